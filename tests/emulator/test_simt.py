"""The emulator itself: every bug planted in bugs.cpp is an error, and the same kernel without it is not."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from tests.emulator.harness import HERE, Emulator, build

BUGS = {
    "missing_barrier": "with no barrier after thread .* read it",
    "missing_warp_barrier": "is (written|read) by .* with no barrier after thread .* (wrote|read) it",
    "shuffle_as_fence": "is read by .* with no barrier after thread .* wrote it",
    "shared_out_of_bounds": "index 32 is outside the 32 cells of the shared array at .*bugs.cpp",
    "uninitialised": "cell 7 of the shared array .* is read by thread 56 .* before anyone wrote it",
    "divergent_barrier": "divergent barrier",
    "barrier_after_exit": "barrier after early exit: thread 63",
    "half_warp_shuffle": "has ended, but its warp waits for it",
    "divergent_shuffle": "divergent warp operation",
    "read_behind": "thread 63 of block 0 reads 4 bytes outside all tensors",
    "write_input": "writes 4 bytes outside all tensors, 0 bytes from tensor 0 .read only.",
    "misaligned_vector": "reads 16 bytes at an address that is no multiple of 16",
    "int_overflow": "a signed integer overflows at .*bugs.cpp",
}


class Arguments(ctypes.Structure):
    _fields_ = (
        ("fixed", ctypes.c_int),
        ("n", ctypes.c_int64),
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = Emulator(build("bugs", sources=[HERE / "bugs.cpp"]))
    emulator.library.bug_run.restype = ctypes.c_char_p
    return emulator


@pytest.mark.parametrize("in_reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug(emulator, bug, in_reverse):
    # aligned as the caching allocator of a GPU aligns
    values, out = torch.ones(80)[:64], torch.zeros(80)[:64]
    assert values.data_ptr() % 16 == 0
    emulator.reversed = in_reverse
    emulator.configure(reads=[values], writes=[out])
    found = {}
    for fixed in (0, 1):
        arguments = Arguments(fixed, 2**30, values.data_ptr(), out.data_ptr())
        error = emulator.library.bug_run(bug.encode(), ctypes.byref(arguments))
        found[fixed] = error.decode() if error else None
    assert found[1] is None
    assert found[0] is not None
    assert re.search(BUGS[bug], found[0]), found[0]


def test_results_of_the_fixed_kernels(emulator):
    """That nothing is reported does not mean that nothing was run."""
    values, out = torch.arange(64.0), torch.zeros(64)
    emulator.configure(reads=[values], writes=[out])
    arguments = Arguments(1, 1, values.data_ptr(), out.data_ptr())
    expected = {
        "missing_barrier": values.sum().expand(64),
        "missing_warp_barrier": values.view(32, 2).flip(1).flatten(),
        "half_warp_shuffle": values[torch.arange(64) ^ 8],
    }
    for kernel, want in expected.items():
        assert emulator.library.bug_run(kernel.encode(), ctypes.byref(arguments)) is None
        assert torch.equal(out, want), kernel


def test_votes_shuffles_atomics(emulator):
    values, out = torch.arange(64.0), torch.full((65,), torch.nan)
    emulator.reversed = False
    emulator.configure(reads=[values], writes=[out])
    arguments = Arguments(1, 1, values.data_ptr(), out.data_ptr())
    assert emulator.library.bug_run(b"operations", ctypes.byref(arguments)) is None
    lane = torch.arange(64)
    assert torch.equal(out[:64], values[lane // 32 * 32 + lane % 32 // 4])
    assert out[64] == 128


def test_unknown_kernel(emulator):
    with pytest.raises(RuntimeError, match="there is no such kernel"):
        emulator.launch("nothing", 1, 32, [], reads=[], writes=[])
