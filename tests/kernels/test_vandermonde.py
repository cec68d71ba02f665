"""vandermonde and its transposed product against their terms one by one, in 80-bit floats."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import fastpo
from tests.device import to_device
from tests.kernels.test_cauchy import (
    BACKENDS,
    by_backend,
    by_dtype,
    by_form,
    one_thread,  # noqa: F401
    random,
    wide,
)
from tests.memory import peak_allocated

# terms and steps; around the vectors, the blocks of terms, the tables of 64 and the chunks of 4,096 steps
SHAPES = [(0, 3), (3, 0), (1, 1), (2, 2), (5, 63), (17, 64), (9, 65), (33, 300), (3, 4096), (2, 8300)]


def make(count: int, length: int, dtype: torch.dtype, leading: tuple[int, ...] = (2,), seed: int = 0) -> list[Tensor]:
    """v and x as of an S4D layer, of time steps from 1e-3 to 1; some terms hardly decay, some do at once."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*leading, count)
    decay = torch.exp(torch.rand(shape, generator=generator, dtype=torch.float64) * -math.log(max(2, 4 * length)))
    x = torch.complex(-decay, math.pi * torch.randn(shape, generator=generator, dtype=torch.float64))
    return [random(shape, dtype, seed + 1), x.to(dtype)]


def product(v: Tensor, x: Tensor, length: int, symmetric: bool = True, backend: str = "native") -> Tensor:
    with fastpo.use_backend(backend):
        return fastpo.vandermonde(to_device(v), to_device(x), length, symmetric=symmetric).cpu()


def transpose(u: Tensor, v: Tensor, x: Tensor, backend: str = "native") -> Tensor:
    with fastpo.use_backend(backend):
        return fastpo.vandermonde_transpose(to_device(u), to_device(v), to_device(x)).cpu()


def powers(x: Tensor, length: int) -> np.ndarray:
    """e^(x_n l), (..., L, N)."""
    return np.exp(wide(x)[..., None, :] * np.arange(length, dtype=np.longdouble)[:, None])


def allowed(sizes: np.ndarray, truth: np.ndarray, axis: int, dtype: torch.dtype, backend: str, x: Tensor) -> np.ndarray:
    """complex64: an ulp of the largest term, or of the sum where that is larger. complex128: natively a power is a
    product of 12 exponentials, each of 1.5 ulp; in the reference its phase is rounded; and each addition may lose half
    an ulp."""
    length, count = sizes.shape[-2], sizes.shape[axis]
    if dtype == torch.complex64:
        return torch.finfo(dtype).eps * np.maximum(sizes.max(axis, initial=0), np.abs(truth))
    phase = x.abs().max().item() * length if backend == "reference" and x.numel() else 30.0
    return torch.finfo(dtype).eps * (4 + phase + count / 2) * sizes.sum(axis)


class TestForward:
    @by_form
    @by_dtype
    @by_backend
    def test_terms(self, backend, dtype, symmetric):
        for count, length in SHAPES:
            v, x = make(count, length, dtype, seed=length)
            each = wide(v)[:, None, :] * powers(x, length)
            truth, sizes = each.sum(-1), np.abs(each)
            found = product(v, x, length, symmetric, backend)
            if symmetric:
                truth, sizes = 2 * truth.real, 2 * sizes
                assert not found.is_complex()
            error = np.abs(found.numpy() - truth)
            assert found.shape == truth.shape
            assert (error <= allowed(sizes, truth, -1, dtype, backend, x)).all(), (count, length)

    def test_long_phases(self):
        """Where x l is rounded to fp32 the result has no digit left, as in the original."""
        length, x = 2**18, torch.tensor([-1e-6 + 3.1j, -2e-6 - 2.3j])
        v = torch.tensor([1 + 1j, 0.5 - 1j])
        found = product(v, x, length)
        truth = 2 * (powers(x, length) * wide(v)).sum(-1).real
        assert np.abs(found.numpy() - truth).max() < 1e-6
        rounded = 2 * (v * torch.exp(x * torch.arange(length)[:, None])).sum(-1).real
        assert np.abs(rounded.numpy() - truth).max() > 1e-3

    @by_form
    def test_far_powers(self, symmetric):
        """Of e^-620 as many digits as of 1: the exponent's rounding is put right, in chunks that begin beside powers
        of two."""
        x = torch.tensor([[-0.05 + 0.7j], [-0.051 + 1.1j], [-0.047 - 2.3j]], dtype=torch.complex128)
        length, v = 12_400, torch.tensor([0.6 - 0.8j], dtype=torch.complex128)
        each = powers(x, length) * wide(v)
        truth, sizes = each[..., 0], np.abs(each)
        if symmetric:
            truth, sizes = 2 * truth.real, 2 * sizes
        error = np.abs(product(v, x, length, symmetric).numpy() - truth)
        assert (error <= allowed(sizes, truth, -1, torch.complex128, "native", x)).all()

    def test_scale(self):
        """Powers from subnormal to overflow, beyond what complex64 holds of one factor."""
        x = torch.tensor([-3 + 1j, -0.7 + 0.2j])
        v = torch.tensor([1e30 + 1e30j, 1e20j])
        found = product(v, x, 200)
        each = powers(x, 200) * wide(v)
        truth = 2 * each.sum(-1).real
        tiny = torch.finfo(torch.float32).smallest_normal
        assert (np.abs(found.numpy() - truth) <= 2e-7 * np.abs(each).max(-1) + tiny).all()
        with pytest.warns(RuntimeWarning, match="x has a positive real part"):
            growing = product(torch.ones(1, dtype=torch.complex64), torch.tensor([1 + 0j]), 120)
        assert growing[:88].isfinite().all() and torch.equal(growing[90:], torch.full((30,), torch.inf))
        assert torch.allclose(growing[:88], 2 * torch.arange(88).double().exp().float())

    @by_backend
    def test_few_steps(self, backend):
        v, x = make(3, 1, torch.complex64)
        assert torch.allclose(product(v, x, 1, backend=backend)[..., 0], 2 * v.real.sum(-1), atol=1e-6)
        assert product(v, x, 0, backend=backend).shape == (2, 0)
        assert product(v, x, 0, symmetric=False, backend=backend).dtype == torch.complex64

    @by_dtype
    def test_symmetric_is_full_with_conjugates(self, dtype):
        v, x = make(7, 100, dtype)
        full = product(torch.cat([v, v.conj()], -1), torch.cat([x, x.conj()], -1), 100, False)
        close = 64 * torch.finfo(dtype).eps
        assert torch.allclose(full.real, product(v, x, 100), rtol=close, atol=close) and full.imag.abs().max() < close

    @by_backend
    def test_nan_stays_where_it_is(self, backend):
        v, x = make(5, 9, torch.complex64, (3,))
        x[1, 2] = torch.nan
        found = product(v, x, 9, backend=backend).isnan()
        assert not found[[0, 2]].any() and found[1, 1:].all()
        u = torch.ones(9)
        assert torch.equal(transpose(u, v, x, backend).isnan(), x.isnan())

    def test_leading_dimensions_and_views(self):
        v, x = random((3, 1, 2, 5), torch.complex64, 0), make(5, 70, torch.complex64, (4, 1))[1]
        found = product(v, x, 70)
        assert found.shape == (3, 4, 2, 70)
        full = [t.expand(3, 4, 2, 5) for t in (v, x)]
        for pair in (full, [t.contiguous() for t in full], [t.conj().resolve_conj().conj() for t in full]):
            assert torch.equal(product(*pair, 70), found)
        assert torch.equal(product(v.transpose(0, 3).contiguous().transpose(0, 3), x, 70), found)
        assert product(v[0, 0, 0], x[0, 0], 70).shape == (70,) and product(v[:0], x, 70).shape == (0, 4, 2, 70)

        u = random((2, 70), torch.complex64, 3)
        y = transpose(u, v, x)
        assert y.shape == (3, 4, 2, 5)
        assert torch.equal(transpose(u.expand(3, 4, 2, 70), *full), y)
        assert torch.equal(transpose(u.conj().resolve_conj().conj(), v, x), y)
        # an imaginary part of a conjugate is negated lazily
        lazy = u.conj().imag
        assert lazy.is_neg() and torch.equal(transpose(lazy, v, x), transpose(-u.imag.clone(), v, x))

    @pytest.mark.once
    def test_dtypes(self):
        v, x = make(4, 6, torch.complex128)
        assert product(v.to(torch.complex64), x, 6).dtype == torch.float64
        assert product(v.to(torch.complex64), x.to(torch.complex64), 6).dtype == torch.float32
        for u in (torch.float32, torch.float64, torch.complex64, torch.complex128):
            made = transpose(torch.ones(6, dtype=u), v.to(torch.complex64), x.to(torch.complex64))
            assert made.dtype == torch.promote_types(u, torch.complex64)


class TestTranspose:
    @pytest.mark.parametrize("real", [True, False], ids=["real", "complex"])
    @by_dtype
    @by_backend
    def test_terms(self, backend, dtype, real):
        for count, length in SHAPES:
            v, x = make(count, length, dtype, seed=length)
            u = random((2, length), dtype, 7)
            u = u.real.contiguous() if real else u
            each = wide(v)[:, None, :] * powers(x, length) * u.numpy()[:, :, None]
            truth = each.sum(-2)
            error = np.abs(wide(transpose(u, v, x, backend)) - truth)
            # the sum is rounded before v, and the product again
            assert (error <= 4 * allowed(np.abs(each), truth, -2, dtype, backend, x)).all(), (count, length)

    def test_growth_behind_the_last_step_is_not_seen(self):
        """The tables hold powers beyond the steps that there are, which may overflow."""
        x, v = torch.tensor([150 + 1j, 700 + 0j], dtype=torch.complex128), torch.ones(2, dtype=torch.complex128)
        with pytest.warns(RuntimeWarning, match="x has a positive real part"):
            found = transpose(torch.tensor([1.0, 1.0], dtype=torch.float64), v, x)
        assert torch.allclose(found, 1 + x.exp(), rtol=1e-14)

    def test_it_is_the_adjoint(self):
        """Σ u Vv = Σ v V'u, on the full form."""
        v, x = make(6, 500, torch.complex128)
        u = random((2, 500), torch.complex128, 1)
        one = (u * product(v, x, 500, symmetric=False)).sum()
        assert torch.allclose(one, transpose(u, v, x).sum(), rtol=1e-12)

    def test_state_of_a_recurrence(self):
        """Of inputs, the last step first: what x_k = e^x x_(k-1) + v u_k ends in."""
        v, x = make(4, 50, torch.complex128)
        u, state = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0
        for k in range(50):
            state = x.exp() * state + v * u[:, k : k + 1]
        assert torch.allclose(transpose(u.flip(-1), v, x), state, rtol=1e-12)


class TestGradient:
    @by_form
    @by_dtype
    @by_backend
    def test_moments(self, backend, dtype, symmetric):
        for count, length in ((3, 4200), (20, 70), (2, 1), (0, 4), (3, 0)):
            v, x = make(count, length, dtype, seed=length)
            leaves = [to_device(t).requires_grad_() for t in (v, x)]
            with fastpo.use_backend(backend):
                out = fastpo.vandermonde(*leaves, length, symmetric=symmetric)
            up = random((2, length), dtype, 5)
            up = up.real.contiguous() if symmetric else up
            found = torch.autograd.grad(out, leaves, to_device(up))
            each = (2 if symmetric else 1) * powers(x, length).conj() * up.numpy()[:, :, None]
            slope = each * np.arange(length)[:, None] * wide(v).conj()[:, None, :]
            for got, terms in zip(found, (each, slope), strict=True):
                truth = terms.sum(-2)
                error = np.abs(wide(got.cpu()) - truth)
                # the factors are multiplied after the sum is rounded
                bound = 4 * allowed(np.abs(terms), truth, -2, dtype, backend, x)
                if backend == "reference" and dtype == torch.complex64:
                    bound = torch.finfo(dtype).eps * 4 * np.abs(terms).sum(-2)
                assert (error <= bound).all(), (count, length)

    @by_form
    @pytest.mark.once
    def test_gradcheck(self, symmetric):
        v = random((2, 1, 2), torch.complex128, 0).requires_grad_()
        x = (0.3 * random((2, 2), torch.complex128, 1)).requires_grad_()
        x = torch.complex(-x.real.abs(), x.imag).detach().requires_grad_()

        def forward(v: Tensor, x: Tensor) -> Tensor:
            return fastpo.vandermonde(v, x, 4, symmetric=symmetric)

        assert torch.autograd.gradcheck(forward, (v, x)) and torch.autograd.gradgradcheck(forward, (v, x))
        u = random((2, 3), torch.complex128, 2)
        u = (u.real.contiguous() if symmetric else u).requires_grad_()
        inputs = (u, v, x)
        assert torch.autograd.gradcheck(fastpo.vandermonde_transpose, inputs)
        assert torch.autograd.gradgradcheck(fastpo.vandermonde_transpose, inputs)

    def test_second_derivatives_by_the_kernel(self):
        """As the reference's, and without its memory."""
        found = []
        for backend in BACKENDS:
            v, x = (t.requires_grad_() for t in make(3, 200, torch.complex128))
            with fastpo.use_backend(backend):
                out = fastpo.vandermonde(v, x, 200)
                grads = torch.autograd.grad(out.square().sum(), (v, x), create_graph=True)
                found.append(torch.autograd.grad(sum(g.abs().square().sum() for g in grads), (v, x)))
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-9)

    def test_only_what_is_needed(self):
        v, x = make(4, 30, torch.complex64)
        u = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
        for function, inputs in (
            (lambda v, x: fastpo.vandermonde(v, x, 30), (v, x)),
            (fastpo.vandermonde_transpose, (u, v, x)),
        ):
            every = [t.clone().requires_grad_() for t in inputs]
            whole = torch.autograd.grad(function(*every).abs().square().sum(), every)
            for i in range(len(inputs)):
                some = [t.clone().requires_grad_(i == k) for k, t in enumerate(inputs)]
                function(*some).abs().square().sum().backward()
                assert torch.equal(some[i].grad, whole[i])
                assert all(t.grad is None for k, t in enumerate(some) if k != i)


class TestDeterminism:
    @pytest.mark.once
    def test_threads(self):
        v, x = (t.requires_grad_() for t in make(40, 9000, torch.complex64, (3,)))
        up, found = torch.randn(3, 9000, generator=torch.Generator().manual_seed(0)), []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out = fastpo.vandermonde(v, x, 9000)
            found.append([out, *torch.autograd.grad(out, (v, x), up)])
        torch.set_num_threads(1)
        assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[1], found[2]))


@pytest.mark.once
class TestOps:
    def test_opcheck(self):
        v, x = make(3, 5, torch.complex64)
        for symmetric in (True, False):
            torch.library.opcheck(torch.ops.fastpo.vandermonde.default, (v, x, 5, symmetric))
            torch.library.opcheck(torch.ops.fastpo.vandermonde.default, (v[:, None], x[0], 0, symmetric))
        for u in (torch.ones(4, 1, 6), random((6,), torch.complex64, 0)):
            for with_slope in (True, False):
                torch.library.opcheck(torch.ops.fastpo.vandermonde_moments.default, (u, x, with_slope))

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiled_equals_eager(self, backend):
        """With cauchy, which by itself is not worth another run of Inductor."""
        torch._dynamo.reset()
        v, x = (t.requires_grad_() for t in make(4, 9, torch.complex64))
        u = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def function(u: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            state = torch.view_as_real(fastpo.vandermonde_transpose(u, v, x))
            response = torch.view_as_real(fastpo.cauchy(v, 1j * u, x))
            return fastpo.vandermonde(v, x, u.shape[-1]), state, response

        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex", UserWarning)
            for one, two in zip(function(u, v, x), compiled(u, v, x), strict=True):
                assert torch.allclose(one, two, rtol=1e-6)
            grads = []
            for f in (function, compiled):
                grads.append(torch.autograd.grad(sum(t.square().sum() for t in f(u, v, x)), (u, v, x)))
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*grads, strict=True)) and counter.frame_count == 1

    def test_shapes_alone(self):
        """Tensors without values are not looked at."""
        v, x = make(4, 9, torch.complex64)
        with FakeTensorMode() as mode:
            v, x = mode.from_tensor(v), mode.from_tensor(x)
            assert fastpo.vandermonde(v, x, 9).shape == (2, 9)
            assert fastpo.cauchy(v, x[0], x).shape == (2, 4)
            assert fastpo.vandermonde_transpose(v, v, x).dtype == torch.complex64

    def test_compiled_for_any_length(self):
        torch._dynamo.reset()

        def function(v: Tensor, x: Tensor, u: Tensor) -> Tensor:
            return fastpo.vandermonde(v, x, u.shape[-1]) + fastpo.vandermonde_transpose(u, v, x).real.sum(-1, True)

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
        for count, length in ((3, 7), (4, 11), (5, 20)):
            v, x = make(count, length, torch.complex64)
            u = torch.ones(length)
            assert torch.equal(compiled(v, x, u), function(v, x, u))
        assert counter.frame_count == 1

    def test_memory_is_that_of_arguments_and_results(self):
        v, x = (t.requires_grad_() for t in make(48, 3000, torch.complex64, (16,)))
        up = torch.ones(16, 3000)

        def both() -> object:
            return torch.autograd.grad(fastpo.vandermonde(v, x, 3000), (v, x), up)

        assert peak_allocated(both) < up.nbytes + 8 * v.nbytes + 2**14 < 48 * up.nbytes / 20

    def test_op_refuses_what_the_public_function_never_passes(self):
        v, x = make(3, 5, torch.complex64)
        with pytest.raises(RuntimeError, match="wrong size"):
            torch.ops.fastpo.vandermonde(v, x[:, :2], 5, True)
        with pytest.raises(RuntimeError, match="a length expected"):
            torch.ops.fastpo.vandermonde(v, x, -1, True)
        with pytest.raises(RuntimeError, match="another dtype"):
            torch.ops.fastpo.vandermonde_moments(torch.ones(5, dtype=torch.float64), x, True)


@pytest.mark.once
class TestBadInput:
    v, x = make(3, 5, torch.complex64)

    @by_backend
    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"v": 1j}, TypeError, r"v must be a torch.Tensor, got complex"),
            ({"x": torch.ones(2, 3)}, TypeError, r"x must have dtype complex64, complex128, got float32"),
            ({"v": torch.ones(2, 3, dtype=torch.float16)}, TypeError, r"v must have dtype .*, got float16"),
            ({"x": -torch.ones(2, 4, dtype=torch.complex64)}, ValueError, r"x has shape \(2, 4\), v \(2, 3\): both"),
            ({"x": -torch.ones(4, 3, dtype=torch.complex64)}, ValueError, r"v \(2, 3\), x \(4, 3\) do not broadcast"),
            ({"length": 5.0}, TypeError, r"length must be an int, got float"),
            ({"length": True}, TypeError, r"length must be an int, got bool"),
            ({"length": -1}, ValueError, r"length must be at least 0, got -1"),
        ],
    )
    def test_arguments(self, backend, arguments, error, text):
        with fastpo.use_backend(backend), pytest.raises(error, match=text):
            fastpo.vandermonde(**{"v": self.v, "x": self.x, "length": 5} | arguments)

    @by_backend
    def test_inputs_of_the_transpose(self, backend):
        with fastpo.use_backend(backend):
            with pytest.raises(
                TypeError, match=r"u must have dtype complex64, complex128, float32, float64, got int64"
            ):
                fastpo.vandermonde_transpose(torch.ones(5, dtype=torch.int64), self.v, self.x)
            with pytest.raises(ValueError, match=r"u \(3, 5\), v \(2, 3\), x \(2, 3\) do not broadcast"):
                fastpo.vandermonde_transpose(torch.ones(3, 5), self.v, self.x)

    def test_growth_is_warned_of_where_the_caller_stands(self):
        for call in (
            lambda x: fastpo.vandermonde(self.v, x, 5),
            lambda x: fastpo.vandermonde_transpose(torch.ones(5), self.v, x),
        ):
            with pytest.warns(RuntimeWarning, match="x has a positive real part") as caught:
                call(self.x + 4)
            assert caught[0].filename == __file__
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                call(self.x)
                call(torch.complex(torch.full((2, 3), 1e-8), self.x.imag))
