"""What the catalogue says of single methods: identities, edges and traps into which other code has fallen."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.reference.registry import objectives

BACKENDS = ["native", "reference"]
DTYPES = [torch.float64, torch.float32]
NAMES = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
ONE = torch.ones(1, dtype=torch.int64)

by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with fastpo.use_backend(request.param):
        yield request.param


def given(n: int = 9, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: (3 * torch.randn(n, generator=generator)).to(dtype) for name in NAMES}


def at(a: Tensor | float, b: Tensor | float, name: str, *inputs: Any, **hyper: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per pair and both gradients at these log-ratios to a reference of 0."""
    chosen, rejected = (torch.as_tensor(x).reshape(-1).clone().requires_grad_() for x in (a, b))
    zero = torch.zeros_like(chosen)
    row = fastpo.reference.objective(name)
    references = (zero, zero) if row.reference_model else ()
    out = getattr(losses, name)(chosen, rejected, *references, *inputs, **hyper, reduction="none")
    return out.loss.detach(), *torch.autograd.grad(out.loss.sum(), (chosen, rejected))


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], rtol: float = 0.0) -> None:
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol and 1e-14)


def margins(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values = torch.tensor([-60.0, -3.0, -0.25, 0.0, 1e-3, 2.0, 45.0], dtype=dtype)
    pairs = torch.cartesian_prod(values, values)
    return pairs[:, 0], pairs[:, 1]


@by_dtype
class TestOneFormulaManyNames:
    @pytest.mark.parametrize("name", ["spin", "online_dpo", "dno_prct", "rso_sigmoid"])
    def test_dpo(self, dtype, name):
        same(at(*margins(dtype), name, beta=0.3), at(*margins(dtype), "dpo", beta=0.3))

    def test_smoothing_per_pair(self, dtype):
        """cdpo = dno = mcts_dpo, each with its own way to say epsilon."""
        a, b = margins(dtype)
        won, lost = torch.tensor([30.0, 10.0], dtype=dtype).expand(len(a), 2).unbind(1)
        same(at(a, b, "mcts_dpo", won, lost), at(a, b, "cdpo", label_smoothing=torch.full_like(a, 0.25)), 1e-6)
        r = torch.rand(2, len(a), generator=torch.Generator().manual_seed(0)).to(dtype).sort(0).values
        same(at(a, b, "dno", r[1], r[0]), at(a, b, "cdpo", label_smoothing=torch.sigmoid(r[0] - r[1])))

    @pytest.mark.parametrize(
        ("name", "hyper", "of"),
        [
            ("cdpo", {"label_smoothing": 0.0}, "dpo"),
            ("robust_dpo", {"label_smoothing": 0.0}, "dpo"),
            ("dpop", {"lambda_": 0.0}, "dpo"),
            ("dpo_shift", {"lambda_": 1.0}, "dpo"),
            ("flex_dpo", {"beta_rejected": 0.3}, "dpo"),
            ("rpo", {"eta": 0.0}, "dpo"),
            ("f_dpo", {"divergence": "reverse_kl"}, "dpo"),
        ],
    )
    def test_a_hyper_parameter_that_switches_off(self, dtype, name, hyper, of):
        eps = torch.finfo(dtype).eps
        # beta a - beta b is rounded otherwise than beta (a - b)
        rtol = 64 * eps if name in ("dpo_shift", "flex_dpo") else 0.0
        same(at(*margins(dtype), name, beta=0.3, **hyper), at(*margins(dtype), of, beta=0.3), rtol)

    def test_without_the_bonus_xpo_is_online_dpo(self, dtype):
        a, b = margins(dtype)
        same(at(a, b, "xpo", a > b, alpha=0.0), at(a, b, "online_dpo"))

    def test_ipo_md_is_online_ipo_and_hard_labels_are_ipo(self, dtype):
        a, b = margins(dtype)
        for p in (0.0, 0.3, 1.0):
            win = torch.full_like(a, p)
            same(at(a, b, "ipo_md", win, beta=0.4), at(a, b, "online_ipo", win, beta=0.4))
        same(at(a, b, "online_ipo", torch.ones_like(a), beta=0.4), at(a, b, "ipo", beta=0.4), 1e-6)

    def test_sppo_hard_is_twice_sppo(self, dtype):
        a, b = margins(dtype)
        soft = at(a, b, "sppo", torch.ones_like(a), torch.zeros_like(a), beta=0.01)
        same(at(a, b, "sppo_hard", beta=0.01), tuple(2 * x for x in soft), 1e-6)

    def test_rso_hinge_is_slic_rescaled(self, dtype):
        a, b = margins(dtype)
        slic = at(a, b, "slic", delta=4.0, lambda_=0.0)
        same(at(a, b, "rso_hinge", beta=0.25), tuple(0.25 * x for x in slic))


class TestIdentities:
    def test_inpo_with_its_step_is_ipo(self):
        tensors = given()
        shift = torch.ones(9, dtype=torch.float64)
        previous = {"previous_chosen": -7 * shift, "previous_rejected": 5 * shift}
        ours = losses.inpo(**tensors, **previous, beta=0.4, eta=0.4).loss
        torch.testing.assert_close(ours, losses.ipo(**tensors, beta=0.4).loss, rtol=1e-13, atol=0)

    def test_inpo_without_beta_drops_the_reference(self):
        tensors = given()
        previous = {"previous_chosen": torch.ones(9).double(), "previous_rejected": torch.zeros(9).double()}
        other = {**tensors, "reference_chosen": tensors["reference_chosen"] + 100}
        found = [losses.inpo(**t, **previous, beta=0.0, eta=0.4).loss for t in (tensors, other)]
        torch.testing.assert_close(*found, rtol=1e-12, atol=0)

    def test_a_step_longer_than_eta_is_refused(self):
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=r"inpo: beta must be at most eta, got 0\.5 and 0\.4"):
            losses.inpo(x, x, x, x, x, x, beta=0.5, eta=0.4)

    def test_length_normalised_forms_at_length_one(self):
        tensors, ones = given(), torch.ones(9, dtype=torch.int64)
        lengths = {"chosen_lengths": ones, "rejected_lengths": ones}
        assert torch.equal(losses.dpo_norm(**tensors, **lengths, beta=0.3).loss, losses.dpo(**tensors, beta=0.3).loss)
        policies = [tensors[name] for name in NAMES[:2]]
        plain = losses.cpo(*policies, beta=0.3, alpha=0).loss
        torch.testing.assert_close(losses.simpo(*policies, **lengths, beta=0.3, gamma=0).loss, plain)
        # alpha -> 0: the difference is of the order of alpha
        near = losses.alpha_po(*policies, **lengths, beta=0.3, gamma=0, alpha=1e-6).loss
        torch.testing.assert_close(near, plain, rtol=1e-5, atol=0)

    def test_averages_come_from_lengths_or_masks(self):
        """Reference-free objectives on tokens and on sums with lengths; rewards are averages too."""
        generator = torch.Generator().manual_seed(0)
        tokens = -torch.rand(2, 5, 7, generator=generator, dtype=torch.float64)
        counts = torch.tensor([[7, 1, 3, 2, 5], [1, 7, 2, 4, 6]])
        masks = torch.arange(7) < counts[..., None]
        for name in ("simpo", "alpha_po", "orpo", "simper"):
            function = getattr(losses, name)
            by_tokens = function(*tokens, chosen_mask=masks[0], rejected_mask=masks[1])
            sums = torch.where(masks, tokens, 0).sum(2)
            by_sums = function(*sums, chosen_lengths=counts[0], rejected_lengths=counts[1])
            for x, y in zip(by_tokens, by_sums, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-14)
            beta = fastpo.reference.objective(name).defaults.get("beta", 1.0)
            torch.testing.assert_close(by_tokens.chosen_rewards, beta * sums[0] / counts[0], rtol=1e-13, atol=0)

    def test_lengths_are_needed(self):
        x = torch.zeros(2)
        for name, count in (("simpo", 2), ("rrhf", 2), ("r_dpo", 4), ("dpo_norm", 4), ("iterative_rpo", 4)):
            with pytest.raises(ValueError, match=rf"{name} with summed \(B,\) log-probs needs chosen_lengths"):
                getattr(losses, name)(*[x] * count)

    def test_r_dpo_penalises_length(self):
        """PLUS alpha (|w| - |l|): a longer chosen response has the smaller loss, so it is pushed less."""
        x = torch.zeros(2).double()
        lengths = {"chosen_lengths": torch.tensor([30, 10]), "rejected_lengths": torch.tensor([10, 30])}
        loss = losses.r_dpo(x, x, x, x, **lengths, alpha=0.1, reduction="none").loss
        assert loss[0] < math.log(2) < loss[1]

    def test_sharpening_is_symmetric(self):
        tensors = given()
        swapped = dict(zip(NAMES, [tensors[n] for n in (NAMES[1], NAMES[0], NAMES[3], NAMES[2])], strict=True))
        ours, theirs = (losses.sharpening_rebel(**t, reduction="none").loss for t in (tensors, swapped))
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
        assert (losses.sharpening_xpo(**tensors, alpha=0.0, reduction="none").loss == ours).all()

    def test_rpo_forms(self):
        """The average form is iterative RPO's, with eta for its alpha."""
        tensors, lengths = given(), {"chosen_lengths": torch.arange(1, 10), "rejected_lengths": torch.arange(1, 10)}
        ours = losses.rpo(**tensors, **lengths, sft="average", beta=0.5, eta=0.2).loss
        assert torch.equal(ours, losses.iterative_rpo(**tensors, **lengths, beta=0.5, alpha=0.2).loss)
        with pytest.raises(ValueError, match="chosen_lengths is only for summed"):
            losses.rpo(**tensors, **lengths)


class TestTraps:
    @pytest.mark.parametrize("divergence", ["forward_kl", "alpha", "jsd", "reverse_kl"])
    def test_f_dpo_at_minus_200(self, divergence):
        """fp32 exp(200) - exp(200) would be NaN; where both sides are clamped the pair is dead, with the loss log 2."""
        for a, b in itertools.product((-200.0, 0.0, 200.0), repeat=2):
            found = at(a, b, "f_dpo", divergence=divergence)
            assert all(x.isfinite().all() for x in found), (a, b)
        loss, da, db = at(-200.0, -200.0, "f_dpo", divergence=divergence)
        assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
        assert (da == 0).item() == (db == 0).item() == (divergence in ("forward_kl", "alpha"))

    def test_f_dpo_alpha_conventions(self):
        """1 - alpha in TRL: the same at one half only; and the paper's limits."""
        a, b = margins(torch.float64)
        a, b = a / 20, b / 20
        paper, trl = (
            [at(a, b, "f_dpo", divergence="alpha", alpha=alpha, convention=c)[0] for alpha in (0.5, 0.3)]
            for c in (None, "trl")
        )
        assert torch.equal(paper[0], trl[0]) and (paper[1] - trl[1]).abs().max() > 1e-2
        for alpha, limit in ((1e-7, "reverse_kl"), (1 - 1e-9, "forward_kl")):
            near = at(a, b, "f_dpo", divergence="alpha", alpha=alpha)[0]
            torch.testing.assert_close(near, at(a, b, "f_dpo", divergence=limit)[0], rtol=1e-5, atol=1e-7)

    def test_f_dpo_jsd_is_bounded(self):
        """The chosen side's margin cannot pass log 2."""
        loss = at(1e4, 0.0, "f_dpo", divergence="jsd", beta=1.0)[0]
        assert loss.item() == pytest.approx(math.log1p(math.exp(-math.log(2))), rel=1e-6)

    def test_without_smoothing_there_is_no_flipped_term(self):
        """0 * log σ(-inf) is NaN; at an infinite margin dpo has the loss 0, and so has what equals it."""
        chosen, rejected, zero = (torch.tensor([x]) for x in (0.0, -math.inf, 0.0))
        given = chosen, rejected, zero, zero
        found = [
            losses.dpo(*given),
            losses.cdpo(*given, label_smoothing=0.0),
            losses.cdpo(*given, label_smoothing=zero),
            losses.robust_dpo(*given, label_smoothing=0.0),
            losses.odpo(*given, chosen_score=zero + 2, rejected_score=zero),
            losses.bradley_terry(chosen, rejected),
            losses.bradley_terry(chosen, rejected, margin=1.0),
        ]
        assert [out.loss.item() for out in found] == [0.0] * len(found)
        assert losses.cdpo(*given, label_smoothing=0.1).loss == math.inf

    def test_discopop_at_minus_100(self):
        """m e^-z is 0 * inf in two factors; here it is a number, and the loss that of a logistic loss."""
        for z in (-100.0, -1e4, 100.0, 1e4):
            loss, slope, _ = at(z, 0.0, "discopop", beta=1.0, tau=0.05)
            assert loss.isfinite() and slope.isfinite()
            assert loss.item() == pytest.approx(max(-z, 0.0) if z < 0 else math.exp(-z), abs=1e-6)

    @by_dtype
    def test_orpo_at_probability_one(self, dtype):
        for a, b in itertools.product((0.0, -1e-9, -1e-3, -50.0), repeat=2):
            lengths = {"chosen_lengths": ONE, "rejected_lengths": ONE}
            found = at(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype), "orpo", **lengths)
            assert all(x.isfinite().all() for x in found), (a, b)

    @pytest.mark.parametrize("backend", ["native", "reference"])
    def test_orpo_keeps_its_digits_there(self, backend):
        """log(1 - p) by its letters is off by 6e-4 at p = e^-0.0001."""
        a, b = -1e-4, -3e-3
        odds = [x - math.log(-math.expm1(x)) for x in (a, b)]
        want = -a + math.log1p(math.exp(odds[1] - odds[0]))
        w, worse = torch.tensor([a]), torch.tensor([b])
        with fastpo.use_backend(backend):
            found = losses.orpo(w, worse, lambda_=1.0, chosen_lengths=ONE, rejected_lengths=ONE).loss
        assert found.item() == pytest.approx(want, rel=2e-6)

    def test_exponentials_of_bad_completions(self):
        """alpha_po and chi_po at log-ratios whose exponential overflows fp32."""
        lengths = {"chosen_lengths": ONE, "rejected_lengths": ONE}
        for a, b in itertools.product((-500.0, -1.0, 500.0), repeat=2):
            assert all(x.isfinite().all() for x in at(min(a, 0.0), min(b, 0.0), "alpha_po", **lengths, alpha=1.0))
            assert all(x.isfinite().all() for x in at(a, b, "chi_po")), (a, b)

    def test_chi_po_clips(self):
        loss, da, db = at(5.0, -5.0, "chi_po", beta=1.0, r_max=2.0)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-4)), rel=1e-6) and da == db == 0

    def test_robust_dpo_may_be_negative(self):
        assert at(50.0, 0.0, "robust_dpo", beta=1.0, label_smoothing=0.1)[0].item() == pytest.approx(-6.25)

    def test_equal_responses(self):
        """w == l token for token: the losses of a margin have gradients that cancel; the others do not."""
        for row in objectives("pairwise"):
            if row.inputs or row.previous_model or row.lengths == "average" or not row.reference_model or row.tokens:
                continue
            lengths = {"chosen_lengths": ONE, "rejected_lengths": ONE} if row.lengths == "count" else {}
            if row.options:
                lengths = {}
            _, da, db = at(torch.tensor([0.7]).double(), torch.tensor([0.7]).double(), row.name, **lengths)
            pure = abs((da + db).item()) < 1e-12
            impure = {"nca_pair", "sppo_hard", "cal_dpo", "rpo", "iterative_rpo", "apo_down", "flex_dpo"}
            assert pure == (row.name not in impure | {"dpo_shift", "sharpening_xpo"}), row.name

    def test_apo_at_the_reference(self):
        """A loss of 1; and apo_down leaves the chosen response alone there."""
        for name in ("apo_zero", "apo_down"):
            assert at(0.0, 0.0, name)[0] == 1.0
        _, da, db = at(0.0, 0.0, "apo_down", beta=0.2)
        assert da == 0 and db.item() == pytest.approx(0.05)
        # zero: chosen up, rejected down; down: both down, the rejected one further
        _, da, db = at(0.3, -0.4, "apo_zero")
        assert da < 0 < db

    def test_exo_is_stationary_and_then_dead(self):
        smoothing, beta = 0.1, 0.5
        h = math.log((1 - smoothing) / smoothing) / beta
        ratio = torch.tensor([h], dtype=torch.float64)
        loss, slope, _ = at(ratio, 0 * ratio, "exo_pair", beta=beta, label_smoothing=smoothing)
        assert abs(loss.item()) < 1e-14 and abs(slope.item()) < 1e-14
        # badly ranked pairs are not corrected
        assert abs(at(-200.0, 0.0, "exo_pair", beta=beta)[1].item()) < 1e-30

    def test_dpop_starts_as_dpo(self):
        """At the reference the penalty's subgradient is 0."""
        same(at(0.0, 0.0, "dpop", beta=0.3), at(0.0, 0.0, "dpo", beta=0.3))
        assert at(-1.0, 0.0, "dpop", beta=0.3, lambda_=5.0)[1].item() < 5 * at(-1.0, 0.0, "dpo", beta=0.3)[1].item()

    def test_cal_dpo_has_no_beta_in_its_sigmoid(self):
        for beta in (0.1, 10.0):
            loss = at(torch.tensor([1.5]).double(), torch.zeros(1).double(), "cal_dpo", beta=beta, lambda_=0.0)[0]
            assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-13)

    def test_sppo_targets_are_500_nats(self):
        loss, da, db = at(0.0, 0.0, "sppo", torch.ones(1), torch.zeros(1))
        assert [loss.item(), da.item(), db.item()] == pytest.approx([250_000, -500, 500])

    def test_mcts_visits(self):
        """No visits of the winner count as one; a loser with more visits gives one half, not more."""
        h = torch.full((4,), 2.0)
        won, lost = torch.tensor([0.0, 0.0, 3.0, 9.0]), torch.tensor([0.0, 4.0, 9.0, 3.0])
        smoothing = torch.tensor([0.0, 0.499999, 0.499999, 0.25])
        ours, theirs = at(h, 0 * h, "mcts_dpo", won, lost), at(h, 0 * h, "cdpo", label_smoothing=smoothing)
        same(ours, theirs, 1e-4)

    def test_odpo_scores(self):
        """Equal scores would be a loss of 0 without a word, and reversed ones NaN; a gap below 1 lowers the target."""
        x = torch.zeros(2)
        for rejected in (torch.tensor([1.0, 2.0]), torch.tensor([5.0, 0.0])):
            with pytest.raises(ValueError, match="odpo: chosen_score must be above rejected_score in every pair"):
                losses.odpo(x, x, x, x, torch.tensor([2.0, 2.0]), rejected)
        with pytest.raises(ValueError, match="odpo: chosen_score and rejected_score must be positive"):
            losses.odpo(x, x, x, x, torch.tensor([2.0, 2.0]), torch.tensor([1.0, -1.0]), offset="log_ratio")
        below, above = (losses.odpo(x, x, x, x, gap * torch.ones(2), x).loss for gap in (0.5, 2.0))
        assert below < math.log(2) < above

    def test_bco_pair_without_shift_is_binary_cross_entropy(self):
        loss = at(0.6, -0.8, "bco_pair", torch.zeros(()), beta=0.5)[0]
        want = math.log1p(math.exp(-0.3)) + math.log1p(math.exp(-0.4))
        assert loss.item() == pytest.approx(want, rel=1e-6)

    def test_hinge_of_slic_is_dead_beyond_its_margin(self):
        loss, da, db = at(5.0, 0.0, "slic", delta=1.0, lambda_=0.25)
        assert (loss.item(), da.item(), db.item()) == (-1.25, -0.25, 0.0)

    def test_xpo_pushes_the_references_sample_down(self):
        """Plus alpha log pi, whoever won."""
        for first in (True, False):
            with_bonus = at(0.4, 0.1, "xpo", torch.tensor([first]), alpha=0.5)
            plain = at(0.4, 0.1, "dpo")
            pushed = [x.item() - y.item() for x, y in zip(with_bonus[1:], plain[1:], strict=True)]
            assert pushed == pytest.approx([0.5 * first, 0.5 * (not first)])

    def test_npo_forgets(self):
        policy = torch.tensor([-5.0, 0.0, 5.0, 400.0]).double().requires_grad_()
        out = losses.npo(policy, torch.zeros(4).double(), reduction="sum")
        (grad,) = torch.autograd.grad(out.loss, policy)
        assert (grad > 0).all() and grad[3].item() == pytest.approx(2.0) and out.loss.isfinite()

    @pytest.mark.parametrize("kl", ["sequence", "to_go"])
    def test_nash_kl_is_the_kls_gradient(self, kl):
        """At P = 1/2 only the KL is left: over all sequences of two tokens its expectation is the exact gradient, which
        the per-token form of TRL is not."""
        generator = torch.Generator().manual_seed(1)
        logits = [torch.randn(3, *[2] * i, generator=generator).double().requires_grad_() for i in (0, 1)]
        reference = [torch.log_softmax(torch.randn(3, *[2] * i, generator=generator).double(), 0) for i in (0, 1)]
        first, second = torch.log_softmax(logits[0], 0), torch.log_softmax(logits[1], 0)
        i, s = (t.flatten() for t in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
        # the state after the first token: its parity
        tokens = torch.stack([first[i], second[s, i % 2]], 1)
        known = torch.stack([reference[0][i], reference[1][s, i % 2]], 1)
        law = tokens.sum(1).exp()
        exact = torch.autograd.grad((law * (tokens - known).sum(1)).sum(), logits, retain_graph=True)
        out = losses.nash_md(tokens, known, torch.full((9,), 0.5), beta=0.7, kl=kl, reduction="none")
        ours = torch.autograd.grad((law.detach() * out.loss).sum(), logits, retain_graph=True)
        for x, y in zip(ours, exact, strict=True):
            torch.testing.assert_close(x, 0.7 * y, rtol=1e-11, atol=1e-13)
        per_token = 0.7 * ((tokens - known).detach() * tokens).sum(1)
        theirs = torch.autograd.grad((law.detach() * per_token).sum(), logits)
        assert (theirs[0] - 0.7 * exact[0]).abs().max() > 1e-2
        torch.testing.assert_close(out.penalties, 0.7 * (tokens - known).sum(1).detach())

    def test_a_bad_row_stays_alone(self):
        """NaN and inf of one row reach no other, in value or gradient, under reduction="none"."""
        for row in objectives():
            if row.prepare is not None or row.tokens:
                continue
            names = [f"{m}_{s}" if s else m for m in row.models for s in row.sides]
            tensors = {name: -torch.rand(5, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}
            for i in row.inputs:
                tensors[i.name] = torch.full((5,), 0.5) > 0 if i.boolean else torch.full(() if i.shared else (5,), 0.5)
            if row.lengths in ("average", "count") and not row.options:
                tensors |= {f"{s}_lengths": torch.ones(5, dtype=torch.int64) for s in row.sides}
            found = []
            for poison in (None, math.nan, math.inf, -math.inf):
                leaf = tensors[names[0]].clone()
                if poison is not None:
                    leaf[2] = poison
                leaf.requires_grad_()
                out = getattr(losses, row.name)(**{**tensors, names[0]: leaf}, reduction="none")
                found.append((out.loss.detach(), torch.autograd.grad(out.loss.sum(), leaf)[0]))
            others = torch.tensor([0, 1, 3, 4])
            for loss, grad in found[1:]:
                assert torch.equal(loss[others], found[0][0][others]), row.name
                assert torch.equal(grad[others], found[0][1][others]), row.name
