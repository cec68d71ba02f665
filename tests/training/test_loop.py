"""The optimiser step: what it starts from, and that the division of a batch leaves no trace."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fastpo import algorithms
from fastpo.algorithms import Batch
from fastpo.reference import objectives
from fastpo.training.batches import collate, interleaved
from fastpo.training.data import Encoder, Example, encode, with_mismatched
from fastpo.training.loop import (
    Job,
    Memory,
    _numbers,
    _whole_step,
    constant_streams,
    evaluate_examples,
    micro_batches,
    optimizer_step,
)
from fastpo.training.model import Logits, Policy, Scores, policy_inputs

from .conftest import character_tokenizer, pairs, tiny_model, tiny_reward_model

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")
LOG2 = math.log(2)


def texts(rng, count):
    """Different texts; letters repeat in them."""
    return ["".join(rng.choice("abcde") for _ in range(rng.randint(2, 9))) + str(i) for i in range(count)]


def given_rows(algorithm, count=24):
    """Data of the kinds that are no pairs and no single completions with labels."""
    rng, rows = random.Random(1), []
    for i in range(count):
        prompt, some = f"{rng.choice('abc')}{i} ", texts(rng, rng.randint(2, 4))
        numbers = [rng.random() for _ in some]
        rows.append(
            {
                "lists": {"completions": some, "scores": numbers, "labels": numbers},
                "identifiers": {"completions": [*"abcd"][: len(some)], "ranks": rng.sample(range(1, 9), len(some))},
                "demonstrations": {"completion": some, "reward": [-n for n in numbers]},
                "hindsight": {"chosen": some[0], "rejected": some[1]},
                "tools": {"completion": "".join(some), "tools": [some[1], some[1][:1] + "x"]},
                "decisions": {
                    "actions": ["a", "bc"],
                    "losses": [[rng.random(), rng.random()] for _ in some[2:]] + [[rng.random(), 0.0]],
                    "observations": [text[:2] for text in some],
                },
            }[algorithm.kind]
            | {"prompt": prompt}
        )
    return rows


# single tokens of the test's tokenizer
PHRASES = {
    "conditional_training": {"aligned": "<", "misaligned": ">"},
    "chain_of_hindsight": {"good": " <", "bad": " > "},
    "filtering": {"threshold": 0.6},
    "sequence_unlikelihood": {"n": 1},
    "implicit_reward_sft": {"divergence": "pearson_chi2"},
}


def rows_for(algorithm, count=24):
    """Data of the algorithm's kind, numbers included."""
    if algorithm.kind not in ("pairwise", "unpaired"):
        return given_rows(algorithm, count)
    rows = [
        {**row, "chosen_score": 3 + i % 5, "rejected_score": i % 3, "chosen_visits": 2 + i % 4, "rejected_visits": 1}
        | {"margin": i % 3 / 2, "annotator": i % 4}
        for i, row in enumerate(pairs(count))
    ]
    if algorithm.unlearns:
        return [{"prompt": r["prompt"], "completion": r["rejected"]} for r in rows]
    return rows if algorithm.kind == "pairwise" else rows[: count // 2]


def make_job(name="dpo", tokens=4096, reference_seed=0, max_norm=1e9, **hyper):
    algorithm = algorithms.build(name, {**PHRASES.get(name, {}), **hyper})
    tokenizer = character_tokenizer(eos_token="[E]")
    encoder = Encoder(tokenizer, "tiny", 64, algorithm.kind, algorithm.columns, algorithm.control)
    examples = encode(rows_for(algorithm), "", encoder, algorithm.problem)
    if algorithm.mismatched:
        examples = with_mismatched(examples, 64)
    accelerator = accelerate.Accelerator(cpu=True)
    memory = Memory()
    torch.manual_seed(3)
    if isinstance(algorithm, algorithms.RewardModel):
        policy = Scores([tiny_reward_model(len(tokenizer), seed) for seed in range(algorithm.groups)])
        memory.state = {"models": torch.tensor([0, 1, 1, 0])} if algorithm.groups > 1 else {}
    else:
        policy = Policy(tiny_model(len(tokenizer)), own=algorithm.module(16))
    frozen = tiny_model(len(tokenizer), reference_seed)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    constants = {}
    if "reference" in algorithm.models and not algorithm.divergence:
        statistics = algorithm.statistics["reference"]
        everything = range(len(examples))
        constants = constant_streams(accelerator, Policy(frozen), examples, everything, 4096, statistics=statistics)
    return Job(
        accelerator=accelerator,
        policy=policy,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        algorithm=algorithm,
        examples=examples,
        constants=constants,
        reference=Logits(frozen) if algorithm.divergence else None,
        memory=memory,
        steps=4,
        size=12,
        tokens=tokens,
        seed=0,
        max_norm=max_norm,
    )


FIRST_LOSS = {
    **dict.fromkeys(("dpo", "cdpo", "robust_dpo", "rso_sigmoid", "dpo_norm", "mcts_dpo", "f_dpo", "chi_po"), LOG2),
    **dict.fromkeys(("ld_dpo", "sampo", "tdpo", "mallows_po", "beta_dpo", "aot", "aot_unpaired", "bco"), LOG2),
    "hinge": 1.0,
    "ipo": 25.0,
    "bco_pair": 2 * LOG2,
    "nca_pair": 2 * LOG2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "kto": 0.5,
    "apo_zero_unpaired": 0.5,
    "npo": 20 * LOG2,
}
GIVEN = [name for name in algorithms.names() if algorithms.kind(name) != "prompts"]
WITH_REFERENCE = [row.name for row in objectives() if row.reference_model and row.name in GIVEN]


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_the_policy_starts_at_the_reference(name):
    metrics = optimizer_step(make_job(name), 0)
    if name in FIRST_LOSS:
        assert metrics["loss"] == pytest.approx(FIRST_LOSS[name], rel=1e-5)
    for key in ("chosen_reward", "rejected_reward", "reward_margin"):
        # all that is unlearned is rejected
        assert metrics.get(key, 0) == pytest.approx(0, abs=1e-5), key


@pytest.mark.parametrize("name, tokens", [("dpo", 150), *((name, 61) for name in GIVEN)])
def test_micro_batches_add_up_to_the_batch(name, tokens):
    """Two steps, the second of which knows what the first one remembered."""
    # clipped, as some gradients are long enough to make the second step another one
    whole, parts = (make_job(name, tokens=n, reference_seed=1, max_norm=1.0) for n in (4096, tokens))
    for step in range(2):
        one, many = optimizer_step(whole, step), optimizer_step(parts, step)
        assert one.keys() == many.keys()
        for key in one.keys() - {"seconds"}:
            assert many[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
    assert whole.memory.state.keys() == parts.memory.state.keys()
    for ours, theirs in zip(whole.policy.parameters(), parts.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [4096, 61])
def test_padding_is_counted(tokens):
    """Of what is laid out as rectangles: each forward's is as long as its longest sequence."""
    packed, padded = make_job(tokens=tokens), make_job(tokens=tokens)
    padded.policy.layout = "padded"
    assert optimizer_step(packed, 0)["padding"] == 0
    indices = padded.indices(0)
    there = computed = 0
    for members, batch in micro_batches(padded.accelerator, [padded.examples[i] for i in indices], tokens):
        assert members
        there += len(batch.input_ids)
        computed += int((batch.position_ids == 0).sum()) * (int(batch.position_ids.max()) + 1)
    found = optimizer_step(padded, 0)["padding"]
    assert 0 < found < 1 and found == pytest.approx(1 - there / computed)


COUPLED = [name for name in GIVEN if algorithms.build(name, {}).whole_step]


@pytest.mark.parametrize("tokens", [61, 1 << 14])
@pytest.mark.parametrize("name", COUPLED)
def test_a_whole_steps_gradient_is_that_of_one_graph(name, tokens):
    """The loss of all examples, differentiated through one forward."""
    job, plain = make_job(name, tokens=tokens, reference_seed=1), make_job(name, reference_seed=1)
    indices = list(range(len(job.examples)))
    batch = collate(plain.examples, torch.device("cpu"))
    streams = {"policy": plain.policy(*policy_inputs(batch))}
    if "reference" in plain.constants:
        streams["reference"] = torch.cat(interleaved([plain.constants["reference"][i] for i in indices]))
    numbers = _numbers(plain, batch.numbers, batch.each)
    out = plain.algorithm(Batch(streams, batch.completions, numbers, len(indices), 7, len(batch.targets)), {})
    out.loss.backward()

    totals, state = _whole_step(job, indices, 7)
    assert totals["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    for key, value in out.state.items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(job.policy.parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * float(theirs.grad.abs().max()))


@pytest.mark.parametrize(("tokens", "forwards"), [(1 << 14, 1), (200, 4)])
def test_a_step_in_one_micro_batch_takes_one_forward(tokens, forwards):
    job, calls = make_job("bco", tokens=tokens, reference_seed=1), []
    job.policy.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    _whole_step(job, [*range(len(job.examples))], 7)
    assert len(calls) == forwards and sum(calls) == max(1, forwards // 2)


def test_evaluation_leaves_no_trace():
    for name in ("beta_dpo", "bco"):
        job = make_job(name)
        optimizer_step(job, 0)
        before = {key: value.clone() for key, value in job.memory.state.items()}
        first = evaluate_examples(job, job.examples, job.constants)
        assert first == evaluate_examples(job, job.examples, job.constants)
        assert before.keys() == job.memory.state.keys() != set()
        assert all(torch.equal(before[key], job.memory.state[key]) for key in before)


def test_the_memory_of_a_step_is_a_moving_average():
    """BCO's δ after two steps, from rewards computed by hand."""
    job = make_job("bco", reference_seed=1, beta=0.3, decay=0.75)
    from fastpo.training.batches import step_indices

    expected = None
    for step in range(2):
        indices = step_indices(step, 12, len(job.examples), 0)
        means = []
        for label in (1.0, 0.0):
            rewards = []
            for i in indices:
                if job.examples[i].numbers[0] == label:
                    with torch.no_grad():
                        alone = job.policy(*policy_inputs(collate([job.examples[i]], torch.device("cpu"))))
                    rewards.append(0.3 * float(alone.sum() - job.constants["reference"][i][0].sum()))
            means.append(sum(rewards) / len(rewards))
        now = sum(means) / 2
        expected = now if expected is None else 0.75 * expected + 0.25 * now
        optimizer_step(job, step)
        assert float(job.memory.state["delta"]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_class_means_of_single_completions():
    """Rewards are means over their class, however unequal the classes are."""
    job = make_job("apo_zero_unpaired", reference_seed=1, tokens=61)
    constants, rewards = job.constants["reference"], {0.0: [], 1.0: []}
    examples = [e for i, e in enumerate(job.examples) if i % 2 == 0 or i < 4]
    kept = [i for i in range(len(job.examples)) if i % 2 == 0 or i < 4]
    for i in kept:
        with torch.no_grad():
            alone = job.policy(*policy_inputs(collate([job.examples[i]], torch.device("cpu"))))
        rewards[job.examples[i].numbers[0]].append(0.1 * float(alone.sum() - constants[i][0].sum()))
    found = evaluate_examples(job, examples, {"reference": {n: constants[i] for n, i in enumerate(kept)}})
    assert len(rewards[0.0]) != len(rewards[1.0])
    assert found["chosen_reward"] == pytest.approx(sum(rewards[1.0]) / len(rewards[1.0]), rel=1e-4)
    assert found["rejected_reward"] == pytest.approx(sum(rewards[0.0]) / len(rewards[0.0]), rel=1e-4)


def test_one_step_is_plain_dpo():
    """The whole path against a dozen lines of torch."""
    job = make_job(reference_seed=1, beta=0.3)
    plain = tiny_model(job.policy.model.config.vocab_size)
    frozen = tiny_model(job.policy.model.config.vocab_size, seed=1)

    def total(model, prompt, completion):
        logprobs = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        return sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(completion))

    metrics = optimizer_step(job, 0)
    from fastpo.training.batches import step_indices

    losses = []
    for i in step_indices(0, 12, 24, seed=0):
        prompt, (chosen, rejected), *_ = job.examples[i]
        with torch.no_grad():
            reference = total(frozen, prompt, chosen) - total(frozen, prompt, rejected)
        margin = total(plain, prompt, chosen) - total(plain, prompt, rejected) - reference
        losses.append(-torch.nn.functional.logsigmoid(0.3 * margin))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for ours, theirs in zip(job.policy.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-4, atol=1e-5)


def test_constants_are_those_of_the_frozen_model():
    job = make_job("mallows_po", reference_seed=1)
    frozen = tiny_model(job.policy.model.config.vocab_size, seed=1)
    for i in (0, 11, 23):
        batch = collate([job.examples[i]], torch.device("cpu"))
        logits = frozen(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False).logits[
            0
        ]
        p = logits[batch.predictors].log_softmax(-1)
        logprobs = torch.cat(job.constants["reference"][i])
        torch.testing.assert_close(logprobs, p.gather(1, batch.targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
        entropy = torch.cat(job.constants["reference_normalised_entropy"][i])
        expected = -(p.exp() * p).sum(-1) / math.log(p.shape[-1])
        torch.testing.assert_close(entropy, expected, rtol=1e-5, atol=1e-5)


def test_what_a_policy_says_beside_log_probs():
    policy = Policy(tiny_model(20))
    frozen = tiny_model(20, seed=1)
    batch = collate([Example([1, 2, 3], ([4, 5], [6])), Example([7], ([8], [9, 10]))], torch.device("cpu"))
    rows = (batch.input_ids[None], batch.position_ids[None])
    p, q = (
        m(input_ids=rows[0], position_ids=rows[1], use_cache=False).logits[0, batch.predictors].log_softmax(-1)
        for m in (policy.model, frozen)
    )
    weights = torch.linspace(-1, 2, len(batch.targets))
    reference_logits = Logits(frozen)(*policy_inputs(batch)[:3])
    out = policy(*policy_inputs(batch), statistics=("log_sum_p2",), reference_logits=reference_logits)
    kl = (q.exp() * (q - p)).sum(-1)
    torch.testing.assert_close(out["logprobs"], p.gather(1, batch.targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["log_sum_p2"], (2 * p).logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["kl"], kl, rtol=1e-5, atol=1e-5)
    parameters = list(policy.parameters())
    for ours, theirs in zip(
        torch.autograd.grad((out["kl"] + out["logprobs"]) @ weights, parameters, retain_graph=True),
        torch.autograd.grad((kl + p.gather(1, batch.targets[:, None])[:, 0]) @ weights, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert policy(*policy_inputs(batch), statistics=("log_sum_p2",)).keys() == {"logprobs", "log_sum_p2"}
