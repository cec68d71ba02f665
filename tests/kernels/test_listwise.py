"""listwise against its definitions in fp64: every objective, layout and dtype, lists from none to 1,024 items."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.kernels import _native
from fastpo.reference.listwise import OTHERS, PAIRS, list_objective, list_objectives
from tests.device import to_device
from tests.memory import peak_allocated
from tests.tolerance import assert_within

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["padded", "masked", "packed", "packed masked"]
BACKENDS = ["native", "reference"]
# an objective with its options
CASES: dict[str, tuple[str, dict[str, Any]]] = {}
for _row in list_objectives():
    for _loss in _row.kinds:
        CASES[f"{_row.name} {_loss}".strip()] = _row.name, {"loss": _loss} if _loss else {}
CASES |= {
    "lipo_pair logistic mean": ("lipo_pair", {"average_pairs": True}),
    "lipo_pair hinge mean": ("lipo_pair", {"loss": "hinge", "average_pairs": True}),
    "lipo_lambda log2": ("lipo_lambda", {"discount": "log2", "average_pairs": True}),
    "first_ranknet sum": ("first_ranknet", {"average_pairs": False}),
}
# lists and items; whole vectors, parts of one, several of them
SHAPES = [(0, 3), (3, 0), (2, 1), (5, 2), (4, 3), (3, 16), (3, 17), (2, 31), (2, 64), (2, 130)]

by_case = pytest.mark.parametrize("case", CASES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that share busy cores wait for each other; test_threads takes two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(
    case: str, layout: str, lists: int, items: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0
) -> dict[str, Any]:
    """The arguments of a case: scores that are exact in every dtype, so that ranks are those of fp64, and ties."""
    name, options = CASES[case]
    row, generator = list_objective(name), torch.Generator().manual_seed(seed)
    shape = (lists, items) if layout in ("padded", "masked") else (lists * items + 2,)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    given: dict[str, Any] = {}
    for tensor in row.tensors:
        if tensor == "labels":
            given[tensor] = (integers(0, 4) / 4).to(dtype)
        elif tensor == "ranks":
            given[tensor] = integers(1, max(1, items))
        elif tensor == "lengths":
            given[tensor] = integers(1, 9)
        elif tensor == "rewards":
            given[tensor] = (integers(-12, 12) / 8).to(dtype)
        else:
            given[tensor] = (integers(-64, 64) / 32 * spread).to(dtype)
    mask = None
    if "masked" in layout:
        mask = torch.rand(shape, generator=generator) < 0.7
        for tensor in given.values():
            if tensor.dtype.is_floating_point:
                bad = torch.tensor([math.nan, math.inf, -math.inf, 7.0], dtype=tensor.dtype)
                tensor.copy_(torch.where(mask, tensor, bad[integers(0, 3)]))
    cu_seqlens = None
    if layout.startswith("packed"):
        cuts = torch.sort(torch.randint(0, lists * items + 1, (max(lists - 1, 0),), generator=generator))[0]
        ends = torch.full((int(lists > 0),), lists * items)
        cu_seqlens = torch.cat([torch.zeros(1), cuts, ends]).to(torch.int32)
    required = {n: 0.3 for n, default in row.defaults.items() if default is None}
    return {**given, "mask": mask, "cu_seqlens": cu_seqlens, **required, **options}


def evaluate(case: str, given: dict[str, Any], backend: str = "native", **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, rewards, and the gradient for an upstream of one number per loss."""
    name, _ = CASES[case]
    first = list_objective(name).names[0]
    leaf = to_device(given[first].detach()).clone(memory_format=torch.preserve_format).requires_grad_()
    there = {k: to_device(v) for k, v in {**given, **more}.items()}
    with fastpo.use_backend(backend):  # type: ignore[arg-type]
        out = getattr(losses, name)(**{**there, first: leaf})
        upstream = torch.linspace(0.5, 1.5, max(1, out.loss.numel()), dtype=out.loss.dtype)[: out.loss.numel()]
        (grad,) = torch.autograd.grad(out.loss, leaf, upstream.reshape(out.loss.shape).to(leaf.device))
    return out.loss.detach().cpu(), out.rewards.cpu(), grad.cpu()


def widened(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.dtype.is_floating_point else v for k, v in given.items()}


def compare(case: str, given: dict[str, Any], **more: Any) -> None:
    """Our error is that of same-dtype torch and 8 eps of the terms: a score, its exponential and logarithm, and a
    weight are about eight roundings."""
    ours = evaluate(case, given, **more)
    first = list_objective(CASES[case][0]).names[0]
    dtype = given[first].dtype
    accumulator = torch.promote_types(dtype, torch.float32)
    exact = evaluate(case, widened(given, torch.float64), "reference", **more)
    plain = evaluate(case, widened(given, accumulator), "reference", **more)
    assert ours[0].dtype == ours[1].dtype == accumulator and ours[2].dtype == dtype
    counts = torch.ones_like(given[first], dtype=torch.bool) if given["mask"] is None else given["mask"]

    def largest(of: Tensor) -> float:
        found = of.double().masked_fill(~counts | ~of.double().isfinite(), 0).abs()
        return found.max().item() if found.numel() else 0.0

    # products of scores and targets at most, and as many terms as items
    terms = (1 + largest(exact[1])) * (1 + max(largest(given[n]) for n in list_objective(CASES[case][0]).tensors))
    items = 1 + given[first].numel() / max(1, len(ours[0]) if ours[0].dim() else 1)
    for name, mine, truth, theirs in zip(("loss", "rewards", "gradient"), ours, exact, plain, strict=True):
        eps = dtype if name == "gradient" else accumulator
        whole = truth.masked_fill(~truth.isfinite(), 0).abs().max().item() if truth.numel() else 0.0
        # a gradient has its own dtype's rounding, and the terms that of the accumulator
        size = 4 * max(terms * items, whole) * torch.finfo(accumulator).eps / torch.finfo(eps).eps
        assert_within(mine, truth, theirs.to(mine.dtype), eps, f"{case} {name}", terms=size)


class TestValues:
    @by_case
    @by_layout
    def test_sizes(self, case, layout):
        for i, (lists, items) in enumerate(SHAPES):
            dtype = DTYPES[i % 4]
            compare(case, make(case, layout, lists, items, dtype, seed=i), reduction="none")

    @by_case
    @by_dtype
    def test_dtypes(self, case, dtype):
        for i, layout in enumerate(LAYOUTS):
            compare(case, make(case, layout, 3, 19, dtype, seed=10 + i), reduction=("mean", "sum", "none")[i % 3])

    @by_case
    def test_longest(self, case):
        compare(case, make(case, "padded", 1, 1024, torch.float32, seed=3))
        compare(case, make(case, "masked", 1, 1024, torch.float64, seed=4))

    @by_case
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_far_scores(self, case, dtype):
        """No exponential overflows, and no sum of those that vanish is taken for 0."""
        for spread in (500.0, 20_000.0):
            given = make(case, "masked", 4, 21, dtype, seed=5, spread=spread)
            assert torch.isfinite(evaluate(case, given)[0])
            compare(case, given, reduction="none")

    def test_far_ranking(self):
        """The worst first: every term of ListMLE but the last is the distance to the best."""
        policy = torch.tensor([[0.0, 1000.0, 3000.0]])
        out = losses.list_mle(policy.requires_grad_(), None, torch.tensor([[3.0, 2.0, 1.0]]), beta=1.0)
        assert out.loss.item() == 5000.0
        assert torch.autograd.grad(out.loss, policy)[0].tolist() == [[-1.0, -1.0, 2.0]]

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_far_and_near_scores(self, backend):
        """Beside the largest stand others nearly as large, whose sums count as the distances to the far ones do."""
        policy = torch.tensor([[0.0, 0.3, 999.6, 1000.0, 3000.0, 2999.5, 2999.2]], dtype=torch.float64)
        log_sums = policy.requires_grad_().flip(1).logcumsumexp(1).flip(1)
        (slopes,) = torch.autograd.grad((log_sums - policy)[:, :-1].sum(), policy)
        with fastpo.use_backend(backend):
            out = losses.list_mle(policy, None, torch.arange(7.0, 0.0, -1.0)[None], beta=1.0)
        assert out.loss.item() == pytest.approx((log_sums - policy)[:, :-1].sum().item(), rel=1e-14)
        # log-sums of 3,000 are rounded, both here and there, in seven exponents
        atol = 2 * 7 * 3000 * 2.0**-52
        assert torch.allclose(torch.autograd.grad(out.loss, policy)[0], slopes, rtol=0, atol=atol)

    @by_case
    def test_packed_is_padded(self, case):
        given = make(case, "padded", 5, 16, torch.float32)
        flat = {k: v.flatten() if isinstance(v, Tensor) else v for k, v in given.items()}
        flat["cu_seqlens"] = torch.arange(0, 81, 16, dtype=torch.int32)
        for one, other in zip(evaluate(case, given), evaluate(case, flat), strict=True):
            assert torch.equal(one.flatten(), other.flatten())

    @by_case
    def test_padding_changes_nothing(self, case):
        given = make(case, "padded", 3, 13, torch.float32)
        wide = {
            k: torch.nn.functional.pad(v, (1, 4), value=3) if isinstance(v, Tensor) else v for k, v in given.items()
        }
        wide["mask"] = torch.zeros(3, 18, dtype=torch.bool)
        wide["mask"][:, 1:14] = True
        for one, other in zip(evaluate(case, given), evaluate(case, wide), strict=True):
            if other.dim():
                assert not other[~wide["mask"]].any()
                other = other[:, 1:14]
            assert torch.equal(one, other)

    @by_case
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_empty_and_lost_lists(self, case, backend):
        """A list of none or one is as the catalogue says; what is no number loses its own list and no other."""
        first = list_objective(CASES[case][0]).names[0]
        given = make(case, "padded", 6, 4, torch.float32)
        given["mask"] = torch.ones(6, 4, dtype=torch.bool)
        given["mask"][0] = False
        given["mask"][1, 1:] = False
        given[first][2, 1], given[first][3, 2], given[first][4, 0] = math.nan, math.inf, -math.inf
        loss, rewards, grad = evaluate(case, given, backend, reduction="none")
        assert loss[0] == 0 and not grad[0].any() and not rewards[0].any()
        if not case.startswith(("lipo_point", "nca")):
            assert loss[1] == 0 and not grad[1].any()
        assert loss[2:5].isnan().all() and grad[2:5].isnan().all()
        assert loss[5].isfinite() and grad[5].isfinite().all()
        # and in a target, where it is not refused
        given = make(case, "padded", 2, 3, torch.float32)
        name = list_objective(CASES[case][0]).names[-1]
        given[name] = given[name].float()
        given[name][0, 1] = math.nan
        loss, _, grad = evaluate(case, given, backend, reduction="none")
        assert loss.isnan().tolist() == [True, False] and grad.isnan().all(1).tolist() == [True, False]

    @by_case
    def test_strides(self, case):
        given = make(case, "padded", 6, 8, torch.float32)
        strided = {k: v.T.contiguous().T if isinstance(v, Tensor) else v for k, v in given.items()}
        for one, other in zip(evaluate(case, given), evaluate(case, strided), strict=True):
            assert torch.equal(one, other)

    @by_case
    def test_threads(self, case):
        """The same bits with one thread and with two."""
        given = make(case, "masked", 300, 40, torch.float32)
        one = evaluate(case, given)
        torch.set_num_threads(2)
        two = evaluate(case, given)
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    def test_memory(self):
        """No matrix of pairs, which would be 32 MB."""
        policy, labels = torch.randn(8, 1024, requires_grad=True), torch.rand(8, 1024)

        def run() -> Tensor:
            return torch.autograd.grad(losses.lipo_lambda(policy, None, labels).loss, policy)[0]

        assert peak_allocated(run) < 8 * policy.numel() * 4

    @by_case
    def test_micro_batches(self, case):
        given = make(case, "padded", 6, 5, torch.float64)
        loss, _, grad = evaluate(case, given)
        halves = [{k: v[i : i + 3] if isinstance(v, Tensor) else v for k, v in given.items()} for i in (0, 3)]
        for num_items in (6, torch.tensor(6)):
            parts = [evaluate(case, half, num_items=num_items) for half in halves]
            assert torch.allclose(parts[0][0] + parts[1][0], loss, rtol=1e-13)
            assert torch.allclose(torch.cat([part[2] for part in parts]), grad, rtol=1e-12, atol=1e-16)


class TestAutograd:
    @by_case
    def test_gradcheck(self, case):
        """Of the slopes and, through the reference, of their slopes; at random scores, away from kinks and ties."""
        row = list_objective(CASES[case][0])
        first = row.names[0]
        for layout in ("masked", "packed"):
            given = make(case, layout, 2, 4, torch.float64, seed=2)
            noise = torch.rand(given[first].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            given[first] = given[first].nan_to_num(5.0, 5.0, 5.0) + noise
            given = {k: v.nan_to_num(1.0, 1.0, 1.0) if isinstance(v, Tensor) and v.is_floating_point() else v
                     for k, v in given.items()}  # fmt: skip

            def loss(leaf: Tensor, given: dict[str, Any] = given) -> Tensor:
                return getattr(losses, row.name)(**{**given, first: leaf}, reduction="none").loss

            leaf = given[first].clone().requires_grad_()
            assert torch.autograd.gradcheck(loss, leaf)
            assert torch.autograd.gradgradcheck(loss, leaf)

    @by_case
    def test_second_backward(self, case):
        given = make(case, "padded", 3, 5, torch.float32)
        first = list_objective(CASES[case][0]).names[0]
        leaf = given[first].requires_grad_()
        loss = getattr(losses, CASES[case][0])(**given).loss
        once, twice = (torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, twice) and torch.equal(once, torch.autograd.grad(loss, leaf, torch.tensor(3.0))[0])

    @by_case
    @pytest.mark.once
    def test_compiled(self, case):
        name, _ = CASES[case]
        first = list_objective(name).names[0]
        given = make(case, "masked", 3, 5, torch.float32)

        def step(leaf: Tensor) -> tuple[Tensor, Tensor]:
            out = getattr(losses, name)(**{**given, first: leaf})
            return out.loss, out.rewards

        torch._dynamo.reset()
        leaf = given[first].requires_grad_()
        eager, compiled = step(leaf), torch.compile(step, fullgraph=True, backend="aot_eager")(leaf)
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
        assert torch.equal(*(torch.autograd.grad(out[0], leaf)[0] for out in (eager, compiled)))


class TestOps:
    @pytest.mark.once
    def test_opcheck(self):
        policy, other = torch.randn(3, 5, requires_grad=False), torch.rand(3, 5)
        targets, mask = torch.rand(3, 5), torch.rand(3, 5) < 0.8
        boundaries = torch.tensor([0, 2, 7], dtype=torch.int32)
        numbers = [0.5, 2.0, 1.0]
        for reduce, denominator in ((True, None), (False, 1.0)):
            padded = (6, policy, other, targets, mask, None, numbers, False, reduce, denominator)
            packed = (4, policy.flatten(), None, targets.flatten(), None, boundaries, numbers, True, reduce, 3.0)
            for arguments in (padded, packed):
                torch.library.opcheck(torch.ops.fastpo.listwise.default, arguments)

    @pytest.mark.skipif(not _native.CPU.loaded, reason="no compiled library")
    def test_kinds(self):
        """Compiled graphs keep a kind's number: the order may grow at its end and nowhere else."""
        assert list(_native.CPU.list_kinds)[:4] == ["point_mse", "point_sigmoid", "pair_logistic", "pair_hinge"]
        assert set(_native.CPU.list_kinds) == {*PAIRS, *OTHERS}
        assert {kind for row in list_objectives() for kind in row.kinds.values()} == {*PAIRS, *OTHERS}


class TestArguments:
    @pytest.mark.parametrize("row", list(list_objectives()), ids=lambda row: row.name)
    def test_public(self, row):
        function = getattr(losses, row.name)
        parameters = inspect.signature(function).parameters
        assert all(f"    {name}: " in function.__doc__ or f", {name}" in function.__doc__ for name in parameters)
        for name, default in row.defaults.items():
            assert parameters[name].default == (inspect.Parameter.empty if default is None else default)
            assert default is None or default in row.domains[name]
            assert f"{name}: in {row.domains[name]}." in function.__doc__
        for text in (row.paper, row.equation, "Args:", "Returns:", "Raises:"):
            assert text in function.__doc__
        assert function.__name__ == row.name and function.__module__ == "fastpo.losses"

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"policy": [1.0]}, TypeError, "policy must be a torch.Tensor, got list"),
            ({"policy": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "policy must have dtype float32"),
            ({"policy": torch.ones(6)}, ValueError, "policy has shape (6,), expected (B, K), or (N,) with cu_seqlens"),
            ({"policy": torch.ones(1, 1025)}, ValueError, "policy has lists of 1025 items; at most 1024"),
            ({"reference": torch.ones(2, 4)}, ValueError, "reference has shape (2, 4), expected (2, 3)"),
            ({"reference": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "reference must have dtype"),
            ({"labels": None}, TypeError, "labels must be a torch.Tensor"),
            ({"labels": torch.ones(3, 2)}, ValueError, "labels has shape (3, 2), expected (2, 3)"),
            ({"labels": torch.full((2, 3), 1.5)}, ValueError, "labels must be in [0, 1] for lipo_lambda, got 1.5"),
            ({"labels": -torch.ones(2, 3)}, ValueError, "labels must be in [0, 1] for lipo_lambda, got -1"),
            ({"labels": torch.ones(2, 3, device="meta")}, ValueError, "labels is on meta, policy on cpu"),
            ({"mask": torch.ones(2, 3)}, TypeError, "mask must have dtype bool"),
            ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "mask has shape (2, 4)"),
            (
                {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)},
                ValueError,
                "policy has shape (2, 3), expected (N,",
            ),
            ({"cu_seqlens": torch.tensor([0, 2])}, TypeError, "cu_seqlens must have dtype int32"),
            ({"beta": 0.0}, ValueError, "beta must be in (0, inf) for lipo_lambda, got 0"),
            ({"beta": True}, TypeError, "beta must be a number, got bool"),
            ({"beta": torch.tensor(1.0)}, TypeError, "beta must be a number, got Tensor"),
            ({"average_pairs": 1}, TypeError, "average_pairs must be a bool, got int"),
            ({"discount": "ln"}, ValueError, "discount must be one of 'log', 'log2' for lipo_lambda, got 'ln'"),
            ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none"),
            ({"num_items": 0}, ValueError, "num_items must be positive and finite, got 0"),
            ({"num_items": 2, "reduction": "sum"}, ValueError, "num_items is the denominator of reduction='mean'"),
        ],
    )
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_bad(self, change, error, message, backend):
        given = {"policy": torch.ones(2, 3), "reference": torch.ones(2, 3), "labels": torch.ones(2, 3), **change}
        with fastpo.use_backend(backend), pytest.raises(error, match=re.escape(message)):
            losses.lipo_lambda(**given)

    def test_what_equals_a_number_is_none(self):
        """A call like an earlier one is not checked again, but True is not like 1.0."""
        one = torch.ones(1, 2)
        losses.lipo_pair(one, None, one, beta=1.0, average_pairs=False)
        with pytest.raises(TypeError, match="beta must be a number, got bool"):
            losses.lipo_pair(one, None, one, beta=True, average_pairs=False)
        with pytest.raises(TypeError, match="average_pairs must be a bool, got int"):
            losses.lipo_pair(one, None, one, beta=1.0, average_pairs=0)

    def test_integer_targets(self):
        """Ranks and rewards may be integers, whose order fp64 keeps."""
        policy = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        far = torch.tensor([[2**40, 2**40 + 1]])
        assert losses.list_mle(policy, None, far).loss == losses.list_mle(policy, None, torch.tensor([[0, 1]])).loss

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_bad_lists(self, backend):
        flat = torch.ones(1100)
        for bounds, message in (
            ([0, 9, 5], "cu_seqlens must rise from 0 to at most 1100"),
            ([1, 9], "cu_seqlens must rise"),
            ([0, 1101], "cu_seqlens must rise"),
            ([0, 1030], "cu_seqlens has a list of 1030 items; at most 1024"),
        ):
            with fastpo.use_backend(backend), pytest.raises(ValueError, match=message):
                losses.list_mle(flat, None, flat, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        with pytest.raises(ValueError, match="mean' of an empty batch is undefined"):
            losses.list_mle(torch.ones(0, 3), None, torch.ones(0, 3))
        with pytest.raises(ValueError, match=r"ranks must be in \[1, inf\) for first_ranknet, got 0"):
            losses.first_ranknet(torch.ones(1, 2), torch.tensor([[0, 1]]))
        with pytest.raises(ValueError, match="loss must be one of 'mse', 'sigmoid' for lipo_point, got 'bce'"):
            losses.lipo_point(torch.ones(1, 2), None, torch.ones(1, 2), loss="bce")
        with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'beta'"):
            losses.brain(*[torch.ones(1, 2)] * 4)

    def test_masked_targets_are_not_looked_at(self):
        labels, mask = torch.tensor([[0.5, 9.0]]), torch.tensor([[True, False]])
        assert losses.lipo_softmax(torch.ones(1, 2), None, labels, mask=mask).loss == 0
        packed = torch.tensor([0.5, 9.0])
        bounds = torch.tensor([0, 1], dtype=torch.int32)
        assert losses.lipo_lambda(torch.ones(2), None, packed, cu_seqlens=bounds).loss == 0


class TestRankGen:
    def test_is_its_definition(self):
        generator = torch.Generator().manual_seed(0)
        p, c, g = (torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
        products = p @ c.T
        for generated, negatives, columns in (
            (None, "batch", products),
            (g, "batch", torch.cat([products, p @ g.T], 1)),
            (g, "own", torch.cat([products, (p * g).sum(1)[:, None]], 1)),
        ):
            want = -(products.diagonal() - columns.exp().sum(1).log())
            out = losses.rank_gen(p, c, generated, negatives=negatives, reduction="none")
            assert torch.allclose(out.loss, want, rtol=1e-12) and torch.equal(out.rewards, columns)
            leaves = [t for t in (p, c, generated) if t is not None]
            for ours, theirs in zip(
                torch.autograd.grad(out.loss.sum(), leaves, retain_graph=True),
                torch.autograd.grad(want.sum(), leaves, retain_graph=True),
                strict=True,
            ):
                assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-13)

    def test_edges(self):
        one = torch.full((1, 3), 50.0)
        assert losses.rank_gen(one, one).loss == 0
        # products of 7,500 in bf16
        many = torch.eye(3).bfloat16() * 87
        assert losses.rank_gen(many, many).loss == 0
        with pytest.raises(ValueError, match="negatives must be one of 'batch', 'own', got 'all'"):
            losses.rank_gen(one, one, negatives="all")
        with pytest.raises(ValueError, match=r"suffixes has shape \(2, 3\), expected \(1, 3\)"):
            losses.rank_gen(one, torch.ones(2, 3))
