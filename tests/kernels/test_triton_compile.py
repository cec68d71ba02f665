"""What the Triton kernels become on GPUs that need not be here: registers, vector loads and stores, shared memory.

None of it says how fast they are, but each of these has to hold for them to be fast.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia")
pytest.importorskip("triton.backends.amd")

ROOT = Path(__file__).parents[2]
# without asking for more than a program has by default
SHARED = {"sm": 48 << 10, "gfx942": 64 << 10}


@pytest.fixture(scope="module")
def compile_all(tmp_path_factory: pytest.TempPathFactory):
    """The facts of triton_compile.py about a set of kernels, asked for once."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def compiled(which: str, vendor: str) -> dict[str, Any]:
        if (which, vendor) not in found:
            command = [sys.executable, str(ROOT / "tests/kernels/triton_compile.py"), which, vendor]
            paths = os.pathsep.join(p for p in (str(ROOT), environment.get("PYTHONPATH")) if p)
            out = subprocess.run(command, env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True)
            assert out.returncode == 0, out.stderr[-3000:]
            found[which, vendor] = json.loads(out.stdout)
        return found[which, vendor]

    return compiled


def registers_fit(f: dict[str, Any]) -> bool:
    return bool(f["spilled"]) and not any(f["spilled"])


def all_vectors(f: dict[str, Any]) -> bool:
    """The main loop moves whole vectors only; where rows begin elsewhere than the gradient's, it stores them."""
    loads, stores = f["vectors"]
    right = f["aligned"] == "unlike" or f["loads"] == [loads, 0]
    return loads > 0 and right and f["stores"] == [stores, 0]


@pytest.mark.parametrize("which", ["cases", "tiles", "pairs"])
@pytest.mark.parametrize("vendor", ["nvidia", "amd"])
class TestKernels:
    """Those of token_logprobs ("cases"), of linear_logprobs ("tiles") and of vocab_divergence ("pairs")."""

    def test_no_register_is_spilled(self, compile_all, vendor, which):
        for name, f in compile_all(which, vendor).items():
            assert registers_fit(f), f"{name}: {f['registers']} registers, spilled {f['spilled']}"

    def test_half_the_threads_of_a_multiprocessor_fit(self, compile_all, vendor, which):
        """Latency is hidden by threads. The default cuts, of which every one keeps 1,024 threads on 65,536 registers
        (NVIDIA), 16 wavefronts on 4 times 512 (AMD); 800 where the gradient is narrower, for which each thread has
        twice as many loads under way; 512 for divergences with logarithms of a column, which have more to compute."""
        for name, f in compile_all(which, vendor).items():
            if f["config"] is None:
                nvidia = 128 if f["divergence"] else 80 if f["out"] else 64
                limit = nvidia if vendor == "nvidia" else 128
                assert f["registers"] <= limit, f"{name}: {f['registers']} registers"

    def test_vectors_in_the_main_loop(self, compile_all, vendor, which):
        """For rows at multiples of 16 bytes and for others alike (V = 50,257)."""
        seen = set()
        for name, f in compile_all(which, vendor).items():
            if f["kernel"] != "combine":
                seen.add((f["kernel"], f["aligned"]))
                assert all_vectors(f), f"{name}: loads {f['loads']}, stores {f['stores']}, not {f['vectors']} vectors"
        assert len(seen) == 5

    def test_no_thread_waits_in_the_main_loop(self, compile_all, vendor, which):
        """But where tiles go through shared memory. No such memory at all in the backward: there, a layout that
        changes between load and store would let one thread overwrite logits that another has not read."""
        for name, f in compile_all(which, vendor).items():
            staged = f["kernel"] == "forward" and f["config"] is not None and f["config"][1] > 1
            if f["kernel"] != "combine" and not staged:
                assert f["barriers"] == 0, name
            if f["kernel"] in ("backward", "gradient", "pair backward"):
                assert f["shared"] == 0, name

    def test_shared_memory_and_precision(self, compile_all, vendor, which):
        for name, f in compile_all(which, vendor).items():
            assert f["shared"] <= SHARED[f["arch"].split("_")[0]], f"{name}: {f['shared']} bytes"
            assert not f["tf32"], name


@pytest.mark.parametrize("vendor", ["nvidia", "amd"])
def test_the_checks_find_defects(compile_all, vendor):
    """Too few registers, and pointers of which nothing is known."""
    spilling, forward, backward = compile_all("defects", vendor).values()
    assert not registers_fit(spilling) and all_vectors(spilling)
    fold, gradient = compile_all("tile defects", vendor).values()
    for f in (forward, backward, fold, gradient):
        assert not all_vectors(f) and f["loads"][0] == 0 and f["loads"][1] > 0
    for f in (backward, gradient):
        assert f["stores"][0] == 0 and f["stores"][1] > 0
