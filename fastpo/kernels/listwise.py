"""`listwise`: one loss per list of items, from their scores and targets, with its gradient in the same launch.

The scores are made of log-probs inside the kernel; lists are padded under a mask or packed, and have at most 1,024
items. Items are ranked by counting, and pairs are never stored, so that a list of K takes O(K) memory. The losses of
items and pairs are in csrc/formulas/listwise.h; how they are put together is in the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.kernels.cuda import listwise as _launch
from fastpo.kernels.cuda import nvrtc
from fastpo.kernels.objective import mean_denominator, mean_of, scaled
from fastpo.reference import listwise as reference
from fastpo.reference.listwise import DISCOUNTS, MAX_ITEMS, ListObjective, Numbers


class ListwiseOutput(NamedTuple):
    """What an objective on lists returns.

    Attributes:
        loss: scalar, or (B,) with `reduction="none"`; the only differentiable field.
        rewards: the scores in the layout of the log-probs, such as β · log(π/π_ref); 0 where an item does not count.
    """

    loss: Tensor
    rewards: Tensor


# `reduce` sums over the lists, and the loss is a scalar; it and the slopes are divided by `denominator`, or by the
# number of lists if that is None. `numbers` are those of `fastpo.reference.listwise.Numbers`.
torch.library.define(
    "fastpo::listwise",
    "(int kind, Tensor policy, Tensor? other, Tensor targets, Tensor? mask, Tensor? cu_seqlens, float[] numbers, "
    "bool pair_mean, bool reduce, float? denominator) -> (Tensor loss, Tensor slopes, Tensor scores)",
)


@torch.library.register_fake("fastpo::listwise")
def _fake(
    kind: int,
    policy: Tensor,
    other: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numbers: list[float],
    pair_mean: bool,
    reduce: bool,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = policy.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    in_double = any(t is not None and t.dtype == torch.float64 for t in (policy, other))
    slopes = policy.new_empty(policy.shape, dtype=torch.float64 if in_double else torch.float32)
    return slopes.new_empty(() if reduce else (lists,)), slopes, torch.empty_like(slopes)


def launched_by(launcher: nvrtc.Launcher) -> dict[str, Callable[..., Any]]:
    """Implementation of the op that launches the kernels of csrc/cuda from Python."""
    return {"listwise": functools.partial(_launch.forward, launcher)}


# kept: the implementations go with it
_LIBRARY = nvrtc.serve("listwise", launched_by, "listwise.cuh")


class _Call(NamedTuple):
    """What a call of the op has beside its tensors."""

    kind: str
    numbers: Numbers
    pair_mean: bool
    reduce: bool
    denominator: float | None


class _Listwise(torch.autograd.Function):
    """The op with its gradient. What is no tensor stands in one argument, of which each takes half a microsecond."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        policy: Tensor,
        other: Tensor | None,
        targets: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tensors = (policy, other, targets, mask, cu_seqlens)
        rest = (list(call.numbers), call.pair_mean, call.reduce, call.denominator)
        loss, slopes, scores = torch.ops.fastpo.listwise(_native.CPU.list_kinds[call.kind], *tensors, *rest)
        ctx.mark_non_differentiable(scores)
        ctx.set_materialize_grads(False)
        ctx.call = call
        # all but the slopes are needed only to differentiate the gradient again, and to spread one per list
        ctx.save_for_backward(slopes, *tensors)
        return loss, scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        slopes, *tensors = ctx.saved_tensors
        out: Tensor | None = None
        if grad is not None:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                out = _differentiable_backward(ctx.call, grad, tensors)
            else:
                if grad.dim() == 1:
                    grad = grad[:, None] if tensors[4] is None else _spread(grad, tensors[4], len(slopes))
                out = scaled(slopes, grad).to(tensors[0].dtype)
        return None, out, None, None, None, None


def _spread(grad: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Each list's number at its items, 0 behind the last list."""
    at = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(total, device=grad.device), right=True)
    return torch.cat([grad, grad.new_zeros(1)])[at]


def _differentiable_backward(call: _Call, grad: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
    """The gradient as a function that can be differentiated again (create_graph), from the reference."""
    policy, *rest = tensors
    assert policy is not None
    view = policy.view_as(policy)
    loss, _ = _reference(call, view, *rest)
    (found,) = torch.autograd.grad(loss, [view], grad, create_graph=True, materialize_grads=True)
    return found


def _reference(call: _Call, policy: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    other, targets, mask, cu_seqlens = rest
    layout = (mask, cu_seqlens)
    loss, scores = reference.listwise(call.kind, policy, other, targets, *layout, call.numbers, call.pair_mean)
    return mean_of(loss, call.denominator) if call.reduce else loss, scores


class _Plan(NamedTuple):
    """What a call does that its tensors have no part in."""

    kind: str
    values: dict[str, float]
    numbers: Numbers
    pair_mean: bool


def _one_of(name: str, value: object, known: Any, row: ListObjective) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))} for {row.name}, got {value!r}")


def _plan(row: ListObjective, hyper: tuple[object, ...], options: tuple[Any, ...]) -> _Plan:
    values = _checks.hyper_parameters(row.name, dict(zip(row.defaults, hyper, strict=True)), row.domains)
    numbers, rest = row.numbers(values), list(options)
    loss = rest.pop(0) if len(row.kinds) > 1 else ""
    _one_of("loss", loss, row.kinds, row)
    pair_mean = False
    if row.average_pairs is not None:
        pair_mean = rest.pop(0)
        if not isinstance(pair_mean, bool):
            raise TypeError(f"average_pairs must be a bool, got {type(pair_mean).__name__}")
    if row.discounts:
        discount = rest.pop(0)
        _one_of("discount", discount, DISCOUNTS, row)
        numbers = numbers._replace(weight=DISCOUNTS[discount])
    return _Plan(row.kinds[loss], values, numbers, pair_mean)


# of calls like earlier ones; the types are arguments too: True is no number, though it equals one
@functools.lru_cache(maxsize=256)
def _known_plan(name: str, hyper: tuple[object, ...], options: tuple[Any, ...], *_: type) -> _Plan:
    return _plan(reference.list_objective(name), hyper, options)


def _may_be_integers(row: ListObjective, name: str) -> bool:
    return name == "lengths" or name == row.names[-1]


def _check_tensors(
    row: ListObjective, tensors: tuple[Tensor | None, ...], mask: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    of = row.names[0]
    policy = _checks.tensor(of, tensors[0], _checks.FLOATS)
    if cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, of, policy)
        if policy.dim() != 1:
            raise ValueError(f"{of} has shape {tuple(policy.shape)}, expected (N,) with cu_seqlens")
    elif policy.dim() != 2:
        raise ValueError(f"{of} has shape {tuple(policy.shape)}, expected (B, K), or (N,) with cu_seqlens")
    elif policy.shape[1] > MAX_ITEMS:
        raise ValueError(f"{of} has lists of {policy.shape[1]} items; at most {MAX_ITEMS} are supported")
    for name, given in zip(row.tensors, tensors, strict=True):
        if name == of or (given is None and name in row.optional):
            continue
        allowed = _checks.FLOATS + _checks.INTEGERS * _may_be_integers(row, name)
        tensor = _checks.tensor(name, given, allowed)
        _checks.same_device(name, tensor, of, policy)
        _checks.shape(name, tensor, policy.shape, f"it must match {of}")
    if mask is not None:
        _checks.tensor("mask", mask, (torch.bool,))
        _checks.same_device("mask", mask, of, policy)
        _checks.shape("mask", mask, policy.shape, f"it must match {of}")


def _check_targets(row: ListObjective, targets: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """What counts among the targets is in their domain, where values may be looked at."""
    if row.targets is None or not _checks.readable(targets):
        return
    if cu_seqlens is not None and len(cu_seqlens) > 0:
        end = max(0, int(cu_seqlens[-1]))
        targets, mask = targets[:end], None if mask is None else mask[:end]
    if mask is not None:
        targets = targets[mask]
    if targets.numel() == 0:
        return
    name = row.names[-1]
    for bound in torch.aminmax(targets):
        # a NaN makes its list NaN, here as on devices
        if (found := bound.item()) == found and found not in row.targets:
            raise ValueError(f"{name} must be in {row.targets} for {row.name}, got {found:g}")


def _check_lengths(cu_seqlens: Tensor | None, total: int) -> None:
    """Boundaries in order and lists not too long, where values may be looked at."""
    _checks.rising("cu_seqlens", cu_seqlens, total)
    if cu_seqlens is None or len(cu_seqlens) < 2 or not _checks.readable(cu_seqlens):
        return
    if (longest := int(cu_seqlens.diff().max())) > MAX_ITEMS:
        raise ValueError(f"cu_seqlens has a list of {longest} items; at most {MAX_ITEMS} are supported")


def _constant(t: Tensor | None, integers: torch.dtype) -> Tensor | None:
    if t is None:
        return None
    t = t.detach() if t.requires_grad else t
    return t if t.dtype.is_floating_point else t.to(integers)


def evaluate(
    row: ListObjective,
    tensors: tuple[Tensor | None, ...],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
    hyper: tuple[object, ...],
    options: tuple[Any, ...],
) -> ListwiseOutput:
    """Loss and scores of a row of the table; the functions of `fastpo.losses` document the arguments."""
    if torch.compiler.is_compiling():
        # tracing follows no cache
        plan = _plan(row, hyper, options)
    else:
        try:
            plan = _known_plan(row.name, hyper, options, *map(type, hyper), *map(type, options))
        except TypeError:
            # an argument without a hash has no place in the cache, and is no number: this says so
            plan = _plan(row, hyper, options)
    _check_tensors(row, tensors, mask, cu_seqlens)
    first = tensors[0]
    assert first is not None
    _check_targets(row, tensors[-1], mask, cu_seqlens)  # type: ignore[arg-type]
    of = row.names[0]
    lists = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    denominator = mean_denominator(reduction, num_items, lists, first, of)
    # fp64 targets leave the accumulator's type alone, lengths in fp64 would not
    constants = [_constant(t, torch.float32) for t in tensors[1:-1]]
    policy, other, targets = row.take(first, *constants, _constant(tensors[-1], torch.float64), plan.values)
    call = _Call(plan.kind, plan.numbers, plan.pair_mean, reduction != "none", denominator)
    dtypes = (policy.dtype, targets.dtype) if other is None else (policy.dtype, other.dtype, targets.dtype)
    native = _native.serves("listwise", policy.device, *dtypes)
    # the compiled CPU kernel looks at boundaries itself
    if not native or policy.device.type != "cpu":
        _check_lengths(cu_seqlens, len(policy))
    if native:
        loss, scores = _native.call(_Listwise.apply, call, policy, other, targets, mask, cu_seqlens)
    else:
        loss, scores = _reference(call, policy, other, targets, mask, cu_seqlens)
    if isinstance(num_items, Tensor):
        loss = loss / num_items.to(loss.dtype)
    return ListwiseOutput(loss, scores)
