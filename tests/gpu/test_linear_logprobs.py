"""linear_logprobs on a GPU: the CPU's own cases over Triton's tiles and cuBLAS's products; streams, graphs, memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels import _tiles
from tests.device import to_device
from tests.kernels import test_linear_logprobs as cases
from tests.kernels.test_linear_logprobs import STATISTICS, compare, evaluate, make, small_tiles

by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@by_dtype
class TestValues:
    @pytest.mark.parametrize("vocab", [1, 2, 63, 65, 1000, 4097])
    def test_vocabulary_sizes(self, dtype, vocab):
        cases.TestValues().test_vocabulary_sizes(dtype, vocab)

    @pytest.mark.parametrize("rows", [1, 63, 513, 1100])
    def test_row_counts(self, dtype, rows):
        cases.TestValues().test_row_counts(dtype, rows)

    def test_several_tiles_each_way(self, dtype, monkeypatch):
        cases.TestValues().test_several_tiles_each_way(dtype, monkeypatch)

    @pytest.mark.parametrize("ids", [1, 7])
    def test_several_ids(self, dtype, ids):
        cases.TestValues().test_several_ids(dtype, ids)

    @pytest.mark.parametrize("stats", [(), ("entropy",), ("log_sum_p2", "top1"), ("mean_logit",)])
    def test_statistics_asked_for(self, dtype, stats):
        cases.TestValues().test_statistics_asked_for(dtype, stats)

    def test_temperature(self, dtype):
        cases.TestValues().test_temperature(dtype, 0.3)

    @pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
    def test_scale_and_cap(self, dtype, softcap):
        cases.TestValues().test_scale_and_cap(dtype, softcap)

    def test_views(self, dtype):
        cases.test_views(dtype)

    def test_adapter(self, dtype, monkeypatch):
        cases.TestLora().test_adapter(dtype, 4, monkeypatch)


@by_dtype
class TestAllowed:
    def test_values(self, dtype):
        cases.TestAllowed().test_values(dtype, 1000, 0.4)

    @pytest.mark.parametrize("options", cases.TestAllowed.OPTIONS, ids=["plain", "scaled", "capped"])
    def test_several_tiles(self, dtype, options, monkeypatch):
        cases.TestAllowed().test_several_tiles(dtype, options, monkeypatch)

    def test_one_set_for_all_rows(self, dtype, monkeypatch):
        cases.TestAllowed().test_one_set_for_all_rows(dtype, monkeypatch)


@by_dtype
class TestRows:
    def test_left_out(self, dtype):
        cases.TestIgnored().test_rows_left_out(dtype)

    def test_all_left_out(self, dtype, monkeypatch):
        cases.TestIgnored().test_all_rows(dtype, monkeypatch)

    def test_none(self, dtype):
        cases.TestIgnored().test_no_rows(dtype)

    def test_named(self, dtype):
        cases.TestRows().test_named(dtype)


@by_dtype
class TestPaths:
    @pytest.mark.parametrize("stats", [(), STATISTICS], ids=["plain", "stats"])
    def test_kept_logits(self, dtype, stats, monkeypatch):
        cases.TestKept().test_the_same_bits(dtype, stats, monkeypatch)

    @pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3}], ids=str)
    def test_frozen_head(self, dtype, options, monkeypatch):
        cases.TestFrozenHead().test_as_with_a_head_that_learns(dtype, options, monkeypatch)

    def test_skipped_tiles(self, dtype, monkeypatch):
        """Within the documented bounds of the results with none skipped, and some are skipped."""
        small_tiles(monkeypatch, 16, 1)
        given = cases.TestSkipping().given(dtype)
        threshold = 1e-3
        results, made = [], []
        for t in (threshold, 0.0):
            with cases.counted_products(monkeypatch) as products:
                results.append(evaluate(given, stats=(), skip_below=t))
            made.append(len(products))
        ours, exact = results
        assert made[0] < 0.6 * made[1]
        error = {n: (ours[n].double() - exact[n].double()).abs() for n in ("d_hidden", "d_weight")}
        # both are rounded to the dtype
        slack = {n: 2 * torch.finfo(dtype).eps * exact[n].double().abs().max() for n in error}
        assert (error["d_hidden"] <= threshold * given["weight"].double().abs().sum(0) + slack["d_hidden"]).all()
        assert (error["d_weight"] <= threshold * given["hidden"].double().abs().sum(0) + slack["d_weight"]).all()


def on(device: torch.device, *rows: int, **options) -> dict[str, Tensor]:
    """Inputs on the device, of which hidden and weight need gradients."""
    given = {name: t.to(device) for name, t in make(*rows, **options).items()}
    given["hidden"].requires_grad_()
    given["weight"].requires_grad_()
    return given


def step(given: dict[str, Tensor], **options) -> list[Tensor]:
    """The outputs that have a gradient, and the gradients of their sum."""
    out = fastpo.linear_logprobs(**given, stats=("entropy",), **options)
    leaves = [given["hidden"], given["weight"]]
    return [out.logprobs, out.entropy, *torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaves)]


class TestDevice:
    @by_dtype
    def test_repeats(self, dtype):
        given = make(300, vocab=5001, dtype=dtype)
        first = evaluate(given)
        for _ in range(3):
            assert all(torch.equal(t, first[name]) for name, t in evaluate(given).items())

    @by_dtype
    def test_large_tiles(self, dtype):
        compare(make(70, vocab=20_003, dtype=dtype), stats=("entropy",))

    def test_past_two_billion_logits(self, cuda):
        """Kept logits past 2^31: the last rows, against the same rows alone."""
        if torch.cuda.mem_get_info()[0] < 40 << 30:
            pytest.skip("needs 40 GB")
        rows, vocab = 17_000, 130_001
        hidden, weight = (torch.randn(n, 64, device=cuda).bfloat16().requires_grad_() for n in (rows, vocab))
        targets = torch.randint(vocab, (rows,), device=cuda)
        found = []
        for budget in (1 << 40, 0):
            out = fastpo.linear_logprobs(hidden, weight, targets, memory_budget=budget)
            found.append([out, *torch.autograd.grad(out.sum(), (hidden, weight))])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        last = hidden.detach()[-8:].clone().requires_grad_()
        alone = fastpo.linear_logprobs(last, weight, targets[-8:])
        assert torch.allclose(out[-8:], alone, rtol=1e-4, atol=1e-4)
        (grad,) = torch.autograd.grad(alone.sum(), last)
        assert torch.allclose(found[1][1][-8:].float(), grad.float(), rtol=2e-2, atol=2e-2)

    def test_memory(self, cuda):
        """What the docs say that the backward takes beside the gradients, and nothing of the logits' size."""
        rows, size, vocab = 4096, 256, 131_072
        hidden, weight = (torch.randn(n, size, device=cuda).bfloat16().requires_grad_() for n in (rows, vocab))
        targets = torch.randint(vocab, (rows,), device=cuda)
        for budget in (0, 4 * rows * vocab):

            def run(budget: int = budget) -> tuple[Tensor, ...]:
                out = fastpo.linear_logprobs(hidden, weight, targets, memory_budget=budget)
                return out, *torch.autograd.grad(out.sum(), (hidden, weight))

            run()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            outputs = run()
            extra = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in outputs)
            buffer = _tiles.TILINGS["cuda"].bytes
            columns = buffer // (4 * rows)
            documented = buffer * 3 // 2 + rows * (64 + 17) + rows * size * 4 + columns * size * 4 + budget
            assert extra <= documented + (16 << 20), (budget, extra, documented)
            del outputs

    def test_current_stream(self, cuda):
        given = on(cuda, 64, vocab=5000)
        want = step(given)
        late, stream = torch.full_like(given["hidden"], math.nan), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.detach().copy_(given["hidden"].detach())
            ours = step({**given, "hidden": late.detach().requires_grad_()})
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))

    @pytest.mark.parametrize("budget", [0, 1 << 30])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_never_waits(self, cuda, budget, frozen):
        """With the rows given."""
        given = on(cuda, 64, vocab=60_000, dtype=torch.bfloat16)
        given["weight"].requires_grad_(not frozen)
        rows = torch.arange(0, 64, 2, device=cuda)
        temperature = torch.full((64,), 0.7, device=cuda)

        def run() -> None:
            out = fastpo.linear_logprobs(**given, temperature=temperature, rows=rows, memory_budget=budget)
            out.sum().backward()

        run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("budget", [0, 1 << 30])
    def test_graph(self, cuda, budget):
        """With the rows given."""
        given = on(cuda, 64, vocab=5001, dtype=torch.bfloat16)
        options = {"rows": torch.arange(0, 64, 2, device=cuda), "memory_budget": budget}
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            step(given, **options)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(given, **options)
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                given["hidden"].copy_(torch.randn_like(given["hidden"]))
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(found, step(given, **options), strict=True))

    def test_compiled(self, cuda):
        torch._dynamo.reset()
        given = on(cuda, 8, vocab=500)
        names = ("hidden", "weight", "targets")
        results = []
        for call in (fastpo.linear_logprobs, torch.compile(fastpo.linear_logprobs, fullgraph=True)):
            out = call(*(given[name] for name in names))
            results.append([out, *torch.autograd.grad(out.sum(), (given["hidden"], given["weight"]))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_out_of_range(self, cuda, monkeypatch):
        hidden, weight = torch.randn(3, 8, device=cuda), torch.randn(50, 8, device=cuda)
        targets = torch.tensor([1, 50, -7], device=cuda)
        assert fastpo.linear_logprobs(hidden, weight, targets).isnan().tolist() == [False, True, True]
        monkeypatch.setenv("FASTPO_DEBUG", "1")
        with pytest.raises(IndexError, match=r"targets\[1\] is 50, out of range"):
            fastpo.linear_logprobs(hidden, weight, targets)

    @pytest.mark.sanitize
    @by_dtype
    def test_under_the_sanitizer(self, dtype, monkeypatch):
        small_tiles(monkeypatch, 16, 1 << 16)
        for rows, vocab in ((33, 1001), (2, 7003)):
            given = {name: to_device(t) for name, t in make(rows, vocab=vocab, dtype=dtype, ids=2).items()}
            for budget in (0, 1 << 30):
                assert evaluate(given, memory_budget=budget)["logprobs"].isfinite().all()
