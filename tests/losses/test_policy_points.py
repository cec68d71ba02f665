"""What policy gradients converge to in one step over a few actions, under full expectation.

The policy moves along the semi-gradient, actions weighted by the policy itself as a constant, until it stands still;
the point is compared with the stated one from two starts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.reference.policy import policies

REWARD = torch.tensor([0.3, -0.8, 1.1, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.35, 0.3, 0.1, 0.25], dtype=torch.float64)
BETA = 0.7
STARTS = {"reference": REFERENCE.log(), "far": torch.tensor([-3.0, 2.0, -1.0, 1.5], dtype=torch.float64)}
by_start = pytest.mark.parametrize("start", list(STARTS))
by_backend = pytest.mark.parametrize("backend", ["native", "reference"])


def gibbs(values: Tensor) -> Tensor:
    return torch.softmax(REFERENCE.log() + values, 0)


def forward_kl_point(reference: Tensor, values: Tensor, beta: float) -> Tensor:
    """ref β / (λ - r), where λ makes it sum to 1."""
    low, high = values.max(), values.max() + 2 * beta
    for _ in range(200):
        middle = (low + high) / 2
        total = (reference * beta / (middle - values)).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    return reference * beta / (low - values)


def total_variation(a: Tensor, b: Tensor) -> float:
    return 0.5 * (a - b).abs().sum().item()


def settle(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 2000, rate: float = 0.6) -> Tensor:
    """The policy at which the semi-gradient, divided by the probabilities, is 0 for all actions."""
    logits = start.clone()
    for _ in range(steps):
        leaf = logits.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(torch.log_softmax(leaf, 0)), leaf)
        step = gradient / torch.softmax(leaf, 0).detach()
        # no farther than one nat: the rates of rare actions are large
        logits = logits.detach() - (rate * step).clamp(-1, 1)
        if step.abs().max() < 1e-11:
            break
    return torch.softmax(logits, 0)


def on_policy(advantages: Callable[[Tensor], Tensor], name: str = "reinforce", **options: object):
    """The expectation of a loss over one action, with advantages from the detached log-probs."""

    def loss(logp: Tensor) -> Tensor:
        out = getattr(losses, name)(
            logp[:, None],
            advantages(logp.detach()),
            reference_logprobs=REFERENCE.log()[:, None],
            reduction="none",
            aggregation="seq_mean_token_sum",
            **options,
        )
        return (logp.detach().exp() * out.loss).sum()

    return loss


def shaped(logp: Tensor) -> Tensor:
    """The reward with k1 in it, minus its mean."""
    values = REWARD + losses.kl_reward(logp, REFERENCE.log(), beta=BETA)
    return values - (logp.exp() * values).sum()


def plain(logp: Tensor) -> Tensor:
    return REWARD - (logp.exp() * REWARD).sum()


METHODS = [row.name for row in policies() if row.theory == "gibbs"]


@by_backend
class TestOneStep:
    @by_start
    @pytest.mark.parametrize("name", METHODS)
    def test_kl_in_the_reward(self, name, start, backend):
        """Every method has the gradient -A on data of the policy: all reach the tilted reference."""
        more = {"beta": 0.0} if name != "reinforce" else {}
        with fastpo.use_backend(backend):
            found = settle(on_policy(shaped, name, **more), STARTS[start])
        assert total_variation(found, gibbs(REWARD / BETA)) < 1e-9
        assert total_variation(found, gibbs(REWARD / (1.5 * BETA))) > 1e-2

    @by_start
    def test_kl_in_the_loss(self, start, backend):
        """k2's point is the tilted reference, on one step; k3 has a point of its own, and ρ k3 has k2's."""
        with fastpo.use_backend(backend):
            k2, k3, corrected, mixed = (
                settle(on_policy(plain, "ppo", beta=BETA, **options), STARTS[start])
                for options in (
                    {"kl": "k2"},
                    {"kl": "k3"},
                    {"kl": "k3", "kl_corrected": True},
                    {"kl": "k3", "kl_gradient": "k2"},
                )
            )
        right = gibbs(REWARD / BETA)
        assert max(total_variation(p, right) for p in (k2, corrected, mixed)) < 1e-9
        assert total_variation(k3, forward_kl_point(REFERENCE, REWARD, BETA)) < 1e-9
        assert total_variation(k3, right) > 1e-2

    def test_k1_in_the_loss_has_no_force(self, backend):
        """The policy runs to the best action, whatever β."""
        with fastpo.use_backend(backend):
            found = settle(on_policy(plain, "ppo", beta=5.0, kl="k1"), STARTS["reference"], steps=300)
        assert found[REWARD.argmax()] > 0.999

    def test_expected_gradients_of_the_estimators(self, backend):
        """E[∇k1] = 0, E[∇k2] = ∇KL(π, ref), E[∇k3] = ∇KL(ref, π)."""
        zero = torch.zeros(4, dtype=torch.float64)
        leaf = STARTS["far"].clone().requires_grad_()
        logp = torch.log_softmax(leaf, 0)
        reverse = (logp.exp() * (logp - REFERENCE.log())).sum()
        forward = (REFERENCE * (REFERENCE.log() - logp)).sum()
        exact = {"k1": zero}
        for name, value in (("k2", reverse), ("k3", forward)):
            exact[name] = torch.autograd.grad(value, leaf, retain_graph=True)[0]
        for kl, want in exact.items():
            leaf = STARTS["far"].clone().requires_grad_()
            with fastpo.use_backend(backend):
                value = on_policy(lambda p: zero, "ppo", beta=1.0, kl=kl)(torch.log_softmax(leaf, 0))
            torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], want, rtol=1e-10, atol=1e-10)

    @by_start
    @pytest.mark.parametrize("clipping", ["separate", "joint"])
    def test_p3o(self, clipping, start, backend):
        """On-policy pairs, with the KL in the reward."""
        i, j = (t.flatten() for t in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))

        def loss(logp: Tensor) -> Tensor:
            policies, old = (logp[i], logp[j]), (logp.detach()[i], logp.detach()[j])
            reference = (REFERENCE.log()[i], REFERENCE.log()[j])
            options = {"beta": BETA, "clipping": clipping, "reduction": "none"}
            out = losses.p3o(*policies, *reference, *old, REWARD[i], REWARD[j], **options)
            return (logp.detach().exp()[i] * logp.detach().exp()[j] * out.loss).sum()

        with fastpo.use_backend(backend):
            found = settle(loss, STARTS[start])
        assert total_variation(found, gibbs(REWARD / BETA)) < 1e-9
