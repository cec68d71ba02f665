"""The compiled libraries: what is in them, how one is chosen, and what happens without them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpo
from fastpo.kernels import _native
from fastpo.reference.registry import formulas

from .fresh import python

PACKAGE = Path(fastpo.__file__).parent
CUDA = sorted(PACKAGE.glob("_cuda*.so"))
SOURCES = PACKAGE.parent
SETS = _native.CPU.text("fastpo_built_for").split(",") if _native.CPU.loaded else []


def test_native_is_here_where_it_is_required():
    if os.environ.get("FASTPO_REQUIRE_NATIVE") == "1":
        assert _native.CPU.loaded and _native._HOST is not None
        assert {(s.backend, s.reason) for s in fastpo.info().services if s.device != "cuda"} == {("compiled", None)}
        if shutil.which("nvcc") and os.environ.get("FASTPO_CUDA") != "0":
            assert CUDA


@pytest.mark.skipif(not _native.CPU.loaded, reason="no compiled library")
class TestLibrary:
    def test_every_pairwise_row_has_a_formula(self):
        """Compiled graphs keep a formula's number: the order may grow at its end and nowhere else."""
        assert list(_native.CPU.formulas)[:5] == ["dpo", "cdpo", "robust_dpo", "ipo", "hinge"]
        assert list(_native.CPU.unpaired_formulas) == ["kto", "bco", "npo", "nash", "nash_to_go"]
        rows = list(formulas())
        assert {*_native.CPU.formulas, *_native.CPU.unpaired_formulas} == {row.name for row in rows}
        assert {h for row in rows for h in (*row.defaults, *row.fixed)} == set(_native.CPU.hyper_parameters)

    def test_only_the_stable_abi(self):
        """Undefined torch symbols are C functions: no C++ name of a torch version."""
        out = subprocess.run(
            ["nm", "-D", "--undefined-only", str(_native.CPU.path)],
            capture_output=True,
            text=True,
            check=True,
        )
        names = [line.split()[-1] for line in out.stdout.splitlines()]
        assert any(n.startswith("aoti_torch_") for n in names)
        assert not [n for n in names if re.match(r"_Z.*(2at|3c10|5torch)", n)]

    def test_no_vector_code_outside_its_namespace(self):
        """A VEX or EVEX instruction in code shared with the baseline is an illegal instruction on an older machine."""
        command = ["objdump", "-d", "--no-show-raw-insn", "-C", str(_native.CPU.path)]
        function, found = "", {}
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
                function = header[1]
            elif re.match(r"\s+[0-9a-f]+:\s+(\{evex\} )?(v[a-z0-9]+|k(mov|ortest|and|or|not|xor)[bwdq]?)\s", line):
                found.setdefault(function, line)
        inside = {f for f in found if "fastpo::avx2::" in f or "fastpo::avx512::" in f}
        assert len(inside) > 20, "the AVX kernels are missing"
        assert not set(found) - inside, list(found.items())[:3]

    def test_each_other_instruction_set(self):
        """The kernels' own tests under the sets that are not in use, but for those that say nothing of their
        arithmetic: a process for each set, at once, as most of the time is Python's."""
        others = []
        for capability in SETS:
            probe = python("import fastpo", SOURCES, FASTPO_CPU_CAPABILITY=capability)
            here = "this build on this machine has" not in probe.stderr
            assert not here or probe.returncode == 0, probe.stderr
            if here and capability != _native.CPU.text("fastpo_capability"):
                others.append(capability)
        if not others:
            pytest.skip("the set in use, whose tests run anyway, is the only one here")
        # one file per kernel of csrc/cpu
        kernels = {p.name.rsplit("_", 1)[0] for p in (PACKAGE.parent / "csrc" / "cpu").glob("*_baseline.cpp")}
        tests = [f"tests/kernels/test_{name}.py" for name in sorted(kernels)]
        assert len(tests) >= 2
        running = {
            capability: subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-m", "not once", "-p", "no:cacheprovider", *tests],
                env={**os.environ, "FASTPO_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parent.parent,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for capability in others
        }
        for capability, process in running.items():
            out, _ = process.communicate()
            assert process.returncode == 0, f"{capability}\n{out[-3000:]}"
            assert re.search(r"\d{3,} passed", out)

    def test_capability_is_read_and_checked(self):
        show = "from fastpo.kernels import _native; print(_native.CPU.text('fastpo_capability'))"
        assert python(show, SOURCES, FASTPO_CPU_CAPABILITY="default").stdout.strip() == "default"
        bad = python(show, SOURCES, FASTPO_CPU_CAPABILITY="sse9")
        assert bad.returncode != 0
        assert "FASTPO_CPU_CAPABILITY is 'sse9'; this build on this machine has: default" in bad.stderr
        if Path("/proc/cpuinfo").exists():
            flags = {*re.findall(r"\w+", Path("/proc/cpuinfo").read_text())}
            needed = {"default": set(), "avx2": {"avx2", "fma", "f16c"}}
            needed["avx512"] = needed["avx2"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
            here = [name for name in SETS if needed[name] <= flags]
            assert f"machine has: {', '.join(here)}\n" in bad.stderr

    def test_unknown_backend_and_device(self):
        with (
            pytest.raises(ValueError, match="backend must be 'auto', 'native' or 'reference', got 'fast'"),
            fastpo.use_backend("fast"),
        ):
            pass
        with (
            fastpo.use_backend("native"),
            pytest.raises(RuntimeError, match="no compiled kernel for device type 'meta'"),
        ):
            fastpo.token_logprobs(torch.zeros(1, 2, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"))

    def test_use_backend_is_undone(self):
        with pytest.raises(KeyError), fastpo.use_backend("reference"):
            assert _native._backend == "reference"
            raise KeyError
        assert _native._backend == "auto"


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("op", ["objective", "token_logprobs", "vocab_divergence"])
def test_who_serves_a_device_is_no_part_of_a_graph(op):
    """What is asked on every call on a CUDA device, and looks for libraries, does not break a compiled graph."""
    torch._dynamo.reset()

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _native.why_not(op, torch.device("cuda"), torch.float32) else x + 2

    x = torch.zeros(1)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), function(x))


def test_constant_when_traced_is_torchs_mark():
    def function() -> None: ...

    theirs = vars(torch.compiler.assume_constant_result(function)).copy()
    vars(function).clear()
    assert theirs and vars(_native.constant_when_traced(function)) == theirs


def test_import_leaves_alone_what_is_large():
    """The compilers; and transformers, also where there are layers of S4, beside whose language model it is needed."""
    large = ("torch._dynamo", "triton", "cupy", "transformers")
    # torch itself may warn
    code = "import sys, torch, warnings; warnings.simplefilter('error'); import fastpo; fastpo.nn.S4Layer(4, 8); "
    code += f"print(*(m for m in {large} if m in sys.modules))"
    out = python(code, SOURCES)
    assert out.returncode == 0 and out.stdout == "\n", out.stdout + out.stderr


class TestWithoutLibraries:
    @pytest.fixture
    def bare(self, tmp_path):
        """The package as an install without a compiler leaves it."""
        shutil.copytree(PACKAGE, tmp_path / "fastpo", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        return tmp_path

    def test_the_reference_serves(self, bare):
        code = (
            "import torch, fastpo; from fastpo import losses\n"
            "x = torch.zeros(2, 4, requires_grad=True)\n"
            "fastpo.token_logprobs(x, torch.tensor([0, 3])).sum().backward(); print(x.grad[0, 0].item())\n"
            "o = torch.ones(2); print(round(losses.dpo(o, o, o, o).loss.item(), 4)); print(fastpo.pack([1, 2], 3))\n"
            "print(fastpo.info())"
        )
        out = python(code, bare)
        assert out.stdout.splitlines()[:3] == ["0.75", "0.6931", "[[1, 0]]"], out.stderr
        assert out.stderr == ""
        assert out.stdout.count("reference (not built)") == 10

    def test_required(self, bare):
        out = python("import fastpo", bare, FASTPO_REQUIRE_NATIVE="1")
        assert out.returncode != 0
        assert "FASTPO_REQUIRE_NATIVE=1, but fastpo._cpu did not load: not built" in out.stderr

    def test_broken_library(self, bare):
        (bare / "fastpo" / "_cpu.abi3.so").write_bytes(b"not a library")
        out = python("import fastpo; print(fastpo.info())", bare)
        assert "invalid ELF header" in out.stdout or "file too short" in out.stdout, out.stderr


def test_info_report():
    report = fastpo.info()
    assert f"torch         {torch.__version__}" in str(report)
    names = {(s.function, s.device) for s in report.services}
    assert {("token_logprobs", "cpu"), ("vocab_divergence", "cpu"), ("objective", "cpu"), ("packing", "host")} <= names
    assert all(s.reason for s in report.services if s.backend == "reference")
    assert report.as_dict()["libraries"]["_cpu"]["path"] == str(_native.CPU.path)


@pytest.mark.skipif(not CUDA, reason="_cuda is not built: no nvcc")
class TestCudaLibrary:
    """What can be known of it beside a torch without CUDA."""

    def test_loads_with_every_symbol_resolved(self):
        code = (
            "import torch, ctypes, fastpo; assert torch.version.cuda is None\n"
            "from fastpo.kernels import _native\n"
            f"cuda = ctypes.CDLL({str(CUDA[0])!r})\n"
            "print(_native.cuda_built_with(_native.CUDA.path) // 1000, _native.cuda_driver())\n"
            "cuda.fastpo_cuda_runtime.restype = ctypes.c_char_p\n"
            "assert str(_native.cuda_built_with(_native.CUDA.path)) in cuda.fastpo_cuda_runtime().decode()\n"
            "name = 'fastpo::objective'\n"
            "print(torch._C._dispatch_dump(name).count('csrc/torch/cuda') > 0)\n"
        )
        # which the loader reads when a process starts
        environment = {**os.environ, "PYTHONPATH": str(SOURCES), "LD_BIND_NOW": "1"}
        out = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        assert re.fullmatch(r"1\d \d+\nTrue\n", out.stdout), out.stdout

    def test_needs_only_the_stable_interface(self):
        """Of torch the C interface, of CUDA nothing: cudart is inside, and libtorch_cuda is looked up at run time."""
        command = ["nm", "-D", "--undefined-only", str(CUDA[0])]
        undefined = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = [line.split()[-1] for line in undefined.splitlines()]
        assert not [n for n in names if re.match(r"_ZN.*(c10|at|torch)[0-9]", n)]
        assert not [n for n in names if n.startswith(("cuda", "__cuda", "cu")) and n[2:3].isupper()]
        needed = subprocess.run(["objdump", "-p", str(CUDA[0])], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"NEEDED\s+lib(?:cuda|c10_cuda|torch_cuda)\S*", needed)

    def test_exports_nothing_of_cudart(self):
        command = ["nm", "-D", "--defined-only", str(CUDA[0])]
        defined = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert not re.findall(r" cuda[A-Z]\w+", defined)

    def test_holds_code_for_each_architecture(self):
        code = CUDA[0].read_bytes()
        for architecture in (80, 90, 100, 120):
            assert f"sm_{architecture}".encode() in code
        # PTX for what comes later
        assert b".target sm_100" in code or b"compute_100" in code
