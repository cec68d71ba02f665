"""Methods that learn from preferences among completions which they sample: each its draws, its pairs and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor

from fastpo import data, losses
from fastpo.algorithms import direct
from fastpo.algorithms.base import (
    Batch,
    Column,
    Draft,
    Draw,
    Group,
    Prepared,
    State,
    StepOutput,
    Turn,
    check_hyper,
)
from fastpo.algorithms.direct import Direct
from fastpo.algorithms.pairwise import Pairwise
from fastpo.algorithms.plain import Plain
from fastpo.algorithms.rollouts import COUNT, Numbers, Options
from fastpo.reference import Objective, objective
from fastpo.reference.registry import NOT_NEGATIVE, PROBABILITY, Domain
from fastpo.reference.sequence import sequence_sum


class Learner(Protocol):
    """The loss of a method on its examples, with what it needs of them, as in `Algorithm`."""

    @property
    def models(self) -> tuple[str, ...]: ...

    @property
    def columns(self) -> tuple[Column, ...]: ...

    def __call__(self, batch: Batch, state: State) -> StepOutput: ...

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]: ...


class Single(Direct):
    """Policy gradients: an example is one completion, with the probability that it is preferred to an opponent's."""

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        lengths, ends = batch.completions.lengths, batch.completions.cu_seqlens
        inputs, new = self._inputs(batch, [sum(lengths)], state)
        out = getattr(losses, self.row.name)(
            *(batch.streams[model] for model in self.models),
            **inputs,
            cu_seqlens=ends,
            num_items=batch.num_items,
            **self._given,
        )
        each = {"penalty": out.penalties, **inputs}
        metrics = {name: values.sum() / batch.num_items for name, values in each.items()}
        return StepOutput(out.loss, {"loss": out.loss.detach(), **metrics}, new)


class Hybrid(Pairwise):
    """HyPO: an example is a pair that the data have, and behind it samples of the policy, for the KL."""

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        lengths, ends = batch.completions.lengths, batch.completions.cu_seqlens
        hyper: Options = self.hyper
        rows = len(lengths) // (2 + hyper["samples"])
        sizes = [sum(lengths[:rows]), sum(lengths[rows : 2 * rows]), sum(lengths[2 * rows :])]
        parts = {model: batch.streams[model].split(sizes) for model in self.models}
        starts = ends[2 * rows :] - sizes[0] - sizes[1]
        # the samples stand one behind the other: all first ones, then all second ones
        online = [sequence_sum(parts[model][2], None, starts)[0].view(-1, rows).T for model in self.models]
        out = losses.hypo(
            *(side for model in self.models for side in parts[model][:2]),
            *online,
            beta=hyper["beta"],
            # the KL is a mean over the prompts of this forward, and they are a part of the step's
            lambda_=hyper["lambda_"] * rows / batch.num_items,
            chosen_cu_seqlens=ends[: rows + 1],
            rejected_cu_seqlens=ends[rows : 2 * rows + 1] - sizes[0],
            num_items=batch.num_items,
        )
        ratios = (online[0] - online[1]).detach().mean(1)
        metrics = self._metrics(out, batch.num_items) | {"kl": ratios.sum() / batch.num_items}
        return StepOutput(out.loss, {"loss": out.loss.detach(), **metrics}, {})


class Likelihood:
    """An example is one completion, whose log-prob is raised: minus their sum over its tokens."""

    models = ("policy",)
    columns: tuple[Column, ...] = ()

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        out = losses.sft(
            batch.streams["policy"], cu_seqlens=batch.completions.cu_seqlens, num_items=float(batch.num_items)
        )
        return StepOutput(out.loss, {"loss": out.loss.detach()}, {})

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        return dict(totals)


_FORMS: Mapping[str, type[Direct]] = {"pairwise": Pairwise, "policy": Single}


@dataclass(frozen=True)
class Method:
    """A method that samples completions and compares them.

    Attributes:
        name, title, source: of the method.
        draws: the completions of each prompt, by the hyper-parameters.
        drafts: the examples that are made of a prompt's completions.
        rows: of the registry, the losses it may have; the first is the default, and none is `Likelihood`.
        form: of the loss, if not that of its row's kind.
        compares: the pairs of samples that the judge is asked about; None for all.
        anchors: whose the fixed models of the loss are, as in `Online.anchors`.
        needs, demonstrations: as in `Online`.
        numbers: hyper-parameters beside those of the loss: defaults and domains.
        options: hyper-parameters that are words: the admissible values, the default first.
    """

    name: str
    title: str
    source: str
    draws: Callable[[Options], tuple[Draw, ...]]
    drafts: Callable[[Group, Options], list[Draft]]
    rows: tuple[str, ...] = ()
    form: type[Direct] | None = None
    compares: Callable[[Options], list[tuple[int, int]]] | None = None
    anchors: Mapping[str, str] = field(default_factory=lambda: {"reference": "start"})
    needs: str | None = "judge"
    demonstrations: int = 0
    numbers: Numbers = field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def losses(self) -> tuple[str, ...]:
        """The rows, as those of other methods."""
        return self.rows or ("sft",)

    def build(self, hyper: Options) -> Preference:
        """With all of `defaults()`, or others."""
        return Preference(self, hyper)

    @property
    def row(self) -> Objective | None:
        """Of the default loss."""
        return objective(self.rows[0]) if self.rows else None

    def domains(self) -> dict[str, Domain]:
        """The numbers that a user may choose."""
        own = {} if self.row is None else direct.domains(self.row)
        return {**own, **{name: domain for name, (_, domain) in self.numbers.items()}}

    def defaults(self) -> dict[str, Any]:
        """All hyper-parameters with their default values."""
        own = {} if self.row is None else direct.defaults(self.row)
        chosen = {name: values[0] for name, values in self.choices().items()}
        return {**{name: value for name, (value, _) in self.numbers.items()}, **own, **chosen}

    def choices(self) -> dict[str, tuple[str | None, ...]]:
        """The hyper-parameters that are words."""
        own = {} if self.row is None else dict(self.row.options)
        return {**({"loss": self.rows} if len(self.rows) > 1 else {}), **own, **self.options}

    def learner(self, hyper: Options) -> Learner:
        """The loss with these hyper-parameters."""
        if not self.rows:
            return Likelihood()
        row = objective(hyper.get("loss", self.rows[0]))
        return (self.form or _FORMS[row.kind])(row, hyper)  # type: ignore[return-value]


@dataclass(frozen=True)
class Preference(Plain):
    """A method of the table: samples become examples of its loss, whose fixed models are those of the turn or the run.

    Attributes:
        method: of the table.
        hyper: all of `method.defaults()`.
    """

    method: Method
    hyper: Options

    kind = "prompts"
    critic = False

    def __post_init__(self) -> None:
        check_hyper(self.name, self.hyper, self.method.domains(), self.method.choices())
        row = self.method.row
        if row is not None and row.joint is not None and (found := row.joint(self.hyper)) is not None:
            raise ValueError(found)

    @property
    def name(self) -> str:
        return self.method.name

    @cached_property
    def learner(self) -> Learner:
        return self.method.learner(self.hyper)

    @property
    def models(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.learner.models

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.learner.columns

    @property
    def draws(self) -> tuple[Draw, ...]:
        return self.method.draws(self.hyper)

    @property
    def demonstrations(self) -> int:
        return self.method.demonstrations

    @property
    def needs(self) -> str | None:
        return self.method.needs

    def anchors(self, steps: int) -> Mapping[str, str]:
        found = {model: whose for model, whose in self.method.anchors.items() if model in self.models}
        # in the only step of a turn the policy still is what it was at its beginning
        return {model: whose for model, whose in found.items() if whose != "turn" or steps > 1}

    def drafts(self, group: Group) -> list[Draft]:
        return self.method.drafts(group, self.hyper)

    def compared(self, count: int) -> list[tuple[int, int]]:
        if self.method.compares is None:
            return list(combinations(range(count), 2))
        return self.method.compares(self.hyper)

    def prepare(self, turn: Turn, state: State) -> Prepared:
        return Prepared({}, {}, {})

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        own = batch.streams["policy"].detach()
        streams = {model: own for model, whose in self.method.anchors.items() if whose == "turn"}
        return self.learner(batch._replace(streams={**streams, **batch.streams}), state)

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        return self.learner.finish(totals)


def _own(hyper: Options) -> tuple[Draw, ...]:
    return (Draw("policy", hyper["samples"]),)


def _with(source: str) -> Callable[[Options], tuple[Draw, ...]]:
    """As many completions of the policy as of another model."""
    return lambda hyper: (Draw("policy", hyper["samples"]), Draw(source, hyper["samples"]))


def _of(source: str) -> Callable[[Options], tuple[Draw, ...]]:
    return lambda hyper: (Draw(source, hyper["samples"]),)


def _neighbours(hyper: Options) -> list[tuple[int, int]]:
    """Samples two and two: they are drawn alike, so that no order is better than theirs."""
    return [(i, i + 1) for i in range(0, hyper["samples"] - 1, 2)]


def _opponents(hyper: Options) -> list[tuple[int, int]]:
    """Each sample of the policy and one of the other model."""
    return [(i, hyper["samples"] + i) for i in range(hyper["samples"])]


def _table(group: Group, rows: int, columns: int) -> Tensor:
    """fp64 (rows, columns), the probability that one of the first samples is preferred to another."""
    return torch.tensor([[group.wins(i, j) for j in range(columns)] for i in range(rows)], dtype=torch.float64)


def _sides(pairs: data.Pairs) -> list[tuple[int, int]]:
    """Chosen and rejected of one prompt's pairs."""
    return list(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))


def _labels(group: Group, pairs: Sequence[tuple[int, int]], hyper: Options) -> list[bool]:
    """Whether the first sample of each pair is the chosen one, as the option `label` says; of a tie it is."""
    wins = [group.wins(i, j) for i, j in pairs]
    if hyper["label"] == "likelier":
        return [p >= 0.5 for p in wins]
    drawn = torch.rand(len(wins), dtype=torch.float64, generator=group.generator).tolist()
    return [at < p for at, p in zip(drawn, wins, strict=True)]


def _judged(group: Group, hyper: Options) -> list[Draft]:
    """Two and two, each pair labelled."""
    pairs = _neighbours(hyper)
    labels = _labels(group, pairs, hyper)
    return [Draft(pair if won else pair[::-1]) for pair, won in zip(pairs, labels, strict=True)]


def _soft(group: Group, hyper: Options) -> list[Draft]:
    """Two and two, the likelier winner first, with the probability that it is preferred."""
    wins = [(pair, group.wins(*pair)) for pair in _neighbours(hyper)]
    return [Draft(pair, (p,)) if p >= 0.5 else Draft(pair[::-1], (1 - p,)) for pair, p in wins]


def _rewarded(group: Group, hyper: Options) -> list[Draft]:
    """Random pairs without a completion in two of them (CoPG may take all pairs), each with the rewards of both."""
    pairs = _sides(data.first_round_pairs(group.rewards, generator=group.generator))
    return [Draft(pair, tuple(group.rewards[i] for i in pair)) for pair in pairs]


def _against(group: Group, hyper: Options) -> list[Draft]:
    """Each completion of the policy against one of the opponent."""
    return [Draft((i,), (group.wins(i, j),)) for i, j in _opponents(hyper)]


def _each_other(group: Group, hyper: Options) -> list[Draft]:
    """Completions of the policy, two and two against each other."""
    sides = [side for i, j in _neighbours(hyper) for side in ((i, j), (j, i))]
    return [Draft((i,), (group.wins(i, j),)) for i, j in sides]


def _explored(group: Group, hyper: Options) -> list[Draft]:
    """Each completion of the policy and one of the reference, labelled, with whether the reference's is chosen."""
    pairs = _opponents(hyper)
    labels = _labels(group, pairs, hyper)
    return [Draft(pair, (0.0,)) if won else Draft(pair[::-1], (1.0,)) for pair, won in zip(pairs, labels, strict=True)]


def _side_by_side(group: Group, hyper: Options) -> list[Draft]:
    """Each completion of the policy and one of the base model, in this order."""
    return [Draft(pair) for pair in _opponents(hyper)]


def _self_play(group: Group, hyper: Options) -> list[Draft]:
    """The demonstration above each completion of the policy."""
    n = hyper["samples"]
    return [Draft((n, i)) for i in range(n)]


def _best_and_worst(group: Group, hyper: Options) -> tuple[int, int, Tensor]:
    """The completions with the largest and the smallest win rate, and all win rates; of equals the first and last."""
    n = hyper["samples"]
    rates = _table(group, n, n).mean(1)
    best, last = data.select_best_of_n(rates), data.select_best_of_n(-rates.flip(0))
    return int(best), n - 1 - int(last), rates


def _extremes(group: Group, hyper: Options) -> list[Draft]:
    """The completions that win most and least often, with their win rates."""
    best, worst, rates = _best_and_worst(group, hyper)
    return [Draft((best, worst), (float(rates[best]), float(rates[worst])))]


def _separated(group: Group, hyper: Options) -> list[Draft]:
    """The same without the rates, which must differ."""
    best, worst, rates = _best_and_worst(group, hyper)
    return [Draft((best, worst))] if rates[best] > rates[worst] else []


def _rated(group: Group, hyper: Options) -> list[Draft]:
    """Random pairs, each with the win rates of both."""
    n = hyper["samples"]
    rates = _table(group, n, n).mean(1)
    pairs = _sides(data.first_round_pairs(rates, generator=group.generator))
    return [Draft(pair, tuple(float(rates[i]) for i in pair)) for pair in pairs]


def _large_margin(group: Group, hyper: Options) -> list[Draft]:
    """Of samples and demonstration all pairs whose win rates against the samples are far apart."""
    n = hyper["samples"]
    pairs = data.large_margin_filter(_table(group, n + 1, n).mean(1), hyper["margin"])
    return [Draft(pair) for pair in _sides(pairs)]


def _accepted(group: Group, hyper: Options) -> list[Draft]:
    """Pairs of what rejection sampling accepts; it takes less than is wanted where less is distinct."""
    ids: dict[tuple[int, ...], int] = {}
    same = [ids.setdefault(tuple(sample.ids), len(ids)) for sample in group.samples]
    collapse = hyper["duplicates"] == "collapse"
    wanted = min(hyper["accepted"], len(ids) if collapse else len(same))
    accepted = data.rso_rejection_sample(
        group.rewards,
        wanted,
        beta=hyper["sampler_beta"],
        candidates=torch.tensor(same) if collapse else None,
        generator=group.generator,
    ).indices.tolist()
    paired = data.tournament_pairs if hyper["ranking"] == "tournament" else data.first_round_pairs
    pairs = _sides(paired([group.rewards[i] for i in accepted], generator=group.generator))
    return [Draft((accepted[chosen], accepted[rejected])) for chosen, rejected in pairs]


def _likeliest(group: Group, hyper: Options) -> list[Draft]:
    """The completion that the base model itself finds the most probable."""
    return [Draft((int(data.select_best_of_n(group.logprobs)),))]


def _hybrid(group: Group, hyper: Options) -> list[Draft]:
    """The pair of the data, which stands behind the samples, and these."""
    n = hyper["samples"]
    return [Draft((n, n + 1, *range(n)))]


def _samples(count: int, domain: Domain = COUNT) -> Numbers:
    return {"samples": (count, domain)}


PAIR = Domain(2.0)
# how a pair is labelled: its likelier winner is the chosen one; or either, with the probability that it is preferred,
# which are the labels of the theorems on Bradley and Terry's model
LABEL: Mapping[str, tuple[str, ...]] = {"label": ("likelier", "drawn")}
# the reference's share in the mixture of policy and reference
MIXTURE: Numbers = {"mixture": (0.125, PROBABILITY)}
LAST_ITERATE = {"reference": "turn"}
# the iterate before this turn beside the model at the start
BOTH = {"reference": "start", "previous": "turn"}

_ALL = (
    Method(
        "online_dpo",
        "Online DPO (OAIF)",
        "2402.04792",
        _own,
        _judged,
        ("online_dpo",),
        compares=_neighbours,
        numbers=_samples(2, PAIR),
        options=LABEL,
    ),
    Method(
        "online_ipo",
        "Online IPO",
        "2403.08635",
        _own,
        _soft,
        ("online_ipo",),
        compares=_neighbours,
        numbers=_samples(2, PAIR),
    ),
    Method(
        "ipo_md",
        "IPO-MD",
        "2403.08635, Sec. 5",
        _of("mixture"),
        _soft,
        ("ipo_md",),
        compares=_neighbours,
        numbers={**_samples(2, PAIR), **MIXTURE},
    ),
    Method(
        "nash_md",
        "Nash-MD policy gradient",
        "2312.00886, Sec. 7",
        _with("mixture"),
        _against,
        ("nash_md",),
        compares=_opponents,
        numbers={**_samples(1), **MIXTURE},
    ),
    Method(
        "nash_ema",
        "Nash-EMA policy gradient",
        "2312.00886, App. F.3",
        _with("average"),
        _against,
        ("nash_ema",),
        compares=_opponents,
        numbers={**_samples(1), "decay": (0.999, PROBABILITY)},
    ),
    Method(
        "nash_mp",
        "Nash-MP (proximal point) policy gradient",
        "2505.19731, the single-loss form; the target's decay is not verified",
        _own,
        _each_other,
        ("nash_mp",),
        compares=_neighbours,
        anchors={"reference": "start", "previous": "average"},
        numbers={**_samples(2, PAIR), "decay": (0.999, PROBABILITY)},
    ),
    Method(
        "xpo",
        "Exploratory Preference Optimization",
        "2405.21046, Alg. 1",
        _with("reference"),
        _explored,
        ("xpo",),
        compares=_opponents,
        numbers=_samples(1),
        options=LABEL,
    ),
    Method(
        "hypo",
        "Hybrid Preference Optimization",
        "2406.01462, Alg. 1; k = 2 and λ are not verified",
        _own,
        _hybrid,
        ("dpo",),
        form=Hybrid,
        needs=None,
        demonstrations=2,
        numbers={**_samples(2), "lambda_": (1e-4, NOT_NEGATIVE)},
    ),
    Method(
        "spin",
        "Self-Play Fine-Tuning",
        "2401.01335, Eq. 4.7; an iteration is a turn",
        _own,
        _self_play,
        ("spin",),
        anchors=LAST_ITERATE,
        needs=None,
        demonstrations=1,
        numbers=_samples(1),
    ),
    Method(
        "sppo",
        "Self-Play Preference Optimization",
        "2405.00675, Alg. 1; the official code pairs by a ranker's score, here it is the win rate",
        _own,
        _extremes,
        ("sppo",),
        anchors=LAST_ITERATE,
        numbers=_samples(5, PAIR),
    ),
    Method(
        "sppo_hard",
        "SPPO with hard labels",
        "2405.00675, as TRL and Liger have it",
        _own,
        _separated,
        ("sppo_hard",),
        anchors=LAST_ITERATE,
        numbers=_samples(5, PAIR),
    ),
    Method(
        "dno",
        "Direct Nash Optimization",
        "2404.03715, Alg. 1",
        _own,
        _rated,
        ("dno",),
        anchors=LAST_ITERATE,
        numbers=_samples(5, PAIR),
    ),
    Method(
        "dno_prct",
        "Direct Nash Optimization, practical form",
        "2404.03715, Alg. 2; the number of samples and the margin are not verified",
        _own,
        _large_margin,
        ("dno_prct",),
        anchors=LAST_ITERATE,
        demonstrations=1,
        numbers={**_samples(5), "margin": (0.1, NOT_NEGATIVE)},
    ),
    Method(
        "inpo",
        "Iterative Nash Policy Optimization",
        "2407.00617, Alg. 1",
        _own,
        _separated,
        ("inpo",),
        anchors=BOTH,
        numbers=_samples(8, PAIR),
    ),
    Method(
        "p3o",
        "Pairwise Proximal Policy Optimization",
        "2310.00212, Sec. 4",
        _own,
        _rewarded,
        ("p3o",),
        anchors=BOTH,
        needs="reward",
        numbers=_samples(2, PAIR),
    ),
    Method(
        "copg",
        "Contrastive Policy Gradient",
        "2406.19185; on the policy's own samples, though it may have any",
        _own,
        _rewarded,
        ("copg",),
        needs="reward",
        numbers=_samples(2, PAIR),
    ),
    Method(
        "rso",
        "Statistical Rejection Sampling Optimization",
        "2309.06657, Alg. 1 and Eq. 8 to 10; rewards are those of single completions, not of a ranker of pairs",
        _of("reference"),
        _accepted,
        ("rso_sigmoid", "hinge", "rso_hinge"),
        needs="reward",
        numbers={**_samples(64, PAIR), "accepted": (8, PAIR), "sampler_beta": (0.5, NOT_NEGATIVE)},
        options={"ranking": ("first_round", "tournament"), "duplicates": ("collapse", "keep")},
    ),
    Method(
        "sharpening_sft",
        "Sharpening, SFT form",
        "2412.01951, Sec. 4.1",
        _of("reference"),
        _likeliest,
        anchors={},
        needs=None,
        numbers=_samples(8),
    ),
    Method(
        "sharpening_xpo",
        "Sharpening, XPO form",
        "2412.01951, App. J.2; of the data so far a turn sees its own",
        _with("reference"),
        _side_by_side,
        ("sharpening_xpo",),
        needs=None,
        numbers=_samples(1),
    ),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
