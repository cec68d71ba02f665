"""policy_objective on a GPU: the CPU kernel's own cases, compiled and by NVRTC; streams, graphs, waiting."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo import losses
from fastpo.kernels.policy import launched_by
from fastpo.reference.policy import AGGREGATIONS, policies, policy
from tests.device import to_device
from tests.gpu.launch import both_ways
from tests.kernels import test_policy as cases
from tests.kernels.test_policy import evaluate, make, settings

launch = both_ways("policy.cuh", launched_by)


class TestKernel(cases.TestKernel):
    # of the CPU alone
    test_derivatives = None
    test_micro_batches_add_up = None
    test_compiles = None
    test_public = None


def on_device(name: str, rows: int = 64, tokens: int = 500, **settings_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every tensor that the method takes, of which the log-probs need a gradient, and its options."""
    row = policy(name)
    given = {n: to_device(t) for n, t in make(row, "padded", rows, tokens, torch.float32).items()}
    given["logprobs"] = given["logprobs"].clone().requires_grad_()
    return given, settings(row, **settings_)


def step(name: str, given: dict[str, Any], options: dict[str, Any]) -> list[Tensor]:
    """The loss, its gradient and the metrics."""
    out = getattr(losses, name)(**given, **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), given["logprobs"])
    return [out.loss.detach(), grad, out.metrics.sums, out.metrics.maxima]


class TestDevice:
    @pytest.mark.parametrize("tokens", [1, 33, 1000, 5000, 100_000])
    def test_repeats(self, tokens):
        """Bit for bit the same, in whatever order blocks run."""
        for name, layout in itertools.product(("gspo", "grpo"), ("padded", "packed")):
            row = policy(name)
            given = make(row, layout, 100_000 // tokens + 3, tokens, torch.float32)
            first = evaluate(row, given, **settings(row))
            for _ in range(3):
                again = evaluate(row, given, **settings(row))
                assert all(torch.equal(value, again[n]) for n, value in first.items())

    def test_many_rows(self):
        """More sequences than a grid has blocks in a second dimension."""
        row = policy("grpo")
        cases.compare(row, make(row, "padded", 70_000, 3, torch.float32), **settings(row))

    @pytest.mark.parametrize("name", ["gspo", "grpo"])
    def test_current_stream(self, cuda, name):
        """The launch waits for what its stream waits for."""
        given, options = on_device(name)
        want = step(name, given, options)
        late, stream = torch.full_like(given["logprobs"], float("nan")), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.detach().copy_(given["logprobs"].detach())
            ours = step(name, {**given, "logprobs": late.detach().requires_grad_()}, options)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    @pytest.mark.parametrize("more", [{}, {"num_items": 7.0}, {"count_empty": True}, {"reduction": "none"}], ids=str)
    def test_never_waits(self, cuda, aggregation, more):
        given, options = on_device("grpo", aggregation=aggregation)
        step("grpo", given, {**options, **more})
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step("grpo", given, {**options, **more})
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("name", ["gspo", "grpo"])
    def test_graph(self, cuda, name):
        """Captured once, replayed on other numbers."""
        given, options = on_device(name)
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            step(name, given, options)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(name, given, options)
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                given["logprobs"].copy_(given["old_logprobs"] + 0.3 * torch.randn_like(given["logprobs"]))
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(found, step(name, given, options), strict=True))

    def test_compiled(self, cuda):
        torch._dynamo.reset()
        given, options = on_device("gspo", 8, 50)

        def loss(logprobs: Tensor) -> tuple[Tensor, Tensor]:
            out = losses.gspo(**{**given, "logprobs": logprobs}, **options)
            return out.loss, out.metrics.sums

        eager, compiled = loss(given["logprobs"]), torch.compile(loss, fullgraph=True)(given["logprobs"])
        assert torch.equal(eager[1], compiled[1])
        # the division by the denominator may be compiled to another one
        torch.testing.assert_close(*(out[0] for out in (eager, compiled)), rtol=2e-7, atol=0)
        grads = [torch.autograd.grad(out[0], given["logprobs"])[0] for out in (eager, compiled)]
        torch.testing.assert_close(*grads, rtol=4e-7, atol=0)

    def test_bad_boundaries(self, cuda, monkeypatch):
        values, advantages = torch.ones(6, device=cuda), torch.ones(2, device=cuda)
        boundaries = torch.tensor([0, 9, 6], dtype=torch.int32, device=cuda)
        assert losses.ppo(values, advantages, cu_seqlens=boundaries, reduction="none").loss.isnan().all()
        monkeypatch.setenv("FASTPO_DEBUG", "1")
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to at most 6"):
            losses.ppo(values, advantages, cu_seqlens=boundaries)

    @pytest.mark.sanitize
    def test_under_the_sanitizer(self):
        """Few sizes of every method, for compute-sanitizer, which is slow."""
        shapes = [(9, 1), (9, 37), (5, 1100), (700, 3)]
        for i, (row, (rows, tokens)) in enumerate(itertools.product(policies(), shapes)):
            given = make(row, ("padded", "packed")[i % 2], rows, tokens, (torch.float32, torch.bfloat16)[i // 2 % 2])
            assert evaluate(row, given, **settings(row))["loss"].isfinite().all()
