"""`affine_scan`: x_t = a_t x_(t+1) + b_t along each row, and the returns and advantages that are such scans.

One kernel walks the rows. For the scan itself a and b are given; for its gradient they are made of the upstream
gradient; for advantages, of rewards, values and log-ratios (csrc/formulas/recurrence.h), so that temporal differences,
recursion and returns are one launch. It computes in double and rounds once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.kernels.cuda import affine_scan as _launch
from fastpo.kernels.cuda import nvrtc
from fastpo.reference import scan as reference

# `before` is x before each step, empty unless `keep`
torch.library.define(
    "fastpo::affine_scan",
    "(Tensor a, Tensor b, Tensor? initial, Tensor? mask, Tensor? cu_seqlens, bool reverse, bool keep) -> "
    "(Tensor x, Tensor before)",
)
# of a, of b and of the initial x; `reverse` is the forward's
torch.library.define(
    "fastpo::affine_scan_backward",
    "(Tensor grad, Tensor a, Tensor before, Tensor? mask, Tensor? cu_seqlens, bool reverse) -> "
    "(Tensor grad_a, Tensor grad_b, Tensor grad_initial)",
)
torch.library.define(
    "fastpo::advantages",
    "(Tensor rewards, Tensor? values, Tensor? next_values, Tensor? log_ratios, Tensor? terminated, Tensor? truncated, "
    "Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap, Tensor? repeat, float gamma, float lam, float rho_bar, "
    "float c_bar, bool skip) -> (Tensor advantages, Tensor returns)",
)


def _accumulator(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


@torch.library.register_fake("fastpo::affine_scan")
def _fake(
    a: Tensor,
    b: Tensor,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    x = a.new_empty(a.shape, dtype=_accumulator(a, b, initial))
    return x, x.new_empty(a.shape if keep else (0,))


@torch.library.register_fake("fastpo::affine_scan_backward")
def _fake_backward(
    grad: Tensor, a: Tensor, before: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grad_a = a.new_empty(a.shape, dtype=_accumulator(a, grad, before))
    return grad_a, grad_a.new_empty(a.shape), grad_a.new_empty((rows,))


@torch.library.register_fake("fastpo::advantages")
def _fake_advantages(
    rewards: Tensor,
    values: Tensor | None,
    next_values: Tensor | None,
    log_ratios: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    dtype = _accumulator(rewards, values, next_values, log_ratios, bootstrap)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def launched_by(launcher: nvrtc.Launcher) -> dict[str, Callable[..., Any]]:
    """Implementations of the ops that launch the kernel of csrc/cuda from Python."""

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(launcher, *arguments)

    return {
        "affine_scan": bound(_launch.forward),
        "affine_scan_backward": bound(_launch.backward),
        "advantages": bound(_launch.advantages),
    }


_LIBRARY = nvrtc.serve("affine_scan", launched_by)


class _AffineScan(torch.autograd.Function):
    """The op with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        initial: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> Tensor:
        keep = any(ctx.needs_input_grad[:3])
        x, before = torch.ops.fastpo.affine_scan(a, b, initial, mask, cu_seqlens, reverse, keep)
        ctx.reverse = reverse
        # b and the initial x are needed only to differentiate the gradient again
        ctx.save_for_backward(a, b, initial, mask, cu_seqlens, before)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, initial, mask, cu_seqlens, before = ctx.saved_tensors
        needed, nothing = ctx.needs_input_grad[:3], (None, None, None)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable_backward(ctx, grad), *nothing
        found = torch.ops.fastpo.affine_scan_backward(grad, a, before, mask, cu_seqlens, ctx.reverse)
        inputs = (a, b, initial)
        grads = [g.to(t.dtype) if n and t is not None else None for g, t, n in zip(found, inputs, needed, strict=True)]
        return *grads, *nothing


def _differentiable_backward(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradient as a function that can be differentiated again (create_graph), from the reference."""
    a, b, initial, mask, cu_seqlens, _ = ctx.saved_tensors
    # views, so that each gradient is that of its own argument, also where one is made from the other
    a, b, initial = a.view_as(a), b.view_as(b), None if initial is None else initial.view_as(initial)
    x = reference.affine_scan(a, b, initial=initial, reverse=ctx.reverse, mask=mask, cu_seqlens=cu_seqlens)
    needed = ctx.needs_input_grad[:3]
    inputs = [t for t, n in zip((a, b, initial), needed, strict=True) if n]
    # x of no tokens depends on nothing
    grads = torch.autograd.grad(x, inputs, grad, create_graph=True, allow_unused=True, materialize_grads=True)
    found = iter(grads)
    return [next(found) if n else None for n in needed]


def affine_scan(
    a: Tensor | float,
    b: Tensor,
    *,
    initial: Tensor | None = None,
    reverse: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """x_t = a_t x_(t+1) + b_t along every row; forward, x_t = a_t x_(t-1) + b_t.

    Discounted returns are a = γ and b = r; the next valid value is a = 1 - m and b = m V; a linear recurrence of any
    kind is one. Computed in double, whatever the dtype, and rounded once. Differentiable in a, b and initial; the
    gradient is one scan in the other direction.

    Args:
        a: (B, T), or (N,) packed with `cu_seqlens`; or one number for all. A slope of 0 forgets x, also one that is inf
            or NaN.
        b: of the same shape.
        initial: (B,), x before the first step; 0 if None.
        reverse: walk from the end of each row to its beginning.
        mask: bool, of the shape of b, True where a token counts. The others are passed over: x is carried over them,
            and theirs is 0; what they hold has no influence.
        cu_seqlens: int32 (B + 1,), the boundaries of packed sequences. x of tokens behind the last is 0.

    Returns:
        x of the shape of b, fp32 (fp64 if an argument is).

    Raises:
        TypeError: an argument is no tensor of the dtypes above.
        ValueError: shapes or devices differ, or `cu_seqlens` does not rise from 0 to at most N.

    Source: G. E. Blelloch, Prefix sums and their applications (1990), for the composition (a, b) of steps.
    """
    b = _layout("b", b, mask, cu_seqlens)
    if isinstance(a, Tensor):
        slopes = _token("a", a, "b", b, _checks.FLOATS)
    else:
        # not in a narrow dtype, which would round it
        slopes = torch.full_like(b, _checks.number("a", a), dtype=torch.promote_types(b.dtype, torch.float32))
    per_row("initial", initial, "b", b, cu_seqlens, _checks.FLOATS)
    floats = [t.dtype for t in (slopes, b, initial) if t is not None]
    if not _native.serves("affine_scan", b.device, *floats):
        _checks.rising("cu_seqlens", cu_seqlens, b.shape[0])
        return reference.affine_scan(slopes, b, initial=initial, reverse=reverse, mask=mask, cu_seqlens=cu_seqlens)
    if b.device.type != "cpu":
        _checks.rising("cu_seqlens", cu_seqlens, b.shape[0])
    return _native.call(_AffineScan.apply, slopes, b, initial, mask, cu_seqlens, bool(reverse))


def _token(name: str, value: object, of: str, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A tensor of one entry per token."""
    tensor = _checks.tensor(name, value, dtypes)
    _checks.same_device(name, tensor, of, like)
    _checks.shape(name, tensor, like.shape, f"it must match {of}")
    return tensor


def _layout(name: str, value: object, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The tokens of padded rows or packed sequences, with their mask and boundaries."""
    tensor = _checks.tensor(name, value, _checks.FLOATS)
    if cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, name, tensor)
        if tensor.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (N,) with cu_seqlens")
    elif tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (B, T), or (N,) with cu_seqlens")
    if mask is not None:
        _token("mask", mask, name, tensor, (torch.bool,))
    return tensor


def per_row(
    name: str,
    value: object,
    of: str,
    like: Tensor,
    cu_seqlens: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Check an optional tensor of one entry per row."""
    if value is None:
        return
    tensor = _checks.tensor(name, value, dtypes)
    _checks.same_device(name, tensor, of, like)
    rows = like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _checks.shape(name, tensor, (rows,), f"one per row of {of}")


def advantages(
    rewards: Tensor,
    values: Tensor | None = None,
    *,
    next_values: Tensor | None = None,
    log_ratios: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    repeat: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    skip: bool = True,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, checked; the functions of `fastpo.advantages` document the arguments. No gradient."""
    rewards = _layout("rewards", rewards, mask, cu_seqlens).detach()
    tokens = {"values": values, "next_values": next_values, "log_ratios": log_ratios}
    given = {name: t for name, t in tokens.items() if t is not None}
    for name, t in given.items():
        given[name] = _token(name, t, "rewards", rewards, _checks.FLOATS).detach()
    for name, flag in {"terminated": terminated, "truncated": truncated}.items():
        if flag is not None:
            _token(name, flag, "rewards", rewards, (torch.bool,))
    per_row("bootstrap", bootstrap, "rewards", rewards, cu_seqlens, _checks.FLOATS)
    if bootstrap is not None:
        given["bootstrap"] = bootstrap.detach()
    numbers = {"gamma": gamma, "lam": lam, "rho_bar": rho_bar, "c_bar": c_bar}
    flags = {"terminated": terminated, "truncated": truncated, "repeat": repeat}
    floats = [t.dtype for t in (rewards, *given.values())]
    native = _native.serves("affine_scan", rewards.device, *floats)
    if not native or rewards.device.type != "cpu":
        _checks.rising("cu_seqlens", cu_seqlens, rewards.shape[0])
    if not native:
        # given has values under their own name
        arguments: dict[str, Any] = {**given, **flags, **numbers}
        return reference.advantages(rewards, mask=mask, cu_seqlens=cu_seqlens, skip=skip, **arguments)
    return _native.call(
        torch.ops.fastpo.advantages,
        rewards,
        *(given.get(name) for name in tokens),
        terminated,
        truncated,
        mask,
        cu_seqlens,
        given.get("bootstrap"),
        repeat,
        *numbers.values(),
        skip,
    )
