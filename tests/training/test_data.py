"""Preference files to token ids."""

from __future__ import annotations

import pytest

from fastpo import algorithms
from fastpo.training.data import Encoder, Example, encode, load_examples, read_rows, with_mismatched
from fastpo.training.errors import UserError

from .conftest import TEMPLATE, character_tokenizer, pairs

ROW = {"prompt": "ab ", "chosen": "cd", "rejected": "e"}


@pytest.fixture
def encoder():
    tokenizer = character_tokenizer(eos_token="[E]", bos_token="[B]")
    tokenizer.chat_template = TEMPLATE
    return Encoder(tokenizer, "tiny", 64)


def texts(encoder, example):
    decode = encoder.tokenizer.decode
    return decode(example.prompt), *(decode(c) for c in example.completions)


def test_plain_rows_end_with_eos(encoder):
    assert texts(encoder, encoder.example(ROW, "row 1")) == ("a b  ", "c d [E]", "e [E]")


def test_eos_is_not_doubled(encoder):
    example = encoder.example({"prompt": "a", "chosen": "b[E]", "rejected": ""}, "row 1")
    assert texts(encoder, example) == ("a", "b [E]", "[E]")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("the sky is blue", "the sky is green"),
        ("same", "same"),
        ("a", "ab"),
        ("x y", "x z"),
        ("no", "yes"),
        (["u", "a"], ["u", "b"]),
        (["u", "a"], ["u", "a", "v", "b"]),
    ],
)
def test_implicit_prompt_is_trls(chosen, rejected, encoder):
    extract_prompt = pytest.importorskip("trl.data_utils").extract_prompt
    if isinstance(chosen, list):
        chosen, rejected = ([{"role": "user", "content": t} for t in side] for side in (chosen, rejected))
    row = {"chosen": chosen, "rejected": rejected}
    assert encoder.example(row, "row 1") == encoder.example({**row, **extract_prompt(row)}, "row 1")


def test_conversation_is_rendered_and_ends_at_eos(encoder):
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "ok"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    prompt, chosen, rejected = (t.replace(" ", "") for t in texts(encoder, encoder.example(row, "row 1")))
    # the line break that the template writes after EOS is never generated
    assert (prompt, chosen, rejected) == ("<user>hi[E]\n<assistant>", "ok[E]", "no[E]")


def test_tokens_do_not_merge_across_the_border():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "ab": 2, "c": 3, "[E]": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")])), eos_token="[E]"
    )
    assert tokenizer("cab")["input_ids"] == [3, 2]
    example = Encoder(tokenizer, "bpe", 64).example({"prompt": "ca", "chosen": "b", "rejected": "c"}, "row 1")
    assert example.prompt == [3, 0]
    assert example.completions == ([1, 4], [3, 4])


def test_the_tokenizers_own_bos_comes_first():
    from tokenizers.processors import TemplateProcessing

    tokenizer = character_tokenizer(eos_token="[E]", bos_token="[B]")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[B] $A [E]", special_tokens=[("[B]", bos), ("[E]", eos)]
    )
    example = Encoder(tokenizer, "tiny", 64).example(ROW, "row 1")
    assert example.prompt == [bos, *tokenizer("ab ", add_special_tokens=False)["input_ids"]]
    assert [c.count(eos) for c in example.completions] == [1, 1]


def test_empty_prompt_starts_with_bos_or_is_refused(encoder):
    row = {"prompt": "", "chosen": "a", "rejected": "b"}
    assert encoder.example(row, "row 1").prompt == [encoder.tokenizer.bos_token_id]
    with pytest.raises(UserError, match="row 1: the prompt is empty and the tokenizer has no BOS"):
        Encoder(character_tokenizer(eos_token="[E]"), "tiny", 64).example(row, "row 1")


def test_long_completions_are_cut_and_long_prompts_refused(encoder):
    encoder.max_length = 5
    example = encoder.example({"prompt": "abc", "chosen": "defgh", "rejected": "d"}, "row 1")
    assert [len(c) for c in example.completions] == [2, 2]
    assert encoder.cut == 1
    with pytest.raises(UserError, match=r"row 2: the prompt has 5 tokens, .* --max_length 5"):
        encoder.example({"prompt": "abcde", "chosen": "f", "rejected": "g"}, "row 2")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_formats_hold_the_same(suffix, tmp_path, write, encoder):
    rows = pairs(5)
    path = write(rows, f"data.{suffix}")
    if suffix == "parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    assert read_rows(path) == rows
    assert load_examples(path, encoder) == [encoder.example(row, "", i) for i, row in enumerate(rows, 1)]


def test_conversations_survive_parquet(tmp_path, encoder):
    import datasets

    chat = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [{"prompt": [{"role": "user", "content": "hi"}], **chat}] * 2
    path = str(tmp_path / "chat.parquet")
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert load_examples(path, encoder)[1] == encoder.example(rows[0], "", 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r'there is no "rejected" \(it has: prompt, chosen\)'),
        ({"prompt": "a", "rejected": "b", "chosen": None}, 'there is no "chosen"'),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "must all be strings or all be lists"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": "x"}], "rejected": "b"}, "must all be"),
        ({"prompt": "a", "chosen": [{"content": "x"}], "rejected": "b"}, "must all be"),
        ({"chosen": "", "rejected": "b"}, "chosen or rejected is empty"),
    ],
)
def test_bad_rows_are_named(row, message, encoder):
    with pytest.raises(UserError, match=f"row 7: .*{message}"):
        encoder.example(row, "row 7")


UNPAIRED = {"prompt": "ab ", "completion": "cd", "label": True}


def reader(encoder, name):
    """The encoder for an algorithm, and what it refuses."""
    algorithm = algorithms.build(name, {})
    return Encoder(encoder.tokenizer, "tiny", 64, algorithm.kind, algorithm.columns), algorithm.problem


def test_unpaired_rows(encoder, write):
    rows = [UNPAIRED, {**UNPAIRED, "completion": "e", "label": False}]
    found = load_examples(write(rows), *reader(encoder, "kto"))
    assert [texts(encoder, e) for e in found] == [("a b  ", "c d [E]"), ("a b  ", "e [E]")]
    assert [e.numbers for e in found] == [(1.0,), (0.0,)] and [e.row for e in found] == [1, 2]


def test_unpaired_conversations(encoder, write):
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "ok"}],
        "label": False,
    }
    (found,) = load_examples(write([row]), *reader(encoder, "kto"))
    prompt, completion = (t.replace(" ", "") for t in texts(encoder, found))
    assert (prompt, completion) == ("<user>hi[E]\n<assistant>", "ok[E]")


def test_pairs_are_two_single_completions(encoder, write):
    """As TRL unpairs them, the prompt being what both sides begin with."""
    unpair = pytest.importorskip("trl.data_utils")
    import datasets

    rows = [{"chosen": "the sky is blue", "rejected": "the sky is green"}, {"chosen": "x y", "rejected": "x z"}]
    theirs = unpair.unpair_preference_dataset(datasets.Dataset.from_list([unpair.extract_prompt(r) for r in rows]))
    ours = load_examples(write(rows), *reader(encoder, "kto"))
    expected = load_examples(write(list(theirs), "theirs.jsonl"), *reader(encoder, "kto"))
    assert [e.row for e in ours] == [1, 1, 2, 2]
    key = lambda e: (e.prompt, e.completions, e.numbers)  # noqa: E731
    assert sorted(map(key, ours)) == sorted(map(key, expected))


@pytest.mark.parametrize(
    ("more", "numbers"),
    [
        ({"chosen_score": 4, "rejected_score": 1.5}, (4.0, 1.5)),
        ({"score_chosen": 4, "score_rejected": 1.5}, (4.0, 1.5)),
        ({"margin": 2.5}, (2.5, 0.0)),
    ],
)
def test_scored_pairs(more, numbers, encoder, write):
    (found,) = load_examples(write([{**ROW, **more}]), *reader(encoder, "odpo"))
    assert found.numbers == numbers and found.completions == encoder.example(ROW, "").completions


def test_scored_conversations(encoder, write):
    row = {
        "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}],
        "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}],
        "chosen_visits": 5,
        "rejected_visits": 2,
    }
    (found,) = load_examples(write([row]), *reader(encoder, "mcts_dpo"))
    assert found.numbers == (5.0, 2.0)
    assert [t.replace(" ", "") for t in texts(encoder, found)[1:]] == ["ok[E]", "no[E]"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("kto", {"prompt": "a", "label": True}, r'there is no "completion" \(it has: prompt, label\)'),
        ("kto", {"prompt": "a", "completion": "b"}, 'there is no "label"'),
        ("kto", {"completion": "b", "label": True}, 'there is no "prompt"'),
        ("kto", {**UNPAIRED, "label": "yes"}, "\"label\" must be true or false, got 'yes'"),
        ("kto", {**UNPAIRED, "completion": 3}, "prompt and completion must all be strings or all be lists"),
        ("kto", {"prompt": "a", "chosen": "b"}, 'there is no "rejected"'),
        ("bco", {**UNPAIRED, "density_ratio": 0}, r'"density_ratio" must be in \(0, inf\) for bco, got 0'),
        ("npo", UNPAIRED, "npo unlearns every completion of its data, but this one is desirable"),
        ("odpo", ROW, 'there is no "chosen_score"'),
        ("odpo", {**ROW, "chosen_score": "5", "rejected_score": 1}, "\"chosen_score\" must be a number, got '5'"),
        ("odpo", {**ROW, "chosen_score": True, "rejected_score": 1}, '"chosen_score" must be a number, got True'),
        ("odpo", {**ROW, "margin": float("nan")}, '"margin" must be finite, got nan'),
        ("odpo", {**ROW, "chosen_score": 1, "rejected_score": 1}, "chosen_score must be above rejected_score"),
        ("mcts_dpo", {**ROW, "chosen_visits": 1, "rejected_visits": -1}, r'"rejected_visits" must be in \[0, inf\)'),
    ],
)
def test_bad_columns_are_named(name, row, message, encoder):
    good = {"completion": "b", "label": False} if name in ("kto", "bco", "npo") else {"chosen": "b", "rejected": "c"}
    good |= {"prompt": "a", "chosen_score": 2, "rejected_score": 1, "chosen_visits": 1, "rejected_visits": 1}
    with pytest.raises(UserError, match=f"^data.jsonl, row 2: .*{message}"):
        encode([good, row], "data.jsonl", *reader(encoder, name))


def test_mismatched_completions_are_those_of_other_prompts():
    def examples(prompts):
        return [Example([p], ([10 + i, 11, 12],)) for i, p in enumerate(prompts)]

    def partners(prompts):
        found = with_mismatched(examples(prompts), 3)
        assert [e.completions[0] for e in found] == [e.completions[0] for e in examples(prompts)]
        # cut to the room that the other prompt leaves
        assert all(len(e.completions[1]) == 2 for e in found)
        return [e.completions[1][0] - 10 for e in found]

    assert partners([1, 2, 3]) == [1, 2, 0]
    assert partners([1, 1, 2, 2]) == [2, 2, 0, 0]
    assert partners([1, 2, 1, 1]) == [1, 2, 1, 1]
    assert partners([2, 1, 1, 2]) == [1, 3, 3, 1]
    assert partners([1, 1, 1]) == [1, 2, 0]
    assert partners([1]) == [0]


def test_tokenizers_that_cannot_serve_are_refused(encoder):
    with pytest.raises(UserError, match="no EOS token"):
        Encoder(character_tokenizer(), "tiny", 64)
    encoder.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encoder.example({k: [{"role": "user", "content": v}] for k, v in ROW.items()}, "row 1")
