"""Packing and balancing: the compiled module against its twin, and both against exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastpo
from fastpo.kernels.packing import balance, pack

small = st.lists(st.integers(0, 12), max_size=7)


def both(function, *args):
    """The result of the compiled module, which must be that of the twin."""
    with fastpo.use_backend("native"):
        compiled = function(*args)
    with fastpo.use_backend("reference"):
        assert function(*args) == compiled
    return compiled


def naive_first_fit(lengths, budget):
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b in bins if sum(lengths[j] for j in b) + lengths[i] <= budget]
        (fitting[0] if fitting else bins).append(i if fitting else [i])
    return bins


def partitions(n, parts):
    return itertools.product(range(parts), repeat=n)


def totals(assignment, lengths, parts):
    return [sum(n for n, a in zip(lengths, assignment, strict=True) if a == p) for p in range(parts)]


class TestPack:
    @settings(deadline=None)
    @given(st.lists(st.integers(0, 50), max_size=60))
    def test_is_first_fit_decreasing(self, lengths):
        assert both(pack, lengths, 50) == naive_first_fit(lengths, 50)

    @settings(deadline=None, max_examples=40)
    @given(small)
    def test_number_of_bins(self, lengths):
        used = len(both(pack, lengths, 12))
        best = next(
            k
            for k in range(len(lengths) + 1)
            if any(max(totals(a, lengths, k), default=0) <= 12 for a in partitions(len(lengths), k))
        )
        assert used * 9 <= 11 * best + 6

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 400), max_size=200), st.integers(400, 1000))
    def test_partition_within_the_budget(self, lengths, budget):
        bins = both(pack, lengths, budget)
        assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in b) <= budget for b in bins)

    def test_large(self):
        lengths = np.random.default_rng(0).integers(1, 4097, 100_000).tolist()
        bins = both(pack, lengths, 8192)
        assert len(bins) <= 1.001 * -(-sum(lengths) // 8192)

    def test_inputs(self):
        for lengths in (
            [3, 1, 2],
            (3, 1, 2),
            np.array([3, 1, 2]),
            torch.tensor([3, 1, 2]),
            torch.tensor([3, 1, 2]).int(),
        ):
            assert both(pack, lengths, 3) == [[0], [2, 1]]
        assert both(pack, range(4), 3) == [[3, 0], [2, 1]]
        assert both(pack, [], 3) == []

    def test_errors(self):
        with pytest.raises(ValueError, match=r"lengths\[1\] is 5000, longer than the budget of 4096"):
            pack([1, 5000], 4096)
        with pytest.raises(ValueError, match=r"lengths\[0\] is -1"):
            pack([-1], 4)
        with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
            pack([], 0)
        with pytest.raises(TypeError, match="budget must be an int, got float"):
            pack([1], 4.0)
        with pytest.raises(TypeError, match="lengths must be a sequence of integers"):
            pack([1.5], 4)
        with pytest.raises(TypeError, match="lengths must have dtype int64, int32"):
            pack(torch.tensor([1.0]), 4)
        with pytest.raises(ValueError, match=r"lengths has shape \(1, 1\)"):
            pack(torch.tensor([[1]]), 4)


class TestBalance:
    @settings(deadline=None)
    @given(st.lists(st.integers(0, 300), max_size=80), st.integers(1, 9))
    def test_partition(self, lengths, parts):
        groups = both(balance, lengths, parts)
        assert len(groups) == parts
        assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
        assert all(g == sorted(g) for g in groups)
        weights = [sum(lengths[i] for i in g) for g in groups]
        assert weights == sorted(weights, reverse=True)

    @settings(deadline=None, max_examples=40)
    @given(small, st.integers(1, 3))
    def test_largest_total(self, lengths, parts):
        """Differencing is within 4/3 - 1/(3 parts) of the optimum (Michiels et al. 2003), as greedy LPT is."""
        best = min((max(totals(a, lengths, parts)) for a in partitions(len(lengths), parts)), default=0)
        worst = max(sum(lengths[i] for i in g) for g in both(balance, lengths, parts))
        assert worst * 3 * parts <= best * (4 * parts - 1)

    def test_two_parts_known_case(self):
        """Karmarkar and Karp's own example style: 8 7 6 5 4 is split 16 : 14 by differencing."""
        groups = both(balance, [8, 7, 6, 5, 4], 2)
        assert [sum([8, 7, 6, 5, 4][i] for i in g) for g in groups] == [16, 14]

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 300), min_size=0, max_size=20), st.integers(1, 6))
    def test_equal_size(self, lengths, parts):
        lengths = lengths * parts
        groups = both(balance, lengths, parts, True)
        assert [len(g) for g in groups] == [len(lengths) // parts] * parts
        assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))

    def test_large(self):
        lengths = np.random.default_rng(0).integers(1, 4097, 20_000).tolist()
        weights = [sum(lengths[i] for i in g) for g in both(balance, lengths, 8)]
        assert weights[0] - weights[-1] <= 8

    def test_errors(self):
        with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
            balance([1], 0)
        with pytest.raises(ValueError, match="multiple of parts=2 sequences, got 3 lengths"):
            balance([1, 2, 3], 2, equal_size=True)
