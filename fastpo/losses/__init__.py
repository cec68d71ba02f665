"""Preference objectives: functions of log-probabilities, flat and named as in the literature.

The functions are built from the registry (`fastpo.reference.objectives()`), one per row.
"""

from __future__ import annotations

from collections.abc import Callable

from fastpo.kernels.objective import PairwiseOutput
from fastpo.losses._build import build_pairwise
from fastpo.reference.registry import objectives

_FUNCTIONS: dict[str, Callable[..., PairwiseOutput]] = {row.name: build_pairwise(row) for row in objectives("pairwise")}
globals().update(_FUNCTIONS)

__all__ = ["PairwiseOutput", *_FUNCTIONS]


def __getattr__(name: str) -> Callable[..., PairwiseOutput]:
    raise AttributeError(f"fastpo.losses has no objective {name!r}; it has {', '.join(_FUNCTIONS)}")
