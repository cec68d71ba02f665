"""The CUDA kernel of affine_scan, emulated: over the CPU kernel's own cases as the compiled library launches it, and as
Python launches it, where the emulator knows which memory a launch may touch. Both launches are then compared."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from fastpo.kernels.cuda import affine_scan as launch
from fastpo.kernels.cuda import arguments
from tests.emulator.harness import Compiled, compiled_launch, few_blocks
from tests.kernels import test_affine_scan as cases
from tests.kernels.test_affine_scan import (
    HYPER,
    LAYOUTS,
    VARIANTS,
    advantage_case,
    affine_case,
    compare,
    compare_advantages,
    evaluate,
    scan,
)


class TestValues(Compiled, cases.TestValues):
    @pytest.fixture(autouse=True)
    def few_shapes(self, monkeypatch):
        """A warp's rows, and a block's."""
        monkeypatch.setattr(cases, "SHAPES", [(1, 0), (0, 5), (1, 1), (3, 7), (5, 33), (1, 1025)])


class TestScan(Compiled, cases.TestScan): ...


class TestAutograd(Compiled, cases.TestAutograd): ...


class TestAdvantages(Compiled, cases.TestAdvantages): ...


class TestProperties(Compiled, cases.TestProperties): ...


class TestOps(Compiled):
    test_opcheck = cases.TestOps.test_opcheck

    def test_the_emulator_ran(self):
        """What these tests see is not the CPU kernel: there, bad boundaries raise; here they give NaN."""
        one, boundaries = torch.ones(6), torch.tensor([0, 9, 6], dtype=torch.int32)
        x, _ = torch.ops.fastpo.affine_scan(one, one, None, None, boundaries, True, False)
        assert x.isnan().all()


class TestLaunchFromPython:
    """No access outside the tensors, at no shape, in no order of the threads."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_shapes(self, checked, dtype, layout):
        for i, (rows, tokens) in enumerate([(1, 0), (0, 5), (1, 1), (3, 31), (9, 33), (1, 1024), (2, 1100)]):
            compare(affine_case(layout, rows, tokens, dtype, seed=i), reverse=bool(i % 2))
        assert set(checked.launched) == {"affine_scan"}

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_advantages(self, checked, layout):
        for variant, (rows, tokens) in itertools.product(VARIANTS.values(), [(3, 40), (2, 1100)]):
            case = advantage_case(layout, rows, tokens, torch.float32) | dict.fromkeys(variant)
            compare_advantages(case, skip=tokens == 40)

    @pytest.mark.parametrize("tokens", [40, 1100])
    def test_gradients(self, checked, tokens):
        for layout in LAYOUTS:
            case = affine_case(layout, 3, tokens, torch.float64)
            grads = []
            for backend in ("native", "reference"):
                leaves = [case[k].detach().clone().requires_grad_() for k in ("a", "b", "initial")]
                x = scan({**case, "a": leaves[0], "b": leaves[1], "initial": leaves[2]}, backend)
                grads.append(torch.autograd.grad(x.square().sum(), leaves))
            for ours, want in zip(*grads, strict=True):
                assert torch.allclose(ours, want, rtol=1e-10, atol=1e-10 * want.abs().max().item())

    def test_more_rows_than_blocks(self, checked, monkeypatch):
        """Blocks go on to further rows: shown with few blocks."""

        monkeypatch.setattr(launch, "team_shape", few_blocks(launch.team_shape))
        for layout, (rows, tokens) in itertools.product(LAYOUTS, [(70, 9), (5, 1100)]):
            compare(affine_case(layout, rows, tokens, torch.float32))

    @pytest.mark.parametrize("bad", [[0, 9, 6], [0, -1, 6], [3, 2, 6], [0, 4, 2_000_000_000], [-5, 0, 6], [0, 3, -2]])
    def test_bad_boundaries_read_nothing(self, checked, bad):
        """A device cannot raise: what stands in no row is NaN, and nothing outside the tensors is touched."""
        one, boundaries = torch.ones(6), torch.tensor(bad, dtype=torch.int32)
        x, before = torch.ops.fastpo.affine_scan(one, one, None, None, boundaries, True, True)
        held = torch.zeros(6, dtype=torch.bool)
        for i, (a, b) in enumerate(itertools.pairwise([*bad, 6])):
            if 0 <= a <= b <= 6 and (i > 0 or a == 0):
                held[a:b] = True
        assert torch.equal(x.isnan(), ~held) and torch.equal(before.isnan(), ~held)

    def test_equals_the_compiled_launch(self, checked, ops):
        for layout, dtype in itertools.product(LAYOUTS, (torch.float32, torch.float64, torch.bfloat16)):
            affine, rest = affine_case(layout, 5, 70, dtype), advantage_case(layout, 5, 70, dtype)
            ours = [scan(affine), scan(affine, reverse=False), *evaluate(rest, "native", skip=False)]
            with compiled_launch(ops):
                theirs = [scan(affine), scan(affine, reverse=False), *evaluate(rest, "native", skip=False)]
            assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
        assert HYPER["gamma"] < 1


class TestShapes:
    """The launch from Python restates struct and grid of the C++ side."""

    def test_struct(self, exports):
        assert ctypes.sizeof(launch.Scan) == exports.fastpo_scan_size()

    def test_grids(self, exports):
        out = (ctypes.c_longlong * 4)()
        sizes = [0, 1, 2, 7, 8, 9, 1000, 1023, 1024, 1025, 65_535, 65_536, 2**20, 2**31, 2**33 + 7]
        for rows, tokens in itertools.product(sizes, sizes):
            exports.fastpo_team_shape(ctypes.c_longlong(rows), ctypes.c_longlong(tokens), out)
            s = arguments.team_shape(rows, tokens)
            assert list(out) == [s.blocks, s.threads, s.team, s.rows], (rows, tokens)
            assert 1 <= s.blocks < 2**31 and s.threads <= 512
