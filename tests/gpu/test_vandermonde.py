"""vandermonde on a GPU: the CPU kernel's own cases, by the compiled library and by NVRTC; graphs, waiting."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels.vandermonde import launched_by
from tests.device import to_device
from tests.gpu.launch import both_ways
from tests.kernels import test_vandermonde as cases
from tests.kernels.test_cauchy import random
from tests.kernels.test_vandermonde import make, product, transpose

launch = both_ways("vandermonde.cuh", launched_by)


class LookedAt:
    """Growth is warned of where values may be looked at."""

    @pytest.fixture(autouse=True)
    def values_are_looked_at(self, monkeypatch):
        monkeypatch.setenv("FASTPO_DEBUG", "1")


class TestForward(LookedAt, cases.TestForward): ...


class TestTranspose(LookedAt, cases.TestTranspose): ...


def on_device(v: Tensor, x: Tensor, length: int, up: Tensor) -> list[Tensor]:
    """The product, its gradients, and the transposed product."""
    leaves = [to_device(t).requires_grad_() for t in (v, x)]
    out = fastpo.vandermonde(*leaves, length)
    grads = torch.autograd.grad(out, leaves, to_device(up))
    return [out.detach(), *grads, fastpo.vandermonde_transpose(to_device(up), *leaves).detach()]


class TestDevice:
    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_gradients(self, dtype, symmetric):
        cases.TestGradient().test_moments("native", dtype, symmetric)

    def test_as_on_the_cpu(self, device):
        """Sizes of a layer, a long row, many terms, and more rows than blocks."""
        for leading, terms, length in (((256,), 32, 2048), ((2,), 7, 2**17), ((3,), 1500, 700), ((40_000,), 2, 3)):
            v, x = make(terms, length, torch.complex64, leading)
            up = random((*leading, length), torch.complex64, 1).real.contiguous()
            leaves = [t.clone().requires_grad_() for t in (v, x)]
            with fastpo.use_backend("native"):
                out = fastpo.vandermonde(*leaves, length)
                want = [out.detach(), *torch.autograd.grad(out, leaves, up)]
                want.append(fastpo.vandermonde_transpose(up, v, x))
            for ours, theirs in zip(on_device(v, x, length, up), want, strict=True):
                # both compute in double; the products with v are rounded again
                assert (ours.cpu() - theirs).abs().max() <= 1e-6 * theirs.abs().max(), (leading, terms, length)

    def test_repeats(self, device):
        for leading, terms, length in (((64,), 32, 2048), ((1,), 3, 2**16)):
            v, x = make(terms, length, torch.complex64, leading)
            up = random((*leading, length), torch.complex64, 1).real.contiguous()
            first = on_device(v, x, length, up)
            for _ in range(3):
                assert all(map(torch.equal, first, on_device(v, x, length, up)))

    def test_never_waits_and_is_captured(self, cuda):
        v, x = (t.to(cuda) for t in make(32, 2048, torch.complex64, (16,)))
        up = torch.randn(16, 2048, device=cuda)
        want = fastpo.vandermonde(v, x, 2048)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_device(v, x, 2048, up)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fastpo.vandermonde(v, x, 2048)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)

    @pytest.mark.sanitize
    def test_under_the_sanitizer(self):
        for dtype, (terms, length) in itertools.product((torch.complex64, torch.complex128), [(9, 37), (3, 4100)]):
            v, x = make(terms, length, dtype)
            up = random((2, length), dtype, 1)
            assert product(v, x, length).isfinite().all() and product(v, x, length, False).isfinite().all()
            assert all(t.isfinite().all() for t in on_device(v, x, length, up.real.contiguous()))
            assert transpose(up, v, x).isfinite().all()
