"""What is said before a run that samples begins, or while it goes on, if something is not as it must be."""

from __future__ import annotations

import json

import pytest

from fastpo.cli import main

from .conftest import pairs

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")

REWARDS = """
def one(completions, **_):
    return [1.0] * len(completions)

def raises(completions, **_):
    raise ZeroDivisionError("no completion is good enough")

def nan(completions, **_):
    return [float("nan")] * len(completions)

def short(completions, **_):
    return [1.0]

def sometimes(completions, **_):
    return [float(len(text)) if i % 2 else None for i, text in enumerate(completions)]
"""


@pytest.fixture
def fails(model_folder, write, tmp_path, capsys):
    """What a run says on stderr, which must not begin or must end with code 2; {F} is the file of rewards."""
    data = write(pairs(8))
    (tmp_path / "rewards.py").write_text(REWARDS)

    def fails(name: str, *more: str) -> str:
        options = [word.replace("{F}", str(tmp_path / "rewards.py")) for word in more]
        command = ["train", name, "--model", str(model_folder), "--data", data, "--output", str(tmp_path / "run")]
        short = ["--steps", "2", "--batch.size", "2", "--rollout.max_new_tokens", "4", "--max_length", "64"]
        assert main([*command, *short, "--optim.lr", "1e-3", *options]) == 2
        return capsys.readouterr().err

    return fails


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("grpo", (), "--reward.of: grpo needs a function (FILE.py:NAME) or a reward model"),
        ("online_dpo", (), "--reward.judge: online_dpo needs a judge, or rewards (--reward.of) to make one of"),
        ("grpo", ("--reward.of", "{F}:none"), "there is no function none (there are: nan, one, raises,"),
        ("grpo", ("--reward.of", "{F}:raises"), "no completion is good enough"),
        ("grpo", ("--reward.of", "{F}:nan"), "rewards.py:nan"),
        ("grpo", ("--reward.of", "{F}:short"), "rewards.py:short"),
        (
            "online_dpo",
            ("--reward.of", "{F}:one", "--reward.unscored", "skip"),
            "compares completions by their rewards",
        ),
        ("meta_po", ("--reward.of", "{F}:one"), "one object with version, refine, state_dict and load_state_dict"),
        ("rto", ("--reward.of", "{F}:one"), "rto needs --aux, a further model"),
        ("grpo", ("--reward.of", "{F}:one", "--aux", "x"), "--aux: grpo asks no further model"),
        ("grpo", ("--reward.of", "{F}:one", "--rollout.max_new_tokens", "60"), "is more than --max_length 64"),
        ("grpo", ("--reward.of", "{F}:one", "--rollout.top_p", "0"), "--rollout.top_p must be in (0, 1]"),
        ("grpo", ("--reward.of", "{F}:one", "--rollout.temperature", "0"), "--rollout.temperature must be positive"),
        ("nash_md", ("--reward.of", "{F}:one", "--rollout.engine", "vllm"), "nash_md also samples from the mixture"),
        ("nash_ema", ("--reward.of", "{F}:one", "--lora.rank", "2"), "has a model that follows all weights"),
        ("dpo", ("--algorithm.beta", "0"), "beta must be in (0, inf)"),
    ],
)
def test_what_makes_no_run(name, more, says, fails):
    assert says in fails(name, *more)


def run(name, model_folder, data, output, *more):
    command = ["train", name, "--model", str(model_folder), "--data", data, "--output", str(output), "--steps", "3"]
    more = ("--batch.size", "4", "--optim.lr", "1e-2", "--rollout.max_new_tokens", "5", "--max_length", "64", *more)
    assert main([*command, "--algorithm.samples", "4", *more]) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines() if '"step": 0' not in line]


def test_equal_rewards_teach_nothing_and_are_said_to_be(model_folder, write, tmp_path):
    """GRPO takes steps without a gradient, DAPO looks for other prompts and then takes none."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    one = ("--reward.of", f"{tmp_path}/rewards.py:one", "--algorithm.beta", "0")
    for record in run("grpo", model_folder, write(pairs(8)), tmp_path / "grpo", *one):
        assert record["same_reward"] == 1 and record["reward_std"] == 0 and record["grad_norm"] == 0
    for record in run("dapo", model_folder, write(pairs(8)), tmp_path / "dapo", *one[:2]):
        assert record["examples"] == 0 and record["tokens"] == 0 and "loss" not in record


def test_completions_without_a_reward_may_be_left_out(model_folder, write, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    more = ("--reward.of", f"{tmp_path}/rewards.py:sometimes", "--reward.unscored", "skip")
    for record in run("grpo", model_folder, write(pairs(8)), tmp_path / "run", *more):
        assert record["examples"] == 8 and record["reward"] > 0
