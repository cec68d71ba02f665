"""vocab_divergence on a GPU: the CPU kernel's own cases in Triton, compiled."""

from __future__ import annotations

import pytest
import torch

import fastpo
from tests.kernels import test_vocab_divergence as cases
from tests.kernels.test_vocab_divergence import compare, evaluate, make


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class TestValues(cases.TestValues): ...


class TestExtremeRows(cases.TestExtremeRows): ...


class TestMembers(cases.TestMembers):
    # of the CPU alone
    test_gradcheck = None


class TestKinds(cases.TestKinds):
    # of the CPU alone
    test_compiled = None
    test_only_the_gradients_that_are_needed = None


class TestImpossibleTokens:
    test_jsd = cases.TestJensenShannon.test_impossible_tokens
    test_skew = cases.TestSkew.test_impossible_tokens
    test_tv = cases.TestTotalVariation.test_impossible_tokens
    test_alpha = cases.TestAlpha.test_impossible_tokens


class TestLayouts:
    def test_strides(self, dtype):
        for pair in cases.TestLayouts().layouts(dtype).values():
            compare(*pair)

    @pytest.mark.parametrize("vocab", [1000, 1001, 50_257, 151_936])
    def test_shifted_positions(self, dtype, vocab):
        """(B, T, V)[:, :-1] against a contiguous reference, and rows that begin anywhere."""
        logits, reference = make(3, 5, vocab, dtype=dtype)
        compare(logits[:, :-1], reference[:, :-1].contiguous())


class TestDevice:
    def test_equal_streams(self, dtype):
        logits = make(4, 5000, dtype=dtype)[0]
        assert not any(value.any() for value in evaluate(logits, logits.clone()).values())

    def test_repeats(self, dtype):
        pair = make(50, 5001, dtype=dtype)
        first = evaluate(*pair)
        for _ in range(5):
            again = evaluate(*pair)
            assert all(torch.equal(first[name], again[name]) for name in first)

    def test_never_waits(self, cuda):
        logits, reference = (t.to(cuda) for t in make(64, 60_000))
        temperature, mask = torch.full((64,), 0.7, device=cuda), torch.arange(64, device=cuda) % 3 > 0
        logits.requires_grad_()

        def step() -> None:
            fastpo.token_kl(logits, reference, mask=mask, temperature=temperature).sum().backward()

        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
