"""affine_scan and the advantages made of it, against their recursions in 80-bit floats.

The kernel computes in double and rounds once, so for fp32 and narrower every result is the exact one, rounded; for fp64
the rule of tests/tolerance.py holds, with the sum of the magnitudes of the terms as the size of a result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastpo
from fastpo.kernels.affine_scan import advantages
from tests.device import to_device
from tests.tolerance import assert_within

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["native", "reference"]
LAYOUTS = ["padded", "padded masked", "packed", "packed masked"]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
both_ways = pytest.mark.parametrize("reverse", [True, False], ids=["reverse", "forward"])

Arguments = dict[str, Tensor | None]
# around the borders of vectors, of a warp, of a block of the walk and of a GPU's team
SHAPES = [(1, 0), (0, 5), (1, 1), (2, 2), (3, 7), (2, 63), (5, 33), (2, 511), (2, 1025)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that share busy cores wait for each other; TestLongRows takes more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coins(*shape: int, p: float, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


def layout_of(
    layout: str, rows: int, tokens: int, seed: int = 0
) -> tuple[tuple[int, ...], Tensor | None, Tensor | None]:
    """The shape of the tokens, the mask and the boundaries; a row without tokens, and one masked altogether."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, tokens + 1, (rows,), generator=generator)
    if rows:
        lengths[-1] = tokens
    if layout.startswith("packed"):
        boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        # tokens behind the last sequence
        shape: tuple[int, ...] = (int(boundaries[-1]) + 3,)
        mask = torch.rand(shape, generator=generator) < 0.7 if "masked" in layout else None
        return shape, mask, boundaries
    if "masked" not in layout:
        return (rows, tokens), None, None
    # padding on both sides, and holes
    position = torch.arange(tokens)
    mask = (position < lengths[:, None]) & (position >= lengths[:, None] // 5)
    mask &= (torch.rand(rows, tokens, generator=generator) < 0.8) | (position % 100 < 60)
    if rows > 1:
        mask[0] = False
    return (rows, tokens), mask, None


def spans(shape: tuple[int, ...], cu_seqlens: Tensor | None) -> list[slice]:
    if cu_seqlens is None:
        return [slice(r * shape[1], (r + 1) * shape[1]) for r in range(shape[0])]
    return [slice(a, b) for a, b in itertools.pairwise(cu_seqlens.tolist())]


def extended(t: Tensor | None, shape: tuple[int, ...] | torch.Size) -> np.ndarray:
    return np.zeros(math.prod(shape), np.longdouble) if t is None else t.double().numpy().astype(np.longdouble).ravel()


def flags(t: Tensor | None, shape: tuple[int, ...] | torch.Size, default: bool) -> np.ndarray:
    return np.full(math.prod(shape), default) if t is None else t.numpy().ravel()


def exact_scan(
    a: Tensor,
    b: Tensor,
    initial: Tensor | None = None,
    reverse: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> np.ndarray:
    slopes, shifts, counts = extended(a, b.shape), extended(b, b.shape), flags(mask, b.shape, True)
    out = np.zeros(b.numel(), np.longdouble)
    for row, span in enumerate(spans(tuple(b.shape), cu_seqlens)):
        x = np.longdouble(0 if initial is None else initial[row].item())
        places = range(span.start, span.stop)
        for t in reversed(places) if reverse else places:
            if counts[t]:
                x = out[t] = slopes[t] * x + shifts[t]
    return out.reshape(b.shape)


def affine_case(layout: str, rows: int, tokens: int, dtype: torch.dtype, seed: int = 0) -> Arguments:
    shape, mask, boundaries = layout_of(layout, rows, tokens, seed)
    # slopes around 1 and below, of both signs, and some that forget
    a = (0.97 + 0.05 * random(*shape, seed=seed)) * (1 - 2 * coins(*shape, p=0.1, seed=seed + 1).float())
    a = torch.where(coins(*shape, p=0.03, seed=seed + 2), 0, a)
    b, initial = random(*shape, seed=seed + 3), random(rows, seed=seed + 4)
    return {"a": a.to(dtype), "b": b.to(dtype), "initial": initial.to(dtype), "mask": mask, "cu_seqlens": boundaries}


def scan(case: Arguments, backend: str = "native", **options) -> Tensor:
    with fastpo.use_backend(backend):
        return fastpo.affine_scan(**{k: to_device(v) for k, v in case.items()}, **options).cpu()


def compare(case: Arguments, reverse: bool = True) -> Tensor:
    """The native result, checked."""
    ours, same = (scan(case, backend, reverse=reverse) for backend in BACKENDS)
    truth = exact_scan(**case, reverse=reverse)
    sizes = {k: case[k].abs() if k in ("a", "b", "initial") and case[k] is not None else case[k] for k in case}
    terms = exact_scan(**sizes, reverse=reverse).astype(np.float64)
    assert ours.dtype == same.dtype and ours.shape == case["b"].shape
    if ours.dtype == torch.float32:
        # rounded once; where large terms cancel, double leaves its own error
        error = np.abs(ours.double().numpy() - truth)
        assert (error <= 0.5001 * 2**-23 * np.abs(truth) + 2.0**-45 * terms).all()
    assert_within(ours, truth, same, terms=terms)
    return ours


@by_dtype
@by_layout
@both_ways
class TestValues:
    def test_sizes(self, dtype, layout, reverse):
        for i, (rows, tokens) in enumerate(SHAPES):
            case = affine_case(layout, rows, tokens, dtype, seed=10 * i)
            compare(case, reverse)
            if tokens < 100:
                compare({**case, "initial": None}, reverse)

    def test_views(self, dtype, layout, reverse):
        case = affine_case(layout, 5, 41, dtype)
        plain = scan(case, reverse=reverse)

        def apart(t: Tensor) -> Tensor:
            base = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
            base[..., ::2] = t
            return base[..., ::2]

        views = {k: t if t is None or k == "cu_seqlens" else apart(t) for k, t in case.items()}
        assert torch.equal(scan(views, reverse=reverse), plain)
        if layout == "padded":
            turned = {k: t.t().contiguous().t() if t is not None and t.dim() == 2 else t for k, t in case.items()}
            assert torch.equal(scan(turned, reverse=reverse), plain)

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_masked_tokens_have_no_influence(self, dtype, layout, reverse, poison):
        if "masked" not in layout:
            pytest.skip("nothing is masked")
        case = affine_case(layout, 6, 700, dtype)
        dirty = {**case, **{k: case[k].masked_fill(~case["mask"], poison) for k in ("a", "b")}}
        for backend in BACKENDS:
            ours = scan(dirty, backend, reverse=reverse)
            assert torch.equal(ours, scan(case, backend, reverse=reverse))
            assert (ours[~case["mask"]] == 0).all() and (ours[case["mask"]] != 0).any()


class TestScan:
    @by_backend
    def test_geometric_series(self, backend):
        """a = γ, b = 1: (1 - γ^n) / (1 - γ), however one gets there."""
        n, gamma = 300, 0.9375
        powers = torch.tensor(gamma, dtype=torch.float64) ** torch.arange(n, 0, -1)
        want = (1 - powers) / (1 - gamma)
        with fastpo.use_backend(backend):
            ones = torch.ones(2, n, dtype=torch.float64)
            assert torch.allclose(fastpo.affine_scan(gamma, ones), want.expand(2, n), rtol=1e-14)
            forward = fastpo.affine_scan(gamma, ones, reverse=False)
            assert torch.allclose(forward, want.flip(0).expand(2, n), rtol=1e-14)

    @by_backend
    def test_next_valid_value(self, backend):
        """a = 1 - m, b = m V is the value of the next token that counts, exactly."""
        values, m = random(3, 50), coins(3, 50, p=0.3).float()
        with fastpo.use_backend(backend):
            found = fastpo.affine_scan(1 - m, m * values)
        for row, t in itertools.product(range(3), range(50)):
            ahead = m[row, t:].nonzero()
            assert found[row, t] == (values[row, t + ahead[0]] if len(ahead) else 0)

    @by_backend
    @both_ways
    def test_a_slope_of_zero_forgets(self, backend, reverse):
        """NaN and inf of another episode stay there, across vectors, warps and blocks of the walk."""
        for at, bad in itertools.product((3, 40, 300, 900), (math.nan, math.inf)):
            a, b = torch.full((1, 1200), 0.5), torch.ones(1, 1200)
            a[0, 600] = 0
            b[0, at if not reverse else 1199 - at] = bad
            with fastpo.use_backend(backend):
                x = fastpo.affine_scan(a, b, reverse=reverse)[0]
            x = x.flip(0) if reverse else x
            zero = 599 if reverse else 600
            assert x[:at].isfinite().all() and not x[at].isfinite()
            if at < zero:
                assert not x[zero - 1].isfinite() and x[zero:].isfinite().all()

    def test_rows_do_not_depend_on_their_neighbours(self):
        case = affine_case("padded masked", 40, 600, torch.float32)
        whole = scan(case)
        for row in (0, 7, 39):
            assert torch.equal(
                scan({k: None if t is None else t[row : row + 1] for k, t in case.items()})[0], whole[row]
            )

    def test_number_for_a(self):
        b = random(2, 9).to(torch.bfloat16)
        assert torch.equal(fastpo.affine_scan(0.99, b), fastpo.affine_scan(torch.full((2, 9), 0.99), b))


class TestLongRows:
    """Rows that several threads share."""

    @pytest.fixture(params=[2, 3])
    def threads(self, request):
        torch.set_num_threads(request.param)
        yield request.param
        torch.set_num_threads(1)

    @both_ways
    @pytest.mark.parametrize("layout", ["padded", "padded masked", "packed masked"])
    def test_chunks(self, threads, layout, reverse):
        for dtype in (torch.float32, torch.float64):
            case = affine_case(layout, 1, 70_001, dtype)
            ours = compare_long(case, reverse)
            torch.set_num_threads(1)
            one = scan(case, reverse=reverse)
            torch.set_num_threads(threads)
            assert torch.allclose(ours, one, rtol=4 * torch.finfo(dtype).eps, atol=1e-12)

    @both_ways
    def test_slopes_of_one(self, threads, reverse):
        """What a chunk carries over is nothing where slopes decay; here it is all of it."""
        case = affine_case("padded masked", 1, 70_001, torch.float64)
        compare_long({**case, "a": torch.where(case["a"] < 0, -1.0, 1.0).double()}, reverse)

    def test_repeats(self, threads):
        case = affine_case("padded masked", 1, 100_003, torch.float32)
        assert torch.equal(scan(case), scan(case))

    @pytest.mark.parametrize("skip", [True, False])
    def test_advantages(self, threads, skip):
        """What a chunk must know of those before: the value behind it, also across a hole; whether all is padding."""
        for seed, tail in itertools.product(range(3), (0, 20_000, 50_000)):
            case = advantage_case("padded masked", 1, 70_000, torch.float64, seed)
            # a hole over the border of chunks, and padding over several
            case["mask"][0, 17_000:36_000] = False
            case["mask"][0, 70_000 - tail :] = False
            # the values behind are given, or those of the row
            for each in (case, {**case, "next_values": None}):
                ours = evaluate(each, "native", skip=skip)
                torch.set_num_threads(1)
                one = evaluate(each, "native", skip=skip)
                torch.set_num_threads(threads)
                for x, y in zip(ours, one, strict=True):
                    assert torch.allclose(x, y, rtol=1e-12, atol=1e-11)

    @pytest.mark.parametrize("padding", ["none", "right", "left", "hole"])
    def test_plain_gae(self, threads, padding):
        """fp32 without flags takes a path of its own through stretches and blocks without masked tokens, fp64 the
        general one."""
        names = ("next_values", "log_ratios", "terminated", "truncated", "cu_seqlens")
        for rows, tokens in ((1, 70_001), (4, 2500), (3, 9001)):
            case = advantage_case("padded masked", rows, tokens, torch.float32) | dict.fromkeys(names)
            mask = torch.ones(rows, tokens, dtype=torch.bool)
            cut = slice(*{"right": (-1300, None), "left": (0, 1300), "hole": (700, 1500), "none": (0, 0)}[padding])
            mask[:, cut] = False
            case["mask"] = None if padding == "none" else mask
            wide = {k: t.double() if t is not None and t.dtype == torch.float32 else t for k, t in case.items()}
            ours = evaluate(case, "native")
            torch.set_num_threads(1)
            general = evaluate(wide, "native")
            torch.set_num_threads(threads)
            for x, y in zip(ours, general, strict=True):
                # rounded once; what cancels leaves the error of double
                assert torch.allclose(x.double(), y, rtol=0.5001 * 2**-23, atol=1e-13)


def compare_long(case: Arguments, reverse: bool) -> Tensor:
    """Without the reference, which takes a step a token."""
    ours, truth = scan(case, reverse=reverse), exact_scan(**case, reverse=reverse)
    sizes = {k: case[k].abs() if k in ("a", "b", "initial") else case[k] for k in case}
    terms = exact_scan(**sizes, reverse=reverse)
    eps = torch.finfo(ours.dtype).eps
    error = np.abs(ours.double().numpy() - truth)
    # of n roundings in double, of which the terms carry each a part; they walk randomly
    assert (error <= eps * np.abs(truth) + 300 * 2.0**-53 * terms).all()
    return ours


class TestAutograd:
    @pytest.mark.once
    @both_ways
    @by_layout
    def test_gradcheck(self, layout, reverse):
        case = affine_case(layout, 3, 5, torch.float64)
        leaves = [case[k].requires_grad_() for k in ("a", "b", "initial")]

        def function(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
            return scan({**case, "a": a, "b": b, "initial": initial}, reverse=reverse)

        assert torch.autograd.gradcheck(function, leaves, rtol=1e-6, atol=1e-8)
        assert torch.autograd.gradgradcheck(function, leaves, rtol=1e-6, atol=1e-8)

    @both_ways
    @by_dtype
    @by_layout
    def test_gradients_as_in_torch(self, layout, dtype, reverse):
        """Against autograd through the fp64 recursion, at sizes that cross vectors and blocks."""
        for rows, tokens in ((3, 40), (2, 600)):
            case = affine_case(layout, rows, tokens, dtype, seed=3)
            names, upstream = ("a", "b", "initial"), random(*case["b"].shape, seed=9)
            grads = []
            for backend, wide in (("native", False), ("reference", False), ("reference", True)):
                given = {k: t.detach().double() if wide and k in names else t for k, t in case.items()}
                leaves = [to_device(given[k].detach()).requires_grad_() for k in names]
                with fastpo.use_backend(backend):
                    x = fastpo.affine_scan(
                        leaves[0],
                        leaves[1],
                        initial=leaves[2],
                        reverse=reverse,
                        mask=to_device(case["mask"]),
                        cu_seqlens=to_device(case["cu_seqlens"]),
                    )
                grads.append([g.cpu() for g in torch.autograd.grad(x, leaves, to_device(upstream).to(x.dtype))])
            for name, ours, same, truth in zip(names, *grads, strict=True):
                assert ours.dtype == dtype
                assert_within(ours, truth, same, name=name, terms=4 * truth.abs().max().item() if truth.numel() else 0)
                if case["mask"] is not None and name != "initial":
                    assert (ours[~case["mask"]] == 0).all()

    @pytest.mark.once
    def test_only_what_needs_a_gradient(self):
        case = affine_case("padded", 3, 8, torch.float32)
        every = [case[k].clone().requires_grad_() for k in ("a", "b", "initial")]
        want = torch.autograd.grad(scan(dict(zip(("a", "b", "initial"), every, strict=True))).sum(), every)
        for i, name in enumerate(("a", "b", "initial")):
            leaf = case[name].clone().requires_grad_()
            assert torch.equal(torch.autograd.grad(scan({**case, name: leaf}).sum(), leaf)[0], want[i])
        assert not scan(case).requires_grad

    @pytest.mark.once
    def test_second_backward_and_upstream_of_any_layout(self):
        case = affine_case("padded", 4, 6, torch.float32)
        leaf = case["b"].requires_grad_()
        x, up = scan(case), random(6, 4).t()
        first, second = (torch.autograd.grad(x, leaf, s * up, retain_graph=True)[0] for s in (1, -2))
        assert torch.equal(-2 * first, second)
        assert torch.equal(torch.autograd.grad(x, leaf, up.contiguous())[0], first)

    @pytest.mark.once
    def test_one_tensor_as_both(self):
        """x_t = b_t x_(t+1) + b_t: each gradient counts once, also under create_graph."""
        for create_graph in (False, True):
            found = []
            for backend in BACKENDS:
                leaf = (0.5 * random(2, 7)).double().requires_grad_()
                with fastpo.use_backend(backend):
                    x = fastpo.affine_scan(leaf, leaf)
                found += torch.autograd.grad(x.square().sum(), leaf, create_graph=create_graph)
            assert torch.allclose(*found, rtol=1e-13)

    @pytest.mark.once
    def test_create_graph_through_a_network(self):
        found = []
        for backend in BACKENDS:
            weight = torch.linspace(0.5, 1.5, 3, dtype=torch.float64).requires_grad_()
            inputs = random(2, 9, 3).double()
            a, b = (inputs * weight).sum(-1).sigmoid(), (inputs * weight).tanh().sum(-1)
            with fastpo.use_backend(backend):
                x = fastpo.affine_scan(a, b)
            (grad,) = torch.autograd.grad(x.sum(), weight, create_graph=True)
            found += torch.autograd.grad(grad.square().sum(), weight)
        assert torch.allclose(*found, rtol=1e-11) and found[0].abs().min() > 1e-6


@pytest.mark.once
class TestOps:
    def test_opcheck(self):
        for layout, reverse in itertools.product(LAYOUTS, (True, False)):
            case = affine_case(layout, 3, 6, torch.float32)
            layout_ = (case["mask"], case["cu_seqlens"])
            for keep, initial in itertools.product((True, False), (case["initial"], None)):
                arguments = (case["a"], case["b"], initial, *layout_, reverse, keep)
                torch.library.opcheck(torch.ops.fastpo.affine_scan.default, arguments)
            arguments = (case["b"], case["a"], case["b"], *layout_, reverse)
            torch.library.opcheck(torch.ops.fastpo.affine_scan_backward.default, arguments)
        case = advantage_case("padded masked", 3, 6, torch.float32)
        torch.library.opcheck(torch.ops.fastpo.advantages.default, op_arguments(case))
        bare = (case["rewards"], *[None] * 9, 0.9, 1.0, 1.0, 1.0, True)
        torch.library.opcheck(torch.ops.fastpo.advantages.default, bare)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiled_equals_eager(self, backend):
        torch._dynamo.reset()
        case = affine_case("padded masked", 4, 9, torch.float32)
        leaf = case["b"].requires_grad_()

        def function(a: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            x = fastpo.affine_scan(a, b, mask=mask)
            out = fastpo.advantages.gae(b, a, mask=mask, gamma=0.9)
            return x, out.advantages

        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        arguments = (case["a"], leaf, case["mask"])
        for one, two in zip(function(*arguments), compiled(*arguments), strict=True):
            assert torch.equal(one, two)
        grads = [torch.autograd.grad(f(*arguments)[0].square().sum(), leaf)[0] for f in (function, compiled)]
        assert torch.equal(*grads) and counter.frame_count == 1

    def test_inputs_are_not_touched(self):
        case = affine_case("packed masked", 4, 9, torch.float32)
        before = {k: None if t is None else t.clone() for k, t in case.items()}
        scan(case)
        assert all(t is None or torch.equal(t, case[k]) for k, t in before.items())


@pytest.mark.once
class TestBadInput:
    a, b = torch.ones(2, 3), torch.ones(2, 3)

    @by_backend
    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"b": [1.0]}, TypeError, r"b must be a torch.Tensor, got list"),
            ({"b": torch.ones(2, 3, dtype=torch.int64)}, TypeError, r"b must have dtype float32, .*, got int64"),
            ({"b": torch.ones(3)}, ValueError, r"b has shape \(3,\), expected \(B, T\), or \(N,\) with cu_seqlens"),
            ({"a": torch.ones(2, 4)}, ValueError, r"a has shape \(2, 4\), expected \(2, 3\): it must match b"),
            ({"a": "x"}, TypeError, r"a must be a number, got str"),
            ({"initial": torch.ones(3)}, ValueError, r"initial has shape \(3,\), expected \(2,\): one per row of b"),
            ({"mask": torch.ones(2, 3)}, TypeError, r"mask must have dtype bool, got float32"),
            ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask has shape \(3,\), expected \(2, 3\)"),
            ({"cu_seqlens": torch.tensor([0, 3])}, TypeError, r"cu_seqlens must have dtype int32, got int64"),
            (
                {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)},
                ValueError,
                r"b has shape \(2, 3\), expected \(N,\) with cu_seqlens",
            ),
        ],
    )
    def test_arguments(self, backend, arguments, error, text):
        with fastpo.use_backend(backend), pytest.raises(error, match=text):
            fastpo.affine_scan(**{"a": self.a, "b": self.b} | arguments)

    @by_backend
    @pytest.mark.parametrize("bad", [[0, 4, 2], [1, 3], [0, 9], [0, -1, 3]])
    def test_boundaries(self, backend, bad):
        boundaries, one = torch.tensor(bad, dtype=torch.int32), torch.ones(5)
        text = "cu_seqlens must rise from 0 to at most 5, the number of tokens"
        with fastpo.use_backend(backend):
            with pytest.raises(ValueError, match=text):
                fastpo.affine_scan(one, one, cu_seqlens=boundaries)
            with pytest.raises(ValueError, match=text):
                fastpo.advantages.gae(one, one, cu_seqlens=boundaries)

    def test_op_refuses_what_the_public_function_never_passes(self):
        with pytest.raises(RuntimeError, match="wrong size"):
            torch.ops.fastpo.affine_scan(self.a, torch.ones(2, 2), None, None, None, True, True)
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.fastpo.affine_scan(self.a[0], self.a[0], None, None, None, True, True)


def advantage_case(layout: str, rows: int, tokens: int, dtype: torch.dtype, seed: int = 0) -> Arguments:
    """Every argument of the advantages."""
    shape, mask, boundaries = layout_of(layout, rows, tokens, seed)
    names = ("rewards", "values", "next_values", "log_ratios")
    floats = {name: random(*shape, seed=seed + 5 * i + 1).to(dtype) for i, name in enumerate(names)}
    return {
        **floats,
        "terminated": coins(*shape, p=0.02, seed=seed + 30),
        "truncated": coins(*shape, p=0.02, seed=seed + 31),
        "mask": mask,
        "cu_seqlens": boundaries,
        "bootstrap": random(rows, seed=seed + 32).to(dtype),
        "repeat": coins(rows, p=0.5, seed=seed + 33),
    }


HYPER = {"gamma": 0.98, "lam": 0.9, "rho_bar": 1.2, "c_bar": 0.9}


def op_arguments(case: Arguments) -> tuple:
    return (*case.values(), *HYPER.values(), True)


def evaluate(case: Arguments, backend: str, **options) -> tuple[Tensor, Tensor]:
    with fastpo.use_backend(backend):
        given = {k: to_device(v) for k, v in case.items()}
        found = advantages(given.pop("rewards"), given.pop("values"), **given, **HYPER | options)
    return found[0].cpu(), found[1].cpu()


def exact_advantages(
    case: Arguments, skip: bool = True, sizes: bool = False, **options
) -> tuple[np.ndarray, np.ndarray]:
    """The definition: for each token the sum over the steps behind it, term by term. `sizes` adds magnitudes."""
    hyper = HYPER | options
    like = case["rewards"]
    r, v, nv, lr = (extended(case.get(k), like.shape) for k in ("rewards", "values", "next_values", "log_ratios"))
    counts = flags(case["mask"], like.shape, True)
    term, trunc = (flags(case[k], like.shape, False) for k in ("terminated", "truncated"))
    out = np.zeros((2, like.numel()), np.longdouble)
    for row, span in enumerate(spans(tuple(like.shape), case["cu_seqlens"])):
        places = [t for t in range(span.start, span.stop) if counts[t]]
        if not skip and places:
            places = [t for t in range(span.start, span.stop) if t <= places[-1]]
        bootstrap = 0 if case["bootstrap"] is None else np.longdouble(case["bootstrap"][row].double().item())
        x = np.longdouble(0) if case["values"] is not None else bootstrap
        for i in reversed(range(len(places))):
            t = places[i]
            on = counts[t]
            if case["next_values"] is not None:
                ahead = nv[t] if on else 0
            elif case["values"] is None:
                ahead = 0
            elif i + 1 < len(places):
                ahead = v[places[i + 1]] if counts[places[i + 1]] else 0
            else:
                ahead = v[t] if case["repeat"] is not None and case["repeat"][row] else bootstrap
            reward, value = (r[t], v[t]) if on else (0, 0)
            ends, stops = on and term[t], on and (term[t] or trunc[t])
            ratio = np.exp(lr[t]) if on else np.longdouble(1)
            rho, c = min(ratio, hyper["rho_bar"]), min(ratio, hyper["c_bar"])
            if case["log_ratios"] is None:
                rho = c = np.longdouble(1)
            carried = 0 if stops else np.longdouble(hyper["gamma"])
            gained = 0 if ends else np.longdouble(hyper["gamma"]) * ahead
            if sizes:
                delta = rho * (abs(reward) + abs(gained) + abs(value))
            else:
                delta = rho * (reward + gained - value)
            before, x = x, delta + carried * np.longdouble(hyper["lam"]) * c * x
            if on:
                out[0, t] = x if case["log_ratios"] is None else delta + rho * carried * before
                out[1, t] = x + (abs(value) if sizes else value)
    return out[0].reshape(like.shape), out[1].reshape(like.shape)


def compare_advantages(case: Arguments, skip: bool = True, **options) -> None:
    ours, same = (evaluate(case, backend, skip=skip, **options) for backend in BACKENDS)
    truth = exact_advantages(case, skip, **options)
    sizes = exact_advantages(
        {**case, "bootstrap": None if case["bootstrap"] is None else case["bootstrap"].abs()},
        skip,
        sizes=True,
        **options,
    )
    for name, x, y, exact, terms in zip(("advantages", "returns"), ours, same, truth, sizes, strict=True):
        if x.dtype == torch.float32:
            error = np.abs(x.double().numpy() - exact)
            assert (error <= 0.5001 * 2**-23 * np.abs(exact) + 2.0**-45 * terms).all(), name
        assert_within(x, exact, y, name=name, terms=4 * terms.astype(np.float64))


# which arguments are absent
VARIANTS = {
    "everything": (),
    "gae": ("next_values", "log_ratios", "terminated", "truncated", "repeat"),
    "gae with next values": ("log_ratios", "bootstrap", "repeat"),
    "egae": ("next_values", "log_ratios", "terminated", "truncated", "bootstrap"),
    "vtrace": ("next_values", "truncated", "repeat"),
    "returns": ("values", "next_values", "log_ratios", "truncated", "repeat"),
    "returns of whole rows": ("values", "next_values", "log_ratios", "terminated", "truncated", "repeat", "bootstrap"),
}


@by_dtype
@by_layout
class TestAdvantages:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_variants(self, dtype, layout, variant):
        for i, (rows, tokens) in enumerate([(1, 0), (0, 5), (1, 1), (3, 7), (4, 33), (2, 515)]):
            case = advantage_case(layout, rows, tokens, dtype, seed=100 * i)
            case |= dict.fromkeys(VARIANTS[variant])
            for skip in (True, False):
                compare_advantages(case, skip)
            if tokens < 100:
                compare_advantages(case, lam=0.0)
                compare_advantages(case, gamma=1.0, lam=1.0, rho_bar=math.inf, c_bar=math.inf)

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_masked_tokens_have_no_influence(self, dtype, layout, poison):
        if "masked" not in layout:
            pytest.skip("nothing is masked")
        case = advantage_case(layout, 6, 600, dtype)
        dirty = dict(case)
        for name in ("rewards", "values", "next_values", "log_ratios"):
            dirty[name] = case[name].masked_fill(~case["mask"], poison)
        for name in ("terminated", "truncated"):
            dirty[name] = case[name] | ~case["mask"]
        for backend, skip in itertools.product(BACKENDS, (True, False)):
            for x, y in zip(evaluate(dirty, backend, skip=skip), evaluate(case, backend, skip=skip), strict=True):
                assert torch.equal(x, y) and (x[~case["mask"]] == 0).all()

    def test_other_episodes_have_no_influence(self, dtype, layout):
        """NaN behind the end of an episode stays there."""
        case = advantage_case(layout, 3, 300, dtype) | dict.fromkeys(("truncated", "next_values"))
        flat = case["terminated"].view(-1)
        flat.zero_()
        end = next(t for t in reversed(range(len(flat) - 40)) if case["mask"] is None or case["mask"].view(-1)[t])
        flat[end] = True
        clean = [evaluate(case, backend) for backend in BACKENDS]
        for name in ("rewards", "values", "log_ratios"):
            case[name].view(-1)[end + 1 :] = math.nan
        for backend, want in zip(BACKENDS, clean, strict=True):
            for x, y in zip(evaluate(case, backend), want, strict=True):
                assert torch.equal(x.view(-1)[: end + 1], y.view(-1)[: end + 1])


numbers = st.integers(-64, 64).map(lambda k: k / 8)


@pytest.mark.once
class TestProperties:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=40), st.booleans())
    def test_dropping_masked_tokens(self, tokens, reverse):
        """A masked row is the row without its masked tokens, bit for bit: sums of these numbers are exact."""
        b, initial, mask = (
            torch.tensor([t[0] for t in tokens]),
            torch.tensor([0.5]),
            torch.tensor([t[2] for t in tokens]),
        )
        whole = fastpo.affine_scan(1.0, b[None], initial=initial, mask=mask[None], reverse=reverse)[0]
        short = fastpo.affine_scan(1.0, b[mask][None], initial=initial, reverse=reverse)[0]
        assert torch.equal(whole[mask], short)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.lists(st.lists(numbers, max_size=30), min_size=1, max_size=6))
    def test_packed_is_padded(self, rows):
        lengths = torch.tensor([len(r) for r in rows])
        boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        packed = torch.tensor([x for r in rows for x in r])
        mask = torch.arange(max(int(lengths.max()), 1)) < lengths[:, None]
        padded = torch.full(mask.shape, math.nan)
        padded[mask] = packed
        found = fastpo.advantages.discounted_returns(packed, gamma=0.5, cu_seqlens=boundaries)
        want = fastpo.advantages.discounted_returns(padded, gamma=0.5, mask=mask)
        assert torch.allclose(found, want[mask], rtol=2e-7, atol=0)

    def test_turning_the_row(self):
        case = affine_case("padded masked", 4, 77, torch.float32)
        turned = {k: t.flip(1) if t is not None and t.dim() == 2 else t for k, t in case.items()}
        assert torch.equal(scan(case), scan(turned, reverse=False).flip(1))
