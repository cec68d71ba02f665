"""Training on single completions that are labelled desirable or not, or that are all to be unlearned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fastpo import losses
from fastpo.algorithms.base import Batch, Column, State, StepOutput
from fastpo.algorithms.direct import Direct

_LABEL = Column("label", boolean=True, default=0.0)


class Unpaired(Direct):
    """Every method whose loss is an unpaired row of the registry: KTO, BCO, APO-zero, NPO."""

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        return (_LABEL,) if self.unlearns else super().columns

    def problem(self, numbers: Sequence[Sequence[float]]) -> tuple[int, str] | None:
        if not self.unlearns:
            return super().problem(numbers)
        for i, (label,) in enumerate(numbers):
            if label:
                desirable = "this one is desirable (its label is true, or it is the chosen one of a pair)"
                return i, f"{self.name} unlearns every completion of its data, but {desirable}"
        return None

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        rows = len(batch.numbers["label"])
        size = sum(batch.completions.lengths[:rows])
        inputs, new = self._inputs(batch, [size], state)
        out = getattr(losses, self.name)(
            *(batch.streams[model][:size] for model in self.models),
            **inputs,
            cu_seqlens=batch.completions.cu_seqlens[: rows + 1],
            num_items=batch.num_items,
            **self._given,
        )
        desirable = batch.numbers["label"] > 0.5
        beyond = out.rewards - self._centre(inputs)
        right = torch.where(desirable, beyond > 0, beyond < 0)
        each = {
            "chosen_reward": torch.where(desirable, out.rewards, 0),
            "rejected_reward": torch.where(desirable, 0, out.rewards),
            "reward_accuracy": right,
            "desirable": desirable,
        }
        metrics = {name: values.sum() / batch.num_items for name, values in each.items()}
        return StepOutput(out.loss, {"loss": out.loss.detach(), **metrics}, new)

    def _centre(self, inputs: Mapping[str, Tensor]) -> Tensor | float:
        """The reward at which the loss takes a completion for neither desirable nor undesirable."""
        if "kl" in inputs:
            return float(self.hyper["beta"]) * inputs["kl"]  # type: ignore[arg-type]
        return inputs.get("delta", 0.0)

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The rewards as means over their class; a step without one of the classes has no such mean."""
        found = dict(totals)
        share = found.pop("desirable")
        for name, part in (("chosen_reward", share), ("rejected_reward", 1 - share)):
            total = found.pop(name)
            # shares are sums of single precision
            if part > 1e-6:
                found[name] = total / part
        if "chosen_reward" in found and "rejected_reward" in found:
            found["reward_margin"] = found["chosen_reward"] - found["rejected_reward"]
        return found
