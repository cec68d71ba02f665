"""Sampling with transformers: what is drawn, from which distribution, and its log-probs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastpo.kernels import pack_allowed, token_logprobs, unpack_allowed
from fastpo.training import rollouts
from fastpo.training.rollouts import Mask, Mixture, Sampling, TransformersEngine, draw, nucleus, uniforms

from .conftest import character_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("threads")
VOCABULARY = 11
PROMPTS = [[1, 2, 3, 4], [5], [6, 7, 8], [9, 1]]
SAMPLING = Sampling(max_new_tokens=6, stop=(10, 3), seed=5)
# fp32 log-softmax of logits of order 1, of attention over another number of tokens
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def model():
    return tiny_model(VOCABULARY)


@pytest.fixture(scope="module")
def other():
    return tiny_model(VOCABULARY, seed=1)


def engine_of(model, **options):
    return TransformersEngine(lambda function: function(model), **options)


def logits_of(model, prompt, ids):
    """Of every token of a completion."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0]
    return out[len(prompt) - 1 : -1]


def everything(found):
    return [(prompt, rollout) for prompt, of in zip(PROMPTS, found, strict=True) for rollout in of]


def test_log_probs_are_a_forwards(model):
    engine = engine_of(model, tokens=10_000)
    found = engine.generate(PROMPTS, 5, replace(SAMPLING, temperature=0.7))
    assert [len(of) for of in found] == [5] * len(PROMPTS)
    for prompt, rollout in everything(found):
        expected = token_logprobs(logits_of(model, prompt, rollout.ids) / 0.7, torch.tensor(rollout.ids))
        torch.testing.assert_close(rollout.logprobs, expected, **CLOSE)
        # it ends with the first token that stops, or at the longest
        ends = [n for n, token in enumerate(rollout.ids) if token in SAMPLING.stop]
        assert ends == ([len(rollout.ids) - 1] if rollout.ended else [])
        assert rollout.ended or len(rollout.ids) == 6
    assert len({tuple(rollout.ids) for _, rollout in everything(found)}) > 10


def test_no_division_of_the_prompts_leaves_a_trace(model):
    together = engine_of(model, tokens=10_000).generate(PROMPTS, 4, SAMPLING, keys=[7, 3, 5, 1])
    apart = engine_of(model, tokens=1).generate(PROMPTS, 4, SAMPLING, keys=[7, 3, 5, 1])
    assert [[r.ids for r in of] for of in together] == [[r.ids for r in of] for of in apart]
    for one, two in zip(together, apart, strict=True):
        for ours, theirs in zip(one, two, strict=True):
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, **CLOSE)
    # nor does what else is asked for: half of the prompts, more samples
    half = engine_of(model, tokens=30).generate(PROMPTS[2:], 6, SAMPLING, keys=[5, 1])
    assert [[r.ids for r in of[:4]] for of in half] == [[r.ids for r in of] for of in together[2:]]
    again = engine_of(model, tokens=10_000).generate(PROMPTS, 4, replace(SAMPLING, seed=6), keys=[7, 3, 5, 1])
    assert again != together


def test_draws_follow_the_distribution(model):
    count = 4000
    sampling = Sampling(max_new_tokens=1, temperature=0.8)
    (found,) = engine_of(model, tokens=100_000).generate([PROMPTS[0]], count, sampling)
    probabilities = (logits_of(model, PROMPTS[0], [0])[0] / 0.8).softmax(-1)
    seen = torch.bincount(torch.tensor([r.ids[0] for r in found]), minlength=VOCABULARY) / count
    # five standard deviations of each share
    assert ((seen - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / count).sqrt() + 1e-3).all()


def test_greedy_takes_the_most_probable_token(model):
    found = engine_of(model, tokens=10_000).generate(PROMPTS, 2, replace(SAMPLING, temperature=0.0))
    for prompt, rollout in everything(found):
        assert rollout.ids == logits_of(model, prompt, rollout.ids).argmax(-1).tolist()


@pytest.mark.parametrize("size", [5, 256, 1000])
def test_draws_invert_the_distribution_function(size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, size, generator=generator) * 3
    logits[:, ::3] = float("-inf")
    at = torch.rand(40, 1, generator=generator, dtype=torch.float64)
    at[0], at[1] = 0.0, 1 - 2**-53
    chosen, logprobs = draw(logits, at)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    before = (cumulative - logits.double().softmax(-1)).gather(-1, chosen)
    # the weights' fp32 exponentials, each within 2 ulp
    slack = 4 * 2.0**-24
    assert (before <= at + slack).all() and (at <= cumulative.gather(-1, chosen) + slack).all()
    assert logits.gather(-1, chosen).isfinite().all()
    # two roundings of numbers below 32
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, chosen), rtol=0, atol=2 * 2.0**-19)


def test_the_ends_of_the_draws_never_have_no_weight():
    logits = torch.full((2, 600), float("-inf"))
    logits[:, [7, 300, 301]] = 0.0
    chosen, _ = draw(logits, torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64))
    assert chosen[:, 0].tolist() == [7, 301]


COMPANIONS = {
    "alone": lambda other: {},
    "mixture": lambda other: {"mixture": Mixture(other, 0.3)},
    "mask": lambda other: {"mask": Mask(other, 0.8, 2)},
}


@pytest.mark.parametrize("companion", COMPANIONS)
def test_a_prompt_is_computed_once(model, other, companion):
    seen = {model: [], other: []}

    def note(layer, inputs, _):
        seen[model if layer is model.model.layers[0] else other].append(tuple(inputs[0].shape[:2]))

    hooks = [each.model.layers[0].register_forward_hook(note) for each in (model, other)]
    prompts, sampling = [PROMPTS[0], PROMPTS[2]], Sampling(max_new_tokens=4)
    engine_of(model, tokens=1000).generate(prompts, 3, sampling, **COMPANIONS[companion](other))
    for hook in hooks:
        hook.remove()
    # the prompts without their last tokens, then a token of every row
    each = [(2, 3)] + [(6, 1)] * 4
    assert seen == {model: each, other: [] if companion == "alone" else each}


@pytest.mark.parametrize("companion", COMPANIONS)
def test_shared_prompts_change_no_draw(model, other, companion, monkeypatch):
    """As if every row computed its prompt."""
    engine, sampling = engine_of(model, tokens=10_000), replace(SAMPLING, temperature=0.9, stop=())
    shared = engine.generate(PROMPTS, 6, sampling, **COMPANIONS[companion](other))
    monkeypatch.setattr(rollouts, "_begin", lambda *_, **__: {})
    own = engine.generate(PROMPTS, 6, sampling, **COMPANIONS[companion](other))
    assert len({tuple(rollout.ids) for _, rollout in everything(own)}) > 10
    for (_, ours), (_, theirs) in zip(everything(shared), everything(own), strict=True):
        assert ours.ids == theirs.ids and ours.ended == theirs.ended
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, **CLOSE)
        assert ours.allowed is theirs.allowed is None or torch.equal(ours.allowed, theirs.allowed)


def test_the_nucleus_is_the_smallest_set_that_reaches_its_probability():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    kept = nucleus(probabilities.log(), 0.7).isfinite()
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert nucleus(probabilities.log(), 1.0).isfinite().all()


def test_sampling_from_the_nucleus_is_renormalised(model):
    found = engine_of(model, tokens=10_000).generate(PROMPTS, 5, replace(SAMPLING, top_p=0.6))
    for prompt, rollout in everything(found):
        logits = nucleus(logits_of(model, prompt, rollout.ids), 0.6)
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(rollout.ids)[:, None])[:, 0]
        assert expected.isfinite().all()
        torch.testing.assert_close(rollout.logprobs, expected, **CLOSE)


def test_a_text_ends_a_completion_and_belongs_to_it():
    tokenizer = character_tokenizer(eos_token="[E]")
    engine = engine_of(tiny_model(len(tokenizer)), tokens=10_000, tokenizer=tokenizer)
    free = Sampling(max_new_tokens=8)
    (plain,) = engine.generate([[1]], 30, free)
    text = tokenizer.decode(plain[0].ids[3:5])
    (stopped,) = engine.generate([[1]], 30, replace(free, stop_strings=(text,)))
    assert any(rollout.ended for rollout in stopped)
    for whole, rollout in zip(plain, stopped, strict=True):
        ends = [n for n in range(1, 9) if text in tokenizer.decode(whole.ids[:n])]
        assert rollout.ids == whole.ids[: ends[0] if ends else 8] and rollout.ended == bool(ends)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mixture_lies_between_two_models(model, other, share):
    engine = engine_of(model, tokens=10_000)
    found = engine.generate(PROMPTS, 3, SAMPLING, mixture=Mixture(other, share))
    for prompt, rollout in everything(found):
        ours, theirs = (logits_of(m, prompt, rollout.ids).log_softmax(-1) for m in (model, other))
        mixed = ((1 - share) * ours + share * theirs).log_softmax(-1)
        expected = mixed.gather(-1, torch.tensor(rollout.ids)[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs, expected, **CLOSE)
    if share == 0:
        assert [[r.ids for r in of] for of in found] == [
            [r.ids for r in of] for of in engine.generate(PROMPTS, 3, SAMPLING)
        ]


def test_a_mask_allows_what_another_model_finds_likely(model, other):
    engine = engine_of(model, tokens=10_000)
    found = engine.generate(PROMPTS, 4, replace(SAMPLING, temperature=0.9), mask=Mask(other, 0.5, 2))
    for prompt, rollout in everything(found):
        assert rollout.allowed is not None and rollout.allowed.shape == (len(rollout.ids), 1)
        expected = nucleus(logits_of(other, prompt, rollout.ids) / 0.9, 0.5).isfinite()
        best = logits_of(other, prompt, rollout.ids).topk(2).indices
        expected = expected.scatter(-1, best, True)
        expected[:, list(SAMPLING.stop)] = True  # what ends a completion always may
        assert torch.equal(unpack_allowed(rollout.allowed, VOCABULARY), expected)
        logits = logits_of(model, prompt, rollout.ids) / 0.9
        logprobs = token_logprobs(logits, torch.tensor(rollout.ids), allowed=pack_allowed(expected))
        torch.testing.assert_close(rollout.logprobs, logprobs, **CLOSE)
    assert all(rollout.allowed is None for _, rollout in everything(engine.generate(PROMPTS, 1, SAMPLING)))


def test_uniform_numbers_depend_on_seed_prompt_and_place():
    first = uniforms(0, 1, 2, 5)
    assert torch.equal(first, uniforms(0, 1, 2, 5)) and torch.equal(first[:3], uniforms(0, 1, 2, 3))
    assert all(not torch.equal(first, uniforms(*key, 5)) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 12, 2)))
    assert first.dtype == torch.float64 and ((first >= 0) & (first < 1)).all()


def test_processes_that_share_weights_run_equally_many_forwards(model):
    calls, single = [], engine_of(model, tokens=10_000)

    def inside(function):
        # as one process, which has none to wait for
        calls.append(function)
        return single._batch(model, **function.keywords)

    alone = single.generate(PROMPTS, 2, SAMPLING)
    shared = TransformersEngine(inside, tokens=10_000, largest=lambda count: 3).generate(PROMPTS, 2, SAMPLING)
    assert [[r.ids for r in of] for of in shared] == [[r.ids for r in of] for of in alone]
    assert len(calls) == 3
    # one that has nothing to sample
    assert TransformersEngine(inside, tokens=10_000, largest=lambda count: 2).generate([], 2, SAMPLING) == []
    assert len(calls) == 5
