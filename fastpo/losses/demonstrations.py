"""Objectives on demonstrations: completions that are to be imitated, without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.objective import Reduction
from fastpo.losses._tokens import check_layout, check_like, reducer, tokens
from fastpo.reference.registry import Domain

Divergence = Literal["total_variation", "pearson_chi2", "squared_hellinger", "jsd", "reverse_kl", "forward_kl"]

# φ of each divergence, and where it is defined
_PHI: dict[str, tuple[Callable[[Tensor], Tensor], Domain]] = {
    "total_variation": (lambda x: x, Domain()),
    "pearson_chi2": (lambda x: x - x.square() / 4, Domain()),
    "squared_hellinger": (lambda x: x / (1 + x), Domain(low=-1.0, low_open=True)),
    # log(2 - e^-x), in the form that keeps its digits at 0
    "jsd": (lambda x: torch.log1p(-torch.expm1(-x)), Domain(low=-0.6931471805599453, low_open=True)),
    "reverse_kl": (lambda x: -torch.exp(-(x + 1)), Domain()),
    "forward_kl": (lambda x: 1 + x.log(), Domain(low=0.0, low_open=True)),
}


class DemonstrationOutput(NamedTuple):
    """What an objective on demonstrations returns.

    Attributes:
        loss: scalar, or (B,) with `reduction="none"`; the only differentiable field.
        rewards: (B,), the sum of the implicit rewards r_t of the tokens.
        values: (B,), V of the state before the first token.
    """

    loss: Tensor
    rewards: Tensor
    values: Tensor


def implicit_reward_sft(
    policy: Tensor,
    reference: Tensor,
    values: Tensor,
    *,
    divergence: Divergence = "total_variation",
    beta: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> DemonstrationOutput:
    """-Σ_t φ(r_t) + V(s_0), r_t = β log π/π_ref(y_t) + V(s_t) - V(s_{t+1}), V behind the last token 0.

    φ(x) is x for the total variation, where the rewards telescope: plain SFT, β times, up to a constant. x - x²/4 for
    Pearson's χ², which falls again from x = 2 on; x/(1+x) for the squared Hellinger distance; log(2 - e⁻ˣ) for the JSD;
    -e⁻⁽ˣ⁺¹⁾ for the reverse and 1 + log x for the forward KL.

    Source: derived from Implicit Reward as the Bridge, arXiv:2507.00018, in the manner of IQ-Learn. This is not that
    paper's method to the letter: which divergences it uses, whether on tokens or sequences, and its V are not verified.

    Args:
        policy: log-probs of the demonstrations' tokens under the policy, fp32, bf16, fp16 or fp64: padded (B, T), or
            packed (N,) with cu_seqlens.
        reference: the same under the reference model; constants.
        values: V of the state in which each token is chosen, laid out as policy; differentiable. Any function of the
            state; `implicit_values` is one choice.
        divergence: one of "total_variation", "pearson_chi2", "squared_hellinger", "jsd", "reverse_kl", "forward_kl".
        beta: in (0, inf).
        mask: bool, of the shape of policy, True where a token counts; the state after a token is that before the next
            one that counts. What stands elsewhere has no influence, NaN included.
        cu_seqlens: int32 (B + 1,), boundaries of the packed sequences.
        reduction, num_items: as in `fastpo.losses.dpo`.

    Returns:
        DemonstrationOutput, fp32 (fp64 for fp64 input). A sequence without tokens has the loss 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes or devices do not match, beta is outside its domain, or a reward is outside φ's: above -1
            for the squared Hellinger distance, above -log 2 for the JSD, above 0 for the forward KL. Where values may
            not be looked at, the loss is then NaN.
    """
    if divergence not in _PHI:
        raise ValueError(f"divergence must be one of {', '.join(map(repr, _PHI))}, got {divergence!r}")
    if not 0 < _checks.number("beta", beta) < float("inf"):
        raise ValueError(f"beta must be in (0, inf) for implicit_reward_sft, got {beta:g}")
    rows = check_layout("policy", policy, mask, cu_seqlens)
    check_like("reference", reference, "policy", policy)
    check_like("values", values, "policy", policy)
    reduce = reducer(reduction, num_items, rows, policy, "policy")

    dtype = torch.promote_types(policy.dtype, torch.promote_types(values.dtype, torch.float32))
    ours, theirs, value = (t.flatten().to(dtype) for t in (policy, reference.detach(), values))
    n = len(ours)
    rows, row, counts, following, first = tokens(policy, mask, cu_seqlens)
    ratio = torch.where(counts, ours - theirs, 0)
    # V at place n: what is behind the last token
    value = torch.cat([torch.where(counts, value, 0), value.new_zeros(1)])

    reward = beta * ratio + value[:n] - value[following]
    phi, domain = _PHI[divergence]
    outside = counts & (reward <= domain.low) if domain.low > -float("inf") else torch.zeros_like(counts)
    if _checks.readable(policy) and outside.any():
        at = int(outside.nonzero()[0])
        where = [at] if cu_seqlens is not None else [at // policy.shape[1], at % policy.shape[1]]
        raise ValueError(f"the reward of token {where} is {reward[at].item():g}, but {divergence} needs it in {domain}")
    # 1 is in every domain: no NaN comes back from where nothing counts
    scores = torch.where(counts, phi(torch.where(counts, reward, 1)), 0).masked_fill(outside, float("nan"))
    zero = scores.new_zeros(rows + 1)
    start = value[first]
    loss = start - zero.index_add(0, row, scores)[:rows]
    total = zero.index_add(0, row, torch.where(counts, reward, 0).detach())[:rows]
    return DemonstrationOutput(reduce(loss), total, start.detach())


def implicit_values(logits: Tensor, reference_logits: Tensor, *, beta: float = 1.0) -> Tensor:
    """β log Σ_a π_ref(a) exp(logit_a/β): the value of a state whose action values are the policy's logits.

    One choice of V for `implicit_reward_sft`; that it is the paper's is not verified.

    Args:
        logits: (..., V) of the policy, fp32, bf16, fp16 or fp64; differentiable.
        reference_logits: the same of the reference model; constants.
        beta: in (0, inf).

    Returns:
        (...), fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: a wrong dtype, shapes that do not match, or beta outside its domain.
    """
    _checks.tensor("logits", logits, _checks.FLOATS)
    _checks.tensor("reference_logits", reference_logits, _checks.FLOATS)
    _checks.same_device("reference_logits", reference_logits, "logits", logits)
    _checks.shape("reference_logits", reference_logits, logits.shape, "it must match logits")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (..., V) with V > 0")
    if not 0 < _checks.number("beta", beta) < float("inf"):
        raise ValueError(f"beta must be in (0, inf) for implicit_values, got {beta:g}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    reference = torch.log_softmax(reference_logits.detach().to(dtype), -1)
    return beta * torch.logsumexp(reference + logits.to(dtype) / beta, -1)
