"""Turns: which examples they make, what a step sees of them, and how they go on after a stop."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from fastpo import algorithms
from fastpo.training import task
from fastpo.training.data import Prompt
from fastpo.training.loop import Job, Memory, optimizer_step
from fastpo.training.model import Critic, Policy
from fastpo.training.references import MovingReference
from fastpo.training.rollouts import Sampling, TransformersEngine
from fastpo.training.scorers import Combined, Part
from fastpo.training.turns import Plan, Turns

from .conftest import tiny_model

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")
VOCABULARY = 12
STOP = 11
PROMPTS = [Prompt(f"{n}:", [n, (3 * n) % 9, 9][: 1 + n % 3], (), {}, n + 1) for n in range(10)]


def even(samples):
    """The share of even tokens."""
    return [sum(token % 2 == 0 for token in s.ids) / len(s.ids) for s in samples]


class Rubric(task.Rubric):
    """Of completions that are no sums: the last token, then the length too."""

    def __call__(self, samples):
        return [float(s.ids[-1] % 2 == 0) + (self.items > 2) * len(s.ids) for s in samples]

    def refine(self, samples, rewards):
        assert len(samples) == len(rewards) and self(samples) == list(rewards)
        self.items += 1
        self.version += 1


def make(name="grpo", *, size=4, minibatches=1, epochs=1, rounds=1, tokens=4096, longest=5, scorer=even, **hyper):
    """A job of a tiny model and the turns that feed it."""
    algorithm = algorithms.build(name, hyper)
    accelerator = accelerate.Accelerator(cpu=True)
    model = tiny_model(VOCABULARY)
    several = algorithm.needs == "rewards"
    if several:
        scorer = Combined([Part("even", even), Part("short", lambda samples: [1 / len(s.ids) for s in samples])])
    critic = Critic(model, 3 if algorithm.critic == "each" else 1) if algorithm.critic else None
    policy = Policy(model, critic=critic)
    other = tiny_model(VOCABULARY, seed=1)
    anchors = {"start": Policy(other), "aux": Policy(tiny_model(VOCABULARY, seed=2))}
    turns = Turns(
        accelerator,
        algorithm,
        PROMPTS,
        TransformersEngine(policy.inside, tokens=1000),
        Sampling(max_new_tokens=longest, stop=(STOP,)),
        Plan(size=size, minibatches=minibatches, epochs=epochs, rounds=rounds, tokens=tokens, seed=3, context=64),
        decode=lambda ids: " ".join(map(str, ids)),
        scorer=scorer,
        anchors=anchors,
        companion=other,
        lagged=MovingReference(accelerator, tiny_model(VOCABULARY)) if name == "nlpo" else None,
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    return Job(
        accelerator=accelerator,
        policy=policy,
        optimizer=optimizer,
        schedule=SimpleNamespace(get_last_lr=lambda: [1e-2], step=lambda: None),
        algorithm=algorithm,
        examples=turns.examples,
        constants=turns.constants,
        reference=None,
        memory=Memory(),
        steps=100,
        size=size,
        tokens=tokens,
        seed=3,
        max_norm=1.0,
        before_step=turns,
        order=turns.order,
        max_length=longest,
    )


def step(job, number):
    return {**(job.before_step(job, number) or {}), **optimizer_step(job, number)}


def test_the_steps_of_a_pass_divide_the_examples():
    job = make(size=5, minibatches=3, epochs=2, samples=4)
    found = job.before_step(job, 0)
    assert found["examples"] == len(job.examples) == 20
    passes = [[job.order(epoch * 3 + part) for part in range(3)] for epoch in range(2)]
    for parts in passes:
        assert sorted(i for part in parts for i in part) == list(range(20))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert passes[0] != passes[1]
    before = list(job.examples)
    # the turn has six steps
    assert all(job.before_step(job, n) == {} for n in range(1, 6)) and job.examples == before
    assert job.before_step(job, 6)["epoch"] == 1 and job.examples != before


def test_constants_are_of_the_examples_they_stand_at():
    job = make("ppo", minibatches=2, epochs=2, samples=3)
    job.before_step(job, 0)
    assert {"old", "old_value", "reference", "rollout", "advantages", "returns"} == job.constants.keys()
    for i, example in enumerate(job.examples):
        (ids,) = example.completions
        for name in job.constants:
            assert job.constants[name][i][0].shape == (len(ids),)
        # the engine's log-probs are those of the policy's forward
        torch.testing.assert_close(job.constants["old"][i][0], job.constants["rollout"][i][0], rtol=1e-5, atol=1e-5)


def test_what_a_filter_drops_is_not_trained_on():
    kept = make("dapo", longest=3, samples=6, overlong="filter")
    everything = make("dapo", longest=3, samples=6, overlong="keep")
    for job in (kept, everything):
        job.before_step(job, 0)
    ends = [n for n, e in enumerate(everything.examples) if e.completions[0][-1] == STOP]
    assert 0 < len(ends) < len(everything.examples)
    assert list(kept.examples) == [everything.examples[n] for n in ends]
    for i, n in enumerate(ends):
        for name in kept.constants:
            assert torch.equal(kept.constants[name][i][0], everything.constants[name][n][0])


def test_prompts_are_drawn_until_enough_teach_something():
    def some(samples):
        return [float(s.ids[0] % 2) if s.prompt_ids[0] % 3 == 0 else 1.0 for s in samples]

    counts = []
    for rounds in (1, 2, 9):
        job = make("dapo", rounds=rounds, samples=8, scorer=some, overlong="keep")
        job.before_step(job, 0)
        prompts = [example.prompt for example in job.examples]
        assert all(prompt[0] % 3 == 0 for prompt in prompts)
        counts.append(len(prompts) // 8)
    # a round has four of ten prompts, of which four can teach
    assert counts[0] <= counts[1] <= counts[2] == 4 and counts[0] < 4


def test_a_turn_without_examples_changes_nothing():
    job = make("dapo", rounds=2, scorer=lambda samples: [1.0] * len(samples))
    before = copy.deepcopy(job.policy.state_dict())
    found = step(job, 0)
    assert found["examples"] == 0 and found["tokens"] == 0 and found["same_reward"] == 1 and "loss" not in found
    assert all(torch.equal(before[name], value) for name, value in job.policy.state_dict().items())


@pytest.mark.parametrize("name", ["grpo", "ppo", "nlpo", "constrained_ppo", "t_ppo", "clip_cov"])
def test_no_division_of_a_step_leaves_a_trace(name):
    gradients = []
    for tokens in (4096, 24):
        hyper = {"window": 3} if name == "t_ppo" else {"fraction": 0.2, "low": -9.0} if name == "clip_cov" else {}
        job = make(name, epochs=2, tokens=tokens, samples=3, **hyper)
        job.before_step(job, 0)
        job.optimizer.step = lambda: None
        job.optimizer.zero_grad = lambda: None
        optimizer_step(job, 0)
        gradients.append({n: p.grad for n, p in job.policy.named_parameters() if p.grad is not None})
    one, two = gradients
    assert one.keys() == two.keys() and any(g.abs().max() > 1e-3 for g in one.values())
    for key in one:
        # sums of fp32 products in another order
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "ppo", "nlpo", "hapo", "constrained_ppo", "t_ppo", "meta_po", "xrpo"])
def test_a_stop_within_a_turn_leaves_no_trace(name):
    hyper = {
        "nlpo": {"mask_every": 2, "mask_min_tokens": 2},
        "t_ppo": {"window": 2, "samples": 2},
        "meta_po": {"refine_every": 1, "episodes": 5},
        "xrpo": {"first": 2, "samples": 4},
    }.get(name, {})
    scorer = {"meta_po": lambda: Rubric(), "hapo": lambda: lambda s: [float(x.ids[0] % 2) for x in s]}.get(
        name, lambda: even
    )
    shape = {"minibatches": 2, "epochs": 2, **hyper}
    whole = make(name, scorer=scorer(), **shape)
    metrics = [step(whole, n) for n in range(6)]
    begun = make(name, scorer=scorer(), **shape)
    for n in range(3):
        step(begun, n)

    def kept(job):
        lagged = job.before_step.lagged
        return [job.policy, job.optimizer, job.before_step, *([lagged.model] if lagged else [])]

    saved = copy.deepcopy([each.state_dict() for each in kept(begun)])
    rest = make(name, scorer=scorer(), **shape)
    for target, state in zip(kept(rest), saved, strict=True):
        target.load_state_dict(state)
    for n in range(3, 6):
        assert step(rest, n) == metrics[n]
    for key, value in whole.policy.state_dict().items():
        assert torch.equal(value, rest.policy.state_dict()[key])


def test_windows_go_on_where_they_ended():
    whole = make("t_ppo", samples=2, window=5)
    whole.before_step(whole, 0)
    assert whole.before_step.begun == []  # a window as long as a completion
    job = make("t_ppo", samples=2, window=2)
    turns = job.before_step
    turns(job, 0)
    assert len(job.examples) == 8 and all(len(e.completions[0]) <= 2 for e in job.examples)
    open_ = [e for e in job.examples if e.completions[0][-1] != STOP]
    assert 0 < len(open_) == len(turns.begun)
    assert [(PROMPTS[i].ids, r.ids) for i, r in turns.begun] == [(e.prompt, e.completions[0]) for e in open_]
    found = turns(job, 1)
    # they come first, as they were and two tokens more; new ones fill the places that are left
    for before, now in zip(open_, job.examples, strict=False):
        ids = now.completions[0]
        assert now.prompt == before.prompt and ids[:2] == before.completions[0] and 2 < len(ids) <= 4
    places = 4 - -(-len(open_) // 2)
    assert len(job.examples) == len(open_) + 2 * places and 0 < found["unfinished"] <= 1
    masks = [job.constants["trained"][i][0].tolist() for i in range(len(open_))]
    assert all(mask[:2] == [False, False] and all(mask[2:]) for mask in masks)
    # what is not finished has no reward
    for i, example in enumerate(job.examples):
        if example.completions[0][-1] != STOP and len(example.completions[0]) < 5:
            assert example.numbers == (0.0,) and not job.constants["valued"][i][0].any()


def test_more_is_sampled_of_uncertain_prompts():
    def some(samples):
        return [float(sum(s.ids) % 2) if s.prompt_ids[0] % 2 else 1.0 for s in samples]

    job = make("xrpo", scorer=some, first=4, samples=6, rounds=2, exploration=1e-6, exemplars=0, size=6)
    found = job.before_step(job, 0)
    assert len(job.examples) == 36 and found["samples_least"] == 4 < found["samples_most"]
    counts = {}
    for example in job.examples:
        counts[tuple(example.prompt)] = counts.get(tuple(example.prompt), 0) + 1
    assert all(counts[prompt] == 4 for prompt in counts if prompt[0] % 2 == 0)


def test_unsolved_prompts_see_solved_ones():
    job = make(
        "xrpo",
        first=2,
        samples=4,
        rounds=1,
        exemplars=1,
        size=10,
        scorer=lambda s: [1.0 - x.prompt_ids[0] % 2 for x in s],
    )
    turns = job.before_step
    asked = []
    generate = turns.engine.generate
    turns.engine.generate = lambda texts, *more, **named: (asked.extend(texts), generate(texts, *more, **named))[1]
    turns(job, 0)
    own = [prompt.ids for prompt in PROMPTS]
    behind = [text for text in asked if text not in own]
    assert behind
    for text in behind:
        assert any(text[-len(ids) :] == ids for ids in own if ids[0] % 2)
        assert any(text[: len(ids)] == ids for ids in own if ids[0] % 2 == 0)
    # what is trained on is the bare prompt
    assert all(example.prompt in own for example in job.examples)
    # without room there are none
    turns.plan = SimpleNamespace(**{**vars(turns.plan), "context": 7})
    asked.clear()
    turns._sampled(1)
    assert all(text in own for text in asked)


def test_a_rubric_is_rewritten_between_turns():
    job = make("meta_po", scorer=Rubric(), refine_every=2, episodes=3, samples=2)
    versions = [step(job, n)["rubric"] for n in range(5)]
    assert versions == [0, 0, 1, 1, 2]


def test_the_mask_follows_the_policy():
    job = make("nlpo", mask_every=2, mask_min_tokens=1, mask_top_p=0.5, samples=2)
    lagged = job.before_step.lagged.model
    same = []
    for n in range(4):
        job.before_step(job, n)
        same.append(
            all(torch.equal(a, b) for a, b in zip(lagged.parameters(), job.policy.model.parameters(), strict=True))
        )
        optimizer_step(job, n)
    assert same == [True, False, True, False]
    for i, example in enumerate(job.examples):
        sets = job.constants["allowed"][i][0]
        assert sets.shape == (len(example.completions[0]), 1)
        # the sampled token is one of several that were not all
        bits = [[word >> v & 1 for v in range(VOCABULARY)] for word in sets[:, 0].tolist()]
        assert all(of[token] for of, token in zip(bits, example.completions[0], strict=True))
        assert any(sum(of) < VOCABULARY for of in bits)


def test_evaluation_is_the_same_every_time():
    job = make()
    turns = job.before_step
    first = turns.evaluate(PROMPTS[:4])
    assert first.keys() == {"reward", "length"} and turns.evaluate(PROMPTS[:4]) == first
    assert job.examples == []
