"""Preference files in TRL's formats, read and turned into token ids.

A row of pairs is {"prompt", "chosen", "rejected"}, or without "prompt", which is then what chosen and rejected have in
common. An unpaired row is {"prompt", "completion", "label"}, the label true or false; a pair in its place stands for
two of them. The values are strings, or lists of {"role", "content"} that the tokenizer's chat template renders.

Some algorithms read numbers beside: "chosen_score" and "rejected_score" (or "score_chosen" and "score_rejected", or
their difference as "margin"), "chosen_visits" and "rejected_visits", "density_ratio"; and "annotator", a name.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from fastpo.algorithms import Column
from fastpo.training.errors import UserError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


# what else a column may be called
OTHER_NAMES = {"chosen_score": "score_chosen", "rejected_score": "score_rejected"}


class Example(NamedTuple):
    """One row as token ids.

    Attributes:
        prompt: its tokens.
        completions: of a pair chosen and rejected, else one; each with its EOS.
        numbers: what the row says beside, in the order of the algorithm's columns.
        row: its number in the file, from 1.
    """

    prompt: list[int]
    completions: tuple[list[int], ...]
    numbers: tuple[float, ...] = ()
    row: int = 0

    @property
    def tokens(self) -> int:
        """Length of all its sequences."""
        return sum(len(self.prompt) + len(c) for c in self.completions)


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
    value = row[name]
    if column.boolean:
        if not isinstance(value, bool) and value not in (0, 1):
            raise UserError(f'{where}: "{name}" must be true or false, got {value!r}')
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f'{where}: "{name}" must be a number, got {value!r}')
    if not math.isfinite(value):
        raise UserError(f'{where}: "{name}" must be finite, got {value}')
    return float(value)


class Encoder:
    """Rows of text to examples of token ids.

    Args:
        tokenizer: the model's.
        name: the model's, for errors.
        max_length: most tokens of prompt and completion.
        kind: "pairwise" or "unpaired", as the algorithm's.
        columns: the numbers to be read.
    """

    def __init__(
        self, tokenizer: Any, name: str, max_length: int, kind: str = "pairwise", columns: Sequence[Column] = ()
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name}: the tokenizer has no EOS token, so the model could not learn where to stop")
        self.tokenizer, self.name, self.max_length = tokenizer, name, max_length
        self.kind, self.columns = kind, tuple(columns)
        self.cut = 0  # completions that were too long
        # by column of names, their numbers in the order in which they came
        self.categories: dict[str, dict[str | int, int]] = {}
        self.eos: int = tokenizer.eos_token_id
        # what the tokenizer itself puts before a text, and nothing that it would put behind one
        special = tokenizer("")["input_ids"]
        self.start: list[int] = special[:1] if special[:1] == [tokenizer.bos_token_id] else []

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

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

    def _start(self, prompt: str, rendered: bool, where: str) -> list[int]:
        """The tokens of a prompt, at least one."""
        ids = self._ids(prompt) if prompt else []
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
        ids = self._start(text, rendered, where)
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

    def example(self, row: dict[str, Any], where: str, number: int = 0) -> Example:
        """One row as token ids; `where` names it in errors, `number` is its place in the file."""
        prompt, *texts = _pair(row, where) if self.kind == "pairwise" else _single(row, where)
        numbers = tuple(self._column(row, column, where) for column in self.columns)
        rendered = not isinstance(texts[0], str)
        if rendered:
            prompt, texts = self._render(prompt, texts)
        alone = self._ids(prompt) if prompt else []
        completions = [self._close(self._completion(prompt, alone, t), rendered) for t in texts]
        prompt_ids = self._start(prompt, rendered, where)
        room = self.max_length - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"{where}: the prompt has {len(prompt_ids):,} tokens, which leaves no room for a completion "
                f"within --max_length {self.max_length:,}"
            )
        self.cut += sum(len(ids) > room for ids in completions)
        return Example(prompt_ids, tuple(ids[:room] for ids in completions), numbers, number)


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
    examples = []
    for i, row in enumerate(rows, 1):
        where = f"{path}, row {i}"
        parts = [row] if encoder.kind == "pairwise" else _unpaired(row, where)
        examples += [encoder.example(part, where, i) for part in parts]
    found = None if problem is None else problem([example.numbers for example in examples])
    if found is not None:
        raise UserError(f"{path}, row {examples[found[0]].row}: {found[1]}")
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
