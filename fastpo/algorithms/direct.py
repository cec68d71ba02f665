"""What training on pairs and on single completions have in common: hyper-parameters and the inputs of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.algorithms.base import Batch, Column, Completions, Control, Hyper, State, check_hyper
from fastpo.algorithms.inputs import SOURCES, Drawn, Seen, Statistic, Stream
from fastpo.reference import Domain, Objective, objective
from fastpo.reference.sequence import sequence_sum


def statistic_of(row: Objective) -> Statistic | None:
    """What computes a row's inputs from the whole step, if it has such inputs."""
    found = (SOURCES[given.name] for given in row.inputs)
    return next((source for source in found if isinstance(source, Statistic)), None)


def domains(row: Objective) -> dict[str, Domain]:
    """The numbers that a user may choose: those of the loss, and those of its statistics."""
    statistic = statistic_of(row)
    more = {} if statistic is None else {name: domain for name, (_, domain) in statistic.hyper.items()}
    return {**row.domains, **more}


def defaults(row: Objective) -> dict[str, Any]:
    """All hyper-parameters with their default values: numbers, and the keywords that choose a variant."""
    statistic = statistic_of(row)
    more = {} if statistic is None else {name: value for name, (value, _) in statistic.hyper.items()}
    options = {name: values[0] for name, values in row.options.items()}
    return {**row.defaults, **more, **options, **({"length_norm": False} if row.length_norm else {})}


@dataclass(frozen=True)
class Direct:
    """A method whose loss is a row of the registry, on data that are given.

    Attributes:
        row: of the registry.
        hyper: all of `defaults(row)`.
    """

    row: Objective
    hyper: Hyper

    def __post_init__(self) -> None:
        check_hyper(self.name, self.hyper, domains(self.row), self.row.options)

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def kind(self) -> str:
        return self.row.kind

    @property
    def models(self) -> tuple[str, ...]:
        return self.row.models

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        found = (SOURCES[given.name] for given in self.row.inputs)
        return tuple(source for source in found if isinstance(source, Column))

    @cached_property
    def _streams(self) -> frozenset[str]:
        found = (SOURCES[given.name] for given in self.row.inputs)
        return frozenset(source.name for source in found if isinstance(source, Stream))

    @property
    def statistics(self) -> Mapping[str, tuple[str, ...]]:
        return {
            model: tuple(sorted(s.removeprefix(f"{model}_") for s in self._streams if s.startswith(f"{model}_")))
            for model in self.models
        }

    @property
    def divergence(self) -> bool:
        return "kl" in self._streams

    @property
    def mismatched(self) -> bool:
        return self._statistic is not None and self._statistic.mismatched

    @property
    def unlearns(self) -> bool:
        return self.kind == "unpaired" and "labels" not in (given.name for given in self.row.inputs)

    @property
    def whole_step(self) -> bool:
        return self.row.coupled or self._statistic is not None

    @property
    def control(self) -> Control | None:
        return None

    def module(self, width: int) -> nn.Module | None:
        return None

    def candidates(self, ids: Tensor, completions: Completions) -> Tensor | None:
        return None

    @cached_property
    def _statistic(self) -> Statistic | None:
        return statistic_of(self.row)

    def problem(self, numbers: Sequence[Sequence[float]]) -> tuple[int, str] | None:
        given = [each for each in self.row.inputs if isinstance(SOURCES[each.name], Column)]
        columns = list(zip(*numbers, strict=True))
        for each, column, values in zip(given, self.columns, columns, strict=True):
            for i, value in enumerate(values):
                if not each.boolean and value not in each.domain:
                    return i, f'"{column.name}" must be in {each.domain} for {self.name}, got {value:g}'
        check = self._taken.check
        if check is None:
            return None
        tensors = {
            each.name: torch.tensor(values, dtype=torch.float64) for each, values in zip(given, columns, strict=True)
        }
        if check(tensors) is None:
            return None
        for i in range(len(numbers)):
            if (found := check({name: values[i : i + 1] for name, values in tensors.items()})) is not None:
                return i, found
        raise AssertionError(f"{self.name}: its check refuses all rows together, but none alone")

    @property
    def _taken(self) -> Objective:
        """The row whose formula the options choose."""
        if not self.row.options:
            return self.row
        return objective(self.row.variants[tuple(self.hyper[name] for name in self.row.options)].row)  # type: ignore[misc]

    def draw(self, completions: Completions, seed: int) -> dict[str, Tensor]:
        sources = (SOURCES[given.name] for given in self.row.inputs)
        drawn = {source.name: source.draw for source in sources if isinstance(source, Drawn)}
        return {name: draw(completions, torch.Generator().manual_seed(seed)) for name, draw in drawn.items()}

    @property
    def _given(self) -> dict[str, Any]:
        """The hyper-parameters that the loss itself takes."""
        own = {*self.row.defaults, *self.row.options, *["length_norm"] * self.row.length_norm}
        return {name: value for name, value in self.hyper.items() if name in own}

    def _inputs(self, batch: Batch, sizes: Sequence[int], state: State) -> tuple[dict[str, Tensor], State]:
        """The loss's inputs beside log-probs, by argument, and the new state.

        Args:
            batch: of the loss.
            sizes: tokens of each side, which stand one behind the other in the streams.
            state: of the steps before.
        """
        inputs: dict[str, Tensor] = {}
        new: State = {}
        if self._statistic is not None:
            inputs, new = self._statistic.compute(self._seen(batch), self.hyper, state)
        for given in self.row.inputs:
            source = SOURCES[given.name]
            if isinstance(source, Column):
                numbers = batch.numbers[source.name]
                inputs[given.name] = numbers > 0.5 if given.boolean else numbers
            elif not isinstance(source, Statistic):
                assert given.side is not None
                inputs[given.name] = batch.streams[source.name][: sum(sizes)].split(list(sizes))[given.side]
        return {given.name: inputs[given.name] for given in self.row.inputs}, new

    def _seen(self, batch: Batch) -> Seen:
        parts = len(self.row.sides) + self.mismatched
        ends = batch.completions.cu_seqlens
        sums = [
            sequence_sum(batch.streams[model].detach(), None, ends)[0].chunk(parts) for model in ("policy", "reference")
        ]
        labels = batch.numbers.get("label")
        return Seen(
            sums[0],
            sums[1],
            ends.diff().to(sums[0][0].dtype).chunk(parts),
            None if labels is None else labels > 0.5,
            torch.Generator().manual_seed(batch.seed),
        )

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        return dict(totals)
