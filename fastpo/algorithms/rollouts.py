"""Policy gradients: one completion per example, a row of the policy losses, and an estimate of the advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastpo import losses, rewards
from fastpo.algorithms.base import (
    Batch,
    Column,
    Draft,
    Draw,
    Group,
    Prepared,
    State,
    StepOutput,
    Turn,
    check_hyper,
)
from fastpo.algorithms.plain import Plain
from fastpo.losses import RolloutCorrection
from fastpo.reference.policy import AGGREGATIONS, ESTIMATORS, PolicyObjective, policy
from fastpo.reference.registry import NOT_NEGATIVE, POSITIVE, Domain

CORRECTIONS: Mapping[str, Callable[[], RolloutCorrection] | None] = {
    "none": None,
    "tis": RolloutCorrection.tis,
    "sequence_tis": partial(RolloutCorrection.tis, level="sequence"),
    "sequence_mean_tis": partial(RolloutCorrection.tis, level="sequence_mean"),
    "mis": RolloutCorrection.mis,
    "icepop": RolloutCorrection.icepop,
    "sequence_mask": RolloutCorrection.sequence_mask,
}
COUNT = Domain(1.0)
Options = Mapping[str, Any]
REWARD = Column("reward")


class Seen(NamedTuple):
    """What advantages are estimated from.

    Attributes:
        rewards: fp64 (B,).
        groups: int64 (B,), the prompt of each.
        lengths: int64 (B,), in tokens.
        cu_seqlens: of the streams.
        kl: (N,), log π - log π_ref of every token, of methods whose penalty is in the reward.
        values: (N,), of the critic; (N, 1 + K) with one value for each of K rewards.
        turn: all of it.
        state: what is remembered of the turns before.
    """

    rewards: Tensor
    groups: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    kl: Tensor | None
    values: Tensor | None
    turn: Turn
    state: State

    def per_token(self, values: Tensor) -> Tensor:
        """(B,) numbers at every token of their completions."""
        return values.repeat_interleave(self.lengths)

    def sequence_kl(self) -> Tensor:
        """(B,), the sums of kl."""
        assert self.kl is not None
        return self.per_sequence(self.kl)

    def per_sequence(self, stream: Tensor) -> Tensor:
        """fp64 (B,), the sums of a stream over the completions."""
        ids = torch.arange(len(self.lengths), device=stream.device).repeat_interleave(self.lengths)
        return torch.zeros_like(self.rewards).index_add(0, ids, stream.to(self.rewards.dtype))

    def token_rewards(self, hyper: Options) -> Tensor:
        """(N,), the penalty of every token, and the reward at the last one."""
        assert self.kl is not None
        return rewards.token_rewards(self.rewards, self.kl, beta=hyper["beta"], cu_seqlens=self.cu_seqlens)


class Estimate(NamedTuple):
    """Of the advantages.

    Attributes:
        advantages: (N,), of every token.
        returns: what the critic learns, of the shape of its values.
        keep: bool (B,), the examples that are trained on; None for all.
        trained: bool (N,), the tokens whose policy term counts; None for all.
        valued: bool (N,), those whose value counts.
        metrics: of the turn.
        state: what is to be remembered.
    """

    advantages: Tensor
    returns: Tensor | None = None
    keep: Tensor | None = None
    trained: Tensor | None = None
    valued: Tensor | None = None
    metrics: Mapping[str, float] = {}
    state: Mapping[str, Tensor] = {}


Numbers = Mapping[str, tuple[float, Domain]]
Estimator = Callable[[Seen, Options], Estimate]


@dataclass(frozen=True)
class Recipe:
    """A policy gradient.

    Attributes:
        name, title, source: of the method.
        loss: its row among the policy losses.
        estimate: of the advantages.
        samples: completions of each prompt.
        penalty: where KL(policy, reference) is: in the loss, in the reward, or nowhere.
        numbers: hyper-parameters beside those of the loss: defaults and domains; they also replace the loss's defaults.
        options: hyper-parameters that are words: the admissible values, the default first.
        aggregation: if not the loss's.
        critic: whether it has one: True of one value, "each" of one for the divergence and one for each reward.
        greedy: whether the most probable completion is sampled too, as a baseline.
        drafts: what a group becomes, if not an example of each sampled completion.
        texts: hyper-parameters that are words of the user's own.
        references: completions of the reference that are rewarded too, behind the policy's.
        rewards: whether each of several reward functions counts by itself.
        aux: whether a further model says its log-probs.
        masked: whether a copy of the policy allows the tokens that are sampled from.
        answered: whether completions are preambles, and rewards those of the first model's answers behind them.
        denoises: whether the policy is a masked-diffusion language model.
        algorithm: its class, if not `PolicyGradient`.
    """

    name: str
    title: str
    source: str
    loss: str
    estimate: Estimator
    samples: int = 8
    penalty: Literal["loss", "reward"] | None = None
    numbers: Numbers = field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aggregation: str | None = None
    critic: bool | Literal["each"] = False
    greedy: bool = False
    drafts: Callable[[Group, Options], list[Draft]] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    references: int = 0
    rewards: bool = False
    aux: bool = False
    masked: bool = False
    answered: bool = False
    denoises: bool = False
    algorithm: type[PolicyGradient] | None = None

    @property
    def losses(self) -> tuple[str, ...]:
        """Its row, as those of other methods."""
        return (self.loss,)

    @property
    def row(self) -> PolicyObjective:
        """Of the policy loss."""
        return policy(self.loss)

    @property
    def controlled(self) -> bool:
        """Whether the coefficient of the divergence can follow it; mixed advantages have no coefficient."""
        return self.penalty == "reward" and self.critic != "each"

    def domains(self) -> dict[str, Domain]:
        """The numbers that a user may choose."""
        more: dict[str, Domain] = {"samples": COUNT}
        if self.penalty is not None:
            more["beta"] = NOT_NEGATIVE
        more["entropy_coefficient"] = NOT_NEGATIVE
        if self.critic:
            more |= {"value_coefficient": NOT_NEGATIVE, "value_epsilon": POSITIVE}
        if self.controlled:
            more |= {"kl_target": POSITIVE, "kl_horizon": POSITIVE}
        if self.references:
            more["references"] = COUNT
        if self.masked:
            more |= {"mask_top_p": Domain(0.0, 1.0, low_open=True), "mask_min_tokens": COUNT, "mask_every": COUNT}
        return {**self.row.domains, **more, **{name: domain for name, (_, domain) in self.numbers.items()}}

    def defaults(self) -> dict[str, Any]:
        """All hyper-parameters with their default values."""
        out: dict[str, Any] = {"samples": self.samples, **self.row.defaults}
        if self.penalty is not None:
            out["beta"] = self.row.beta or 0.05
        out["entropy_coefficient"] = 0.0
        if self.critic:
            out |= {"value_coefficient": 0.1, "value_epsilon": 0.2}
        if self.controlled:
            out |= {"kl_target": 6.0, "kl_horizon": 10_000.0}
        if self.references:
            out["references"] = self.references
        if self.masked:
            out |= {"mask_top_p": 0.9, "mask_min_tokens": 100, "mask_every": 20}
        out |= {name: value for name, (value, _) in self.numbers.items()} | dict(self.texts)
        return out | {name: values[0] for name, values in self.choices().items()}

    def choices(self) -> dict[str, tuple[str, ...]]:
        """The hyper-parameters that are words."""
        first = self.aggregation or self.row.aggregation
        out = {"aggregation": (first, *(name for name in AGGREGATIONS if name != first))}
        if self.penalty == "loss":
            out["kl"] = tuple(ESTIMATORS[::-1])
        if self.controlled:
            out["kl_control"] = ("fixed", "adaptive")
        out["correction"] = tuple(CORRECTIONS)
        return out | dict(self.options)

    def build(self, hyper: Options) -> PolicyGradient:
        """With all of `defaults()`, or others."""
        return (self.algorithm or PolicyGradient)(self, hyper)


@dataclass(frozen=True)
class PolicyGradient(Plain):
    """A method that samples completions, estimates their advantages, and weighs their tokens by them.

    Attributes:
        recipe: of the method.
        hyper: all of `recipe.defaults()`.
    """

    recipe: Recipe
    hyper: Options

    kind = "prompts"
    demonstrations = 0

    def __post_init__(self) -> None:
        check_hyper(self.name, self.hyper, self.recipe.domains(), self.recipe.choices())
        if self._adaptive and not self.hyper["beta"]:
            raise ValueError(f"beta must be positive for {self.name} with an adaptive kl_control, got 0")
        if self.whole_step and self.hyper["entropy_coefficient"]:
            # of a whole step only the log-probs have slopes
            raise ValueError(f"entropy_coefficient must be 0 for {self.name}, which looks at the whole step")

    @property
    def needs(self) -> str:
        return "answer" if self.recipe.answered else "rewards" if self.recipe.rewards else "reward"

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def models(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("policy", "reference") if self.recipe.penalty else ("policy",)

    @property
    def columns(self) -> tuple[Column, ...]:
        return (REWARD, Column("greedy_reward")) if self.recipe.greedy else (REWARD,)

    @cached_property
    def statistics(self) -> Mapping[str, tuple[str, ...]]:
        more: tuple[str, ...] = ("value",) if self.recipe.critic else ()
        if self.hyper["entropy_coefficient"]:
            more += ("entropy",)
        return {model: more if model == "policy" else () for model in self.models}

    @property
    def whole_step(self) -> bool:  # type: ignore[override]
        return bool(self.recipe.row.selected)

    @property
    def critic(self) -> bool | str:
        return self.recipe.critic

    @property
    def draws(self) -> tuple[Draw, ...]:
        out = [Draw("masked" if self.recipe.masked else "policy", int(self.hyper["samples"]))]
        if self.recipe.greedy:
            out.append(Draw("greedy", 1))
        if self.recipe.references:
            out.append(Draw("reference", int(self.hyper["references"])))
        return tuple(out)

    def anchors(self, steps: int) -> Mapping[str, str]:
        # in the only step of a turn the policy still is what sampled
        old = steps > 1 or self.recipe.penalty == "reward" or self.hyper["correction"] != "none"
        # a masked policy is what sampled, and nothing else has its masks
        out = {"old": "rollout" if self.recipe.masked else "turn"} if old else {}
        if self._penalised or self.recipe.aux:
            out["reference"] = "start"
        return {**out, "aux": "aux"} if self.recipe.aux else out

    @property
    def _adaptive(self) -> bool:
        return self.hyper.get("kl_control") == "adaptive"

    @property
    def _penalised(self) -> bool:
        return self.recipe.penalty is not None and self.hyper["beta"] > 0

    def drafts(self, group: Group) -> list[Draft]:
        if self.recipe.drafts is not None:
            return self.recipe.drafts(group, self.hyper)
        if self.recipe.greedy:
            *scores, greedy = group.rewards
            return [Draft((i,), (score, greedy)) for i, score in enumerate(scores) if not math.isnan(score - greedy)]
        # without a reward there is nothing to learn, and the others' mean is theirs alone
        return [Draft((i,), (score,)) for i, score in enumerate(group.rewards) if not math.isnan(score)]

    def prepare(self, turn: Turn, state: State) -> Prepared:
        batch, hyper, state = turn.batch, self.hyper, dict(state)
        if self._adaptive and "kl_coefficient" in state:
            hyper = {**hyper, "beta": float(state["kl_coefficient"])}
        lengths = torch.tensor(batch.completions.lengths, device=turn.groups.device)
        kl = None
        if self.recipe.penalty == "reward":
            old = batch.streams["old"]
            # without a weight the reference is not asked
            kl = old - batch.streams["reference"] if self._penalised else torch.zeros_like(old)
        seen = Seen(
            batch.numbers["reward"],
            turn.groups,
            lengths,
            batch.completions.cu_seqlens,
            kl,
            batch.streams.get("old_value"),
            turn,
            state,
        )
        found = self.recipe.estimate(seen, hyper)
        streams = {"advantages": found.advantages.float()}
        if found.returns is not None:
            streams["returns"] = found.returns.float()
        metrics, state = dict(found.metrics), dict(found.state)
        if found.trained is not None:
            # the denominators are those of all tokens, and the losses with masks are linear in the advantages
            streams["trained"] = found.trained
            streams["advantages"] = streams["advantages"] * _share(found.trained)
        if found.valued is not None:
            streams["valued"] = found.valued * _share(found.valued)
        if self._adaptive:
            control = rewards.AdaptiveKLController(
                hyper["beta"], target=hyper["kl_target"], horizon=hyper["kl_horizon"]
            )
            control.update(float(seen.sequence_kl().mean()), len(lengths))
            state["kl_coefficient"] = torch.tensor(control.value, dtype=torch.float64)
            metrics["kl_coefficient"] = control.value
        return Prepared(streams, metrics, state, found.keep)

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        row, hyper, streams = self.recipe.row, self.hyper, batch.streams
        aggregation = hyper["aggregation"]
        layout: dict[str, Any] = {
            "cu_seqlens": batch.completions.cu_seqlens,
            "aggregation": aggregation,
            "num_items": batch.num_tokens if aggregation == "token_mean" else batch.num_items,
        }
        if aggregation == "const_norm":
            layout["max_length"] = batch.max_length
        given: dict[str, Any] = {name: hyper[name] for name in row.defaults}
        correction = CORRECTIONS[str(hyper["correction"])]
        if correction is not None:
            given |= {"correction": correction(), "rollout_logprobs": streams["rollout"]}
        if self.recipe.penalty == "loss" and self._penalised:
            given |= {"beta": hyper["beta"], "kl": hyper["kl"], "reference_logprobs": streams["reference"]}
        else:
            given["beta"] = 0.0
        if hyper["entropy_coefficient"]:
            given |= {"entropy": streams["policy_entropy"], "entropy_coefficient": hyper["entropy_coefficient"]}
        if row.selected:
            given["selected"] = self._selected(batch)
        if "trained" in streams:
            given["policy_mask"] = streams["trained"]
        out = getattr(losses, row.name)(
            streams["policy"], streams["advantages"], old_logprobs=streams.get("old"), **given, **layout
        )
        total = out.loss
        metrics = {name: out.metrics.sum(of) / batch.num_tokens for name, of in _METRICS.items()}
        if self.recipe.critic:
            value = self._value_loss(batch)
            total = total + hyper["value_coefficient"] * value
            metrics["value_loss"] = value.detach()
        return StepOutput(total, {"loss": total.detach(), **metrics}, {})

    def _value_loss(self, batch: Batch) -> Tensor:
        """The mean over the tokens; of several values, the mean of theirs."""
        streams, mask = batch.streams, None
        layout: dict[str, Any] = {"cu_seqlens": batch.completions.cu_seqlens, "num_items": batch.num_tokens}
        scale = 1.0
        if "valued" in streams:
            mask = streams["valued"] > 0
            scale = float(streams["valued"].max())
        values, returns, old = (
            streams[name].reshape(len(streams["policy"]), -1).T for name in ("policy_value", "returns", "old_value")
        )
        parts = [
            losses.value_clip(*each, epsilon=self.hyper["value_epsilon"], mask=mask, **layout).loss
            for each in zip(values, returns, old, strict=True)
        ]
        return scale * torch.stack(parts).mean()

    def _selected(self, batch: Batch) -> Tensor:
        """The tokens that a statistic of the whole step chooses."""
        hyper, streams = self.hyper, batch.streams
        device = streams["policy"].device
        logprobs, advantages = streams["policy"].detach().cpu(), streams["advantages"].cpu()
        if self.recipe.loss == "kl_cov":
            return losses.kl_cov_tokens(logprobs, advantages, fraction=hyper["fraction"]).to(device)
        old = streams.get("old")
        return losses.clip_cov_tokens(
            logprobs,
            advantages,
            old_logprobs=None if old is None else old.cpu(),
            **{name: hyper[name] for name in ("fraction", "low", "high", "epsilon_low", "epsilon_high")},
            # drawn on the CPU, so that every device draws the same
            generator=torch.Generator().manual_seed(batch.seed),
        ).to(device)


def _share(chosen: Tensor) -> float:
    """How many times as many tokens there are as are chosen."""
    return len(chosen) / max(1, int(chosen.sum()))


_METRICS = {
    "clip_fraction_high": "clipped_high",
    "clip_fraction_low": "clipped_low",
    "ratio": "ratio",
    "policy_kl": "old_k1",
}
