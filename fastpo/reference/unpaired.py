"""Objectives on single completions in plain torch: labelled desirable or not, or sampled from the policy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.reference.pairwise import Given, Hyper, Prepared, Sides
from fastpo.reference.registry import NOT_NEGATIVE, POSITIVE, PROBABILITY, Input, Objective, Variant, derive, register
from fastpo.reference.sequence import Side, summed


class Single(NamedTuple):
    """What a formula on single completions sees, each of shape (B,): sums, as in `Pair`."""

    policy: Tensor
    logratio: Tensor
    step: Tensor | None = None


LABELS = Input("labels", "True for a desirable completion, False for an undesirable one", boolean=True)


@register(
    "unpaired",
    title="Kahneman-Tversky Optimization",
    paper="arXiv:2402.01306",
    equation="Eq. 7",
    domains={"beta": POSITIVE, "lambda_desirable": NOT_NEGATIVE, "lambda_undesirable": NOT_NEGATIVE},
    theory="property",
    inputs=(LABELS, Input("kl", "the reference point z0, from `kto_kl`", NOT_NEGATIVE, shared=True)),
    aliases={"trl": "KTOTrainer, kto", "liger": "kto"},
)
def kto(
    row: Single,
    labels: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    lambda_desirable: float = 1.0,
    lambda_undesirable: float = 1.0,
) -> Tensor:
    """λ_D (1 - σ(β (r - z0))) for desirable completions, λ_U (1 - σ(β (z0 - r))) for undesirable ones.

    r is the log-ratio to the reference; no gradient goes through z0. Choose λ_D n_D / (λ_U n_U) in [1, 4/3].
    """
    x = beta * (row.logratio - kl)
    # 1 - σ(x) = σ(-x)
    return torch.where(labels > 0.5, lambda_desirable * torch.sigmoid(-x), lambda_undesirable * torch.sigmoid(x))


def _zero_point(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    return sides, (given["labels"], sides[0].policy.new_zeros(()).float())


derive(
    "apo_zero_unpaired",
    "kto",
    title="APO-zero on single completions",
    paper="arXiv:2408.06266",
    equation="Eq. 7",
    domains={"beta": POSITIVE},
    fixed={"lambda_desirable": 1.0, "lambda_undesirable": 1.0},
    inputs=(LABELS,),
    prepare=_zero_point,
    aliases={"trl": "KTOTrainer, apo_zero_unpaired"},
    about="1 - σ(βr) for desirable completions, σ(βr) for undesirable ones: `kto` at z0 = 0.",
)


def _weighted(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    weight = torch.where(given["labels"] > 0.5, torch.ones_like(given["density_ratio"]), given["density_ratio"])
    return sides, (given["labels"], given["delta"], weight)


@register(
    "unpaired",
    title="Binary Classifier Optimization",
    paper="arXiv:2404.04656",
    equation="definition of L_BCO",
    domains={"beta": POSITIVE},
    theory="gibbs",
    inputs=(
        LABELS,
        Input("delta", "the reward shift, from `bco_delta`", shared=True),
        Input("density_ratio", "p(desirable|x) / p(undesirable|x), weighs undesirable rows", POSITIVE, shared=True),
    ),
    prepare=_weighted,
    aliases={"trl": "BCOTrainer"},
)
def bco(row: Single, labels: Tensor, delta: Tensor, weight: Tensor, *, beta: float = 0.1) -> Tensor:
    """-log σ(βr - δ) for desirable completions, -w(x) log σ(-(βr - δ)) for undesirable ones.

    The paper's δ is the mean of both classes' mean rewards, kept as a moving average; TRL's is the mean of all rewards
    so far, another number where the classes are unequal. `density_ratio` is 1 where prompts of both kinds are alike.
    """
    x = beta * row.logratio - delta
    return -weight * F.logsigmoid(torch.where(labels > 0.5, x, -x))


@register(
    "unpaired",
    title="Negative Preference Optimization",
    paper="arXiv:2404.05868",
    equation="not verified",
    domains={"beta": POSITIVE},
    theory="property",
)
def npo(row: Single, *, beta: float = 0.1) -> Tensor:
    """(2/β) softplus(βr) on data to be unlearned, r the log-ratio to the reference. Not verified."""
    return -2 / beta * F.logsigmoid(-beta * row.logratio)


_WIN = Input("win_probability", "P(completion preferred to the opponent's)", PROBABILITY)


@register(
    "policy",
    title="Nash-MD policy gradient",
    paper="arXiv:2312.00886",
    equation="Eq. 13",
    domains={"beta": NOT_NEGATIVE, "eta": NOT_NEGATIVE},
    theory="selfplay",
    online=True,
    inputs=(_WIN,),
    public=False,
)
def nash(row: Single, win_probability: Tensor, *, beta: float = 0.008, eta: float = 0.0) -> Tensor:
    """-sg(P - 1/2 - β K - η K_t) log π(y), K and K_t the log-ratios to the reference and to a target policy."""
    advantage = win_probability - 0.5 - beta * row.logratio
    if row.step is not None:
        advantage = advantage - eta * row.step
    return -advantage.detach() * row.policy


def _later(values: Tensor, ends: Tensor | None) -> Tensor:
    """The sum over each sequence from every token on; packed ones with the end of each token's sequence."""
    if ends is None:
        return values.flip(1).cumsum(1).flip(1)
    before = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return before[ends] - before[:-1]


def _to_go(sides: Sides, given: Given, hyper: Hyper) -> Prepared:
    """Every token's log-prob times its slope, constant; and models under which the log-ratios are what they were."""
    (side,) = sides
    weights = {"reference": hyper["beta"]}
    if side.previous is not None:
        weights["previous"] = hyper["beta"] / hyper["eta"]
    inside, win = side.mask, given["win_probability"].double()
    slope, ends = 0.5 - win[:, None], None
    if side.cu_seqlens is not None:
        position = torch.arange(len(side.policy), device=win.device)
        row = torch.searchsorted(side.cu_seqlens[1:].long(), position, right=True)
        known = row < len(win)
        inside = known if inside is None else inside & known
        # one row more for the tokens of no sequence
        slope = 0.5 - torch.cat([win, win.new_zeros(1)])[row]
        ends = torch.cat([side.cu_seqlens[1:].long(), position.new_full((1,), len(position))])[row]

    policy = side.policy.to(torch.promote_types(side.policy.dtype, torch.float32))
    ratios = {}
    for model, weight in weights.items():
        ratio = (policy - getattr(side, model)).detach()
        ratios[model] = ratio if inside is None else torch.where(inside, ratio, 0)
        slope = slope + weight * _later(ratios[model].double(), ends)
    tokens = slope.to(policy.dtype) * (policy if inside is None else torch.where(inside, policy, 0))
    return (side._replace(policy=tokens, **{m: tokens.detach() - ratio for m, ratio in ratios.items()}),), ()


@register(
    "policy",
    title="Nash-MD policy gradient, token by token",
    paper="arXiv:2312.00886",
    equation="App. F",
    domains={"beta": NOT_NEGATIVE, "eta": NOT_NEGATIVE},
    theory="selfplay",
    online=True,
    tokens=True,
    inputs=(_WIN,),
    prepare=_to_go,
    public=False,
)
def nash_to_go(row: Single, *, beta: float = 0.008, eta: float = 0.0) -> Tensor:
    """Σ_t sg(1/2 - P + β Σ_{s≥t} k_s) log π_t: the sum of what `_to_go` made of the tokens."""
    return row.policy


def _forms(name: str, **changes: Any) -> None:
    """A row over `nash` under both forms of the KL's gradient."""
    derive(f"{name}_to_go", "nash_to_go", public=False, **changes)
    derive(
        name,
        "nash",
        options={"kl": ("sequence", "to_go")},
        variants={("sequence",): Variant(name), ("to_go",): Variant(f"{name}_to_go")},
        **changes,
    )


_forms(
    "nash_md",
    domains={"beta": NOT_NEGATIVE},
    fixed={"eta": 0.0},
    aliases={"trl": "NashMDTrainer (its KL gradient drops later tokens)"},
    about="""-sg(P - 1/2 - β K) log π(y), K = log π(y)/π_ref(y): the policy gradient against an opponent's sample.

y is a sample of the policy, the opponent the mixture of policy and reference (coefficient 0.125 to 0.375; at 0 the
fixed point is the Nash equilibrium). β is the paper's τ. The value is a surrogate: only its gradient means something.
kl="to_go" takes at every token the log-ratio of it and the later ones in place of the sequence's: as unbiased, and
of smaller variance. TRL's per-token KL gradient drops the later tokens, which is another fixed point.""",
)
_forms(
    "nash_ema",
    equation="App. F.3",
    title="Nash-EMA policy gradient",
    domains={"beta": NOT_NEGATIVE},
    fixed={"eta": 0.0},
    about="""-sg(P - 1/2 - β K) log π(y): `nash_md` whose opponent is a moving average of the policy's weights.

kl="to_go" is as there.""",
)
_forms(
    "nash_mp",
    title="Nash-MP (proximal point) policy gradient",
    paper="arXiv:2505.19731",
    equation="the single-loss form; not verified",
    domains={"beta": NOT_NEGATIVE, "eta": POSITIVE},
    defaults={"beta": 0.1, "eta": 1.0},
    hyper=lambda h: {"beta": h["beta"], "eta": h["beta"] / h["eta"]},
    previous_model=True,
    about="""-sg(P - 1/2 - β K - (β/η) K_t) log π(y), K_t the log-ratio to a target, a moving average of the policy.

Derived from the second version's abstract: weights, defaults and the target's update are not verified, and parity
with the paper is not claimed. kl="to_go" is as in `nash_md`, for both log-ratios.""",
)


def single_objective(
    row: Objective, side: Side, hyper: Hyper, *, columns: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Per-row loss (B,) and the detached reward β · log-ratio, differentiated by torch."""
    s = summed(side)
    loss = row.formula(Single(s.policy, s.logratio, s.step), *(c.to(s.policy.dtype) for c in columns), **hyper)
    return loss, (hyper.get("beta", 1.0) * s.logratio).detach()
