"""objective: the compiled pairwise losses against the fp64 reference, which tests/losses checks itself.

Five formulas of log-ratios alone, in every dtype and layout; tests/losses/test_methods.py goes over all methods.
Multiples of 2^-10 have exact sums: with those, results must agree bit for bit whatever the layout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastpo
from fastpo import losses
from fastpo.kernels import _native
from fastpo.kernels.objective import PairwiseOutput
from fastpo.reference.pairwise import Side
from fastpo.reference.registry import Objective, formulas, objective
from fastpo.reference.sequence import sequence_sum
from tests.device import to_device
from tests.tolerance import assert_within

ROWS = [objective(name) for name in ("dpo", "cdpo", "robust_dpo", "ipo", "hinge")]
# a row and whether it is evaluated on per-token averages
CASES = [(row, False) for row in ROWS] + [(row, True) for row in ROWS if row.length_norm]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["native", "reference"]
# a scale at which z = beta h of the data below is of order 1, and no hyper-parameter is at a special value
HYPER = {"beta": 0.3, "label_smoothing": 0.15}

by_case = pytest.mark.parametrize(
    ("row", "length_norm"), CASES, ids=[row.name + "-length_norm" * norm for row, norm in CASES]
)
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

Pairs = tuple[Side, Side]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that share busy cores wait for each other, ten times longer; TestDeterminism takes two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hyper_parameters(row: Objective) -> dict[str, float]:
    return {name: HYPER.get(name, default) for name, default in row.defaults.items()}


def call(row: Objective, chosen: Side, rejected: Side, backend: str = "native", **options) -> PairwiseOutput:
    """The public function, whose arguments are the fields of the sides by name."""
    arguments = hyper_parameters(row) | options
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        layout = {"mask": side.mask, "cu_seqlens": side.cu_seqlens, "lengths": side.lengths}
        arguments |= {f"{name}_{key}": value for key, value in layout.items() if value is not None}
    if arguments.get("length_norm") is False:
        del arguments["length_norm"]
    policies, references = (chosen.policy, rejected.policy), (chosen.reference, rejected.reference)
    with fastpo.use_backend(backend):
        return getattr(losses, row.name)(*policies, *(references if row.reference_model else ()), **arguments)


def upstream(loss: Tensor) -> Tensor:
    """A fixed upstream gradient, not 1 and of both signs; made in fp32, so the same for every dtype."""
    return random(*loss.shape, seed=7).to(loss.dtype) if loss.dim() else torch.tensor(-1.75, dtype=loss.dtype)


def evaluate(row: Objective, pairs: Pairs, backend: str = "native", **options) -> dict[str, Tensor]:
    """Outputs, and the gradients with respect to both policies."""
    sides = [Side(*map(to_device, side)) for side in pairs]
    sides = [side._replace(policy=side.policy.detach().requires_grad_()) for side in sides]
    out = call(row, *sides, backend, **{key: to_device(value) for key, value in options.items()})
    grads = torch.autograd.grad(out.loss, [s.policy for s in sides], to_device(upstream(out.loss)))
    results = {
        "loss": out.loss.detach(),
        "chosen_rewards": out.chosen_rewards,
        "rejected_rewards": out.rejected_rewards,
        "chosen_grad": grads[0],
        "rejected_grad": grads[1],
    }
    return {name: value.cpu() for name, value in results.items()}


def as_double(side: Side) -> Side:
    reference = None if side.reference is None else side.reference.double()
    return side._replace(policy=side.policy.double(), reference=reference)


def summed(side: Side, dtype: torch.dtype) -> tuple[Side, Tensor]:
    """The side's log-probs as fp64 sums, and per row the size whose eps in `dtype` is their ratio's error.

    In fp64 the truth is as rounded as the rest: there the size is that of the tokens' magnitudes together.
    """
    side = as_double(side)
    policy, counts = sequence_sum(side.policy, side.mask, side.cu_seqlens)
    reference = torch.zeros_like(policy)
    size = sequence_sum(side.policy.abs(), side.mask, side.cu_seqlens)[0]
    if side.reference is not None:
        reference, _ = sequence_sum(side.reference, side.mask, side.cu_seqlens)
        size = size + sequence_sum(side.reference.abs(), side.mask, side.cu_seqlens)[0]
    if dtype != torch.float64:
        size = (policy - reference).abs()
    return Side(policy, reference, lengths=side.lengths if counts is None else counts), size


def sensitivities(row: Objective, pairs: Pairs, dtype: torch.dtype, length_norm: bool = False) -> dict[str, Tensor]:
    """By how many eps each pair's results move when both log-ratios are off by one, in the worse direction.

    The rounding of the log-ratios is the same for us and for torch, but each has its own luck with it. By
    differences, so that no formula needs to be known here.
    """
    (chosen, da), (rejected, db) = (summed(side, dtype) for side in pairs)
    if not length_norm:
        chosen, rejected = chosen._replace(lengths=None), rejected._replace(lengths=None)
    step = 2.0**-30
    moved = (
        chosen._replace(policy=chosen.policy + step * da),
        rejected._replace(policy=rejected.policy - step * db),
    )
    found = []
    for sides in ((chosen, rejected), moved):
        leaves = [s._replace(policy=s.policy.detach().requires_grad_()) for s in sides]
        loss = call(row, *leaves, backend="reference", reduction="none", length_norm=length_norm).loss
        slopes = torch.autograd.grad(loss.sum(), [s.policy for s in leaves])
        found.append((loss.detach(), *slopes))
    moves = [(x - y).abs() / step for x, y in zip(*found, strict=True)]
    beta = hyper_parameters(row)["beta"]
    names = ("loss", "chosen_grad", "rejected_grad", "chosen_rewards", "rejected_rewards")
    return dict(zip(names, (*moves, beta * da, beta * db), strict=True))


def compare(row: Objective, pairs: Pairs, **options) -> dict[str, Tensor]:
    """The native results, checked by the accuracy rule."""
    ours, same = (evaluate(row, pairs, backend, **options) for backend in BACKENDS)
    truth = evaluate(row, (as_double(pairs[0]), as_double(pairs[1])), "reference", **options)
    sensitive = sensitivities(row, pairs, same["loss"].dtype, options.get("length_norm", False))
    up = upstream(same["loss"]).double().abs()
    rows = len(same["chosen_rewards"])
    reduction = options.get("reduction", "mean")
    denominator = options.get("num_items", rows) if reduction == "mean" else 1
    in_double = same["loss"].dtype == torch.float64
    for name, value in ours.items():
        assert value.dtype == same[name].dtype and value.shape == same[name].shape, name
        assert not value.requires_grad
        terms, largest = sensitive[name], truth[name].abs().max() if value.numel() else 0.0
        if name == "loss":
            # terms of order 1 cancel inside a formula, as in (1 - e) log sigmoid(z) - e log sigmoid(-z)
            terms = terms + 1
            if reduction != "none":
                # the roundings of a sum of like terms walk randomly; only fp64 is summed in its own precision
                terms = terms.sum() / denominator * (math.sqrt(rows) if in_double else 1)
        elif name.endswith("_grad"):
            # a product of up to five rounded factors: 1 - e, 1 / (1 - 2e), beta, 1 / B and the upstream
            terms = terms * up / denominator + 2 * largest
        if in_double:
            # the truth has the error of torch's result, which therefore does not show
            terms = terms + 2 * largest
        assert_within(value, truth[name], same[name], name=name, terms=terms.max().item() if terms.numel() else 0.0)
    return ours


def boundaries_of(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)


def tokens_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Log-probs of a policy and of a reference near it."""
    reference = -2 * random(*shape, seed=seed).abs()
    return (reference + 0.4 * random(*shape, seed=seed + 1)).to(dtype), reference.to(dtype)


def make(layout: str, rows: int, tokens: int, dtype: torch.dtype, seed: int = 0, length_norm: bool = False) -> Side:
    """One side of random pairs in one of the layouts."""
    if layout == "summed":
        lengths = torch.randint(0, 30, (rows,), generator=torch.Generator().manual_seed(seed))
        reference = -20 + 5 * random(rows, seed=seed)
        policy = reference + 3 * random(rows, seed=seed + 1)
        # the index's dtype alternates, as both are allowed
        index = torch.int32 if seed % 2 else torch.int64
        given = lengths.to(index) if length_norm else None
        return Side(policy.to(dtype), reference.to(dtype), lengths=given)
    generator = torch.Generator().manual_seed(seed + 2)
    lengths = torch.randint(0, tokens + 1, (rows,), generator=generator)
    if rows > 2:
        lengths[rows // 2], lengths[-1] = 0, tokens
    if layout.startswith("padded"):
        mask = None
        if layout == "padded masked":
            # ragged ends, as in right padding, and holes, as in tool calls
            mask = (torch.arange(tokens) < lengths[:, None]) & (torch.rand(rows, tokens, generator=generator) < 0.8)
        return Side(*tokens_of((rows, tokens), dtype, seed), mask=mask)
    boundaries = boundaries_of(lengths)
    total = int(boundaries[-1])
    mask = torch.rand(total, generator=generator) < 0.7 if layout == "packed masked" else None
    return Side(*tokens_of((total,), dtype, seed), mask=mask, cu_seqlens=boundaries)


LAYOUTS = ["summed", "padded", "padded masked", "packed", "packed masked"]
SUMMED_ROWS = [1, 2, 63, 255, 256, 257, 4097]
TOKEN_SHAPES = [
    (1, 0),
    (1, 1),
    (2, 1),
    (2, 63),
    (63, 0),
    (63, 17),
    (255, 2),
    (256, 2),
    (257, 17),
    (4097, 1),
    (5, 1000),
]


@by_dtype
@by_case
class TestValues:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_sizes(self, row, length_norm, dtype, layout):
        shapes = [(rows, 1) for rows in SUMMED_ROWS] if layout == "summed" else TOKEN_SHAPES
        for i, (rows, tokens) in enumerate(shapes):
            # the sides differ in their number of tokens
            other = max(0, tokens - 1) if i % 2 else tokens + 3
            pairs = (
                make(layout, rows, tokens, dtype, 10, length_norm),
                make(layout, rows, other, dtype, 21, length_norm),
            )
            for reduction in ("mean", "sum", "none"):
                ours = compare(row, pairs, length_norm=length_norm, reduction=reduction)
                assert ours["loss"].isfinite().all() and ours["chosen_grad"].isfinite().all()

    def test_sides_with_layouts_of_their_own(self, row, length_norm, dtype):
        for one, two in itertools.permutations(LAYOUTS, 2):
            pairs = make(one, 9, 33, dtype, 4, length_norm), make(two, 9, 33, dtype, 15, length_norm)
            compare(row, pairs, length_norm=length_norm, reduction="none")

    def test_values_with_num_items(self, row, length_norm, dtype):
        pairs = make("padded masked", 7, 11, dtype, 1), make("packed", 7, 11, dtype, 2)
        compare(row, pairs, length_norm=length_norm, num_items=19)

    def test_no_tokens_at_all(self, row, length_norm, dtype):
        """Log-prob 0 and length 1: the loss at the reference, and nothing is NaN."""
        zero = torch.zeros(1, dtype=dtype)
        at_reference = call(row, Side(zero, zero), Side(zero, zero)).loss
        empty = torch.zeros(3, 0, dtype=dtype)
        masked = torch.full((3, 4), math.nan, dtype=dtype)
        for side in (
            Side(empty, empty),
            Side(masked, masked, torch.zeros(3, 4, dtype=torch.bool)),
            Side(empty[0], empty[0], cu_seqlens=torch.zeros(4, dtype=torch.int32)),
            Side(masked[0], masked[0], cu_seqlens=torch.zeros(4, dtype=torch.int32)),
        ):
            ours = evaluate(row, (side, side), length_norm=length_norm, reduction="none")
            assert (ours["loss"] == at_reference).all() and (ours["chosen_rewards"] == 0).all()
            assert (ours["chosen_grad"] == 0).all() and (ours["rejected_grad"] == 0).all()

    def test_empty_batch(self, row, length_norm, dtype):
        no_rows = torch.zeros(0, dtype=dtype)
        lengths = torch.zeros(0, dtype=torch.int64) if length_norm else None
        sides = [
            Side(no_rows, no_rows, lengths=lengths),
            Side(no_rows.view(0, 5), no_rows.view(0, 5)),
            Side(no_rows.view(0, 5), no_rows.view(0, 5), torch.zeros(0, 5, dtype=torch.bool)),
            Side(no_rows, no_rows, cu_seqlens=torch.zeros(1, dtype=torch.int32)),
            # tokens, but no sequence
            Side(
                no_rows.new_full((6,), math.nan),
                no_rows.new_zeros(6),
                cu_seqlens=torch.zeros(1, dtype=torch.int32),
            ),
        ]
        for backend, side in itertools.product(BACKENDS, sides):
            for options in ({"reduction": "sum"}, {"num_items": 4}, {"num_items": torch.tensor(4)}):
                ours = evaluate(row, (side, side), backend, length_norm=length_norm, **options)
                assert ours["loss"].shape == () and ours["loss"] == 0
                assert ours["chosen_rewards"].shape == (0,)
                assert ours["chosen_grad"].shape == side.policy.shape and (ours["chosen_grad"] == 0).all()
            none = evaluate(row, (side, side), backend, length_norm=length_norm, reduction="none")
            assert none["loss"].shape == (0,) and (none["rejected_grad"] == 0).all()
            with pytest.raises(ValueError, match=r"reduction='mean' of an empty batch.*num_items"):
                call(row, side, side, backend, length_norm=length_norm)


def strided(side: Side, name: str) -> Side:
    """The same numbers behind other strides."""

    def apply(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        fill = torch.tensor(True if t.dtype == torch.bool else math.nan).to(t.dtype)
        if name == "every other":
            base = fill.expand(*t.shape[:-1], 2 * t.shape[-1]).clone()
            base[..., ::2] = t
            return base[..., ::2]
        if name == "unaligned":
            base = fill.expand(t.numel() + 1).clone()
            base[1:] = t.flatten()
            return base[1:].view(t.shape)
        if name == "narrowed":
            base = fill.expand(*[n + 3 for n in t.shape]).clone()
            view = base[tuple(slice(1, 1 + n) for n in t.shape)]
            view.copy_(t)
            return view
        if name == "rows apart":
            base = fill.expand(3 * t.shape[0], *t.shape[1:]).clone()
            base[1::3] = t
            return base[1::3]
        assert name == "transposed"
        return t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], 1)[:, 1]

    return Side(*(apply(t) if t is not None and t.dtype != torch.int32 else t for t in side))


@by_dtype
@by_case
class TestStrides:
    @pytest.mark.parametrize("name", ["every other", "unaligned", "narrowed", "rows apart", "transposed"])
    def test_views(self, row, length_norm, dtype, name):
        for layout in LAYOUTS:
            pairs = (make(layout, 21, 35, dtype, 3, length_norm), make(layout, 21, 34, dtype, 8, length_norm))
            views = strided(pairs[0], name), strided(pairs[1], name)
            for reduction in ("mean", "none"):
                plain, ours = (evaluate(row, p, length_norm=length_norm, reduction=reduction) for p in (pairs, views))
                for key, value in ours.items():
                    assert torch.equal(value, plain[key]), (layout, key)

    def test_expanded(self, row, length_norm, dtype):
        lengths = torch.tensor([5]).expand(4) if length_norm else None
        one = random(1, seed=5).to(dtype).expand(4)
        row_of_tokens, column = tokens_of((1, 9), dtype, 3)[0].expand(4, 9), one[:, None].expand(4, 9)
        mask = (torch.arange(9) < 6).expand(4, 9)
        boundaries = torch.tensor([0, 3, 3, 20, 40], dtype=torch.int32)
        packed, packed_mask = one[:1].expand(40), torch.tensor([True]).expand(40)
        for side in (
            Side(one, one.neg(), lengths=lengths),
            Side(row_of_tokens, column),
            Side(column, row_of_tokens, mask),
            Side(packed, packed.neg(), packed_mask, boundaries),
        ):
            plain = Side(*(None if t is None else t.contiguous() for t in side))
            for a, b in zip(
                *(evaluate(row, (s, s), length_norm=length_norm, reduction="none").values() for s in (side, plain)),
                strict=True,
            ):
                assert torch.equal(a, b)

    def test_layouts_of_one_stream_may_differ(self, row, length_norm, dtype):
        """Policy, reference and mask each with strides of their own."""
        chosen, rejected = make("padded masked", 8, 20, dtype, 3), make("padded masked", 8, 20, dtype, 6)
        other = chosen._replace(
            policy=strided(chosen, "transposed").policy,
            reference=strided(chosen, "narrowed").reference,
            mask=strided(chosen, "every other").mask,
        )
        plain, ours = (evaluate(row, (c, rejected), length_norm=length_norm) for c in (chosen, other))
        for key, value in ours.items():
            assert torch.equal(value, plain[key]), key


@by_dtype
@by_case
class TestMasked:
    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, -6e4])
    def test_masked_tokens_have_no_influence(self, row, length_norm, dtype, poison):
        for layout in ("padded masked", "packed masked"):
            pairs = make(layout, 9, 70, dtype, 3), make(layout, 9, 41, dtype, 8)
            dirty = [
                s._replace(
                    policy=s.policy.masked_fill(~s.mask, poison),
                    reference=s.reference.masked_fill(~s.mask, -poison),
                )
                for s in pairs
            ]
            clean, ours = (evaluate(row, p, length_norm=length_norm, reduction="none") for p in (pairs, tuple(dirty)))
            for key, value in ours.items():
                assert torch.equal(value, clean[key]), (layout, key)
            for side, name in zip(pairs, ("chosen_grad", "rejected_grad"), strict=True):
                masked = ours[name][~side.mask]
                assert masked.numel() and (masked == 0).all() and (ours[name][side.mask] != 0).any()

    def test_tokens_behind_the_last_sequence(self, row, length_norm, dtype):
        for layout in ("packed", "packed masked"):
            pairs = make(layout, 6, 40, dtype, 3), make(layout, 6, 33, dtype, 8)
            longer = [
                s._replace(
                    policy=torch.cat([s.policy, s.policy.new_full((17,), math.nan)]),
                    reference=torch.cat([s.reference, s.reference.new_full((17,), math.inf)]),
                    mask=None if s.mask is None else torch.cat([s.mask, torch.ones(17, dtype=torch.bool)]),
                )
                for s in pairs
            ]
            plain, ours = (evaluate(row, p, length_norm=length_norm) for p in (pairs, tuple(longer)))
            for key, value in ours.items():
                end = plain[key].shape[0] if key.endswith("_grad") else None
                assert torch.equal(value[:end] if end is not None else value, plain[key]), key
                assert end is None or (value[end:] == 0).all()

    def test_bad_rows_stay_alone(self, row, length_norm, dtype):
        """A token that counts and is NaN spoils its own pair; a gradient of its neighbours stays bitwise."""
        for layout in ("padded", "packed"):
            pairs = make(layout, 9, 12, dtype, 3), make(layout, 9, 12, dtype, 8)
            bad = pairs[0].policy.clone()
            flat = bad if layout == "packed" else bad.view(-1)
            first = 8 * 12 if layout == "padded" else int(pairs[0].cu_seqlens[8])
            flat[first + 3] = math.nan
            clean, ours = (
                evaluate(row, (pairs[0]._replace(policy=p), pairs[1]), length_norm=length_norm, reduction="none")
                for p in (pairs[0].policy, bad)
            )
            assert ours["loss"][8].isnan() and ours["chosen_rewards"][8].isnan()
            assert torch.equal(ours["loss"][:8], clean["loss"][:8])
            assert torch.equal(ours["chosen_grad"].view(-1)[:first], clean["chosen_grad"].view(-1)[:first])


class TestExtremeRows:
    values = (0.0, 1e-30, -1e-30, 1.0, 50.0, -50.0, 1e4, -1e4, math.inf, -math.inf, math.nan)

    @by_dtype
    @by_row
    @pytest.mark.parametrize("layout", ["summed", "padded"])
    def test_as_in_torch(self, row, dtype, layout):
        """Every pair of extreme log-ratios, alone in its row, judged by itself and not by the largest."""
        pairs = torch.tensor(list(itertools.product(self.values, repeat=2))).to(dtype)
        chosen, rejected = (x.clone() if layout == "summed" else x[:, None].clone() for x in pairs.unbind(1))
        zero = torch.zeros_like(chosen)
        sides = Side(chosen, zero), Side(rejected, zero)
        ours, same = (evaluate(row, sides, backend, reduction="none") for backend in BACKENDS)
        truth = evaluate(row, (as_double(sides[0]), as_double(sides[1])), "reference", reduction="none")
        sensitive = sensitivities(row, sides, same["loss"].dtype)
        for name, value in ours.items():
            for i in range(len(pairs)):
                at = f"{name} of {pairs[i].tolist()}"
                if not truth[name][i].isfinite().all():
                    assert torch.equal(value[i].isnan(), same[name][i].isnan()), at
                    assert value[i].isnan().all() or torch.equal(value[i], same[name][i]), at
                    continue
                terms = sensitive[name][i].nan_to_num(0, 0, 0).item()
                assert_within(value[i], truth[name][i], same[name][i], name=at, terms=terms)

    @by_row
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_every_digit(self, row, dtype):
        """Along the margin, each loss and slope by itself: the smallest has as many digits as torch's."""
        margin = torch.cat([torch.linspace(-400, 400, 1601), torch.logspace(-12, 3, 200), -torch.logspace(-12, 3, 200)])
        margin = margin.to(dtype)
        zero = torch.zeros_like(margin)
        sides = Side(margin, zero), Side(zero, zero)
        ours, same = (evaluate(row, sides, backend, reduction="none") for backend in BACKENDS)
        truth = evaluate(row, (as_double(sides[0]), as_double(sides[1])), "reference", reduction="none")
        sensitive = sensitivities(row, sides, dtype)
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        for name in ("loss", "chosen_grad"):
            up = torch.ones(()) if name == "loss" else upstream(truth["loss"]).abs()
            size = torch.maximum(truth[name].abs(), sensitive[name] * up)
            if row.name not in ("dpo", "ipo"):
                # terms of order 1 that cancel: (1 - e) sigma(-z) and e sigma(z), or 1 and z
                size = size + (1.0 if name == "loss" else HYPER["beta"]) * up
            # an fp64 truth has torch's own error, which does not show in the first term
            slack = 4 if dtype == torch.float64 else 2
            allowed = (same[name].double() - truth[name]).abs() + slack * eps * size + tiny
            assert ((ours[name].double() - truth[name]).abs() <= allowed).all(), name

    @pytest.mark.parametrize("layout", ["padded", "packed"])
    def test_small_difference_of_large_sums(self, layout):
        """Thousands of tokens whose ratio to the reference is small: summed in double, rounded once."""
        rows, tokens, eps = 16, 4000, torch.finfo(torch.float32).eps
        reference = -1.5 - random(rows, tokens, seed=1).abs()
        policy = reference + 2e-3 * random(rows, tokens, seed=2)
        chosen = Side(policy, reference)
        if layout == "packed":
            boundaries = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32)
            chosen = Side(policy.view(-1), reference.view(-1), cu_seqlens=boundaries)
        pairs = chosen, Side(torch.zeros(rows), torch.zeros(rows))
        for row in ROWS:
            ours, same = (evaluate(row, pairs, backend, reduction="none") for backend in BACKENDS)
            truth = evaluate(row, (as_double(pairs[0]), as_double(pairs[1])), "reference", reduction="none")
            errors = {key: [(x[key].double() - truth[key]).abs() for x in (ours, same)] for key in truth}
            # the roundings of beta, of the log-ratio and of their product
            assert (errors["chosen_rewards"][0] <= 2 * eps * truth["chosen_rewards"].abs()).all()
            # torch's own sums are far from that, or this shows nothing
            assert errors["chosen_rewards"][1].max() > 100 * errors["chosen_rewards"][0].max()
            for key, (our_error, torch_error) in errors.items():
                assert our_error.max() <= torch_error.max() + 2 * eps * truth[key].abs().max(), (
                    row.name,
                    key,
                )

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_hinge_of_nan_as_in_torch(self, backend):
        """torch.relu lets the gradient through where its input is NaN."""
        margin = torch.tensor([math.nan], requires_grad=True)
        zero = torch.zeros(1)
        with fastpo.use_backend(backend):
            losses.hinge(margin, zero, zero, zero, beta=0.5).loss.backward()
        assert margin.grad.item() == -0.5


@pytest.mark.once
class TestAutograd:
    layouts = ("summed", "padded masked", "packed masked")

    @by_case
    @pytest.mark.parametrize("layout", layouts)
    def test_gradcheck(self, row, length_norm, layout):
        """First and second derivatives of the public function; a constant gradient would fail the second."""
        chosen, rejected = (make(layout, 3, 3, torch.float64, s, length_norm) for s in (3, 6))

        def function(one: Tensor, two: Tensor, reduction: str) -> Tensor:
            sides = chosen._replace(policy=one), rejected._replace(policy=two)
            return call(row, *sides, reduction=reduction, length_norm=length_norm).loss

        policies = [s.policy.requires_grad_() for s in (chosen, rejected)]
        for reduction in ("none", "mean"):
            # differences of fp64 at steps of 1e-6 are good to 1e-9; the default of 1e-3 would pass a planted error
            tight = {"rtol": 1e-6, "atol": 1e-8}
            assert torch.autograd.gradcheck(function, (*policies, reduction), **tight)
            assert torch.autograd.gradgradcheck(function, (*policies, reduction), **tight)

    @by_row
    @pytest.mark.parametrize("layout", layouts)
    def test_create_graph_through_a_network(self, row, layout):
        """A gradient penalty on the weights."""
        chosen, rejected = make(layout, 4, 5, torch.float64, 3), make(layout, 4, 6, torch.float64, 8)
        penalties = []
        for backend in BACKENDS:
            weight = torch.linspace(0.5, 1.5, 3, dtype=torch.float64).requires_grad_()
            sides = [
                s._replace(policy=(s.policy[..., None] * weight).tanh().sum(-1) * (2 + weight.sum()))
                for s in (chosen, rejected)
            ]
            loss = call(row, *sides, backend, reduction="sum").loss
            (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
            penalties += torch.autograd.grad((grad.square().sum() + loss.detach() * grad.sum()), weight)
        assert torch.allclose(*penalties, rtol=1e-11, atol=0) and penalties[0].abs().min() > 1e-6

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("create_graph", [False, True])
    def test_one_tensor_on_both_sides(self, backend, create_graph):
        """Chosen and rejected tokens in one tensor, told apart by masks: each gradient counts once."""
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(3, 8, generator=generator) < 0.5
        leaf = random(3, 8, seed=1).double().requires_grad_()
        reference = torch.zeros(3, 8, dtype=torch.float64)
        loss = call(objective("dpo"), Side(leaf, reference, mask), Side(leaf, reference, ~mask), backend).loss
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=create_graph)
        margin = torch.where(mask, leaf, -leaf).detach().sum(1, keepdim=True)
        beta = HYPER["beta"]
        expected = -beta * torch.sigmoid(-beta * margin) * torch.where(mask, 1.0, -1.0) / 3
        assert torch.allclose(grad, expected, rtol=1e-14)

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_one_side_computed_from_the_other(self, create_graph):
        """Both reach the leaf: the rejected one also through the chosen one, once."""
        grads = []
        for backend in BACKENDS:
            leaf = random(5, seed=1).double().requires_grad_()
            chosen = leaf * 2
            rejected = chosen.flip(0).tanh()
            zero = torch.zeros(5, dtype=torch.float64)
            loss = call(objective("dpo"), Side(chosen, zero), Side(rejected, zero), backend).loss
            grads += torch.autograd.grad(loss, leaf, create_graph=create_graph)
        assert torch.allclose(*grads, rtol=1e-13)

    @by_case
    @by_dtype
    def test_only_one_side_needs_a_gradient(self, row, length_norm, dtype):
        for layout, create_graph in itertools.product(LAYOUTS, (False, True)):
            pairs = make(layout, 5, 6, dtype, 3, length_norm), make(layout, 5, 6, dtype, 8, length_norm)
            both = evaluate(row, pairs, length_norm=length_norm)
            for i, name in enumerate(("chosen_grad", "rejected_grad")):
                sides = list(pairs)
                leaf = pairs[i].policy.detach().clone().requires_grad_()
                sides[i] = pairs[i]._replace(policy=leaf)
                loss = call(row, *sides, length_norm=length_norm).loss
                loss.backward(upstream(loss), create_graph=create_graph)
                assert not sides[1 - i].policy.requires_grad and sides[1 - i].policy.grad is None
                if create_graph:
                    # from the reference, so equal up to rounding
                    eps = torch.finfo(dtype).eps
                    assert torch.allclose(leaf.grad, both[name], rtol=4 * eps, atol=64 * eps * both[name].abs().max())
                else:
                    assert torch.equal(leaf.grad, both[name])

    @by_row
    def test_references_and_rewards_are_constants(self, row):
        for backend, layout in itertools.product(BACKENDS, LAYOUTS):
            sides = [
                s._replace(policy=s.policy.requires_grad_(), reference=s.reference.requires_grad_())
                for s in (make(layout, 4, 5, torch.float32, seed) for seed in (3, 8))
            ]
            out = call(row, *sides, backend)
            assert out.loss.requires_grad and not out.chosen_rewards.requires_grad
            assert not out.margins.requires_grad and not out.accuracies.requires_grad
            out.loss.backward()
            assert all(s.reference.grad is None and s.policy.grad is not None for s in sides)
            constant = [s._replace(policy=s.policy.detach()) for s in sides]
            assert not call(row, *constant, backend).loss.requires_grad

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_the_last_backward_leaves_earlier_gradients_alone(self, reduction):
        # it uses the memory of what the forward saved
        leaves = [torch.randn(6, requires_grad=True) for _ in range(2)]
        loss = losses.dpo(*leaves, torch.randn(6), torch.randn(6), reduction=reduction).loss
        w = torch.rand_like(loss)
        first = torch.autograd.grad(loss, leaves, w, retain_graph=True)
        kept = [g.clone() for g in first]
        last = torch.autograd.grad(loss, leaves, w)
        for f, k, g in zip(first, kept, last, strict=True):
            assert torch.equal(f, k)
            assert torch.equal(g, k)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, leaves, w)

    def test_a_batch_of_gradients(self):
        leaves = [torch.randn(6, requires_grad=True) for _ in range(2)]
        loss = losses.dpo(*leaves, torch.randn(6), torch.randn(6)).loss
        (one,) = torch.autograd.grad(loss, leaves[0], retain_graph=True)
        (batch,) = torch.autograd.grad(loss, leaves[0], torch.tensor([1.0, -2.0]), is_grads_batched=True)
        assert torch.equal(batch, torch.stack([one, -2 * one]))

    @by_case
    @by_dtype
    def test_second_backward(self, row, length_norm, dtype):
        """Saved tensors survive the first; scaling by a power of two is exact."""
        for layout in LAYOUTS:
            pairs = [
                s._replace(policy=s.policy.requires_grad_())
                for s in (make(layout, 5, 6, dtype, seed, length_norm) for seed in (3, 8))
            ]
            loss = call(row, *pairs, reduction="none", length_norm=length_norm).loss
            leaves = [s.policy for s in pairs]
            first = torch.autograd.grad(loss, leaves, upstream(loss), retain_graph=True)
            second = torch.autograd.grad(loss, leaves, -2 * upstream(loss))
            for a, b in zip(first, second, strict=True):
                # subnormal fp16 gradients lose bits: none are here
                assert torch.equal(-2 * a, b) and a.abs().max() > 0

    def test_upstream_of_any_layout(self):
        pairs = make("padded", 6, 4, torch.float32, 3), make("padded", 6, 4, torch.float32, 8)
        leaf = pairs[0].policy.requires_grad_()
        loss = call(objective("dpo"), *pairs, reduction="none").loss
        weights = random(6, 2, seed=4)[:, 1]
        grads = [torch.autograd.grad(loss, leaf, w, retain_graph=True)[0] for w in (weights, weights.contiguous())]
        assert torch.equal(*grads)
        ones = [
            torch.autograd.grad(loss, leaf, w, retain_graph=True)[0] for w in (torch.ones(1).expand(6), torch.ones(6))
        ]
        assert torch.equal(*ones)

    def test_inputs_are_not_touched(self):
        for layout in LAYOUTS:
            pairs = make(layout, 5, 6, torch.bfloat16, 3), make(layout, 5, 6, torch.bfloat16, 8)
            before = [None if t is None else t.clone() for s in pairs for t in s]
            evaluate(objective("dpo"), pairs)
            for old, new in zip(before, (t for s in pairs for t in s), strict=True):
                assert (old is None and new is None) or torch.equal(old, new)

    def test_changed_inputs_are_noticed(self):
        """A mask rewritten between forward and backward would spread a gradient over the wrong tokens."""
        chosen, rejected = (
            make("padded masked", 5, 6, torch.float32, 3),
            make("padded", 5, 6, torch.float32, 8),
        )
        loss = call(objective("dpo"), chosen._replace(policy=chosen.policy.requires_grad_()), rejected).loss
        chosen.mask.fill_(True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_mixed_dtypes(self):
        """A policy in bf16 with a reference in fp32, sides in two dtypes, and fp64 anywhere makes it fp64."""
        row = objective("dpo")
        for layout in LAYOUTS:
            one, two = make(layout, 9, 7, torch.float32, 3), make(layout, 9, 7, torch.float32, 8)
            low = one._replace(policy=one.policy.bfloat16()), two._replace(policy=two.policy.bfloat16())
            for pairs in (low, (low[0], two), (one._replace(policy=one.policy.half()), low[1])):
                ours = compare(row, pairs, reduction="none")
                assert ours["loss"].dtype == torch.float32
                assert ours["chosen_grad"].dtype == pairs[0].policy.dtype
                assert ours["rejected_grad"].dtype == pairs[1].policy.dtype
            wide = (
                one._replace(reference=one.reference.double()),
                two._replace(reference=two.reference.double()),
            )
            ours, truth = evaluate(row, wide), evaluate(row, (as_double(one), as_double(two)))
            assert ours["loss"].dtype == torch.float64 and ours["chosen_grad"].dtype == torch.float32
            assert torch.allclose(ours["loss"], truth["loss"], rtol=1e-14)
            assert torch.equal(ours["chosen_grad"], truth["chosen_grad"].float())


class TestNumItems:
    @by_case
    @by_dtype
    @pytest.mark.parametrize("as_tensor", [False, True])
    def test_micro_batches_add_up(self, row, length_norm, dtype, as_tensor):
        """Micro-batches of unequal size, one of them empty, have the gradients of the big batch's mean."""
        rows, cuts = 11, (0, 4, 4, 5, 11)
        for backend, layout in itertools.product(BACKENDS, ("summed", "padded masked")):
            pairs = make(layout, rows, 6, dtype, 3, length_norm), make(layout, rows, 6, dtype, 8, length_norm)
            whole = evaluate(row, pairs, backend, length_norm=length_norm)
            total = torch.zeros((), dtype=whole["loss"].dtype)
            # counts come as integers
            num_items = torch.tensor(rows) if as_tensor else rows
            for first, end in itertools.pairwise(cuts):
                part = tuple(Side(*(None if t is None else t[first:end] for t in side)) for side in pairs)
                out = evaluate(row, part, backend, length_norm=length_norm, num_items=num_items)
                total += out["loss"]
                assert out["loss"].dtype == whole["loss"].dtype and out["loss"].shape == ()
                for name in ("chosen_grad", "rejected_grad"):
                    # one more rounding where the division comes after the sum
                    expected = whole[name][first:end]
                    assert torch.allclose(out[name], expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
            eps = torch.finfo(total.dtype).eps
            assert torch.allclose(total, whole["loss"], rtol=rows * eps)

    def test_tensor_keeps_the_dtype_of_the_loss(self):
        """A count in fp64 would otherwise turn an fp32 loss into fp64."""
        zero = torch.zeros(2)
        for backend, dtype in itertools.product(BACKENDS, (torch.int64, torch.float32, torch.float64)):
            side = Side(zero, zero)
            loss = call(objective("dpo"), side, side, backend, num_items=torch.tensor(4, dtype=dtype)).loss
            assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(2) / 2, rel=1e-6)


class TestDeterminism:
    @by_dtype
    @pytest.mark.parametrize(
        ("layout", "rows", "tokens"),
        [("summed", 70_001, 1), ("padded masked", 600, 400), ("packed", 700, 300)],
    )
    def test_repeats_and_threads(self, dtype, layout, rows, tokens):
        """Large enough that two threads share the forward and the backward."""
        row = objective("ipo")
        pairs = make(layout, rows, tokens, dtype, 3), make(layout, rows, tokens, dtype, 8)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 1, 2, 2):
                torch.set_num_threads(threads)
                results.append(evaluate(row, pairs))
        finally:
            torch.set_num_threads(before)
        for other in [*results[1:], compare(row, pairs)]:
            for key, value in other.items():
                assert torch.equal(value, results[0][key]), key

    @by_case
    def test_rows_do_not_depend_on_their_neighbours(self, row, length_norm):
        for layout in ("summed", "padded masked"):
            pairs = (
                make(layout, 300, 19, torch.float32, 3, length_norm),
                make(layout, 300, 19, torch.float32, 8, length_norm),
            )
            whole = evaluate(row, pairs, length_norm=length_norm, reduction="none")
            for first, end in ((0, 1), (255, 257), (123, 130), (299, 300)):
                part = tuple(Side(*(None if t is None else t[first:end] for t in side)) for side in pairs)
                out = call(row, *part, length_norm=length_norm, reduction="none")
                assert torch.equal(out.loss, whole["loss"][first:end])
                assert torch.equal(out.chosen_rewards, whole["chosen_rewards"][first:end])


# multiples of 2^-10 below 2^6: sums of hundreds of them are exact in fp32
exact_number = st.integers(-(2**16), 2**16).map(lambda k: k / 1024)
once = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.once
class TestProperties:
    @once
    @given(
        st.lists(st.tuples(*[exact_number] * 5), min_size=1, max_size=40),
        st.sampled_from([torch.float32, torch.float64]),
    )
    def test_a_common_shift_cancels(self, rows, dtype):
        """Adding a constant to policy and reference of a side changes nothing, bit for bit."""
        a, b, c, d, shift = torch.tensor(rows, dtype=dtype).unbind(1)
        for row in ROWS:
            plain = evaluate(row, (Side(a, c), Side(b, d)), reduction="none")
            moved = evaluate(row, (Side(a + shift, c + shift), Side(b, d)), reduction="none")
            for key, value in moved.items():
                assert torch.equal(value, plain[key]), (row.name, key)

    @once
    @given(st.lists(st.tuples(*[exact_number] * 4), min_size=1, max_size=40), st.randoms(use_true_random=False))
    def test_permuting_the_rows(self, rows, generator):
        order = list(range(len(rows)))
        generator.shuffle(order)
        a, b, c, d = torch.tensor(rows).unbind(1)
        for row in ROWS:
            plain = call(row, Side(a, c), Side(b, d), reduction="none")
            permuted = call(row, Side(a[order], c[order]), Side(b[order], d[order]), reduction="none")
            for x, y in zip(plain, permuted, strict=True):
                assert torch.equal(x[order], y)

    @once
    @given(st.lists(st.tuples(*[exact_number] * 4), min_size=1, max_size=40))
    def test_swapping_the_sides(self, rows):
        """Rewards change places, margins their sign; a tie is no win for either."""
        a, b, c, d = torch.tensor(rows).unbind(1)
        for row in ROWS:
            one, two = call(row, Side(a, c), Side(b, d)), call(row, Side(b, d), Side(a, c))
            assert torch.equal(one.chosen_rewards, two.rejected_rewards)
            assert torch.equal(one.rejected_rewards, two.chosen_rewards)
            assert torch.equal(one.margins, -two.margins)
            assert torch.equal(one.accuracies + two.accuracies, (one.margins != 0).float())

    @once
    @given(
        st.lists(st.lists(st.tuples(exact_number, exact_number), max_size=40), min_size=1, max_size=12),
        st.booleans(),
    )
    def test_layouts_agree(self, sequences, as_half):
        """The same tokens summed, padded with NaN on either side, or packed: the same bits."""
        lengths = torch.tensor([len(s) for s in sequences])
        tokens, rows = int(lengths.max()) + 1, len(sequences)
        flat = torch.tensor([x for s in sequences for x in s]).view(-1, 2)
        if as_half:
            # 11 bits are what is exact in fp16
            flat = (flat * 16).round() / 16
        dtype = torch.float16 if as_half else torch.float32
        policy, reference = flat.to(dtype).unbind(1)
        boundaries = boundaries_of(lengths)
        starts = boundaries[:-1].tolist()
        sides = {"packed": Side(policy, reference, cu_seqlens=boundaries)}
        valid = torch.arange(tokens) < lengths[:, None]
        for name, mask in (("right", valid), ("left", valid.flip(1))):
            padded = [
                torch.full((rows, tokens), math.nan, dtype=dtype).masked_scatter(mask, x) for x in (policy, reference)
            ]
            sides[name] = Side(*padded, mask=mask)
        sums = [
            torch.stack([x[s : s + n].float().sum() for s, n in zip(starts, lengths.tolist(), strict=True)])
            for x in (policy, reference)
        ]
        sides["summed"] = Side(*sums, lengths=lengths)
        other = Side(torch.zeros(rows), torch.full((rows,), 0.5), lengths=torch.arange(rows))
        for row, length_norm in CASES:
            results = {}
            for name, side in sides.items():
                if not length_norm:
                    side = side._replace(lengths=None)
                given_other = other if length_norm else other._replace(lengths=None)
                results[name] = evaluate(row, (side, given_other), length_norm=length_norm, reduction="none")
            per_row = results["summed"]["chosen_grad"].to(dtype)
            for name, side in sides.items():
                for key in ("loss", "chosen_rewards", "rejected_rewards", "rejected_grad"):
                    assert torch.equal(results[name][key], results["summed"][key]), (row.name, name, key)
                if name == "packed":
                    assert torch.equal(results[name]["chosen_grad"], per_row.repeat_interleave(lengths))
                elif name != "summed":
                    assert torch.equal(results[name]["chosen_grad"], torch.where(side.mask, per_row[:, None], 0))


def step_of(row: Objective, pairs: Pairs, **options) -> Callable[..., tuple[Tensor, ...]]:
    """A training step's part as a user would compile it: something before the loss, something behind it."""
    function, hyper = getattr(losses, row.name), hyper_parameters(row)

    def step(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
        out = function(
            chosen * 1.5,
            rejected * 0.5,
            pairs[0].reference,
            pairs[1].reference,
            chosen_mask=pairs[0].mask,
            rejected_mask=pairs[1].mask,
            chosen_cu_seqlens=pairs[0].cu_seqlens,
            rejected_cu_seqlens=pairs[1].cu_seqlens,
            **hyper,
            **options,
        )
        return out.loss * 2, out.chosen_rewards, out.rejected_rewards, out.accuracies

    return step


def results_of(step: Callable[..., tuple[Tensor, ...]], pairs: Pairs) -> list[Tensor]:
    leaves = [s.policy.detach().clone().requires_grad_() for s in pairs]
    loss, *metrics = step(*leaves)
    return [loss.detach(), *metrics, *torch.autograd.grad(loss, leaves, upstream(loss))]


@pytest.mark.once
class TestOps:
    def setup_method(self):
        # what one test compiled would count against the next one's limit of recompilations
        torch._dynamo.reset()

    def test_every_row_is_compiled(self):
        """A row without a formula in C++ works too, but then this file compares the reference with itself."""
        assert {row.kernel for row in formulas("pairwise")} == set(_native.CPU.formulas)
        others = {row.kernel for kind in ("unpaired", "policy") for row in formulas(kind)}
        assert others == set(_native.CPU.unpaired_formulas)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_opcheck(self, layout, dtype):
        length_norm = layout == "summed"
        sides = make(layout, 3, 5, dtype, 3, length_norm), make(layout, 3, 6, dtype, 8, length_norm)
        policies, references = [s.policy for s in sides], [s.reference for s in sides]
        masks, cu_seqlens = [s.mask for s in sides], [s.cu_seqlens for s in sides]
        lengths, hyper = [s.lengths for s in sides], [0.3] * len(_native.CPU.hyper_parameters)
        op = torch.ops.fastpo.objective.default
        for reduce, streams in itertools.product((False, True), (policies + references, policies)):
            arguments = (
                _native.CPU.formulas["ipo"],
                streams,
                masks,
                cu_seqlens,
                lengths,
                [],
                hyper,
                int(length_norm),
                reduce,
                3.0,
            )
            torch.library.opcheck(op, arguments)
        loss, slopes, _ = op(*arguments)
        for needed in (0, 1, 2, 3):
            backward = torch.ones_like(loss), slopes, policies, masks, cu_seqlens, needed
            torch.library.opcheck(torch.ops.fastpo.objective_backward.default, backward)

    @by_row
    def test_compiled_equals_eager(self, row):
        """In one graph, and bit for bit, as aot_eager runs the same kernels."""
        for layouts, dtype, reduction in (
            (("padded masked", "padded"), torch.float32, "mean"),
            (("summed", "summed"), torch.float32, "none"),
            (("packed", "packed masked"), torch.bfloat16, "sum"),
        ):
            pairs = make(layouts[0], 4, 6, dtype, 3), make(layouts[1], 4, 5, dtype, 8)
            step = step_of(row, pairs, reduction=reduction)
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
            for eager, other in zip(results_of(step, pairs), results_of(compiled, pairs), strict=True):
                assert torch.equal(eager, other), layouts

    def test_compiled_with_length_norm_and_num_items(self):
        pairs = make("padded masked", 4, 6, torch.float32, 3), make("padded masked", 4, 5, torch.float32, 8)
        step = step_of(objective("ipo"), pairs, length_norm=True, num_items=torch.tensor(9))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for eager, other in zip(results_of(step, pairs), results_of(compiled, pairs), strict=True):
            assert torch.equal(eager, other)

    def test_inductor_equals_eager(self):
        pairs = make("padded masked", 9, 33, torch.float32, 3), make("padded masked", 9, 30, torch.float32, 8)
        step = step_of(objective("dpo"), pairs)
        compiled = torch.compile(step, fullgraph=True)
        for eager, other in zip(results_of(step, pairs), results_of(compiled, pairs), strict=True):
            # the products around the op may be fused
            assert torch.allclose(eager, other, rtol=4 * torch.finfo(torch.float32).eps, atol=0)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_dynamic_shapes(self, reduction):
        """One graph serves batches of every size: the last batch of an epoch is not compiled anew."""

        def step(chosen: Tensor, rejected: Tensor, mask: Tensor, other_mask: Tensor) -> Tensor:
            references = torch.zeros_like(chosen), torch.zeros_like(rejected)
            masks = {"chosen_mask": mask, "rejected_mask": other_mask}
            return losses.dpo(chosen, rejected, *references, **masks, reduction=reduction).loss

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
        counts = set()
        for rows, tokens in ((3, 5), (4, 7), (19, 2)):
            chosen, rejected = (make("padded masked", rows, tokens + i, torch.float32, i) for i in (0, 2))
            found = []
            for function in (step, compiled):
                leaf = chosen.policy.clone().requires_grad_()
                loss = function(leaf, rejected.policy, chosen.mask, rejected.mask)
                found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
            for eager, other in zip(*found, strict=True):
                assert torch.equal(eager, other)
            counts.add(counter.frame_count)
        assert len(counts) == 1


class Wrong:
    """Bad arguments of a pairwise loss, as (changed arguments, error, message)."""

    two = torch.zeros(2)
    tokens = torch.zeros(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    floats = "must have dtype float32, float64, bfloat16, float16, got"

    @classmethod
    def of_side(cls, side: str) -> list[tuple[dict, type[Exception], str]]:
        policy, reference, mask = f"policy_{side}", f"reference_{side}", f"{side}_mask"
        cu_seqlens, lengths = f"{side}_cu_seqlens", f"{side}_lengths"
        padded = {policy: cls.tokens, reference: cls.tokens}
        packed = {policy: torch.zeros(6), reference: torch.zeros(6), cu_seqlens: cls.cu_seqlens}
        count = torch.ones(2, dtype=torch.int64)
        averaged = {"length_norm": True, "chosen_lengths": count, "rejected_lengths": count}
        wrong_type = [
            ({policy: [0.0, 0.0]}, f"{policy} must be a torch.Tensor, got list"),
            ({policy: None}, f"{policy} must be a torch.Tensor, got NoneType"),
            ({policy: cls.two.long()}, f"{policy} {cls.floats} int64"),
            (
                {policy: cls.tokens.to_sparse()},
                f"{policy} must be a strided tensor, got layout torch.sparse_coo",
            ),
            ({reference: 0.0}, f"{reference} must be a torch.Tensor, got float"),
            ({reference: None}, f"{reference} must be a torch.Tensor, got NoneType"),
            ({reference: cls.two.bool()}, f"{reference} {cls.floats} bool"),
            ({**padded, mask: [[True]]}, f"{mask} must be a torch.Tensor, got list"),
            ({**padded, mask: cls.mask.long()}, f"{mask} must have dtype bool, got int64"),
            ({**packed, cu_seqlens: [0, 2, 6]}, f"{cu_seqlens} must be a torch.Tensor, got list"),
            ({**packed, cu_seqlens: cls.cu_seqlens.long()}, f"{cu_seqlens} must have dtype int32, got int64"),
            ({**averaged, lengths: [1, 1]}, f"{lengths} must be a torch.Tensor, got list"),
            ({**averaged, lengths: cls.two}, f"{lengths} must have dtype int64, int32, got float32"),
        ]
        wrong_value = [
            ({policy: torch.tensor(0.0)}, rf"{policy} has shape \(\), expected \(B,\) or \(B, T\)"),
            ({policy: torch.zeros(2, 3, 4)}, rf"{policy} has shape \(2, 3, 4\), expected \(B,\) or \(B, T\)"),
            (
                {**packed, policy: cls.tokens},
                rf"{policy} has shape \(2, 3\), expected \(N,\) with {cu_seqlens}",
            ),
            (
                {**packed, cu_seqlens: cls.cu_seqlens[:0]},
                rf"{cu_seqlens} has shape \(0,\), expected \(B \+ 1,\)",
            ),
            (
                {**packed, cu_seqlens: cls.cu_seqlens[None]},
                rf"{cu_seqlens} has shape \(1, 3\), expected \(B \+ 1,\)",
            ),
            ({**packed, cu_seqlens: cls.cu_seqlens.to("meta")}, f"{cu_seqlens} is on meta, {policy} on cpu"),
            ({reference: cls.two[:1]}, rf"{reference} has shape \(1,\), expected \(2,\)"),
            ({reference: cls.tokens}, rf"{reference} has shape \(2, 3\), expected \(2,\)"),
            ({reference: cls.two.to("meta")}, f"{reference} is on meta, {policy} on cpu"),
            (
                {mask: cls.mask[:, 0]},
                rf"{mask} is for token log-probs, but {policy} is \(B,\), summed already",
            ),
            ({**padded, mask: cls.mask.t()}, rf"{mask} has shape \(3, 2\), expected \(2, 3\)"),
            ({**packed, mask: cls.mask}, rf"{mask} has shape \(2, 3\), expected \(6,\)"),
            ({**padded, mask: cls.mask.to("meta")}, f"{mask} is on meta, {policy} on cpu"),
            ({**averaged, lengths: None}, rf"length_norm=True with summed \(B,\) log-probs needs {lengths}"),
            ({lengths: count}, f"{lengths} is only for length_norm=True"),
            ({**averaged, **padded}, f"{lengths} is only for length_norm=True with summed"),
            ({**averaged, **packed}, f"{lengths} is only for length_norm=True with summed"),
            ({**averaged, lengths: count[:1]}, rf"{lengths} has shape \(1,\), expected \(2,\)"),
            ({**averaged, lengths: count.to("meta")}, f"{lengths} is on meta, {policy} on cpu"),
        ]
        for bad in ([1, 2, 6], [0, 3, 2], [0, 2, 7], [0, 7, 6], [-1, 2, 6], [0, -1, 6]):
            boundaries = {**packed, cu_seqlens: torch.tensor(bad, dtype=torch.int32)}
            wrong_value.append((boundaries, "cu_seqlens must rise from 0 to at most 6, the number of tokens"))
        return [(given, TypeError, message) for given, message in wrong_type] + [
            (given, ValueError, message) for given, message in wrong_value
        ]

    @classmethod
    def of_both(cls) -> list[tuple[dict, type[Exception], str]]:
        three = torch.zeros(3)
        rejected = {"policy_rejected": three, "reference_rejected": three}
        return [
            (rejected, ValueError, "policy_rejected has 3 rows, policy_chosen has 2"),
            (
                {**rejected, "policy_rejected": three.to("meta")},
                ValueError,
                "policy_rejected is on meta, policy_chosen on",
            ),
            ({"reduction": "average"}, ValueError, "reduction must be one of mean, sum, none; got 'average'"),
            ({"reduction": None}, ValueError, "reduction must be one of mean, sum, none; got None"),
            (
                {"num_items": 2, "reduction": "sum"},
                ValueError,
                "num_items is the denominator of reduction='mean'",
            ),
            (
                {"num_items": 2, "reduction": "none"},
                ValueError,
                "num_items is the denominator of reduction='mean'",
            ),
            (
                {"num_items": torch.tensor([2])},
                ValueError,
                r"num_items must be .* 0-dimensional, got shape \(1,\)",
            ),
            ({"num_items": 0}, ValueError, "num_items must be positive and finite, got 0"),
            ({"num_items": -2.5}, ValueError, "num_items must be positive and finite, got -2.5"),
            ({"num_items": math.nan}, ValueError, "num_items must be .*, got nan"),
            ({"num_items": math.inf}, ValueError, "num_items must be .*, got inf"),
            ({"num_items": "2"}, TypeError, "num_items must be a number, got str"),
            ({"num_items": True}, TypeError, "num_items must be a number, got bool"),
            ({"num_items": torch.tensor(2j)}, TypeError, "num_items"),
            (
                {"num_items": torch.tensor(2).to("meta")},
                ValueError,
                "num_items is on meta, policy_chosen on cpu",
            ),
        ]


@pytest.mark.once
class TestBadInput:
    @staticmethod
    def refused(name: str, given: dict, error: type[Exception], message: str) -> None:
        sides = [f"{model}_{side}" for model in ("policy", "reference") for side in ("chosen", "rejected")]
        for backend in BACKENDS:
            with fastpo.use_backend(backend), pytest.raises(error, match=message):
                getattr(losses, name)(**{key: torch.zeros(2) for key in sides} | given)

    # ipo takes every argument there is
    @pytest.mark.parametrize(
        ("given_arguments", "error", "message"),
        [*Wrong.of_side("chosen"), *Wrong.of_side("rejected"), *Wrong.of_both()],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_messages(self, given_arguments, error, message):
        self.refused("ipo", given_arguments, error, message)

    @by_row
    def test_hyper_parameters(self, row):
        for name, domain in row.domains.items():
            outside = [-1.0, math.nan, math.inf, -math.inf]
            outside += [domain.low] * domain.low_open + [domain.high] * domain.high_open
            for value in outside:
                assert value not in domain
                self.refused(
                    row.name,
                    {name: value},
                    ValueError,
                    rf"{name} must be in .*{domain.high:g}.* for {row.name}, got",
                )
            for value, kind in (
                ("0.1", "str"),
                (None, "NoneType"),
                (True, "bool"),
                *[(torch.tensor(0.1), "Tensor")] * (name not in row.per_row),
            ):
                self.refused(row.name, {name: value}, TypeError, f"{name} must be a number, got {kind}")

    @by_row
    def test_unknown_arguments(self, row):
        self.refused(row.name, {"gamma": 0.1}, TypeError, "unexpected keyword argument 'gamma'")
        if not row.length_norm:
            self.refused(row.name, {"length_norm": True}, TypeError, "unexpected keyword argument 'length_norm'")

    def test_limits_of_the_domains_are_taken(self):
        zero = torch.zeros(2)
        assert (
            losses.cdpo(zero, zero, zero, zero, beta=1, label_smoothing=0).loss
            == losses.dpo(zero, zero, zero, zero).loss
        )

    def test_backend(self):
        with (
            pytest.raises(ValueError, match="backend must be 'auto', 'native' or 'reference', got 'cuda'"),
            fastpo.use_backend("cuda"),
        ):
            pass
        meta = torch.zeros(2, device="meta")
        assert losses.dpo(meta, meta, meta, meta).loss.device.type == "meta"
        with (
            pytest.raises(RuntimeError, match="no compiled kernel for device type 'meta'"),
            fastpo.use_backend("native"),
        ):
            losses.dpo(meta, meta, meta, meta)
        # the block above left nothing behind
        assert losses.dpo(meta, meta, meta, meta).loss.shape == ()

    def test_op_refuses_what_the_public_function_never_passes(self):
        """The compiled op reads raw memory: it checks what it would read past."""
        two = torch.zeros(2)
        nothing: list[Tensor | None] = [None, None]
        hyper = [0.1] * len(_native.CPU.hyper_parameters)
        good = (0, [two, two, two, two], nothing, nothing, nothing, [], hyper, 0, True, 2.0)
        op = torch.ops.fastpo.objective
        for place, bad, message in (
            (0, len(_native.CPU.formulas), "there is no formula"),
            (0, -1, "there is no formula"),
            (1, [two, two, two], "one to 3 streams per side"),
            (1, [two] * 8, "one to 3 streams per side"),
            (1, [two, two, two, torch.zeros(3)], "differ in"),
            (1, [two, torch.zeros(3), two, two], "differ in"),
            (2, [None], "one or two sides"),
            (5, [two.repeat(2)[:3]], "a column has the wrong size"),
            (5, [two] * 5, "at most 4 columns"),
            (2, [torch.ones(1, dtype=torch.bool), None], "mask has the wrong size"),
            (6, hyper[:-1], "wrong number of hyper-parameters"),
            (1, [two.long(), two, two, two], "floating point"),
        ):
            arguments = [*good]
            arguments[place] = bad
            with pytest.raises(RuntimeError, match=message):
                op(*arguments)
