"""The CUDA kernel of segment_stats, emulated, as tests/emulator/test_affine_scan.py does it."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from fastpo.kernels.cuda import segment_stats as launch
from fastpo.reference.segments import MODES
from tests.emulator.harness import Compiled, compiled_launch, few_blocks
from tests.kernels import test_segment_stats as cases
from tests.kernels.test_segment_stats import LAYOUTS, make, normalize, stats


class TestValues(Compiled, cases.TestValues):
    @pytest.fixture(autouse=True)
    def few_shapes(self, monkeypatch):
        """A warp's segments alone, as the emulator is slow; TestLaunchFromPython has a block's."""
        monkeypatch.setattr(cases, "SHAPES", [(1, 0), (3, 2), (5, 7), (1, 40)])


class TestGroups(Compiled, cases.TestGroups): ...


class TestOps(Compiled):
    test_opcheck = cases.TestOps.test_opcheck


class TestLaunchFromPython:
    """No access outside the tensors, at no shape, in no order of the threads."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_shapes(self, checked, dtype, layout):
        eps = torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps
        for i, (groups, members) in enumerate([(0, 3), (1, 0), (1, 1), (3, 31), (9, 5), (1, 1024), (2, 1100)]):
            case = make(layout, groups, members, dtype, seed=i)
            for mode in MODES:
                ours, want = (normalize(case, backend, mode=mode) for backend in ("native", "reference"))
                assert torch.allclose(ours, want, rtol=64 * eps, atol=64 * eps), (mode, groups, members)
            if case["group_ids"] is None:
                for ours, want in zip(*(stats(case, b, skip_nan=True) for b in ("native", "reference")), strict=True):
                    assert torch.allclose(ours, want, rtol=64 * eps, atol=64 * eps * members)
        assert set(checked.launched) == {"segment_stats"}

    def test_more_segments_than_blocks(self, checked, monkeypatch):
        monkeypatch.setattr(launch, "team_shape", few_blocks(launch.team_shape))
        for layout, (groups, members) in itertools.product(LAYOUTS, [(70, 4), (5, 1100)]):
            case = make(layout, groups, members, torch.float64)
            assert torch.allclose(*(normalize(case, backend) for backend in ("native", "reference")), rtol=1e-11)

    @pytest.mark.parametrize("bad", [[0, 9, 6], [0, -1, 6], [3, 2, 6], [0, 4, 2_000_000_000], [-5, 0, 6], [0, 3, -2]])
    def test_bad_boundaries_read_nothing(self, checked, bad):
        """Segments with bad boundaries have NaN statistics, and what stands in no segment is NaN."""
        values = torch.arange(6.0)
        found, normal, _ = torch.ops.fastpo.segment_stats(
            values, None, None, None, torch.tensor(bad), 0, 1, 0.0, False, False, 7
        )
        inside = [0 <= a <= b <= 6 and (i > 0 or a == 0) for i, (a, b) in enumerate(itertools.pairwise(bad))]
        assert found.isnan().any(0).tolist() == [not ok for ok in inside]
        held = torch.zeros(6, dtype=torch.bool)
        for i, (a, b) in enumerate(itertools.pairwise([*bad, 6])):
            if 0 <= a <= b <= 6 and (i > 0 or a == 0):
                held[a:b] = True
        assert torch.equal(normal.isnan(), ~held)

    def test_bad_order_reads_nothing(self, checked):
        order = torch.tensor([0, 9, -1, 2])
        _, normal, _ = torch.ops.fastpo.segment_stats(
            torch.tensor([1.0, 5, 3, 7]), None, None, order, torch.tensor([0, 4]), 0, 1, 0.0, False, False, 7
        )
        assert normal[[0, 2]].tolist() == [-1, 1] and normal[[1, 3]].isnan().all()

    def test_equals_the_compiled_launch(self, checked, ops):
        for layout, dtype in itertools.product(LAYOUTS, (torch.float32, torch.float64, torch.bfloat16)):
            case = make(layout, 9, 20, dtype)
            ours = [normalize(case, mode=mode) for mode in MODES]
            with compiled_launch(ops):
                theirs = [normalize(case, mode=mode) for mode in MODES]
            assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_struct(exports):
    assert ctypes.sizeof(launch.Segments) == exports.fastpo_segments_size()
