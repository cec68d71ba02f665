"""linear_divergence on a GPU: the CPU's own cases over cuBLAS's products, without rounding of bf16 logits; graphs."""

from __future__ import annotations

import pytest
import torch

import fastpo
from tests.device import to_device
from tests.kernels import test_linear_divergence as cases
from tests.kernels.test_linear_divergence import NAMES, blocks, compare, make

__all__ = ["blocks"]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class TestValues(cases.TestValues):
    # of the CPU alone
    test_products_of_narrow_operands = None
    test_known_distributions = None
    test_small_divergences_keep_their_digits = None
    test_leading_dimensions = None


class TestMasks(cases.TestMasks): ...


class TestDevice:
    def test_many_rows(self, dtype):
        compare(make(300, dtype=dtype), softcap=3.0)

    def test_on_the_device(self):
        given = {name: to_device(t) for name, t in make(dtype=torch.float32).items()}
        found = fastpo.linear_divergence(**given)
        assert set(given) == set(NAMES) and found.device == given["hidden"].device


class TestMemory:
    def test_blocks(self):
        """Of 2^28 logits a model's block, 2^27, at a time: two of them, a gradient, and temporaries."""
        rows, vocab = 2048, 1 << 17
        generator = torch.Generator("cuda").manual_seed(0)
        hidden, others = (torch.randn(rows, 64, generator=generator, device="cuda") for _ in range(2))
        weight = torch.randn(vocab, 64, generator=generator, device="cuda").requires_grad_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = fastpo.linear_divergence(hidden, weight, others, weight, memory_budget=0)
        torch.autograd.grad(out.sum(), weight)
        assert torch.cuda.max_memory_allocated() - before < 3.5 * 4 * (1 << 27)
