"""Every method, by its public function: the compiled kernel against the reference, derivatives, compile, bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastpo import losses
from fastpo.reference.registry import formulas, objective
from tests.losses.methods import CASES, DETACHED, HYPER, Case, arguments, as_double, call, evaluate, policies
from tests.tolerance import assert_within

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
LAYOUTS = ("summed", "padded", "packed")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layouts(case: Case) -> tuple[str, ...]:
    return LAYOUTS[1:] if case.needs_tokens else LAYOUTS


def moved(case: Case, given: dict[str, Tensor], step: float) -> list[dict[str, Tensor]]:
    """The inputs with, one at a time, each number that is rounded on the way moved by `step` of its size."""
    out = []
    for side in case.row.sides:
        names = [f"{model}_{side}" if side else model for model in case.row.models]
        first = given[names[0]]
        for name in names[1:]:
            out.append({**given, name: given[name] - step * (first - given[name]).abs()})
        # all models together, which leaves the ratios alone
        out.append({**given, **{name: given[name] + step * first.abs() for name in names}})
    inputs = [i.name for i in case.row.inputs if not i.boolean]
    return out + [{**given, name: given[name] * (1 + step)} for name in inputs]


def sensitivities(case: Case, given: dict[str, Tensor], **more) -> dict[str, Tensor]:
    """By how many eps results move when every rounded number is off by one, in the worse direction; in fp64."""
    step = 2.0**-26
    truth = evaluate(case, given, "reference", **more)
    total = {name: torch.zeros_like(value) for name, value in truth.items()}
    for inputs in moved(case, given, step):
        other = evaluate(case, inputs, "reference", **more)
        for name in total:
            total[name] += (other[name] - truth[name]).abs() / step
    return total


def compare(case: Case, layout: str, rows: int, dtype: torch.dtype) -> None:
    """The native results and gradients by the accuracy rule."""
    given = arguments(case, layout, rows, 7, dtype, seed=3)
    truth = evaluate(case, as_double(given), "reference", reduction="none")
    ours, same = (evaluate(case, given, backend, reduction="none") for backend in ("native", "reference"))
    terms = sensitivities(case, as_double(given), reduction="none")
    steepest = max(value.abs().max().item() for name, value in truth.items() if name.startswith("grad"))
    for name, value in ours.items():
        assert value.dtype == same[name].dtype and value.shape == same[name].shape and value.isfinite().all()
        # a handful of operations, each rounded, on terms as large as the largest result; what cancels in one side's
        # slope, as in apo_down, is of the size of the other's
        size = terms[name] + 2 * (steepest if name.startswith("grad") else truth[name].abs().max().item())
        if dtype == torch.float64:
            # the truth is as rounded as the rest
            size = 3 * size
        assert_within(value, truth[name], same[name], name=f"{layout} {name}", terms=size.numpy())


@by_case
class TestKernel:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_equals_the_reference(self, case, dtype):
        for layout in layouts(case):
            # more than a block of the kernel, and a last one that fills no vector
            compare(case, layout, 259, dtype)

    def test_reductions(self, case):
        """Mean and sum of the losses, their gradients, and micro-batches."""
        given = arguments(case, "padded", 6, 5, torch.float64, seed=1)
        each = evaluate(case, given, reduction="none")["loss"]
        for backend in ("native", "reference"):
            mean, total, shared = (
                call(case, given, backend, **more).loss
                for more in ({}, {"reduction": "sum"}, {"num_items": torch.tensor(12)})
            )
            torch.testing.assert_close(mean, each.mean(), rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(total, each.sum(), rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(shared, each.sum() / 12, rtol=1e-14, atol=1e-14)

    def test_first_and_second_derivatives(self, case):
        """By differences; where a stop-gradient forbids them, the second derivative of the reference."""
        for layout in layouts(case):
            given = arguments(case, layout, 3, 3, torch.float64, seed=2)
            names = policies(case)
            leaves = [given[name].requires_grad_() for name in names]

            def loss(*values: Tensor) -> Tensor:
                return call(case, {**given, **dict(zip(names, values, strict=True))}, reduction="none").loss  # noqa: B023

            tight = {"rtol": 1e-6, "atol": 1e-8}
            if case.row.name not in DETACHED and case.taken.name != "tdpo2":
                assert torch.autograd.gradcheck(loss, leaves, **tight)
                assert torch.autograd.gradgradcheck(loss, leaves, **tight)
                continue
            weights = torch.linspace(-1, 1, 3, dtype=torch.float64)
            results = []
            for backend in ("native", "reference"):
                value = call(case, given, backend, reduction="none").loss
                grads = torch.autograd.grad(value, leaves, weights, create_graph=True, allow_unused=True)
                penalty = sum(g.square().sum() for g in grads if g is not None)
                again = torch.autograd.grad(penalty, leaves, allow_unused=True) if penalty.requires_grad else grads
                results.append([g.detach() for g in (*grads, *again) if g is not None])
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)

    def test_padding_has_no_influence(self, case):
        """Masked tokens may hold anything, in every tensor that is laid out as they are."""
        given = arguments(case, "padded", 5, 9, torch.float32, seed=4)
        dirty = dict(given)
        for place, side in enumerate(case.row.sides):
            mask = given[f"{side}_mask" if side else "mask"]
            names = [f"{model}_{side}" if side else model for model in case.row.models]
            names += [i.name for i in case.row.inputs if i.side == place and not i.boolean]
            for name in names:
                dirty[name] = given[name].masked_fill(~mask, math.nan)
        for backend in ("native", "reference"):
            clean, ours = (evaluate(case, g, backend, reduction="none") for g in (given, dirty))
            for name, value in ours.items():
                assert torch.equal(value, clean[name]), (backend, name)

    def test_a_sequence_without_tokens(self, case):
        given = arguments(case, "padded", 4, 5, torch.float32, seed=5)
        for side in case.row.sides:
            given[f"{side}_mask" if side else "mask"][1] = False
        for backend in ("native", "reference"):
            out = evaluate(case, given, backend, reduction="none")
            assert all(value.isfinite().all() for value in out.values())
            for name in policies(case):
                assert (out[f"grad of {name}"][1] == 0).all()

    def test_nothing_but_the_policy_has_a_gradient(self, case):
        given = arguments(case, layouts(case)[0], 4, 5, torch.float32, seed=6)
        leaves = {n: t.requires_grad_() if t.dtype.is_floating_point else t for n, t in given.items()}
        for backend in ("native", "reference"):
            call(case, leaves, backend).loss.backward()
            with_gradient = {name for name, t in leaves.items() if t.grad is not None}
            assert with_gradient == set(policies(case)) - ({"chosen_kl"} if case.taken.name == "tdpo2" else set())
            for t in leaves.values():
                t.grad = None

    def test_rows_are_read_in_place_or_gathered(self, case):
        """Whole vectors of adjacent fp32 numbers are read where they are, others by another path: the same bits."""
        if "summed" not in layouts(case):
            pytest.skip("takes tokens")
        given = arguments(case, "summed", 48, 7, torch.float32, seed=8)
        apart = {n: t if t.dim() == 0 else torch.stack([t, t], -1)[..., 0] for n, t in given.items()}
        found = []
        for tensors in (given, apart):
            leaves = {n: t.detach().requires_grad_(n in policies(case)) for n, t in tensors.items()}
            out = call(case, leaves, reduction="none")
            wanted = [leaves[n] for n in policies(case)]
            upstream = torch.linspace(-1.5, 2.0, 48)
            found.append([*out, *torch.autograd.grad(out.loss, wanted, upstream, allow_unused=True)])
        for ours, other in zip(*found, strict=True):
            assert (ours is None and other is None) or torch.equal(ours, other)

    def test_compiled_equals_eager(self, case):
        torch._dynamo.reset()
        given = arguments(case, layouts(case)[0], 5, 6, torch.float32, seed=7)
        names = policies(case)

        def step(*values: Tensor) -> Tensor:
            return call(case, {**given, **dict(zip(names, values, strict=True))}, "auto").loss * 2

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        results = []
        for function in (step, compiled):
            leaves = [given[name].detach().clone().requires_grad_() for name in names]
            value = function(*leaves)
            grads = torch.autograd.grad(value, leaves, allow_unused=True)
            results.append([value.detach(), *(g for g in grads if g is not None)])
        for eager, other in zip(*results, strict=True):
            assert torch.equal(eager, other)

    def test_hyper_parameters_outside_their_domain(self, case):
        given = arguments(case, layouts(case)[0], 2, 3, torch.float32)
        for name, domain in case.row.domains.items():
            outside = [math.nan, -math.inf, *[math.inf] * (not domain.infinite)]
            outside += [domain.low] * domain.low_open + [domain.high] * (domain.high_open and domain.high < math.inf)
            outside += [domain.low - 1] * math.isfinite(domain.low)
            for value in outside:
                with pytest.raises(ValueError, match=f"{name} must be in .* for {case.row.name}, got"):
                    call(case, given, **{name: value})
            with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
                call(case, given, **{name: "1"})

    def test_bad_inputs(self, case):
        for given_input in case.row.inputs:
            given = arguments(case, layouts(case)[0], 3, 4, torch.float32)
            name, value = given_input.name, given[given_input.name]
            bad = [("1", TypeError, f"{name} must be a torch.Tensor, got str"), (None, TypeError, name)]
            wrong = value.float() if given_input.boolean else value > 0
            bad.append((wrong, TypeError, f"{name} must have dtype"))
            bad.append((torch.ones(5, 7, dtype=value.dtype), ValueError, rf"{name} has shape \(5, 7\)"))
            bad.append((value.to("meta"), ValueError, f"{name} is on meta"))
            if not given_input.boolean and given_input.side is None:
                bad.append((torch.full_like(value, math.nan), ValueError, f"{name} must be in"))
                if math.isfinite(given_input.domain.low):
                    bad.append((torch.full_like(value, given_input.domain.low - 1), ValueError, f"{name} must be in"))
                if math.isfinite(given_input.domain.high):
                    bad.append((torch.full_like(value, given_input.domain.high + 1), ValueError, f"{name} must be in"))
            for wrong_value, error, message in bad:
                for backend in ("native", "reference"):
                    with pytest.raises(error, match=message):
                        call(case, {**given, name: wrong_value}, backend)

    def test_bad_options(self, case):
        given = arguments(case, layouts(case)[0], 2, 3, torch.float32)
        for name in case.row.options:
            with pytest.raises(ValueError, match=f"{name} must be one of .* for {case.row.name}, got 'other'"):
                call(case, given, **{name: "other"})


# not those that are sampled, cut or sorted: that is dpo or cdpo behind it
@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.needs_tokens and not c.row.name.startswith("aot")], ids=lambda case: case.id
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_rows(case, dtype):
    """Log-ratios of every size alone in their row, judged by themselves; NaN gives NaN."""
    values = (0.0, 1e-30, -1e-30, 1.0, 50.0, -50.0, 300.0, -300.0, 1e4, -1e4, math.nan)
    row = case.row
    sides = [f"{row.scores}_{side}" if side else row.scores for side in row.sides]
    grid = torch.tensor(list(itertools.product(values, repeat=len(sides)))).to(dtype)
    given = arguments(case, "summed", len(grid), 3, dtype)
    for name, column in zip(sides, grid.unbind(1), strict=True):
        others = [name.replace(row.scores, model) for model in row.models]
        # a log-prob itself is not above 0
        given |= {name: torch.zeros_like(column) for name in others}
        given[name] = column.clone() if row.reference_model else -column.abs()
    ours, same = (evaluate(case, given, backend, reduction="none") for backend in ("native", "reference"))
    known = grid.isfinite().all(1)
    eps = torch.finfo(dtype).eps
    for name, value in ours.items():
        # exponents of size z lose z eps, and none is above 300 where its exponential is not 0 or clamped
        torch.testing.assert_close(value[known], same[name][known], rtol=2000 * eps, atol=2000 * eps)
    assert ours["loss"][~known].isnan().all() and same["loss"][~known].isnan().all()


def test_every_formula_has_a_case():
    """Also those without a public function: another row's variant, or a hyper-parameter per pair."""
    reached = {case.taken.kernel for case in CASES} | {
        objective(r).kernel for c in CASES for r in c.row.per_row.values()
    }
    assert reached == {row.kernel for row in formulas()}


def test_every_hyper_parameter_has_a_value():
    assert {name for case in CASES for name in case.row.defaults} == set(HYPER)


class TestNumbersPerPair:
    def test_equals_one_number(self):
        case = next(case for case in CASES if case.row.name == "cdpo")
        given = arguments(case, "summed", 9, 1, torch.float64)
        each = torch.linspace(0.0, 0.49, 9, dtype=torch.float64)
        for backend in ("native", "reference"):
            ours = evaluate(case, given, backend, reduction="none")
            all_ = [
                evaluate(Case(case.row, {"label_smoothing": e}), given, backend, reduction="none")
                for e in each.tolist()
            ]
            together = evaluate(Case(case.row, {"label_smoothing": each}), given, backend, reduction="none")
            for name in ours:
                want = torch.stack([a[name][i] for i, a in enumerate(all_)])
                torch.testing.assert_close(together[name], want, rtol=1e-14, atol=1e-15)

    @pytest.mark.parametrize("backend", ["native", "reference"])
    def test_margins(self, backend):
        """bradley_terry with a margin for each pair: its own in every row, and no gradient through it."""
        case = next(case for case in CASES if case.row.name == "bradley_terry")
        given = arguments(case, "summed", 5, 1, torch.float64)
        margins = torch.linspace(0, 2, 5, dtype=torch.float64).requires_grad_()
        together = evaluate(Case(case.row, {"margin": margins}), given, backend, reduction="none")
        for i, margin in enumerate(margins.tolist()):
            alone = evaluate(Case(case.row, {"margin": margin}), given, backend, reduction="none")
            for name, value in alone.items():
                torch.testing.assert_close(together[name][i], value[i], rtol=1e-14, atol=1e-15)
        with pytest.raises(ValueError, match=r"margin must be in \[0, inf\) for bradley_terry, got -1"):
            losses.bradley_terry(torch.zeros(2), torch.zeros(2), margin=torch.tensor([0.5, -1.0]))

    def test_refused(self):
        x = torch.zeros(3)
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\) for cdpo, got 0.5"):
            losses.cdpo(x, x, x, x, label_smoothing=torch.tensor([0.1, 0.5, 0.2]))
        with pytest.raises(ValueError, match=r"label_smoothing has shape \(2,\), expected \(3,\)"):
            losses.cdpo(x, x, x, x, label_smoothing=torch.zeros(2))
        with pytest.raises(TypeError, match="label_smoothing must be a number, got Tensor"):
            losses.robust_dpo(x, x, x, x, label_smoothing=torch.zeros(3))


def test_composed_losses_compile():
    """They are made of functions that were built before."""
    tensors = [torch.randn(8, requires_grad=i < 2) for i in range(4)]

    def mixed(*given):
        return losses.mixture({"dpo": 1.0, "ipo": 0.5}, *given).loss

    torch.testing.assert_close(torch.compile(mixed, fullgraph=True)(*tensors), mixed(*tensors))
