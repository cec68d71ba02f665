"""Statistics of segments of numbers, and members normalised by them, in plain torch."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Mode = Literal["center", "standardize", "leave_one_out", "lead", "standardized_lead"]
MODES: tuple[Mode, ...] = get_args(Mode)


class SegmentStats(NamedTuple):
    """Statistics of each segment, (S,) in fp32 (fp64 for fp64 values).

    An empty segment has count, sum, mean and variance 0, and the extremes inf and -inf. A constant one has exactly its
    number as mean and no variance. One with no more members than `ddof` has the variance 0.
    """

    count: Tensor  # type: ignore[assignment]
    sum: Tensor
    mean: Tensor
    var: Tensor
    min: Tensor
    max: Tensor


def group_members(ids: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The members in the order of their groups, stable, and where groups begin, (S + 1,) int64.

    With `groups` of at least 0 there are as many segments, one per id, and ids outside are in none. With -1 there are
    as many as members, of which the last are empty.
    """
    ids = ids.long()
    found, order = torch.sort(ids, stable=True)
    if groups < 0:
        found = torch.cat([found.new_zeros(1), (found.diff() != 0).long()]).cumsum(0)[: len(ids)]
        groups = len(ids)
    return order, torch.searchsorted(found, torch.arange(groups + 1, device=ids.device))


def segment_stats(
    values: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    boundaries: Tensor | None,
    mode: Mode,
    ddof: int,
    eps: float,
    skip_nan: bool,
    raw_singletons: bool,
) -> tuple[SegmentStats, Tensor, Tensor]:
    """The statistics, the members normalised, and which of them count in a segment that is not constant.

    Args:
        values: (S, N), or (N,) with `boundaries`, in which segment s has the members order[j] of boundaries[s] <= j <
            boundaries[s + 1]; without an order, the j themselves.
        weights: of the mean that is taken off.
        mask: True where a member counts; with `skip_nan`, one that is NaN does not.
        mode: "center": less the mean; "standardize": that over (standard deviation + eps); "leave_one_out": less the
            mean of the others; "lead": of the best member what it has before the second, of the others 0;
            "standardized_lead": that over (standard deviation + eps).
        raw_singletons: the only member of a segment stays as it is (over 1 + eps where it would be divided), else it
            becomes 0.
    """
    accumulate = torch.promote_types(values.dtype, torch.float32)
    x = values.to(accumulate)
    counts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    if skip_nan:
        counts = counts & ~x.isnan()
    if boundaries is None:
        segments = x.shape[0]
        index = torch.arange(segments, device=x.device)[:, None].expand(x.shape).reshape(-1)
    else:
        segments = boundaries.shape[0] - 1
        position = torch.arange(x.shape[0], device=x.device)
        index = torch.searchsorted(boundaries[1:].contiguous(), position, right=True)
        if order is not None:
            index = torch.empty_like(index).index_copy(0, order, index)
        counts = counts & (index < segments)
    # what does not count is in an extra segment
    flat, at = x.reshape(-1), torch.where(counts.reshape(-1), index, segments)

    def total(of: Tensor) -> Tensor:
        return of.new_zeros(segments + 1).index_add(0, at, of)

    def extreme(of: Tensor, which: str) -> Tensor:
        start = of.new_full((segments + 1,), torch.inf if which == "amin" else -torch.inf)
        return start.scatter_reduce(0, at, of, which)

    count, sums = total(torch.ones_like(flat)), total(flat)
    low, high = extreme(flat, "amin"), extreme(flat, "amax")
    constant = (low == high) & (count > 0)
    mean = torch.where(constant, low, sums / count.clamp(min=1))
    deviation = torch.where(constant[at], 0, flat - mean[at])
    variance = torch.where(count > ddof, total(deviation.square()) / (count - ddof).clamp(min=1), 0)
    variance = torch.where(constant, 0, variance)
    centre, zero = mean, constant | (count < 2)
    if weights is not None:
        w = weights.to(accumulate).reshape(-1)
        weight = total(w)
        zero = zero | (weight == 0)
        centre = total(torch.where(w == 0, 0, w * flat)) / weight
    factor = torch.ones_like(count)
    if mode in ("lead", "standardized_lead"):
        best = flat == high[at]
        several = total(best.to(accumulate)) > 1
        centre = torch.where(several, high, extreme(torch.where(best, -torch.inf, flat), "amax"))
    if mode == "leave_one_out":
        factor = count / (count - 1)
    scaled = mode in ("standardize", "standardized_lead")
    if scaled:
        zero = zero | (count <= ddof)
        factor = 1 / (variance.sqrt() + eps)
    out = torch.where(zero[at], 0, (flat - centre[at]) * factor[at])
    if mode in ("lead", "standardized_lead"):
        out = torch.where(flat < high[at], 0, out)
    if raw_singletons:
        out = torch.where(count[at] == 1, flat / (1 + eps) if scaled else flat, out)
    inside = counts.reshape(-1)
    stats = SegmentStats(*(t[:-1] for t in (count, sums, mean, variance, low, high)))
    return stats, torch.where(inside, out, 0).view(x.shape), (inside & ~constant[at]).view(x.shape)
