"""SFT by implicit rewards: closed forms, plain SFT under the total variation, differences, layouts, bad input."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from torch import Tensor

from fastpo import losses

NAN = math.nan
mp.mp.dps = 60
# φ and φ', as the catalogue has them
PHI = {
    "total_variation": (lambda x: x, lambda x: mp.mpf(1)),
    "pearson_chi2": (lambda x: x - x**2 / 4, lambda x: 1 - x / 2),
    "squared_hellinger": (lambda x: x / (1 + x), lambda x: 1 / (1 + x) ** 2),
    "jsd": (lambda x: mp.log(2 - mp.exp(-x)), lambda x: mp.exp(-x) / (2 - mp.exp(-x))),
    "reverse_kl": (lambda x: -mp.exp(-(x + 1)), lambda x: mp.exp(-(x + 1))),
    "forward_kl": (lambda x: 1 + mp.log(x), lambda x: 1 / x),
}
LOW = {"squared_hellinger": -1.0, "jsd": -math.log(2), "forward_kl": 0.0}
by_divergence = pytest.mark.parametrize("divergence", list(PHI))


def given(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Five sequences with holes in their masks, one of them empty; every reward is in every domain."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 6, generator=generator) < 0.7
    mask[3] = False
    reference = -torch.rand(5, 6, generator=generator, dtype=torch.float64) - 1
    policy = reference + 0.2 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    # values that fall from token to token
    values = 6.0 - torch.arange(6) + 0.2 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    return {"policy": policy.to(dtype), "reference": reference.to(dtype), "values": values.to(dtype), "mask": mask}


def packed(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens one behind the other, with two behind the last sequence."""
    mask = x["mask"]
    out = {
        n: torch.cat([x[n][mask], torch.full((2,), NAN, dtype=x[n].dtype)]) for n in ("policy", "reference", "values")
    }
    return out | {"cu_seqlens": torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()}


def by_hand(x: dict[str, Tensor], divergence: str, beta: float) -> tuple[list, list[list], list[list]]:
    """Loss, and its derivatives with respect to each counted token's log-prob and value, by sequence."""
    phi, slope = PHI[divergence]
    all_losses, all_policy, all_values = [], [], []
    for row in range(5):
        places = x["mask"][row].nonzero()[:, 0].tolist()
        v = [mp.mpf(x["values"][row, t].item()) for t in places] + [mp.mpf(0)]
        ratio = [mp.mpf(x["policy"][row, t].item()) - mp.mpf(x["reference"][row, t].item()) for t in places]
        r = [beta * a + v[k] - v[k + 1] for k, a in enumerate(ratio)]
        slopes = [slope(y) for y in r]
        all_losses.append(v[0] - sum(map(phi, r)))
        all_policy.append([-beta * s for s in slopes])
        # V_k is in r_k, in r_{k-1}, and the first one in V(s_0)
        all_values.append([(slopes[k - 1] if k else 1) - s for k, s in enumerate(slopes)])
    return all_losses, all_policy, all_values


@by_divergence
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_closed_form(divergence, beta):
    x = given()
    want = by_hand(x, divergence, beta)
    for inputs in (x, packed(x)):
        leaves = {n: inputs[n].clone().requires_grad_() for n in ("policy", "values")}
        out = losses.implicit_reward_sft(**{**inputs, **leaves}, divergence=divergence, beta=beta, reduction="none")
        grads = torch.autograd.grad(out.loss.sum(), list(leaves.values()))
        counts = x["mask"] if "mask" in inputs else torch.arange(len(inputs["policy"])) < inputs["cu_seqlens"][-1]
        for found, exact in zip(grads, want[1:], strict=True):
            flat = [float(y) for row in exact for y in row]
            assert found[counts].tolist() == pytest.approx(flat, rel=1e-13, abs=1e-14)
            assert (found[~counts] == 0).all()
        assert out.loss.tolist() == pytest.approx([float(y) for y in want[0]], rel=1e-13, abs=1e-13)
        assert out.loss[3] == 0 and out.values[3] == 0 and not out.rewards.requires_grad
        ratios = torch.where(x["mask"], x["policy"] - x["reference"], 0).sum(1)
        torch.testing.assert_close(out.rewards, beta * ratios + out.values, rtol=1e-13, atol=1e-13)


@by_divergence
def test_the_slope_is_that_of_phi(divergence):
    for x in (0.25, 0.7, 1.9):
        assert abs(mp.diff(PHI[divergence][0], x) - PHI[divergence][1](mp.mpf(x))) < mp.mpf("1e-15")


@by_divergence
def test_differences(divergence):
    x = given()
    leaves = [x[n].requires_grad_() for n in ("policy", "values")]

    def loss(policy: Tensor, values: Tensor) -> Tensor:
        given = {**x, "policy": policy, "values": values}
        return losses.implicit_reward_sft(**given, divergence=divergence, beta=0.7, reduction="none").loss

    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)


def test_total_variation_is_plain_sft():
    """The rewards telescope: the loss is -beta log pi and a constant, whatever V is; under another φ it is not."""
    x = given()
    leaves = {n: x[n].clone().requires_grad_() for n in ("policy", "values")}
    plain = -0.5 * torch.where(x["mask"], x["policy"] - x["reference"], 0).sum(1)
    for values in (leaves["values"], 10 * leaves["values"] - 3):
        out = losses.implicit_reward_sft(**{**x, **leaves, "values": values}, beta=0.5, reduction="none")
        torch.testing.assert_close(out.loss, plain, rtol=0, atol=1e-13)
        policy, value = torch.autograd.grad(out.loss.sum(), list(leaves.values()), retain_graph=True)
        torch.testing.assert_close(policy, torch.where(x["mask"], -0.5, 0.0).double(), rtol=0, atol=1e-15)
        assert value.abs().max() < 1e-13
    other = losses.implicit_reward_sft(**x, beta=0.5, divergence="pearson_chi2", reduction="none")
    assert (other.loss - plain).abs().max() > 0.1


@by_divergence
def test_padding_has_no_influence(divergence):
    x = given()
    dirty = {n: x[n].masked_fill(~x["mask"], NAN) for n in ("policy", "reference", "values")} | {"mask": x["mask"]}
    results = []
    for inputs in (x, dirty):
        leaves = {n: inputs[n].clone().requires_grad_() for n in ("policy", "values")}
        out = losses.implicit_reward_sft(**{**inputs, **leaves}, divergence=divergence)
        results.append([out.loss.detach(), *torch.autograd.grad(out.loss, list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_reductions_and_dtypes():
    x = given()
    each = losses.implicit_reward_sft(**x, reduction="none").loss
    for more, want in (
        ({}, each.mean()),
        ({"reduction": "sum"}, each.sum()),
        ({"num_items": 8}, each.sum() / 8),
        ({"num_items": torch.tensor(8)}, each.sum() / 8),
    ):
        torch.testing.assert_close(losses.implicit_reward_sft(**x, **more).loss, want, rtol=1e-14, atol=0)
    half = {n: t.bfloat16().requires_grad_() if t.is_floating_point() else t for n, t in x.items()}
    out = losses.implicit_reward_sft(**half, divergence="jsd")
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and half["policy"].grad.dtype == torch.bfloat16
    assert half["reference"].grad is None
    nothing = torch.zeros(0, 4)
    assert losses.implicit_reward_sft(nothing, nothing, nothing, reduction="sum").loss == 0
    narrow = torch.zeros(3, 0)
    assert losses.implicit_reward_sft(narrow, narrow, narrow).loss == 0


@pytest.mark.parametrize("divergence", list(LOW))
def test_outside_the_domain(divergence):
    """The reward of the second token is at the end of the domain."""
    policy = torch.tensor([[-1.0, LOW[divergence]]])
    reference = torch.tensor([[-1.5, 0.0]])
    values = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=rf"the reward of token \[0, 1\] is .*, but {divergence} needs it in \("):
        losses.implicit_reward_sft(policy, reference, values, divergence=divergence)
    mask = torch.tensor([[True, False]])
    assert losses.implicit_reward_sft(policy, reference, values, divergence=divergence, mask=mask).loss.isfinite()


def test_jsd_keeps_its_digits():
    """log(2 - exp(-x)) at x = 1e-9 is x to nine digits."""
    policy = torch.tensor([[1e-9]])
    loss = losses.implicit_reward_sft(policy, 0 * policy, 0 * policy, divergence="jsd").loss
    assert loss.item() == pytest.approx(-1e-9, rel=1e-6)


def test_values_of_logits():
    """beta log sum ref exp(logit/beta); between the expectation under the reference and the largest logit."""
    generator = torch.Generator().manual_seed(1)
    logits, reference = (torch.randn(3, 4, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    known = torch.softmax(reference, -1)
    for beta in (0.01, 0.4, 100.0):
        found = losses.implicit_values(logits, reference, beta=beta)
        if beta == 0.4:
            torch.testing.assert_close(found, beta * (known * (logits / beta).exp()).sum(-1).log())
        assert (found <= logits.amax(-1)).all() and (found >= (known * logits).sum(-1)).all()
    torch.testing.assert_close(
        losses.implicit_values(logits, reference, beta=1e6), (known * logits).sum(-1), rtol=1e-4, atol=1e-4
    )
    # the action values' own rewards: Q - V(s) is beta log pi/ref of the policy they make
    policy = torch.log_softmax(known.log() + logits / 0.4, -1)
    advantage = logits - losses.implicit_values(logits, reference, beta=0.4)[..., None]
    torch.testing.assert_close(0.4 * (policy - known.log()), advantage)


def test_refused():
    x = torch.zeros(2, 3)
    for change, error, message in (
        ({"values": x[0]}, ValueError, r"values has shape \(3,\), expected \(2, 3\)"),
        ({"reference": x.long()}, TypeError, "reference must have dtype"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of 'total_variation', .*, got 'kl'"),
        ({"beta": 0.0}, ValueError, r"beta must be in \(0, inf\) for implicit_reward_sft, got 0"),
        ({"mask": x}, TypeError, "mask must have dtype bool"),
        ({"cu_seqlens": torch.tensor([0, 3]).int()}, ValueError, r"policy has shape \(2, 3\), expected"),
        ({"reduction": "median"}, ValueError, "reduction must be one of"),
    ):
        with pytest.raises(error, match=message):
            losses.implicit_reward_sft(**{"policy": x, "reference": x, "values": x, **change})
    with pytest.raises(ValueError, match=r"policy has shape \(3,\), expected \(B, T\)"):
        losses.implicit_reward_sft(x[0], x[0], x[0])
    with pytest.raises(ValueError, match=r"reference_logits has shape \(2, 3\), expected \(2, 4\)"):
        losses.implicit_values(torch.zeros(2, 4), x)
    with pytest.raises(ValueError, match="with V > 0"):
        losses.implicit_values(torch.zeros(2, 0), torch.zeros(2, 0))
