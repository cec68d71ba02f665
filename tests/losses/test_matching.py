"""Distribution matching: enumerated gradients, fixed points, forbidden samples, an unknown Z, state, bad input."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpo import losses
from tests.losses.test_policy_points import STARTS, settle, total_variation

NAN, INF = math.nan, math.inf
_generator = torch.Generator().manual_seed(2)
# log P over four texts, of which Z is about 55
TARGET = 1.2 * torch.randn(4, generator=_generator, dtype=torch.float64) + 2.0
P = torch.softmax(TARGET, 0)
LOG_Z = torch.logsumexp(TARGET, 0)
Q = torch.softmax(torch.randn(4, generator=_generator, dtype=torch.float64), 0)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a.log() - b.log())).sum()


def _js(pi: Tensor) -> Tensor:
    middle = (pi + P) / 2
    return _kl(pi, middle) + _kl(P, middle)


DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "forward_kl": lambda pi: _kl(P, pi),
    "reverse_kl": lambda pi: _kl(pi, P),
    "jsd": _js,
    "total_variation": lambda pi: (pi - P).abs().sum() / 2,
    "forward_chi2": lambda pi: ((pi - P).square() / pi).sum(),
    "reverse_chi2": lambda pi: ((pi - P).square() / P).sum(),
}
by_divergence = pytest.mark.parametrize("divergence", list(DIVERGENCES))


def expected(logp: Tensor, method: str = "f_dpg", log_z: Tensor = LOG_Z, **more: object) -> Tensor:
    """The loss under full expectation over the proposal."""
    arguments = (logp, Q.log(), TARGET) if method == "dpg" else (logp, Q.log(), TARGET, log_z)
    return (Q * getattr(losses, method)(*arguments, reduction="none", **more).loss).sum()


@by_divergence
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_gradient_is_that_of_the_divergence(divergence, baseline):
    """With Z as it is; one that is wrong by 1.5 is seen here, and nowhere at the fixed point."""
    leaf = STARTS["far"].clone().requires_grad_()
    (want,) = torch.autograd.grad(DIVERGENCES[divergence](torch.softmax(leaf, 0)), leaf)
    for log_z, right in ((LOG_Z, True), (LOG_Z + math.log(1.5), False)):
        loss = expected(torch.log_softmax(leaf, 0), divergence=divergence, baseline=baseline, log_z=log_z)
        (found,) = torch.autograd.grad(loss, leaf)
        # the rewards of the reverse KL are shifted by a wrong Z, as by a baseline; those of TV are signs
        if right or divergence == "reverse_kl":
            torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
        elif divergence != "total_variation":
            assert (found - want).abs().max() > 1e-2 * want.abs().max()


def test_dpg_and_gdc():
    """DPG's gradient is Z times that of KL(p, π); GDC's and GDC++'s are that of KL(p, π)."""
    leaf = STARTS["far"].clone().requires_grad_()
    (want,) = torch.autograd.grad(DIVERGENCES["forward_kl"](torch.softmax(leaf, 0)), leaf)
    for method, factor in (("dpg", LOG_Z.exp()), ("gdc", 1.0), ("gdc_plus_plus", 1.0)):
        (found,) = torch.autograd.grad(expected(torch.log_softmax(leaf, 0), method), leaf)
        torch.testing.assert_close(found, factor * want, rtol=1e-10, atol=1e-11)


def test_gdc_plus_plus_has_no_variance_at_the_target():
    logp = P.log().requires_grad_()
    out = losses.gdc_plus_plus(logp, Q.log(), TARGET, LOG_Z, reduction="sum")
    (gradient,) = torch.autograd.grad(out.loss, logp)
    assert gradient.abs().max() < 1e-14
    plain = torch.autograd.grad(losses.gdc(logp, Q.log(), TARGET, LOG_Z, reduction="sum").loss, logp)[0]
    assert plain.abs().min() > 0.1


METHODS = [("f_dpg", d) for d in DIVERGENCES if d != "total_variation"]
METHODS += [("dpg", ""), ("gdc", ""), ("gdc_plus_plus", "")]


@pytest.mark.parametrize(("method", "divergence"), METHODS)
@pytest.mark.parametrize("start", list(STARTS))
def test_fixed_point(method, divergence, start):
    """p for any proposal, also with a wrong Z; and another target leads elsewhere."""
    more = {"divergence": divergence} if divergence else {}
    rate = 0.3 / LOG_Z.exp().item() if method == "dpg" else 0.15
    found = settle(lambda logp: expected(logp, method, **more), STARTS[start], rate=rate)
    assert total_variation(found, P) < 1e-9
    assert total_variation(found, torch.softmax(2 * TARGET, 0)) > 1e-2
    if method != "dpg":
        wrong = settle(lambda logp: expected(logp, method, log_z=LOG_Z - 0.4, **more), STARTS[start], rate=rate)
        assert total_variation(wrong, P) < 1e-9


@pytest.mark.parametrize("start", list(STARTS))
def test_fixed_point_of_total_variation(start):
    """Not smooth: steps that decay, to within their size."""
    logits = STARTS[start].clone()
    for k in range(1500):
        leaf = logits.requires_grad_()
        loss = expected(torch.log_softmax(leaf, 0), divergence="total_variation")
        (gradient,) = torch.autograd.grad(loss, leaf)
        logits = leaf.detach() - 0.5 * 0.99**k * gradient / torch.softmax(leaf, 0).detach()
    assert total_variation(torch.softmax(logits, 0), P) < 1e-5


def test_reverse_kl_is_rl_with_a_penalty():
    """log P = log ref + r/β: the gradient is that of -(E r - β KL(π, ref)) / β."""
    reward, reference, beta = TARGET, Q.log(), 0.7
    leaf = STARTS["far"].clone().requires_grad_()
    logp = torch.log_softmax(leaf, 0)
    objective = (logp.exp() * reward).sum() - beta * _kl(logp.exp(), reference.exp())
    (want,) = torch.autograd.grad(-objective / beta, leaf, retain_graph=True)
    target = reference + reward / beta
    out = losses.f_dpg(logp, Q.log(), target, torch.zeros(()), divergence="reverse_kl", reduction="none")
    (found,) = torch.autograd.grad((Q * out.loss).sum(), leaf)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


def test_metrics():
    """Under the proposal's own weights they are the divergences; the effective samples those of P/q."""
    pi = torch.softmax(STARTS["far"], 0)
    # a proposal of multiples of 1/20, so that the mean over 20 samples is the expectation
    counts = torch.tensor([3, 7, 4, 6])
    samples = torch.repeat_interleave(torch.arange(4), counts)
    q = counts.double() / 20
    out = losses.f_dpg(pi.log()[samples], q.log()[samples], TARGET[samples], LOG_Z, divergence="jsd")
    for name in ("forward_kl", "reverse_kl", "total_variation"):
        torch.testing.assert_close(getattr(out.metrics, name), DIVERGENCES[name](pi), rtol=1e-12, atol=1e-12)
    weights = (P / q)[samples]
    torch.testing.assert_close(out.metrics.effective_samples, weights.sum() ** 2 / weights.square().sum())


class TestForbidden:
    """P(x) = 0: bounded rewards stay, infinite ones are an error unless they are clamped."""

    target = torch.tensor([0.3, -INF, 1.0], dtype=torch.float64)
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    q = torch.tensor([-1.5, -1.5, -1.0], dtype=torch.float64)

    def out(self, divergence: str, **more: object) -> losses.MatchingOutput:
        log_z = torch.tensor(0.2, dtype=torch.float64)
        return losses.f_dpg(self.logp, self.q, self.target, log_z, divergence=divergence, reduction="none", **more)

    @pytest.mark.parametrize(
        ("divergence", "reward"),
        [("forward_kl", 0.0), ("jsd", -math.log(2)), ("total_variation", -0.5), ("forward_chi2", -1.0)],
    )
    def test_bounded(self, divergence, reward):
        out = self.out(divergence)
        assert out.pseudo_rewards[1].item() == pytest.approx(reward, abs=1e-15)
        assert out.loss[1].item() == pytest.approx(math.exp(-0.5) * reward * 2.0, abs=1e-15)
        assert out.loss.isfinite().all() and out.metrics.forward_kl.isfinite() and out.metrics.reverse_kl == INF

    @pytest.mark.parametrize("divergence", ["reverse_kl", "reverse_chi2"])
    def test_unbounded(self, divergence):
        with pytest.raises(ValueError, match=rf"log_targets\[1\] is -inf: the pseudo-reward of {divergence} is -inf"):
            self.out(divergence)
        out = self.out(divergence, min_reward=-4.0, baseline=0.5)
        assert out.pseudo_rewards[1] == -4
        assert out.loss[1].item() == pytest.approx(math.exp(-0.5) * (-4.0 - 0.5) * 2.0)

    def test_no_target_yet(self):
        """Z = 0 where no sample was allowed: no gradient, no reward for the baseline, no NaN in the metrics."""
        estimate = losses.PartitionEstimate()
        contexts = torch.tensor([4, 9, 4])
        log_z = estimate.update(self.target - self.q, contexts)
        assert log_z[1] == -INF and log_z[[0, 2]].isfinite().all()
        logp = self.logp.clone().requires_grad_()
        for divergence in DIVERGENCES:
            out = losses.f_dpg(logp, self.q, self.target, log_z, divergence=divergence)
            (gradient,) = torch.autograd.grad(out.loss, logp)
            assert gradient[1] == 0 and (gradient[[0, 2]] != 0).any() and gradient.isfinite().all()
            assert out.pseudo_rewards.isnan().tolist() == [False, True, False]
            assert all(torch.stack(list(out.metrics)).isfinite())
        baseline = losses.RewardBaseline()
        baseline.update(out.pseudo_rewards)
        assert baseline.value == pytest.approx(out.pseudo_rewards[[0, 2]].mean().item())
        none = losses.f_dpg(self.logp, self.q, torch.full((3,), -INF), torch.tensor(-INF))
        assert none.loss == 0 and torch.stack(list(none.metrics)).tolist() == [0.0] * 4

    def test_an_estimate_that_has_not_seen_the_samples(self):
        with pytest.raises(ValueError, match=r"log_z is -inf, but log_targets\[0\] is 0.3: the estimate"):
            losses.f_dpg(self.logp, self.q, self.target, torch.tensor(-INF))


def test_log_space():
    """Log-probs of thousands of nats, where no probability is a number, in fp32."""
    shift = -3000.0
    x = [t.float() for t in (P.log() + 0.2, Q.log(), TARGET)]
    for divergence in DIVERGENCES:
        near = losses.f_dpg(*x, LOG_Z.float(), divergence=divergence, reduction="none")
        far = losses.f_dpg(*(t + shift for t in x), LOG_Z.float(), divergence=divergence, reduction="none")
        torch.testing.assert_close(far.pseudo_rewards, near.pseudo_rewards, rtol=3e-3, atol=3e-3)
        weights = far.loss / (x[0] + shift)
        torch.testing.assert_close(weights, near.loss / x[0], rtol=3e-3, atol=3e-3)
    # 1/t alone overflows where the weight p/q is 1
    out = losses.f_dpg(torch.tensor([-900.0]), torch.tensor([-5.0]), torch.tensor([-5.0]), torch.zeros(()))
    assert out.loss.item() == pytest.approx(900.0)


def test_the_scale_of_the_target():
    """P and Z times the same factor are the same target; DPG, which has no Z, is that many times as fast."""
    logp, shift = (P.log() + 0.2).requires_grad_(), 3.0
    for divergence in DIVERGENCES:
        out = losses.f_dpg(logp, Q.log(), TARGET, LOG_Z, divergence=divergence, reduction="none")
        moved = losses.f_dpg(logp, Q.log(), TARGET + shift, LOG_Z + shift, divergence=divergence, reduction="none")
        torch.testing.assert_close(moved.loss, out.loss, rtol=1e-12, atol=1e-13)
    dpg = [losses.dpg(logp, Q.log(), t).loss for t in (TARGET, TARGET + shift)]
    torch.testing.assert_close(dpg[1], math.exp(shift) * dpg[0])


def test_tokens():
    """Padded and packed tokens are summed; padding has no influence."""
    generator = torch.Generator().manual_seed(0)
    logp, q = (-torch.rand(3, 4, generator=generator) for _ in range(2))
    mask = torch.tensor([[True] * 4, [True, False, True, False], [True, False, False, False]])
    target, log_z = torch.tensor([-1.0, -2.0, 0.5]), torch.tensor([0.1, 0.2, 0.3])
    sums = [torch.where(mask, t, 0).sum(1) for t in (logp, q)]
    want = losses.f_dpg(*sums, target, log_z, divergence="jsd", baseline=0.3)
    dirty = [t.masked_fill(~mask, NAN) for t in (logp, q)]
    leaf = dirty[0].clone().requires_grad_()
    out = losses.f_dpg(leaf, dirty[1], target, log_z, divergence="jsd", baseline=torch.tensor(0.3), mask=mask)
    out.loss.backward()
    assert (leaf.grad[~mask] == 0).all() and (leaf.grad[mask] != 0).all()
    boundaries = torch.tensor([0, 4, 6, 7], dtype=torch.int32)
    flat = losses.f_dpg(
        logp[mask], q[mask], target, log_z, divergence="jsd", baseline=torch.full((3,), 0.3), cu_seqlens=boundaries
    )
    for found in (out, flat):
        torch.testing.assert_close(found.loss, want.loss)
        torch.testing.assert_close(found.pseudo_rewards, want.pseudo_rewards)
    half = logp.bfloat16().requires_grad_()
    losses.f_dpg(half, q.bfloat16(), target, log_z, mask=mask).loss.backward()
    assert half.grad.dtype == torch.bfloat16


class TestPartitionEstimate:
    def test_mean_of_all(self):
        generator = torch.Generator().manual_seed(0)
        estimate = losses.PartitionEstimate()
        weights = [torch.randn(5, generator=generator, dtype=torch.float64) - 1000 for _ in range(3)]
        contexts = torch.tensor([7, 3, 7, 7, 3])
        for w in weights:
            log_z = estimate.update(w, contexts)
        whole = torch.stack(weights)
        for context in (3, 7):
            want = torch.logsumexp(whole[:, contexts == context].flatten(), 0) - math.log(
                3 * (contexts == context).sum()
            )
            torch.testing.assert_close(log_z[contexts == context], want.expand((contexts == context).sum()))
        assert estimate.log_z(torch.tensor([8])) == -INF

    def test_unbiased(self):
        """The mean of P/q over samples of q is Z."""
        draws = torch.multinomial(Q, 200_000, replacement=True, generator=torch.Generator().manual_seed(1))
        log_z = losses.PartitionEstimate().update((TARGET - Q.log())[draws])
        deviation = (Q * ((TARGET - Q.log()).exp() - LOG_Z.exp()).square()).sum().sqrt() / math.sqrt(200_000)
        assert abs(log_z[0].exp() - LOG_Z.exp()) < 4 * deviation

    def test_decay(self):
        estimate = losses.PartitionEstimate(decay=0.5)
        for value in (8.0, 4.0):
            log_z = estimate.update(torch.tensor([value]).log())
        assert log_z.exp().item() == pytest.approx((0.5 * 8 + 4) / 1.5)

    def test_state(self):
        """After saving and loading, all goes on as if nothing had happened."""
        estimate, baseline = losses.PartitionEstimate(decay=0.9), losses.RewardBaseline(3)
        estimate.update(torch.tensor([0.1, -INF, 0.5]), torch.tensor([1, 2, 1]))
        baseline.update(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert baseline.value == 3.0
        states = []
        for s in (estimate, baseline):
            buffer = io.BytesIO()
            torch.save(s.state_dict(), buffer)
            buffer.seek(0)
            states.append(torch.load(buffer, weights_only=True))
        others = losses.PartitionEstimate(), losses.RewardBaseline()
        for other, state in zip(others, states, strict=True):
            other.load_state_dict(state)
        for e in (estimate, others[0]):
            e.update(torch.tensor([0.7, 1.5]), torch.tensor([2, 1]))
        for b in (baseline, others[1]):
            b.update(torch.tensor([10.0, NAN]))
        ids = torch.tensor([1, 2])
        assert torch.equal(estimate.log_z(ids), others[0].log_z(ids)) and estimate.log_z(ids).isfinite().all()
        assert baseline.value == others[1].value == pytest.approx(17 / 3)

    def test_bad_input(self):
        estimate = losses.PartitionEstimate()
        with pytest.raises(ValueError, match="log_weights must be finite, or -inf"):
            estimate.update(torch.tensor([INF]))
        with pytest.raises(ValueError, match=r"contexts has shape \(2,\), expected \(1,\)"):
            estimate.update(torch.zeros(1), torch.tensor([0, 1]))
        with pytest.raises(ValueError, match=r"decay must be in \(0, 1\], got 0.0"):
            losses.PartitionEstimate(decay=0.0)
        with pytest.raises(ValueError, match="window must be at least 1, got 0"):
            losses.RewardBaseline(0)
        with pytest.raises(ValueError, match="rewards holds an infinite one"):
            losses.RewardBaseline().update(torch.tensor([-INF]))
        assert losses.RewardBaseline().value == 0.0


def test_compiled_is_eager():
    def step(policy: Tensor, proposal: Tensor, targets: Tensor, log_z: Tensor) -> Tensor:
        return losses.f_dpg(policy, proposal, targets, log_z, divergence="forward_chi2", baseline=0.2).loss

    x = [P.log().float().requires_grad_(), Q.log().float(), TARGET.float(), LOG_Z.float()]
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(*x)
    torch.testing.assert_close(found, step(*x))
    torch.testing.assert_close(*(torch.autograd.grad(f, x[0])[0] for f in (found, step(*x))))


def test_bad_input():
    x = torch.zeros(3)
    ok = {"policy": x, "proposal": x, "log_targets": x, "log_z": torch.zeros(())}
    for change, error, message in (
        ({"proposal": x[:2]}, ValueError, r"proposal has shape \(2,\), expected \(3,\): it must match policy"),
        ({"log_targets": torch.tensor([0.0, NAN, 0.0])}, ValueError, r"log_targets\[1\] is nan, but it must be finite"),
        ({"log_targets": torch.tensor([0.0, 0.0, INF])}, ValueError, r"log_targets\[2\] is inf"),
        ({"log_z": torch.zeros(2)}, ValueError, r"log_z has shape \(2,\), expected \(3,\).*, or one for all"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of 'forward_kl', .*, got 'kl'"),
        ({"baseline": INF}, ValueError, "baseline must be finite"),
        ({"min_reward": -INF}, ValueError, "min_reward must be finite"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask is for token log-probs"),
        ({"policy": x.long()}, TypeError, "policy must have dtype"),
    ):
        with pytest.raises(error, match=message):
            losses.f_dpg(**{**ok, **change})
