"""The op cauchy on CUDA devices without the compiled library: its launches, restated from csrc/torch/state_space.h and
csrc/cuda/cauchy.cu. Tests compare structs and grids, and run both over the same cases."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpo.kernels.cuda.arguments import PART_THREADS, Leading, Operand, Parts, blocks, broadcast, parts_of
from fastpo.kernels.cuda.nvrtc import Launcher

_THREADS = 128


class Cauchy(ctypes.Structure):
    _fields_ = (
        ("leading", Leading),
        ("v", Operand),
        ("w", Operand),
        ("z", Operand),
        ("grad", Operand),
        ("rows", ctypes.c_int64),
        ("poles", ctypes.c_int64),
        ("nodes", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("grad_v", ctypes.c_void_p),
        ("grad_z", ctypes.c_void_p),
        ("grad_w", ctypes.c_void_p),
        ("symmetric", ctypes.c_bool),
        ("is_double", ctypes.c_bool),
    )


class CauchyShape(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
        ("threads", ctypes.c_int),
    )


def _width(in_double: bool) -> int:
    """Nodes of a thread, and poles of a warp."""
    return 2 if in_double else 4


def cauchy_shape(rows: int, nodes: int, in_double: bool) -> CauchyShape:
    tiles = -(-nodes // (_THREADS * _width(in_double)))
    return CauchyShape(blocks(rows * tiles, 1), tiles, _THREADS)


def cauchy_parts(rows: int, poles: int, nodes: int, in_double: bool) -> Parts:
    return parts_of(rows, poles, nodes, _width(in_double))


def _arithmetic(launcher: Launcher, v: Tensor) -> tuple[str, bool]:
    """Which kernels are run, and whether they compute in double."""
    if v.dtype == torch.complex128:
        return "f64", True
    return ("f32_in_f64", True) if launcher.has_fast_double(v.device) else ("f32", False)


def _prepare(tensors: list[Tensor], symmetric: bool) -> tuple[torch.Size, Cauchy, list[Tensor]]:
    """Of v, z, w and, for the backward, the gradient."""
    shape, leading, operands, kept = broadcast(tensors)
    v, z, w = operands[:3]
    a = Cauchy(
        leading=leading,
        v=v,
        w=w,
        z=z,
        rows=shape.numel(),
        poles=kept[0].shape[-1],
        nodes=kept[1].shape[-1],
        symmetric=symmetric,
        is_double=kept[0].dtype == torch.complex128,
    )
    if len(operands) == 4:
        a.grad = operands[3]
    return shape, a, kept


def forward(launcher: Launcher, v: Tensor, z: Tensor, w: Tensor, symmetric: bool) -> Tensor:
    """What the op returns."""
    shape, a, kept = _prepare([v, z, w], symmetric)
    out = v.new_empty((*shape, a.nodes))
    a.out = out.data_ptr()
    if out.numel():
        name, in_double = _arithmetic(launcher, v)
        s = cauchy_shape(a.rows, a.nodes, in_double)
        launcher.launch(f"cauchy_{name}", s.blocks, s.threads, [a, s], reads=kept, writes=[out])
    return out


def backward(
    launcher: Launcher, grad: Tensor, v: Tensor, z: Tensor, w: Tensor, symmetric: bool, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op's backward returns: the gradients of v, z and w, empty where not wanted."""
    shape, a, kept = _prepare([v, z, w, grad], symmetric)
    columns = (a.poles, a.nodes, a.poles)
    outs = [v.new_empty((*shape, n) if wanted >> bit & 1 else (0,)) for bit, n in enumerate(columns)]
    a.grad_v, a.grad_z, a.grad_w = (t.data_ptr() if wanted >> bit & 1 else None for bit, t in enumerate(outs))
    name, in_double = _arithmetic(launcher, v)
    if outs[1].numel():
        s = cauchy_shape(a.rows, a.nodes, in_double)
        launcher.launch(f"cauchy_slopes_{name}", s.blocks, s.threads, [a, s], reads=kept, writes=[outs[1]])
    if outs[0].numel() or outs[2].numel():
        p = cauchy_parts(a.rows, a.poles, a.nodes, in_double)
        count = a.rows * a.poles
        sums = v.new_empty(p.parts * count * 4 if p.parts > 1 else 0, dtype=torch.float64)
        p.sums = sums.data_ptr() if p.parts > 1 else None
        writes = [outs[0], outs[2], sums]
        launcher.launch(f"cauchy_poles_{name}", p.blocks, p.threads, [a, p], reads=kept, writes=writes)
        if p.parts > 1:
            launcher.launch(
                "cauchy_pole_sums",
                blocks(count, PART_THREADS),
                p.threads,
                [a, p],
                reads=[*kept, sums],
                writes=[outs[0], outs[2]],
            )
    return outs[0], outs[1], outs[2]
