"""What some runs on given data leave behind beside a policy that is more often right: reward models, and flows.

That they learn it is tested where every algorithm is. What is called most of something is over a half by three
binomial errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastpo.training import task
from fastpo.training.model import load_tokenizer
from fastpo.training.scorers import Sample, load_judge, load_scorer

pytest.importorskip("accelerate")


def metrics(run: Path) -> list[dict[str, float]]:
    """Of the steps."""
    return [record for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if record["step"]]


def wrong_and_right(prompts: list[str]) -> tuple[list[Sample], list[Sample]]:
    """The right answer to each prompt, and one that is not."""
    sides = []
    for texts in (map(task.answer, prompts), (str((int(task.answer(p)) + 17) % 39) for p in prompts)):
        given = zip(prompts, texts, strict=True)
        sides.append([Sample(p, t, task._ids(p), [*task._ids(t), task.EOS], True, {}) for p, t in given])
    return sides[1], sides[0]


def mostly(of: Sequence[float]) -> bool:
    return sum(of) / len(of) > 0.5 + 3 * (0.25 / len(of)) ** 0.5


def test_a_reward_model_is_a_reward_and_a_judge(trained):
    run = trained("reward_model")
    wrong, right = wrong_and_right(task.prompts(0)[1])
    tokenizer = load_tokenizer(str(run / "model"))
    scorer = load_scorer([str(run / "model")], tokenizer)
    better = [r > w for r, w in zip(scorer(right), scorer(wrong), strict=True)]
    assert mostly(better) and mostly(load_judge([str(run / "model")], tokenizer)(right, wrong))
    held_out = [json.loads(line)["prompt"] for line in (run / task.HELD_OUT).read_text().splitlines()]
    assert {*held_out} <= {*task.prompts(0)[1]}


def test_reactions_are_predicted(trained):
    """As probabilities, above a half of what is liked and below of what is not."""
    run = trained("reaction_model")
    wrong, right = wrong_and_right(task.prompts(0)[1])
    scorer = load_scorer([str(run / "model")], load_tokenizer(str(run / "model")))
    likes, dislikes = scorer(right), [1 - chance for chance in scorer(wrong)]
    assert all(0 < chance < 1 for chance in (*likes, *dislikes))
    assert mostly(likes) and mostly(dislikes)


def test_annotators_are_told_apart(trained):
    """Two reward models, of which one learns what the contrary ones prefer."""
    run = trained("maxmin")
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
        better[name] = [r > w for r, w in zip(ours, theirs, strict=True)]
    assert mostly(better[str(*others)]) and mostly([not right for right in better[str(*contrary)]])


def test_an_autoregressive_reward_ranks_held_out_answers(trained):
    run = trained("autoregressive_reward")
    wrong, right = wrong_and_right(task.prompts(0)[1])
    scorer = load_scorer([str(run / "model")], load_tokenizer(str(run / "model")))
    assert mostly([r > w for r, w in zip(scorer(right), scorer(wrong), strict=True)])


def test_flows_learn_the_mean_of_the_rewards(trained):
    """log Z grows towards the logarithm of the mean of e^5 for a right answer and of less for the others, about 3."""
    run = trained("detailed_balance")
    assert metrics(run)[0]["log_z"] == 0 and 1.5 < metrics(run)[-1]["log_z"] < 3.5


def test_what_is_unlearned_is_wrong(trained):
    run = trained("npo", "--steps", "1")
    rows = [json.loads(line) for line in (run / task.DATA["unpaired"]).read_text().splitlines()]
    assert all(task.answer(row["prompt"]) != row["completion"] and row["label"] is False for row in rows)
