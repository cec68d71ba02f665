"""Every objective on given data, as `fastpo train NAME` on the built-in task, from one fitted reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastpo import algorithms
from fastpo.cli import main
from fastpo.training import task
from fastpo.training.config import built_in_defaults

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture
def trained(fitted, tmp_path, monkeypatch):
    """A short run; returns its summary and its folder."""
    folder, preferences = fitted

    def trained(name: str, *more: str) -> tuple[dict[str, float], Path]:
        monkeypatch.setattr(task, "build", lambda to, *_: shutil.copytree(folder, to, dirs_exist_ok=True))
        monkeypatch.setattr(task, "_preferences", lambda *_: preferences)
        run = tmp_path / "run"
        # a fifth of the steps at five times the rate
        rate = 5 * built_in_defaults(name)["optim.lr"]
        command = ["train", name, "--output", str(run), "--steps", "40", "--optim.lr", str(rate)]
        assert main([*command, "--eval_every", "0", "--batch.tokens", "1024", *more]) == 0
        return json.loads((run / "summary.json").read_text()), run

    return trained


# it knows nothing of right answers
UNLEARNS = {"npo"}
# its minimum is where both answers are impossible: for data whose chosen answers are worse than the policy's
LOWERS_BOTH = {"apo_down"}


@pytest.mark.parametrize("name", sorted({*algorithms.names("pairwise", "unpaired")} - LOWERS_BOTH - UNLEARNS))
def test_accuracy_improves(name, trained):
    summary, _ = trained(name)
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.15


@pytest.mark.parametrize("name", sorted(LOWERS_BOTH))
def test_both_answers_fall_and_the_wrong_one_further(name, trained):
    summary, run = trained(name)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["rejected_reward"] < last["chosen_reward"] - 0.5 < -1.5
    assert summary["loss_last"] < summary["loss_first"] - 0.2
    # what is chosen here is right
    assert summary["accuracy_after"] < summary["accuracy_before"]


@pytest.mark.parametrize("name", sorted(UNLEARNS))
def test_wrong_answers_are_unlearned(name, trained):
    """Their rewards fall, and little else changes: the policy stays near the reference, and right answers gain."""
    summary, run = trained(name)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["rejected_reward"] < -0.5 and summary["kl"] < 0.3
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.05
    rows = map(json.loads, (run / task.DATA["unpaired"]).read_text().splitlines())
    assert all(task.answer(row["prompt"]) != row["completion"] and row["label"] is False for row in rows)
