"""The torch reference of the pairwise objectives against closed forms, identities and theorems.

The closed forms are the catalogue's, evaluated by mpmath in 60 digits: torch is not compared with itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, replace

import mpmath as mp
import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.reference.pairwise import Pair, Side, pairwise_objective
from fastpo.reference.registry import POSITIVE, Domain, Objective, objective, objectives, register
from fastpo.reference.sequence import sequence_sum

EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny
ROWS = [objective(name) for name in ("dpo", "cdpo", "robust_dpo", "ipo", "hinge")]
BACKENDS = ["native", "reference"]
mp.mp.dps = 60

by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def log_sigmoid(z: mp.mpf) -> mp.mpf:
    return min(z, mp.mpf(0)) - mp.log1p(mp.exp(-abs(z)))


def sigmoid(z: mp.mpf) -> mp.mpf:
    return 1 / (1 + mp.exp(-z))


Terms = list[mp.mpf]
# (terms of the loss, terms of dloss/dh) at the margin h: rounding scales with the terms, not with their sum
ClosedForm = Callable[..., tuple[Terms, Terms]]


def dpo(h: mp.mpf, beta: mp.mpf) -> tuple[Terms, Terms]:
    z = beta * h
    return [-log_sigmoid(z)], [-beta * sigmoid(-z)]


def cdpo(h: mp.mpf, beta: mp.mpf, label_smoothing: mp.mpf) -> tuple[Terms, Terms]:
    z, e = beta * h, label_smoothing
    return [-(1 - e) * log_sigmoid(z), -e * log_sigmoid(-z)], [beta * sigmoid(z), -beta * (1 - e)]


def robust_dpo(h: mp.mpf, beta: mp.mpf, label_smoothing: mp.mpf) -> tuple[Terms, Terms]:
    z, e = beta * h, label_smoothing
    loss = [-(1 - e) * log_sigmoid(z) / (1 - 2 * e), e * log_sigmoid(-z) / (1 - 2 * e)]
    return loss, [beta * sigmoid(z), -beta * (1 - e) / (1 - 2 * e)]


def ipo(h: mp.mpf, beta: mp.mpf) -> tuple[Terms, Terms]:
    target = 1 / (2 * beta)
    return [h * h, -2 * h * target, target * target], [2 * h, -2 * target]


def hinge(h: mp.mpf, beta: mp.mpf) -> tuple[Terms, Terms]:
    active = beta * h < 1
    return ([mp.mpf(1), -beta * h], [-beta]) if active else ([mp.mpf(0)], [mp.mpf(0)])


CLOSED_FORMS: dict[str, ClosedForm] = {f.__name__: f for f in (dpo, cdpo, robust_dpo, ipo, hinge)}
# the papers'; a changed default would change results without a word
DEFAULTS = {
    "dpo": {"beta": 0.1},
    "cdpo": {"beta": 0.1, "label_smoothing": 0.0},
    "robust_dpo": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"beta": 0.1},
    "hinge": {"beta": 0.05},
}
VALUES = {"beta": (0.01, 0.5, 3.0), "label_smoothing": (0.0, 0.1, 0.3, 0.499)}
# sums of two of these are exact in fp64, so the closed form sees the margin that torch sees
LOG_RATIOS = (0.0, 2.0**-100, -(2.0**-30), 0.25, -1.0, 8.5, -300.0, 10_000.0)


def settings(row: Objective) -> list[dict[str, float]]:
    """The defaults of a row, and all combinations of values inside its domains."""
    grid = [VALUES.get(name, (default,)) for name, default in row.defaults.items()]
    return [
        dict(row.defaults),
        *(dict(zip(row.defaults, values, strict=True)) for values in itertools.product(*grid)),
    ]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def evaluate(
    row: Objective, chosen: Tensor, rejected: Tensor, hyper: Mapping[str, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients of the formula, for log-ratios to a reference of 0."""
    a, b = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    loss, _, _ = pairwise_objective(row, Side(a, torch.zeros_like(a)), Side(b, torch.zeros_like(b)), dict(hyper))
    return loss.detach(), *torch.autograd.grad(loss.sum(), (a, b))


def public(row: Objective, margin: Tensor, backend: str = "reference", **hyper: float) -> Tensor:
    """The public function's loss per pair at these margins."""
    zero = torch.zeros_like(margin)
    with fastpo.use_backend(backend):
        return getattr(losses, row.name)(margin, zero, zero, zero, reduction="none", **hyper).loss


class TestClosedForms:
    @by_row
    def test_value_and_gradient(self, row):
        """A few roundings of every term, and one of z = beta h, which the slope carries into the result."""
        pairs = list(itertools.product(LOG_RATIOS, repeat=2))
        a, b = double(*(x for x, _ in pairs)), double(*(y for _, y in pairs))
        for hyper in settings(row):
            exact = {name: mp.mpf(value) for name, value in hyper.items()}
            loss, da, db = evaluate(row, a, b, hyper)
            for i, (x, y) in enumerate(pairs):
                h = mp.mpf(x) - mp.mpf(y)
                terms, slopes = CLOSED_FORMS[row.name](h, **exact)
                allowed = 8 * EPS * (sum(map(abs, terms)) + abs(sum(slopes) * h)) + TINY
                assert abs(mp.mpf(loss[i].item()) - sum(terms)) <= allowed, (hyper, x, y)
                # the slope's own sensitivity to z is at most |z| times itself in its tails
                allowed = 8 * EPS * sum(map(abs, slopes)) * (1 + abs(exact["beta"] * h)) + TINY
                assert abs(mp.mpf(da[i].item()) - sum(slopes)) <= allowed, (hyper, x, y)
                assert abs(mp.mpf(db[i].item()) + sum(slopes)) <= allowed, (hyper, x, y)

    @by_row
    def test_closed_gradient_is_the_derivative(self, row):
        """The catalogue's gradient formula belongs to the catalogue's loss."""
        for hyper in settings(row):
            exact = {name: mp.mpf(value) for name, value in hyper.items()}
            closed = CLOSED_FORMS[row.name]
            for h in (mp.mpf("-7.3"), mp.mpf("0.4"), mp.mpf("11.9")):
                derivative = mp.diff(lambda x: sum(closed(x, **exact)[0]), h)  # noqa: B023
                assert abs(derivative - sum(closed(h, **exact)[1])) < mp.mpf("1e-20")

    @pytest.mark.parametrize("z", [20.0, 40.0, 92.0, 700.0])
    def test_small_losses_keep_their_digits(self, z):
        """log(1 + e^-z): a loss of 1e-40 and its gradient are right to the last digits, not rounded to 0."""
        loss, slope, _ = evaluate(objective("dpo"), double(z), double(0.0), {"beta": 1.0})
        (exact_loss,), (exact_slope,) = dpo(mp.mpf(z), mp.mpf(1))
        assert abs(mp.mpf(loss.item()) / exact_loss - 1) <= 4 * EPS
        assert abs(mp.mpf(slope.item()) / exact_slope - 1) <= 4 * EPS

    @pytest.mark.parametrize("beta", [0.1, 0.7])
    def test_ipo_on_averages(self, beta):
        """TRL's convention, (a/|w| - b/|l| - 1/(2 beta))^2: every token has the slope / its side's length."""
        generator = torch.Generator().manual_seed(3)
        policy = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
        reference = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
        lengths = [[6, 1, 3, 0], [2, 6, 0, 0]]
        masks = torch.arange(6) < torch.tensor(lengths)[..., None]
        policy.requires_grad_()
        sides = [Side(policy[s], reference[s], masks[s]) for s in (0, 1)]
        loss, *rewards = pairwise_objective(objective("ipo"), *sides, {"beta": beta}, length_norm=True)
        (grad,) = torch.autograd.grad(loss.sum(), policy)
        for i in range(4):
            sums = [math.fsum((policy - reference)[s, i, : lengths[s][i]].tolist()) for s in (0, 1)]
            n = [max(lengths[s][i], 1) for s in (0, 1)]
            error = sums[0] / n[0] - sums[1] / n[1] - 1 / (2 * beta)
            assert loss[i].item() == pytest.approx(error**2, rel=32 * EPS)
            for s, sign in ((0, 1), (1, -1)):
                # rewards stay sums whatever the loss averages
                assert rewards[s][i].item() == pytest.approx(beta * sums[s], rel=32 * EPS, abs=32 * EPS)
                for t in range(6):
                    want = sign * 2 * error / n[s] if t < lengths[s][i] else 0.0
                    assert grad[s, i, t].item() == pytest.approx(want, rel=32 * EPS)

    def test_without_reference_model_the_ratio_is_the_policy(self):
        loss, *rewards = pairwise_objective(objective("dpo"), Side(double(3.0)), Side(double(1.0)), {"beta": 0.5})
        assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)), rel=4 * EPS)
        assert [r.item() for r in rewards] == [1.5, 0.5]

    def test_formula_sees_averages(self):
        seen: list[Pair] = []

        def formula(pair: Pair, *, beta: float) -> Tensor:
            seen.append(pair)
            return pair.chosen

        row = replace(objective("ipo"), formula=formula)
        sides = [
            Side(double(-8.0), double(-2.0), lengths=torch.tensor([4])),
            Side(double(-9.0), double(-3.0), lengths=torch.tensor([0])),
        ]
        pairwise_objective(row, *sides, {"beta": 1.0}, length_norm=True)
        assert [x.item() for x in seen[0][:4]] == [-2.0, -9.0, -1.5, -6.0] and seen[0].margin.item() == 4.5
        assert [seen[0].chosen_length.item(), seen[0].rejected_length.item()] == [4.0, 1.0]


class TestSequenceSum:
    def values(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(5, 7, generator=generator).to(dtype), torch.rand(5, 7, generator=generator) < 0.6

    def test_summed_already(self):
        values = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
        sums, counts = sequence_sum(values)
        assert counts is None and sums.dtype == torch.float32 and sums.tolist() == [1.5, -2.0]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("masked", [False, True])
    def test_padded(self, dtype, masked):
        values, mask = self.values(dtype)
        mask[3] = False
        sums, counts = sequence_sum(values, mask if masked else None)
        assert sums.dtype == torch.promote_types(dtype, torch.float32)
        for i in range(5):
            kept = [v for v, m in zip(values[i].tolist(), mask[i].tolist(), strict=True) if m or not masked]
            # seven additions, each rounding a partial sum that is at most the sum of the magnitudes
            allowed = 7 * torch.finfo(sums.dtype).eps * sum(map(abs, kept))
            assert abs(sums[i].item() - math.fsum(kept)) <= allowed
            assert counts[i].item() == len(kept)

    @pytest.mark.parametrize("boundaries", [[0, 4, 4, 9, 35], [0, 0, 30], [0, 35], [0], [0, 0], [0, 1, 2, 3]])
    @pytest.mark.parametrize("masked", [False, True])
    def test_packed(self, boundaries, masked):
        """Empty sequences, first and in between, and tokens that belong to none."""
        values, mask = (t.flatten() for t in self.values())
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
        leaf = values.clone().requires_grad_()
        sums, counts = sequence_sum(leaf, mask if masked else None, cu_seqlens)
        assert sums.shape == counts.shape == (len(boundaries) - 1,)
        weights = torch.arange(1.0, len(boundaries), dtype=torch.float64)
        (grad,) = torch.autograd.grad((sums * weights).sum(), leaf)
        expected = [0.0] * 35
        for i, (first, end) in enumerate(itertools.pairwise(boundaries)):
            kept = [t for t in range(first, end) if mask[t] or not masked]
            terms = [values[t].item() for t in kept]
            assert abs(sums[i].item() - math.fsum(terms)) <= len(kept) * EPS * sum(map(abs, terms))
            assert counts[i].item() == len(kept)
            for t in kept:
                expected[t] = i + 1.0
        assert grad.tolist() == expected

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_what_does_not_count_may_hold_anything(self, poison):
        values, mask = self.values()
        cu_seqlens = torch.tensor([0, 7, 14, 20, 30], dtype=torch.int32)
        inside = torch.arange(35) < 30
        for shape, selected, boundaries in (
            ((5, 7), mask, None),
            ((35,), mask.flatten(), cu_seqlens),
            ((35,), inside, cu_seqlens),
        ):
            clean = values.view(shape).clone().requires_grad_()
            dirty = values.view(shape).masked_fill(~selected, poison).requires_grad_()
            # behind the last boundary no mask is needed
            given = None if selected is inside else selected
            results = [sequence_sum(x, given, boundaries) for x in (clean, dirty)]
            assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
            grads = [
                torch.autograd.grad(r[0].square().sum(), x)[0] for r, x in zip(results, (clean, dirty), strict=True)
            ]
            assert torch.equal(*grads) and (grads[1].masked_select(~selected) == 0).all()


class TestRegistry:
    @by_row
    def test_row(self, row):
        assert objective(row.name) is row and row.formula.__name__ == row.name
        assert row.title and row.paper and row.equation and row.doc
        assert row.defaults == DEFAULTS[row.name] and set(row.defaults) == set(row.domains)
        for name, default in row.defaults.items():
            assert default in row.domains[name]
        assert set(row.aliases) <= {"trl", "liger", "verl", "openrlhf"} and all(row.aliases.values())
        assert row.models == (("policy", "reference") if row.reference_model else ("policy",))

    @by_row
    def test_row_does_not_change(self, row):
        with pytest.raises(FrozenInstanceError):
            row.name = "other"
        for mapping in (row.defaults, row.domains, row.aliases):
            with pytest.raises(TypeError):
                mapping["beta"] = 1.0

    @by_row
    def test_public_function(self, row):
        """Its signature and help come from the row."""
        function = getattr(losses, row.name)
        assert function.__name__ == row.name and row.name in losses.__all__
        for text in (row.title, row.paper, row.equation, *row.aliases.values()):
            assert text in function.__doc__
        for name, default in row.defaults.items():
            assert function.__kwdefaults__[name] == default
            assert f"{name}: in {row.domains[name]}" in function.__doc__
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        sides = [f"{model}_{side}" for model in row.models for side in ("chosen", "rejected")]
        assert list(arguments) == sides
        assert ("length_norm" in function.__kwdefaults__) == row.length_norm
        for name in function.__kwdefaults__:
            assert name in function.__doc__

    def test_names(self):
        names = [row.name for row in objectives()]
        assert len(set(names)) == len(names)
        assert [row.name for row in objectives("pairwise")] == [r.name for r in objectives() if r.kind == "pairwise"]
        with pytest.raises(KeyError):
            objective("no such objective")
        with pytest.raises(AttributeError, match="no objective 'dppo'; it has dpo, cdpo"):
            _ = losses.dppo

    def test_wrong_rows_are_refused(self):
        def unheard_of(pair: Pair, *, beta: float = 1.0) -> Tensor:
            return pair.margin

        def dpo(pair: Pair, *, beta: float = 1.0) -> Tensor:
            return pair.margin

        about = {"title": "t", "paper": "p", "equation": "e", "theory": "property"}
        before = [row.name for row in objectives()]
        with pytest.raises(AssertionError, match="domains must name its keyword arguments"):
            register("pairwise", domains={"alpha": POSITIVE}, **about)(unheard_of)
        with pytest.raises(AssertionError, match="once"):
            register("pairwise", domains={"beta": POSITIVE}, **about)(dpo)
        assert [row.name for row in objectives()] == before

    def test_domain(self):
        half_open = Domain(0.0, 0.5, high_open=True)
        assert 0.0 in half_open and 0.4999 in half_open and 0.5 not in half_open and -1e-300 not in half_open
        assert str(half_open) == "[0, 0.5)" and str(POSITIVE) == "(0, inf)" and str(Domain()) == "(-inf, inf)"
        assert 1e-300 in POSITIVE and 0.0 not in POSITIVE
        for bad in (math.nan, math.inf, -math.inf):
            assert bad not in Domain() and bad not in POSITIVE


@pytest.mark.parametrize("backend", BACKENDS)
class TestIdentities:
    """What the catalogue says of each objective."""

    def margins(self) -> Tensor:
        return torch.cat([torch.linspace(-90, 90, 181, dtype=torch.float64), double(0.0, 1e-30, -1e4, 1e4)])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("name", ["cdpo", "robust_dpo"])
    def test_no_smoothing_is_dpo_bit_for_bit(self, backend, dtype, name):
        results = []
        for row, hyper in ((objective("dpo"), {}), (objective(name), {"label_smoothing": 0.0})):
            margin = self.margins().to(dtype).requires_grad_()
            loss = public(row, margin, backend, beta=0.3, **hyper)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), margin)))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])

    @by_row
    def test_at_the_reference(self, backend, row):
        """log 2 for the logistic ones, robust or not; 1 / (4 beta^2) for ipo; 1 for hinge."""
        expected = {"ipo": lambda beta: 1 / (4 * beta**2), "hinge": lambda beta: 1.0}
        for beta in (0.05, 0.1, 1.0):
            policy = double(-3.25, -1000.0)
            with fastpo.use_backend(backend):
                out = getattr(losses, row.name)(policy, policy + 1, policy, policy + 1, beta=beta, reduction="none")
            want = expected.get(row.name, lambda beta: math.log(2))(beta)
            assert out.loss.tolist() == pytest.approx([want] * 2, rel=8 * EPS)
            assert (out.chosen_rewards == 0).all() and (out.margins == 0).all() and (out.accuracies == 0).all()

    def test_swapping_the_sides(self, backend):
        """The margin changes its sign, and with it each loss in its own way."""
        h = self.margins()
        z = 0.1 * h
        swapped = {row.name: public(row, h, backend, beta=0.1) - public(row, -h, backend, beta=0.1) for row in ROWS}
        e = objective("robust_dpo").defaults["label_smoothing"]
        assert objective("cdpo").defaults["label_smoothing"] == 0
        expected = {
            # log sigmoid(z) - log sigmoid(-z) = z
            "dpo": -z,
            "cdpo": -z,
            "robust_dpo": -z / (1 - 2 * e),
            "ipo": -2 * h / 0.1,
            "hinge": torch.relu(1 - z) - torch.relu(1 + z),
        }
        # each loss is at most about h^2 + 1 / beta^2 here
        scale = h.square() + 100
        for name, want in expected.items():
            assert ((swapped[name] - want).abs() <= 8 * EPS * scale).all(), name

    @pytest.mark.parametrize("epsilon", [0.1, 0.3])
    def test_mixtures_of_labels(self, backend, epsilon):
        """cdpo is dpo under labels flipped at rate e; robust_dpo under such labels is dpo."""
        h = self.margins()
        plain = {sign: public(objective("dpo"), sign * h, backend) for sign in (1, -1)}
        conservative = public(objective("cdpo"), h, backend, label_smoothing=epsilon)
        robust = {s: public(objective("robust_dpo"), s * h, backend, label_smoothing=epsilon) for s in (1, -1)}
        flipped = (1 - epsilon) * plain[1] + epsilon * plain[-1]
        assert torch.allclose(conservative, flipped, rtol=8 * EPS, atol=0)
        # the robust terms are |z| / (1 - 2e) large and cancel
        scale = (1 + 0.1 * h.abs()) / (1 - 2 * epsilon)
        assert (((1 - epsilon) * robust[1] + epsilon * robust[-1] - plain[1]).abs() <= 8 * EPS * scale).all()

    def test_robust_losses_may_be_negative(self, backend):
        loss = public(objective("robust_dpo"), double(50.0), backend, beta=1.0, label_smoothing=0.1)
        assert loss.item() == pytest.approx(-6.25, rel=8 * EPS)

    @pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.45])
    def test_cdpo_is_stationary(self, backend, epsilon):
        """At beta h = log((1 - e) / e): the gradient vanishes there, and points back from both sides."""
        beta = 0.3
        h = math.log((1 - epsilon) / epsilon) / beta
        margin = double(h - 0.01, h, h + 0.01).requires_grad_()
        loss = public(objective("cdpo"), margin, backend, beta=beta, label_smoothing=epsilon)
        (grad,) = torch.autograd.grad(loss.sum(), margin)
        assert abs(grad[1].item()) <= 8 * EPS * beta and grad[0] < 0 < grad[2]

    def test_robust_gradient_never_vanishes(self, backend):
        """S(z) - (1 - e) / (1 - 2e) is below -e / (1 - 2e) everywhere."""
        margin = self.margins().requires_grad_()
        loss = public(objective("robust_dpo"), margin, backend, beta=0.7, label_smoothing=0.2)
        (grad,) = torch.autograd.grad(loss.sum(), margin)
        assert (grad <= -0.7 * 0.2 / 0.6 * (1 - 8 * EPS)).all()

    @pytest.mark.parametrize("beta", [0.5, 0.25, 2.0])
    def test_hinge_stops_at_its_margin(self, backend, beta):
        """The gap 1 / beta suffices: beyond it, and at the kink itself, the gradient is exactly 0."""
        gap = 1 / beta
        margin = double(gap * (1 - 2 * EPS), gap, gap * (1 + 2 * EPS), 1e4).requires_grad_()
        loss = public(objective("hinge"), margin, backend, beta=beta)
        (grad,) = torch.autograd.grad(loss.sum(), margin)
        assert grad.tolist() == [-beta, 0.0, 0.0, 0.0] and loss.tolist()[1:] == [0.0, 0.0, 0.0]


def bradley_terry(reward: Tensor) -> Tensor:
    return torch.sigmoid(reward[:, None] - reward[None])


def total_variation(p: Tensor, q: Tensor) -> float:
    return (p - q).abs().sum().item() / 2


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The policy at which a convex loss of its logits is least: Newton's method with halved steps.

    The Hessian differentiates the loss's own gradient, so the second derivative of the objective is used too.
    """
    logits = start.clone()
    for _ in range(100):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient])
        # pinv: the loss does not change if all logits rise together
        step = -torch.linalg.pinv(hessian, hermitian=True, rtol=1e-13) @ gradient.detach()
        slope = (step @ gradient.detach()).item()
        if slope > -1e-28:
            break
        rate = 1.0
        # near the optimum the loss no longer resolves its own decrease, but the full step is right
        while slope < -1e-12 and rate > 1e-9:
            if loss(logits + rate * step) < value + 0.25 * rate * slope:
                break
            rate /= 2
        logits = logits + rate * step
    return torch.softmax(logits, 0)


class TestFixedPoints:
    """Catalogue 4: under full expectation the minimiser over a tabular softmax policy is the stated one."""

    actions = 5
    beta = 0.5
    epsilon = 0.2

    def setup_method(self):
        generator = torch.Generator().manual_seed(7)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.reward = random(self.actions)
        self.reference = torch.softmax(random(self.actions), 0)
        # arbitrary weights of the unordered pairs; no reward or policy is behind them
        weights = torch.rand(self.actions, self.actions, generator=generator, dtype=torch.float64).add(0.05).triu(1)
        self.weights = weights + weights.T
        # the law from which both members of a pair are drawn
        mu = torch.softmax(random(self.actions), 0)
        self.product = mu[:, None] * mu[None]
        # any preference, here one without a reward behind it
        scores = random(self.actions, self.actions)
        self.preference = torch.sigmoid(scores - scores.T)
        self.starts = {"reference": self.reference.log(), "far": 4 * random(self.actions)}
        self.win_rate = self.preference @ mu

    def gibbs(self, advantage: Tensor) -> Tensor:
        return torch.softmax(self.reference.log() + advantage / self.beta, 0)

    def setting(self, name: str) -> tuple[Tensor, Tensor, dict[str, float], Tensor]:
        """Pair weights, P(first is preferred), hyper-parameters and the policy that minimises."""
        clean = bradley_terry(self.reward)
        flipped = (1 - self.epsilon) * clean + self.epsilon * (1 - clean)
        return {
            "dpo": (self.weights, clean, {}, self.gibbs(self.reward)),
            "robust_dpo": (self.weights, flipped, {"label_smoothing": self.epsilon}, self.gibbs(self.reward)),
            "ipo": (self.product, self.preference, {}, self.gibbs(self.win_rate)),
        }[name]

    def expected(
        self, row: Objective, weights: Tensor, preferred: Tensor, hyper: Mapping[str, float]
    ) -> Callable[[Tensor], Tensor]:
        """The expectation over pairs and labels: every ordered pair, the first member chosen."""
        first, second = (i.flatten() for i in torch.meshgrid(*[torch.arange(self.actions)] * 2, indexing="ij"))
        probability = (weights * preferred).flatten()
        reference = self.reference.log()

        def loss(logits: Tensor) -> Tensor:
            logp = torch.log_softmax(logits, 0)
            out = getattr(losses, row.name)(
                logp[first], logp[second], reference[first], reference[second], reduction="none", **hyper
            )
            return (probability * out.loss).sum()

        return loss

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("start", ["reference", "far"])
    @pytest.mark.parametrize("row", [row for row in ROWS if row.theory == "gibbs"], ids=lambda row: row.name)
    def test_minimiser(self, row, start, backend):
        weights, preferred, hyper, target = self.setting(row.name)
        with fastpo.use_backend(backend):
            right, wrong = (
                minimise(self.expected(row, weights, preferred, {**hyper, "beta": beta}), self.starts[start])
                for beta in (self.beta, 2 * self.beta)
            )
            swapped = minimise(
                self.expected(row, weights, preferred.T, {**hyper, "beta": self.beta}), self.starts[start]
            )
        assert total_variation(right, target) < 1e-9
        # the test sees planted errors
        assert total_variation(wrong, target) > 1e-2 and total_variation(swapped, target) > 1e-2

    def test_settings_matter(self):
        """Claims that the catalogue calls false: ipo on pairs that are not i.i.d., cdpo with dpo's target."""
        _, preferred, _, target = self.setting("ipo")
        loss = self.expected(objective("ipo"), self.weights, preferred, {"beta": self.beta})
        assert total_variation(minimise(loss, self.starts["reference"]), target) > 1e-3
        weights, preferred, _, target = self.setting("dpo")
        loss = self.expected(objective("cdpo"), weights, preferred, {"beta": self.beta, "label_smoothing": 0.2})
        assert total_variation(minimise(loss, self.starts["reference"]), target) > 1e-2

    def test_cdpo_on_two_actions(self):
        """A fixed label: the odds of pi / ref end at ((1 - e) / e)^(1 / beta)."""
        self.actions = 2
        self.reference = torch.softmax(double(0.4, -0.3), 0)
        always = double(0.0, 1.0, 0.0, 0.0).view(2, 2)
        hyper = {"beta": self.beta, "label_smoothing": self.epsilon}
        loss = self.expected(objective("cdpo"), torch.ones(2, 2).double(), always, hyper)
        odds = ((1 - self.epsilon) / self.epsilon) ** (1 / self.beta)
        target = self.reference * double(odds, 1.0)
        for start in (self.reference.log(), double(-5.0, 3.0)):
            assert total_variation(minimise(loss, start), target / target.sum()) < 1e-9
