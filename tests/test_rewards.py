"""fastpo.rewards: rewards of tokens, and the coefficient of the divergence."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo import advantages, rewards

SCORES = torch.tensor([2.0, -1.0, 5.0])
KL = torch.tensor([[0.5, 1.0, -0.25], [1.0, math.nan, 2.0], [math.nan] * 3])
MASK = torch.tensor([[True, True, True], [True, False, False], [False] * 3])


class TestTokenRewards:
    def test_to_go(self):
        out = rewards.token_rewards(SCORES, KL, beta=0.5, mask=MASK)
        assert out.tolist() == [[-0.25, -0.5, 2.125], [-1.5, 0, 0], [0, 0, 0]]

    def test_sequence(self):
        """The last token pays all: every token's return is the same."""
        out = rewards.token_rewards(SCORES, KL, beta=0.5, mask=MASK, form="sequence")
        assert out.tolist() == [[0, 0, 2 - 0.5 * 1.25], [-1.5, 0, 0], [0, 0, 0]]
        returns = advantages.discounted_returns(out, mask=MASK)
        assert returns.tolist() == [[1.375] * 3, [-1.5, 0, 0], [0, 0, 0]]

    def test_holes(self):
        """The score is at the last token that counts, not at the row's end nor behind the first hole."""
        mask = torch.tensor([[True, False, True, False]])
        out = rewards.token_rewards(SCORES[:1], torch.ones(1, 4), beta=1.0, mask=mask)
        assert out.tolist() == [[-1, 0, 1, 0]]

    def test_packed(self):
        kl = torch.tensor([0.5, 1.0, -0.25, 1.0, 9.0, 7.0])
        boundaries = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
        mask = torch.tensor([True, True, True, True, False, True])
        for form, want in (("to_go", [-0.25, -0.5, 2.125, 4.5, 0, 0]), ("sequence", [0, 0, 1.375, 4.5, 0, 0])):
            out = rewards.token_rewards(SCORES, kl, beta=0.5, mask=mask, cu_seqlens=boundaries, form=form)
            assert out.tolist() == want, form

    def test_returns_hold_score_and_divergence_to_go(self):
        out = rewards.token_rewards(SCORES[:1], KL[:1], beta=torch.tensor(0.5))
        returns = advantages.discounted_returns(out)
        assert torch.allclose(returns, 2 - 0.5 * KL[:1].flip(1).cumsum(1).flip(1))
        assert not out.requires_grad

    def test_empty(self):
        for shape in ((0, 4), (2, 0)):
            out = rewards.token_rewards(torch.ones(shape[0]), torch.zeros(shape), beta=0.1)
            assert out.shape == shape
        none = torch.zeros(1, dtype=torch.int32)
        assert rewards.token_rewards(torch.ones(0), torch.ones(3), beta=0.1, cu_seqlens=none).tolist() == [0, 0, 0]

    def test_dtypes(self):
        assert rewards.token_rewards(SCORES.bfloat16(), KL.half(), beta=0.5, mask=MASK).dtype == torch.float32
        assert rewards.token_rewards(SCORES.double(), KL, beta=0.5, mask=MASK).dtype == torch.float64

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"scores": torch.ones(2)}, ValueError, r"scores has shape \(2,\), expected \(3,\): one score per row"),
            ({"kl": torch.ones(3)}, ValueError, r"kl has shape \(3,\), expected \(B, T\)"),
            ({"beta": -0.1}, ValueError, r"beta must be at least 0 and finite, got -0.1"),
            ({"beta": torch.ones(3)}, ValueError, r"beta has shape \(3,\), expected \(\)"),
            ({"form": "token"}, ValueError, r"form must be one of 'to_go', 'sequence'; got 'token'"),
            ({"mask": MASK.float()}, TypeError, r"mask must have dtype bool, got float32"),
            (
                {"kl": torch.ones(3), "cu_seqlens": torch.tensor([0, 2, 1, 3], dtype=torch.int32), "mask": None},
                ValueError,
                r"cu_seqlens must rise from 0 to at most 3",
            ),
        ],
    )
    def test_bad_input(self, arguments, error, text):
        given = {"scores": SCORES, "kl": KL, "mask": MASK, "beta": 0.5} | arguments
        with pytest.raises(error, match=text):
            rewards.token_rewards(**given)


class TestSoftOverlong:
    def test_the_papers_equation(self):
        lengths = torch.tensor([0, 1, 16_383, 16_384, 16_385, 18_432, 20_479, 20_480, 20_481, 10**9])
        want = [0.0, 0, 0, 0, -1 / 4096, -0.5, -4095 / 4096, -1, -1, -1]
        assert rewards.soft_overlong(lengths).tolist() == want
        assert rewards.soft_overlong(lengths.double()).tolist() == want
        assert rewards.soft_overlong(lengths.int()[:5]).dtype == torch.float32

    @pytest.mark.parametrize(("limit", "cache"), [(7, 1), (10, 10), (100, 33)])
    def test_it_falls_along_a_line(self, limit, cache):
        """Monotone and continuous, with the slope -1/cache between the ends."""
        lengths = torch.arange(limit + 5).double()
        out = rewards.soft_overlong(lengths, max_length=limit, cache=cache)
        inside = (lengths >= limit - cache) & (lengths <= limit)
        assert (out[inside] * cache + lengths[inside] - (limit - cache)).abs().max() < 1e-13
        assert (out[lengths <= limit - cache] == 0).all() and (out[lengths >= limit] == -1).all()

    def test_trl(self):
        """Their reward of completions of these lengths."""
        theirs = pytest.importorskip("trl.rewards.other_rewards").get_soft_overlong_punishment(100, 20)
        lengths = list(range(0, 130, 3))
        out = rewards.soft_overlong(torch.tensor(lengths), max_length=100, cache=20)
        assert out.tolist() == pytest.approx(theirs([[0] * n for n in lengths]), abs=1e-7)

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"lengths": torch.ones(2, 2)}, ValueError, r"lengths has shape \(2, 2\), expected \(B,\)"),
            ({"lengths": torch.tensor([3, -1])}, ValueError, "lengths must be at least 0"),
            ({"lengths": [3]}, TypeError, "lengths must be a torch.Tensor, got list"),
            ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
            ({"cache": 0}, ValueError, "cache must be from 1 to max_length = 20480, got 0"),
            ({"cache": 30_000}, ValueError, "cache must be from 1 to max_length = 20480, got 30000"),
            ({"cache": 1.5}, TypeError, "cache must be an int, got float"),
        ],
    )
    def test_bad_input(self, arguments, error, text):
        with pytest.raises(error, match=text):
            rewards.soft_overlong(**{"lengths": torch.tensor([3])} | arguments)


class TestControllers:
    def test_fixed(self):
        controller = rewards.FixedKLController(0.05)
        controller.update(100.0, 256)
        assert controller.value == 0.05

    def test_adaptive(self):
        """Twice the target is clipped to an error of 0.2; a little off it is taken as it is."""
        controller = rewards.AdaptiveKLController(0.1, target=6.0, horizon=1000)
        controller.update(12.0, 100)
        assert controller.value == pytest.approx(0.1 * 1.02)
        controller = rewards.AdaptiveKLController(0.1, target=6.0, horizon=1000)
        controller.update(5.4, 100)
        assert controller.value == pytest.approx(0.1 * (1 - 0.1 * 0.1))

    def test_it_finds_the_coefficient(self):
        """A policy whose divergence is c / β settles at the target."""
        controller = rewards.AdaptiveKLController(1.0, target=6.0, horizon=1000)
        for _ in range(5000):
            controller.update(0.3 / controller.value, 64)
        assert controller.value == pytest.approx(0.05, rel=1e-6)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"target": 0.0}, "target must be positive and finite, got 0"),
            ({"horizon": 0.0}, "horizon must be positive and finite, got 0"),
            ({"value": 0.0}, "value must be positive and finite, got 0"),
            ({"clip": -1.0}, "clip must be positive and finite, got -1"),
        ],
    )
    def test_domains(self, arguments, text):
        with pytest.raises(ValueError, match=text):
            rewards.AdaptiveKLController(**{"value": 0.1} | arguments)

    def test_bad_updates(self):
        controller = rewards.AdaptiveKLController(0.1)
        with pytest.raises(ValueError, match="kl must be finite, got nan"):
            controller.update(math.nan, 1)
        with pytest.raises(ValueError, match="steps must be at least 0 and below horizon / clip, got 50000"):
            controller.update(1.0, 50_000)
        with pytest.raises(ValueError, match="value must be at least 0 and finite, got -1"):
            rewards.FixedKLController(-1.0)
