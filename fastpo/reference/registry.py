"""The table of objectives: one row per method, made by the decorator on its reference formula.

Tests, benchmarks, the command line, the documentation and the trainer iterate over these rows. The table is
built once at import and never changes afterwards.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Theory = Literal["gibbs", "step", "selfplay", "average", "property"]


@dataclass(frozen=True)
class Domain:
    """The interval in which a hyper-parameter is defined; either end may be excluded."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and -math.inf < value < math.inf

    def __str__(self) -> str:
        left = "(" if self.low_open or math.isinf(self.low) else "["
        right = ")" if self.high_open or math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


POSITIVE = Domain(low=0.0, low_open=True)


@dataclass(frozen=True)
class Objective:
    """One row of the registry."""

    name: str
    kind: Literal["pairwise"]
    title: str
    paper: str
    equation: str
    formula: Callable[..., Any]
    defaults: Mapping[str, float]
    domains: Mapping[str, Domain]
    reference_model: bool
    length_norm: bool
    theory: Theory
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.formula) or ""

    @property
    def models(self) -> tuple[str, ...]:
        return ("policy", "reference") if self.reference_model else ("policy",)


_ROWS: dict[str, Objective] = {}


def register(
    kind: Literal["pairwise"],
    *,
    title: str,
    paper: str,
    equation: str,
    domains: Mapping[str, Domain],
    theory: Theory,
    reference_model: bool = True,
    length_norm: bool = False,
    aliases: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated formula into the registry; its keyword defaults become the row's defaults.

    Args:
        kind: the data the objective eats.
        title: name in words.
        paper: arXiv id or other citation.
        equation: where the formula stands in it.
        domains: the admissible interval of every hyper-parameter.
        theory: what kind of statement is known about its optimum (see the theory tests).
        reference_model: whether the objective uses log-probs of a reference model.
        length_norm: whether it is also defined on per-token averages (the `length_norm` argument).
        aliases: name of the same objective in other libraries.
    """

    def enter(formula: Callable[..., Any]) -> Callable[..., Any]:
        name = formula.__name__
        keywords = inspect.signature(formula).parameters.values()
        defaults = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}
        if set(defaults) != set(domains) or name in _ROWS:
            raise AssertionError(f"registry row {name!r}: domains must name its keyword arguments, once")
        _ROWS[name] = Objective(
            name=name,
            kind=kind,
            title=title,
            paper=paper,
            equation=equation,
            formula=formula,
            defaults=MappingProxyType(defaults),
            domains=MappingProxyType(dict(domains)),
            reference_model=reference_model,
            length_norm=length_norm,
            theory=theory,
            aliases=MappingProxyType(dict(aliases or {})),
        )
        return formula

    return enter


def objectives(kind: str | None = None) -> Iterator[Objective]:
    """All rows, or those of one data kind, in the order in which they were registered."""
    return (row for row in _ROWS.values() if kind is None or row.kind == kind)


def objective(name: str) -> Objective:
    """The row of one objective; KeyError if there is none."""
    return _ROWS[name]
