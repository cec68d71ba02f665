"""The kernels: one module each, from the public function with its checks down to the op."""

from fastpo.kernels._native import use_backend
from fastpo.kernels.affine_scan import affine_scan
from fastpo.kernels.allowed import pack_allowed, top_p_allowed, unpack_allowed
from fastpo.kernels.cauchy import cauchy
from fastpo.kernels.completions import completion_logprobs, sequence_logprobs
from fastpo.kernels.linear_divergence import linear_divergence
from fastpo.kernels.linear_logprobs import LinearLogprobs, linear_logprobs
from fastpo.kernels.packing import balance, pack
from fastpo.kernels.segment_stats import SegmentStats, group_normalize, segment_stats
from fastpo.kernels.token_logprobs import TokenLogprobs, token_logprobs
from fastpo.kernels.vandermonde import vandermonde, vandermonde_transpose
from fastpo.kernels.vocab_divergence import token_alpha_divergence, token_jsd, token_kl, token_tv

__all__ = [
    "LinearLogprobs",
    "SegmentStats",
    "TokenLogprobs",
    "affine_scan",
    "balance",
    "cauchy",
    "completion_logprobs",
    "group_normalize",
    "linear_divergence",
    "linear_logprobs",
    "pack",
    "pack_allowed",
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
