"""One class per kind of data: which models a method asks, which inputs it takes, which loss.

An algorithm knows nothing of models, files or optimisers; the training loop knows nothing of algorithms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastpo.algorithms import direct, given, lists
from fastpo.algorithms.base import Algorithm, Batch, Column, Completions, Control, State, StepOutput
from fastpo.algorithms.given import Given, Method
from fastpo.algorithms.inputs import SOURCES
from fastpo.algorithms.lists import Lists
from fastpo.algorithms.pairwise import Pairwise
from fastpo.algorithms.unpaired import Unpaired
from fastpo.reference import Objective, objectives
from fastpo.reference.listwise import ListObjective, list_objectives

_CLASSES: dict[str, type[Pairwise] | type[Unpaired]] = {"pairwise": Pairwise, "unpaired": Unpaired}

# names that methods have elsewhere
ALIASES = {"lipo": "lipo_lambda", "gflownet": "trajectory_balance"}


class _Entry(NamedTuple):
    """What is known of an algorithm before it is built."""

    kind: str
    title: str
    defaults: Mapping[str, Any]
    choices: Mapping[str, tuple[str | None, ...]]
    phrases: Mapping[str, str]
    build: Callable[[Mapping[str, Any]], Algorithm]


def _phrases(domains: Mapping[str, Any], choices: Mapping[str, tuple[str | None, ...]]) -> dict[str, str]:
    phrases = {key: f"a number in {domain}" for key, domain in domains.items()}
    return phrases | {key: f"one of {', '.join(map(str, values))}" for key, values in choices.items()}


def _trainable(row: Objective) -> bool:
    """Policies on data that are given: samples with rewards need another loop, reward models another head."""
    found = all(each.name in SOURCES for each in row.inputs)
    return row.kind in _CLASSES and row.scores == "policy" and not row.online and found


def _of_row(row: Objective) -> _Entry:
    phrases = _phrases(direct.domains(row), row.options)
    if row.length_norm:
        phrases["length_norm"] = "use per-token averages of the log-probs instead of sums"
    options = dict(row.options)
    return _Entry(row.kind, row.title, direct.defaults(row), options, phrases, lambda h: _CLASSES[row.kind](row, h))


def _of_list(row: ListObjective) -> _Entry:
    choices = lists.choices(row)
    phrases = _phrases(row.domains, choices)
    if row.average_pairs is not None:
        phrases["average_pairs"] = "the mean over the pairs of a list instead of their sum"
    return _Entry(lists.kind(row), row.title, lists.defaults(row), choices, phrases, lambda h: Lists(row, h))


def _of_method(row: Method) -> _Entry:
    phrases = {**_phrases(row.domains, row.options), **row.phrases}
    return _Entry(row.kind, row.title, given.defaults(row), dict(row.options), phrases, lambda h: Given(row, h))


_ENTRIES: dict[str, _Entry] = {row.name: _of_row(row) for row in objectives() if _trainable(row)}
_ENTRIES |= {row.name: _of_list(row) for row in list_objectives()}
_ENTRIES |= {row.name: _of_method(row) for row in given.ROWS.values()}


def names(*kinds: str) -> list[str]:
    """The algorithms that can be trained: all, or those on these kinds of data."""
    return [name for name in _ENTRIES if not kinds or kind(name) in kinds]


def kind(name: str) -> str:
    """The data that an algorithm eats."""
    return _ENTRIES[name].kind


def title(name: str) -> str:
    """The method's name in words."""
    return _ENTRIES[name].title


def defaults(name: str) -> dict[str, Any]:
    """The hyper-parameters of an algorithm and their default values."""
    return dict(_ENTRIES[name].defaults)


def choices(name: str) -> dict[str, tuple[str | None, ...]]:
    """The hyper-parameters that are words, and their admissible values."""
    return dict(_ENTRIES[name].choices)


def columns(name: str) -> tuple[Column, ...]:
    """The numbers that an algorithm reads of every example; none of one that cannot be trained."""
    return build(name, {}).columns if name in _ENTRIES else ()


def describe(name: str) -> dict[str, str]:
    """One phrase per hyper-parameter, for help texts."""
    return dict(_ENTRIES[name].phrases)


def build(name: str, hyper: Mapping[str, Any]) -> Algorithm:
    """The algorithm with these hyper-parameters; ValueError for one outside its domain."""
    entry = _ENTRIES[name]
    return entry.build({**entry.defaults, **hyper})


__all__ = [
    "ALIASES",
    "Algorithm",
    "Batch",
    "Column",
    "Completions",
    "Control",
    "State",
    "StepOutput",
    "build",
    "choices",
    "columns",
    "defaults",
    "describe",
    "kind",
    "names",
    "title",
]
