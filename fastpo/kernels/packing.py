"""Packing of sequences into token budgets and balancing over ranks: host structures, compiled or in Python."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.reference import packing as reference

_LARGEST = 2**63 - 1  # the compiled module counts in int64


def _lengths(lengths: Sequence[int] | Tensor) -> list[int]:
    if isinstance(lengths, Tensor):
        _checks.tensor("lengths", lengths, _checks.INTEGERS)
        if lengths.dim() != 1:
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected one dimension")
        values = lengths.tolist()
    else:
        try:
            if isinstance(lengths, (Set, Mapping)):  # has no order for an index to refer to
                raise TypeError
            values = [operator.index(n) for n in lengths]
        except TypeError:
            raise TypeError(f"lengths must be a sequence of integers, got {lengths!r:.80}") from None
    for i, n in enumerate(values):
        if n < 0:
            raise ValueError(f"lengths[{i}] is {n}, expected a length of at least 0")
    if (total := sum(values)) > _LARGEST:
        raise ValueError(f"lengths have the total {total}, expected at most 2**63 - 1")
    return values


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def pack(lengths: Sequence[int] | Tensor, budget: int) -> list[list[int]]:
    """Distribute sequences over few bins of at most `budget` tokens each, by first-fit decreasing.

    The sequences go in order of decreasing length (of equals, the lower index first), each into the first bin that
    has room. Takes O(n log n); needs at most 11/9 of the least possible number of bins, plus 6/9.

    Args:
        lengths: n lengths in tokens: a sequence or array of integers, or an int64 or int32 tensor (n,). 0 is allowed.
        budget: tokens per bin, at least the longest length.

    Returns:
        the bins in the order in which they were opened, each a list of indices into `lengths` in the order in which
        they were put there. No lengths give no bins.

    Raises:
        TypeError: a length or the budget is not an integer.
        ValueError: a length is negative or above the budget, the budget is below 1, or the lengths add up to more
            than int64 holds; the message names the argument and its value.

    Source: D. S. Johnson, Near-optimal bin packing algorithms (1973); the bound is tight by G. Dósa (2007).
    """
    values, limit = _lengths(lengths), _positive("budget", budget)
    for i, n in enumerate(values):
        if n > limit:
            raise ValueError(f"lengths[{i}] is {n}, longer than budget {limit}")
    return (_native.host() or reference).pack(values, min(limit, _LARGEST))


def balance(lengths: Sequence[int] | Tensor, parts: int, equal_size: bool = False) -> list[list[int]]:
    """Distribute sequences over ranks so that the largest total length is small, by the largest differencing method.

    Begins with one partition per sequence (with `equal_size`, per `parts` sequences in order of decreasing length, one
    for each part) and merges the two of the largest spread, heaviest less lightest part, until one is left: the i-th
    heaviest part of one joins the i-th lightest of the other. Of equal lengths and of equally heavy parts the one with
    the lowest index goes first, of equal spreads the older partition. Takes O(n (log n + parts log parts)).

    Args:
        lengths: n lengths in tokens: a sequence or array of integers, or an int64 or int32 tensor (n,). 0 is allowed.
        parts: the number of ranks.
        equal_size: give each rank as many sequences; n must be divisible by `parts`.

    Returns:
        one list of indices per rank, ascending; the rank with the largest total first (of equals, the one with the
        lowest index), ranks without a sequence last. Deterministic, so that every rank can compute it for itself.

    Raises:
        TypeError: an argument is not of the above type.
        ValueError: a length is negative, `parts` is below 1, `equal_size` is asked for and `parts` does not divide n,
            or the lengths add up to more than int64 holds; the message names the argument and its value.

    Source: N. Karmarkar and R. M. Karp, The differencing method of set partitioning (1982).
    """
    values, count = _lengths(lengths), _positive("parts", parts)
    if equal_size and len(values) % count:
        raise ValueError(f"equal_size=True needs a multiple of parts={count} sequences, got {len(values)} lengths")
    return (_native.host() or reference).balance(values, count, bool(equal_size))
