"""Runs with a policy of S4 layers: fastpo train ... --model builtin:s4."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fastpo.cli import main
from fastpo.training import task

pytest.importorskip("accelerate")
pytestmark = [pytest.mark.usefixtures("threads"), pytest.mark.once]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The built-in task's reference, fitted for a third of the time: it adds, and then often adds wrongly."""
    folder = tmp_path_factory.mktemp("s4")
    patch = pytest.MonkeyPatch()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    patch.setattr(task, "FIT_STEPS", 320)
    patch.setattr(task, "CLEAN_STEPS", 240)
    losses = []
    task.build(folder, 0, lambda step, metrics: losses.append(metrics["loss"]), "s4")
    torch.set_num_threads(before)
    patch.undo()
    assert losses[239] < 0.1 < losses[0]
    return folder


@pytest.fixture
def run(reference, tmp_path, monkeypatch):
    def run(name, *more):
        monkeypatch.setattr(task, "build", lambda to, *_: shutil.copytree(reference, to, dirs_exist_ok=True))
        # as long as several steps, and drawn by other runs
        monkeypatch.setattr("fastpo.training.run.plot", lambda *_: None)
        folder = tmp_path / name
        command = ["train", name, "--model", "builtin:s4", "--output", str(folder), "--eval_every", "0", *more]
        assert main(command) == 0
        return folder, json.loads((folder / "summary.json").read_text())

    return run


def test_dpo(run):
    folder, found = run("dpo", "--steps", "24", "--optim.lr", "1e-3")
    assert found["accuracy_before"] < 0.4
    assert found["accuracy_after"] > found["accuracy_before"] + 0.2
    # what it leaves is loaded, and is of S4 layers
    model = task.load_model(str(folder / "model"))
    assert type(model).__name__ == "S4LanguageModel"
    first = task.load_model(str(folder / task.REFERENCE))
    changed = [
        name
        for (name, new), old in zip(model.named_parameters(), first.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert {"C", "B", "P", "A_real", "A_imag", "inv_dt"} <= {name.split(".")[-1] for name in changed}
    # and the run goes on
    assert main(["train", "dpo", "--resume", str(folder), "--steps", "26"]) == 0


def test_grpo(run):
    _, found = run("grpo", "--steps", "14", "--optim.lr", "1e-3", "--batch.tokens", "4096")
    assert found["accuracy_after"] > found["accuracy_before"] + 0.05
    assert found["reward_last"] > found["reward_first"]


def test_own_data(run, reference, tmp_path):
    """The same model from its folder, as any other of transformers."""
    rows = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a)} for a in range(1, 5) for b in range(1, 5)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", "dpo", "--model", str(reference / task.REFERENCE), "--data", str(data), "--steps", "2"]
    assert main([*command, "--output", str(tmp_path / "own")]) == 0
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "1+" * 8, "chosen": "1", "rejected": "2"}) + "\n")
    command[command.index(str(data))] = str(long)
    assert main([*command, "--output", str(tmp_path / "long")]) == 2


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["dpo", "--model", "builtin:s5"], "there is no such model, but builtin:llama and builtin:s4"),
        (["dpo", "--model", "builtin:s4", "--data", "x"], "is of the built-in task, which has its own data"),
        (["reward_model", "--model", "builtin:s4"], "reward_model trains no causal language model"),
        (["diffu_grpo", "--model", "builtin:s4"], "diffu_grpo trains no causal language model"),
        (["dpo", "--model", "builtin:s4", "--reference", "x"], "--reference, --aux and --eval_data need --model and"),
    ],
)
def test_errors(arguments, error, capsys):
    assert main(["train", *arguments]) == 2
    assert error in capsys.readouterr().err
