"""cauchy against its terms one by one, in 80-bit floats and in mpmath."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastpo
from tests.device import to_device
from tests.memory import peak_allocated

DTYPES = [torch.complex128, torch.complex64]
BACKENDS = ["native", "reference"]
# poles and nodes; around the vectors, blocks of poles and blocks of nodes of the kernel
SHAPES = [(0, 3), (1, 0), (1, 1), (2, 5), (7, 63), (32, 130), (65, 513), (17, 1030)]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_form = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "full"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that share busy cores wait for each other; TestDeterminism takes two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128).to(dtype)


def make(poles: int, nodes: int, dtype: torch.dtype, leading: tuple[int, ...] = (2,), seed: int = 0) -> list[Tensor]:
    """v, z and w as of an S4 layer: nodes on the imaginary axis up to far out, poles left of it; some real."""
    steps = torch.logspace(-3, -1, max(1, leading[-1] if leading else 1), dtype=torch.float64)[: max(1, *leading, 1)]
    w = torch.complex(torch.full((poles,), -0.5, dtype=torch.float64), torch.pi * torch.arange(poles).double())
    w = (steps[:, None] if leading else steps[0]) * w + 1e-3 * random((*leading, poles), torch.complex128, seed)
    w = torch.complex(-w.real.abs(), torch.where(torch.arange(poles) % 5 == 4, 0.0, w.imag))
    z = 2j * torch.tan(torch.pi * torch.arange(nodes, dtype=torch.float64) / max(1, 2 * nodes))
    z = z + 1e-2 * random((nodes,), torch.complex128, seed + 1).real
    return [random((*leading, poles), dtype, seed + 2), z.to(dtype), w.to(dtype)]


def product(v: Tensor, z: Tensor, w: Tensor, symmetric: bool = True, backend: str = "native") -> Tensor:
    with fastpo.use_backend(backend):
        return fastpo.cauchy(to_device(v), to_device(z), to_device(w), symmetric=symmetric).cpu()


def wide(t: Tensor) -> np.ndarray:
    return t.detach().resolve_conj().numpy().astype(np.clongdouble)


def terms(v: Tensor, z: Tensor, w: Tensor, symmetric: bool) -> np.ndarray:
    """(..., L, N), or 2 N with the conjugates."""
    V, Z, W = wide(v)[..., None, :], wide(z)[..., :, None], wide(w)[..., None, :]
    found = [V / (Z - W)] + [V.conj() / (Z - W.conj())] * symmetric
    return np.concatenate(np.broadcast_arrays(*found), -1)


def assert_terms(found: Tensor, v: Tensor, z: Tensor, w: Tensor, symmetric: bool, exactly: bool) -> None:
    """Within an ulp of the largest term, or of the sum itself where that is larger; where terms and their sum are
    rounded to the dtype, within 4 ulp of each term and half an ulp for each addition."""
    each = terms(v, z, w, symmetric)
    truth, eps = each.sum(-1), torch.finfo(found.dtype).eps
    assert found.shape == truth.shape
    sizes, count = np.abs(each), each.shape[-1]
    bound = np.maximum(sizes.max(-1, initial=0), np.abs(truth)) * eps
    if not exactly:
        bound = (4 + count / 2) * eps * sizes.sum(-1)
    error = np.abs(wide(found) - truth)
    assert (error <= bound).all(), f"{(error / (bound + 1e-300)).max():.2f} of the error allowed"


class TestForward:
    @by_form
    @by_dtype
    @by_backend
    def test_terms(self, backend, dtype, symmetric):
        exactly = backend == "native" and dtype == torch.complex64
        for poles, nodes in SHAPES:
            case = make(poles, nodes, dtype, seed=poles)
            assert_terms(product(*case, symmetric, backend), *case, symmetric, exactly)

    @by_form
    @by_dtype
    def test_near_poles(self, dtype, symmetric):
        """Nodes a few ulp from a pole or its conjugate, for poles near to and far from the real axis."""
        real = dtype.to_real()
        generator = torch.Generator().manual_seed(1)
        imaginary = torch.tensor([1.0, 1e-3, 1e-6, 1e-9, 0.0, 30.0], dtype=real)
        w = torch.complex(-torch.rand(6, generator=generator, dtype=real) - 0.01, imaginary)
        v = random((6,), dtype, 2)
        ulp = torch.finfo(real).eps * torch.randint(-3, 4, (2, 6, 8), generator=generator).to(real)
        near = torch.complex(w.real[:, None] * (1 + ulp[0]), w.imag[:, None] * (1 + ulp[1])).flatten()
        z = torch.cat([near, near.conj()])
        away = (z[:, None] != w).all(1) & (z[:, None] != w.conj()).all(1)
        assert 40 < away.sum() < len(z)
        exactly = dtype == torch.complex64
        assert_terms(product(v, z[away], w, symmetric), v, z[away], w, symmetric, exactly)
        poles = product(v, z[~away], w, symmetric)
        whose = torch.isin(torch.view_as_real(z[~away])[:, 0], w.real)
        assert whose.all() and not poles.isnan().any()

    @pytest.mark.once
    def test_near_poles_in_many_digits(self):
        w, v = torch.tensor([-0.1 + 3j, -2e-7 + 1e-7j, -5.0 + 0j]), torch.tensor([1 - 2j, 0.3 + 1j, -1 + 1j])
        z = torch.cat([torch.nextafter(w.real, torch.zeros(3)) + 1j * w.imag, torch.tensor([1e4j, 0.5 + 2j])])
        with mpmath.workdps(50):
            pairs = [*zip(v.tolist(), w.tolist(), strict=True)]
            pairs += [(a.conjugate(), b.conjugate()) for a, b in pairs]
            each = [[mpmath.mpc(a) / (mpmath.mpc(c) - mpmath.mpc(b)) for a, b in pairs] for c in z.tolist()]
            truth = torch.tensor([complex(mpmath.fsum(row)) for row in each])
            largest = torch.tensor([float(max(map(abs, row))) for row in each])
        assert ((product(v, z, w) - truth).abs() <= 4 * torch.finfo(torch.float32).eps * largest).all()

    @by_form
    @by_dtype
    @by_backend
    def test_at_poles(self, backend, dtype, symmetric):
        """inf where the node is a pole, in the components that the residue has, and nothing else changes."""
        v, z, w = make(9, 70, dtype, (3,))
        v[1, 2] = 3.0
        before = product(v, z, w, symmetric, backend)
        z[[4, 33]], z[69] = w[1, [2, 7]], w[2, 4].conj()
        found = product(v, z, w, symmetric, backend)
        hit = torch.zeros(3, 70, dtype=torch.bool)
        hit[1, [4, 33]] = hit[2, 69] = True
        assert torch.equal(found.isinf(), hit) and not found.isnan().any()
        same = ~torch.isin(torch.arange(70), torch.tensor([4, 33, 69]))
        assert torch.equal(found[:, same], before[:, same])
        assert found[1, 4].real == torch.inf and found[1, 4].imag.isfinite()
        assert torch.equal(found[1, 33].real.sign(), v[1, 7].real.sign())
        # w[2, 4] is real, and its pair 2 Re v / (z - w)
        assert found[2, 69].imag.isfinite() == symmetric
        # what is finite there is the sum of the other terms
        with np.errstate(divide="ignore", invalid="ignore"):
            each = terms(v, z, w, symmetric)
        others = torch.from_numpy(np.where(np.isfinite(each), each, 0).astype(np.complex128))
        bound = (4 + others.shape[-1] / 2) * torch.finfo(dtype).eps * others.abs().sum(-1)
        for row, node in ((1, 4), (2, 69))[: 1 + symmetric]:
            assert (found[row, node].imag - others[row, node].imag.sum()).abs() <= bound[row, node]

    @by_backend
    def test_nothing_at_a_pole(self, backend):
        v, w = torch.tensor([0j, 1.0]), torch.tensor([-1 + 1j, -2.0])
        found = product(v, torch.tensor([-1 + 1j, 0j]), w, False, backend)
        assert found[0].isnan() and found[1] == 0.5

    @by_form
    @by_dtype
    def test_symmetric_is_full_with_conjugates(self, dtype, symmetric):
        v, z, w = make(12, 40, dtype)
        whole = [torch.cat([t, t.conj()], -1) for t in (v, w)]
        found = [product(v, z, w), product(whole[0], z, whole[1], False)]
        eps = torch.finfo(dtype).eps
        sizes = torch.from_numpy(np.abs(terms(v, z, w, True)).sum(-1).astype(np.float64))
        assert ((found[0] - found[1]).abs() <= 16 * eps * sizes).all()

    @by_form
    @by_dtype
    def test_far_out(self, dtype, symmetric):
        """Nodes and poles of any size whose terms are in range, also those whose squares are not."""
        tiny, huge = (1e-30, 1e30) if dtype == torch.complex64 else (1e-120, 1e120)
        v = random((2, 4), dtype, 3)
        w, z = random((2, 4), dtype, 4), random((6,), dtype, 5)
        w = torch.complex(-w.real.abs(), w.imag)
        for scale in (tiny, huge):
            case = (v * (1e5 if scale > 1 else 1e-5), z * scale, w * scale)
            assert_terms(product(*case, symmetric), *case, symmetric, dtype == torch.complex64)
        assert product(v, torch.full((1,), huge, dtype=dtype), w, symmetric).abs().max() < 1e-20

    @by_backend
    def test_nan_stays_where_it_is(self, backend):
        v, z, w = make(5, 9, torch.complex64, (3,))
        z[4], v[1, 0] = torch.nan, torch.nan
        found = product(v, z, w, backend=backend)
        bad = torch.zeros(3, 9, dtype=torch.bool)
        bad[:, 4] = bad[1] = True
        assert torch.equal(found.isnan(), bad)

    def test_leading_dimensions(self):
        v, w = random((3, 1, 2, 5), torch.complex64, 0), random((4, 1, 5), torch.complex64, 1)
        w = torch.complex(-w.real.abs(), w.imag)
        for z in (random((7,), torch.complex64, 2), random((3, 1, 1, 7), torch.complex64, 3)):
            found = product(v, z, w)
            assert found.shape == (3, 4, 2, 7)
            full = [t.expand(3, 4, 2, t.shape[-1]) for t in (v, z, w)]
            assert torch.equal(product(*full), found)
            assert torch.equal(product(*(t.contiguous() for t in full)), found)
        assert product(v[..., 0, :], z[0, 0, 0], w[0, 0]).shape == (3, 1, 7)
        assert product(v[0, 0, 0], z[0, 0, 0], w[0, 0]).shape == (7,)
        assert product(v[:0], z[0, 0, 0], w).shape == (0, 4, 2, 7)

    def test_views(self):
        """Strides, an offset, and numbers that are conjugated or negated lazily."""
        v, z, w = make(10, 21, torch.complex64, (4,))
        want = product(v, z, w)
        apart = torch.zeros(4, 10, 3, dtype=torch.complex64)
        apart[..., 1] = v
        assert torch.equal(product(apart[..., 1], z, w), want)
        assert torch.equal(product(v.T.contiguous().T, z, w.T.contiguous().T), want)
        mirrored = [t.conj().resolve_conj().conj() for t in (v, z, w)]
        assert all(t.is_conj() for t in mirrored) and torch.equal(product(*mirrored), want)
        assert torch.equal(product(v, z, w.clone().flip(0).flip(0)), want)

    @pytest.mark.once
    def test_mixed_precision(self):
        v, z, w = make(4, 6, torch.complex128)
        found = product(v.to(torch.complex64), z, w)
        assert found.dtype == torch.complex128
        assert torch.equal(found, product(v.to(torch.complex64).to(torch.complex128), z, w))

    @pytest.mark.once
    def test_arrays(self):
        """Anything with __dlpack__, as CuPy's arrays are; those with the older protocol are taken by torch."""
        case = make(3, 5, torch.complex128)

        class Array:
            def __init__(self, t: Tensor):
                self.t = t

            def __dlpack__(self, **options: object) -> object:
                return self.t.__dlpack__(**options)

            def __dlpack_device__(self) -> object:
                return self.t.__dlpack_device__()

        for made in ([Array(t) for t in case], [t.numpy() for t in case]):
            assert torch.equal(fastpo.cauchy(*made), fastpo.cauchy(*case))


class TestGradient:
    @by_form
    @by_dtype
    @by_backend
    def test_sums_of_terms(self, backend, dtype, symmetric):
        """Of each input by its formula, over more nodes and poles than a block has."""
        for poles, nodes in ((5, 1030), (37, 40), (0, 3), (2, 0), (1, 1)):
            v, z, w = make(poles, nodes, dtype, (2,), seed=nodes)
            leaves = [to_device(t).requires_grad_() for t in (v, z, w)]
            with fastpo.use_backend(backend):
                out = fastpo.cauchy(*leaves, symmetric=symmetric)
            up = random((2, nodes), dtype, 9)
            found = torch.autograd.grad(out, leaves, to_device(up))
            V, Z, W, G = wide(v)[:, None, :], wide(z)[None, :, None], wide(w)[:, None, :], wide(up)[:, :, None]
            one, two = 1 / (Z - W), symmetric / (Z - W.conj())
            each = {
                "v": (G * one.conj(), G.conj() * two, 1),
                "z": (-G * (V * one**2).conj(), -G * V * (two**2).conj(), (0, 2)),
                "w": (G * (V * one**2).conj(), (G * V * two.conj() ** 2).conj(), 1),
            }
            steps = {"v": nodes, "z": poles, "w": nodes}
            for got, (name, (first, second, axis)) in zip(found, each.items(), strict=True):
                truth, size = (first + second).sum(axis), (np.abs(first) + np.abs(second)).sum(axis)
                # in complex64 the native sums are in double; elsewhere each addition may lose half an ulp
                exactly = backend == "native" and dtype == torch.complex64
                loss = 4.0 if exactly else 8 + 2 * steps[name] ** 0.5
                error = np.abs(wide(got.cpu()) - truth)
                assert (error <= loss * torch.finfo(dtype).eps * size).all(), name

    @by_form
    @pytest.mark.once
    def test_gradcheck(self, symmetric):
        def leaf(t: Tensor) -> Tensor:
            return t.to(torch.complex128).requires_grad_()

        v, w = leaf(random((3, 1, 2), torch.complex128, 0)), leaf(-1 - random((2, 2), torch.complex128, 1).abs() * 1j)
        z = leaf(random((4,), torch.complex128, 2) + 2)
        assert torch.autograd.gradcheck(lambda *t: fastpo.cauchy(*t, symmetric=symmetric), (v, z, w))
        small = (v[:1], z[:2], w[:1])
        assert torch.autograd.gradgradcheck(lambda *t: fastpo.cauchy(*t, symmetric=symmetric), small)

    @pytest.mark.once
    def test_halves(self):
        """The gradient of a half is that of the whole's first half plus the conjugate of its second."""
        v, z, w = make(6, 30, torch.complex128)
        up = random((2, 30), torch.complex128, 4)
        half = [v.requires_grad_(), w.requires_grad_()]
        whole = [torch.cat([t, t.conj()], -1).detach().requires_grad_() for t in half]
        ours = torch.autograd.grad(fastpo.cauchy(half[0], z, half[1]), half, up)
        full = torch.autograd.grad(fastpo.cauchy(whole[0], z, whole[1], symmetric=False), whole, up)
        for a, b in zip(ours, full, strict=True):
            assert torch.allclose(a, b[:, :6] + b[:, 6:].conj(), rtol=1e-12)

    def test_only_what_is_needed(self):
        case = make(4, 9, torch.complex64)
        every = [t.clone().requires_grad_() for t in case]
        whole = torch.autograd.grad(fastpo.cauchy(*every).abs().square().sum(), every)
        for i in range(3):
            some = [t.clone().requires_grad_(i == k) for k, t in enumerate(case)]
            fastpo.cauchy(*some).abs().square().sum().backward()
            assert torch.equal(some[i].grad, whole[i])
            assert all(t.grad is None for k, t in enumerate(some) if k != i)

    def test_upstream_of_any_layout(self):
        v, z, w = (t.requires_grad_() for t in make(4, 9, torch.complex64))
        out = fastpo.cauchy(v, z, w)
        up = random((2, 9), torch.complex64, 1)
        want = torch.autograd.grad(out, (v, z, w), up, retain_graph=True)
        lazy = up.conj().resolve_conj().conj()
        for other in (lazy, up.T.contiguous().T):
            assert all(map(torch.equal, torch.autograd.grad(out, (v, z, w), other, retain_graph=True), want))
        constant = torch.autograd.grad(out.real.sum(), (v, z, w), retain_graph=True)
        ones = torch.autograd.grad(out, (v, z, w), torch.ones_like(out))
        assert all(map(torch.equal, constant, ones))


class TestDeterminism:
    @pytest.mark.once
    def test_threads(self):
        v, z, w = (t.requires_grad_() for t in make(40, 3000, torch.complex64, (5,)))
        up = random((5, 3000), torch.complex64, 1)
        found = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out = fastpo.cauchy(v, z, w)
            found.append([out, *torch.autograd.grad(out, (v, z, w), up)])
        torch.set_num_threads(1)
        assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[1], found[2]))


@pytest.mark.once
class TestOps:
    def test_opcheck(self):
        for symmetric in (True, False):
            case = make(3, 5, torch.complex64, (2,))
            torch.library.opcheck(torch.ops.fastpo.cauchy.default, (*case, symmetric))
            up = random((2, 5), torch.complex64, 1)
            for wanted in (1, 6, 7):
                torch.library.opcheck(torch.ops.fastpo.cauchy_backward.default, (up, *case, symmetric, wanted))
        broadcast = (random((3, 1, 4), torch.complex64, 0), random((5,), torch.complex64, 1))
        case = (*broadcast, random((2, 4), torch.complex64, 2), True)
        torch.library.opcheck(torch.ops.fastpo.cauchy.default, case)

    def test_compiled_equals_eager(self):
        """Inductor takes it in tests/kernels/test_vandermonde.py."""
        torch._dynamo.reset()
        v, z, w = make(4, 9, torch.complex64)
        leaves = [v.requires_grad_(), w.requires_grad_()]

        def function(v: Tensor, w: Tensor) -> Tensor:
            return torch.view_as_real(fastpo.cauchy(v, z, w))

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        assert torch.equal(function(*leaves), compiled(*leaves))
        grads = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (function, compiled)]
        assert all(map(torch.equal, *grads)) and counter.frame_count == 1

    def test_memory_is_that_of_arguments_and_results(self):
        v, z, w = make(48, 3000, torch.complex64, (16,))
        leaves = [v.requires_grad_(), w.requires_grad_()]
        up = random((16, 3000), torch.complex64, 0)
        output, input_ = up.nbytes, v.nbytes

        def both() -> object:
            return torch.autograd.grad(fastpo.cauchy(leaves[0], z, leaves[1]), leaves, up)

        assert peak_allocated(lambda: fastpo.cauchy(v, z, w)) < output + 2 * input_ + 2**14
        assert peak_allocated(both) < output + 6 * input_ + 2**14 < 48 * output / 20

    def test_inputs_are_not_touched(self):
        case = make(4, 9, torch.complex64)
        before = [t.clone() for t in case]
        product(*case)
        assert all(map(torch.equal, case, before))

    def test_op_refuses_what_the_public_function_never_passes(self):
        v, z, w = make(3, 5, torch.complex64)
        with pytest.raises(RuntimeError, match="wrong size"):
            torch.ops.fastpo.cauchy(v, z, w[:, :2], True)
        with pytest.raises(RuntimeError, match="another dtype"):
            torch.ops.fastpo.cauchy(v, z.to(torch.complex128), w, True)
        with pytest.raises(RuntimeError, match="complex64 or complex128 expected"):
            torch.ops.fastpo.cauchy(v.real, z, w, True)
        with pytest.raises(RuntimeError, match="do not broadcast"):
            torch.ops.fastpo.cauchy(v, z, random((3, 3), torch.complex64, 0), True)


@pytest.mark.once
class TestBadInput:
    v, z, w = make(3, 5, torch.complex64)

    @by_backend
    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"v": [1j]}, TypeError, r"v must be a torch.Tensor, got list"),
            ({"v": torch.ones(2, 3)}, TypeError, r"v must have dtype complex64, complex128, got float32"),
            ({"z": torch.ones(5, dtype=torch.float16)}, TypeError, r"z must have dtype .*, got float16"),
            ({"w": torch.ones(2, 3, dtype=torch.complex32)}, TypeError, r"w must have dtype .*, got complex32"),
            (
                {"w": torch.ones(2, 4, dtype=torch.complex64)},
                ValueError,
                r"w has shape \(2, 4\), v \(2, 3\): both .* N",
            ),
            ({"w": -torch.ones(4, 3, dtype=torch.complex64)}, ValueError, r"leading .* w \(4, 3\) do not broadcast"),
            ({"z": torch.tensor(1j)}, ValueError, r"z has no dimension, expected one at least"),
        ],
    )
    def test_arguments(self, backend, arguments, error, text):
        with fastpo.use_backend(backend), pytest.raises(error, match=text):
            fastpo.cauchy(**{"v": self.v, "z": self.z, "w": self.w} | arguments)

    def test_unstable_poles(self):
        """Warned of where the caller stands, and computed all the same; not of rounding."""
        right = self.w.clone()
        right[1, 2] = 0.25 + 1j
        with pytest.warns(RuntimeWarning, match="w has a positive real part") as caught:
            found = fastpo.cauchy(self.v, self.z, right)
        assert caught[0].filename == __file__
        assert_terms(found, self.v, self.z, right, True, exactly=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            right[1, 2] = 1e-8 + 1j
            fastpo.cauchy(self.v, self.z, right)
