"""A tiny model with a character tokenizer, and preference files for it."""

from __future__ import annotations

import json
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
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, list[str]]]]:
    """The built-in task's reference in a folder, and the answers that are sampled from it for every method.

    Those are by the number of prompts that they are for.
    """
    from fastpo.training import task
    from fastpo.training.model import load_model

    folder = tmp_path_factory.mktemp("built-in")
    before = torch.get_num_threads()
    # as a run of the task does
    torch.set_num_threads(1)
    task.build(folder, 0, lambda *_: None)
    model = load_model(str(folder / task.REFERENCE))
    answers = {len(questions): task._answers(model, questions, 0) for questions in task.prompts(0)}
    torch.set_num_threads(before)
    return folder, answers


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


@pytest.fixture
def sampled_run(fitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """A short run of a method that samples on the built-in task; returns its summary."""

    def run(name: str, *more: str, shuffled: bool = False) -> dict[str, float]:
        verify = task.verify

        def scorer(samples: Any) -> list[float]:
            rewards = verify(samples)
            random.Random(0).shuffle(rewards)
            return rewards

        monkeypatch.setattr(task, "build", lambda to, *_: shutil.copytree(fitted[0], to, dirs_exist_ok=True))
        if shuffled:
            monkeypatch.setattr(task, "verify", scorer)
        folder = tmp_path / "run"
        command = ["train", name, "--output", str(folder), "--steps", "14", "--optim.lr", "1e-3", "--eval_every", "0"]
        assert main([*command, "--batch.tokens", "4096", *more]) == 0
        return json.loads((folder / "summary.json").read_text())

    return run
