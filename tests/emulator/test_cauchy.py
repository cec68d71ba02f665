"""The CUDA kernels of cauchy, emulated, as tests/emulator/test_affine_scan.py does it."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels.cuda import arguments
from fastpo.kernels.cuda import cauchy as launch
from tests.emulator.harness import Compiled, Emulator, assert_structs, compiled_launch, few_blocks
from tests.kernels import test_cauchy as cases
from tests.kernels.test_cauchy import assert_terms, by_dtype, by_form, make, one_thread, product, random  # noqa: F401


class TestForward(Compiled, cases.TestForward):
    @pytest.fixture(autouse=True)
    def few_shapes(self, monkeypatch):
        """Less and more than a group of terms and the shared poles, and several blocks of nodes."""
        monkeypatch.setattr(cases, "SHAPES", [(0, 3), (1, 0), (1, 1), (7, 63), (65, 130), (9, 300)])


class TestGradient(Compiled, cases.TestGradient): ...


class TestOps(Compiled):
    test_opcheck = cases.TestOps.test_opcheck
    test_op_refuses_what_the_public_function_never_passes = (
        cases.TestOps.test_op_refuses_what_the_public_function_never_passes
    )


def gradients(case: list[Tensor], symmetric: bool, up: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in case]
    return torch.autograd.grad(fastpo.cauchy(*leaves, symmetric=symmetric), leaves, up)


@pytest.fixture
def slow_double(checked) -> Iterator[Emulator]:
    """A device on which single precision is computed in itself."""
    checked.fast_double = False
    yield checked
    checked.fast_double = True


class TestLaunchFromPython:
    """No access outside the tensors, at no shape, in no order of the threads."""

    @by_form
    @by_dtype
    def test_shapes(self, checked, dtype, symmetric):
        for poles, nodes in [(0, 3), (1, 1), (5, 33), (66, 40), (3, 300)]:
            case = make(poles, nodes, dtype, seed=poles)
            assert_terms(product(*case, symmetric), *case, symmetric, dtype == torch.complex64)
            self.check_gradients(case, symmetric)
        suffix = "f64" if dtype == torch.complex128 else "f32_in_f64"
        assert set(checked.launched) == {f"cauchy_{suffix}", f"cauchy_slopes_{suffix}", f"cauchy_poles_{suffix}"}

    def check_gradients(self, case: list[Tensor], symmetric: bool) -> None:
        """As in complex128, up to the roundings of sums whose terms are all of the size of the largest gradient."""
        up = random((2, case[1].shape[-1]), case[0].dtype, 5)
        with fastpo.use_backend("reference"):
            want = gradients([t.to(torch.complex128) for t in case], symmetric, up.to(torch.complex128))
        for ours, truth, steps in zip(gradients(case, symmetric, up), want, (up, case[0], up), strict=True):
            scale = truth.abs().max().item() if truth.numel() else 0.0
            loss = 16 + steps.shape[-1] ** 0.5
            assert torch.allclose(
                ours.to(truth.dtype), truth, rtol=0, atol=loss * torch.finfo(case[0].dtype).eps * scale
            )

    @by_form
    def test_single_precision_arithmetic(self, slow_double, symmetric):
        """Each term to 4 ulp, the sum compensated."""
        for poles, nodes in [(1, 1), (7, 40), (70, 33), (3, 600)]:
            case = make(poles, nodes, torch.complex64, seed=poles)
            assert_terms(product(*case, symmetric), *case, symmetric, exactly=False)
            self.check_gradients(case, symmetric)
        names = {"cauchy_f32", "cauchy_slopes_f32", "cauchy_poles_f32"}
        assert set(slow_double.launched) == names

    @by_form
    def test_single_precision_sums_of_many_terms(self, slow_double, symmetric):
        """Of like terms no more is lost than by rounding each term: their number does not multiply it."""
        v, w = torch.ones(1, 500, dtype=torch.complex64), make(500, 1, torch.complex64, (1,))[2]
        w = torch.complex(-1 - w.imag.abs() / w.imag.abs().max() / 16, torch.zeros(1, 500))
        z = torch.tensor([0.5j, 0.25 + 0.1j])
        found = product(v, z, w, symmetric)
        truth = product(v.to(torch.complex128), z.to(torch.complex128), w.to(torch.complex128), symmetric)
        assert ((found - truth).abs() <= 4 * torch.finfo(torch.float32).eps * truth.abs()).all()

    @by_form
    def test_single_precision_at_its_ends(self, slow_double, monkeypatch, symmetric):
        """Near poles, at them, and where squares leave the range: 4 ulp of each term as elsewhere."""

        def of_each_term(found: Tensor, v: Tensor, z: Tensor, w: Tensor, form: bool, exactly: bool) -> None:
            assert_terms(found, v, z, w, form, exactly=False)

        monkeypatch.setattr(cases, "assert_terms", of_each_term)
        tests = cases.TestForward()
        tests.test_near_poles(torch.complex64, symmetric)
        tests.test_at_poles("native", torch.complex64, symmetric)
        tests.test_far_out(torch.complex64, symmetric)
        tests.test_nan_stays_where_it_is("native")

    @by_form
    @by_dtype
    def test_gradients_at_a_pole(self, checked, dtype, symmetric):
        """Not finite of the pole and of the node that is one, and as before of the others, to the bit."""
        case, up = make(9, 70, dtype, (2,)), random((2, 70), dtype, 3)
        case[1][4] = case[2][0, 2] + 1
        before = gradients(case, symmetric, torch.where(torch.arange(70) == 4, 0, up))
        case[1][4] = case[2][0, 2]
        hit = gradients(case, symmetric, up)
        assert not hit[0][0, 2].isfinite() and not hit[1][4].isfinite() and not hit[2][0, 2].isfinite()
        case[1][4] = 1e30
        missed = gradients(case, symmetric, torch.where(torch.arange(70) == 4, 0, up))
        rest = torch.arange(70) != 4
        assert torch.equal(hit[1][rest], before[1][rest])
        for i in (0, 2):
            poles = torch.ones(2, 9, dtype=torch.bool)
            poles[0, 2] = False
            assert hit[i][poles].isfinite().all()
            # a node without an upstream gradient leaves no trace, wherever it is
            assert torch.allclose(before[i], missed[i], rtol=64 * torch.finfo(dtype).eps)

    def test_parts(self, checked):
        """Few poles and many nodes: warps take parts of them, which are added up in their order."""
        case = make(3, 2500, torch.complex64, (1,))
        up = random((1, 2500), torch.complex64, 2)
        found = gradients(case, True, up)
        assert checked.launched[-1] == "cauchy_pole_sums"
        with fastpo.use_backend("reference"):
            want = gradients([t.to(torch.complex128) for t in case], True, up.to(torch.complex128))
        for ours, truth in zip(found, want, strict=True):
            assert (ours - truth).abs().max() <= torch.finfo(torch.float32).eps * truth.abs().max()
        assert all(map(torch.equal, found, gradients(case, True, up)))

    def test_more_work_than_blocks(self, checked, monkeypatch):
        """Blocks go on to further work: shown with few blocks."""
        case = make(5, 300, torch.complex64, (4,))
        up = random((4, 300), torch.complex64, 2)
        want = [product(*case), *gradients(case, True, up)]
        monkeypatch.setattr(launch, "cauchy_shape", few_blocks(launch.cauchy_shape, 2))
        monkeypatch.setattr(launch, "cauchy_parts", few_blocks(launch.cauchy_parts, 1))
        found = [product(*case), *gradients(case, True, up)]
        assert all(map(torch.equal, found, want))

    def test_broadcast(self, checked):
        """Operands are read where they are, by their strides."""
        cases.TestForward().test_leading_dimensions()
        cases.TestForward().test_views()

    def test_equals_the_compiled_launch(self, checked, ops):
        for dtype, symmetric in itertools.product((torch.complex64, torch.complex128), (True, False)):
            case = make(9, 1500, dtype, (2,))
            up = random((2, 1500), dtype, 1)
            ours = [product(*case, symmetric), *gradients(case, symmetric, up)]
            with compiled_launch(ops):
                theirs = [product(*case, symmetric), *gradients(case, symmetric, up)]
            assert all(map(torch.equal, ours, theirs))


class TestShapes:
    """The launch from Python restates structs and grids of the C++ side."""

    def test_structs(self, exports):
        assert_structs(exports.fastpo_cauchy_struct_size, launch.Cauchy, launch.CauchyShape, arguments.Parts)

    def test_grids(self, exports):
        out = (ctypes.c_longlong * 4)()
        sizes = [0, 1, 2, 5, 127, 128, 129, 1024, 1025, 65_535, 2**20 + 1, 2**33 + 7]
        for rows, nodes, in_double in itertools.product(sizes, sizes, (False, True)):
            exports.fastpo_cauchy_shape(ctypes.c_longlong(rows), ctypes.c_longlong(nodes), int(in_double), out)
            s = launch.cauchy_shape(rows, nodes, in_double)
            assert list(out[:3]) == [s.blocks, s.tiles, s.threads], (rows, nodes, in_double)
            assert 1 <= s.blocks < 2**31
        for rows, terms, length, width in itertools.product(sizes, [0, 1, 4, 33, 2**20], sizes, (2, 4)):
            given = [ctypes.c_longlong(n) for n in (rows, terms, length)]
            exports.fastpo_parts(*given, width, out)
            p = arguments.parts_of(rows, terms, length, width)
            assert list(out) == [p.blocks, p.parts, p.length, p.threads], (rows, terms, length)
            assert p.parts * p.length >= length > (p.parts - 1) * p.length or length <= 1024
            # the notes of a device's worth of warps, however long a row is
            assert p.parts == 1 or p.parts * rows * -(-terms // width) <= 4096
