"""One class per kind of data: which models a method asks, which inputs it takes, which loss.

An algorithm knows nothing of models, files or optimisers; the training loop knows nothing of algorithms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from fastpo.algorithms import direct, given, lists, recipes, reward, shaped
from fastpo.algorithms.base import (
    Algorithm,
    Allocating,
    Batch,
    Column,
    Completions,
    Control,
    Draft,
    Draw,
    Group,
    Online,
    Prepared,
    Refining,
    Sample,
    Search,
    State,
    StepOutput,
    Turn,
    Windowed,
)
from fastpo.algorithms.diffusion import DIFFUSION
from fastpo.algorithms.given import Given
from fastpo.algorithms.inputs import SOURCES
from fastpo.algorithms.lists import Lists
from fastpo.algorithms.matching import TARGETS
from fastpo.algorithms.mixed import MPO, Mixed
from fastpo.algorithms.pairwise import Pairwise
from fastpo.algorithms.preferences import METHODS, Method
from fastpo.algorithms.reward import MaxMin, ReactionModel, RewardModel
from fastpo.algorithms.rollouts import Recipe
from fastpo.algorithms.search import SEARCHES
from fastpo.algorithms.unpaired import Unpaired
from fastpo.reference import Domain, Objective, objectives
from fastpo.reference.listwise import ListObjective, list_objectives

_CLASSES: dict[str, type[Pairwise] | type[Unpaired]] = {"pairwise": Pairwise, "unpaired": Unpaired}

# names that methods have elsewhere
ALIASES = {
    "lipo": "lipo_lambda",
    "first": "first_ranknet",
    "gflownet": "trajectory_balance",
    "diffusion_grpo": "diffu_grpo",
}


class _Entry(NamedTuple):
    """What is known of an algorithm before it is built; its losses are the rows of the registry, the default first."""

    kind: str
    title: str
    losses: tuple[str, ...]
    defaults: Mapping[str, Any]
    choices: Mapping[str, tuple[str | None, ...]]
    phrases: Mapping[str, str]
    build: Callable[[Mapping[str, Any]], Algorithm]


def _phrases(domains: Mapping[str, Any], choices: Mapping[str, tuple[str | None, ...]]) -> dict[str, str]:
    phrases = {key: f"a number in {domain}" for key, domain in domains.items()}
    return phrases | {key: f"one of {', '.join(map(str, values))}" for key, values in choices.items()}


def _trainable(row: Objective) -> bool:
    """Policies on data that are given: what samples has entries of its own, as reward models have."""
    found = all(each.name in SOURCES for each in row.inputs)
    online = row.online or row.name in METHODS
    return row.kind in _CLASSES and row.scores == "policy" and not online and found


def _of_row(row: Objective) -> _Entry:
    phrases = _phrases(direct.domains(row), row.options)
    if row.length_norm:
        phrases["length_norm"] = "use per-token averages of the log-probs instead of sums"
    options = dict(row.options)
    return _Entry(
        row.kind,
        row.title,
        (row.name,),
        direct.defaults(row),
        options,
        phrases,
        lambda h: _CLASSES[row.kind](row, h),
    )


def _of_list(row: ListObjective) -> _Entry:
    choices = lists.choices(row)
    phrases = _phrases(row.domains, choices)
    if row.average_pairs is not None:
        phrases["average_pairs"] = "the mean over the pairs of a list instead of their sum"
    return _Entry(
        lists.kind(row), row.title, (row.name,), lists.defaults(row), choices, phrases, lambda h: Lists(row, h)
    )


def _of_method(row: given.Method) -> _Entry:
    phrases = {**_phrases(row.domains, row.options), **row.phrases}
    return _Entry(
        row.kind, row.title, (row.name,), given.defaults(row), dict(row.options), phrases, lambda h: Given(row, h)
    )


def _of_reward_model(row: Objective) -> _Entry:
    return _of_row(row)._replace(build=lambda h: _REWARD_MODELS[row.name](row, h))


class _Method(Protocol):
    """A row of a table of methods that sample completions."""

    @property
    def title(self) -> str: ...

    @property
    def losses(self) -> tuple[str, ...]: ...

    def defaults(self) -> dict[str, Any]: ...

    def domains(self) -> dict[str, Domain]: ...

    def choices(self) -> Mapping[str, tuple[str | None, ...]]: ...

    def build(self, hyper: Mapping[str, Any]) -> Algorithm: ...


def _of_sampling(row: _Method) -> _Entry:
    choices = dict(row.choices())
    phrases = _phrases(row.domains(), choices)
    phrases |= dict.fromkeys(getattr(row, "texts", ()), "numbers, one for each reward or one for all, as 1,0.5")
    return _Entry("prompts", row.title, row.losses, row.defaults(), choices, phrases, row.build)


_REWARD_MODELS: dict[str, type[RewardModel]] = {
    "reward_model": RewardModel,
    "maxmin": MaxMin,
    "reaction_model": ReactionModel,
}


def composed() -> tuple[Objective, ...]:
    """What is trained though it is no objective of its own: reward models."""
    return reward.ROWS


_ENTRIES: dict[str, _Entry] = {row.name: _of_row(row) for row in objectives() if _trainable(row)}
_ENTRIES |= {row.name: _of_list(row) for row in list_objectives()}
_ENTRIES |= {row.name: _of_method(row) for row in given.ROWS.values()}
_ENTRIES |= {row.name: _of_reward_model(row) for row in reward.ROWS}
_SAMPLING: tuple[Mapping[str, _Method], ...] = (recipes.RECIPES, shaped.SHAPED, METHODS, SEARCHES, TARGETS, DIFFUSION)
_ENTRIES |= {name: _of_sampling(row) for table in _SAMPLING for name, row in table.items()}
_ENTRIES[MPO.name] = _of_sampling(MPO)._replace(build=lambda h: Mixed(MPO, h))


def register(row: Recipe | Method) -> None:
    """Make a method of the user's own one that `fastpo train` knows; `examples/new_algorithm.py` is one.

    Args:
        row: a policy gradient (`fastpo.algorithms.rollouts.Recipe`) or what compares samples (`.preferences.Method`).

    Raises:
        ValueError: there is one of this name.
    """
    if row.name in _ENTRIES:
        raise ValueError(f"there is an algorithm {row.name} already")
    _ENTRIES[row.name] = _of_sampling(row)


def names(*kinds: str) -> list[str]:
    """The algorithms that can be trained: all, or those on these kinds of data."""
    return [name for name in _ENTRIES if not kinds or kind(name) in kinds]


def kind(name: str) -> str:
    """The data that an algorithm eats."""
    return _ENTRIES[name].kind


def denoises(name: str) -> bool:
    """Whether it trains masked-diffusion language models, and no causal ones."""
    return name in DIFFUSION or (name in recipes.RECIPES and recipes.RECIPES[name].denoises)


def title(name: str) -> str:
    """The method's name in words."""
    return _ENTRIES[name].title


def losses(name: str) -> tuple[str, ...]:
    """The rows of the registry that are its loss, the default first; its own name, if it is a row of its own."""
    return _ENTRIES[name].losses


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
    "Allocating",
    "Batch",
    "Column",
    "Completions",
    "Control",
    "Draft",
    "Draw",
    "Group",
    "MaxMin",
    "Online",
    "Prepared",
    "Refining",
    "RewardModel",
    "Sample",
    "Search",
    "State",
    "StepOutput",
    "Turn",
    "Windowed",
    "build",
    "choices",
    "columns",
    "composed",
    "defaults",
    "denoises",
    "describe",
    "kind",
    "losses",
    "names",
    "register",
    "title",
]
