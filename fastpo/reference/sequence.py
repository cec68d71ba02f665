"""Masked sums over the tokens of each sequence, in plain torch."""

from __future__ import annotations

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
