"""Selection of training data: against a plain reading of each algorithm, enumerated laws, and bad input."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import data

NAN, INF = math.nan, math.inf


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def algorithm_1(candidates: list[int], rewards: list[float], wanted: int, beta: float, sweeps: list[list[float]]):
    """RSO's Algorithm 1 as it is printed, on a map; draws come from `sweeps`, by sweep and place of the candidate."""
    place, cand = {}, {}
    for i, (c, r) in enumerate(zip(candidates, rewards, strict=True)):
        place.setdefault(c, i)
        cand[c] = r
    accepted: list[int] = []
    tried = 0
    for used, draws in enumerate(sweeps, 1):
        largest, removed = max(cand.values()), []
        for c, r in cand.items():
            tried += 1
            if draws[list(place).index(c)] >= math.exp((r - largest) / beta):
                continue
            accepted.append(c)
            removed.append(c)
            if len(accepted) == wanted:
                return accepted, used, wanted / tried
        for c in removed:
            del cand[c]
    raise AssertionError("too few sweeps")


class TestRejectionSampling:
    @pytest.mark.parametrize("collapse", [False, True])
    @pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
    def test_is_the_printed_algorithm(self, beta, collapse):
        """With the same draws: the same candidates in the same order, sweeps and acceptance."""
        rng = random.Random(3)
        for seed in range(60):
            n = rng.randint(1, 12)
            ids = [rng.randint(0, 6) for _ in range(n)] if collapse else list(range(n))
            rewards = torch.randn(n, generator=seeded(seed), dtype=torch.float64)
            wanted = rng.randint(1, len(set(ids)))
            given = {"candidates": torch.tensor(ids)} if collapse else {}
            out = data.rso_rejection_sample(rewards, wanted, beta=beta, generator=seeded(seed), **given)
            draws = seeded(seed)
            sweeps = [torch.rand(1, n, generator=draws, dtype=torch.float64)[0].tolist() for _ in range(wanted)]
            accepted, used, share = algorithm_1(ids, rewards.tolist(), wanted, beta, sweeps)
            assert [ids[i] for i in out.indices.tolist()] == accepted
            assert out.sweeps == used and out.acceptance.item() == pytest.approx(share, rel=1e-15)
            # of duplicates the last one's reward counts
            assert all(i == n - 1 - ids[::-1].index(ids[i]) for i in out.indices.tolist())

    def test_prompts_are_independent(self):
        """A prompt among others, with candidates that are not there, as if it were alone."""
        rewards, mask = torch.randn(40, 9, generator=seeded(0)), torch.rand(40, 9, generator=seeded(1)) < 0.7
        mask[:, :3] = True
        poisoned = rewards.masked_fill(~mask, NAN)
        counts = torch.zeros(40, 9)
        ids = torch.arange(9).expand(40, 9) // 2
        for seed in range(200):
            out = data.rso_rejection_sample(poisoned, 2, mask=mask, candidates=ids, generator=seeded(seed))
            assert mask.gather(1, out.indices).all()
            assert (ids.gather(1, out.indices).diff(dim=1) != 0).all()
            counts[torch.arange(40)[:, None], out.indices] += 1
        for row in (0, 7, 23):
            kept = mask[row].nonzero()[:, 0]
            alone = torch.zeros(9)
            for seed in range(200):
                one = data.rso_rejection_sample(
                    rewards[row, kept], 2, candidates=ids[row, kept], generator=seeded(1000 + seed)
                )
                alone[kept[one.indices]] += 1
            # two frequencies of 200 draws each, of which the variance is at most 2 x 200 / 4
            assert (alone - counts[row]).abs().max() < 5 * 10

    def test_at_the_ends(self):
        rewards = [1.0, 3.0, 2.0, 3.0, 0.0]
        for beta in (0.0, 1e-9):
            assert data.rso_rejection_sample(rewards, 4, beta=beta).indices.tolist() == [1, 3, 2, 0]
        assert data.rso_rejection_sample([2.0] * 5, 3, beta=0.5).indices.tolist() == [0, 1, 2]
        out = data.rso_rejection_sample([0.0, INF, 1.0, INF, -INF], 5, beta=0.5)
        assert out.indices[:2].tolist() == [1, 3] and out.indices[-1] == 4
        assert data.rso_rejection_sample(np.array([1, 2]), 2, beta=0).indices.tolist() == [1, 0]
        # never more than are wanted, though all pass in the first sweep
        assert data.rso_rejection_sample(torch.zeros(3, 8), 3).indices.shape == (3, 3)

    def test_acceptance(self):
        """Theorem 1: in the first sweep the accepted share is E[exp((r - r_max)/beta)]."""
        rewards = torch.randn(4000, 16, generator=seeded(2), dtype=torch.float64)
        # one draw more than is wanted by any first sweep: a candidate is accepted or not, once
        first = data.rso_rejection_sample(rewards, 1, beta=0.5, generator=seeded(3))
        expected = ((rewards - rewards.amax(1, keepdim=True)) / 0.5).exp()
        # the first one is accepted with its own probability
        assert (first.indices[:, 0] == 0).double().mean().item() == pytest.approx(
            expected[:, 0].mean().item(), abs=0.04
        )

    def test_refused(self):
        for wanted, message in (
            (3, r"num_samples is 3, but rewards\[1\] has 2 distinct candidates"),
            (0, "num_samples must be at least 1, got 0"),
        ):
            with pytest.raises(ValueError, match=message):
                data.rso_rejection_sample(
                    torch.zeros(2, 3), wanted, candidates=torch.tensor([[0, 1, 2], [5, 5, 6]]), beta=0.5
                )
        for bad, error, message in (
            ({"rewards": [0.0, NAN]}, ValueError, r"rewards\[0, 1\] is NaN"),
            (
                {"rewards": torch.zeros(1, 2, 3)},
                ValueError,
                r"rewards has shape \(1, 2, 3\), expected \(P, n\) or \(n,\)",
            ),
            ({"rewards": "high"}, TypeError, "rewards must be a tensor, an array or a list of numbers, got str"),
            ({"rewards": torch.ones(2, dtype=torch.bool)}, TypeError, "rewards must have dtype"),
            ({"rewards": []}, ValueError, r"rewards\[0\] has 0 candidates"),
            ({"beta": -0.1}, ValueError, r"beta must be in \[0, inf\), got -0.1"),
            ({"beta": INF}, ValueError, r"beta must be in \[0, inf\), got inf"),
            ({"num_samples": 1.0}, TypeError, "num_samples must be an int, got float"),
            ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask has shape \(3,\), expected \(2,\)"),
            ({"mask": torch.ones(2)}, TypeError, "mask must have dtype bool"),
            ({"candidates": torch.ones(3).long()}, ValueError, r"candidates has shape \(3,\), expected \(2,\)"),
            ({"candidates": torch.ones(2)}, TypeError, "candidates must have dtype int64, int32"),
        ):
            with pytest.raises(error, match=message):
                data.rso_rejection_sample(**{"rewards": [0.0, 1.0], "num_samples": 1, "beta": 0.5, **bad})


REFERENCE = torch.tensor([0.35, 0.05, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARD = torch.tensor([0.0, 0.9, 0.3, -0.5, 0.6], dtype=torch.float64)


class TestRejectionLaw:
    """Catalogue 4, rso_rejection_sample: whether the first accepted sample has the law ref exp(r/beta)/Z."""

    beta = 0.5
    target = torch.softmax(REFERENCE.log() + REWARD / beta, 0)

    def kept(self, n: int) -> Tensor:
        """The law of the first one accepted among n i.i.d. candidates, duplicates kept, by the best one present."""
        law = torch.zeros(5, dtype=torch.float64)
        for best in range(5):
            for among, sign in ((REWARD <= REWARD[best], 1), (REWARD < REWARD[best], -1)):
                p = torch.where(among, REFERENCE, 0)
                accept = p * ((REWARD - REWARD[best]) / self.beta).exp()
                fail, whole = (p.sum() - accept.sum()).item(), p.sum().item()
                # accepted at the j-th place, after j - 1 that were not, before n - j of any kind
                law += sign * accept * sum(fail ** (j - 1) * whole ** (n - j) for j in range(1, n + 1))
        return law

    def collapsed(self) -> Tensor:
        """The same where each action is one candidate, in the order in which they came first."""
        law = torch.zeros(5, dtype=torch.float64)
        accept = ((REWARD - REWARD.max()) / self.beta).exp().tolist()
        p = REFERENCE.tolist()
        for order in itertools.permutations(range(5)):
            probability, rest = 1.0, 1.0
            for a in order:
                probability, rest = probability * p[a] / rest, rest - p[a]
            for a in order:
                law[a] += probability * accept[a]
                probability *= 1 - accept[a]
        return law

    def frequencies(self, n: int, **more) -> Tensor:
        generator = seeded(n)
        actions = REFERENCE.multinomial(20_000 * n, replacement=True, generator=generator).view(-1, n)
        given = {"candidates": actions} if more.get("collapse") else {}
        out = data.rso_rejection_sample(REWARD[actions], 1, beta=self.beta, generator=generator, **given)
        return torch.bincount(actions.gather(1, out.indices)[:, 0], minlength=5) / 20_000

    def test_kept_duplicates(self):
        """Exact for every n, and geometrically near the Gibbs policy."""
        for n in (1, 2, 6, 40):
            law = self.kept(n)
            assert law.sum().item() == pytest.approx(1, abs=1e-12)
            # five standard deviations of a frequency of 20,000
            assert (self.frequencies(n) - law).abs().max() < 5 * math.sqrt(0.25 / 20_000)
        errors = [(self.kept(n) - self.target).abs().sum().item() / 2 for n in (1, 20, 40, 100)]
        assert errors[0] > 0.2 and errors[3] < 1e-9
        # the probability that a candidate is not accepted where the best one is present
        fail = 1 - (REFERENCE * ((REWARD - REWARD.max()) / self.beta).exp()).sum().item()
        assert errors[2] / errors[1] == pytest.approx(fail**20, rel=0.1)

    def test_collapsed_duplicates(self):
        """Far from it on a small vocabulary, however many candidates there are."""
        law = self.collapsed()
        assert law.sum().item() == pytest.approx(1, abs=1e-12)
        assert (self.frequencies(150, collapse=True) - law).abs().max() < 5 * math.sqrt(0.25 / 20_000) + 0.95**150
        assert (law - self.target).abs().sum() / 2 > 0.1
        # what was kept is not what was collapsed: the tests above would see the one in place of the other
        assert (law - self.kept(150)).abs().max() > 20 * math.sqrt(0.25 / 20_000)

    def test_all_that_was_accepted(self):
        """Eight of 64, as in the paper: near the Gibbs policy too, but not at it, as the best ones run out."""
        generator = seeded(9)
        actions = REFERENCE.multinomial(10_000 * 64, replacement=True, generator=generator).view(-1, 64)
        out = data.rso_rejection_sample(REWARD[actions], 8, beta=self.beta, generator=generator)
        law = torch.bincount(actions.gather(1, out.indices).flatten(), minlength=5) / 80_000
        assert (law - self.target).abs().sum() / 2 < 0.05


class TestPairs:
    def test_first_round(self):
        scores = torch.randn(50, 7, generator=seeded(0))
        pairs = data.first_round_pairs(scores, generator=seeded(1))
        assert pairs.prompts.tolist() == [p for p in range(50) for _ in range(3)]
        both = torch.stack([pairs.chosen, pairs.rejected], 1)
        assert all(len(set(row.flatten().tolist())) == 6 for row in both.view(50, 3, 2))
        gaps = scores[pairs.prompts, pairs.chosen] - scores[pairs.prompts, pairs.rejected]
        assert (gaps > 0).all() and torch.equal(gaps, pairs.margins)

    def test_pairs_are_uniform(self):
        """Every pair of columns equally often, and every column left out equally often."""
        times = torch.zeros(5, 5)
        pairs = data.first_round_pairs(torch.arange(5.0).expand(6000, 5), generator=seeded(2))
        times.index_put_((pairs.chosen, pairs.rejected), torch.ones(len(pairs.chosen)), accumulate=True)
        lower = times[torch.ones(5, 5).tril(-1).bool()]
        # 12,000 pairs of 10 kinds; standard deviation below sqrt(1200)
        assert lower.sum() == 12_000 and (lower - 1200).abs().max() < 5 * 35

    @pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
    def test_tournament(self, n):
        scores = torch.randn(30, n, generator=seeded(n))
        pairs = data.tournament_pairs(scores, generator=seeded(3))
        assert torch.equal(pairs.prompts, torch.arange(30).repeat_interleave(n - 1))
        for p in range(30):
            mine = pairs.prompts == p
            # everyone but the best loses once
            assert sorted([*pairs.rejected[mine].tolist(), int(scores[p].argmax())]) == list(range(n))
            lost: set[int] = set()
            for chosen, rejected in zip(pairs.chosen[mine].tolist(), pairs.rejected[mine].tolist(), strict=True):
                assert not {chosen, rejected} & lost
                lost.add(rejected)
            # a knock-out: the last match is the winner's
            assert n == 1 or pairs.chosen[mine][-1] == scores[p].argmax()

    def test_rounds_halve(self):
        """Eight completions: the winner plays three matches, not seven."""
        pairs = data.tournament_pairs(torch.arange(8.0), generator=seeded(0))
        assert (pairs.chosen == 7).sum() == 3
        assert (data.tournament_pairs(torch.arange(8.0).expand(300, 8), generator=seeded(1)).chosen == 7).sum() == 900

    def test_win_probability(self):
        """Who is preferred need not be transitive; scores give the same pairs as the probabilities they make."""
        cycle = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.8], [0.9, 0.2, 0.5]])
        pairs = data.tournament_pairs(win_probability=cycle.expand(40, 3, 3), generator=seeded(0))
        beats = cycle[pairs.chosen, pairs.rejected]
        assert (beats > 0.5).all() and torch.allclose(pairs.margins, beats - 0.5)
        assert len(set(pairs.chosen[1::2].tolist())) == 3
        scores = torch.randn(20, 6, generator=seeded(4))
        probability = torch.sigmoid(scores[:, :, None] - scores[:, None])
        for function in (data.first_round_pairs, data.tournament_pairs):
            ours, theirs = (
                function(scores, generator=seeded(5)),
                function(win_probability=probability, generator=seeded(5)),
            )
            assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))

    def test_ties_and_infinities(self):
        pairs = data.first_round_pairs(torch.tensor([[1.0, 1.0], [INF, INF], [-INF, INF]]), generator=seeded(0))
        assert pairs.margins.tolist() == [0.0, 0.0, INF] and pairs.chosen[2] == 1
        assert (pairs.chosen != pairs.rejected).all()

    def test_refused(self):
        for given, message in (
            ({}, "give either scores or win_probability"),
            ({"scores": [0.0], "win_probability": [[0.5]]}, "give either scores or win_probability"),
            ({"scores": [NAN, 0.0]}, r"scores\[0, 0\] is NaN"),
            ({"win_probability": torch.zeros(2, 3)}, r"win_probability has shape \(2, 3\), expected \(P, n, n\)"),
            ({"win_probability": [[0.5, NAN], [0.5, 0.5]]}, r"win_probability must be in \[0, 1\]"),
        ):
            for function in (data.first_round_pairs, data.tournament_pairs):
                with pytest.raises(ValueError, match=message):
                    function(**given)


class TestFilters:
    def test_large_margins(self):
        scores, mask = torch.rand(9, 6, generator=seeded(0)), torch.rand(9, 6, generator=seeded(1)) < 0.8
        pairs = data.large_margin_filter(scores.masked_fill(~mask, NAN), 0.3, mask=mask)
        want = [
            (p, i, j)
            for p, i, j in itertools.product(range(9), range(6), range(6))
            if mask[p, i] and mask[p, j] and scores[p, i] - scores[p, j] > 0.3
        ]
        assert list(zip(*(t.tolist() for t in pairs[:3]), strict=True)) == want and len(want) > 20
        assert torch.equal(pairs.margins, scores[pairs.prompts, pairs.chosen] - scores[pairs.prompts, pairs.rejected])
        assert all(len(t) == 0 for t in data.large_margin_filter(scores, 1.0))
        # ties are no preference, and a gap of just the margin is not above it
        assert data.large_margin_filter([1.0, 1.0, 0.5], 0.0).rejected.tolist() == [2, 2]
        assert len(data.large_margin_filter([1.0, 0.5], 0.5).chosen) == 0
        assert data.large_margin_filter([INF, INF, 0.0], 1.0).rejected.tolist() == [2, 2]

    def test_mixed_split(self):
        split = data.mixed_split(np.array([2.0, -3.0, 0.5, 2.5, -0.5]), 2.0)
        assert split.easy.tolist() == [1, 3] and split.hard.tolist() == [0, 2, 4]
        empty = data.mixed_split(torch.zeros(0), 1.0)
        assert len(empty.easy) == len(empty.hard) == 0 and empty.easy.dtype == torch.int64
        assert data.mixed_split(torch.ones(3), 0.0).hard.tolist() == []

    def test_best_of_n(self):
        rewards = torch.tensor([[1.0, 3.0, 3.0], [NAN, -INF, 9.0], [5.0, -1.0, 7.0]])
        mask = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 1, 0]]).bool()
        assert data.select_best_of_n(rewards, mask=mask).tolist() == [1, 1, 0]
        assert data.select_best_of_n([2, 8, 8]) == 1 and data.select_best_of_n(torch.zeros(0, 3)).shape == (0,)
        # integers above 2^24 are not made equal
        assert data.select_best_of_n(torch.tensor([2**24, 2**24 + 1])) == 1

    def test_refused(self):
        for function, arguments, message in (
            (data.large_margin_filter, ([0.0, NAN], 0.1), r"scores\[0, 1\] is NaN"),
            (data.large_margin_filter, ([0.0], -1), r"margin must be in \[0, inf\), got -1"),
            (data.mixed_split, ([0.0, NAN], 0.1), r"margins\[1\] is NaN"),
            (data.mixed_split, ([[0.0]], 0.1), r"margins has shape \(1, 1\), expected \(B,\)"),
            (data.mixed_split, ([0.0], NAN), r"threshold must be in \[0, inf\), got nan"),
            (data.select_best_of_n, ([NAN],), r"rewards\[0, 0\] is NaN"),
            (data.select_best_of_n, (torch.zeros(2, 0),), r"rewards\[0\] has no sample to select"),
        ):
            with pytest.raises(ValueError, match=message):
                function(*arguments)


class TestChes:
    def given(self, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [torch.randn(4, t, 6, generator=seeded(t), dtype=torch.float64).to(dtype) for t in (5, 7)]
        masks = [torch.rand(4, t, generator=seeded(10 + t)) < 0.7 for t in (5, 7)]
        masks[0][2] = False
        return hidden, masks

    def expected(self, hidden: list[Tensor], masks: list[Tensor], norm: bool) -> list[float]:
        out = []
        for i in range(4):
            sums = [h[i][m[i]].double().sum(0) for h, m in zip(hidden, masks, strict=True)]
            lengths = [max(int(m[i].sum()), 1) if norm else 1 for m in masks]
            inner = (sums[0] @ sums[1]).item() / (lengths[0] * lengths[1])
            out.append(inner - (sums[0] @ sums[0]).item() / lengths[0] ** 2)
        return out

    @pytest.mark.parametrize("norm", [False, True])
    def test_definition(self, norm):
        hidden, masks = self.given()
        dirty = [h.masked_fill(~m[..., None], NAN) for h, m in zip(hidden, masks, strict=True)]
        scores = data.ches_scores(*dirty, chosen_mask=masks[0], rejected_mask=masks[1], length_norm=norm)
        assert scores.tolist() == pytest.approx(self.expected(hidden, masks, norm), rel=1e-13, abs=1e-13)
        assert scores[2] == 0
        lengths = [m.sum(1) for m in masks]
        packed = data.ches_scores(
            # and two positions that are in no response
            *(torch.cat([h[m], torch.full((2, 6), NAN)]) for h, m in zip(hidden, masks, strict=True)),
            chosen_cu_seqlens=torch.cat([torch.zeros(1), lengths[0].cumsum(0)]).int(),
            rejected_cu_seqlens=torch.cat([torch.zeros(1), lengths[1].cumsum(0)]).int(),
            length_norm=norm,
        )
        torch.testing.assert_close(packed, scores, rtol=1e-12, atol=1e-13)

    def test_mixed_layouts_and_masks(self):
        """One side padded, the other packed with a mask, which NaN does not pass."""
        hidden, masks = self.given()
        flat, kept = hidden[1].flatten(0, 1), masks[1].flatten()
        scores = data.ches_scores(
            hidden[0],
            flat.masked_fill(~kept[:, None], NAN),
            chosen_mask=masks[0],
            rejected_mask=kept,
            rejected_cu_seqlens=torch.arange(0, 29, 7, dtype=torch.int32),
        )
        assert scores.tolist() == pytest.approx(self.expected(hidden, masks, False), rel=1e-12, abs=1e-12)

    def test_equal_responses_give_zero(self):
        """Also where each term is of the size 1e7, in bf16."""
        hidden = (100 * torch.randn(3, 50, 64, generator=seeded(0))).bfloat16()
        assert data.ches_scores(hidden, hidden).tolist() == [0.0] * 3
        assert data.ches_scores(hidden, hidden).dtype == torch.float32

    def test_accumulates_in_fp32(self):
        """bf16 sums of 4,096 equal states would stop at 256."""
        ones = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
        assert data.ches_scores(ones, 0 * ones).item() == -2 * 4096**2

    def test_refused(self):
        x = torch.zeros(2, 3, 4)
        for given, error, message in (
            ({"chosen_hidden": x[0]}, ValueError, r"chosen_hidden has shape \(3, 4\), expected \(B, T, d\)"),
            ({"rejected_hidden": x[:1]}, ValueError, r"rejected_hidden has shape \(1, 4\), expected \(2, 4\)"),
            ({"rejected_hidden": x.long()}, TypeError, "rejected_hidden must have dtype"),
            (
                {"chosen_mask": torch.ones(2, 4).bool()},
                ValueError,
                r"chosen_mask has shape \(2, 4\), expected \(2, 3\)",
            ),
            ({"rejected_mask": torch.ones(2, 3)}, TypeError, "rejected_mask must have dtype bool"),
            (
                {"chosen_hidden": x[0], "chosen_cu_seqlens": torch.tensor([0, 2, 1]).int()},
                ValueError,
                "chosen_cu_seqlens must rise from 0 to at most 3",
            ),
        ):
            with pytest.raises(error, match=message):
                data.ches_scores(**{"chosen_hidden": x, "rejected_hidden": x, **given})


def two_tastes(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """12 users of two opposite tastes, 40 pairs each of 6 items: users, chosen, rejected, tastes, rewards."""
    generator = seeded(seed)
    reward = 1.5 * torch.randn(6, generator=generator, dtype=torch.float64)
    tastes = (torch.arange(12) % 3 == 0).long()
    users = torch.arange(12).repeat_interleave(40)
    first = torch.randint(6, (480,), generator=generator)
    second = (first + torch.randint(1, 6, (480,), generator=generator)) % 6
    margin = (1 - 2 * tastes[users]) * (reward[first] - reward[second])
    won = torch.rand(480, generator=generator, dtype=torch.float64) < torch.sigmoid(margin)
    return users, torch.where(won, first, second), torch.where(won, second, first), tastes, reward


class BradleyTerry:
    """One score per item and model, with a little ridge, fitted by Newton's method."""

    def __init__(self, chosen: Tensor, rejected: Tensor, items: int = 6) -> None:
        self.design = F.one_hot(chosen, items).double() - F.one_hot(rejected, items).double()
        self.scores: dict[int, Tensor] = {}
        self.rows: list[Tensor] = []

    def __call__(self, model: int, rows: Tensor) -> Tensor:
        self.rows.append(rows)
        x, w = self.design[rows], torch.zeros(self.design.shape[1], dtype=torch.float64)
        for _ in range(30):
            p = torch.sigmoid(-(x @ w))
            hessian = x.T @ (x * (p * (1 - p))[:, None]) + 1e-6 * torch.eye(len(w)).double()
            w = w + torch.linalg.solve(hessian, x.T @ p - 1e-6 * w)
        self.scores[model] = w
        return self.design @ w


class TestMaxMin:
    def test_recovers_planted_groups(self):
        users, chosen, rejected, tastes, reward = two_tastes()
        ids = torch.tensor([7 * (5 * u % 12) - 3 for u in range(12)])
        found = []
        for seed in range(3):
            fit = BradleyTerry(chosen, rejected)
            out = data.maxmin_em(ids[users], fit, 2, generator=seeded(seed))
            assert out.converged and torch.equal(out.users, ids.sort().values)
            order = ids.argsort()
            same = out.models == tastes[order]
            assert same.all() or not same.any(), "a user is in the wrong group"
            assert out.sizes.sum() == 12 and sorted(out.sizes.tolist()) == [4, 8]
            # the likelihood never falls, but for the ridge
            assert all(b >= a - 1e-4 for a, b in itertools.pairwise(out.history))
            # the models' scores are the two tastes, as far as 320 pairs tell
            ours = fit.scores[int(out.models[order.argsort()][0])]
            assert torch.corrcoef(torch.stack([ours, -reward]))[0, 1] > 0.9
            found.append(out.history[-1])
        assert max(found) - min(found) < 1e-6

    def test_one_model_is_worse_and_groups_matter(self):
        users, chosen, rejected, tastes, _ = two_tastes()
        one = data.maxmin_em(users, BradleyTerry(chosen, rejected), 1)
        two = data.maxmin_em(users, BradleyTerry(chosen, rejected), 2, generator=seeded(0))
        assert one.models.tolist() == [0] * 12 and two.history[-1] > one.history[-1] + 20
        # a start at the truth stays there; everyone in the least likely group is not a fixed point
        stay = data.maxmin_em(users, BradleyTerry(chosen, rejected), 2, start=tastes)
        assert torch.equal(stay.models, tastes) and len(stay.history) == 1
        assert not torch.equal(stay.log_likelihoods.argmin(0), tastes)

    def test_e_step(self):
        margins = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.9, 0.5, 0.5, -9.0]])
        users = np.array([4, 4, -2, 9])
        each = torch.stack(
            [F.logsigmoid(margins)[:, [2]].sum(1), F.logsigmoid(margins)[:, :2].sum(1), F.logsigmoid(margins)[:, 3]]
        )
        # users in the order -2, 4, 9; a tie goes to the first model
        assert data.maxmin_assign(margins, users).tolist() == [0, *each.argmax(1)[1:].tolist()] == [0, 1, 0]

    def test_empty_groups_get_the_worst_described_user(self):
        """All choices are likeliest under model 0; user 2 is described worst per pair."""
        users = torch.tensor([0, 0, 1, 2])
        margins = {0: torch.tensor([2.0, 2.0, 1.0, -0.5]), 1: torch.tensor([-1.0, -1.0, -1.0, -1.0])}
        calls: list[tuple[int, list[int]]] = []

        def fit(model: int, rows: Tensor) -> Tensor:
            calls.append((model, rows.tolist()))
            return margins[model]

        both = torch.stack([*margins.values()])
        assert data.maxmin_assign(both, users).tolist() == [0, 0, 0]
        assert data.maxmin_assign(both, users, reseed=True).tolist() == [0, 0, 1]
        out = data.maxmin_em(users, fit, 2, start=[0, 1, 0], max_steps=2)
        assert calls == [(0, [0, 1, 3]), (1, [2]), (0, [0, 1, 2]), (1, [3])]
        assert out.models.tolist() == [0, 0, 1] and out.converged and out.sizes.tolist() == [2, 1]
        assert out.history[1] == pytest.approx(F.logsigmoid(torch.tensor([2.0, 2.0, 1.0, -1.0])).sum().item())

    def test_refused(self):
        users = torch.tensor([0, 1])

        def fit(model: int, rows: Tensor) -> Tensor:
            return torch.zeros(2)

        for given, error, message in (
            ({"num_models": 3}, ValueError, "num_models is 3, but there are 2 users"),
            ({"num_models": 0}, ValueError, "num_models must be at least 1, got 0"),
            ({"users": torch.zeros(0).long()}, ValueError, r"users has shape \(0,\), expected \(B,\), not empty"),
            ({"users": [0.5, 1.0]}, TypeError, "users must have dtype int64, int32"),
            ({"start": [0, 2]}, ValueError, "start must hold every number from 0 to 1"),
            ({"start": [0, 0]}, ValueError, "start must hold every number from 0 to 1"),
            ({"start": [0]}, ValueError, r"start has shape \(1,\), expected \(2,\)"),
            ({"max_steps": 0}, ValueError, "max_steps must be at least 1"),
            (
                {"fit": lambda u, rows: torch.zeros(3)},
                ValueError,
                r"what fit returned has shape \(3,\), expected \(2,\)",
            ),
            ({"fit": lambda u, rows: torch.full((2,), NAN)}, ValueError, r"margins\[0, 0\] is NaN"),
            ({"fit": lambda u, rows: None}, TypeError, "what fit returned must be a tensor"),
        ):
            with pytest.raises(error, match=message):
                data.maxmin_em(**{"users": users, "fit": fit, "num_models": 2, **given})
        with pytest.raises(ValueError, match=r"margins has shape \(2, 3\), expected \(U, 2\)"):
            data.maxmin_assign(torch.zeros(2, 3), users)
        with pytest.raises(ValueError, match="margins are those of 3 models, but there are 2 users"):
            data.maxmin_assign(torch.zeros(3, 2), users, reseed=True)
