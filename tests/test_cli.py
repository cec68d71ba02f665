"""The command line: help, tables, precedence of options, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from fastpo import algorithms, cli, losses
from fastpo.algorithms.given import ROWS
from fastpo.reference import objectives
from fastpo.reference.listwise import list_objectives
from fastpo.reference.policy import policies

from .training.conftest import (  # noqa: F401
    character_tokenizer,
    fresh_accelerate,
    model_folder,
    pairs,
    tiny_model,
    write,
)

pytest.importorskip("jsonargparse")
pytest.importorskip("accelerate")


@pytest.fixture
def fails(capsys):
    """Run a command that must end with exit code 2 and one line on stderr; returns the line."""

    def fails(*argv: str) -> str:
        assert cli.main([str(a) for a in argv]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("fastpo: ") and "Traceback" not in lines[0]
        return lines[0]

    return fails


@pytest.fixture
def train(model_folder, write, tmp_path):  # noqa: F811
    """Arguments of a training run that would work."""

    def train(*more: str, rows=None) -> list[str]:
        data = write(pairs(8) if rows is None else rows)
        output = tmp_path / "run"
        return ["train", "dpo", "--model", str(model_folder), "--data", data, "--output", str(output), *more]

    return train


@pytest.mark.parametrize("argv", [["--help"], ["info", "--help"], ["algorithms", "--help"], ["train", "--help"]])
def test_help(argv, capsys):
    try:
        assert cli.main(argv) == 0
    except SystemExit as stop:
        assert stop.code == 0
    assert "usage: fastpo" in capsys.readouterr().out


def test_help_of_an_algorithm_names_its_options_without_importing_transformers():
    code = (
        "import sys; from fastpo.cli import main\n"
        "try: main(['train', 'robust_dpo', '--help'])\n"
        "finally: sys.exit(len({'transformers', 'accelerate', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for text in ("--algorithm.label_smoothing", "in [0, 0.5)", "--optim.lr", "peak learning rate", "--resume"):
        assert text in done.stdout


def test_algorithms_prints_every_row(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["algorithms"]) == 0
    table = capsys.readouterr().out
    assert cli.main(["algorithms", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = printed["objectives"]
    known = (*objectives(), *algorithms.composed(), *policies(), *list_objectives(), *ROWS.values())
    assert [row["name"] for row in rows] == [row.name for row in known]
    assert len({frozenset(row) for row in rows}) == 1
    assert all(row["name"] in table and row["paper"] in table for row in rows)
    for column in ("name", "data", "models", "defaults", "theory", "source"):
        assert column in table.splitlines()[0]
    by_name = {row["name"]: row for row in rows}
    trained = {row["name"]: row for row in printed["algorithms"]}
    assert [*trained] == algorithms.names() and all(name in table for name in trained)
    # of what is no row of the registry, the functions themselves
    assert all(loss in by_name or callable(getattr(losses, loss)) for row in trained.values() for loss in row["losses"])
    assert trained["rloo"]["losses"] == ["reinforce"] and trained["dpo"]["losses"] == ["dpo"]
    assert (trained["online_dpo"]["data"], trained["lipo_pair"]["data"]) == ("prompts", "lists")
    assert by_name["odpo"]["columns"] == ["chosen_score", "rejected_score"]
    assert (by_name["kto"]["data"], by_name["spin"]["data"]) == ("single completions", "pairs of the policy")
    assert by_name["maxmin"]["columns"] == ["margin", "annotator"] and by_name["maxmin"]["models"] == ["reward"]
    assert by_name["simpo"]["models"] == ["policy"] and by_name["kto"]["models"] == ["policy", "reference"]
    grpo, dapo = by_name["grpo"], by_name["dapo"]
    assert (grpo["data"], grpo["theory"], grpo["models"]) == ("rollouts", "gibbs", ["policy", "reference"])
    assert grpo["defaults"] == {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": "inf", "beta": 0.04}
    assert dapo["models"] == ["policy"]
    assert (dapo["options"]["aggregation"][0], dapo["options"]["kl"][0]) == ("token_mean", "k3")
    brain, pair = by_name["brain"], by_name["lipo_pair"]
    assert (brain["data"], brain["models"], brain["defaults"]) == ("lists", ["policy", "proposal", "prior"], {})
    assert pair["options"]["loss"][0] == "logistic" and list(pair["inputs"]) == ["labels"]
    assert pair["columns"] == ["labels"] and brain["columns"] == ["rewards", "proposal_logprobs"]
    sft, hindsight = by_name["sft"], by_name["chain_of_hindsight"]
    assert (sft["data"], sft["models"], sft["options"]["average"][0]) == ("demonstrations", ["policy"], "token_mean")
    assert (hindsight["data"], hindsight["defaults"]["good"]) == ("pairs or lists", " A good answer: ")
    assert by_name["value_clip"]["models"] == ["critic"] and "beta" not in by_name["value_clip"]["defaults"]


@pytest.mark.parametrize("alias", algorithms.ALIASES)
def test_other_names_are_understood(alias, capsys):
    assert alias not in algorithms.names() and algorithms.ALIASES[alias] in algorithms.names()
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", alias, "--help"])
    assert stop.value.code == 0
    assert f"fastpo train {algorithms.ALIASES[alias]}" in capsys.readouterr().out


def test_info_prints_the_report(capsys):
    assert cli.main(["info"]) == 0
    assert "token_logprobs" in capsys.readouterr().out


def test_command_line_wins_over_yaml_wins_over_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"steps": 7, "optim": {"lr": 0.5}, "algorithm": {"beta": 0.7}}))
    hyper, config, resume = cli._parse("dpo", ["--config", str(path), "--optim.lr", "0.25"])
    assert hyper == {"beta": 0.7} and resume is None
    assert (config.steps, config.optim.lr) == (7, 0.25)
    # the built-in task's defaults, and the generic ones
    assert (config.batch.size, config.optim.schedule) == (64, "linear")
    generic = cli._parse("dpo", ["--model", "m", "--data", "d"])
    assert (generic[0]["beta"], generic[1].optim.lr, generic[1].batch.size) == (0.1, 1e-6, 32)


def test_command_line_wins_over_a_preset():
    _, task, _ = cli._parse("dpo", [])
    _, short, _ = cli._parse("dpo", ["--preset", "ci"])
    _, given, _ = cli._parse("dpo", ["--preset", "ci", "--steps", "3"])
    assert short.steps < task.steps and short.optim.lr > task.optim.lr and short.eval_every == 0
    assert (given.steps, given.optim.lr) == (3, short.optim.lr)
    assert cli._parse("dpo", ["--preset", "task"])[1] == task


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_takes_its_hyper_parameters(name):
    hyper, _, _ = cli._parse(name, ["--model", "m", "--data", "d"])
    assert hyper == algorithms.defaults(name)


def test_words_are_chosen_from_those_that_the_loss_knows(fails):
    hyper, _, _ = cli._parse("f_dpo", ["--model", "m", "--data", "d", "--algorithm.divergence", "jsd"])
    assert hyper["divergence"] == "jsd" and hyper["convention"] is None
    assert "divergence" in fails("train", "f_dpo", "--algorithm.divergence", "hellinger")
    hyper, _, _ = cli._parse("beta_dpo", ["--algorithm.kept", "0.5"])
    assert hyper == {"beta": 1.0, "alpha": 0.6, "kept": 0.5, "decay": 0.9}
    assert "kept must be in (0, 1] for beta_dpo, got 2" in fails("train", "beta_dpo", "--algorithm.kept", "2")


def test_data_of_another_kind(train, fails):
    argv = train()
    argv[1] = "odpo"
    assert 'data.jsonl, row 1: there is no "chosen_score"' in fails(*argv)
    argv = train(rows=[{"prompt": "a", "completion": "b", "label": 3}])
    argv[1] = "kto"
    assert 'data.jsonl, row 1: "label" must be true or false, got 3' in fails(*argv)
    argv[1] = "simpo"
    assert "--reference: simpo has no reference model" in fails(*argv, "--reference", "m")


def test_unknown_algorithm_suggests_the_nearest(fails):
    assert "there is no algorithm 'robustdpo', did you mean robust_dpo?" in fails("train", "robustdpo")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optim.lrr", "1"], "did you mean optim.lr?"),
        (["--optim.lr", "much"], "optim.lr"),
        (["--optim.schedule", "zigzag"], "zigzag"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--algorithm.beta", "0"], "--algorithm.beta must be in (0, inf) for dpo, got 0"),
        (["--optim.lr", "-1"], "--optim.lr must be positive, got -1"),
        (["--optim.warmup", "1"], "--optim.warmup must be in [0, 1), got 1"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--resume", "nowhere"], "nowhere: there is no run in this folder"),
        (["--batch.tokens", "20"], "tokens, which is more than --batch.tokens 20"),
        (["--max_length", "2"], "row 1: the prompt has"),
        (["--eval_data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data", "pairs.csv"], "pairs.csv: no such file"),
        (["--model", "./nowhere"], "./nowhere: cannot be loaded"),
        (["--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
    ],
)
def test_bad_options_are_one_line(more, message, train, fails, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message in fails(*train(*more))


def test_unknown_key_in_yaml(tmp_path, train, fails):
    path = tmp_path / "config.yaml"
    path.write_text("optim:\n  learning_rate: 1\n")
    assert "learning_rate" in fails(*train("--config", str(path)))


def test_label_smoothing_outside_its_domain(fails):
    assert "label_smoothing must be in [0, 0.5) for cdpo" in fails("train", "cdpo", "--algorithm.label_smoothing", ".5")


def test_bad_data_is_one_line(train, fails, tmp_path):
    assert "data.jsonl: the file is empty" in fails(*train(rows=[]))
    assert 'data.jsonl, row 1: there is no "rejected"' in fails(*train(rows=[{"prompt": "a", "chosen": "b"}]))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", \n')
    assert "broken.jsonl: cannot be read" in fails(*train("--data", str(broken)))
    assert "must end in .jsonl, .json, .parquet" in fails(*train("--data", __file__))


def test_model_and_data_need_each_other(fails):
    assert "--model needs --data" in fails("train", "dpo", "--model", "m")
    assert "--data needs --model" in fails("train", "dpo", "--data", "d.jsonl")
    assert "need --model and --data" in fails("train", "dpo", "--reference", "m")
    assert "--preset is of the built-in task" in fails("train", "dpo", "--preset", "ci", "--model", "m", "--data", "d")
    assert "--preset" in fails("train", "dpo", "--preset", "long")


def test_tokenizer_without_eos(train, fails, tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    assert "the tokenizer has no EOS token" in fails(*train("--model", str(tmp_path / "model")))


def test_reference_with_another_vocabulary(train, fails, tmp_path):
    tokenizer = character_tokenizer("zyx", eos_token="[E]", bos_token="[B]")
    tokenizer.save_pretrained(tmp_path / "other")
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "other")
    line = fails(*train("--reference", str(tmp_path / "other")))
    assert "the reference has another vocabulary than" in line and "(5 and 44 tokens" in line


def test_sequences_longer_than_the_model_takes(train, fails):
    rows = [{"prompt": "a" * 120, "chosen": "b" * 20, "rejected": "c"}]
    assert "the model takes 128 tokens, but a sequence has 141" in fails(*train(rows=rows))


def test_a_folder_that_holds_a_run_is_not_overwritten(train, fails, tmp_path):
    assert cli.main(train("--steps", "1")) == 0
    assert "holds a run already" in fails(*train("--steps", "1"))


def test_missing_extra(fails, monkeypatch):
    monkeypatch.setattr(cli, "TRAIN_PACKAGES", ("torch", "no_such_package"))
    assert 'no_such_package is not installed: pip install "fastpo[train]"' in fails("train", "dpo")


def test_nothing_to_resume(fails, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "there is no run of dpo under runs/" in fails("train", "dpo", "--resume")
