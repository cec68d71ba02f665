"""Pairs of segments that a tree search found: the policy's own steps, told apart by what came of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fastpo.algorithms import direct
from fastpo.algorithms.base import Draft, Draw, Group, Prepared, Search, State, Turn, check_hyper
from fastpo.algorithms.pairwise import Pairwise
from fastpo.reference import Domain, Objective, objective
from fastpo.reference.registry import NOT_NEGATIVE

_COUNT = Domain(1.0)


@dataclass(frozen=True)
class SearchMethod:
    """A method that learns from pairs of a tree.

    Attributes:
        name, title, source: of the method.
        loss: its row among the pairwise objectives.
        hardest: the share of a turn's prompts that are learned from, those that surprise the policy most; None: all
            are, and the user has no choice.
    """

    name: str
    title: str
    source: str
    loss: str
    hardest: float | None = None

    @property
    def losses(self) -> tuple[str, ...]:
        """Its row, as those of other methods."""
        return (self.loss,)

    @property
    def row(self) -> Objective:
        """Of the loss."""
        return objective(self.loss)

    def domains(self) -> dict[str, Domain]:
        """The numbers that a user may choose."""
        more = {} if self.hardest is None else {"hardest": Domain(0.0, 1.0, low_open=True)}
        counts = dict.fromkeys(("searches", "width", "segment"), _COUNT)
        return {**direct.domains(self.row), **counts, "exploration": NOT_NEGATIVE, **more}

    def defaults(self) -> dict[str, Any]:
        """All hyper-parameters with their default values."""
        more = {} if self.hardest is None else {"hardest": self.hardest}
        search = {"searches": 8, "width": 4, "segment": 32, "exploration": 1.0}
        return {**direct.defaults(self.row), **search, **more}

    def choices(self) -> dict[str, tuple[str | None, ...]]:
        """The hyper-parameters that are words."""
        return dict(self.row.options)

    def build(self, hyper: Mapping[str, Any]) -> Searched:
        """With all of `defaults()`, or others."""
        return Searched(self.row, hyper, self)


@dataclass(frozen=True)
class Searched(Pairwise):
    """Pairwise preferences between segments behind the same tokens; the reference is the policy at the turn's begin.

    Of the segments behind one node the most visited one is chosen, and that of the lowest value rejected; none are
    where these have the same value.

    Attributes:
        row: of the loss.
        hyper: all of `method.defaults()`.
        method: the method.
    """

    method: SearchMethod

    kind = "prompts"
    critic = False
    demonstrations = False
    needs = "reward"

    def __post_init__(self) -> None:
        check_hyper(self.name, self.hyper, self.method.domains(), self.method.choices())

    @property
    def name(self) -> str:
        return self.method.name

    @cached_property
    def draws(self) -> tuple[Draw, ...]:
        hyper: Mapping[str, Any] = self.hyper
        how = Search(int(hyper["width"]), int(hyper["segment"]), float(hyper["exploration"]))
        return (Draw("search", int(hyper["searches"]), how),)

    def anchors(self, steps: int) -> Mapping[str, str]:
        return {"reference": "turn"}

    def drafts(self, group: Group) -> list[Draft]:
        families: dict[tuple[int, ...], list[int]] = {}
        for i, sample in enumerate(group.samples):
            families.setdefault(tuple(sample.prompt_ids), []).append(i)
        out = []
        for family in families.values():
            chosen = max(family, key=lambda i: (group.visits[i], group.rewards[i]))
            rejected = min(family, key=lambda i: group.rewards[i])
            if group.rewards[chosen] > group.rewards[rejected]:
                # the row's columns, if it has some, are the visits of both
                visits = (float(group.visits[chosen]), float(group.visits[rejected]))
                out.append(Draft((chosen, rejected), visits[: len(self.columns)]))
        return out

    def prepare(self, turn: Turn, state: State) -> Prepared:
        if self.method.hardest is None:
            return Prepared({}, {}, {})
        pairs = len(turn.groups)
        lengths = turn.batch.completions.lengths[:pairs]
        of = turn.groups.repeat_interleave(torch.tensor(lengths))
        # of the chosen segments, which come first
        surprise = -turn.batch.streams["reference"][: len(of)].double()
        groups = len(turn.prompts)
        sums = torch.zeros(groups, dtype=torch.float64).index_add(0, of, surprise)
        counts = of.bincount(minlength=groups)
        kept = math.ceil(float(self.hyper["hardest"]) * groups)  # type: ignore[arg-type]
        hard = torch.zeros(groups, dtype=torch.bool)
        hard[(sums / counts).argsort(descending=True, stable=True)[:kept]] = True
        return Prepared({}, {"perplexity": float((sums.sum() / counts.sum()).exp())}, {}, hard[turn.groups])


_ALL = (
    SearchMethod(
        "online_mcts_dpo",
        "MCTS-DPO, searching as it trains",
        "2405.00451; its search from memory",
        "mcts_dpo",
    ),
    # without its warm-up: supervised, from easy to hard examples
    SearchMethod(
        "itool",
        "iTool: preferences between parts of answers, on the hardest prompts",
        "2501.09766, from memory",
        "dpo",
        hardest=0.5,
    ),
)

SEARCHES: Mapping[str, SearchMethod] = {method.name: method for method in _ALL}
