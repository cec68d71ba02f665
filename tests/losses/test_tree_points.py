"""What policy gradients converge to on a tree of two tokens, with responses of lengths 1 and 2, under full expectation.

The policy moves along the semi-gradient, responses weighted by the policy itself as a constant, until it stands still
at every node; the point is compared with the stated one from two starts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import advantages as adv
from fastpo import losses
from fastpo.rewards import token_rewards
from tests.losses.test_fixed_points import descend
from tests.losses.test_policy_points import forward_kl_point, total_variation

BETA = 0.7
# action 0 ends the response, 1 and 2 lead to a second token of three actions
FIRST = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
SECOND = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], dtype=torch.float64)
LEAVES = [(0, None), *((a, b) for a in (1, 2) for b in range(3))]
MASK = torch.tensor([[True, b is not None] for _, b in LEAVES])
REWARDS = torch.tensor([0.4, 1.0, -0.5, 0.2, 0.0, 0.9, -1.0], dtype=torch.float64)
_generator = torch.Generator().manual_seed(0)
_far = [2 * torch.randn(shape, generator=_generator, dtype=torch.float64) for shape in ((3,), (2, 3))]
STARTS = {"reference": (FIRST.log(), SECOND.log()), "far": (FIRST.log() + _far[0], SECOND.log() + _far[1])}
by_backend = pytest.mark.parametrize("backend", ["native", "reference"])
by_start = pytest.mark.parametrize("start", list(STARTS))


def tree_logprobs(first: Tensor, second: Tensor) -> Tensor:
    """(7, 2), the second token's 0 where there is none."""
    p, q = torch.log_softmax(first, -1), torch.log_softmax(second, -1)
    return torch.stack([p[[a for a, _ in LEAVES]], torch.cat([p.new_zeros(1), q.flatten()])], 1)


TOKENS = tree_logprobs(FIRST.log(), SECOND.log())
TARGET = torch.softmax(TOKENS.sum(1) + REWARDS / BETA, 0)


def settle(loss: Callable[[Tensor], Tensor], start: str, rate: float = 1.0) -> Tensor:
    """The law of the responses (7,) at which the semi-gradient, divided by the probabilities, is 0 at every node."""
    first, second = STARTS[start]
    for _ in range(1000):
        leaves = first.detach().requires_grad_(), second.detach().requires_grad_()
        grads = torch.autograd.grad(loss(tree_logprobs(*leaves)), leaves)
        p, q = torch.softmax(first, -1).detach(), torch.softmax(second, -1).detach()
        steps = grads[0] / p, grads[1] / (q * p[1:, None])
        # no farther than one nat: the rates of rare actions are large
        first, second = (x.detach() - (rate * s).clamp(-1, 1) for x, s in zip(leaves, steps, strict=True))
        if max(s.abs().max() for s in steps) < 1e-11:
            break
    return tree_logprobs(first, second).sum(1).exp()


def shaped(tokens: Tensor, form: str, beta: float) -> tuple[Tensor, Tensor]:
    """Rewards of the tokens with the divergence in them, and their returns."""
    rewards = token_rewards(REWARDS, tokens.detach() - TOKENS, beta=beta, mask=MASK, form=form)
    return rewards, adv.discounted_returns(rewards, mask=MASK)


def greedy(tokens: Tensor) -> int:
    """The leaf that is reached by the likeliest action at each node."""
    first = int(tokens[[0, 1, 4], 0].argmax())
    return first if first == 0 else 3 * first - 2 + int(tokens[3 * first - 2 : 3 * first + 1, 1].argmax())


def reinforce(tokens: Tensor, form: str, beta: float) -> tuple[str, Tensor]:
    return "reinforce", shaped(tokens, form, beta)[1]


def ppo(tokens: Tensor, form: str, beta: float) -> tuple[str, Tensor]:
    returns = shaped(tokens, form, beta)[1]
    return "ppo", returns - (tokens.detach().sum(1).exp() * returns[:, 0]).sum()


def remax(tokens: Tensor, form: str, beta: float) -> tuple[str, Tensor]:
    rewards = shaped(tokens, form, beta)[0]
    return "reinforce", adv.remax(rewards, rewards.sum(1)[greedy(tokens)].expand(7), mask=MASK).advantages


def kl_in_the_reward(method: Callable, form: str, aggregation: str, beta: float = BETA) -> Callable[[Tensor], Tensor]:
    def loss(tokens: Tensor) -> Tensor:
        name, advantages = method(tokens, form, beta)
        out = getattr(losses, name)(tokens, advantages, mask=MASK, aggregation=aggregation, reduction="none")
        return (tokens.detach().sum(1).exp() * out.loss).sum()

    return loss


@by_start
class TestKlInTheReward:
    @pytest.mark.parametrize("form", ["to_go", "sequence"])
    @pytest.mark.parametrize(
        ("method", "aggregation"),
        [
            (reinforce, "seq_mean_token_sum"),
            (ppo, "seq_mean_token_sum"),
            (ppo, "seq_mean_token_mean"),
            (remax, "seq_mean_token_sum"),
            (remax, "seq_mean_token_mean"),
        ],
        ids=lambda x: x if isinstance(x, str) else x.__name__,
    )
    def test_reaches_the_tilted_reference(self, method, aggregation, form, start):
        found = settle(kl_in_the_reward(method, form, aggregation), start)
        assert total_variation(found, TARGET) < 1e-9
        wrong = settle(kl_in_the_reward(method, form, aggregation, 1.5 * BETA), start)
        assert total_variation(wrong, TARGET) > 1e-2

    @pytest.mark.parametrize("aggregation", ["seq_mean_token_sum", "seq_mean_token_mean"])
    def test_rloo(self, aggregation, start):
        """Pairs of responses, each the other's baseline."""
        i, j = (t.flatten() for t in torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij"))

        def loss(tokens: Tensor, beta: float = BETA) -> Tensor:
            law = tokens.detach().sum(1).exp()
            rewards = shaped(tokens, "sequence", beta)[0].sum(1)
            advantages = adv.rloo(torch.stack([rewards[i], rewards[j]], 1))
            options = {"mask": MASK[i], "aggregation": aggregation, "reduction": "none"}
            return (law[i] * law[j] * losses.reinforce(tokens[i], advantages[:, 0], **options).loss).sum()

        assert total_variation(settle(loss, start), TARGET) < 1e-9
        assert total_variation(settle(lambda tokens: loss(tokens, 1.5 * BETA), start), TARGET) > 1e-2

    @pytest.mark.parametrize("clipping", ["separate", "joint"])
    def test_p3o(self, clipping, start):
        """Sequences against each other."""
        i, j = (t.flatten() for t in torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij"))

        def loss(tokens: Tensor, beta: float = BETA) -> Tensor:
            logp, reference = tokens.sum(1), TOKENS.sum(1)
            sides = [(x[i], x[j]) for x in (logp, reference, logp.detach())]
            options = {"beta": beta, "clipping": clipping, "reduction": "none"}
            out = losses.p3o(*sides[0], *sides[1], *sides[2], REWARDS[i], REWARDS[j], **options)
            law = logp.detach().exp()
            return (law[i] * law[j] * out.loss).sum()

        assert total_variation(settle(loss, start), TARGET) < 1e-9
        assert total_variation(settle(lambda tokens: loss(tokens, 1.5 * BETA), start), TARGET) > 1e-2

    def test_without_a_baseline_means_over_tokens_lead_elsewhere(self, start):
        found = settle(kl_in_the_reward(reinforce, "sequence", "seq_mean_token_mean"), start)
        assert total_variation(found, TARGET) > 1e-2


def node_by_node(solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The law (7,) of a policy that at each node is what `solve` makes of the reference and the expected rewards."""
    second = [solve(SECOND[a], REWARDS[3 * a + 1 : 3 * a + 4]) for a in range(2)]
    values = [REWARDS[0], *(q @ REWARDS[3 * a + 1 : 3 * a + 4] for a, q in enumerate(second))]
    first = solve(FIRST, torch.stack(values))
    return torch.stack([first[a] if b is None else first[a] * second[a - 1][b] for a, b in LEAVES])


def penalised(advantages: Tensor, beta: float, **options: object) -> Callable[[Tensor], Tensor]:
    """The expectation of PPO's loss with the penalty in it, per token."""

    def loss(tokens: Tensor) -> Tensor:
        options_ = {"reference_logprobs": TOKENS, "beta": beta, "mask": MASK, "reduction": "none", **options}
        out = losses.ppo(tokens, advantages, aggregation="seq_mean_token_sum", **options_)
        return (tokens.detach().sum(1).exp() * out.loss).sum()

    return loss


class TestKlInTheLoss:
    """Per token, the penalty does not see what divergence comes behind an action."""

    @by_start
    @pytest.mark.parametrize("options", [{"kl": "k2"}, {"kl": "k3", "kl_corrected": True}], ids=["k2", "rho k3"])
    def test_k2(self, options, start):
        """π(z | s) = ref e^(Q(s, z)/β)/Z, Q the expected reward behind z: not the tilted reference."""
        found = settle(penalised(REWARDS, BETA, **options), start)
        assert total_variation(found, node_by_node(lambda p, q: torch.softmax(p.log() + q / BETA, 0))) < 1e-9
        assert total_variation(found, TARGET) > 1e-2

    @by_start
    def test_k3(self, start):
        """π(z | s) = ref β/(λ - Q(s, z))."""
        found = settle(penalised(REWARDS, BETA, kl="k3"), start, rate=0.5)
        assert total_variation(found, node_by_node(lambda p, q: forward_kl_point(p, q, BETA))) < 1e-9
        assert total_variation(found, TARGET) > 1e-2

    @by_backend
    def test_expected_gradients_of_the_estimators(self, backend):
        """0 for k1; for k2 and k3 that of KL(π, ref) and KL(ref, π) of each node, weighted by how often it is met."""
        leaves = [x.clone().requires_grad_() for x in STARTS["far"]]
        p, q = (torch.log_softmax(x, -1) for x in leaves)
        met = p.detach().exp()[1:]
        exact = {"k1": [torch.zeros_like(x) for x in leaves]}
        for name, divergence in (
            ("k2", lambda a, b: (a.exp() * (a - b)).sum(-1)),
            ("k3", lambda a, b: (b.exp() * (b - a)).sum(-1)),
        ):
            value = divergence(p, FIRST.log()) + (met * divergence(q, SECOND.log())).sum()
            exact[name] = list(torch.autograd.grad(value, leaves, retain_graph=True))
        zero = torch.zeros(7, dtype=torch.float64)
        for kl, want in exact.items():
            with fastpo.use_backend(backend):
                value = penalised(zero, 1.0, kl=kl)(tree_logprobs(*leaves))
            for found, wanted in zip(torch.autograd.grad(value, leaves), want, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@by_backend
@by_start
def test_copg_off_policy(start, backend):
    """Pairs of any two laws, none of them the policy's: the tilted reference, where the loss itself is 0."""
    i, j = (t.flatten() for t in torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij"))

    def loss(logits: Tensor, seed: int, beta: float = BETA) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        laws = torch.softmax(2 * torch.randn(2, 7, generator=generator, dtype=torch.float64), 1)
        tokens = tree_logprobs(logits[:3], logits[3:].view(2, 3))
        options = {"beta": beta, "chosen_mask": MASK[i], "rejected_mask": MASK[j], "reduction": "none"}
        out = losses.copg(tokens[i], tokens[j], TOKENS[i], TOKENS[j], REWARDS[i], REWARDS[j], **options)
        return (laws[0][i] * laws[1][j] * out.loss).sum()

    def law(logits: Tensor) -> Tensor:
        return tree_logprobs(logits[:3], logits[3:].view(2, 3)).sum(1).exp()

    begin = torch.cat([x.flatten() for x in STARTS[start]])
    for seed in (1, 2):
        found = descend(lambda x, seed=seed: loss(x, seed), begin)
        assert total_variation(law(found), TARGET) < 1e-9 and loss(found, seed) < 1e-24
    wrong = descend(lambda x: loss(x, 1, 1.5 * BETA), begin)
    assert total_variation(law(wrong), TARGET) > 1e-2
