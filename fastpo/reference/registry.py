"""The table of objectives: one row per method, made by the decorator on its reference formula.

Tests, benchmarks, the command line, the documentation and the trainer iterate over these rows. The table is
built once at import and never changes afterwards. A method that has another's formula is a row of its own over that
formula, made by `derive`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

Theory = Literal["gibbs", "step", "selfplay", "average", "property"]
Kind = Literal["pairwise", "unpaired", "policy"]
Lengths = Literal["none", "optional", "average", "count"]


@dataclass(frozen=True)
class Domain:
    """The interval in which a hyper-parameter is defined; either end may be excluded."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    # whether inf itself is a value
    infinite: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and (-math.inf < value < math.inf or (self.infinite and value == math.inf))

    def __str__(self) -> str:
        left = "(" if self.low_open or math.isinf(self.low) else "["
        right = ")" if self.high_open or (math.isinf(self.high) and not self.infinite) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


POSITIVE = Domain(low=0.0, low_open=True)
NOT_NEGATIVE = Domain(low=0.0)
PROBABILITY = Domain(0.0, 1.0)
ANY = Domain()


@dataclass(frozen=True)
class Input:
    """A tensor beside the log-probs: one number per row, constant to the gradient unless it says otherwise.

    Attributes:
        name: of the argument.
        about: a phrase for the docstring.
        domain: of every number, checked where values may be looked at.
        boolean: whether it is a label.
        shared: whether one number, 0-dimensional, may stand for all rows: a statistic of the batch.
        side: for a number per token, the side (of the row's kind) whose layout it has.
        gradient: whether the gradient flows through it.
    """

    name: str
    about: str
    domain: Domain = ANY
    boolean: bool = False
    shared: bool = False
    side: int | None = None
    gradient: bool = False


@dataclass(frozen=True)
class Variant:
    """What a row computes for one choice of its options.

    Attributes:
        row: name of the row whose formula is taken.
        length_norm: per-token averages, whatever the argument of that name says.
        hyper: from the hyper-parameters that were given to those of that row.
    """

    row: str
    length_norm: bool = False
    hyper: Callable[[dict[str, float]], dict[str, float]] = dict


# a row is itself alone: by identity it has a hash
@dataclass(frozen=True, eq=False)
class Objective:
    """One row of the registry.

    Attributes:
        name: of the public function, and of the row.
        kind: the data the objective eats.
        title: name in words.
        paper: arXiv id or other citation.
        equation: where the formula stands in it.
        formula: the loss per row in torch, of a `Pair` or `Single`, its columns by place and hyper-parameters by name.
        defaults: of the public hyper-parameters.
        domains: of the public hyper-parameters.
        reference_model: whether log-probs of a reference model are given.
        theory: what kind of statement is known about its optimum (see the theory tests).
        aliases: name of the same objective in other libraries.
        kernel: name of the compiled formula, that of the row in which `formula` was registered.
        about: the docstring.
        previous_model: whether log-probs of the previous iterate are given too.
        lengths: "optional": it has a `length_norm` argument; "average": it is on per-token averages; "count": on sums,
            but its formula needs lengths; or "none".
        inputs: tensors beside the log-probs.
        prepare: from the sides, the inputs and the hyper-parameters to sides and columns of the formula. Without it
            the inputs are the columns.
        check: what is wrong with the inputs together, in words, or None.
        columns: names of the formula's columns.
        fixed: hyper-parameters of the formula that are no arguments.
        hyper: from the public hyper-parameters to those of the formula.
        joint: what is wrong with a combination of hyper-parameters, in words, or None.
        per_row: hyper-parameters that may also be a tensor (B,), and the row that is then taken.
        options: names and admissible values of the keywords that choose a variant; the first is the default.
        variants: by the values of the options, in their order; what is missing is an error.
        tokens: whether log-probs must come per token.
        scores: what the sides' numbers are called, "policy" unless they are no log-probs.
        online: whether its data are samples of the policy as it is.
        coupled: whether the loss of a row depends on the other rows of the batch. `prepare` then takes a process group
            too, whose ranks' rows are one batch.
        public: whether it has a public function; else it is the formula of other rows.
    """

    name: str
    kind: Kind
    title: str
    paper: str
    equation: str
    formula: Callable[..., Any]
    defaults: Mapping[str, float]
    domains: Mapping[str, Domain]
    reference_model: bool
    theory: Theory
    aliases: Mapping[str, str] = field(default_factory=dict)
    kernel: str = ""
    about: str = ""
    previous_model: bool = False
    lengths: Lengths = "none"
    inputs: tuple[Input, ...] = ()
    prepare: Callable[..., Any] | None = None
    check: Callable[[Mapping[str, Any]], str | None] | None = None
    columns: tuple[str, ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)
    hyper: Callable[[dict[str, float]], dict[str, float]] | None = None
    joint: Callable[[Mapping[str, float]], str | None] | None = None
    per_row: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    variants: Mapping[tuple[str | None, ...], Variant] = field(default_factory=dict)
    tokens: bool = False
    scores: str = "policy"
    online: bool = False
    coupled: bool = False
    public: bool = True
    # from the above: names of the sides, and of the models whose log-probs each has
    sides: tuple[str, ...] = field(init=False)
    models: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        models = (self.scores, *["reference"] * self.reference_model, *["previous"] * self.previous_model)
        object.__setattr__(self, "sides", ("chosen", "rejected") if self.kind == "pairwise" else ("",))
        object.__setattr__(self, "models", models)

    @property
    def doc(self) -> str:
        return self.about or inspect.getdoc(self.formula) or ""

    @property
    def length_norm(self) -> bool:
        """Whether there is an argument of this name."""
        return self.lengths == "optional"

    def formula_hyper(self, given: Mapping[str, float]) -> dict[str, float]:
        """The hyper-parameters of the formula from the public ones."""
        return {**(given if self.hyper is None else self.hyper(dict(given))), **self.fixed}


_ROWS: dict[str, Objective] = {}


def _enter(row: Objective) -> None:
    if set(row.defaults) != set(row.domains) or row.name in _ROWS:
        raise AssertionError(f"registry row {row.name!r}: domains must name its keyword arguments, once")
    frozen: dict[str, Any] = {
        name: MappingProxyType(dict(getattr(row, name)))
        for name in ("defaults", "domains", "aliases", "fixed", "per_row", "options", "variants")
    }
    _ROWS[row.name] = replace(row, **frozen)


def register(
    kind: Kind,
    *,
    title: str,
    paper: str,
    equation: str,
    domains: Mapping[str, Domain],
    theory: Theory,
    reference_model: bool = True,
    **more: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated formula into the registry; its keyword defaults become the row's defaults.

    The arguments are the fields of `Objective`.
    """

    def enter(formula: Callable[..., Any]) -> Callable[..., Any]:
        name = formula.__name__
        parameters = list(inspect.signature(formula).parameters.values())
        keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        defaults = {key: value for key, value in keywords.items() if key not in more.get("fixed", {})}
        columns = tuple(p.name for p in parameters[1:] if p.kind is not p.KEYWORD_ONLY)
        _enter(
            Objective(
                name=name,
                kind=kind,
                title=title,
                paper=paper,
                equation=equation,
                formula=formula,
                defaults=defaults,
                domains=domains,
                reference_model=reference_model,
                theory=theory,
                kernel=name,
                columns=columns,
                **more,
            )
        )
        return formula

    return enter


def derive(name: str, of: str, *, defaults: Mapping[str, float] | None = None, **changes: Any) -> None:
    """Enter a row over the formula of another: what is not given here is as there, but for the aliases.

    `defaults` change those of the other row; hyper-parameters without a domain in `changes` are dropped.
    """
    other = _ROWS[of]
    domains = changes.pop("domains", other.domains)
    merged = {**other.defaults, **(defaults or {})}
    row = replace(
        other,
        name=name,
        defaults={key: merged[key] for key in domains},
        domains=domains,
        **{"aliases": {}, "per_row": {}, "options": {}, "variants": {}, "public": True, **changes},
    )
    _enter(row)


def objectives(kind: str | None = None) -> Iterator[Objective]:
    """All rows with a public function, or those of one data kind, in the order in which they were registered."""
    return (row for row in _ROWS.values() if row.public and (kind is None or row.kind == kind))


def formulas(kind: str | None = None) -> Iterator[Objective]:
    """All rows that bring a formula of their own."""
    return (row for row in _ROWS.values() if row.name == row.kernel and (kind is None or row.kind == kind))


def objective(name: str) -> Objective:
    """The row of one objective; KeyError if there is none."""
    return _ROWS[name]
