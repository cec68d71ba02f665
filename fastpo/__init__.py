"""Fused kernels for preference optimisation and RL fine-tuning of language models."""

from importlib.metadata import PackageNotFoundError, version

from fastpo import _remedies

_remedies.require_torch()

from fastpo import advantages, data, losses, nn, rewards, schedules, scores
from fastpo._info import info
from fastpo.kernels import (
    LinearLogprobs,
    SegmentStats,
    TokenLogprobs,
    affine_scan,
    balance,
    cauchy,
    completion_logprobs,
    group_normalize,
    linear_divergence,
    linear_logprobs,
    pack,
    pack_allowed,
    segment_stats,
    sequence_logprobs,
    token_alpha_divergence,
    token_jsd,
    token_kl,
    token_logprobs,
    token_tv,
    top_p_allowed,
    unpack_allowed,
    use_backend,
    vandermonde,
    vandermonde_transpose,
)
from fastpo.losses.formula import formula

try:
    __version__ = version("fastpo")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "LinearLogprobs",
    "SegmentStats",
    "TokenLogprobs",
    "__version__",
    "advantages",
    "affine_scan",
    "balance",
    "cauchy",
    "completion_logprobs",
    "data",
    "formula",
    "group_normalize",
    "info",
    "linear_divergence",
    "linear_logprobs",
    "losses",
    "nn",
    "pack",
    "pack_allowed",
    "rewards",
    "schedules",
    "scores",
    "segment_stats",
    "sequence_logprobs",
    "token_alpha_divergence",
    "token_jsd",
    "token_kl",
    "token_logprobs",
    "token_tv",
    "top_p_allowed",
    "unpack_allowed",
    "use_backend",
    "vandermonde",
    "vandermonde_transpose",
]
