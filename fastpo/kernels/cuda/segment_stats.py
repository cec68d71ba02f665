"""The op segment_stats on CUDA devices without the compiled library: its launch, restated from
csrc/torch/segment_stats.h and csrc/cuda/segment_stats.cu. Tests compare structs, and run both over the same cases."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpo.kernels.cuda.arguments import Numbers, contiguous, numbers, pointer, team_shape
from fastpo.kernels.cuda.nvrtc import Launcher


class Segments(ctypes.Structure):
    _fields_ = (
        ("values", Numbers),
        ("weights", Numbers),
        ("mask", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("boundaries", ctypes.c_void_p),
        ("segments", ctypes.c_int64),
        ("members", ctypes.c_int64),
        ("total", ctypes.c_int64),
        ("statistics", ctypes.c_void_p),
        ("normalized", ctypes.c_void_p),
        ("informative", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("ddof", ctypes.c_int),
        ("mode", ctypes.c_int),
        ("skip_nan", ctypes.c_bool),
        ("raw_singletons", ctypes.c_bool),
        ("is_double", ctypes.c_bool),
        ("outside", ctypes.c_void_p),
    )


def forward(
    launcher: Launcher,
    values: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    boundaries: Tensor | None,
    mode: int,
    ddof: int,
    eps: float,
    skip_nan: bool,
    raw_singletons: bool,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns: statistics, normalised members, which of them are informative."""
    values, weights = values.contiguous(), None if weights is None else weights.double().contiguous()
    mask, order, boundaries = contiguous([mask, order, boundaries])
    segments = values.shape[0] if boundaries is None else boundaries.shape[0] - 1
    is_double = values.dtype == torch.float64
    dtype = torch.float64 if is_double else torch.float32
    wants = [bool(wanted >> bit & 1) for bit in range(3)]
    statistics = values.new_empty((6, segments) if wants[0] else (0,), dtype=torch.float64)
    normalized = values.new_empty(values.shape if wants[1] else (0,), dtype=dtype)
    informative = values.new_empty(values.shape if wants[2] else (0,), dtype=torch.bool)
    if boundaries is not None:
        # what no segment has and no boundary explains
        normalized.fill_(torch.nan)
        informative.zero_()
    outs = [statistics, normalized, informative]
    places = [out.data_ptr() if want else None for out, want in zip(outs, wants, strict=True)]
    s = Segments(
        values=numbers(values),
        weights=numbers(weights),
        mask=pointer(mask),
        order=pointer(order),
        boundaries=pointer(boundaries),
        segments=segments,
        members=0 if boundaries is not None else values.shape[1],
        total=values.numel(),
        statistics=places[0],
        normalized=places[1],
        informative=places[2],
        eps=eps,
        ddof=ddof,
        mode=mode,
        skip_nan=skip_nan,
        raw_singletons=raw_singletons,
        is_double=is_double,
    )
    shape = team_shape(segments, values.numel() // max(1, segments))
    if segments or boundaries is not None:
        launcher.launch(
            "segment_stats",
            shape.blocks,
            shape.threads,
            [s, shape],
            reads=[values, weights, mask, order, boundaries],
            writes=outs,
        )
    return statistics, normalized, informative
