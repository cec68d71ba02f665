"""Leading the policy to a target that is known up to a factor: the reference, tilted or cut down by rewards."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastpo import losses
from fastpo.algorithms.base import (
    Algorithm,
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
from fastpo.algorithms.rollouts import COUNT, REWARD, Numbers, Options
from fastpo.losses import MatchingOutput, PartitionEstimate, RewardBaseline
from fastpo.reference import Domain
from fastpo.reference.registry import ANY, POSITIVE
from fastpo.reference.sequence import sequence_sum


@dataclass(frozen=True)
class TargetMethod:
    """A method whose target is P/Z.

    Attributes:
        name, title, source: of the method.
        algorithm: its class, of the method and all of `defaults()`.
        numbers: hyper-parameters beside `samples`: defaults and domains.
        options: hyper-parameters that are words: the admissible values, the default first.
        denoises: whether the policy is a masked-diffusion language model.
        functions: of `fastpo.losses`, the default first, if not the one of its name.
    """

    name: str
    title: str
    source: str
    algorithm: Callable[[TargetMethod, Options], Algorithm]
    numbers: Numbers = field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    denoises: bool = False
    functions: tuple[str, ...] = ()

    @property
    def losses(self) -> tuple[str, ...]:
        """Of `fastpo.losses`."""
        return self.functions or (self.name,)

    def domains(self) -> dict[str, Domain]:
        """The numbers that a user may choose."""
        return {"samples": COUNT, **{name: domain for name, (_, domain) in self.numbers.items()}}

    def defaults(self) -> dict[str, Any]:
        """All hyper-parameters with their default values."""
        numbers = {name: value for name, (value, _) in self.numbers.items()}
        return {"samples": 8, **numbers, **{name: values[0] for name, values in self.options.items()}}

    def choices(self) -> dict[str, tuple[str, ...]]:
        """The hyper-parameters that are words."""
        return dict(self.options)

    def build(self, hyper: Options) -> Algorithm:
        """With all of `defaults()`, or others."""
        return self.algorithm(self, hyper)


@dataclass(frozen=True)
class Sampled(Plain):
    """What the algorithms here have in common: the policy's own samples, each with a reward, and the first model.

    What samples is the policy at the turn's begin, and its log-probs are those it sampled with.

    Attributes:
        method: of the table.
        hyper: all of `method.defaults()`.
    """

    method: TargetMethod
    hyper: Options

    kind = "prompts"
    models = ("policy", "reference")
    demonstrations = 0
    critic = False
    needs = "reward"

    def __post_init__(self) -> None:
        check_hyper(self.name, self.hyper, self.method.domains(), self.method.choices())

    @property
    def name(self) -> str:
        return self.method.name

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        return (REWARD,)

    @property
    def statistics(self) -> Mapping[str, tuple[str, ...]]:
        return {"policy": ("value",) if self.critic else (), "reference": ()}

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("policy", int(self.hyper["samples"])),)

    def anchors(self, steps: int) -> Mapping[str, str]:
        return {"reference": "start"}

    def drafts(self, group: Group) -> list[Draft]:
        return [Draft((i,), (reward,)) for i, reward in enumerate(group.rewards)]

    def prepare(self, turn: Turn, state: State) -> Prepared:
        return Prepared({}, {}, {})


class Brain(Sampled):
    """BRAIn: the samples of a prompt are one example, so that they stay in one forward."""

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        return tuple(Column(f"reward_{i}") for i in range(1, int(self.hyper["samples"]) + 1))

    def drafts(self, group: Group) -> list[Draft]:
        return [Draft(tuple(range(len(group.rewards))), tuple(group.rewards))]

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        n, ends = len(self.columns), batch.completions.cu_seqlens
        # all first samples come first, then all second ones
        sums = (sequence_sum(batch.streams[name], None, ends)[0] for name in ("policy", "rollout", "reference"))
        policy, proposal, prior = (each.view(n, -1).T for each in sums)
        rewards = torch.stack([batch.numbers[column.name] for column in self.columns], 1).to(policy.dtype)
        beta = self.hyper["beta"]
        out = losses.brain(policy, proposal, prior, rewards, beta=beta, num_items=batch.num_items)
        weights = (prior + rewards / beta - proposal).softmax(1)
        found = {"effective_samples": 1 / weights.square().sum(1), "kl": (policy.detach() - prior).mean(1)}
        metrics = {name: values.sum() / batch.num_items for name, values in found.items()}
        return StepOutput(out.loss, {"loss": out.loss.detach(), **metrics}, {})


class Matching(Sampled):
    """Distributional policy gradients: weighted samples, with Z of each prompt estimated over all turns.

    P is the reference tilted, π_ref e^(r/β), or under a constraint, π_ref where r > 0 and 0 elsewhere; f-DPG's
    `min_reward` bounds the pseudo-rewards of what is forbidden. The proposal is the policy at the turn's begin; it is
    not held back until a better one is found.
    """

    def anchors(self, steps: int) -> Mapping[str, str]:
        return {"old": "turn", "reference": "start"}

    def _log_targets(self, batch: Batch) -> Tensor:
        """(B,), log P."""
        prior = sequence_sum(batch.streams["reference"].double(), None, batch.completions.cu_seqlens)[0]
        rewards = batch.numbers["reward"]
        if self.hyper["target"] == "tilted":
            return prior + rewards / self.hyper["beta"]
        return torch.where(rewards > 0, prior, -math.inf)

    def prepare(self, turn: Turn, state: State) -> Prepared:
        batch = turn.batch
        estimate, baseline = PartitionEstimate(decay=self.hyper["decay"]), RewardBaseline()
        if state:
            sums = zip(state["contexts"].tolist(), state["sums"].tolist(), strict=True)
            estimate.load_state_dict({"decay": self.hyper["decay"], "sums": dict(sums)})
            window = baseline.state_dict()["window"]
            baseline.load_state_dict({"window": window, "values": state["pseudo_rewards"].tolist()})
        contexts = torch.tensor([_context(prompt) for prompt in turn.prompts])[turn.groups]
        log_targets = self._log_targets(batch)
        proposal = sequence_sum(batch.streams["rollout"].double(), None, batch.completions.cu_seqlens)[0]
        log_z = estimate.update(log_targets - proposal, contexts)
        before = baseline.value
        out = self._loss(batch, batch.streams["old"], log_z, before)
        if self.hyper.get("baseline") == "mean":
            baseline.update(out.pseudo_rewards)
        known = log_z[log_z > -math.inf]
        metrics = {name: float(value) for name, value in out.metrics._asdict().items()}
        metrics |= {"log_z": float(known.mean())} if len(known) else {}
        found = estimate.state_dict()["sums"]
        new = {
            "contexts": torch.tensor([*found], dtype=torch.int64),
            "sums": torch.tensor([*found.values()], dtype=torch.float64),
            "pseudo_rewards": torch.tensor(baseline.state_dict()["values"], dtype=torch.float64),
        }
        lengths = torch.tensor(batch.completions.lengths)
        constants = {"log_z": log_z, "baseline": torch.full_like(log_z, before)}
        return Prepared({name: of.repeat_interleave(lengths) for name, of in constants.items()}, metrics, new)

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        first = batch.completions.cu_seqlens[:-1].long()
        log_z, baseline = (batch.streams[name][first] for name in ("log_z", "baseline"))
        out = self._loss(batch, batch.streams["policy"], log_z, baseline)
        return StepOutput(out.loss, {"loss": out.loss.detach()}, {})

    def _loss(self, batch: Batch, policy: Tensor, log_z: Tensor, baseline: float | Tensor) -> MatchingOutput:
        log_targets = self._log_targets(batch)
        common: dict[str, Any] = {"cu_seqlens": batch.completions.cu_seqlens, "num_items": batch.num_items}
        given: list[Any] = [policy, batch.streams["rollout"], log_targets]
        if self.name == "dpg":
            return losses.dpg(*given, **common)
        given.append(log_z)
        if self.name != "f_dpg":
            return getattr(losses, self.name)(*given, **common)
        if self.hyper["target"] == "constraint":
            common["min_reward"] = self.hyper["min_reward"]
        common |= {"divergence": self.hyper["divergence"], "baseline": baseline}
        return losses.f_dpg(*given, **common)


class Flow(Sampled):
    """GFlowNet objectives, text being written from left to right: log PF is the policy's log-prob of a token.

    The flow into x is R(x) = π_ref(x) e^(r/β), and what is learned of the others is log F(s) - log π_ref(s): by a
    critic, whose answer to a prompt is its log Z. In the objectives π_ref stands where PB would.
    """

    critic = True

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        hyper, streams, ends = self.hyper, batch.streams, batch.completions.cu_seqlens
        common: dict[str, Any] = {"backward": streams["reference"], "cu_seqlens": ends, "num_items": batch.num_items}
        policy, flows = streams["policy"], streams["policy_value"]
        log_rewards = batch.numbers["reward"] / hyper["beta"]
        if hyper["objective"] == "subtb":
            out = losses.subtrajectory_balance(policy, flows, log_rewards, lambda_=hyper["lambda_"], **common)
        elif hyper["objective"] == "db":
            out = losses.detailed_balance(policy, flows, log_rewards, **common)
        else:
            out = losses.trajectory_balance(policy, flows[ends[:-1].long()], log_rewards, **common)
        metrics = {"log_z": out.log_z, "residual": out.residuals.abs()}
        sums = {name: values.sum() / batch.num_items for name, values in metrics.items()}
        return StepOutput(out.loss, {"loss": out.loss.detach(), **sums}, {})


def _context(prompt: str) -> int:
    """A number of a prompt that is the same in every turn and process."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") >> 1


_BETA: Numbers = {"beta": (0.1, POSITIVE)}
_TARGET: Numbers = {**_BETA, "decay": (1.0, Domain(0.0, 1.0, low_open=True))}
_TARGETS = {"target": ("tilted", "constraint")}

_ALL = (
    TargetMethod("online_brain", "BRAIn", "2402.02479", Brain, _BETA, functions=("brain",)),
    TargetMethod("dpg", "DPG", "1912.08517, from memory", Matching, _TARGET, _TARGETS),
    TargetMethod("gdc", "GDC", "2012.11635", Matching, _TARGET, _TARGETS),
    TargetMethod("gdc_plus_plus", "GDC++", "2206.00761, from memory", Matching, _TARGET, _TARGETS),
    TargetMethod(
        "f_dpg",
        "f-DPG",
        "2302.08215",
        Matching,
        {**_TARGET, "min_reward": (-10.0, ANY)},
        {
            "divergence": ("forward_kl", "reverse_kl", "jsd", "total_variation", "forward_chi2", "reverse_chi2"),
            "baseline": ("mean", "none"),
            **_TARGETS,
        },
    ),
    TargetMethod(
        "online_gflownet",
        "GFlowNet, tuned on its own samples",
        "2209.12782; 2201.13259",
        Flow,
        {**_BETA, "lambda_": (0.9, Domain(0.0, 1.0, low_open=True))},
        {"objective": ("subtb", "tb", "db")},
        functions=("subtrajectory_balance", "trajectory_balance", "detailed_balance"),
    ),
)

TARGETS: Mapping[str, TargetMethod] = {method.name: method for method in _ALL}
