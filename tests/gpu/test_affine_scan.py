"""affine_scan on a GPU: the CPU kernel's own cases, by the compiled library and by NVRTC; streams, graphs, waiting."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastpo
from fastpo.kernels.affine_scan import launched_by
from tests.gpu.launch import both_ways
from tests.kernels import test_affine_scan as cases
from tests.kernels.test_affine_scan import HYPER, LAYOUTS, advantage_case, affine_case, evaluate, scan

launch = both_ways("affine_scan.cuh", launched_by)


class TestValues(cases.TestValues): ...


class TestAdvantages(cases.TestAdvantages): ...


class TestDevice:
    def test_gradients(self):
        cases.TestAutograd().test_gradients_as_in_torch("padded masked", torch.float32, True)

    def test_long_rows(self):
        """Many chunks of a team; and many rows."""
        for rows, tokens in ((2, 200_001), (20_000, 7)):
            case = affine_case("padded masked", rows, tokens, torch.float32)
            with fastpo.use_backend("native"):
                on_cpu = fastpo.affine_scan(**case)
            # both compute in double and round once
            assert torch.allclose(scan(case), on_cpu, rtol=2e-7, atol=1e-9)

    def test_repeats(self):
        for layout in LAYOUTS:
            case = advantage_case(layout, 50, 3000, torch.float32)
            first = evaluate(case, "native")
            for _ in range(3):
                assert all(torch.equal(x, y) for x, y in zip(first, evaluate(case, "native"), strict=True))

    def test_never_waits_and_is_captured(self, cuda):
        rewards, values = torch.randn(64, 500, device=cuda), torch.randn(64, 500, device=cuda)
        want = fastpo.advantages.gae(rewards, values, lam=HYPER["lam"])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fastpo.advantages.gae(rewards, values, lam=HYPER["lam"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fastpo.advantages.gae(rewards, values, lam=HYPER["lam"])
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(out, want, strict=True))

    @pytest.mark.sanitize
    def test_under_the_sanitizer(self):
        for layout, (rows, tokens) in itertools.product(LAYOUTS, [(9, 37), (3, 1100)]):
            assert scan(affine_case(layout, rows, tokens, torch.float32)).isfinite().all()
            assert evaluate(advantage_case(layout, rows, tokens, torch.bfloat16), "native")[0].isfinite().all()
