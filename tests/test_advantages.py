"""fastpo.advantages: closed forms, identities, what the methods' papers say, and where libraries go wrong."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastpo
from fastpo import advantages as adv

by_backend = pytest.mark.parametrize("backend", ["native", "reference"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=["native", "reference"], autouse=True)
def backend(request):
    with fastpo.use_backend(request.param):
        yield request.param


class TestGae:
    def test_as_a_sum(self):
        """A_t = Σ_k (γλ)^k δ_(t+k), by a matrix."""
        rewards, values, bootstrap = random(3, 20), random(3, 20, seed=1), random(3, seed=2)
        gamma, lam = 0.9, 0.8
        behind = torch.cat([values[:, 1:], bootstrap[:, None]], 1)
        deltas = rewards + gamma * behind - values
        powers = torch.triu((gamma * lam) ** (torch.arange(20)[None] - torch.arange(20)[:, None]).double())
        out = adv.gae(rewards, values, gamma=gamma, lam=lam, bootstrap=bootstrap)
        assert close(out.advantages, deltas @ powers.T) and close(out.returns, out.advantages + values)

    def test_both_ends_of_lambda(self):
        """λ = 1: the return less V; λ = 0: the temporal difference."""
        rewards, values = random(2, 9), random(2, 9, seed=1)
        one = adv.gae(rewards, values, gamma=1.0, lam=1.0)
        assert close(one.advantages, rewards.flip(1).cumsum(1).flip(1) - values)
        zero = adv.gae(rewards, values, gamma=0.5, lam=0.0)
        behind = torch.cat([values[:, 1:], torch.zeros(2, 1)], 1)
        assert close(zero.advantages, rewards + 0.5 * behind - values)

    def test_terminated_and_truncated_are_apart(self):
        """Behind a terminated token nothing comes; behind a truncated one a value, but no advantage."""
        rewards, values = torch.ones(1, 3), torch.tensor([[10.0, 20.0, 30.0]])
        following, end = torch.tensor([[5.0, 7.0, 9.0]]), torch.tensor([[False, True, False]])
        whole = adv.gae(rewards, values, gamma=1.0, lam=1.0, next_values=following).advantages
        assert whole.tolist() == [[1 + 5 - 10 + (1 + 7 - 20) + (1 + 9 - 30), 1 + 7 - 20 + (1 + 9 - 30), 1 + 9 - 30]]
        cut = adv.gae(rewards, values, gamma=1.0, lam=1.0, next_values=following, truncated=end).advantages
        assert cut.tolist() == [[1 + 5 - 10 + (1 + 7 - 20), 1 + 7 - 20, 1 + 9 - 30]]
        dead = adv.gae(rewards, values, gamma=1.0, lam=1.0, next_values=following, terminated=end).advantages
        assert dead.tolist() == [[1 + 5 - 10 + (1 - 20), 1 - 20, 1 + 9 - 30]]

    def test_skip_and_multiply(self):
        """Across a tool's answer verl and OpenRLHF or TRL differ on tokens that count: their own loops."""
        rewards, values = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]]), torch.tensor([[0.3, 0.4, 9.0, 9.0, 0.8]])
        mask = torch.tensor([[True, True, False, False, True]])
        gamma, lam = 1.0, 0.5

        def verl() -> list[float]:
            found, last, following = [0.0] * 5, 0.0, 0.0
            for t in reversed(range(5)):
                if mask[0, t]:
                    delta = rewards[0, t].item() + gamma * following - values[0, t].item()
                    last = found[t] = delta + gamma * lam * last
                    following = values[0, t].item()
            return found

        def openrlhf() -> list[float]:
            found, last = [0.0] * 5, 0.0
            v, r = (values * mask)[0].tolist(), (rewards * mask)[0].tolist()
            for t in reversed(range(5)):
                delta = r[t] + gamma * (v[t + 1] if t < 4 else 0.0) - v[t]
                last = found[t] = delta + gamma * lam * last
            return found

        poisoned = values.masked_fill(~mask, math.nan)
        for mode, want in (("skip", verl()), ("multiply", openrlhf())):
            out = adv.gae(rewards, poisoned, gamma=gamma, lam=lam, mask=mask, mask_mode=mode)
            assert torch.allclose(out.advantages, torch.tensor([want]) * mask), mode
        assert verl()[1] != pytest.approx(openrlhf()[1], abs=0.1)

    def test_padding_is_no_hole(self):
        """With "multiply" too, what stands behind the last token that counts is no step."""
        rewards, values, mask = random(1, 4), random(1, 4, seed=1), torch.tensor([[True, True, False, False]])
        for mode in ("skip", "multiply"):
            out = adv.gae(rewards, values, bootstrap=random(1, seed=3), mask=mask, mask_mode=mode)
            short = adv.gae(rewards[:, :2], values[:, :2], bootstrap=random(1, seed=3))
            assert close(out.advantages[:, :2], short.advantages) and (out.advantages[:, 2:] == 0).all()

    def test_a_masked_row(self):
        """verl raises on it where it whitens; it has no advantage."""
        rewards, values, mask = torch.full((2, 3), math.nan), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
        for mode in ("skip", "multiply"):
            out = adv.gae(rewards, values, mask=mask, mask_mode=mode, bootstrap=torch.ones(2))
            assert (out.advantages == 0).all() and (out.returns == 0).all()

    def test_no_gradient_and_no_mutation(self):
        rewards, values = random(2, 5).requires_grad_(), random(2, 5, seed=1).requires_grad_()
        before = rewards.detach().clone()
        out = adv.gae(rewards, values, terminated=torch.zeros(2, 5, dtype=torch.bool))
        assert not out.advantages.requires_grad and not out.returns.requires_grad
        assert torch.equal(rewards.detach(), before)

    def test_bad_input(self):
        one, flag = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
        for name, value in itertools.product(("gamma", "lam"), (-0.1, 1.0001, math.nan)):
            with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got"):
                adv.gae(one, one, **{name: value})
        with pytest.raises(TypeError, match="gamma must be a number, got Tensor"):
            adv.gae(one, one, gamma=torch.tensor(0.9))
        with pytest.raises(ValueError, match=r"values has shape \(2, 2\), expected \(2, 3\): it must match rewards"):
            adv.gae(one, one[:, :2])
        with pytest.raises(ValueError, match="mask_mode must be one of 'skip', 'multiply'; got 'drop'"):
            adv.gae(one, one, mask_mode="drop")
        with pytest.raises(ValueError, match="bootstrap cannot be given with it"):
            adv.gae(one, one, next_values=one, bootstrap=one[:, 0])
        with pytest.raises(ValueError, match="truncated needs next_values"):
            adv.gae(one, one, truncated=flag)
        with pytest.raises(ValueError, match=r"bootstrap has shape \(3,\), expected \(2,\): one per row of rewards"):
            adv.gae(one, one, bootstrap=torch.ones(3))
        with pytest.raises(TypeError, match="terminated must have dtype bool, got float32"):
            adv.gae(one, one, terminated=one)
        with pytest.raises(TypeError, match="finished must have dtype bool, got float32"):
            adv.egae(one, one, one[:, 0])
        with pytest.raises(ValueError, match=r"finished has shape \(2, 3\), expected \(2,\)"):
            adv.egae(one, one, flag)
        with pytest.raises(ValueError, match="rho_bar must be positive, got 0"):
            adv.vtrace(one, one, one, rho_bar=0.0)


class TestEgae:
    def test_finished_rows_are_gae(self):
        rewards, values = random(2, 7), random(2, 7, seed=1)
        out = adv.egae(rewards, values, torch.tensor([True, True]), lam=0.9)
        assert close(out.advantages, adv.gae(rewards, values, lam=0.9).advantages)

    def test_unfinished_rows(self):
        """V behind the window is the last token's: with γ = 1 its advantage is its reward, here 0."""
        values, mask = random(1, 6), torch.arange(6)[None] < 4
        zero = torch.zeros_like(values)
        out = adv.egae(zero, values, torch.tensor([False]), lam=0.5, mask=mask).advantages
        deltas = torch.cat([values[0, 1:4] - values[0, :3], torch.zeros(1)])
        want = [sum(0.5 ** (k - t) * deltas[k] for k in range(t, 4)) for t in range(4)]
        assert close(out[0, :4], torch.stack(want)) and (out[0, 4:] == 0).all() and out[0, 3] == 0
        # a terminal end instead would take V off every advantage
        biased = adv.gae(zero, values, lam=0.5, mask=mask).advantages
        assert close(biased[0, 3], -values[0, 3])
        # γ < 1
        out = adv.egae(zero, values, torch.tensor([False]), gamma=0.9, lam=0.5, mask=mask).advantages
        assert close(out[0, 3], -0.1 * values[0, 3])

    def test_a_window_of_one_token(self):
        value = torch.tensor([[3.0]])
        out = adv.egae(torch.zeros(1, 1), value, torch.tensor([False]))
        assert out.advantages.item() == 0 and out.returns.item() == 3


class TestVtrace:
    def test_the_definition(self):
        """IMPALA eq. 1: vs_s = V_s + Σ_t γ^(t-s) (Π c_i) δ_t."""
        rewards, values, ratios, bootstrap = (random(*s, seed=i) for i, s in enumerate([(1, 8)] * 3 + [(1,)]))
        gamma, rho_bar, c_bar = 0.9, 1.3, 0.8
        out = adv.vtrace(rewards, values, ratios, gamma=gamma, rho_bar=rho_bar, c_bar=c_bar, bootstrap=bootstrap)
        rho, c = ratios[0].exp().clamp(max=rho_bar), ratios[0].exp().clamp(max=c_bar)
        behind = torch.cat([values[0, 1:], bootstrap])
        delta = rho * (rewards[0] + gamma * behind - values[0])
        targets = torch.stack(
            [values[0, s] + sum(gamma ** (t - s) * c[s:t].prod() * delta[t] for t in range(s, 8)) for s in range(8)]
        )
        next_targets = torch.cat([targets[1:], bootstrap])
        assert close(out.returns[0], targets)
        assert close(out.advantages[0], rho * (rewards[0] + gamma * next_targets - values[0]))

    def test_on_policy_it_is_the_return(self):
        """λ = 1 and π = μ: the n-step return, and GAE with λ = 1."""
        rewards, values, bootstrap = random(2, 9), random(2, 9, seed=1), random(2, seed=2)
        zero = torch.zeros_like(rewards)
        out = adv.vtrace(rewards, values, zero, gamma=0.9, bootstrap=bootstrap)
        want = adv.gae(rewards, values, gamma=0.9, lam=1.0, bootstrap=bootstrap)
        assert close(out.returns, want.returns)
        assert close(out.returns, adv.discounted_returns(rewards, gamma=0.9, bootstrap=bootstrap))

    def test_at_truncation(self):
        """torchrl takes the target of the next element, another trajectory's, for the advantage: 3.4 instead of 10."""
        rewards, values = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        next_values, cut = torch.tensor([[10.0, 0.0]]), torch.tensor([[True, False]])
        rewards[0, 1] = 3.4
        out = adv.vtrace(rewards, values, torch.zeros(1, 2), next_values=next_values, truncated=cut)
        assert out.advantages[0, 0] == 10 and out.returns[0, 0] == 10
        # the library's line: the next element's target, and the last one's next value
        targets = torch.cat([out.returns[0, 1:], next_values[0, 1:]])
        assert (rewards[0] + targets - values[0])[0].item() == pytest.approx(3.4)

    def test_values_of_the_clipped_policy(self):
        """One state, two actions: targets are V where V is that of the policy proportional to min(ρ̄ μ, π)."""
        pi, mu = torch.tensor([0.9, 0.1], dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
        rewards, gamma, rho_bar = torch.tensor([1.0, 3.0], dtype=torch.float64), 0.5, 1.5
        clipped = torch.minimum(rho_bar * mu, pi)
        clipped = clipped / clipped.sum()
        value = (clipped @ rewards) / (1 - gamma)
        expected = torch.zeros(1, dtype=torch.float64)
        for actions in itertools.product(range(2), repeat=3):
            index = torch.tensor(actions)
            out = adv.vtrace(
                rewards[index][None],
                value.expand(1, 3),
                (pi.log() - mu.log())[index][None],
                gamma=gamma,
                rho_bar=rho_bar,
                bootstrap=value.view(1),
            )
            expected += mu[index].prod() * out.returns[0, 0]
        assert close(expected, value.view(1))
        assert abs(value - (pi @ rewards) / (1 - gamma)) > 0.3

    @pytest.mark.parametrize("begin", [0.0, 50.0])
    def test_fixed_point_on_several_states(self, begin):
        """On a random MDP, whose paths are enumerated, targets lead from any values to those of that policy."""
        states, actions, steps, gamma, rho_bar = 3, 2, 3, 0.6, 1.1
        pi, mu = torch.softmax(2 * random(2, states, actions, seed=3), -1)
        moves = torch.softmax(random(states, actions, states, seed=4), -1)
        gains = random(states, actions, seed=5)

        def values_of(policy: Tensor) -> Tensor:
            walk = (policy[..., None] * moves).sum(1)
            return torch.linalg.solve(torch.eye(states).double() - gamma * walk, (policy * gains).sum(1))

        # state, action, state, ..., state
        paths = torch.cartesian_prod(*[torch.arange(states), torch.arange(actions)] * steps, torch.arange(states))
        begins, ends, taken = paths[:, 0:-1:2], paths[:, 2::2], paths[:, 1::2]
        law = (mu[begins, taken] * moves[begins, taken, ends]).prod(1)

        def settled(ratios: Tensor) -> Tensor:
            values = torch.full((states,), begin, dtype=torch.float64)
            for _ in range(250):
                out = adv.vtrace(
                    gains[begins, taken],
                    values[begins],
                    ratios[begins, taken],
                    gamma=gamma,
                    lam=0.9,
                    rho_bar=rho_bar,
                    c_bar=0.9,
                    bootstrap=values[ends[:, -1]],
                )
                values = torch.zeros_like(values).index_add(0, begins[:, 0], law * out.returns[:, 0])
            return values

        clipped = torch.minimum(rho_bar * mu, pi)
        found, want = settled(pi.log() - mu.log()), values_of(clipped / clipped.sum(1, keepdim=True))
        assert (found - want).abs().max() < 1e-9
        assert (values_of(pi) - want).abs().max() > 0.05
        # the two policies exchanged
        assert (settled(mu.log() - pi.log()) - want).abs().max() > 0.05


class TestReturns:
    def test_closed_forms(self):
        rewards = random(2, 9)
        assert close(adv.discounted_returns(rewards), rewards.flip(1).cumsum(1).flip(1))
        powers = 0.5 ** torch.arange(9).double()
        assert close(adv.discounted_returns(rewards, gamma=0.5)[:, 0], rewards @ powers)
        bootstrap = random(2, seed=1)
        out = adv.discounted_returns(rewards, gamma=0.5, bootstrap=bootstrap)
        assert close(out[:, 0], rewards @ powers + 0.5**9 * bootstrap)
        end = torch.zeros(2, 9, dtype=torch.bool)
        end[:, 4] = True
        out = adv.discounted_returns(rewards, terminated=end)
        assert close(out[:, 0], rewards[:, :5].sum(1)) and close(out[:, 5], rewards[:, 5:].sum(1))

    def test_reinforce_plus_plus_across_tool_turns(self):
        """verl's running return is multiplied by the mask: turns before a tool's answer get 0. Here they do not."""
        rewards = torch.tensor([[0.0, 0, 0, 0, 0, 1]])
        mask = torch.tensor([[True, True, False, True, True, True]])
        running, verl = 0.0, [0.0] * 6
        for t in reversed(range(6)):
            running = rewards[0, t].item() + running
            verl[t] = running
            running *= float(mask[0, t])
        assert verl == [0, 0, 1, 1, 1, 1]
        out = adv.reinforce_plus_plus(rewards, mask=mask)
        assert out.returns.tolist() == [[1, 1, 0, 1, 1, 1]]
        # all returns are equal, so nothing is to be learnt, exactly
        assert (out.advantages == 0).all()

    def test_reinforce_plus_plus_whitens_all_tokens(self):
        rewards = torch.zeros(2, 3, dtype=torch.float64)
        rewards[0, 0], rewards[1, 2] = 1, 5
        mask = torch.tensor([[True, False, False], [True, True, True]])
        out = adv.reinforce_plus_plus(rewards, mask=mask, eps=0.0)
        tokens = torch.tensor([1.0, 5, 5, 5], dtype=torch.float64)
        want = (tokens - tokens.mean()) / tokens.std()
        assert close(out.advantages[mask], want) and (out.advantages[~mask] == 0).all()
        packed = adv.reinforce_plus_plus(
            torch.cat([rewards[0, :1], rewards[1], torch.full((2,), math.nan)]),
            eps=0.0,
            cu_seqlens=torch.tensor([0, 1, 4], dtype=torch.int32),
        )
        assert close(packed.advantages[:4], want) and (packed.advantages[4:] == 0).all()

    def test_remax(self):
        """R - R_greedy at every token, where the score is at the end."""
        rewards, mask = torch.zeros(2, 4), torch.tensor([[True] * 4, [True, True, False, False]])
        rewards[0, 3], rewards[1, 1] = 2.0, 0.5
        out = adv.remax(rewards, torch.tensor([0.5, 0.5]), mask=mask)
        assert out.advantages.tolist() == [[1.5] * 4, [0.0] * 4] and out.returns.tolist() == [
            [2.0] * 4,
            [0.5, 0.5, 0, 0],
        ]
        packed = torch.cat([rewards[0], rewards[1, :2], torch.ones(1)])
        out = adv.remax(packed, torch.tensor([0.5, 0.25]), cu_seqlens=torch.tensor([0, 4, 6], dtype=torch.int32))
        assert out.advantages.tolist() == [1.5] * 4 + [0.25] * 2 + [0.0]
        with pytest.raises(ValueError, match=r"greedy_rewards has shape \(3,\), expected \(2,\)"):
            adv.remax(rewards, torch.ones(3))


REWARDS = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 3], [2, 2, 2, 2]], dtype=torch.float64)


class TestGroups:
    def test_both_layouts(self):
        """(prompts, samples), and flat with ids, interleaved."""
        ids, lengths = torch.tensor([7, -1, 3]).repeat(4), torch.arange(1, 13).view(3, 4)
        flat = REWARDS.t().reshape(-1)
        for function in (adv.grpo, adv.dr_grpo, adv.rloo, adv.gpg, adv.pass_at_k, adv.reinforce_baseline):
            assert close(function(flat, ids).view(4, 3).t(), function(REWARDS)), function.__name__
        assert close(adv.opo(flat, lengths.t().reshape(-1), ids).view(4, 3).t(), adv.opo(REWARDS, lengths))

    def test_grpo(self):
        assert close(adv.grpo(REWARDS)[:2], (REWARDS - REWARDS.mean(1, keepdim=True))[:2] / REWARDS.std(1)[:2, None])
        trl = (REWARDS - REWARDS.mean(1, keepdim=True)) / (REWARDS.std(1, keepdim=True) + 1e-4)
        assert close(adv.grpo(REWARDS, eps=1e-4), trl)
        batch = (REWARDS - REWARDS.mean(1, keepdim=True)) / (REWARDS.std() + 1e-4)
        assert close(adv.grpo(REWARDS, eps=1e-4, scale="batch"), batch)
        assert close(adv.grpo(REWARDS, scale="none"), adv.dr_grpo(REWARDS))
        # two samples: ±1/sqrt(2), whatever the gap
        assert close(adv.grpo(REWARDS[:1, :2]).abs(), torch.full((1, 2), 0.5, dtype=torch.float64).sqrt())
        with pytest.raises(ValueError, match="scale must be one of 'group', 'batch', 'none'; got 'prompt'"):
            adv.grpo(REWARDS, scale="prompt")

    def test_rloo_is_dr_grpo_scaled(self):
        out = adv.rloo(REWARDS)
        assert close(out[0, 0], torch.tensor(1 - 1 / 3, dtype=torch.float64))
        assert close(out, adv.dr_grpo(REWARDS) * 4 / 3)

    def test_opo(self):
        """Baseline Σ l R / Σ l: the one of least variance where |∇ log π|² ∝ l."""
        lengths = torch.tensor([[1, 3, 0, 2]])
        rewards = torch.tensor([[1.0, 2, 50, 4]])
        assert torch.allclose(adv.opo(rewards, lengths), rewards - 15 / 6)
        # Σ l (R - b)² is stationary in b
        b = torch.tensor(15 / 6, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad((lengths * (rewards - b).square()).sum(), b)
        assert abs(slope) < 1e-9
        assert (adv.opo(rewards, torch.zeros(1, 4)) == 0).all()
        with pytest.raises(ValueError, match="weights must be at least 0"):
            adv.opo(rewards, -lengths)

    def test_gpg(self):
        """verl counts non-zero rewards; a group of equal ones is what teaches nothing."""
        out = adv.gpg(REWARDS)
        assert close(out, adv.dr_grpo(REWARDS) * 12 / 8)
        assert (adv.gpg(torch.ones(3, 4)) == 0).all()
        assert close(adv.gpg(REWARDS, f_norm=2.0), out / 2)
        verl = REWARDS.numel() / REWARDS.count_nonzero()
        assert verl != 12 / 8
        with pytest.raises(ValueError, match="f_norm must be positive and finite, got 0"):
            adv.gpg(REWARDS, f_norm=0.0)

    def test_pass_at_k(self):
        rewards = torch.tensor([[1.0, 4, 2], [3, 3, 0], [0, 0, 0]])
        assert adv.pass_at_k(rewards).tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 0]]
        normal = adv.pass_at_k(rewards, normalize=True)
        assert torch.allclose(normal[0, 1], 2 / rewards[0].std())
        for arguments in ((torch.ones(3, 1),), (torch.ones(3), torch.tensor([0, 0, 5]))):
            with pytest.raises(ValueError, match="rewards has a group of one sample"):
                adv.pass_at_k(*arguments)

    def test_groups_of_one(self):
        """verl's grpo and rloo give the score, its vectorised rloo 0, OpenRLHF NaN; TRL and we give 0."""
        one = torch.tensor([[3.0], [5.0]])
        for function in (adv.grpo, adv.dr_grpo, adv.rloo):
            assert (function(one) == 0).all()
            assert torch.equal(function(one, singleton="raw"), one)
        assert (adv.opo(one, torch.ones(2, 1)) == 0).all() and (adv.gpg(one) == 0).all()
        raw = adv.grpo(one, eps=0.25, singleton="raw")
        assert torch.equal(raw, one / 1.25)

    def test_empty_batches(self):
        for shape in ((0, 4), (3, 0)):
            empty = torch.zeros(shape)
            for function in (adv.grpo, adv.dr_grpo, adv.rloo, adv.gpg, adv.reinforce_baseline):
                assert function(empty).shape == shape
        assert adv.grpo(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)

    def test_unscored_samples(self):
        """TRL: a NaN counts in no statistic, and its advantage is 0."""
        rewards = torch.tensor([[1.0, math.nan, 0, 1]])
        kept = torch.tensor([[1.0, 0, 1]])
        for function in (adv.grpo, adv.dr_grpo, adv.rloo, adv.gpg, adv.pass_at_k, adv.reinforce_baseline):
            out = function(rewards)
            assert out[0, 1] == 0 and torch.allclose(out[0, [0, 2, 3]], function(kept)[0]), function.__name__
        batch = adv.grpo(torch.cat([rewards, kept.new_tensor([[0.0, 0, 0, 8]])]), scale="batch")
        assert batch.isfinite().all() and batch[0, 1] == 0

    def test_constant_groups_at_every_eps(self):
        """Reward 0.7 of 12 samples: exactly 0 after every method."""
        for reward, n in itertools.product((0.1, 0.3, 0.7, 1.1), (5, 12, 16)):
            rewards = torch.full((2, n), reward)
            for eps in (0.0, 1e-9, 1e-8, 1e-6, 1e-4):
                for scale in ("group", "batch"):
                    assert (adv.grpo(rewards, eps=eps, scale=scale) == 0).all()
                assert (adv.pass_at_k(rewards, normalize=True, eps=eps) == 0).all()
                assert (adv.reinforce_baseline(rewards, eps=eps) == 0).all()
                assert (adv.whiten(rewards, eps=eps) == 0).all()
            for function in (adv.dr_grpo, adv.rloo, adv.gpg):
                assert (function(rewards) == 0).all()
            assert (adv.opo(rewards, torch.arange(1, n + 1).expand(2, n)) == 0).all()

    def test_group_advantage_under_full_expectation(self):
        """G = 2, ε = 0: E[A_1, y_1 = y] over pairs from π is P-weighted sign / sqrt(2) (catalogue of fixed points)."""
        pi, r = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), torch.tensor([0.1, 0.7, 0.4], dtype=torch.float64)
        pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))
        a = adv.grpo(r[pairs])[:, 0].view(3, 3)
        want = [(pi * torch.sign(r[y] - r)).sum() / math.sqrt(2) for y in range(3)]
        assert close(a @ pi, torch.stack(want))


class TestWhiten:
    def test_closed_form(self):
        x, mask = random(4, 9), torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.6
        kept = x[mask]
        out = adv.whiten(x.masked_fill(~mask, math.nan), mask)
        assert close(out[mask], (kept - kept.mean()) * (kept.var() + 1e-8).rsqrt()) and (out[~mask] == 0).all()
        biased = adv.whiten(x, ddof=0, eps=0.0)
        assert close(biased, (x - x.mean()) / x.std(correction=0)) and close(biased.mean(), torch.zeros(()).double())
        assert close(adv.whiten(x.view(-1), eps=1e-8), adv.whiten(x).view(-1))
        assert close(adv.whiten(x.view(2, 2, 9)), adv.whiten(x).view(2, 2, 9))

    def test_few_values(self):
        """verl raises on one value; nothing can be learnt from it."""
        one, none = torch.tensor([3.0]), torch.zeros(1, dtype=torch.bool)
        assert adv.whiten(one).item() == 0 and adv.whiten(one, none).item() == 0
        assert adv.whiten(torch.zeros(0)).shape == (0,) and adv.whiten(torch.zeros(0, 3)).shape == (0, 3)

    def test_a_large_mean(self):
        """The mean is taken off in two parts: in fp32 one would leave its rounding."""
        steps = torch.randn(1000, generator=torch.Generator().manual_seed(0)).round(decimals=2)
        x = steps + 1024.0
        want = x.double()
        want = (want - want.mean()) / want.std()
        assert (adv.whiten(x, eps=0.0).double() - want).abs().max() < 4 * torch.finfo(torch.float32).eps * 4

    def test_reinforce_baseline(self):
        """The group's mean off, then whitened as if each token had its response's number."""
        lengths = torch.tensor([[1, 2, 3, 1], [2, 2, 1, 4], [1, 1, 1, 1]])
        out = adv.reinforce_baseline(REWARDS, lengths=lengths, eps=0.0)
        centred = REWARDS - REWARDS.mean(1, keepdim=True)
        tokens = centred.reshape(-1).repeat_interleave(lengths.reshape(-1))
        assert close(out, (centred - tokens.mean()) / tokens.std())
        plain = adv.reinforce_baseline(REWARDS, eps=0.0)
        assert close(plain, (centred - centred.mean()) / centred.std())
        with pytest.raises(ValueError, match="lengths must be at least 0"):
            adv.reinforce_baseline(REWARDS, lengths=-lengths)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="eps must be at least 0 and finite, got -1"):
            adv.whiten(torch.ones(3), eps=-1.0)
        with pytest.raises(ValueError, match=r"mask has shape \(2,\), expected \(3,\): it must match values"):
            adv.whiten(torch.ones(3), torch.ones(2, dtype=torch.bool))


def over_ranks(rows: slice, group: bool) -> list[Tensor]:
    x, mask = random(8, 5), torch.arange(5) < torch.tensor([5, 3, 0, 1, 4, 2, 5, 5])[:, None]
    x[:4] += 3
    return [
        adv.whiten(x[rows], mask[rows], process_group=group),
        adv.whiten(x[rows], process_group=group, ddof=0),
        adv.reinforce_plus_plus(x[rows], mask=mask[rows], process_group=group).advantages,
        adv.reinforce_baseline(x[rows], process_group=group),
        adv.reinforce_baseline(x[rows], lengths=mask[rows].long() + 1, process_group=group),
        # constant on each rank, but not over both
        adv.whiten((torch.arange(8) // 4)[rows].double(), process_group=group),
    ]


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(over_ranks(slice(4 * rank, 4 * rank + 4), True), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")
def test_two_ranks(tmp_path: Path, backend):
    """Two ranks' halves are whitened as one process whitens the whole."""
    if backend == "reference":
        pytest.skip("the ranks take the kernels")
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    for place, want in enumerate(over_ranks(slice(None), False)):
        torch.testing.assert_close(torch.cat([found[place] for found in ranks]), want, rtol=1e-12, atol=1e-13)
    alone = over_ranks(slice(0, 4), False)
    assert (alone[0] - ranks[0][0]).abs().max() > 0.1
