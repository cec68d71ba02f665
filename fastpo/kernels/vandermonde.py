"""`vandermonde`: Σ_n v_n e^(x_n l) for l = 0 .. L-1, S4D's convolution kernel, and its transposed product.

Computed in double, whatever the dtype, and rounded once: powers are products of two factors, e^(x (64 h + j)) =
e^(64 x h) e^(x j), so that there is one complex exponential per term and row, and none per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.kernels.cuda import nvrtc
from fastpo.kernels.cuda import vandermonde as _launch
from fastpo.reference import state_space as reference

# leading dimensions broadcast; with `symmetric`, twice the real part
torch.library.define("fastpo::vandermonde", "(Tensor v, Tensor x, SymInt length, bool symmetric) -> Tensor")
# Σ_l u_l e^(x_n l) and, `with_slope` (else it is empty), Σ_l l u_l e^(x_n l); u is real or complex
torch.library.define(
    "fastpo::vandermonde_moments", "(Tensor u, Tensor x, bool with_slope) -> (Tensor moment, Tensor slope)"
)


@torch.library.register_fake("fastpo::vandermonde")
def _fake(v: Tensor, x: Tensor, length: int, symmetric: bool) -> Tensor:
    leading = torch.broadcast_shapes(v.shape[:-1], x.shape[:-1])
    return v.new_empty((*leading, length), dtype=_checks.real_of(v.dtype) if symmetric else v.dtype)


@torch.library.register_fake("fastpo::vandermonde_moments")
def _fake_moments(u: Tensor, x: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    shape = (*torch.broadcast_shapes(u.shape[:-1], x.shape[:-1]), x.shape[-1])
    return x.new_empty(shape), x.new_empty(shape if with_slope else (0,))


def launched_by(launcher: nvrtc.Launcher) -> dict[str, Callable[..., Any]]:
    """Implementations of the ops that launch the kernels of csrc/cuda from Python."""

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(launcher, *arguments)

    return {"vandermonde": bound(_launch.forward), "vandermonde_moments": bound(_launch.moments)}


_LIBRARY = nvrtc.serve("vandermonde", launched_by)


def _steps(like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], dtype=_checks.real_of(like.dtype), device=like.device)


def _differentiated_again() -> bool:
    """Whether a backward has to be differentiable itself (create_graph)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Vandermonde(torch.autograd.Function):
    """The product with its gradient, which is made of moments."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, x: Tensor, length: int, symmetric: bool) -> Tensor:
        ctx.symmetric = symmetric
        ctx.save_for_backward(v, x)
        return torch.ops.fastpo.vandermonde(v, x, length, symmetric)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, x = ctx.saved_tensors
        needs_v, needs_x = ctx.needs_input_grad[:2]
        conjugate, factor = x.conj().resolve_conj(), 2 if ctx.symmetric else 1
        grad_v = grad_x = slope = None
        if _differentiated_again():
            moment = _Moments.apply(grad, conjugate)
            slope = _Moments.apply(grad * _steps(grad), conjugate) if needs_x else None
        else:
            moment, slope = torch.ops.fastpo.vandermonde_moments(grad, conjugate, needs_x)
        if needs_v:
            grad_v = (factor * moment).sum_to_size(v.shape)
        if needs_x and slope is not None:
            grad_x = (factor * v.conj() * slope).sum_to_size(x.shape)
        return grad_v, grad_x, None, None


class _Moments(torch.autograd.Function):
    """Σ_l u_l e^(x_n l) with its gradient, which is made of products and moments."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor) -> Tensor:
        needs_x = ctx.needs_input_grad[1]
        moment, slope = torch.ops.fastpo.vandermonde_moments(u, x, needs_x)
        ctx.save_for_backward(u, x, slope)
        return moment

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, x, slope = ctx.saved_tensors
        grad_u = grad_x = None
        if ctx.needs_input_grad[0]:
            conjugate, real = x.conj().resolve_conj(), not u.is_complex()
            product = _Vandermonde.apply(grad, conjugate, u.shape[-1], real)
            grad_u = (product / 2 if real else product).sum_to_size(u.shape)
        if ctx.needs_input_grad[1]:
            if _differentiated_again():
                slope = _Moments.apply(u * _steps(u), x)
            grad_x = (grad * slope.conj()).sum_to_size(x.shape)
        return grad_u, grad_x


def _pair(v: object, x: object) -> tuple[Tensor, Tensor]:
    """v and x, (..., N) both."""
    v, x = _checks.complex_array("v", v), _checks.complex_array("x", x)
    _checks.same_device("x", x, "v", v)
    if x.shape[-1] != v.shape[-1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, v {tuple(v.shape)}: both must hold N along the last dimension")
    _checks.broadcast(v=v, x=x)
    return v, x


_GROWTH = "e^(x l) then grows without bound"


def vandermonde(v: Tensor, x: Tensor, length: int, *, symmetric: bool = True) -> Tensor:
    """2 Re Σ_n v_n e^(x_n l) for l = 0 .. length - 1; without `symmetric`, Σ_n v_n e^(x_n l).

    The first is the sum over x and their conjugates, of which v and x then hold one half, and real. Phases are computed
    in double for any length: x l rounded to single precision would lose them. Memory is that of arguments and result.

    Differentiable in v and x any number of times, in torch's convention for complex gradients; the gradient is
    deterministic.

    Args:
        v: complex64 or complex128 (..., N). Also any array with `__dlpack__` or `__cuda_array_interface__`, such as
            CuPy's, as x.
        x: (..., N), the logarithms of the bases. Powers grow, and overflow in the end, where the real part is positive,
            which is warned of where values can be looked at.
        length: L, at least 0.
        symmetric: whether the conjugates are added.

    Returns:
        real (..., L), complex without `symmetric`, with the leading dimensions of v and x broadcast; 0 with N = 0.

    Raises:
        TypeError: an argument is no complex64 or complex128, or `length` no int.
        ValueError: v and x differ in N, leading dimensions do not broadcast, devices differ, or `length` is negative.

    Source: A. Gu, A. Gupta, K. Goel, C. Ré, On the Parameterization and Initialization of Diagonal State Space Models
    (2206.11893).
    """
    v, x = _pair(v, x)
    _checks.no_growth("x", x, _GROWTH)
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"length must be an int, got {type(length).__name__}")
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    dtype = torch.promote_types(v.dtype, x.dtype)
    if not _native.serves("vandermonde", v.device, _checks.real_of(dtype)):
        return reference.vandermonde(v, x, length, symmetric=symmetric)
    return _native.call(_Vandermonde.apply, v.to(dtype), x.to(dtype), length, bool(symmetric))


def vandermonde_transpose(u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """v_n Σ_l u_l e^(x_n l): what an input u, the last step first, leaves in the state of a diagonal system.

    Of a real u the state of the conjugate half is the conjugate. Precision, memory and gradients are those of
    `vandermonde`.

    Args:
        u: (..., L), complex64, complex128, or fp32, fp64.
        v: complex64 or complex128 (..., N).
        x: (..., N), the logarithms of the bases.

    Returns:
        complex (..., N), with the leading dimensions of u, v and x broadcast; 0 with L = 0.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: v and x differ in N, leading dimensions do not broadcast, or devices differ.

    Source: as of `vandermonde`; the original computes it as `log_vandermonde_transpose`.
    """
    u = _checks.complex_array("u", u, real=True)
    v, x = _pair(v, x)
    _checks.no_growth("x", x, _GROWTH)
    _checks.same_device("u", u, "v", v)
    _checks.broadcast(u=u, v=v, x=x)
    dtype = torch.promote_types(torch.promote_types(u.dtype, v.dtype), x.dtype)
    if not _native.serves("vandermonde", v.device, _checks.real_of(dtype)):
        return reference.vandermonde_transpose(u, v, x)
    u = u.to(dtype if u.is_complex() else _checks.real_of(dtype))
    return v.to(dtype) * _native.call(_Moments.apply, u, x.to(dtype))
