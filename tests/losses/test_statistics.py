"""Objectives on tokens or on the whole batch, the functions for their statistics, and those composed of others."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.losses import Moments
from fastpo.reference.sequence import Side, token_ranks
from tests.losses.methods import CASES, arguments, call, evaluate

BACKENDS = ["native", "reference"]
by_backend = pytest.mark.parametrize("backend", BACKENDS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case_of(name: str, **options: str):
    return next(c for c in CASES if c.row.name == name and all(c.options[k] == v for k, v in options.items()))


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)


class TestTokens:
    def test_ranks(self):
        mask = torch.tensor([[False, True, True], [True, False, True]])
        (rank, row), counts = token_ranks(Side(torch.zeros(2, 3), mask=mask))
        assert counts.tolist() == [2, 2] and rank[mask].tolist() == [1, 2, 1, 2] and row.flatten().tolist() == [0, 1]
        boundaries = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
        packed = Side(torch.zeros(6), mask=torch.tensor([1, 1, 1, 0, 1, 1]).bool(), cu_seqlens=boundaries)
        (rank, row), counts = token_ranks(packed)
        assert counts.tolist() == [2, 0, 2] and rank[[0, 1, 2, 4]].tolist() == [1, 2, 1, 2]
        assert row[:5].tolist() == [0, 0, 2, 2, 2]

    @by_backend
    def test_wpo(self, backend):
        """w(y) = exp(mean_t(log p - log sum p^2)), their product clamped, constant to the gradient."""
        case = case_of("wpo")
        given = arguments(case, "padded", 6, 7, torch.float64)
        for limit in (1.0, 0.4, math.inf):
            found = evaluate(case, given, backend, reduction="none", max_weight=limit)
            tokens = {name: value for name, value in given.items() if "sum_p2" not in name}
            plain = evaluate(case_of("dpo"), tokens, backend, reduction="none")
            weights = torch.ones(6, dtype=torch.float64)
            for side in ("chosen", "rejected"):
                mask = given[f"{side}_mask"]
                gap = given[f"policy_{side}"] - given[f"{side}_log_sum_p2"]
                weights = weights * torch.stack([g[m].mean().exp() for g, m in zip(gap, mask, strict=True)])
            weights = weights.clamp(max=limit)
            exactly(found["loss"], weights * plain["loss"])
            exactly(found["grad of policy_chosen"], weights[:, None] * plain["grad of policy_chosen"])

    def test_wpo_greedy_tokens_weigh_more_than_one(self):
        """log p of the likeliest token is above log sum p^2: without a limit the weight passes 1."""
        logp = torch.log_softmax(torch.tensor([3.0, 0.0, 0.0]), 0)
        sums = torch.logsumexp(2 * logp, 0).reshape(1, 1)
        tokens, zero = logp[:1].reshape(1, 1), torch.zeros(1, 1)
        limited, free = (
            losses.wpo(tokens, tokens, zero, zero, sums, sums, max_weight=limit).loss for limit in (1.0, math.inf)
        )
        assert limited.item() == pytest.approx(math.log(2), rel=1e-6) and free > 1.05 * limited

    @by_backend
    def test_mallows(self, backend):
        given = arguments(case_of("mallows_po", loss="dpo"), "padded", 6, 7, torch.float64)
        means = [
            torch.stack([e[m].mean() for e, m in zip(given[f"{s}_entropy"], given[f"{s}_mask"], strict=True)])
            for s in ("chosen", "rejected")
        ]
        d = -0.29 * ((means[0] + means[1]) / 2).log()
        plain = {k: v for k, v in given.items() if "entropy" not in k}
        h = losses.ipo(**plain, beta=1e300, reduction="none").loss.sqrt() * torch.sign(
            losses.dpo(**plain, beta=1.0).margins
        )
        out = call(case_of("mallows_po", loss="dpo"), given, backend, reduction="none").loss
        exactly(out, -F.logsigmoid(0.3 * d * h))
        out = call(case_of("mallows_po", loss="ipo"), given, backend, reduction="none").loss
        exactly(out, (d * h - 1 / 0.6) ** 2)

    def test_mallows_at_the_ends(self):
        """An entropy of 0 or of log V gives a finite dispersion, not inf and not a dead pair."""
        x, zero = torch.tensor([[-1.0]]).double(), torch.zeros(1, 1).double()
        for entropy in (0.0, 1.0):
            e = torch.full((1, 1), entropy).double()
            loss = losses.mallows_po(x, 2 * x, zero, zero, e, e).loss
            assert loss.isfinite() and loss != math.log(2)

    @by_backend
    def test_tdpo(self, backend):
        """z = beta (h - (D_l - D_w)), or with alpha and a stop-gradient; slopes of D too."""
        for version in ("tdpo1", "tdpo2"):
            case = case_of("tdpo", version=version)
            given = arguments(case, "padded", 6, 7, torch.float64)
            sums = {
                name: torch.stack([t[m].sum() for t, m in zip(given[name], given[f"{side}_mask"], strict=True)])
                for side in ("chosen", "rejected")
                for name in (f"policy_{side}", f"reference_{side}", f"{side}_kl")
            }
            h = sums["policy_chosen"] - sums["reference_chosen"] - sums["policy_rejected"] + sums["reference_rejected"]
            factor = 1.0 if version == "tdpo1" else 0.4
            z = 0.3 * (h - factor * (sums["rejected_kl"] - sums["chosen_kl"]))
            found = evaluate(case, given, backend, reduction="sum")
            exactly(found["loss"], -F.logsigmoid(z).sum())
            # the upstream gradient of a scalar is -1.5 here
            slope = -1.5 * 0.3 * torch.sigmoid(-z)[:, None]
            exactly(found["grad of rejected_kl"], torch.where(given["rejected_mask"], factor * slope, 0))
            chosen = torch.where(given["chosen_mask"], -slope, 0) if version == "tdpo1" else torch.zeros(6, 7).double()
            exactly(found["grad of chosen_kl"], chosen)

    @by_backend
    def test_ld_dpo(self, backend):
        """Behind the shorter length tokens count alpha, under both models; alpha 1 is dpo."""
        case = case_of("ld_dpo")
        given = arguments(case, "padded", 9, 8, torch.float64)
        exactly(call(case, given, backend, alpha=1.0).loss, call(case_of("dpo"), given, backend).loss)
        margins = []
        for i in range(9):
            sides = []
            for s in ("chosen", "rejected"):
                sides.append((given[f"policy_{s}"][i] - given[f"reference_{s}"][i])[given[f"{s}_mask"][i]])
            shared = min(map(len, sides))
            margins.append([(x[:shared].sum() + 0.4 * x[shared:].sum()).item() for x in sides])
        h = torch.tensor([a - b for a, b in margins], dtype=torch.float64)
        exactly(call(case, given, backend, reduction="none").loss, -F.logsigmoid(0.3 * h))

    @by_backend
    @pytest.mark.parametrize("name", ["nash_md", "nash_ema", "nash_mp"])
    def test_nash_to_go(self, backend, name):
        """Each token's slope is 1/2 - P and the weighted log-ratios of it and of the later tokens, in both layouts."""
        case = case_of(name, kl="to_go")
        for layout in ("padded", "packed"):
            given = arguments(case, layout, 6, 7, torch.float64)
            found = evaluate(case, given, backend, reduction="sum")
            rows = (
                [mask.nonzero()[:, 0].tolist() for mask in given["mask"]]
                if layout == "padded"
                else [list(range(a, b)) for a, b in itertools.pairwise(given["cu_seqlens"].tolist())]
            )
            loss, penalties = 0.0, []
            grad = torch.zeros_like(given["policy"])
            for i, places in enumerate(rows):
                streams = {n: given[n][i] if layout == "padded" else given[n] for n in case.row.models}
                slope = 0.5 - given["win_probability"][i].item()
                penalties.append(0.0)
                for t in reversed(places):
                    ratios = {n: (streams["policy"][t] - streams[n][t]).item() for n in case.row.models[1:]}
                    penalties[-1] += 0.3 * ratios["reference"]
                    slope += 0.3 * ratios["reference"] + 0.3 / 0.45 * ratios.get("previous", 0.0)
                    loss += slope * streams["policy"][t].item()
                    # the upstream gradient of a scalar is -1.5 here
                    grad[(i, t) if layout == "padded" else t] = -1.5 * slope
            torch.testing.assert_close(found["grad of policy"], grad, rtol=1e-12, atol=1e-13)
            assert found["loss"].item() == pytest.approx(loss, rel=1e-12)
            assert found["penalties"].tolist() == pytest.approx(penalties, rel=1e-12, abs=1e-13)

    @by_backend
    def test_nash_to_go_of_one_token_is_the_sequence(self, backend):
        given = arguments(case_of("nash_md", kl="to_go"), "padded", 5, 1, torch.float64)
        results = [evaluate(case_of("nash_md", kl=kl), given, backend) for kl in ("to_go", "sequence")]
        exactly(*(r["grad of policy"] for r in results))
        exactly(*(r["loss"] for r in results))

    def test_nash_to_go_with_tokens_of_no_sequence(self):
        """Behind the last boundary, and where there is no sequence at all."""
        tokens, win = torch.tensor([-1.0, -2.0, math.nan]).requires_grad_(), torch.tensor([0.25])
        boundaries = torch.tensor([0, 2], dtype=torch.int32)
        out = losses.nash_md(tokens, torch.zeros(3), win, cu_seqlens=boundaries, kl="to_go", beta=0.5, reduction="sum")
        (grad,) = torch.autograd.grad(out.loss, tokens)
        assert grad.tolist() == [0.25 - 1.5, 0.25 - 1.0, 0.0] and out.penalties.tolist() == [-1.5]
        none = losses.nash_md(tokens, tokens, win[:0], cu_seqlens=boundaries[:1], kl="to_go", reduction="sum")
        assert none.loss == 0

    def test_nash_to_go_needs_tokens(self):
        x = torch.zeros(3)
        with pytest.raises(ValueError, match=r"policy is \(B,\), summed already, but nash_md with kl='to_go' needs it"):
            losses.nash_md(x, x, x, kl="to_go")
        losses.nash_md(x, x, x)

    def test_tokens_are_needed(self):
        x = torch.zeros(3)
        with pytest.raises(ValueError, match=r"policy_chosen is \(B,\), summed already, but ld_dpo needs it per token"):
            losses.ld_dpo(x, x, x, x)

    def test_sampo_sample(self):
        """As many tokens as the shorter response has, only such as count, uniformly, in both layouts."""
        generator = torch.Generator().manual_seed(0)
        masks = [torch.rand(200, 9, generator=generator) < p for p in (0.9, 0.4)]
        counts = torch.minimum(masks[0].sum(1), masks[1].sum(1))
        samples = losses.sampo_sample(*masks, generator=generator)
        for mask, sample in zip(masks, samples, strict=True):
            assert torch.equal(sample.sum(1), counts) and not (sample & ~mask).any()
        often = torch.zeros(6)
        long, short = torch.ones(1, 6, dtype=torch.bool), torch.tensor([[True, True, False]])
        for _ in range(600):
            often += losses.sampo_sample(long, short, generator=generator)[0][0]
        # each token with probability 1/3: 200 times, standard deviation 11.5
        assert (often - 200).abs().max() < 5 * 11.6
        lengths = [masks[0].sum(1), masks[1].sum(1)]
        boundaries = [torch.cat([torch.zeros(1), n.cumsum(0)]).to(torch.int32) for n in lengths]
        packed = losses.sampo_sample(
            *(torch.ones(int(n.sum()), dtype=torch.bool) for n in lengths),
            chosen_cu_seqlens=boundaries[0],
            rejected_cu_seqlens=boundaries[1],
            generator=generator,
        )
        for sample, n in zip(packed, lengths, strict=True):
            assert [int(part.sum()) for part in sample.split(n.tolist())] == counts.tolist()

    def test_sampo_of_equal_lengths_is_dpo(self):
        names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
        given = {name: random(4, 5, seed=i) for i, name in enumerate(names)}
        mask = torch.ones(4, 5, dtype=torch.bool)
        chosen, rejected = losses.sampo_sample(mask, mask)
        out = losses.sampo(**given, chosen_sample=chosen, rejected_sample=rejected)
        exactly(out.loss, losses.dpo(**given).loss)


class TestSorted:
    def pairs(self, n: int) -> dict[str, Tensor]:
        names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
        return {name: 3 * random(n, seed=i) for i, name in enumerate(names)}

    @by_backend
    def test_aot(self, backend):
        """Sorted margins against sorted reference margins; the gradient is scattered back."""
        given = self.pairs(17)
        u, v = (given[f"{model}_chosen"] - given[f"{model}_rejected"] for model in ("policy", "reference"))
        z = 0.3 * (u.sort().values - v.sort().values)
        want = -0.85 * F.logsigmoid(z) - 0.15 * F.logsigmoid(-z)
        found = evaluate(case_of("aot"), given, backend, reduction="sum")
        exactly(found["loss"], want.sum())
        slope = torch.empty_like(z)
        slope[u.argsort()] = -1.5 * 0.3 * (torch.sigmoid(z) - 0.85)
        exactly(found["grad of policy_chosen"], slope)
        exactly(found["grad of policy_rejected"], -slope)

    @by_backend
    def test_aot_unpaired(self, backend):
        given = self.pairs(17)
        a, b = (given[f"policy_{s}"] - given[f"reference_{s}"] for s in ("chosen", "rejected"))
        z = 0.3 * (a.sort().values - b.sort().values)
        found = evaluate(case_of("aot_unpaired"), given, backend, reduction="sum")
        exactly(found["loss"], (-0.85 * F.logsigmoid(z) - 0.15 * F.logsigmoid(-z)).sum())
        for name, ratio, sign in (("chosen", a, 1), ("rejected", b, -1)):
            slope = torch.empty_like(z)
            slope[ratio.argsort()] = -1.5 * 0.3 * (torch.sigmoid(z) - 0.85) * sign
            exactly(found[f"grad of policy_{name}"], slope)
        exactly(found["chosen_rewards"], 0.3 * a)
        exactly(found["rejected_rewards"].sort().values, 0.3 * b.sort().values)

    @pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
    def test_one_pair_is_dpo(self, name):
        given = self.pairs(1)
        exactly(getattr(losses, name)(**given, beta=0.2).loss, losses.dpo(**given, beta=0.2).loss)

    def test_equals_the_cost_of_optimal_transport(self):
        """The sort is the best of all matchings for a convex decreasing loss of the difference: 5! are tried."""
        given = self.pairs(5)
        u, v = (given[f"{model}_chosen"] - given[f"{model}_rejected"] for model in ("policy", "reference"))
        costs = [-F.logsigmoid(u - v[list(order)]).sum() for order in itertools.permutations(range(5))]
        exactly(losses.aot(**given, beta=1.0, reduction="sum").loss, torch.stack(costs).min())

    def test_permuting_the_batch(self):
        given, order = self.pairs(11), torch.randperm(11, generator=torch.Generator().manual_seed(0))
        for name in ("aot", "aot_unpaired"):
            function = getattr(losses, name)
            exactly(function(**given).loss, function(**{k: t[order] for k, t in given.items()}).loss)
        shuffled = {k: t[order] if "rejected" in k else t for k, t in given.items()}
        exactly(losses.aot_unpaired(**given).loss, losses.aot_unpaired(**shuffled).loss)


class TestKto:
    def test_reference_point(self):
        policy, reference = random(7, seed=1), random(7, seed=2)
        z0 = losses.kto_kl(policy, reference)
        exactly(z0, (policy - reference).mean().clamp(min=0))
        assert losses.kto_kl(reference - 1, reference) == 0
        assert not losses.kto_kl(policy.requires_grad_(), reference).requires_grad
        tokens = random(3, 4, seed=3)
        mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
        poisoned = tokens.masked_fill(~mask, math.nan)
        exactly(losses.kto_kl(poisoned + 5, poisoned, mask=mask), torch.tensor(5.0).double())

    def test_refused(self):
        with pytest.raises(ValueError, match="policy has no rows"):
            losses.kto_kl(torch.zeros(0), torch.zeros(0))
        with pytest.raises(ValueError, match="reference has shape"):
            losses.kto_kl(torch.zeros(2), torch.zeros(3))

    @by_backend
    def test_rewards_of_several_rows(self, backend):
        """Sums of rewards by label: a broadcast of rewards against labels would give each row's sum n times."""
        policy, zero = torch.tensor([10.0, -10.0, 20.0]), torch.zeros(3)
        labels = torch.tensor([True, False, True])
        with fastpo.use_backend(backend):
            out = losses.kto(policy, zero, labels, torch.zeros(()), reduction="none")
        assert out.rewards[labels].sum() == 3.0 and out.rewards.shape == (3,)

    @by_backend
    def test_one_class_alone(self, backend):
        policy, zero = torch.tensor([1.0, -1.0]), torch.zeros(2)
        with fastpo.use_backend(backend):
            for label in (True, False):
                out = losses.kto(policy, zero, torch.full((2,), label), torch.tensor(0.5))
                assert out.loss.isfinite()

    @by_backend
    def test_signs_and_saturation(self, backend):
        """Desirable up, undesirable down; far out the gradient vanishes; none goes through z0."""
        policy = torch.tensor([0.5, 0.5, 1e4, -1e4, 1e4, -1e4], dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([True, False, True, True, False, False])
        kl = torch.tensor(0.2, requires_grad=True)
        with fastpo.use_backend(backend):
            losses.kto(policy, torch.zeros(6).double(), labels, kl, reduction="sum").loss.backward()
        assert policy.grad[0] < 0 < policy.grad[1] and (policy.grad[2:] == 0).all() and kl.grad is None

    def test_apo_zero_unpaired_is_kto_at_zero(self):
        policy, zero, labels = random(6), torch.zeros(6).double(), torch.tensor([True, False] * 3)
        kto = losses.kto(policy, zero, labels, torch.zeros(()), beta=0.3)
        exactly(losses.apo_zero_unpaired(policy, zero, labels, beta=0.3).loss, kto.loss)


class TestBco:
    def test_delta(self):
        """The mean of the classes' means, not of all rewards; a moving average; a batch without one class."""
        rewards, labels = torch.tensor([1.0, 2.0, 6.0, -3.0]), torch.tensor([True, True, True, False])
        first = losses.bco_delta(rewards, labels)
        assert first == 0.0
        second = losses.bco_delta(rewards + 1, labels, previous=first, decay=0.75)
        assert second == 0.25
        assert losses.bco_delta(rewards, torch.ones(4, dtype=torch.bool), previous=second) == second
        assert losses.bco_delta(rewards, torch.ones(4, dtype=torch.bool)) == 1.5
        assert losses.bco_delta(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) == 0

    def test_refused(self):
        rewards, labels = torch.zeros(2), torch.ones(2, dtype=torch.bool)
        with pytest.raises(TypeError, match="labels must have dtype bool"):
            losses.bco_delta(rewards, labels.float())
        with pytest.raises(ValueError, match="labels has shape"):
            losses.bco_delta(rewards, labels[:1])
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
            losses.bco_delta(rewards, labels, decay=1.0)


class TestMoments:
    def test_alpha_dpo(self):
        """The first batch is the start; equal gaps, as at the reference, have a positive deviation."""
        gaps = random(9, seed=4)
        first = losses.alpha_dpo_statistics(gaps)
        exactly(first.mean, gaps.mean())
        exactly(first.std, gaps.std())
        second = losses.alpha_dpo_statistics(gaps + 1, previous=first, decay=0.75)
        exactly(second.mean, gaps.mean() + 0.25)
        for flat in (torch.zeros(5), torch.zeros(1)):
            start = losses.alpha_dpo_statistics(flat)
            assert start.std > 0
            zero, lengths = torch.zeros(len(flat)), torch.ones(len(flat), dtype=torch.int64)
            sides = {"chosen_lengths": lengths, "rejected_lengths": lengths}
            assert losses.alpha_dpo(zero, zero, zero, zero, *start, **sides).loss.isfinite()

    def test_beta_dpo(self):
        margins = random(50, seed=5)
        generator = torch.Generator().manual_seed(1)
        out = losses.beta_dpo_statistics(margins, generator=generator)
        assert out.keep.sum() == 40 and not out.batch_beta.requires_grad
        exactly(out.batch_beta, 0.1 * (1 + 0.6 * (margins[out.keep].mean() - margins.mean())))
        # what lies far out is dropped: 10 of 50 are, and the largest is almost surely one of them
        margins[7] = 1e3
        assert not losses.beta_dpo_statistics(margins, generator=generator).keep[7]
        assert losses.beta_dpo_statistics(margins - 1e4, previous=out.moments).batch_beta == pytest.approx(1e-3)
        # a batch of one, and one of equals, as at the reference
        for flat in (torch.zeros(1), torch.zeros(8)):
            found = losses.beta_dpo_statistics(flat)
            assert found.batch_beta == pytest.approx(0.1) and found.keep.sum() == max(1, round(0.8 * len(flat)))

    def test_dropped_pairs_have_no_gradient(self):
        policy = random(10, seed=6).requires_grad_()
        zero = torch.zeros(10).double()
        found = losses.beta_dpo_statistics(policy.detach())
        out = losses.beta_dpo(policy, zero, zero, zero, found.batch_beta, found.keep, num_items=found.keep.sum())
        out.loss.backward()
        assert torch.equal(policy.grad != 0, found.keep)
        kept = policy.detach()[found.keep]
        exactly(out.loss.detach(), -F.logsigmoid(found.batch_beta * kept).mean())
        exactly(out.chosen_rewards, 0.1 * policy.detach())

    def test_refused(self):
        for bad in ({"kept": 0.0}, {"kept": 1.5}, {"decay": 1.0}, {"beta": 0.0}, {"alpha": -1.0}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                losses.beta_dpo_statistics(torch.zeros(3), **bad)
        with pytest.raises(ValueError, match=r"margins has shape \(3, 1\)"):
            losses.beta_dpo_statistics(torch.zeros(3, 1))
        for function in (losses.beta_dpo_statistics, losses.alpha_dpo_statistics):
            with pytest.raises(ValueError, match="has no rows"):
                function(torch.zeros(0))
        assert isinstance(losses.beta_dpo_statistics(torch.zeros(3)).moments, Moments)


class TestMixture:
    def given(self) -> dict[str, Tensor]:
        names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
        return {name: random(5, seed=i).requires_grad_() for i, name in enumerate(names)}

    def test_sum_of_its_parts(self):
        given, delta = self.given(), torch.tensor(0.25)
        weights = {"dpo": 0.8, "bco_pair": 0.2, "simpo": 1.0, "cdpo": -0.1}
        lengths = {"chosen_lengths": torch.arange(1, 6), "rejected_lengths": torch.arange(2, 7)}
        hyper = {"dpo": {"beta": 0.4}, "cdpo": {"label_smoothing": 0.3}}
        out = losses.mixture(weights, **given, hyper=hyper, inputs={"delta": delta}, **lengths, reduction="none")
        policies = [given["policy_chosen"], given["policy_rejected"]]
        want = (
            0.8 * losses.dpo(**given, beta=0.4, reduction="none").loss
            + 0.2 * losses.bco_pair(*given.values(), delta, reduction="none").loss
            + losses.simpo(*policies, **lengths, reduction="none").loss
            - 0.1 * losses.cdpo(**given, label_smoothing=0.3, reduction="none").loss
        )
        exactly(out.loss, want)
        exactly(out.chosen_rewards, losses.dpo(**given, beta=0.4).chosen_rewards)
        for ours, theirs in zip(*(torch.autograd.grad(x.sum(), policies) for x in (out.loss, want)), strict=True):
            exactly(ours, theirs)

    def test_with_variants_and_layouts(self):
        given = arguments(case_of("dpo"), "padded", 4, 6, torch.float64)
        weights = {"f_dpo": 1.0, "ipo": 0.5, "rpo": 2.0}
        hyper = {"f_dpo": {"divergence": "jsd"}, "ipo": {"convention": "trl"}, "rpo": {"sft": "average"}}
        out = losses.mixture(weights, **given, hyper=hyper)
        want = sum(w * getattr(losses, n)(**given, **hyper[n]).loss for n, w in weights.items())
        exactly(out.loss, want)

    def test_refused(self):
        x = torch.zeros(2)
        for weights, message in (
            ({}, "weights is empty"),
            ({"dppo": 1.0}, "names 'dppo', which is no pairwise objective"),
            ({"kto": 1.0}, "names 'kto', which is no pairwise objective"),
            ({"dpo": math.nan}, r"weights\['dpo'\] must be finite, got nan"),
        ):
            with pytest.raises(ValueError, match=message):
                losses.mixture(weights, x, x, x, x)
        with pytest.raises(ValueError, match="hyper names 'ipo', which has no weight"):
            losses.mixture({"dpo": 1.0}, x, x, x, x, hyper={"ipo": {}})
        with pytest.raises(TypeError, match="reference_chosen must be a"):
            losses.mixture({"dpo": 1.0}, x, x)


class TestDiffusion:
    def test_loss_and_gradient(self):
        """z = -beta/2 ((m_w - m_l) - (mref_w - mref_l)), m means over all elements; the catalogue's gradient."""
        predictions = [random(3, 4, 2, 2, seed=i) for i in range(6)]
        w, other, rw, rl, tw, tl = predictions
        w.requires_grad_(), other.requires_grad_()
        out = losses.diffusion_dpo(w, other, rw, rl, tw, tl, beta=40.0, reduction="sum")
        m = [(p - t).square().flatten(1).mean(1) for p, t in ((w, tw), (other, tl), (rw, tw), (rl, tl))]
        z = -20.0 * ((m[0] - m[1]) - (m[2] - m[3]))
        exactly(out.loss, -F.logsigmoid(z).sum())
        grads = torch.autograd.grad(out.loss, [w, other])
        slope = (20.0 * torch.sigmoid(-z)).detach()[:, None, None, None]
        exactly(grads[0], slope * 2 * (w - tw).detach() / 16)
        exactly(grads[1], -slope * 2 * (other - tl).detach() / 16)
        assert torch.equal(out.accuracies, (z > 0).double())

    def test_half_precision_means_are_wide(self):
        image = torch.full((1, 3, 64, 64), 0.1).bfloat16()
        zero = torch.zeros_like(image)
        out = losses.diffusion_dpo(image, zero, zero, zero, zero, zero)
        assert out.loss.dtype == torch.float32
        assert out.chosen_rewards.item() == pytest.approx(-2500 * image.double().square().mean().item(), rel=1e-5)

    def test_refused(self):
        x = torch.zeros(2, 3)
        with pytest.raises(ValueError, match=r"target_rejected has shape \(2, 4\)"):
            losses.diffusion_dpo(x, x, x, x, x, torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"beta must be in \(0, inf\)"):
            losses.diffusion_dpo(x, x, x, x, x, x, beta=0.0)
        with pytest.raises(ValueError, match=r"prediction_chosen has shape \(2,\), expected \(B, ...\)"):
            losses.diffusion_dpo(*[torch.zeros(2)] * 6)


class TestHypo:
    def test_gradient_is_that_of_the_kl(self):
        """In expectation over k samples of a tabular policy: d KL(pi, ref) / d logits, enumerated."""
        logits = random(4, seed=1).requires_grad_()
        reference = torch.log_softmax(random(4, seed=2), 0)
        logp = torch.log_softmax(logits, 0)
        kl = (logp.exp() * (logp - reference)).sum()
        (want,) = torch.autograd.grad(kl, logits, retain_graph=True)
        zero = torch.zeros(1).double()
        for k in (1, 2):
            total = torch.zeros(4, dtype=torch.float64)
            for samples in torch.cartesian_prod(*[torch.arange(4)] * k).view(-1, k):
                weight = logp.detach()[samples].sum().exp()
                logp_again = torch.log_softmax(logits, 0)
                online = logp_again[samples][None], reference[samples][None]
                out = losses.hypo(zero, zero, zero, zero, *online, lambda_=1.0)
                total += weight * torch.autograd.grad(out.loss, logits)[0]
            exactly(total, want)

    def test_without_its_second_term_it_is_dpo(self):
        given = [random(4, seed=i) for i in range(4)]
        online = random(3, 2, seed=9)
        exactly(losses.hypo(*given, online, online - 1, lambda_=0.0).loss, losses.dpo(*given).loss)

    def test_refused(self):
        x = torch.zeros(2)
        for online, message in ((torch.zeros(2), r"shape \(2,\), expected \(P, k\)"), (torch.zeros(0, 2), "not empty")):
            with pytest.raises(ValueError, match=message):
                losses.hypo(x, x, x, x, online, online)
        with pytest.raises(ValueError, match=r"lambda_ must be in \[0, inf\)"):
            losses.hypo(x, x, x, x, torch.zeros(1, 2), torch.zeros(1, 2), lambda_=-1.0)
