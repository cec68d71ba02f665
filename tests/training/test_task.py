"""The built-in task, in its parts and from end to end."""

from __future__ import annotations

import json

import pytest
import torch

from fastpo.cli import main
from fastpo.training import task

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")


class Adder(torch.nn.Module):
    """Answers rightly, always."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.wrong = wrong

    def forward(self, input_ids, **_):
        logits = torch.full((*input_ids.shape, task.EOS + 1), -30.0)
        for row, ids in enumerate(input_ids.tolist()):
            question, _, _ = "".join((*task.CHARACTERS, "")[i] for i in ids).partition("=")
            right = [task.CHARACTERS.index(c) for c in self.wrong or task.answer(question + "=")]
            first = len(question)
            for i, token in enumerate([*right, task.EOS]):
                if first + i < len(ids):
                    logits[row, first + i, token] = 0
        return type("Output", (), {"logits": logits})


def test_the_prompts_are_all_sums_and_a_fifth_is_held_out():
    train, held_out = task.prompts(0)
    assert len(train) == 320 and len(held_out) == 80 and len({*train, *held_out}) == 400
    assert task.prompts(1)[1] != held_out
    assert (task.answer("7+5="), task.answer("19+19=")) == ("12", "38")


def test_the_verifier_scores_samples():
    found = task.evaluate(Adder(), Adder(), 0)
    assert found == {"accuracy": 1.0, "kl": pytest.approx(0, abs=1e-6), "gain": 0, "gain_error": 0}
    assert task.evaluate(Adder("100"), Adder("100"), 0)["accuracy"] == 0


def test_the_gain_is_paired_by_prompt():
    """Who is always right against who answers 12: alone, each prompt differs by 0 or 1."""
    twelve = [task.answer(prompt) == "12" for prompt in task.prompts(0)[1]]
    found = task.evaluate(Adder(), Adder("12"), 0)
    share = 1 - sum(twelve) / len(twelve)
    assert 0 < share < 1 and found["accuracy"] == 1 and found["gain"] == pytest.approx(share)
    assert found["gain_error"] == pytest.approx((share * (1 - share) / (len(twelve) - 1)) ** 0.5)


def test_the_kl_is_exact():
    """A policy that is certain where the reference gives every character the same chance."""

    class Uniform(Adder):
        def forward(self, input_ids, **_):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, task.EOS + 1)})

    found = task.evaluate(Adder(), Uniform(), 0)["kl"]
    tokens = [len(task.answer(prompt)) + 1 for prompt in task.prompts(0)[1]]
    expected = torch.log(torch.tensor(task.EOS + 1.0)) * sum(tokens) / len(tokens)
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_fastpo_train_dpo(tmp_path, monkeypatch, capsys):
    """What a newcomer types, and a resumed step more."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "dpo"]) == 0
    run = tmp_path / "runs" / "dpo"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.25
    assert summary["reward_accuracy_last"] > 0.9
    assert 0 < summary["kl"] < 3
    printed = capsys.readouterr().out
    for text in ("accuracy  ", "KL  ", "tokens/s", "metrics.jsonl", "curve.png", "checkpoints", "summary.json"):
        assert text in printed
    pairs = list(map(json.loads, (run / "task" / "pairs.jsonl").read_text().splitlines()))
    assert all(task.answer(p["prompt"]) == p["chosen"] != p["rejected"] for p in pairs)
    assert not {p["prompt"] for p in pairs} & {*task.prompts(0)[1]}

    assert main(["train", "dpo", "--resume", "--steps", "201"]) == 0
    resumed = json.loads((run / "summary.json").read_text())
    assert resumed["steps"] == 201 and resumed["accuracy_before"] == summary["accuracy_before"]
