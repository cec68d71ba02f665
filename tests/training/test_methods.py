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
from fastpo.training.model import load_tokenizer
from fastpo.training.scorers import Sample, load_judge, load_scorer

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture
def trained(fitted, tmp_path, monkeypatch):
    """A short run; returns its summary and its folder."""
    folder, preferences = fitted

    def trained(name: str, *more: str) -> tuple[dict[str, float], Path]:
        monkeypatch.setattr(task, "build", lambda to, *_: shutil.copytree(folder, to, dirs_exist_ok=True))
        monkeypatch.setattr(task, "_preferences", lambda _, questions, __: preferences[len(questions)])
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


REWARD_MODELS = {row.name for row in algorithms.composed()} | {"autoregressive_reward"}
GIVEN = {*algorithms.names("pairwise", "unpaired")}


@pytest.mark.parametrize("name", sorted(GIVEN - LOWERS_BOTH - UNLEARNS - REWARD_MODELS))
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


def wrong_and_right(prompts: list[str]) -> tuple[list[Sample], list[Sample]]:
    """The right answer to each prompt, and one that is not."""
    sides = []
    for texts in (map(task.answer, prompts), (str((int(task.answer(p)) + 17) % 39) for p in prompts)):
        given = zip(prompts, texts, strict=True)
        sides.append([Sample(p, t, task._ids(p), [*task._ids(t), task.EOS], True, {}) for p, t in given])
    return sides[1], sides[0]


def test_a_reward_model_ranks_held_out_pairs(trained):
    """And serves as a reward and as a judge."""
    summary, run = trained("reward_model")
    assert 0.35 < summary["reward_accuracy_before"] < 0.65 and summary["reward_accuracy_after"] > 0.75
    wrong, right = wrong_and_right(task.prompts(0)[1])
    tokenizer = load_tokenizer(str(run / "model"))
    scorer = load_scorer([str(run / "model")], tokenizer)
    better = [r > w for r, w in zip(scorer(right), scorer(wrong), strict=True)]
    assert sum(better) / len(better) > 0.75
    assert sum(load_judge([str(run / "model")], tokenizer)(right, wrong)) / len(right) > 0.65
    held_out = [json.loads(line)["prompt"] for line in (run / task.HELD_OUT).read_text().splitlines()]
    assert {*held_out} <= {*task.prompts(0)[1]}


def test_reactions_are_predicted(trained):
    summary, run = trained("reaction_model")
    assert summary["reward_accuracy_before"] < 0.65 and summary["reward_accuracy_after"] > 0.75
    wrong, right = wrong_and_right(task.prompts(0)[1])
    scorer = load_scorer([str(run / "model")], load_tokenizer(str(run / "model")))
    chances = [sum(scorer(samples)) / len(samples) for samples in (right, wrong)]
    assert 0.6 < chances[0] < 1 and 0 < chances[1] < 0.4


def test_annotators_are_told_apart(trained):
    """Two reward models, of which one learns what the contrary ones prefer."""
    summary, run = trained("maxmin")
    assert summary["reward_accuracy_before"] < 0.65 and summary["reward_accuracy_after"] > 0.75
    groups = json.loads((run / "model" / "annotators.json").read_text())
    contrary = {groups[f"annotator {who}"] for who in task.CONTRARY}
    others = {groups[f"annotator {who}"] for who in range(task.ANNOTATORS) if who not in task.CONTRARY}
    assert len(contrary) == len(others) == 1 and contrary != others
    wrong, right = wrong_and_right(task.prompts(0)[1])
    tokenizer = load_tokenizer(str(run / "model" / "0"))
    scorer = load_scorer([str(run / "model" / str(u)) for u in (0, 1)], tokenizer, how="min")
    better = {}
    for name in ("0", "1"):
        ours, theirs = scorer.each(right)[name], scorer.each(wrong)[name]
        better[name] = sum(r > w for r, w in zip(ours, theirs, strict=True)) / len(right)
    assert better[str(*others)] > 0.7 and better[str(*contrary)] < 0.3


def test_an_autoregressive_reward_ranks_held_out_answers(trained):
    summary, run = trained("autoregressive_reward")
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.15
    wrong, right = wrong_and_right(task.prompts(0)[1])
    scorer = load_scorer([str(run / "model")], load_tokenizer(str(run / "model")))
    better = [r > w for r, w in zip(scorer(right), scorer(wrong), strict=True)]
    assert sum(better) / len(better) > 0.8
