"""A tiny model with a character tokenizer, and preference files for it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpo.cli import main
from fastpo.training import task

transformers = pytest.importorskip("transformers")

CHARACTERS = string.ascii_lowercase + string.digits + " .<>/\n"
TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def character_tokenizer(characters: str = CHARACTERS, **special: str) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate([*characters, "[E]", "[B]"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def tiny_model(vocabulary: int, seed: int = 0, tied: bool = False) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_reward_model(vocabulary: int, seed: int = 0, pad: int | None = None) -> Any:
    """The same with a head that gives one score."""
    config = tiny_model(1).config
    config.update({"vocab_size": vocabulary, "num_labels": 1, "pad_token_id": pad})
    torch.manual_seed(seed)
    return transformers.LlamaForSequenceClassification(config).eval()


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of different lengths; what is chosen has an a where what is rejected has a z."""
    rng = random.Random(seed)

    def text(letter: str) -> str:
        return "".join(rng.choice("bcd" + letter) for _ in range(rng.randint(1, 9)))

    def row() -> dict[str, str]:
        out = {"prompt": text("e") + " ", "chosen": text("a"), "rejected": text("z")}
        # which of two equal completions has more is a matter of rounding
        return out if out["chosen"] != out["rejected"] else row()

    return [row() for _ in range(count)]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = character_tokenizer(eos_token="[E]", bos_token="[B]", pad_token="[E]")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    # tied weights are the harder case for checkpoints
    tiny_model(len(tokenizer), tied=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The reference of a built-in task (`task` or `denoising_task`) and a seed in a folder.

    It is fitted once, also where several processes share the tests, unless two need it at the same moment.
    """
    from fastpo.training import denoising_task

    # before a test replaces them
    builds = {built: built.build for built in (task, denoising_task)}
    mine = tmp_path_factory.getbasetemp()
    everyones = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine

    def fitted(built: Any = task, seed: int = 0) -> Path:
        folder = everyones / f"{built.__name__}-{seed}"
        if not folder.exists():
            partial, before = tmp_path_factory.mktemp("reference"), torch.get_num_threads()
            # as a run of the task does
            torch.set_num_threads(1)
            builds[built](partial, seed, lambda *_: None)
            torch.set_num_threads(before)
            with contextlib.suppress(OSError):
                partial.rename(folder)
        return folder

    return fitted


@pytest.fixture(scope="session")
def answers(fitted: Callable[..., Path]) -> Callable[[int], dict[str, list[str]]]:
    """What the built-in task's reference of a seed answers to every prompt, as it is sampled for every method."""
    from fastpo.training.model import load_model

    found: dict[int, dict[str, list[str]]] = {}
    sample = task._answers

    def answers(seed: int) -> dict[str, list[str]]:
        if seed not in found:
            model = load_model(str(fitted(task, seed) / task.REFERENCE))
            found[seed] = {q: texts for of in task.prompts(seed) for q, texts in sample(model, of, seed).items()}
        return found[seed]

    return answers


@pytest.fixture
def trained(
    fitted: Any, answers: Any, tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """A run of `--preset ci` from the shared reference, without its figure; returns its folder."""
    from fastpo.training import denoising_task, run

    # as long as several steps
    monkeypatch.setattr(run, "plot", lambda *_: None)
    monkeypatch.setattr(task, "_answers", lambda _, questions, seed: {q: [*answers(seed)[q]] for q in questions})
    for built in (task, denoising_task):

        def copied(to: Path, seed: int, *_: Any, built: Any = built) -> None:
            shutil.copytree(fitted(built, seed), to, dirs_exist_ok=True)

        monkeypatch.setattr(built, "build", copied)

    def trained(name: str, *more: str, output: str = "run") -> Path:
        assert main(["train", name, "--preset", "ci", "--output", str(tmp_path / output), *more]) == 0
        return tmp_path / output

    return trained


def summary(folder: Path) -> dict[str, Any]:
    """Of a run."""
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def threads() -> Iterator[None]:
    """One thread: the tensors here are too small to share, and the built-in task takes one for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the first precision of a process for ever."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
