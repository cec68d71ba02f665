"""What is known of policies in closed form: how far best-of-n and exponential tilting go, and what they cost in KL."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpo.kernels import _checks


def _samples(n: object) -> int:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an int, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return n


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n: KL of the best of n samples to the policy that they are from.

    Exact where no two rewards are equal, as for continuous ones; else an upper bound, which may be far off.
    `best_of_n_probabilities` gives the law of a policy that can be enumerated.

    Source: Asymptotics of language model alignment (2404.01730).
    """
    return math.log(_samples(n)) - (n - 1) / n


def best_of_n_win_rate(n: int) -> float:
    """n/(n + 1): how often the best of n samples is better than one more; ties count half.

    Source: as `best_of_n_kl`; exact under the same condition.
    """
    return _samples(n) / (n + 1)


def best_of_n_probabilities(probabilities: Tensor, rewards: Tensor, n: int) -> Tensor:
    """The law of the best of n samples: F(r)^n - F(r-)^n for each value of the reward, shared by those that have it.

    Args:
        probabilities: (V,), of the outcomes, at least 0 and 1 in sum.
        rewards: (V,); ties are broken uniformly among samples, so in proportion to the probabilities.
        n: at least 1.

    Returns:
        fp64 (V,).

    Raises:
        TypeError, ValueError: wrong types or shapes, probabilities that are none, a reward that is NaN, or n below 1.
    """
    _samples(n)
    _checks.tensor("probabilities", probabilities, _checks.FLOATS)
    _checks.tensor("rewards", rewards, _checks.FLOATS)
    if probabilities.dim() != 1:
        raise ValueError(f"probabilities has shape {tuple(probabilities.shape)}, expected (V,)")
    _checks.shape("rewards", rewards, probabilities.shape, "one per outcome")
    p = probabilities.detach().double()
    if not bool((p >= 0).all()) or abs(p.sum().item() - 1) > 1e-3:
        raise ValueError("probabilities must be at least 0, and 1 in sum")
    if bool(rewards.isnan().any()):
        raise ValueError("rewards must not be NaN")
    p = p / p.sum()
    values, place = rewards.detach().double().unique(return_inverse=True)
    mass = torch.zeros_like(values).index_add(0, place, p)
    upper = mass.cumsum(0).clamp(max=1)
    # the last is 1, and all that follows from it
    upper[-1:] = 1.0
    lower = torch.cat([upper.new_zeros(1), upper[:-1]])
    share = torch.where(mass > 0, (upper**n - lower**n) / torch.where(mass > 0, mass, 1), 0)
    return p * share[place]


def tilt_kl(t: float) -> float:
    """KL of π ∝ p e^(tC) to p, C uniform on [0, 1] under p as calibrated rewards are.

        t (e^t/(e^t - 1) - 1/t) - log((e^t - 1)/t)

    The same for -t, and 0 for 0.

    Source: Asymptotics of language model alignment (2404.01730).
    """
    size = abs(_checks.number("t", t))
    if not size < math.inf:
        raise ValueError(f"t must be finite, got {t}")
    if size < 0.05:
        # the first three terms of its series, where the closed form has lost its digits
        return size**2 / 24 - size**4 / 960 + size**6 / 36288
    # log((e^t - 1)/t) = t + log((1 - e^-t)/t): nothing overflows
    below = -math.expm1(-size)
    return size / below - 1 - size - math.log(below / size)
