"""The CUDA kernels of policy_objective, emulated: over the CPU kernel's own cases, as the compiled library launches
them, and as Python launches them, where the emulator knows which memory a launch may touch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastpo.kernels import _native
from fastpo.kernels.cuda import policy as launch
from fastpo.reference.policy import policies, policy
from tests.emulator.harness import assert_structs, compiled_launch
from tests.kernels.test_policy import CORRECTIONS, PENALTIES, compare, evaluate, make, settings

ROWS = list(policies())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def every_method(dtypes, seed: int) -> None:
    for i, (row, dtype) in enumerate(itertools.product(ROWS, dtypes)):
        layout = ("padded", "packed")[i % 2]
        given = make(row, layout, 4, 300, dtype, seed=seed + i)
        compare(row, given, **settings(row), reduction=("mean", "none")[i % 2])


def test_every_method(ops):
    with compiled_launch(ops):
        every_method((torch.float32, torch.float64, torch.bfloat16), 0)


def test_choices(ops):
    with compiled_launch(ops):
        for i, (penalty, correction) in enumerate(zip(PENALTIES, CORRECTIONS, strict=True)):
            for name in ("gspo", "grpo", "gmpo", "vespo"):
                row = policy(name)
                given = make(row, ("padded", "packed")[i % 2], 3, 40, torch.float64, seed=20 + i)
                given = {k: v for k, v in given.items() if (k, i % 3) != ("old_logprobs", 2)}
                options = settings(row, **penalty, correction=correction)
                compare(row, given, **options, off_policy_threshold=0.02 if i % 2 else None)


def test_masked_places_have_no_influence(ops):
    row = policy("gspo")
    given = make(row, "padded", 4, 41, torch.float32, seed=6)
    floats = [k for k, v in given.items() if v.shape == (4, 41) and v.is_floating_point()]
    dirty = {k: v.masked_fill(~given["mask"], math.nan) if k in floats else v for k, v in given.items()}
    with compiled_launch(ops):
        clean, ours = (evaluate(row, g, **settings(row)) for g in (given, dirty))
    for name, value in ours.items():
        assert torch.equal(value, clean[name]), name


class TestLaunchFromPython:
    def test_every_method(self, checked):
        every_method((torch.float32, torch.float64), 50)
        assert set(checked.launched) == {"policy_f32", "policy_f64", "policy_sum"}

    @pytest.mark.parametrize("tokens", [0, 1, 31, 257])
    def test_shapes(self, checked, tokens):
        row = policy("gspo")
        for rows, dtype in itertools.product((1, 5), (torch.float32, torch.float16)):
            for layout in ("padded", "packed"):
                given = make(row, layout, rows, max(tokens, 1), dtype, seed=tokens)
                if tokens == 0:
                    name = "mask" if layout == "padded" else "cu_seqlens"
                    given[name] = torch.zeros_like(given[name])
                compare(row, given, **settings(row))

    def test_more_rows_than_blocks(self, checked, monkeypatch):
        monkeypatch.setattr(launch, "blocks", lambda rows, each: 2)
        row = policy("gmpo")
        compare(row, make(row, "padded", 7, 20, torch.float32, seed=3), **settings(row))

    def test_views(self, checked):
        row = policy("grpo")
        given = make(row, "padded", 4, 12, torch.float32, seed=8)
        views = {k: v.t().contiguous().t() if v.dim() == 2 else v.repeat_interleave(2)[::2] for k, v in given.items()}
        plain, ours = (evaluate(row, g, **settings(row)) for g in (given, views))
        for name, value in ours.items():
            assert torch.equal(value, plain[name]), name

    @pytest.mark.parametrize("bad", [[0, 9, 6], [0, -1, 6], [3, 2, 6], [0, 4, 2_000_000_000], [0, 3, -2]])
    def test_bad_boundaries_read_nothing(self, checked, bad):
        """A device cannot raise: the rows concerned are NaN, and nothing outside the tensor is touched."""
        values, boundaries = torch.ones(6), torch.tensor(bad, dtype=torch.int32)
        numbers, choices = [0.5] * len(_native.CPU.policy_numbers), [0] * len(_native.CPU.policy_choices)
        streams = (values, values, None, None, None, torch.ones(2), True, None, None, boundaries)
        loss, slopes, *_ = torch.ops.fastpo.policy_objective(1, *streams, numbers, choices, False, False, False)
        inside = [0 <= a <= b <= 6 and (i > 0 or a == 0) for i, (a, b) in enumerate(itertools.pairwise(bad))]
        assert loss.isnan().tolist() == [not ok for ok in inside]
        held = torch.zeros(6, dtype=torch.bool)
        for ok, (a, b) in zip(inside, itertools.pairwise(bad), strict=True):
            held[a:b] |= ok
        assert (slopes[~held] == 0).all() and slopes.isfinite().all()


def test_structs(exports):
    assert_structs(exports.fastpo_policy_struct_size, launch.PolicyObjective, launch.PolicySum)
