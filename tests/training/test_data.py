"""Preference files to token ids."""

from __future__ import annotations

import math

import pytest

from fastpo import algorithms
from fastpo.training import data
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


class Counted:
    """A tokenizer, and the texts of each of its calls."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        self.calls.append(texts)
        return self.tokenizer(texts, **options)


def test_rows_are_tokenised_together(write, encoder, monkeypatch):
    monkeypatch.setattr(data, "_TOGETHER", 4)
    rows = [{**row, "prompt": "same "} for row in pairs(6)]
    expected = [encoder.example(row, "", i) for i, row in enumerate(rows, 1)]
    encoder.tokenizer = Counted(encoder.tokenizer)
    assert load_examples(write(rows), encoder) == expected
    first, second = encoder.tokenizer.calls
    sides = ["same " + row[side] for row in rows for side in ("chosen", "rejected")]
    assert {*first} == {"same ", *sides[:8]} and {*second} == {"same ", *sides[8:]} and first.count("same ") == 1


def test_the_first_bad_row_is_told(write, encoder):
    """Of one whose tokens are too many and one that cannot be read, both among those that are tokenised together."""
    long, unread = {"prompt": "a" * 99, "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}
    for rows, message in (
        ([ROW, long, unread], "row 2: the prompt has 99"),
        ([ROW, unread, long], "row 2: there is no"),
    ):
        with pytest.raises(UserError, match=message):
            load_examples(write(rows), encoder)


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


LIST = {"prompt": "ab ", "completions": ["c", "de", "f"], "scores": [1, 3, 2.5]}
SEGMENTS = {"prompt": "ab ", "completion": ["cd", " ef"], "reward": [0.5, -1]}
TOOL = {"prompt": "a ", "completion": "do go(1)", "tools": ["go", "got", "run"]}
ROUNDS = {"prompt": "a ", "actions": ["b", "cd"], "losses": [[0, 1], [0.5, 0.25]], "observations": ["e "]}


def reader_of(encoder, name, **hyper):
    """The encoder for an algorithm with control phrases that are tokens of the test's tokenizer."""
    phrases = {"conditional_training": {"aligned": "<", "misaligned": ">", "drop": 0.0}}
    phrases["chain_of_hindsight"] = {"good": " < ", "bad": " > "}
    algorithm = algorithms.build(name, {**phrases.get(name, {}), **hyper})
    given = Encoder(encoder.tokenizer, "tiny", 64, algorithm.kind, algorithm.columns, algorithm.control)
    return given, algorithm.problem


def test_lists(encoder, write):
    rows = [LIST, {**LIST, "completions": ["g", "h"], "scores": [0, -1]}]
    found = load_examples(write(rows), *reader_of(encoder, "exo"))
    assert [texts(encoder, e) for e in found] == [
        ("a b  ", "c [E]", "d e [E]", "f [E]"),
        ("a b  ", "g [E]", "h [E]"),
    ]
    assert [e.each for e in found] == [((1.0,), (3.0,), (2.5,)), ((0.0,), (-1.0,))]
    assert all(e.numbers == () and e.marks == () and e.learnt == () for e in found)


def test_lists_of_conversations(encoder, write):
    sides = [[{"role": "assistant", "content": text}] for text in ("ok", "no")]
    row = {"prompt": [{"role": "user", "content": "hi"}], "completions": sides, "ranks": [2, 1]}
    (found,) = load_examples(write([row]), *reader_of(encoder, "plackett_luce"))
    assert [t.replace(" ", "") for t in texts(encoder, found)[1:]] == ["ok[E]", "no[E]"]
    assert found.each == ((-2.0,), (-1.0,))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("exo", {"labels": [0.1, 0.2, 0.3], "scores": None}, [0.1, 0.2, 0.3]),
        ("exo", {"rewards": [1, 2, 3]}, [1, 2, 3]),
        ("exo", {"ranks": [1, 2, 2], "scores": None}, [-1, -2, -2]),
        # certain wins, itself and a tie counting a half
        ("lipo_pair", {"ranks": [1, 2, 2], "scores": None}, [2.5 / 3, 1 / 3, 1 / 3]),
        ("lipo_pair", {"labels": [0.5, 0, 1]}, [0.5, 0, 1]),
        (
            "lipo_pair",
            {"scores": [0, 1000, 999]},
            [0.5 / 3, (1.5 + sigmoid(1)) / 3, (1.5 + sigmoid(-1)) / 3],
        ),
        ("brain", {"scores": [1, 2, 3], "proposal_logprobs": [-1, -2, -3]}, [(1, -1), (2, -2), (3, -3)]),
    ],
)
def test_what_lists_are_ranked_by(name, more, expected, encoder, write):
    (found,) = load_examples(write([{**LIST, **more}]), *reader_of(encoder, name))
    flat = [each if isinstance(each, tuple) else (each,) for each in expected]
    assert [pytest.approx(each) for each in flat] == list(found.each)


def test_a_proposal_that_is_not_given_is_marked(encoder):
    (found,) = encode([LIST], "", *reader_of(encoder, "brain"))
    assert [(reward, math.isnan(q)) for reward, q in found.each] == [(1.0, True), (3.0, True), (2.5, True)]


def test_identifiers_are_single_tokens_without_eos(encoder):
    rows = [{**LIST, "completions": ["c", "d", "e"]}]
    (found,) = encode(rows, "", *reader_of(encoder, "first_ranknet"))
    assert texts(encoder, found) == ("a b  ", "c", "d", "e")
    assert found.each == ((3.0,), (1.0,), (2.0,))


@pytest.mark.parametrize(
    ("more", "rewards"),
    [
        ({"reward": -2}, -2.0),
        ({"score": 4}, 4.0),
        ({"misalignment": 0.25}, -0.25),
        ({"label": True}, 0.0),
        ({"label": False}, -1.0),
    ],
)
def test_rewards_of_demonstrations(more, rewards, encoder):
    row = {"prompt": "ab ", "completion": "cd", **more}
    (found,) = encode([row], "", *reader_of(encoder, "rwr"))
    assert texts(encoder, found) == ("a b  ", "c d [E]") and found.marks == ((((rewards,),) * 3),)
    # what is a factor of the whole stands at its end
    (found,) = encode([row], "", *reader_of(encoder, "trajectory_balance"))
    assert found.marks == (((0.0,), (0.0,), (rewards,)),)


def test_segments_have_rewards_of_their_own(encoder):
    (found,) = encode([SEGMENTS], "", *reader_of(encoder, "awr"))
    assert texts(encoder, found) == ("a b  ", "c d   e f [E]")
    assert [value for (value,) in found.marks[0]] == [0.5, 0.5, -1, -1, -1, -1]
    (found,) = encode([SEGMENTS], "", *reader_of(encoder, "subtrajectory_balance"))
    assert [value for (value,) in found.marks[0]] == [0, 0.5, 0, 0, 0, -1]
    labels = {**SEGMENTS, "reward": None, "label": [True, False]}
    (found,) = encode([labels], "", *reader_of(encoder, "rwr"))
    assert [value for (value,) in found.marks[0]] == [0, 0, -1, -1, -1, -1]


def test_plain_demonstrations_need_no_numbers(encoder):
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "ok"}],
    }
    (found,) = encode([row], "", *reader_of(encoder, "sft"))
    assert texts(encoder, found)[1].replace(" ", "") == "ok[E]" and found.marks == () == found.learnt


def test_control_tokens_are_said_and_not_learnt(encoder):
    (found,) = encode([SEGMENTS], "", *reader_of(encoder, "conditional_training"))
    assert texts(encoder, found) == ("a b  ", "< c d >   e f [E]")
    assert found.learnt == ((False, True, True, False, True, True, True, True),)
    assert list(found.trained(0)) == [1, 2, 4, 5, 6, 7]
    dropped = encode([SEGMENTS] * 50, "", *reader_of(encoder, "conditional_training", drop=0.5))
    again = encode([SEGMENTS] * 50, "", *reader_of(encoder, "conditional_training", drop=0.5))
    said = sum(flags.count(False) for e in dropped for flags in (e.learnt or ((),)))
    assert 30 < said < 70 and dropped == again


def test_filtering_leaves_out_what_is_bad_on_average(encoder):
    rows = [{**SEGMENTS, "reward": [r, -1.0]} for r in (0.5, 4.0, 1.0)]
    # two tokens of the first segment, four of the second
    found = encode(rows, "", *reader_of(encoder, "filtering", threshold=0.0))
    assert [e.row for e in found] == [2]
    assert [e.row for e in encode(rows, "", *reader_of(encoder, "filtering", threshold=0.35))] == [2, 3]
    with pytest.raises(UserError, match=r"^x.jsonl: no row is good enough to be trained on"):
        encode(rows, "x.jsonl", *reader_of(encoder, "filtering", threshold=-9.0))


def test_hindsight_tells_both_sides_in_turn(encoder):
    rows = [{"prompt": "a ", "chosen": "b", "rejected": "cd"}] * 2
    found = encode(rows, "", *reader_of(encoder, "chain_of_hindsight"))
    assert [texts(encoder, e)[1] for e in found] == [
        "  <   b [E]   >   c d [E]",
        "  >   c d [E]   <   b [E]",
    ]
    assert found[0].learnt == ((False,) * 3 + (True,) * 2 + (False,) * 3 + (True,) * 3,)
    lists = [LIST, {**LIST, "scores": [2, 2, 2]}]
    (found,) = encode(lists, "", *reader_of(encoder, "chain_of_hindsight"))
    assert texts(encoder, found)[1] == "  <   d e [E]   >   c [E]"


def test_tool_names_have_key_tokens(encoder):
    rows = [TOOL, {**TOOL, "completion": "got 1"}, {**TOOL, "completion": "none"}, {**TOOL, "tools": ["go"]}]
    found = encode(rows, "", *reader_of(encoder, "tl_training"))
    keys = ["".join(str(int(key)) for (key,) in e.marks[0]) for e in found]
    # the first character, and what stands behind the name where a longer name goes on
    assert [texts(encoder, e)[1].replace(" ", "") for e in found] == ["dogo.1.[E]", "got1[E]", "none[E]", "dogo.1.[E]"]
    assert keys == ["000101000", "101000", "00000", "000100000"]
    answers = [{**TOOL, "answer": "NameError: x is not defined"}, {**TOOL, "answer": "3"}]
    assert [e.row for e in encode(answers, "", *reader_of(encoder, "tl_training"))] == [2]


def test_decisions_are_told_of_the_rounds_before(encoder):
    (found,) = encode([ROUNDS], "", *reader_of(encoder, "regret"))
    assert texts(encoder, found) == ("a  ", "b [E]", "c d [E]", "e   b [E]", "e   c d [E]")
    assert found.each == ((0.0,), (1.0,), (0.5,), (0.25,)) and found.numbers == (2.0,)
    assert [list(found.trained(k)) for k in range(4)] == [[0, 1], [0, 1, 2], [2, 3], [2, 3, 4]]


@pytest.mark.parametrize(
    ("name", "good", "more", "message"),
    [
        ("exo", LIST, {"completions": None}, r'there is no "completions" \(it has: prompt, scores\)'),
        ("exo", LIST, {"completions": ["a"]}, r"\"completions\" must be a list of at least 2, got \['a'\]"),
        ("exo", LIST, {"completions": "ab"}, "\"completions\" must be a list of at least 2, got 'ab'"),
        ("exo", LIST, {"completions": ["a", 2, "b"]}, "prompt and completions must all be strings or all be lists"),
        ("exo", LIST, {"scores": None}, r'there is no "scores" \(it has: prompt, completions\)'),
        ("exo", LIST, {"scores": [1, 2]}, '"scores" must be a list of 3 numbers, one for each of completions'),
        ("exo", LIST, {"scores": [1, "2", 3]}, "\"scores\" must be a number, got '2'"),
        ("exo", LIST, {"scores": [1, float("inf"), 3]}, '"scores" must be finite, got inf'),
        ("lipo_point", LIST, {"labels": [0, 2, 1]}, r'"labels" must be in \[0, 1\], got 2'),
        ("lipo_softmax", LIST, {"labels": [0, -1, 1]}, r'"labels" must be in \[0, inf\), got -1'),
        ("first_ranknet", LIST, {}, "'de' in \"completions\" must be one token, but it is 2"),
        (
            "first_ranknet",
            LIST,
            {"completions": ["c", "d", "c"]},
            "'c' and 'c' in \"completions\" are the same token",
        ),
        ("brain", LIST, {"proposal_logprobs": [1]}, '"proposal_logprobs" must be a list of 3 numbers'),
        ("rwr", SEGMENTS, {"reward": None}, r'there is no "reward" \(it has: prompt, completion\)'),
        ("rwr", SEGMENTS, {"reward": None, "misalignment": [1, "2"]}, "\"misalignment\" must be a number, got '2'"),
        ("rwr", SEGMENTS, {"reward": 1}, '"reward" must be a list of 2 numbers, one for each of the segments'),
        ("rwr", SEGMENTS, {"completion": ["a", 1]}, '"completion" must be a list of strings, at least 1'),
        (
            "rwr",
            SEGMENTS,
            {"completion": "a", "reward": None, "label": "yes"},
            "\"label\" must be true or false, got 'yes'",
        ),
        ("sft", SEGMENTS, {"completion": 3}, "prompt and completion must all be strings or all be lists"),
        ("sft", SEGMENTS, {"prompt": [{"role": "user", "content": "a"}]}, '"prompt" must be a string here'),
        ("trajectory_balance", SEGMENTS, {"reward": None}, 'there is no "log_reward"'),
        ("unlikelihood", SEGMENTS, {"reward": [-2, 0]}, r'"reward" must be in \[-1, 0\], got -2'),
        ("chain_of_hindsight", LIST, {"scores": None}, 'there is no "scores"'),
        ("chain_of_hindsight", LIST, {"completions": ["a"]}, '"completions" must be a list of strings, at least 2'),
        ("chain_of_hindsight", LIST, {"prompt": None}, 'there is no "prompt"'),
        ("tl_training", TOOL, {"tools": None}, 'there is no "tools"'),
        ("tl_training", TOOL, {"tools": "go"}, "\"tools\" must be a list of strings, at least 1, got 'go'"),
        ("tl_training", TOOL, {"answer": 3}, '"answer" must be a string here, got 3'),
        ("tl_training", TOOL, {"completion": None}, 'there is no "completion"'),
        ("regret", ROUNDS, {"actions": ["b"]}, '"actions" must be a list of strings, at least 2'),
        (
            "regret",
            ROUNDS,
            {"actions": ["b", "c", "d"]},
            '"losses" must be a list of 3 numbers, one for each of the acti',
        ),
        ("regret", ROUNDS, {"losses": []}, r'"losses" must be a list of at least one round, got \[\]'),
        (
            "regret",
            ROUNDS,
            {"losses": [[1, 2], [1, 2], [3, 4]]},
            '"observations" must tell of all rounds but the last, 2',
        ),
        (
            "regret",
            ROUNDS,
            {"actions": ["b", "c", "d"], "losses": [[1, 2, 3]]},
            "there are 3 actions, but the first row has 2",
        ),
    ],
)
def test_bad_rows_of_other_kinds_are_named(name, good, more, message, encoder):
    rule = {"rule": "share"} if name == "unlikelihood" else {}
    given = reader_of(encoder, name, **rule)
    first = {**good, "reward": [-0.5, -1]} if rule else good
    first = {**good, "completions": ["c", "d", "e"]} if name == "first_ranknet" else first
    with pytest.raises(UserError, match=f"^data.jsonl, row 2: .*{message}"):
        encode([first, {**good, **more}], "data.jsonl", *given)


def test_a_cut_completion_must_leave_something_to_learn(encoder):
    given, _ = reader_of(encoder, "chain_of_hindsight")
    given.max_length = 4
    with pytest.raises(
        UserError, match="row 1: nothing to be trained on is left of a completion within --max_length 4"
    ):
        given.example({"prompt": "a", "chosen": "b", "rejected": "c"}, "row 1", 1)
    given.max_length = 5
    found = given.example({"prompt": "a", "chosen": "b", "rejected": "c"}, "row 1", 1)
    assert len(found.completions[0]) == len(found.learnt[0]) == 4 and given.cut == 2


def test_a_cut_completion_keeps_its_rewards(encoder):
    for name, expected in (("rwr", [0.5, 0.5, -1.0]), ("trajectory_balance", [0.0, 0.5, -1.0])):
        given, _ = reader_of(encoder, name)
        given.max_length = 6
        found = given.example(SEGMENTS, "row 1")
        assert [value for (value,) in found.marks[0]] == expected and given.cut == 1


def test_control_phrases_are_tokens(encoder):
    algorithm = algorithms.build("conditional_training", {})
    given = Encoder(encoder.tokenizer, "tiny", 64, algorithm.kind, algorithm.columns, algorithm.control)
    with pytest.raises(
        UserError, match=r"^tiny: '<\|aligned\|>' must be one token, .* but it is 11; add it to the tok"
    ):
        given.example(SEGMENTS, "row 1")
