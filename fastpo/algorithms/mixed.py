"""Mixed Preference Optimization: DPO on the pairs that are easy, then PPO on the prompts of the others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from fastpo import data
from fastpo.algorithms.base import Batch, Draft, Group, Prepared, State, StepOutput, Turn
from fastpo.algorithms.pairwise import Pairwise
from fastpo.algorithms.recipes import GAE, RECIPES
from fastpo.algorithms.rollouts import PolicyGradient, Recipe
from fastpo.reference import objective
from fastpo.reference.registry import NOT_NEGATIVE, POSITIVE, PROBABILITY

MPO = Recipe(
    "mpo",
    "Mixed Preference Optimization",
    "2403.19443; threshold and β are not verified",
    "ppo",
    RECIPES["ppo"].estimate,
    samples=1,
    penalty="reward",
    numbers={
        **GAE,
        "first_stage": (0.5, PROBABILITY),
        "threshold": (1.0, NOT_NEGATIVE),
        "dpo_beta": (0.1, POSITIVE),
    },
    critic=True,
)


class Mixed(PolicyGradient):
    """Two stages of one run: the second one's PPO starts from the model that DPO gave, which is also its reference.

    A pair is easy if the column "margin" of its row, or else the difference of its rewards, is beyond the threshold.
    The first stage is the share `first_stage` of the turns, in which the policy's samples are measured only.
    """

    demonstrations = 2

    @cached_property
    def _first(self) -> Pairwise:
        return Pairwise(objective("dpo"), {"beta": self.hyper["dpo_beta"]})

    def anchors(self, steps: int) -> Mapping[str, str]:
        return {**super().anchors(steps), "reference": "stage"}

    def drafts(self, group: Group) -> list[Draft]:
        *rewards, chosen, rejected = group.rewards
        own = len(rewards)
        known = group.samples[own].row.get("margin")
        margin = chosen - rejected if known is None else float(known)
        easy = len(data.mixed_split([margin], self.hyper["threshold"]).easy) > 0
        if group.stage == 0:
            return [Draft((own, own + 1), (margin,))] if easy else []
        return [] if easy else super().drafts(group._replace(rewards=rewards))

    def prepare(self, turn: Turn, state: State) -> Prepared:
        if len(turn.batch.completions.lengths) > len(turn.groups):
            return Prepared({}, {}, {})
        return super().prepare(turn, state)

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        if "advantages" in batch.streams:
            return super().__call__(batch, state)
        out = self._first(batch, state)
        # the critic, which learns nothing yet, has a gradient all the same: what trains in parallel waits for it
        return out._replace(loss=out.loss + 0 * batch.streams["policy_value"].sum())
