"""Which tokens and sequences of RL data count: masks and selections for `fastpo.losses`, on detached numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.reference.ranks import gathered, summed_over

if TYPE_CHECKING:
    from fastpo.losses.statistics import Group


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
    if group is not None and group is not False:
        # ranks differ in their tokens: gathered with as many places on each
        longest = _largest(len(flat), keys, group)
        padded = torch.cat([flat, flat.new_full((longest - len(flat),), -torch.inf)])
        everyone, first = gathered(padded, group)
    else:
        everyone, first = flat, 0
    taken = torch.zeros_like(everyone, dtype=torch.bool)
    order = everyone.argsort(descending=True, stable=True)[:number]
    taken[order] = True
    taken &= everyone > -torch.inf
    return taken[first : first + len(flat)].view_as(keys)


def _largest(length: int, like: Tensor, group: Group) -> int:
    import torch.distributed as dist

    longest = torch.tensor(length, device=like.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=None if group is True else group)
    return int(longest)


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
    flat = values.masked_fill(~counts, torch.nan).flatten()
    if process_group is not None and process_group is not False:
        longest = _largest(len(flat), flat, process_group)
        flat, _ = gathered(torch.cat([flat, flat.new_full((longest - len(flat),), torch.nan)]), process_group)
    ordered = flat[~flat.isnan()].sort().values
    if len(ordered) == 0:
        return torch.zeros_like(counts)
    # torch.quantile takes at most 16 million numbers
    position = (1 - quantile) * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    threshold = torch.lerp(ordered[below], ordered[above], position - below)
    return counts & (values >= threshold)


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
