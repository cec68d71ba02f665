"""The policy gradients: each an estimate of the advantages and a row of the policy losses."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastpo import advantages, losses, rewards
from fastpo.algorithms.base import Draft, Group
from fastpo.algorithms.rollouts import COUNT, Estimate, Numbers, Options, Recipe, Seen
from fastpo.reference.policy import EPSILON, UPPER
from fastpo.reference.registry import NOT_NEGATIVE, POSITIVE, PROBABILITY, Domain

EPS: Numbers = {"eps": (1e-4, NOT_NEGATIVE)}
GAE: Numbers = {"gamma": (1.0, PROBABILITY), "lam": (0.95, PROBABILITY)}


def by_critic(seen: Seen, token_rewards: Tensor, hyper: Options) -> Estimate:
    """Whitened, by GAE."""
    assert seen.values is not None
    found = advantages.gae(
        token_rewards, seen.values, gamma=hyper["gamma"], lam=hyper["lam"], cu_seqlens=seen.cu_seqlens
    )
    return Estimate(advantages.whiten(found.advantages), found.returns)


def gae(seen: Seen, hyper: Options) -> Estimate:
    return by_critic(seen, seen.token_rewards(hyper), hyper)


def group_normalised(seen: Seen, hyper: Options) -> Estimate:
    scale = hyper.get("scale", "group")
    return Estimate(seen.per_token(advantages.grpo(seen.rewards, seen.groups, eps=hyper["eps"], scale=scale)))


def _centred(seen: Seen, hyper: Options) -> Estimate:
    return Estimate(seen.per_token(advantages.dr_grpo(seen.rewards, seen.groups)))


def _dapo(seen: Seen, hyper: Options) -> Estimate:
    scores = seen.rewards
    longest = seen.turn.batch.max_length
    cache = int(hyper["overlong_share"] * longest)
    if cache:
        scores = scores + rewards.soft_overlong(seen.lengths, max_length=longest, cache=cache)
    found = advantages.grpo(scores, seen.groups, eps=hyper["eps"])
    return Estimate(seen.per_token(found), keep=seen.turn.ended if hyper["overlong"] == "filter" else None)


def _mixed(group: Group, hyper: Options) -> list[Draft]:
    """DAPO's dynamic sampling: nothing of a group whose rewards are all one."""
    known = [(i, reward) for i, reward in enumerate(group.rewards) if not math.isnan(reward)]
    if len({reward for _, reward in known}) < 2:
        return []
    return [Draft((i,), (reward,)) for i, reward in known]


def penalised(seen: Seen, hyper: Options) -> Seen:
    """The rewards with the penalty of the whole sequence."""
    return seen._replace(rewards=seen.rewards - hyper["beta"] * seen.sequence_kl().to(seen.rewards.dtype))


def rloo(seen: Seen, hyper: Options) -> Estimate:
    seen = penalised(seen, hyper)
    return Estimate(seen.per_token(advantages.rloo(seen.rewards, seen.groups)))


def _opo(seen: Seen, hyper: Options) -> Estimate:
    return Estimate(seen.per_token(advantages.opo(seen.rewards, seen.lengths, seen.groups)))


def _gpg(seen: Seen, hyper: Options) -> Estimate:
    return Estimate(seen.per_token(advantages.gpg(seen.rewards, seen.groups, f_norm=hyper["f_norm"])))


def _pass_at_k(seen: Seen, hyper: Options) -> Estimate:
    return Estimate(seen.per_token(advantages.pass_at_k(seen.rewards, seen.groups)))


def _reinforce_plus_plus(seen: Seen, hyper: Options) -> Estimate:
    found = advantages.reinforce_plus_plus(seen.token_rewards(hyper), gamma=hyper["gamma"], cu_seqlens=seen.cu_seqlens)
    return Estimate(found.advantages)


def _reinforce_baseline(seen: Seen, hyper: Options) -> Estimate:
    found = advantages.reinforce_baseline(seen.rewards, seen.groups, lengths=seen.lengths)
    return Estimate(seen.per_token(found))


def _remax(seen: Seen, hyper: Options) -> Estimate:
    greedy = seen.turn.batch.numbers["greedy_reward"]
    found = advantages.remax(seen.token_rewards(hyper), greedy, gamma=hyper["gamma"], cu_seqlens=seen.cu_seqlens)
    return Estimate(found.advantages)


def _reinforce(seen: Seen, hyper: Options) -> Estimate:
    seen = penalised(seen, hyper)
    return Estimate(seen.per_token(seen.rewards - seen.rewards.mean()))


def _hidden_prompts(group: Group, hyper: Options) -> list[Draft]:
    """Each completion behind its prompt of which tokens are hidden, so many times with others."""
    prompt = torch.tensor([group.samples[0].prompt_ids])
    everything = torch.ones_like(prompt, dtype=torch.bool)
    out = []
    for _ in range(int(hyper["masks"])):
        for i, reward in enumerate(group.rewards):
            hidden = losses.diffu_grpo_tokens(
                prompt,
                -1,
                prompt_mask=everything,
                completion_mask=~everything,
                probability=hyper["hidden"],
                generator=group.generator,
            )
            out.append(Draft((i,), (reward,), tuple(hidden[0].tolist())))
    return out


SCALE = {"scale": ("group", "batch", "none")}
_COV: Numbers = {"fraction": (2e-4, PROBABILITY), "low": (1.0, Domain()), "high": (5.0, Domain())}

_ALL = (
    Recipe(
        "ppo",
        "PPO with a critic",
        "1707.06347, as InstructGPT (2203.02155)",
        "ppo",
        gae,
        samples=1,
        penalty="reward",
        numbers=GAE,
        critic=True,
    ),
    Recipe(
        "reinforce",
        "REINFORCE, the mean of the turn as baseline",
        "Williams 1992; 2205.11275",
        "reinforce",
        _reinforce,
        samples=1,
        penalty="reward",
        aggregation="seq_mean_token_sum",
    ),
    Recipe("grpo", "GRPO", "2402.03300", "grpo", group_normalised, penalty="loss", numbers=EPS, options=SCALE),
    Recipe("dr_grpo", "Dr. GRPO", "2503.20783", "dr_grpo", _centred),
    Recipe(
        "dapo",
        "DAPO",
        "2503.14476",
        "dapo",
        _dapo,
        numbers={**EPS, "overlong_share": (0.2, PROBABILITY)},
        options={"overlong": ("filter", "keep")},
        drafts=_mixed,
    ),
    Recipe("gspo", "GSPO", "2507.18071", "gspo", group_normalised, numbers=EPS),
    Recipe("gspo_token", "GSPO-token", "2507.18071", "gspo_token", group_normalised, numbers=EPS),
    Recipe("cispo", "CISPO", "2506.13585", "cispo", group_normalised, numbers=EPS),
    Recipe("gmpo", "GMPO", "2507.20673", "gmpo", group_normalised, numbers=EPS),
    Recipe("sapo", "SAPO", "2511.20347", "sapo", group_normalised, numbers=EPS),
    Recipe("vespo", "VESPO", "TRL's loss type", "vespo", group_normalised, numbers=EPS),
    Recipe("luspo", "LUSPO", "TRL's loss type", "luspo", group_normalised, numbers=EPS),
    Recipe("rloo", "RLOO", "2402.14740", "reinforce", rloo, penalty="reward", aggregation="seq_mean_token_sum"),
    Recipe(
        "reinforce_plus_plus",
        "REINFORCE++",
        "2501.03262",
        "ppo",
        _reinforce_plus_plus,
        samples=1,
        penalty="reward",
        numbers={"gamma": (1.0, PROBABILITY)},
    ),
    Recipe(
        "reinforce_plus_plus_baseline",
        "REINFORCE++ with the group's mean as baseline",
        "2501.03262",
        "ppo",
        _reinforce_baseline,
        penalty="loss",
    ),
    Recipe(
        "remax",
        "ReMax",
        "2310.10505",
        "reinforce",
        _remax,
        samples=1,
        penalty="reward",
        numbers={"gamma": (1.0, PROBABILITY)},
        aggregation="seq_mean_token_sum",
        greedy=True,
    ),
    Recipe("opo", "OPO", "2505.23585", "reinforce", _opo),
    Recipe("gpg", "GPG", "2504.02546", "reinforce", _gpg, numbers={"f_norm": (1.0, POSITIVE)}),
    Recipe("pass_at_k", "GRPO on pass@k", "verl: grpo_passk", "ppo", _pass_at_k),
    Recipe("clip_cov", "Clip-Cov", "2505.22617", "clip_cov", group_normalised, numbers={**EPS, **_COV}),
    Recipe(
        "kl_cov",
        "KL-Cov",
        "2505.22617",
        "kl_cov",
        group_normalised,
        numbers={**EPS, "fraction": (2e-3, PROBABILITY)},
    ),
    # that the paper's loss is CoPG is not verified; in the only step of a turn this has its gradient
    Recipe(
        "preamble_rl",
        "Reverse engineering human preferences: preambles for a frozen model",
        "2505.15795, from memory",
        "reinforce",
        rloo,
        penalty="reward",
        aggregation="seq_mean_token_sum",
        answered=True,
    ),
    Recipe(
        "diffu_grpo",
        "diffu-GRPO, of masked-diffusion language models",
        "2504.12216, as its official code has it",
        "grpo",
        _centred,
        samples=6,
        penalty="loss",
        numbers={
            "epsilon_low": (0.5, EPSILON),
            "epsilon_high": (0.5, UPPER),
            "beta": (0.04, NOT_NEGATIVE),
            "masks": (1, COUNT),
            "hidden": (0.15, PROBABILITY),
        },
        # what the engine says of its draws are no log-probs of the estimate
        options={"correction": ("none",)},
        aggregation="token_mean",
        drafts=_hidden_prompts,
        denoises=True,
    ),
)

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
