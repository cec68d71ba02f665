"""Masked sums over the tokens of each sequence, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def sequence_sum(
    values: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Sum per sequence in fp32 (fp64 for fp64 input), and how many tokens were summed.

    Args:
        values: (B,) already summed; (B, T) padded; or (N,) packed when `cu_seqlens` is given.
        mask: bool of the shape of `values`, True where a token counts; the others are selected away, so that
            NaN or inf there reaches neither value nor gradient.
        cu_seqlens: int (B + 1,), the boundaries of the packed sequences.

    Returns:
        sums (B,) and counts (B,) int64, or None where `values` was sequence-level already.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if values.dim() == 1 and cu_seqlens is None:
        return values, None
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    values = torch.where(mask, values, 0)
    if cu_seqlens is None:
        return values.sum(1), mask.sum(1)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    position = torch.arange(values.shape[0], device=values.device)
    # tokens outside every sequence go to an extra row that is cut off
    row = torch.searchsorted(cu_seqlens.long(), position, right=True) - 1
    inside = (row >= 0) & (row < len(starts))
    row = torch.where(inside, row, len(starts))
    out = values.new_zeros(len(starts) + 1)
    sums = out.index_add(0, row, torch.where(inside, values, 0))[:-1]
    counts = torch.zeros(len(ends) + 1, dtype=torch.int64, device=values.device)
    counts = counts.index_add(0, row, mask.long())[:-1]
    return sums, counts


class Side(NamedTuple):
    """One completion of every row: chosen or rejected of a pair, or the only one.

    `policy`, `reference` and `previous` are (B,), or token-level: (B, T) with an optional `mask`, or packed (N,) with
    `cu_seqlens` and an optional `mask`. `lengths` (B,) is needed only for averages of sequence-level log-probs.
    """

    policy: Tensor
    reference: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    lengths: Tensor | None = None
    previous: Tensor | None = None

    def sums(self) -> tuple[Tensor, Tensor | None]:
        """The policy's log-prob per sequence, and the number of tokens if it is known."""
        total, counts = sequence_sum(self.policy, self.mask, self.cu_seqlens)
        return total, self.lengths if counts is None else counts


class Summed(NamedTuple):
    """One side as a formula sees it, (B,) each; the ratio to a model that is not there is that to 1."""

    policy: Tensor
    logratio: Tensor
    step: Tensor | None
    length: Tensor | None


def summed(side: Side) -> Summed:
    """The sums of a side, and its lengths, at least 1, if they are known."""
    policy, counts = side.sums()
    ratios = [
        policy - sequence_sum(model.detach(), side.mask, side.cu_seqlens)[0]
        for model in (side.reference, side.previous)
        if model is not None
    ]
    length = None if counts is None else counts.clamp(min=1).to(policy.dtype)
    return Summed(policy, ratios[0] if ratios else policy, ratios[1] if len(ratios) > 1 else None, length)


def per_token(side: Summed) -> Summed:
    """The same as averages."""
    n = side.length
    assert n is not None
    return Summed(side.policy / n, side.logratio / n, None if side.step is None else side.step / n, n)


def token_ranks(side: Side) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Ranks of the tokens that count in their sequence, from 1; their sequence; and their number per sequence.

    Ranks have the shape of the token-level log-probs, those of tokens that do not count without meaning; the sequence
    is an index that broadcasts against them.
    """
    counts = sequence_sum(torch.zeros_like(side.policy), side.mask, side.cu_seqlens)[1]
    assert counts is not None
    kept = torch.ones_like(side.policy, dtype=torch.int64) if side.mask is None else side.mask.long()
    if side.cu_seqlens is None:
        row = torch.arange(kept.shape[0], device=kept.device)[:, None]
        return (kept.cumsum(1), row), counts
    position = torch.arange(kept.shape[0], device=kept.device)
    row = torch.searchsorted(side.cu_seqlens[1:].long(), position, right=True).clamp(max=max(len(counts) - 1, 0))
    before = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
    return (before[1:] - before[side.cu_seqlens[:-1].long()][row], row), counts
