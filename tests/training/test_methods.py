"""Every objective on given data, as `fastpo train NAME` on the built-in task, from one fitted reference."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

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
    folder, answers = fitted

    def trained(name: str, *more: str, shuffle: bool = False) -> tuple[dict[str, float], Path]:
        monkeypatch.setattr(task, "build", lambda to, *_: shutil.copytree(folder, to, dirs_exist_ok=True))
        monkeypatch.setattr(task, "_answers", lambda _, questions, __: answers[len(questions)])
        if shuffle:
            write = task.write_rows
            monkeypatch.setattr(task, "write_rows", lambda path, rows: write(path, shuffled(rows)))
        run = tmp_path / "run"
        # a fifth of the steps at five times the rate
        rate = 5 * built_in_defaults(name)["optim.lr"]
        command = ["train", name, "--output", str(run), "--steps", "40", "--optim.lr", str(rate)]
        assert main([*command, "--eval_every", "0", "--batch.tokens", "1024", *more]) == 0
        return json.loads((run / "summary.json").read_text()), run

    return trained


def shuffled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same answers, of which other ones are called good; demonstrations without a word are those of others."""
    rng, told = random.Random(5), {"reward", "log_reward", "answer"} & rows[0].keys()
    for column in told or {"completion"} & rows[0].keys():
        for row, other in zip(rows, rng.sample([row[column] for row in rows], len(rows)), strict=True):
            row[column] = other
    for row in rows:
        for values in (row.get("scores", []), row.get("ranks", []), *row.get("losses", [])):
            rng.shuffle(values)
        if "chosen" in row and rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def metrics(run: Path) -> list[dict[str, float]]:
    """Of the steps."""
    return [record for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if record["step"]]


# it knows nothing of right answers
UNLEARNS = {"npo"}
# its minimum is where both answers are impossible: for data whose chosen answers are worse than the policy's
LOWERS_BOTH = {"apo_down"}
# flows learn from the end of an answer to its beginning, a token at a time, and what the data lack holds none of them
# down; forward-looking ones are told earlier
BALANCES = {"detailed_balance", "fl_detailed_balance"}
# it ranks first characters
RANKS = {"first_ranknet"}


REWARD_MODELS = {row.name for row in algorithms.composed()} | {"autoregressive_reward"}
GIVEN = {name for name in algorithms.names() if algorithms.kind(name) != "prompts"}


@pytest.mark.parametrize("name", sorted(GIVEN - LOWERS_BOTH - UNLEARNS - REWARD_MODELS - BALANCES - RANKS))
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


@pytest.mark.parametrize("name", sorted(BALANCES))
def test_flows_come_into_balance(name, trained):
    """log Z grows towards the logarithm of the mean of e^5 for a right answer and of less for the others, about 3."""
    summary, run = trained(name)
    assert summary["loss_last"] < 0.75 * summary["loss_first"]
    assert metrics(run)[0]["log_z"] == 0 and 1.5 < metrics(run)[-1]["log_z"] < 3.5


def test_flows_that_look_forward_find_right_answers(trained):
    """With some more and smaller steps."""
    summary, _ = trained("fl_detailed_balance", "--steps", "80", "--optim.lr", "4e-4")
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.08


def test_identifiers_are_ranked(trained):
    """The first character of the right answer is more and more likely beside the others; not so if any may be first."""
    _, run = trained("first_ranknet")
    first, last = metrics(run)[0], metrics(run)[-1]
    assert last["reward_margin"] > first["reward_margin"] + 3 and last["reward_accuracy"] > 0.95


# one method for each kind of data and of what they are told
@pytest.mark.parametrize(
    "name",
    [
        *("lipo_lambda", "first_ranknet", "sft", "rwr", "conditional_training", "chain_of_hindsight", "tl_training"),
        *("regret", "trajectory_balance"),
    ],
)
def test_nothing_is_learnt_from_data_that_say_nothing(name, trained):
    summary, _ = trained(name, shuffle=True)
    assert summary["accuracy_after"] < summary["accuracy_before"] + 0.1
