"""Pairwise preference objectives in plain torch: a chosen and a rejected completion of one prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.reference.registry import POSITIVE, Domain, Objective, register
from fastpo.reference.sequence import sequence_sum


class Pair(NamedTuple):
    """What a pairwise formula sees, each of shape (B,): summed log-probs and their ratios to the reference.

    With `length_norm` the log-probs and log-ratios are per-token averages instead of sums.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_logratio: Tensor
    rejected_logratio: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen_logratio - self.rejected_logratio


@register(
    "pairwise",
    title="Direct Preference Optimization",
    paper="arXiv:2305.18290",
    equation="Eq. 7",
    domains={"beta": POSITIVE},
    theory="gibbs",
    aliases={"trl": "sigmoid", "liger": "sigmoid"},
)
def dpo(pair: Pair, *, beta: float = 0.1) -> Tensor:
    """-log σ(β h), where h is the chosen minus the rejected log-ratio to the reference.

    At the reference the loss is log 2. Its optimum for labels from a Bradley-Terry model with reward r is
    the policy proportional to π_ref exp(r/β).
    """
    return -F.logsigmoid(beta * pair.margin)


@register(
    "pairwise",
    title="Conservative DPO",
    paper="E. Mitchell, A note on DPO with noisy preferences (2023)",
    equation="Eq. 3",
    domains={"beta": POSITIVE, "label_smoothing": Domain(0.0, 0.5, high_open=True)},
    theory="property",
)
def cdpo(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-(1-ε) log σ(βh) - ε log σ(-βh): DPO on labels believed to be wrong with probability ε.

    Stationary at βh = log((1-ε)/ε), so the margin stays bounded. TRL and Liger have no such objective: their
    "robust" is `robust_dpo`, whose flipped term has the opposite sign.
    """
    z = beta * pair.margin
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


@register(
    "pairwise",
    title="Provably robust DPO",
    paper="arXiv:2403.00409",
    equation="definition of L_robust",
    domains={"beta": POSITIVE, "label_smoothing": Domain(0.0, 0.5, high_open=True)},
    theory="gibbs",
    aliases={"trl": "robust", "liger": "robust"},
)
def robust_dpo(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """[-(1-ε) log σ(βh) + ε log σ(-βh)] / (1-2ε): unbiased DPO under labels flipped at the rate ε.

    Not bounded below for ε > 0: negative losses are legal. ε = 0 is DPO.
    """
    z = beta * pair.margin
    mixed = -(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)
    return mixed / (1 - 2 * label_smoothing)


@register(
    "pairwise",
    title="Identity Preference Optimization",
    paper="arXiv:2310.12036",
    equation="Eq. 17",
    domains={"beta": POSITIVE},
    theory="gibbs",
    length_norm=True,
    aliases={"trl": "ipo (with length_norm=True)"},
)
def ipo(pair: Pair, *, beta: float = 0.1) -> Tensor:
    """(h - 1/(2β))²; β is the paper's τ.

    The paper's formula is on summed log-probs, the default. TRL's DPOTrainer uses per-token averages, which
    `length_norm=True` gives.
    """
    return (pair.margin - 1 / (2 * beta)) ** 2


@register(
    "pairwise",
    title="RSO hinge-norm",
    paper="arXiv:2309.06657",
    equation="Eq. 10",
    domains={"beta": POSITIVE},
    theory="property",
    aliases={"trl": "hinge", "liger": "hinge"},
)
def hinge(pair: Pair, *, beta: float = 0.05) -> Tensor:
    """max(0, 1 - βh); β is the paper's γ. The subgradient at the kink is 0, as in `torch.relu`.

    TRL lists it under SLiC-HF, which has no reference model and another scale.
    """
    return torch.relu(1 - beta * pair.margin)


class Side(NamedTuple):
    """One side of the pairs, chosen or rejected.

    `policy` and `reference` are (B,), or token-level: (B, T) with an optional `mask`, or packed (N,) with
    `cu_seqlens` and an optional `mask`. `lengths` (B,) is needed only for averages of sequence-level log-probs.
    """

    policy: Tensor
    reference: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    lengths: Tensor | None = None


def _sums(side: Side) -> tuple[Tensor, Tensor, Tensor | None]:
    policy, counts = sequence_sum(side.policy, side.mask, side.cu_seqlens)
    lengths = side.lengths if counts is None else counts
    if side.reference is None:
        return policy, policy, lengths
    reference, _ = sequence_sum(side.reference.detach(), side.mask, side.cu_seqlens)
    return policy, policy - reference, lengths


def pairwise_objective(
    row: Objective, chosen: Side, rejected: Side, hyper: dict[str, float], *, length_norm: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-pair loss (B,) and the detached rewards β · log-ratio of both sides, differentiated by torch.

    β is 1 for a row that has none.
    """
    (lw, a, nw), (ll, b, nl) = _sums(chosen), _sums(rejected)
    beta = hyper.get("beta", 1.0)
    rewards = (beta * a).detach(), (beta * b).detach()
    if length_norm:
        assert nw is not None and nl is not None
        nw, nl = nw.clamp(min=1).to(a.dtype), nl.clamp(min=1).to(b.dtype)
        lw, a, ll, b = lw / nw, a / nw, ll / nl, b / nl
    return row.formula(Pair(lw, ll, a, b), **hyper), *rewards
