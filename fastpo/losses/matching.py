"""Distribution matching: the policy π is led to p = P/Z, of which P alone is known, by samples of a proposal q.

P(x) = a(x) exp(λ φ(x)) of an energy-based model, or a(x) exp(r(x)/β) as in RL with a KL penalty, is given by its log:
log P = log a + r/β; log P = -inf where x is forbidden. `PartitionEstimate` and `RewardBaseline` are what the
objectives know of the past. Everything is in log space and in double.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.objective import Reduction
from fastpo.losses._tokens import check_rows, logprob_sums, number_in, reducer
from fastpo.reference.ranks import gathered

if TYPE_CHECKING:
    from fastpo.reference.ranks import Group

MatchedDivergence = Literal["forward_kl", "reverse_kl", "jsd", "total_variation", "forward_chi2", "reverse_chi2"]


class _Reward(NamedTuple):
    """-f'(t) = coefficient · t^power + rest(log t), t = π/p; the power by itself, as it goes into the exponent."""

    coefficient: float
    power: float
    rest: Callable[[Tensor], Tensor]


_REWARDS: dict[str, _Reward] = {
    "forward_kl": _Reward(1.0, -1.0, torch.zeros_like),
    "reverse_kl": _Reward(0.0, 0.0, lambda log_t: -log_t - 1),
    "jsd": _Reward(0.0, 0.0, lambda log_t: torch.logaddexp(torch.zeros_like(log_t), -log_t) - math.log(2)),
    "total_variation": _Reward(0.0, 0.0, lambda log_t: -log_t.sign() / 2),
    "forward_chi2": _Reward(1.0, -2.0, lambda log_t: torch.full_like(log_t, -1)),
    "reverse_chi2": _Reward(-2.0, 1.0, lambda log_t: torch.full_like(log_t, 2)),
}
# where p = 0 their reward is -inf
_NEED_SUPPORT = ("reverse_kl", "reverse_chi2")


class MatchingMetrics(NamedTuple):
    """Estimates from the samples, 0-dimensional, without gradient; over rows whose context has an estimate of Z.

    Attributes:
        forward_kl: KL(p, π), mean of p/q log(p/π).
        reverse_kl: KL(π, p), mean of π/q log(π/p); inf where π samples what p forbids.
        total_variation: half the mean of |p/q - π/q|.
        effective_samples: (Σ P/q)² / Σ (P/q)², at most the number of rows; 0 where all P are 0.
    """

    forward_kl: Tensor
    reverse_kl: Tensor
    total_variation: Tensor
    effective_samples: Tensor


class MatchingOutput(NamedTuple):
    """What an objective of distribution matching returns.

    Attributes:
        loss: scalar, or (B,) with `reduction="none"`; the only differentiable field. A surrogate: its gradient is the
            estimate, its value is not the divergence.
        pseudo_rewards: (B,), -f'(π/p), what `RewardBaseline.update` takes; NaN where the context has no estimate yet.
        metrics: MatchingMetrics.
    """

    loss: Tensor
    pseudo_rewards: Tensor
    metrics: MatchingMetrics


def _metrics(policy: Tensor, proposal: Tensor, target: Tensor, known: Tensor, dtype: torch.dtype) -> MatchingMetrics:
    """From log π, log q and log p; `known` where log p means something."""
    count = known.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return (torch.where(known, values, 0).sum() / count).to(dtype)

    log_w, log_v = target - proposal, policy - proposal
    w, v = log_w.exp(), log_v.exp()
    # 0 log 0 = 0
    forward = torch.where(w > 0, w * torch.where(w > 0, target - policy, 0), 0)
    total, squares = (torch.where(known, w**k, 0).sum() for k in (1, 2))
    effective = torch.where(total > 0, total.square() / torch.where(total > 0, squares, 1), 0)
    reverse = torch.where(v > 0, v * torch.where(v > 0, policy - target, 0), 0)
    return MatchingMetrics(mean(forward), mean(reverse), mean((w - v).abs() / 2), effective.to(dtype))


def _finite(name: str, values: Tensor, *, minus: bool = False) -> None:
    """Check values where they may be looked at; -inf is allowed with `minus`."""
    if _checks.readable(values):
        bad = (~(values.isfinite() | (values == -math.inf) if minus else values.isfinite())).nonzero()
        if len(bad):
            at = int(bad[0])
            least = "finite, or -inf where P is 0" if minus else "finite"
            raise ValueError(f"{name}[{at}] is {values[at].item()}, but it must be {least}")


def f_dpg(
    policy: Tensor,
    proposal: Tensor,
    log_targets: Tensor,
    log_z: Tensor,
    *,
    divergence: MatchedDivergence = "forward_kl",
    baseline: float | Tensor = 0.0,
    min_reward: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> MatchingOutput:
    """-π/q (-f'(π/p) - baseline) log π, the first two constant: its gradient is E_q's estimate of ∇ D_f(π, p).

        D_f(π, p) = E_p f(t), t = π/p        -f'(t)
        forward_kl       KL(p, π)            1/t; π/q times it is p/q: GDC, and DPG but for Z
        reverse_kl       KL(π, p)            -log t - 1; RL with a KL penalty
        jsd              twice the usual     softplus(-log t) - log 2
        total_variation                      -sign(log t) / 2
        forward_chi2     χ²(p, π)            1/t² - 1
        reverse_chi2     χ²(π, p)            2 - 2t

    A baseline leaves the expectation as it is. That of a Z that is wrong by a factor leads to the same policy, but not
    along the gradient of the divergence.

    Source: f-DPG, arXiv:2302.08215, Theorem 1 and Table 1. Elsewhere: disco: FDPGTuner.

    Args:
        policy: log π of the samples, fp32, bf16, fp16 or fp64: summed (B,); or per token, padded (B, T), or packed (N,)
            with cu_seqlens.
        proposal: log q, of the same shape, q being what the samples are from; constants.
        log_targets: (B,), log P, at least -inf; constants.
        log_z: (), or (B,), log Z of each context, as `PartitionEstimate.update` gives it; constants. Rows where it is
            -inf, because no sample so far was allowed, have no target and no gradient.
        divergence: one of the names above.
        baseline: a number, () or (B,): `RewardBaseline.value`.
        min_reward: pseudo-rewards are at least that. Without it, forbidden samples (P = 0) are an error for reverse_kl
            and reverse_chi2, where theirs is -inf; for the others it is bounded.
        mask, cu_seqlens: the layout of token log-probs; what does not count has no influence, NaN included.
        reduction, num_items: as in `fastpo.losses.dpo`.

    Returns:
        MatchingOutput, fp32 (fp64 for fp64 input).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes or devices do not match; log_targets is inf or NaN, or above -inf where log_z is -inf; or
            -inf where the divergence needs P > 0. Where values may not be looked at, the loss is then infinite or NaN.
    """
    if divergence not in _REWARDS:
        raise ValueError(f"divergence must be one of {', '.join(map(repr, _REWARDS))}, got {divergence!r}")
    if min_reward is not None and not abs(_checks.number("min_reward", min_reward)) < math.inf:
        raise ValueError(f"min_reward must be finite, got {min_reward}")
    _checks.tensor("policy", policy, _checks.FLOATS)
    _checks.tensor("proposal", proposal, _checks.FLOATS)
    _checks.same_device("proposal", proposal, "policy", policy)
    _checks.shape("proposal", proposal, policy.shape, "it must match policy")
    ours = logprob_sums("policy", policy, mask, cu_seqlens)
    theirs = logprob_sums("proposal", proposal.detach(), mask, cu_seqlens).double()
    rows = len(ours)
    check_rows("log_targets", log_targets, "policy", policy, rows)
    check_rows("log_z", log_z, "policy", policy, rows, shared=True)
    if isinstance(baseline, Tensor):
        check_rows("baseline", baseline, "policy", policy, rows, shared=True)
        baseline = baseline.detach().double()
    elif not abs(_checks.number("baseline", baseline)) < math.inf:
        raise ValueError(f"baseline must be finite, got {baseline}")
    reduce = reducer(reduction, num_items, rows, policy, "policy")
    _finite("log_targets", log_targets, minus=True)
    _finite("log_z", log_z.reshape(-1), minus=True)

    logp, z = ours.detach().double(), log_z.detach().double().expand(rows)
    known, target = z > -math.inf, log_targets.detach().double()
    if _checks.readable(z) and len(at := (~known & (target > -math.inf)).nonzero()):
        raise ValueError(
            f"log_z is -inf, but log_targets[{int(at[0])}] is {target[at[0]].item():g}: "
            "the estimate of Z must have seen the samples"
        )
    target = torch.where(known, target - torch.where(known, z, 0), -math.inf)
    log_t = torch.where(known, logp - target, 0)
    forbidden = known & (target == -math.inf)
    if divergence in _NEED_SUPPORT and min_reward is None and _checks.readable(target) and forbidden.any():
        raise ValueError(
            f"log_targets[{int(forbidden.nonzero()[0])}] is -inf: the pseudo-reward of {divergence} is -inf where "
            "P is 0; give a min_reward, or take jsd or total_variation"
        )
    coefficient, power, rest = _REWARDS[divergence]
    log_ratio, bounded = logp - theirs, rest(log_t)
    rewards, weight = bounded, log_ratio.exp() * (bounded - baseline)
    if coefficient:
        # in one exponent: π/q may be 0 where 1/t is inf
        rewards = rewards + coefficient * (power * log_t).exp()
        weight = weight + coefficient * (power * log_t + log_ratio).exp()
    if min_reward is not None:
        low = rewards < min_reward
        rewards = rewards.clamp(min=min_reward)
        weight = torch.where(low, log_ratio.exp() * (min_reward - baseline), weight)
    weight = torch.where(known, weight, 0)
    each = -weight.to(ours.dtype) * ours
    metrics = _metrics(logp, theirs, target, known, ours.dtype)
    rewards = torch.where(known, rewards, math.nan).to(ours.dtype)
    return MatchingOutput(reduce(each), rewards, metrics)


def dpg(
    policy: Tensor,
    proposal: Tensor,
    log_targets: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> MatchingOutput:
    """-P/q log π, the weight constant: Z times the gradient of KL(p, π), without knowing Z.

    Source: Distributional policy gradient, arXiv:1912.08517 (from memory); GDC, arXiv:2012.11635.

    Args, returns, raises: as `f_dpg`. The pseudo-rewards are P/π, and the metrics those of Z = 1.
    """
    z = policy.new_zeros((), dtype=torch.float32) if isinstance(policy, Tensor) else torch.zeros(())
    layout: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "reduction": reduction, "num_items": num_items}
    return f_dpg(policy, proposal, log_targets, z, **layout)


def gdc(
    policy: Tensor,
    proposal: Tensor,
    log_targets: Tensor,
    log_z: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> MatchingOutput:
    """-p/q log π, the weight constant: `f_dpg` of the forward KL without a baseline.

    The paper replaces q by π whenever π has come closer to p: compare `metrics.forward_kl` on the same samples.

    Source: A distributional approach to controlled text generation, arXiv:2012.11635, Algorithm 1.

    Args, returns, raises: as `f_dpg`.
    """
    layout: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "reduction": reduction, "num_items": num_items}
    return f_dpg(policy, proposal, log_targets, log_z, **layout)


def gdc_plus_plus(
    policy: Tensor,
    proposal: Tensor,
    log_targets: Tensor,
    log_z: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> MatchingOutput:
    """-(p/q - π/q) log π, the weight constant: `f_dpg` of the forward KL with the baseline 1, its variance 0 at π = p.

    Source: On reinforcement learning and distribution matching, arXiv:2206.00761 (from memory).

    Args, returns, raises: as `f_dpg`.
    """
    layout: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "reduction": reduction, "num_items": num_items}
    return f_dpg(policy, proposal, log_targets, log_z, baseline=1.0, **layout)


class PartitionEstimate:
    """log Z of each context, Z the mean of P/q over its samples so far. The state is saved with checkpoints.

    Args:
        decay: what a context's earlier samples weigh at each of its updates, in (0, 1]; 1 for the mean of all, which
            stays unbiased when q changes.

    Source: arXiv:2012.11635, §3, and its contextual form in arXiv:2302.08215.
    """

    def __init__(self, *, decay: float = 1.0) -> None:
        self.decay = number_in("decay", decay, 0, 1, closed="high")
        # the log of the sum of P/q, and the number of samples that it is of
        self._sums: dict[int, tuple[float, float]] = {}

    def update(self, log_weights: Tensor, contexts: Tensor | None = None, *, process_group: Group = None) -> Tensor:
        """Take samples in; returns log Z of each row's context, these samples among its own.

        Args:
            log_weights: (B,), log P - log q, summed over the sequence; -inf where P is 0.
            contexts: int64 or int32 (B,), which context each sample is of; None: all are of one.
            process_group: ranks whose samples count together, so that all have the same estimates.

        Returns:
            (B,), fp32 (fp64 for fp64 input), without gradient; -inf where no sample of the context had P > 0.

        Raises:
            TypeError, ValueError: wrong dtypes or shapes, or log_weights is inf or NaN.
        """
        _checks.tensor("log_weights", log_weights, _checks.FLOATS)
        if log_weights.dim() != 1:
            raise ValueError(f"log_weights has shape {tuple(log_weights.shape)}, expected (B,)")
        if contexts is None:
            contexts = torch.zeros_like(log_weights, dtype=torch.int64)
        _checks.tensor("contexts", contexts, _checks.INTEGERS)
        _checks.shape("contexts", contexts, log_weights.shape, "one per row of log_weights")
        values = log_weights.detach()
        if not (values.isfinite() | (values == -math.inf)).all():
            raise ValueError("log_weights must be finite, or -inf where P is 0")
        everyone = gathered(values.double(), process_group)[0]
        of = gathered(contexts.long(), process_group)[0]
        names, place = of.unique(return_inverse=True)
        high = everyone.new_full((len(names),), -math.inf).scatter_reduce(0, place, everyone, "amax")
        shift = torch.where(high > -math.inf, high, 0)
        total = torch.zeros_like(high).index_add(0, place, (everyone - shift[place]).exp()).log() + shift
        counts = torch.bincount(place, minlength=len(names))
        for name, log_sum, count in zip(names.tolist(), total.tolist(), counts.tolist(), strict=True):
            before, samples = self._sums.get(name, (-math.inf, 0.0))
            pair = torch.tensor([before + math.log(self.decay), log_sum], dtype=torch.float64)
            self._sums[name] = (torch.logsumexp(pair, 0).item(), samples * self.decay + count)
        return self.log_z(contexts).to(torch.promote_types(log_weights.dtype, torch.float32))

    def log_z(self, contexts: Tensor | None = None) -> Tensor:
        """log Z of contexts (B,), in fp64; without them, () of the one; -inf for one that was never seen."""
        ids = [0] if contexts is None else contexts.tolist()
        found = [self._sums.get(name, (-math.inf, 1.0)) for name in ids]
        value = torch.tensor([log_sum - math.log(count) for log_sum, count in found], dtype=torch.float64)
        return value[0] if contexts is None else value.to(contexts.device)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "sums": dict(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decay = float(state["decay"])
        self._sums = {int(name): (float(pair[0]), float(pair[1])) for name, pair in state["sums"].items()}


class RewardBaseline:
    """The mean of the last pseudo-rewards, unweighted; 0 before the first. The state is saved with checkpoints.

    Args:
        window: how many are kept; 1,024 is disco's.
    """

    def __init__(self, window: int = 1024) -> None:
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"window must be an int, got {type(window).__name__}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self._values: deque[float] = deque(maxlen=window)

    @property
    def value(self) -> float:
        """To be read before the batch's own rewards are taken in."""
        return math.fsum(self._values) / len(self._values) if self._values else 0.0

    def update(self, rewards: Tensor, *, process_group: Group = None) -> None:
        """Take in pseudo-rewards (B,); NaN is none. One that is infinite is a ValueError."""
        _checks.tensor("rewards", rewards, _checks.FLOATS)
        if rewards.dim() != 1:
            raise ValueError(f"rewards has shape {tuple(rewards.shape)}, expected (B,)")
        values = gathered(rewards.detach().double(), process_group)[0]
        values = values[~values.isnan()]
        if values.isinf().any():
            raise ValueError("rewards holds an infinite one: give f_dpg a min_reward, or no baseline")
        self._values.extend(values.tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"window": self._values.maxlen, "values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values = deque(map(float, state["values"]), maxlen=int(state["window"]))
