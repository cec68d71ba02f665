"""objective on a GPU: the CPU kernel's own cases, by the compiled library and by NVRTC; streams, graphs, waiting."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.kernels.objective import launched_by
from fastpo.reference.registry import objective
from tests.device import to_device
from tests.gpu.launch import both_ways
from tests.kernels import test_objective as cases
from tests.kernels.test_objective import LAYOUTS, evaluate, make
from tests.losses import test_methods as methods

launch = both_ways("objective.cuh", launched_by)


class TestValues(cases.TestValues): ...


@pytest.mark.parametrize("case", methods.CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_method(case, dtype):
    for layout in methods.layouts(case):
        methods.compare(case, layout, 259, dtype)


class TestStrides(cases.TestStrides): ...


class TestMasked(cases.TestMasked): ...


class TestExtremeRows(cases.TestExtremeRows): ...


class TestNumItems(cases.TestNumItems): ...


def pairs_on(device: torch.device, rows: int = 64, tokens: int = 100) -> list[Tensor]:
    torch.manual_seed(0)
    return [(-2 * torch.rand(rows, tokens)).to(device) for _ in range(4)]


class TestDevice:
    @pytest.mark.parametrize("tokens", [1, 33, 1000, 1025, 5000, 100_000])
    def test_repeats(self, tokens):
        """Bit for bit the same, in whatever order blocks run."""
        for layout in LAYOUTS[1:]:
            pairs = (
                make(layout, 200_000 // tokens + 3, tokens, torch.float32, 1),
                make(layout, 200_000 // tokens + 3, tokens, torch.float32, 4),
            )
            first = evaluate(objective("dpo"), pairs)
            for _ in range(3):
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(first.values(), evaluate(objective("dpo"), pairs).values(), strict=True)
                )

    def test_many_pairs(self, device):
        """More rows than a grid has threads."""
        rows = 5_000_000
        chosen, rejected = torch.randn(rows, device=device), torch.randn(rows, device=device)
        zero = torch.zeros_like(chosen)
        ours = losses.dpo(chosen, rejected, zero, zero, beta=0.5)
        with fastpo.use_backend("reference"):
            truth = losses.dpo(*(t.double() for t in (chosen, rejected, zero, zero)), beta=0.5)
        # each loss is rounded once to fp32, the sum is in fp64: the roundings are independent
        assert abs(ours.loss.item() - truth.loss.item()) < 1e-7
        assert torch.equal(ours.chosen_rewards, 0.5 * chosen)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_current_stream(self, cuda, reduction):
        """The launch waits for what its stream waits for."""
        inputs = pairs_on(cuda)
        leaf = inputs[0].clone().requires_grad_()
        want = losses.dpo(leaf, *inputs[1:], reduction=reduction).loss
        want.sum().backward()
        late = [torch.full_like(t, float("nan")) for t in inputs]
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for t, value in zip(late, inputs, strict=True):
                t.copy_(value)
            late[0].requires_grad_()
            loss = losses.dpo(*late, reduction=reduction).loss
            loss.sum().backward()
        torch.cuda.synchronize()
        assert torch.equal(loss, want) and torch.equal(late[0].grad, leaf.grad)

    def test_another_thread(self, cuda):
        """A thread without a context of its own, as autograd's are at first."""
        inputs, found = pairs_on(cuda), []
        want = losses.dpo(*inputs).loss
        thread = threading.Thread(target=lambda: found.append(losses.dpo(*inputs).loss))
        thread.start()
        thread.join()
        assert torch.equal(found[0], want)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_never_waits(self, cuda, reduction):
        inputs = [t.requires_grad_() for t in pairs_on(cuda)]
        mask = torch.ones_like(inputs[0], dtype=torch.bool)
        losses.ipo(*inputs, chosen_mask=mask, length_norm=True)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses.ipo(*inputs, chosen_mask=mask, length_norm=True, reduction=reduction).loss.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_graph(self, cuda):
        """Captured once, replayed on other numbers."""
        inputs = [t.requires_grad_() for t in pairs_on(cuda)]

        def step() -> tuple[Tensor, Tensor]:
            loss = losses.dpo(*inputs).loss
            return loss, torch.autograd.grad(loss, inputs[0])[0]

        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            step()
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss, grad = step()
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                for t in inputs:
                    t.copy_(-torch.rand_like(t))
            graph.replay()
            want_loss, want_grad = step()
            assert torch.equal(loss, want_loss) and torch.equal(grad, want_grad)

    def test_compiled(self, cuda):
        torch._dynamo.reset()
        inputs = [t.requires_grad_() for t in pairs_on(cuda)]

        def step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            out = losses.dpo(*tensors)
            return out.loss, out.chosen_rewards

        eager, compiled = step(*inputs), torch.compile(step, fullgraph=True)(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
        assert torch.equal(*(torch.autograd.grad(out[0], inputs[0])[0] for out in (eager, compiled)))

    def test_bad_boundaries(self, cuda, monkeypatch):
        values, boundaries = torch.ones(6, device=cuda), torch.tensor([0, 9, 6], dtype=torch.int32, device=cuda)
        layout = {f"{side}_cu_seqlens": boundaries for side in ("chosen", "rejected")}
        assert losses.dpo(values, values, values, values, **layout, reduction="none").loss.isnan().all()
        monkeypatch.setenv("FASTPO_DEBUG", "1")
        with pytest.raises(ValueError, match="chosen_cu_seqlens must rise from 0 to at most 6"):
            losses.dpo(values, values, values, values, **layout)

    @pytest.mark.sanitize
    def test_under_the_sanitizer(self, device):
        """Few sizes of every layout, for compute-sanitizer, which is slow."""
        shapes = [(9, 1), (9, 37), (9, 1100), (40_000, 3)]
        for layout, dtype, (rows, tokens) in itertools.product(LAYOUTS, (torch.float32, torch.bfloat16), shapes):
            pairs = [cases.Side(*map(to_device, make(layout, rows, tokens, dtype, seed))) for seed in (1, 4)]
            for reduction in ("mean", "none"):
                assert evaluate(objective("dpo"), pairs, reduction=reduction)["loss"].isfinite().all()
