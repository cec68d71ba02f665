"""Each method on demonstrations and other given data against its formula, written out for one completion at a time."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fastpo import algorithms, losses
from fastpo.algorithms import Batch, Completions
from fastpo.algorithms.given import ROWS, StateValue

LENGTHS = (3, 1, 4, 2)
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
TOKENS, ITEMS = 23, 7  # of the whole step
IDS = torch.tensor([4, 5, 4, 1, 2, 2, 3, 2, 6, 7])


def batch(learnt: tuple[str, ...] = ("policy",), **more: torch.Tensor) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        return torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)

    found = {"policy": -drawn() - 0.1, "reference": -drawn() - 0.1, "values": drawn(), "reward": -drawn()}
    found |= {"key": (drawn() > 0.5).double(), "log_reward": drawn() - 0.5, "ids": IDS, **more}
    for name in learnt:
        found[name].requires_grad_()
    return Batch(found, Completions(LENGTHS, ENDS, (1,) * len(LENGTHS)), {}, ITEMS, 0, TOKENS)


def each(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return values.split(LENGTHS)


def squared_parts(of: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Σ_(i<j) λ^(j-i) (b_j - b_i)² / Σ_(i<j) λ^(j-i) of the balances b."""
    pairs = [(i, j) for j in range(len(of)) for i in range(j)]
    weights = [decay ** (j - i) for i, j in pairs]
    return sum(w * (of[j] - of[i]).square() for w, (i, j) in zip(weights, pairs, strict=True)) / sum(weights)


def flow(of: Batch, *, prior: bool, ahead: bool, balance: str) -> torch.Tensor:
    total = 0.0
    for p, q, v, r in zip(*(each(of.streams[k]) for k in ("policy", "reference", "values", "log_reward")), strict=True):
        steps = (p - q if prior else p).cumsum(0)
        # log F of the states before each token and behind the last
        states = [v[t] + (r[:t].sum() if ahead else 0) for t in range(len(v))] + [r.sum()]
        of_state = [(steps[t - 1] if t else 0) - states[t] for t in range(len(states))]
        if balance == "tb":
            total = total + (v[0] + steps[-1] - r.sum()).square()
        elif balance == "db":
            total = total + sum((b - a).square() for a, b in pairwise(of_state)) / len(v)
        else:
            total = total + squared_parts(of_state, 0.7)
    return total / ITEMS


def repeated(ids: torch.Tensor) -> torch.Tensor:
    return torch.tensor([token in ids[:t].tolist() for t, token in enumerate(ids.tolist())])


FORMULAS = {
    "sft": ({}, lambda b, s: -s["policy"].sum() / TOKENS),
    "sft, by sequences": (
        {"average": "seq_mean"},
        lambda b, s: -sum(p.mean() for p in each(s["policy"])) / ITEMS,
    ),
    "filtering": ({}, lambda b, s: -s["policy"].sum() / TOKENS),
    "conditional_training": ({}, lambda b, s: -s["policy"].sum() / TOKENS),
    "rwr": (
        {"beta": 0.3, "max_weight": 0.5},
        lambda b, s: -((s["reward"] / 0.3).exp().clamp(max=0.5) * s["policy"]).sum() / TOKENS,
    ),
    "awr": (
        {"beta": 0.3, "alpha": 0.2},
        lambda b, s: (
            (
                -0.2 * (((s["reward"] - s["values"].detach()) / 0.3).exp() * s["policy"]).sum()
                + 0.8 * (s["reward"] - s["values"]).square().sum()
            )
            / TOKENS
        ),
    ),
    "unlikelihood": (
        {"threshold": 0.5, "alpha": 0.3},
        lambda b, s: -torch.where(s["reward"] >= -0.5, s["policy"], 0.3 * (1 - s["policy"].exp()).log()).sum() / TOKENS,
    ),
    "unlikelihood, by shares": (
        {"rule": "share", "alpha": 0.3},
        lambda b, s: (
            -((1 + s["reward"]) * s["policy"] - 0.3 * s["reward"] * (1 - s["policy"].exp()).log()).sum() / TOKENS
        ),
    ),
    "sequence_unlikelihood": (
        {"n": 1, "mle": 0.25},
        lambda b, s: (
            -(
                torch.where(torch.cat([*map(repeated, each(s["ids"]))]), (1 - s["policy"].exp()).log(), 0)
                + 0.25 * s["policy"]
            ).sum()
            / TOKENS
        ),
    ),
    "chain_of_hindsight": ({}, lambda b, s: -sum(p.mean() for p in each(s["policy"])) / ITEMS),
    "implicit_reward_sft": (
        {"beta": 0.4, "divergence": "pearson_chi2"},
        lambda b, s: (
            sum(
                v[0] - sum(x - x.square() / 4 for x in 0.4 * (p - q) + v - torch.cat([v[1:], v.new_zeros(1)]))
                for p, q, v in zip(*(each(s[k]) for k in ("policy", "reference", "values")), strict=True)
            )
            / ITEMS
        ),
    ),
    "trajectory_balance": ({}, lambda b, s: flow(b, prior=True, ahead=False, balance="tb")),
    "trajectory_balance, no prior": ({"prior": "none"}, lambda b, s: flow(b, prior=False, ahead=False, balance="tb")),
    "detailed_balance": ({}, lambda b, s: flow(b, prior=True, ahead=False, balance="db")),
    "subtrajectory_balance": ({"lambda_": 0.7}, lambda b, s: flow(b, prior=True, ahead=False, balance="sub")),
    "fl_detailed_balance": ({"prior": "none"}, lambda b, s: flow(b, prior=False, ahead=True, balance="db")),
    "fl_subtrajectory_balance": ({"lambda_": 0.7}, lambda b, s: flow(b, prior=True, ahead=True, balance="sub")),
}
LEARNT = ("policy", "values")


@pytest.mark.parametrize("case", FORMULAS)
def test_loss_and_gradient_are_the_formulas(case):
    name, (hyper, formula) = case.split(",")[0], FORMULAS[case]
    algorithm, ours, theirs = algorithms.build(name, hyper), batch(LEARNT), batch(LEARNT)
    out = algorithm(ours, {})
    expected = formula(theirs, theirs.streams)
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-9)
    out.loss.backward()
    expected.backward()
    for stream in LEARNT:
        found, wanted = ours.streams[stream].grad, theirs.streams[stream].grad
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    assert (algorithm.module(8) is not None) == ROWS[name].learns > 0 or "values" not in out.metrics


def test_every_method_has_a_formula():
    elsewhere = {"token_unlikelihood", "tl_training", "regret"}
    assert {case.split(",")[0] for case in FORMULAS} | elsewhere == ROWS.keys()


def test_token_unlikelihood():
    """Against the loss on logits, whose log-probs the trainer has at the candidates alone."""
    algorithm = algorithms.build("token_unlikelihood", {"alpha": 0.6})
    completions = Completions(LENGTHS, ENDS, (1,) * 4)
    candidates = algorithm.candidates(IDS, completions)
    assert candidates[2].tolist()[:3] == [-100, 5, -100] and (candidates[3] == -100).all()
    logits = torch.randn(10, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    logp = logits.log_softmax(-1)
    others = torch.where(candidates == -100, 0.0, logp.gather(1, candidates.clamp(min=0)))
    streams = {"policy": logp.gather(1, IDS[:, None])[:, 0], "policy_candidates": others, "ids": IDS}
    ours = algorithm(Batch(streams, completions, {}, ITEMS, 0, TOKENS), {}).loss
    theirs = losses.token_unlikelihood(logits, IDS, candidates, alpha=0.6, num_items=TOKENS).loss
    torch.testing.assert_close(ours, theirs)
    for found, wanted in zip(*(torch.autograd.grad(x, logits, retain_graph=True) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(found, wanted)


def test_tl_training():
    algorithm, given = algorithms.build("tl_training", {"cap": 2.0}), batch()
    keys = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    given.streams["key"] = keys.double()
    # two others for one key; no other; three others, which is above the cap; no key
    weights = torch.tensor([2, 1, 1, 1, 2, 1, 1, 1, 1, 1.0], dtype=torch.float64)
    p = given.streams["policy"]
    expected = -sum((w * x).sum() / w.sum() for w, x in zip(each(weights), each(p), strict=True)) / ITEMS
    torch.testing.assert_close(algorithm(given, {}).loss, expected, rtol=1e-6, atol=1e-9)


def test_regret():
    """Two rows, of two rounds and of one, between three actions."""
    algorithm = algorithms.build("regret", {"k": 2.0})
    # completions: the first of both rows, the second, the third, then the rest of the longer row
    lengths = (1, 2, 1, 1, 2, 1, 1, 1, 1)
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    slots = ((0, 2, 4, 6, 7, 8), (1, 3, 5))
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(sum(lengths), generator=generator, dtype=torch.float64).requires_grad_()
    cost = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    numbers = {"actions": torch.tensor([3.0, 3.0]), "losses": cost}
    given = Batch({"policy": p}, Completions(lengths, ends, (6, 3)), numbers, 2, 0, sum(lengths))
    out = algorithm(given, {})
    sums = torch.stack([part.sum() for part in p.split(lengths)])
    regrets = []
    for places in slots:
        rounds = [places[i : i + 3] for i in range(0, len(places), 3)]
        paid = sum((sums[list(r)].softmax(0) * cost[list(r)]).sum() for r in rounds)
        regrets.append(paid - min(sum(cost[r[a]] for r in rounds) for a in range(3)))
    found = torch.stack(regrets)
    expected = ((2 * found).softmax(0) * found.clamp(min=0).square()).sum()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.metrics["regret"], found.detach().mean())
    (ours,), (theirs,) = (torch.autograd.grad(x, p, retain_graph=True) for x in (out.loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert algorithm.whole_step
    assert algorithm.problem([(3.0,), (3.0,)]) is None
    assert algorithm.problem([(3.0,), (2.0,)]) == (1, "there are 2 actions, but the first row has 3")


def test_a_state_value_starts_at_nothing_and_learns():
    head = StateValue(4, 10.0)
    hidden = torch.randn(5, 4, dtype=torch.bfloat16)
    assert head(hidden).tolist() == [0.0] * 5 and head(hidden).dtype == torch.float32
    head(hidden).sum().backward()
    torch.testing.assert_close(head.linear.weight.grad, 10 * hidden.float().sum(0, keepdim=True))
    assert math.isclose(head.linear.bias.grad.item(), 50.0)


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("rwr", {"beta": 0.0}, r"beta must be in \(0, inf\) for rwr, got 0"),
        ("sft", {"average": "sum"}, "average must be one of token_mean, seq_mean for sft, got sum"),
        ("sequence_unlikelihood", {"n": 0}, r"n must be in \[1, inf\) for sequence_unlikelihood, got 0"),
    ],
)
def test_hyper_parameters_are_checked(name, hyper, message):
    with pytest.raises(ValueError, match=message):
        algorithms.build(name, hyper)
