"""The op vandermonde on CUDA devices without the compiled library: its launches, restated from
csrc/torch/state_space.h and csrc/cuda/vandermonde.cu. Tests compare structs and grids, and run both over the same
cases."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpo.kernels.cuda.arguments import PART_THREADS, Leading, Operand, Parts, blocks, broadcast, parts_of
from fastpo.kernels.cuda.nvrtc import Launcher

_THREADS, _TILE, _MOMENT_WIDTH = 256, 2048, 4


class Vandermonde(ctypes.Structure):
    _fields_ = (
        ("leading", Leading),
        ("v", Operand),
        ("x", Operand),
        ("u", Operand),
        ("rows", ctypes.c_int64),
        ("terms", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("moment", ctypes.c_void_p),
        ("slope", ctypes.c_void_p),
        ("real", ctypes.c_bool),
        ("is_double", ctypes.c_bool),
    )


class VandermondeShape(ctypes.Structure):
    _fields_ = (("blocks", ctypes.c_int64), ("tiles", ctypes.c_int64), ("threads", ctypes.c_int))


def vandermonde_shape(rows: int, length: int) -> VandermondeShape:
    tiles = -(-length // _TILE)
    return VandermondeShape(blocks(rows * tiles, 1), tiles, _THREADS)


def moment_parts(rows: int, terms: int, length: int) -> Parts:
    return parts_of(rows, terms, length, _MOMENT_WIDTH)


def forward(launcher: Launcher, v: Tensor, x: Tensor, length: int, symmetric: bool) -> Tensor:
    """What the op returns."""
    shape, leading, operands, kept = broadcast([v, x])
    out = x.new_empty((*shape, length), dtype=x.dtype.to_real() if symmetric else x.dtype)
    a = Vandermonde(
        leading=leading,
        v=operands[0],
        x=operands[1],
        rows=shape.numel(),
        terms=x.shape[-1],
        length=length,
        out=out.data_ptr(),
        real=symmetric,
        is_double=x.dtype == torch.complex128,
    )
    if out.numel():
        s = vandermonde_shape(a.rows, length)
        launcher.launch("vandermonde", s.blocks, s.threads, [a, s], reads=kept, writes=[out])
    return out


def moments(launcher: Launcher, u: Tensor, x: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    """What the op of the moments returns."""
    shape, leading, operands, kept = broadcast([u, x])
    moment = x.new_empty((*shape, x.shape[-1]))
    slope = x.new_empty(moment.shape if with_slope else (0,))
    a = Vandermonde(
        leading=leading,
        x=operands[1],
        u=operands[0],
        rows=shape.numel(),
        terms=x.shape[-1],
        length=u.shape[-1],
        moment=moment.data_ptr(),
        slope=slope.data_ptr() if with_slope else None,
        real=not u.is_complex(),
        is_double=x.dtype == torch.complex128,
    )
    if moment.numel():
        p = moment_parts(a.rows, a.terms, a.length)
        sums = x.new_empty(p.parts * moment.numel() * 4 if p.parts > 1 else 0, dtype=torch.float64)
        p.sums = sums.data_ptr() if p.parts > 1 else None
        writes = [moment, slope, sums]
        launcher.launch("vandermonde_moments", p.blocks, p.threads, [a, p], reads=kept, writes=writes)
        if p.parts > 1:
            each = blocks(moment.numel(), PART_THREADS)
            launcher.launch("vandermonde_moment_sums", each, p.threads, [a, p], reads=[sums], writes=[moment, slope])
    return moment, slope
