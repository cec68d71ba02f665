"""What some objectives know of the whole batch or of its past, on detached numbers: an input of theirs, computed here.

Over several ranks each function takes the `process_group` (True for the default one) and gives every rank the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.reference.ranks import gathered, summed_over
from fastpo.reference.sequence import Side, sequence_sum, token_ranks

if TYPE_CHECKING:
    from fastpo.reference.ranks import Group


def _row(name: str, value: Tensor, rows: int | None = None) -> Tensor:
    tensor = _checks.tensor(name, value, _checks.FLOATS)
    if tensor.dim() != 1 or (rows is not None and tensor.shape[0] != rows):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({'B' if rows is None else rows},)")
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _fraction(name: str, value: float, *, one: bool = False) -> None:
    number = _checks.number(name, value)
    if not (0 < number < 1 or (one and number == 1) or (not one and number == 0)):
        raise ValueError(f"{name} must be in {'(0, 1]' if one else '[0, 1)'}, got {value:g}")


def kto_kl(
    policy: Tensor,
    reference: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    process_group: Group = None,
) -> Tensor:
    """KTO's reference point z0: the mean log-ratio of mismatched pairs, over all ranks, and then at least 0.

    Args:
        policy, reference: log-probs of completions under prompts that are not theirs (the next completion of the
            batch), summed (B,) or per token, as in the losses.
        mask, cu_seqlens: the layout of token log-probs.
        process_group: ranks whose batches count together.

    Returns:
        0-dimensional, without gradient: the `kl` of `fastpo.losses.kto`.

    Raises:
        TypeError, ValueError: policy and reference differ in shape or are no floats, or the batch is empty.
    """
    _checks.tensor("policy", policy, _checks.FLOATS)
    _checks.tensor("reference", reference, _checks.FLOATS)
    _checks.shape("reference", reference, policy.shape, "it must match policy")
    sums = [sequence_sum(t.detach(), mask, cu_seqlens)[0] for t in (policy, reference)]
    ratios = sums[0] - sums[1]
    if ratios.shape[0] == 0 and process_group is None:
        raise ValueError("policy has no rows: the mean of an empty batch is undefined")
    total, count = summed_over(torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))]), process_group)
    return (total / count).clamp(min=0)


def bco_delta(
    rewards: Tensor,
    labels: Tensor,
    *,
    previous: Tensor | None = None,
    decay: float = 0.9,
    process_group: Group = None,
) -> Tensor:
    """BCO's reward shift: the mean of the two classes' mean rewards, as a moving average.

    Args:
        rewards: (B,), β · log-ratio.
        labels: bool (B,), True for desirable rows.
        previous: the last value; without it, this batch's alone.
        decay: weight of the last value. The paper's number is not verified.
        process_group: ranks whose batches count together.

    Returns:
        0-dimensional, without gradient. A batch without one of the classes leaves `previous` as it is; the first batch
        then gives the mean of the other class, and 0 if it is empty.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or decay outside [0, 1).
    """
    values = _row("rewards", rewards)
    _checks.tensor("labels", labels, (torch.bool,))
    _checks.shape("labels", labels, rewards.shape, "one label per reward")
    _fraction("decay", decay)
    kept = [torch.where(side, values, 0).sum() for side in (labels, ~labels)]
    counts = [side.sum().to(values.dtype) for side in (labels, ~labels)]
    sums = summed_over(torch.stack([*kept, *counts]), process_group)
    present = sums[2:] > 0
    means = torch.where(present, sums[:2] / sums[2:].clamp(min=1), 0)
    now = means.sum() / present.sum().clamp(min=1)
    if previous is None:
        return now
    last = previous.detach().to(now)
    return torch.where(present.all(), decay * last + (1 - decay) * now, last)


class Moments(NamedTuple):
    """Moving averages of a batch's mean and standard deviation, 0-dimensional."""

    mean: Tensor
    std: Tensor


def _moments(values: Tensor, previous: Moments | None, decay: float) -> Moments:
    """The official codes begin at 0, which makes the first steps NaN: here the first batch is the beginning."""
    mean = values.mean()
    std = (values - mean).square().sum().div(max(len(values) - 1, 1)).sqrt()
    if previous is not None:
        mean = decay * previous.mean.to(mean) + (1 - decay) * mean
        std = decay * previous.std.to(std) + (1 - decay) * std
    # equal margins, as at the start, or a batch of one
    return Moments(mean, std.clamp(min=1e-6))


class BetaDPOStatistics(NamedTuple):
    """Inputs of `fastpo.losses.beta_dpo` for one batch.

    Attributes:
        batch_beta: 0-dimensional, the batch's β.
        keep: bool (B,), which pairs count.
        moments: to be passed as `previous` with the next batch.
    """

    batch_beta: Tensor
    keep: Tensor
    moments: Moments


def beta_dpo_statistics(
    margins: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    kept: float = 0.8,
    decay: float = 0.9,
    previous: Moments | None = None,
    generator: torch.Generator | None = None,
    process_group: Group = None,
) -> BetaDPOStatistics:
    """β-DPO's batch: which pairs are kept, and their β = β₀ (1 + α (mean kept margin - moving mean)), at least 1e-3.

    Pairs are drawn without replacement with the weights exp(-((margin - mean) / std)² / 2).

    Args:
        margins: (B,), h: the chosen minus the rejected log-ratio.
        beta: β₀.
        alpha: the paper's a.
        kept: the fraction of pairs that is kept, at least one.
        decay: of the moving mean and standard deviation.
        previous: the last batch's `moments`.
        generator: draws the pairs; over ranks, with the same seed on each.
        process_group: ranks whose margins count together.

    Raises:
        TypeError, ValueError: margins are not (B,) floats with B > 0, or a number is outside its domain.
    """
    for name, number in (("beta", beta), ("alpha", alpha)):
        if _checks.number(name, number) <= 0:
            raise ValueError(f"{name} must be positive, got {number:g}")
    _fraction("decay", decay)
    _fraction("kept", kept, one=True)
    ours = _row("margins", margins)
    everyone, first = gathered(ours, process_group)
    if len(everyone) == 0:
        raise ValueError("margins has no rows")
    moments = _moments(everyone, previous, decay)
    weights = torch.exp(-0.5 * ((everyone - moments.mean) / moments.std).square())
    # far outliers still have a chance: multinomial wants as many positive weights as draws
    weights = weights.clamp(min=torch.finfo(weights.dtype).tiny)
    drawn = weights.multinomial(max(1, round(kept * len(everyone))), generator=generator)
    keep = torch.zeros_like(everyone, dtype=torch.bool)
    keep[drawn] = True
    batch_beta = (beta * (1 + alpha * (everyone[drawn].mean() - moments.mean))).clamp(min=1e-3)
    return BetaDPOStatistics(batch_beta, keep[first : first + len(ours)], moments)


def alpha_dpo_statistics(
    gaps: Tensor, *, decay: float = 0.9, previous: Moments | None = None, process_group: Group = None
) -> Moments:
    """Moving mean and standard deviation of the gaps: `gap_mean` and `gap_std` of `fastpo.losses.alpha_dpo`.

    Args:
        gaps: (B,), the chosen minus the rejected log-ratio per token.
        decay: of the moving averages.
        previous: what the last batch gave.
        process_group: ranks whose gaps count together.

    Raises:
        TypeError, ValueError: gaps are not (B,) floats with B > 0, or decay is outside [0, 1).
    """
    _fraction("decay", decay)
    everyone, _ = gathered(_row("gaps", gaps), process_group)
    if len(everyone) == 0:
        raise ValueError("gaps has no rows")
    return _moments(everyone, previous, decay)


def sampo_sample(
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """As many tokens of each response as the shorter one of its pair has, uniformly without replacement.

    Args:
        chosen_mask, rejected_mask: bool (B, T), or (N,) with cu_seqlens: the tokens that count.
        chosen_cu_seqlens, rejected_cu_seqlens: int32 (B + 1,), boundaries of the packed responses.
        generator: draws the tokens.

    Returns:
        `chosen_sample` and `rejected_sample` of `fastpo.losses.sampo`, of the masks' shapes.

    Raises:
        TypeError, ValueError: the masks are not bool, or differ in rows.
    """
    sides = []
    for name, mask, boundaries in (
        ("chosen_mask", chosen_mask, chosen_cu_seqlens),
        ("rejected_mask", rejected_mask, rejected_cu_seqlens),
    ):
        _checks.tensor(name, mask, (torch.bool,))
        if mask.dim() != (2 if boundaries is None else 1):
            raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected (B, T), or (N,) with cu_seqlens")
        sides.append(Side(mask.float(), None, mask, boundaries))
    found = [token_ranks(side) for side in sides]
    counts = [count for _, count in found]
    if counts[0].shape != counts[1].shape:
        raise ValueError(f"rejected_mask has {len(counts[1])} rows, chosen_mask has {len(counts[0])}")
    wanted = torch.minimum(*counts)
    samples = []
    for side, ((_, rows), _) in zip(sides, found, strict=True):
        assert side.mask is not None
        row = rows.expand_as(side.mask).flatten()
        keys = torch.rand(row.shape, generator=generator, device=row.device, dtype=torch.float64)
        # by row, then what counts, then at random
        order = (3 * row + keys + (~side.mask.flatten())).argsort()
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        sizes = torch.bincount(row, minlength=len(wanted))
        place = position - (sizes.cumsum(0) - sizes)[row]
        samples.append(((place < wanted[row]) & side.mask.flatten()).view_as(side.mask))
    return samples[0], samples[1]
