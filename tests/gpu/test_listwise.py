"""listwise on a GPU: the CPU kernel's own cases."""

from __future__ import annotations

import pytest
import torch

from fastpo import losses
from tests.kernels import test_listwise as cases
from tests.kernels.test_listwise import CASES, LAYOUTS, evaluate, make


class TestValues(cases.TestValues): ...


class TestDevice:
    def test_never_waits(self, cuda):
        policy, labels = torch.randn(99, 16, device=cuda, requires_grad=True), torch.rand(99, 16, device=cuda)
        losses.lipo_lambda(policy, None, labels).loss.backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for function in (losses.lipo_lambda, losses.list_mle, losses.lipo_softmax):
                function(policy, None, labels).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.sanitize
    def test_under_the_sanitizer(self):
        for case in CASES:
            for layout in LAYOUTS:
                assert evaluate(case, make(case, layout, 5, 40, torch.float32))[0].isfinite()
