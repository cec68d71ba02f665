"""Sets of allowed tokens as packed bits: what `token_logprobs` and `linear_logprobs` renormalise over."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.reference import vocabulary

# logits that are sorted at a time, each of which takes some 40 bytes meanwhile
_AT_ONCE = 1 << 24


def pack_allowed(mask: Tensor) -> Tensor:
    """A mask over the vocabulary as a bit per token.

    Bit v % 32 of word v // 32 is token v's, the layout of the token bitmasks of xgrammar and llguidance (from memory),
    which can be given as they are wherever `allowed` is an argument. Unions and intersections of packed sets are | and
    & of their words.

    Args:
        mask: (..., V) bool, True where a token is allowed.

    Returns:
        int32 (..., ceil(V / 32)); the bits behind the last token are 0.

    Raises:
        TypeError: `mask` is not a bool tensor.
        ValueError: `mask` has no vocabulary dimension.
    """
    _checks.tensor("mask", mask, (torch.bool,))
    if mask.dim() == 0:
        raise ValueError("mask must have a vocabulary dimension, got a 0-dimensional tensor")
    return vocabulary.pack_allowed(mask)


def unpack_allowed(allowed: Tensor, vocab_size: int) -> Tensor:
    """The mask that `pack_allowed` packs: bool (..., vocab_size) of int32 (..., ceil(vocab_size / 32)).

    Raises:
        TypeError: `allowed` is not an int32 tensor, or `vocab_size` not an int.
        ValueError: their sizes do not match.
    """
    _checks.tensor("allowed", allowed, (torch.int32,))
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    words = -(-vocab_size // 32)
    if vocab_size < 0 or allowed.dim() == 0 or allowed.shape[-1] != words:
        raise ValueError(
            f"allowed has shape {tuple(allowed.shape)}, expected (..., {words}): a bit for each of {vocab_size} tokens"
        )
    return vocabulary.unpack_allowed(allowed, vocab_size)


def top_p_allowed(
    logits: Tensor,
    top_p: float,
    *,
    min_tokens: int = 1,
    always: Sequence[int] | Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Per row, the smallest set of the most likely tokens that have at least the probability `top_p` together.

    The set of NLPO (Ramamurthy et al., 2210.01241, Algorithm 1), where the logits are those of the mask policy, a copy
    of the policy that lags behind it. The set is made when a token is sampled and kept with it: sampling, the old and
    the new log-probs and the entropy are all under the policy renormalised over that one set, which holds the sampled
    token. Of a set that is made again, from another mask policy, the sampled token may be no member, and its log-prob
    is -inf: `always` keeps it.

    The authors' code keeps 100 tokens at least (one less for causal models) and its special tokens always, for a
    `top_p` of 0.9; it renormalises by zeroed probabilities that it then clamps, which is not done here.

    Args:
        logits: (..., V), fp32, bf16, fp16 or fp64. Of equals the lower id comes first.
        top_p: in (0, 1]; 1 allows all that are not -inf.
        min_tokens: how many of the most likely tokens are in each set, whatever they have.
        always: ids that are in the set: a sequence of them for all rows, or a tensor (...) or (..., K), int64 or int32,
            of each row's own; `ignore_index` stands for none.

    Returns:
        int32 (..., ceil(V / 32)), packed as `pack_allowed` does, in which `token_logprobs` takes it. A row with a NaN
        or +inf has its first `min_tokens` in descending order, NaN first, alone.

    Raises:
        TypeError: a dtype or type is not one of the above.
        ValueError: shapes or devices do not match, or a number is not in its domain.
        IndexError: an id of `always` is out of range; of a tensor on the CPU, elsewhere with FASTPO_DEBUG=1.
    """
    _checks.tensor("logits", logits, _checks.FLOATS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: it must have a vocabulary dimension, not empty")
    if not 0 < _checks.number("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if isinstance(min_tokens, bool) or not isinstance(min_tokens, int):
        raise TypeError(f"min_tokens must be an int, got {type(min_tokens).__name__}")
    if min_tokens < 1:
        raise ValueError(f"min_tokens must be at least 1, got {min_tokens}")
    _checks.ignore_index(ignore_index)
    rows, size = logits.shape[:-1], logits.shape[-1]
    flat = logits.detach().reshape(-1, size)
    ids = _ids(always, logits, ignore_index)
    parts = []
    height = max(1, _AT_ONCE // size)
    for first in range(0, len(flat), height):
        block = slice(first, first + height)
        own = None if ids is None else ids[block]
        parts.append(
            vocabulary.top_p_allowed(
                flat[block], float(top_p), min_tokens=min_tokens, always=own, ignore_index=ignore_index
            )
        )
    words = torch.cat(parts) if parts else flat.new_empty((0, -(-size // 32)), dtype=torch.int32)
    return words.view(*rows, -(-size // 32))


def _ids(always: Sequence[int] | Tensor | None, logits: Tensor, ignore_index: int) -> Tensor | None:
    """`always` as (rows, K)."""
    rows, size = logits.shape[:-1], logits.shape[-1]
    count = math.prod(rows)
    if always is None:
        return None
    if not isinstance(always, Tensor):
        if isinstance(always, str) or not isinstance(always, Sequence):
            raise TypeError(f"always must be a sequence of ids or a tensor, got {type(always).__name__}")
        for id in always:
            if isinstance(id, bool) or not isinstance(id, int):
                raise TypeError(f"always must hold ints, got {type(id).__name__}")
            if id != ignore_index and not 0 <= id < size:
                raise IndexError(f"always holds {id}, out of range for a vocabulary of {size}")
        return torch.tensor(list(always), dtype=torch.int64, device=logits.device).expand(count, -1)
    _checks.tensor("always", always, _checks.INTEGERS)
    _checks.same_device("always", always, "logits", logits)
    if always.shape != rows and (always.dim() != len(rows) + 1 or always.shape[:-1] != rows):
        raise ValueError(f"always has shape {tuple(always.shape)}, expected {tuple(rows)} or {(*rows, 'K')}")
    ids = always.reshape(count, always.shape[-1] if always.dim() == logits.dim() else 1)
    if _checks.readable(ids):
        bad = ((ids < 0) | (ids >= size)) & (ids != ignore_index)
        if bad.any():
            raise IndexError(f"always holds {int(ids[bad][0])}, out of range for a vocabulary of {size}")
    return ids
