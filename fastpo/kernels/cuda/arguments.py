"""What the launches of csrc/cuda from Python share: structs, grids and pointers, restated from the C++ side."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
WARP, SHORT_ROW, MOST_BLOCKS = 32, 1024, 16384


class Shape(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_int64),
        ("threads", ctypes.c_int),
        ("team", ctypes.c_int),
        ("rows", ctypes.c_int),
    )


class Numbers(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int))


def blocks(items: int, per_block: int) -> int:
    return min(max(-(-items // per_block), 1), MOST_BLOCKS)


def team_shape(rows: int, tokens: int) -> Shape:
    threads, team = 256, WARP if tokens <= SHORT_ROW else 256
    return Shape(blocks(rows, threads // team), threads, team, threads // team)


MAX_LEADING = 8


class Leading(ctypes.Structure):
    _fields_ = (("dims", ctypes.c_int), ("sizes", ctypes.c_int64 * MAX_LEADING))


class Operand(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * MAX_LEADING))


def broadcast(tensors: list[Tensor]) -> tuple[torch.Size, Leading, list[Operand], list[Tensor]]:
    """The leading dimensions of tensors (..., K), with adjacent ones merged where that is the same, as operands of
    contiguous rows; and the tensors, of which those whose rows are not contiguous are copies."""
    kept = [t if t.shape[-1] < 2 or t.stride(-1) == 1 else t.contiguous() for t in tensors]
    shape = torch.broadcast_shapes(*(t.shape[:-1] for t in kept))
    views = [t.expand(*shape, t.shape[-1]) for t in kept]
    leading, operands = Leading(), [Operand(data=t.data_ptr()) for t in kept]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        strides, last = [t.stride(d) for t in views], leading.dims - 1
        merges = last >= 0 and all(o.strides[last] == size * s for o, s in zip(operands, strides, strict=True))
        if not merges:
            if leading.dims == MAX_LEADING:
                raise RuntimeError(f"more than {MAX_LEADING} leading dimensions")
            last = leading.dims
            leading.dims, leading.sizes[last] = last + 1, 1
        leading.sizes[last] *= size
        for o, s in zip(operands, strides, strict=True):
            o.strides[last] = s
    return shape, leading, operands, kept


class Parts(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_int64),
        ("parts", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("threads", ctypes.c_int),
        ("sums", ctypes.c_void_p),
    )


PART_THREADS, _PART_GRAIN, _ENOUGH_WARPS = 128, 1024, 4096


def parts_of(rows: int, terms: int, length: int, per_warp: int) -> Parts:
    groups, grains = rows * -(-terms // per_warp), max(-(-length // _PART_GRAIN), 1)
    wanted = min(max(_ENOUGH_WARPS // max(groups, 1), 1), grains)
    each = -(-grains // wanted)
    parts = -(-grains // each)
    return Parts(blocks(groups * parts, PART_THREADS // WARP), parts, each * _PART_GRAIN, PART_THREADS)


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def contiguous(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def numbers(t: Tensor | None) -> Numbers:
    return Numbers() if t is None else Numbers(t.data_ptr(), DTYPES[t.dtype])
