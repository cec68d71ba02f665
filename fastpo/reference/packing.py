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


def balance(lengths: Sequence[int], parts: int, equal_size: bool = False) -> list[list[int]]:
    """Karmarkar-Karp differencing, as `fastpo.kernels.packing.balance` documents it."""
    if not lengths:
        return [[] for _ in range(parts)]
    order = _by_decreasing_length(lengths)
    step = parts if equal_size else 1
    # a partial partition is a list of (-total, lowest item, items), the heaviest part first
    heap = []
    for number, first in enumerate(range(0, len(order), step)):
        partial = [(-lengths[i], i, [i]) for i in order[first : first + step]]
        partial += [(0, len(lengths), [])] * (parts - step)
        heap.append((partial[0][0] - partial[-1][0], number, partial))
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        a, b = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        merged = [(x + y, min(i, j), p + q) for (x, i, p), (y, j, q) in zip(a, reversed(b), strict=True)]
        merged.sort(key=lambda part: part[:2])
        heapq.heappush(heap, (merged[0][0] - merged[-1][0], number, merged))
        number += 1
    return [sorted(items) for _, _, items in heap[0][2]]
