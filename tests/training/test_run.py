"""Whole runs: resuming, interrupting, several processes, what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from fastpo.cli import main
from fastpo.training.errors import UserError
from fastpo.training.report import Journal, read_records

from .conftest import pairs, tiny_model
from .workers import before_step, interrupt

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")

# measured, so never the same twice
TIMES = ("seconds",)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def options(model: Path, data: str, output: Path, *more: str, name: str = "dpo") -> list[str]:
    return [
        *("train", name, "--model", str(model), "--data", data, "--output", str(output)),
        *("--steps", "6", "--batch.size", "8", "--batch.tokens", "160", "--optim.lr", "1e-2"),
        *("--eval_every", "2", *(("--algorithm.every", "2") if name == "maxmin" else ()), *more),
    ]


def metrics(run: Path) -> list[dict[str, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted((run / "model").rglob("*.safetensors"))
    return {f"{file.parent.name}.{key}": value for file in files for key, value in load_file(file).items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps({**row, "annotator": i % 4}) + "\n" for i, row in enumerate(pairs(20))))
    return str(path)


@pytest.fixture(scope="module")
def straight_runs(model_folder, data, tmp_path_factory):
    """Six steps without a stop, by algorithm."""
    runs: dict[str, Path] = {}

    def straight(name: str) -> Path:
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("runs") / "straight"
            assert main(options(model_folder, data, runs[name], "--eval_data", data, name=name)) == 0
        return runs[name]

    return straight


@pytest.fixture
def straight(straight_runs):
    return straight_runs("dpo")


def test_a_run_leaves_what_it_says(straight, model_folder, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary = json.loads((straight / "summary.json").read_text())
    assert summary["algorithm"] == "dpo" and summary["steps"] == 6 and summary["examples"] == 20
    assert summary["loss_before"] == pytest.approx(0.693147, abs=1e-5)
    assert summary["loss_after"] < 0.6 and summary["reward_accuracy_after"] > 0.8
    assert summary["tokens_per_second"] > 0 and summary["seconds"] > 0 and summary["padding"] == 0
    assert (straight / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (straight / "checkpoints").iterdir()] == ["step-00000006"]
    config = yaml.safe_load((straight / "config.yaml").read_text())
    assert config["optim"]["lr"] == 1e-2 and config["algorithm"] == {"beta": 0.1}
    assert [r["step"] for r in metrics(straight)] == [0, 1, 2, 3, 4, 5, 6]

    trained = AutoModelForCausalLM.from_pretrained(straight / "model")
    before = AutoModelForCausalLM.from_pretrained(model_folder)
    assert AutoTokenizer.from_pretrained(straight / "model").eos_token == "[E]"
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)


@pytest.mark.parametrize("name", ("dpo", "beta_dpo", "bco", "sampo", "maxmin"))
def test_resuming_is_bitwise_the_straight_run(name, straight_runs, model_folder, data, tmp_path):
    from fastpo.training import checkpoint

    straight = straight_runs(name)
    output = tmp_path / "run"
    more = ("--eval_data", data, "--checkpoint_every", "3")
    with before_step(3, interrupt):
        assert main(options(model_folder, data, output, *more, name=name)) == 130
    assert checkpoint.latest(output).name == "step-00000003"
    assert main(["train", name, "--resume", str(output)]) == 0
    assert_same_run(straight, output)


def test_layers_that_are_computed_again_change_nothing(straight, model_folder, data, tmp_path):
    more = ("--eval_data", data, "--gradient_checkpointing", "true")
    assert main(options(model_folder, data, tmp_path / "run", *more)) == 0
    assert_same_run(straight, tmp_path / "run")


def test_a_finished_run_resumes_only_with_more_steps(model_folder, data, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(options(model_folder, data, output, "--steps", "1")) == 0
    assert main(["train", "dpo", "--resume", str(output)]) == 2
    assert "has done its 1 steps" in capsys.readouterr().err
    assert main(["train", "dpo", "--resume", str(output), "--steps", "2"]) == 0
    assert [r["step"] for r in metrics(output)] == [1, 2]
    assert main(["train", "ipo", "--resume", str(output), "--steps", "3"]) == 2
    assert "a run of dpo, not of ipo" in capsys.readouterr().err


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run ended or hung: {process.communicate(timeout=5)}")


def test_ctrl_c_leaves_a_checkpoint_that_resumes(model_folder, data, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "fastpo.cli", *options(model_folder, data, output, "--steps", "100000")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for_step(output, 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    line = errors.strip().splitlines()[-1]
    done = len(metrics(output))
    assert f"stopped after step {done}; to continue: fastpo train dpo --resume {output}" in line
    assert main(["train", "dpo", "--resume", str(output), "--steps", str(done + 2)]) == 0
    assert [r["step"] for r in metrics(output)] == list(range(1, done + 3))


def free_port() -> int:
    """Drawn from those that no system gives to connections by itself, as it is used long after it was found free."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return port


def launched(launcher: list[str], *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """What a launcher does with two processes."""
    command = [sys.executable, "-m", *launcher, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 or not check, done.stderr
    return done


def torchrun() -> list[str]:
    return ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]


def in_two_processes(arguments: list[str]) -> None:
    launched(torchrun(), "-m", "fastpo.cli", *arguments)


# A step sums over at most 160 tokens, and in another order each of six steps is off by that many roundings of fp32.
# Rewards are β = 0.1 times the difference of two sums of log-probs, of at most 40 nats.
TOLERANCE, REWARDS = 6 * 160 * 2**-24, 4.0


def assert_about_the_same_run(one: Path, other: Path) -> None:
    """The same metrics at every step and the same weights, up to the order of the sums."""
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        # an accuracy jumps where rounding decides a near tie
        smooth = [key for key in theirs if not key.endswith("accuracy")]
        near = pytest.approx({k: theirs[k] for k in smooth}, rel=TOLERANCE, abs=REWARDS * TOLERANCE)
        assert {k: ours[k] for k in smooth} == near
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        # weights are of the order of 1, and the optimiser's steps of the learning rate 1e-2
        assert float((weight - theirs[key]).double().norm()) <= TOLERANCE * float(theirs[key].double().norm()), key


def test_torchrun_does_what_one_process_does(straight, model_folder, data, tmp_path):
    output = tmp_path / "run"
    in_two_processes(options(model_folder, data, output, "--eval_data", data))
    assert_about_the_same_run(output, straight)


def test_another_reference(model_folder, data, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    other = tmp_path / "other"
    tokenizer.save_pretrained(other)
    tiny_model(len(tokenizer), seed=3).save_pretrained(other)
    output = tmp_path / "run"
    assert main(options(model_folder, data, output, "--steps", "1", "--reference", str(other))) == 0
    record = metrics(output)[0]
    assert abs(record["reward_margin"]) > 1e-3 and record["loss"] != pytest.approx(0.693147, abs=1e-4)


def test_trackers_get_the_metrics(model_folder, data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    more = ("--steps", "3", "--eval_data", data, "--tracker", "tensorboard")
    assert main(options(model_folder, data, output, *more)) == 0
    (folder,) = {file.parent for file in output.rglob("events.out.tfevents*") if file.parent.name == "fastpo"}
    events = EventAccumulator(str(folder)).Reload()
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for name in {key for record in records for key in record} - {"step"}:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        # tensorboard keeps fp32
        wanted = [(r["step"], pytest.approx(r[name], rel=2**-23)) for r in records if name in r]
        assert found == wanted, name


def test_the_data_are_read_once(straight, model_folder, tmp_path, capsys):
    """A file that vanishes in the middle of a run changes nothing, and at a resumption all that it was is needed."""
    rows = "".join(json.dumps(row) + "\n" for row in pairs(20))
    data, held_out, output = tmp_path / "pairs.jsonl", tmp_path / "held-out.jsonl", tmp_path / "run"
    for file in (data, held_out):
        file.write_text(rows)
    with before_step(2, lambda: (data.unlink(), held_out.write_text(""))):
        assert main(options(model_folder, str(data), output, "--eval_data", str(held_out))) == 0
    assert_same_run(straight, output)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    resume = ["train", "dpo", "--resume", str(output), "--steps", "8"]
    held_out.write_text(rows)
    for content, message in (
        (None, f"{data}: no such file"),
        ("", f"{data}: the file is empty"),
        (rows[:-20], f"{data}: cannot be read"),
        # cut between two rows, it is a file of data, and others than before
        ("".join(rows.splitlines(True)[:12]), "the data of the run have changed; put back those it was started with"),
    ):
        if content is not None:
            data.write_text(content)
        assert main(resume) == 2
        assert message in capsys.readouterr().err
        assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before
    data.write_text(rows)
    assert main(resume) == 0


def test_the_journal_of_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    journal = Journal(path, 1)
    journal.add(2, {"loss": 0.5})
    assert read_records(path) == journal.records == [{"step": 0}, {"step": 1}, {"step": 2, "loss": 0.5}]
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: is not JSON"):
        Journal(path, 2)
    path.unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read: No such file"):
        Journal(path, 2)


def test_bf16_trains(model_folder, data, tmp_path):
    output = tmp_path / "run"
    assert main(options(model_folder, data, output, "--precision", "bf16")) == 0
    records = metrics(output)
    assert records[0]["loss"] == pytest.approx(0.693147, abs=2e-2)
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(w.dtype == torch.float32 for w in weights(output).values())
