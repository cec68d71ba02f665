"""Catalogue 4, row by row: the policy to which each method with a theorem provably leads, in exactly its setting.

On a tabular softmax policy under full expectation; judged by the total variation to the stated point, from two starts,
with planted errors that must be seen. `tests/losses/test_reference.py` has the method and its first rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.reference.registry import objectives
from tests.losses.test_reference import bradley_terry, total_variation

BACKENDS = ["native", "reference"]
N = 5
BETA = 0.5
_generator = torch.Generator().manual_seed(11)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


def _simplex() -> Tensor:
    return torch.softmax(_random(N), 0)


REWARD, REFERENCE, LENGTH = _random(N), _simplex(), torch.tensor([1, 3, 2, 5, 4])
_weights = torch.rand(N, N, generator=_generator, dtype=torch.float64).add(0.05).triu(1)
# of unordered pairs: no reward or policy is behind them
WEIGHTS = _weights + _weights.T
CLEAN = bradley_terry(REWARD)
_scores = _random(N, N)
# a preference without a reward behind it
PREFERENCE = torch.sigmoid(_scores - _scores.T)
PREVIOUS, DATA, VISITS = _simplex(), _simplex(), torch.tensor([40.0, 7.0, 90.0, 12.0, 25.0], dtype=torch.float64)
SCORE, EACH = _random(N), -torch.rand(N, generator=_generator, dtype=torch.float64)
WIN_RATE = torch.rand(N, generator=_generator, dtype=torch.float64)
STARTS = {"reference": REFERENCE.log(), "far": 3 * _random(N)}


def normalised(log_density: Tensor) -> Tensor:
    return torch.softmax(log_density, 0)


def gibbs(advantage: Tensor, base: Tensor = REFERENCE, beta: float = BETA) -> Tensor:
    return normalised(base.log() + advantage / beta)


def root(f: Callable[[Tensor], Tensor], low: float, high: float) -> Tensor:
    """Where an increasing function of a number (or of one each) is 0, by bisection to the last bit."""
    shape = f(torch.tensor(low, dtype=torch.float64)).shape
    a, b = torch.full(shape, low, dtype=torch.float64), torch.full(shape, high, dtype=torch.float64)
    for _ in range(200):
        middle = (a + b) / 2
        below = f(middle) < 0
        a, b = torch.where(below, middle, a), torch.where(below, b, middle)
    return (a + b) / 2


def shifted(policy: Callable[[Tensor], Tensor], low: float, high: float) -> Tensor:
    """policy(c) for the shift c at which it sums to 1; it decreases in c."""
    return policy(root(lambda c: 1 - policy(c).sum(), low, high))


def descend(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The logits at which a loss is least, convex or not: Newton's method with the Hessian's absolute values.

    The Hessian differentiates the loss's own gradient, so the second derivative of the objective is used too.
    """
    logits = start.clone()
    for _ in range(300):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient])
        values, vectors = torch.linalg.eigh(hessian.detach())
        # the loss does not change along the shifts of a softmax
        size = values.abs()
        inverse = torch.where(size < 1e-12 * size.max(), 0, 1 / size)
        step = -(vectors * inverse) @ (vectors.T @ gradient.detach())
        slope = (step @ gradient.detach()).item()
        if slope > -1e-28:
            break
        rate = 1.0
        # near the optimum the loss no longer resolves its own decrease, but the full step is right
        while slope < -1e-12 and rate > 1e-9 and loss(logits + rate * step) > value + 0.1 * rate * slope:
            rate /= 2
        logits = logits + rate * step
    return logits


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The policy at which it is least."""
    return torch.softmax(descend(loss, start), 0)


class Setting(NamedTuple):
    """Weights of ordered pairs (chosen, rejected), further arguments by their indices, and the minimiser."""

    weights: Tensor
    target: Tensor
    hyper: dict[str, object]
    inputs: Callable[[Tensor, Tensor], dict[str, Tensor]] = lambda i, j: {}
    # a loss whose minimiser over logits is asked for, rather than over a policy
    reference: Tensor = REFERENCE
    # of the labels, to plant an error
    transposed: Tensor | None = None


def labelled(probability: Tensor, weights: Tensor = WEIGHTS) -> dict[str, Tensor]:
    return {"weights": weights * probability, "transposed": weights * probability.T}


def lengths(i: Tensor, j: Tensor) -> dict[str, Tensor]:
    return {"chosen_lengths": LENGTH[i], "rejected_lengths": LENGTH[j]}


def sppo_step(beta: float) -> Tensor:
    """log u + lam u / 2 = (P(y > pi_t) - 1/2) / beta with u = pi / pi_t, and lam such that pi sums to 1."""
    target = (PREFERENCE @ PREVIOUS - 0.5) / beta

    def policy(lam: Tensor) -> Tensor:
        return PREVIOUS * root(lambda t: t + lam / 2 * t.exp() - target, -80.0, 40.0).exp()

    return shifted(policy, -0.5, 50.0)


def ordered() -> Tensor:
    """The pairs whose first member has more visits."""
    return WEIGHTS * (VISITS[:, None] > VISITS[None])


def chi_target() -> Tensor:
    def policy(c: Tensor) -> Tensor:
        right = (REWARD - c) / BETA
        return REFERENCE * root(lambda t: t.exp() + t - right, -200.0, 20.0).exp()

    return shifted(policy, -100.0, 100.0)


PAIRWISE: dict[tuple[str, str], Callable[[], Setting]] = {
    **{
        (name, ""): lambda: Setting(**labelled(CLEAN), target=gibbs(REWARD), hyper={})
        for name in ("dpo", "online_dpo", "rso_sigmoid")
    },
    # no reference: a uniform one
    ("autoregressive_reward", ""): lambda: Setting(**labelled(CLEAN), target=normalised(REWARD / BETA), hyper={}),
    ("robust_dpo", ""): lambda: Setting(
        **labelled(0.8 * CLEAN + 0.2 * CLEAN.T), target=gibbs(REWARD), hyper={"label_smoothing": 0.2}
    ),
    ("ipo", ""): lambda: Setting(
        **labelled(PREFERENCE, DATA[:, None] * DATA), target=gibbs(PREFERENCE @ DATA), hyper={}
    ),
    ("ipo", "trl"): lambda: Setting(
        **labelled(PREFERENCE, DATA[:, None] * DATA),
        target=gibbs(3 * (PREFERENCE @ DATA)),
        hyper={"convention": "trl"},
        inputs=lambda i, j: {"chosen_lengths": torch.full_like(i, 3), "rejected_lengths": torch.full_like(j, 3)},
    ),
    ("f_dpo", "reverse_kl"): lambda: Setting(
        **labelled(CLEAN), target=gibbs(REWARD), hyper={"divergence": "reverse_kl"}
    ),
    ("f_dpo", "forward_kl"): lambda: Setting(
        **labelled(CLEAN),
        target=shifted(lambda c: REFERENCE * BETA / (REWARD.max() + c - REWARD), 1e-6, 100.0),
        hyper={"divergence": "forward_kl"},
    ),
    ("f_dpo", "jsd"): lambda: Setting(
        **labelled(CLEAN),
        # log(2u / (1 + u)) = (r - c) / beta
        target=shifted(
            lambda c: REFERENCE / (2 * torch.exp((REWARD.max() + c - REWARD) / BETA) - 1),
            -BETA * 0.69 + 1e-9,
            100.0,
        ),
        hyper={"divergence": "jsd"},
    ),
    ("f_dpo", "alpha"): lambda: Setting(
        **labelled(CLEAN),
        target=shifted(lambda c: REFERENCE * (0.3 * (REWARD.max() + c - REWARD) / BETA) ** (-1 / 0.3), 1e-6, 100.0),
        hyper={"divergence": "alpha", "alpha": 0.3},
    ),
    ("chi_po", ""): lambda: Setting(**labelled(CLEAN), target=chi_target(), hyper={}),
    ("r_dpo", ""): lambda: Setting(
        **labelled(CLEAN), target=gibbs(REWARD - 0.4 * LENGTH.double()), hyper={"alpha": 0.4}, inputs=lengths
    ),
    ("odpo", "identity"): lambda: Setting(
        **labelled(CLEAN),
        target=gibbs(REWARD + 0.4 * SCORE),
        hyper={"alpha": 0.4, "offset": "identity"},
        inputs=lambda i, j: {"chosen_score": SCORE[i], "rejected_score": SCORE[j]},
    ),
    ("mcts_dpo", ""): lambda: Setting(
        ordered(),
        gibbs(VISITS.log()),
        {},
        lambda i, j: {"chosen_visits": VISITS[i], "rejected_visits": VISITS[j]},
        transposed=ordered().T,
    ),
    ("dpo_norm", ""): lambda: Setting(
        **labelled(CLEAN),
        target=shifted(lambda c: REFERENCE * torch.exp(LENGTH * (REWARD - c) / BETA), -50.0, 50.0),
        hyper={},
        inputs=lengths,
    ),
    ("simpo", ""): lambda: Setting(
        **labelled(CLEAN),
        target=shifted(lambda c: torch.exp(LENGTH * (REWARD - c) / BETA), -50.0, 50.0),
        hyper={"gamma": 0},
        inputs=lengths,
    ),
    ("alpha_po", ""): lambda: Setting(
        **labelled(CLEAN),
        target=shifted(lambda c: (1 + 0.3 * (REWARD.max() + c - REWARD) / BETA) ** (-2 / 0.3), -BETA / 0.3 + 1e-6, 1e4),
        hyper={"gamma": 0, "alpha": 0.3},
        inputs=lambda i, j: {"chosen_lengths": torch.full_like(i, 2), "rejected_lengths": torch.full_like(j, 2)},
    ),
    ("cpo", "alpha=0"): lambda: Setting(**labelled(CLEAN), target=normalised(REWARD / BETA), hyper={"alpha": 0}),
    ("sharpening_rebel", ""): lambda: Setting(WEIGHTS, gibbs(REFERENCE.log()), {}),
    ("nca_pair", "beta=1"): lambda: Setting(
        **labelled(CLEAN, REFERENCE[:, None] * REFERENCE), target=2 * REFERENCE * (CLEAN @ REFERENCE), hyper={"beta": 1}
    ),
    ("spin", ""): lambda: Setting(
        DATA[:, None] * PREVIOUS,
        normalised(PREVIOUS.log() + (DATA.log() - PREVIOUS.log()) / BETA),
        {},
        reference=PREVIOUS,
        transposed=(DATA[:, None] * PREVIOUS).T,
    ),
    ("dno", ""): lambda: Setting(
        WEIGHTS,
        gibbs(WIN_RATE, PREVIOUS),
        {},
        lambda i, j: {"chosen_win_rate": WIN_RATE[i], "rejected_win_rate": WIN_RATE[j]},
        PREVIOUS,
    ),
    ("sppo", ""): lambda: Setting(
        PREVIOUS[:, None] * PREVIOUS,
        sppo_step(BETA),
        {},
        lambda i, j: {
            "chosen_win_rate": (PREFERENCE @ PREVIOUS)[i],
            "rejected_win_rate": (PREFERENCE @ PREVIOUS)[j],
        },
        PREVIOUS,
    ),
    ("sppo_hard", ""): lambda: Setting(
        **labelled(PREFERENCE, PREVIOUS[:, None] * PREVIOUS), target=sppo_step(BETA), hyper={}, reference=PREVIOUS
    ),
    ("inpo", ""): lambda: Setting(
        **labelled(PREFERENCE, PREVIOUS[:, None] * PREVIOUS),
        target=normalised(
            BETA / 0.8 * REFERENCE.log() + (1 - BETA / 0.8) * PREVIOUS.log() + PREFERENCE @ PREVIOUS / 0.8
        ),
        hyper={"eta": 0.8},
        inputs=lambda i, j: {"previous_chosen": PREVIOUS.log()[i], "previous_rejected": PREVIOUS.log()[j]},
    ),
    # pairs of any policy, rewards instead of labels
    ("copg", ""): lambda: Setting(
        WEIGHTS, gibbs(REWARD), {}, inputs=lambda i, j: {"chosen_reward": REWARD[i], "rejected_reward": REWARD[j]}
    ),
    # what is added at 0 leaves the theorem of the rest
    ("xpo", "alpha=0"): lambda: Setting(
        **labelled(CLEAN),
        target=gibbs(REWARD),
        hyper={"alpha": 0},
        inputs=lambda i, j: {"chosen_is_reference": i > j},
    ),
    ("rpo", "eta=0"): lambda: Setting(**labelled(CLEAN), target=gibbs(REWARD), hyper={"eta": 0}),
    ("sharpening_xpo", "alpha=0"): lambda: Setting(WEIGHTS, gibbs(REFERENCE.log()), {"alpha": 0}),
}


def expected(name: str, setting: Setting, weights: Tensor, **hyper: object) -> Callable[[Tensor], Tensor]:
    """The expectation of a method's loss over every ordered pair, as a function of the policy's logits."""
    row = fastpo.reference.objective(name)
    first, second = (i.flatten() for i in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij"))
    given = setting.inputs(first, second)

    def loss(logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, 0)
        tensors = {f"{row.scores}_chosen": logp[first], f"{row.scores}_rejected": logp[second]}
        if row.reference_model:
            tensors |= {"reference_chosen": setting.reference.log()[first]}
            tensors |= {"reference_rejected": setting.reference.log()[second]}
        out = getattr(losses, name)(**tensors, **given, **hyper, reduction="none")
        return (weights.flatten() * out.loss).sum()

    return loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", list(STARTS))
@pytest.mark.parametrize(("name", "variant"), list(PAIRWISE), ids=lambda x: x)
def test_minimiser(name, variant, start, backend):
    setting = PAIRWISE[name, variant]()
    hyper = {"beta": BETA, **setting.hyper}
    with fastpo.use_backend(backend):
        right = minimise(expected(name, setting, setting.weights, **hyper), STARTS[start])
        assert total_variation(right, setting.target) < 1e-9
        # the test sees planted errors
        larger = {**hyper, "beta": 1.5 * hyper["beta"]}
        wrong = minimise(expected(name, setting, setting.weights, **larger), STARTS[start])
        assert total_variation(wrong, setting.target) > 5e-3
        if setting.transposed is not None:
            swapped = minimise(expected(name, setting, setting.transposed, **hyper), STARTS[start])
            assert total_variation(swapped, setting.target) > 5e-3


def test_every_theorem_is_here():
    """Rows whose theory is a target or a step; the others have properties."""
    covered = {name for name, _ in PAIRWISE} | {"bradley_terry", "wpo", "tdpo", "bco"}
    covered |= {"online_ipo", "ipo_md", "nash_md", "nash_ema", "nash_mp"}
    # tests/losses/test_policy_points.py
    covered |= {"p3o"}
    assert {row.name for row in objectives() if row.theory != "property"} <= covered


@pytest.mark.parametrize("backend", BACKENDS)
class TestOthers:
    @pytest.mark.parametrize("start", list(STARTS))
    def test_bradley_terry(self, backend, start):
        """The scores are the reward, up to a constant; with the same margin for all pairs they are not."""
        i, j = (t.flatten() for t in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij"))

        def loss(scores: Tensor, **margin: float) -> Tensor:
            out = losses.bradley_terry(scores[i], scores[j], reduction="none", **margin)
            return ((WEIGHTS * CLEAN).flatten() * out.loss).sum()

        with fastpo.use_backend(backend):
            assert total_variation(minimise(loss, STARTS[start]), normalised(REWARD)) < 1e-9
            with_margin = minimise(lambda scores: loss(scores, margin=0.3), STARTS[start])
            assert total_variation(with_margin, normalised(REWARD)) > 1e-2

    @pytest.mark.parametrize("start", list(STARTS))
    def test_wpo(self, backend, start):
        """A detached weight that is symmetric in the pair changes nothing."""
        i, j = (t.flatten() for t in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij"))

        def loss(logits: Tensor, winner_too: bool = False) -> Tensor:
            logp = torch.log_softmax(logits, 0)
            # weights exp(EACH), those of the chosen one squared if they are to depend on who won
            log_sum = logp.detach() - EACH, logp.detach() - EACH * (3 if winner_too else 1)
            tensors = logp[i], logp[j], REFERENCE.log()[i], REFERENCE.log()[j], log_sum[1][i], log_sum[0][j]
            ones = torch.ones_like(i)
            out = losses.wpo(*tensors, beta=BETA, chosen_lengths=ones, rejected_lengths=ones, reduction="none")
            return ((WEIGHTS * CLEAN).flatten() * out.loss).sum()

        with fastpo.use_backend(backend):
            assert total_variation(minimise(loss, STARTS[start]), gibbs(REWARD)) < 1e-9
            assert total_variation(minimise(lambda x: loss(x, True), STARTS[start]), gibbs(REWARD)) > 1e-2

    @pytest.mark.parametrize("start", list(STARTS))
    def test_bco(self, backend, start):
        """Thumbs up with probability sigmoid(r) on the reference's samples, at the delta that minimises jointly."""
        up = torch.sigmoid(REWARD)
        delta = -BETA * torch.logsumexp(REFERENCE.log() + REWARD / BETA, 0)

        def loss(logits: Tensor, delta: Tensor, beta: float = BETA) -> Tensor:
            logp, one = torch.log_softmax(logits, 0), torch.ones(N, dtype=torch.float64)
            total = torch.zeros((), dtype=torch.float64)
            for label, probability in ((True, up), (False, 1 - up)):
                labels = torch.full((N,), label)
                out = losses.bco(logp, REFERENCE.log(), labels, delta, one, beta=beta, reduction="none")
                total = total + (REFERENCE * probability * out.loss).sum()
            return total

        with fastpo.use_backend(backend):
            assert total_variation(minimise(lambda x: loss(x, delta), STARTS[start]), gibbs(REWARD)) < 1e-9
            # no delta, as in the peers' bco_pair, and the paper's mean of class means, are other points
            zero = torch.zeros((), dtype=torch.float64)
            assert total_variation(minimise(lambda x: loss(x, zero), STARTS[start]), gibbs(REWARD)) > 1e-2
            at = (gibbs(REWARD) / REFERENCE).log() * BETA
            means = [(REFERENCE * p * at).sum() / (REFERENCE * p).sum() for p in (up, 1 - up)]
            paper = (means[0] + means[1]) / 2
            assert total_variation(minimise(lambda x: loss(x, paper), STARTS[start]), gibbs(REWARD)) > 1e-4

    @pytest.mark.parametrize("start", [0.0, 2.0])
    def test_tdpo1_on_a_tree(self, backend, start):
        """pi(z given s) prop. ref exp(Q_ref(s, z) / beta), Q_ref the expected reward under the reference; not dpo's."""
        generator = torch.Generator().manual_seed(2)

        def draw(n: int) -> Tensor:
            return torch.randn(n, generator=generator, dtype=torch.float64)

        # the root's tokens: one ends, the two others lead to states with two tokens each
        reference, reward = [torch.log_softmax(draw(n), 0) for n in (3, 2, 2)], draw(5)
        paths = [((0, 0),), ((0, 1), (1, 0)), ((0, 1), (1, 1)), ((0, 2), (2, 0)), ((0, 2), (2, 1))]
        weights = torch.rand(5, 5, generator=generator, dtype=torch.float64).add(0.1)
        weights = (weights + weights.T) * torch.sigmoid(reward[:, None] - reward)
        first, second = (t.flatten() for t in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))

        def tokens(values: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
            padded = [torch.stack([*v, *[torch.zeros((), dtype=torch.float64)] * (2 - len(v))]) for v in values]
            return torch.stack(padded), torch.tensor([[True, len(v) > 1] for v in values])

        def law(policy: list[Tensor]) -> Tensor:
            return torch.stack([sum(policy[s][t] for s, t in path) for path in paths]).exp()

        def loss(logits: Tensor, **hyper: object) -> Tensor:
            policy = [torch.log_softmax(x, 0) for x in logits.split([3, 2, 2])]
            divergence = [(r.exp() * (r - p)).sum() for r, p in zip(reference, policy, strict=True)]
            ours, mask = tokens([[policy[s][t] for s, t in path] for path in paths])
            theirs, _ = tokens([[reference[s][t] for s, t in path] for path in paths])
            kl, _ = tokens([[divergence[s] for s, _ in path] for path in paths])
            sides = (t[i] for t in (ours, theirs, kl) for i in (first, second))
            masks = {"chosen_mask": mask[first], "rejected_mask": mask[second]}
            out = losses.tdpo(*sides, **masks, **hyper, reduction="none")
            return (weights.flatten() * out.loss).sum()

        below = [(reference[s].exp() * reward[a:b]).sum() for s, a, b in ((1, 1, 3), (2, 3, 5))]
        q = [torch.stack([reward[0], *below]), reward[1:3], reward[3:5]]
        target = law([torch.log_softmax(r + value / BETA, 0) for r, value in zip(reference, q, strict=True)])

        def minimiser(**hyper: object) -> Tensor:
            logits = descend(lambda x: loss(x, **hyper), start * draw(7))
            return law([torch.log_softmax(x, 0) for x in logits.split([3, 2, 2])])

        with fastpo.use_backend(backend):
            assert total_variation(minimiser(beta=BETA), target) < 1e-9
            assert total_variation(minimiser(beta=2 * BETA), target) > 1e-2
        sequences = law(reference)
        assert total_variation(normalised(sequences.log() + reward / BETA), target) > 1e-2


def regularised_nash(beta: float) -> Tensor:
    """pi = ref exp(P(y > pi) / beta) / Z, by damped iteration."""
    policy = REFERENCE
    for _ in range(20_000):
        policy = 0.95 * policy + 0.05 * gibbs(PREFERENCE @ policy, beta=beta)
    return policy


def semi_gradient(
    loss: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    rate: float,
    steps: int = 400,
    law: Callable[[Tensor], Tensor] = lambda policy: policy,
) -> Tensor:
    """Where grad / pi vanishes, all of it taken with the data fixed: no gradient flows through sampling.

    `law` gives the samples' law where it is not the policy's.
    """
    logits = start.clone()
    for _ in range(steps):
        leaf = logits.clone().requires_grad_()
        policy = torch.softmax(logits, 0)
        (gradient,) = torch.autograd.grad(loss(leaf, policy), leaf)
        logits = logits - rate * gradient / law(policy)
        logits = logits - logits.logsumexp(0)
    return torch.softmax(logits, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", list(STARTS))
class TestSelfPlay:
    TARGET = regularised_nash(BETA)

    @pytest.mark.parametrize("name", ["online_ipo", "ipo_md"])
    def test_online_ipo(self, backend, start, name):
        """Both samples from the policy, soft labels: the regularised Nash equilibrium. TRL's sign(p - 1/2) is not."""
        i, j = (t.flatten() for t in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij"))

        def loss(logits: Tensor, policy: Tensor, p: Tensor = PREFERENCE, beta: float = BETA) -> Tensor:
            logp, r = torch.log_softmax(logits, 0), REFERENCE.log()
            out = getattr(losses, name)(logp[i], logp[j], r[i], r[j], p.flatten(), beta=beta, reduction="none")
            return (policy[i] * policy[j] * out.loss).sum()

        with fastpo.use_backend(backend):
            assert total_variation(semi_gradient(loss, STARTS[start], 0.2), self.TARGET) < 1e-9
            doubled = semi_gradient(lambda x, y: loss(x, y, beta=2 * BETA), STARTS[start], 0.2)
            assert total_variation(doubled, self.TARGET) > 1e-2
            hard = (PREFERENCE > 0.5).double() + 0.5 * (PREFERENCE == 0.5)
            signs = semi_gradient(lambda x, y: loss(x, y, hard), STARTS[start], 0.2)
            assert total_variation(signs, self.TARGET) > 1e-2

    @pytest.mark.parametrize("name", ["nash_md", "nash_ema"])
    def test_against_oneself(self, backend, start, name):
        """The opponent is the policy: mixture coefficient 0, or an average that has caught up."""

        def loss(logits: Tensor, policy: Tensor, mixed: float = 0.0, beta: float = BETA) -> Tensor:
            opponent = normalised((1 - mixed) * policy.log() + mixed * REFERENCE.log())
            logp = torch.log_softmax(logits, 0)
            win = PREFERENCE @ opponent
            out = getattr(losses, name)(logp, REFERENCE.log(), win, beta=beta, reduction="none")
            return (policy * out.loss).sum()

        with fastpo.use_backend(backend):
            assert total_variation(semi_gradient(loss, STARTS[start], 0.8), self.TARGET) < 1e-9
            # a mixture is another game
            mixture = semi_gradient(lambda x, y: loss(x, y, 0.5), STARTS[start], 0.8)
            assert total_variation(mixture, self.TARGET) > 1e-3
            doubled = semi_gradient(lambda x, y: loss(x, y, beta=2 * BETA), STARTS[start], 0.8)
            assert total_variation(doubled, self.TARGET) > 1e-2

    def test_nash_mp(self, backend, start):
        """With a target that follows the policy, the prox term has no say in the limit."""

        def run(beta: float) -> Tensor:
            target = torch.softmax(STARTS["far"], 0)

            def loss(logits: Tensor, policy: Tensor) -> Tensor:
                nonlocal target
                target = 0.7 * target + 0.3 * policy
                logp, win = torch.log_softmax(logits, 0), PREFERENCE @ policy
                out = losses.nash_mp(logp, REFERENCE.log(), target.log(), win, beta=beta, eta=0.7, reduction="none")
                return (policy * out.loss).sum()

            return semi_gradient(loss, STARTS[start], 0.4, 1000)

        with fastpo.use_backend(backend):
            assert total_variation(run(BETA), self.TARGET) < 1e-9
            assert total_variation(run(2 * BETA), self.TARGET) > 1e-2
