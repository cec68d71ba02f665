"""What methods with advantages relative to a group converge to: groups of G samples of the policy, all enumerated.

The expected advantage of an action, Ã(y) = E[A_1 | y_1 = y], depends on the policy where it is divided by the group's
standard deviation: the point is then one that agrees with itself. A group counts by its members, not by their order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastpo import advantages as adv
from fastpo import losses
from tests.losses.test_policy_points import BETA, REFERENCE, STARTS, forward_kl_point, gibbs, settle, total_variation

# two are equal: a group of different actions may be constant
REWARD = torch.tensor([0.3, -0.8, 1.1, 0.3], dtype=torch.float64)
SIZES = (2, 4, 8)
by_start = pytest.mark.parametrize("start", list(STARTS))
by_size = pytest.mark.parametrize("size", SIZES)


def multisets(size: int) -> tuple[Tensor, Tensor]:
    """All groups up to order (M, size), and in how many orders each can be drawn."""
    groups = torch.tensor(list(itertools.combinations_with_replacement(range(len(REWARD)), size)))
    counts = torch.nn.functional.one_hot(groups, len(REWARD)).sum(1)
    orders = [math.factorial(size) / math.prod(map(math.factorial, row)) for row in counts.tolist()]
    return groups, torch.tensor(orders, dtype=torch.float64)


def expected(size: int, advantages: Callable[[Tensor, Tensor], Tensor], name: str, **options: object):
    """The expectation of a loss over groups of the policy; advantages from the groups' rewards and log-probs."""
    groups, orders = multisets(size)

    def loss(logp: Tensor) -> Tensor:
        tokens = logp[groups]
        out = getattr(losses, name)(
            tokens.view(-1, 1),
            advantages(REWARD[groups], tokens.detach()).flatten(),
            reference_logprobs=REFERENCE.log()[groups].view(-1, 1),
            reduction="none",
            aggregation="seq_mean_token_sum",
            **options,
        )
        weights = orders * tokens.detach().sum(1).exp()
        return (weights * out.loss.view(groups.shape).mean(1)).sum()

    return loss


def mean_advantage(policy: Tensor, size: int, ddof: int, eps: float) -> Tensor:
    """Ã by the formula, over every ordered choice of the others."""
    others = torch.cartesian_prod(*[torch.arange(len(REWARD))] * (size - 1)).view(-1, size - 1)
    weights = policy[others].prod(1)
    found = []
    for y in range(len(REWARD)):
        values = REWARD[torch.cat([torch.full((len(others), 1), y), others], 1)]
        std = (values - values.mean(1, keepdim=True)).square().sum(1).div(size - ddof).sqrt()
        constant = (values == values[:, :1]).all(1)
        found.append((weights * torch.where(constant, 0, (values[:, 0] - values.mean(1)) / (std + eps))).sum())
    return torch.stack(found)


@by_start
@by_size
@pytest.mark.parametrize(("ddof", "eps"), [(1, 0.0), (0, 0.1)])
class TestGrpo:
    def test_k2(self, size, ddof, eps, start):
        """π = ref e^(Ã/β)/Z with the Ã of π itself, and nothing else."""

        def advantages(rewards: Tensor, _: Tensor) -> Tensor:
            return adv.grpo(rewards, ddof=ddof, eps=eps)

        found = settle(expected(size, advantages, "grpo", beta=BETA, kl="k2"), STARTS[start])
        tilde = mean_advantage(found, size, ddof, eps)
        assert total_variation(found, gibbs(tilde / BETA)) < 1e-9
        wrong = settle(expected(size, advantages, "grpo", beta=1.5 * BETA, kl="k2"), STARTS[start])
        assert total_variation(wrong, gibbs(mean_advantage(wrong, size, ddof, eps) / BETA)) > 1e-2
        # the rewards themselves, another deviation, another size: other points
        assert total_variation(found, gibbs(REWARD / BETA)) > 1e-2
        other = mean_advantage(found, size, 1 - ddof, 0.1 - eps)
        assert total_variation(found, gibbs(other / BETA)) > 1e-3
        if size > 2:
            assert total_variation(found, gibbs(mean_advantage(found, size // 2, ddof, eps) / BETA)) > 1e-3
        if size == 2 and eps == 0:
            higher = (found * ((REWARD[:, None] > REWARD) + 0.5 * (REWARD[:, None] == REWARD))).sum(1)
            assert total_variation(found, gibbs(math.sqrt(2) * higher / BETA)) < 1e-9

    def test_k3(self, size, ddof, eps, start):
        """π = ref β/(λ - Ã)."""

        def advantages(rewards: Tensor, _: Tensor) -> Tensor:
            return adv.grpo(rewards, ddof=ddof, eps=eps)

        found = settle(expected(size, advantages, "grpo", beta=BETA, kl="k3"), STARTS[start])
        tilde = mean_advantage(found, size, ddof, eps)
        assert total_variation(found, forward_kl_point(REFERENCE, tilde, BETA)) < 1e-9
        assert total_variation(found, gibbs(tilde / BETA)) > 1e-3


@by_start
@by_size
class TestDrGrpo:
    """r - mean is (1 - 1/G) of what the leave-one-out advantage is on average."""

    def run(self, size: int, start: str, advantages: Callable, **options: object) -> Tensor:
        return settle(expected(size, advantages, "dr_grpo", **options), STARTS[start])

    def test_kl_in_the_loss(self, size, start):
        found = self.run(size, start, lambda r, _: adv.dr_grpo(r), beta=BETA, kl="k2")
        assert total_variation(found, gibbs((1 - 1 / size) * REWARD / BETA)) < 1e-9
        assert total_variation(found, gibbs(REWARD / BETA)) > 1e-2
        found = self.run(size, start, lambda r, _: adv.dr_grpo(r), beta=BETA, kl="k3")
        assert total_variation(found, forward_kl_point(REFERENCE, (1 - 1 / size) * REWARD, BETA)) < 1e-9

    def test_rloo(self, size, start):
        found = self.run(size, start, lambda r, _: adv.rloo(r), beta=BETA, kl="k2")
        assert total_variation(found, gibbs(REWARD / BETA)) < 1e-9

    def test_kl_in_the_reward(self, size, start):
        """The factor is then one of the step, not of the point."""

        def shaped(rewards: Tensor, logp: Tensor) -> Tensor:
            reference = REFERENCE.log()[multisets(size)[0]]
            return adv.dr_grpo(rewards + losses.kl_reward(logp, reference, beta=BETA))

        found = self.run(size, start, shaped)
        assert total_variation(found, gibbs(REWARD / BETA)) < 1e-9
        assert total_variation(found, gibbs((1 - 1 / size) * REWARD / BETA)) > 1e-2


def test_large_groups_have_several_points():
    """Right or wrong answers, of which the reference has 0.2 right, and k2 with β = 1: for G = 64 three policies agree
    with themselves; for G = 8, or with β = 2, one."""

    def points(size: int, beta: float) -> int:
        # rows of k right answers, the first k
        right = torch.arange(size) < torch.arange(size + 1)[:, None]
        advantages = adv.grpo(right.double())
        logits = torch.linspace(-20, 20, 4001, dtype=torch.float64)
        k = torch.arange(size, dtype=torch.float64)
        orders = math.lgamma(size) - torch.lgamma(k + 1) - torch.lgamma(size - k)
        law = torch.exp(orders - k * softplus(-logits)[:, None] - (size - 1 - k) * softplus(logits)[:, None])
        # of a right answer beside k others that are right, and of a wrong one
        gap = law @ (advantages[1:, 0] - advantages[:-1, -1])
        residual = logits - math.log(0.2 / 0.8) - gap / beta
        return int((residual.sign().diff() != 0).sum())

    assert (points(64, 1.0), points(8, 1.0), points(64, 2.0)) == (3, 1, 1)
