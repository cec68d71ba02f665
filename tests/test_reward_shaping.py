"""fastpo.rewards beyond tokens: histories, calibration, combinations, allocation, multipliers; and their state."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor

from fastpo import advantages, rewards
from tests.losses.test_policy_points import BETA, REFERENCE, STARTS, gibbs, on_policy, settle, total_variation

NAN = math.nan


def reloaded(state: dict) -> dict:
    """A state as a checkpoint gives it back."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class TestRto:
    scores = torch.tensor([20.0, -1.0])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logprobs, reference, dpo = (torch.tensor(t) for t in (
        [[-1.0, -2.0, -0.5], [-1.0, NAN, NAN]],
        [[-1.5, -2.0, -0.25], [-3.0, NAN, NAN]],
        [[-1.0, -1.0, -4.0], [-2.5, NAN, NAN]],
    ))  # fmt: skip

    def test_closed_form(self):
        """Scaled, then clipped per token; the score is clipped at the last token."""
        found = rewards.rto_rewards(
            self.scores, self.logprobs, self.reference, self.dpo, dpo_scale=0.1, dpo_clip=0.08, beta=0.2, mask=self.mask
        )
        want = [[0.05 - 0.1, 0.08, -0.08 + 0.05 + 10], [0.05 - 0.4 - 1, 0, 0]]
        torch.testing.assert_close(found, torch.tensor(want))
        boundaries = torch.tensor([0, 3, 4], dtype=torch.int32)
        flat = [t[self.mask] for t in (self.logprobs, self.reference, self.dpo)]
        packed = rewards.rto_rewards(self.scores, *flat, dpo_scale=0.1, dpo_clip=0.08, beta=0.2, cu_seqlens=boundaries)
        torch.testing.assert_close(packed, found[self.mask])

    def test_a_scale_of_one_scales(self):
        """The code leaves the ratio unscaled for 1, which is the same, and for 0 and below, which is an error."""
        found = rewards.rto_rewards(
            torch.zeros(2), self.reference, self.reference, self.dpo, dpo_scale=1.0, dpo_clip=2.0, mask=self.mask
        )
        torch.testing.assert_close(found, torch.tensor([[0.5, 1.0, -2.0], [0.5, 0, 0]]))
        with pytest.raises(ValueError, match="dpo_scale must be positive and finite, got 0"):
            rewards.rto_rewards(torch.zeros(2), self.dpo, self.dpo, self.dpo, dpo_scale=0.0)
        with pytest.raises(ValueError, match=r"dpo_logprobs has shape \(2, 2\), expected \(2, 3\)"):
            rewards.rto_rewards(self.scores, self.dpo, self.dpo, self.dpo[:, :2])


class TestHapo:
    def test_cosine(self):
        history = rewards.HapoHistory()
        prompts, lengths = ["a", "a", 7], torch.tensor([10, 20, 30])
        correct = torch.tensor([True, True, False])
        assert history.rewards(prompts, lengths, correct).tolist() == [1, 1, 0]
        history.update(prompts, lengths, correct)
        assert history.length("a") == 10 and history.length(7) is None
        # what a batch has is seen from the next one on
        same = ["a"] * 6
        sizes = torch.tensor([0, 5, 10, 15, 20, 99])
        f = [1.0, math.cos(math.pi / 4), 0.0, -math.cos(math.pi / 4), -1.0, -1.0]
        right = history.rewards(same, sizes, torch.ones(6, dtype=torch.bool))
        assert right.tolist() == pytest.approx([1 + max(-0.7, x) for x in f], abs=1e-6)
        wrong = history.rewards(same, sizes, torch.zeros(6, dtype=torch.bool))
        assert wrong.tolist() == pytest.approx([min(0, x) for x in f], abs=1e-6)

    def test_linear(self):
        history = rewards.HapoHistory(form="linear", weight=0.5)
        history.update(["a"], torch.tensor([100]), torch.tensor([True]))
        sizes = torch.tensor([40, 100, 110, 140, 400])
        right = history.rewards(["a"] * 5, sizes, torch.ones(5, dtype=torch.bool))
        assert right.tolist() == pytest.approx([1 + 0.5 * x for x in (0.6, 0, 0, -0.3, -0.7)])
        wrong = history.rewards(["a"] * 5, sizes, torch.zeros(5, dtype=torch.bool))
        assert wrong.tolist() == pytest.approx([0.5 * x for x in (0, 0, 0, -0.3, -1)], abs=1e-7)

    def test_mean(self):
        history = rewards.HapoHistory(statistic="mean")
        history.update(["a"] * 3, torch.tensor([10, 30, 1000]), torch.tensor([True, True, False]))
        assert history.length("a") == 20

    def test_state(self):
        """A history continues after a checkpoint as if nothing had happened."""
        first = rewards.HapoHistory(statistic="mean")
        first.update(["a", 3], torch.tensor([10, 30]), torch.tensor([True, True]))
        second = rewards.HapoHistory(statistic="mean")
        second.load_state_dict(reloaded(copy.deepcopy(first.state_dict())))
        for history in (first, second):
            history.update(["a"], torch.tensor([20]), torch.tensor([True]))
        assert first.state_dict() == second.state_dict() and second.length("a") == 15 and second.length(3) == 30

    def test_bad_input(self):
        history = rewards.HapoHistory()
        one = torch.tensor([True])
        with pytest.raises(ValueError, match=r"lengths has shape \(1,\), expected \(2,\): one per prompt"):
            history.rewards(["a", "b"], torch.tensor([1]), one)
        with pytest.raises(TypeError, match="prompts must be names or numbers"):
            history.rewards([1.5], torch.tensor([1]), one)
        with pytest.raises(ValueError, match="lengths must be at least 0"):
            history.update(["a"], torch.tensor([-1]), one)
        with pytest.raises(ValueError, match=r"floor must be in \[-1, 0\], got 0.5"):
            rewards.HapoHistory(floor=0.5)


class TestInfAlign:
    def test_calibration(self):
        found = rewards.calibrated_rewards(
            torch.tensor([[1.0, 2.0, NAN], [0.0, 5.0, 1.0]]), torch.tensor([[1.0, 0.0, 2.0, 1.0], [NAN, 1.0, NAN, 3.0]])
        )
        torch.testing.assert_close(found, torch.tensor([[0.5, 0.875, NAN], [0.0, 1.0, 0.25]]), equal_nan=True)
        assert rewards.calibrated_rewards(torch.ones(1), torch.full((1, 3), NAN)).isnan().all()

    def test_uniform_under_the_reference(self):
        """The mean is 1/2 and the variance 1/12, up to the number of samples, whatever the reward's law."""
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(1, 4000, generator=generator, dtype=torch.float64).exp()
        c = rewards.calibrated_rewards(draws[:, :2000], draws[:, 2000:])
        assert abs(c.mean() - 0.5) < 5 / math.sqrt(12 * 1000) and abs(c.var() - 1 / 12) < 0.005
        # it does not change with a monotone transform of the reward
        assert torch.equal(c, rewards.calibrated_rewards(draws[:, :2000].log(), draws[:, 2000:].log()))

    @pytest.mark.parametrize("target", ["win_rate", "best_of_n", "worst_of_n"])
    @pytest.mark.parametrize("start", list(STARTS))
    def test_fixed_point(self, target, start):
        """RL on Φ(C), C enumerated under the reference, ends at ref e^(Φ(C)/β)/Z; another t ends elsewhere."""
        reward = torch.tensor([0.3, -0.8, 1.1, 0.3], dtype=torch.float64)
        # the reference's samples in exact proportions
        samples = torch.repeat_interleave(reward, (20 * REFERENCE).round().long())
        c = rewards.calibrated_rewards(reward, samples.expand(4, -1))
        wins = (REFERENCE * ((reward[:, None] > reward) + (reward[:, None] == reward) / 2)).sum(1)
        torch.testing.assert_close(c, wins, rtol=1e-12, atol=0)
        phi = rewards.infalign_rewards(c, target=target, t=1.5)

        def shaped(logp: Tensor) -> Tensor:
            values = phi - BETA * (logp - REFERENCE.log())
            return values - (logp.exp() * values).sum()

        found = settle(on_policy(shaped), STARTS[start])
        assert total_variation(found, gibbs(phi / BETA)) < 1e-9
        if target != "win_rate":
            assert total_variation(found, gibbs(rewards.infalign_rewards(c, target=target, t=3.0) / BETA)) > 1e-2

    def test_transforms(self):
        c = torch.tensor([0.0, 0.5, 1.0])
        best, worst = (rewards.infalign_rewards(c, target=n, t=2.0) for n in ("best_of_n", "worst_of_n"))
        torch.testing.assert_close(best, (2 * c).exp())
        torch.testing.assert_close(worst, -(-2 * c).exp())
        assert (best.diff() > 0).all() and (worst.diff() > 0).all()
        for bad in (torch.tensor([1.5]), torch.tensor([-0.1])):
            with pytest.raises(ValueError, match=r"calibrated must be in \[0, 1\]"):
                rewards.infalign_rewards(bad)
        with pytest.raises(ValueError, match="t must be positive and finite, got -1"):
            rewards.infalign_rewards(c, t=-1.0)
        with pytest.raises(ValueError, match=r"reference_rewards has shape \(2, 3\), expected \(1, n\)"):
            rewards.calibrated_rewards(torch.ones(1), torch.ones(2, 3))


class TestSeveralRewards:
    def test_weighted(self):
        x = torch.tensor([[1.0, 2.0], [NAN, 4.0], [NAN, NAN]])
        found = rewards.weighted_rewards(x, [0.5, 0.25])
        torch.testing.assert_close(found, torch.tensor([1.0, 1.0, NAN]), equal_nan=True)
        x = torch.tensor([[1.0, 100.0], [3.0, 300.0], [NAN, 200.0]])
        found = rewards.weighted_rewards(x, torch.tensor([1.0, 2.0]), normalize=True)
        root = math.sqrt(0.5)
        torch.testing.assert_close(found, torch.tensor([-root - 2, root + 2, 0.0]), rtol=1e-4, atol=1e-6)
        with pytest.raises(ValueError, match=r"weights has shape \(3,\), expected \(2,\)"):
            rewards.weighted_rewards(x, [1.0, 1.0, 1.0])

    def test_normalised_by_hand(self):
        """As TRL computes it, up to where eps stands; a reward of large scale does not drown the other."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(5, 4, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1000.0])
        found = rewards.multi_objective(x, [1.0, 0.5], eps=1e-9)
        each = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        total = (each * torch.tensor([1.0, 0.5])).sum(-1)
        want = (total - total.mean()) / total.std()
        torch.testing.assert_close(found, want, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(rewards.multi_objective(x * torch.tensor([1.0, 7.0]), [1.0, 0.5], eps=1e-9), found)
        summed = rewards.multi_objective(x, [1.0, 0.5], order="sum_then_normalize", eps=1e-9)
        torch.testing.assert_close(summed, advantages.grpo((x * torch.tensor([1.0, 0.5])).sum(-1), eps=1e-9))
        assert (summed - found).abs().max() > 0.1

    def test_groups_in_any_order(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, 4, 2, generator=generator)
        order = torch.randperm(12, generator=generator)
        ids = torch.arange(3).repeat_interleave(4)[order]
        found = rewards.multi_objective(x.flatten(0, 1)[order], group_ids=ids)
        torch.testing.assert_close(found, rewards.multi_objective(x).flatten()[order])

    def test_constant_and_missing(self):
        """Rewards that are equal in a group add exactly nothing; an unscored response gets 0."""
        x = torch.tensor([[[0.7, 1.0], [0.7, 2.0], [0.7, 3.0]], [[0.7, NAN], [0.7, 5.0], [NAN, NAN]]])
        found = rewards.multi_objective(x)
        only = rewards.multi_objective(x[..., 1:])
        assert found[1, 2] == 0 and found[0, 1] == 0 and found.isfinite().all()
        # the second group has nothing to say: one scored reward, and equal ones
        assert (found[1] == 0).all() and (only[0] * found[0] >= 0).all()
        assert (rewards.multi_objective(torch.full((2, 12, 3), 0.7)) == 0).all()
        with pytest.raises(ValueError, match=r"rewards has shape \(2, 3\), expected \(P, G, K\)"):
            rewards.multi_objective(torch.ones(2, 3))


class TestXrpo:
    @pytest.mark.parametrize(
        ("degrees", "quantile"),
        [(1, 12.7062047364), (2, 4.3026527297), (3, 3.1824463053), (10, 2.2281388520), (29, 2.0452296421)],
    )
    def test_quantiles(self, degrees, quantile):
        """The table of Student's t, two-sided 95%."""
        from fastpo.rewards.shaping import _student_t

        assert _student_t(0.95, degrees) == pytest.approx(quantile, rel=1e-10)

    def test_priorities(self):
        counts, stds = torch.tensor([4, 4, 2]), torch.tensor([0.5, 0.0, 0.5])
        found = rewards.xrpo_priorities(counts, stds, exploration=0.7)
        t = {1: 12.7062047364, 2: 4.3026527297, 3: 3.1824463053, 4: 2.7764451052}
        phi = [0.7 * math.sqrt(math.log(11) / n) for n in (4, 4, 2)]
        want = [
            0.5 * (t[3] / 2 - t[4] / math.sqrt(5)) + phi[0],
            phi[1],
            0.5 * (t[1] / math.sqrt(2) - t[2] / math.sqrt(3)) + phi[2],
        ]
        assert found.tolist() == pytest.approx(want, rel=1e-9)

    def test_allocation(self):
        """The uncertain prompt first; then what one more rollout of each is still worth."""
        counts, stds = torch.tensor([4, 4, 2]), torch.tensor([0.5, 0.0, 0.5])
        given = rewards.xrpo_allocate(counts, stds, 10)
        assert given.sum() == 10 and given[2] > given[0] > given[1]
        assert rewards.xrpo_allocate(counts, stds, 1).tolist() == [0, 0, 1]
        assert rewards.xrpo_allocate(torch.tensor([3, 3]), torch.ones(2), 1).tolist() == [1, 0]
        with pytest.raises(ValueError, match="counts must be at least 2 for every prompt, got 1"):
            rewards.xrpo_allocate(torch.tensor([1]), torch.ones(1), 1)
        with pytest.raises(ValueError, match="stds must be at least 0 and finite"):
            rewards.xrpo_priorities(torch.tensor([2]), torch.tensor([NAN]))
        with pytest.raises(ValueError, match="total must be at least 0 and finite, got -1"):
            rewards.xrpo_priorities(counts, stds, total=-1)
        with pytest.raises(ValueError, match="budget must be at least 0"):
            rewards.xrpo_allocate(counts, stds, -1)

    def test_novelty(self):
        """Only right ones with A > 0, only what is less likely than the group, at most κ A."""
        a = torch.tensor([[1.0, 1.0, -0.5, 1.0], [0.0, 0.0, 0.0, 0.0]])
        s = torch.tensor([[-2.0, -1.0, -2.0, -1.0], [-1.0, -1.0, -1.0, -3.0]])
        correct = torch.tensor([[True, True, True, False], [True] * 4])
        found = rewards.xrpo_novelty(a, s, correct)
        want = 1 + min(2.5 * (1 - math.exp(-0.5)), 0.5)
        assert found.tolist() == [pytest.approx([want, 1, -0.5, 1]), [0, 0, 0, 0]]
        small = rewards.xrpo_novelty(a, s, correct, scale=0.1)
        assert small[0, 0].item() == pytest.approx(1 + 0.1 * (1 - math.exp(-0.5)))
        ids = torch.tensor([5, 5, 5, 5, 2, 2, 2, 2])
        assert torch.equal(rewards.xrpo_novelty(a.flatten(), s.flatten(), correct.flatten(), ids), found.flatten())


class TestMultipliers:
    def test_mix(self):
        multipliers = rewards.ConstraintMultipliers([0.0, 0.0], spread=0.0)
        kl, a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]), torch.tensor([-1.0, 4.0])
        torch.testing.assert_close(multipliers.mix(kl, [a, b]), (2 - 1.0) * kl + 0.5 * a + 0.5 * b)
        equality = rewards.ConstraintMultipliers([0.0], kind="xi", spread=0.0)
        assert equality.values.tolist() == [0.0] and torch.equal(equality.mix(kl, [a]), kl)

    @pytest.mark.parametrize("kind", ["mu", "xi"])
    def test_step(self, kind):
        """Gradient descent with momentum on Σ μ (v - θ), as torch's SGD does it."""
        multipliers = rewards.ConstraintMultipliers(
            [0.3, 1.0], kind=kind, learning_rate=0.5, generator=torch.Generator().manual_seed(0), spread=1.0
        )
        raw = torch.tensor(multipliers.state_dict()["raw"], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([raw], lr=0.5, momentum=0.1)
        for values in ([1.0, 0.0], [0.5, 2.0], [0.0, 0.9]):
            before = multipliers.values
            multipliers.update(values)
            weight = torch.sigmoid(raw) if kind == "mu" else torch.tanh(raw)
            optimizer.zero_grad()
            (weight * (torch.tensor(values) - torch.tensor([0.3, 1.0]))).sum().backward()
            optimizer.step()
            torch.testing.assert_close(torch.tensor(multipliers.state_dict()["raw"], dtype=torch.float64), raw.detach())
            if values == [1.0, 0.0]:
                assert multipliers.values[0] < before[0] and multipliers.values[1] > before[1]

    def test_infeasible(self):
        """A constraint that never holds takes all the weight, and no more."""
        multipliers = rewards.ConstraintMultipliers([10.0], learning_rate=1.0)
        for _ in range(500):
            multipliers.update([0.0])
        assert 0.99 < multipliers.values[0] <= 1

    def test_norm(self):
        multipliers = rewards.ConstraintMultipliers([0.0], learning_rate=1.0, momentum=0.0, max_norm=0.1, spread=0.0)
        multipliers.update([100.0])
        assert multipliers.state_dict()["raw"] == [pytest.approx(-0.1)]

    def test_state(self):
        first = rewards.ConstraintMultipliers([0.3, 1.0])
        first.update([1.0, 0.0])
        second = rewards.ConstraintMultipliers([0.3, 1.0])
        second.load_state_dict(reloaded(copy.deepcopy(first.state_dict())))
        for multipliers in (first, second):
            multipliers.update([0.7, 0.2])
        assert first.state_dict() == second.state_dict()
        with pytest.raises(ValueError, match="state has 2 multipliers, expected 1"):
            rewards.ConstraintMultipliers([0.0]).load_state_dict(first.state_dict())

    def test_bad_input(self):
        with pytest.raises(ValueError, match="thresholds must be finite numbers, at least one"):
            rewards.ConstraintMultipliers([])
        with pytest.raises(ValueError, match="kind must be 'mu' or 'xi'"):
            rewards.ConstraintMultipliers([0.0], kind="nu")
        multipliers = rewards.ConstraintMultipliers([0.0])
        with pytest.raises(ValueError, match="advantages has 2 entries, expected 1"):
            multipliers.mix(torch.ones(2), [torch.ones(2)] * 2)
        with pytest.raises(ValueError, match="estimates must be finite"):
            multipliers.update([NAN])


class TestRubrics:
    def test_score(self):
        text = "Clarity: <score> 4 </score>. Depth: <score>-1</score>; 7 of 10"
        assert rewards.rubric_score(text) == 3 and rewards.rubric_score("no score") == 0
        assert rewards.rubric_score("a: 4/5, b: 2/5", pattern=r"(\d+)/5") == 6
        with pytest.raises(ValueError, match="pattern must have one group, got 0"):
            rewards.rubric_score(text, pattern=r"\d+")

    def test_versions(self):
        """A rubric that is ten times as generous gives the same rewards once it has been seen."""
        normalizer = rewards.VersionNormalizer(eps=0.0)
        scores = torch.tensor([3.0, 5.0, 4.0, 8.0])
        for version, factor in ((0, 1.0), (1, 10.0)):
            for part in (scores[:1], scores[1:], torch.tensor([NAN])):
                normalizer.update(factor * part, version)
        found = [normalizer.normalize(f * scores, v) for v, f in ((0, 1.0), (1, 10.0))]
        torch.testing.assert_close(found[0], (scores - scores.mean()) / scores.std())
        torch.testing.assert_close(found[1], found[0])

    def test_equal_scores(self):
        normalizer = rewards.VersionNormalizer()
        normalizer.update(torch.full((12,), 0.7), 0)
        found = normalizer.normalize(torch.tensor([0.7, NAN]), 0)
        assert found[0] == 0 and found[1].isnan()
        with pytest.raises(ValueError, match="version 1 has given no scores yet"):
            normalizer.normalize(torch.ones(1), 1)

    def test_state(self):
        first = rewards.VersionNormalizer()
        first.update(torch.tensor([1.0, 2.0]), 3)
        second = rewards.VersionNormalizer()
        second.load_state_dict(reloaded(copy.deepcopy(first.state_dict())))
        for normalizer in (first, second):
            normalizer.update(torch.tensor([5.0]), 3)
        assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize(
    ("call", "reward"),
    [
        (None, -2.0),
        ("search(q)", -2.0),
        ('{"name": "search"}', -2.0),
        ('{"name": "find", "arguments": {"q": "a"}}', -2.0),
        ('{"name": "open", "arguments": {"url": "a"}}', -1.5),
        ({"name": "search", "arguments": {"page": 1, "url": 2}}, -1.8),
        ({"name": "search", "arguments": {"url": 2}}, -1.3),
        ({"name": "search", "arguments": {"q": "a", "n": 3, "page": 1, "url": 2}}, -1.3),
        ({"name": "search", "arguments": {"q": "a", "page": 1}}, -1.0),
        ({"name": "search", "arguments": {"q": "a", "n": 3, "url": 2}}, -0.8),
        ({"name": "search", "arguments": {"q": "a"}}, -0.5),
        ({"name": "search", "arguments": {"q": "a", "n": 3, "page": 1}}, -0.5),
        ({"name": "search", "arguments": {"q": "a", "n": 4}}, -0.25),
        ('{"name": "search", "arguments": {"n": 3, "q": "a"}}', 1.0),
    ],
)
def test_tool_use(call, reward):
    tools = {"search": ["q", "n", "page"], "open": ["url"]}
    expected = {"name": "search", "arguments": {"q": "a", "n": 3}}
    assert rewards.tool_use_reward(call, expected, tools) == reward


def test_tool_use_bad_input():
    with pytest.raises(ValueError, match="expected must be a call of one of the tools"):
        rewards.tool_use_reward(None, {"name": "search", "arguments": {}}, {"open": []})
