"""Rewards before they become advantages: per token, calibrated, combined, by their history; and their coefficients."""

from fastpo.rewards.controllers import AdaptiveKLController, ConstraintMultipliers, FixedKLController
from fastpo.rewards.history import HapoHistory, VersionNormalizer, rubric_score
from fastpo.rewards.shaping import (
    calibrated_rewards,
    infalign_rewards,
    multi_objective,
    tool_use_reward,
    weighted_rewards,
    xrpo_allocate,
    xrpo_novelty,
    xrpo_priorities,
)
from fastpo.rewards.tokens import rto_rewards, soft_overlong, token_rewards

__all__ = [
    "AdaptiveKLController",
    "ConstraintMultipliers",
    "FixedKLController",
    "HapoHistory",
    "VersionNormalizer",
    "calibrated_rewards",
    "infalign_rewards",
    "multi_objective",
    "rto_rewards",
    "rubric_score",
    "soft_overlong",
    "token_rewards",
    "tool_use_reward",
    "weighted_rewards",
    "xrpo_allocate",
    "xrpo_novelty",
    "xrpo_priorities",
]
