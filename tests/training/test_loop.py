"""The optimiser step: what it starts from, and that the division of a batch leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo import algorithms
from fastpo.training.batches import collate
from fastpo.training.data import Encoder
from fastpo.training.loop import Job, constant_logprobs, evaluate_examples, optimizer_step
from fastpo.training.model import Policy, policy_inputs

from .conftest import character_tokenizer, pairs, tiny_model

accelerate = pytest.importorskip("accelerate")
LOG2 = math.log(2)


def make_job(name="dpo", tokens=4096, reference_seed=0, max_norm=1e9, **hyper):
    tokenizer = character_tokenizer(eos_token="[E]")
    encoder = Encoder(tokenizer, "tiny", 64)
    examples = [encoder.example(row, "") for row in pairs(24)]
    accelerator = accelerate.Accelerator(cpu=True)
    policy = Policy(tiny_model(len(tokenizer)))
    frozen = Policy(tiny_model(len(tokenizer), reference_seed))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    everything = range(len(examples))
    return Job(
        accelerator=accelerator,
        policy=policy,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        algorithm=algorithms.build(name, hyper),
        examples=examples,
        constants={"reference": constant_logprobs(accelerator, frozen, examples, everything, 4096)},
        steps=4,
        size=12,
        tokens=tokens,
        seed=0,
        max_norm=max_norm,
    )


FIRST_LOSS = {
    "dpo": LOG2,
    "cdpo": LOG2,
    "robust_dpo": LOG2,
    "hinge": 1.0,
    "ipo": 25.0,
}


@pytest.mark.parametrize("name", algorithms.names())
def test_the_policy_starts_at_the_reference(name):
    metrics = optimizer_step(make_job(name), 0)
    assert metrics["loss"] == pytest.approx(FIRST_LOSS[name], rel=1e-5)
    assert metrics["chosen_reward"] == pytest.approx(0, abs=1e-5)
    assert metrics["reward_margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_learns_its_pairs(name):
    job = make_job(name, max_norm=1.0)
    before = evaluate_examples(job, job.examples, job.constants)
    for step in range(30):
        optimizer_step(job, step)
    after = evaluate_examples(job, job.examples, job.constants)
    assert after["loss"] < before["loss"]
    assert after["reward_accuracy"] > 0.9
    assert after["reward_margin"] > 0.1


@pytest.mark.parametrize("tokens", [61, 150])
def test_micro_batches_add_up_to_the_batch(tokens):
    whole, parts = make_job(reference_seed=1), make_job(tokens=tokens, reference_seed=1)
    for step in range(2):
        one, many = optimizer_step(whole, step), optimizer_step(parts, step)
        for key in ("loss", "reward_margin", "chosen_reward", "reward_accuracy", "grad_norm"):
            assert many[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
    for ours, theirs in zip(whole.policy.parameters(), parts.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


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
        prompt, (chosen, rejected) = job.examples[i]
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
    job = make_job(reference_seed=1)
    frozen = Policy(tiny_model(job.policy.model.config.vocab_size, seed=1))
    for i in (0, 11, 23):
        alone = frozen(*policy_inputs(collate([job.examples[i]], torch.device("cpu"))))
        torch.testing.assert_close(torch.cat(job.constants["reference"][i]), alone, rtol=1e-5, atol=1e-5)
