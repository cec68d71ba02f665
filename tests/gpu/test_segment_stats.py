"""segment_stats on a GPU: the CPU kernel's own cases; waiting."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo import advantages
from tests.kernels import test_segment_stats as cases
from tests.kernels.test_segment_stats import LAYOUTS, make, normalize


class TestValues(cases.TestValues): ...


class TestDevice:
    def test_many_groups(self, device):
        rewards, ids = torch.randn(300_000, device=device), torch.randint(0, 40_000, (300_000,), device=device)
        ours = advantages.grpo(rewards, ids)
        with fastpo.use_backend("native"):
            on_cpu = advantages.grpo(rewards.cpu(), ids.cpu())
        # both compute in double; the order of a sum differs
        assert torch.allclose(ours.cpu(), on_cpu, rtol=2e-7, atol=1e-12)

    def test_never_waits(self, cuda):
        rewards, ids = torch.randn(999, device=cuda), torch.randint(0, 99, (999,), device=cuda)
        advantages.grpo(rewards, ids)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for function in (advantages.grpo, advantages.rloo, advantages.gpg, advantages.reinforce_baseline):
                function(rewards, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.sanitize
    def test_under_the_sanitizer(self):
        for layout in LAYOUTS:
            assert normalize(make(layout, 7, 40, torch.float32)).isfinite().all()
