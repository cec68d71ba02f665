"""Rewards of tokens from scores of responses, their divergence, and models that judge tokens."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.losses._tokens import counted
from fastpo.reference.sequence import Side, sequence_sum, token_ranks

Form = Literal["to_go", "sequence"]


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    *,
    beta: float | Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: Form = "to_go",
) -> Tensor:
    """r_t = -β kl_t, and the score at the last token that counts. No gradient flows through it.

    A row without tokens has no place for its score: its rewards are 0.

    Args:
        scores: (B,), the reward of each response.
        kl: (B, T), or (N,) with `cu_seqlens`: an estimate of the divergence at each token. log π - log π_ref is the one
            whose sum over the sequence is unbiased.
        beta: the coefficient, a number of at least 0 or a 0-dimensional tensor (a controller's `value`).
        mask: bool, of the shape of kl, True where a token counts.
        cu_seqlens: int32 (B + 1,), the boundaries of packed responses.
        form: "to_go", every token pays its own, so that the return of a token has the divergence behind it;
            "sequence", the last token pays all, so that every token has the whole.

    Returns:
        of the shape of kl, fp32 (fp64 for fp64 input); 0 where the mask is False.

    Raises:
        TypeError, ValueError: the arguments do not fit each other, or β is negative.

    Source: D. M. Ziegler et al. (1909.08593) eq. 2, per token as in InstructGPT (2203.02155).
    """
    kl = _checks.tensor("kl", kl, _checks.FLOATS).detach()
    scores = _checks.tensor("scores", scores, _checks.FLOATS).detach()
    _checks.same_device("scores", scores, "kl", kl)
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(map(repr, get_args(Form)))}; got {form!r}")
    if cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, "kl", kl)
        if kl.dim() != 1:
            raise ValueError(f"kl has shape {tuple(kl.shape)}, expected (N,) with cu_seqlens")
        _checks.rising("cu_seqlens", cu_seqlens, kl.shape[0])
    elif kl.dim() != 2:
        raise ValueError(f"kl has shape {tuple(kl.shape)}, expected (B, T), or (N,) with cu_seqlens")
    rows = kl.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _checks.shape("scores", scores, (rows,), "one score per row of kl")
    if mask is not None:
        _checks.tensor("mask", mask, (torch.bool,))
        _checks.same_device("mask", mask, "kl", kl)
        _checks.shape("mask", mask, kl.shape, "it must match kl")
    if isinstance(beta, Tensor):
        _checks.tensor("beta", beta, _checks.FLOATS)
        _checks.shape("beta", beta, (), "one coefficient for all")
        _checks.same_device("beta", beta, "kl", kl)
        beta = beta.detach()
    elif not 0 <= _checks.number("beta", beta) < math.inf:
        raise ValueError(f"beta must be at least 0 and finite, got {beta:g}")
    dtype = torch.promote_types(torch.promote_types(kl.dtype, scores.dtype), torch.float32)
    kl, scores = kl.to(dtype), scores.to(dtype)
    if kl.numel() == 0 or rows == 0:
        return torch.zeros_like(kl)
    (rank, row), counts = token_ranks(Side(kl, mask=mask, cu_seqlens=cu_seqlens))
    counted = torch.ones_like(kl, dtype=torch.bool) if mask is None else mask
    if cu_seqlens is not None:
        counted = counted & (torch.arange(kl.shape[0], device=kl.device) < cu_seqlens[-1])
    last = counted & (rank == counts[row])
    if form == "sequence":
        total = sequence_sum(kl, mask, cu_seqlens)[0]
        return torch.where(last, (scores - beta * total)[row], 0).to(dtype)
    return torch.where(counted, -beta * kl, 0).to(dtype) + torch.where(last, scores[row], 0)


def soft_overlong(lengths: Tensor, *, max_length: int = 20_480, cache: int = 4096) -> Tensor:
    """DAPO's punishment of long responses: 0, then down to -1 over the last `cache` tokens, and -1 beyond `max_length`.

    It is added to the reward of correctness, ±1 in the paper, before the advantages are taken; `mixed_groups` goes by
    correctness alone.

    Args:
        lengths: integers or floats (B,), the tokens of each response, at least 0.
        max_length: the limit, positive; with the paper's 20,480 the expected length is 16,384.
        cache: from 1 to `max_length`; the punishment begins at max_length - cache.

    Returns:
        (B,), fp32 (fp64 for fp64 lengths), in [-1, 0].

    Raises:
        TypeError, ValueError: lengths are no such tensor or negative, or a limit is outside its domain.

    Source: DAPO (2503.14476) eq. 13. TRL: get_soft_overlong_punishment.
    """
    lengths = _checks.tensor("lengths", lengths, _checks.INTEGERS + _checks.FLOATS).detach()
    if lengths.dim() != 1:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected (B,)")
    for name, value in (("max_length", max_length), ("cache", cache)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if not 1 <= cache <= max_length:
        raise ValueError(f"cache must be from 1 to max_length = {max_length}, got {cache}")
    if _checks.readable(lengths) and not (lengths >= 0).all():
        raise ValueError("lengths must be at least 0")
    dtype = torch.promote_types(lengths.dtype, torch.float32)
    # lengths are exact in double, and the quotient is rounded once
    return ((max_length - cache - lengths.double()) / cache).clamp(-1, 0).to(dtype)


def rto_rewards(
    scores: Tensor,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    dpo_logprobs: Tensor,
    *,
    dpo_scale: float = 0.05,
    dpo_clip: float = 0.05,
    beta: float | Tensor = 0.01,
    score_clip: float = 10.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """RTO: r_t = clip(β₁ log π_dpo/π_ref, ±c) - β log π/π_ref, and the clipped score at the last token that counts.

    No gradient flows through it. β₁ scales whatever it is; the official code leaves the ratio as it is for β₁ <= 0.

    Args:
        scores: (B,), the (normalised) reward model's.
        logprobs: of the tokens under the policy that sampled them, (B, T), or (N,) with `cu_seqlens`.
        reference_logprobs: under the model from which both DPO and the policy began.
        dpo_logprobs: under the model trained by DPO.
        dpo_scale: β₁, positive; dpo_clip: c, positive, applied after the scale, per token. The code's are 0.05.
        beta: as in `token_rewards`; the code's first is 0.01.
        score_clip: positive; the code's is 10.
        mask, cu_seqlens: as in `token_rewards`.

    Returns:
        of the shape of logprobs, fp32 (fp64 for fp64 input); 0 where the mask is False.

    Raises:
        TypeError, ValueError: as `token_rewards`; or a number is not positive.

    Source: DPO meets PPO (2404.18922), the equation of r_rto, as its official code has it.
    """
    for name, value in (("dpo_scale", dpo_scale), ("dpo_clip", dpo_clip), ("score_clip", score_clip)):
        if not 0 < _checks.number(name, value) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value:g}")
    given = {"logprobs": logprobs, "reference_logprobs": reference_logprobs, "dpo_logprobs": dpo_logprobs}
    for name, tensor in given.items():
        _checks.tensor(name, tensor, _checks.FLOATS)
        _checks.same_device(name, tensor, "logprobs", logprobs)
        _checks.shape(name, tensor, logprobs.shape, "it must match logprobs")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    policy, reference, dpo = (t.detach().to(dtype) for t in given.values())
    scores = _checks.tensor("scores", scores, _checks.FLOATS).clamp(-score_clip, score_clip)
    shaped = token_rewards(scores, policy - reference, beta=beta, mask=mask, cu_seqlens=cu_seqlens)
    counts = counted(mask, logprobs, cu_seqlens)
    return shaped + torch.where(counts, (dpo_scale * (dpo - reference)).clamp(-dpo_clip, dpo_clip), 0)
