"""The ops of affine_scan on CUDA devices without the compiled library: their launch, restated from
csrc/torch/affine_scan.h and csrc/cuda/affine_scan.cu. Tests compare structs and grids, and run both over the same
cases."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpo.kernels.cuda.arguments import Numbers, contiguous, numbers, pointer, team_shape
from fastpo.kernels.cuda.nvrtc import Launcher

_AFFINE, _ADJOINT, _ADVANTAGE = 0, 1, 2
_MAX_STREAMS = 4


class Scan(ctypes.Structure):
    _fields_ = (
        ("stream", Numbers * _MAX_STREAMS),
        ("initial", Numbers),
        ("mask", ctypes.c_void_p),
        ("terminated", ctypes.c_void_p),
        ("truncated", ctypes.c_void_p),
        ("repeat", ctypes.c_void_p),
        ("boundaries", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("total", ctypes.c_int64),
        ("out", ctypes.c_void_p * 2),
        ("last", ctypes.c_void_p),
        ("gamma", ctypes.c_double),
        ("lambda_", ctypes.c_double),
        ("rho_bar", ctypes.c_double),
        ("c_bar", ctypes.c_double),
        ("composites", ctypes.c_void_p),
        ("chunks", ctypes.c_int64),
        ("phase", ctypes.c_int),
        ("kind", ctypes.c_int),
        ("reverse", ctypes.c_bool),
        ("holes", ctypes.c_bool),
        ("is_double", ctypes.c_bool),
    )


def _run(
    launcher: Launcher,
    kind: int,
    streams: Sequence[Tensor | None],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    reverse: bool,
    wanted: tuple[bool, bool, bool],
    flags: Sequence[Tensor | None] = (None, None, None),
    hyper: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    holes: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two outputs per token and one per row, empty where not wanted; `flags` are terminated, truncated, repeat."""
    streams, (mask, boundaries, initial) = contiguous(list(streams)), contiguous([mask, cu_seqlens, initial])
    flags = contiguous(list(flags))
    like = streams[0]
    assert like is not None
    rows = like.shape[0] if boundaries is None else boundaries.shape[0] - 1
    is_double = any(t is not None and t.dtype == torch.float64 for t in (*streams, initial))
    dtype = torch.float64 if is_double else torch.float32
    # what no row has and no boundary explains
    fill = None if boundaries is None else torch.nan
    outs = []
    for keep in wanted[:2]:
        out = like.new_empty(like.shape if keep else (0,), dtype=dtype)
        outs.append(out if fill is None else out.fill_(fill))
    last = like.new_empty((rows,) if wanted[2] else (0,), dtype=dtype)
    s = Scan(
        initial=numbers(initial),
        mask=pointer(mask),
        terminated=pointer(flags[0]),
        truncated=pointer(flags[1]),
        repeat=pointer(flags[2]),
        boundaries=pointer(boundaries),
        rows=rows,
        tokens=0 if boundaries is not None else like.shape[1],
        total=like.numel(),
        last=last.data_ptr() if wanted[2] else None,
        gamma=hyper[0],
        lambda_=hyper[1],
        rho_bar=hyper[2],
        c_bar=hyper[3],
        chunks=1,
        kind=kind,
        reverse=reverse,
        holes=holes,
        is_double=is_double,
    )
    for i, t in enumerate(streams):
        s.stream[i] = numbers(t)
    for i, (out, keep) in enumerate(zip(outs, wanted, strict=False)):
        s.out[i] = out.data_ptr() if keep else None
    shape = team_shape(rows, like.numel() // max(1, rows))
    if rows or boundaries is not None:
        launcher.launch(
            "affine_scan",
            shape.blocks,
            shape.threads,
            [s, shape],
            reads=[*streams, mask, boundaries, initial, *flags],
            writes=[*outs, last],
        )
    return outs[0], outs[1], last


def forward(
    launcher: Launcher,
    a: Tensor,
    b: Tensor,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """What the op returns: x, and x before each step."""
    return _run(launcher, _AFFINE, (a, b), mask, cu_seqlens, initial, reverse, (True, keep, False))[:2]


def backward(
    launcher: Launcher,
    grad: Tensor,
    a: Tensor,
    before: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op's backward returns: the gradients of a, of b and of the initial x."""
    streams = (a, grad, before)
    return _run(launcher, _ADJOINT, streams, mask, cu_seqlens, None, not reverse, (True, True, True))


def advantages(
    launcher: Launcher,
    rewards: Tensor,
    values: Tensor | None,
    next_values: Tensor | None,
    log_ratios: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    repeat: Tensor | None,
    gamma: float,
    lam: float,
    rho_bar: float,
    c_bar: float,
    skip: bool,
) -> tuple[Tensor, Tensor]:
    """What the op returns: advantages and returns."""
    streams, flags = (rewards, values, next_values, log_ratios), (terminated, truncated, repeat)
    hyper, wanted = (gamma, lam, rho_bar, c_bar), (True, True, False)
    return _run(launcher, _ADVANTAGE, streams, mask, cu_seqlens, bootstrap, True, wanted, flags, hyper, not skip)[:2]
