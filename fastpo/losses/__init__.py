"""Preference objectives: functions of log-probabilities, flat and named as in the literature.

Most functions are built from three tables, one per row: preferences from `fastpo.reference.objectives()`, policy
gradients from `fastpo.reference.policy.policies()`, objectives on lists from
`fastpo.reference.listwise.list_objectives()`. `contrastive`, `composed`, `demonstrations`, `ranking`, `statistics` and
`filters` hold the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpo.kernels.listwise import ListwiseOutput
from fastpo.kernels.objective import PairwiseOutput, PolicyOutput, UnpairedOutput
from fastpo.kernels.policy import PolicyGradientOutput, PolicyMetrics, kl_reward
from fastpo.losses import _listwise, _policy
from fastpo.losses._build import build
from fastpo.losses.composed import diffusion_dpo, hypo, mixture
from fastpo.losses.contrastive import rank_gen
from fastpo.losses.demonstrations import DemonstrationOutput, implicit_reward_sft, implicit_values
from fastpo.losses.filters import (
    clip_cov_tokens,
    entropy_mask,
    kl_cov_tokens,
    mixed_groups,
    overlong_mask,
    tppo_masks,
)
from fastpo.losses.ranking import RankingMetrics, ranking_metrics
from fastpo.losses.statistics import (
    BetaDPOStatistics,
    Moments,
    alpha_dpo_statistics,
    bco_delta,
    beta_dpo_statistics,
    kto_kl,
    sampo_sample,
)
from fastpo.reference.listwise import list_objectives
from fastpo.reference.policy import RolloutCorrection, policies
from fastpo.reference.registry import objectives

_FUNCTIONS: dict[str, Callable[..., Any]] = {row.name: build(row) for row in objectives()}
_FUNCTIONS |= {row.name: _policy.build(row) for row in policies()}
_FUNCTIONS |= {row.name: _listwise.build(row) for row in list_objectives()}
globals().update(_FUNCTIONS)

__all__ = [
    "BetaDPOStatistics",
    "DemonstrationOutput",
    "ListwiseOutput",
    "Moments",
    "PairwiseOutput",
    "PolicyGradientOutput",
    "PolicyMetrics",
    "PolicyOutput",
    "RankingMetrics",
    "RolloutCorrection",
    "UnpairedOutput",
    "alpha_dpo_statistics",
    "bco_delta",
    "beta_dpo_statistics",
    "clip_cov_tokens",
    "diffusion_dpo",
    "entropy_mask",
    "hypo",
    "implicit_reward_sft",
    "implicit_values",
    "kl_cov_tokens",
    "kl_reward",
    "kto_kl",
    "mixed_groups",
    "mixture",
    "overlong_mask",
    "rank_gen",
    "ranking_metrics",
    "sampo_sample",
    "tppo_masks",
    *_FUNCTIONS,
]


def __getattr__(name: str) -> Callable[..., Any]:
    raise AttributeError(f"fastpo.losses has no objective {name!r}; it has {', '.join(_FUNCTIONS)}")
