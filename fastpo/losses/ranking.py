"""What is logged beside an objective on lists."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.reference.listwise import MAX_ITEMS


class RankingMetrics(NamedTuple):
    """How the scores of each list rank its items, (B,) each, fp32 (fp64 for fp64 scores), without gradient.

    A list without a pair of different labels has NaN in all of them, so that `torch.nanmean` leaves it out.

    Attributes:
        top1: 1 where the item of the highest score has the highest label.
        pair_accuracy: share of the pairs of different labels whose better item has the higher score; a tie counts 0.
        ndcg: DCG with gains 2^label - 1 and discounts log2(1 + rank) over the best one.
        margin: the highest score among the best items minus the lowest among the worst.
    """

    top1: Tensor
    pair_accuracy: Tensor
    ndcg: Tensor
    margin: Tensor


@torch.no_grad()
def ranking_metrics(scores: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> RankingMetrics:
    """Top-1 and pair accuracy, NDCG and margin of each list, such as of the rewards of `fastpo.losses.lipo_lambda`.

    In plain torch, over the (B, K, K) pairs: to be logged now and then. Equal scores are ranked as they come.

    Args:
        scores: (B, K), fp32, bf16, fp16 or fp64, finite where they count.
        labels: floats or integers (B, K), the largest the best; for NDCG at least 0.
        mask: bool (B, K), True where an item counts.

    Returns:
        RankingMetrics.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices, or lists of more than 1,024 items.
    """
    _checks.tensor("scores", scores, _checks.FLOATS)
    _checks.tensor("labels", labels, _checks.FLOATS + _checks.INTEGERS)
    if scores.dim() != 2 or scores.shape[1] > MAX_ITEMS:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected (B, K), K at most {MAX_ITEMS}")
    _checks.same_device("labels", labels, "scores", scores)
    _checks.shape("labels", labels, scores.shape, "it must match scores")
    if mask is not None:
        _checks.tensor("mask", mask, (torch.bool,))
        _checks.same_device("mask", mask, "scores", scores)
        _checks.shape("mask", mask, scores.shape, "it must match scores")
    dtype = torch.promote_types(scores.dtype, torch.float32)
    lists, items = scores.shape
    if items == 0:
        return RankingMetrics(*torch.full((4, lists), torch.nan, dtype=dtype, device=scores.device))
    counts = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    s = torch.where(counts, scores.to(dtype), -torch.inf)
    t = torch.where(counts, labels.to(dtype), -torch.inf)
    better = counts[:, None] & counts[:, :, None] & (t[:, :, None] > t[:, None])
    pairs = better.sum((1, 2))
    right = (better & (s[:, :, None] > s[:, None])).sum((1, 2))
    best, worst = t.amax(1, keepdim=True), torch.where(counts, t, torch.inf).amin(1, keepdim=True)
    order = s.argsort(dim=1, descending=True, stable=True)
    discounts = 1 / torch.arange(2, items + 2, device=s.device, dtype=dtype).log2()
    gains = torch.where(counts, torch.exp2(torch.where(counts, t, 0)) - 1, 0)
    dcg, ideal = ((x * discounts).sum(1) for x in (gains.gather(1, order), gains.sort(dim=1, descending=True)[0]))
    lead = torch.where(t == best, s, -torch.inf).amax(1)
    trail = torch.where(counts & (t == worst), s, torch.inf).amin(1)
    top1 = (t.gather(1, order[:, :1]) == best)[:, 0].to(dtype)
    found = (top1, right / pairs.clamp(min=1), dcg / ideal, lead - trail)
    return RankingMetrics(*(torch.where(pairs > 0, x.to(dtype), torch.nan) for x in found))
