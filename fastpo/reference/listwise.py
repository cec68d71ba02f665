"""Objectives on lists: K completions of one prompt, each with a score and a target.

A row of the table is a method: what its tensors become (the log-probs, what is taken off or divides them, the targets),
which of the kinds of loss it is, and its hyper-parameters. The kinds are defined here in plain torch, pair losses on
(B, K, K).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.reference.registry import NOT_NEGATIVE, POSITIVE, PROBABILITY, Domain

MAX_ITEMS = 1024


class Numbers(NamedTuple):
    """What the kinds are told beside tensors: the scores' and the targets' factor; the weight of the pairs, or of PRO's
    supervised term."""

    scale: float = 1.0
    target_scale: float = 1.0
    weight: float = 1.0


class Items(NamedTuple):
    """Lists (B, K) in which places that do not count hold 0: scores, targets, whether they count, the policy's
    log-probs and what divided them."""

    scores: Tensor
    targets: Tensor
    counts: Tensor
    policy: Tensor
    other: Tensor | None

    def total(self, of: Tensor) -> Tensor:
        return torch.where(self.counts, of, 0).sum(1)

    def log_softmax(self, of: Tensor) -> Tensor:
        logits = torch.where(self.counts, of, -torch.inf)
        # a list without items has no softmax, and no gradient of one
        logits = torch.where(self.counts.any(1, keepdim=True), logits, 0)
        return torch.where(self.counts, of - logits.logsumexp(1, keepdim=True), 0)

    def best_first(self) -> Tensor:
        """The order by the targets; equal ones as they come, what does not count last."""
        return torch.where(self.counts, self.targets, -torch.inf).argsort(dim=1, descending=True, stable=True)


def _point_mse(x: Items, numbers: Numbers) -> Tensor:
    return x.total((x.targets - x.scores).square())


def _point_sigmoid(x: Items, numbers: Numbers) -> Tensor:
    return x.total(-(x.targets * F.logsigmoid(x.scores) + (1 - x.targets) * F.logsigmoid(-x.scores)))


def _pairs(x: Items, each: Callable[[Tensor], Tensor], weights: Tensor, mean: bool) -> Tensor:
    """Σ over pairs (i, j) with the target of i above that of j of weight · each(s_i - s_j)."""
    better = x.counts[:, :, None] & x.counts[:, None] & (x.targets[:, :, None] > x.targets[:, None])
    margins = torch.where(better, x.scores[:, :, None] - x.scores[:, None], 0)
    total = torch.where(better, weights * each(margins), 0).sum((1, 2))
    return total / better.sum((1, 2)).clamp(min=1) if mean else total


def _pair_logistic(x: Items, numbers: Numbers, mean: bool) -> Tensor:
    return numbers.weight * _pairs(x, lambda d: -F.logsigmoid(d), x.scores.new_ones(()), mean)


def _pair_hinge(x: Items, numbers: Numbers, mean: bool) -> Tensor:
    return numbers.weight * _pairs(x, lambda d: torch.relu(1 - d), x.scores.new_ones(()), mean)


def _lambda(x: Items, numbers: Numbers, mean: bool) -> Tensor:
    scores = torch.where(x.counts, x.scores.detach(), -torch.inf)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(1) + 1
    gain, inverse = torch.exp2(x.targets) - 1, 1 / torch.log1p(rank.to(scores.dtype))
    delta = (gain[:, :, None] - gain[:, None]).abs() * (inverse[:, :, None] - inverse[:, None]).abs()
    return numbers.weight * _pairs(x, lambda d: -F.logsigmoid(d), delta, mean)


def _ranknet(x: Items, numbers: Numbers, mean: bool) -> Tensor:
    sums = x.targets[:, :, None] + x.targets[:, None]
    flipped = x._replace(targets=-x.targets)
    return numbers.weight * _pairs(flipped, lambda d: -F.logsigmoid(d), 1 / torch.where(sums == 0, 1, sums), mean)


def _list_mle(x: Items, numbers: Numbers) -> Tensor:
    order = x.best_first()
    scores, counts = x.scores.gather(1, order), x.counts.gather(1, order)
    behind = torch.ones(2 * scores.shape[1:], dtype=torch.bool, device=scores.device).triu()
    behind = behind & (counts[:, None] | torch.eye(len(behind), dtype=torch.bool, device=scores.device))
    sums = torch.where(behind, scores[:, None], -torch.inf).logsumexp(2)
    return torch.where(counts, sums - scores, 0).sum(1)


def _cross_entropy(x: Items, weights: Tensor) -> Tensor:
    return -x.total(weights * x.log_softmax(x.scores))


def _softmax(x: Items, numbers: Numbers) -> Tensor:
    total = x.total(x.targets)[:, None]
    return _cross_entropy(x, x.targets / torch.where(total == 0, 1, total))


def _info_nca(x: Items, numbers: Numbers) -> Tensor:
    return _cross_entropy(x, x.log_softmax(x.targets).exp())


def _brain(x: Items, numbers: Numbers) -> Tensor:
    log_q = x.log_softmax(x.targets)
    return x.total(log_q.exp() * (log_q - x.log_softmax(x.scores)))


def _nca(x: Items, numbers: Numbers) -> Tensor:
    q, n = x.log_softmax(x.targets).exp(), x.counts.sum(1, keepdim=True).clamp(min=1)
    return -x.total(q * F.logsigmoid(x.scores) + F.logsigmoid(-x.scores) / n)


def _exo(x: Items, numbers: Numbers) -> Tensor:
    log_p = x.log_softmax(x.scores)
    return x.total(log_p.exp() * (log_p - x.log_softmax(x.targets)))


def _pro(x: Items, numbers: Numbers) -> Tensor:
    order = x.best_first()
    p, r, counts = (t.gather(1, order) for t in (x.scores, x.targets, x.counts))
    if p.shape[1] == 0:
        return p.sum(1)
    worst = torch.where(counts, r, torch.inf).amin(1, keepdim=True)
    own = p * torch.where(counts, r - worst, 0)
    logits = p[:, None] * (r[:, :, None] - r[:, None])
    behind = torch.ones_like(logits, dtype=torch.bool).triu(1) & counts[:, None]
    rivals = torch.where(behind, logits, -torch.inf)
    sums = torch.cat([own[:, :, None], rivals], 2).logsumexp(2)
    best = torch.where(counts[:, 0], x.policy.gather(1, order)[:, 0], 0)
    supervised = numbers.weight * (counts.sum(1) - 1).to(best.dtype).square() * best
    return torch.where(counts, sums - own, 0).sum(1) - supervised


PAIRS: dict[str, Callable[[Items, Numbers, bool], Tensor]] = {
    "pair_logistic": _pair_logistic,
    "pair_hinge": _pair_hinge,
    "lambda": _lambda,
    "ranknet": _ranknet,
}
OTHERS: dict[str, Callable[[Items, Numbers], Tensor]] = {
    "point_mse": _point_mse,
    "point_sigmoid": _point_sigmoid,
    "list_mle": _list_mle,
    "softmax": _softmax,
    "info_nca": _info_nca,
    "brain": _brain,
    "nca": _nca,
    "exo": _exo,
    "pro": _pro,
}


def _places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Where the items of each list are among `total`, (B, K), and which of the places are of the list."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    longest = int(lengths.max()) if len(lengths) else 0
    offsets = torch.arange(longest, device=cu_seqlens.device)
    return (starts[:, None] + offsets).clamp(max=max(total - 1, 0)), offsets < lengths[:, None]


def listwise(
    kind: str,
    policy: Tensor,
    other: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numbers: Numbers,
    pair_mean: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of each list (B,), and the scores in the layout of `policy`, 0 where an item does not count.

    The scores are scale · (policy - other), of "pro" policy / other; the targets are multiplied by target_scale. A
    score or a target that is infinite or NaN makes loss and gradient of its list NaN. A list without items has loss 0.
    """
    dtype = torch.promote_types(policy.dtype, torch.float32)
    if other is not None:
        dtype = torch.promote_types(dtype, other.dtype)
    p, t, o = (None if x is None else x.to(dtype) for x in (policy, targets, other))
    assert p is not None and t is not None
    counts = torch.ones_like(p, dtype=torch.bool) if mask is None else mask
    place = None
    if cu_seqlens is not None:
        place, inside = _places(cu_seqlens, len(p))
        p, t, counts = p[place], t[place], inside & counts[place]
        o = None if o is None else o[place]
    p, t = torch.where(counts, p, 0), torch.where(counts, t, 0) * numbers.target_scale
    scores = p
    if o is not None:
        o = torch.where(counts, o, 1 if kind == "pro" else 0)
        scores = p / o if kind == "pro" else p - o
    scores = scores * numbers.scale
    lost = (counts & ~(scores.isfinite() & t.isfinite())).any(1, keepdim=True)
    kept = counts & ~lost
    items = Items(torch.where(kept, scores, 0), torch.where(kept, t, 0), kept, torch.where(kept, p, 0), o)
    loss = PAIRS[kind](items, numbers, pair_mean) if kind in PAIRS else OTHERS[kind](items, numbers)
    # a factor: the gradient of a NaN that is not selected would be one
    loss = loss + (scores * torch.zeros_like(scores).masked_fill(counts & lost, torch.nan)).sum(1)
    found = scores.detach()
    if place is None:
        return loss, found
    flat = found.new_zeros(policy.shape)
    return loss, flat.index_put((place[counts],), found[counts])


@dataclass(frozen=True)
class ListObjective:
    """A row of the table.

    Attributes:
        name: of the public function.
        title, paper, equation: where it is from.
        kinds: the kinds of loss, by the value of the option `loss`; one without a name where there is no such option.
        tensors: names of the arguments and what they are, the differentiable one first; the last are the targets.
        optional: the tensors that may be None.
        take: from the tensors in their order and the hyper-parameters to log-probs, `other` and targets.
        numbers: from the hyper-parameters to `Numbers`.
        defaults, domains: of the hyper-parameters; one without default has None.
        targets: the domain of the targets, checked where values may be looked at.
        average_pairs: the default of the option of that name; None where there is none.
        discounts: whether there is an option `discount`.
        theory: what the tests hold it to: a fixed point, or a property.
        about: the docstring.
    """

    name: str
    title: str
    paper: str
    equation: str
    kinds: Mapping[str, str]
    tensors: Mapping[str, str]
    take: Callable[..., tuple[Tensor, Tensor | None, Tensor]]
    numbers: Callable[[Mapping[str, float]], Numbers]
    defaults: Mapping[str, float | None]
    domains: Mapping[str, Domain]
    theory: str
    about: str
    optional: tuple[str, ...] = ()
    targets: Domain | None = None
    average_pairs: bool | None = None
    discounts: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors."""
        return tuple(self.tensors)

    @property
    def models(self) -> tuple[str, ...]:
        """Whose log-probs, or scores, are given."""
        return tuple(name for name in self.tensors if name in ("policy", "reference", "proposal", "prior", "scores"))

    @property
    def doc(self) -> str:
        return self.about


_ROWS: dict[str, ListObjective] = {}


def list_objectives() -> Iterator[ListObjective]:
    """The rows of the table."""
    return iter(_ROWS.values())


def list_objective(name: str) -> ListObjective:
    """One of them."""
    return _ROWS[name]


def _row(name: str, kinds: str | Mapping[str, str], about: str, **rest: object) -> None:
    named = {"": kinds} if isinstance(kinds, str) else kinds
    _ROWS[name] = ListObjective(name=name, kinds=named, about=inspect.cleandoc(about), **rest)  # type: ignore[arg-type]


_LOGPROBS = "summed log-probs of the completions under the policy; differentiable"
_REFERENCE = "the same under the reference model; constants"
_WITH_REFERENCE = {"policy": _LOGPROBS, "reference": _REFERENCE + ". None: the scores are beta · policy"}
_LABELS = "of the completions, constants; {}"
_BETA = {"beta": POSITIVE}


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _as_given(policy: Tensor, other: Tensor | None, targets: Tensor, _: object) -> tuple[Tensor, Tensor | None, Tensor]:
    return policy, other, targets


def _by_beta(h: Mapping[str, float]) -> Numbers:
    return Numbers(scale=h["beta"])


_LIPO = {
    "title": "LiPO: Listwise Preference Optimization through Learning-to-Rank",
    "paper": "arXiv:2402.01878",
    "optional": ("reference",),
    "take": _as_given,
    "numbers": _by_beta,
    "defaults": {"beta": 0.05},
    "domains": _BETA,
}
_TIES = "A pair with equal labels is none."

_row(
    "lipo_point",
    {"mse": "point_mse", "sigmoid": "point_sigmoid"},
    """Σ_i (ψ_i - s_i)², or Σ_i softplus(s_i) - ψ_i s_i, of s = β log(π/π_ref) and labels ψ.

    The first compares an unbounded log-ratio with a probability, as the paper has it. The only one of the family that
    looks at each completion by itself.""",
    **_LIPO,
    equation="§4 (from memory)",
    tensors={**_WITH_REFERENCE, "labels": _LABELS.format("probabilities to be preferred")},
    targets=PROBABILITY,
    theory="property",
)
_row(
    "lipo_pair",
    {"logistic": "pair_logistic", "hinge": "pair_hinge"},
    f"""Σ over pairs with ψ_i > ψ_j of softplus(-(s_i - s_j)), or of max(0, 1 - (s_i - s_j)), s = β log(π/π_ref).

    {_TIES} With K = 2 this is DPO, or SLiC-HF with a reference. The signs of the paper's print are put right.""",
    **_LIPO,
    equation="§4 (from memory; K = 2 agrees with TRL)",
    tensors={**_WITH_REFERENCE, "labels": _LABELS.format("only their order counts")},
    average_pairs=False,
    theory="property",
)
_row(
    "lipo_lambda",
    "lambda",
    f"""LambdaLoss: Σ over pairs with ψ_i > ψ_j of Δ_ij softplus(-(s_i - s_j)), s = β log(π/π_ref).

    Δ_ij = |2^ψ_i - 2^ψ_j| · |1/log(1 + τ_i) - 1/log(1 + τ_j)|, τ the rank under the scores of this step, from 1, is a
    constant. Equal scores are ranked as they come, so that Δ then depends on the order of the list.
    {_TIES}
    With K = 2 this is DPO times a constant. It is neither divided by the best DCG nor in integer grades, as other
    lambda losses are.""",
    **_LIPO,
    equation="the lambda loss of §4 (base of the logarithm from memory)",
    tensors={**_WITH_REFERENCE, "labels": _LABELS.format("in [0, 1]")},
    targets=PROBABILITY,
    average_pairs=False,
    discounts=True,
    theory="property",
)
_MLE = """-Σ_k log(e^s_τ(k) / Σ_{{j >= k}} e^s_τ(j)), τ the order of the {what}, the best first, s = β log(π/π_ref).

    The negative log-likelihood of the ranking under Plackett and Luce's model; with K = 2 DPO. Equal {what} count as
    they stand in the list.{more}"""
_row(
    "list_mle",
    "list_mle",
    _MLE.format(what="labels", more=" LiPO's DPO_PL, with its β; `plackett_luce` has that of DPO."),
    **_LIPO,
    equation='"DPO_PL" (from memory)',
    tensors={**_WITH_REFERENCE, "labels": _LABELS.format("only their order counts")},
    theory="gibbs",
)
_row(
    "plackett_luce",
    "list_mle",
    _MLE.format(what="rewards", more=" Rankings must be sampled, not sorted, for π_ref e^{r/β}/Z to be the optimum."),
    title="Direct Preference Optimization",
    paper="arXiv:2305.18290",
    equation="App. A.3 (from memory)",
    optional=("reference",),
    take=_as_given,
    numbers=_by_beta,
    defaults={"beta": 0.1},
    domains=_BETA,
    tensors={**_WITH_REFERENCE, "rewards": _LABELS.format("only their order counts")},
    theory="gibbs",
)
_row(
    "lipo_softmax",
    "softmax",
    """-Σ_i w_i log softmax(s)_i, w = ψ / Σψ, s = β log(π/π_ref): ListNet's cross-entropy.

    A list whose labels are all 0 has loss 0. The labels are divided by their sum; ListNet takes their softmax, which is
    `info_nca`. Its optimum is π_ref ψ^{1/β}/Z.""",
    **_LIPO,
    equation="§4 (from memory)",
    tensors={**_WITH_REFERENCE, "labels": _LABELS.format("at least 0")},
    targets=NOT_NEGATIVE,
    theory="gibbs",
)
_row(
    "pro",
    "pro",
    """-Σ_k log(e^{p_k d_k} / (e^{p_k d_k} + Σ_{i>k} e^{p_i (r_k - r_i)})) - w (K-1)² log π(y_1), the best first.

    p is the log-prob per token, d_k = r_k - r_K the largest distance, w the weight `sft_weight` of the best
    completion's summed log-prob. There is no reference model. The scale of the rewards is an inverse temperature. Equal
    rewards count as they stand in the list; the terms of those below then have the exponent 0. The official code masks
    one token beside the right ones, and sums exponentials as they are.""",
    title="Preference Ranking Optimization for Human Alignment",
    paper="arXiv:2306.17492",
    equation="Eq. 7-9; the weight is that of the official scripts",
    tensors={
        "policy": _LOGPROBS,
        "lengths": "numbers of tokens of the completions, floats or integers",
        "rewards": _LABELS.format("of a reward model"),
    },
    take=_as_given,
    numbers=lambda h: Numbers(weight=h["sft_weight"]),
    defaults={"sft_weight": 0.05},
    domains={"sft_weight": NOT_NEGATIVE},
    theory="property",
)
_row(
    "first_ranknet",
    "ranknet",
    """Σ over pairs with r_i < r_j of softplus(s_j - s_i) / (r_i + r_j), over the number of pairs.

    FIRST's weighted RankNet, s the logits of the candidates' identifiers and r their target ranks. It is to be added to
    the language model's loss, 10 times in the paper. Pairs of equal ranks are none; a list without pairs has loss 0.
    The sign is that of the code: the paper prints s_i - s_j.""",
    title="FIRST: Faster Improved Listwise Reranking with Single Token Decoding",
    paper="arXiv:2406.15657",
    equation="the weighted RankNet loss, after the code",
    tensors={"scores": "logits of the identifiers; differentiable", "ranks": "floats or integers from 1, the best"},
    take=lambda scores, ranks, _: (scores, None, ranks),
    numbers=lambda h: Numbers(),
    defaults={},
    domains={},
    targets=Domain(1.0),
    average_pairs=True,
    aliases={"rank_llm": "weighted_ranknet"},
    theory="property",
)
_row(
    "brain",
    "brain",
    """KL(a ‖ b) of a = softmax(log p_sft + r/β - log q'), b = softmax(log π - log q') over samples of a proposal q'.

    Self-normalised importance sampling of the posterior p_sft e^{r/β}/Z, which is its optimum for any proposal. Its
    gradient is that of BRAIn's estimator with its baseline, -Σ (a_i - b_i) ∇ log π(y_i). One sample has loss 0. There
    is no default of β: the paper's is not verified.""",
    title="BRAIn: Bayesian Reward-conditioned Amortized Inference",
    paper="arXiv:2402.02479",
    equation="gradient of Eq. 12 (its number is not verified), after the code",
    tensors={
        "policy": _LOGPROBS,
        "proposal": "the same under the model that sampled; constants",
        "prior": "the same under the supervised model; constants",
        "rewards": _LABELS.format("log-odds of being good, times β"),
    },
    take=lambda policy, proposal, prior, rewards, h: (
        policy,
        proposal,
        _wide(prior) + _wide(rewards) / h["beta"] - _wide(proposal),
    ),
    numbers=lambda h: Numbers(),
    defaults={"beta": None},
    domains=_BETA,
    theory="gibbs",
)
_NCA = {
    "title": "Noise Contrastive Alignment of Language Models with Explicit Rewards",
    "paper": "arXiv:2402.05369",
    "tensors": {"policy": _LOGPROBS, "reference": _REFERENCE, "rewards": _LABELS.format("of any scale")},
    "take": _as_given,
    "numbers": lambda h: Numbers(scale=h["beta"], target_scale=1 / h["alpha"]),
    "defaults": {"beta": 0.01, "alpha": 1.0},
    "domains": {"beta": POSITIVE, "alpha": POSITIVE},
}
_ALPHA = "α is what the official script divides by; its default, and β's, are not verified."
_row(
    "info_nca",
    "info_nca",
    f"""-Σ_i q_i log softmax(s)_i, q = softmax(r/α), s = β log(π/π_ref).

    Its optimum is π_ref e^{{r/(αβ)}}/Z. {_ALPHA}""",
    **_NCA,
    equation="InfoNCA, after the code",
    theory="gibbs",
)
_row(
    "nca",
    "nca",
    f"""-Σ_i q_i log σ(s_i) + log σ(-s_i)/K, q = softmax(r/α), s = β log(π/π_ref).

    K is the number of completions that count. With finite K its optimum is not π_ref e^{{r/α}}/Z: at β = 1 and for
    samples of π_ref it is π_ref(y) K E[q_y], over the lists that y is in. {_ALPHA}""",
    **_NCA,
    equation="NCA, after the code",
    theory="gibbs",
)
_row(
    "exo",
    "exo",
    """KL(softmax(β log(π/π_ref)) ‖ softmax(r/β_r)) over the list.

    The reverse KL: its gradient vanishes where the policy has no mass in the list. Its optimum is
    π_ref e^{r/(β β_r)}/Z, for any K >= 2. `exo_pair` is the form for a preference without rewards.""",
    title="Towards Efficient and Exact Optimization of Language Model Alignment",
    paper="arXiv:2402.00856",
    equation="EXO-rw, after the code",
    tensors={"policy": _LOGPROBS, "reference": _REFERENCE, "rewards": _LABELS.format("of a reward model")},
    take=_as_given,
    numbers=lambda h: Numbers(scale=h["beta"], target_scale=1 / h["beta_r"]),
    defaults={"beta": 0.1, "beta_r": 0.5},
    domains={"beta": POSITIVE, "beta_r": POSITIVE},
    theory="gibbs",
)
# the natural logarithm's weights times this are those of log2
DISCOUNTS = {"log": 1.0, "log2": math.log(2)}
