"""The expectation step of MaxMin-RLHF: which reward model describes whose choices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpo.algorithms import MaxMin, State
from fastpo.algorithms.reward import ANNOTATOR
from fastpo.data import maxmin_assign
from fastpo.training.data import Example
from fastpo.training.errors import UserError
from fastpo.training.loop import Job, constant_streams


class Annotators:
    """Gives each annotator a reward model, in the job's memory, so that checkpoints hold it.

    Called before each step with the number of steps that were done. After every so many, each annotator gets the model
    under which the likelihood of all their choices in the training data is largest.

    Source: MaxMin-RLHF, arXiv:2402.08925, Algorithm 2; its details are not verified.
    """

    def __init__(self, algorithm: MaxMin, examples: Sequence[Example], held_out: Sequence[Example], seed: int) -> None:
        """
        Args:
            algorithm: how many models, how often.
            examples: the training data.
            held_out: what is measured on.
            seed: of the division to begin with.

        Raises:
            UserError: there are fewer annotators than models, or one of the held-out pairs has none of the others.
        """
        self.algorithm, self.examples = algorithm, examples
        self._column = algorithm.columns.index(ANNOTATOR)
        self.users = torch.tensor([int(example.numbers[self._column]) for example in examples])
        self.count, self.seed = int(self.users.max()) + 1, seed
        if self.count < algorithm.groups:
            raise UserError(f"--algorithm.groups {algorithm.groups} is more than there are annotators ({self.count})")
        for example in held_out:
            if example.numbers[self._column] >= self.count:
                raise UserError(f"--eval_data, row {example.row}: its annotator has no pairs in the training data")

    def start(self) -> State:
        """A random division into parts of equal size, one more or less."""
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed))
        return {"models": order % self.algorithm.groups}

    def __call__(self, job: Job, done: int) -> None:
        """What is due before the step that follows `done` steps."""
        if done and done % self.algorithm.every == 0:
            job.memory.state = {"models": self.assign(job)}

    def assign(self, job: Job) -> torch.Tensor:
        """The model of each annotator (H,), by the models as they are."""
        statistics = self.algorithm.statistics["policy"]
        everything = range(len(self.examples))
        streams = constant_streams(
            job.accelerator, job.policy, self.examples, everything, job.tokens, "score", statistics
        )
        margins = torch.empty(self.algorithm.groups, len(self.examples), dtype=torch.float64)
        for u, name in enumerate(("score", *(f"score_{s}" for s in statistics))):
            for i in everything:
                chosen, rejected = streams[name][i]
                margins[u, i] = float(chosen.sum() - rejected.sum())
        return maxmin_assign(margins, self.users, reseed=True)
