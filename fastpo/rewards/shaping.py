"""Transforms of rewards: calibrated, combined, sharpened; and where the next rollouts are worth most. No gradients."""

from __future__ import annotations

import functools
import heapq
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastpo.advantages import whiten
from fastpo.kernels import _checks
from fastpo.kernels.segment_stats import normalized

if TYPE_CHECKING:
    from fastpo.reference.ranks import Group


def calibrated_rewards(rewards: Tensor, reference_rewards: Tensor) -> Tensor:
    """InfAlign's Ĉ: the share of the reference model's samples of the prompt that are worse, ties half.

    Uniform on [0, 1] for responses of the reference itself, in steps of 1/2n.

    Args:
        rewards: (P,), or (P, G), of the responses to P prompts. NaN stays NaN.
        reference_rewards: (P, n), of the reference's responses to the same prompts, by the same reward; NaN is none.

    Returns:
        of the shape of rewards, fp32 (fp64 for fp64 input); NaN for a prompt without any reference.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes.

    Source: InfAlign (2412.19792); the concept is verified, not the letter.
    """
    _checks.tensor("rewards", rewards, _checks.FLOATS)
    _checks.tensor("reference_rewards", reference_rewards, _checks.FLOATS)
    _checks.same_device("reference_rewards", reference_rewards, "rewards", rewards)
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}, expected (P,) or (P, G)")
    if reference_rewards.dim() != 2 or len(reference_rewards) != len(rewards):
        raise ValueError(f"reference_rewards has shape {tuple(reference_rewards.shape)}, expected ({len(rewards)}, n)")
    wide = torch.promote_types(torch.promote_types(rewards.dtype, reference_rewards.dtype), torch.float32)
    own = rewards.detach().reshape(len(rewards), -1, 1).to(wide)
    others = reference_rewards.detach()[:, None, :].to(wide)
    # a comparison with NaN is False, and so counts nothing
    wins = (own > others).to(wide) + (own == others).to(wide) / 2
    share = wins.sum(2) / (~others.isnan()).sum(2)
    return torch.where(own[..., 0].isnan(), math.nan, share).reshape(rewards.shape)


def infalign_rewards(
    calibrated: Tensor, *, target: Literal["win_rate", "best_of_n", "worst_of_n"] = "win_rate", t: float = 10.0
) -> Tensor:
    """Φ(C) of InfAlign: what to maximise under a KL penalty for how the model will be used.

    C for the win rate of a single sample; e^(tC) for that of the best of N samples; -e^(-tC) for the worst of N, as
    under jailbreaks. It leads to ref e^(Φ(C)/β) / Z.

    Args:
        calibrated: of any shape, in [0, 1], as `calibrated_rewards` gives them; NaN stays NaN.
        target: as above.
        t: positive and finite. The best one depends on N; about 10 for N = 4 is from memory.

    Returns:
        of that shape, fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: a wrong dtype, calibrated outside [0, 1], or t is not positive.

    Source: InfAlign (2412.19792), CTRL.
    """
    _checks.tensor("calibrated", calibrated, _checks.FLOATS)
    if target not in ("win_rate", "best_of_n", "worst_of_n"):
        raise ValueError(f"target must be 'win_rate', 'best_of_n' or 'worst_of_n', got {target!r}")
    if not 0 < _checks.number("t", t) < math.inf:
        raise ValueError(f"t must be positive and finite, got {t:g}")
    c = calibrated.detach().to(torch.promote_types(calibrated.dtype, torch.float32))
    if _checks.readable(c) and bool(((c < 0) | (c > 1)).any()):
        raise ValueError("calibrated must be in [0, 1]: pass the shares of calibrated_rewards")
    if target == "win_rate":
        return c
    return torch.exp(t * c) if target == "best_of_n" else -torch.exp(-t * c)


def _weights(weights: Tensor | Sequence[float], rewards: Tensor) -> Tensor:
    w = torch.as_tensor(weights, dtype=rewards.dtype, device=rewards.device)
    _checks.shape("weights", w, rewards.shape[-1:], "one per reward, the last dimension of rewards")
    if _checks.readable(w) and not bool(w.isfinite().all()):
        raise ValueError("weights must be finite")
    return w


def _several(rewards: Tensor) -> Tensor:
    _checks.tensor("rewards", rewards, _checks.FLOATS)
    if rewards.dim() < 2 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}, expected (..., K) with K > 0")
    return rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))


def weighted_rewards(
    rewards: Tensor,
    weights: Tensor | Sequence[float],
    *,
    normalize: bool = False,
    process_group: Group = None,
) -> Tensor:
    """RLUF: Σ_k w_k r_k of K rewards, such as helpfulness, safety and P[Love].

    A reward that could not be had (NaN) is left out; a response without any has NaN.

    Args:
        rewards: (..., K). Models of different scales are to be normalised; P[Love] is the sigmoid of a classifier
            trained by binary cross entropy.
        weights: K numbers. The paper's for love, 0.1 and 0.3, are from memory; responses that only say goodbye are what
            large ones lead to.
        normalize: each reward less its mean, over its deviation, over all responses.
        process_group: ranks whose responses are normalised together.

    Returns:
        (...), fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or a weight is not finite.

    Source: Reinforcement learning from user feedback (2505.14946). Elsewhere: TRL: reward_weights.
    """
    values = _several(rewards)
    w = _weights(weights, values)
    there = ~values.isnan()
    if normalize:
        columns = [
            whiten(v, m, process_group=process_group) for v, m in zip(values.unbind(-1), there.unbind(-1), strict=True)
        ]
        values = torch.stack(columns, -1)
    total = torch.where(there, values * w, 0).sum(-1)
    return torch.where(there.any(-1), total, math.nan)


def multi_objective(
    rewards: Tensor,
    weights: Tensor | Sequence[float] | None = None,
    group_ids: Tensor | None = None,
    *,
    order: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum",
    ddof: int = 1,
    eps: float = 1e-4,
    process_group: Group = None,
) -> Tensor:
    """Advantages from K rewards, each normalised in its group before they are summed, so that none drowns the others.

    "normalize_then_sum" is GDPO of 2026, not the diffusion model's: the weighted sum of the normalised rewards,
    whitened over the batch. "sum_then_normalize" is GRPO of the weighted sum. Rewards that are equal in a group give
    exactly 0, and so does a response without any reward (NaN).

    Args:
        rewards: (prompts, samples, K), or (N, K) with `group_ids`; NaN is a reward that could not be had.
        weights: K numbers; None: 1 each.
        group_ids: int64 or int32 (N,), as in `fastpo.advantages.grpo`.
        order: as above.
        ddof: the variances are over count - ddof.
        eps: added to the deviation in a group; TRL's. Whitening adds its square to the variance.
        process_group: ranks that are whitened together.

    Returns:
        of the shape of rewards without K, fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or an option is outside its domain.

    Source: GDPO (2601.05242); as TRL has it in multi_objective_aggregation.
    """
    if order not in ("normalize_then_sum", "sum_then_normalize"):
        raise ValueError(f"order must be 'normalize_then_sum' or 'sum_then_normalize', got {order!r}")
    values = _several(rewards)
    if values.dim() != (3 if group_ids is None else 2):
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}, expected (P, G, K), or (N, K) with group_ids")
    w = _weights([1.0] * values.shape[-1] if weights is None else weights, values)
    if order == "sum_then_normalize":
        return normalized(weighted_rewards(values, w), group_ids, mode="standardize", ddof=ddof, eps=eps)[0]
    each = [normalized(v.contiguous(), group_ids, mode="standardize", ddof=ddof, eps=eps)[0] for v in values.unbind(-1)]
    scored = ~values.isnan().all(-1)
    return whiten((torch.stack(each, -1) * w).sum(-1), scored, ddof=ddof, eps=eps**2, process_group=process_group)


@functools.lru_cache(maxsize=4096)
def _student_t(confidence: float, degrees: int) -> float:
    """t with P(|T| < t) = confidence, T of Student's distribution with a whole number of degrees of freedom.

    The probability is a finite sum of powers of the cosine of θ = atan(t/√ν); bisected over θ.
    Source: M. Abramowitz and I. Stegun, Handbook of mathematical functions, 26.7.3 and 26.7.4.
    """

    def probability(theta: float) -> float:
        sine, cosine = math.sin(theta), math.cos(theta)
        odd = degrees % 2
        term = cosine if odd else 1.0
        total = term if degrees > 1 else 0.0
        for k in range(2 + odd, degrees - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        return (theta + sine * total) * 2 / math.pi if odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _counts(counts: Tensor, stds: Tensor, alpha: float, exploration: float) -> tuple[list[int], list[float]]:
    _checks.tensor("counts", counts, _checks.INTEGERS)
    _checks.tensor("stds", stds, _checks.FLOATS)
    if counts.dim() != 1:
        raise ValueError(f"counts has shape {tuple(counts.shape)}, expected (P,)")
    _checks.shape("stds", stds, counts.shape, "one per prompt of counts")
    if not 0 < _checks.number("alpha", alpha) < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha:g}")
    if not 0 <= _checks.number("exploration", exploration) < math.inf:
        raise ValueError(f"exploration must be at least 0 and finite, got {exploration:g}")
    n, s = counts.tolist(), stds.double().tolist()
    if any(count < 2 for count in n):
        raise ValueError(f"counts must be at least 2 for every prompt, got {min(n)}: a deviation needs two rewards")
    if any(not 0 <= std < math.inf for std in s):
        raise ValueError("stds must be at least 0 and finite")
    return n, s


def _priority(n: int, std: float, total: float, alpha: float, exploration: float) -> float:
    def half_width(n: int) -> float:
        return _student_t(1 - alpha, n - 1) * std / math.sqrt(n) if std else 0.0

    return half_width(n) - half_width(n + 1) + exploration * math.sqrt(math.log1p(total) / n)


def xrpo_priorities(
    counts: Tensor, stds: Tensor, *, total: int | None = None, alpha: float = 0.05, exploration: float = 1.0
) -> Tensor:
    """XRPO: how much one more rollout of each prompt is worth.

    h(n) - h(n + 1) + λ √(log(1 + T)/n), h(n) = t_(1-α/2, n-1) s/√n the half-width of the confidence interval of the
    mean reward of n rollouts, s as it is.

    Args:
        counts: int64 or int32 (P,), rollouts of each prompt so far, n, at least 2.
        stds: (P,), standard deviations of their rewards, s.
        total: T; None: the sum of counts. Whether it is rollouts or rounds is open.
        alpha: in (0, 1); exploration: λ, at least 0. Their values are from memory.

    Returns:
        fp64 (P,).

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or a number is outside its domain.

    Source: XRPO (2510.06672); from memory.
    """
    n, s = _counts(counts, stds, alpha, exploration)
    of = float(sum(n) if total is None else _checks.number("total", total))
    if not 0 <= of < math.inf:
        raise ValueError(f"total must be at least 0 and finite, got {of:g}")
    return torch.tensor(
        [_priority(*pair, of, alpha, exploration) for pair in zip(n, s, strict=True)], dtype=torch.float64
    )


def xrpo_allocate(
    counts: Tensor,
    stds: Tensor,
    budget: int,
    *,
    alpha: float = 0.05,
    exploration: float = 1.0,
) -> Tensor:
    """How many of the next `budget` rollouts each prompt gets: one by one to that of the largest priority.

    Each rollout that is given makes the next one of its prompt worth less; that the deviation would change is left out.
    Ties go to the first.

    Args:
        counts, stds, alpha, exploration: as in `xrpo_priorities`, with T the sum of counts.
        budget: at least 0.

    Returns:
        int64 (P,), whose sum is the budget.

    Raises:
        TypeError, ValueError: as `xrpo_priorities`; or the budget is negative, or there is no prompt to have it.

    Source: XRPO (2510.06672); that priorities are renewed within a round is ours.
    """
    n, s = _counts(counts, stds, alpha, exploration)
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget must be an int, got {type(budget).__name__}")
    if budget < 0 or (budget and not n):
        raise ValueError(f"budget must be at least 0, and 0 without prompts; got {budget}")
    total = float(sum(n))
    given = [0] * len(n)
    queue = [(-_priority(n[i], s[i], total, alpha, exploration), i) for i in range(len(n))]
    heapq.heapify(queue)
    for _ in range(budget):
        _, i = queue[0]
        given[i] += 1
        heapq.heapreplace(queue, (-_priority(n[i] + given[i], s[i], total, alpha, exploration), i))
    return torch.tensor(given, dtype=torch.int64)


def xrpo_novelty(
    advantages: Tensor,
    mean_logprobs: Tensor,
    correct: Tensor,
    group_ids: Tensor | None = None,
    *,
    scale: float = 2.5,
    share: float = 0.5,
) -> Tensor:
    """XRPO's sharpening: A + min(max(λ (1 - η), 0), κ A) for correct responses with A > 0, η = e^(s - mean s).

    s is a response's mean log-prob, and its mean that of its group: what the policy finds unlikely and is right gets
    more.

    Args:
        advantages: (prompts, samples), or (N,) with `group_ids`.
        mean_logprobs: of the same shape, s; constants.
        correct: bool, of the same shape.
        group_ids: int64 or int32 (N,).
        scale: λ, at least 0; share: κ, at least 0; the paper's 2.5 and 0.5.

    Returns:
        of the shape of advantages, fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or a number is negative.

    Source: XRPO (2510.06672).
    """
    _checks.tensor("advantages", advantages, _checks.FLOATS)
    _checks.tensor("mean_logprobs", mean_logprobs, _checks.FLOATS)
    _checks.shape("mean_logprobs", mean_logprobs, advantages.shape, "it must match advantages")
    _checks.tensor("correct", correct, (torch.bool,))
    _checks.shape("correct", correct, advantages.shape, "it must match advantages")
    for name, value in (("scale", scale), ("share", share)):
        if not 0 <= _checks.number(name, value) < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value:g}")
    a = advantages.detach().to(torch.promote_types(advantages.dtype, torch.float32))
    above = normalized(mean_logprobs, group_ids, mode="center")[0].to(a.dtype)
    bonus = torch.minimum((-scale * torch.expm1(above)).clamp(min=0), share * a)
    return torch.where(correct & (a > 0), a + bonus, a)


def _call(value: str | Mapping[str, Any] | None) -> tuple[str, Mapping[str, Any]] | None:
    """The name and the arguments of a tool call, None if it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments")
    return (value["name"], arguments) if isinstance(arguments, Mapping) else None


def tool_use_reward(
    call: str | Mapping[str, Any] | None,
    expected: Mapping[str, Any],
    tools: Mapping[str, Sequence[str]],
) -> float:
    """TL-Training's reward of a tool call by the kind of its error, from -2 to 1.

        -2     not readable, or of a tool that there is not
        -1.5   another tool than expected
        -1.8   parameters that the tool does not have, too many, and too few
        -1.3   such that it does not have, and too many or too few
        -1     too many and too few
        -0.8   such that it does not have
        -0.5   too many or too few
        -0.25  another value
        1      right

    Args:
        call: {"name", "arguments"}, or its JSON; anything else is not readable.
        expected: the same of the right call; its tool must be one of tools.
        tools: the names of the parameters of each tool.

    Returns:
        the reward. PPO on it clips it to ±5 and has a KL coefficient of 0.4 in the code.

    Raises:
        ValueError: expected is no call of one of the tools.

    Source: TL-Training (2412.15495), as its official code has it.
    """
    right = _call(expected)
    if right is None or right[0] not in tools:
        raise ValueError(f"expected must be a call of one of the tools, got {expected!r}")
    ours = _call(call)
    if ours is None or ours[0] not in tools:
        return -2.0
    if ours[0] != right[0]:
        return -1.5
    known, given, wanted = set(tools[right[0]]), set(ours[1]), set(right[1])
    invented, extra, missing = bool(given - known), bool((given & known) - wanted), bool(wanted - given)
    if invented:
        return {0: -0.8, 1: -1.3, 2: -1.8}[extra + missing]
    if extra or missing:
        return -1.0 if extra and missing else -0.5
    return 1.0 if dict(ours[1]) == dict(right[1]) else -0.25
