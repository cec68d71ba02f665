"""One class per kind of data: which models a method asks, which inputs it takes, which loss.

An algorithm knows nothing of models, files or optimisers; the training loop knows nothing of algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fastpo.algorithms import direct
from fastpo.algorithms.base import (
    Algorithm,
    Batch,
    Column,
    Completions,
    Draft,
    Draw,
    Group,
    Online,
    Prepared,
    Sample,
    Search,
    State,
    StepOutput,
    Turn,
)
from fastpo.algorithms.diffusion import DIFFUSION
from fastpo.algorithms.inputs import SOURCES
from fastpo.algorithms.matching import TARGETS
from fastpo.algorithms.pairwise import Pairwise
from fastpo.algorithms.recipes import RECIPES
from fastpo.algorithms.search import SEARCHES
from fastpo.algorithms.unpaired import Unpaired
from fastpo.reference import Domain, Objective, objectives

_CLASSES: dict[str, type[Pairwise] | type[Unpaired]] = {"pairwise": Pairwise, "unpaired": Unpaired}


def _trainable(row: Objective) -> bool:
    """Policies on data that are given: samples with rewards need another loop, reward models another head."""
    given = all(each.name in SOURCES for each in row.inputs)
    return row.kind in _CLASSES and row.scores == "policy" and not row.online and given


_ROWS = {row.name: row for row in objectives() if _trainable(row)}


class _Method(Protocol):
    """A row of a table of methods that sample completions."""

    @property
    def title(self) -> str: ...

    def defaults(self) -> dict[str, Any]: ...

    def domains(self) -> dict[str, Domain]: ...

    def choices(self) -> Mapping[str, tuple[str | None, ...]]: ...

    def build(self, hyper: Mapping[str, Any]) -> Algorithm: ...


# what samples completions itself
_ONLINE: Mapping[str, _Method] = {**RECIPES, **SEARCHES, **TARGETS, **DIFFUSION}


def names(*kinds: str) -> list[str]:
    """The algorithms that can be trained: all, or those on these kinds of data."""
    everything = [*_ROWS, *_ONLINE]
    return [name for name in everything if kind(name) in kinds] if kinds else everything


def kind(name: str) -> str:
    """The data that an algorithm eats: "prompts" of one that samples completions itself."""
    return "prompts" if name in _ONLINE else _ROWS[name].kind


def denoises(name: str) -> bool:
    """Whether it trains masked-diffusion language models, and no causal ones."""
    return name in DIFFUSION or (name in RECIPES and RECIPES[name].denoises)


def title(name: str) -> str:
    """The method's name in words."""
    return (_ONLINE.get(name) or _ROWS[name]).title


def defaults(name: str) -> dict[str, Any]:
    """The hyper-parameters of an algorithm and their default values."""
    if name in _ONLINE:
        return _ONLINE[name].defaults()
    return direct.defaults(_ROWS[name])


def choices(name: str) -> dict[str, tuple[str | None, ...]]:
    """The hyper-parameters that are words, and their admissible values."""
    if name in _ONLINE:
        return dict(_ONLINE[name].choices())
    return dict(_ROWS[name].options)


def columns(name: str) -> tuple[Column, ...]:
    """The numbers that an algorithm reads of every example; none of one that cannot be trained."""
    return build(name, {}).columns if name in names() else ()


def describe(name: str) -> dict[str, str]:
    """One phrase per hyper-parameter, for help texts."""
    row = _ROWS.get(name)
    domains = _ONLINE[name].domains() if row is None else direct.domains(row)
    phrases = {key: f"a number in {domain}" for key, domain in domains.items()}
    phrases |= {key: f"one of {', '.join(map(str, values))}" for key, values in choices(name).items()}
    if row is not None and row.length_norm:
        phrases["length_norm"] = "use per-token averages of the log-probs instead of sums"
    return phrases


def build(name: str, hyper: Mapping[str, Any]) -> Algorithm:
    """The algorithm with these hyper-parameters; ValueError for one outside its domain."""
    if name in _ONLINE:
        return _ONLINE[name].build({**defaults(name), **hyper})
    row = _ROWS[name]
    return _CLASSES[row.kind](row, {**defaults(name), **hyper})


__all__ = [
    "Algorithm",
    "Batch",
    "Column",
    "Completions",
    "Draft",
    "Draw",
    "Group",
    "Online",
    "Prepared",
    "Sample",
    "Search",
    "State",
    "StepOutput",
    "Turn",
    "build",
    "choices",
    "columns",
    "defaults",
    "denoises",
    "describe",
    "kind",
    "names",
    "title",
]
