"""fastpo.scores: best-of-n and tilting against enumeration and quadrature."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import pytest
import torch

from fastpo import scores


def test_best_of_n_is_enumerated():
    """All tuples of four samples; ties go to one of the best, uniformly."""
    p = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.5, 1.0, -2.0])
    for n in (1, 2, 4):
        want = torch.zeros(4, dtype=torch.float64)
        for draw in itertools.product(range(4), repeat=n):
            best = [i for i in draw if reward[i] == max(reward[j] for j in draw)]
            for i in best:
                want[i] += math.prod(p[j].item() for j in draw) / len(best)
        torch.testing.assert_close(scores.best_of_n_probabilities(p, reward, n), want)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 100])
def test_closed_forms(n):
    """Without ties the KL and the win rate are those of n u^(n-1) on [0, 1]; with them the KL is an upper bound."""
    density = lambda u: n * u ** (n - 1)  # noqa: E731
    kl = mp.quad(lambda u: density(u) * mp.log(density(u)) if u else mp.mpf(0), [0, 0.5, 0.9, 1])
    win = mp.quad(lambda u: density(u) * u, [0, 0.9, 1])
    assert scores.best_of_n_kl(n) == pytest.approx(float(kl), abs=1e-10)
    assert scores.best_of_n_win_rate(n) == pytest.approx(float(win), rel=1e-12)
    # many outcomes are nearly continuous
    p = torch.full((20_000,), 1 / 20_000, dtype=torch.float64)
    law = scores.best_of_n_probabilities(p, torch.arange(20_000.0, dtype=torch.float64), n)
    found = torch.where(law > 0, law * (law / p).clamp(min=1e-300).log(), 0).sum().item()
    assert found <= scores.best_of_n_kl(n) + 1e-12 and found == pytest.approx(scores.best_of_n_kl(n), abs=1e-2)
    few = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    law = scores.best_of_n_probabilities(few, torch.tensor([0.0, 1.0, 2.0]), n)
    discrete = torch.where(law > 0, law * (law / few).clamp(min=1e-300).log(), 0).sum().item()
    assert discrete < scores.best_of_n_kl(n) or n == 1


@pytest.mark.parametrize("t", [1e-6, 0.049, 0.051, 1.0, -3.0, 30.0, 1000.0])
def test_tilt(t):
    x = mp.mpf(t)
    with mp.workdps(60):
        want = x * (mp.exp(x) / (mp.exp(x) - 1) - 1 / x) - mp.log((mp.exp(x) - 1) / x)
    assert scores.tilt_kl(t) == pytest.approx(float(want), rel=1e-11)
    assert scores.tilt_kl(0.0) == 0


def test_bad_input():
    p = torch.tensor([0.5, 0.5])
    for function in (scores.best_of_n_kl, scores.best_of_n_win_rate):
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            function(0)
        with pytest.raises(TypeError, match="n must be an int, got float"):
            function(2.0)
    with pytest.raises(ValueError, match="probabilities must be at least 0, and 1 in sum"):
        scores.best_of_n_probabilities(p + 0.5, p, 2)
    with pytest.raises(ValueError, match=r"rewards has shape \(3,\), expected \(2,\)"):
        scores.best_of_n_probabilities(p, torch.zeros(3), 2)
    with pytest.raises(ValueError, match="rewards must not be NaN"):
        scores.best_of_n_probabilities(p, torch.tensor([0.0, math.nan]), 2)
    with pytest.raises(ValueError, match="t must be finite"):
        scores.tilt_kl(math.inf)
