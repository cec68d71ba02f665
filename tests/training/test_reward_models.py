"""Reward models in training: scores, losses, annotators."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from fastpo import algorithms
from fastpo.cli import main
from fastpo.training.annotators import Annotators
from fastpo.training.batches import collate, step_indices
from fastpo.training.data import Encoder, Example, encode
from fastpo.training.errors import UserError
from fastpo.training.loop import evaluate_examples, optimizer_step
from fastpo.training.model import Scores, load_reward_model, policy_inputs

from .conftest import character_tokenizer, pairs, tiny_model, tiny_reward_model
from .test_loop import make_job

pytestmark = pytest.mark.usefixtures("threads")

PAD = 6
# completions that end with the padding token, that have nothing else, and a whole sequence of it
EXAMPLES = [
    Example([1, 2, 3], ([4, 5, PAD], [PAD])),
    Example([7], ([8], [9, 10, 11, 12])),
    Example([PAD], ([PAD, PAD], [4, PAD])),
]


def one_by_one(model, examples=EXAMPLES):
    """What transformers says of each sequence alone, in packed order."""
    ids = [e.prompt + e.completions[k] for k in range(2) for e in examples]
    return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in ids])


def architectures():
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BloomConfig,
        BloomForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
    )

    one = dict(vocab_size=20, num_labels=1, pad_token_id=PAD)
    gpt2 = dict(n_embd=16, n_layer=2, n_head=2)
    yield "gpt2", "shared", lambda: GPT2ForSequenceClassification(GPT2Config(**one, **gpt2))
    bloom = dict(hidden_size=16, n_layer=2, n_head=2)
    yield "bloom", "padded", lambda: BloomForSequenceClassification(BloomConfig(**one, **bloom))
    bert = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    yield "bert", None, lambda: BertForSequenceClassification(BertConfig(**one, **bert))
    yield "llama", "shared", lambda: tiny_reward_model(20, pad=PAD)
    yield "llama without padding", "shared", lambda: tiny_reward_model(20)


@pytest.mark.parametrize("name, layout, build", [pytest.param(*a, id=a[0]) for a in architectures()])
def test_scores_are_transformers_own(name, layout, build):
    torch.manual_seed(0)
    model = build().eval()
    scores = Scores([model])
    assert scores.layout == layout
    batch = collate(EXAMPLES, torch.device("cpu"))
    found = scores(*policy_inputs(batch))
    expected = one_by_one(model)
    last = torch.tensor(batch.completions.lengths).cumsum(0) - 1
    torch.testing.assert_close(found[last], expected, rtol=1e-4, atol=2e-6)
    others = torch.ones(len(found), dtype=torch.bool).index_fill(0, last, False)
    assert (found[others] == 0).all() and others.sum() == 7
    weights = torch.randn(len(found), generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found @ weights, parameters, allow_unused=True),
        torch.autograd.grad(expected @ weights[last], parameters, allow_unused=True),
        strict=True,
    ):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max() + 1e-3))


def test_several_models_answer_together():
    models = [tiny_reward_model(20, seed, PAD) for seed in range(3)]
    batch = collate(EXAMPLES, torch.device("cpu"))
    found = Scores(models)(*policy_inputs(batch), statistics=("1", "2"))
    assert list(found) == ["logprobs", "1", "2"]
    for model, stream in zip(models, found.values(), strict=True):
        assert torch.equal(stream, Scores([model])(*policy_inputs(batch)))


def test_a_new_head_knows_its_padding(model_folder, tmp_path):
    model = load_reward_model(str(model_folder))
    tokenizer = character_tokenizer(eos_token="[E]", bos_token="[B]")
    # the folder's tokenizer pads with EOS
    assert model.config.pad_token_id == tokenizer.eos_token_id and model.score.weight.shape == (1, 16)
    tokenizer.save_pretrained(tmp_path)
    tiny_model(len(tokenizer)).save_pretrained(tmp_path)
    assert load_reward_model(str(tmp_path)).config.pad_token_id == tokenizer.eos_token_id


def scores_of(model, example):
    """Of the chosen and the rejected completion, by transformers alone."""
    ids = [example.prompt + completion for completion in example.completions]
    return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in ids])


MARGINS = {
    "column": lambda i: i % 3 / 2,
    "scores": lambda i: 3 + i % 5 - i % 3,
    "none": lambda i: 0,
}


@pytest.mark.parametrize(("margin", "center"), [("column", 0.0), ("scores", 0.1), ("none", 0.3)])
def test_the_loss_by_hand(margin, center):
    job = make_job("reward_model", tokens=61, margin=margin, center=center)
    plain = tiny_reward_model(44)
    losses, right = [], []
    for i in step_indices(0, job.size, len(job.examples), 0):
        r = scores_of(plain, job.examples[i])
        losses.append(-F.logsigmoid(r[0] - r[1] - MARGINS[margin](i)) + center * r.sum() ** 2)
        right.append(bool(r[0] > r[1]))
    loss = torch.stack(losses).mean()
    loss.backward()
    metrics = optimizer_step(job, 0)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["reward_accuracy"] == pytest.approx(sum(right) / len(right))
    for ours, theirs in zip(job.policy.models[0].parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-4, atol=1e-5)


def test_reactions_by_hand():
    job = make_job("reaction_model", tokens=61)
    plain = tiny_reward_model(44)
    losses, right, likes = [], [], []
    for i in step_indices(0, job.size, len(job.examples), 0):
        example = job.examples[i]
        score = plain(input_ids=torch.tensor([example.prompt + example.completions[0]])).logits[0, 0]
        label = i % 2 == 0
        losses.append(-F.logsigmoid(score if label else -score))
        right.append(bool(score > 0) == label)
        if label:
            likes.append(score.item())
    loss = torch.stack(losses).mean()
    loss.backward()
    metrics = optimizer_step(job, 0)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["reward_accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["chosen_reward"] == pytest.approx(sum(likes) / len(likes), rel=1e-3, abs=1e-5)
    for ours, theirs in zip(job.policy.models[0].parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-4, atol=1e-5)


def test_an_annotators_pairs_train_their_model_alone():
    job = make_job("maxmin", tokens=61, center=0.1)
    models = [tiny_reward_model(44, seed) for seed in (0, 1)]
    loss, shares = torch.zeros(()), [0, 0]
    for i in step_indices(0, job.size, len(job.examples), 0):
        which = [0, 1, 1, 0][i % 4]
        r = scores_of(models[which], job.examples[i])
        loss = loss - F.logsigmoid(r[0] - r[1] - i % 3 / 2) / job.size + 0.1 * r.sum() ** 2 / job.size
        shares[which] += 1
    loss.backward()
    metrics = optimizer_step(job, 0)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert [metrics[f"share_{u}"] for u in (0, 1)] == pytest.approx([n / job.size for n in shares])
    for model, plain in zip(job.policy.models, models, strict=True):
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-4, atol=1e-5)
    assert set(job.memory.state) == {"models"}


class TestAnnotators:
    def annotators(self, job, held_out=()):
        return Annotators(job.algorithm, job.examples, held_out, 0)

    def test_the_expectation_step_by_hand(self):
        job = make_job("maxmin", tokens=61, every=3)
        annotators = self.annotators(job)
        likelihoods = torch.zeros(2, 4)
        with torch.no_grad():
            for i, example in enumerate(job.examples):
                for u, model in enumerate(job.policy.models):
                    r = scores_of(model, example)
                    likelihoods[u, i % 4] += F.logsigmoid(r[0] - r[1])
        expected = likelihoods.argmax(0)
        if len({*expected.tolist()}) == 1:
            # the one who is worst described, with as many pairs as the others
            expected[likelihoods[expected[0]].argmin()] = 1 - expected[0]
        before = job.memory.state["models"]
        for done in (0, 1, 2, 4):
            annotators(job, done)
            assert job.memory.state["models"] is before
        annotators(job, 3)
        assert job.memory.state["models"].tolist() == expected.tolist() != before.tolist()

    def test_it_begins_with_equal_parts(self):
        job = make_job("maxmin")
        start = self.annotators(job).start()["models"]
        assert sorted(start.tolist()) == [0, 0, 1, 1]
        assert start.tolist() == self.annotators(job).start()["models"].tolist()

    def test_too_few_and_unknown(self):
        with pytest.raises(UserError, match=r"--algorithm\.groups 5 is more than there are annotators \(4\)"):
            self.annotators(make_job("maxmin", groups=5))
        job = make_job("maxmin")
        stranger = job.examples[0]._replace(numbers=(0.0, 4.0), row=7)
        with pytest.raises(UserError, match="--eval_data, row 7: its annotator has no pairs in the training data"):
            self.annotators(job, [stranger])

    def test_evaluation_knows_the_groups(self):
        job = make_job("maxmin")
        found = evaluate_examples(job, job.examples, {})
        assert found["share_0"] == pytest.approx(0.5) and found["share_1"] == pytest.approx(0.5)


class TestColumns:
    def encoder(self, name, **hyper):
        algorithm = algorithms.build(name, hyper)
        return algorithm, Encoder(character_tokenizer(eos_token="[E]"), "tiny", 64, "pairwise", algorithm.columns)

    def encode(self, name, *rows, **hyper):
        algorithm, encoder = self.encoder(name, **hyper)
        whole = [{**row, **given} for row, given in zip(pairs(len(rows)), rows, strict=True)]
        return [e.numbers for e in encode(whole, "f", encoder, algorithm.problem)], encoder

    def test_names_are_numbered_as_they_come(self):
        numbers, encoder = self.encode("maxmin", *({"annotator": who} for who in ("b", "a", "b", 3)))
        assert numbers == [(0.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.0, 2.0)]
        assert encoder.categories == {"annotator": {"b": 0, "a": 1, 3: 2}}

    @pytest.mark.parametrize(
        ("name", "row", "hyper", "message"),
        [
            ("maxmin", {}, {}, 'f, row 1: there is no "annotator"'),
            ("maxmin", {"annotator": 1.5}, {}, '"annotator" must be a string or an integer, got 1.5'),
            ("maxmin", {"annotator": True}, {}, '"annotator" must be a string or an integer, got True'),
            ("reward_model", {"margin": -1}, {}, 'f, row 1: "margin" must be at least 0 for reward_model, got -1'),
            (
                "reward_model",
                {"chosen_score": 1, "rejected_score": 2},
                {"margin": "scores"},
                "chosen_score less rejected_score, the margin, must be at least 0 for reward_model, got -1",
            ),
            ("reward_model", {}, {"margin": "scores"}, 'there is no "chosen_score"'),
        ],
    )
    def test_what_is_wrong_with_a_row(self, name, row, hyper, message):
        with pytest.raises(UserError) as caught:
            self.encode(name, row, **hyper)
        assert message in str(caught.value)

    def test_margins(self):
        assert self.encode("reward_model", {"margin": 2}, {})[0] == [(2.0,), (0.0,)]
        scores = {"score_chosen": 4, "score_rejected": 1}
        assert self.encode("reward_model", scores, margin="scores")[0] == [(4.0, 1.0)]
        assert self.encode("reward_model", {"margin": 2}, margin="none")[0] == [()]


def test_a_run_on_data_of_ones_own(model_folder, write, tmp_path):
    """From a causal language model to a folder that transformers loads; trained on, it keeps its head."""
    from transformers import AutoModelForSequenceClassification

    data = write(pairs(16))
    run, more = tmp_path / "run", tmp_path / "more"
    options = ["--data", data, "--eval_data", data, "--steps", "12", "--batch.size", "8", "--optim.lr", "1e-2"]
    assert main(["train", "reward_model", "--model", str(model_folder), "--output", str(run), *options]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reward_accuracy_after"] > 0.9 > summary["reward_accuracy_before"]
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.num_labels == 1
    again = ["train", "reward_model", "--model", str(run / "model"), "--output", str(more), *options]
    assert main([*again, "--steps", "1", "--optim.lr", "1e-9"]) == 0
    continued = json.loads((more / "summary.json").read_text())
    assert continued["loss_before"] == pytest.approx(summary["loss_after"], rel=1e-4)
