"""`objective`: one scalar formula per row, fused with the masked sums of its inputs over the tokens.

The C++ side evaluates the formula of a registry row (csrc/formulas) on dual numbers, so that one forward launch
returns loss, slopes and metrics; the backward spreads the slopes over the tokens.

A row of the batch has one or more sides (a pair: chosen, rejected), each with its own layout: a mask, or
cu_seqlens, or neither. The op's streams are tensors of log-probs, one per side and model: first the policy's,
one per side, which are differentiable, then the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.kernels.cuda import nvrtc
from fastpo.kernels.cuda import objective as _launch
from fastpo.reference.pairwise import Side, pairwise_objective
from fastpo.reference.registry import Objective, objective

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")


class PairwiseOutput(NamedTuple):
    """What a pairwise objective returns.

    Attributes:
        loss: scalar, or (B,) with `reduction="none"`; the only differentiable field.
        chosen_rewards: (B,), the implicit reward β · log(π/π_ref) of the chosen completion.
        rejected_rewards: (B,), the same of the rejected one.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """(B,), chosen minus rejected reward."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def accuracies(self) -> Tensor:
        """(B,), 1 where the chosen reward is the larger; a tie counts 0."""
        return (self.chosen_rewards > self.rejected_rewards).to(self.chosen_rewards.dtype)


# `reduce` sums over the rows, and the loss is a scalar; it and the slopes (sides, B) are divided by `denominator`, or
# by the number of rows if that is None, which leaves the batch size out of compiled graphs
torch.library.define(
    "fastpo::objective",
    "(int formula, Tensor[] streams, Tensor?[] masks, Tensor?[] cu_seqlens, Tensor?[] lengths, float[] hyper, "
    "bool length_norm, bool reduce, float? denominator) -> (Tensor loss, Tensor slopes, Tensor rewards)",
)
# the same for a formula given as C++ source (see fastpo/losses/formula.py), with hyper-parameters by place
torch.library.define(
    "fastpo::formula_objective",
    "(str source, Tensor[] streams, Tensor?[] masks, Tensor?[] cu_seqlens, Tensor?[] lengths, float[] hyper, "
    "bool length_norm, bool reduce, float? denominator, float reward_scale) -> "
    "(Tensor loss, Tensor slopes, Tensor rewards)",
)
# `needed`: bit i is set if the gradient of stream i is wanted; the others come back empty
torch.library.define(
    "fastpo::objective_backward",
    "(Tensor grad, Tensor slopes, Tensor[] streams, Tensor?[] masks, Tensor?[] cu_seqlens, int needed) -> Tensor[]",
)


def _rows(stream: Tensor, cu_seqlens: Tensor | None) -> int:
    return stream.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _accumulator(streams: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(s.dtype == torch.float64 for s in streams) else torch.float32


@torch.library.register_fake("fastpo::formula_objective")
@torch.library.register_fake("fastpo::objective")
def _fake(
    formula: int | str,
    streams: list[Tensor],
    masks: list[Tensor | None],
    cu_seqlens: list[Tensor | None],
    lengths: list[Tensor | None],
    hyper: list[float],
    length_norm: bool,
    reduce: bool,
    denominator: float | None,
    reward_scale: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, sides = _rows(streams[0], cu_seqlens[0]), len(masks)
    dtype = _accumulator(streams)
    loss = streams[0].new_empty(() if reduce else (rows,), dtype=dtype)
    return loss, loss.new_empty((sides, rows)), loss.new_empty((sides, rows))


@torch.library.register_fake("fastpo::objective_backward")
def _fake_backward(
    grad: Tensor,
    slopes: Tensor,
    streams: list[Tensor],
    masks: list[Tensor | None],
    cu_seqlens: list[Tensor | None],
    needed: int,
) -> list[Tensor]:
    return [s.new_empty(s.shape if needed >> i & 1 else (0,)) for i, s in enumerate(streams)]


def launched_by(launcher: nvrtc.Launcher) -> dict[str, Callable[..., Any]]:
    """Implementations of the ops that launch the kernels of csrc/cuda from Python."""

    def forward(
        formula: int,
        streams: list[Tensor],
        masks: list[Tensor | None],
        cu_seqlens: list[Tensor | None],
        lengths: list[Tensor | None],
        hyper: list[float],
        length_norm: bool,
        reduce: bool,
        denominator: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        beta = hyper[_native.CPU.hyper_parameters.index("beta")]
        layout = (masks, cu_seqlens, lengths)
        return _launch.forward(launcher, formula, streams, *layout, hyper, length_norm, reduce, denominator, beta)

    def backward(*arguments: Any) -> list[Tensor]:
        return _launch.backward(launcher, *arguments)

    return {"objective": forward, "objective_backward": backward}


def _why_not_cuda(device: torch.device, *dtypes: torch.dtype) -> str | None:
    if _native.CUDA.loaded:
        return _native.why_not_compiled_for(device)
    return nvrtc.why_not() and f"_cuda: {_native.CUDA.error}; {nvrtc.why_not()}"


@torch.library.impl("fastpo::formula_objective", "cuda")
def _formula_objective(source: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    launcher = nvrtc.Driver("objective.cuh", {"FASTPO_USER_FORMULA": source})
    return _launch.forward(launcher, 0, *arguments)


_native.on_cuda("objective", _why_not_cuda, by="compiled" if _native.CUDA.loaded else "NVRTC")
if not _native.CUDA.loaded:
    # kept: the implementations go with it
    _LIBRARY = torch.library.Library("fastpo", "IMPL")
    for _name, _function in launched_by(nvrtc.Driver("objective.cuh")).items():
        _LIBRARY.impl(_name, _function, "CUDA")


class _Objective(torch.autograd.Function):
    """The op with its gradient. A Function, as registering autograd for the op takes 60 microseconds a call more,
    which is the whole cost of a loss on a few pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        formula: int | str,
        hyper: list[float],
        reward_scale: float,
        length_norm: bool,
        reduce: bool,
        denominator: float | None,
        sides: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        streams, layouts = list(tensors[: -3 * sides]), tensors[-3 * sides :]
        masks, cu_seqlens, lengths = (list(layouts[i * sides : (i + 1) * sides]) for i in range(3))
        arguments = (formula, streams, masks, cu_seqlens, lengths, hyper, length_norm, reduce, denominator)
        if isinstance(formula, str):
            loss, slopes, rewards = torch.ops.fastpo.formula_objective(*arguments, reward_scale)
        else:
            loss, slopes, rewards = torch.ops.fastpo.objective(*arguments)
        ctx.mark_non_differentiable(rewards)
        ctx.set_materialize_grads(False)
        ctx.formula, ctx.hyper, ctx.length_norm, ctx.reduce, ctx.denominator = (
            formula,
            hyper,
            length_norm,
            reduce,
            denominator,
        )
        ctx.sides = sides
        # the reference's log-probs are needed only to differentiate the gradient again
        ctx.save_for_backward(slopes, *tensors)
        return loss, rewards

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        slopes, *tensors = ctx.saved_tensors
        sides = ctx.sides
        streams, layouts = tensors[: -3 * sides], tensors[-3 * sides :]
        masks, cu_seqlens, lengths = (layouts[i * sides : (i + 1) * sides] for i in range(3))
        needed = ctx.needs_input_grad[7 : 7 + sides]
        grads: list[Tensor | None] = [None] * sides
        if grad is not None and any(needed):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                grads = _differentiable_backward(ctx, grad, needed, streams, masks, cu_seqlens, lengths)
            else:
                grads = _spread(grad, slopes, streams[:sides], masks, cu_seqlens, needed)
        return None, None, None, None, None, None, None, *grads, *[None] * (len(tensors) - sides)


def _spread(
    grad: Tensor,
    slopes: Tensor,
    streams: list[Tensor],
    masks: list[Tensor | None],
    cu_seqlens: list[Tensor | None],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    summed = all(
        s.dim() == 1 and c is None and s.dtype == slopes.dtype for s, c in zip(streams, cu_seqlens, strict=True)
    )
    if summed:
        out = list((slopes * grad).unbind(0))
    else:
        bits = sum(1 << i for i, n in enumerate(needed) if n)
        out = torch.ops.fastpo.objective_backward(grad, slopes, streams, masks, cu_seqlens, bits)
    return [g if n else None for g, n in zip(out, needed, strict=True)]


def _differentiable_backward(
    ctx: Any,
    grad: Tensor,
    needed: tuple[bool, ...],
    streams: list[Tensor],
    masks: list[Tensor | None],
    cu_seqlens: list[Tensor | None],
    lengths: list[Tensor | None],
) -> list[Tensor | None]:
    """The gradient as a function that can be differentiated again (create_graph), from the reference."""
    if isinstance(ctx.formula, str):
        row = _USER_ROWS[ctx.formula]
        given = dict(zip(row.formula.hyper_names, ctx.hyper, strict=True))  # type: ignore[attr-defined]
    else:
        row = objective(next(name for name, index in _native.CPU.formulas.items() if index == ctx.formula))
        given = dict(zip(_native.CPU.hyper_parameters, ctx.hyper, strict=True))
    references: Sequence[Tensor | None] = streams[ctx.sides :] or [None] * ctx.sides
    # views, so that each gradient is that of its own argument, also where one policy stream is made from the other
    policies = [s.view_as(s) for s in streams[: ctx.sides]]
    parts = zip(policies, references, masks, cu_seqlens, lengths, strict=True)
    chosen, rejected = (Side(*part) for part in parts)
    hyper = {name: given[name] for name in row.defaults}
    loss, *_ = pairwise_objective(row, chosen, rejected, hyper, length_norm=ctx.length_norm)
    if ctx.reduce:
        loss = _mean(loss, ctx.denominator)
    inputs = [s for s, n in zip(policies, needed, strict=True) if n]
    found = iter(torch.autograd.grad(loss, inputs, grad, create_graph=True))
    return [next(found) if n else None for n in needed]


# rows of formulas that users gave, by their source
_USER_ROWS: dict[str, Objective] = {}


def _kernel_of(row: Objective, device: torch.device, *dtypes: torch.dtype) -> int | str | None:
    """The number or the source of the row's compiled formula, or None if the reference is to be taken."""
    if not _native.serves("objective", device, *dtypes):
        return None
    if row.name in _native.CPU.formulas:
        return _native.CPU.formulas[row.name]
    source = getattr(row.formula, "source", None)
    if source is not None and device.type == "cuda" and nvrtc.why_not() is None:
        _USER_ROWS[source] = row
        return source
    where = " on a CUDA device with CuPy" if source is not None else ""
    _native.refuse(f"{row.name} has no compiled formula" + f" but{where}" * bool(where))
    return None


def _check_side(row: Objective, name: str, side: Side, policy_of: Tensor, length_norm: bool) -> int:
    """Check one side of the pairs; returns its number of rows."""
    policy = _checks.tensor(f"policy_{name}", side.policy, _checks.FLOATS)
    _checks.same_device(f"policy_{name}", policy, "policy_chosen", policy_of)
    packed = side.cu_seqlens is not None
    if packed:
        _checks.cu_seqlens(f"{name}_cu_seqlens", side.cu_seqlens, f"policy_{name}", policy)
        if policy.dim() != 1:
            raise ValueError(f"policy_{name} has shape {tuple(policy.shape)}, expected (N,) with {name}_cu_seqlens")
    elif policy.dim() not in (1, 2):
        raise ValueError(f"policy_{name} has shape {tuple(policy.shape)}, expected (B,) or (B, T)")
    tokens = packed or policy.dim() == 2
    if row.reference_model:
        reference = _checks.tensor(f"reference_{name}", side.reference, _checks.FLOATS)
        _checks.same_device(f"reference_{name}", reference, f"policy_{name}", policy)
        _checks.shape(f"reference_{name}", reference, policy.shape, f"it must match policy_{name}")
    if side.mask is not None:
        mask = _checks.tensor(f"{name}_mask", side.mask, (torch.bool,))
        _checks.same_device(f"{name}_mask", mask, f"policy_{name}", policy)
        if not tokens:
            raise ValueError(f"{name}_mask is for token log-probs, but policy_{name} is (B,), summed already")
        _checks.shape(f"{name}_mask", mask, policy.shape, f"it must match policy_{name}")
    rows = _rows(policy, side.cu_seqlens)
    if side.lengths is not None:
        if tokens or not length_norm:
            raise ValueError(f"{name}_lengths is only for length_norm=True with summed (B,) log-probs")
        lengths = _checks.tensor(f"{name}_lengths", side.lengths, _checks.INTEGERS)
        _checks.same_device(f"{name}_lengths", lengths, f"policy_{name}", policy)
        _checks.shape(f"{name}_lengths", lengths, (rows,), f"one length per row of policy_{name}")
    elif length_norm and not tokens:
        raise ValueError(f"length_norm=True with summed (B,) log-probs needs {name}_lengths")
    return rows


def _denominator(reduction: str, num_items: float | Tensor | None, rows: int, policy: Tensor) -> float | None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items is the denominator of reduction='mean', got reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        _checks.tensor("num_items", num_items, _checks.FLOATS + _checks.INTEGERS)
        if num_items.dim() != 0:
            raise ValueError(f"num_items must be a number or 0-dimensional, got shape {tuple(num_items.shape)}")
        _checks.same_device("num_items", num_items, "policy_chosen", policy)
        return 1.0
    if num_items is not None:
        if not 0 < _checks.number("num_items", num_items) < math.inf:
            raise ValueError(f"num_items must be positive and finite, got {num_items}")
        return float(num_items)
    if reduction != "mean":
        return 1.0
    if rows == 0:
        raise ValueError("reduction='mean' of an empty batch is undefined: pass num_items, or reduction='sum'")
    return None


def _mean(loss: Tensor, denominator: float | None) -> Tensor:
    return loss.mean() if denominator is None else loss.sum() / denominator


def pairwise(
    row: Objective,
    chosen: Side,
    rejected: Side,
    hyper: Mapping[str, object],
    *,
    length_norm: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> PairwiseOutput:
    """Evaluate a pairwise registry row; the functions of `fastpo.losses` document the arguments."""
    values = _checks.hyper_parameters(row.name, hyper, row.domains)
    rows = _check_side(row, "chosen", chosen, chosen.policy, length_norm)
    if (other := _check_side(row, "rejected", rejected, chosen.policy, length_norm)) != rows:
        raise ValueError(f"policy_rejected has {other} rows, policy_chosen has {rows}: pairs need as many of both")
    denominator = _denominator(reduction, num_items, rows, chosen.policy)
    sides = (chosen, rejected)
    policies = [s.policy for s in sides]
    references = [s.reference.detach() for s in sides if s.reference is not None]
    streams = [*policies, *references]
    device = chosen.policy.device
    formula = _kernel_of(row, device, *(s.dtype for s in streams))
    if formula is None or device.type != "cpu":  # the compiled CPU kernel looks itself
        _checks.rising("chosen_cu_seqlens", chosen.cu_seqlens, chosen.policy.shape[0])
        _checks.rising("rejected_cu_seqlens", rejected.cu_seqlens, rejected.policy.shape[0])
    if formula is not None:
        names = row.formula.hyper_names if isinstance(formula, str) else _native.CPU.hyper_parameters  # type: ignore[attr-defined]
        loss, rewards = _native.call(
            _Objective.apply,
            formula,
            [values.get(name, 0.0) for name in names],
            values.get("beta", 1.0),
            length_norm,
            reduction != "none",
            denominator,
            len(sides),
            *streams,
            *(s.mask for s in sides),
            *(s.cu_seqlens for s in sides),
            *(s.lengths for s in sides),
        )
        chosen_rewards, rejected_rewards = rewards.unbind(0)
    else:
        loss, chosen_rewards, rejected_rewards = pairwise_objective(
            row, chosen, rejected, values, length_norm=length_norm
        )
        if reduction != "none":
            loss = _mean(loss, denominator)
    if isinstance(num_items, Tensor):
        loss = loss / num_items.to(loss.dtype)
    return PairwiseOutput(loss, chosen_rewards, rejected_rewards)
