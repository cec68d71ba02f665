"""The tiles of linear_logprobs in Triton, in Triton's interpreter: against the CPU's ops on the same tensors, and the
whole driver over a selection of the CPU's cases with them in its place.

The interpreter spends its time per vector of 16 bytes that a program handles at once and not per element: the driver's
cases run with more of them than a GPU's, those about borders with the fewest.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels import _tiles
from tests.emulator.harness import in_place_of_cpu
from tests.kernels import test_linear_logprobs as cases
from tests.kernels.test_token_logprobs import allow, make
from tests.tolerance import assert_within

pytest.importorskip("triton")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("Triton compiles: TRITON_INTERPRET is not 1", allow_module_level=True)

from fastpo.kernels.triton import linear_logprobs as kernels

# what numpy says of inf - inf, and of a vector of only NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LARGE = (kernels.Fold(2048, 4), kernels.Gradient(2048, 2, 4))
SMALL = (kernels.Fold(16, 4), kernels.Gradient(16, 2, 4))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# where fp16 takes no other path than bf16 does
by_two_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
LN_2 = 0.6931471805599453
# without a cap its scale is in the inverse temperatures
PLAIN, CAPPED = (1.0, 0.0), (1.5, 4.0)


def vector(dtype: torch.dtype) -> int:
    """Elements in 16 bytes."""
    return 16 // dtype.itemsize


def among_nans(tile: Tensor, before: int = 0, after: int = 0) -> Tensor:
    """The tile as a view of a buffer that holds NaN around its rows, at its beginning and at its end."""
    rows, columns = tile.shape
    width = before + columns + after
    buffer = torch.full((rows + 2, width), torch.nan, dtype=tile.dtype)
    view = buffer[1:-1, before : before + columns]
    view.copy_(tile)
    return view


def copy_of(view: Tensor) -> Tensor:
    """With its surroundings."""
    base = view if view._base is None else view._base
    return base.clone().as_strided(view.shape, view.stride(), view.storage_offset())


def surroundings(view: Tensor) -> Tensor:
    """The elements of its buffer that are not in it, and 7 for a NaN."""
    base = view if view._base is None else view._base
    inside = torch.zeros(base.shape, dtype=torch.bool)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return base[~inside].nan_to_num(7)


def fold(
    op: Any,
    tiles: list[Tensor],
    targets: Tensor,
    inverse: Tensor,
    *,
    scale_and_cap: tuple[float, float] = PLAIN,
    first: int = 0,
    top1: bool = True,
    total: bool = True,
    weighted: bool = True,
    squared: bool = True,
) -> dict[str, Tensor]:
    """What the rows carry after all tiles."""
    rows = len(inverse)
    state = torch.zeros(4, rows, dtype=torch.float64)
    state[0] = -torch.inf
    carried = {"state": state, "taken": torch.zeros(targets.shape, dtype=torch.float64)}
    carried |= {"top1": torch.zeros(rows, dtype=torch.int64), "total": torch.zeros(rows, dtype=torch.float64)}
    optional = (carried["top1"] if top1 else None, carried["total"] if total else None)
    for tile in tiles:
        op(tile, first, targets, inverse, *scale_and_cap, state, carried["taken"], *optional, weighted, squared)
        first += tile.shape[1]
    return carried


def capped(x: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """In fp64: what the softmax is taken of, and its derivative."""
    x = x.double()
    if not cap:
        return x, torch.ones_like(x)
    tanh = (x * (scale / cap)).tanh()
    # from the exponential, for 1 - tanh² loses its digits
    e = (-2 * (x * (scale / cap)).abs()).exp()
    return cap * tanh, scale * 4 * e / (1 + e) ** 2


def check_fold(tiles: list[Tensor], targets: Tensor, inverse: Tensor, config=None, first: int = 0, **options) -> Any:
    """Our error is at most that of the CPU's op and 2 eps of fp32, of finite rows; returns what the CPU's rows carry.

    A sum's terms 2^t have the relative error (1 + |t ln 2|) eps, as those of token_logprobs; with a cap each of the two
    logits in t has one of about 2 eps.
    """
    before = [(t.clone(), surroundings(t)) for t in tiles]
    ours = fold(functools.partial(kernels.fold_tile, config=config), tiles, targets, inverse, first=first, **options)
    for tile, (inside, outside) in zip(tiles, before, strict=True):
        assert torch.equal(tile, inside) and torch.equal(surroundings(tile), outside)
    cpu = fold(torch.ops.fastpo.fold_tile, [t.clone() for t in tiles], targets, inverse, first=first, **options)

    scale_and_cap = options.get("scale_and_cap", PLAIN)
    x, _ = capped(torch.cat(tiles, 1), *scale_and_cap)
    largest = x.amax(1, keepdim=True)
    z = (x - largest) * inverse[:, None]
    e, t = z.exp(), z / LN_2
    # what is impossible adds nothing
    t = torch.where(e == 0, 0, t)
    place = targets - first
    inside = (place >= 0) & (place < x.shape[1])
    truth = {
        "state": torch.stack([largest[:, 0], e.sum(1), (e * t).sum(1), (e * e).sum(1)]),
        "taken": torch.where(inside, x.gather(1, torch.where(inside, place, 0)), 0),
        "total": x.sum(1),
    }
    relative = 1 + t.abs() * LN_2
    if scale_and_cap[1]:
        relative = relative + (x.abs() + largest.abs()) * inverse[:, None]
    terms = {
        "state": torch.stack([
            truth["state"][0].abs(),
            (e * relative).sum(1),
            (e * t.abs() * relative).sum(1) + 1,
            2 * (e * e * relative).sum(1),
        ]),
        "taken": truth["taken"].abs(),
        "total": x.abs().sum(1),
    }  # fmt: skip
    rows = [
        i for i, used in enumerate((True, True, options.get("weighted", True), options.get("squared", True))) if used
    ]
    for name in ("state", "taken", "total"):
        pick = [(ours[name], truth[name], cpu[name], terms[name])]
        if name == "state":
            pick = [tuple(p[i] for p in pick[0]) for i in rows]
        for value, exact, same, size in pick:
            if name != "total" or options.get("total", True):
                assert_within(value, exact, same, torch.float32, name=name, terms=size.numpy())
    if not scale_and_cap[1]:
        assert torch.equal(ours["state"][0], cpu["state"][0]) and torch.equal(ours["taken"], cpu["taken"])
    if options.get("top1", True):
        # a cap may round two logits to one, which one depends on its rounding
        at = ours["top1"][:, None] - first
        assert torch.equal(ours["top1"], cpu["top1"]) or (scale_and_cap[1] and torch.equal(x.gather(1, at), largest))
    return cpu


def coefficients(inverse: Tensor, state: Tensor, ids: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random `at`, `slope` and `grads`, of the size that the driver's have."""
    g = torch.Generator().manual_seed(1)
    at, slope = torch.randn(2, len(inverse), generator=g, dtype=torch.float64) * inverse / state[1]
    return at, slope * LN_2, torch.randn(len(inverse), ids, generator=g, dtype=torch.float64) * inverse[:, None]


def check_gradient(
    tiles: list[Tensor],
    targets: Tensor,
    inverse: Tensor,
    state: Tensor,
    config=None,
    first: int = 0,
    scale_and_cap: tuple[float, float] = PLAIN,
    entropy: bool = True,
    out: torch.dtype | None = None,
) -> list[Tensor]:
    """As check_fold, for the gradients of every tile; those in `out` are those of an fp32 tile, rounded."""
    at, slope, grads = coefficients(inverse, state, targets.shape[1])
    arguments = (targets, inverse, *scale_and_cap, state, at, slope if entropy else None, grads)
    found = []
    for tile in tiles:
        ours, cpu = copy_of(tile), tile.clone()
        kernels.dlogits_tile(ours, first, *arguments, config=config)
        assert torch.equal(surroundings(ours), surroundings(tile))
        torch.ops.fastpo.dlogits_tile(cpu, first, *arguments)
        if out is not None:
            wide, other = (
                tile.to(torch.float32, copy=True),
                among_nans(torch.zeros(tile.shape, dtype=out), after=vector(out)),
            )
            kernels.dlogits_tile(wide, first, *arguments, config=config)
            kernels.dlogits_tile(tile, first, *arguments, other, config=config)
            # the interpreter cuts bf16 off where a GPU rounds
            nearest = wide.to(out).float()
            one_bit = torch.where(nearest.abs() > wide.abs(), torch.finfo(out).eps * nearest.abs(), 0)
            assert ((other - nearest).abs() <= (one_bit if out == torch.bfloat16 else 0)).all()
            assert (surroundings(other) == 7).all()
        x, derivative = capped(tile, *scale_and_cap)
        t = (x - state[0, :, None]) * (inverse / LN_2)[:, None]
        relative = 1 + t.abs() * LN_2
        if scale_and_cap[1]:
            relative = relative + (x.abs() + state[0, :, None].abs()) * inverse[:, None]
        weight = slope[:, None] * t if entropy else 0 * t
        extra, size = torch.zeros_like(x), torch.zeros_like(x)
        for k in range(targets.shape[1]):
            place = targets[:, k] - first
            rows = ((place >= 0) & (place < x.shape[1])).nonzero()[:, 0]
            extra[rows, place[rows]] += grads[rows, k]
            size[rows, place[rows]] += grads[rows, k].abs()
        truth = (t.exp2() * (at[:, None] + weight) + extra) * derivative
        size = (t.exp2() * (at[:, None].abs() + weight.abs()) * relative + size) * derivative
        assert_within(ours, truth, cpu, name="gradient", terms=size.numpy())
        found.append(ours)
        first += tile.shape[1]
    return found


def check(
    tiles: list[Tensor], targets: Tensor, inverse: Tensor, configs=LARGE, entropy: bool = True, **options
) -> None:
    """Both kernels."""
    state = check_fold(tiles, targets, inverse, configs[0], **options)["state"]
    place = {n: options[n] for n in ("first", "scale_and_cap") if n in options}
    check_gradient(tiles, targets, inverse, state, configs[1], entropy=entropy, **place)


def rows_of(rows: int, ids: int, columns: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Targets, among them some that are in none of the columns, and inverse temperatures."""
    g = torch.Generator().manual_seed(2)
    targets = torch.randint(first - 3, first + columns + 3, (rows, ids), generator=g).clamp(min=-1)
    return targets, torch.rand(rows, generator=g, dtype=torch.float64) * 2 + 0.3


@pytest.mark.parametrize("scale_and_cap", [PLAIN, CAPPED], ids=["plain", "capped"])
class TestValues:
    @by_dtype
    @pytest.mark.parametrize("columns", [1, 2, 63, 1000])
    def test_tiles_in_sequence(self, dtype, columns, scale_and_cap):
        logits, _ = make(3, 3 * columns, dtype=dtype)
        # the largest in the second tile, far above all others
        logits[0, columns + columns // 2] = 60
        targets, inverse = rows_of(3, 1, 3 * columns, 70)
        tiles = [among_nans(t, 0, -columns % vector(dtype)) for t in logits.split(columns, 1)]
        check(tiles, targets, inverse, first=70, scale_and_cap=scale_and_cap)

    @by_two_dtypes
    def test_every_start_and_length(self, dtype, scale_and_cap):
        """Rows that begin and end anywhere in a vector of 16 bytes, shorter than one and longer than a program's."""
        e = vector(dtype)
        for before in range(0, e, 1 if e == 4 else 3):
            for columns in (1 + before, 17 * e - 1 - before, 35 * e + (3 * before) % e):
                logits, _ = make(2, columns, dtype=dtype, seed=before)
                targets = torch.tensor([[10, 9 + columns], [10 + columns // 2, 10 + columns]])
                tile = among_nans(logits, before, 3 + before)
                inverse = torch.tensor([0.7, 1.3], dtype=torch.float64)
                check([tile], targets, inverse, SMALL, first=10, scale_and_cap=scale_and_cap)

    @by_two_dtypes
    def test_ids_everywhere(self, dtype, scale_and_cap):
        """At the borders of vectors, programs and edges, several times, outside of the tile, and not valid."""
        e = vector(dtype)
        columns, first = 16 * e * 5 + 3, 1000
        for before in (0, 3):
            head = -before % e
            borders = [head + 16 * e * n + d for n in range(6) for d in (-1, 0, 1)] + [0, 1, columns - 2, columns - 1]
            ids = [first + c for c in borders if -1 <= c <= columns]
            targets = torch.tensor([ids, ids[::-1], [first + 7] * len(ids), [-1] * len(ids)])
            targets[1, ::2] = -1
            targets[2, ::3] = 3
            tile = among_nans(make(4, columns, dtype=dtype)[0], before, e - before + 1)
            inverse = torch.full((4,), 0.8, dtype=torch.float64)
            check([tile], targets, inverse, SMALL, first=first, scale_and_cap=scale_and_cap)

    @by_two_dtypes
    def test_offset(self, dtype, scale_and_cap):
        """Logits around 1e4, beyond any cap."""
        logits = make(3, 300, dtype=dtype)[0] + torch.tensor(1e4, dtype=dtype)
        targets, inverse = rows_of(3, 2, 300)
        scale, cap = scale_and_cap
        check(list(logits.split(150, 1)), targets, inverse, scale_and_cap=(scale, 1e4 if cap else 0.0))
        if cap:
            # all alike
            carried = fold(kernels.fold_tile, [logits], targets, inverse, scale_and_cap=scale_and_cap)
            assert (carried["state"][:2].t() == torch.tensor([cap, 300.0])).all() and not carried["top1"].any()

    @by_two_dtypes
    @pytest.mark.parametrize("entropy", [False, True])
    def test_out(self, dtype, entropy, scale_and_cap):
        """Into a tensor of another dtype or strides; aligned, and not in both."""
        for columns, before, out in ((272, 0, torch.bfloat16), (65, 0, torch.float16), (65, 3, torch.bfloat16)):
            logits, _ = make(3, columns, dtype=dtype)
            targets, inverse = rows_of(3, 3, columns)
            tile = among_nans(logits, before, 5 if before else -columns % 8)
            state = fold(torch.ops.fastpo.fold_tile, [logits], targets, inverse, scale_and_cap=scale_and_cap)["state"]
            place = {"scale_and_cap": scale_and_cap, "entropy": entropy, "out": out}
            was = copy_of(tile)
            check_gradient([tile], targets, inverse, state, SMALL[1], **place)
            assert torch.equal(tile, was)

    def test_what_is_asked_for(self, scale_and_cap):
        """Each combination is a kernel of its own, and none changes the others' results."""
        logits, _ = make(1, 101)
        targets, inverse = rows_of(1, 3, 101)
        run = functools.partial(fold, kernels.fold_tile, list(logits.split(60, 1)), targets, inverse)
        names = ("top1", "total", "weighted", "squared")
        every = run(scale_and_cap=scale_and_cap)
        for bits in range(16):
            flags = {name: bool(bits >> i & 1) for i, name in enumerate(names)}
            some = run(scale_and_cap=scale_and_cap, **flags)
            assert torch.equal(some["taken"], every["taken"])
            asked = [True, True, flags["weighted"], flags["squared"]]
            assert torch.equal(some["state"][asked], every["state"][asked])
            for name in names[:2]:
                assert torch.equal(some[name], every[name] if flags[name] else torch.zeros_like(every[name]))

    @pytest.mark.parametrize("ids", [0, 1, 3])
    def test_few_or_no_ids(self, ids, scale_and_cap):
        logits, _ = make(3, 50)
        targets, inverse = rows_of(3, ids, 50)
        check(list(logits.split(30, 1)), targets, inverse, scale_and_cap=scale_and_cap)

    def test_default_configs(self, scale_and_cap):
        """Chosen by width, and every other, gives the same up to rounding."""
        logits, _ = make(2, 4100)
        targets, inverse = rows_of(2, 2, 4100)
        for configs in ((None, None), (kernels.FOLD_CONFIGS[1], kernels.GRADIENT_CONFIGS[1])):
            check([logits[:, :200], logits[:, 200:]], targets, inverse, configs, scale_and_cap=scale_and_cap)

    def test_rows_do_not_depend_on_each_other(self, scale_and_cap):
        logits, _ = make(9, 700)
        targets, inverse = rows_of(9, 2, 700)
        options = {"scale_and_cap": scale_and_cap}
        whole, again = (fold(kernels.fold_tile, [logits], targets, inverse, **options) for _ in range(2))
        alone = fold(kernels.fold_tile, [logits[4:5]], targets[4:5], inverse[4:5], **options)
        assert all(torch.equal(v, again[n]) for n, v in whole.items())
        assert all(torch.equal(v, whole[n][:, 4:5] if n == "state" else whole[n][4:5]) for n, v in alone.items())


class TestExtremeRows:
    @by_two_dtypes
    @pytest.mark.parametrize("scale_and_cap", [PLAIN, CAPPED], ids=["plain", "capped"])
    def test_as_the_cpu_has_them(self, dtype, scale_and_cap):
        """-inf, +inf and NaN, anywhere and in any order of tiles, stay in their rows and are found alike."""
        rows = {
            "finite": {},
            "one -inf": {3: -torch.inf},
            "only -inf": dict.fromkeys(range(120), -torch.inf),
            "-inf at first": dict.fromkeys(range(40), -torch.inf),
            "+inf": {50: torch.inf},
            "two +inf": {10: torch.inf, 100: torch.inf},
            "nan": {60: torch.nan},
            "nan twice": {30: torch.nan, 90: torch.nan},
            "only nan": dict.fromkeys(range(120), torch.nan),
            "+inf, then nan": {20: torch.inf, 70: torch.nan},
            "nan, then +inf": {70: torch.inf, 20: torch.nan},
            "both in a tile": {50: torch.inf, 60: torch.nan},
            "lowest": dict.fromkeys(range(120), torch.finfo(dtype).min),
            "highest at last": {119: torch.finfo(dtype).max},
        }
        logits, _ = make(len(rows), 120, dtype=dtype)
        for row, changes in zip(logits, rows.values(), strict=True):
            for column, value in changes.items():
                row[column] = value
        targets, inverse = rows_of(len(rows), 2, 120)
        options = {"scale_and_cap": scale_and_cap}
        for widths in ([40, 41, 39], [120]):
            tiles = [among_nans(t, 1, 2) for t in logits.split(widths, 1)]
            ours = fold(functools.partial(kernels.fold_tile, config=SMALL[0]), tiles, targets, inverse, **options)
            cpu = fold(torch.ops.fastpo.fold_tile, [t.clone() for t in tiles], targets, inverse, **options)
            # the plain sum is made in fp32 and may overflow, where the CPU's is made in fp64
            large = cpu["total"].abs() > 1e38
            assert (ours["total"][large].abs() > 1e38).all()
            ours["total"] = torch.where(large, cpu["total"], ours["total"])
            for name, value in ours.items():
                torch.testing.assert_close(value, cpu[name], rtol=2e-6, atol=2e-5, equal_nan=True, msg=name)
            at, slope, grads = coefficients(inverse, cpu["state"], 2)
            first = 0
            for tile in tiles:
                theirs = tile.clone()
                arguments = (first, targets, inverse, *scale_and_cap, cpu["state"], at, slope, grads)
                kernels.dlogits_tile(tile, *arguments, config=SMALL[1])
                torch.ops.fastpo.dlogits_tile(theirs, *arguments)
                rounding = torch.finfo(dtype).eps
                torch.testing.assert_close(tile, theirs, rtol=rounding, atol=2e-5, equal_nan=True)
                assert (surroundings(tile) == 7).all()
                first += tile.shape[1]

    @by_two_dtypes
    def test_top1_among_equals(self, dtype):
        """The lowest of equal maxima, wherever in edges, vectors, programs and tiles they are."""
        e, g = vector(dtype), torch.Generator().manual_seed(0)
        targets, inverse = torch.zeros(4, 0, dtype=torch.int64), torch.ones(4, dtype=torch.float64)
        op = functools.partial(kernels.fold_tile, config=SMALL[0])
        for before in (0, 1, e - 1):
            for columns in (e - 1, 5 * e + 1, 40 * e + e - 1):
                logits = torch.randint(0, 4, (4, 2 * columns), generator=g).to(dtype)
                logits[1, -2:] = 9
                logits[2, [0, columns - 1, columns, -1]] = 9
                logits[3, [columns, -1]] = 9
                tiles = [among_nans(t, before, 1) for t in logits.split(columns, 1)]
                top1 = fold(op, tiles, targets, inverse, first=5)["top1"]
                # torch's argmax says nothing of equals
                assert top1.tolist() == [5 + row.index(max(row)) for row in logits.tolist()]

    def test_nothing(self):
        """No rows, and no columns."""
        for rows, columns in ((0, 5), (3, 0)):
            tile, (targets, inverse) = torch.zeros(rows, columns), rows_of(rows, 2, 5)
            carried = fold(kernels.fold_tile, [tile], targets, inverse)
            assert (carried["state"][0] == -torch.inf).all() and not carried["state"][1:].any()
            kernels.dlogits_tile(
                tile, 0, targets, inverse, 1.0, 0.0, carried["state"], inverse, None, inverse.new_zeros(rows, 2)
            )


class TestSoftcap:
    def test_accuracy(self):
        """As its docstring says, with the interpreter's exponential and division."""
        x = torch.cat([torch.logspace(-30, 2, 2000), torch.linspace(0.9, 1.1, 2000), torch.linspace(0, 12, 4000)])
        x = torch.cat([x, -x, torch.tensor([torch.inf, -torch.inf, torch.nan])])[None]
        ids, one = torch.arange(x.shape[1])[None], torch.ones(1, dtype=torch.float64)
        carried = fold(kernels.fold_tile, [x], ids, one, scale_and_cap=(1.0, 1.0))
        exact = x.double().tanh()
        near = exact.isfinite() & (exact != 0)
        assert ((carried["taken"] - exact).abs()[near] <= 2.3e-7 * exact.abs()[near]).all()
        assert torch.equal(carried["taken"][~near].nan_to_num(7), exact[~near].nan_to_num(7))
        # T = inf and at = 1 leave the derivative; beyond 40 it is below what fp32 holds
        state, inside, gradient = torch.zeros(4, 1, dtype=torch.float64), x.abs() < 40, x.clone()
        none = torch.zeros(1, 0)
        kernels.dlogits_tile(gradient, 0, none.long(), 0 * one, 1.0, 1.0, state, one, None, none.double())
        slope = capped(x, 1.0, 1.0)[1]
        assert ((gradient - slope).abs()[inside] <= 8e-6 * slope[inside]).all()
        assert (gradient[~inside & ~x.isnan()] < 1e-30).all() and gradient[0, -1].isnan()


class TestPlace:
    def test_cuda_takes_them(self):
        for name in ("fold_tile", "dlogits_tile"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpo::{name}", "CUDA")

    def test_which_loads_and_stores_are_vectors(self, monkeypatch):
        """EDGES only where a row begins or ends inside a vector; ALIKE unless that of `out` begins elsewhere in one."""
        launched: list[dict[str, Any]] = []
        monkeypatch.setattr(kernels, "launch", lambda *_, **constants: launched.append(constants))

        def constants(tile: Tensor, out: Tensor | None = None) -> tuple:
            launched.clear()
            targets, inverse = rows_of(len(tile), 1, tile.shape[1])
            carried = fold(kernels.fold_tile, [tile], targets, inverse)
            at, slope, grads = coefficients(inverse, carried["state"], 1)
            kernels.dlogits_tile(tile, 0, targets, inverse, 1.0, 0.0, carried["state"], at, slope, grads, out)
            forward, backward = launched
            return forward["E"], forward["EDGES"], backward["E"], backward["EDGES"], backward["ALIKE"]

        wide, narrow = torch.zeros(3, 48), torch.zeros(3, 48, dtype=torch.bfloat16)
        assert constants(wide) == (4, False, 4, False, True)
        assert constants(narrow) == (8, False, 8, False, True)
        assert constants(wide, narrow) == (4, False, 8, False, True)
        # the last slice of a vocabulary, in rows as long as the others'
        assert constants(wide[:, :44], narrow[:, :44]) == (4, False, 8, True, True)
        assert constants(wide[:, :43], narrow[:, :43]) == (4, True, 8, True, True)
        assert constants(torch.zeros(3, 43)) == (4, True, 4, True, True)
        assert constants(wide[:, 4:44], narrow[:, :40]) == (4, False, 8, False, True)
        assert constants(wide[:, 1:41], narrow[:, :40]) == (4, True, 8, False, False)
        # one row: its stride is nothing to go by
        assert constants(torch.zeros(1, 49)[:, :48]) == (4, False, 4, False, True)

    def test_bad_arguments(self):
        tile, (targets, inverse) = torch.zeros(3, 8), rows_of(3, 1, 8)
        state = torch.zeros(3, 4, dtype=torch.float64)
        arguments = (0, targets, inverse, 1.0, 0.0)
        with pytest.raises(ValueError, match="state has the wrong dtype, size or strides"):
            kernels.fold_tile(tile, *arguments, state.t(), targets.double(), None, None, True, True)
        with pytest.raises(ValueError, match="taken has the wrong dtype"):
            kernels.fold_tile(tile, *arguments, state.view(4, 3), targets.float(), None, None, True, True)
        with pytest.raises(ValueError, match="columns of a tile must be adjacent"):
            kernels.fold_tile(tile.t()[:3], *arguments, state.view(4, 3), targets.double(), None, None, True, True)
        with pytest.raises(ValueError, match=r"out has shape \(3, 7\), the tile \(3, 8\)"):
            rest = (state.view(4, 3), inverse, None, targets.double(), tile[:, :7])
            kernels.dlogits_tile(tile, *arguments, *rest)


class TestAllowed:
    @by_two_dtypes
    @pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
    @pytest.mark.parametrize("scale_and_cap", [PLAIN, CAPPED], ids=["plain", "capped"])
    def test_as_the_cpu_has_them(self, dtype, scale_and_cap, shared):
        """Rows that begin and end anywhere; logits outside hold anything, and in one row so do those inside."""
        e = vector(dtype)
        for before, columns in ((0, 40 * e), (1, 5), (3, 17 * e + 1), (e - 1, 66 * e - 3)):
            logits, _ = make(3, columns, dtype=dtype, seed=before)
            targets, inverse = torch.tensor([[0], [columns - 1], [-1]]), torch.tensor([0.7, 1.3, 1.0]).double()
            # that hold the first and the last column
            spoiled, words, mask = allow(logits, torch.tensor([[0, columns - 1]] * 3))
            if shared:
                spoiled, words, mask = torch.where(mask[0], logits, spoiled), words[:1], mask[:1].expand(3, -1)
            spoiled[2, mask[2].nonzero()[0]] = torch.nan
            tile = among_nans(spoiled, before, 2)
            carried = []
            for op in (functools.partial(kernels.fold_tile, config=SMALL[0]), torch.ops.fastpo.fold_tile):
                call = functools.partial(_with_sets, op, words)
                carried.append(fold(call, [tile], targets, inverse, scale_and_cap=scale_and_cap))
            for name, value in carried[0].items():
                torch.testing.assert_close(value, carried[1][name], rtol=2e-6, atol=2e-5, equal_nan=True, msg=name)
            assert carried[0]["state"][:, :2].isfinite().all() and carried[0]["state"][1, 2].isnan()
            x, _ = capped(torch.where(mask, spoiled, 0), *scale_and_cap)
            torch.testing.assert_close(carried[0]["total"][:2], x.sum(1)[:2], rtol=2e-6, atol=2e-5)
            at, slope, grads = coefficients(inverse, carried[1]["state"], 1)
            arguments = (0, targets, inverse, *scale_and_cap, carried[1]["state"], at, slope, grads, None, words)
            ours, theirs = copy_of(tile), tile.clone()
            kernels.dlogits_tile(ours, *arguments, config=SMALL[1])
            torch.ops.fastpo.dlogits_tile(theirs, *arguments)
            torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=2e-5, equal_nan=True)
            assert torch.equal(surroundings(ours), surroundings(tile))
            assert (ours[~mask] == 0).all() and ours[:2].isfinite().all()

    def test_wrong_arguments(self):
        logits, _ = make(3, 40)
        targets, inverse = rows_of(3, 1, 40)
        for words in (torch.zeros(3, 2), torch.zeros(2, 2).int(), torch.zeros(3, 1).int(), torch.zeros(2, 3).int().t()):
            for op in (kernels.fold_tile, torch.ops.fastpo.fold_tile):
                with pytest.raises((ValueError, RuntimeError), match="allowed has the wrong dtype, size or strides"):
                    fold(functools.partial(_with_sets, op, words), [logits], targets, inverse)


def _with_sets(op: Any, words: Tensor, *args: Any) -> None:
    op(*args, words)


@contextlib.contextmanager
def interpreted(configs=LARGE) -> Iterator[Counter]:
    """The two ops on CPU tensors are the Triton kernels; counts how often each was called."""
    calls: Counter = Counter()
    functions = {
        "fold_tile": functools.partial(kernels.fold_tile, config=configs[0]),
        "dlogits_tile": functools.partial(kernels.dlogits_tile, config=configs[1]),
    }

    def counted(name):
        def call(*args):
            calls[name] += 1
            functions[name](*args)

        return call

    with in_place_of_cpu({name: counted(name) for name in functions}):
        yield calls


class TestDriver:
    """fastpo.linear_logprobs, forward and backward, over tiles in Triton."""

    @pytest.fixture(autouse=True)
    def triton(self) -> Iterator[Counter]:
        with interpreted() as calls:
            yield calls
        assert calls.total()

    @pytest.fixture
    def small_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Three columns of tiles for 150 tokens, two of rows for five."""
        cases.small_tiles(monkeypatch, 3, 1)

    @pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "logit_scale": 1.7, "softcap": 3.0}], ids=str)
    def test_products_with_wide_results(self, options, small_tiles, monkeypatch):
        """As on a GPU: bf16 operands, fp32 tiles, gradients in a buffer of their own. A CPU's products are widened."""

        def mm(a, b, *, out_dtype=None, out=None):
            return out.copy_(a.to(out_dtype or a.dtype) @ b.to(out_dtype or b.dtype))

        def addmm(c, a, b, *, out_dtype=None, out=None):
            return out.copy_(c + a.to(out_dtype or a.dtype) @ b.to(out_dtype or b.dtype))

        monkeypatch.setattr(_tiles, "multiplies_into_wide", lambda t: True)
        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(torch, "addmm", addmm)
        for budget in (0, 1 << 20):
            given = cases.make(5, vocab=150, ids=2, dtype=torch.bfloat16, bias=True, rank=2)
            cases.compare(given, memory_budget=budget, **options)
        given = cases.make(5, vocab=150, dtype=torch.bfloat16)
        ours, same = cases.TestFrozenHead().run(given, **options), cases.evaluate(given, stats=(), **options)
        assert torch.equal(ours["logprobs"], same["logprobs"])

    def test_the_kernels_run(self, triton):
        cases.evaluate(cases.make(3, vocab=40))
        assert triton["fold_tile"] == triton["dlogits_tile"] == 1

    @by_dtype
    @pytest.mark.parametrize("vocab", [1, 63, 1000])
    def test_vocabulary_sizes(self, dtype, vocab):
        cases.TestValues().test_vocabulary_sizes(dtype, vocab)

    @by_two_dtypes
    def test_several_ids(self, dtype):
        cases.TestValues().test_several_ids(dtype, 3)

    @by_two_dtypes
    @pytest.mark.parametrize("softcap", [2.0, 30.0])
    def test_scale_and_cap(self, dtype, softcap):
        cases.TestValues().test_scale_and_cap(dtype, softcap)

    @by_two_dtypes
    def test_temperature(self, dtype):
        cases.TestValues().test_temperature(dtype, 0.3)

    @pytest.mark.parametrize("stats", [(), ("log_sum_p2", "top1"), ("mean_logit",)])
    def test_statistics_asked_for(self, stats):
        cases.TestValues().test_statistics_asked_for(torch.bfloat16, stats)

    @by_two_dtypes
    @pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3}])
    def test_several_tiles(self, dtype, options, small_tiles, triton):
        cases.compare(cases.make(5, vocab=150, ids=2, dtype=dtype, bias=True), **options)
        assert triton["fold_tile"] == 6 and triton["dlogits_tile"] == 6

    def test_rows_left_out(self):
        cases.TestIgnored().test_rows_left_out(torch.bfloat16)

    @pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3}])
    def test_frozen_head(self, options, small_tiles, triton):
        """The tiles become exponentials in the forward, relative to a maximum that rises."""
        given = cases.make(5, vocab=150, ids=2, bias=True)
        ours = cases.TestFrozenHead().run(given, **options)
        assert triton["fold_tile"] == triton["dlogits_tile"] == 6
        same = cases.evaluate(given, "reference", ("logsumexp",), **options)
        wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        truth = cases.evaluate(wide, "reference", ("logsumexp",), **options)["d_hidden"]
        terms = 2 * cases.gradient_terms(given, ("logsumexp",), options)["d_hidden"].numpy()
        assert_within(ours["d_hidden"], truth, same["d_hidden"], name="d_hidden", terms=terms)

    def test_nan_stays_in_its_row(self):
        cases.TestBadInput().test_nan_stays_in_its_row()

    @by_two_dtypes
    def test_allowed(self, dtype, monkeypatch):
        cases.TestAllowed().test_one_set_for_all_rows(dtype, monkeypatch)
        cases.TestAllowed().test_frozen_head(dtype, cases.TestAllowed.OPTIONS[2], monkeypatch)


def test_the_cpu_ops_come_back():
    given = cases.make(3, vocab=40)
    with interpreted() as calls:
        fastpo.linear_logprobs(**given)
    fastpo.linear_logprobs(**given)
    assert calls.total() == 1
