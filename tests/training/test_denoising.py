"""Masked-diffusion language models: their log-probs, their samples, and diffu-GRPO on them."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastpo import algorithms
from fastpo.algorithms import Batch, Group, Sample, Turn
from fastpo.losses import elbo_nodes
from fastpo.training.batches import collate, step_layout
from fastpo.training.data import Example
from fastpo.training.denoising import Denoiser, DenoisingEngine, mask_token
from fastpo.training.errors import UserError
from fastpo.training.model import policy_inputs
from fastpo.training.rollouts import Sampling

from .conftest import character_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")


def denoiser(vocabulary, room, temperature=1.0, seed=0):
    """The last token is the mask."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        pad_token_id=None,
    )
    return Denoiser(transformers.BertForMaskedLM(config).eval(), vocabulary - 1, room, temperature=temperature)


def alone(model, prompt, written):
    """The log-probs (room, V) of one sequence, computed without padding."""
    mask = model.mask
    ids = torch.tensor([[mask if token < 0 else token for token in [*prompt, *written]]])
    logits = model.model(input_ids=ids).logits[0, len(prompt) :] / model.temperature
    return torch.cat([logits[:, :mask].log_softmax(-1), torch.full((len(written), 1), -torch.inf)], 1)


def test_log_probs_are_those_of_hidden_completions():
    model = denoiser(9, 5, temperature=0.7)
    examples = [
        Example([1, 2, 3], ([4, 5], [6])),
        Example([7], ([1, 2, 3, 4, 5], [2, 2])),
        Example([1, -1, 3, -1], ([8 - 1], [0, 0, 0, 0])),  # hidden tokens in the prompt
    ]
    batch = collate(examples, torch.device("cpu"))
    found = model(*policy_inputs(batch))
    expected = []
    for k in (0, 1):
        for example in examples:
            ids = torch.tensor(example.completions[k])
            logprobs = alone(model, example.prompt, [model.mask] * 5)
            expected.append(logprobs[: len(ids)].gather(1, ids[:, None])[:, 0])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    more = model(*policy_inputs(batch), statistics=("entropy",))
    assert torch.equal(more["logprobs"], found)
    # the room of five behind each prompt is none of the padding
    lengths = [(len(example.prompt), len(c)) for example in examples for c in example.completions]
    assert model.computed(lengths) == (2 * (3 + 1 + 4 + 15), 6 * 9)
    distribution = alone(model, [1, 2, 3], [model.mask] * 5)[0, : model.mask]
    entropy = -(distribution.exp() * distribution).sum()
    torch.testing.assert_close(more["entropy"][0], entropy, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(found.sum(), [*model.parameters()], allow_unused=True)
    theirs = torch.autograd.grad(torch.cat(expected).sum(), [*model.parameters()], allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rate", ["time", "count"])
@torch.no_grad()
def test_bounds_are_those_of_some_masks(rate):
    """Of all the ways to hide as many tokens at each time, one gives the numbers found; beside others, the same one."""
    model = denoiser(9, 4)
    model.nodes, model.rate = 2, rate
    examples = [Example([1, 2, 3], ([4, 5, 1],)), Example([7], ([1, 2, 3, 4],)), Example([1, -1], ([6],))]
    together = model(*policy_inputs(collate(examples, torch.device("cpu")))).split([3, 4, 1])
    times, weights = elbo_nodes(2)
    for example, found in zip(examples, together, strict=True):
        (single,) = model(*policy_inputs(collate([example], torch.device("cpu")))).split(len(found))
        torch.testing.assert_close(single, found, rtol=1e-4, atol=1e-5)
        ids = example.completions[0]
        length, behind = len(ids), [model.mask] * (4 - len(ids))

        def added(time, weight, hidden, ids=ids, behind=behind, prompt=example.prompt, length=length):
            written = [model.mask if i in hidden else token for i, token in enumerate(ids)]
            logprobs = alone(model, prompt, [*written, *behind])
            factor = weight / time if rate == "time" else weight * length / len(hidden)
            return torch.tensor([factor * float(logprobs[i, ids[i]]) if i in hidden else 0.0 for i in range(length)])

        ways = [
            [
                added(float(time), float(weight), hidden)
                for hidden in itertools.combinations(range(length), max(1, round(float(time) * length)))
            ]
            for time, weight in zip(times, weights, strict=True)
        ]
        right = [torch.allclose(found, sum(way), rtol=1e-4, atol=1e-4) for way in itertools.product(*ways)]
        assert sum(right) == 1


def test_gdpo_is_ppo_on_sequences():
    """-min(r A, clip(r) A) / |y| + the penalty / |y|, mean over the sequences; any division adds up."""
    lengths = [3, 1, 2, 4]
    generator = torch.Generator().manual_seed(0)
    streams = {name: -torch.rand(10, generator=generator) for name in ("policy", "old", "reference")}
    algorithm = algorithms.build("diffusion_gdpo", {"epsilon": 0.3, "beta": 0.2})
    assert algorithm.anchors(1) == {"reference": "start"}
    assert algorithm.anchors(2) == {"old": "turn", "reference": "start"}
    assert algorithms.build("diffusion_gdpo", {}).anchors(1) == {}

    def batch(which):
        examples = [Example([1], ([0] * lengths[i],)) for i in which]
        parts = {name: stream.split(lengths) for name, stream in streams.items()}
        return Batch(
            streams={name: torch.cat([of[i] for i in which]) for name, of in parts.items()},
            completions=step_layout(examples, torch.device("cpu")),
            numbers={"reward": torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64)[list(which)]},
            num_items=4,
            seed=0,
            num_tokens=10,
            max_length=4,
        )

    everything = batch(range(4))
    turn = Turn(everything, torch.tensor([0, 0, 1, 1]), ["a", "b"], torch.ones(4, dtype=torch.bool))
    advantages = algorithm.prepare(turn, {}).streams["advantages"]
    assert advantages.tolist() == [0.5] * 3 + [-0.5] + [0.25] * 2 + [-0.25] * 4
    streams["advantages"] = advantages

    def loss(which):
        given = batch(which)
        policy = given.streams["policy"].clone().requires_grad_()
        out = algorithm(given._replace(streams={**given.streams, "policy": policy}), {})
        out.loss.backward()
        return float(out.loss.detach()), policy.grad

    sums = {name: torch.stack([part.sum() for part in stream.split(lengths)]) for name, stream in streams.items()}
    a = torch.tensor([0.5, -0.5, 0.25, -0.25])
    ratio = (sums["policy"] - sums["old"]).exp()
    gap = sums["reference"] - sums["policy"]
    each = -torch.minimum(ratio * a, ratio.clamp(0.7, 1.3) * a) + 0.2 * (gap.exp() - gap - 1)
    total, slopes = loss(range(4))
    assert total == pytest.approx(float((each / torch.tensor(lengths)).mean()), rel=1e-4)
    one, first = loss([0, 1])
    two, second = loss([2, 3])
    assert one + two == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(torch.cat([first, second]), slopes)
    # no token of a sequence counts more than another
    assert all(part.eq(part[0]).all() for part in slopes.split(lengths)) and slopes.any()


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 1, 2], [3, 3]]


def test_completions_do_not_depend_on_the_batch():
    model = denoiser(9, 4)
    sampling = Sampling(4, stop=(0,), seed=3)
    together = DenoisingEngine(model, tokens=10_000).generate(PROMPTS, 5, sampling, [7, 8, 9, 10])
    for i, prompt in enumerate(PROMPTS):
        (single,) = DenoisingEngine(model, tokens=1).generate([prompt], 5, sampling, [7 + i])
        assert [each.ids for each in single] == [each.ids for each in together[i]]
        for ours, theirs in zip(single, together[i], strict=True):
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-5)
    other = DenoisingEngine(model, tokens=64).generate(PROMPTS, 5, Sampling(4, stop=(0,), seed=4), [7, 8, 9, 10])
    assert [[each.ids for each in of] for of in other] != [[each.ids for each in of] for of in together]


def test_completions_are_cut_behind_the_token_that_ends_them():
    model = denoiser(4, 6)
    whole, cut = (
        DenoisingEngine(model, tokens=1000).generate([[1]], 40, Sampling(6, stop=stop))[0] for stop in ((), (0,))
    )
    assert {each.ended for each in cut} == {True, False} and not any(each.ended for each in whole)
    for long, short in zip(whole, cut, strict=True):
        assert len(long.ids) == 6 and model.mask not in long.ids
        length = long.ids.index(0) + 1 if 0 in long.ids else 6
        assert short.ids == long.ids[:length] and short.ended == (0 in long.ids)
        assert torch.equal(short.logprobs, long.logprobs[:length])


def paths(model, prompt, written, temperature):
    """Every text that can come of `written` with its probability and the log-probs of its draws."""
    hidden = [place for place, token in enumerate(written) if token == model.mask]
    if not hidden:
        yield tuple(written), 0.0, {}
        return
    logits = alone(model, prompt, written)
    place = max(hidden, key=lambda i: float(logits[i].max()))
    for token, logprob in enumerate((logits[place] / temperature).log_softmax(0)[: model.mask].tolist()):
        after = [*written[:place], token, *written[place + 1 :]]
        for text, rest, each in paths(model, prompt, after, temperature):
            yield text, logprob + rest, {**each, place: logprob}


@torch.no_grad()
def test_the_distribution_of_samples():
    """The probabilities of all texts of three tokens add up to one, and are those of their draws."""
    model, draws, temperature = denoiser(4, 3, seed=1), 4000, 0.8
    table = {text: (total, each) for text, total, each in paths(model, [2, 1], [3, 3, 3], temperature)}
    assert set(table) == set(itertools.product(range(3), repeat=3))
    exact = torch.tensor([total for total, _ in table.values()]).double().exp()
    assert float(exact.sum()) == pytest.approx(1, abs=1e-5)
    (found,) = DenoisingEngine(model, tokens=4096).generate([[2, 1]], draws, Sampling(3, temperature))
    for rollout in found[:50]:
        _, each = table[tuple(rollout.ids)]
        torch.testing.assert_close(rollout.logprobs, torch.tensor([each[i] for i in range(3)]), rtol=1e-4, atol=1e-4)
    counts = torch.tensor([sum(tuple(r.ids) == text for r in found) for text in table])
    # five standard deviations
    assert ((counts / draws - exact).abs() < 5 * (exact * (1 - exact) / draws).sqrt() + 1e-9).all()
    (greedy,) = DenoisingEngine(model, tokens=64).generate([[2, 1]], 2, Sampling(3, 0.0))
    written = [3, 3, 3]
    while 3 in written:
        logits = alone(model, [2, 1], written)
        place = max((i for i in range(3) if written[i] == 3), key=lambda i: float(logits[i].max()))
        written[place] = int(logits[place].argmax())
    assert [each.ids for each in greedy] == [written, written]


def test_what_a_masked_model_needs():
    with pytest.raises(UserError, match=r"tiny: the tokenizer has no mask token"):
        mask_token(character_tokenizer(eos_token="[E]"), "tiny")
    with pytest.raises(UserError, match=r"--rollout\.stop"):
        DenoisingEngine(denoiser(4, 3), tokens=64).generate([[1]], 1, Sampling(3, stop_strings=("x",)))


def test_prompts_are_hidden_in_part():
    prompt = list(range(1, 201))
    samples = [Sample("", "", prompt, [i], True, {}) for i in range(3)]

    def drafts(seed=0, **hyper):
        generator = torch.Generator().manual_seed(seed)
        given = Group(samples, [0.0, 1.0, 0.5], lambda i, j: 0.5, [0.0] * 3, generator)
        return algorithms.build("diffu_grpo", hyper).drafts(given)

    found = drafts(masks=4)
    assert [draft.completions for draft in found] == [(0,), (1,), (2,)] * 4
    assert [draft.numbers for draft in found] == [(0.0,), (1.0,), (0.5,)] * 4
    assert len({draft.prompt for draft in found}) == 12
    hidden = [draft.prompt.count(-1) for draft in found]
    # five standard deviations of 2,400 draws
    assert abs(sum(hidden) / 2400 - 0.15) < 5 * (0.15 * 0.85 / 2400) ** 0.5
    assert all(token in (-1, own) for draft in found for token, own in zip(draft.prompt, prompt, strict=True))
    assert drafts(masks=4) == found != drafts(seed=1, masks=4)
    assert {draft.prompt for draft in drafts(hidden=0.0)} == {tuple(prompt)}
