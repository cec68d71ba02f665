"""Coefficients that follow the run: of the divergence, and of constraints on several rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastpo.kernels import _checks


@dataclass
class FixedKLController:
    """A coefficient that stays.

    Attributes:
        value: β.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= _checks.number("value", self.value) < math.inf:
            raise ValueError(f"value must be at least 0 and finite, got {self.value:g}")

    def update(self, kl: float, steps: int) -> None:
        """Nothing changes."""


@dataclass
class AdaptiveKLController:
    """β <- β (1 + clip(KL / target - 1, ±clip) steps / horizon), so that the divergence stays near the target.

    Attributes:
        value: β.
        target: the divergence of a response, in nats; positive. 6 is the paper's.
        horizon: in responses, positive; 10,000 is the paper's.
        clip: the largest relative error, positive; 0.2 is the paper's.

    Source: D. M. Ziegler et al. (1909.08593) §2.2.
    """

    value: float
    target: float = 6.0
    horizon: float = 10_000
    clip: float = 0.2

    def __post_init__(self) -> None:
        for name in ("value", "target", "horizon", "clip"):
            number = _checks.number(name, getattr(self, name))
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {number:g}")

    def update(self, kl: float, steps: int) -> None:
        """After a batch of `steps` responses with the mean divergence `kl`."""
        if not math.isfinite(_checks.number("kl", kl)):
            raise ValueError(f"kl must be finite, got {kl}")
        # with more, the coefficient could turn negative
        if not 0 <= _checks.number("steps", steps) < self.horizon / self.clip:
            raise ValueError(f"steps must be at least 0 and below horizon / clip, got {steps}")
        error = min(max(kl / self.target - 1, -self.clip), self.clip)
        self.value *= 1 + error * steps / self.horizon


class ConstraintMultipliers:
    """Lagrange multipliers of C constraints on rewards: μ = sigmoid(λ) for v >= θ, ξ = tanh(λ) for v = θ.

    The policy learns from (C - Σ μ) A_KL + Σ μ A; then a step of gradient descent with momentum on Σ μ (v - θ) makes a
    multiplier fall where its value is above the threshold, and rise below. The state is saved with checkpoints.

    Args:
        thresholds: θ of each reward.
        kind: "mu" or "xi".
        learning_rate, momentum: the code's, 0.01 and 0.1.
        max_norm: the gradient's norm is clipped there, if given.
        spread: λ begins at independent normal numbers of this deviation; the code's N(0, 0.01) read as such.
        generator: draws them.

    Source: Confronting reward model overoptimization (2310.04373), its official code, whose update is once per
    minibatch, v the mean over all tokens of the reward to go; the normalisation of its text is not verified.
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        *,
        kind: Literal["mu", "xi"] = "mu",
        learning_rate: float = 0.01,
        momentum: float = 0.1,
        max_norm: float | None = None,
        spread: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> None:
        self.thresholds = [_checks.number(f"thresholds[{i}]", theta) for i, theta in enumerate(thresholds)]
        if not self.thresholds or not all(map(math.isfinite, self.thresholds)):
            raise ValueError(f"thresholds must be finite numbers, at least one; got {list(thresholds)}")
        if kind not in ("mu", "xi"):
            raise ValueError(f"kind must be 'mu' or 'xi', got {kind!r}")
        if not 0 < _checks.number("learning_rate", learning_rate) < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
        if not 0 <= _checks.number("momentum", momentum) < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not 0 <= _checks.number("spread", spread) < math.inf:
            raise ValueError(f"spread must be at least 0 and finite, got {spread}")
        if max_norm is not None and not 0 < _checks.number("max_norm", max_norm):
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        self.kind, self.learning_rate, self.momentum, self.max_norm = kind, learning_rate, momentum, max_norm
        self._raw = spread * torch.randn(len(self.thresholds), generator=generator, dtype=torch.float64)
        self._velocity = torch.zeros_like(self._raw)

    @property
    def values(self) -> Tensor:
        """μ or ξ, fp64 (C,)."""
        return torch.sigmoid(self._raw) if self.kind == "mu" else torch.tanh(self._raw)

    def mix(self, kl_advantages: Tensor, advantages: Sequence[Tensor]) -> Tensor:
        """(C - Σ μ) A_KL + Σ μ A.

        Args:
            kl_advantages: of the reward -KL, of any shape, normalised.
            advantages: those of each reward, C of that shape, each normalised; NaN is passed on.

        Returns:
            of that shape, fp32 (fp64 for fp64 input), without gradient.

        Raises:
            TypeError, ValueError: there are not C, or shapes or dtypes do not match.
        """
        _checks.tensor("kl_advantages", kl_advantages, _checks.FLOATS)
        if len(advantages) != len(self.thresholds):
            raise ValueError(
                f"advantages has {len(advantages)} entries, expected {len(self.thresholds)}: one per reward"
            )
        dtype = torch.promote_types(kl_advantages.dtype, torch.float32)
        weights = self.values.tolist()
        out = (len(weights) - math.fsum(weights)) * kl_advantages.detach().to(dtype)
        for i, (weight, advantage) in enumerate(zip(weights, advantages, strict=True)):
            _checks.tensor(f"advantages[{i}]", advantage, _checks.FLOATS)
            _checks.same_device(f"advantages[{i}]", advantage, "kl_advantages", kl_advantages)
            _checks.shape(f"advantages[{i}]", advantage, kl_advantages.shape, "it must match kl_advantages")
            out = out + weight * advantage.detach().to(dtype)
        return out

    def update(self, estimates: Sequence[float]) -> None:
        """After a minibatch in which the rewards had these values v; over ranks, their means over all."""
        if len(estimates) != len(self.thresholds):
            raise ValueError(f"estimates has {len(estimates)} entries, expected {len(self.thresholds)}")
        values = [_checks.number(f"estimates[{i}]", v) for i, v in enumerate(estimates)]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"estimates must be finite, got {values}")
        weight = self.values
        slope = weight * (1 - weight) if self.kind == "mu" else 1 - weight.square()
        excess = torch.tensor(values, dtype=torch.float64) - torch.tensor(self.thresholds, dtype=torch.float64)
        gradient = excess * slope
        if self.max_norm is not None:
            gradient = gradient * min(1.0, self.max_norm / max(gradient.norm().item(), 1e-300))
        self._velocity = self.momentum * self._velocity + gradient
        self._raw = self._raw - self.learning_rate * self._velocity

    def state_dict(self) -> dict[str, Any]:
        return {"raw": self._raw.tolist(), "velocity": self._velocity.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["raw"]) != len(self.thresholds):
            raise ValueError(f"state has {len(state['raw'])} multipliers, expected {len(self.thresholds)}")
        self._raw = torch.tensor(state["raw"], dtype=torch.float64)
        self._velocity = torch.tensor(state["velocity"], dtype=torch.float64)
