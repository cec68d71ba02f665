"""Packing and balancing of sequences in plain Python: the twins of csrc/host."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def _by_decreasing_length(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing, as `fastpo.kernels.packing.pack` documents it."""
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    # largest free space below each node of a tree over the bins; bins not open yet count as empty
    room = [budget] * (2 * leaves)
    bins: list[list[int]] = []
    for item in _by_decreasing_length(lengths):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[item] else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        room[node] -= lengths[item]
        node //= 2
        while node:
            room[node] = max(room[2 * node], room[2 * node + 1])
            node //= 2
    return bins


# a part that holds items: -total, the lowest item, the items
_Part = tuple[int, int, list[int]]


def _join(a: _Part, b: _Part) -> _Part:
    few, many = sorted((a[2], b[2]), key=len)
    many += few  # the shorter list is copied: O(n log n) for all merges together
    return a[0] + b[0], min(a[1], b[1]), many


def balance(lengths: Sequence[int], parts: int, equal_size: bool = False) -> list[list[int]]:
    """Karmarkar-Karp differencing, as `fastpo.kernels.packing.balance` documents it."""
    if not lengths:
        return [[] for _ in range(parts)]
    order = _by_decreasing_length(lengths)
    step = parts if equal_size else 1

    # a partial partition is a list of parts, heaviest first; empty parts would come last and are left out
    def entry(number: int, partial: list[_Part]) -> tuple[int, int, list[_Part]]:
        lightest = partial[-1][0] if len(partial) == parts else 0
        return partial[0][0] - lightest, number, partial

    starts = ([(-lengths[i], i, [i]) for i in order[first : first + step]] for first in range(0, len(order), step))
    heap = [entry(number, partial) for number, partial in enumerate(starts)]
    heapq.heapify(heap)
    for number in range(len(heap), 2 * len(heap) - 1):
        a, b = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        # the i-th heaviest part of one meets the i-th lightest of the other; where that is empty, nothing is added
        alone, other = parts - len(b), parts - len(a)
        met = [_join(x, y) for x, y in zip(a[alone:], reversed(b[other:]), strict=True)]
        heapq.heappush(heap, entry(number, sorted(a[:alone] + b[:other] + met, key=lambda part: part[:2])))
    groups = [sorted(items) for _, _, items in heap[0][2]]
    return groups + [[] for _ in range(parts - len(groups))]
