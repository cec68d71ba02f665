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


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def contiguous(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def numbers(t: Tensor | None) -> Numbers:
    return Numbers() if t is None else Numbers(t.data_ptr(), DTYPES[t.dtype])
