"""The compiled libraries: finding them, choosing between them and the reference, and saying why.

Importing this module never warns: what could not be loaded is remembered and shown by `fastpo.info()`.
With FASTPO_REQUIRE_NATIVE=1 in the environment a library that does not load is an ImportError instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn, TypeVar

import torch

Backend = Literal["auto", "native", "reference"]

_F = TypeVar("_F", bound=Callable[..., object])

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_backend: Backend = "auto"
# the major compute capabilities that setup.py compiles for
_CUDA_MAJORS = (8, 9, 10, 12)


def constant_when_traced(function: _F) -> _F:
    """`torch.compiler.assume_constant_result`, which imports the compiler, seconds of it, to set this mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass
class Library:
    """One compiled library: where it is, or why it is not there."""

    name: str
    path: Path | None = None
    error: str | None = None
    # the file is there, and should have been loaded
    failed: bool = False
    handle: ctypes.CDLL | None = None
    formulas: dict[str, int] = field(default_factory=dict)
    unpaired_formulas: dict[str, int] = field(default_factory=dict)
    hyper_parameters: tuple[str, ...] = ()
    policy_formulas: dict[str, int] = field(default_factory=dict)
    policy_numbers: tuple[str, ...] = ()
    policy_choices: tuple[str, ...] = ()
    list_kinds: dict[str, int] = field(default_factory=dict)

    @property
    def loaded(self) -> bool:
        return self.handle is not None and self.error is None

    def text(self, symbol: str) -> str:
        """What an exported `const char* symbol()` of the library says."""
        assert self.handle is not None
        function = self.handle[symbol]
        function.restype = ctypes.c_char_p
        return function().decode()


_PACKAGE = Path(__file__).parent.parent


def _find(name: str) -> list[Path]:
    suffix = "pyd" if sys.platform == "win32" else "so"
    return sorted(_PACKAGE.glob(f"{name}*.{suffix}"))


def _not_built(name: str) -> str:
    """Why there is no library, in the words that setup.py left."""
    try:
        left = json.loads((_PACKAGE / "not_built.json").read_text())
    except (OSError, ValueError):
        left = {}
    why = left.get(name, "fastpo was built without nvcc" if name == "_cuda" else None)
    return f"not built ({why})" if why else "not built"


def _cut_short(path: Path) -> str | None:
    """What is wrong with an ELF file whose end is missing: of most such the loader dies (SIGBUS), without a word."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return None
    (table,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    whole, there = table + size * count, path.stat().st_size
    return f"the file is cut short, {there:,} of {whole:,} bytes" if there < whole else None


def _open(name: str) -> Library:
    library = Library(name, path=next(iter(_find(name)), None))
    if library.path is None:
        library.error = _not_built(name)
        return library
    library.error = _cut_short(library.path)
    try:
        if library.error is None:
            library.handle = ctypes.CDLL(str(library.path))
    except OSError as error:
        library.error = str(error)
    library.failed = library.handle is None
    return library


def _load(name: str) -> Library:
    library = _open(name)
    if library.handle is None:
        return library
    try:
        library.formulas = {n: i for i, n in enumerate(library.text("fastpo_formulas").split(","))}
        library.unpaired_formulas = {n: i for i, n in enumerate(library.text("fastpo_unpaired_formulas").split(","))}
        library.hyper_parameters = tuple(library.text("fastpo_hyper_parameters").split(","))
        library.policy_formulas = {n: i for i, n in enumerate(library.text("fastpo_policy_formulas").split(","))}
        library.policy_numbers = tuple(library.text("fastpo_policy_numbers").split(","))
        library.policy_choices = tuple(library.text("fastpo_policy_choices").split(","))
        library.list_kinds = {n: i for i, n in enumerate(library.text("fastpo_list_kinds").split(","))}
        # reads FASTPO_CPU_CAPABILITY; an unknown or unsupported value is an error, not a fallback
        problem = library.text("fastpo_capability_error")
    except AttributeError as error:
        library.handle, library.error, library.failed = None, str(error), True
        return library
    if problem:
        raise RuntimeError(problem)
    return library


def _import_host() -> tuple[ModuleType | None, str | None]:
    spec = importlib.util.find_spec("fastpo._host")
    if spec is None or spec.origin is None:
        return None, "there is none for this Python" if _find("_host") else _not_built("_host")
    if cut := _cut_short(Path(spec.origin)):
        return None, cut
    try:
        return importlib.import_module("fastpo._host"), None
    except ImportError as error:
        return None, str(error)


def version_of(path: Path) -> str | None:
    """The version of fastpo that a library says it is of, read from the file; None if it does not say."""
    found = re.search(rb"fastpo version ([\w.+]+)", path.read_bytes())
    return found[1].decode() if found else None


def cuda_driver() -> int:
    """The newest CUDA that the installed driver runs, 13010 for 13.1; 0 without a driver. It starts nothing."""
    try:
        driver, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0
    except (OSError, AttributeError):
        return 0


def cuda_built_with(path: Path) -> int:
    """The CUDA that a `_cuda` library was built with, read from the file; 0 if it does not say."""
    found = re.search(rb"fastpo built with CUDART (\d+)", path.read_bytes())
    return int(found[1]) if found else 0


def dotted(version: int) -> str:
    """A version of CUDA as people write it: 13.1 for 13010."""
    return f"{version // 1000}.{version % 1000 // 10}"


def driver_runs(built: int) -> bool:
    """Whether the driver runs code that was built with this CUDA: within a major version, newer code runs too."""
    return cuda_driver() // 1000 >= built // 1000 > 0


def _load_cuda() -> Library:
    """The library for CUDA devices, if torch has CUDA and the driver runs the CUDA that it was built with.

    Loading it registers its ops, so what does not fit is not loaded.
    """
    library = Library("_cuda", path=next(iter(_find("_cuda")), None))
    if library.path is None:
        library.error = _not_built("_cuda")
    elif torch.version.cuda is None:
        library.error = "this torch has no CUDA"
    elif os.environ.get("FASTPO_CUDA") == "0":
        library.error = "left out by FASTPO_CUDA=0"
    elif error := _cut_short(library.path):
        library.error, library.failed = error, True
    else:
        built, driver = cuda_built_with(library.path), cuda_driver()
        if driver_runs(built):
            return _open("_cuda")
        runs = f"the driver runs CUDA {dotted(driver)} at most" if driver else "there is no driver"
        library.error = f"built with CUDA {dotted(built)}, but {runs}"
    return library


@constant_when_traced
def why_not_compiled_for(device: torch.device) -> str | None:
    """None if `_cuda` holds code for a CUDA device, else the reason."""
    return _why_not_compiled_for(device)


@functools.cache
def _why_not_compiled_for(device: torch.device) -> str | None:
    if not CUDA.loaded or not torch.cuda.is_available():
        return CUDA.error
    major, minor = torch.cuda.get_device_capability(device)
    if major in _CUDA_MAJORS:
        return None
    assert CUDA.path is not None
    # what is newer gets its code from the library's PTX, by a driver that is as new as the compiler was
    if major > min(_CUDA_MAJORS) and cuda_driver() >= cuda_built_with(CUDA.path):
        return None
    return f"_cuda has no code for the compute capability {major}.{minor}"


CPU = _load("_cpu")
CUDA = _load_cuda()
_HOST, HOST_ERROR = _import_host()
if os.environ.get("FASTPO_REQUIRE_NATIVE") == "1":
    for _name, _error in (("_cpu", CPU.error), ("_host", HOST_ERROR)):
        if _error:
            raise ImportError(f"FASTPO_REQUIRE_NATIVE=1, but fastpo.{_name} did not load: {_error}")


def host() -> ModuleType | None:
    """The pybind11 module, or None if it is not built or the reference is asked for."""
    if _backend == "reference":
        return None
    if _backend == "native" and _HOST is None:
        raise RuntimeError(f"use_backend('native'): fastpo._host did not load: {HOST_ERROR}")
    return _HOST


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Choose what computes inside the block, for debugging.

    Args:
        backend: "native" takes the compiled kernels and raises where there is none; "reference" takes plain
            torch; "auto", the default outside any block, takes the native kernel where there is one.
    """
    global _backend
    if backend not in ("auto", "native", "reference"):
        raise ValueError(f"backend must be 'auto', 'native' or 'reference', got {backend!r}")
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


# per op, why CUDA devices are not served, None if they are, and who serves them
_CUDA: dict[str, tuple[Callable[..., str | None], str]] = {}


def on_cuda(op: str, why_not: Callable[..., str | None], by: str = "compiled") -> None:
    """Say that `by` serves `op` on CUDA devices, unless `why_not(device, *dtypes)` gives a reason in words."""
    _CUDA[op] = why_not, by


# imported when the first of its kernels runs
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def why_not_triton(_: torch.device, *dtypes: torch.dtype) -> str | None:
    """For `on_cuda`, of kernels in Triton, on CUDA and HIP devices."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    for dtype in dtypes:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"no Triton kernel for {dtype}"
    return None


def server(op: str, device: torch.device) -> str:
    """Who serves `op` on a device, where `why_not` has no objection."""
    return _CUDA[op][1] if device.type == "cuda" and op in _CUDA else "compiled"


def why_not(op: str, device: torch.device, *dtypes: torch.dtype) -> str | None:
    """None if `op` has a compiled kernel for this device and these dtypes, else the reason in words."""
    if device.type == "cuda" and op in _CUDA:
        return _CUDA[op][0](device, *dtypes)
    if device.type != "cpu":
        return f"no compiled kernel for device type {device.type!r}"
    if not CPU.loaded:
        return CPU.error
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return f"no compiled kernel for {dtype}"
    return None


def refuse(reason: str) -> None:
    """Raise if the native kernel is asked for by `use_backend`, where `reason` says why there is none."""
    if _backend == "native":
        raise RuntimeError(f"use_backend('native'): {reason}")


def serves(op: str, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether the native kernel of `op` is to be taken under the backend in force."""
    if _backend == "reference":
        return False
    reason = why_not(op, device, *dtypes)
    if reason is not None:
        refuse(reason)
    return reason is None


# checks of tensor values live in C++, in front of the loop; they name the Python error they stand for
_TAGGED = re.compile(r"\[fastpo (IndexError|ValueError)\] (.*?)(?:\n|$)")
_ERRORS: dict[str, type[Exception]] = {"IndexError": IndexError, "ValueError": ValueError}


def _reraise(error: RuntimeError) -> NoReturn:
    tagged = _TAGGED.search(str(error))
    if tagged is None:
        raise error
    raise _ERRORS[tagged[1]](tagged[2]) from None


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Call an op; a check that failed in C++ becomes the Python error that it names (not under compile)."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        _reraise(error)
