"""Whole runs on two processes, sharded or not: those of one, resumed with as many or as few, and after a death.

All runs of two processes are done by two launches, as it is starting that takes long: see workers.py.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fastpo.cli import main
from fastpo.training import checkpoint

from .conftest import character_tokenizer, pairs, tiny_model
from .test_run import (
    assert_about_the_same_run,
    assert_same_run,
    free_port,
    launched,
    metrics,
    options,
    torchrun,
    weights,
)
from .workers import before_step, interrupt

accelerate = pytest.importorskip("accelerate")
AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer

from fastpo.nn import S4Config, S4LanguageModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("threads")

# a sum over examples, in more and smaller forwards, and with a reference that moves; two methods that look at the whole
# step, of which one remembers, and one that asks the reference itself at every step; reward models whose annotators are
# assigned from all pairs; three that sample: one with two steps a turn, one with a critic, and one that samples more
# for some prompts only; and a model of S4 layers, whose Fourier transforms are as long as a forward's longest sequence
SAMPLING = ("--reward.of", "REWARD", "--rollout.max_new_tokens", "6", "--rollout.tokens", "200", "--max_length", "64")
METHODS = {
    "dpo": ("dpo",),
    "small": ("dpo", "--batch.tokens", "60"),
    "sync": ("dpo", "--sync.every", "2", "--sync.alpha", "0.5"),
    "beta_dpo": ("beta_dpo",),
    "bco": ("bco",),
    "tdpo": ("tdpo",),
    "maxmin": ("maxmin",),
    "grpo": ("grpo", *SAMPLING, "--rollout.minibatches", "2", "--algorithm.samples", "3"),
    "ppo": ("ppo", *SAMPLING, "--algorithm.samples", "2"),
    "xrpo": ("xrpo", *SAMPLING, "--algorithm.samples", "2"),
    "s4": ("dpo", "--model", "S4", "--batch.tokens", "60"),
}
PARALLEL = ("ddp", "fsdp2")
# what is stopped after three of six steps, and with what it is continued
STOPPED = (("bco", "ddp"), ("sync", "fsdp2"), ("grpo", "fsdp2"))


class Runs(NamedTuple):
    """What was done on two processes.

    Attributes:
        folder: of all runs.
        said: by the name of a job, its exit codes, and what the processes said on stderr.
        killed: what torchrun returned and said where a process was killed.
    """

    folder: Path
    said: dict[str, list[tuple[int, str]]]
    killed: tuple[int, str]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps({**row, "annotator": i % 4}) + "\n" for i, row in enumerate(pairs(20))))
    path.with_name("reward.py").write_text(
        "def vowels(completions, **_):\n    return [sum(c in 'aeiou' for c in text) for text in completions]\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def s4_folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("s4")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "d_state": 8, "max_position_embeddings": 64}
    config = S4Config(vocab_size=len(tokenizer), dt_min=0.02, dt_max=0.5, initializer_range=0.3, **sizes)
    S4LanguageModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def command(model_folder, s4_folder, data):
    words = {"REWARD": str(Path(data).with_name("reward.py")) + ":vowels", "S4": str(s4_folder)}

    def command(method: str, output: Path, *more: str) -> list[str]:
        name, *own = (words.get(word, word) for word in METHODS[method])
        return options(model_folder, data, output, "--eval_data", data, *own, *more, name=name)

    return command


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """Six steps of one process, by method."""
    folder = tmp_path_factory.mktemp("alone")

    def alone(method: str) -> Path:
        if not (folder / method).exists():
            assert main(command(method, folder / method)) == 0
        return folder / method

    return alone


@pytest.fixture(scope="module")
def runs(command, data, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("two")
    short = ("--checkpoint_every", "3")

    (folder / "killed").mkdir()
    (folder / "killed" / "jobs.json").write_text(
        json.dumps(
            [
                {
                    "argv": command("sync", folder / "sync-killed", "--parallel", "fsdp2", *short),
                    "port": free_port(),
                    "kill": 4,
                }
            ]
        )
    )
    worker = str(Path(__file__).parent / "workers.py")
    killed = launched(torchrun(), worker, str(folder / "killed"), check=False)

    jobs = {}
    for parallel in PARALLEL:
        for method in METHODS:
            run = f"{method}-{parallel}"
            jobs[run] = {"argv": command(method, folder / run, "--parallel", parallel)}
    for method, parallel in STOPPED:
        run = f"{method}-{parallel}"
        argv = command(method, folder / f"{run}-resumed", "--parallel", parallel, *short)
        jobs[f"{run}-stopped"] = {"argv": argv, "interrupt": 3, "keep": str(folder / f"{run}-stopped")}
        name = METHODS[method][0]
        jobs[f"{run}-resumed"] = {"argv": ["train", name, "--resume", str(folder / f"{run}-resumed")]}
        # of one process, to be continued by two
        with before_step(3, interrupt):
            assert main(command(method, folder / f"{run}-spread", *short)) == 130
        jobs[f"{run}-spread"] = {
            "argv": ["train", name, "--resume", str(folder / f"{run}-spread"), "--parallel", parallel]
        }
    shutil.copytree(folder / "sync-killed", folder / "sync-killed-copy")
    jobs["sync-killed"] = {"argv": ["train", "dpo", "--resume", str(folder / "sync-killed")]}
    jobs["told"] = {"argv": command("dpo", folder / "told", "--parallel", "fsdp2"), "terminate": 2}
    jobs["bf16"] = {"argv": command("dpo", folder / "bf16", "--parallel", "fsdp2", "--precision", "bf16")}
    jobs["odd"] = {"argv": command("dpo", folder / "odd", "--batch.size", "7")}
    shutil.copy(data, folder / "of-0.jsonl")
    jobs["one-fails"] = {"argv": command("dpo", folder / "one-fails", "--data", str(folder / "of-{rank}.jsonl"))}
    with_ports = [{**job, "port": free_port()} for job in jobs.values()]
    (folder / "jobs.json").write_text(json.dumps(with_ports))
    launcher = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2"]
    launched([*launcher, f"--main_process_port={free_port()}"], worker, str(folder))
    codes, said = (
        [json.loads((folder / f"{what}-{rank}.json").read_text()) for rank in range(2)] for what in ("codes", "said")
    )
    answers = {name: [(codes[rank][n], said[rank][n]) for rank in range(2)] for n, name in enumerate(jobs)}
    return Runs(folder, answers, (killed.returncode, killed.stderr))


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_do_what_one_does(method, parallel, runs, alone):
    run = f"{method}-{parallel}"
    assert [code for code, _ in runs.said[run]] == [0, 0]
    assert_about_the_same_run(runs.folder / run, alone(method))


@pytest.mark.parametrize(("method", "parallel"), STOPPED)
def test_resuming_on_as_many_is_bitwise_the_straight_run(method, parallel, runs):
    run = f"{method}-{parallel}"
    assert [code for code, _ in runs.said[f"{run}-stopped"]] == [130, 130]
    assert checkpoint.latest(runs.folder / f"{run}-stopped").name == "step-00000003"
    assert [code for code, _ in runs.said[f"{run}-resumed"]] == [0, 0]
    assert_same_run(runs.folder / f"{run}-resumed", runs.folder / run)


@pytest.mark.parametrize(("method", "parallel"), STOPPED)
def test_resuming_on_other_numbers(method, parallel, runs, alone, tmp_path):
    run = f"{method}-{parallel}"
    assert [code for code, _ in runs.said[f"{run}-spread"]] == [0, 0]
    assert_about_the_same_run(runs.folder / f"{run}-spread", alone(method))
    shutil.copytree(runs.folder / f"{run}-stopped", tmp_path / "run")
    assert main(["train", METHODS[method][0], "--resume", str(tmp_path / "run")]) == 0
    assert_about_the_same_run(tmp_path / "run", alone(method))


def test_a_killed_process_ends_the_run(runs, alone, tmp_path):
    code, said = runs.killed
    assert code != 0 and "Signal 9 (SIGKILL)" in said
    # the other process says how to go on, if it is left the time
    assert json.loads((runs.folder / "killed" / "codes-0.json").read_text()) == [130]
    (said,) = json.loads((runs.folder / "killed" / "said-0.json").read_text())
    run = runs.folder / "sync-killed"
    assert said == f"fastpo: another process has ended; to continue: fastpo train dpo --resume {run}\n"
    copy = tmp_path / "run"
    shutil.copytree(runs.folder / "sync-killed-copy", copy)
    assert checkpoint.latest(copy).name == "step-00000003" and len(metrics(copy)) == 5
    assert runs.said["sync-killed"] == [(0, ""), (0, "")]
    assert_same_run(runs.folder / "sync-killed", runs.folder / "sync-fsdp2")
    assert main(["train", "dpo", "--resume", str(copy)]) == 0
    assert_about_the_same_run(copy, alone("sync"))


def test_a_signal_to_one_process_stops_all(runs):
    """After the step in which it came, with a checkpoint of it."""
    assert [code for code, _ in runs.said["told"]] == [130, 130]
    run = runs.folder / "told"
    said = f"fastpo: stopped after step 3; to continue: fastpo train dpo --resume {run}\n"
    assert [text for _, text in runs.said["told"]] == [said, ""]
    assert checkpoint.latest(run).name == "step-00000003"
    assert metrics(run) == metrics(runs.folder / "dpo-fsdp2")[:4]


def test_bf16_trains_with_shards(runs, alone):
    """The forward is in bf16, with 8 bits, and what is summed and kept in fp32."""
    assert [code for code, _ in runs.said["bf16"]] == [0, 0]
    ours, theirs = metrics(runs.folder / "bf16"), metrics(alone("dpo"))
    assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], rel=2**-7) and ours[-1]["loss"] != theirs[-1]["loss"]
    assert ours[-1]["eval_loss"] < 0.9 * ours[0]["eval_loss"]
    assert all(weight.dtype == torch.float32 for weight in weights(runs.folder / "bf16").values())


def test_errors_are_those_of_all_processes(runs):
    first, second = runs.said["odd"]
    assert first == (2, "fastpo: --batch.size 7 is not a multiple of the 2 processes\n") and second == (2, "")
    first, second = runs.said["one-fails"]
    assert first == (2, f"fastpo: process 1: {runs.folder / 'of-1.jsonl'}: no such file\n") and second == (2, "")


def test_a_half_written_checkpoint_is_none(runs, tmp_path):
    """What a process left that was killed while it wrote its share."""
    run = tmp_path / "run"
    shutil.copytree(runs.folder / "sync-fsdp2-stopped", run)
    whole = checkpoint.latest(run)
    partial = whole.with_name(".step-00000006.part")
    shutil.copytree(whole, partial)
    (partial / checkpoint.STATE).unlink()
    (partial / checkpoint.TENSORS / ".metadata").unlink()
    assert checkpoint.latest(run) == whole
    assert main(["train", "dpo", "--resume", str(run)]) == 0
    assert [folder.name for folder in (run / checkpoint.FOLDER).iterdir()] == ["step-00000006"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_damaged_checkpoints_are_errors(runs, tmp_path, capsys):
    """Each file of a sharded checkpoint missing, or cut, and nothing lost by trying."""
    run = tmp_path / "run"
    shutil.copytree(runs.folder / "sync-fsdp2-stopped", run)
    step = checkpoint.latest(run)
    files = sorted(path for path in step.rglob("*") if path.is_file())
    names = {str(path.relative_to(step)) for path in files}
    assert names == {
        *("state.json", "objects.pt", "random-0.pt", "random-1.pt"),
        *("tensors/.metadata", "tensors/__0_0.distcp", "tensors/__1_0.distcp"),
    }
    for path in files:
        before, content = contents(run), path.read_bytes()
        for damaged in (None, content[: len(content) // 2]):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            now = contents(run)
            assert main(["train", "dpo", "--resume", str(run)]) == 2
            said = capsys.readouterr().err
            assert str(path) in said and ("missing" if damaged is None else "damaged") in said
            assert contents(run) == now
            path.write_bytes(content)
        assert contents(run) == before
    assert main(["train", "dpo", "--resume", str(run)]) == 0


def test_other_runs_are_errors(command, model_folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command("bco", run, "--steps", "1")) == 0
    size = len(character_tokenizer(eos_token="[E]", bos_token="[B]", pad_token="[E]"))
    for name, tied, more in (("untied", False, 0), ("wider", True, 3)):
        shutil.copytree(model_folder, tmp_path / name)
        tiny_model(size + more, tied=tied).save_pretrained(tmp_path / name)
    before = contents(run)
    for name, more, message in (
        ("kto", (), "this is a run of bco, not of kto"),
        (
            "bco",
            ("--model", str(tmp_path / "untied")),
            f"it is of another model: policy.model.lm_head.weight is missing there and has the shape ({size}, 16) "
            "here (1 of the tensors)",
        ),
        (
            "bco",
            ("--model", str(tmp_path / "wider")),
            f"policy.model.model.embed_tokens.weight has the shape ({size}, 16) there and has the shape "
            f"({size + 3}, 16) here",
        ),
        ("bco", ("--sync.every", "2"), "reference.model.model.embed_tokens.weight is missing there"),
    ):
        assert main(["train", name, "--resume", str(run), *more]) == 2
        assert message in capsys.readouterr().err
        assert contents(run) == before


def test_random_states_are_put_back(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)

    def drawn() -> list[object]:
        return [random.random(), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    model = torch.nn.Linear(2, 2)
    parts = checkpoint.Parts("dpo", "", {"policy": model}, torch.optim.AdamW(model.parameters()), {})
    # of a Gaussian, numpy keeps the second of a pair
    np.random.randn()
    step = checkpoint.save(accelerator, tmp_path, 1, parts)
    before = drawn()
    assert drawn() != before
    assert checkpoint.load(accelerator, step, parts) == 1
    assert drawn() == before


def test_what_a_checkpoint_says(runs):
    state = json.loads((checkpoint.latest(runs.folder / "bco-ddp") / checkpoint.STATE).read_text())
    assert (state["step"], state["algorithm"], state["processes"]) == (6, "bco", 2)
    objects = torch.load(checkpoint.latest(runs.folder / "bco-ddp") / checkpoint.OBJECTS, weights_only=True)
    assert objects.keys() == {"schedule", "memory"} and "delta" in objects["memory"]
