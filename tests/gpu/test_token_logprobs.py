"""token_logprobs on a GPU: the CPU kernel's own cases in Triton, compiled; streams, graphs, waiting, large tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastpo
from tests.device import to_device
from tests.kernels import test_token_logprobs as cases
from tests.kernels.test_token_logprobs import STATISTICS, compare, evaluate, make


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class TestValues(cases.TestValues):
    def test_common_offset(self, dtype):
        """The device's own exponential is within 2 ulp, for which `compare` has no room at logits of 1e4 apart."""
        logits, targets = make(4, 3000, dtype=torch.float32)
        shifted = (logits + 1e4).to(dtype)
        back = evaluate((shifted.double() - 1e4).to(dtype), targets)
        if dtype == torch.float32:
            ours = evaluate(shifted, targets)
            assert all(torch.equal(ours[name], back[name]) for name in ("logprobs", "entropy", "log_sum_p2", "grad"))


class TestExtremeRows(cases.TestExtremeRows): ...


class TestAllowed:
    @pytest.mark.parametrize("vocab", [1, 33, 4097, 50_257, 151_936])
    def test_values(self, dtype, vocab):
        cases.TestAllowed().test_values(dtype, vocab, 0.4)

    def test_layouts(self, dtype):
        cases.TestAllowed().test_layouts(dtype)

    def test_one_set_for_all_rows(self, dtype):
        cases.TestAllowed().test_one_set_for_all_rows(dtype)


class TestLayouts:
    def test_strides(self, dtype):
        for logits in cases.TestLayouts().layouts(dtype).values():
            count = logits[..., 0].numel()
            compare(logits, torch.arange(count).view(logits.shape[:-1]) % logits.shape[-1])

    @pytest.mark.parametrize("vocab", [1000, 1001, 50_257, 151_936])
    def test_shifted_positions(self, dtype, vocab):
        """(B, T, V)[:, :-1], as every training loop has it, and rows that begin anywhere."""
        base, _ = make(3, 5, vocab, dtype=dtype)
        compare(base[:, :-1], torch.randint(vocab, (3, 4)))


class TestDevice:
    @pytest.mark.parametrize(("rows", "vocab"), [(1, 50_257), (3, 50_257), (3, 151_936), (40, 50_000), (1, 1_000_000)])
    def test_split_rows(self, dtype, rows, vocab):
        compare(*make(rows, vocab, dtype=dtype))

    def test_repeats(self, dtype):
        for shape in ((2, 200_000), (500, 5001)):
            logits, targets = make(*shape, dtype=dtype)
            first = evaluate(logits, targets)
            for _ in range(5):
                assert all(
                    torch.equal(a, b) for a, b in zip(first.values(), evaluate(logits, targets).values(), strict=True)
                )

    def test_past_two_billion_elements(self, cuda):
        """Offsets past 2^31: the last rows, against the same rows alone."""
        if torch.cuda.mem_get_info()[0] < 20 << 30:
            pytest.skip("needs 20 GB")
        rows, vocab = 17_000, 130_001
        logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=cuda)
        logits.normal_().requires_grad_()
        targets = torch.randint(vocab, (rows,), device=cuda)
        out = fastpo.token_logprobs(logits, targets, stats=STATISTICS)
        (out.logprobs.sum() + out.entropy.sum()).backward()
        last = logits.detach()[-8:].clone().requires_grad_()
        alone = fastpo.token_logprobs(last, targets[-8:], stats=STATISTICS)
        (alone.logprobs.sum() + alone.entropy.sum()).backward()
        # few rows may be split and summed in another order
        assert torch.allclose(out.logprobs[-8:], alone.logprobs, rtol=1e-5, atol=1e-5)
        assert torch.equal(out.top1[-8:], alone.top1)
        assert torch.allclose(logits.grad[-8:].float(), last.grad.float(), rtol=1e-2, atol=1e-8)

    def test_current_stream(self, cuda):
        logits, targets = (t.to(cuda) for t in make(64, 5000))
        leaf = logits.clone().requires_grad_()
        want = fastpo.token_logprobs(leaf, targets)
        want.sum().backward()
        late, stream = torch.full_like(logits, float("nan")), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(logits)
            late.requires_grad_()
            ours = fastpo.token_logprobs(late, targets)
            ours.sum().backward()
        torch.cuda.synchronize()
        assert torch.equal(ours, want) and torch.equal(late.grad, leaf.grad)

    @pytest.mark.parametrize("rows", [2, 64])
    def test_never_waits(self, cuda, rows):
        logits, targets = (t.to(cuda) for t in make(rows, 60_000))
        temperature = torch.full((rows,), 0.7, device=cuda)
        logits.requires_grad_()

        def step() -> None:
            out = fastpo.token_logprobs(logits, targets, temperature=temperature, stats=STATISTICS)
            (out.logprobs.sum() + out.entropy.sum()).backward()

        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_graph(self, cuda):
        logits, targets = (t.to(cuda) for t in make(64, 5001, dtype=torch.bfloat16))
        logits.requires_grad_()

        def step() -> tuple[Tensor, Tensor]:
            out = fastpo.token_logprobs(logits, targets)
            return out, torch.autograd.grad(out.sum(), logits)[0]

        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            step()
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                logits.copy_(torch.randn_like(logits))
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))

    def test_compiled(self, cuda):
        torch._dynamo.reset()
        logits, targets = (t.to(cuda) for t in make(8, 500))
        logits.requires_grad_()
        compiled = torch.compile(lambda x: fastpo.token_logprobs(x, targets) * 2, fullgraph=True)
        ours, eager = compiled(logits), fastpo.token_logprobs(logits, targets) * 2
        assert torch.equal(ours, eager)
        assert torch.equal(*(torch.autograd.grad(o.sum(), logits)[0] for o in (ours, eager)))

    def test_out_of_range(self, cuda, monkeypatch):
        logits, targets = torch.randn(3, 50, device=cuda), torch.tensor([1, 50, -7], device=cuda)
        out = fastpo.token_logprobs(logits, targets)
        assert out.isnan().tolist() == [False, True, True]
        monkeypatch.setenv("FASTPO_DEBUG", "1")
        with pytest.raises(IndexError, match=r"targets\[1\] is 50, out of range"):
            fastpo.token_logprobs(logits, targets)

    @pytest.mark.sanitize
    def test_under_the_sanitizer(self, dtype):
        for shape in ((3, 1000), (2, 1001), (1, 70_003)):
            logits, targets = map(to_device, make(*shape, dtype=dtype, ids=2))
            assert evaluate(logits, targets)["logprobs"].isfinite().all()
