"""`fastpo info`: each thing that may be wrong with an installation is brought about, found, and its remedy named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpo
from fastpo import _diagnosis, _info, _remedies, cli
from fastpo.kernels import _native

from .fresh import python

PACKAGE = Path(fastpo.__file__).parent
ROOT = PACKAGE.parent
REBUILD = "FASTPO_REQUIRE_NATIVE=1 pip install --no-build-isolation --no-deps --force-reinstall"
REPORT = "import sys; from fastpo.cli import main; sys.exit(main(['info', '--json']))"
native = pytest.mark.skipif(not _native.CPU.loaded, reason="no compiled library")
pytestmark = pytest.mark.once


class Report:
    """What `fastpo info --json` says in a fresh process, of a copy of the package."""

    def __init__(self, path: Path, before: str = "", **environment: str):
        done = python(before + "\n" + REPORT, path, **environment)
        assert done.stdout, done.stderr
        self.code, self.stderr, said = done.returncode, done.stderr, json.loads(done.stdout)
        self.findings = [_remedies.Finding(**finding) for finding in said["findings"]]
        self.services = [_info.Service(**service) for service in said["services"]]
        self.libraries = said["libraries"]

    def only(self, check: str) -> _remedies.Finding:
        (finding,) = (f for f in self.findings if f.check == check)
        assert finding.broken is _remedies.ROWS[check].broken
        return finding


@pytest.fixture
def copy(tmp_path):
    """A package beside no sources, as an install is, with none of the libraries."""
    shutil.copytree(PACKAGE, tmp_path / "fastpo", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def library(name: str) -> Path:
    found = sorted(PACKAGE.glob(f"{name}.*so"))
    if not found:
        pytest.skip(f"{name} is not built")
    return found[0]


def link(copy: Path, *names: str) -> None:
    for path in map(library, names):
        (copy / "fastpo" / path.name).symlink_to(path)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Code that makes torch one for CUDA, beside a driver of another CUDA: a library with the one symbol asked for."""
    folder = tmp_path_factory.mktemp("driver")

    def driver(cuda: str, version: int) -> str:
        path = folder / f"libcuda-{version}.so"
        source = f"int cuDriverGetVersion(int* v) {{ *v = {version}; return 0; }}"
        command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(path)]
        subprocess.run(command, input=source, text=True, check=True)
        return f"import ctypes, torch; ctypes.CDLL({str(path)!r}); torch.version.cuda = {cuda!r}\n"

    return driver


NO_CUPY = "import sys; sys.modules['cupy_backends'] = None\n"
# as a package that is not installed: not to be found
HIDE = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *more: None if name in {names} else find(name, *more)
"""


@native
def test_a_healthy_install_prints_no_remedy(copy, capsys):
    link(copy, "_cpu", "_host", *(["_cuda"] if list(PACKAGE.glob("_cuda*.so")) else []))
    report = Report(copy)
    assert (report.code, report.findings, report.stderr) == (0, [], "")
    assert {s.backend for s in report.services if s.device != "cuda"} == {"compiled"}
    if os.environ.get("FASTPO_CPU_CAPABILITY") is None and not fastpo.info().findings:
        assert cli.main(["info"]) == 0
        assert "remedy" not in capsys.readouterr().out


class TestTorch:
    @pytest.fixture
    def old(self, copy):
        (copy / "torch").mkdir()
        (copy / "torch" / "__init__.py").write_text("__version__ = '2.9.1+cu128'\n")
        return copy

    def test_an_old_one_is_an_import_error(self, old):
        command = [sys.executable, "-c", "import fastpo"]
        done = subprocess.run(command, cwd=old, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
        assert done.returncode == 1
        said = "ImportError: torch 2.9.1+cu128 is installed, and fastpo needs torch 2.10 or newer: "
        assert done.stderr.splitlines()[-1] == said + 'pip install --upgrade "torch>=2.10"'

    @pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+gitabc", "2.15.0.dev1", "3.0"])
    def test_others_are_not(self, version, monkeypatch):
        monkeypatch.setattr(torch, "__version__", version)
        _remedies.require_torch()

    def test_the_oldest_is_the_one_of_the_project(self):
        oldest = ".".join(map(str, _remedies.OLDEST_TORCH))
        text = (ROOT / "pyproject.toml").read_text()
        assert f'dependencies = ["torch>={oldest}"]' in text and f'"torch>={oldest}", "pybind11' in text


class TestLibraries:
    def test_not_built(self, copy):
        (copy / "fastpo" / "not_built.json").write_text('{"_cpu": "no C++ compiler: there is no c++"}')
        report = Report(copy, PATH="/nowhere", CXX="my-c++")
        assert report.code == 0
        (cpu, host) = report.findings
        assert {f.check for f in report.findings} == {"not built"} and not cpu.broken
        assert cpu.found.startswith("_cpu: not built (no C++ compiler: there is no c++); a C++20 compiler is needed")
        assert host.found.startswith("_host: not built; ")
        assert REBUILD in cpu.remedy and cpu.remedy.startswith('pip install "setuptools>=77" wheel pybind11 ninja &&')
        assert {s.backend for s in report.services} == {"reference", "Python"}

    def test_not_built_and_a_compiler_is_here(self, copy):
        (copy / "my-c++").touch(mode=0o755)
        report = Report(copy, PATH=str(copy), CXX="my-c++")
        assert report.only("not built").found == f"_cpu and _host: not built; {copy / 'my-c++'} is here now"

    @native
    def test_did_not_load(self, copy, driver):
        """A file cut short, of which the loader would die; one for another Python; one for another system."""
        whole, host, folder = library("_cpu"), library("_host"), copy / "fastpo"
        (folder / whole.name).write_bytes(whole.read_bytes()[:100_000])
        shutil.copy(host, folder / "_host.cpython-39-x86_64-linux-gnu.so")
        (folder / "_cuda.abi3.so").write_bytes(
            b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01 fastpo built with CUDART 13000" + bytes(64)
        )
        report = Report(copy, driver("13.0", 13000) + NO_CUPY)
        assert report.code == 1
        cpu, host, cuda = (f for f in report.findings if f.check == "library")
        size = whole.stat().st_size
        assert f"did not load: the file is cut short, 100,000 of {size:,} bytes" in cpu.found
        assert "did not load: there is none for this Python; it is for Python 3.9, and this is 3." in host.found
        assert "invalid ELF header; it is for Darwin arm64, and this is Linux" in cuda.found
        assert all(f.broken and REBUILD in f.remedy and str(folder) in f.found for f in (cpu, host, cuda))
        reasons = {s.reason for s in report.services if s.device == "cpu"}
        assert reasons == {f"the file is cut short, 100,000 of {size:,} bytes"}

    def test_the_loaders_own_words(self, copy):
        (copy / "fastpo" / "_cpu.abi3.so").write_bytes(b"not a library")
        (found,) = (f.found for f in Report(copy).findings if f.check == "library")
        assert re.search(r"_cpu.abi3.so did not load: .*(file too short|invalid ELF header); it is no library", found)

    @native
    def test_another_version_and_a_lower_instruction_set(self, copy):
        link(copy, "_cpu", "_host")
        (copy / "pyproject.toml").write_text('version = "9.8.7"\n')
        report = Report(copy, FASTPO_CPU_CAPABILITY="default")
        cpu, host = (f for f in report.findings if f.check == "version")
        assert report.code == 1
        assert cpu.found.endswith(f"_cpu.abi3.so is of version {fastpo_version()}, and the Python sources are of 9.8.7")
        assert cpu.broken and "_host" in host.found and REBUILD in cpu.remedy
        best = _native.CPU.text("fastpo_supported").split(", ")[-1]
        if best != "default":
            lower = report.only("instruction set")
            assert lower.found == f"FASTPO_CPU_CAPABILITY=default is in the environment, and this processor has {best}"
            assert lower.remedy == "unset FASTPO_CPU_CAPABILITY"

    @native
    def test_every_library_says_the_projects_version(self):
        """The one place of the version is pyproject.toml."""
        for path in PACKAGE.glob("_*.so"):
            assert _native.version_of(path) == fastpo_version(), path
        assert _native.CPU.text("fastpo_version") == f"fastpo version {fastpo_version()}"
        assert fastpo.__version__ in (fastpo_version(), "0+unknown")
        assert _diagnosis.sources_version() == fastpo_version()

    def test_in_a_checkout_the_command_builds_it_in_place(self):
        assert _diagnosis.rebuild().startswith(f"cd {ROOT} && pip install ")
        assert _diagnosis.rebuild().endswith("&& FASTPO_REQUIRE_NATIVE=1 python setup.py build_ext --inplace")

    @pytest.mark.parametrize(
        ("origin", "given"),
        [
            ({"url": "file:///{folder}", "dir_info": {}}, "{folder}"),
            ({"url": "file:///nowhere/fastpo-0.1.0.tar.gz", "archive_info": {}}, "fastpo"),
            ({"url": "file:///{folder}/fastpo-0.1.0-py3-none-any.whl", "archive_info": {}}, "fastpo"),
            ({"url": "https://a.b/fastpo", "vcs_info": {"vcs": "git", "commit_id": "1"}}, "git+https://a.b/fastpo"),
        ],
    )
    def test_elsewhere_it_is_installed_from_where_it_came(self, origin, given, tmp_path, monkeypatch):
        told = tmp_path / "fastpo-0.1.0.dist-info"
        told.mkdir()
        (told / "METADATA").write_text("Name: fastpo\nVersion: 0.1.0\n")
        text = json.dumps(origin).replace("{folder}", str(tmp_path).lstrip("/"))
        (told / "direct_url.json").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(_diagnosis, "PACKAGE", tmp_path / "fastpo")
        assert _diagnosis.rebuild().endswith(f"--no-binary fastpo {given.replace('{folder}', str(tmp_path))}")


def fastpo_version() -> str:
    return re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def only_distributions_of(folder: Path) -> str:
    return (
        "import functools, importlib.metadata as m\n"
        f"m.distributions = functools.partial(m.distributions, path=[{str(folder)!r}])\n"
    )


class TestCuda:
    """Beside a torch that says it has CUDA, and a driver that says which it runs."""

    def test_an_old_driver(self, copy, driver):
        link(copy, "_cuda")
        built = _native.cuda_built_with(library("_cuda"))
        older = built // 1000 - 1
        bare = NO_CUPY + HIDE.format(names=["triton"]) + only_distributions_of(copy)
        report = Report(copy, driver(f"{older}.8", older * 1000 + 80) + bare)
        found = report.only("driver")
        assert report.code == 0 and f"_cuda.abi3.so was built with CUDA {_native.dotted(built)}, " in found.found
        assert found.found.endswith(f"and the driver runs CUDA {older}.8 at most; the reference serves")
        assert f"pip install cupy-cuda{older}x nvidia-cuda-nvrtc" in found.remedy
        # in place of it, nothing
        nvrtc = report.only("NVRTC")
        assert (
            "_cuda: built with CUDA" in nvrtc.found and "CuPy, which would compile it by NVRTC, is not" in nvrtc.found
        )
        suffix = f"-cu{older}" if older < 13 else ""
        assert nvrtc.remedy == f"pip install cupy-cuda{older}x nvidia-cuda-nvrtc{suffix}"
        triton = report.only("Triton")
        assert triton.found.startswith(f"torch has CUDA {older}.8, and Triton is not installed")
        assert re.match(r'pip install "(pytorch-)?triton', triton.remedy)

    def test_no_driver_and_no_device_is_nothing_to_mend(self, copy, driver):
        """As torch from PyPI is on a machine without a GPU."""
        pytest.importorskip("triton")
        link(copy, "_cpu", "_host", "_cuda")
        report = Report(copy, driver("13.0", 0))
        assert (report.code, report.findings) == (0, [])
        assert report.libraries["_cuda"]["error"].endswith("but there is no driver")

    def test_no_nvrtc(self, copy, driver):
        backends = copy / "cupy_backends" / "cuda" / "libs"
        backends.mkdir(parents=True)
        for folder in (copy / "cupy_backends", copy / "cupy_backends" / "cuda", backends):
            (folder / "__init__.py").touch()
        (backends / "nvrtc.py").write_text("def getVersion():\n    raise RuntimeError('libnvrtc.so.13 is not here')")
        report = Report(copy, driver("13.0", 13000))
        found = report.only("NVRTC")
        assert "CuPy finds no NVRTC: libnvrtc.so.13 is not here" in found.found
        assert "_cuda: not built (fastpo was built without nvcc)" in found.found
        assert found.remedy == "pip install cupy-cuda13x nvidia-cuda-nvrtc"

    @pytest.mark.parametrize(("here", "wanted"), [(13, 12), (12, 13)])
    def test_cupy_for_another_cuda(self, here, wanted, copy, driver):
        """For a newer one, which the driver does not run; for an older one, whose NVRTC is not here."""
        (copy / "other.dist-info").mkdir()
        (copy / "other.dist-info" / "METADATA").write_text(f"Name: cupy-cuda{here}x\nVersion: 14.0.0\n")
        missing = NO_CUPY if here < wanted else ""
        report = Report(copy, driver(f"{wanted}.0", wanted * 1000) + missing + only_distributions_of(copy))
        found = report.only("CuPy")
        assert found.found == f"cupy-cuda{here}x is installed, and torch with this driver needs CuPy for CUDA {wanted}"
        assert found.remedy.startswith(
            f"pip uninstall --yes cupy-cuda{here}x && pip install cupy-cuda{wanted}x nvidia-"
        )
        assert report.code == 1

    def test_a_gpu_that_is_not_among_those_compiled_for(self, copy, driver):
        link(copy, "_cuda")
        device = "from unittest import mock\n" + "".join(
            f"mock.patch('torch.cuda.{name}', lambda *_: {value}).start()\n"
            for name, value in {
                "is_available": True,
                "device_count": 1,
                "get_device_capability": (7, 5),
                "get_device_name": "'Some GPU'",
            }.items()
        )
        built = _native.cuda_built_with(library("_cuda"))
        report = Report(copy, driver(_native.dotted(built), built) + device)
        found = report.only("architecture")
        assert found.found == "Some GPU: _cuda has no code for the compute capability 7.5; the reference serves it"
        assert "export FASTPO_CUDA=0" in found.remedy and "pip install cupy-cuda" in found.remedy
        left_out = Report(copy, driver(_native.dotted(built), built) + device, FASTPO_CUDA="0")
        assert left_out.libraries["_cuda"]["error"] == "left out by FASTPO_CUDA=0"
        assert not [f for f in left_out.findings if f.check == "architecture"]


@native
def test_a_kernel_that_is_wrong(monkeypatch, capsys):
    scan = _info.affine_scan
    monkeypatch.setattr(_info, "affine_scan", lambda *given: scan(*given) + 1e-3)
    monkeypatch.setattr(_info, "cauchy", lambda *given: 1 / 0)
    assert cli.main(["info"]) == 1
    said = capsys.readouterr().out
    assert "kernel (broken): affine_scan on cpu: the native kernel gives a wrong result\n" in said
    assert "kernel (broken): cauchy on cpu: the native kernel failed: division by zero\n" in said
    assert said.count("    remedy: cd ") == 2 and "fastpo info --json" in said
    wrong = next(s for s in fastpo.info().services if s.function == "affine_scan")
    assert wrong.backend == "compiled" and wrong.failed


def test_json_is_the_data_of_the_report(capsys):
    code = cli.main(["info", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(fastpo.info().as_dict()))
    assert code == int(fastpo.info().broken)


def test_every_row_has_a_check():
    """But that of torch, without which nothing is imported."""
    source = (PACKAGE / "_diagnosis.py").read_text()
    checks = re.search(r"checks: .*? = \{(.*?)\n    \}", source, re.DOTALL)[1]
    assert {"torch", *re.findall(r'"(.+?)":', checks)} == set(_remedies.ROWS)
