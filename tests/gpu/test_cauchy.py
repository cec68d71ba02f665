"""cauchy on a GPU: the CPU kernel's own cases, by the compiled library and by NVRTC; streams, graphs, waiting."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels.cauchy import launched_by
from fastpo.kernels.cuda import nvrtc
from tests.device import to_device
from tests.gpu.launch import both_ways
from tests.kernels import test_cauchy as cases
from tests.kernels.test_cauchy import assert_terms, make, product, random

launch = both_ways("cauchy.cuh", launched_by)


@pytest.fixture(autouse=True)
def bound_of_the_arithmetic(device, monkeypatch):
    """Where double precision is slow, single precision is computed in itself: to 4 ulp of each term."""
    if device.type == "cuda" and nvrtc.why_not() is None and not nvrtc.Driver("").has_fast_double(device):

        def of_each_term(found: Tensor, v: Tensor, z: Tensor, w: Tensor, symmetric: bool, exactly: bool) -> None:
            assert_terms(found, v, z, w, symmetric, exactly=False)

        monkeypatch.setattr(cases, "assert_terms", of_each_term)


class TestForward(cases.TestForward): ...


def on_device(case: list[Tensor], up: Tensor) -> list[Tensor]:
    """The product and its gradients."""
    leaves = [to_device(t).requires_grad_() for t in case]
    out = fastpo.cauchy(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, to_device(up))]


def close(found: list[Tensor], want: list[Tensor]) -> bool:
    eps = torch.finfo(want[0].dtype).eps
    return all((a.cpu() - b).abs().max() <= 64 * eps * b.abs().max() for a, b in zip(found, want, strict=True))


class TestDevice:
    @pytest.mark.parametrize("backend", ["native", "reference"])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_gradients(self, backend, symmetric):
        cases.TestGradient().test_sums_of_terms(backend, torch.complex128, symmetric)

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
    def test_as_on_the_cpu(self, device, dtype):
        """Sizes of a layer, a long row, many poles, and more rows than blocks."""
        for leading, poles, nodes in (((256,), 32, 2048), ((2,), 7, 2**17), ((3,), 1500, 700), ((40_000,), 2, 3)):
            case = make(poles, nodes, dtype, leading)
            up = random((*leading, nodes), dtype, 1)
            leaves = [t.clone().requires_grad_() for t in case]
            with fastpo.use_backend("native"):
                out = fastpo.cauchy(*leaves)
            want = [out.detach(), *torch.autograd.grad(out, leaves, up)]
            assert close(on_device(case, up), want), (leading, poles, nodes)

    def test_repeats(self, device):
        for leading, poles, nodes in (((64,), 32, 2048), ((1,), 3, 2**16)):
            case, up = make(poles, nodes, torch.complex64, leading), random((*leading, nodes), torch.complex64, 1)
            first = on_device(case, up)
            for _ in range(3):
                assert all(map(torch.equal, first, on_device(case, up)))

    def test_never_waits_and_is_captured(self, cuda):
        case = [t.to(cuda) for t in make(32, 2048, torch.complex64, (16,))]
        v, z, w = case
        up = torch.randn(16, 2048, dtype=torch.complex64, device=cuda)
        want = fastpo.cauchy(*case)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            leaves = [v.clone().requires_grad_(), w.clone().requires_grad_()]
            torch.autograd.grad(fastpo.cauchy(leaves[0], z, leaves[1]), leaves, up)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fastpo.cauchy(*case)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)

    def test_on_another_stream(self, cuda):
        case = [t.to(cuda) for t in make(32, 2048, torch.complex64, (16,))]
        want, stream = fastpo.cauchy(*case), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = fastpo.cauchy(*case)
        stream.synchronize()
        assert torch.equal(found, want)

    def test_memory_is_that_of_arguments_and_results(self, cuda):
        case = [t.to(cuda) for t in make(64, 8192, torch.complex64, (256,))]
        leaves = [t.requires_grad_() for t in (case[0], case[2])]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = fastpo.cauchy(leaves[0], case[1], leaves[1])
        torch.autograd.grad(out, leaves, out.detach())
        # every term would be 128 times the result
        assert torch.cuda.max_memory_allocated() - before < 2 * out.nbytes

    @pytest.mark.sanitize
    def test_under_the_sanitizer(self):
        for dtype, (poles, nodes) in itertools.product((torch.complex64, torch.complex128), [(9, 37), (70, 1100)]):
            case, up = make(poles, nodes, dtype), random((2, nodes), dtype, 1)
            assert all(t.isfinite().all() for t in on_device(case, up))
            assert product(*case, False).isfinite().all()
