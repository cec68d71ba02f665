"""The checks behind `_remedies.ROWS`: each yields the words of its row, once for everything that it finds."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution, distributions, requires, version
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from fastpo._remedies import ROWS, Finding
from fastpo.kernels import _native
from fastpo.kernels.cuda import nvrtc

Words = Mapping[str, str]

PACKAGE = Path(__file__).parent
_TOOLS = 'pip install "setuptools>=77" wheel pybind11 ninja'
_REQUIRED = 'set "FASTPO_REQUIRE_NATIVE=1" &&' if sys.platform == "win32" else "FASTPO_REQUIRE_NATIVE=1"
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
_MACH_MACHINES = {0x01000007: "x86_64", 0x0100000C: "arm64"}


def diagnose(kernels: Iterable[Words]) -> list[Finding]:
    """Everything that is wrong here; `kernels` are those that were run and failed, as words of their row."""
    checks: dict[str, Callable[[], Iterable[Words]]] = {
        "not built": _not_built,
        "library": _not_loaded,
        "version": _versions,
        "instruction set": _instruction_set,
        "driver": _driver,
        "architecture": _architecture,
        "NVRTC": _nvrtc,
        "CuPy": _cupy,
        "Triton": _triton,
        "kernel": lambda: kernels,
    }
    return [ROWS[check].found(**words) for check, find in checks.items() for words in find()]


def source_tree() -> Path | None:
    """The checkout that the package is imported from, if it is one."""
    root = PACKAGE.parent
    return root if (root / "setup.py").is_file() and (root / "csrc").is_dir() else None


def sources_version() -> str | None:
    """The version of the Python sources: of the checkout, whatever is installed, else of the distribution."""
    project = PACKAGE.parent / "pyproject.toml"
    if project.is_file() and (found := re.search(r'^version = "(.+)"', project.read_text(), re.MULTILINE)):
        return found[1]
    return installed("fastpo")


def installed(*names: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _installed_from() -> str:
    """What to give pip: where this fastpo came from, if that is sources and still there."""
    try:
        told = distribution("fastpo").read_text("direct_url.json")
    except PackageNotFoundError:
        told = None
    origin = json.loads(told) if told else {}
    url = origin.get("url", "")
    if "vcs_info" in origin:
        return f"{origin['vcs_info']['vcs']}+{url}"
    path = Path(url2pathname(urlsplit(url).path)) if url.startswith("file:") else None
    return shlex.quote(str(path)) if path and path.suffix != ".whl" and path.exists() else "fastpo"


def rebuild() -> str:
    """The command that builds the libraries of this fastpo, or says why it cannot."""
    if root := source_tree():
        return f"cd {shlex.quote(str(root))} && {_TOOLS} && {_REQUIRED} python setup.py build_ext --inplace"
    return reinstall(_installed_from())


def reinstall(origin: str) -> str:
    """`rebuild` of an install; pip's cache may hold the wheel that was made without a compiler."""
    options = "--no-build-isolation --no-deps --force-reinstall --no-cache-dir --no-binary fastpo"
    return f"{_TOOLS} && {_REQUIRED} pip install {options} {origin}"


def _files(name: str) -> list[Path]:
    """The files of a library, those of other platforms too."""
    return [path for path in sorted(PACKAGE.glob(f"{name}.*")) if path.suffix in (".so", ".pyd", ".dylib")]


def _not_built() -> Iterator[Words]:
    missing: dict[str, list[str]] = {}
    for name, error in (("_cpu", _native.CPU.error), ("_host", _native.HOST_ERROR)):
        if error and not _files(name):
            missing.setdefault(error, []).append(name)
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++", "clang-cl")
    here = next(filter(None, map(shutil.which, compilers)), None)
    needed = "a C++20 compiler is needed, g++ 11 or clang 14 or newer, from the packages of the system"
    for reason, names in missing.items():
        compiler = f"{here} is here now" if here else f"{needed}, and none is on PATH"
        yield {"libraries": " and ".join(names), "reason": reason, "compiler": compiler, "rebuild": rebuild()}


def _platform_of(path: Path) -> str | None:
    """The system and processor that a library is for, by its header; None if it has none."""
    with path.open("rb") as file:
        head = file.read(20)
    if head[:4] == b"\x7fELF" and len(head) == 20:
        machine = int.from_bytes(head[18:], "little")
        return f"Linux {_ELF_MACHINES.get(machine, machine)}"
    if head[:4] == b"\xcf\xfa\xed\xfe":
        machine = int.from_bytes(head[4:8], "little")
        return f"Darwin {_MACH_MACHINES.get(machine, machine)}"
    return "Windows" if head[:2] == b"MZ" else None


def _mismatch(path: Path) -> str:
    """Why this file could not be loaded here, as far as the file says it."""
    built, here = _platform_of(path), f"{platform.system()} {platform.machine()}"
    if built is None:
        return "; it is no library"
    if not here.startswith(built):
        return f"; it is for {built}, and this is {here}"
    python = re.search(r"\.(?:cpython-|cp)(\d)(\d+)", path.name)
    if python and (int(python[1]), int(python[2])) != sys.version_info[:2]:
        return f"; it is for Python {python[1]}.{python[2]}, and this is {platform.python_version()}"
    return ""


def _not_loaded() -> Iterator[Words]:
    # _cuda may well be there and not fit, which is no failure
    cuda = _native.CUDA.error if _native.CUDA.failed else None
    for name, error in (("_cpu", _native.CPU.error), ("_host", _native.HOST_ERROR), ("_cuda", cuda)):
        for path in _files(name) if error else ():
            yield {"file": str(path), "error": str(error), "mismatch": _mismatch(path), "rebuild": rebuild()}


def _versions() -> Iterator[Words]:
    expected = sources_version()
    host = getattr(_native._HOST, "__file__", None)
    for path in (_native.CPU.path, _native.CUDA.path, host and Path(host)):
        if path is None or expected is None:
            continue
        built = _native.version_of(path)
        # what follows a plus sign is of the wheel, not of the sources
        if (built or "").partition("+")[0] != expected.partition("+")[0]:
            words = {"file": str(path), "built": built or "unknown", "version": expected}
            yield {**words, "rebuild": rebuild()}


def _instruction_set() -> Iterator[Words]:
    forced = os.environ.get("FASTPO_CPU_CAPABILITY")
    if _native.CPU.loaded and forced is not None:
        best = _native.CPU.text("fastpo_supported").split(", ")[-1]
        if forced != best:
            yield {"forced": forced, "best": best}


def _cuda_major() -> int | None:
    """The major version of the CUDA that torch has and the driver runs; None without a driver or without CUDA."""
    driver = _native.cuda_driver()
    if torch.version.cuda is None or not driver:
        return None
    return min(int(torch.version.cuda.split(".")[0]), driver // 1000)


def _install_nvrtc(major: int) -> str:
    return f"pip install cupy-cuda{major}x nvidia-cuda-nvrtc{f'-cu{major}' if major < 13 else ''}"


def _driver() -> Iterator[Words]:
    path, major = _native.CUDA.path, _cuda_major()
    if path is None or major is None or _native.CUDA.failed or _native.driver_runs(_native.cuda_built_with(path)):
        return
    yield {
        "file": str(path),
        "built": _native.dotted(_native.cuda_built_with(path)),
        "driver": _native.dotted(_native.cuda_driver()),
        "instead": "the reference serves" if nvrtc.why_not() else "NVRTC serves",
        "nvrtc": _install_nvrtc(major),
    }


def _architecture() -> Iterator[Words]:
    major = _cuda_major()
    if major is None or not _native.CUDA.loaded or not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        if reason := _native.why_not_compiled_for(torch.device("cuda", index)):
            yield {"device": torch.cuda.get_device_name(index), "reason": reason, "nvrtc": _install_nvrtc(major)}


def _nvrtc() -> Iterator[Words]:
    major = _cuda_major()
    if major and not _native.CUDA.loaded and (reason := nvrtc.why_not()):
        yield {"library": str(_native.CUDA.error), "reason": reason, "nvrtc": _install_nvrtc(major)}


def _cupy() -> Iterator[Words]:
    wanted = _cuda_major()
    names = {found.metadata["Name"].lower() for found in distributions()} if wanted else set()
    majors = {name: int(found[1]) for name in names if (found := re.fullmatch(r"cupy-cuda(\d+)x", name))}
    if wanted is None or not majors or wanted in majors.values():
        return
    # CuPy for an older CUDA does where it finds the NVRTC of that one
    if max(majors.values()) > wanted or nvrtc.why_not():
        yield {"installed": " ".join(majors), "wanted": str(wanted), "nvrtc": _install_nvrtc(wanted)}


def _triton() -> Iterator[Words]:
    if not _native.why_not_triton(torch.device("cuda")) or not (torch.version.cuda or torch.version.hip):
        return
    # torch says which one it goes with
    asked = (requirement.partition(";")[0].strip() for requirement in requires("torch") or ())
    triton = next((r for r in asked if re.match(r"(pytorch-)?triton\b", r)), None)
    has = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    yield {"platform": has, "triton": triton or ("triton-windows" if sys.platform == "win32" else "triton")}
