"""`policy_objective`: one scalar formula per token of sampled completions, with everything that RL adds to it.

One forward launch gives the loss, its slopes and the metrics; the slopes are written per token, before the denominator
of the aggregation, so that the backward is one multiplication. The formulas are in csrc/formulas/policy.h; how they
couple the tokens of a sequence is said there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.kernels.cuda import nvrtc
from fastpo.kernels.cuda import policy as _launch
from fastpo.kernels.objective import scaled
from fastpo.reference.policy import (
    AGGREGATIONS,
    ESTIMATORS,
    MAXIMA,
    SUMS,
    Batch,
    Level,
    Penalty,
    PolicyObjective,
    RolloutCorrection,
    estimate_kl,
    policy,
    policy_objective,
    rows_of,
)

_PLACES = {name: place for place, name in enumerate(SUMS)}


class PolicyMetrics(NamedTuple):
    """What a policy objective knows of its batch. Ranks and micro-batches add `sums` and take the larger `maxima`.

    The properties are means over the tokens that count, on the device, unless they say otherwise: 0-dimensional, fp64,
    0 for a batch without tokens. What was not given (a reference, a rollout, an entropy) is 0.

    Attributes:
        sums: fp64, by the names in `fastpo.reference.policy.SUMS`.
        maxima: fp64, by those in `MAXIMA`; -inf for a batch without tokens.
    """

    sums: Tensor
    maxima: Tensor

    def sum(self, name: str) -> Tensor:
        """One of the sums."""
        return self.sums[_PLACES[name]]

    def _mean(self, name: str) -> Tensor:
        return self.sum(name) / self.sum("tokens").clamp(min=1)

    @property
    def tokens(self) -> Tensor:
        """How many tokens count."""
        return self.sum("tokens")

    @property
    def sequences(self) -> Tensor:
        """How many sequences have one."""
        return self.sum("sequences")

    @property
    def policy_loss(self) -> Tensor:
        """The policy term with its weights, without penalties."""
        return self._mean("policy_loss")

    @property
    def clip_fraction_high(self) -> Tensor:
        """Tokens above the upper bound with A > 0 (of any A, where the method clips so)."""
        return self._mean("clipped_high")

    @property
    def clip_fraction_low(self) -> Tensor:
        """Tokens below the lower bound with A < 0 (of any A, where the method clips so)."""
        return self._mean("clipped_low")

    @property
    def clip_fraction_dual(self) -> Tensor:
        """Tokens above the dual clip, or delta, with A < 0."""
        return self._mean("clipped_dual")

    @property
    def ratio_mean(self) -> Tensor:
        """The method's ratio: of the token, or of its sequence."""
        return self._mean("ratio")

    @property
    def ratio_max(self) -> Tensor:
        """The largest."""
        return self.maxima[MAXIMA.index("ratio")]

    @property
    def ratio_min(self) -> Tensor:
        """The smallest."""
        return -self.maxima[MAXIMA.index("negative_ratio")]

    @property
    def ratio_ess(self) -> Tensor:
        """The effective sample size of the ratios over the number of tokens, in (0, 1]."""
        return self._ess("ratio", "ratio_square")

    @property
    def old_kl(self) -> Tensor:
        """The k1 estimate of KL(π_old, π): the mean of log π_old - log π. verl's ppo_kl."""
        return self._mean("old_k1")

    @property
    def old_k2(self) -> Tensor:
        """½ (log π - log π_old)²."""
        return self._mean("old_k2")

    @property
    def kl(self) -> Tensor:
        """The penalty's estimate of KL(π, π_ref), without β."""
        return self._mean("kl")

    @property
    def entropy(self) -> Tensor:
        """The entropy that was given."""
        return self._mean("entropy")

    @property
    def dropped_fraction(self) -> Tensor:
        """Tokens whose policy term the off-policy threshold took."""
        return self._mean("dropped")

    @property
    def rollout_ratio_mean(self) -> Tensor:
        """old / rollout at the level of the weights, before bounds."""
        return self._mean("rollout_ratio")

    @property
    def rollout_ratio_max(self) -> Tensor:
        """The largest."""
        return self.maxima[MAXIMA.index("rollout_ratio")]

    @property
    def rollout_ratio_min(self) -> Tensor:
        """The smallest."""
        return -self.maxima[MAXIMA.index("negative_rollout_ratio")]

    @property
    def rollout_ess(self) -> Tensor:
        """The effective sample size of these ratios over the number of tokens."""
        return self._ess("rollout_ratio", "rollout_ratio_square")

    @property
    def rollout_chi2(self) -> Tensor:
        """The mean of ratio² - 1: the χ² divergence of old from rollout."""
        return torch.where(self.tokens > 0, self._mean("rollout_ratio_square") - 1, 0)

    @property
    def rollout_kl(self) -> Tensor:
        """The k1 estimate of KL(rollout, old)."""
        return self._mean("rollout_k1")

    @property
    def rollout_k3(self) -> Tensor:
        """The k3 estimate of the same."""
        return self._mean("rollout_k3")

    @property
    def weight_mean(self) -> Tensor:
        """The off-policy weights as they are used."""
        return self._mean("weight")

    @property
    def weight_ess(self) -> Tensor:
        """Their effective sample size over the number of tokens."""
        return self._ess("weight", "weight_square")

    @property
    def truncated_fraction(self) -> Tensor:
        """Tokens whose weight a bound changed."""
        return self._mean("truncated")

    @property
    def rejected_fraction(self) -> Tensor:
        """Tokens whose weight is 0 as their ratio was outside."""
        return self._mean("rejected")

    def _ess(self, one: str, square: str) -> Tensor:
        below = self.tokens * self.sum(square)
        return self.sum(one).square() / torch.where(below > 0, below, 1)


class PolicyGradientOutput(NamedTuple):
    """What a policy objective returns.

    Attributes:
        loss: scalar, or (B,) with `reduction="none"`; the only differentiable field.
        metrics: of the same pass.
    """

    loss: Tensor
    metrics: PolicyMetrics


# `reduce` sums over the sequences. Loss and slopes are before the denominator: sums over the tokens of a sequence, or
# means with the choice `average`. The slopes are those by the log-probs and, if asked for, by the entropy (else empty).
torch.library.define(
    "fastpo::policy_objective",
    "(int formula, Tensor logprobs, Tensor? old, Tensor? reference, Tensor? rollout, Tensor? entropy, "
    "Tensor advantages, bool per_row, Tensor? mask, Tensor? selected, Tensor? cu_seqlens, float[] numbers, "
    "int[] choices, bool use_threshold, bool entropy_gradient, bool reduce) -> "
    "(Tensor loss, Tensor slopes, Tensor entropy_slopes, Tensor sums, Tensor maxima)",
)


@torch.library.register_fake("fastpo::policy_objective")
def _fake(
    formula: int,
    logprobs: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    rollout: Tensor | None,
    entropy: Tensor | None,
    advantages: Tensor,
    per_row: bool,
    mask: Tensor | None,
    selected: Tensor | None,
    cu_seqlens: Tensor | None,
    numbers: list[float],
    choices: list[int],
    use_threshold: bool,
    entropy_gradient: bool,
    reduce: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    given = [logprobs, old, reference, rollout, entropy, None if per_row else advantages]
    in_double = any(t is not None and t.dtype == torch.float64 for t in given)
    dtype = torch.float64 if in_double else torch.float32
    slopes = logprobs.new_empty(logprobs.shape, dtype=dtype)
    return (
        logprobs.new_empty(() if reduce else (rows,), dtype=dtype),
        slopes,
        logprobs.new_empty(logprobs.shape if entropy_gradient else (0,), dtype=dtype),
        logprobs.new_empty((len(SUMS),), dtype=torch.float64),
        logprobs.new_empty((len(MAXIMA),), dtype=torch.float64),
    )


def launched_by(launcher: nvrtc.Launcher) -> dict[str, Callable[..., Any]]:
    """Implementation of the op that launches the kernels of csrc/cuda from Python."""
    return {"policy_objective": functools.partial(_launch.forward, launcher)}


# kept: the implementations go with it
_LIBRARY = nvrtc.serve("policy_objective", launched_by, "policy.cuh")


class _Settings(NamedTuple):
    """What is no tensor."""

    row: str
    hyper: tuple[tuple[str, float], ...]
    penalty: Penalty
    entropy_coefficient: float
    correction: RolloutCorrection | None
    threshold: float | None
    average: bool
    reduce: bool


class _Call(NamedTuple):
    """What a call of the op has beside its tensors, and which of those of a `Batch` there are.

    `counted`, "tokens", "sequences", "rows" or "", is what the loss is divided by, times `factor`.
    """

    settings: _Settings
    numbers: list[float]
    choices: list[int]
    per_row: bool
    counted: str
    factor: float
    present: tuple[bool, ...]

    def batch(self, tensors: Sequence[Tensor]) -> Batch:
        rest = iter(tensors)
        return Batch(*[next(rest) if present else None for present in self.present])  # type: ignore[arg-type]


_ENTROPY = Batch._fields.index("entropy")


class _PolicyObjective(torch.autograd.Function):
    """The op with its gradient. Each argument of a Function takes half a microsecond: what is not there is none."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, settings = call.batch(tensors), call.settings
        place = 1 + sum(call.present[:_ENTROPY])
        entropy_gradient = batch.entropy is not None and ctx.needs_input_grad[place]
        loss, slopes, entropy_slopes, sums, maxima = torch.ops.fastpo.policy_objective(
            _native.CPU.policy_formulas[policy(settings.row).kernel],
            batch.logprobs,
            batch.old,
            batch.reference,
            batch.rollout,
            batch.entropy,
            batch.advantages,
            call.per_row,
            batch.mask,
            batch.selected,
            batch.cu_seqlens,
            call.numbers,
            call.choices,
            settings.threshold is not None,
            entropy_gradient,
            settings.reduce,
        )
        ctx.mark_non_differentiable(sums, maxima)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.divisor = call, _divisor(call.counted, call.factor, sums, batch, loss.dtype)
        ctx.save_for_backward(slopes, entropy_slopes, *tensors)
        return loss / ctx.divisor, sums, maxima

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        slopes, entropy_slopes, *tensors = ctx.saved_tensors
        call: _Call = ctx.call
        batch = call.batch(tensors)
        place = sum(call.present[:_ENTROPY])
        needed = ctx.needs_input_grad[1], batch.entropy is not None and ctx.needs_input_grad[1 + place]
        found: list[Tensor | None] = [None] * len(tensors)
        if grad is not None and True in needed:
            grads: list[Tensor | None] = [None, None]
            grad = grad / ctx.divisor
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                grads = _differentiable_backward(call.settings, batch, grad, needed)
            else:
                factor = grad
                if grad.dim() == 1:
                    factor = grad[:, None] if batch.cu_seqlens is None else _spread(grad, batch)
                for i, (s, t) in enumerate(((slopes, batch.logprobs), (entropy_slopes, batch.entropy))):
                    if needed[i]:
                        assert t is not None
                        grads[i] = scaled(s, factor).to(t.dtype)
            found[0] = grads[0]
            if needed[1]:
                found[place] = grads[1]
        return None, *found


def _spread(grad: Tensor, batch: Batch) -> Tensor:
    """Each sequence's number at its tokens; packed."""
    return grad[rows_of(batch)[0]] if len(grad) else grad.new_zeros(batch.logprobs.shape)


def _differentiable_backward(
    settings: _Settings, batch: Batch, grad: Tensor, needed: tuple[bool, bool]
) -> list[Tensor | None]:
    """The gradient as a function that can be differentiated again (create_graph), from the reference."""
    # views, so that each gradient is that of its own argument, also where one is made from the other
    logprobs = batch.logprobs.view_as(batch.logprobs)
    entropy = None if batch.entropy is None else batch.entropy.view_as(batch.entropy)
    loss = _reference(settings, batch._replace(logprobs=logprobs, entropy=entropy))[0]
    inputs = [t for t, n in zip((logprobs, entropy), needed, strict=True) if n and t is not None]
    found = iter(torch.autograd.grad(loss, inputs, grad, create_graph=True, materialize_grads=True))
    return [next(found) if n else None for n in needed]


def _reference(s: _Settings, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    loss, sums, maxima = policy_objective(
        policy(s.row),
        batch,
        dict(s.hyper),
        penalty=s.penalty,
        entropy_coefficient=s.entropy_coefficient,
        correction=s.correction,
        threshold=s.threshold,
        average=s.average,
    )
    return loss.sum() if s.reduce else loss, sums, maxima


def _check_batch(row: PolicyObjective, batch: Batch) -> None:
    names = VALUE_NAMES if row.values else TOKEN_NAMES
    of = names["logprobs"]
    logprobs = _checks.tensor(of, batch.logprobs, _checks.FLOATS)
    if batch.cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", batch.cu_seqlens, of, logprobs)
        if logprobs.dim() != 1:
            raise ValueError(f"{of} has shape {tuple(logprobs.shape)}, expected (N,) with cu_seqlens")
    elif logprobs.dim() != 2:
        raise ValueError(f"{of} has shape {tuple(logprobs.shape)}, expected (B, T), or (N,) with cu_seqlens")
    for field in ("old", "reference", "rollout", "entropy"):
        if (given := getattr(batch, field)) is not None:
            tensor = _checks.tensor(names[field], given, _checks.FLOATS)
            _checks.same_device(names[field], tensor, of, logprobs)
            _checks.shape(names[field], tensor, logprobs.shape, f"it must match {of}")
    advantages = _checks.tensor(names["advantages"], batch.advantages, _checks.FLOATS)
    _checks.same_device(names["advantages"], advantages, of, logprobs)
    if not batch.per_row and advantages.shape != logprobs.shape:
        raise ValueError(
            f"{names['advantages']} has shape {tuple(advantages.shape)}, expected {tuple(logprobs.shape)}, one per "
            f"token, or ({batch.rows},), one per sequence"
        )
    for name, given in (("mask", batch.mask), ("selected" if row.selected else "policy_mask", batch.selected)):
        if given is not None:
            _checks.tensor(name, given, (torch.bool,))
            _checks.same_device(name, given, of, logprobs)
            _checks.shape(name, given, logprobs.shape, f"it must match {of}")


TOKEN_NAMES = {
    "logprobs": "logprobs",
    "advantages": "advantages",
    "old": "old_logprobs",
    "reference": "reference_logprobs",
    "rollout": "rollout_logprobs",
    "entropy": "entropy",
}
VALUE_NAMES = {"logprobs": "values", "advantages": "returns", "old": "old_values"}


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def _not_negative(name: str, value: object) -> float:
    number = _checks.number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {number:g}")
    return number


def _check_correction(c: object) -> None:
    if not isinstance(c, RolloutCorrection):
        raise TypeError(f"correction must be a fastpo.losses.RolloutCorrection, got {type(c).__name__}")
    for name in ("level", "reject"):
        if (given := getattr(c, name)) is not None:
            _one_of(f"correction.{name}", given, get_args(Level))
    for low, high in (("low", "high"), ("reject_low", "reject_high")):
        a, b = (_checks.number(f"correction.{name}", getattr(c, name)) for name in (low, high))
        if not 0 <= a <= b:
            raise ValueError(f"correction.{low} and {high} must be 0 <= {low} <= {high}, got {a:g} and {b:g}")


_LEVELS = {None: 0, "token": 1, "sequence": 2, "sequence_mean": 3}
_NUMBERS = {
    "clip_low": -math.inf,
    "clip_high": math.inf,
    "dual_clip": math.inf,
    "weight_high": math.inf,
    "reject_high": math.inf,
}


def _numbers(s: _Settings, row: PolicyObjective) -> list[float]:
    c = s.correction or RolloutCorrection(None)
    given = {
        **row.numbers(dict(s.hyper)),
        "beta": s.penalty.beta,
        "entropy_coefficient": s.entropy_coefficient,
        "weight_low": c.low,
        "weight_high": c.high,
        "reject_low": c.reject_low,
        "reject_high": c.reject_high,
        "threshold": s.threshold or 0.0,
    }
    return [float(given.get(name, _NUMBERS.get(name, 0.0))) for name in _native.CPU.policy_numbers]


def _choices(s: _Settings, row: PolicyObjective) -> list[int]:
    c = s.correction or RolloutCorrection(None)
    given = {
        "kl": ESTIMATORS.index(s.penalty.value) + 1,
        "kl_gradient": ESTIMATORS.index(s.penalty.gradient) + 1,
        "corrected": int(s.penalty.corrected),
        "average": int(s.average),
        "weight_level": _LEVELS[c.level],
        "reject_level": _LEVELS[c.reject],
        "keep": int(row.keeps),
    }
    return [given[name] for name in _native.CPU.policy_choices]


class _Plan(NamedTuple):
    """What a call does that its tensors have no part in; `constant` is the length of const_norm, or 0."""

    settings: _Settings
    numbers: list[float]
    choices: list[int]
    constant: int


def _plan(
    row: PolicyObjective,
    beta: float,
    kl: str,
    kl_gradient: str | None,
    kl_corrected: bool,
    entropy_coefficient: float,
    correction: RolloutCorrection | None,
    threshold: float | None,
    aggregation: str,
    max_length: int | None,
    reduction: str,
    *hyper: Any,
) -> _Plan:
    """Of a row, given the arguments of `evaluate` and then the hyper-parameters, name by name."""
    values = _checks.hyper_parameters(row.name, dict(zip(hyper[::2], hyper[1::2], strict=True)), row.domains)
    if row.joint is not None and (problem := row.joint(values)) is not None:
        raise ValueError(f"{row.name}: {problem}")
    _one_of("kl", kl, ESTIMATORS)
    if kl_gradient is not None:
        _one_of("kl_gradient", kl_gradient, ESTIMATORS)
    if correction is not None:
        _check_correction(correction)
    _one_of("aggregation", aggregation, AGGREGATIONS)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be one of mean, none; got {reduction!r}")
    weight = _not_negative("beta", beta)
    settings = _Settings(
        row.name,
        tuple(values.items()),
        Penalty(weight, kl, kl_gradient or kl, bool(kl_corrected)),  # type: ignore[arg-type]
        _checks.number("entropy_coefficient", entropy_coefficient),
        correction,
        None if threshold is None else _checks.number("off_policy_threshold", threshold),
        aggregation == "seq_mean_token_mean",
        reduction == "mean",
    )
    constant = _max_length(aggregation, max_length)
    return _Plan(settings, _numbers(settings, row), _choices(settings, row), constant)


# of calls like earlier ones; True is no number, though it equals one
_known_plan = functools.lru_cache(maxsize=1024, typed=True)(_plan)


def evaluate(
    row: PolicyObjective,
    batch: Batch,
    hyper: Mapping[str, object],
    *,
    beta: float = 0.0,
    kl: str = "k3",
    kl_gradient: str | None = None,
    kl_corrected: bool = False,
    entropy_coefficient: float = 0.0,
    correction: RolloutCorrection | None = None,
    off_policy_threshold: float | None = None,
    aggregation: str = "token_mean",
    max_length: int | None = None,
    count_empty: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> PolicyGradientOutput:
    """Loss and metrics of a row of the table; the functions of `fastpo.losses` document the arguments."""
    _check_batch(row, batch)
    penalty = (beta, kl, kl_gradient, kl_corrected, entropy_coefficient)
    rest = (correction, off_policy_threshold, aggregation, max_length, reduction)
    planned: Any = (row, *penalty, *rest, *[part for item in hyper.items() for part in item])
    try:
        # tracing follows no cache
        plan = _plan(*planned) if torch.compiler.is_compiling() else _known_plan(*planned)
    except TypeError:
        # an argument without a hash has no place in the cache, and is no number: this says so
        plan = _plan(*planned)
    settings = plan.settings
    if settings.penalty.beta > 0 and batch.reference is None:
        raise ValueError(f"beta is {beta:g}, but there are no reference_logprobs: pass them, or beta=0")
    if settings.entropy_coefficient and batch.entropy is None:
        raise ValueError(f"entropy_coefficient is {entropy_coefficient:g}, but there is no entropy")
    if correction is not None and batch.rollout is None:
        raise ValueError("correction needs rollout_logprobs")
    if settings.threshold is not None and batch.rollout is None and batch.old is None:
        raise ValueError("off_policy_threshold needs old_logprobs or rollout_logprobs")
    _check_num_items(num_items, reduction, batch)
    if batch.logprobs.device.type != "cpu":
        _checks.rising("cu_seqlens", batch.cu_seqlens, batch.logprobs.shape[0])
    count, factor = _denominator(aggregation, count_empty, reduction, num_items)
    factor *= plan.constant or 1
    dtypes = [t.dtype for t in batch[:6] if t is not None]
    if _native.serves("policy_objective", batch.logprobs.device, *dtypes):
        held = [t.detach() if t is not None and t.requires_grad else t for t in batch[1:5]]
        tensors = [batch.logprobs, *held, *batch[5:]]
        present = tuple([t is not None for t in tensors])
        call = _Call(settings, plan.numbers, plan.choices, batch.per_row, count, factor, present)
        loss, sums, maxima = _native.call(_PolicyObjective.apply, call, *[t for t in tensors if t is not None])
    else:
        _checks.rising("cu_seqlens", batch.cu_seqlens, batch.logprobs.shape[0])
        loss, sums, maxima = _reference(settings, batch)
        loss = loss / _divisor(count, factor, sums, batch, loss.dtype)
    if isinstance(num_items, Tensor):
        loss = loss / num_items.to(loss.dtype)
    return PolicyGradientOutput(loss, PolicyMetrics(sums, maxima))


def _max_length(aggregation: str, max_length: object) -> int:
    if aggregation != "const_norm":
        if max_length is not None:
            raise ValueError(f"max_length is for aggregation='const_norm', got aggregation={aggregation!r}")
        return 0
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise TypeError(f"aggregation='const_norm' needs max_length, an int, got {type(max_length).__name__}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    return max_length


def _check_num_items(num_items: float | Tensor | None, reduction: str, batch: Batch) -> None:
    if num_items is None:
        if reduction == "mean" and batch.rows == 0:
            raise ValueError("reduction='mean' of an empty batch is undefined: pass num_items")
        return
    if reduction != "mean":
        raise ValueError(f"num_items is the denominator of reduction='mean', got reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        _checks.tensor("num_items", num_items, _checks.FLOATS + _checks.INTEGERS)
        if num_items.dim() != 0:
            raise ValueError(f"num_items must be a number or 0-dimensional, got shape {tuple(num_items.shape)}")
        _checks.same_device("num_items", num_items, "logprobs", batch.logprobs)
    elif not 0 < _checks.number("num_items", num_items) < math.inf:
        raise ValueError(f"num_items must be positive and finite, got {num_items}")


def _denominator(
    aggregation: str, count_empty: bool, reduction: str, num_items: float | Tensor | None
) -> tuple[str, float]:
    """What is counted of the batch, if anything, and a number: their product is the denominator."""
    if reduction != "mean" or isinstance(num_items, Tensor):
        return "", 1.0
    if num_items is not None:
        return "", float(num_items)
    if aggregation == "token_mean":
        return "tokens", 1.0
    return "rows" if count_empty or aggregation == "const_norm" else "sequences", 1.0


def _divisor(count: str, factor: float, sums: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor | float:
    # numbers stay on the host: copied to a GPU, they would be waited for
    if count in ("", "rows"):
        return factor * batch.rows if count else factor
    return sums[_PLACES[count]].clamp(min=1).to(dtype)


def kl_reward(
    logprobs: Tensor, reference_logprobs: Tensor, *, beta: float, kl: str = "k1", mask: Tensor | None = None
) -> Tensor:
    """-β KL per token, a reward: the penalty where it is right for every policy gradient.

    With k1 in the reward the optimum is π_ref e^{r/β}/Z. In the loss, k1 has no force on average, k2 has the gradient
    of KL(π, π_ref) on one step, and k3 that of KL(π_ref, π).

    Args:
        logprobs: of the policy that sampled, (B, T) or (N,); constants.
        reference_logprobs: of the same shape.
        beta: at least 0.
        kl: "k1", "k2" or "k3": d, d²/2 or e^-d - 1 + d of the log-ratio d.
        mask: bool of the same shape; elsewhere the reward is 0.

    Returns:
        fp32 (fp64 for fp64 input), of the same shape, without gradient. Add the score to the last token's.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices, a negative beta or an unknown estimator.

    Source: RL with KL penalties is better viewed as Bayesian inference (2205.11275): the objective is
    β (log Z - KL(π, π*)) with the posterior π* = π_ref e^(r/β)/Z, π_ref being the prior and e^(r/β) the evidence.
    """
    _checks.tensor("logprobs", logprobs, _checks.FLOATS)
    _checks.tensor("reference_logprobs", reference_logprobs, _checks.FLOATS)
    _checks.same_device("reference_logprobs", reference_logprobs, "logprobs", logprobs)
    _checks.shape("reference_logprobs", reference_logprobs, logprobs.shape, "it must match logprobs")
    _not_negative("beta", beta)
    _one_of("kl", kl, ESTIMATORS)
    dtype = torch.promote_types(torch.promote_types(logprobs.dtype, reference_logprobs.dtype), torch.float32)
    reward = -beta * estimate_kl(logprobs.detach().to(dtype) - reference_logprobs.detach().to(dtype), kl)
    if mask is None:
        return reward
    _checks.tensor("mask", mask, (torch.bool,))
    _checks.shape("mask", mask, logprobs.shape, "it must match logprobs")
    return torch.where(mask, reward, 0)
