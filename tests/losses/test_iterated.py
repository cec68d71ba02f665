"""Catalogue 4, what comes of many steps: iterates of exact steps, their averages, self-play, selection.

Every step minimises the public loss, or follows its semi-gradient; judged by the total variation to the stated point
(by exploitability where only the average converges), from two starts, with planted errors that must be seen.
`tests/losses/test_fixed_points.py` has single steps and the tools.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpo import data, losses
from tests.losses.test_fixed_points import (
    BETA,
    CLEAN,
    DATA,
    PREFERENCE,
    REFERENCE,
    REWARD,
    STARTS,
    WEIGHTS,
    N,
    Setting,
    expected,
    gibbs,
    minimise,
    normalised,
    regularised_nash,
    semi_gradient,
)
from tests.losses.test_reference import total_variation

by_start = pytest.mark.parametrize("start", list(STARTS))
FIRST, SECOND = (i.flatten() for i in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij"))
TARGET = regularised_nash(BETA)


def _game() -> Tensor:
    """0 beats 1 beats 2 beats 0, not equally often, and all of them beat 3 and 4: no answer is best."""
    scores = torch.zeros(N, N, dtype=torch.float64)
    for i, j, s in ((0, 1, 1.5), (1, 2, 1.0), (2, 0, 2.0), (3, 4, 0.3)):
        scores[i, j] = s
    for i, j in itertools.product(range(3), (3, 4)):
        scores[i, j] = 0.5 + 0.2 * i + 0.1 * (j - 3)
    return torch.sigmoid(scores - scores.T)


GAME = _game()


def exploitability(policy: Tensor, game: Tensor = GAME) -> float:
    """By how much the best response wins more often than half of the time."""
    return (game @ policy).max().item() - 0.5


def step(name: str, policy: Tensor, weights: Tensor, inputs: Callable, *, reference: Tensor, **hyper: float) -> Tensor:
    """The policy that minimises the loss on data of the last one."""
    setting = Setting(weights, policy, {}, inputs, reference)
    return minimise(expected(name, setting, weights, **hyper), policy.log())


def spin(policy: Tensor, beta: float) -> Tensor:
    return step("spin", policy, DATA[:, None] * policy, lambda i, j: {}, reference=policy, beta=beta)


class TestSpin:
    @by_start
    @pytest.mark.parametrize("beta", [0.8, 1.0, 2.0])
    def test_converges_above_one_half(self, start, beta):
        """The distance of the log-ratios is multiplied by 1 - 1/beta: geometric, and one step at 1."""
        policy, steps = torch.softmax(STARTS[start], 0), 0
        while total_variation(policy, DATA) > 1e-10 and steps < 50:
            before, policy, steps = policy, spin(policy, beta), steps + 1
            want = normalised(before.log() + (DATA / before).log() / beta)
            assert total_variation(policy, want) < 1e-9
        assert total_variation(policy, DATA) < 1e-9 and (steps == 1) == (beta == 1.0)

    @pytest.mark.parametrize("beta", [0.1, 0.4])
    def test_repels_below_one_half(self, beta):
        """The data's policy stays where it is for every beta, but what is next to it is driven away."""
        assert total_variation(spin(DATA, beta), DATA) < 1e-9
        near = normalised(DATA.log() + 1e-6 * STARTS["far"])
        distances = [total_variation(near, DATA)]
        for _ in range(3):
            near = spin(near, beta)
            distances.append(total_variation(near, DATA))
        factor = 1 / beta - 1
        assert all(b / a == pytest.approx(factor, rel=0.05) for a, b in itertools.pairwise(distances))

    def test_sees_swapped_sides(self):
        """With the sample as the chosen response the step leads away from the data."""
        setting = Setting((DATA[:, None] * REFERENCE).T, DATA, {}, reference=REFERENCE)
        wrong = minimise(expected("spin", setting, setting.weights, beta=1.0), REFERENCE.log())
        assert total_variation(wrong, DATA) > total_variation(REFERENCE, DATA) > 1e-2


def win_rates(policy: Tensor, game: Tensor) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    wins = game @ policy
    return lambda i, j: {"chosen_win_rate": wins[i], "rejected_win_rate": wins[j]}


def sppo(policy: Tensor, game: Tensor, eta: float) -> Tensor:
    weights = policy[:, None] * policy
    return step("sppo", policy, weights, win_rates(policy, game), reference=policy, beta=1 / eta)


def dno(policy: Tensor, game: Tensor, eta: float) -> Tensor:
    return step("dno", policy, WEIGHTS, win_rates(policy, game), reference=policy, beta=1 / eta)


class TestAverages:
    """sppo and dno in self-play: the average of the iterates is nearly unexploitable, the last iterate cycles."""

    ETA, STEPS = 0.4, 400

    def run(self, method: Callable, start: str, game: Tensor = GAME, steps: int = STEPS) -> tuple[Tensor, list[float]]:
        policy, total, exploited = torch.softmax(STARTS[start], 0), torch.zeros(N).double(), []
        for _ in range(steps):
            total += policy
            exploited.append(exploitability(policy))
            policy = method(policy, game, self.ETA)
        return total / steps, exploited

    @by_start
    @pytest.mark.parametrize("method", [sppo, dno])
    def test_average_and_last_iterate(self, method, start):
        average, exploited = self.run(method, start)
        # regret: log(1/least start) / (eta T), and eta / 8 for steps of this size
        least = torch.softmax(STARTS[start], 0)[:3].min()
        assert exploitability(average) < -least.log().item() / (self.ETA * self.STEPS) + self.ETA / 8
        assert exploitability(average) < 0.03
        assert min(exploited[-100:]) > 0.03 and max(exploited[-100:]) > 0.1
        assert average[3:].sum() < 0.05

    @pytest.mark.parametrize("method", [sppo, dno])
    def test_sees_swapped_preferences(self, method):
        average, _ = self.run(method, "reference", GAME.T, 100)
        assert exploitability(average) > 0.1

    def test_a_reward_behind_the_game(self):
        """A Bradley-Terry game has one best answer, and dno's last iterate goes there."""
        policy = REFERENCE
        for _ in range(60):
            policy = dno(policy, CLEAN, 2.0)
        assert policy[REWARD.argmax()] > 1 - 1e-6


class TestInpo:
    TAU = 0.1

    def limit(self, eta: float, start: str, steps: int, tau: float = TAU) -> Tensor:
        policy = torch.softmax(STARTS[start], 0)
        for _ in range(steps):
            last = policy.log()

            def inputs(i: Tensor, j: Tensor, last: Tensor = last) -> dict[str, Tensor]:
                return {"previous_chosen": last[i], "previous_rejected": last[j]}

            weights = policy[:, None] * policy * GAME
            policy = step("inpo", policy, weights, inputs, reference=REFERENCE, beta=tau, eta=eta)
        return policy

    @staticmethod
    def nash(tau: float) -> Tensor:
        """pi = ref exp(P(y > pi) / tau) / Z, by small steps."""
        policy = REFERENCE
        for _ in range(40_000):
            policy = normalised(0.99 * policy.log() + 0.01 * gibbs(GAME @ policy, beta=tau).log())
        return policy

    @by_start
    def test_reaches_the_regularised_equilibrium(self, start):
        target = self.nash(self.TAU)
        assert total_variation(gibbs(GAME @ target, beta=self.TAU), target) < 1e-12
        assert total_variation(self.limit(1.0, start, 260), target) < 1e-9
        assert total_variation(self.limit(1.0, start, 60, tau=0.2), target) > 1e-2

    def test_steps_that_are_too_long(self):
        """An eta near tau overshoots: the iterates do not settle."""
        policy = self.limit(0.12, "reference", 40)
        assert total_variation(policy, self.nash(self.TAU)) > 0.05


def mixture_point(b: float) -> Tensor:
    """pi = ref exp(P(y > pi^(1-b) ref^b) / beta) / Z."""
    policy = REFERENCE
    for _ in range(5000):
        mixed = normalised((1 - b) * policy.log() + b * REFERENCE.log())
        policy = normalised(0.9 * policy.log() + 0.1 * gibbs(PREFERENCE @ mixed).log())
    return policy


@by_start
class TestNash:
    @pytest.mark.parametrize("b", [0.125, 0.5])
    @pytest.mark.parametrize("name", ["nash_md", "ipo_md"])
    def test_mixtures(self, start, name, b):
        """With an opponent mixed with the reference: another point than the equilibrium, the same for both losses."""
        target = mixture_point(b)

        def mixed(policy: Tensor) -> Tensor:
            return normalised((1 - b) * policy.log() + b * REFERENCE.log())

        def policy_gradient(logits: Tensor, policy: Tensor, beta: float = BETA) -> Tensor:
            win, logp = PREFERENCE @ mixed(policy), torch.log_softmax(logits, 0)
            return (policy * losses.nash_md(logp, REFERENCE.log(), win, beta=beta, reduction="none").loss).sum()

        def pairs_of_the_mixture(logits: Tensor, policy: Tensor, beta: float = BETA) -> Tensor:
            logp, r, law = torch.log_softmax(logits, 0), REFERENCE.log(), mixed(policy)
            tensors = logp[FIRST], logp[SECOND], r[FIRST], r[SECOND], PREFERENCE.flatten()
            return (law[FIRST] * law[SECOND] * losses.ipo_md(*tensors, beta=beta, reduction="none").loss).sum()

        def run(beta: float) -> Tensor:
            if name == "nash_md":
                return semi_gradient(lambda x, p: policy_gradient(x, p, beta), STARTS[start], 0.8)
            return semi_gradient(lambda x, p: pairs_of_the_mixture(x, p, beta), STARTS[start], 0.2, law=mixed)

        assert total_variation(run(BETA), target) < 1e-9
        assert total_variation(run(2 * BETA), target) > 1e-2
        assert total_variation(target, TARGET) > 1e-3 * b

    def test_online_ipo_with_sampled_labels(self, start):
        """Labels drawn with the probability p lead where p itself does; a gradient through the samples elsewhere."""

        def loss(logits: Tensor, policy: Tensor) -> Tensor:
            logp, r = torch.log_softmax(logits, 0), REFERENCE.log()
            tensors = logp[FIRST], logp[SECOND], r[FIRST], r[SECOND]
            each = [
                losses.online_ipo(*tensors, torch.full_like(tensors[0], label).detach(), beta=BETA, reduction="none")
                for label in (1.0, 0.0)
            ]
            p = PREFERENCE.flatten()
            return (policy[FIRST] * policy[SECOND] * (p * each[0].loss + (1 - p) * each[1].loss)).sum()

        assert total_variation(semi_gradient(loss, STARTS[start], 0.2), TARGET) < 1e-9
        through = semi_gradient(lambda x, policy: loss(x, torch.softmax(x, 0)), TARGET.log(), 0.02, 400)
        assert total_variation(through, TARGET) > 1e-2

    @pytest.mark.parametrize("decay", [0.5, 0.95, 1.0])
    def test_nash_ema(self, start, decay):
        """An average of the weights as the opponent: the equilibrium, unless it never moves from the first policy."""
        first = torch.softmax(STARTS[start], 0)
        average = STARTS[start].clone()

        def loss(logits: Tensor, policy: Tensor) -> Tensor:
            nonlocal average
            average = decay * average + (1 - decay) * logits.detach()
            win = PREFERENCE @ torch.softmax(average, 0)
            out = losses.nash_ema(torch.log_softmax(logits, 0), REFERENCE.log(), win, beta=BETA, reduction="none")
            return (policy * out.loss).sum()

        found = semi_gradient(loss, STARTS[start], 0.4, 1200)
        fixed = gibbs(PREFERENCE @ first)
        assert total_variation(found, fixed if decay == 1 else TARGET) < 1e-9
        assert total_variation(fixed, TARGET) > 1e-3

    @pytest.mark.parametrize("eta", [0.3, 1.0])
    def test_nash_mp_in_two_steps(self, start, eta):
        """The first version's mirror prox: both half steps stay near the last policy, the second one answers the first.

        The half steps' semi-gradient is linear in the log-probs, so that one step of the right length solves it.
        """

        def half(opponent: Tensor, near: Tensor, beta: float) -> Tensor:
            def loss(logits: Tensor, policy: Tensor) -> Tensor:
                win = PREFERENCE @ opponent
                tensors = torch.log_softmax(logits, 0), REFERENCE.log(), near.log(), win
                out = losses.nash_mp(*tensors, beta=beta, eta=eta, reduction="none")
                return (policy * out.loss).sum()

            return semi_gradient(loss, near.log(), 1 / (beta + beta / eta), 2)

        def run(beta: float) -> list[Tensor]:
            policies = [torch.softmax(STARTS[start], 0)]
            for _ in range(120):
                middle = half(policies[-1], policies[-1], beta)
                policies.append(half(middle, policies[-1], beta))
            return policies

        policies = run(BETA)
        assert total_variation(policies[-1], TARGET) < 1e-9
        # linear, at least as fast as 1 / (1 + eta) in the divergence
        away = [(p.log() - TARGET.log()).abs().max().item() for p in policies[:12]]
        assert away[10] < away[0] * (1 + eta) ** -4.5
        assert total_variation(run(2 * BETA)[-1], TARGET) > 1e-2


class TestTree:
    """Two tokens, sequences of one and two: the KL's gradient over whole sequences, and the equilibrium it leads to."""

    generator = torch.Generator().manual_seed(4)
    sizes = (3, 2, 2)
    paths = (((0, 0),), ((0, 1), (1, 0)), ((0, 1), (1, 1)), ((0, 2), (2, 0)), ((0, 2), (2, 1)))
    reference = tuple(
        torch.log_softmax(torch.randn(n, generator=torch.Generator().manual_seed(i), dtype=torch.float64), 0)
        for i, n in enumerate((3, 2, 2))
    )
    starts = (0.0, 2.0)

    def tokens(self, policy: tuple[Tensor, ...]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack(
            [torch.stack([*(policy[s][t] for s, t in path), *[zero] * (2 - len(path))]) for path in self.paths]
        )

    mask = torch.tensor([[True, len(path) > 1] for path in paths])

    def law(self, policy: tuple[Tensor, ...]) -> Tensor:
        return self.tokens(policy).sum(1).exp()

    def equilibrium(self) -> Tensor:
        policy = reference = self.law(self.reference)
        for _ in range(5000):
            policy = normalised(0.9 * policy.log() + 0.1 * gibbs(PREFERENCE @ policy, base=reference).log())
        return policy

    def run(self, kl: str, scale: float, beta: float = BETA) -> Tensor:
        generator = torch.Generator().manual_seed(8)
        logits = [scale * torch.randn(n, generator=generator, dtype=torch.float64) for n in self.sizes]
        known = self.tokens(self.reference)
        for _ in range(600):
            leaves = [x.clone().requires_grad_() for x in logits]
            policy = tuple(torch.log_softmax(x, 0) for x in leaves)
            ours = self.tokens(policy)
            law = ours.sum(1).exp().detach()
            win = PREFERENCE @ law
            if kl == "per_token":
                # TRL's: every token with its own log-ratio alone
                slope = 0.5 - win[:, None] + beta * (ours - known).detach()
                each = torch.where(self.mask, slope * ours, 0).sum(1)
            else:
                each = losses.nash_md(ours, known, win, beta=beta, mask=self.mask, kl=kl, reduction="none").loss
            grads = torch.autograd.grad((law * each).sum(), leaves)
            visits = [torch.ones(()).double(), policy[0][1].exp(), policy[0][2].exp()]
            for s, (x, p, v, g) in enumerate(zip(leaves, policy, visits, grads, strict=True)):
                moved = x.detach() - 0.5 * g / (v * p.exp()).detach()
                logits[s] = moved - moved.logsumexp(0)
        return self.law(tuple(torch.log_softmax(x, 0) for x in logits))

    @pytest.mark.parametrize("scale", starts)
    @pytest.mark.parametrize("kl", ["sequence", "to_go"])
    def test_equilibrium(self, kl, scale):
        target = self.equilibrium()
        assert total_variation(self.run(kl, scale), target) < 1e-9
        assert total_variation(self.run(kl, scale, 2 * BETA), target) > 1e-2

    def test_per_token_form_is_elsewhere(self):
        assert total_variation(self.run("per_token", 0.0), self.equilibrium()) > 1e-3

    def test_to_go_has_the_smaller_variance(self):
        """The same expectation over samples, with less noise."""
        policy = [x.clone().requires_grad_() for x in self.reference]
        known = [torch.log_softmax(1.5 * torch.randn(n, generator=self.generator).double(), 0) for n in self.sizes]
        ours, theirs = self.tokens(tuple(torch.log_softmax(x, 0) for x in policy)), self.tokens(tuple(known))
        law, win, moments = ours.sum(1).exp().detach(), torch.full((5,), 0.5).double(), {}
        for kl in ("sequence", "to_go"):
            each = losses.nash_md(ours, theirs, win, beta=1.0, mask=self.mask, kl=kl, reduction="none").loss
            grads = torch.stack(
                [torch.cat(torch.autograd.grad(x, policy, retain_graph=True, materialize_grads=True)) for x in each]
            )
            mean = (law[:, None] * grads).sum(0)
            moments[kl] = mean, (law[:, None] * (grads - mean).square()).sum()
        torch.testing.assert_close(moments["sequence"][0], moments["to_go"][0], rtol=1e-12, atol=1e-14)
        assert moments["to_go"][1] < 0.95 * moments["sequence"][1]


class TestSharpening:
    """SFT on the best of N of the base's own samples: the law of the best of N, and no Gibbs policy."""

    def law(self, n: int, select: Callable[[Tensor], Tensor], reward: Tensor) -> Tensor:
        """What is selected, over all N-tuples of samples."""
        tuples = torch.cartesian_prod(*[torch.arange(N)] * n).view(-1, n)
        chosen = tuples.gather(1, select(reward[tuples])[:, None])[:, 0]
        weights = REFERENCE[tuples].prod(1)
        return torch.zeros(N, dtype=torch.float64).index_add(0, chosen, weights)

    def exact(self, n: int, reward: Tensor) -> Tensor:
        """F(r)^N - F_-(r)^N, shared within a tie as the base shares it."""
        below, tied = (reward < reward[:, None]), (reward == reward[:, None])
        f_minus, mass = (below * REFERENCE).sum(1), (tied * REFERENCE).sum(1)
        return ((f_minus + mass) ** n - f_minus**n) * REFERENCE / mass

    @by_start
    @pytest.mark.parametrize("n", [1, 2, 4])
    def test_best_of_n(self, n, start):
        zero = torch.zeros(N, 1, dtype=torch.float64)
        for reward in (REFERENCE.log(), torch.tensor([0.0, 1.0, 1.0, 2.0, 0.0]).double()):
            target = self.exact(n, reward)
            selected = self.law(n, data.select_best_of_n, reward)
            assert total_variation(selected, target) < 1e-14

            def sft(logits: Tensor, law: Tensor = selected) -> Tensor:
                logp = torch.log_softmax(logits, 0)[:, None]
                return (law * losses.implicit_reward_sft(logp, zero, zero, reduction="none").loss).sum()

            assert total_variation(minimise(sft, STARTS[start]), target) < 1e-9
            if n > 1:
                worst = self.law(n, lambda r: data.select_best_of_n(-r), reward)
                assert total_variation(worst, target) > 1e-2
                assert total_variation(self.exact(n + 1, reward), target) > 1e-2

    def test_is_not_the_sharpened_gibbs_policy(self):
        """base^(1 + 1/beta) for the best beta of a fine grid is not it either."""
        target = self.exact(4, REFERENCE.log())
        powers = torch.linspace(1, 8, 1401, dtype=torch.float64)
        assert min(total_variation(normalised(p * REFERENCE.log()), target) for p in powers) > 5e-3
