"""The op `objective` on CUDA devices without the compiled library: its launch, restated from csrc/cuda/objective.cuh
and csrc/torch/cuda/objective.cpp. Tests compare structs and grids, and run both over the same cases."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpo.kernels.cuda.arguments import DTYPES, SHORT_ROW, WARP, Shape, blocks, contiguous, pointer
from fastpo.kernels.cuda.nvrtc import Launcher

_MAX_SIDES, _MAX_STREAMS, _MAX_COLUMNS, _MAX_HYPER = 2, 6, 4, 64


class Layout(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
        ("boundaries", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("total", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("lengths_are_int64", ctypes.c_bool),
    )


class Stream(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("dtype", ctypes.c_int))


class Objective(ctypes.Structure):
    _fields_ = (
        ("layouts", Layout * _MAX_SIDES),
        ("stream", Stream * _MAX_STREAMS),
        ("column", Stream * _MAX_COLUMNS),
        ("hyper", ctypes.c_double * _MAX_HYPER),
        ("scale", ctypes.c_double),
        ("reward_scale", ctypes.c_double),
        ("rows", ctypes.c_int64),
        ("loss", ctypes.c_void_p),
        ("block_loss", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("rewards", ctypes.c_void_p),
        ("formula", ctypes.c_int),
        ("sides", ctypes.c_int),
        ("models", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("use_lengths", ctypes.c_int),
        ("is_double", ctypes.c_bool),
    )


class Spread(ctypes.Structure):
    _fields_ = (
        ("layout", Layout),
        ("rows", ctypes.c_int64),
        ("grad", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("is_double", ctypes.c_bool),
        ("grad_per_row", ctypes.c_bool),
    )


class LossSum(ctypes.Structure):
    _fields_ = (
        ("block_loss", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("denominator", ctypes.c_double),
        ("loss", ctypes.c_void_p),
        ("is_double", ctypes.c_bool),
    )


class SpreadSides(ctypes.Structure):
    _fields_ = (("side", Spread * _MAX_SIDES), ("sides", ctypes.c_int))


_LONG_TEAM, _MOST_THREADS, _MOST_ROWS = 128, 512, 32
_BUSY_BLOCKS, _SUM_THREADS = 1024, 512


def objective_shape(rows: int, tokens: int, streams: int) -> Shape:
    if tokens <= 1:
        threads = per_block = 256
        team = 1
    elif tokens <= SHORT_ROW:
        threads, team = 256, WARP
        per_block = min(max(rows // _BUSY_BLOCKS, threads // (WARP * streams)), _MOST_ROWS)
    else:
        threads, team, per_block = min(_LONG_TEAM * streams, _MOST_THREADS), _LONG_TEAM, 1
    return Shape(blocks(rows, per_block), threads, team, per_block)


def spread_shape(items: int, tokens: int) -> Shape:
    threads, team = 256, WARP if tokens <= SHORT_ROW else _LONG_TEAM
    return Shape(blocks(items, threads // team), threads, team, threads // team)


def _rows(stream: Tensor, boundaries: Tensor | None) -> int:
    return stream.shape[0] if boundaries is None else boundaries.shape[0] - 1


def _tokens_per_row(streams: list[Tensor], rows: int) -> int:
    return max(1, *(t.numel() // max(1, rows) for t in streams))


def _layout(stream: Tensor, mask: Tensor | None, boundaries: Tensor | None, lengths: Tensor | None) -> Layout:
    tokens = stream.shape[1] if boundaries is None and stream.dim() == 2 else 1
    return Layout(
        mask=pointer(mask),
        mask_stride=tokens,
        boundaries=pointer(boundaries),
        tokens=tokens,
        total=stream.numel(),
        lengths=pointer(lengths),
        lengths_are_int64=lengths is not None and lengths.dtype == torch.int64,
    )


def forward(
    launcher: Launcher,
    formula: int,
    streams: list[Tensor],
    masks: list[Tensor | None],
    cu_seqlens: list[Tensor | None],
    lengths: list[Tensor | None],
    columns: list[Tensor],
    hyper: list[float],
    use_lengths: int,
    reduce: bool,
    denominator: float | None,
    reward_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns: loss, slopes, rewards."""
    masks, cu_seqlens, lengths = contiguous(masks), contiguous(cu_seqlens), contiguous(lengths)
    rows, sides = _rows(streams[0], cu_seqlens[0]), len(masks)
    is_double = any(s.dtype == torch.float64 for s in streams)
    # tokens of a row must be adjacent; rows, and summed streams, may have any stride
    streams = [
        s.contiguous() if (s.dim() == 2 or cu_seqlens[i % sides] is not None) and s.stride(-1) != 1 else s
        for i, s in enumerate(streams)
    ]
    shape = objective_shape(rows, _tokens_per_row(streams, rows), len(streams))
    loss = streams[0].new_empty(() if reduce else (rows,), dtype=torch.float64 if is_double else torch.float32)
    slopes, rewards = loss.new_empty((sides, rows)), loss.new_empty((sides, rows))
    block_loss = loss.new_empty(shape.blocks, dtype=torch.float64) if reduce else None
    divisor = float(rows) if denominator is None else denominator
    o = Objective(
        scale=1 / divisor if divisor else 0.0,
        reward_scale=reward_scale,
        rows=rows,
        loss=None if reduce else loss.data_ptr(),
        block_loss=pointer(block_loss),
        slopes=slopes.data_ptr(),
        rewards=rewards.data_ptr(),
        formula=formula,
        sides=sides,
        models=len(streams) // sides,
        columns=len(columns),
        use_lengths=use_lengths,
        is_double=is_double,
    )
    o.hyper[: len(hyper)] = hyper
    for side in range(sides):
        o.layouts[side] = _layout(streams[side], masks[side], cu_seqlens[side], lengths[side])
    for i, s in enumerate(streams):
        o.stream[i] = Stream(s.data_ptr(), s.stride(0) if s.dim() else 1, DTYPES[s.dtype])
    for i, s in enumerate(columns):
        o.column[i] = Stream(s.data_ptr(), s.stride(0), DTYPES[s.dtype])
    if rows:
        launcher.launch(
            "objective_f64" if is_double else "objective_f32",
            shape.blocks,
            shape.threads,
            [o, shape],
            reads=[*streams, *masks, *cu_seqlens, *lengths, *columns],
            writes=[slopes, rewards, block_loss if reduce else loss],
        )
    elif block_loss is not None:
        block_loss.zero_()
    if block_loss is not None:
        total = LossSum(block_loss.data_ptr(), shape.blocks, divisor, loss.data_ptr(), is_double)
        launcher.launch("objective_sum", 1, _SUM_THREADS, [total], reads=[block_loss], writes=[loss])
    return loss, slopes, rewards


def backward(
    launcher: Launcher,
    grad: Tensor,
    slopes: Tensor,
    streams: list[Tensor],
    masks: list[Tensor | None],
    cu_seqlens: list[Tensor | None],
    needed: int,
) -> list[Tensor]:
    """What the op's backward returns: the gradient of each stream, empty where it is not needed."""
    grad, slopes = grad.contiguous(), slopes.contiguous()
    masks, cu_seqlens = contiguous(masks), contiguous(cu_seqlens)
    out = [s.new_empty(s.shape if needed >> i & 1 else 0) for i, s in enumerate(streams)]
    rows = slopes.shape[1]
    arguments = SpreadSides(sides=0)
    for i, s in enumerate(streams):
        if not needed >> i & 1:
            continue
        arguments.side[arguments.sides] = Spread(
            layout=_layout(s, masks[i], cu_seqlens[i], None),
            rows=rows,
            grad=grad.data_ptr(),
            slopes=slopes[i].data_ptr(),
            gradient=out[i].data_ptr(),
            dtype=DTYPES[s.dtype],
            is_double=slopes.dtype == torch.float64,
            grad_per_row=grad.dim() == 1,
        )
        arguments.sides += 1
        if cu_seqlens[i] is not None:
            out[i].zero_()  # tokens that no sequence has
    if arguments.sides:
        shape = spread_shape(rows * arguments.sides, _tokens_per_row(streams, rows))
        launcher.launch(
            "objective_spread",
            shape.blocks,
            shape.threads,
            [arguments, shape],
            reads=[grad, slopes, *masks, *cu_seqlens],
            writes=out,
        )
    return out
