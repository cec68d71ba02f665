"""Reference models that follow the policy: TR-DPO's updates, and sDPO's stages.

Their log-probs change with them, so they are computed for each step's examples and never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastpo.training.batches import stage
from fastpo.training.data import Example
from fastpo.training.loop import Constants, Job, constant_streams


class MovingReference:
    """A reference model that takes over the policy's weights while it is trained.

    Called before each step with the number of steps that were done, it moves the reference if one is due, and puts the
    log-probs of the step's examples into `constants`. A resumed run, whose checkpoint holds the reference's weights,
    does the same as one without a stop.

    With `every`, TR-DPO: after each so many steps the reference becomes α policy + (1 - α) reference; α < 1 is the
    soft, α = 1 the hard update. With the job's stages, sDPO: where a stage begins it becomes the policy.

    Source: TR-DPO, arXiv:2404.09656 (not verified; α = 0.6 and every 512 steps are TRL's defaults), and sDPO,
    arXiv:2403.19270.

    Attributes:
        constants: the job's, by stream, of the examples of the step at hand.
    """

    def __init__(
        self,
        accelerator: Any,
        model: Any,
        *,
        every: int = 0,
        alpha: float = 0.6,
        statistics: tuple[str, ...] | None = (),
    ) -> None:
        """
        Args:
            accelerator: devices and processes.
            model: the reference's `Policy` or `Logits`, prepared, with weights of its own.
            every: steps between updates, 0 for none.
            alpha: the policy's share in an update, in (0, 1].
            statistics: of the reference beside its log-probs, as in `Policy.forward`; None if the loss asks the model
                itself and there are no constants.

        Raises:
            ValueError: every is negative, or alpha is outside its domain.
        """
        if every < 0:
            raise ValueError(f"every must be at least 0, got {every}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {alpha:g}")
        self.accelerator, self.model, self.every, self.alpha = accelerator, model, every, alpha
        self.statistics = statistics
        self.constants: dict[str, Constants] = {}

    def __call__(self, job: Job, done: int) -> None:
        """What is due before the step that follows `done` steps."""
        if done and stage(done, job.steps, job.stages) != stage(done - 1, job.steps, job.stages):
            self.move(job.policy, 1.0)
        elif done and self.every and done % self.every == 0:
            self.move(job.policy, self.alpha)
        self.constants.clear()
        self.constants.update(self.of(job.examples, sorted(set(job.indices(done))), job.tokens))

    def of(self, examples: Sequence[Example], indices: Sequence[int], tokens: int) -> dict[str, Constants]:
        """The streams of some examples under the reference as it is."""
        if self.statistics is None:
            return {}
        return constant_streams(self.accelerator, self.model, examples, indices, tokens, statistics=self.statistics)

    @torch.no_grad()
    def move(self, policy: nn.Module, alpha: float) -> None:
        """reference ← α policy + (1 - α) reference, parameters and buffers."""
        pairs = zip(_state(self.accelerator, policy), _state(self.accelerator, self.model), strict=True)
        for (name, new), (known, old) in pairs:
            if name != known or new.shape != old.shape:
                raise ValueError(
                    f"the reference cannot follow the policy: {known} {tuple(old.shape)} is where the policy has "
                    f"{name} {tuple(new.shape)}"
                )
            # a policy may be sharded where its reference is not
            if hasattr(new, "full_tensor") and not hasattr(old, "full_tensor"):
                new = new.full_tensor()
            if alpha == 1 or not old.is_floating_point():
                old.copy_(new)
            else:
                old.lerp_(new.to(old.dtype), alpha)


def _state(accelerator: Any, model: Any) -> list[tuple[str, torch.Tensor]]:
    inner = accelerator.unwrap_model(model)
    named = [*inner.named_parameters(), *inner.named_buffers()]
    # what is learnt beside the policy has no counterpart
    return [(name, value) for name, value in named if not name.startswith(("critic.", "own."))]
