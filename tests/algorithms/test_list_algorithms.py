"""What an algorithm on lists hands to its loss, and what it makes of the answer."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo import algorithms, losses
from fastpo.algorithms import Batch, Completions
from fastpo.algorithms.base import Column
from fastpo.reference.listwise import list_objective, list_objectives

# three lists of 3, 2 and 4 completions: the first ones come first, then the second ones, and so on
COUNTS = (3, 2, 4)
PLACES = ((0, 3, 6), (1, 4), (2, 5, 7, 8))
LENGTHS = (2, 1, 3, 1, 4, 2, 2, 1, 3)
COMPLETIONS = Completions(LENGTHS, torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32), COUNTS)
NAMES = [row.name for row in list_objectives()]


def streams(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: -torch.rand(sum(LENGTHS), generator=generator).double() for name in ("policy", "reference")}
    return {**found, "policy": found["policy"].requires_grad_()}


def numbers(columns: tuple[Column, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = {
        "labels": torch.rand(len(LENGTHS), generator=generator),
        "rewards": torch.randn(len(LENGTHS), generator=generator),
        "ranks": torch.randint(1, 5, (len(LENGTHS),), generator=generator),
        "proposal_logprobs": torch.full((len(LENGTHS),), math.nan),
    }
    return {column.name: drawn[column.name].double() for column in columns}


def by_hand(name: str, of: dict[str, torch.Tensor], given: dict[str, torch.Tensor], **hyper):
    """The loss of the lists one by one, from sums made completion by completion."""
    row, parts = list_objective(name), {key: values.split(LENGTHS) for key, values in of.items()}
    total = 0.0
    for places in PLACES:
        sums = {key: torch.stack([values[i].sum() for i in places])[None] for key, values in parts.items()}
        known = {key: values[list(places)][None] for key, values in given.items()}
        proposal = known.get("proposal_logprobs")
        if proposal is not None:
            known["proposal"] = torch.where(proposal.isnan(), sums["reference"], proposal)
        lengths = torch.tensor([[LENGTHS[i] for i in places]])
        known |= {**sums, "prior": sums.get("reference"), "scores": sums["policy"], "lengths": lengths}
        tensors = [known[argument] for argument in row.names]
        total = total + getattr(losses, name)(*tensors, **hyper, reduction="sum").loss
    return total


def test_the_completions_of_an_example_are_found():
    assert COMPLETIONS.slots() == [list(places) for places in PLACES]
    order, bounds = COMPLETIONS.by_example()
    assert order.tolist() == [i for places in PLACES for i in places]
    assert (bounds.tolist(), bounds.dtype) == ([0, 3, 5, 9], torch.int32)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_loss(name):
    algorithm = algorithms.build(name, {})
    given, ours, theirs = numbers(algorithm.columns), streams(), streams()
    used = {key: ours[key] for key in algorithm.models}
    out = algorithm(Batch(used, COMPLETIONS, given, 7, 0, sum(LENGTHS)), {})
    hyper = algorithms.defaults(name)
    expected = by_hand(name, {key: theirs[key] for key in algorithm.models}, given, **hyper) / 7
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-12)
    out.loss.backward()
    expected.backward()
    torch.testing.assert_close(ours["policy"].grad, theirs["policy"].grad, rtol=1e-9, atol=1e-12)
    assert out.metrics["loss"] == out.loss.detach() and not out.state


def test_a_proposal_that_is_given_counts():
    algorithm = algorithms.build("brain", {"beta": 0.5})
    given, of = numbers(algorithm.columns), streams()
    before = algorithm(Batch(of, COMPLETIONS, given, 3, 0, sum(LENGTHS)), {}).loss
    given["proposal_logprobs"][4] = -9.0
    after = algorithm(Batch(of, COMPLETIONS, given, 3, 0, sum(LENGTHS)), {}).loss
    torch.testing.assert_close(after, by_hand("brain", of, given, beta=0.5) / 3, rtol=1e-9, atol=1e-12)
    assert abs(after.item() - before.item()) > 1e-3


def test_lists_with_nothing_to_rank_are_left_out_of_the_means():
    algorithm = algorithms.build("plackett_luce", {"beta": 1.0})
    of = {"policy": torch.zeros(sum(LENGTHS)), "reference": torch.zeros(sum(LENGTHS))}
    starts = COMPLETIONS.cu_seqlens.tolist()
    rewards = torch.zeros(len(LENGTHS), dtype=torch.float64)
    # of the first list the last is best, and has the score 2; the second list has one label, and the third's best
    # completion is worse off by 1
    rewards[6], rewards[2] = 1.0, 1.0
    of["policy"][starts[6]] = 2.0
    of["policy"][starts[2]] = -1.0
    out = algorithm(Batch(of, COMPLETIONS, {"rewards": rewards}, 3, 0, sum(LENGTHS)), {})
    found = algorithm.finish({name: float(value) for name, value in out.metrics.items()})
    assert found["reward_margin"] == pytest.approx((2 - 1) / 2)
    assert (found["reward_accuracy"], found["top1"]) == (pytest.approx(0.5), pytest.approx(0.5))
    flat = algorithm(Batch(of, COMPLETIONS, {"rewards": torch.zeros(9)}, 3, 0, sum(LENGTHS)), {})
    assert algorithm.finish({name: float(value) for name, value in flat.metrics.items()}).keys() == {"loss"}


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("exo", {"beta_r": 0.0}, r"beta_r must be in \(0, inf\) for exo, got 0"),
        ("lipo_pair", {"loss": "mse"}, "loss must be one of logistic, hinge for lipo_pair, got mse"),
    ],
)
def test_hyper_parameters_are_checked(name, hyper, message):
    with pytest.raises(ValueError, match=message):
        algorithms.build(name, hyper)
