"""Training on pairs of a chosen and a rejected completion."""

from __future__ import annotations

from fastpo import losses
from fastpo.algorithms.base import Batch, State, StepOutput
from fastpo.algorithms.direct import Direct


class Pairwise(Direct):
    """Every method whose loss is a pairwise row of the registry: DPO and its relatives."""

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        lengths, ends = batch.completions
        pairs = len(lengths) // 2
        sizes = [sum(lengths[:pairs]), sum(lengths[pairs:])]
        sides = [side for model in self.models for side in batch.streams[model].split(sizes)]
        inputs, new = self._inputs(batch, sizes, state)
        out = getattr(losses, self.row.name)(
            *sides,
            **inputs,
            chosen_cu_seqlens=ends[: pairs + 1],
            rejected_cu_seqlens=ends[pairs:] - sizes[0],
            # a mean over the pairs that the step keeps, if it does not keep all
            num_items=inputs["keep"].sum() if "keep" in inputs else batch.num_items,
            **self._given,
        )
        each = {
            "chosen_reward": out.chosen_rewards,
            "rejected_reward": out.rejected_rewards,
            "reward_margin": out.margins,
            "reward_accuracy": out.accuracies,
        }
        metrics = {name: values.sum() / batch.num_items for name, values in each.items()}
        return StepOutput(out.loss, {"loss": out.loss.detach(), **metrics}, new)
