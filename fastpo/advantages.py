"""Advantages and returns: scans over tokens, and rewards relative to their group. Nothing here carries a gradient.

Over tokens, rewards and values are padded (B, T) with a `mask`, or packed (N,) with `cu_seqlens`; results are 0 where
the mask is False. Of groups, rewards are (prompts, samples), or (N,) with `group_ids`: any integers, equal for the
samples of a prompt, which need not be adjacent. A reward of NaN is one that could not be had: it counts in no group,
and its advantage is 0. Scans and the statistics of groups are in double and rounded once, to fp32 (fp64 for fp64
input).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.affine_scan import advantages as estimate
from fastpo.kernels.affine_scan import per_row
from fastpo.kernels.segment_stats import Singleton, normalized, statistics

if TYPE_CHECKING:
    # a torch without distributed has no such class
    Group = dist.ProcessGroup | bool | None

MaskMode = Literal["skip", "multiply"]
Scale = Literal["group", "batch", "none"]


class Advantages(NamedTuple):
    """Advantages and what they are advantages over: returns, which are the targets of a value function.

    Both have the shape of the rewards and are 0 where the mask is False.
    """

    advantages: Tensor
    returns: Tensor


def _choice(name: str, value: object, of: object) -> None:
    if value not in get_args(of):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(of)))}; got {value!r}")


def _unit(name: str, value: object) -> float:
    number = _checks.number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {number:g}")
    return number


def _positive(name: str, value: object, *, zero: bool = False, inf: bool = False) -> float:
    number = _checks.number(name, value)
    if not (number > 0 or (zero and number == 0)) or (number == math.inf and not inf):
        least = "at least 0" if zero else "positive"
        raise ValueError(f"{name} must be {least}{'' if inf else ' and finite'}, got {number:g}")
    return number


def _behind(next_values: Tensor | None, bootstrap: Tensor | None, truncated: Tensor | None) -> None:
    if next_values is not None and bootstrap is not None:
        raise ValueError("next_values has the value behind every token: bootstrap cannot be given with it")
    if truncated is not None and next_values is None:
        raise ValueError(
            "truncated needs next_values: behind a truncated token stands another episode's value "
            "(for rows cut at their end, bootstrap alone says it)"
        )


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    next_values: Tensor | None = None,
    bootstrap: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask_mode: MaskMode = "skip",
) -> Advantages:
    """Generalised advantage estimation, in one launch.

        δ_t = r_t + γ V_(t+1) (1 - terminated_t) - V_t
        A_t = δ_t + γ λ (1 - terminated_t or truncated_t) A_(t+1),  returns = A + V

    Whitening is `whiten`, after the returns are taken.

    Args:
        rewards: (B, T), or (N,) with `cu_seqlens`.
        values: of the same shape, V_t of the state in which token t is chosen.
        gamma: discount, in [0, 1]; 1 for language models.
        lam: λ in [0, 1]. 0.95 is TRL's; verl and OpenRLHF take 1.
        next_values: V behind each token, where it is not the value of the next one.
        bootstrap: (B,), V behind the last token of each row; without it the row's end is terminal.
        terminated: bool, True where an episode ends in a terminal state.
        truncated: bool, True where it is cut: V behind it counts (it needs `next_values`), A behind it does not.
        mask: bool, True where a token counts.
        cu_seqlens: int32 (B + 1,), the boundaries of packed rows.
        mask_mode: what a masked token between others is. "skip", nothing (verl): the token before it sees the value of
            the next that counts, as behind a tool's answer it should. "multiply", a step without reward and value
            (OpenRLHF, TRL): λ decays through the hole and the bootstrap is cut there. Padding is none in both.

    Returns:
        `Advantages`.

    Raises:
        TypeError: an argument is no tensor or number of the types above.
        ValueError: shapes or devices differ, γ or λ is outside [0, 1], `bootstrap` and `next_values` are both given,
            `truncated` without `next_values`, or `cu_seqlens` does not rise from 0 to at most N.

    Source: J. Schulman et al. (1506.02438) eq. 16.
    """
    _choice("mask_mode", mask_mode, MaskMode)
    _behind(next_values, bootstrap, truncated)
    return Advantages(
        *estimate(
            rewards,
            values,
            next_values=next_values,
            terminated=terminated,
            truncated=truncated,
            mask=mask,
            cu_seqlens=cu_seqlens,
            bootstrap=bootstrap,
            gamma=_unit("gamma", gamma),
            lam=_unit("lam", lam),
            skip=mask_mode == "skip",
        )
    )


def egae(
    rewards: Tensor,
    values: Tensor,
    finished: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    """GAE of windows of which some were cut before the response ended: V behind the window is that of its last token.

    So with γ = 1 the last token of an unfinished window has the advantage of its reward alone, where a terminal end
    would bias every advantage down by V. The policy learns from every token of the window, the value function from
    finished responses only: their returns with λ = 1.

    Args:
        rewards, values: (B, T), or (N,) with `cu_seqlens`.
        finished: bool (B,), True where the response ended in the window.
        gamma, lam: in [0, 1]. The paper's λ depends on the length; 0.95 is `gae`'s.
        mask: bool, True for the tokens of the window.
        cu_seqlens: int32 (B + 1,), the boundaries of packed rows.

    Returns:
        `Advantages`.

    Raises:
        TypeError, ValueError: as `gae`; or `finished` is not bool (B,).

    Source: T-PPO (2506.15050) §3. The assumption on V is the paper's; its window sizes are not verified.
    """
    _checks.tensor("rewards", rewards, _checks.FLOATS)
    repeat = ~_checks.tensor("finished", finished, (torch.bool,))
    per_row("finished", finished, "rewards", rewards, cu_seqlens, (torch.bool,))
    return Advantages(
        *estimate(
            rewards,
            values,
            mask=mask,
            cu_seqlens=cu_seqlens,
            repeat=repeat,
            gamma=_unit("gamma", gamma),
            lam=_unit("lam", lam),
        )
    )


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    bootstrap: Tensor | None = None,
    terminated: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """G_t = r_t + γ (1 - terminated_t) G_(t+1); with γ = 1, the reward to go.

    Masked tokens are passed over: the return of a token before a tool's answer holds the rewards behind it.

    Args:
        rewards: (B, T), or (N,) with `cu_seqlens`.
        gamma: in [0, 1].
        bootstrap: (B,), the return behind the last token; 0 if None.
        terminated: bool, True where an episode ends.
        mask: bool, True where a token counts.
        cu_seqlens: int32 (B + 1,), the boundaries of packed rows.

    Returns:
        of the shape of rewards.

    Raises:
        TypeError, ValueError: as `gae`.
    """
    _, returns = estimate(
        rewards,
        bootstrap=bootstrap,
        terminated=terminated,
        mask=mask,
        cu_seqlens=cu_seqlens,
        gamma=_unit("gamma", gamma),
    )
    return returns


def vtrace(
    rewards: Tensor,
    values: Tensor,
    log_ratios: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    next_values: Tensor | None = None,
    bootstrap: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    """V-trace targets and policy-gradient advantages from rollouts of another policy, in one launch.

        ρ_t = min(ρ̄, π/μ), c_t = λ min(c̄, π/μ), δ_t = ρ_t (r_t + γ V_(t+1) - V_t)
        vs_t = V_t + δ_t + γ c_t (vs_(t+1) - V_(t+1))
        A_t = ρ_t (r_t + γ vs_(t+1) - V_t), where vs_(t+1) is V_(t+1) at the end of an episode, terminal or cut

    The values to which this converges are those of the policy proportional to min(ρ̄ μ, π), not of π.

    Args:
        rewards, values: (B, T), or (N,) with `cu_seqlens`.
        log_ratios: log π - log μ of each token, the policy over the one that sampled it.
        gamma, lam: in [0, 1].
        rho_bar, c_bar: positive, inf allowed; the paper's are 1.
        next_values, bootstrap, terminated, truncated, mask, cu_seqlens: as in `gae`.

    Returns:
        `Advantages`, whose returns are the targets vs.

    Raises:
        TypeError, ValueError: as `gae`; or ρ̄ or c̄ is not positive.

    Source: IMPALA (1802.01561) eq. 1 and §4.2.
    """
    _behind(next_values, bootstrap, truncated)
    return Advantages(
        *estimate(
            rewards,
            values,
            next_values=next_values,
            log_ratios=log_ratios,
            terminated=terminated,
            truncated=truncated,
            mask=mask,
            cu_seqlens=cu_seqlens,
            bootstrap=bootstrap,
            gamma=_unit("gamma", gamma),
            lam=_unit("lam", lam),
            rho_bar=_positive("rho_bar", rho_bar, inf=True),
            c_bar=_positive("c_bar", c_bar, inf=True),
        )
    )


def reinforce_plus_plus(
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    ddof: int = 1,
    eps: float = 1e-8,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    process_group: Group = None,
) -> Advantages:
    """Returns to go, whitened over all tokens of the batch.

    The return of a turn before a tool's answer holds what comes behind it; whitening weighs a response by its tokens.

    Args:
        rewards: (B, T), or (N,) with `cu_seqlens`: score and KL per token, as `fastpo.rewards.token_rewards` has them.
        gamma: in [0, 1].
        ddof, eps, process_group: as in `whiten`.
        mask: bool, True where a token counts.
        cu_seqlens: int32 (B + 1,), the boundaries of packed rows.

    Returns:
        `Advantages`.

    Raises:
        TypeError, ValueError: as `gae` and `whiten`.

    Source: REINFORCE++ (2501.03262).
    """
    returns = discounted_returns(rewards, gamma=gamma, mask=mask, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        # tokens behind the last sequence are none
        inside = torch.arange(len(returns), device=returns.device) < cu_seqlens[-1]
        mask = inside if mask is None else mask & inside
    return Advantages(whiten(returns, mask, ddof=ddof, eps=eps, process_group=process_group), returns)


def remax(
    rewards: Tensor,
    greedy_rewards: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    """The return to go less the reward of the prompt's greedy response, at every token.

    Args:
        rewards: (B, T), or (N,) with `cu_seqlens`.
        greedy_rewards: (B,), the baseline of each row.
        gamma: in [0, 1].
        mask: bool, True where a token counts.
        cu_seqlens: int32 (B + 1,), the boundaries of packed rows.

    Returns:
        `Advantages`.

    Raises:
        TypeError, ValueError: as `gae`; or `greedy_rewards` is not (B,).

    Source: ReMax (2310.10505) Algorithm 1.
    """
    returns = discounted_returns(rewards, gamma=gamma, mask=mask, cu_seqlens=cu_seqlens)
    per_row("greedy_rewards", greedy_rewards, "rewards", rewards, cu_seqlens, _checks.FLOATS)
    baseline = greedy_rewards.detach().to(returns.dtype)
    if cu_seqlens is None:
        baseline, counts = baseline[:, None], mask
    else:
        position = torch.arange(len(returns), device=returns.device)
        row = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
        inside = row < len(baseline)
        # one more row, for tokens behind the last sequence
        baseline = torch.cat([baseline, baseline.new_zeros(1)])[row]
        counts = inside if mask is None else mask & inside
    out = returns - baseline
    return Advantages(out if counts is None else torch.where(counts, out, 0), returns)


def _moments(stats: Tensor, group: Group) -> Tensor:
    """Count, mean, sum of squared deviations, minimum and maximum of several parts (5, S) together, over the ranks."""

    def together(parts: Tensor) -> Tensor:
        count, mean, squares, low, high = parts.unbind(0)
        total = count.sum()
        centre = (count * mean).sum() / total.clamp(min=1)
        spread = (squares + count * (mean - centre).square()).sum()
        if parts.shape[1] == 0:
            return parts.new_tensor([0.0, 0.0, 0.0, math.inf, -math.inf])
        return torch.stack([total, centre, spread, low.min(), high.max()])

    own = together(stats)
    if group is None or group is False:
        return own
    of = None if group is True else group
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(of))]
    dist.all_gather(ranks, own, group=of)
    return together(torch.stack(ranks, 1))


def _whitened(values: Tensor, moments: Tensor, ddof: int, eps: float) -> Tensor:
    count, mean, squares, low, high = moments.unbind(0)
    variance = squares / (count - ddof).clamp(min=1)
    factor = (variance + eps).rsqrt()
    factor = torch.where((low == high) | (count <= ddof), 0, factor)
    # the mean in two parts: it may be far larger than what is left of the values
    high_part = mean.to(values.dtype)
    low_part = (mean - high_part.double()).to(values.dtype)
    return torch.where(factor == 0, 0, ((values - high_part) - low_part) * factor.to(values.dtype))


def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    ddof: int = 1,
    eps: float = 1e-8,
    process_group: Group = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over everything that counts, on all ranks.

    Equal values give exactly 0, and so do no more values than ddof.

    Args:
        values: of any shape.
        mask: bool, of the same shape, True where a value counts; the others give 0, whatever they hold.
        ddof: the variance is over count - ddof: 1 is verl's and TRL's, 0 OpenRLHF's.
        eps: added to the variance, at least 0.
        process_group: ranks whose values count together; True for the default group.

    Returns:
        of the shape of values, fp32 (fp64 for fp64 values), without gradient.

    Raises:
        TypeError, ValueError: values or mask are no tensors of those types and shapes, or ddof or eps is negative.
    """
    values = _checks.tensor("values", values, _checks.FLOATS).detach()
    _positive("eps", eps, zero=True)
    if mask is not None:
        _checks.tensor("mask", mask, (torch.bool,))
        _checks.same_device("mask", mask, "values", values)
        _checks.shape("mask", mask, values.shape, "it must match values")
    rows = values if values.dim() == 2 else values.reshape(1, -1)
    of_rows = statistics(rows, mask=None if mask is None else mask.reshape(rows.shape), ddof=0)
    parts = torch.stack([of_rows.count, of_rows.mean, of_rows.count * of_rows.var, of_rows.min, of_rows.max])
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    out = _whitened(wide, _moments(parts, process_group), ddof, eps)
    return out if mask is None else torch.where(mask, out, 0)


def grpo(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    ddof: int = 1,
    eps: float = 0.0,
    scale: Scale = "group",
    singleton: Singleton = "zero",
    mask: Tensor | None = None,
) -> Tensor:
    """(r - mean of the group) / (standard deviation + eps); exactly 0 in a group of equal rewards, whatever eps.

    Args:
        rewards: (prompts, samples), or (N,) with `group_ids`.
        group_ids: int64 or int32 (N,).
        ddof: the variance is over count - ddof. The paper does not say; the libraries take 1.
        eps: the paper has none. TRL's is 1e-4, verl's 1e-6, OpenRLHF's 1e-9.
        scale: "group"; "batch", the deviation of the whole batch (TRL's scale_rewards); or "none", which is `dr_grpo`.
        singleton: what the only sample of a prompt becomes: "zero" (TRL), or "raw", its reward over 1 + eps (verl).
        mask: bool, True where a reward counts.

    Returns:
        of the shape of rewards.

    Raises:
        TypeError, ValueError: rewards, ids or mask do not fit each other, or an option is outside its domain.

    Source: DeepSeekMath (2402.03300) eq. 3.
    """
    _choice("scale", scale, Scale)
    if scale == "group":
        return normalized(rewards, group_ids, mode="standardize", ddof=ddof, eps=eps, singleton=singleton, mask=mask)[0]
    _positive("eps", eps, zero=True)
    out = dr_grpo(rewards, group_ids, singleton=singleton, mask=mask)
    if scale == "none":
        return out
    counts = None if mask is None else mask.reshape(1, -1)
    std = statistics(rewards.reshape(1, -1), mask=counts, ddof=ddof, skip_nan=True).var.sqrt()
    return torch.where(std == 0, 0, out / (std + eps)).to(out.dtype)


def dr_grpo(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    singleton: Singleton = "zero",
    mask: Tensor | None = None,
) -> Tensor:
    """r - mean of the group: `rloo` times (G - 1) / G.

    Args, returns, raises: as `grpo`.

    Source: Understanding R1-Zero-like training (2503.20783).
    """
    return normalized(rewards, group_ids, mode="center", singleton=singleton, mask=mask)[0]


def rloo(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    singleton: Singleton = "zero",
    mask: Tensor | None = None,
) -> Tensor:
    """r - mean of the other samples of the prompt.

    Args, returns, raises: as `grpo`. The KL belongs into the rewards, as a sum over the sequence.

    Source: Back to basics (2402.14740) eq. 6.
    """
    return normalized(rewards, group_ids, mode="leave_one_out", singleton=singleton, mask=mask)[0]


def opo(
    rewards: Tensor,
    lengths: Tensor,
    group_ids: Tensor | None = None,
    *,
    singleton: Singleton = "zero",
    mask: Tensor | None = None,
) -> Tensor:
    """r less the mean of the group weighted by the lengths, the baseline of least variance where |∇ log π|² ∝ |y|.

    Args:
        rewards, group_ids, singleton, mask: as in `grpo`.
        lengths: floats or integers of the shape of rewards, at least 0: tokens of the responses. A group without
            any token gives 0.

    Returns:
        of the shape of rewards.

    Raises:
        TypeError, ValueError: as `grpo`; or a length is negative.

    Source: On-policy RL with optimal reward baseline (2505.23585) eq. 6.
    """
    return normalized(rewards, group_ids, mode="center", weights=lengths, singleton=singleton, mask=mask)[0]


def gpg(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    f_norm: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """α (r - mean of the group) / F_norm, α = B / (B - M), where M of the B samples are in groups of equal rewards.

    So the mean over the batch is that over the groups from which something is learnt. Without such a group all is 0.

    Args:
        rewards, group_ids, mask: as in `grpo`.
        f_norm: positive; the paper's is 1.

    Returns:
        of the shape of rewards.

    Raises:
        TypeError, ValueError: as `grpo`; or f_norm is not positive.

    Source: GPG (2504.02546). verl counts non-zero rewards instead of the samples of mixed groups.
    """
    scale = _positive("f_norm", f_norm)
    out, informative = normalized(rewards, group_ids, mode="center", mask=mask, informative=True)
    counted = ~rewards.isnan() if mask is None else mask & ~rewards.isnan()
    # divided last, as 1 / scale is rounded
    return out * (counted.sum() / informative.sum().clamp(min=1)).to(out.dtype) / scale


def pass_at_k(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    normalize: bool = False,
    ddof: int = 1,
    eps: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Of the best sample of a prompt, its lead over the second; of the others, and where several are best, 0.

    Args:
        rewards, group_ids, mask: as in `grpo`; a group needs two samples.
        normalize: divide by (standard deviation of the group + eps).
        ddof, eps: as in `grpo`.

    Returns:
        of the shape of rewards.

    Raises:
        TypeError, ValueError: as `grpo`; or a prompt has one sample alone. On a GPU, where reading values would wait,
            that gives 0, and raises under FASTPO_DEBUG=1.

    Source: verl's grpo_passk.
    """
    out, _ = normalized(
        rewards, group_ids, mode="standardized_lead" if normalize else "lead", ddof=ddof, eps=eps, mask=mask
    )
    alone = group_ids is None and rewards.shape[1] == 1 and rewards.shape[0] > 0
    if group_ids is not None and _checks.readable(group_ids):
        alone = bool((group_ids.unique(return_counts=True)[1] == 1).any())
    if alone:
        raise ValueError("rewards has a group of one sample: pass_at_k compares the best with the second")
    return out


def reinforce_baseline(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    ddof: int = 1,
    eps: float = 1e-8,
    singleton: Singleton = "zero",
    mask: Tensor | None = None,
    process_group: Group = None,
) -> Tensor:
    """REINFORCE++-baseline: r - mean of the group, whitened over the batch.

    Args:
        rewards, group_ids, singleton, mask: as in `grpo`.
        lengths: integers or floats of the shape of rewards: tokens of the responses, by which the whitening weighs them
            as if each token had its response's number, which is what the paper and verl do. None weighs all alike.
        ddof, eps, process_group: as in `whiten`.

    Returns:
        of the shape of rewards: the advantage of every token of the response.

    Raises:
        TypeError, ValueError: as `grpo` and `whiten`.

    Source: REINFORCE++ (2501.03262).
    """
    _positive("eps", eps, zero=True)
    centred = dr_grpo(rewards, group_ids, singleton=singleton, mask=mask)
    counts = ~rewards.isnan() if mask is None else mask & ~rewards.isnan()
    if lengths is None:
        return whiten(centred, counts, ddof=ddof, eps=eps, process_group=process_group)
    weights = _checks.tensor("lengths", lengths, _checks.FLOATS + _checks.INTEGERS)
    _checks.shape("lengths", weights, rewards.shape, "one length per reward")
    _checks.same_device("lengths", weights, "rewards", rewards)
    if _checks.readable(weights) and not (weights >= 0).all():
        raise ValueError("lengths must be at least 0")
    # a response is a part of the batch with as many equal values as it has tokens
    n = torch.where(counts, weights.double(), 0).reshape(-1)
    x = centred.double().reshape(-1)
    low, high = torch.where(n > 0, x, math.inf), torch.where(n > 0, x, -math.inf)
    moments = _moments(torch.stack([n, x, torch.zeros_like(x), low, high]), process_group)
    return torch.where(counts, _whitened(centred, moments, ddof, eps), 0)
