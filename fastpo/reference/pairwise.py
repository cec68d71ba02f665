"""Pairwise preference objectives in plain torch: a chosen and a rejected completion of one prompt.

What a docstring calls "not verified" was not read in the paper or in its authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.reference.ranks import gathered
from fastpo.reference.registry import (
    ANY,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Domain,
    Input,
    Objective,
    Variant,
    derive,
    register,
)
from fastpo.reference.sequence import Side, per_token, summed, token_ranks

if TYPE_CHECKING:
    from fastpo.reference.ranks import Group


class Pair(NamedTuple):
    """What a pairwise formula sees, each of shape (B,): summed log-probs and their ratios to the reference.

    On averages (`length_norm`, and the rows that are always on them) all of them are per token. `*_step` are the
    log-ratios to the previous iterate, `*_length` the numbers of tokens, at least 1; where a row has neither, None.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_logratio: Tensor
    rejected_logratio: Tensor
    chosen_step: Tensor | None = None
    rejected_step: Tensor | None = None
    chosen_length: Tensor | None = None
    rejected_length: Tensor | None = None

    @property
    def margin(self) -> Tensor:
        return self.chosen_logratio - self.rejected_logratio


SMOOTHING = Domain(0.0, 0.5, high_open=True)
Sides = tuple[Side, ...]
Given = dict[str, Tensor]
Hyper = Mapping[str, float]
Prepared = tuple[Sides, tuple[Tensor, ...]]


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


def _flipped(z: Tensor, label_smoothing: float) -> Tensor | float:
    """ε log σ(-z); without smoothing there is no such term, also where its logarithm is infinite."""
    return label_smoothing * F.logsigmoid(-z) if label_smoothing else 0.0


@register(
    "pairwise",
    title="Conservative DPO",
    paper="E. Mitchell, A note on DPO with noisy preferences (2023)",
    equation="Eq. 3",
    domains={"beta": POSITIVE, "label_smoothing": SMOOTHING},
    theory="property",
    per_row={"label_smoothing": "cdpo_each"},
)
def cdpo(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-(1-ε) log σ(βh) - ε log σ(-βh): DPO on labels believed to be wrong with probability ε.

    Stationary at βh = log((1-ε)/ε), so the margin stays bounded. TRL and Liger have no such objective: their
    "robust" is `robust_dpo`, whose flipped term has the opposite sign. ε may be one number per pair.
    """
    z = beta * pair.margin
    return -(1 - label_smoothing) * F.logsigmoid(z) - _flipped(z, label_smoothing)


@register(
    "pairwise",
    title="Provably robust DPO",
    paper="arXiv:2403.00409",
    equation="definition of L_robust",
    domains={"beta": POSITIVE, "label_smoothing": SMOOTHING},
    theory="gibbs",
    aliases={"trl": "robust", "liger": "robust"},
)
def robust_dpo(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """[-(1-ε) log σ(βh) + ε log σ(-βh)] / (1-2ε): unbiased DPO under labels flipped at the rate ε.

    Not bounded below for ε > 0: negative losses are legal. ε = 0 is DPO.
    """
    z = beta * pair.margin
    mixed = -(1 - label_smoothing) * F.logsigmoid(z) + _flipped(z, label_smoothing)
    return mixed / (1 - 2 * label_smoothing)


@register(
    "pairwise",
    title="Identity Preference Optimization",
    paper="arXiv:2310.12036",
    equation="Eq. 17",
    domains={"beta": POSITIVE},
    theory="gibbs",
    lengths="optional",
    options={"convention": (None, "trl")},
    variants={(None,): Variant("ipo"), ("trl",): Variant("ipo", length_norm=True)},
    aliases={"trl": "ipo (with convention='trl')"},
)
def ipo(pair: Pair, *, beta: float = 0.1) -> Tensor:
    """(h - 1/(2β))²; β is the paper's τ.

    The paper's formula is on summed log-probs, the default. TRL's DPOTrainer uses per-token averages, which
    `length_norm=True` or `convention="trl"` gives.
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


# one formula, several names


derive(
    "spin",
    "dpo",
    title="Self-Play Fine-Tuning",
    paper="arXiv:2401.01335",
    equation="Eq. 4.7",
    theory="step",
    online=True,
    aliases={"trl": "sigmoid", "verl": "spin"},
    about="""-log σ(β h): DPO of human responses against samples of the last iterate, which is the reference.

β is the paper's λ (0.1; 5.0 in its last iteration). Where the sample is the human's response the gradient is 0. verl's
recipe of this name labels two samples by a reward, which is `online_dpo`.""",
)
derive(
    "online_dpo",
    "dpo",
    title="Online DPO (OAIF)",
    paper="arXiv:2402.04792",
    equation="the DPO loss on labelled pairs of samples",
    online=True,
    aliases={"trl": "OnlineDPOTrainer, sigmoid", "verl": "spin"},
    about="-log σ(β h) on two samples of the policy, labelled by a judge: DPO on its own data.",
)
derive(
    "dno_prct",
    "dpo",
    title="Direct Nash Optimization, practical form",
    paper="arXiv:2404.03715",
    equation="Eq. 13",
    theory="property",
    online=True,
    about="""-log σ(β h) on pairs with a large margin of win rates; the reference is the previous iterate.

The SFT model as the reference would be DPO. β is the paper's η̃; its value is not verified.""",
)
derive(
    "rso_sigmoid",
    "dpo",
    title="RSO sigmoid-norm",
    paper="arXiv:2309.06657",
    equation="Eq. 8",
    defaults={"beta": 0.05},
    aliases={"trl": "sigmoid", "liger": "sigmoid"},
    about="""-log σ(β h) on pairs from statistical rejection sampling; β is the paper's γ.

The sampler has a β of its own (0.5): it is another number.""",
)
derive(
    "dpo_norm",
    "dpo",
    title="Length-normalised DPO",
    paper="arXiv:2411.15124",
    equation="Sec. 4.3",
    defaults={"beta": 5.0},
    lengths="average",
    aliases={"trl": "sigmoid_norm"},
    about="""-log σ(β (a/|w| - b/|l|)) with the log-ratios a and b per token.

The default β (Tulu 3's) is not verified; TRL's is 0.1. RSO's "sigmoid-norm" is plain DPO: another method.""",
)


@register(
    "pairwise",
    title="Conservative DPO, each pair with its ε",
    paper="E. Mitchell, A note on DPO with noisy preferences (2023)",
    equation="Eq. 3",
    domains={"beta": POSITIVE},
    theory="property",
    public=False,
)
def cdpo_each(pair: Pair, label_smoothing: Tensor, *, beta: float = 0.1) -> Tensor:
    """-(1-ε) log σ(βh) - ε log σ(-βh) with one ε per pair."""
    z = beta * pair.margin
    flipped = torch.where(label_smoothing > 0, label_smoothing * F.logsigmoid(-z), 0)
    return -(1 - label_smoothing) * F.logsigmoid(z) - flipped


def _soft_label(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    # ε = 1 - p with p = σ(r1 - r2)
    return sides, (torch.sigmoid(given["rejected_win_rate"] - given["chosen_win_rate"]),)


derive(
    "dno",
    "cdpo_each",
    title="Direct Nash Optimization",
    paper="arXiv:2404.03715",
    equation="Eq. 8 and 12",
    theory="step",
    online=True,
    inputs=(
        Input("chosen_win_rate", "the first response's probability to be preferred to a sample", PROBABILITY),
        Input("rejected_win_rate", "the same of the second", PROBABILITY),
    ),
    prepare=_soft_label,
    about="""-p log σ(βh) - (1-p) log σ(-βh) with p = σ(r1 - r2): cDPO whose ε comes from win rates.

r are the win rates against the previous iterate, which is the reference. β is the paper's η, without a published value.
The names chosen and rejected only tell the two responses apart.""",
)


def _visits(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    won, lost = given["chosen_visits"], given["rejected_visits"]
    return sides, ((lost / (won.clamp(min=1) + lost)).clamp(max=0.5),)


derive(
    "mcts_dpo",
    "cdpo_each",
    title="MCTS-DPO",
    paper="arXiv:2405.00451",
    equation="the loss with α",
    theory="gibbs",
    inputs=(
        Input("chosen_visits", "visits of the chosen step in the search tree", NOT_NEGATIVE),
        Input("rejected_visits", "visits of the rejected step", NOT_NEGATIVE),
    ),
    prepare=_visits,
    about="""-(1-ε) log σ(βh) - ε log σ(-βh) with ε = N_l / (N_w + N_l) from the visits of both steps, at most 1/2.

Where N_w is 0 it counts as 1, as in the official code. The log-probs begin at the first token in which the steps
differ. Its optimum is π_ref N^(1/β) where the winner is the one with more visits.""",
)


@register(
    "pairwise",
    title="SLiC-HF",
    paper="arXiv:2305.10425",
    equation="calibration and regularisation loss",
    domains={"delta": POSITIVE, "lambda_": NOT_NEGATIVE},
    theory="property",
    reference_model=False,
    fixed={"beta": 1.0},
    aliases={"trl": "CPOTrainer, hinge (its NLL is a token mean)"},
)
def slic(pair: Pair, *, delta: float = 1.0, lambda_: float = 0.5, beta: float = 1.0) -> Tensor:
    """max(0, δ - log π(y_w) + log π(y_l)) - λ log π(y_w), on sums, without a reference model.

    The SFT target is the chosen response; for another one take λ = 0 and add its term. The defaults are not verified
    (HALOs: λ = 0.1).
    """
    return torch.relu(delta - beta * (pair.chosen - pair.rejected)) - lambda_ * pair.chosen


derive(
    "rso_hinge",
    "slic",
    title="RSO hinge",
    paper="arXiv:2309.06657",
    equation="Eq. 9",
    domains={"beta": POSITIVE},
    defaults={"beta": 0.05},
    fixed={"delta": 1.0, "lambda_": 0.0},
    about="""max(0, 1 - β (log π(y_w) - log π(y_l))): SLiC's calibration with δ = 1/β, times β. β is the paper's γ.

`hinge` is the form with a reference model.""",
)


@register(
    "pairwise",
    title="Self-Play Preference Optimization",
    paper="arXiv:2405.00675",
    equation="Eq. 4.7",
    domains={"beta": POSITIVE},
    theory="step",
    online=True,
    inputs=(
        Input("chosen_win_rate", "the chosen response's probability to be preferred to a sample", PROBABILITY),
        Input("rejected_win_rate", "the same of the rejected one", PROBABILITY),
    ),
)
def sppo(pair: Pair, chosen_win_rate: Tensor, rejected_win_rate: Tensor, *, beta: float = 0.001) -> Tensor:
    """((a - (P_w - ½)/β)² + (b - (P_l - ½)/β)²) / 2, a and b the log-ratios to the last iterate.

    β is 1/η; the ½ is that of the official code. At P = 1 the target is 500 nats: clip gradients.
    """
    first = pair.chosen_logratio - (chosen_win_rate - 0.5) / beta
    second = pair.rejected_logratio - (rejected_win_rate - 0.5) / beta
    return 0.5 * (first**2 + second**2)


@register(
    "pairwise",
    title="SPPO with hard labels",
    paper="arXiv:2405.00675",
    equation="Eq. 4.7 with P = 1 and 0, as TRL and Liger have it",
    domains={"beta": POSITIVE},
    theory="step",
    online=True,
    aliases={"trl": "sppo_hard", "liger": "sppo_hard"},
)
def sppo_hard(pair: Pair, *, beta: float = 0.001) -> Tensor:
    """(a - 1/(2β))² + (b + 1/(2β))²: twice `sppo` at the win rates 1 and 0, which is the peers' convention."""
    return (pair.chosen_logratio - 0.5 / beta) ** 2 + (pair.rejected_logratio + 0.5 / beta) ** 2


def _step_not_longer(hyper: Mapping[str, float]) -> str | None:
    return (
        f"beta must be at most eta, got {hyper['beta']:g} and {hyper['eta']:g}"
        if hyper["beta"] > hyper["eta"]
        else None
    )


@register(
    "pairwise",
    title="Iterative Nash Policy Optimization",
    paper="arXiv:2407.00617",
    equation="Eq. 8",
    domains={"beta": NOT_NEGATIVE, "eta": POSITIVE},
    theory="step",
    previous_model=True,
    online=True,
    joint=_step_not_longer,
)
def inpo(pair: Pair, *, beta: float = 0.0025, eta: float = 0.0075) -> Tensor:
    """(H - 1/(2η))² with H = (β/η) h + (1 - β/η) h_t, h_t the margin of log-ratios to the last iterate.

    β is the paper's τ, η its step; β = η is IPO. The defaults are those of the MNPO code. Whether the authors' runs
    average over tokens is not verified.
    """
    assert pair.chosen_step is not None and pair.rejected_step is not None
    share = beta / eta
    margin = share * pair.margin + (1 - share) * (pair.chosen_step - pair.rejected_step)
    return (margin - 1 / (2 * eta)) ** 2


_REWARDS = (
    Input("chosen_reward", "the first sample's reward"),
    Input("rejected_reward", "the second's; neither need be the better one"),
)


def _reward_gap(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    return sides, (given["chosen_reward"] - given["rejected_reward"],)


@register(
    "pairwise",
    title="Contrastive Policy Gradient",
    paper="arXiv:2406.19185",
    equation="the pair loss; its factor is not verified",
    domains={"beta": POSITIVE},
    theory="gibbs",
    inputs=_REWARDS,
    prepare=_reward_gap,
)
def copg(pair: Pair, reward_gap: Tensor, *, beta: float = 0.1) -> Tensor:
    """(R - R' - β h)² / (2β): both samples' rewards, regularised by β times the log-ratio, shall be equal.

    The samples may be of any policy. With this factor the gradient by log π(y) is minus the gap of regularised rewards.
    """
    return (reward_gap - beta * pair.margin) ** 2 / (2 * beta)


def _shaped(pair: Pair, gap: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios to the sampling policy, and the gap of the rewards less β times its log-ratios to the reference."""
    first, second = pair.chosen_step, pair.rejected_step
    assert first is not None and second is not None
    shape = (pair.chosen_logratio - first) - (pair.rejected_logratio - second)
    return first, second, gap - beta * shape.detach()


@register(
    "pairwise",
    title="Pairwise Proximal Policy Optimization",
    paper="arXiv:2310.00212",
    equation="Theorem 1 and Section 4; ε and the exact clip are not verified",
    domains={"beta": NOT_NEGATIVE, "epsilon": Domain(0.0, 1.0)},
    theory="gibbs",
    previous_model=True,
    online=True,
    inputs=_REWARDS,
    prepare=_reward_gap,
    options={"clipping": ("separate", "joint")},
    variants={("separate",): Variant("p3o"), ("joint",): Variant("p3o_joint")},
)
def p3o(pair: Pair, reward_gap: Tensor, *, beta: float = 0.1, epsilon: float = 0.2) -> Tensor:
    """-½ Σ_i min(g_i sg[ρ_j] ρ_i, g_i sg[ρ_j] clip(ρ_i, 1 ± ε)), g_i the gap of sample i's reward to that of j.

    The samples are of the previous iterate; ρ_i is the sequence's ratio to it, cut at e^±20, and rewards are less β
    times its log-ratio to the reference. `clipping="joint"` clips Δ = log ρ_1 - log ρ_2 to ±ε in
    -½ min(g sg[ρ_1 ρ_2] Δ, g sg[ρ_1 ρ_2] clip(Δ)). Adding a constant to both rewards changes nothing.
    """
    first, second, gap = _shaped(pair, reward_gap, beta)
    total = torch.zeros_like(gap)
    for own, other, g in ((first, second, gap), (second, first, -gap)):
        ratio, weight = own.clamp(-20, 20).exp(), g * other.detach().clamp(-20, 20).exp()
        total = total - 0.5 * torch.minimum(weight * ratio, weight * ratio.clamp(1 - epsilon, 1 + epsilon))
    return total


@register(
    "pairwise",
    title="P3O, clipped jointly",
    paper="arXiv:2310.00212",
    equation="Section 4",
    domains={"beta": NOT_NEGATIVE, "epsilon": Domain(0.0, 1.0)},
    theory="gibbs",
    previous_model=True,
    online=True,
    inputs=_REWARDS,
    prepare=_reward_gap,
    public=False,
)
def p3o_joint(pair: Pair, reward_gap: Tensor, *, beta: float = 0.1, epsilon: float = 0.2) -> Tensor:
    first, second, gap = _shaped(pair, reward_gap, beta)
    margin, weight = first - second, gap * (first.clamp(-20, 20).exp() * second.clamp(-20, 20).exp()).detach()
    return -0.5 * torch.minimum(weight * margin, weight * margin.clamp(-epsilon, epsilon))


@register(
    "pairwise",
    title="Exploratory Preference Optimization",
    paper="arXiv:2405.21046",
    equation="Alg. 1",
    domains={"beta": POSITIVE, "alpha": NOT_NEGATIVE},
    theory="property",
    online=True,
    inputs=(
        Input("chosen_is_reference", "True where the chosen response is the reference model's sample", boolean=True),
    ),
    aliases={"trl": "XPOTrainer, sigmoid"},
)
def xpo(pair: Pair, chosen_is_reference: Tensor, *, beta: float = 0.1, alpha: float = 1e-5) -> Tensor:
    """-log σ(βh) + α log π(y~), y~ the response that the reference model sampled, whoever won.

    The bonus pushes the reference's sample down. α = 0 is online DPO. The paper gives α no number: this is TRL's. The
    statement of the algorithm is not verified; the loss is TRL's.
    """
    sampled = torch.where(chosen_is_reference > 0.5, pair.chosen, pair.rejected)
    return -F.logsigmoid(beta * pair.margin) + alpha * sampled


@register(
    "pairwise",
    title="RPO (DPO + SFT), cumulative form",
    paper="arXiv:2405.16436",
    equation="Sec. 5",
    domains={"beta": POSITIVE, "eta": NOT_NEGATIVE},
    theory="property",
    lengths="count",
    options={"sft": ("cumulative", "average")},
    variants={
        ("cumulative",): Variant("rpo_cumulative"),
        ("average",): Variant("iterative_rpo", hyper=lambda h: {"beta": h["beta"], "alpha": h["eta"]}),
    },
)
def rpo(pair: Pair, *, beta: float = 0.01, eta: float = 0.005) -> Tensor:
    """-log σ(βh) - ηβ log π(y_w); with sft="average", -log σ(βh) - η log π(y_w) / |w| (App. F).

    The defaults are those of the cumulative form; the average form's are η = 0.2 and β = 0.5 (gemma). TRL's "sft" is
    the mean over all tokens of the batch: neither form. TRL's old `rpo_alpha` is `iterative_rpo`.
    """
    return -F.logsigmoid(beta * pair.margin) - eta * beta * pair.chosen


derive("rpo_cumulative", "rpo", lengths="none", public=False)


@register(
    "pairwise",
    title="Iterative RPO",
    paper="arXiv:2404.19733",
    equation="Eq. 1",
    domains={"beta": POSITIVE, "alpha": NOT_NEGATIVE},
    theory="property",
    lengths="count",
    aliases={"trl": "['sigmoid', 'sft'] (its NLL is a mean over the batch's tokens)"},
)
def iterative_rpo(pair: Pair, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """-log σ(βh) - α log π(y_w) / |w|: DPO and the NLL of the chosen response per token.

    The normaliser is not verified.
    """
    assert pair.chosen_length is not None
    return -F.logsigmoid(beta * pair.margin) - alpha * pair.chosen / pair.chosen_length


def _bounded_exp(x: Tensor) -> Tensor:
    return torch.exp(x.clamp(max=80.0))


@register(
    "pairwise",
    title="f-DPO with the forward KL",
    paper="arXiv:2309.16240",
    equation="definition of L_f",
    domains={"beta": POSITIVE},
    theory="gibbs",
    public=False,
)
def forward_kl_dpo(pair: Pair, *, beta: float = 0.1) -> Tensor:
    """-log σ(β (g(a) - g(b))) with g(x) = -e^-x."""
    return -F.logsigmoid(beta * (_bounded_exp(-pair.rejected_logratio) - _bounded_exp(-pair.chosen_logratio)))


@register(
    "pairwise",
    title="f-DPO with the Jensen-Shannon divergence",
    paper="arXiv:2309.16240",
    equation="definition of L_f",
    domains={"beta": POSITIVE},
    theory="gibbs",
    public=False,
)
def jsd_dpo(pair: Pair, *, beta: float = 0.1) -> Tensor:
    """-log σ(β (g(a) - g(b))) with g(x) = log 2 + log σ(x)."""
    return -F.logsigmoid(beta * (F.logsigmoid(pair.chosen_logratio) - F.logsigmoid(pair.rejected_logratio)))


@register(
    "pairwise",
    title="f-DPO with an α-divergence",
    paper="arXiv:2309.16240",
    equation="definition of L_f",
    domains={"beta": POSITIVE, "alpha": Domain(0.0, 1.0, low_open=True, high_open=True)},
    theory="gibbs",
    public=False,
)
def alpha_dpo_divergence(pair: Pair, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """-log σ(β (g(a) - g(b))) with g(x) = -e^(-αx) / α."""
    a, b = _bounded_exp(-alpha * pair.chosen_logratio), _bounded_exp(-alpha * pair.rejected_logratio)
    return -F.logsigmoid(beta / alpha * (b - a))


def _without_alpha(hyper: dict[str, float]) -> dict[str, float]:
    return {"beta": hyper["beta"]}


def _trl_alpha(hyper: dict[str, float]) -> dict[str, float]:
    return {"beta": hyper["beta"], "alpha": 1 - hyper["alpha"]}


derive(
    "f_dpo",
    "alpha_dpo_divergence",
    title="f-DPO",
    options={"divergence": ("reverse_kl", "forward_kl", "jsd", "alpha"), "convention": (None, "trl")},
    variants={
        **{("reverse_kl", c): Variant("dpo", hyper=_without_alpha) for c in (None, "trl")},
        **{("forward_kl", c): Variant("forward_kl_dpo", hyper=_without_alpha) for c in (None, "trl")},
        **{("jsd", c): Variant("jsd_dpo", hyper=_without_alpha) for c in (None, "trl")},
        ("alpha", None): Variant("alpha_dpo_divergence"),
        ("alpha", "trl"): Variant("alpha_dpo_divergence", hyper=_trl_alpha),
    },
    aliases={"trl": "sigmoid with f_divergence_type"},
    about="""-log σ(β (g(a) - g(b))), g(x) = f'(e^x), for the divergence D_f in place of the reverse KL.

divergence="reverse_kl" is DPO, g(x) = x; "forward_kl" -e^-x; "jsd" log 2 + log σ(x); "alpha" -e^(-αx)/α, whose limits
are the reverse KL at α = 0 and the forward KL at 1. Exponents stop at 80, beyond which the gradient is 0; where both
sides are there, the loss is log 2. α is that of "alpha" alone; convention="trl" reads it as TRL does, 1 - α. The
formulas are the official code's.""",
)


@register(
    "pairwise",
    title="χPO",
    paper="arXiv:2407.13399",
    equation="not verified",
    domains={"beta": POSITIVE, "r_max": Domain(0.0, low_open=True, infinite=True)},
    theory="gibbs",
)
def chi_po(pair: Pair, *, beta: float = 0.1, r_max: float = math.inf) -> Tensor:
    """-log σ(clip(β (φ(a) - φ(b)), -2R, 2R)) with φ(x) = e^x + x, the mixed χ² and KL divergence.

    R is `r_max`; inf, the default, does not clip. Exponents stop at 80, as in `f_dpo`. Formula and source are not
    verified.
    """
    a, b = (_bounded_exp(x) + x for x in (pair.chosen_logratio, pair.rejected_logratio))
    return -F.logsigmoid((beta * (a - b)).clamp(-2 * r_max, 2 * r_max))


@register(
    "pairwise",
    title="Noise Contrastive Alignment on pairs",
    paper="arXiv:2402.05369",
    equation="the NCA loss for K = 2",
    domains={"beta": POSITIVE},
    theory="gibbs",
    aliases={"trl": "nca_pair", "liger": "nca_pair"},
)
def nca_pair(pair: Pair, *, beta: float = 0.01) -> Tensor:
    """-log σ(βa) - ½ log σ(-βa) - ½ log σ(-βb). Pairs that are equal still have a gradient."""
    a, b = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    return -F.logsigmoid(a) - 0.5 * (F.logsigmoid(-a) + F.logsigmoid(-b))


@register(
    "pairwise",
    title="Efficient Exact Optimization on pairs",
    paper="arXiv:2402.00856",
    equation="Eq. 16",
    domains={"beta": POSITIVE, "label_smoothing": Domain(0.0, 0.5, low_open=True, high_open=True)},
    theory="property",
    aliases={"trl": "exo_pair", "liger": "exo_pair"},
)
def exo_pair(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """KL of (σ(βh), σ(-βh)) to the smoothed label (1-ε, ε): a reverse KL.

    Zero at βh = log((1-ε)/ε). Its gradient vanishes for large margins of either sign: badly ranked pairs stay so. The
    official code has ε = e^-10.
    """
    z, smoothing = beta * pair.margin, pair.margin.new_tensor(label_smoothing)
    log_p, log_q = F.logsigmoid(z), F.logsigmoid(-z)
    return torch.sigmoid(z) * (log_p - torch.log(1 - smoothing)) + torch.sigmoid(-z) * (log_q - torch.log(smoothing))


@register(
    "pairwise",
    title="APO-zero",
    paper="arXiv:2408.06266",
    equation="Eq. 7",
    domains={"beta": POSITIVE},
    theory="property",
    aliases={"trl": "apo_zero", "liger": "apo_zero"},
)
def apo_zero(pair: Pair, *, beta: float = 0.1) -> Tensor:
    """1 - σ(βa) + σ(βb): chosen responses up, rejected ones down. The 1 is TRL's; the paper leaves it out."""
    return torch.sigmoid(-beta * pair.chosen_logratio) + torch.sigmoid(beta * pair.rejected_logratio)


@register(
    "pairwise",
    title="APO-down",
    paper="arXiv:2408.06266",
    equation="Eq. 8",
    domains={"beta": POSITIVE},
    theory="property",
    aliases={"trl": "apo_down", "liger": "apo_down"},
)
def apo_down(pair: Pair, *, beta: float = 0.1) -> Tensor:
    """σ(βa) + 1 - σ(βh): both responses down, the rejected one further. At the reference the chosen gradient is 0."""
    return torch.sigmoid(beta * pair.chosen_logratio) + torch.sigmoid(-beta * pair.margin)


@register(
    "pairwise",
    title="Binary Classifier Optimization on pairs",
    paper="arXiv:2404.04656",
    equation="definition of L_BCO",
    domains={"beta": POSITIVE},
    theory="property",
    inputs=(Input("delta", "the reward shift; 0 is TRL's and Liger's bco_pair (see `bco_delta`)", shared=True),),
    aliases={"trl": "bco_pair (with delta = 0)", "liger": "bco_pair (with delta = 0)"},
)
def bco_pair(pair: Pair, delta: Tensor, *, beta: float = 0.1) -> Tensor:
    """-log σ(βa - δ) - log σ(-(βb - δ)): a binary classifier of the shifted rewards."""
    a, b = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    return -F.logsigmoid(a - delta) - F.logsigmoid(delta - b)


@register(
    "pairwise",
    title="DPO with an offset per pair",
    paper="arXiv:2402.10571",
    equation="the loss with an offset",
    domains={"beta": POSITIVE, "label_smoothing": SMOOTHING},
    theory="property",
    public=False,
)
def offset_dpo(pair: Pair, offset: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-(1-ε) log σ(βh + offset) - ε log σ(-(βh + offset))."""
    z = beta * pair.margin + offset
    return -(1 - label_smoothing) * F.logsigmoid(z) - _flipped(z, label_smoothing)


def _log_gap(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    return sides, (-hyper["alpha"] * (given["chosen_score"] - given["rejected_score"]).log(),)


def _gap(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    return sides, (-hyper["alpha"] * (given["chosen_score"] - given["rejected_score"]),)


def _log_ratio(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    return sides, (-hyper["alpha"] * (given["chosen_score"].log() - given["rejected_score"].log()),)


def _ordered(given: Given) -> str | None:
    if not (given["chosen_score"] > given["rejected_score"]).all():
        return "chosen_score must be above rejected_score in every pair"
    return None


def _positive_scores(given: Given) -> str | None:
    if not (torch.minimum(given["chosen_score"], given["rejected_score"]) > 0).all():
        return "chosen_score and rejected_score must be positive for offset='log_ratio'"
    return None


_odpo: dict[str, Any] = {
    "domains": {"beta": POSITIVE, "alpha": NOT_NEGATIVE},
    "defaults": {"alpha": 1.0},
    "fixed": {"label_smoothing": 0.0},
    "hyper": lambda h: {"beta": h["beta"]},
    "inputs": (
        Input("chosen_score", "the chosen response's score"),
        Input("rejected_score", "the rejected one's"),
    ),
    "title": "DPO with an offset",
    "equation": "definition of L_ODPO",
}
derive("odpo_identity", "offset_dpo", prepare=_gap, public=False, theory="gibbs", **_odpo)
derive("odpo_log_ratio", "offset_dpo", prepare=_log_ratio, check=_positive_scores, public=False, **_odpo)
derive(
    "odpo",
    "offset_dpo",
    prepare=_log_gap,
    check=_ordered,
    options={"offset": ("log", "identity", "log_ratio")},
    variants={
        ("log",): Variant("odpo"),
        ("identity",): Variant("odpo_identity"),
        ("log_ratio",): Variant("odpo_log_ratio"),
    },
    about="""-log σ(βh - α f(s_w - s_l)): a pair is to be as far apart as its scores say.

f is log with offset="log", the official choice, negative for gaps below 1; the gap itself with "identity"; and
log(s_w / s_l) with "log_ratio". Under "log" scores that do not rank the chosen response first are an error.""",
    **_odpo,
)


def _margin(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    if "margin" in given:
        return sides, (-given["margin"],)
    return sides, (torch.full((), -hyper["margin"], dtype=torch.float64, device=sides[0].policy.device),)


derive(
    "bradley_terry",
    "offset_dpo",
    title="Bradley-Terry reward model",
    paper="R. A. Bradley, M. E. Terry, Biometrika 39 (1952)",
    equation="the log-likelihood of the choice; the margin is arXiv:2307.09288's",
    domains={"margin": NOT_NEGATIVE},
    defaults={"margin": 0.0},
    fixed={"beta": 1.0, "label_smoothing": 0.0},
    hyper=lambda h: {},
    prepare=_margin,
    per_row={"margin": "bradley_terry"},
    theory="gibbs",
    reference_model=False,
    scores="reward",
    aliases={"trl": "RewardTrainer"},
    about="""-log σ(r_w - r_l - m) of the scores of a reward model: without m the negative log-likelihood of the choice.

m is Llama 2's margin, larger for responses that are more different; one number, or one per pair. With a margin the
scores are no longer those of the Bradley-Terry model, also where it is the same for all pairs.""",
)


def _gamma(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    return sides, (torch.full((), -hyper["gamma"], dtype=torch.float64, device=sides[0].policy.device),)


derive(
    "autoregressive_reward",
    "offset_dpo",
    title="GenARM's autoregressive reward model",
    paper="arXiv:2410.08193",
    equation="the loss of its official code",
    domains={"beta": POSITIVE, "gamma": ANY, "label_smoothing": SMOOTHING},
    defaults={"beta": 0.05, "gamma": 0.0},
    hyper=lambda h: {"beta": h["beta"], "label_smoothing": h["label_smoothing"]},
    prepare=_gamma,
    theory="gibbs",
    reference_model=False,
    about="""-(1-ε) log σ(z) - ε log σ(-z), z = β (log π_r(y_w) - log π_r(y_l)) - γ: a language model as reward.

Its reward is log π_r(y|x), one part of it at each token; a policy is guided by adding a multiple of them to its own
log-probs. DPO without a reference model: nothing keeps the log-probs from falling together. γ is 0 and β 0.05 in the
official script, which also knows averages in place of the sums and does not use them.""",
)


def _sums(side: Side) -> tuple[Tensor, Tensor]:
    """log-probs under the policy and the reference, constants."""
    assert side.reference is not None
    return side.sums()[0].detach(), side._replace(policy=side.reference).sums()[0].detach()


def _matched(sides: Sides, given: Given, hyper: Hyper, group: Group = None) -> Prepared:
    (policy_w, reference_w), (policy_l, reference_l) = map(_sums, sides)
    margins, first = gathered(torch.stack([policy_w - policy_l, reference_w - reference_l], 1), group)
    policy, reference = margins.unbind(1)
    ours = slice(first, first + len(policy_w))
    # the reference's margin of the same rank takes the place of its own
    rank = policy.argsort(stable=True).argsort()[ours]
    return sides, (hyper["beta"] * (reference[ours] - reference.sort().values[rank]),)


derive(
    "aot",
    "offset_dpo",
    title="Alignment via Optimal Transport, paired",
    paper="arXiv:2406.05882",
    equation="the paired loss",
    defaults={"beta": 0.01},
    prepare=_matched,
    coupled=True,
    aliases={"trl": "aot"},
    about="""-(1-ε) log σ(β d) - ε log σ(-β d), d the difference of the i-th smallest policy and reference margins.

The margins log π(y_w) - log π(y_l) of the batch are sorted, and so are the reference's: the cost of the optimal
transport between them. The batch is what one call sees, or with process_group all ranks' calls: the method wants the
global one.""",
)


def _rematched(sides: Sides, given: Given, hyper: Hyper, group: Group = None) -> Prepared:
    chosen, rejected = sides
    (policy_w, reference_w), (_, reference_l) = map(_sums, sides)
    ratio, first = gathered(policy_w - reference_w, group)
    rank = ratio.argsort(stable=True).argsort()[first : first + len(policy_w)]
    # a partner's gradient goes to the rank that has it
    policy_l, reference_l = (gathered(t, group)[0] for t in (rejected.sums()[0], reference_l))
    partner = (policy_l.detach() - reference_l).argsort(stable=True)[rank]
    return (chosen, Side(policy_l[partner], reference_l[partner])), ()


derive(
    "aot_unpaired",
    "cdpo",
    title="Alignment via Optimal Transport, unpaired",
    paper="arXiv:2406.05882",
    equation="the unpaired loss",
    defaults={"beta": 0.01},
    prepare=_rematched,
    coupled=True,
    aliases={"trl": "aot_unpaired"},
    about="""-(1-ε) log σ(β d) - ε log σ(-β d), d the i-th smallest chosen minus the i-th smallest rejected log-ratio.

Chosen and rejected responses need not belong together, but are as many. Each chosen one is compared with the rejected
one of its rank, whose reward stands at its place in rejected_rewards. The batch is what one call sees, or with
process_group all ranks' calls; the backward then communicates too, so that every rank must run it.""",
)


@register(
    "pairwise",
    title="DiscoPOP (log-ratio modulated loss)",
    paper="arXiv:2406.08414",
    equation="Eq. 5",
    domains={"beta": POSITIVE, "tau": POSITIVE},
    theory="property",
    aliases={"trl": "discopop", "liger": "discopop"},
)
def discopop(pair: Pair, *, beta: float = 0.05, tau: float = 0.05) -> Tensor:
    """(1-m) softplus(-z) + m e^-z with z = βh and m = σ(z/τ). Not convex: stationary for a range around z = 0."""
    z = beta * pair.margin
    # m e^-z in one exponent: apart, they are 0 and inf
    return torch.sigmoid(-z / tau) * -F.logsigmoid(z) + torch.exp(F.logsigmoid(z / tau) - z)


@register(
    "pairwise",
    title="Flex-DPO",
    paper="arXiv:2406.07327",
    equation="Sec. 3.3",
    domains={"beta": POSITIVE, "beta_rejected": NOT_NEGATIVE},
    theory="property",
)
def flex_dpo(pair: Pair, *, beta: float = 0.1, beta_rejected: float = 0.08) -> Tensor:
    """-log σ(β₊ a - β₋ b): a smaller β₋ keeps the rejected responses from falling. The loss line is not verified."""
    return -F.logsigmoid(beta * pair.chosen_logratio - beta_rejected * pair.rejected_logratio)


derive(
    "dpo_shift",
    "flex_dpo",
    title="DPO-Shift",
    paper="arXiv:2502.07599",
    equation="not verified",
    domains={"beta": POSITIVE, "lambda_": NOT_NEGATIVE},
    defaults={"lambda_": 0.75},
    hyper=lambda h: {"beta": h["beta"], "beta_rejected": h["lambda_"] * h["beta"]},
    about="""-log σ(βa - λβb): `flex_dpo` with β₋ = λβ; λ = 1 is DPO. Formula and the default of λ are not verified.""",
)


@register(
    "pairwise",
    title="Cal-DPO",
    paper="arXiv:2412.14516",
    equation="the official code",
    domains={"beta": POSITIVE, "lambda_": NOT_NEGATIVE},
    theory="property",
    lengths="optional",
)
def cal_dpo(pair: Pair, *, beta: float = 0.001, lambda_: float = 0.5) -> Tensor:
    """-log σ(h) + λ ((a - 1/(2β))² + (b + 1/(2β))²). There is no β inside the σ.

    λ = 0.5 is the official code's; the paper's constant is not verified. `length_norm=True` is "Cal-DPO-average".
    """
    a, b = pair.chosen_logratio, pair.rejected_logratio
    return -F.logsigmoid(pair.margin) + lambda_ * ((a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2)


@register(
    "pairwise",
    title="Online IPO",
    paper="arXiv:2403.08635",
    equation="Eq. 11",
    domains={"beta": POSITIVE},
    theory="selfplay",
    online=True,
    inputs=(Input("win_probability", "p(chosen preferred to rejected), 0 or 1 for a hard label", PROBABILITY),),
    aliases={"trl": "OnlineDPOTrainer, ipo (hard labels)"},
)
def online_ipo(pair: Pair, win_probability: Tensor, *, beta: float = 1.0) -> Tensor:
    """p (h - 1/(2β))² + (1-p) (h + 1/(2β))² on two samples of the policy; β is the paper's τ."""
    p, target = win_probability, 0.5 / beta
    return p * (pair.margin - target) ** 2 + (1 - p) * (pair.margin + target) ** 2


derive(
    "ipo_md",
    "online_ipo",
    title="IPO-MD",
    equation="Sec. 5",
    about="""p (h - 1/(2β))² + (1-p) (h + 1/(2β))² on two samples of the mixture of policy and reference.

`online_ipo` on other data: the loss is evaluated with the policy, not with the mixture, whose coefficient (0.125) is
the sampler's.""",
)


def _log_base(pair: Pair) -> Tensor:
    """log base(y) - log base(y')."""
    return ((pair.chosen - pair.chosen_logratio) - (pair.rejected - pair.rejected_logratio)).detach()


@register(
    "pairwise",
    title="Sharpening, RLHF form",
    paper="arXiv:2412.01951",
    equation="Eq. 8",
    domains={"beta": POSITIVE},
    theory="gibbs",
)
def sharpening_rebel(pair: Pair, *, beta: float = 0.1) -> Tensor:
    """(βh - (log base(y) - log base(y')))²: regression on the base model's own log-probs; the base is the reference.

    Symmetric in the two responses, which are samples of the base. Optimum: base^(1 + 1/β). β has no published value.
    """
    return (beta * pair.margin - _log_base(pair)) ** 2


@register(
    "pairwise",
    title="Sharpening, XPO form",
    paper="arXiv:2412.01951",
    equation="App. J.2, Alg. 1",
    domains={"beta": POSITIVE, "alpha": NOT_NEGATIVE},
    theory="property",
    online=True,
)
def sharpening_xpo(pair: Pair, *, beta: float = 0.1, alpha: float = 1e-5) -> Tensor:
    """α log π(y') + (βh - (log base(y) - log base(y')))², y' (the rejected side) a sample of the base.

    The algorithm prints a minus before the square; its proof has the plus. Neither number has a published value.
    """
    return alpha * pair.rejected + (beta * pair.margin - _log_base(pair)) ** 2


@register(
    "pairwise",
    title="DPO-Positive (Smaug)",
    paper="arXiv:2402.13228",
    equation="Eq. 3",
    domains={"beta": POSITIVE, "lambda_": NOT_NEGATIVE},
    theory="property",
)
def dpop(pair: Pair, *, beta: float = 0.3, lambda_: float = 50.0) -> Tensor:
    """-log σ(β (h - λ max(0, -a))): a penalty where the chosen response falls below the reference, inside the σ.

    At the reference its subgradient is 0. The defaults are not verified.
    """
    return -F.logsigmoid(beta * (pair.margin - lambda_ * torch.relu(-pair.chosen_logratio)))


@register(
    "pairwise",
    title="DPO, each pair with its β and its weight",
    paper="arXiv:2305.18290",
    equation="Eq. 7",
    domains={"beta": POSITIVE},
    theory="property",
    public=False,
)
def dpo_each(pair: Pair, scale: Tensor, weight: Tensor, *, beta: float = 0.1) -> Tensor:
    """-weight log σ(scale h). `beta` is that of the rewards."""
    return -weight * F.logsigmoid(scale * pair.margin)


@register(
    "pairwise",
    title="IPO, each pair with its scale",
    paper="arXiv:2405.14953",
    equation="the official code",
    domains={"beta": POSITIVE},
    theory="property",
    public=False,
)
def ipo_each(pair: Pair, scale: Tensor, *, beta: float = 0.1) -> Tensor:
    """(scale h - 1/(2β))²."""
    return (scale * pair.margin - 1 / (2 * beta)) ** 2


def _batch_beta(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    return sides, (given["batch_beta"], given["keep"])


derive(
    "beta_dpo",
    "dpo_each",
    title="β-DPO",
    paper="arXiv:2407.08639",
    equation="the official code",
    inputs=(
        Input("batch_beta", "the batch's β, from `beta_dpo_statistics`", POSITIVE, shared=True),
        Input("keep", "which pairs the batch keeps, from `beta_dpo_statistics`", boolean=True),
    ),
    prepare=_batch_beta,
    about="""-log σ(β_batch h) for the pairs that are kept, 0 for the others: β follows the batch's margins.

`beta` is β₀, that of the rewards. `beta_dpo_statistics` computes both inputs; the mean over the kept pairs takes
num_items=keep.sum().""",
)


def _weights(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    logs = []
    for side, name in zip(sides, ("chosen_log_sum_p2", "rejected_log_sum_p2"), strict=True):
        policy, n = side.sums()
        expected, _ = side._replace(policy=given[name]).sums()
        assert n is not None
        logs.append((policy.detach() - expected) / n.clamp(min=1))
    weight = torch.exp(logs[0] + logs[1]).clamp(max=hyper["max_weight"])
    return sides, (weight.new_tensor(hyper["beta"]), weight)


derive(
    "wpo",
    "dpo_each",
    title="Weighted Preference Optimization",
    paper="arXiv:2406.11827",
    equation="Eq. 2",
    theory="gibbs",
    domains={"beta": POSITIVE, "max_weight": Domain(0.0, low_open=True, infinite=True)},
    defaults={"beta": 0.01, "max_weight": 1.0},
    hyper=lambda h: {"beta": h["beta"]},
    lengths="count",
    inputs=(
        Input("chosen_log_sum_p2", "log Σ_v p(v)² of the policy, laid out as policy_chosen (token_logprobs)", side=0),
        Input("rejected_log_sum_p2", "the same, laid out as policy_rejected", side=1),
    ),
    prepare=_weights,
    aliases={"trl": "sigmoid with use_weighting=True (its weights are not clamped)"},
    about="""w_w w_l (-log σ(βh)), w(y) = exp(mean over tokens of log p(y_t) - log Σ_v p(v)²), constant to the gradient.

The product is clamped at `max_weight`: 1 as in the official code; the paper's equation shows no clamp (inf).""",
)


def _dispersion(sides: Sides, given: Given, hyper: Hyper) -> Tensor:
    means = []
    for side, name in zip(sides, ("chosen_entropy", "rejected_entropy"), strict=True):
        total, n = side._replace(policy=given[name]).sums()
        assert n is not None
        means.append(total / n.clamp(min=1))
    # at 0 the dispersion is infinite, at 1 the pair is dead
    normalised = ((means[0] + means[1]) / 2).clamp(1e-6, 1 - 1e-6)
    return -hyper["dispersion"] * normalised.log()


def _mallows(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    scale = hyper["beta"] * _dispersion(sides, given, hyper)
    return sides, (scale, scale.new_ones(()))


def _mallows_ipo(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    return sides, (_dispersion(sides, given, hyper),)


_mallows_row: dict[str, Any] = {
    "domains": {"beta": POSITIVE, "dispersion": POSITIVE},
    "defaults": {"dispersion": 0.29},
    "hyper": lambda h: {"beta": h["beta"]},
    "lengths": "count",
    "inputs": (
        Input("chosen_entropy", "the reference's entropy / log(vocabulary), laid out as policy_chosen", ANY, side=0),
        Input("rejected_entropy", "the same, laid out as policy_rejected", ANY, side=1),
    ),
    "title": "MallowsPO",
    "paper": "arXiv:2405.14953",
    "equation": "the official code",
}
derive("mallows_po_ipo", "ipo_each", prepare=_mallows_ipo, public=False, **_mallows_row)
derive(
    "mallows_po",
    "dpo_each",
    prepare=_mallows,
    options={"loss": ("dpo", "ipo")},
    variants={("dpo",): Variant("mallows_po"), ("ipo",): Variant("mallows_po_ipo")},
    about="""-log σ(β d h), or with loss="ipo" (d h - 1/(2β))², d the dispersion of the prompt's responses.

d = -dispersion log(H), H the mean over tokens and both responses of the reference model's entropy over log V, clamped
to [1e-6, 1 - 1e-6].""",
    **_mallows_row,
)


@register(
    "pairwise",
    title="α-DPO",
    paper="arXiv:2410.10148",
    equation="the official code",
    domains={"beta": POSITIVE, "alpha": NOT_NEGATIVE, "gamma": NOT_NEGATIVE},
    theory="property",
    lengths="average",
    inputs=(
        Input("gap_mean", "mean of the gaps, from `alpha_dpo_statistics`", shared=True),
        Input("gap_std", "their standard deviation, from `alpha_dpo_statistics`", POSITIVE, shared=True),
    ),
)
def alpha_dpo(
    pair: Pair, gap_mean: Tensor, gap_std: Tensor, *, beta: float = 10.0, alpha: float = 0.1, gamma: float = 3.0
) -> Tensor:
    """-log σ(β (lw' - ll' - α ĝ) - γ) on averages, ĝ = (h' - mean)/std the standardised gap, constant to the gradient.

    The official code has the ratio γ/β (0.15 to 0.6) in place of γ, β 2.5 to 10, α 0.05 to 0.2, by model.
    """
    gap = ((pair.margin - gap_mean) / gap_std).detach()
    return -F.logsigmoid(beta * (pair.chosen - pair.rejected - alpha * gap) - gamma)


# without a reference model


@register(
    "pairwise",
    title="Simple Preference Optimization",
    paper="arXiv:2405.14734",
    equation="Eq. 6",
    domains={"beta": POSITIVE, "gamma": ANY},
    theory="gibbs",
    reference_model=False,
    lengths="average",
    aliases={"trl": "CPOTrainer, simpo (with cpo_alpha=0)", "liger": "simpo (with compute_nll_loss=False)"},
)
def simpo(pair: Pair, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """-log σ(β (lw' - ll') - γ), lw' and ll' the log-probs per token.

    By model β is 2 to 10 and γ/β 0.1 to 0.8; the official code takes that ratio. TRL's default β is 0.1.
    """
    return -F.logsigmoid(beta * (pair.chosen - pair.rejected) - gamma)


@register(
    "pairwise",
    title="AlphaPO",
    paper="arXiv:2501.03884",
    equation="the reward r_α",
    domains={"beta": POSITIVE, "alpha": POSITIVE, "gamma": ANY},
    theory="gibbs",
    reference_model=False,
    lengths="average",
    aliases={"trl": "CPOTrainer, alphapo"},
)
def alpha_po(pair: Pair, *, beta: float = 2.5, alpha: float = 0.25, gamma: float = 0.1) -> Tensor:
    """-log σ(β (r_w - r_l) - γ) with r = (1 - e^(-α x)) / α of the log-probs x per token; α → 0 is SimPO.

    Exponents stop at 80.
    """
    a, b = _bounded_exp(-alpha * pair.chosen), _bounded_exp(-alpha * pair.rejected)
    return -F.logsigmoid(beta / alpha * (b - a) - gamma)


@register(
    "pairwise",
    title="Contrastive Preference Optimization",
    paper="arXiv:2401.08417",
    equation="Eq. 3 to 5",
    domains={"beta": POSITIVE, "alpha": NOT_NEGATIVE},
    theory="property",
    reference_model=False,
    aliases={"trl": "CPOTrainer, sigmoid (its NLL is a token mean)", "liger": "cpo (its NLL is a token mean)"},
)
def cpo(pair: Pair, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """-log σ(β (log π(y_w) - log π(y_l))) - α log π(y_w), on sums. The numbers of the equations are not verified."""
    return -F.logsigmoid(beta * (pair.chosen - pair.rejected)) - alpha * pair.chosen


def _log_odds(x: Tensor) -> Tensor:
    x = x.clamp(max=-1e-6)
    near = x > -math.log(2)
    # each branch sees only what it is accurate for
    low, high = torch.where(near, x.new_tensor(-1.0), x), torch.where(near, x, x.new_tensor(-0.1))
    return x - torch.where(near, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low)))


@register(
    "pairwise",
    title="Odds Ratio Preference Optimization",
    paper="arXiv:2403.07691",
    equation="Eq. 6 and 7",
    domains={"lambda_": NOT_NEGATIVE},
    theory="property",
    reference_model=False,
    lengths="average",
    aliases={"trl": "ORPOTrainer (its NLL counts the prompt too)", "liger": "orpo"},
)
def orpo(pair: Pair, *, lambda_: float = 0.1) -> Tensor:
    """-lw' - λ log σ(log odds(e^lw') - log odds(e^ll')) with odds(p) = p/(1-p), on log-probs per token.

    The NLL is that of the completion. Log-probs beyond -1e-6 count as that in the odds.
    """
    return -pair.chosen - lambda_ * F.logsigmoid(_log_odds(pair.chosen) - _log_odds(pair.rejected))


@register(
    "pairwise",
    title="SimPER",
    paper="arXiv:2502.00883",
    equation="not verified",
    domains={},
    theory="property",
    reference_model=False,
    lengths="average",
)
def simper(pair: Pair) -> Tensor:
    """e^ll' - e^lw' of the log-probs per token: inverse perplexities. Formula and source are not verified."""
    return torch.exp(pair.rejected) - torch.exp(pair.chosen)


@register(
    "pairwise",
    title="RRHF on pairs",
    paper="arXiv:2304.05302",
    equation="not verified",
    domains={"alpha": NOT_NEGATIVE},
    theory="property",
    reference_model=False,
    lengths="count",
)
def rrhf(pair: Pair, *, alpha: float = 1.0) -> Tensor:
    """max(0, ll' - lw') - α log π(y_w): a ranking by log-probs per token, and the NLL (a sum). Not verified."""
    assert pair.chosen_length is not None and pair.rejected_length is not None
    ranking = torch.relu(pair.rejected / pair.rejected_length - pair.chosen / pair.chosen_length)
    return ranking - alpha * pair.chosen


@register(
    "pairwise",
    title="R-DPO (length-regularised DPO)",
    paper="arXiv:2403.19159",
    equation="the loss with a length term",
    domains={"beta": POSITIVE, "alpha": ANY},
    theory="gibbs",
    lengths="count",
)
def r_dpo(pair: Pair, *, beta: float = 0.1, alpha: float = 0.05) -> Tensor:
    """-log σ(βh + α (|w| - |l|)): the optimum for the reward r - α|y|, so α > 0 shortens. α is outside β.

    Some code has a minus. The default of α is not verified.
    """
    assert pair.chosen_length is not None and pair.rejected_length is not None
    return -F.logsigmoid(beta * pair.margin + alpha * (pair.chosen_length - pair.rejected_length))


# on tokens


def _wide(tokens: Tensor) -> Tensor:
    """At least fp32: what is computed from tokens is not rounded to their dtype."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def _tdpo1(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    chosen, rejected = sides
    return (
        chosen._replace(policy=_wide(chosen.policy) + given["chosen_kl"]),
        rejected._replace(policy=_wide(rejected.policy) + given["rejected_kl"]),
    ), ()


def _tdpo2(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    chosen, rejected = sides
    return (
        chosen._replace(policy=_wide(chosen.policy) + hyper["alpha"] * given["chosen_kl"].detach()),
        rejected._replace(policy=_wide(rejected.policy) + hyper["alpha"] * given["rejected_kl"]),
    ), ()


_tdpo_row: dict[str, Any] = {
    "domains": {"beta": POSITIVE, "alpha": NOT_NEGATIVE},
    "defaults": {"alpha": 0.5},
    "hyper": lambda h: {"beta": h["beta"]},
    "inputs": (
        Input("chosen_kl", "KL(ref ‖ π) at every token, laid out as policy_chosen", side=0, gradient=True),
        Input("rejected_kl", "the same, laid out as policy_rejected", side=1, gradient=True),
    ),
    "title": "Token-level DPO",
    "paper": "arXiv:2404.11999",
    "equation": "the official code",
}
derive("tdpo2", "dpo", prepare=_tdpo2, public=False, theory="property", **_tdpo_row)
derive(
    "tdpo",
    "dpo",
    prepare=_tdpo1,
    options={"version": ("tdpo1", "tdpo2")},
    variants={("tdpo1",): Variant("tdpo"), ("tdpo2",): Variant("tdpo2")},
    about="""-log σ(β (h - (D_l - D_w))), D(y) = Σ_t KL(ref ‖ π) at the tokens of y.

version="tdpo2" has α (D_l - sg D_w) in place of D_l - D_w; α is its alone. The divergences come per token and carry
their gradient. The rewards are β (log-ratio + D), or with αD.""",
    **_tdpo_row,
)


def _shortened(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    ranks, counts = zip(*(token_ranks(side) for side in sides), strict=True)
    shared = torch.minimum(*counts)
    out = []
    for side, (rank, row) in zip(sides, ranks, strict=True):
        assert side.reference is not None
        within = rank <= shared[row]
        models = _wide(side.policy), _wide(side.reference)
        policy, reference = (torch.where(within, values, hyper["alpha"] * values) for values in models)
        out.append(side._replace(policy=policy, reference=reference))
    return tuple(out), ()


derive(
    "ld_dpo",
    "dpo",
    title="Length-desensitised DPO",
    paper="arXiv:2409.06411",
    equation="TRL's ld_alpha",
    theory="property",
    domains={"beta": POSITIVE, "alpha": PROBABILITY},
    defaults={"alpha": 0.5},
    hyper=lambda h: {"beta": h["beta"]},
    tokens=True,
    prepare=_shortened,
    aliases={"trl": "sigmoid with ld_alpha"},
    about="""-log σ(βh) where the tokens behind the length of the shorter response count α, under both models.

α = 1 is DPO, α = 0 cuts the longer response. Log-probs come per token.""",
)


def _sampled(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    return tuple(
        side._replace(mask=given[name] > 0.5 if side.mask is None else side.mask & (given[name] > 0.5))
        for side, name in zip(sides, ("chosen_sample", "rejected_sample"), strict=True)
    ), ()


derive(
    "sampo",
    "dpo",
    title="Down-sampled DPO (SamPO)",
    paper="arXiv:2406.10957",
    equation="the loss on sampled tokens; not verified",
    theory="property",
    tokens=True,
    inputs=(
        Input("chosen_sample", "which tokens count, laid out as policy_chosen (`sampo_sample`)", boolean=True, side=0),
        Input("rejected_sample", "the same, laid out as policy_rejected", boolean=True, side=1),
    ),
    prepare=_sampled,
    about="""-log σ(βh) on as many tokens of the longer response as the shorter one has, drawn by `sampo_sample`.

The same tokens count under both models, as the paper has it; the official code draws them twice.""",
)


def pairwise_objective(
    row: Objective,
    chosen: Side,
    rejected: Side,
    hyper: Hyper,
    *,
    length_norm: bool = False,
    columns: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-pair loss (B,) and the detached rewards β · log-ratio of both sides, differentiated by torch.

    `hyper` are those of the row's formula; β is 1 for a row that has none. Rewards are averages only where the row is
    always on averages.
    """
    sums = [summed(chosen), summed(rejected)]
    taken = [per_token(side) for side in sums] if length_norm or row.lengths == "average" else sums
    # field by field: both policies, both log-ratios, ...
    pair = Pair(*(value for field in zip(*taken, strict=True) for value in field))
    loss = row.formula(pair, *(c.to(pair.chosen.dtype) for c in columns), **hyper)
    beta = hyper.get("beta", 1.0)
    rewards = [(beta * side.logratio).detach() for side in (taken if row.lengths == "average" else sums)]
    return loss, rewards[0], rewards[1]
