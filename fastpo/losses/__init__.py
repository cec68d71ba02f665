"""Preference objectives: functions of log-probabilities, flat and named as in the literature.

Most functions are built from three tables, one per row: preferences from `fastpo.reference.objectives()`, policy
gradients from `fastpo.reference.policy.policies()`, objectives on lists from
`fastpo.reference.listwise.list_objectives()`. `composed`, `contrastive`, `demonstrations`, `likelihood`, `flows`,
`matching` and `diffusion` hold the others; `statistics`, `filters`, `weights` and `ranking` what they take or give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpo.kernels.listwise import ListwiseOutput
from fastpo.kernels.objective import PairwiseOutput, PolicyOutput, UnpairedOutput
from fastpo.kernels.policy import PolicyGradientOutput, PolicyMetrics, kl_reward
from fastpo.losses import _listwise, _policy
from fastpo.losses._build import built
from fastpo.losses.composed import diffusion_dpo, hypo, mixture
from fastpo.losses.contrastive import rank_gen
from fastpo.losses.demonstrations import DemonstrationOutput, implicit_reward_sft, implicit_values
from fastpo.losses.diffusion import (
    ElboNodes,
    Noised,
    diffu_grpo,
    diffu_grpo_tokens,
    diffusion_gdpo,
    elbo,
    elbo_nodes,
    noise_tokens,
)
from fastpo.losses.filters import (
    clip_cov_tokens,
    entropy_mask,
    kl_cov_tokens,
    mean_rollout_weight,
    mixed_groups,
    overlong_mask,
    rejection_mask,
    tppo_masks,
)
from fastpo.losses.flows import (
    FlowOutput,
    detailed_balance,
    fl_detailed_balance,
    fl_subtrajectory_balance,
    subtrajectory_balance,
    trajectory_balance,
)
from fastpo.losses.likelihood import (
    AwrOutput,
    LikelihoodOutput,
    RegretOutput,
    awr,
    chain_of_hindsight,
    regret_loss,
    rwr,
    sequence_unlikelihood,
    sft,
    token_unlikelihood,
    unlikelihood,
)
from fastpo.losses.matching import (
    MatchingMetrics,
    MatchingOutput,
    PartitionEstimate,
    RewardBaseline,
    dpg,
    f_dpg,
    gdc,
    gdc_plus_plus,
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
from fastpo.losses.weights import (
    adverse_turns,
    conditional_tokens,
    document_filter,
    forgetful_mask,
    previous_tokens,
    repeated_ngrams,
    tl_key_tokens,
    tl_token_weights,
)
from fastpo.reference.listwise import list_objectives
from fastpo.reference.policy import RolloutCorrection, policies
from fastpo.reference.registry import objectives

_FUNCTIONS: dict[str, Callable[..., Any]] = {row.name: built(row) for row in objectives()}
_FUNCTIONS |= {row.name: _policy.build(row) for row in policies()}
_FUNCTIONS |= {row.name: _listwise.build(row) for row in list_objectives()}
globals().update(_FUNCTIONS)

__all__ = [
    "AwrOutput",
    "BetaDPOStatistics",
    "DemonstrationOutput",
    "ElboNodes",
    "FlowOutput",
    "LikelihoodOutput",
    "MatchingMetrics",
    "MatchingOutput",
    "ListwiseOutput",
    "Moments",
    "Noised",
    "PairwiseOutput",
    "PartitionEstimate",
    "PolicyGradientOutput",
    "PolicyMetrics",
    "PolicyOutput",
    "RegretOutput",
    "RewardBaseline",
    "RankingMetrics",
    "RolloutCorrection",
    "UnpairedOutput",
    "adverse_turns",
    "alpha_dpo_statistics",
    "awr",
    "bco_delta",
    "beta_dpo_statistics",
    "chain_of_hindsight",
    "clip_cov_tokens",
    "conditional_tokens",
    "detailed_balance",
    "diffu_grpo",
    "diffu_grpo_tokens",
    "diffusion_dpo",
    "diffusion_gdpo",
    "document_filter",
    "dpg",
    "elbo",
    "elbo_nodes",
    "entropy_mask",
    "f_dpg",
    "fl_detailed_balance",
    "fl_subtrajectory_balance",
    "forgetful_mask",
    "gdc",
    "gdc_plus_plus",
    "hypo",
    "implicit_reward_sft",
    "implicit_values",
    "kl_cov_tokens",
    "kl_reward",
    "kto_kl",
    "mean_rollout_weight",
    "mixed_groups",
    "mixture",
    "noise_tokens",
    "overlong_mask",
    "previous_tokens",
    "regret_loss",
    "rejection_mask",
    "repeated_ngrams",
    "rwr",
    "rank_gen",
    "ranking_metrics",
    "sampo_sample",
    "sequence_unlikelihood",
    "sft",
    "subtrajectory_balance",
    "tl_key_tokens",
    "tl_token_weights",
    "token_unlikelihood",
    "tppo_masks",
    "trajectory_balance",
    "unlikelihood",
    *_FUNCTIONS,
]


def __getattr__(name: str) -> Callable[..., Any]:
    raise AttributeError(f"fastpo.losses has no objective {name!r}; it has {', '.join(_FUNCTIONS)}")
