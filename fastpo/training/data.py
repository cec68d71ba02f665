"""Data files in TRL's formats, read and turned into token ids.

A row of pairs is {"prompt", "chosen", "rejected"}, or without "prompt", which is then what chosen and rejected have in
common. An unpaired row is {"prompt", "completion", "label"}, the label true or false; a pair in its place stands for
two of them. The values are strings, or lists of {"role", "content"} that the tokenizer's chat template renders.

Some algorithms read numbers beside: "chosen_score" and "rejected_score" (or "score_chosen" and "score_rejected", or
their difference as "margin"), "chosen_visits" and "rejected_visits", "density_ratio"; and "annotator", a name.

The other kinds:

- lists: {"prompt", "completions", "scores"}, two completions or more, and as many scores; or in their place "rewards",
  "labels" (probabilities to be preferred) or "ranks" (from 1, the best): each algorithm gets what it wants, see
  `_targets`. "proposal_logprobs" is optional: log q(y) of whoever sampled.
- identifiers: a list whose completions are one token each, which names a passage of the prompt.
- demonstrations: {"prompt", "completion"}, for some algorithms with "reward", or "score", the larger the better;
  "misalignment", the smaller the better; or "label", true for reward 0 and false for -1. The completion may be a list
  of strings, its segments, with as many rewards.
- hindsight: rows of pairs or lists; the best and the worst completion are told one behind the other.
- tools: {"prompt", "completion", "tools"}, the names of all tools, of which the completion may call one; "answer" is
  what the tool said, optional. A call whose answer is an error is left out.
- decisions: {"prompt", "actions", "losses", "observations"}: of each round the losses of all actions, and the text that
  tells of it; the last round needs none.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from fastpo.algorithms import Column, Control
from fastpo.losses import adverse_turns, conditional_tokens, document_filter, tl_key_tokens
from fastpo.training.errors import UserError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


# rows that are tokenised together, by the tokenizer's own threads
_TOGETHER = 1024

# what else a column may be called
OTHER_NAMES = {"chosen_score": "score_chosen", "rejected_score": "score_rejected", "log_reward": "reward"}


class Example(NamedTuple):
    """One row as token ids.

    Attributes:
        prompt: its tokens.
        completions: of a pair chosen and rejected, of a list all of them, else one; each with its EOS.
        numbers: what the row says beside, in the order of the algorithm's columns of examples.
        row: its number in the file, from 1.
        each: for every completion, its numbers in the order of the columns of completions.
        marks: for every completion, the numbers of its tokens in the order of the columns of tokens and segments.
        learnt: for every completion, which of its tokens are trained on; empty: all.
    """

    prompt: list[int]
    completions: tuple[list[int], ...]
    numbers: tuple[float, ...] = ()
    row: int = 0
    each: tuple[tuple[float, ...], ...] = ()
    marks: tuple[tuple[tuple[float, ...], ...], ...] = ()
    learnt: tuple[tuple[bool, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Length of all its sequences."""
        return sum(len(self.prompt) + len(c) for c in self.completions)

    def trained(self, k: int) -> Sequence[int]:
        """The tokens of the k-th completion that are trained on."""
        if not self.learnt:
            return range(len(self.completions[k]))
        return [i for i, learn in enumerate(self.learnt[k]) if learn]


class Segment(NamedTuple):
    """A part of a completion.

    Attributes:
        text: a string; or, if it is the only one, a conversation.
        numbers: its numbers in the order of the columns of tokens and segments.
        learnt: whether it is trained on.
        ends: whether EOS follows, as it does the last one.
        among: the names of all tools, if it is one of them: its number is then 1 at the tokens that decide which.
    """

    text: Any
    numbers: tuple[float, ...] = ()
    learnt: bool = True
    ends: bool = False
    among: tuple[str, ...] = ()


class Parsed(NamedTuple):
    """One row as text: prompt, completions as segments, the numbers of the example and of its completions."""

    prompt: Any
    completions: Sequence[Sequence[Segment]]
    numbers: tuple[float, ...] = ()
    each: tuple[tuple[float, ...], ...] = ()


class _Written(NamedTuple):
    """A row as the texts that are tokenised, of which a chat template may have written the prompt and completions."""

    parsed: Parsed
    rendered: bool
    where: str
    number: int

    @property
    def texts(self) -> list[str]:
        prompt, sides = self.parsed.prompt, self.parsed.completions
        found = [text for side in sides for text in (prompt + side[0].text, *(s.text for s in side[1:]))]
        return [prompt, *found] if prompt else found


class Prompt(NamedTuple):
    """One row that completions are sampled for.

    Attributes:
        text: as the model sees it.
        ids: its tokens.
        completions: the tokens of the row's own completions that are asked for, with EOS.
        row: as it is in the file.
        number: its number in the file, from 1.
    """

    text: str
    ids: list[int]
    completions: tuple[list[int], ...]
    row: dict[str, Any]
    number: int


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a JSONL or Parquet file."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file")
    if file.suffix not in FORMATS:
        raise UserError(f"{path}: the file must end in {', '.join(FORMATS)}")
    if file.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    # the cache would outlive the run and answer for a file that has changed
    with TemporaryDirectory() as cache:
        try:
            table = datasets.load_dataset(
                FORMATS[file.suffix],
                data_files=str(file),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
            )
            rows = list(table)
        except Exception as error:
            cause = str(error.__cause__ or error).strip().splitlines()
            raise UserError(f"{path}: cannot be read: {cause[0] if cause else type(error).__name__}") from error
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    return rows


def _split_prompt(chosen: Sequence[Any], rejected: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The common beginning as the prompt, and what is left of both; neither is left empty."""
    most = min(len(chosen), len(rejected)) - 1
    cut = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    # a tokenizer joins a space to the word after it
    if isinstance(chosen, str) and cut > 0 and chosen[cut - 1] == " " and chosen[cut] != rejected[cut]:
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )


def _require(row: dict[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if row.get(name) is None:
            has = ", ".join(key for key, value in row.items() if value is not None)
            raise UserError(f'{where}: there is no "{name}" (it has: {has})')


def _same_form(values: Sequence[Any], names: str, where: str) -> None:
    if not all(isinstance(v, str) for v in values) and not all(_is_conversation(v) for v in values):
        raise UserError(f"{where}: {names} must all be strings or all be lists of role and content")


def _pair(row: dict[str, Any], where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected."""
    _require(row, ("chosen", "rejected"), where)
    values = [row[name] for name in ("prompt", "chosen", "rejected") if row.get(name) is not None]
    _same_form(values, "prompt, chosen and rejected", where)
    if not (row["chosen"] and row["rejected"]) and row.get("prompt") is None:
        raise UserError(f"{where}: chosen or rejected is empty, and there is no prompt")
    return (values[0], values[1], values[2]) if len(values) == 3 else _split_prompt(values[0], values[1])


def _single(row: dict[str, Any], where: str) -> tuple[Any, Any]:
    """Prompt and completion."""
    _require(row, ("prompt", "completion"), where)
    _same_form([row["prompt"], row["completion"]], "prompt and completion", where)
    return row["prompt"], row["completion"]


def _strings(row: dict[str, Any], name: str, where: str, least: int = 1) -> list[str]:
    """A column that is a list of strings."""
    _require(row, (name,), where)
    value = row[name]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value) or len(value) < least:
        raise UserError(f'{where}: "{name}" must be a list of strings, at least {least}, got {value!r}')
    return value


def _text(row: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Check columns that are strings, and may be no conversations."""
    _require(row, names, where)
    for name in names:
        if not isinstance(row[name], str):
            raise UserError(f'{where}: "{name}" must be a string here, got {row[name]!r}')


def _unpaired(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """An unpaired row as it is; of a pair, its two completions with their labels."""
    if row.get("completion") is not None or row.get("chosen") is None:
        return [row]
    prompt, chosen, rejected = _pair(row, where)
    rest = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected")}
    return [
        {**rest, "prompt": prompt, "completion": completion, "label": label}
        for completion, label in ((chosen, True), (rejected, False))
    ]


def _number(row: dict[str, Any], column: Column, where: str) -> float:
    """What a row has in a column."""
    names = [column.name, OTHER_NAMES.get(column.name, column.name)]
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None and column.name in OTHER_NAMES and row.get("margin") is not None:
        # only the difference of the scores is known
        margin = _number(row, Column("margin"), where)
        return margin if column.name == "chosen_score" else 0.0
    if name is None:
        if column.default is None:
            _require(row, (column.name,), where)
        assert column.default is not None
        return column.default
    return _value(row[name], name, column, where)


def _value(value: Any, name: str, column: Column, where: str) -> float:
    """A number as a column may hold it; `name` is what the row calls it."""
    if column.boolean:
        if not isinstance(value, bool) and value not in (0, 1):
            raise UserError(f'{where}: "{name}" must be true or false, got {value!r}')
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f'{where}: "{name}" must be a number, got {value!r}')
    if not math.isfinite(value):
        raise UserError(f'{where}: "{name}" must be finite, got {value}')
    if value not in column.domain:
        raise UserError(f'{where}: "{name}" must be in {column.domain}, got {value:g}')
    return float(value)


def _values(value: Any, name: str, count: int, of: str, where: str, column: Column | None = None) -> list[float]:
    """A column's one number for each of `count` things, which `of` names."""
    if not isinstance(value, list) or len(value) != count:
        raise UserError(f'{where}: "{name}" must be a list of {count} numbers, one for each of {of}, got {value!r}')
    return [_value(each, name, column or Column(name), where) for each in value]


def _above(values: Sequence[float]) -> list[list[float]]:
    """Of each against each: 1 where the first is larger, 1/2 where they are equal."""
    return [[float(a > b) + (a == b) / 2 for b in values] for a in values]


def _targets(row: dict[str, Any], column: Column, where: str) -> list[float]:
    """What a list algorithm wants to know of each completion, from what the row has.

    "rewards" are "scores" or "labels" as they are, and minus the "ranks". "labels" are the mean over the list of the
    probability to be preferred: σ of the scores' difference, as under Bradley and Terry's model, or what the ranks say
    for certain, itself counting 1/2. "ranks" count the completions that are better, equal ones being equal.
    """
    names = [column.name, *("scores", "rewards", "labels", "ranks")]
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        _require(row, ("scores",), where)
    assert name is not None
    values = _values(row[name], name, len(row["completions"]), "completions", where)
    if name != column.name:
        better = [-v for v in values] if name == "ranks" else values
        if column.name == "labels" and name != "ranks":
            # each difference on the side where exp is small
            odds = [[math.exp(-abs(a - b)) for b in values] for a in values]
            wins = [
                [1 / (1 + e) if a >= b else e / (1 + e) for b, e in zip(values, row_odds, strict=True)]
                for a, row_odds in zip(values, odds, strict=True)
            ]
            values = [sum(win) / len(win) for win in wins]
        elif column.name == "labels":
            values = [sum(win) / len(win) for win in _above(better)]
        elif column.name == "ranks":
            values = [1.0 + sum(other > own for other in better) for own in better]
        else:
            values = better
    return [_value(value, name, column, where) for value in values]


# what else a reward may be called, and what it then is
_REWARDS: dict[str, Callable[[float], float]] = {
    "score": lambda score: score,
    "misalignment": lambda bad: -bad,
    "label": lambda good: good - 1,
}


def _rewards(row: dict[str, Any], column: Column, count: int, where: str) -> list[float]:
    """A column of rewards, one for each segment of a completion."""
    known = (column.name, OTHER_NAMES.get(column.name, column.name), *_REWARDS)
    name = next((name for name in known if row.get(name) is not None), column.name)
    _require(row, (name,), where)
    values = row[name] if isinstance(row[name], list) else [row[name]]
    given = _values(values, name, count, "the segments of the completion", where, Column(name, boolean=name == "label"))
    found = [_REWARDS[name](value) if name in _REWARDS else value for value in given]
    return [_value(value, name, column, where) for value in found]


class Encoder:
    """Rows of text to examples of token ids.

    Args:
        tokenizer: the model's.
        name: the model's, for errors.
        max_length: most tokens of prompt and completion.
        kind: of the data, as the algorithm's.
        columns: the numbers to be read.
        control: what becomes of good and bad completions, as the algorithm's.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        max_length: int,
        kind: str = "pairwise",
        columns: Sequence[Column] = (),
        control: Control | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name}: the tokenizer has no EOS token, so the model could not learn where to stop")
        self.tokenizer, self.name, self.max_length = tokenizer, name, max_length
        self.kind, self.columns, self.control = kind, tuple(columns), control
        self.read = _READERS[kind]
        self.marks = tuple(column for column in columns if column.level in ("token", "segment"))
        self.cut = 0  # completions that were too long
        # the tokens of texts that were tokenised ahead
        self.known: dict[str, list[int]] = {}
        self.control_tokens: dict[str, int] = {}
        # by column of names, their numbers in the order in which they came
        self.categories: dict[str, dict[str | int, int]] = {}
        self.eos: int = tokenizer.eos_token_id
        # what the tokenizer itself puts before a text, and nothing that it would put behind one
        special = tokenizer("")["input_ids"]
        self.start: list[int] = special[:1] if special[:1] == [tokenizer.bos_token_id] else []

    def of_level(self, level: str) -> list[Column]:
        """The columns that have a number for each of something."""
        return [column for column in self.columns if column.level == level]

    def _ids(self, text: str) -> list[int]:
        found = self.known.get(text)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if found is None else found

    def _completion(self, prompt: str, prompt_ids: list[int], completion: str) -> list[int]:
        """The completion's tokens behind just those prompt tokens that the model sees when it generates."""
        joint = self._ids(prompt + completion)
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        # together they would merge across the border
        return self._ids(completion)

    def _render(self, prompt: list[dict[str, str]], sides: Sequence[list[dict[str, str]]]) -> tuple[str, list[str]]:
        """A conversation's prompt and completions as text."""
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.name}: the data are conversations, but the tokenizer has no chat template")
        template = self.tokenizer.apply_chat_template
        answered = bool(prompt) and prompt[-1]["role"] == "assistant"
        opening = {"continue_final_message": True} if answered else {"add_generation_prompt": True}
        head = template(prompt, tokenize=False, **opening) if prompt else ""
        whole = [template(prompt + side, tokenize=False) for side in sides]
        # some templates render the last turn differently from the same turn in the middle
        shared = head
        while not all(text.startswith(shared) for text in whole):
            shared = shared[:-1]
        return shared, [text[len(shared) :] for text in whole]

    def _close(self, ids: list[int], rendered: bool) -> list[int]:
        """The completion up to its EOS; a template may write more after it, which is never generated."""
        if rendered and self.eos in ids:
            return ids[: len(ids) - ids[::-1].index(self.eos)]
        return ids if ids[-1:] == [self.eos] else [*ids, self.eos]

    def _start(self, ids: list[int], rendered: bool, where: str) -> list[int]:
        """A prompt of these tokens as the model sees it: at least one token."""
        if not rendered:  # a chat template writes BOS itself
            ids = self.start + ids
        if not ids:
            if self.tokenizer.bos_token_id is None:
                raise UserError(f"{where}: the prompt is empty and the tokenizer has no BOS token to begin with")
            ids = [self.tokenizer.bos_token_id]
        return ids

    def prompt(self, row: dict[str, Any], where: str, number: int, *, room: int, demonstrations: int) -> Prompt:
        """One row as a prompt that leaves room for so many tokens, with its completions if these are demonstrations."""
        _require(row, ("prompt",), where)
        _same_form([row["prompt"]], "prompt", where)
        text, rendered = row["prompt"], not isinstance(row["prompt"], str)
        completions = self.example(row, where, number).completions if demonstrations else ()
        if rendered:
            text, _ = self._render(text, [])
        ids = self._start(self._ids(text) if text else [], rendered, where)
        if len(ids) + room > self.max_length:
            raise UserError(
                f"{where}: the prompt has {len(ids):,} tokens, which with --rollout.max_new_tokens {room:,} is more "
                f"than --max_length {self.max_length:,}"
            )
        return Prompt(text, ids, completions, row, number)

    def _column(self, row: dict[str, Any], column: Column, where: str) -> float:
        """What a row has in a column, as a number."""
        if not column.category:
            return _number(row, column, where)
        _require(row, (column.name,), where)
        value = row[column.name]
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise UserError(f'{where}: "{column.name}" must be a string or an integer, got {value!r}')
        known = self.categories.setdefault(column.name, {})
        return float(known.setdefault(value, len(known)))

    def _control_token(self, text: str) -> int:
        if text in self.control_tokens:
            return self.control_tokens[text]
        ids = self._ids(text)
        if len(ids) != 1:
            raise UserError(
                f"{self.name}: {text!r} must be one token, to have an embedding of its own, but it is {len(ids)}; "
                "add it to the tokenizer and the model, or take one that is there"
            )
        self.control_tokens[text] = ids[0]
        return ids[0]

    def example(self, row: dict[str, Any], where: str, number: int = 0) -> Example:
        """One row as token ids; `where` names it in errors, `number` is its place in the file."""
        return self._example(self._written(row, where, number))

    def examples(self, rows: Iterable[tuple[dict[str, Any], str, int]]) -> list[Example]:
        """`example` of each of them, of which the tokenizer gets all texts at once."""
        written, bad = [], None
        try:
            for row in rows:
                written.append(self._written(*row))
        except UserError as error:
            # an earlier row may be worse
            bad = error
        texts = list(dict.fromkeys(text for row in written for text in row.texts))
        if texts:
            self.known = dict(zip(texts, self.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
        found = [self._example(row) for row in written]
        self.known = {}
        if bad is not None:
            raise bad
        return found

    def _written(self, row: dict[str, Any], where: str, number: int) -> _Written:
        parsed = self.read(self, row, where, number)
        sides = parsed.completions
        rendered = not isinstance(sides[0][0].text, str)
        if rendered:
            prompt, texts = self._render(parsed.prompt, [side[0].text for side in sides])
            sides = [[side[0]._replace(text=text)] for side, text in zip(sides, texts, strict=True)]
            parsed = parsed._replace(prompt=prompt, completions=sides)
        return _Written(parsed, rendered, where, number)

    def _example(self, written: _Written) -> Example:
        (prompt, sides, numbers, each), rendered, where, number = written
        alone = self._ids(prompt) if prompt else []
        pieces = [self._pieces(prompt, alone, side, rendered) for side in sides]
        prompt_ids = self._start(alone, rendered, where)
        room = self.max_length - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"{where}: the prompt has {len(prompt_ids):,} tokens, which leaves no room for a completion "
                f"within --max_length {self.max_length:,}"
            )
        completions, marks, learnt = zip(*map(self._joined, sides, pieces, [number] * len(sides)), strict=True)
        self.cut += sum(len(ids) > room for ids in completions)
        whole = all(all(flags) for flags in learnt)
        if not all(any(flags[:room]) for flags in learnt):
            raise UserError(
                f"{where}: nothing to be trained on is left of a completion within --max_length {self.max_length:,}"
            )
        return Example(
            prompt_ids,
            tuple(ids[:room] for ids in completions),
            numbers,
            number,
            each,
            tuple(self._cut(of, room) for of in marks) if self.marks else (),
            () if whole else tuple(flags[:room] for flags in learnt),
        )

    def _pieces(self, prompt: str, prompt_ids: list[int], side: Sequence[Segment], rendered: bool) -> list[list[int]]:
        """The token ids of the segments of a completion, EOS included."""
        pieces = [self._completion(prompt, prompt_ids, side[0].text), *(self._ids(s.text) for s in side[1:])]
        if self.kind == "identifiers":
            return pieces
        ends = [*(segment.ends for segment in side[:-1]), True]
        return [self._close(ids, rendered) if end else ids for ids, end in zip(pieces, ends, strict=True)]

    def _joined(
        self, side: Sequence[Segment], pieces: list[list[int]], number: int
    ) -> tuple[list[int], tuple[tuple[float, ...], ...], tuple[bool, ...]]:
        """A completion's tokens, their numbers, and which are trained on."""
        if self.kind == "demonstrations" and self.control is not None and self.control.bad is not None:
            found, flags = conditional_tokens(
                pieces,
                [-segment.numbers[0] for segment in side],
                aligned=self._control_token(self.control.good),
                misaligned=self._control_token(self.control.bad),
                threshold=-self.control.threshold,
                drop=self.control.drop,
                generator=torch.Generator().manual_seed(number),
            )
            return found.tolist(), ((0.0,),) * len(found), tuple(flags.tolist())
        marks: list[tuple[float, ...]] = []
        for segment, ids in zip(side, pieces, strict=True):
            for place in range(len(ids)):
                held = [c.level == "token" or place == len(ids) - 1 for c in self.marks]
                marks.append(tuple(v if hold else 0.0 for v, hold in zip(segment.numbers, held, strict=True)))
        if len(side) > 1 and side[1].among:
            marks = [(float(key),) for key in self._keys(pieces, side[1].among)]
        learnt = [segment.learnt for segment, ids in zip(side, pieces, strict=True) for _ in ids]
        return [token for ids in pieces for token in ids], tuple(marks), tuple(learnt)

    def _cut(self, marks: tuple[tuple[float, ...], ...], room: int) -> tuple[tuple[float, ...], ...]:
        """The numbers of the first so many tokens; those of segments that are cut off go to the last of them."""
        kept, lost = marks[:room], marks[room:]
        if not lost:
            return kept
        levels = [column.level for column in self.marks]
        more = [sum(numbers[n] for numbers in lost) if level == "segment" else 0.0 for n, level in enumerate(levels)]
        return (*kept[:-1], tuple(value + rest for value, rest in zip(kept[-1], more, strict=True)))

    def _keys(self, pieces: list[list[int]], names: Sequence[str]) -> list[bool]:
        """Which tokens decide on the tool whose name is the middle one of three pieces.

        What stands behind the name decides too, if a longer name begins with it.
        """
        before, name, after = pieces
        own = [*name, after[0]]
        keys = tl_key_tokens(own, [ids for ids in map(self._ids, names) if ids != name])
        return [*(False for _ in before), *keys, *(False for _ in after[1:])]

    def keeps(self, example: Example) -> bool:
        """Whether an example is good enough to be trained on."""
        if self.control is None or self.control.bad is not None:
            return True
        scores = torch.tensor([[-numbers[0] for numbers in example.marks[0]]], dtype=torch.float64)
        return bool(document_filter(scores, threshold=-self.control.threshold))


def _read_pair(encoder: Encoder, row: dict[str, Any], where: str, number: int) -> Parsed:
    prompt, *texts = _pair(row, where)
    numbers = tuple(encoder._column(row, column, where) for column in encoder.columns)
    return Parsed(prompt, [[Segment(text)] for text in texts], numbers)


def _read_single(encoder: Encoder, row: dict[str, Any], where: str, number: int) -> Parsed:
    prompt, text = _single(row, where)
    numbers = tuple(encoder._column(row, column, where) for column in encoder.columns)
    return Parsed(prompt, [[Segment(text)]], numbers)


def _read_list(encoder: Encoder, row: dict[str, Any], where: str, number: int) -> Parsed:
    _require(row, ("prompt", "completions"), where)
    completions = row["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise UserError(f'{where}: "completions" must be a list of at least 2, got {completions!r}')
    _same_form([row["prompt"], *completions], "prompt and completions", where)
    columns = []
    for column in encoder.of_level("completion"):
        if column.default is None:
            columns.append(_targets(row, column, where))
        elif row.get(column.name) is None:
            columns.append([column.default] * len(completions))
        else:
            columns.append(_values(row[column.name], column.name, len(completions), "completions", where))
    each = tuple(zip(*columns, strict=True))
    return Parsed(row["prompt"], [[Segment(text)] for text in completions], (), each)


def _read_identifiers(encoder: Encoder, row: dict[str, Any], where: str, number: int) -> Parsed:
    parsed = _read_list(encoder, row, where, number)
    _text(row, ("prompt",), where)
    known: dict[int, str] = {}
    for (segment,) in parsed.completions:
        ids = encoder._ids(segment.text)
        if len(ids) != 1:
            raise UserError(f'{where}: {segment.text!r} in "completions" must be one token, but it is {len(ids)}')
        if ids[0] in known:
            raise UserError(f'{where}: {segment.text!r} and {known[ids[0]]!r} in "completions" are the same token')
        known[ids[0]] = segment.text
    return parsed


def _read_demonstration(encoder: Encoder, row: dict[str, Any], where: str, number: int) -> Parsed:
    _require(row, ("prompt", "completion"), where)
    texts = row["completion"]
    if isinstance(texts, list) and not _is_conversation(texts):
        _text(row, ("prompt",), where)
        texts = _strings(row, "completion", where)
    else:
        _same_form([row["prompt"], texts], "prompt and completion", where)
        texts = [texts]
    if encoder.control is not None and encoder.control.bad is not None:
        _text(row, ("prompt",), where)
    columns = [_rewards(row, column, len(texts), where) for column in encoder.marks]
    numbers = list(zip(*columns, strict=True)) or [()] * len(texts)
    return Parsed(row["prompt"], [[Segment(text, of) for text, of in zip(texts, numbers, strict=True)]])


def _read_hindsight(encoder: Encoder, row: dict[str, Any], where: str, number: int) -> Parsed:
    """The chain of a pair, every other row the best first, so that both phrases are heard in both places."""
    assert encoder.control is not None and encoder.control.bad is not None
    prompt, chosen, rejected = _pair(_best_and_worst(row, where), where)
    if not isinstance(prompt, str):
        raise UserError(f"{where}: prompt and completions must be strings here")
    chain = [(encoder.control.good, chosen), (encoder.control.bad, rejected)]
    side: list[Segment] = []
    for phrase, text in chain if number % 2 else chain[::-1]:
        side += [Segment(phrase, learnt=False), Segment(text, ends=True)]
    return Parsed(prompt, [side])


def _best_and_worst(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A pair as it is; of a list, the first of the best and the first of the worst completions."""
    if row.get("completions") is None:
        return row
    _require(row, ("prompt",), where)
    texts = _strings(row, "completions", where, 2)
    scores = _targets(row, Column("rewards"), where)
    best, worst = (texts[scores.index(extreme)] for extreme in (max(scores), min(scores)))
    return {"prompt": row["prompt"], "chosen": best, "rejected": worst}


def _read_tool_use(encoder: Encoder, row: dict[str, Any], where: str, number: int) -> Parsed:
    _text(row, ("prompt", "completion"), where)
    names = tuple(_strings(row, "tools", where))
    text = row["completion"]
    called = [name for name in names if name and name in text]
    if not called:
        return Parsed(row["prompt"], [[Segment(text, (0.0,))]])
    # of names that begin at the same place, the longest
    name = min(called, key=lambda each: (text.index(each), -len(each)))
    before, _, after = text.partition(name)
    return Parsed(
        row["prompt"], [[Segment(before, (0.0,)), Segment(name, (0.0,), among=names), Segment(after, (0.0,))]]
    )


def _read_decisions(encoder: Encoder, row: dict[str, Any], where: str, number: int) -> Parsed:
    _text(row, ("prompt",), where)
    actions = _strings(row, "actions", where, 2)
    _require(row, ("losses",), where)
    losses = row["losses"]
    if not isinstance(losses, list) or not losses:
        raise UserError(f'{where}: "losses" must be a list of at least one round, got {losses!r}')
    told = _strings({"observations": [], **row}, "observations", where, 0)
    if len(told) < len(losses) - 1:
        raise UserError(
            f'{where}: "observations" must tell of all rounds but the last, {len(losses) - 1}, got {len(told)}'
        )
    sides, each = [], []
    for t, _ in enumerate(losses):
        values = _values(losses[t], "losses", len(actions), f"the actions of round {t + 1}", where)
        past = [Segment("".join(told[:t]), learnt=False)] if t else []
        for action, value in zip(actions, values, strict=True):
            sides.append([*past, Segment(action)])
            each.append((value,))
    return Parsed(row["prompt"], sides, (float(len(actions)),), tuple(each))


_READERS: dict[str, Callable[[Encoder, dict[str, Any], str, int], Parsed]] = {
    "pairwise": _read_pair,
    "unpaired": _read_single,
    "lists": _read_list,
    "identifiers": _read_identifiers,
    "demonstrations": _read_demonstration,
    "hindsight": _read_hindsight,
    "tools": _read_tool_use,
    "decisions": _read_decisions,
}


def _parts(kind: str, row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A row as the rows that it stands for."""
    if kind == "unpaired":
        return _unpaired(row, where)
    if kind == "hindsight" and row.get("completions") is not None:
        _require(row, ("prompt",), where)
        _strings(row, "completions", where, 2)
        # of equal ones none is the best
        return [row] if len(set(_targets(row, Column("rewards"), where))) > 1 else []
    if kind == "tools" and row.get("answer") is not None:
        _text(row, ("completion", "answer"), where)
        turns = [{"role": "assistant", "content": row["completion"]}, {"role": "tool", "content": row["answer"]}]
        return [] if adverse_turns(turns)[0] else [row]
    return [row]


def load_prompts(path: str, encoder: Encoder, *, room: int, demonstrations: int) -> list[Prompt]:
    """A file of prompts as token ids; UserError for what cannot be sampled for, with file, row and column.

    Args:
        path: the file.
        encoder: of the model; for one demonstration with the data kind "unpaired", whose columns prompt and completion
            they have, for two of them with the kind "pairwise".
        room: most tokens of a completion.
        demonstrations: how many completions every row must have.
    """
    more: dict[str, Any] = {"room": room, "demonstrations": demonstrations}
    return [encoder.prompt(row, f"{path}, row {i}", i, **more) for i, row in enumerate(read_rows(path), 1)]


# the first example whose numbers an algorithm refuses, and why
Problem = Callable[[Sequence[Sequence[float]]], tuple[int, str] | None]


def load_examples(path: str, encoder: Encoder, problem: Problem | None = None) -> list[Example]:
    """A preference file as token ids; UserError for what cannot be trained on, with file, row and column."""
    return encode(read_rows(path), path, encoder, problem)


def encode(
    rows: Sequence[dict[str, Any]], path: str, encoder: Encoder, problem: Problem | None = None
) -> list[Example]:
    """The rows of a file as token ids."""
    examples: list[Example] = []
    for first in range(0, len(rows), _TOGETHER):
        some = ((row, f"{path}, row {i}", i) for i, row in enumerate(rows[first : first + _TOGETHER], first + 1))
        parts = ((part, where, i) for row, where, i in some for part in _parts(encoder.kind, row, where))
        examples += filter(encoder.keeps, encoder.examples(parts))
    if not examples:
        raise UserError(f"{path}: no row is good enough to be trained on")
    refused = None if problem is None else problem([example.numbers for example in examples])
    if refused is not None:
        raise UserError(f"{path}, row {examples[refused[0]].row}: {refused[1]}")
    return examples


def with_mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Each example with the completion of the next one that has another prompt, as a further completion of its own.

    The last example is followed by the first. Where all prompts are one, it is the next completion.
    """
    count = len(examples)
    other = [(i + 1) % count for i in range(count)]
    if any(example.prompt != examples[0].prompt for example in examples):
        # twice around, because the last ones look at the first
        for i in reversed([*range(count), *range(count)]):
            if examples[other[i]].prompt == examples[i].prompt:
                other[i] = other[(i + 1) % count]
    out = []
    for example, j in zip(examples, other, strict=True):
        room = max_length - len(example.prompt)
        completion = examples[j].completions[0][:room]
        out.append(example._replace(completions=(*example.completions, completion)))
    return out


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
