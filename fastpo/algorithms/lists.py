"""Training on lists: several completions of one prompt, each with a score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastpo import losses
from fastpo.algorithms.base import Batch, Column, Hyper, State, StepOutput, check_hyper
from fastpo.algorithms.plain import Plain
from fastpo.losses._listwise import options
from fastpo.reference.listwise import DISCOUNTS, ListObjective
from fastpo.reference.registry import ANY
from fastpo.reference.sequence import sequence_sum

# log q(y) of whoever sampled; without it, the reference did
_PROPOSAL = Column("proposal_logprobs", default=math.nan, level="completion")


def defaults(row: ListObjective) -> dict[str, Any]:
    """All hyper-parameters with their default values; where the loss has none, 1: the rewards as they are."""
    numbers = {name: 1.0 if value is None else value for name, value in row.defaults.items()}
    return {**numbers, **options(row)}


def choices(row: ListObjective) -> dict[str, tuple[str | None, ...]]:
    """The hyper-parameters that are words, and their admissible values."""
    known: dict[str, tuple[str | None, ...]] = {"loss": tuple(row.kinds), "discount": tuple(DISCOUNTS)}
    return {name: known[name] for name in options(row) if name in known}


def kind(row: ListObjective) -> str:
    """The data that a row eats."""
    return "identifiers" if "scores" in row.tensors else "lists"


@dataclass(frozen=True)
class Lists(Plain):
    """Every method whose loss is a row of the table of lists: LiPO's, PRO, InfoNCA, NCA, EXO, BRAIn, FIRST.

    Completions are scored by their summed log-probs. BRAIn's supervised model is the reference, and so is its
    proposal where the data do not say otherwise. FIRST's scores are logits of identifiers; as only their differences
    count, log-probs of completions of one token each serve. The language model's loss that FIRST is added to is `sft`.

    Attributes:
        row: of the table.
        hyper: all of `defaults(row)`.
    """

    row: ListObjective
    hyper: Hyper

    def __post_init__(self) -> None:
        check_hyper(self.name, self.hyper, self.row.domains, choices(self.row))

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def kind(self) -> str:
        return kind(self.row)

    @cached_property
    def models(self) -> tuple[str, ...]:  # type: ignore[override]
        given = self.row.models
        return ("policy", "reference") if "reference" in given or "prior" in given else ("policy",)

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        targets = Column(self.row.names[-1], level="completion", domain=self.row.targets or ANY)
        return (targets, *[_PROPOSAL] * ("proposal" in self.row.tensors))

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        ends = batch.completions.cu_seqlens
        order, bounds = batch.completions.by_example()
        sums = {model: sequence_sum(batch.streams[model], None, ends)[0][order] for model in self.models}
        numbers = {name: values[order] for name, values in batch.numbers.items()}
        tensors = self._tensors(sums, numbers, ends.diff()[order])
        out = getattr(losses, self.name)(*tensors, **self.hyper, cu_seqlens=bounds, num_items=batch.num_items)
        targets = -tensors[-1] if self.row.names[-1] == "ranks" else tensors[-1]
        found = _ranking(out.rewards, targets, bounds)
        metrics = {name: values.nansum() / batch.num_items for name, values in found.items()}
        return StepOutput(out.loss, {"loss": out.loss.detach(), **metrics}, {})

    def _tensors(self, sums: Mapping[str, Tensor], numbers: Mapping[str, Tensor], lengths: Tensor) -> list[Tensor]:
        """The arguments of the loss, in their order."""
        given: dict[str, Tensor] = {**sums, **numbers, "scores": sums["policy"], "lengths": lengths}
        if "prior" in self.row.tensors:
            proposal = numbers[_PROPOSAL.name].to(sums["reference"].dtype)
            given["prior"] = sums["reference"]
            given["proposal"] = torch.where(proposal.isnan(), sums["reference"], proposal)
        return [given[name] for name in self.row.names]

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        """How the lists are ranked, as means over those that have something to rank."""
        found = dict(totals)
        share = found.pop("ranked")
        for name in ("reward_margin", "reward_accuracy", "top1"):
            total = found.pop(name)
            # shares are sums of single precision
            if share > 1e-6:
                found[name] = total / share
        return found


def _ranking(rewards: Tensor, targets: Tensor, bounds: Tensor) -> dict[str, Tensor]:
    """The metrics of packed lists, (B,) each: NaN, and "ranked" 0, where all targets of a list are equal."""
    counts = bounds.diff()
    mask = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    padded = [values.new_zeros(mask.shape).masked_scatter(mask, values) for values in (rewards, targets)]
    found = losses.ranking_metrics(*padded, mask=mask)
    return {
        "reward_margin": found.margin,
        "reward_accuracy": found.pair_accuracy,
        "top1": found.top1,
        "ranked": (~found.margin.isnan()).to(found.margin.dtype),
    }
