"""segment_stats and group_normalize against their definitions, group by group, in 80-bit floats."""

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
from fastpo.kernels.segment_stats import normalized
from fastpo.reference import segments as reference
from fastpo.reference.segments import MODES
from tests.device import to_device
from tests.tolerance import assert_within

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["native", "reference"]
LAYOUTS = ["rows", "rows masked", "packed", "packed masked", "ids", "ids masked", "ids in order", "far ids"]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_backend = pytest.mark.parametrize("backend", BACKENDS)

Arguments = dict[str, Tensor | None]
# segments and members on average
SHAPES = [(0, 3), (1, 0), (1, 1), (3, 2), (7, 12), (40, 5), (2, 63), (3, 300), (2, 1030), (1, 4097)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that share busy cores wait for each other; TestDeterminism takes two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(layout: str, groups: int, members: int, dtype: torch.dtype, seed: int = 0) -> Arguments:
    """Random values with ties, constant groups, groups of one, empty groups and NaNs."""
    generator = torch.Generator().manual_seed(seed)
    shape: tuple[int, ...] = (groups, members)
    if not layout.startswith("rows"):
        shape = (groups * members + 2 * layout.startswith("packed"),)
    values = torch.randn(shape, generator=generator)
    # few values, as of a verifier, in some groups
    values = torch.where(torch.rand(shape, generator=generator) < 0.4, (values > 0) * 0.7, values)
    values = torch.where(torch.rand(shape, generator=generator) < 0.02, torch.nan, values)
    ids = boundaries = None
    at = torch.arange(groups)[:, None].expand(groups, members).reshape(-1)
    if layout.startswith("packed"):
        cuts = torch.sort(torch.randint(0, groups * members + 1, (max(groups - 1, 0),), generator=generator))[0]
        edges = [torch.zeros(1), cuts, torch.full((int(groups > 0),), groups * members)]
        boundaries = torch.cat(edges).to(torch.int32)
    elif "ids" in layout:
        at = torch.randint(0, max(groups, 1), shape, generator=generator)
        at = torch.sort(at)[0] if layout == "ids in order" else at
        ids = at * (10**15 if layout == "far ids" else 1) - (10**17 if layout == "far ids" else 0)
        if seed % 2 and layout != "far ids":
            ids = ids.to(torch.int32)
    if not layout.startswith("packed") and groups > 2 and members:
        # a constant group, of a number that is no binary fraction
        values.view(-1)[at == 1] = 0.7
    mask = torch.rand(shape, generator=generator) < 0.8 if "masked" in layout else None
    return {"values": values.to(dtype), "group_ids": ids, "mask": mask, "cu_seqlens": boundaries}


def groups_of(case: Arguments) -> list[np.ndarray]:
    """Places of the members of each segment, by definition."""
    values = case["values"]
    places = np.arange(values.numel())
    if case["group_ids"] is not None:
        ids = case["group_ids"].numpy()
        return [places[ids == g] for g in np.unique(ids)]
    if case["cu_seqlens"] is not None:
        return [places[a:b] for a, b in itertools.pairwise(case["cu_seqlens"].tolist())]
    return list(places.reshape(values.shape))


def numbers_of(case: Arguments, skip_nan: bool) -> tuple[np.ndarray, np.ndarray]:
    x = case["values"].double().numpy().astype(np.longdouble).ravel()
    counts = np.ones(x.shape, bool) if case["mask"] is None else case["mask"].numpy().ravel()
    return x, counts & ~(np.isnan(x) & skip_nan)


def moments(x: np.ndarray, ddof: int) -> tuple[np.longdouble, np.longdouble]:
    if len(x) == 0:
        return np.longdouble(0), np.longdouble(0)
    if x.min() == x.max():
        return x[0], np.longdouble(0)
    mean = x.mean()
    return mean, ((x - mean) ** 2).sum() / (len(x) - ddof) if len(x) > ddof else np.longdouble(0)


def exact(case: Arguments, mode: str, ddof: int, eps: float, singleton: str, weights: Tensor | None) -> np.ndarray:
    x, counts = numbers_of(case, True)
    out = np.zeros(x.shape, np.longdouble)
    for group in groups_of(case):
        places = group[counts[group]]
        g, n = x[places], len(places)
        scaled = mode.startswith("standardized") or mode == "standardize"
        if n == 1 and singleton == "raw":
            out[places] = g / (1 + np.longdouble(eps)) if scaled else g
        if n < 2 or g.min() == g.max():
            continue
        mean, variance = moments(g, ddof)
        if weights is not None:
            w = weights.double().numpy().astype(np.longdouble).ravel()[places]
            if w.sum() == 0:
                continue
            mean = (w * g).sum() / w.sum()
        if mode == "leave_one_out":
            made = np.array([g[i] - np.delete(g, i).mean() for i in range(n)])
            if weights is not None:
                made = n * (g - mean) / (n - 1)
        elif "lead" in mode:
            second = np.sort(g)[-2]
            made = np.where(g == g.max(), g - second, 0)
        else:
            made = g - mean
        if scaled:
            made = made / (np.sqrt(variance) + eps) if n > ddof else 0 * made
        out[places] = made
    return out.reshape(case["values"].shape)


def normalize(case: Arguments, backend: str = "native", **options) -> Tensor:
    with fastpo.use_backend(backend):
        given = {k: to_device(v) for k, v in {**case, **options}.items()}
        return fastpo.group_normalize(given.pop("values"), given.pop("group_ids"), **given).cpu()


def stats(case: Arguments, backend: str = "native", **options) -> list[Tensor]:
    with fastpo.use_backend(backend):
        given = {k: to_device(v) for k, v in {**case, **options}.items()}
        found = fastpo.segment_stats(given.pop("values"), given.pop("group_ids"), **given)
        return [t.cpu() for t in found]


@by_dtype
@by_layout
class TestValues:
    def test_normalize(self, dtype, layout):
        for i, (groups, members) in enumerate(SHAPES):
            case = make(layout, groups, members, dtype, seed=i)
            weights = torch.randint(0, 4, case["values"].shape, generator=torch.Generator().manual_seed(i))
            x, _ = numbers_of(case, True)
            size = float(np.nan_to_num(np.abs(x)).max()) if x.size else 0.0
            for mode, (ddof, eps, singleton) in itertools.product(
                MODES, [(1, 0.0, "zero"), (0, 1e-4, "raw"), (2, 1e-6, "zero")]
            ):
                for w in (None, weights) if mode == "center" else (None,):
                    options = {"mode": mode, "ddof": ddof, "eps": eps, "singleton": singleton, "weights": w}
                    ours, same = (normalize(case, backend, **options) for backend in BACKENDS)
                    truth = exact(case, mode, ddof, eps, singleton, w)
                    assert ours.dtype == same.dtype and ours.shape == case["values"].shape
                    # in fp64 what is divided has the rounding of the values, and small deviations divide it
                    terms = size
                    if dtype == torch.float64 and "standard" in mode:
                        terms = 64 * (1 + size) * float(np.abs(truth).max(initial=0))
                    elif dtype == torch.float64:
                        terms = 16 * size
                    elif ours.numel():
                        error = np.abs(ours.double().numpy() - truth)
                        # double inside, rounded once
                        assert (error <= 0.5001 * 2**-23 * np.abs(truth) + 2.0**-40 * (1 + size)).all(), options
                    assert_within(ours, truth, same, name=f"{mode} {groups} x {members}", terms=terms)
                    zero = truth == 0
                    assert (ours.numpy()[zero] == 0).all()

    @pytest.mark.parametrize("skip_nan", [True, False])
    def test_statistics(self, dtype, layout, skip_nan):
        if layout == "far ids":
            pytest.skip("statistics are of ids 0 .. num_groups")
        for i, (groups, members) in enumerate(SHAPES):
            case, options = make(layout, groups, members, dtype, seed=i), {"skip_nan": skip_nan}
            if case["group_ids"] is not None:
                options["num_groups"] = groups + 2
            x, counts = numbers_of(case, skip_nan)
            lists = groups_of(case)
            if case["group_ids"] is not None:
                ids = case["group_ids"].numpy()
                lists = [np.flatnonzero(ids == g) for g in range(groups + 2)]
            for ddof in (0, 1):
                want = []
                for group in lists:
                    g = x[group[counts[group]]]
                    low, high = (g.min(), g.max()) if len(g) else (np.inf, -np.inf)
                    want.append([len(g), g.sum(), *moments(g, ddof), low, high])
                table = np.array(want, np.longdouble).reshape(-1, 6)
                found = [stats(case, backend, ddof=ddof, **options) for backend in BACKENDS]
                for k, (ours, same) in enumerate(zip(*found, strict=True)):
                    sizes = np.array([np.nan_to_num(np.abs(x[g[counts[g]]])).sum() for g in lists], float)
                    terms = sizes * np.maximum(sizes, 1) if dtype == torch.float64 else sizes * 0
                    assert_within(ours, table[:, k], same, name=str(k), terms=np.nan_to_num(terms))

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_masked_members_have_no_influence(self, dtype, layout, poison):
        if "masked" not in layout:
            pytest.skip("nothing is masked")
        case = make(layout, 9, 7, dtype)
        dirty = {**case, "values": case["values"].masked_fill(~case["mask"], poison)}
        for backend, mode in itertools.product(BACKENDS, MODES):
            ours = normalize(dirty, backend, mode=mode)
            assert torch.equal(ours, normalize(case, backend, mode=mode)) and (ours[~case["mask"]] == 0).all()


@by_backend
class TestGroups:
    @pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-8, 1e-6, 1e-4])
    @by_dtype
    def test_constant_groups_are_exactly_zero(self, backend, dtype, eps):
        """OpenRLHF's group_norm gives |A| up to 0.96 here, Dr. GRPO's repository 0.90, verl 0.11, TRL 1e-3."""
        each = torch.tensor([0.1, 0.3, 0.7, 1.1, 1e-3, 1e4], dtype=dtype)
        for n, mode in itertools.product(range(2, 17), MODES):
            rewards = each[:, None].repeat(1, n)
            ids = torch.arange(rewards.numel()) % len(each)
            with fastpo.use_backend(backend):
                assert (fastpo.group_normalize(rewards, mode=mode, eps=eps) == 0).all()
                assert (fastpo.group_normalize(rewards.t().reshape(-1), ids, mode=mode, eps=eps) == 0).all()

    def test_the_trap_is_real(self, backend):
        """The usual computation in fp32 fails the test above."""
        rewards = torch.full((1, 12), 0.7)
        worst = max(
            ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-9)).abs().max().item()
            for r in (torch.full((1, n), v) for n in range(5, 17) for v in (0.1, 0.3, 0.7, 1.1))
        )
        assert worst > 0.5 and rewards.shape == (1, 12)

    def test_nan_is_left_out(self, backend):
        """An unscored member counts in nothing, and its advantage is 0."""
        rewards = torch.tensor([[1.0, math.nan, 3.0], [math.nan, math.nan, 2.0], [math.nan] * 3])
        with fastpo.use_backend(backend):
            found = fastpo.group_normalize(rewards, mode="center")
            assert found.tolist() == [[-1, 0, 1], [0, 0, 0], [0, 0, 0]]
            found = fastpo.group_normalize(rewards, mode="center", singleton="raw")
            assert found.tolist() == [[-1, 0, 1], [0, 0, 2], [0, 0, 0]]

    def test_ids_may_be_anything(self, backend):
        """Spread over the batch, negative, with gaps, close or far."""
        rewards = torch.tensor([1.0, 10.0, 3.0, 20.0, 5.0])
        with fastpo.use_backend(backend):
            for ids in ([0, 1, 0, 1, 0], [-5, 7, -5, 7, -5], [2**62, -(2**62), 2**62, -(2**62), 2**62]):
                found = fastpo.group_normalize(rewards, torch.tensor(ids), mode="center")
                assert found.tolist() == [-2, -5, 0, 5, 2]

    @pytest.mark.parametrize("ordered", [True, False])
    def test_nan_and_inf_stay_in_their_group(self, backend, ordered):
        """Groups of 1 to 19, the last one ending with the batch, every third place in turn."""
        sizes = torch.arange(1, 20)
        ids = torch.repeat_interleave(sizes, sizes)
        rewards = torch.randn(len(ids), generator=torch.Generator().manual_seed(3))
        order = (
            torch.arange(len(ids)) if ordered else torch.randperm(len(ids), generator=torch.Generator().manual_seed(4))
        )
        with fastpo.use_backend(backend):
            clean = fastpo.group_normalize(rewards[order], ids[order])
            for bad, at in itertools.product((math.nan, math.inf, -math.inf), range(0, len(ids), 3)):
                spoilt = rewards.clone()
                spoilt[at] = bad
                found = fastpo.group_normalize(spoilt[order], ids[order])
                others, same = ids[order] != ids[at], ids[order] == ids[at]
                assert torch.equal(found[others], clean[others])
                if math.isnan(bad):
                    rest = same & ~torch.isnan(spoilt[order])
                    assert found[order == at].item() == 0
                    alone = fastpo.group_normalize(rewards[order][rest][None])[0]
                    # double inside, in another order of the sum, and rounded once: an ulp at most
                    assert torch.allclose(found[rest], alone, rtol=2**-23, atol=0)
                elif same.sum() > 1:
                    assert torch.isnan(found[same]).all()

    @by_layout
    def test_what_is_informative(self, backend, layout):
        """Members that count, of groups that are not constant."""
        for i, (groups, members) in enumerate(SHAPES):
            case = make(layout, groups, members, torch.float32, seed=i)
            x, counts = numbers_of(case, True)
            expected = np.zeros(x.shape, bool)
            for group in groups_of(case):
                places = group[counts[group]]
                expected[places] = len(set(x[places])) > 1
            with fastpo.use_backend(backend):
                given = {name: to_device(case[name]) for name in ("mask", "cu_seqlens")}
                values, ids = to_device(case["values"]), to_device(case["group_ids"])
                _, found = normalized(values, ids, mode="center", informative=True, **given)
            assert found.cpu().numpy().ravel().tolist() == expected.tolist()

    def test_small_deviations_of_large_rewards(self, backend):
        """In fp64, 1e6 plus a few units of 1e-6: the mean is corrected by its own deviations."""
        steps = torch.tensor([[1.0, 2.0, 4.0, 9.0]], dtype=torch.float64)
        rewards = 2.0**20 + steps * 2.0**-20
        with fastpo.use_backend(backend):
            found, want = (fastpo.group_normalize(t) for t in (rewards, steps))
        assert torch.allclose(found, want, rtol=1e-12)

    def test_no_gradient(self, backend):
        rewards = torch.ones(2, 3, requires_grad=True)
        with fastpo.use_backend(backend):
            assert not fastpo.group_normalize(rewards).requires_grad
            assert not fastpo.segment_stats(rewards).mean.requires_grad

    def test_permuting_the_members(self, backend):
        case = make("ids", 9, 8, torch.float32, seed=4)
        order = torch.randperm(72, generator=torch.Generator().manual_seed(1))
        moved = {k: None if t is None else t[order] for k, t in case.items()}
        for mode in MODES:
            plain, ours = normalize(case, backend, mode=mode), normalize(moved, backend, mode=mode)
            assert torch.allclose(ours, plain[order], rtol=1e-5, atol=1e-6)


numbers = st.integers(-50, 50).map(lambda k: k / 4)


@pytest.mark.once
class TestProperties:
    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(numbers, st.integers(-3, 3)), min_size=1, max_size=40), numbers)
    def test_a_common_shift_and_a_scale(self, members, shift):
        """A constant per prompt cancels exactly; standardised, so does a positive scale."""
        values, ids = torch.tensor([m[0] for m in members]), torch.tensor([m[1] for m in members])
        for mode in MODES:
            plain = fastpo.group_normalize(values, ids, mode=mode)
            moved = fastpo.group_normalize(values + shift, ids, mode=mode)
            assert torch.allclose(moved, plain, rtol=1e-6, atol=1e-12)
            if mode.startswith("standard"):
                scaled = fastpo.group_normalize(4 * values, ids, mode=mode)
                assert torch.allclose(scaled, plain, rtol=1e-6, atol=0)

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40), st.booleans())
    def test_members_are_those_of_the_reference(self, ids, near):
        given = torch.tensor([i % 7 - 3 for i in ids] if near else ids, dtype=torch.int64)
        ours = torch.ops.fastpo.group_members(given, -1)
        for x, y in zip(ours, reference.group_members(given, -1), strict=True):
            assert torch.equal(x, y)
        shifted = given % 7
        for x, y in zip(torch.ops.fastpo.group_members(shifted, 9), reference.group_members(shifted, 9), strict=True):
            assert torch.equal(x, y)


class TestDeterminism:
    @pytest.mark.parametrize("layout", ["rows masked", "packed", "ids"])
    def test_repeats_and_threads(self, layout):
        case = make(layout, 900, 70, torch.float32)
        results = []
        for threads in (1, 1, 2, 2):
            torch.set_num_threads(threads)
            results.append(normalize(case))
        torch.set_num_threads(1)
        assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.once
class TestOps:
    def test_opcheck(self):
        for layout, wanted in itertools.product(LAYOUTS, (1, 2, 6, 7)):
            case = make(layout, 4, 5, torch.float32)
            order = boundaries = None
            if case["group_ids"] is not None:
                order, boundaries = torch.ops.fastpo.group_members(case["group_ids"], -1)
                torch.library.opcheck(torch.ops.fastpo.group_members.default, (case["group_ids"], -1))
            elif case["cu_seqlens"] is not None:
                boundaries = case["cu_seqlens"].long()
            arguments = (case["values"], None, case["mask"], order, boundaries, 1, 1, 1e-6, True, False, wanted)
            torch.library.opcheck(torch.ops.fastpo.segment_stats.default, arguments)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiled_equals_eager(self, backend):
        torch._dynamo.reset()
        case = make("ids", 6, 5, torch.float32)

        def function(values: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            grouped = fastpo.group_normalize(values * 2, ids)
            return grouped, *fastpo.segment_stats(values.view(6, 5)), fastpo.advantages.gpg(values, ids)

        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        arguments = (case["values"].nan_to_num(0), case["group_ids"])
        for one, two in zip(function(*arguments), compiled(*arguments), strict=True):
            assert torch.equal(one, two)
        assert counter.frame_count == 1


@pytest.mark.once
class TestBadInput:
    rewards, ids = torch.ones(4), torch.tensor([0, 1, 0, 1])

    @by_backend
    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"values": torch.ones(4, dtype=torch.int64)}, TypeError, r"values must have dtype float32.*got int64"),
            ({"group_ids": None}, ValueError, r"values has shape \(4,\), expected \(S, N\), or \(N,\) with group_ids"),
            ({"values": torch.ones(2, 2)}, ValueError, r"values has shape \(2, 2\), expected \(N,\) with group_ids"),
            ({"group_ids": torch.ones(4)}, TypeError, r"group_ids must have dtype int64, int32, got float32"),
            ({"group_ids": torch.ones(3, dtype=torch.int64)}, ValueError, r"group_ids has shape \(3,\), expected"),
            ({"mask": torch.ones(4)}, TypeError, r"mask must have dtype bool, got float32"),
            ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask has shape \(3,\), expected \(4,\)"),
            ({"mode": "mean"}, ValueError, r"mode must be one of center, .*; got 'mean'"),
            ({"singleton": "nan"}, ValueError, r"singleton must be one of zero, raw; got 'nan'"),
            ({"ddof": -1}, ValueError, r"ddof must be at least 0, got -1"),
            ({"ddof": 1.0}, TypeError, r"ddof must be an int, got float"),
            ({"eps": -1e-9}, ValueError, r"eps must be at least 0 and finite, got -1e-09"),
            ({"eps": math.nan}, ValueError, r"eps must be at least 0 and finite, got nan"),
            ({"weights": -torch.ones(4)}, ValueError, r"weights must be at least 0"),
            ({"weights": torch.ones(3)}, ValueError, r"weights has shape \(3,\), expected \(4,\)"),
            (
                {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)},
                ValueError,
                r"group_ids and cu_seqlens both say what a segment is",
            ),
        ],
    )
    def test_arguments(self, backend, arguments, error, text):
        given = {"values": self.rewards, "group_ids": self.ids} | arguments
        with fastpo.use_backend(backend), pytest.raises(error, match=text):
            fastpo.group_normalize(**given)

    @by_backend
    def test_number_of_groups(self, backend):
        with fastpo.use_backend(backend):
            with pytest.raises(ValueError, match="num_groups must be given with group_ids"):
                fastpo.segment_stats(self.rewards, self.ids)
            with pytest.raises(IndexError, match=r"group_ids\[1\] is 1, out of range for num_groups=1"):
                fastpo.segment_stats(self.rewards, self.ids, num_groups=1)
            with pytest.raises(ValueError, match="num_groups is the number of ids"):
                fastpo.segment_stats(self.rewards.view(2, 2), num_groups=2)
            with pytest.raises(TypeError, match="num_groups must be an int, got float"):
                fastpo.segment_stats(self.rewards, self.ids, num_groups=2.0)

    @by_backend
    @pytest.mark.parametrize("bad", [[0, 4, 2], [1, 3], [0, 9]])
    def test_boundaries(self, backend, bad):
        boundaries = torch.tensor(bad, dtype=torch.int32)
        with fastpo.use_backend(backend), pytest.raises(ValueError, match="cu_seqlens must rise from 0 to at most 4"):
            fastpo.segment_stats(self.rewards, cu_seqlens=boundaries)

    def test_op_refuses_what_the_public_function_never_passes(self):
        rest = (1, 1, 0.0, True, False, 7)
        with pytest.raises(RuntimeError, match="wrong size"):
            torch.ops.fastpo.segment_stats(
                self.rewards.view(2, 2), None, torch.ones(3, dtype=torch.bool), None, None, *rest
            )
        order, boundaries = torch.tensor([0, 9, 1, 2]), torch.tensor([0, 4])
        with pytest.raises(RuntimeError, match="order is no permutation"):
            torch.ops.fastpo.segment_stats(self.rewards, None, None, order, boundaries, *rest)
