"""Policy objectives on the tokens of sampled completions, in plain torch: the table of methods, and the oracle.

A row of the table is a formula per token. What all methods share is `policy_objective`: the penalty towards the
reference, the weights of off-policy data, the entropy bonus, and the metrics. The compiled kernel evaluates the same on
dual numbers (csrc/formulas/policy.h); here autograd does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.reference.registry import NOT_NEGATIVE, POSITIVE, Domain, Theory
from fastpo.reference.sequence import sequence_sum

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const_norm"]
AGGREGATIONS: tuple[Aggregation, ...] = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const_norm")
Estimator = Literal["k1", "k2", "k3"]
ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")
Level = Literal["token", "sequence", "sequence_mean"]
# log-ratios beyond it count as it, without gradient, where they are exponentiated
FURTHEST = 20.0

SUMS = (
    *("tokens", "sequences", "policy_loss", "clipped_high", "clipped_low", "clipped_dual", "ratio", "ratio_square"),
    *("old_k1", "old_k2", "kl", "entropy", "dropped", "rollout_ratio", "rollout_ratio_square", "rollout_k1"),
    *("rollout_k3", "weight", "weight_square", "truncated", "rejected"),
)
MAXIMA = ("ratio", "negative_ratio", "rollout_ratio", "negative_rollout_ratio")

EPSILON = Domain(0.0, 1.0)
UPPER = Domain(0.0, infinite=True)
ABOVE_ONE = Domain(1.0, low_open=True, infinite=True)


class RolloutCorrection(NamedTuple):
    """Weights for data whose sampler, the rollout engine, is not the policy that is held fixed in the loss.

    r is old / rollout, per token or of the sequence. A token's policy term, not its penalties, is multiplied by the
    constant w = min(max(r, low), high), and by 0 where r is outside [reject_low, reject_high]; it stays in the
    denominators. Log-ratios are cut at ±20. Decoupled PPO is `level="token"` without bounds. For the "bypass" mode pass
    the rollout's log-probs as `old_logprobs` and no correction: weighing as well would count the ratio twice.

    Attributes:
        level: of the ratio in w: "token", "sequence" (the product over the tokens) or "sequence_mean" (their geometric
            mean, whose size does not grow with the length); None for w = 1.
        low, high: bounds of w.
        reject: level of the ratio that decides, or None to reject nothing.
        reject_low, reject_high: what is kept.
    """

    level: Level | None = "token"
    low: float = 0.0
    high: float = math.inf
    reject: Level | None = None
    reject_low: float = 0.0
    reject_high: float = math.inf

    @classmethod
    def tis(cls, high: float = 2.0, *, low: float = 0.0, level: Level = "token") -> Any:
        """Truncated importance sampling. verl: C = 2; TRL: *_truncate, 3; OpenRLHF's "tis" has low 0.5, high 5."""
        return cls(level, low, high)

    @classmethod
    def mis(cls, low: float = 0.0, high: float = 3.0, *, level: Level = "sequence") -> Any:
        """Masked importance sampling: w = r inside the bounds, else 0. TRL: sequence_mask; at token level, IcePop."""
        return cls(level, 0.0, math.inf, level, low, high)

    @classmethod
    def icepop(cls, low: float = 0.5, high: float = 5.0) -> Any:
        """`mis` per token."""
        return cls.mis(low, high, level="token")

    @classmethod
    def sequence_mask(cls, low: float = 0.5, high: float = 5.0) -> Any:
        """Untruncated token weights on sequences whose geometric mean is inside. OpenRLHF: "seq-mask-tis"."""
        return cls("token", 0.0, math.inf, "sequence_mean", low, high)


@dataclass(frozen=True)
class Tokens:
    """What a formula sees: tensors that broadcast to the shape of the log-probs, in which masked places hold 0.

    Attributes:
        logprobs: differentiable.
        logratio: d, to the policy of the sampling step.
        old: that policy's log-probs.
        advantages: constants.
        selected: bool, of formulas that ask for it.
        total: the sum of a tensor over the tokens of each sequence, given back to its tokens.
        mean: the same over their number.
    """

    logprobs: Tensor
    logratio: Tensor
    old: Tensor
    advantages: Tensor
    selected: Tensor | None
    total: Callable[[Tensor], Tensor]
    mean: Callable[[Tensor], Tensor]


class Terms(NamedTuple):
    """What a formula gives per token: the loss; the ratio; what is clipped, in the metrics, and its bounds."""

    loss: Tensor
    ratio: Tensor
    bounded: Tensor
    low: float = -math.inf
    high: float = math.inf
    dual: float = math.inf
    both_sides: bool = False


# a row is itself alone: by identity it has a hash
@dataclass(frozen=True, eq=False)
class PolicyObjective:
    """A row of the table.

    Attributes:
        name: of the public function.
        title, paper, equation: where it is from.
        formula: `Terms` of `Tokens`, hyper-parameters by name.
        defaults, domains: of the hyper-parameters.
        aggregation: the method's own.
        kernel: name of the compiled formula.
        numbers: from the hyper-parameters to the compiled formula's numbers.
        theory: "gibbs" if on data of the policy its gradient is -A, so that with the divergence in the reward it leads
            to π_ref e^(r/β)/Z; else "property".
        beta: default weight of the penalty towards the reference.
        selected: what its `selected` is, in words; "" if it has none.
        keeps: whether what is not selected has no policy term; else the formula knows what to do.
        values: whether it is about a critic's values, and takes neither reference nor rollout.
        joint: what is wrong with a combination of hyper-parameters, in words, or None.
        aliases: name in other libraries.
        about: the docstring.
    """

    name: str
    title: str
    paper: str
    equation: str
    formula: Callable[..., Terms]
    defaults: Mapping[str, float]
    domains: Mapping[str, Domain]
    aggregation: Aggregation
    kernel: str
    numbers: Callable[[Mapping[str, float]], dict[str, float]]
    theory: Theory
    beta: float = 0.0
    selected: str = ""
    keeps: bool = True
    values: bool = False
    joint: Callable[[Mapping[str, float]], str | None] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    about: str = ""

    @property
    def doc(self) -> str:
        return self.about or inspect.getdoc(self.formula) or ""

    @property
    def models(self) -> tuple[str, ...]:
        """The models of which it takes numbers as it is; the policy's own past and the rollout's engine are none."""
        if self.values:
            return ("critic",)
        return ("policy", "reference") if self.beta > 0 else ("policy",)


_ROWS: dict[str, PolicyObjective] = {}


def _enter(row: PolicyObjective) -> None:
    if set(row.defaults) != set(row.domains) or row.name in _ROWS:
        raise AssertionError(f"policy row {row.name!r}: domains must name its keyword arguments, once")
    frozen: dict[str, Any] = {n: MappingProxyType(dict(getattr(row, n))) for n in ("defaults", "domains", "aliases")}
    _ROWS[row.name] = replace(row, **frozen)


def register(kernel: str | None = None, **fields: Any) -> Callable[[Callable[..., Terms]], Callable[..., Terms]]:
    """Enter the decorated formula into the table; its keyword defaults become the row's."""

    def enter(formula: Callable[..., Terms]) -> Callable[..., Terms]:
        keywords = [p for p in inspect.signature(formula).parameters.values() if p.kind is p.KEYWORD_ONLY]
        defaults = {p.name: p.default for p in keywords}
        name = formula.__name__
        _enter(PolicyObjective(name=name, formula=formula, defaults=defaults, kernel=kernel or name, **fields))
        return formula

    return enter


def derive(name: str, of: str, *, defaults: Mapping[str, float] | None = None, **changes: Any) -> None:
    """Enter a row over another's formula: what is not given is as there, but for the aliases."""
    other = _ROWS[of]
    merged = {**other.defaults, **(defaults or {})}
    _enter(replace(other, name=name, defaults=merged, **{"aliases": {}, **changes}))


def policies() -> Iterator[PolicyObjective]:
    """All rows, in the order in which they were registered."""
    return iter(_ROWS.values())


def policy(name: str) -> PolicyObjective:
    """The row of one objective; KeyError if there is none."""
    return _ROWS[name]


def _ratio(logratio: Tensor) -> Tensor:
    return logratio.clamp(-FURTHEST, FURTHEST).exp()


def _clipped(t: Tokens, ratio: Tensor, low: float, high: float, dual: float = math.inf) -> Terms:
    """PPO's pessimistic surrogate with the ratio clipped to [1 - low, 1 + high]."""
    a = t.advantages
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    if dual < math.inf:
        loss = torch.where(a < 0, torch.minimum(loss, -a * dual), loss)
    return Terms(loss, ratio, ratio, 1 - low, 1 + high, dual)


def _bounds(h: Mapping[str, float]) -> dict[str, float]:
    return {"clip_low": 1 - h["epsilon_low"], "clip_high": 1 + h["epsilon_high"]}


def _ppo_numbers(h: Mapping[str, float]) -> dict[str, float]:
    return {**_bounds(h), "dual_clip": h["dual_clip"]}


_EPSILONS = {"epsilon_low": EPSILON, "epsilon_high": UPPER}


@register(
    kernel="clipped",
    title="Proximal Policy Optimization",
    paper="arXiv:1707.06347; dual clip: arXiv:1912.09729",
    equation="Eq. 7; dual clip: Eq. 5",
    domains={**_EPSILONS, "dual_clip": ABOVE_ONE},
    aggregation="token_mean",
    numbers=_ppo_numbers,
    theory="gibbs",
    aliases={"verl": "vanilla (dual clip 3)", "openrlhf": "PolicyLoss", "trl": "PPOTrainer"},
)
def ppo(t: Tokens, *, epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float = math.inf) -> Terms:
    """max(-A ρ, -A clip(ρ, 1 - ε_low, 1 + ε_high)), and at most -A c, c = dual_clip, where A < 0; ρ = π/π_old.

    verl takes c = 3; the paper and TRL have none, c = inf. Decoupled PPO and bypass: see `RolloutCorrection`.
    """
    return _clipped(t, _ratio(t.logratio), epsilon_low, epsilon_high, dual_clip)


def _delta(h: Mapping[str, float]) -> str | None:
    if h["delta"] <= 1 + h["epsilon_high"]:
        return f"delta must be above 1 + epsilon_high = {1 + h['epsilon_high']:g}, got {h['delta']:g}"
    return None


@register(
    kernel="clipped",
    title="Group Relative Policy Optimization",
    paper="arXiv:2402.03300; delta: arXiv:2505.07291",
    equation="Eq. 3 and 4",
    domains={**_EPSILONS, "delta": ABOVE_ONE},
    aggregation="seq_mean_token_mean",
    numbers=lambda h: {**_bounds(h), "dual_clip": h["delta"]},
    theory="gibbs",
    beta=0.04,
    joint=_delta,
    aliases={
        "trl": 'GRPOTrainer, loss_type="grpo" (its default is dapo, and β = 0)',
        "verl": "vanilla with seq-mean-token-mean",
        "liger": "LigerFusedLinearGRPOLoss",
        "openrlhf": "group_norm",
    },
)
def grpo(t: Tokens, *, epsilon_low: float = 0.2, epsilon_high: float = 0.2, delta: float = math.inf) -> Terms:
    """max(-A min(ρ, δ), -A clip(ρ, 1 - ε_low, 1 + ε_high)) + β KL, ρ = π/π_old, A the group's normalised advantages.

    δ bounds ρ where A < 0 (two-sided clipping). It is what PPO calls dual clip.
    """
    a, ratio = t.advantages, _ratio(t.logratio)
    bounded = ratio.clamp(max=delta) if delta < math.inf else ratio
    loss = torch.maximum(-a * bounded, -a * ratio.clamp(1 - epsilon_low, 1 + epsilon_high))
    return Terms(loss, ratio, ratio, 1 - epsilon_low, 1 + epsilon_high, delta)


derive(
    "dr_grpo",
    "grpo",
    title="GRPO Done Right",
    paper="arXiv:2503.20783",
    equation="Section 3.1",
    aggregation="const_norm",
    beta=0.0,
    aliases={"trl": 'loss_type="dr_grpo"', "verl": "seq-mean-token-sum-norm (it does not divide by B)"},
    about="""`grpo` with every token divided by the same constant, B · max_length, and without a penalty.

The advantages are not divided by the group's standard deviation. verl's aggregation divides by max_length alone, so
that its gradient grows with the batch.""",
)
derive(
    "dapo",
    "grpo",
    title="Decoupled Clip and Dynamic Sampling Policy Optimization",
    paper="arXiv:2503.14476",
    equation="Eq. 8 to 13",
    aggregation="token_mean",
    defaults={"epsilon_high": 0.28},
    beta=0.0,
    aliases={"trl": 'loss_type="dapo"', "liger": "dapo", "verl": "vanilla with token-mean"},
    about="""`grpo` with a higher upper bound, averaged over all tokens of the batch, and without a penalty.

`fastpo.losses.mixed_groups` is its dynamic sampling, `overlong_mask` its overlong filter. Give the tokens of the whole
batch as `num_items`: a mean of micro-batches' means is another loss.""",
)


@register(
    title="Group Sequence Policy Optimization",
    paper="arXiv:2507.18071",
    equation="Eq. 5 to 7",
    domains=_EPSILONS,
    aggregation="seq_mean_token_mean",
    numbers=_bounds,
    theory="gibbs",
    aliases={
        "trl": 'importance_sampling_level="sequence"',
        "liger": 'importance_sampling_level="sequence"',
        "openrlhf": "gspo",
    },
)
def gspo(t: Tokens, *, epsilon_low: float = 3e-4, epsilon_high: float = 4e-4) -> Terms:
    """max(-A s, -A clip(s, 1 - ε_low, 1 + ε_high)), s = exp(mean of the sequence's log-ratios)."""
    return _clipped(t, _ratio(t.mean(t.logratio)), epsilon_low, epsilon_high)


@register(
    title="GSPO per token",
    paper="arXiv:2507.18071",
    equation="Eq. 13 and 14",
    domains=_EPSILONS,
    aggregation="seq_mean_token_mean",
    numbers=_bounds,
    theory="gibbs",
    aliases={"verl": "gspo (its default clip_ratio 0.2 is far too wide)", "trl": "gspo_token"},
)
def gspo_token(t: Tokens, *, epsilon_low: float = 3e-4, epsilon_high: float = 4e-4) -> Terms:
    """GSPO's value with token gradients: s_t = sg[s] π/sg[π]; equal to `gspo` where A is one number per sequence."""
    held = _ratio(t.mean(t.logratio)).detach()
    return _clipped(t, held * (t.logratio - t.logratio.detach()).exp(), epsilon_low, epsilon_high)


@register(
    title="Clipped IS-weight Policy Optimization",
    paper="arXiv:2506.13585",
    equation="Eq. 4 and 5",
    domains=_EPSILONS,
    aggregation="token_mean",
    numbers=lambda h: {**_bounds(h), "both_sides": 1.0},
    theory="gibbs",
    aliases={"trl": "cispo (epsilon_high is the cap 1 + ε_high itself)", "verl": "cispo", "liger": "cispo"},
)
def cispo(t: Tokens, *, epsilon_low: float = 1.0, epsilon_high: float = 4.0) -> Terms:
    """-sg[clip(ρ, 1 - ε_low, 1 + ε_high)] A log π: every token keeps a gradient. The value is a surrogate.

    The paper gives no bounds: these are no lower one, and ScaleRL's cap of 5.
    """
    ratio = _ratio(t.logratio)
    weight = ratio.clamp(1 - epsilon_low, 1 + epsilon_high).detach()
    return Terms(-weight * t.advantages * t.logprobs, ratio, ratio, 1 - epsilon_low, 1 + epsilon_high, both_sides=True)


@register(
    title="Geometric-Mean Policy Optimization",
    paper="arXiv:2507.20673",
    equation="not verified",
    domains={"epsilon_low": NOT_NEGATIVE, "epsilon_high": NOT_NEGATIVE},
    aggregation="seq_mean_token_mean",
    numbers=lambda h: {"clip_low": -h["epsilon_low"], "clip_high": h["epsilon_high"]},
    theory="gibbs",
    aliases={"trl": "gmpo", "verl": "geo_mean (bounds 0.2, and the mean counts fully masked rows)"},
)
def gmpo(t: Tokens, *, epsilon_low: float = 0.4, epsilon_high: float = 0.4) -> Terms:
    """-A exp(mean of the clipped log-ratios); clipped above at ε_high where A > 0, below at -ε_low where A < 0."""
    a, d = t.advantages, t.logratio
    clipped = d.clamp(-epsilon_low, epsilon_high)
    chosen = torch.where(a > 0, torch.minimum(d, clipped), torch.where(a < 0, torch.maximum(d, clipped), 0))
    ratio = _ratio(t.mean(chosen))
    return Terms(-a * ratio, ratio, d, -epsilon_low, epsilon_high)


@register(
    title="Soft Adaptive Policy Optimization",
    paper="arXiv:2511.20347",
    equation="not verified",
    domains={"tau_positive": POSITIVE, "tau_negative": POSITIVE},
    aggregation="seq_mean_token_mean",
    numbers=dict,
    theory="gibbs",
    aliases={"trl": "sapo", "verl": "sapo", "liger": "sapo"},
)
def sapo(t: Tokens, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Terms:
    """-A (4/τ) σ(τ (ρ - 1)), τ by the sign of A. Its value on-policy is -2A/τ, its gradient -A."""
    a, ratio = t.advantages, _ratio(t.logratio)
    tau = torch.where(a > 0, a.new_tensor(tau_positive), a.new_tensor(tau_negative))
    return Terms(-a * (4 / tau) * torch.sigmoid(tau * (ratio - 1)), ratio, ratio)


@register(
    title="VESPO",
    paper="a loss type of TRL; the paper was not seen",
    equation="TRL's code",
    domains={name: NOT_NEGATIVE for name in ("k_positive", "lambda_positive", "k_negative", "lambda_negative")},
    aggregation="token_mean",
    numbers=dict,
    theory="gibbs",
    aliases={"trl": "vespo", "liger": "vespo"},
)
def vespo(
    t: Tokens,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> Terms:
    """-sg[φ] A log π, φ = exp(λ + k log w - λ w), w the ratio of the sequence; k and λ by the sign of A.

    log w is the sum of log-ratios, between log 1e-8 and 20. Off-policy weights multiply the loss, as in every method
    here; TRL multiplies them into w.
    """
    a = t.advantages
    x = t.total(t.logratio.detach().clamp(-FURTHEST, FURTHEST)).clamp(math.log(1e-8), FURTHEST)
    k = torch.where(a < 0, a.new_tensor(k_negative), a.new_tensor(k_positive))
    lambda_ = torch.where(a < 0, a.new_tensor(lambda_negative), a.new_tensor(lambda_positive))
    ratio = _ratio(t.logratio)
    return Terms(-torch.exp(lambda_ + k * x - lambda_ * x.exp()) * a * t.logprobs, ratio, ratio)


derive(
    "luspo",
    "gspo",
    title="LUSPO",
    paper="a loss type of TRL; the paper was not seen",
    equation="TRL's code",
    aggregation="seq_mean_token_sum",
    aliases={"trl": "luspo (with a penalty or token weights its mean counts padding)", "liger": "luspo (the same)"},
    about="""|y| max(-A s, -A clip(s, 1 - ε_low, 1 + ε_high)), averaged over the sequences: `gspo` times the length.

A penalty or a weight per token is summed over the sequence as well.""",
)


@register(
    kernel="reinforce",
    title="REINFORCE",
    paper="Williams (1992); for language models: arXiv:2402.14740",
    equation="Eq. 6",
    domains={},
    aggregation="token_mean",
    numbers=dict,
    theory="gibbs",
    aliases={"openrlhf": "reinforce", "verl": "gpg"},
)
def reinforce(t: Tokens) -> Terms:
    """-A log π: the gradient on data of the policy itself, with the advantages of RLOO, ReMax, OPO or GPG.

    `aggregation="seq_mean_token_sum"` is RLOO's log-prob of the whole sequence. `old_logprobs` serve the metrics only.
    """
    ratio = _ratio(t.logratio)
    return Terms(-t.advantages * t.logprobs, ratio, ratio)


derive(
    "clip_cov",
    "ppo",
    title="Clip-Cov, of The Entropy Mechanism",
    paper="arXiv:2505.22617",
    equation="Eq. 10 to 12",
    theory="property",
    selected="the tokens that keep their policy term, from `clip_cov_tokens`",
    aliases={"verl": "clip_cov"},
    about="""`ppo` without the tokens whose covariance of log-prob and advantage is high; denominators are unchanged.

The official scripts disable the ordinary clipping (epsilon_low=1, epsilon_high=inf).""",
)


@register(
    kernel="kl_cov",
    title="KL-Cov, of The Entropy Mechanism",
    paper="arXiv:2505.22617",
    equation="Eq. 13 and 14",
    domains={"penalty": NOT_NEGATIVE},
    aggregation="token_mean",
    numbers=dict,
    theory="property",
    selected="the tokens that are penalised, from `kl_cov_tokens`",
    keeps=False,
    aliases={"verl": "kl_cov"},
)
def kl_cov(t: Tokens, *, penalty: float = 1.0) -> Terms:
    """-A ρ, plus penalty · |log ρ| on the tokens of highest covariance. There is no clipping.

    On the policy's own data, ρ = 1, the penalty has no gradient.
    """
    ratio = _ratio(t.logratio)
    plain = -t.advantages * ratio
    assert t.selected is not None
    return Terms(torch.where(t.selected, plain + penalty * t.logratio.abs(), plain), ratio, ratio)


@register(
    kernel="value_clip",
    title="Clipped value loss of PPO",
    paper="practice after arXiv:1707.06347",
    equation="OpenAI baselines, ppo2",
    domains={"epsilon": NOT_NEGATIVE},
    aggregation="token_mean",
    numbers=lambda h: {"clip_low": -h["epsilon"], "clip_high": h["epsilon"], "both_sides": 1.0},
    theory="property",
    values=True,
    aliases={"verl": "compute_value_loss (0.5)", "openrlhf": "ValueLoss", "trl": "PPOTrainer (vf_coef 0.1 outside)"},
)
def value_clip(t: Tokens, *, epsilon: float = 0.2) -> Terms:
    """½ max((v - R)², (clip(v, v_old - ε, v_old + ε) - R)²); the metrics' ratio has no meaning here."""
    clipped = t.old + t.logratio.clamp(-epsilon, epsilon)
    loss = 0.5 * torch.maximum((t.logprobs - t.advantages).square(), (clipped - t.advantages).square())
    return Terms(loss, _ratio(t.logratio), t.logratio, -epsilon, epsilon, both_sides=True)


class Batch(NamedTuple):
    """The tensors of a call. Log-probs are (B, T), or (N,) with cu_seqlens; advantages so too, or (B,)."""

    logprobs: Tensor
    advantages: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    rollout: Tensor | None = None
    entropy: Tensor | None = None
    mask: Tensor | None = None
    selected: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def rows(self) -> int:
        """The number of sequences."""
        return self.logprobs.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def per_row(self) -> bool:
        """Whether there is one advantage per sequence."""
        return self.advantages.dim() == 1 and self.advantages.shape[0] == self.rows


class Penalty(NamedTuple):
    """β times an estimator of KL(π, reference): its value and gradient, and whether the ratio multiplies it."""

    beta: float = 0.0
    value: Estimator = "k3"
    gradient: Estimator = "k3"
    corrected: bool = False


NO_PENALTY = Penalty()


class Sums(NamedTuple):
    """Loss per sequence (B,), before the denominator; sums over tokens, and maxima."""

    loss: Tensor
    sums: Tensor
    maxima: Tensor


def estimate_kl(logratio: Tensor, estimator: str) -> Tensor:
    """k1, k2 or k3 of a log-ratio, log π - log π_ref, of samples of π."""
    if estimator == "k1":
        return logratio
    if estimator == "k2":
        return 0.5 * logratio.square()
    return torch.expm1((-logratio).clamp(-FURTHEST, FURTHEST)) + logratio


def rows_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which sequence each token belongs to (0 where none), and whether it counts; in the shape of the log-probs."""
    p = batch.logprobs
    counts = torch.ones_like(p, dtype=torch.bool) if batch.mask is None else batch.mask
    if batch.cu_seqlens is None:
        return torch.arange(p.shape[0], device=p.device)[:, None].expand_as(p), counts
    position = torch.arange(p.shape[0], device=p.device)
    row = torch.searchsorted(batch.cu_seqlens[1:].long(), position, right=True)
    inside = row < len(batch.cu_seqlens) - 1
    return torch.where(inside, row, 0), counts & inside


def policy_objective(
    row: PolicyObjective,
    batch: Batch,
    hyper: Mapping[str, float],
    *,
    penalty: Penalty = NO_PENALTY,
    entropy_coefficient: float = 0.0,
    correction: RolloutCorrection | None = None,
    threshold: float | None = None,
    average: bool = False,
) -> Sums:
    """Loss per sequence, differentiated by torch: the sum over its tokens, or with `average` their mean."""
    index, counts = rows_of(batch)
    rows = batch.rows
    dtype = torch.promote_types(batch.logprobs.dtype, torch.float32)
    given = [batch.old, batch.reference, batch.rollout, batch.entropy]
    for t in (*given, None if batch.per_row else batch.advantages):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)

    def per_sequence(values: Tensor) -> Tensor:
        return sequence_sum(values.expand(counts.shape), counts, batch.cu_seqlens)[0]

    def back(values: Tensor) -> Tensor:
        return values[index] if rows else values.new_zeros(index.shape)

    def clean(t: Tensor | None, constant: bool = True) -> Tensor | None:
        if t is None:
            return None
        return torch.where(counts, (t.detach() if constant else t).to(dtype), 0)

    lengths = per_sequence(counts.to(dtype))
    length = lengths.clamp(min=1)

    def total(values: Tensor) -> Tensor:
        return back(per_sequence(values))

    def mean(values: Tensor) -> Tensor:
        return back(per_sequence(values) / length)

    logprobs = clean(batch.logprobs, constant=False)
    assert logprobs is not None
    old, reference, rollout, entropy = (
        clean(t, constant=t is not batch.entropy) for t in (batch.old, batch.reference, batch.rollout, batch.entropy)
    )
    if old is None:
        old = logprobs.detach()
    advantages = batch.advantages.detach().to(dtype)
    advantages = torch.where(counts, back(advantages) if batch.per_row else advantages, 0)
    tokens = Tokens(logprobs, logprobs - old, old, advantages, batch.selected, total, mean)
    terms = row.formula(tokens, **hyper)
    sums = dict.fromkeys(SUMS, torch.zeros((), dtype=torch.float64, device=logprobs.device))
    maxima = dict.fromkeys(MAXIMA, torch.full_like(sums["tokens"], -math.inf))

    def add(name: str, values: Tensor) -> None:
        sums[name] = torch.where(counts, values.detach(), 0).double().sum()

    def top(name: str, values: Tensor) -> None:
        if values.numel():
            maxima[name] = torch.where(counts, values.detach(), -math.inf).max().double()
            maxima[f"negative_{name}"] = torch.where(counts, -values.detach(), -math.inf).max().double()

    above, below = terms.bounded > terms.high, terms.bounded < terms.low
    if not terms.both_sides:
        above, below = above & (advantages > 0), below & (advantages < 0)
    add("tokens", counts)
    sums["sequences"] = (lengths > 0).sum().double()
    add("clipped_high", above)
    add("clipped_low", below)
    add("clipped_dual", (terms.bounded > terms.dual) & (advantages < 0))
    add("ratio", terms.ratio)
    add("ratio_square", terms.ratio.square())
    top("ratio", terms.ratio)
    add("old_k1", -tokens.logratio)
    add("old_k2", 0.5 * tokens.logratio.square())

    kept = counts
    if batch.selected is not None and row.keeps:
        kept = kept & batch.selected
    if threshold is not None:
        drift = mean((rollout if rollout is not None else old) - logprobs.detach())
        stays = kept & ((advantages >= 0) | (drift <= threshold))
        add("dropped", kept & ~stays)
        kept = stays
    loss = terms.loss
    if rollout is not None:
        c = RolloutCorrection(None) if correction is None else correction
        logratio = old - rollout
        ratios = {"token": _ratio(logratio)}
        if "sequence" in (c.level, c.reject):
            ratios["sequence"] = _ratio(total(logratio))
        if "sequence_mean" in (c.level, c.reject):
            ratios["sequence_mean"] = _ratio(mean(logratio))
        raw = ratios[c.level or "token"]
        weight = torch.ones_like(raw) if c.level is None else raw.clamp(c.low, c.high)
        if c.level is not None:
            add("truncated", raw != weight)
        if c.reject is not None:
            accepted = (ratios[c.reject] >= c.reject_low) & (ratios[c.reject] <= c.reject_high)
            add("rejected", ~accepted)
            weight = torch.where(accepted, weight, 0)
        add("rollout_ratio", raw)
        add("rollout_ratio_square", raw.square())
        top("rollout_ratio", raw)
        add("rollout_k1", -logratio)
        add("rollout_k3", estimate_kl(-logratio, "k3"))
        add("weight", weight)
        add("weight_square", weight.square())
        loss = weight * loss
        kept = kept & (weight > 0)
    loss = torch.where(kept, loss, 0)
    add("policy_loss", loss)
    if reference is not None:
        logratio = logprobs - reference
        kl = estimate_kl(logratio, penalty.value)
        if penalty.gradient != penalty.value:
            other = estimate_kl(logratio, penalty.gradient)
            kl = kl.detach() + other - other.detach()
        if penalty.corrected:
            kl = terms.ratio * kl
        add("kl", kl)
        loss = loss + penalty.beta * kl
    if entropy is not None:
        add("entropy", entropy)
        loss = loss - entropy_coefficient * entropy
    per_row_loss = per_sequence(loss)
    if average:
        per_row_loss = per_row_loss / length
    return Sums(per_row_loss, torch.stack(list(sums.values())), torch.stack(list(maxima.values())))
