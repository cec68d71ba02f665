"""Preference files in TRL's formats, read and turned into token ids.

A row is {"prompt", "chosen", "rejected"}, or without "prompt", which is then what chosen and rejected have in
common. The values are strings, or lists of {"role", "content"} that the tokenizer's chat template renders.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from fastpo.training.errors import UserError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Example(NamedTuple):
    """One row as token ids: a prompt and its completions (of a pair: chosen, rejected), each with its EOS."""

    prompt: list[int]
    completions: tuple[list[int], ...]

    @property
    def tokens(self) -> int:
        """Length of all its sequences."""
        return sum(len(self.prompt) + len(c) for c in self.completions)


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


def _fields(row: dict[str, Any], where: str) -> tuple[Any, Any, Any]:
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            has = ", ".join(key for key, value in row.items() if value is not None)
            raise UserError(f'{where}: there is no "{name}" (it has: {has})')
    values = [row[name] for name in ("prompt", "chosen", "rejected") if row.get(name) is not None]
    if not all(isinstance(v, str) for v in values) and not all(_is_conversation(v) for v in values):
        raise UserError(f"{where}: prompt, chosen and rejected must all be strings or all be lists of role and content")
    if not (row["chosen"] and row["rejected"]) and row.get("prompt") is None:
        raise UserError(f"{where}: chosen or rejected is empty, and there is no prompt")
    return (values[0], values[1], values[2]) if len(values) == 3 else _split_prompt(values[0], values[1])


class Encoder:
    """Rows of text to examples of token ids."""

    def __init__(self, tokenizer: Any, name: str, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name}: the tokenizer has no EOS token, so the model could not learn where to stop")
        self.tokenizer, self.name, self.max_length = tokenizer, name, max_length
        self.cut = 0  # completions that were too long
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

    def example(self, row: dict[str, Any], where: str) -> Example:
        """One row as token ids; `where` names it in errors."""
        prompt, chosen, rejected = _fields(row, where)
        rendered = not isinstance(chosen, str)
        texts = [chosen, rejected]
        if rendered:
            prompt, texts = self._render(prompt, texts)
        prompt_ids = self._ids(prompt) if prompt else []
        completions = [self._close(self._completion(prompt, prompt_ids, t), rendered) for t in texts]
        if not rendered:  # a chat template writes BOS itself
            prompt_ids = self.start + prompt_ids
        if not prompt_ids:
            if self.tokenizer.bos_token_id is None:
                raise UserError(f"{where}: the prompt is empty and the tokenizer has no BOS token to begin with")
            prompt_ids = [self.tokenizer.bos_token_id]
        room = self.max_length - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"{where}: the prompt has {len(prompt_ids):,} tokens, which leaves no room for a completion "
                f"within --max_length {self.max_length:,}"
            )
        self.cut += sum(len(ids) > room for ids in completions)
        return Example(prompt_ids, tuple(ids[:room] for ids in completions))


def load_examples(path: str, encoder: Encoder) -> list[Example]:
    """A preference file as token ids."""
    return [encoder.example(row, f"{path}, row {i}") for i, row in enumerate(read_rows(path), 1)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
