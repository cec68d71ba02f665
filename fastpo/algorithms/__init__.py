"""One small class per method: which data it eats, which models it asks, which loss it takes.

An algorithm knows nothing of models, files or optimisers; the training loop knows nothing of algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastpo.algorithms.base import Algorithm, Completions, StepOutput
from fastpo.algorithms.pairwise import Pairwise
from fastpo.reference import objectives

_CLASSES = {"pairwise": Pairwise}
# those whose training is tested
_NAMES = ("dpo", "cdpo", "robust_dpo", "ipo", "hinge")
_ROWS = {row.name: row for row in objectives() if row.kind in _CLASSES and row.name in _NAMES}


def names() -> list[str]:
    """The algorithms that can be trained."""
    return list(_ROWS)


def title(name: str) -> str:
    """The method's name in words."""
    return _ROWS[name].title


def defaults(name: str) -> dict[str, float | bool]:
    """The hyper-parameters of an algorithm and their default values."""
    row = _ROWS[name]
    return {**row.defaults, **({"length_norm": False} if row.length_norm else {})}


def describe(name: str) -> dict[str, str]:
    """One phrase per hyper-parameter, for help texts."""
    row = _ROWS[name]
    phrases = {key: f"a number in {domain}" for key, domain in row.domains.items()}
    if row.length_norm:
        phrases["length_norm"] = "use per-token averages of the log-probs instead of sums"
    return phrases


def build(name: str, hyper: Mapping[str, float | bool]) -> Algorithm:
    """The algorithm with these hyper-parameters; ValueError for one outside its domain."""
    row = _ROWS[name]
    return _CLASSES[row.kind](row, {**defaults(name), **hyper})


__all__ = ["Algorithm", "Completions", "StepOutput", "build", "defaults", "describe", "names", "title"]
