"""Training on pairs of a chosen and a rejected completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastpo import losses
from fastpo.algorithms.base import Completions, StepOutput
from fastpo.reference import Objective


@dataclass(frozen=True)
class Pairwise:
    """Every method whose loss is a pairwise row of the registry: DPO and its relatives."""

    row: Objective
    hyper: Mapping[str, float | bool]

    def __post_init__(self) -> None:
        for key, domain in self.row.domains.items():
            if self.hyper[key] not in domain:
                raise ValueError(f"{key} must be in {domain} for {self.name}, got {self.hyper[key]:g}")

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def kind(self) -> str:
        return self.row.kind

    @property
    def models(self) -> tuple[str, ...]:
        return self.row.models

    def __call__(self, logprobs: Mapping[str, Tensor], completions: Completions, num_items: int) -> StepOutput:
        pairs = len(completions.lengths) // 2
        sizes = [sum(completions.lengths[:pairs]), sum(completions.lengths[pairs:])]
        sides = [side for model in self.models for side in logprobs[model].split(sizes)]
        ends = completions.cu_seqlens
        out = getattr(losses, self.name)(
            *sides,
            chosen_cu_seqlens=ends[: pairs + 1],
            rejected_cu_seqlens=ends[pairs:] - sizes[0],
            num_items=num_items,
            **self.hyper,
        )
        each = {
            "chosen_reward": out.chosen_rewards,
            "rejected_reward": out.rejected_rewards,
            "reward_margin": out.margins,
            "reward_accuracy": out.accuracies,
        }
        metrics = {name: values.sum() / num_items for name, values in each.items()}
        return StepOutput(out.loss, {"loss": out.loss.detach(), **metrics})
