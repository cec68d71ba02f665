"""Builds the emulator with the kernels of csrc/cuda in it, and runs them in place of fastpo's CPU ops."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from fastpo.kernels.affine_scan import launched_by as affine_scan
from fastpo.kernels.cauchy import launched_by as cauchy
from fastpo.kernels.cuda import nvrtc
from fastpo.kernels.listwise import launched_by as listwise
from fastpo.kernels.objective import launched_by as objective
from fastpo.kernels.policy import launched_by as policy
from fastpo.kernels.segment_stats import launched_by as segment_stats
from fastpo.kernels.vandermonde import launched_by as vandermonde

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "emulator"
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-DFASTPO_EMULATOR", f"-I{HERE}"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
# integer overflow of the kernels becomes an error of the emulator's
CHECKED = ["-fsanitize=signed-integer-overflow"]
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time, of those that run tests side by side."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(source: Path, options: Sequence[str], name: str) -> Path:
    """The object of a source, made again when anything it may include has changed."""
    target = FOLDER / f"{name}.o"
    inputs = [source, *HERE.glob("*.h"), *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    command = ["g++", *FLAGS, *options, "-c", str(source), "-o", str(target)]
    stamp = target.with_suffix(".command")
    if (
        not target.exists()
        or any(p.stat().st_mtime > target.stat().st_mtime for p in inputs)
        or stamp.read_text() != shlex.join(command)
    ):
        subprocess.run(command, check=True)
        stamp.write_text(shlex.join(command))
    return target


@_alone()
def build(name: str = "emulator", defines: Mapping[str, str] | None = None, sources: Sequence[Path] = ()) -> Path:
    """A library of the emulator and the kernels; `sources` are compiled in addition."""
    given = [f"-D{key}={value}" for key, value in (defines or {}).items()]
    kernels = [_compile(path, [*CHECKED, *given], f"{name}-{path.stem}") for path in (HERE / "kernels.cpp", *sources)]
    objects = [_compile(HERE / "simt.cpp", [], "simt"), *kernels]
    library = FOLDER / f"{name}.so"
    subprocess.run(["g++", "-shared", "-Wl,--no-undefined", *map(str, objects), "-o", str(library)], check=True)
    return library


@_alone()
def build_ops() -> Path:
    """The compiled ops for CUDA, csrc/torch/cuda and csrc/cuda/*.cu, over the emulator."""
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    objects = [_compile(HERE / "simt.cpp", [], "simt")]
    # versions.cu has no kernels, only questions to a real driver
    for path in sorted(p for p in (ROOT / "csrc" / "cuda").glob("*.cu") if p.stem != "versions"):
        objects.append(_compile(path, [*CHECKED, "-x", "c++"], f"ops-{path.stem}-launch"))
    for path in sorted((ROOT / "csrc" / "torch" / "cuda").glob("*.cpp")):
        objects.append(_compile(path, [*includes, TORCH_TARGET], f"ops-{path.stem}-torch"))
    library = FOLDER / "ops.so"
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command = ["g++", "-shared", "-Wl,--no-undefined", *map(str, objects), *libraries, "-ltorch", "-ltorch_cpu"]
    subprocess.run([*command, "-lc10", "-o", str(library)], check=True)
    return library


def assert_structs(size: Callable[[int], int], *structs: type[ctypes.Structure]) -> None:
    """The launch from Python has the structs of the C++ side, whose sizes `size` tells."""
    assert [size(which) for which in range(len(structs))] == [ctypes.sizeof(struct) for struct in structs]


def few_blocks(shape: Callable[..., Any], blocks: int = 2) -> Callable[..., Any]:
    """The function that shapes a launch, with so many blocks, which must then go on to further work."""

    def shaped(*arguments: Any) -> Any:
        s = shape(*arguments)
        s.blocks = blocks
        return s

    return shaped


def _extent(t: Tensor) -> tuple[int, int]:
    """The memory from a tensor's first element to its last."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


class Emulator:
    """A `Launcher` that runs kernels on CPU tensors.

    Attributes:
        reversed: whether threads and blocks run from the last to the first.
        blocks: the blocks to run; all, if empty.
        launched: names of the kernels run so far.
        fast_double: whether the device's double precision is worth using for single.
    """

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.simt_run.restype = ctypes.c_char_p
        self.reversed = False
        self.blocks: list[int] = []
        self.launched: list[str] = []
        self.fast_double = True

    def configure(self, reads: Iterable[Tensor | None], writes: Iterable[Tensor | None]) -> None:
        """Say what the next launch may touch."""
        ranges = [(*_extent(t), w) for w, tensors in enumerate((reads, writes)) for t in tensors if t is not None]
        numbers = [n for r in ranges for n in r]
        self.library.simt_configure(
            int(self.reversed),
            len(ranges),
            (ctypes.c_int64 * len(numbers))(*numbers),
            len(self.blocks),
            (ctypes.c_int64 * len(self.blocks))(*self.blocks),
        )

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
        self.configure(reads, writes)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self.launched.append(kernel)
        error = self.library.simt_run(kernel.encode(), ctypes.c_int64(blocks), ctypes.c_int64(threads), pointers)
        if error:
            raise RuntimeError(f"{kernel}: {error.decode()}")

    def has_fast_double(self, device: torch.device) -> bool:
        return self.fast_double


# the ops of each kernel of csrc/cuda
KERNELS = (objective, affine_scan, policy, segment_stats, listwise, cauchy, vandermonde)


@contextlib.contextmanager
def in_place_of_cpu(implementations: Mapping[str, object]) -> Iterator[None]:
    """Let the ops of `fastpo` on CPU tensors be these, for the time of the block."""
    library = torch.library.Library("fastpo", "IMPL")
    for name, function in implementations.items():
        library.impl(name, function, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def python_launch(emulator: Emulator) -> Iterator[None]:
    """The ops as CuPy's launcher runs them."""
    served = [launched_by(emulator) for launched_by in KERNELS]
    with in_place_of_cpu({name: function for ops in served for name, function in ops.items()}):
        yield


_OPS: list[str] = []


@contextlib.contextmanager
def compiled_launch(library: Path) -> Iterator[None]:
    """The ops as the compiled library `_cuda` runs them."""
    if not _OPS:
        # nothing is launched: this is for the names
        names = [name for launched_by in KERNELS for name in launched_by(nvrtc.Driver(""))]
        for name in names:
            schema = getattr(torch.ops.fastpo, name).default._schema
            torch.library.define(f"fastpo_emulator::{name}", str(schema).removeprefix(f"fastpo::{name}"))
        ctypes.CDLL(str(library))
        _OPS.extend(names)
    with in_place_of_cpu({name: getattr(torch.ops.fastpo_emulator, name).default for name in _OPS}):
        yield


class Compiled:
    """Runs the cases of a class on the compiled launch."""

    @pytest.fixture(autouse=True)
    def emulated(self, ops: Path) -> Iterator[None]:
        with compiled_launch(ops):
            yield
