"""What needs a GPU is tried here on the CPU, so that it does not fail there for a slip of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kernel", ["linear_divergence", "linear_logprobs", "objective", "policy", "token_logprobs"])
def test_the_tests(kernel):
    command = ("-m", "pytest", "-q", "-k", "TestDevice and not split", f"tests/gpu/test_{kernel}.py")
    out = run(*command, FASTPO_TEST_DEVICE="cpu")
    assert out.returncode == 0, out.stdout[-3000:]
    assert " passed" in out.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they run")
def test_without_a_device_they_are_not_collected():
    out = run("-m", "pytest", "-q", "tests/gpu")
    assert "no tests ran" in out.stdout


def test_the_benchmark(tmp_path):
    # what torch compiles says nothing of the script, and takes two minutes
    command = ("benchmarks/gpu.py", "--device", "cpu", "--small", "--output", str(tmp_path))
    out = run(*command, TORCH_COMPILE_DISABLE="1")
    assert out.returncode == 0, out.stderr[-3000:]
    report = json.loads((tmp_path / "gpu-none.json").read_text())
    assert len(report["cases"]) == 21
    for case in report["cases"]:
        assert case["providers"]["fastpo"]["status"] == case["providers"]["eager"]["status"] == "ok"
        assert case["providers"]["fastpo"]["seconds"]["median"] > 0
    assert (tmp_path / "gpu-none.png").exists()
    assert report["environment"]["rates"]["copy_gb_per_s"] > 0
