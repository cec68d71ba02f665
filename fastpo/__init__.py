"""Fused kernels for preference optimisation and RL fine-tuning of language models."""

from importlib.metadata import PackageNotFoundError, version

from fastpo import losses
from fastpo.kernels import TokenLogprobs, token_logprobs, use_backend

try:
    __version__ = version("fastpo")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["TokenLogprobs", "__version__", "losses", "token_logprobs", "use_backend"]
