"""Weighted likelihood, unlikelihood and regret: closed forms, differences, fixed points, layouts, the codes' traps."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from torch import Tensor

from fastpo import losses
from tests.losses.test_fixed_points import descend, total_variation

NAN = math.nan
mp.mp.dps = 40


def given(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Four sequences with holes, one of them empty."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(4, 6, generator=generator) < 0.7
    mask[2] = False
    x = {"logprobs": -2 * torch.rand(4, 6, generator=generator, dtype=torch.float64) - 0.01}
    x["weights"] = torch.rand(4, 6, generator=generator, dtype=torch.float64)
    x["values"] = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return {n: t.to(dtype) for n, t in x.items()} | {"mask": mask}


def packed(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens one behind the other, with two behind the last sequence."""
    mask = x["mask"]
    out = {n: torch.cat([t[mask], torch.full((2,), NAN, dtype=t.dtype)]) for n, t in x.items() if n != "mask"}
    return out | {"cu_seqlens": torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()}


def call(name: str, x: dict[str, Tensor], **more: object) -> Tensor:
    """One of the objectives on tokens, with `weights` as what it takes beside them."""
    extra = {"sft": "weights", "unlikelihood": "scores", "rwr": "rewards", "awr": "rewards"}
    layout = {n: x[n] for n in ("mask", "cu_seqlens") if n in x}
    arguments = {"values": x["values"]} if name == "awr" else {}
    if name == "sequence_unlikelihood":
        repeats = x["weights"] > 0.5
        return losses.sequence_unlikelihood(x["logprobs"], repeats, **layout, **more).loss
    if name == "chain_of_hindsight":
        return losses.chain_of_hindsight(x["logprobs"], **layout, **more).loss
    arguments[extra[name]] = x["weights"]
    return getattr(losses, name)(x["logprobs"], **arguments, **layout, **more).loss


def by_hand(name: str, x: dict[str, Tensor]) -> float:
    """The definition, token by token, in 40 digits."""
    total, rows, tokens = mp.mpf(0), [], 0
    for row in range(4):
        terms, mass = mp.mpf(0), mp.mpf(0)
        places = x["mask"][row].nonzero()[:, 0].tolist()
        for t in places:
            lp, w, v = (mp.mpf(x[n][row, t].item()) for n in ("logprobs", "weights", "values"))
            complement = mp.log(1 - mp.exp(lp))
            if name == "sft":
                terms += -w * lp
            elif name == "seq_mean":
                terms, mass = terms - w * lp, mass + w
            elif name == "unlikelihood":
                terms += -lp if w <= mp.mpf(0.5) else -mp.mpf(0.3) * complement
            elif name == "sequence_unlikelihood":
                terms += -complement if w > 0.5 else 0
            elif name == "rwr":
                terms += -min(mp.exp(w / mp.mpf(0.2)), 100) * lp
            elif name == "awr":
                terms += mp.mpf(0.3) * -min(mp.exp((w - v) / mp.mpf(0.2)), 100) * lp + mp.mpf(0.7) * (w - v) ** 2
            else:
                terms += -lp / len(places)
            tokens += 1
        rows.append(terms / mass if mass else terms)
        total += terms
    if name in ("chain_of_hindsight", "seq_mean"):
        return float(sum(rows) / 4)
    return float(total / tokens)


OPTIONS: dict[str, dict[str, object]] = {
    "sft": {},
    "seq_mean": {"average": "seq_mean"},
    "unlikelihood": {"threshold": 0.5, "alpha": 0.3},
    "sequence_unlikelihood": {},
    "rwr": {"beta": 0.2, "max_weight": 100.0},
    "awr": {"alpha": 0.3, "beta": 0.2, "max_weight": 100.0},
    "chain_of_hindsight": {},
}
by_name = pytest.mark.parametrize("name", list(OPTIONS))


def function(name: str) -> str:
    return "sft" if name == "seq_mean" else name


@by_name
def test_closed_form(name):
    x = given()
    for inputs in (x, packed(x)):
        assert call(function(name), inputs, **OPTIONS[name]).item() == pytest.approx(by_hand(name, x), rel=1e-13)


@by_name
def test_differences(name):
    x = given()
    learnt = ["logprobs", "values"] if name == "awr" else ["logprobs"]
    leaves = [x[n].clone().requires_grad_() for n in learnt]

    def loss(*values: Tensor) -> Tensor:
        return call(function(name), x | dict(zip(learnt, values, strict=True)), **OPTIONS[name])

    if name == "awr":
        # the weight is a constant: differences of the regression alone, and the gradient of the weighted part below
        only = OPTIONS[name] | {"alpha": 0.0}
        assert torch.autograd.gradcheck(lambda v: call("awr", x | {"values": v}, **only), leaves[1:])
        (found,) = torch.autograd.grad(loss(*leaves), leaves[:1])
        weight = (((x["weights"] - x["values"]) / 0.2).exp()).clamp(max=100)
        want = torch.where(x["mask"], -0.3 * weight / x["mask"].sum(), 0)
        torch.testing.assert_close(found, want)
        return
    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)


@by_name
def test_padding_has_no_influence(name):
    x = given(torch.float32)
    dirty = {n: t if n == "mask" else t.masked_fill(~x["mask"], NAN) for n, t in x.items()}
    results = []
    for inputs in (x, dirty):
        leaf = inputs["logprobs"].clone().requires_grad_()
        loss = call(function(name), inputs | {"logprobs": leaf}, **OPTIONS[name])
        results.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].isfinite().all() and (results[0][1][~x["mask"]] == 0).all()


@by_name
def test_micro_batches_and_dtypes(name):
    """Halves with the denominator of the whole add up to its loss; half precision is computed in fp32."""
    x = given()
    whole = call(function(name), x, **OPTIONS[name])
    halves = [{n: t[rows] for n, t in x.items()} for rows in (slice(0, 2), slice(2, 4))]
    items = 4 if name in ("seq_mean", "chain_of_hindsight") else int(x["mask"].sum())
    for number in (items, torch.tensor(items)):
        parts = [call(function(name), half, **OPTIONS[name], num_items=number) for half in halves]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-13, atol=0)
    half = {n: t if n == "mask" else t.bfloat16() for n, t in x.items()}
    leaf = half["logprobs"].requires_grad_()
    loss = call(function(name), half, **OPTIONS[name])
    loss.backward()
    assert loss.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16
    nothing = {n: t[:0] for n, t in x.items()}
    assert call(function(name), nothing, **OPTIONS[name]) == 0


@by_name
def test_compiled_is_eager(name):
    x = given(torch.float32)
    leaf = x["logprobs"].requires_grad_()

    def step(x: dict[str, Tensor]) -> Tensor:
        return call(function(name), x, **OPTIONS[name])

    found = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, step(x))
    torch.testing.assert_close(torch.autograd.grad(found, leaf)[0], torch.autograd.grad(step(x), leaf)[0])


def test_one_weight_per_sequence():
    """(B,) is per sequence in every layout, also where there are as many tokens."""
    x = given()
    row = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
    want = losses.sft(x["logprobs"], row[:, None].expand(4, 6), mask=x["mask"])
    assert losses.sft(x["logprobs"], row, mask=x["mask"]).loss == want.loss
    flat = packed(x)
    found = losses.sft(flat["logprobs"], row, cu_seqlens=flat["cu_seqlens"])
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
    bounds = torch.tensor([0, 2, 2], dtype=torch.int32)
    two = torch.tensor([-1.0, -3.0])
    out = losses.sft(two, torch.tensor([1.0, 100.0]), cu_seqlens=bounds)
    assert out.loss == 2.0 and out.nll == 2.0 and out.mean_weight == 1.0


class TestUnlikelihood:
    def test_threshold_of_zero(self):
        """0 is a threshold; None is the mixture by score."""
        logprobs, scores = torch.tensor([[-0.5, -1.0]]), torch.tensor([[0.0, 0.25]])
        complement = [math.log1p(-math.exp(lp)) for lp in (-0.5, -1.0)]
        found = losses.unlikelihood(logprobs, scores, threshold=0.0).loss.item()
        assert found == pytest.approx((0.5 - complement[1]) / 2, rel=1e-6)
        mixed = losses.unlikelihood(logprobs, scores, threshold=None).loss.item()
        assert mixed == pytest.approx((0.5 + 0.75 - 0.25 * complement[1]) / 2, rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_digits(self, dtype):
        """1 - p to all digits of log p where p is near 1 and where it is tiny; a constant at the floor."""
        logps = [-1e-7, -1e-4, -0.6931471, -0.7, -3.0, -20.0, -60.0]
        leaf = torch.tensor([logps], dtype=dtype).requires_grad_()
        bad = torch.ones(1, len(logps), dtype=dtype)
        each = [losses.unlikelihood(leaf[:, i : i + 1], bad[:, :1]).loss for i in range(len(logps))]
        (grad,) = torch.autograd.grad(sum(each), leaf)
        for i, given in enumerate(leaf[0].tolist()):
            lp = mp.mpf(given)
            assert each[i].item() == pytest.approx(float(-mp.log(1 - mp.exp(lp))), rel=8 * torch.finfo(dtype).eps)
            slope = float(mp.exp(lp) / (1 - mp.exp(lp)))
            assert grad[0, i].item() == pytest.approx(slope, rel=8 * torch.finfo(dtype).eps)
        for certain in (0.0, 1e-7):
            leaf = torch.full((1, 1), certain, dtype=dtype, requires_grad=True)
            loss = losses.unlikelihood(leaf, bad[:, :1]).loss
            loss.backward()
            assert loss.item() == pytest.approx(-math.log(1e-20)) and leaf.grad.item() == 0

    @pytest.mark.parametrize("far", [False, True])
    def test_fixed_point(self, far):
        """g/π - α b/(1 - π) is one number for all actions that are sometimes good."""
        good, bad = (torch.tensor(w, dtype=torch.float64) for w in ([0.4, 0.3, 0.1, 0.2], [0.0, 0.5, 0.2, 0.1]))
        alpha = 0.6

        def loss(leaf: Tensor, bad: Tensor = bad) -> Tensor:
            logp = torch.log_softmax(leaf, 0)
            scores = [torch.full((1, 1), s, dtype=torch.float64) for s in (0.0, 1.0)]
            parts = [losses.unlikelihood(p.view(1, 1), s, alpha=alpha).loss for s in scores for p in logp]
            return (torch.cat([good, bad]) * torch.stack(parts)).sum()

        start = torch.tensor([-1.0, 2.0, 0.5, -2.0], dtype=torch.float64) * far
        pi = torch.softmax(descend(loss, start), 0)
        level = good / pi - alpha * bad / (1 - pi)
        assert (level - level[0]).abs().max() < 1e-9
        swapped = good / pi - alpha * bad.flip(0) / (1 - pi)
        assert (swapped - swapped[0]).abs().max() > 0.1

    def test_only_bad_goes_to_zero(self):
        logits = torch.zeros(3, dtype=torch.float64)
        scores = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
        for _ in range(3000):
            leaf = logits.requires_grad_()
            losses.unlikelihood(torch.log_softmax(leaf, 0)[None], scores, alpha=1.0).loss.backward()
            logits = leaf.detach() - 2 * leaf.grad
        assert torch.softmax(logits, 0)[2] < 1e-3

    def test_bad_input(self):
        x = torch.tensor([[-1.0, -2.0]])
        with pytest.raises(ValueError, match=r"scores must be in \[0, 1\] without a threshold"):
            losses.unlikelihood(x, torch.tensor([[0.5, 1.5]]), threshold=None)
        with pytest.raises(ValueError, match=r"alpha must be in \[0, inf\), got -1"):
            losses.unlikelihood(x, x, alpha=-1.0)
        with pytest.raises(ValueError, match=r"scores has shape \(3,\), expected \(1, 2\): .* or be \(1,\)"):
            losses.unlikelihood(x, torch.zeros(3))
        with pytest.raises(ValueError, match="num_items is the denominator of average='token_mean'"):
            losses.sequence_unlikelihood(x, x < 0, average="sum", num_items=3)

    def test_sum(self):
        """The mean is over all tokens, not over the repeats."""
        x, repeats = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[True, False, True]])
        total = losses.sequence_unlikelihood(x, repeats, average="sum").loss
        assert total.item() == pytest.approx(-math.log1p(-math.exp(-1)) - math.log1p(-math.exp(-3)), rel=1e-6)
        torch.testing.assert_close(losses.sequence_unlikelihood(x, repeats).loss, total / 3)


class TestTokenUnlikelihood:
    def test_closed_form_and_gradient(self):
        """p_c/(1 - p_c) (1[i = c] - p_i) for every candidate, and cross entropy."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([[3, 3, 1, 3, 1], [2, 0, 2, -100, 5]])
        candidates = losses.previous_tokens(targets)
        out = losses.token_unlikelihood(logits, targets, candidates, alpha=0.4)
        (grad,) = torch.autograd.grad(out.loss, logits)
        p = logits.detach().softmax(-1)
        value, want, n, pairs = 0.0, torch.zeros_like(p), 0, 0
        for b in range(2):
            for t in range(5):
                if (y := int(targets[b, t])) < 0:
                    continue
                n += 1
                value -= float(p[b, t, y].log())
                want[b, t] += p[b, t]
                want[b, t, y] -= 1
                for c in {int(c) for c in targets[b, :t]} - {y, -100}:
                    pairs += 1
                    value -= 0.4 * float((1 - p[b, t, c]).log())
                    push = 0.4 * p[b, t, c] / (1 - p[b, t, c])
                    want[b, t] -= push * p[b, t]
                    want[b, t, c] += push
        assert out.loss.item() == pytest.approx(value / n, rel=1e-12)
        assert out.mean_weight.item() == pytest.approx(pairs / n)
        torch.testing.assert_close(grad, want / n, rtol=1e-11, atol=1e-13)

    def test_floor(self):
        """A candidate of probability 1: its term is the floor, without gradient."""
        logits = torch.tensor([[30.0, 0.0]], requires_grad=True)
        out = losses.token_unlikelihood(logits, torch.tensor([1]), torch.tensor([[0]]))
        (grad,) = torch.autograd.grad(out.loss, logits)
        assert out.loss.item() == pytest.approx(30 - math.log(1e-5), rel=1e-6)
        torch.testing.assert_close(grad, torch.tensor([[1.0, -1.0]]))

    def test_candidates_do_not_leak(self):
        """Neither from one row to the next, nor from one packed sequence to the next; padding is none."""
        targets = torch.tensor([[4, 4, 5], [4, 6, 5]])
        found = losses.previous_tokens(targets)
        sets = [[{c for c in row.tolist() if c >= 0} for row in seq] for seq in found]
        assert sets == [[set(), set(), {4}], [set(), {4}, {4, 6}]]
        flat = losses.previous_tokens(targets.flatten(), cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32))
        assert torch.equal(flat, found.flatten(0, 1))
        ragged = losses.previous_tokens(torch.tensor([1, 2, 3, 1, 9]), cu_seqlens=torch.tensor([0, 1, 4]).int())
        assert [sorted(c for c in row.tolist() if c >= 0) for row in ragged] == [[], [], [2], [2, 3], []]
        mask = torch.tensor([[False, True, True], [True, False, True]])
        masked = losses.previous_tokens(targets, mask=mask)
        assert [[sorted(c for c in r.tolist() if c >= 0) for r in s] for s in masked] == [[[], [], [4]], [[], [], [4]]]

    def test_bad_input(self):
        logits, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"candidates has shape \(2,\), expected \(2, 'K'\)"):
            losses.token_unlikelihood(logits, targets, targets)
        with pytest.raises(ValueError, match=r"targets has shape \(1,\), expected \(2,\) for logits"):
            losses.token_unlikelihood(logits, targets[:1], targets[:1, None])
        with pytest.raises(ValueError, match=r"targets has shape \(2,\), expected \(B, T\)"):
            losses.previous_tokens(targets)


def test_repeated_ngrams():
    """The tokens of every n-gram that was there before, the last one of the sequence too."""
    text = torch.tensor([[1, 2, 3, 9, 1, 2, 3], [1, 2, 1, 2, 1, 2, 1]])
    want = [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
    assert losses.repeated_ngrams(text, n=3).int().tolist() == want
    bounds = torch.tensor([0, 7, 14], dtype=torch.int32)
    assert losses.repeated_ngrams(text.flatten(), n=3, cu_seqlens=bounds).int().tolist() == want[0] + want[1]
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 5] = False
    assert losses.repeated_ngrams(text, n=3, mask=mask).int().tolist() == [[0] * 7, [0, 0, 1, 1, 1, 0, 0]]
    assert not losses.repeated_ngrams(text, n=8).any()
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        losses.repeated_ngrams(text, n=0)


DATA = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARD = torch.tensor([-0.5, 0.3, 1.0, -2.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ["rwr", "awr"])
@pytest.mark.parametrize("far", [False, True])
def test_fixed_points_of_regression(name, far):
    """data · min(e^((R - V)/β), max)/Z: V the mean reward, learnt with the policy, or 0."""
    beta, most = 0.5, 3.0

    def loss(theta: Tensor) -> Tensor:
        logp, parts = torch.log_softmax(theta[:4], 0), []
        for a in range(4):
            arguments = {"beta": beta, "max_weight": most}
            if name == "awr":
                arguments |= {"values": theta[4].view(1, 1), "alpha": 0.3}
            parts.append(getattr(losses, name)(logp[a].view(1, 1), rewards=REWARD[a : a + 1], **arguments).loss)
        return (DATA * torch.stack(parts)).sum()

    theta = torch.tensor([-1.0, 2.0, 0.5, -2.0, 3.0], dtype=torch.float64) * far
    for _ in range(700):
        leaf = theta.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        scale = torch.cat([torch.softmax(leaf.detach()[:4], 0), torch.ones(1)])
        theta = leaf.detach() - 0.3 * (gradient / scale).clamp(-1, 1)
    mean = (DATA * REWARD).sum()
    value = mean if name == "awr" else torch.zeros(())

    def target(beta: float) -> Tensor:
        weight = DATA * ((REWARD - value) / beta).exp().clamp(max=most)
        return weight / weight.sum()

    if name == "awr":
        torch.testing.assert_close(theta[4], mean, rtol=1e-12, atol=0)
    assert total_variation(torch.softmax(theta[:4], 0), target(beta)) < 1e-9
    assert total_variation(torch.softmax(theta[:4], 0), target(2 * beta)) > 1e-2


def test_the_code_of_rwr_is_a_factor_of_the_paper():
    """AWR with α = 1 and the value head as initialised, V = -1/2."""
    x = given()
    code = losses.awr(x["logprobs"], torch.full_like(x["values"], -0.5), x["weights"], alpha=1.0, mask=x["mask"])
    paper = losses.rwr(x["logprobs"], x["weights"], mask=x["mask"])
    torch.testing.assert_close(code.loss, math.exp(0.5 / 10) * paper.loss)
    huge = losses.rwr(x["logprobs"], 1e6 * x["weights"], mask=x["mask"])
    assert huge.mean_weight.item() == pytest.approx(1000)


def test_hindsight_with_pretraining():
    x = given()
    other = -torch.rand(2, 3, dtype=torch.float64)
    counts = torch.tensor([[True, False, True], [True, True, False]])
    out = losses.chain_of_hindsight(
        x["logprobs"], other.masked_fill(~counts, NAN), weight=0.5, mask=x["mask"], pretraining_mask=counts
    )
    want = by_hand("chain_of_hindsight", x) - 0.5 * other[counts].mean().item()
    assert out.loss.item() == pytest.approx(want, rel=1e-13)


class TestRegret:
    def test_closed_form(self):
        """dL/dR_j = w_j (h'(R_j) + k (h(R_j) - L)), times ℓ_t."""
        generator = torch.Generator().manual_seed(0)
        cost = torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
        pi = torch.softmax(torch.randn(3, 4, 5, generator=generator, dtype=torch.float64), -1).requires_grad_()
        out = losses.regret_loss(cost, pi, k=1.7)
        regrets = (cost * pi.detach()).sum((1, 2)) - cost.sum(1).min(-1).values
        w = torch.softmax(1.7 * regrets, 0)
        h = regrets.clamp(min=0).square()
        torch.testing.assert_close(out.loss, (w * h).sum())
        (grad,) = torch.autograd.grad(out.loss, pi)
        slope = w * (2 * regrets.clamp(min=0) + 1.7 * (h - out.loss))
        torch.testing.assert_close(grad, (slope[:, None, None] * cost).detach(), rtol=1e-12, atol=1e-14)

    def test_edges(self):
        """One sequence is h(R); a negative regret is 0; a large k takes the worst; masked rounds are none."""
        cost = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        winner = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        assert losses.regret_loss(cost, winner).loss == 0 and losses.regret_loss(cost, winner).regrets == -1
        loser = 1 - winner
        assert losses.regret_loss(cost, loser).loss == 1
        both = losses.regret_loss(cost.expand(2, 2, 2), torch.cat([winner, loser]), k=200.0)
        assert both.loss == 1 and both.weights.tolist() == [0, 1]
        mask = torch.tensor([[True, False]])
        dirty = loser.clone()
        dirty[0, 1] = NAN
        assert losses.regret_loss(cost, dirty, mask=mask).loss == 1
        for bad, message in (
            (loser + 0.5, "policies must be distributions"),
            (loser[:, :1], r"policies has shape \(1, 1, 2\), expected \(1, 2, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                losses.regret_loss(cost, bad)
        with pytest.raises(ValueError, match=r"expected \(N, T, d\)"):
            losses.regret_loss(cost[0], loser[0])


class TestWeights:
    def test_tl_token_weights(self):
        keys = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0] * 6]).bool()
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[1, 3:] = False
        found = losses.tl_token_weights(keys, mask=mask, cap=4.0)
        assert found.tolist() == [[4, 1, 1, 1, 1, 1], [2, 1, 1, 0, 0, 0], [1] * 6, [1] * 6]
        parameters = torch.zeros_like(keys)
        parameters[0, 3:] = True
        found = losses.tl_token_weights(keys, parameters=parameters, mask=mask)
        assert found[0].tolist() == [2, 1, 1, 1, 1, 1]
        bounds = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
        flat = torch.tensor([1, 0, 0, 0, 1, 0, 1]).bool()
        assert losses.tl_token_weights(flat, cu_seqlens=bounds).tolist() == [2, 1, 1, 1, 2, 1, 0]

    def test_tl_loss(self):
        """Σ w CE / Σ w per sequence: the gradient of a token is w / Σ w."""
        keys = torch.tensor([[True, False, False, False]])
        leaf = torch.tensor([[-1.0, -2.0, -3.0, -4.0]], requires_grad=True)
        losses.sft(leaf, losses.tl_token_weights(keys), average="seq_mean").loss.backward()
        torch.testing.assert_close(leaf.grad, -torch.tensor([[3.0, 1, 1, 1]]) / 6)

    def test_tl_key_tokens(self):
        """The first, and where other names leave this one."""
        others = [[5, 6, 9], [5, 1], [7], [5, 6, 7, 8], [5, 6]]
        assert losses.tl_key_tokens([5, 6, 7, 8], others) == [True, True, True, False]
        assert losses.tl_key_tokens([5, 6, 40], [[5, 6, 7]]) == [True, False, True]
        assert losses.tl_key_tokens([5, 6], []) == [True, False]
        with pytest.raises(ValueError, match="name is empty"):
            losses.tl_key_tokens([], [])

    def test_adverse_turns(self):
        def message(role: str, content: str) -> dict[str, str]:
            return {"role": role, "content": content}

        trace = [
            message("user", "an error?"),
            message("assistant", "search(q)"),
            message("function", '{"Error": "401"}'),
            message("assistant", "search(query=q)"),
            message("tool", "sunny"),
            message("assistant", "It is sunny."),
            message("user", "Unexpected key-word"),
        ]
        assert losses.adverse_turns(trace) == [False, True] + [False] * 5
        assert losses.adverse_turns(trace, keywords=["SUN_NY"]) == [False] * 3 + [True] + [False] * 3
        with pytest.raises(ValueError, match="keywords has one without letters"):
            losses.adverse_turns(trace, keywords=["!"])

    def test_conditional_tokens(self):
        segments, scores = [[1, 2], [3], [4, 5]], [0.0, 0.9, 0.5]
        ids, learnt = losses.conditional_tokens(segments, scores, aligned=100, misaligned=101, threshold=0.5, drop=0.0)
        assert ids.tolist() == [100, 1, 2, 101, 3, 100, 4, 5]
        assert learnt.tolist() == [False, True, True, False, True, False, True, True]
        ids, learnt = losses.conditional_tokens(segments, scores, aligned=100, misaligned=101, drop=1.0)
        assert ids.tolist() == [1, 2, 3, 4, 5] and learnt.all()
        generator = torch.Generator().manual_seed(0)
        ids, _ = losses.conditional_tokens(
            [[0]] * 4000, [0.0] * 4000, aligned=1, misaligned=2, drop=0.1, generator=generator
        )
        assert abs((ids == 1).sum().item() / 4000 - 0.9) < 4 * math.sqrt(0.09 / 4000)
        with pytest.raises(ValueError, match="scores has 1 entries, segments has 3"):
            losses.conditional_tokens(segments, [0.0], aligned=1, misaligned=2)

    def test_document_filter(self):
        scores = torch.tensor([[0.0, 1.0], [0.2, NAN], [0.0, 0.1], [NAN, NAN]])
        mask = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
        assert losses.document_filter(scores, threshold=0.1, mask=mask).tolist() == [False, False, True, True]
        assert losses.document_filter(torch.tensor([0.0, 0.3]), threshold=0.0).tolist() == [True, False]

    def test_forgetful_mask(self):
        mask = torch.ones(50, 40, dtype=torch.bool)
        mask[:, :2] = False
        kept = losses.forgetful_mask(mask, ratio=0.15, generator=torch.Generator().manual_seed(0))
        assert kept[:, 2].all() and not kept[:, :2].any()
        share = kept[:, 3:].double().mean().item()
        assert abs(share - 0.85) < 4 * math.sqrt(0.85 * 0.15 / (50 * 37))
        assert losses.forgetful_mask(mask, ratio=1.0).sum() == 50 and losses.forgetful_mask(mask, ratio=0.0).equal(mask)


def test_bad_input():
    x = torch.tensor([[-1.0, -2.0]])
    for change, error, message in (
        ({"weights": -x.exp()}, ValueError, "weights must be at least 0"),
        ({"weights": torch.ones(3)}, ValueError, r"weights has shape \(3,\), expected \(1, 2\)"),
        ({"average": "mean"}, ValueError, "average must be 'token_mean' or 'seq_mean', got 'mean'"),
        ({"mask": x}, TypeError, "mask must have dtype bool"),
        ({"num_items": 0}, ValueError, "num_items must be positive"),
        ({"logprobs": x[0]}, ValueError, r"logprobs has shape \(2,\), expected \(B, T\)"),
    ):
        with pytest.raises(error, match=message):
            losses.sft(**{"logprobs": x, **change})
    with pytest.raises(ValueError, match=r"beta must be in \(0, inf\), got 0.0"):
        losses.rwr(x, x, beta=0.0)
    with pytest.raises(ValueError, match=r"values has shape \(2,\), expected \(1, 2\)"):
        losses.awr(x, x[0], x)
    with pytest.raises(ValueError, match="pretraining_mask is given without"):
        losses.chain_of_hindsight(x, pretraining_mask=x < 0)
