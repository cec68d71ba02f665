"""The CUDA kernels of listwise, emulated, as tests/emulator/test_policy.py does it."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastpo.kernels.cuda import listwise as launch
from tests.emulator.harness import Compiled, assert_structs, compiled_launch, few_blocks
from tests.kernels import test_listwise as cases
from tests.kernels.test_listwise import CASES, LAYOUTS, compare, evaluate, make, one_thread  # noqa: F401


class TestValues(Compiled):
    @pytest.mark.parametrize("case", CASES)
    def test_empty_and_lost_lists(self, case):
        cases.TestValues().test_empty_and_lost_lists(case, "native")

    @pytest.mark.parametrize("case", CASES)
    def test_layouts(self, case):
        """A warp's lists and a block's, every layout and dtype."""
        for i, (layout, (lists, items)) in enumerate(itertools.product(LAYOUTS, [(0, 3), (3, 0), (5, 7), (2, 70)])):
            dtype = cases.DTYPES[i % 3]
            compare(case, make(case, layout, lists, items, dtype, seed=i), reduction=("mean" if lists else "sum"))

    @pytest.mark.parametrize("case", CASES)
    def test_far_scores(self, case):
        compare(case, make(case, "masked", 3, 9, torch.float32, seed=5, spread=20_000.0), reduction="none")

    def test_opcheck(self):
        cases.TestOps().test_opcheck()


class TestLaunchFromPython:
    """No access outside the tensors, at no shape, in no order of the threads."""

    @pytest.mark.parametrize("case", CASES)
    def test_shapes(self, checked, case):
        for i, (lists, items) in enumerate([(0, 3), (1, 0), (1, 1), (9, 5), (3, 33), (2, 66)]):
            layout, dtype = LAYOUTS[i % 4], cases.DTYPES[i % 3]
            compare(case, make(case, layout, lists, items, dtype, seed=i), reduction="none")
        assert set(checked.launched) <= {"listwise_f32", "listwise_f64", "listwise_sum"}

    def test_more_lists_than_blocks(self, checked, monkeypatch):
        monkeypatch.setattr(launch, "list_shape", few_blocks(launch.list_shape))
        for case, (lists, items) in itertools.product(("list_mle", "lipo_lambda", "pro"), [(40, 3), (5, 65)]):
            compare(case, make(case, "masked", lists, items, torch.float64))

    @pytest.mark.parametrize("bad", [[0, 9, 6], [0, -1, 6], [3, 2, 6], [0, 4, 2_000_000_000], [-5, 0, 6], [0, 3, -2]])
    def test_bad_boundaries_read_nothing(self, checked, bad):
        """Lists with bad boundaries have the loss NaN, and no gradient."""
        policy = torch.arange(6.0)
        loss, slopes, _ = torch.ops.fastpo.listwise(
            6, policy, None, policy, None, torch.tensor(bad, dtype=torch.int32), [1.0, 1.0, 1.0], False, False, 1.0
        )
        inside = [0 <= a <= b <= 6 and (i > 0 or a == 0) for i, (a, b) in enumerate(itertools.pairwise(bad))]
        assert loss.isnan().tolist() == [not ok for ok in inside] and slopes.isfinite().all()

    def test_long_lists_are_refused(self, checked):
        flat = torch.zeros(1030)
        bounds = torch.tensor([0, 1026, 1030], dtype=torch.int32)
        loss, slopes, _ = torch.ops.fastpo.listwise(
            0, flat, None, flat + 1, None, bounds, [1.0, 1.0, 1.0], False, False, 1.0
        )
        assert loss.isnan().tolist() == [True, False]
        assert slopes[:1026].tolist() == [0.0] * 1026 and slopes[1026:].tolist() == [-2.0] * 4

    def test_equals_the_compiled_launch(self, checked, ops):
        for case, layout in zip(CASES, itertools.cycle(LAYOUTS)):
            given = make(case, layout, 5, 20, torch.float32)
            ours = evaluate(case, given)
            with compiled_launch(ops):
                theirs = evaluate(case, given)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_structs(exports):
    assert_structs(exports.fastpo_listwise_struct_size, launch.Listwise, launch.ListSum)
