"""Fused kernels for preference optimisation and RL fine-tuning of language models."""

from importlib.metadata import PackageNotFoundError, version

from fastpo import losses
from fastpo._info import info
from fastpo.kernels import (
    LinearLogprobs,
    TokenLogprobs,
    balance,
    completion_logprobs,
    linear_logprobs,
    pack,
    sequence_logprobs,
    token_alpha_divergence,
    token_jsd,
    token_kl,
    token_logprobs,
    token_tv,
    use_backend,
)
from fastpo.losses.formula import formula

try:
    __version__ = version("fastpo")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "LinearLogprobs",
    "TokenLogprobs",
    "__version__",
    "balance",
    "completion_logprobs",
    "formula",
    "info",
    "linear_logprobs",
    "losses",
    "pack",
    "sequence_logprobs",
    "token_alpha_divergence",
    "token_jsd",
    "token_kl",
    "token_logprobs",
    "token_tv",
    "use_backend",
]
