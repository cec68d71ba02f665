"""What most algorithms on given data answer when they are asked for something special: nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fastpo.algorithms.base import Completions, Control


class Plain:
    """The part of `Algorithm` that says no: no statistics, no draws, no coupling, nothing learnt beside the policy."""

    divergence = False
    mismatched = False
    unlearns = False
    whole_step = False
    control: Control | None = None
    models: tuple[str, ...]

    @property
    def statistics(self) -> Mapping[str, tuple[str, ...]]:
        return {model: () for model in self.models}

    def module(self, width: int) -> nn.Module | None:
        return None

    def candidates(self, ids: Tensor, completions: Completions) -> Tensor | None:
        return None

    def problem(self, numbers: Sequence[Sequence[float]]) -> tuple[int, str] | None:
        return None

    def draw(self, completions: Completions, seed: int) -> dict[str, Tensor]:
        return {}

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        return dict(totals)
