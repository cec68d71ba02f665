"""The op `listwise` on CUDA devices without the compiled library: its launch, restated from csrc/torch/listwise.h and
csrc/cuda/listwise.cu. Tests compare structs, and run both over the same cases."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpo.kernels.cuda.arguments import WARP, Numbers, Shape, blocks, numbers, pointer
from fastpo.kernels.cuda.nvrtc import Launcher

SHORT_LIST, _THREADS = 64, 256


class Listwise(ctypes.Structure):
    _fields_ = (
        ("policy", Numbers),
        ("other", Numbers),
        ("targets", Numbers),
        ("mask", ctypes.c_void_p),
        ("boundaries", ctypes.c_void_p),
        ("lists", ctypes.c_int64),
        ("items", ctypes.c_int64),
        ("total", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("target_scale", ctypes.c_double),
        ("weight", ctypes.c_double),
        ("factor", ctypes.c_double),
        ("pair_mean", ctypes.c_bool),
        ("is_double", ctypes.c_bool),
        ("kind", ctypes.c_int),
        ("list_loss", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


class ListSum(ctypes.Structure):
    _fields_ = (
        ("list_loss", ctypes.c_void_p),
        ("lists", ctypes.c_int64),
        ("denominator", ctypes.c_double),
        ("loss", ctypes.c_void_p),
        ("is_double", ctypes.c_bool),
        ("reduce", ctypes.c_bool),
    )


def list_shape(lists: int, items: int) -> Shape:
    """A warp per list, or a block for long ones."""
    team = WARP if items <= SHORT_LIST else _THREADS
    return Shape(blocks(lists, _THREADS // team), _THREADS, team, _THREADS // team)


def forward(
    launcher: Launcher,
    kind: int,
    policy: Tensor,
    other: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    given: list[float],
    pair_mean: bool,
    reduce: bool,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns: loss, slopes, scores."""
    policy, targets = policy.contiguous(), targets.contiguous()
    other, mask, cu_seqlens = (None if t is None else t.contiguous() for t in (other, mask, cu_seqlens))
    lists = policy.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    is_double = any(t is not None and t.dtype == torch.float64 for t in (policy, other))
    slopes = policy.new_empty(policy.shape, dtype=torch.float64 if is_double else torch.float32)
    scores, loss = torch.empty_like(slopes), slopes.new_empty(() if reduce else (lists,))
    if cu_seqlens is not None:
        slopes.zero_()  # items that no list has
        scores.zero_()
    list_loss, scratch = (slopes.new_empty(n, dtype=torch.float64) for n in (lists, policy.numel()))
    divisor = float(lists) if denominator is None else denominator
    o = Listwise(
        policy=numbers(policy),
        other=numbers(other),
        targets=numbers(targets),
        mask=pointer(mask),
        boundaries=pointer(cu_seqlens),
        lists=lists,
        items=policy.shape[1] if cu_seqlens is None else 0,
        total=policy.numel(),
        scale=given[0],
        target_scale=given[1],
        weight=given[2],
        factor=1 / divisor if divisor else 0.0,
        pair_mean=pair_mean,
        is_double=is_double,
        kind=kind,
        list_loss=list_loss.data_ptr(),
        slopes=slopes.data_ptr(),
        scores=scores.data_ptr(),
        scratch=scratch.data_ptr(),
    )
    shape = list_shape(lists, policy.numel() // max(1, lists))
    if lists:
        launcher.launch(
            "listwise_f64" if is_double else "listwise_f32",
            shape.blocks,
            shape.threads,
            [o, shape],
            reads=[policy, other, targets, mask, cu_seqlens],
            writes=[list_loss, slopes, scores, scratch],
        )
    total = ListSum(list_loss.data_ptr(), lists, divisor, loss.data_ptr(), is_double, reduce)
    launcher.launch("listwise_sum", 1, _THREADS, [total], reads=[list_loss], writes=[loss])
    return loss, slopes, scores
