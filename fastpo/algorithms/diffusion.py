"""Group policy optimisation of masked-diffusion language models by a bound on the likelihood of whole sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastpo import advantages, losses
from fastpo.algorithms.base import Batch, Prepared, State, StepOutput, Turn
from fastpo.algorithms.matching import Sampled, TargetMethod
from fastpo.algorithms.rollouts import COUNT
from fastpo.reference.policy import ESTIMATORS
from fastpo.reference.registry import NOT_NEGATIVE
from fastpo.reference.sequence import sequence_sum


class Gdpo(Sampled):
    """PPO with a sequence as its only token: the streams are what each token adds to the bound, on the same masks."""

    def anchors(self, steps: int) -> Mapping[str, str]:
        # in the only step of a turn the policy still is what sampled
        old = {"old": "turn"} if steps > 1 else {}
        return {**old, **({"reference": "start"} if self.hyper["beta"] else {})}

    def prepare(self, turn: Turn, state: State) -> Prepared:
        found = advantages.dr_grpo(turn.batch.numbers["reward"], turn.groups)
        lengths = torch.tensor(turn.batch.completions.lengths)
        return Prepared({"advantages": found.float().repeat_interleave(lengths)}, {}, {})

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        streams, ends = batch.streams, batch.completions.cu_seqlens
        bounds = {
            name: sequence_sum(streams[name], None, ends)[0]
            for name in ("policy", "old", "reference")
            if name in streams
        }
        more: dict[str, Any] = {name: self.hyper[name] for name in ("epsilon", "beta", "kl")}
        out = losses.diffusion_gdpo(
            bounds["policy"],
            streams["advantages"][ends[:-1].long()],
            bounds.get("old"),
            ends.diff(),
            reference_elbos=bounds.get("reference"),
            num_items=batch.num_items,
            **more,
        )
        clipped = out.metrics.sum("clipped_high") + out.metrics.sum("clipped_low")
        metrics = {"clip_fraction": clipped / batch.num_items, "ratio": out.metrics.sum("ratio") / batch.num_items}
        return StepOutput(out.loss, {"loss": out.loss.detach(), **metrics}, {})


DIFFUSION: Mapping[str, TargetMethod] = {
    "diffusion_gdpo": TargetMethod(
        "diffusion_gdpo",
        "GDPO, of masked-diffusion language models",
        "2510.08554, partly verified",
        Gdpo,
        {"nodes": (2, COUNT), "epsilon": (0.2, NOT_NEGATIVE), "beta": (0.0, NOT_NEGATIVE)},
        {"rate": ("time", "count"), "kl": ESTIMATORS[::-1]},
        denoises=True,
    )
}
