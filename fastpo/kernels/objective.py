"""`objective`: one scalar formula per row, fused with the masked sums of its inputs over the tokens.

The C++ side evaluates the formula of a registry row (csrc/formulas) on dual numbers, so that one forward launch
returns loss, slopes and metrics; the backward spreads the slopes over the tokens.

A row of the batch has one or two sides (a pair: chosen, rejected), each with its own layout: a mask, or
cu_seqlens, or neither. The op's streams are tensors of log-probs, one per side and model: first the policy's,
one per side, which are differentiable, then the reference's and the previous iterate's. Columns are constants, one
number per row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.kernels.cuda import nvrtc
from fastpo.kernels.cuda import objective as _launch
from fastpo.reference.pairwise import pairwise_objective
from fastpo.reference.registry import Input, Objective, objective
from fastpo.reference.sequence import Side
from fastpo.reference.unpaired import single_objective

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
        # one pass: a bool tensor and its conversion take five times as long
        return torch.gt(self.chosen_rewards, self.rejected_rewards, out=torch.empty_like(self.chosen_rewards))


class UnpairedOutput(NamedTuple):
    """What an objective on labelled single completions returns.

    Attributes:
        loss: scalar, or (B,) with `reduction="none"`; the only differentiable field.
        rewards: (B,), the implicit rewards β · log(π/π_ref).
    """

    loss: Tensor
    rewards: Tensor


class PolicyOutput(NamedTuple):
    """What an objective on samples of the policy returns.

    Attributes:
        loss: scalar, or (B,) with `reduction="none"`; the only differentiable field. A surrogate: its gradient counts.
        penalties: (B,), β · log(π/π_ref), what the reference takes off the reward.
    """

    loss: Tensor
    penalties: Tensor


Output = PairwiseOutput | UnpairedOutput | PolicyOutput

# what the op does with lengths, as bits (csrc/arguments.h)
AVERAGE, AVERAGE_REWARDS, COUNT = 1, 2, 4

# `reduce` sums over the rows, and the loss is a scalar; it and the slopes (sides, B) are divided by `denominator`, or
# by the number of rows if that is None, which leaves the batch size out of compiled graphs
torch.library.define(
    "fastpo::objective",
    "(int formula, Tensor[] streams, Tensor?[] masks, Tensor?[] cu_seqlens, Tensor?[] lengths, Tensor[] columns, "
    "float[] hyper, int use_lengths, bool reduce, float? denominator) -> (Tensor loss, Tensor slopes, Tensor rewards)",
)
# the same for a formula given as C++ source (see fastpo/losses/formula.py), with hyper-parameters by place
torch.library.define(
    "fastpo::formula_objective",
    "(str source, Tensor[] streams, Tensor?[] masks, Tensor?[] cu_seqlens, Tensor?[] lengths, "
    "Tensor[] columns, float[] hyper, int use_lengths, bool reduce, float? denominator, float reward_scale) -> "
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
    columns: list[Tensor],
    hyper: list[float],
    use_lengths: int,
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
        columns: list[Tensor],
        hyper: list[float],
        use_lengths: int,
        reduce: bool,
        denominator: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        beta = hyper[_native.CPU.hyper_parameters.index("beta")]
        given = (masks, cu_seqlens, lengths, columns)
        return _launch.forward(launcher, formula, streams, *given, hyper, use_lengths, reduce, denominator, beta)

    def backward(*arguments: Any) -> list[Tensor]:
        return _launch.backward(launcher, *arguments)

    return {"objective": forward, "objective_backward": backward}


@torch.library.impl("fastpo::formula_objective", "cuda")
def _formula_objective(source: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    launcher = nvrtc.Driver("objective.cuh", {"FASTPO_USER_FORMULA": source})
    return _launch.forward(launcher, 0, *arguments)


_LIBRARY = nvrtc.serve("objective", launched_by)


class _Call(NamedTuple):
    """What a call of the op has beside its tensors; of the tensors, the sides that have a mask, cu_seqlens, lengths."""

    formula: int | str
    hyper: list[float]
    reward_scale: float
    use_lengths: int
    reduce: bool
    denominator: float | None
    sides: int
    models: int
    present: tuple[bool, ...]

    def parts(self, tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
        """Streams, masks, cu_seqlens, lengths and columns, which stand one behind the other."""
        count = self.models * self.sides
        streams, rest = list(tensors[:count]), iter(tensors[count:])
        if True not in self.present:
            return streams, [None] * self.sides, [None] * self.sides, [None] * self.sides, list(rest)
        layouts = [next(rest) if present else None for present in self.present]
        masks, cu_seqlens, lengths = (layouts[i * self.sides : (i + 1) * self.sides] for i in range(3))
        return streams, masks, cu_seqlens, lengths, list(rest)


class _Objective(torch.autograd.Function):
    """The op with its gradient. A Function, as registering autograd for the op takes 60 microseconds a call more,
    which is the whole cost of a loss on a few pairs; each of its arguments takes half a microsecond, so that what is no
    tensor stands in one."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (*call.parts(tensors), call.hyper, call.use_lengths, call.reduce, call.denominator)
        if isinstance(call.formula, str):
            loss, slopes, rewards = torch.ops.fastpo.formula_objective(call.formula, *arguments, call.reward_scale)
        else:
            loss, slopes, rewards = torch.ops.fastpo.objective(call.formula, *arguments)
        ctx.mark_non_differentiable(rewards)
        ctx.set_materialize_grads(False)
        ctx.call = call
        # all but the policy's log-probs are needed only to differentiate the gradient again
        ctx.save_for_backward(slopes, *tensors)
        return loss, rewards

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        slopes, *tensors = ctx.saved_tensors
        call: _Call = ctx.call
        needed = ctx.needs_input_grad[1 : 1 + call.sides]
        grads: list[Tensor | None] = [None] * call.sides
        if grad is not None and True in needed:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                grads = _differentiable_backward(call, grad, needed, tensors)
            else:
                grads = _spread(call, grad, slopes, tensors, needed)
        return None, *grads, *[None] * (len(tensors) - call.sides)


# whether saved tensors outlive the backward that runs; torch asks the same before it reuses their memory
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def scaled(slopes: Tensor, grad: Tensor) -> Tensor:
    """The slopes that a forward saved times the incoming gradient, in their own memory if nobody needs them again:
    fresh memory costs more than all else."""
    if not torch.compiler.is_compiling() and not _keeps_graph():
        try:
            return slopes.mul_(grad)
        except RuntimeError:
            # a batch of gradients (vmap, is_grads_batched) does not fit
            pass
    return slopes * grad


def _spread(
    call: _Call, grad: Tensor, slopes: Tensor, tensors: Sequence[Tensor], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    policies = tensors[: call.sides]
    out: Sequence[Tensor]
    if all(p.dim() == 1 and p.dtype == slopes.dtype for p in policies) and not any(call.present[call.sides :]):
        out = scaled(slopes, grad).unbind(0)
    else:
        _, masks, cu_seqlens, *_ = call.parts(tensors)
        bits = sum(1 << i for i, n in enumerate(needed) if n)
        out = torch.ops.fastpo.objective_backward(grad, slopes, policies, masks, cu_seqlens, bits)
    return [g if n else None for g, n in zip(out, needed, strict=True)]


def _differentiable_backward(
    call: _Call, grad: Tensor, needed: tuple[bool, ...], tensors: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradient as a function that can be differentiated again (create_graph), from the reference."""
    streams, masks, cu_seqlens, lengths, columns = call.parts(tensors)
    if isinstance(call.formula, str):
        row = _USER_ROWS[call.formula]
        given = dict(zip(row.formula.hyper_names, call.hyper, strict=True))  # type: ignore[attr-defined]
    else:
        row = objective(next(name for name, index in _formulas(call.sides).items() if index == call.formula))
        given = dict(zip(_native.CPU.hyper_parameters, call.hyper, strict=True))
    # views, so that each gradient is that of its own argument, also where one policy stream is made from the other
    policies = [s.view_as(s) for s in streams[: call.sides]]
    others = [streams[m * call.sides : (m + 1) * call.sides] for m in range(1, call.models)]
    others.extend([None] * call.sides for _ in range(3 - call.models))
    parts = zip(policies, others[0], masks, cu_seqlens, lengths, others[1], strict=True)
    hyper = {name: given[name] for name in (*row.defaults, *row.fixed)}
    average = bool(call.use_lengths & AVERAGE)
    loss, *_ = _reference(row, tuple(Side(*part) for part in parts), hyper, average, tuple(columns))
    if call.reduce:
        loss = mean_of(loss, call.denominator)
    inputs = [s for s, n in zip(policies, needed, strict=True) if n]
    found = iter(torch.autograd.grad(loss, inputs, grad, create_graph=True))
    return [next(found) if n else None for n in needed]


def _reference(
    row: Objective, sides: tuple[Side, ...], hyper: Mapping[str, float], length_norm: bool, columns: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Loss per row and the rewards of each side, by torch."""
    if len(sides) == 1:
        return single_objective(row, sides[0], hyper, columns=columns)
    chosen, rejected = sides
    return pairwise_objective(row, chosen, rejected, hyper, length_norm=length_norm, columns=columns)


# rows of formulas that users gave, by their source
_USER_ROWS: dict[str, Objective] = {}


def _formulas(sides: int) -> dict[str, int]:
    return _native.CPU.formulas if sides == 2 else _native.CPU.unpaired_formulas


def _kernel_of(row: Objective, device: torch.device, *dtypes: torch.dtype) -> int | str | None:
    """The number or the source of the row's compiled formula, or None if the reference is to be taken."""
    if not _native.serves("objective", device, *dtypes):
        return None
    number = _formulas(len(row.sides)).get(row.kernel)
    if number is not None:
        return number
    source = getattr(row.formula, "source", None)
    if source is not None and device.type == "cuda" and nvrtc.why_not() is None:
        _USER_ROWS[source] = row
        return source
    where = " on a CUDA device with CuPy" if source is not None else ""
    _native.refuse(f"{row.name} has no compiled formula" + f" but{where}" * bool(where))
    return None


def _of(what: str, side: str) -> str:
    """The argument's name: policy_chosen, or policy where there is one side."""
    return f"{what}_{side}" if side else what


def _layout_of(side: str, what: str) -> str:
    return f"{side}_{what}" if side else what


def _fits(row: Objective, side: Side, like: Tensor, lengths_needed: bool, tokens_for: str | None) -> bool:
    """Whether a side is as plain as most, and needs none of the words of `_check_side`, which take longer than this."""
    policy, reference, mask, cu_seqlens, lengths, previous = side
    streams = [t for t in (policy, reference, previous) if t is not None]
    if cu_seqlens is not None or lengths is not None or len(streams) != len(row.models):
        return False
    if not isinstance(policy, Tensor) or not isinstance(like, Tensor):
        return False
    shape, device = policy.shape, like.device
    for t in streams:
        if not isinstance(t, Tensor) or t.dtype not in _checks.FLOATS or t.layout is not torch.strided:
            return False
        if t.shape != shape or t.device != device:
            return False
    if mask is None:
        return len(shape) == 1 and not lengths_needed and tokens_for is None
    plain = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.layout is torch.strided
    return plain and len(shape) == 2 and mask.shape == shape and mask.device == device


def _check_side(
    row: Objective, name: str, side: Side, policy_of: Tensor, lengths_needed: bool, tokens_for: str | None
) -> int:
    """Check one side of the rows; returns their number. `tokens_for` needs log-probs per token."""
    if _fits(row, side, policy_of, lengths_needed, tokens_for):
        return side.policy.shape[0]
    of, first = _of(row.scores, name), _of(row.scores, row.sides[0])
    policy = _checks.tensor(of, side.policy, _checks.FLOATS)
    _checks.same_device(of, policy, first, policy_of)
    packed = side.cu_seqlens is not None
    if packed:
        at = _layout_of(name, "cu_seqlens")
        _checks.cu_seqlens(at, side.cu_seqlens, of, policy)
        if policy.dim() != 1:
            raise ValueError(f"{of} has shape {tuple(policy.shape)}, expected (N,) with {at}")
    elif policy.dim() not in (1, 2):
        raise ValueError(f"{of} has shape {tuple(policy.shape)}, expected (B,) or (B, T)")
    tokens = packed or policy.dim() == 2
    if tokens_for is not None and not tokens:
        raise ValueError(f"{of} is (B,), summed already, but {tokens_for} needs it per token: (B, T), or (N,) packed")
    for model, stream in zip(("reference", "previous"), (side.reference, side.previous), strict=True):
        if model in row.models:
            given = _checks.tensor(_of(model, name), stream, _checks.FLOATS)
            _checks.same_device(_of(model, name), given, of, policy)
            _checks.shape(_of(model, name), given, policy.shape, f"it must match {of}")
    if side.mask is not None:
        at = _layout_of(name, "mask")
        mask = _checks.tensor(at, side.mask, (torch.bool,))
        _checks.same_device(at, mask, of, policy)
        if not tokens:
            raise ValueError(f"{at} is for token log-probs, but {of} is (B,), summed already")
        _checks.shape(at, mask, policy.shape, f"it must match {of}")
    rows = _rows(policy, side.cu_seqlens)
    at = _layout_of(name, "lengths")
    if side.lengths is not None:
        if tokens or not lengths_needed:
            because = "length_norm=True with summed (B,) log-probs" if row.length_norm else "summed (B,) log-probs"
            raise ValueError(f"{at} is only for {because}")
        lengths = _checks.tensor(at, side.lengths, _checks.INTEGERS)
        _checks.same_device(at, lengths, of, policy)
        _checks.shape(at, lengths, (rows,), f"one length per row of {of}")
    elif lengths_needed and not tokens:
        why = "length_norm=True" if row.length_norm else row.name
        raise ValueError(f"{why} with summed (B,) log-probs needs {at}")
    return rows


def _check_domain(name: str, value: Tensor, domain: Any, label: str) -> None:
    if value.numel() and _checks.readable(value):
        for end in torch.aminmax(value):
            if (found := end.item()) not in domain:
                raise ValueError(f"{name} must be in {domain} for {label}, got {found:g}")


def _check_input(row: Objective, given: Input, value: object, sides: tuple[Side, ...], rows: int) -> Tensor:
    """An input as a tensor of floats, constant unless it carries a gradient."""
    side = sides[given.side or 0]
    policy, of = side.policy, _of(row.scores, row.sides[given.side or 0])
    dtypes = (torch.bool,) if given.boolean else _checks.FLOATS + _checks.INTEGERS
    tensor = _checks.tensor(given.name, value, dtypes)
    _checks.same_device(given.name, tensor, of, policy)
    if given.side is not None:
        _checks.shape(given.name, tensor, policy.shape, f"it must match {of}")
    elif not (given.shared and tensor.dim() == 0):
        _checks.shape(given.name, tensor, (rows,), f"one number per row of {of}" + " or one for all" * given.shared)
    if given.side is None and not given.boolean:
        _check_domain(given.name, tensor, given.domain, row.name)
    if not tensor.dtype.is_floating_point:
        tensor = tensor.to(torch.float32 if given.boolean else torch.float64)
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor if given.gradient else tensor.detach()


def mean_denominator(
    reduction: str, num_items: float | Tensor | None, rows: int, policy: Tensor, name: str
) -> float | None:
    """What the sum over the rows is divided by, None for their number; 1 where num_items is a tensor."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items is the denominator of reduction='mean', got reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        _checks.tensor("num_items", num_items, _checks.FLOATS + _checks.INTEGERS)
        if num_items.dim() != 0:
            raise ValueError(f"num_items must be a number or 0-dimensional, got shape {tuple(num_items.shape)}")
        _checks.same_device("num_items", num_items, name, policy)
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


def mean_of(loss: Tensor, denominator: float | None) -> Tensor:
    return loss.mean() if denominator is None else loss.sum() / denominator


class _Plan(NamedTuple):
    """What a call does that its tensors have no part in.

    Attributes:
        taken: the row whose formula is evaluated.
        values: the hyper-parameters, for `prepare`.
        formula_values: those of the formula.
        hyper: the same as the op takes them.
        use_lengths: what the op does with lengths.
        lengths_needed: whether summed log-probs need them.
        tokens_for: what needs log-probs per token, in words.
    """

    taken: Objective
    values: dict[str, float]
    formula_values: dict[str, float]
    hyper: list[float]
    use_lengths: int
    lengths_needed: bool
    tokens_for: str | None


def _plan(row: Objective, length_norm: bool, each: str | None, options: int, *given: Any) -> _Plan:
    """Of a row, given the values of its `options` options and then its hyper-parameters but `each`, name by name."""
    chosen = dict(zip(row.options, given[:options], strict=True))
    numbers = dict(zip(given[options::2], given[options + 1 :: 2], strict=True))
    taken, translate = row, None
    if chosen:
        for option, value in chosen.items():
            if value not in row.options[option]:
                known = ", ".join(repr(v) for v in row.options[option])
                raise ValueError(f"{option} must be one of {known} for {row.name}, got {value!r}")
        variant = row.variants[tuple(chosen.values())]
        taken, translate, length_norm = objective(variant.row), variant.hyper, length_norm or variant.length_norm
    values = _checks.hyper_parameters(row.name, numbers, row.domains)
    if row.joint is not None and (problem := row.joint(values)) is not None:
        raise ValueError(f"{row.name}: {problem}")
    tokens_for = row.name if row.tokens else None
    if taken.tokens and not row.tokens:
        tokens_for = f"{row.name} with {', '.join(f'{name}={value!r}' for name, value in chosen.items())}"
    if each is not None:
        taken = objective(row.per_row[each])
    if translate is not None:
        values = translate(values)
    formula_values = taken.formula_hyper(values)
    use_lengths = AVERAGE if length_norm else 0
    if taken.lengths == "average":
        use_lengths = AVERAGE | AVERAGE_REWARDS
    elif taken.lengths == "count":
        use_lengths = COUNT
    names: Sequence[str] = getattr(taken.formula, "hyper_names", _native.CPU.hyper_parameters)
    hyper = [formula_values.get(name, 1.0 if name == "beta" else 0.0) for name in names]
    return _Plan(taken, values, formula_values, hyper, use_lengths, use_lengths != 0, tokens_for)


# of calls like earlier ones; True is no number, though it equals one
_known_plan = functools.lru_cache(maxsize=1024, typed=True)(_plan)


def _check_inputs(
    row: Objective, taken: Objective, inputs: Mapping[str, object], sides: tuple[Side, ...], rows: int
) -> dict[str, Tensor]:
    """The tensors beside the log-probs, each by itself and all together."""
    given = {i.name: _check_input(row, i, inputs[i.name], sides, rows) for i in row.inputs}
    if taken.check is not None and all(_checks.readable(t) for t in given.values()):
        if (problem := taken.check(given)) is not None:
            raise ValueError(f"{row.name}: {problem}")
    return given


def evaluate(
    row: Objective,
    sides: tuple[Side, ...],
    hyper: Mapping[str, object],
    inputs: Mapping[str, object],
    *,
    options: Mapping[str, object],
    length_norm: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    process_group: Any = None,
) -> tuple[Tensor, ...]:
    """Loss and rewards of each side of a registry row; the functions of `fastpo.losses` document the arguments."""
    each = next((name for name in row.per_row if isinstance(hyper[name], Tensor)), None) if row.per_row else None
    numbers = [part for item in hyper.items() if item[0] != each for part in item]
    planned: Any = (row, length_norm, each, len(options), *options.values(), *numbers)
    try:
        # tracing follows no cache
        plan = _plan(*planned) if torch.compiler.is_compiling() else _known_plan(*planned)
    except TypeError:
        # an argument without a hash has no place in the cache, and is no number: this says so
        plan = _plan(*planned)
    taken, first = plan.taken, sides[0].policy
    needs = plan.lengths_needed, plan.tokens_for
    rows = _check_side(row, row.sides[0], sides[0], first, *needs)
    if len(sides) == 2 and (other := _check_side(row, row.sides[1], sides[1], first, *needs)) != rows:
        names = [_of(row.scores, side) for side in row.sides]
        raise ValueError(f"{names[1]} has {other} rows, {names[0]} has {rows}: pairs need as many of both")
    denominator = mean_denominator(reduction, num_items, rows, first, _of(row.scores, row.sides[0]))
    given = _check_inputs(row, taken, inputs, sides, rows) if row.inputs else {}
    if each is not None:
        given = {each: _check_input(row, Input(each, "", domain=row.domains[each]), hyper[each], sides, rows)}
    columns = tuple(given.values())
    # the compiled CPU kernel looks at boundaries itself
    if taken.prepare is not None or first.device.type != "cpu":
        _check_boundaries(row, sides)
    if taken.prepare is not None:
        group = {"group": process_group} if row.coupled else {}
        sides, columns = taken.prepare(sides, given, plan.values, **group)
    columns = tuple([c.expand(rows) if c.dim() == 0 else c for c in columns])
    constants = [s.reference for s in sides] + [s.previous for s in sides]
    streams = [s.policy for s in sides]
    streams += [t.detach() if t.requires_grad else t for t in constants if t is not None]
    formula = _kernel_of(taken, first.device, *[s.dtype for s in streams])
    if formula is None and taken.prepare is None and first.device.type == "cpu":
        _check_boundaries(row, sides)
    if formula is not None:
        layouts = [s.mask for s in sides] + [s.cu_seqlens for s in sides] + [s.lengths for s in sides]
        call = _Call(
            formula,
            plan.hyper,
            plan.formula_values.get("beta", 1.0),
            plan.use_lengths,
            reduction != "none",
            denominator,
            len(sides),
            len(row.models),
            tuple([t is not None for t in layouts]),
        )
        loss, rewards = _native.call(_Objective.apply, call, *streams, *[t for t in layouts if t is not None], *columns)
        results = (loss, *rewards.unbind(0))
    else:
        average = bool(plan.use_lengths & AVERAGE)
        loss, *each_reward = _reference(taken, sides, plan.formula_values, average, columns)
        results = (loss if reduction == "none" else mean_of(loss, denominator), *each_reward)
    if isinstance(num_items, Tensor):
        return results[0] / num_items.to(results[0].dtype), *results[1:]
    return results


def _check_boundaries(row: Objective, sides: tuple[Side, ...]) -> None:
    for name, side in zip(row.sides, sides, strict=True):
        _checks.rising(_layout_of(name, "cu_seqlens"), side.cu_seqlens, side.policy.shape[0])
