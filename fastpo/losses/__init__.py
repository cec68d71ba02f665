"""Preference objectives: functions of log-probabilities, flat and named as in the literature.

Most functions are built from the registry (`fastpo.reference.objectives()`), one per row; `composed`, `demonstrations`
and `statistics` hold the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpo.kernels.objective import PairwiseOutput, PolicyOutput, UnpairedOutput
from fastpo.losses._build import build
from fastpo.losses.composed import diffusion_dpo, hypo, mixture
from fastpo.losses.demonstrations import DemonstrationOutput, implicit_reward_sft, implicit_values
from fastpo.losses.statistics import (
    BetaDPOStatistics,
    Moments,
    alpha_dpo_statistics,
    bco_delta,
    beta_dpo_statistics,
    kto_kl,
    sampo_sample,
)
from fastpo.reference.registry import objectives

_FUNCTIONS: dict[str, Callable[..., Any]] = {row.name: build(row) for row in objectives()}
globals().update(_FUNCTIONS)

__all__ = [
    "BetaDPOStatistics",
    "DemonstrationOutput",
    "Moments",
    "PairwiseOutput",
    "PolicyOutput",
    "UnpairedOutput",
    "alpha_dpo_statistics",
    "bco_delta",
    "beta_dpo_statistics",
    "diffusion_dpo",
    "hypo",
    "implicit_reward_sft",
    "implicit_values",
    "kto_kl",
    "mixture",
    "sampo_sample",
    *_FUNCTIONS,
]


def __getattr__(name: str) -> Callable[..., Any]:
    raise AttributeError(f"fastpo.losses has no objective {name!r}; it has {', '.join(_FUNCTIONS)}")
