"""The source distribution: what is in it, and that it installs and serves where there is no compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fastpo

from .fresh import python

ROOT = Path(fastpo.__file__).parents[1]
TOP = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
# written by setuptools
MADE = {"PKG-INFO", "setup.cfg"}
INSTALL = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
pytestmark = [pytest.mark.once, pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")]


def run(*command: str, cwd: Path, **given: str) -> str:
    """Without a compiler, unless a PATH is given; returns what was printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTPO_") and k not in ("CC", "CXX")}
    environment |= {"PATH": "/nowhere", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **given}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A checkout, with what lies about in one."""
    tree = tmp_path_factory.mktemp("tree")
    for name in TOP:
        shutil.copy(ROOT / name, tree)
    for name in ("csrc", "fastpo"):
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "not_built.json")
        )
    return tree


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    wanted = {*TOP, *(f"{top}/{name}" for top in ("csrc", "fastpo") for name in files(tree / top))}
    for name in ("tests/test_any.py", "docs/index.md", "fastpo/_cpu.abi3.so", "fastpo/not_built.json", "csrc/any.o"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
    folder = tmp_path_factory.mktemp("dist")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=tree)
    (made,) = folder.iterdir()
    return made, wanted


def test_it_holds_what_a_build_needs_and_nothing_else(sdist):
    made, wanted = sdist
    with tarfile.open(made) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    names -= {name for name in names if name.startswith("fastpo.egg-info/")} | MADE
    assert names == {name for name in wanted if name != "csrc/cuda/README.md"}


def test_without_a_compiler(sdist, tmp_path):
    """It installs, the build says that nothing was compiled, the reference serves, and `fastpo info` has the remedy."""
    made, wanted = sdist
    target = tmp_path / "site"
    said = run(*INSTALL, str(target), str(made), cwd=tmp_path)
    for name in ("_cpu", "_host"):
        assert f"fastpo: {name} is not built: no C++ compiler: there is no c++" in said
    # what NVRTC compiles, and what type checkers read
    installed = files(target / "fastpo")
    sources = {name for name in wanted if name.startswith("csrc/") and name.endswith((".cuh", "arguments.h"))}
    sources |= {name for name in wanted if name.startswith("csrc/formulas/")}
    assert len(sources) > 10 and {*sources, "py.typed", "losses/__init__.pyi"} <= installed
    assert not [name for name in installed if name.endswith(".so")]
    code = (
        "import torch, fastpo, json\n"
        "x = torch.zeros(2, 4, requires_grad=True)\n"
        "logps = fastpo.token_logprobs(x, torch.tensor([0, 3]))\n"
        "o = torch.zeros(1)\n"
        "out = fastpo.losses.dpo(logps[:1], logps[1:], o, o, beta=1.0)\n"
        "out.loss.backward()\n"
        "print(round(out.loss.item(), 6), x.grad.tolist())\n"
        "print(fastpo.__version__, fastpo.__file__)\n"
        "print(json.dumps(fastpo.info().as_dict()['findings']))"
    )
    done = python(code, target, PATH="/nowhere")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    numbers, version, findings = done.stdout.splitlines()
    assert numbers == "0.693147 [[-0.375, 0.125, 0.125, 0.125], [-0.125, -0.125, -0.125, 0.375]]"
    assert version == f"{made.name.split('-')[1].removesuffix('.tar.gz')} {target / 'fastpo' / '__init__.py'}"
    (finding,) = json.loads(findings)
    assert finding["found"].startswith("_cpu and _host: not built (no C++ compiler: there is no c++); a C++20 compiler")
    assert finding["remedy"].endswith(f"--no-binary fastpo {made}") and not finding["broken"]


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [False, True])
def test_with_a_compiler(cuda, sdist, tmp_path):
    """All libraries are built, _cuda where there is nvcc and it is not declined. Minutes each."""
    made, _ = sdist
    if cuda and not shutil.which("nvcc"):
        pytest.skip("there is no nvcc")
    target = tmp_path / "site"
    wanted = {"FASTPO_REQUIRE_NATIVE": "1", "PATH": os.environ["PATH"], **({} if cuda else {"FASTPO_CUDA": "0"})}
    run(*INSTALL, str(target), str(made), cwd=tmp_path, **wanted)
    built = {path.name.partition(".")[0] for path in (target / "fastpo").glob("_*.so")}
    assert built == {"_cpu", "_host"} | ({"_cuda"} if cuda else set())
    assert not (target / "fastpo" / "not_built.json").exists()
    done = python("import json, fastpo; print(json.dumps(fastpo.info().as_dict()))", target)
    said = json.loads(done.stdout)
    assert said["findings"] == [] and said["libraries"]["_cpu"]["path"].startswith(str(target)), done.stderr
    assert {s["backend"] for s in said["services"] if s["device"] != "cuda"} == {"compiled"}
