"""Policy gradients whose rewards are shaped: by models, histories, constraints, rubrics; or sampled in an own way."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastpo import advantages, losses, rewards
from fastpo.algorithms.base import Draft, Draw, Group
from fastpo.algorithms.recipes import EPS, GAE, by_critic, gae, group_normalised, rloo
from fastpo.algorithms.rollouts import COUNT, Estimate, Options, PolicyGradient, Recipe, Seen
from fastpo.reference.registry import NOT_NEGATIVE, POSITIVE, Domain

CORRECT = ("correct", (0.5, Domain()))


def _numbers(name: str, text: str, count: int) -> list[float]:
    """The numbers of a text that has one for each of `count` rewards, or one for all."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) not in (1, count) or not all(map(math.isfinite, found)):
        raise ValueError(f"{name} must be {count} finite numbers with commas between them, or one, got {text!r}")
    return found * count if len(found) == 1 else found


def _means(seen: Seen) -> dict[str, float]:
    return {f"reward_{name}": float(values.mean()) for name, values in seen.turn.rewards.items()}


def _rto(seen: Seen, hyper: Options) -> Estimate:
    streams = seen.turn.batch.streams
    dpo = streams["aux"] - streams["reference"]
    shaped = rewards.rto_rewards(
        seen.rewards,
        streams["old"],
        streams["reference"],
        streams["aux"],
        **{name: hyper[name] for name in ("dpo_scale", "dpo_clip", "beta", "score_clip")},
        cu_seqlens=seen.cu_seqlens,
    )
    return by_critic(seen, shaped, hyper)._replace(metrics={"dpo_reward": float(hyper["dpo_scale"] * dpo.mean())})


def _key(prompt: str) -> int:
    """A prompt's number in what is remembered of it; of 63 bits, so that it fits into a tensor."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") >> 1


def _hapo(seen: Seen, hyper: Options) -> Estimate:
    history = rewards.HapoHistory(
        statistic=hyper["history"], form=hyper["form"], **{n: hyper[n] for n in ("weight", "floor", "tolerance")}
    )
    if "history" in seen.state:
        rows = zip(seen.state["prompts"].tolist(), seen.state["history"].tolist(), strict=True)
        history.load_state_dict({"seen": dict(rows)})
    prompts = [_key(seen.turn.prompts[group]) for group in seen.groups.tolist()]
    correct = seen.rewards >= hyper["correct"]
    shaped = history.rewards(prompts, seen.lengths, correct)
    history.update(prompts, seen.lengths, correct)
    known = history.state_dict()["seen"]
    state = {
        "prompts": torch.tensor([*known], dtype=torch.int64),
        "history": torch.tensor([*known.values()], dtype=torch.float64).reshape(-1, 3),
    }
    found = group_normalised(seen._replace(rewards=shaped.to(seen.rewards.dtype)), hyper)
    bonus = float((shaped.double() - correct.double()).mean())
    return found._replace(metrics={"length_reward": bonus, "known_prompts": float(len(known))}, state=state)


def _constrained(seen: Seen, hyper: Options) -> Estimate:
    """One value and one advantage for the divergence and for each reward; the multipliers move once a turn."""
    assert seen.values is not None and seen.kl is not None
    names, scores = [*seen.turn.rewards], [*seen.turn.rewards.values()]
    multipliers = rewards.ConstraintMultipliers(
        _numbers("thresholds", hyper["thresholds"], len(scores)),
        kind=hyper["kind"],
        learning_rate=hyper["multiplier_rate"],
        momentum=hyper["multiplier_momentum"],
        generator=torch.Generator().manual_seed(0),
    )
    if "multipliers" in seen.state:
        raw, velocity = seen.state["multipliers"].tolist()
        multipliers.load_state_dict({"raw": raw, "velocity": velocity})
    layout: dict[str, Any] = {"cu_seqlens": seen.cu_seqlens}
    none = torch.zeros_like(seen.kl)
    shaped = [
        rewards.token_rewards(torch.zeros_like(seen.rewards), seen.kl, beta=hyper["beta"], **layout),
        *(rewards.token_rewards(score, none, beta=0.0, **layout) for score in scores),
    ]
    values = [value.contiguous() for value in seen.values.unbind(1)]
    of: dict[str, Any] = {"gamma": hyper["gamma"], "lam": hyper["lam"], **layout}
    each = [advantages.gae(reward, value, **of) for reward, value in zip(shaped, values, strict=True)]
    own, *others = [advantages.whiten(found.advantages) for found in each]
    weights = multipliers.values.tolist()
    mixed = multipliers.mix(own, others)
    to_go = [advantages.discounted_returns(reward, gamma=hyper["gamma"], **layout) for reward in shaped[1:]]
    multipliers.update([float(found.mean()) for found in to_go])
    known = multipliers.state_dict()
    return Estimate(
        mixed,
        torch.stack([found.returns for found in each], 1),
        metrics=_means(seen) | {f"multiplier_{name}": weight for name, weight in zip(names, weights, strict=True)},
        state={"multipliers": torch.tensor([known["raw"], known["velocity"]], dtype=torch.float64)},
    )


def _calibrated(group: Group, hyper: Options) -> list[Draft]:
    """InfAlign: the policy's samples with Φ of the share of the reference's samples that are worse."""
    count = int(hyper["samples"])
    own, theirs = (torch.tensor([part], dtype=torch.float64) for part in (group.rewards[:count], group.rewards[count:]))
    share = rewards.calibrated_rewards(own, theirs)
    shaped = rewards.infalign_rewards(share, target=hyper["target"], t=hyper["t"])[0].tolist()
    return [Draft((i,), (reward,)) for i, reward in enumerate(shaped)]


def _inf_align(seen: Seen, hyper: Options) -> Estimate:
    return rloo(seen, hyper)._replace(metrics={"calibrated_reward": float(seen.rewards.mean())})


def _maxmin(seen: Seen, hyper: Options) -> Estimate:
    scores = seen.turn.rewards
    # of equal ones the first
    least = min(scores, key=lambda name: float(scores[name].mean()))
    return gae(seen._replace(rewards=scores[least]), hyper)._replace(metrics=_means(seen))


def _rluf(seen: Seen, hyper: Options) -> Estimate:
    scores = torch.stack([*seen.turn.rewards.values()], 1)
    weights = _numbers("weights", hyper["weights"], scores.shape[1])
    total = rewards.weighted_rewards(scores, weights, normalize=hyper["normalize"] == "yes")
    return group_normalised(seen._replace(rewards=total), hyper)._replace(metrics=_means(seen))


def _meta(seen: Seen, hyper: Options) -> Estimate:
    version, scores = seen.turn.version, seen.rewards
    metrics = {"rubric": float(version)}
    if hyper["normalize"] == "no":
        return gae(seen, hyper)._replace(metrics=metrics)
    normalizer = rewards.VersionNormalizer()
    if "versions" in seen.state:
        rows = seen.state["versions"].tolist()
        normalizer.load_state_dict({"seen": {int(v): tuple(of) for v, *of in rows}})
    normalizer.update(scores, version)
    found = gae(seen._replace(rewards=normalizer.normalize(scores, version)), hyper)
    rows = [[float(v), *of] for v, of in normalizer.state_dict()["seen"].items()]
    return found._replace(metrics=metrics, state={"versions": torch.tensor(rows, dtype=torch.float64)})


def _truncated(seen: Seen, hyper: Options) -> Estimate:
    """T-PPO: the policy learns from the turn's tokens, the critic from completions that are finished."""
    turn, lengths = seen.turn, seen.lengths
    assert seen.values is not None and turn.begun is not None
    finished = turn.ended | (lengths >= turn.batch.max_length)
    shaped = seen.token_rewards(hyper)
    there = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    new, valued = (mask[there] for mask in losses.tppo_masks(there, turn.begun, finished))
    layout = {"cu_seqlens": seen.cu_seqlens}
    found = advantages.egae(shaped, seen.values, finished, gamma=hyper["gamma"], lam=hyper["lam"], mask=new, **layout)
    returns = advantages.discounted_returns(shaped, gamma=hyper["gamma"], **layout)
    unfinished = 1 - float(finished.double().mean())
    return Estimate(
        advantages.whiten(found.advantages, new),
        returns,
        trained=new,
        valued=valued,
        metrics={"unfinished": unfinished},
    )


def _xrpo(seen: Seen, hyper: Options) -> Estimate:
    found = advantages.grpo(seen.rewards, seen.groups, eps=hyper["eps"])
    mean = seen.per_sequence(seen.turn.batch.streams["old"]) / seen.lengths
    sharpened = rewards.xrpo_novelty(
        found, mean, seen.rewards >= hyper["correct"], seen.groups, scale=hyper["novelty"], share=hyper["novelty_share"]
    )
    counts = torch.bincount(seen.groups).double()
    metrics = {
        "novelty": float((sharpened - found).mean()),
        "samples_least": float(counts.min()),
        "samples_most": float(counts.max()),
    }
    return Estimate(seen.per_token(sharpened), metrics=metrics)


class WindowedPolicyGradient(PolicyGradient):
    """One whose completions grow by a window each turn."""

    @property
    def window(self) -> int:
        return int(self.hyper["window"])


class AllocatingPolicyGradient(PolicyGradient):
    """One that samples more of the prompts whose mean reward is least certain."""

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("policy", int(self.hyper["first"])),)

    @property
    def solved(self) -> float:
        return float(self.hyper["correct"])

    @property
    def exemplars(self) -> int:
        return int(self.hyper["exemplars"])

    def anchors(self, steps: int) -> Mapping[str, str]:
        # what is sampled behind exemplars is trained without them
        return {**super().anchors(steps), "old": "turn"}

    def allocate(self, rewards: Sequence[Sequence[float]], round: int) -> list[int]:
        """XRPO's: the rest of the samples in equal rounds."""
        rounds = int(self.hyper["rounds"])
        rest = max(0, int(self.hyper["samples"]) - int(self.hyper["first"])) * len(rewards)
        if round >= rounds or not rest:
            return []
        return _allocated(rewards, rest * (round + 1) // rounds - rest * round // rounds, self.hyper)


class RefiningPolicyGradient(PolicyGradient):
    """One that has its rubric rewritten."""

    @property
    def refine_every(self) -> int:
        return int(self.hyper["refine_every"])

    @property
    def episodes(self) -> int:
        return int(self.hyper["episodes"])


def _allocated(scores: Sequence[Sequence[float]], budget: int, hyper: Options) -> list[int]:
    counts = torch.tensor([len(of) for of in scores])
    stds = torch.tensor([float(torch.tensor(of, dtype=torch.float64).std()) for of in scores], dtype=torch.float64)
    return rewards.xrpo_allocate(counts, stds, budget, alpha=hyper["alpha"], exploration=hyper["exploration"]).tolist()


_ALL = (
    Recipe(
        "rto",
        "RTO: PPO with the token rewards of a model trained by DPO",
        "2404.18922, as its code has it; the paper weighs the terms otherwise",
        "ppo",
        _rto,
        samples=1,
        penalty="reward",
        numbers={
            **GAE,
            "beta": (0.01, NOT_NEGATIVE),
            "dpo_scale": (0.05, POSITIVE),
            "dpo_clip": (0.05, POSITIVE),
            "score_clip": (10.0, POSITIVE),
        },
        critic=True,
        aux=True,
    ),
    Recipe(
        "nlpo",
        "NLPO: PPO among the tokens that a lagging copy allows",
        "2210.01241 Alg. 1, as RL4LMs has it",
        "ppo",
        gae,
        samples=1,
        penalty="reward",
        # its value loss is not clipped, and has no half
        numbers={**GAE, "value_epsilon": (1e6, POSITIVE), "value_coefficient": (1.0, NOT_NEGATIVE)},
        critic=True,
        masked=True,
    ),
    Recipe(
        "hapo",
        "HAPO: GRPO for answers shorter than the shortest right one so far",
        "2505.11225 eq. 2-5",
        "grpo",
        _hapo,
        samples=2,
        penalty="loss",
        numbers={
            **EPS,
            **dict([CORRECT]),
            "weight": (1.0, NOT_NEGATIVE),
            "floor": (-0.7, Domain(-1.0, 0.0)),
            "tolerance": (0.1, NOT_NEGATIVE),
        },
        options={"history": ("shortest", "mean"), "form": ("cosine", "linear")},
    ),
    Recipe(
        "constrained_ppo",
        "μ-PPO and ξ-PPO: rewards held at thresholds by multipliers",
        "2310.04373, as its code has it; the normalisation of its text is not verified",
        "ppo",
        _constrained,
        samples=1,
        penalty="reward",
        numbers={
            **GAE,
            "beta": (1.0, POSITIVE),
            "value_coefficient": (0.5, NOT_NEGATIVE),
            "multiplier_rate": (0.01, POSITIVE),
            "multiplier_momentum": (0.1, Domain(0.0, 1.0, high_open=True)),
        },
        options={"kind": ("mu", "xi")},
        texts={"thresholds": "0.5"},
        critic="each",
        rewards=True,
    ),
    Recipe(
        "inf_align",
        "InfAlign: rewards calibrated by the reference's samples, for the win rate or best of N",
        "2412.19792, its concept; t is from memory",
        "reinforce",
        _inf_align,
        penalty="reward",
        numbers={"t": (10.0, POSITIVE)},
        options={"target": ("win_rate", "best_of_n", "worst_of_n")},
        aggregation="seq_mean_token_sum",
        drafts=_calibrated,
        references=8,
    ),
    Recipe(
        "maxmin_ppo",
        "MaxMin-RLHF: PPO on the reward whose mean over the turn is least",
        "2402.08925, from memory",
        "ppo",
        _maxmin,
        samples=1,
        penalty="reward",
        numbers=GAE,
        critic=True,
        rewards=True,
    ),
    Recipe(
        "rluf",
        "RLUF: GRPO on a weighted sum of rewards, as of helpfulness, safety and love",
        "2505.14946; its weights are from memory, and the optimiser is ours",
        "grpo",
        _rluf,
        penalty="loss",
        numbers=EPS,
        options={"normalize": ("no", "yes")},
        texts={"weights": "1"},
        rewards=True,
    ),
    Recipe(
        "meta_po",
        "Meta Policy Optimization: PPO on a judge's rubric that is rewritten during the run",
        "2504.20157, the constants of its code; the rest is from memory, and normalising by version is ours",
        "ppo",
        _meta,
        samples=1,
        penalty="reward",
        numbers={**GAE, "refine_every": (10, COUNT), "episodes": (20, COUNT)},
        options={"normalize": ("no", "version")},
        critic=True,
        algorithm=RefiningPolicyGradient,
    ),
    Recipe(
        "t_ppo",
        "T-PPO: PPO on windows of completions that go on in the next turn",
        "2506.15050 §3; its windows and its rule for values are from memory",
        "ppo",
        _truncated,
        samples=1,
        penalty="reward",
        numbers={**GAE, "window": (8192, COUNT)},
        critic=True,
        algorithm=WindowedPolicyGradient,
    ),
    Recipe(
        "xrpo",
        "XRPO: GRPO with samples where they tell most, and a bonus for unlikely right answers",
        "2510.06672; allocation, T and α are from memory, and what is nearest to a prompt is ours",
        "grpo",
        _xrpo,
        penalty="loss",
        numbers={
            **EPS,
            **dict([CORRECT]),
            "first": (4, Domain(2.0)),
            "rounds": (2, COUNT),
            "exemplars": (2, NOT_NEGATIVE),
            "alpha": (0.05, Domain(0.0, 1.0, low_open=True, high_open=True)),
            "exploration": (1.0, NOT_NEGATIVE),
            "novelty": (2.5, NOT_NEGATIVE),
            "novelty_share": (0.5, NOT_NEGATIVE),
        },
        algorithm=AllocatingPolicyGradient,
    ),
)

SHAPED: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
