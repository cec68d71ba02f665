"""The examples that train on the built-in task."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fastpo import algorithms
from fastpo.cli import main

from .conftest import summary

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def new_algorithm(monkeypatch):
    monkeypatch.setattr(algorithms, "_ENTRIES", dict(algorithms._ENTRIES))
    spec = importlib.util.spec_from_file_location("new_algorithm", EXAMPLES / "new_algorithm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_algorithm_of_ones_own(new_algorithm, trained, capsys):
    lines = (EXAMPLES / "new_algorithm.py").read_text().splitlines()
    code = lines[lines.index("import sys") :]
    assert len([line for line in code if line.strip()]) < 40
    found = summary(trained("median_grpo", "--algorithm.beta", "0.01"))
    assert found["gain_after"] > 3 * found["gain_error_after"]
    assert main(["train", "median_grpo", "--algorithm.most", "0"]) == 2
    assert "most must be in (0, inf)" in capsys.readouterr().err


def test_a_name_is_given_once(new_algorithm):
    with pytest.raises(ValueError, match="there is an algorithm median_grpo already"):
        algorithms.register(new_algorithm.Recipe("median_grpo", "", "", "ppo", new_algorithm.median))
