"""The CUDA kernels of vandermonde, emulated, as tests/emulator/test_affine_scan.py does it."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels.cuda import vandermonde as launch
from tests.emulator.harness import Compiled, assert_structs, compiled_launch, few_blocks
from tests.kernels import test_vandermonde as cases
from tests.kernels.test_cauchy import by_dtype, by_form, random
from tests.kernels.test_vandermonde import make, product, transpose


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """Less and more than the terms in shared memory, the near steps, and a block's; TestLaunchFromPython has parts."""
    monkeypatch.setattr(cases, "SHAPES", [(0, 3), (3, 0), (1, 1), (17, 64), (9, 65), (33, 300), (2, 2100)])


class TestForward(Compiled, cases.TestForward):
    # of 2^18 steps, test_phases runs two blocks
    test_long_phases = None


class TestTranspose(Compiled, cases.TestTranspose): ...


class TestGradient(Compiled, cases.TestGradient):
    # of thousands of launches, all of them small
    test_gradcheck = None


class TestOps(Compiled):
    test_opcheck = cases.TestOps.test_opcheck
    test_op_refuses_what_the_public_function_never_passes = (
        cases.TestOps.test_op_refuses_what_the_public_function_never_passes
    )


def gradients(v: Tensor, x: Tensor, length: int, symmetric: bool, up: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (v, x)]
    return torch.autograd.grad(fastpo.vandermonde(*leaves, length, symmetric=symmetric), leaves, up)


def upstream(length: int, dtype: torch.dtype, symmetric: bool, rows: int = 2) -> Tensor:
    up = random((rows, length), dtype, 5)
    return up.real.contiguous() if symmetric else up


class TestLaunchFromPython:
    """No access outside the tensors, at no shape, in no order of the threads."""

    @by_form
    @by_dtype
    def test_shapes(self, checked, dtype, symmetric):
        for count, length in [(1, 1), (17, 65), (5, 130), (2, 2100)]:
            v, x = make(count, length, dtype, seed=length)
            up = upstream(length, dtype, symmetric)
            ours = [product(v, x, length, symmetric), *gradients(v, x, length, symmetric, up)]
            with fastpo.use_backend("reference"):
                wide = [t.to(torch.complex128) for t in (v, x)]
                want = gradients(*wide, length, symmetric, up.to(torch.promote_types(up.dtype, torch.float64)))
            want = [product(*wide, length, symmetric, "reference"), *want]
            # the reference rounds phases
            rounding = max(4 * torch.finfo(dtype).eps, 8 * length * torch.finfo(torch.float64).eps)
            for one, truth in zip(ours, want, strict=True):
                assert torch.allclose(one.to(truth.dtype), truth, rtol=0, atol=rounding * truth.abs().max().item())
        names = {"vandermonde", "vandermonde_moments", "vandermonde_moment_sums"}
        assert set(checked.launched) == names

    def test_phases(self, checked):
        """The last steps of a long row, of which two blocks are run, against 80-bit floats."""
        length = 2**18
        v, x = torch.tensor([1 + 1j, 0.5 - 1j]), torch.tensor([-1e-6 + 3.1j, -2e-6 - 2.3j])
        checked.blocks = [64, 127]
        found = product(v, x, length)
        checked.blocks = []
        for block in (64, 127):
            run = range(2048 * block, 2048 * (block + 1), 97)
            each = cases.np.exp(cases.wide(x) * cases.np.array(run, dtype=cases.np.longdouble)[:, None])
            truth = 2 * (each * cases.wide(v)).sum(-1).real
            assert cases.np.abs(found[run].numpy() - truth).max() < 4e-7

    def test_parts(self, checked):
        """Few terms and many steps: warps take parts of them, which are added up in their order."""
        v, x = make(3, 3000, torch.complex64, (1,))
        u = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0))
        found = transpose(u, v, x)
        assert checked.launched == ["vandermonde_moments", "vandermonde_moment_sums"]
        truth = transpose(u.double(), v.to(torch.complex128), x.to(torch.complex128), "reference")
        assert (found - truth).abs().max() <= 4e-7 * truth.abs().max()
        assert torch.equal(found, transpose(u, v, x))

    def test_more_work_than_blocks(self, checked, monkeypatch):
        """Blocks go on to further work: shown with few blocks."""
        v, x = make(5, 2100, torch.complex64, (4,))
        up = upstream(2100, torch.complex64, True, 4)
        want = [product(v, x, 2100), *gradients(v, x, 2100, True, up)]
        monkeypatch.setattr(launch, "vandermonde_shape", few_blocks(launch.vandermonde_shape, 3))
        monkeypatch.setattr(launch, "moment_parts", few_blocks(launch.moment_parts, 1))
        found = [product(v, x, 2100), *gradients(v, x, 2100, True, up)]
        assert all(map(torch.equal, found, want))

    def test_broadcast(self, checked):
        """Operands are read where they are, by their strides."""
        cases.TestForward().test_leading_dimensions_and_views()

    def test_equals_the_compiled_launch(self, checked, ops):
        for dtype, symmetric in itertools.product((torch.complex64, torch.complex128), (True, False)):
            v, x = make(5, 1500, dtype)
            up = upstream(1500, dtype, symmetric)
            ours = [product(v, x, 1500, symmetric), *gradients(v, x, 1500, symmetric, up)]
            with compiled_launch(ops):
                theirs = [product(v, x, 1500, symmetric), *gradients(v, x, 1500, symmetric, up)]
            assert all(map(torch.equal, ours, theirs))


class TestShapes:
    """The launch from Python restates structs and grids of the C++ side."""

    def test_structs(self, exports):
        assert_structs(exports.fastpo_vandermonde_struct_size, launch.Vandermonde, launch.VandermondeShape)

    def test_grids(self, exports):
        out = (ctypes.c_longlong * 3)()
        sizes = [0, 1, 2, 63, 2047, 2048, 2049, 65_535, 2**20 + 1, 2**33 + 7]
        for rows, length in itertools.product(sizes, sizes):
            exports.fastpo_vandermonde_shape(ctypes.c_longlong(rows), ctypes.c_longlong(length), out)
            s = launch.vandermonde_shape(rows, length)
            assert list(out) == [s.blocks, s.tiles, s.threads] and 1 <= s.blocks < 2**31, (rows, length)
