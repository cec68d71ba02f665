"""Rewards of what another model answers once it has read a completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fastpo.algorithms import Sample
from fastpo.training.rollouts import Engine, Sampling


class Candidate:
    """A `Scorer` of preambles: a frozen model reads each of them and the prompt, and its answer is rewarded.

    The preamble stands before the prompt, behind the token with which texts begin, if there is one. The answer is the
    most probable one, so that nothing but the preamble makes it better or worse.

    Source: Reverse engineering human preferences with reinforcement learning, 2505.15795 (from memory).
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        decode: Callable[[Sequence[int]], str],
        scorer: Callable[[Sequence[Sample]], list[float]],
        begin: int | None = None,
    ) -> None:
        """
        Args:
            engine: of the frozen model, whose vocabulary is the policy's.
            sampling: with its tokens that end an answer, and how long one may be.
            decode: token ids to text, without the tokens that end it.
            scorer: of the answers, each as a completion of the bare prompt.
            begin: the token with which texts begin.
        """
        self.engine, self.decode, self.scorer, self.begin = engine, decode, scorer, begin
        self.sampling = replace(sampling, temperature=0.0)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        found = self.engine.generate([self._read(sample) for sample in samples], 1, self.sampling)
        answers = [
            sample._replace(completion=self.decode(answer.ids), ids=answer.ids, ended=answer.ended)
            for sample, (answer,) in zip(samples, found, strict=True)
        ]
        return self.scorer(answers)

    def _read(self, sample: Sample) -> list[int]:
        preamble = sample.ids
        if preamble[-1] in self.sampling.stop:
            preamble = preamble[:-1]
        first = int(sample.prompt_ids[0] == self.begin)
        return [*sample.prompt_ids[:first], *preamble, *sample.prompt_ids[first:]]
