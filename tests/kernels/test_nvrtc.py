"""Device code through NVRTC, without a device: every kernel for every architecture, and the cache of what was made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastpo.kernels.cuda import nvrtc
from fastpo.kernels.cuda.nvrtc import compile_source, cubin, flatten, source_folder

pytestmark = pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))

FILES = sorted(p.name for p in (source_folder() / "cuda").glob("*.cuh") if "_KERNEL(" in p.read_text())
FILES.remove("device.cuh")
ARCHITECTURES = [80, 90, 100]


def kernels(file: str) -> dict[str, int]:
    """The kernels that a file defines, and how many registers a thread may have."""
    text = (source_folder() / "cuda" / file).read_text()
    found = re.findall(r"^FASTPO_(SMALL_)?KERNEL\((\w+)", text, re.MULTILINE)
    # so that blocks of 512 or 256 threads fit
    return {name: 255 if small else 128 for small, name in found}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_compiles_without_spills(file, architecture):
    log: list[str] = []
    code = compile_source(flatten(source_folder() / "cuda" / file), architecture, {}, log=log)
    assert code[:4] == b"\x7fELF"
    found = re.findall(
        r"Function properties for (\w+)\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        log[0],
        re.DOTALL,
    )
    limits = kernels(file)
    assert {name for name, *_ in found} == set(limits), log[0]
    for name, *numbers in found:
        stack, stores, loads, registers = map(int, numbers)
        assert (stack, stores, loads) == (0, 0, 0), (name, log[0])
        assert registers <= limits[name], (name, registers)
    assert all(name.encode() in code for name in kernels(file))


def test_a_spill_would_be_seen():
    """The same pattern finds spills in a kernel that must have them."""
    sums = "\n".join(f"float a{i} = x[{i} * n];" for i in range(300))
    uses = "\n".join(f"x[{i} * n + 1] = a{i} * a{(i * 7 + 150) % 300};" for i in range(300))
    head = 'extern "C" __global__ void __launch_bounds__(1024) spilling(float* x, int n)'
    source = f"{head} {{ {sums} __syncthreads(); {uses} }}"
    log: list[str] = []
    compile_source(source, 90, {}, log=log)
    (stores,) = re.findall(r"(\d+) bytes spill stores", log[0])
    assert int(stores) > 0


def test_errors_hold_the_compilers_words():
    with pytest.raises(RuntimeError, match=r"identifier .*nothing.* is undefined"):
        compile_source('extern "C" __global__ void f(float* x) { *x = nothing; }', 90, {})


def test_defines_reach_the_source():
    compile_source('extern "C" __global__ void f(float* x) { *x = VALUE; }', 90, {"VALUE": "1.0f + 2.0f"})


def test_flattened_source_has_no_includes_but_the_emulators():
    text = flatten(source_folder() / "cuda" / "objective.cuh")
    assert re.findall(r"#include.*", text) == ['#include "simt.h"']
    assert text.count("struct Dual {") == 1


class TestCache:
    SOURCE = 'extern "C" __global__ void f(float* x) { *x = 1; }'

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FASTPO_CACHE_DIR", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def test_compiled_once(self, folder, monkeypatch):
        first = cubin(self.SOURCE, 90, {})
        assert len(list(folder.iterdir())) == 1
        monkeypatch.setattr(nvrtc, "compile_source", lambda *_: pytest.fail("compiled again"))
        assert cubin(self.SOURCE, 90, {}) == first

    def test_other_options_are_other_code(self, folder):
        codes = [cubin(self.SOURCE, 90, {}), cubin(self.SOURCE, 80, {}), cubin(self.SOURCE + "\n", 90, {"A": "1"})]
        assert len(list(folder.iterdir())) == 3 and codes[0] != codes[1]

    def test_a_folder_that_cannot_be_written(self, folder, monkeypatch):
        folder.write_text("a file where the folder should be")
        assert cubin(self.SOURCE, 90, {})[:4] == b"\x7fELF"


def test_a_wheel_carries_the_sources(tmp_path):
    """An installed package has them beside its modules, and finds the same text there."""
    root = Path(__file__).parents[2]
    if not (root / "setup.py").exists():
        pytest.skip("not a source tree")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True)
    carried = tmp_path / "fastpo" / "csrc"
    for file in FILES:
        assert flatten(carried / "cuda" / file) == flatten(source_folder() / "cuda" / file)
    code = "from fastpo.kernels.cuda.nvrtc import source_folder; print(source_folder())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FASTPO_REQUIRE_NATIVE": "0"}
    out = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert out.stdout.strip() == str(carried), out.stderr
