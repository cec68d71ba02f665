"""Training reward models: of pairs, one for all or several for groups of annotators; and of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import losses
from fastpo.algorithms.base import Batch, Column, State, StepOutput
from fastpo.algorithms.direct import Direct
from fastpo.algorithms.inputs import SOURCES
from fastpo.algorithms.unpaired import Unpaired
from fastpo.reference import Domain, Objective, objective
from fastpo.reference.registry import NOT_NEGATIVE
from fastpo.reference.sequence import sequence_sum

ANNOTATOR = Column("annotator", category=True)

_REWARD_MODEL = replace(
    objective("bradley_terry"),
    name="reward_model",
    title="Reward model by Bradley-Terry",
    defaults={"center": 0.0},
    domains={"center": NOT_NEGATIVE},
    options={"margin": ("column", "scores", "none")},
    per_row={},
    about="""-log σ(r_w - r_l - m) + c (r_w + r_l)², of a model's scores at the ends of the completions.

m is Llama 2's margin: the column "margin", 0 where there is none; or with margin="scores" chosen_score less
rejected_score. The term with c = center, TRL's center_rewards_coefficient (arXiv:2312.09244, not in the catalogue; 0.01
is its documentation's), keeps the scores around 0: the likelihood alone knows their differences only.""",
)
_MAXMIN = replace(
    _REWARD_MODEL,
    name="maxmin",
    title="MaxMin-RLHF's reward models",
    paper="arXiv:2402.08925",
    equation="Algorithm 2, from memory",
    theory="property",
    defaults={"groups": 2, "every": 10, **_REWARD_MODEL.defaults},
    domains={"groups": Domain(1.0), "every": Domain(1.0), **_REWARD_MODEL.domains},
    aliases={},
    about="""Reward models for groups of annotators, by hard expectation-maximisation on Bradley-Terry.

Each of `groups` models learns from the pairs of its annotators, and after every `every` steps each annotator is given
the model under which the likelihood of all their choices is largest; of equals the first. A model that has lost all of
them gets the one who is worst described elsewhere. It begins with a random division into equal parts. A policy is then
to maximise the least of the models' mean rewards, so their scales must be comparable: `center` keeps them together.""",
)
_REACTION_MODEL = replace(
    objective("apo_zero_unpaired"),
    name="reaction_model",
    title="RLUF's model of reactions",
    paper="arXiv:2505.14946",
    equation="P[Love], from memory",
    theory="property",
    defaults={},
    domains={},
    reference_model=False,
    scores="reward",
    aliases={},
    about="""Binary cross entropy of a model's score at the end of a completion, a logit, with its label.

The label says whether users reacted so, such as with love. Where few do, the paper draws as many of the others, which
is left to the data. As a reward the model gives the probability.""",
)
ROWS: tuple[Objective, ...] = (_REWARD_MODEL, _MAXMIN, _REACTION_MODEL)


class RewardModel(Direct):
    """One reward model, learned from pairs.

    Attributes:
        problem_type: what transformers is to call the model's task, if there is a word.
    """

    problem_type: ClassVar[str | None] = None

    @property
    def models(self) -> tuple[str, ...]:
        # the loop's name for what is trained
        return ("policy",)

    @property
    def groups(self) -> int:
        """How many reward models there are."""
        return 1

    @property
    def statistics(self) -> Mapping[str, tuple[str, ...]]:
        return {"policy": tuple(map(str, range(1, self.groups)))}

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        found = {
            "column": (Column("margin", default=0.0),),
            "scores": (SOURCES["chosen_score"], SOURCES["rejected_score"]),
            "none": (),
        }
        return found[str(self.hyper["margin"])]  # type: ignore[return-value]

    def problem(self, numbers: Sequence[Sequence[float]]) -> tuple[int, str] | None:
        for i, values in enumerate(numbers):
            given = dict(zip((column.name for column in self.columns), values, strict=True))
            margin = given.get("margin", given.get("chosen_score", 0) - given.get("rejected_score", 0))
            if margin < 0:
                what = '"margin"' if "margin" in given else "chosen_score less rejected_score, the margin,"
                return i, f"{what} must be at least 0 for {self.name}, got {margin:g}"
        return None

    def _margins(self, batch: Batch, like: Tensor) -> Tensor:
        numbers = batch.numbers
        if "chosen_score" in numbers:
            return (numbers["chosen_score"] - numbers["rejected_score"]).to(like.dtype)
        return numbers["margin"].to(like.dtype) if "margin" in numbers else torch.zeros_like(like)

    def _scores(self, batch: Batch, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """The score of every completion, and further sums over the pairs for the metrics."""
        return sequence_sum(batch.streams["policy"], None, batch.completions.cu_seqlens)[0], {}

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        scores, counts = self._scores(batch, state)
        chosen, rejected = scores.chunk(2)
        out = losses.bradley_terry(chosen, rejected, margin=self._margins(batch, chosen), num_items=batch.num_items)
        loss = out.loss
        center = float(self.hyper["center"])  # type: ignore[arg-type]
        if center:
            loss = loss + center * (chosen + rejected).square().sum() / batch.num_items
        sums = {
            "chosen_reward": out.chosen_rewards,
            "rejected_reward": out.rejected_rewards,
            "reward_margin": out.margins,
            "reward_accuracy": out.accuracies,
            **counts,
        }
        metrics = {name: values.sum() / batch.num_items for name, values in sums.items()}
        return StepOutput(loss, {"loss": loss.detach(), **metrics}, state)


class ReactionModel(RewardModel):
    """A reward model that is a classifier, learned from single completions with labels."""

    # transformers' word for independent logits, be there one
    problem_type = "multi_label_classification"
    finish = Unpaired.finish

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        return (SOURCES["labels"],)  # type: ignore[return-value]

    def problem(self, numbers: Sequence[Sequence[float]]) -> None:
        return None

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        scores, _ = self._scores(batch, state)
        labels = batch.numbers["label"] > 0.5
        loss = F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="sum") / batch.num_items
        rewards = scores.detach()
        sums = {
            "chosen_reward": torch.where(labels, rewards, 0),
            "rejected_reward": torch.where(labels, 0, rewards),
            "reward_accuracy": (rewards > 0) == labels,
            "desirable": labels,
        }
        metrics = {name: values.sum() / batch.num_items for name, values in sums.items()}
        return StepOutput(loss, {"loss": loss.detach(), **metrics}, state)


class MaxMin(RewardModel):
    """Several reward models and who is described by which.

    The state has "models", int64: by the annotator's number, the reward model. The expectation step writes it.
    """

    @property
    def groups(self) -> int:
        return int(self.hyper["groups"])  # type: ignore[arg-type]

    @property
    def every(self) -> int:
        """Steps between expectation steps."""
        return int(self.hyper["every"])  # type: ignore[arg-type]

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        return (*super().columns, ANNOTATOR)

    def _scores(self, batch: Batch, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        ends = batch.completions.cu_seqlens
        streams = [batch.streams["policy"], *(batch.streams[f"policy_{name}"] for name in self.statistics["policy"])]
        scores = torch.stack([sequence_sum(stream, None, ends)[0] for stream in streams])
        annotators = batch.numbers[ANNOTATOR.name].long()
        models = state["models"].to(annotators.device)[annotators]
        counts = {f"share_{u}": models == u for u in range(self.groups)}
        return scores.gather(0, torch.cat([models, models])[None])[0], counts
