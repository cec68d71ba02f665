"""Rewards of tokens from scores of responses and their divergence, and the coefficient of that divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastpo.kernels import _checks
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


@dataclass
class FixedKLController:
    """A coefficient that stays.

    Attributes:
        value: β.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= _checks.number("value", self.value) < math.inf:
            raise ValueError(f"value must be at least 0 and finite, got {self.value:g}")

    def update(self, kl: float, steps: int) -> None:
        """Nothing changes."""


@dataclass
class AdaptiveKLController:
    """β <- β (1 + clip(KL / target - 1, ±clip) steps / horizon), so that the divergence stays near the target.

    Attributes:
        value: β.
        target: the divergence of a response, in nats; positive. 6 is the paper's.
        horizon: in responses, positive; 10,000 is the paper's.
        clip: the largest relative error, positive; 0.2 is the paper's.

    Source: D. M. Ziegler et al. (1909.08593) §2.2.
    """

    value: float
    target: float = 6.0
    horizon: float = 10_000
    clip: float = 0.2

    def __post_init__(self) -> None:
        for name in ("value", "target", "horizon", "clip"):
            number = _checks.number(name, getattr(self, name))
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {number:g}")

    def update(self, kl: float, steps: int) -> None:
        """After a batch of `steps` responses with the mean divergence `kl`."""
        if not math.isfinite(_checks.number("kl", kl)):
            raise ValueError(f"kl must be finite, got {kl}")
        # with more, the coefficient could turn negative
        if not 0 <= _checks.number("steps", steps) < self.horizon / self.clip:
            raise ValueError(f"steps must be at least 0 and below horizon / clip, got {steps}")
        error = min(max(kl / self.target - 1, -self.clip), self.clip)
        self.value *= 1 + error * steps / self.horizon
