"""`cauchy`: Σ_n v_n / (z_l - w_n), the product on which S4's convolution kernel stands, with its gradients.

Terms are made and added up in registers, so that neither direction holds (..., L, N) of anything. The denominators are
differences z - w, and their squared moduli sums of two squares: multiplied out, they would lose all digits near a pole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.kernels.cuda import cauchy as _launch
from fastpo.kernels.cuda import nvrtc
from fastpo.reference import state_space as reference

# which gradients are asked of the backward, as bits
_V, _Z, _W = 1, 2, 4

# leading dimensions broadcast
torch.library.define("fastpo::cauchy", "(Tensor v, Tensor z, Tensor w, bool symmetric) -> Tensor")
# each in the broadcast leading dimensions, to be summed over those that its input lacks; what is not `wanted` is empty
torch.library.define(
    "fastpo::cauchy_backward",
    "(Tensor grad, Tensor v, Tensor z, Tensor w, bool symmetric, int wanted) -> "
    "(Tensor grad_v, Tensor grad_z, Tensor grad_w)",
)


def _leading(*tensors: Tensor) -> torch.Size:
    return torch.broadcast_shapes(*(t.shape[:-1] for t in tensors))


@torch.library.register_fake("fastpo::cauchy")
def _fake(v: Tensor, z: Tensor, w: Tensor, symmetric: bool) -> Tensor:
    return v.new_empty((*_leading(v, z, w), z.shape[-1]))


@torch.library.register_fake("fastpo::cauchy_backward")
def _fake_backward(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, symmetric: bool, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    leading = _leading(v, z, w)

    def gradient(bit: int, columns: int) -> Tensor:
        return v.new_empty((*leading, columns) if wanted & bit else (0,))

    return gradient(_V, v.shape[-1]), gradient(_Z, z.shape[-1]), gradient(_W, v.shape[-1])


def launched_by(launcher: nvrtc.Launcher) -> dict[str, Callable[..., Any]]:
    """Implementations of the ops that launch the kernels of csrc/cuda from Python."""

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(launcher, *arguments)

    return {"cauchy": bound(_launch.forward), "cauchy_backward": bound(_launch.backward)}


_LIBRARY = nvrtc.serve("cauchy", launched_by)


class _Cauchy(torch.autograd.Function):
    """The op with its gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, z: Tensor, w: Tensor, symmetric: bool) -> Tensor:
        ctx.symmetric = symmetric
        ctx.save_for_backward(v, z, w)
        return torch.ops.fastpo.cauchy(v, z, w, symmetric)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable_backward(ctx, grad), None
        wanted = sum(bit for bit, n in zip((_V, _Z, _W), needed, strict=True) if n)
        found = torch.ops.fastpo.cauchy_backward(grad, *inputs, ctx.symmetric, wanted)
        grads = [g.sum_to_size(t.shape) if n else None for g, t, n in zip(found, inputs, needed, strict=True)]
        return *grads, None


def _differentiable_backward(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradient as a function that can be differentiated again (create_graph), from the reference."""
    # views, so that each gradient is that of its own argument, also where one is made from the other
    views = [t.view_as(t) for t in ctx.saved_tensors]
    out = reference.cauchy(*views, symmetric=ctx.symmetric)
    needed = ctx.needs_input_grad[:3]
    inputs = [t for t, n in zip(views, needed, strict=True) if n]
    found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True, allow_unused=True, materialize_grads=True))
    return [next(found) if n else None for n in needed]


def cauchy(v: Tensor, z: Tensor, w: Tensor, *, symmetric: bool = True) -> Tensor:
    """Σ_n v_n / (z_l - w_n) + conj(v_n) / (z_l - conj(w_n)): rational functions with poles w, at the nodes z.

    The second terms are those of the conjugate poles of a real system, of which v and w then hold one half; without
    `symmetric` they are left out. complex64 is computed in double and rounded once: an error is at most 4 ulp of the
    sum or of its largest term, whichever is larger, near poles too. On a GPU whose double precision has less than half
    the rate of single, complex64 is computed in single: each term is right to 4 ulp, and their sum is compensated. Each
    term of complex128 is right to 4 ulp, for |z - w| between 1e-150 and 1e150, and their sum is a plain one. At a pole
    the sum is inf, in the components that v has, and gradients to which that node belongs are not finite. Memory is
    that of arguments and result.

    Differentiable in v, z and w, in torch's convention for complex gradients; the gradient is deterministic. A gradient
    of the gradient is the reference's, which holds every term.

    Args:
        v: complex64 or complex128 (..., N), the residues. Also any array with `__dlpack__` or
            `__cuda_array_interface__`, such as CuPy's, as the others.
        z: (..., L), the nodes.
        w: (..., N), the poles. Poles with a positive real part are those of an unstable system, and warned of where
            values can be looked at.
        symmetric: whether the conjugate terms are added. A real pole then counts twice.

    Returns:
        complex (..., L), with the leading dimensions of v, z and w broadcast; 0 with N = 0.

    Raises:
        TypeError: an argument is no complex64 or complex128.
        ValueError: v and w differ in N, leading dimensions do not broadcast, or devices differ.

    Source: A. Gu, K. Goel, C. Ré, Efficiently Modeling Long Sequences with Structured State Spaces (2111.00396),
    Algorithm 1.
    """
    v, z, w = (_checks.complex_array(n, t) for n, t in {"v": v, "z": z, "w": w}.items())
    _checks.same_device("z", z, "v", v)
    _checks.same_device("w", w, "v", v)
    if w.shape[-1] != v.shape[-1]:
        raise ValueError(f"w has shape {tuple(w.shape)}, v {tuple(v.shape)}: both must hold N along the last dimension")
    _checks.broadcast(v=v, z=z, w=w)
    _checks.no_growth("w", w, "poles of an unstable system")
    dtype = torch.promote_types(torch.promote_types(v.dtype, z.dtype), w.dtype)
    v, z, w = v.to(dtype), z.to(dtype), w.to(dtype)
    if not _native.serves("cauchy", v.device, _checks.real_of(dtype)):
        return reference.cauchy(v, z, w, symmetric=symmetric)
    return _native.call(_Cauchy.apply, v, z, w, bool(symmetric))
