"""What compositions of token-level tensors share: where each token belongs, and how losses of rows are reduced."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.objective import Reduction, mean_denominator, mean_of
from fastpo.reference.sequence import sequence_sum


class Tokens(NamedTuple):
    """The N tokens of padded rows or packed sequences, one behind the other.

    Attributes:
        rows: the number of sequences.
        row: int64 (N,), the sequence of each token; `rows` for those behind the last.
        counts: bool (N,), which tokens count.
        following: int64 (N,), the next token of the sequence that counts; N where there is none.
        first: int64 (rows,), the first token that counts; N where there is none.
    """

    rows: int
    row: Tensor
    counts: Tensor
    following: Tensor
    first: Tensor


def check_layout(name: str, like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Check tokens that are padded (B, T), or packed (N,) with cu_seqlens, and their mask; returns the rows."""
    _checks.tensor(name, like, _checks.FLOATS)
    if like.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"{name} has shape {tuple(like.shape)}, expected (B, T), or (N,) with cu_seqlens")
    if cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, name, like)
        _checks.rising("cu_seqlens", cu_seqlens, len(like))
    if mask is not None:
        check_mask("mask", mask, name, like)
    return len(like) if cu_seqlens is None else len(cu_seqlens) - 1


def check_mask(name: str, mask: Tensor, of: str, like: Tensor) -> Tensor:
    """Check a bool tensor of the shape of another."""
    _checks.tensor(name, mask, (torch.bool,))
    _checks.same_device(name, mask, of, like)
    _checks.shape(name, mask, like.shape, f"it must match {of}")
    return mask


def check_like(name: str, value: Tensor, of: str, like: Tensor) -> Tensor:
    """Check floats of the shape of others."""
    _checks.tensor(name, value, _checks.FLOATS)
    _checks.same_device(name, value, of, like)
    _checks.shape(name, value, like.shape, f"it must match {of}")
    return value


def check_rows(name: str, value: Tensor, of: str, like: Tensor, rows: int, *, shared: bool = False) -> Tensor:
    """Check floats of one per row, or, where they may be `shared`, one for all."""
    _checks.tensor(name, value, _checks.FLOATS)
    _checks.same_device(name, value, of, like)
    if not (shared and value.dim() == 0):
        _checks.shape(name, value, (rows,), f"one per row of {of}" + ", or one for all" * shared)
    return value


def tokens(like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tokens:
    """The places of tokens of a checked layout."""
    n = like.numel()
    position = torch.arange(n, device=like.device)
    if cu_seqlens is None:
        rows, length = like.shape
        place = position.view(rows, length)
        counts = torch.ones_like(place, dtype=torch.bool) if mask is None else mask
        if mask is not None and n:
            # the next that counts, from each place on
            place = torch.where(mask, place, n).flip(1).cummin(1).values.flip(1)
        # behind the last of a row, and in a row without places, there is none
        coming = torch.cat([place, place.new_full((rows, 1), n)], 1)
        return Tokens(rows, position // max(length, 1), counts.flatten(), coming[:, 1:].flatten(), coming[:, 0])
    bounds = cu_seqlens.long()
    rows = len(bounds) - 1
    row = torch.searchsorted(bounds[1:], position, right=True)
    counts = row < rows if mask is None else mask & (row < rows)
    coming = torch.where(counts, position, n).flip(0).cummin(0).values.flip(0) if n else position
    coming = torch.cat([coming, coming.new_full((2,), n)])
    ends = torch.cat([bounds[1:], bounds.new_zeros(1)])
    following = torch.where(coming[1 : n + 1] < ends[row], coming[1 : n + 1], n)
    first = torch.where(coming[bounds[:-1]] < bounds[1:], coming[bounds[:-1]], n)
    return Tokens(rows, row, counts, following, first)


def logprob_sums(name: str, logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Log-probs per sequence (B,), summed already or to be summed, checked."""
    _checks.tensor(name, logprobs, _checks.FLOATS)
    if logprobs.dim() != 1 or cu_seqlens is not None:
        if logprobs.dim() not in (1, 2):
            raise ValueError(
                f"{name} has shape {tuple(logprobs.shape)}, expected (B,), (B, T), or (N,) with cu_seqlens"
            )
        check_layout(name, logprobs, mask, cu_seqlens)
    elif mask is not None:
        raise ValueError(f"mask is for token log-probs, but {name} is (B,), summed already")
    return sequence_sum(logprobs, mask, cu_seqlens)[0]


def counted(mask: Tensor | None, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Which of the tokens count, as a bool tensor of their shape."""
    counts = torch.ones_like(like, dtype=torch.bool) if mask is None else mask
    if cu_seqlens is not None:
        counts = counts & (torch.arange(len(like), device=like.device) < cu_seqlens[-1])
    return counts


def reducer(
    reduction: Reduction, num_items: float | Tensor | None, rows: int, like: Tensor, name: str
) -> Callable[[Tensor], Tensor]:
    """What makes the loss of the losses (rows,), checked: `fastpo.losses.dpo` has the arguments."""
    denominator = mean_denominator(reduction, num_items, rows, like, name)

    def reduce(loss: Tensor) -> Tensor:
        if reduction == "none":
            return loss
        out = mean_of(loss, denominator)
        return out / num_items.to(out.dtype) if isinstance(num_items, Tensor) else out

    return reduce


def number_in(name: str, value: object, low: float, high: float, *, closed: str = "") -> float:
    """A finite number between two, of which those named in `closed` ("low", "high", "both") are allowed."""
    number = _checks.number(name, value)
    left, right = closed in ("low", "both"), closed in ("high", "both")
    if not ((low <= number if left else low < number) and (number <= high if right else number < high)):
        raise ValueError(
            f"{name} must be in {'[' if left else '('}{low:g}, {high:g}{']' if right else ')'}, got {value}"
        )
    return number
