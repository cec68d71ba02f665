"""Which tokens and sequences of RL data count: masks and selections for `fastpo.losses`, on detached numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.policy import evaluate
from fastpo.reference.policy import Batch, RolloutCorrection, estimate_kl, policy, rows_of
from fastpo.reference.ranks import gathered, summed_over
from fastpo.reference.sequence import sequence_sum

if TYPE_CHECKING:
    from fastpo.losses.statistics import Group

RejectionLevel = Literal["token", "sequence", "sequence_mean", "sequence_max"]


def _like(name: str, value: object, other: str, of: Tensor) -> Tensor:
    tensor = _checks.tensor(name, value, (torch.bool,))
    _checks.same_device(name, tensor, other, of)
    _checks.shape(name, tensor, of.shape, f"it must match {other}")
    return tensor


def _share(name: str, value: float) -> float:
    number = _checks.number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {number:g}")
    return number


def _covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor | None, group: Group) -> tuple[Tensor, Tensor, int]:
    """(A - mean A) (log π - mean log π), which tokens count, and how many there are of all ranks; in fp64."""
    _checks.tensor("logprobs", logprobs, _checks.FLOATS)
    _checks.tensor("advantages", advantages, _checks.FLOATS)
    _checks.shape("advantages", advantages, logprobs.shape, "one per token: it must match logprobs")
    counts = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else _like("mask", mask, "logprobs", logprobs)
    p, a = (torch.where(counts, t.detach().double(), 0) for t in (logprobs, advantages))
    sums = summed_over(torch.stack([p.sum(), a.sum(), counts.sum().double()]), group)
    n = sums[2].clamp(min=1)
    return torch.where(counts, (p - sums[0] / n) * (a - sums[1] / n), 0), counts, int(sums[2])


def _chosen(keys: Tensor, number: int, group: Group) -> Tensor:
    """Where the `number` largest keys of all ranks are; keys of -inf never are."""
    flat = keys.flatten()
    everyone, first = gathered(flat, group)
    taken = torch.zeros_like(everyone, dtype=torch.bool)
    order = everyone.argsort(descending=True, stable=True)[:number]
    taken[order] = True
    taken &= everyone > -torch.inf
    return taken[first : first + len(flat)].view_as(keys)


def clip_cov_tokens(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    process_group: Group = None,
) -> Tensor:
    """The tokens that keep their policy term in `fastpo.losses.clip_cov`.

    Of the tokens whose covariance is between the bounds and which the ratio does not clip already,
    max(1, floor(fraction · tokens)) are drawn uniformly and lose it. The statistics are of the tensors given: pass
    those of the whole batch, or `process_group`, not those of a micro-batch.

    Args:
        logprobs, advantages: (B, T) or (N,), constants.
        old_logprobs: None: nothing is clipped.
        fraction: the paper's r.
        low, high: bounds of the covariance.
        epsilon_low, epsilon_high: those of the loss.
        mask: bool, the tokens that count.
        generator: draws the tokens; on ranks each with its own seed.
        process_group: ranks whose tokens count together.

    Returns:
        bool, in the shape of logprobs, False for the tokens that were drawn.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or a fraction outside [0, 1].
    """
    _share("fraction", fraction)
    covariance, counts, tokens = _covariance(logprobs, advantages, mask, process_group)
    candidates = counts & (covariance > low) & (covariance < high)
    if old_logprobs is not None:
        _checks.shape("old_logprobs", old_logprobs, logprobs.shape, "it must match logprobs")
        ratio = torch.where(counts, logprobs.detach().double() - old_logprobs.detach().double(), 0).exp()
        clipped = torch.where(advantages > 0, ratio > 1 + epsilon_high, (ratio < 1 - epsilon_low) & (advantages < 0))
        candidates &= ~clipped
    keys = torch.rand(logprobs.shape, generator=generator, device=logprobs.device, dtype=torch.float64)
    return ~_chosen(keys.masked_fill(~candidates, -torch.inf), max(1, int(fraction * tokens)), process_group)


def kl_cov_tokens(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    fraction: float = 2e-3,
    mask: Tensor | None = None,
    process_group: Group = None,
) -> Tensor:
    """The tokens that `fastpo.losses.kl_cov` penalises: the max(1, floor(fraction · tokens)) of highest covariance.

    Args:
        logprobs, advantages: (B, T) or (N,), constants: of the whole batch, as in `clip_cov_tokens`.
        fraction: the paper's k. verl's default is a tenth of it.
        mask: bool, the tokens that count.
        process_group: ranks whose tokens count together.

    Returns:
        bool, in the shape of logprobs. Of equal covariances the first goes first.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or a fraction outside [0, 1].
    """
    _share("fraction", fraction)
    covariance, counts, tokens = _covariance(logprobs, advantages, mask, process_group)
    keys = covariance.masked_fill(~counts, -torch.inf)
    return _chosen(keys, max(1, int(fraction * tokens)), process_group)


def entropy_mask(
    entropy: Tensor, quantile: float, *, mask: Tensor | None = None, process_group: Group = None
) -> Tensor:
    """A `policy_mask` of the tokens of highest entropy: those at or above the (1 - quantile) quantile.

    Args:
        entropy: (B, T) or (N,), constants.
        quantile: the share that is kept, in [0, 1]; TRL's top_entropy_quantile. 1 keeps all.
        mask: bool, the tokens that count.
        process_group: ranks whose tokens count together.

    Returns:
        bool, in the shape of entropy; False where no token counts. The quantile is interpolated, as torch.quantile's.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or a quantile outside [0, 1].

    Source: Beyond the 80/20 Rule, arXiv:2506.01939.
    """
    _checks.tensor("entropy", entropy, _checks.FLOATS)
    _share("quantile", quantile)
    counts = torch.ones_like(entropy, dtype=torch.bool) if mask is None else _like("mask", mask, "entropy", entropy)
    values = entropy.detach().double()
    ordered = gathered(values[counts & ~values.isnan()], process_group)[0].sort().values
    if len(ordered) == 0:
        return torch.zeros_like(counts)
    # torch.quantile takes at most 16 million numbers
    position = (1 - quantile) * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    threshold = torch.lerp(ordered[below], ordered[above], position - below)
    return counts & (values >= threshold)


def _choice(name: str, value: object, of: object) -> None:
    if value not in get_args(of):
        raise ValueError(f"{name} must be one of {', '.join(get_args(of))}; got {value!r}")


def rejection_mask(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    limit: float,
    *,
    estimator: Literal["k2", "k3"] = "k3",
    level: RejectionLevel = "token",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The tokens on which the policy that is held fixed has not left the engine that sampled: verl's rejection.

    Those whose estimate of KL(rollout, old), k2 = ½ log² r or k3 = r - 1 - log r of r = old / rollout, is at most
    `limit`. Bounds of r itself are the `reject` of `RolloutCorrection`. As a loss's `mask`, what is rejected leaves the
    denominators, as in verl; as its `policy_mask`, it keeps its penalty and its place in them.

    Args:
        old_logprobs, rollout_logprobs: (B, T), or (N,) with `cu_seqlens`; constants. In k3, r is at most e^20.
        limit: at least 0.
        estimator: "k2" or "k3".
        level: of the estimate: of the token, or its sum, mean or maximum over the tokens of the sequence, which is then
            kept or rejected as a whole.
        mask: bool, the tokens that count.
        cu_seqlens: int32 (B + 1,), the boundaries of packed sequences.

    Returns:
        bool, in the shape of the log-probs, False where no token counts.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, an unknown word, or a negative limit.

    Source: verl, compute_rollout_rejection_mask.
    """
    batch = _rollout(old_logprobs, rollout_logprobs, mask, cu_seqlens)
    if not _checks.number("limit", limit) >= 0:
        raise ValueError(f"limit must be at least 0, got {limit:g}")
    _choice("estimator", estimator, Literal["k2", "k3"])
    _choice("level", level, RejectionLevel)
    row, counts = rows_of(batch)
    old, rollout = (torch.where(counts, t.detach().double(), 0) for t in (old_logprobs, rollout_logprobs))
    values = estimate_kl(rollout - old, estimator)
    if level == "sequence_max":
        largest = values.new_zeros(batch.rows + 1)
        # tokens that do not count go to a row that nobody asks about
        place = torch.where(counts, row, batch.rows)
        values = largest.scatter_reduce(0, place.flatten(), values.flatten(), "amax")[place]
    elif level != "token":
        total = sequence_sum(values, counts, cu_seqlens)[0]
        if level == "sequence_mean":
            total = total / sequence_sum(counts.double(), counts, cu_seqlens)[0].clamp(min=1)
        values = total[row] if batch.rows else values
    return counts & (values <= limit)


def mean_rollout_weight(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    correction: RolloutCorrection,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    process_group: Group = None,
) -> Tensor:
    """The mean of a correction's weights over the tokens. Advantages divided by it are weighted by w / mean(w).

    So a policy term is normalised, which is linear in the size of the advantages (but for `kl_cov`'s penalty), and the
    penalties are not. The mean is of the tensors given: pass those of the whole batch, or `process_group`.

    Args:
        old_logprobs, rollout_logprobs: (B, T), or (N,) with `cu_seqlens`; constants.
        correction: a `RolloutCorrection`.
        mask: bool, the tokens that count.
        cu_seqlens: int32 (B + 1,), the boundaries of packed sequences.
        process_group: ranks whose tokens count together.

    Returns:
        0-dimensional, fp64; 1 where all weights are 0.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or bounds outside their domain.

    Source: verl's batch normalisation of rollout weights.
    """
    batch = _rollout(old_logprobs, rollout_logprobs, mask, cu_seqlens)
    metrics = evaluate(policy("reinforce"), batch, {}, correction=correction, reduction="none").metrics
    total, tokens = summed_over(torch.stack([metrics.sum("weight"), metrics.tokens]), process_group)
    return torch.where(total > 0, total / tokens.clamp(min=1), 1)


def _rollout(old: Tensor, rollout: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Batch:
    """The two policies' log-probs as a batch without advantages, checked."""
    _checks.tensor("old_logprobs", old, _checks.FLOATS)
    if cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, "old_logprobs", old)
        _checks.rising("cu_seqlens", cu_seqlens, old.shape[0])
    if old.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"old_logprobs has shape {tuple(old.shape)}, expected (B, T), or (N,) with cu_seqlens")
    _checks.tensor("rollout_logprobs", rollout, _checks.FLOATS)
    _checks.same_device("rollout_logprobs", rollout, "old_logprobs", old)
    _checks.shape("rollout_logprobs", rollout, old.shape, "it must match old_logprobs")
    if mask is not None:
        _like("mask", mask, "old_logprobs", old)
    old, rollout = old.detach(), rollout.detach()
    return Batch(old, old.new_zeros(old.shape), rollout=rollout, mask=mask, cu_seqlens=cu_seqlens)


def overlong_mask(mask: Tensor, truncated: Tensor) -> Tensor:
    """DAPO's overlong filter: `mask` without the sequences that were cut off by the length limit.

    Args:
        mask: bool (B, T), the tokens that count.
        truncated: bool (B,).

    Returns:
        bool (B, T): pass it as `mask`, so that these tokens leave the denominators too.

    Raises:
        TypeError, ValueError: not bool, or rows that differ.

    Source: DAPO, arXiv:2503.14476, Section 3.4.
    """
    _checks.tensor("mask", mask, (torch.bool,))
    if mask.dim() != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (B, T)")
    _checks.tensor("truncated", truncated, (torch.bool,))
    _checks.shape("truncated", truncated, mask.shape[:1], "one per row of mask")
    return mask & ~truncated[:, None]


def mixed_groups(correct: Tensor, groups: Tensor) -> Tensor:
    """DAPO's dynamic sampling: the samples of prompts that are answered neither always rightly nor always wrongly.

    Args:
        correct: bool (B,), by the accuracy alone: a shaped reward would break ties.
        groups: int (B,), the prompt of each sample; numbers need not be dense or sorted.

    Returns:
        bool (B,). If none is left, sample on.

    Raises:
        TypeError, ValueError: wrong dtypes, or shapes that differ.

    Source: DAPO, arXiv:2503.14476, Eq. 11.
    """
    _checks.tensor("correct", correct, (torch.bool,))
    _checks.tensor("groups", groups, _checks.INTEGERS)
    if correct.dim() != 1:
        raise ValueError(f"correct has shape {tuple(correct.shape)}, expected (B,)")
    _checks.shape("groups", groups, correct.shape, "one per sample")
    _, place = groups.unique(return_inverse=True)
    size = torch.bincount(place, minlength=1)
    right = torch.zeros_like(size).index_add(0, place, correct.long())
    return ((right > 0) & (right < size))[place]


def tppo_masks(mask: Tensor, begin: Tensor, finished: Tensor) -> tuple[Tensor, Tensor]:
    """T-PPO's token filter: what a window of newly generated tokens trains, the policy and the critic.

    The policy is trained on every token once, in the window that generated it; the critic on finished responses, with
    Monte-Carlo returns.

    Args:
        mask: bool (B, T), the response's tokens so far.
        begin: int (B,), the position at which this window begins.
        finished: bool (B,), whether the response is complete.

    Returns:
        the masks of the policy loss and of the value loss, bool (B, T).

    Raises:
        TypeError, ValueError: wrong dtypes or shapes.

    Source: Truncated Proximal Policy Optimization, arXiv:2506.15050, Section 3; the rule for values is not verified.
    """
    _checks.tensor("mask", mask, (torch.bool,))
    if mask.dim() != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (B, T)")
    _checks.tensor("begin", begin, _checks.INTEGERS)
    _checks.tensor("finished", finished, (torch.bool,))
    _checks.shape("begin", begin, mask.shape[:1], "one per row of mask")
    _checks.shape("finished", finished, mask.shape[:1], "one per row of mask")
    new = torch.arange(mask.shape[1], device=mask.device) >= begin[:, None]
    return mask & new, mask & finished[:, None]
