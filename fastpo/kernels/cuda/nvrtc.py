"""Device code compiled by NVRTC and launched through the driver, both by CuPy's bindings.

The sources are those of the compiled library, csrc/cuda; so no user needs nvcc, and a driver older than the CUDA that
the library was built with is served by the NVRTC of torch's own CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastpo.kernels import _native
from fastpo.kernels._native import constant_when_traced

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)".*$', re.MULTILINE)


class Launcher(Protocol):
    """What runs a kernel: the driver, or the emulator of the tests."""

    def launch(
        self,
        kernel: str,
        blocks: int,
        threads: int,
        arguments: Sequence[ctypes.Structure],
        *,
        reads: Iterable[Tensor | None],
        writes: Iterable[Tensor | None],
    ) -> None:
        """Run `kernel` on a one-dimensional grid; it touches nothing but the tensors named."""
        ...

    def has_fast_double(self, device: torch.device) -> bool:
        """Whether the device computes in double at half the rate of single precision."""
        ...


@constant_when_traced
def why_not() -> str | None:
    """None if CuPy is there to compile and launch, with an NVRTC that it finds, else the reason."""
    return _why_not()


@functools.cache
def _why_not() -> str | None:
    if importlib.util.find_spec("cupy_backends") is None:
        return "CuPy, which would compile it by NVRTC, is not installed"
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # of CuPy's search for the library, which has errors of its own
        return f"CuPy finds no NVRTC: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def source_folder() -> Path:
    """csrc, in a source tree or as a wheel carries it."""
    package = Path(__file__).parents[2]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cuda").is_dir():
            return folder
    raise FileNotFoundError(f"fastpo's device sources are neither in {package} nor beside it")


def flatten(path: Path) -> str:
    """The source with its includes in place, each file once, as NVRTC reads no files."""
    seen: set[Path] = set()

    def text(file: Path) -> str:
        seen.add(file)

        def inlined(match: re.Match[str]) -> str:
            included = (file.parent / match[1]).resolve()
            if included in seen:
                return ""
            # the emulator's header stands behind a condition that is false here
            return text(included) if included.exists() else match[0]

        return _INCLUDE.sub(inlined, file.read_text().replace("#pragma once", ""))

    return text(path.resolve())


def compile_source(
    source: str, architecture: int, defines: Mapping[str, str], *, log: list[str] | None = None
) -> bytes:
    """Machine code for sm_`architecture`; a RuntimeError holds the compiler's messages.

    `log` receives the assembler's report on each kernel: registers, stack, spills.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source, "fastpo.cu", (), ())
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++20"]
    options += ["--ptxas-options=-v"] if log is not None else []
    options += [f"-D{name}={value}" for name, value in defines.items()]
    try:
        nvrtc.compileProgram(program, options)
        if log is not None:
            log.append(nvrtc.getProgramLog(program))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"NVRTC: {error}\n{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


def cache_folder() -> Path:
    """Where compiled kernels are kept: $FASTPO_CACHE_DIR, or fastpo in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastpo"
    return Path(os.environ.get("FASTPO_CACHE_DIR") or default)


def cubin(source: str, architecture: int, defines: Mapping[str, str]) -> bytes:
    """As `compile_source`, kept on disk; a cache that cannot be written is no error."""
    from cupy_backends.cuda.libs import nvrtc

    key = repr((source, architecture, sorted(defines.items()), nvrtc.getVersion()))
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    code = compile_source(source, architecture, defines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # several processes may compile the same kernel at once: each writes a file of its own and moves it there
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        pass
    return code


def _architecture(device: int) -> int:
    """The newest architecture that NVRTC knows and the device runs: one of its own major version."""
    from cupy_backends.cuda.libs import nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    fitting = [a for a in nvrtc.getSupportedArchs() if a // 10 == major and a % 10 <= minor]
    if not fitting:
        version = ".".join(map(str, nvrtc.getVersion()))
        raise RuntimeError(f"NVRTC {version} does not compile for the compute capability {major}.{minor} of {device}")
    return max(fitting)


@functools.cache
def _function(name: str, file: str, defines: tuple[tuple[str, str], ...], device: int) -> int:
    """The kernel, loaded on the device, which must be the current one. It stays loaded: graphs may hold it."""
    from cupy_backends.cuda.api import driver

    return driver.moduleGetFunction(_module(file, defines, device), name)


@functools.cache
def _module(file: str, defines: tuple[tuple[str, str], ...], device: int) -> int:
    from cupy_backends.cuda.api import driver

    source = flatten(source_folder() / "cuda" / file)
    return driver.moduleLoadData(cubin(source, _architecture(device), dict(defines)))


@functools.cache
def _has_fast_double(device: int) -> bool:
    from cupy_backends.cuda.api import runtime

    return runtime.deviceGetAttribute(runtime.cudaDevAttrSingleToDoublePrecisionPerfRatio, device) <= 2


class Driver:
    """Launches kernels of one file of csrc/cuda on the current stream of the tensors' device."""

    def __init__(self, file: str, defines: Mapping[str, str] | None = None):
        self.file, self.defines = file, tuple(sorted((defines or {}).items()))

    def launch(
        self,
        kernel: str,
        blocks: int,
        threads: int,
        arguments: Sequence[ctypes.Structure],
        *,
        reads: Iterable[Tensor | None],
        writes: Iterable[Tensor | None],
    ) -> None:
        from cupy_backends.cuda.api import driver, runtime

        device = next(t.device for t in writes if t is not None)
        pointers: Any = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        with torch.cuda.device(device):
            # a fresh thread, as autograd's, has no context until something of the runtime asks for it
            if not driver.ctxGetCurrent():
                runtime.setDevice(torch.cuda.current_device())
            stream = torch.cuda.current_stream().cuda_stream
            function = _function(kernel, self.file, self.defines, torch.cuda.current_device())
            driver.launchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(pointers), 0)

    def has_fast_double(self, device: torch.device) -> bool:
        return _has_fast_double(torch.cuda.current_device() if device.index is None else device.index)


def _why_not_cuda(device: torch.device, *dtypes: torch.dtype) -> str | None:
    if _native.CUDA.loaded:
        return _native.why_not_compiled_for(device)
    return why_not() and f"_cuda: {_native.CUDA.error}; {why_not()}"


def serve(
    kernel: str, launched_by: Callable[[Launcher], Mapping[str, object]], source: str | None = None
) -> torch.library.Library | None:
    """Say who serves a kernel of csrc/cuda on CUDA devices: `_cuda`, or NVRTC, by the ops that `launched_by` gives for
    a launcher. They are registered while the result is kept."""
    _native.on_cuda(kernel, _why_not_cuda, by="compiled" if _native.CUDA.loaded else "NVRTC")
    if _native.CUDA.loaded:
        return None
    library = torch.library.Library("fastpo", "IMPL")
    for name, function in launched_by(Driver(source or f"{kernel}.cuh")).items():
        library.impl(name, function, "CUDA")
    return library
