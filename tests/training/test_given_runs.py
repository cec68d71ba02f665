"""Whole runs on lists, demonstrations and decisions: resumed, on two processes, and what they leave behind."""

from __future__ import annotations

import json

import pytest

from fastpo import algorithms
from fastpo.cli import main

from .test_loop import given_rows
from .test_run import assert_about_the_same_run, assert_same_run, in_two_processes, metrics, options, weights

pytest.importorskip("accelerate")


@pytest.fixture
def given(tmp_path, model_folder):
    """The options of a run of six steps on data of the algorithm's kind, measured on the same."""

    def given(name: str, output: str, *more: str) -> list[str]:
        data = tmp_path / f"{name}.jsonl"
        rows = given_rows(algorithms.build(name, {}), 20)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        more = ("--eval_data", str(data), "--optim.lr", "1e-3", *more)
        return options(model_folder, str(data), tmp_path / output, *more, name=name)

    return given


def test_what_is_learnt_beside_the_policy_is_resumed_and_not_exported(given, tmp_path):
    schedule = ("--optim.schedule", "constant", "--optim.warmup", "0", "--eval_every", "3")
    assert main(given("trajectory_balance", "straight", *schedule)) == 0
    assert main(given("trajectory_balance", "parts", *schedule, "--steps", "3")) == 0
    assert main(["train", "gflownet", "--resume", str(tmp_path / "parts"), "--steps", "6"]) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    records = metrics(tmp_path / "straight")
    assert records[1]["log_z"] == 0 != records[-1]["log_z"]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "model")
    # beside the name of their folder
    exported = {name.removeprefix("model.") for name in weights(tmp_path / "straight")}
    assert exported <= model.state_dict().keys()


# token means and a head of its own; lists of different lengths; all decisions of a step at once
@pytest.mark.parametrize("name", ["awr", "lipo_lambda", "regret"])
def test_two_processes_do_what_one_does(name, given, tmp_path):
    assert main(given(name, "one")) == 0
    in_two_processes(given(name, "two"))
    assert_about_the_same_run(tmp_path / "two", tmp_path / "one")
    first = (metrics(tmp_path / run)[1] for run in ("one", "two"))
    norms = [record["grad_norm"] for record in first]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
