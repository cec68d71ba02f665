"""Preference objectives: functions of log-probabilities, flat and named as in the literature.

The functions are built from the registry (`fastpo.reference.objectives()`), one per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpo.kernels.objective import PairwiseOutput, PolicyOutput, UnpairedOutput
from fastpo.losses._build import build
from fastpo.reference.registry import objectives

_FUNCTIONS: dict[str, Callable[..., Any]] = {row.name: build(row) for row in objectives()}
globals().update(_FUNCTIONS)

__all__ = ["PairwiseOutput", "PolicyOutput", "UnpairedOutput", *_FUNCTIONS]


def __getattr__(name: str) -> Callable[..., Any]:
    raise AttributeError(f"fastpo.losses has no objective {name!r}; it has {', '.join(_FUNCTIONS)}")
