"""What an algorithm hands to its loss."""

from __future__ import annotations

import pytest
import torch

from fastpo import algorithms, losses
from fastpo.algorithms import Batch, Completions

LENGTHS = (2, 3, 1, 4, 2, 3)
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
CHOSEN = sum(LENGTHS[:3])
# how many belong to one example is nothing to those who know it
COMPLETIONS = Completions(LENGTHS, ENDS, (2, 2, 2))


def batch(streams: tuple[str, ...], numbers: dict[str, torch.Tensor]) -> Batch:
    """Six completions: three pairs, or six rows."""
    generator = torch.Generator().manual_seed(0)
    found = {name: -torch.rand(sum(LENGTHS), generator=generator) for name in ("policy", "reference", *streams)}
    return Batch(found, COMPLETIONS, numbers, 6, 0, sum(LENGTHS))


def pairs(given: Batch) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The sides of policy and reference, and their boundaries, by hand."""
    sides = [part for name in ("policy", "reference") for part in (given.streams[name][:6], given.streams[name][6:])]
    boundaries = {"chosen_cu_seqlens": ENDS[:4], "rejected_cu_seqlens": ENDS[3:] - CHOSEN}
    return sides, boundaries


@pytest.mark.parametrize(
    ("name", "stream", "argument"),
    [
        ("wpo", "policy_log_sum_p2", "log_sum_p2"),
        ("mallows_po", "reference_normalised_entropy", "entropy"),
        ("tdpo", "kl", "kl"),
    ],
)
def test_numbers_per_token_go_to_their_side(name, stream, argument):
    given = batch((stream,), {})
    if name == "mallows_po":
        given.streams[stream].abs_()
    sides, boundaries = pairs(given)
    inputs = {f"chosen_{argument}": given.streams[stream][:6], f"rejected_{argument}": given.streams[stream][6:]}
    expected = getattr(losses, name)(*sides, **inputs, **boundaries, num_items=6)
    found = algorithms.build(name, {})(given, {})
    assert torch.equal(found.loss, expected.loss)
    assert float(found.metrics["reward_margin"]) == pytest.approx(float(expected.margins.sum()) / 6)


@pytest.mark.parametrize(
    ("name", "columns", "hyper"),
    [
        ("odpo", ("chosen_score", "rejected_score"), {"offset": "log_ratio"}),
        ("mcts_dpo", ("chosen_visits", "rejected_visits"), {}),
    ],
)
def test_columns_go_to_their_argument(name, columns, hyper):
    numbers = {column: torch.tensor([5.0, 4.0, 9.0]) - 3 * n for n, column in enumerate(columns)}
    given = batch((), numbers)
    sides, boundaries = pairs(given)
    expected = getattr(losses, name)(*sides, **numbers, **boundaries, **hyper, num_items=6)
    assert torch.equal(algorithms.build(name, hyper)(given, {}).loss, expected.loss)


def test_a_sample_has_as_many_tokens_of_both_sides():
    algorithm = algorithms.build("sampo", {})
    drawn = algorithm.draw(COMPLETIONS, 3)["sample"]
    counts = [int(part.sum()) for part in drawn.split(list(LENGTHS))]
    assert counts == [2, 2, 1, 2, 2, 1]
    assert torch.equal(drawn, algorithm.draw(COMPLETIONS, 3)["sample"])
    assert any(not torch.equal(drawn, algorithm.draw(COMPLETIONS, s)["sample"]) for s in range(9))


def test_what_is_known_of_the_step():
    """KTO's z0 and BCO's shift against their definitions, with prompts that are not the completions'."""
    labels = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    given = batch((), {"label": labels})
    # the reference is less sure of everything, so that z0 is positive
    given.streams["reference"].sub_(0.5)
    sums = [torch.stack([p.sum() for p in given.streams[m].split(list(LENGTHS))]) for m in ("policy", "reference")]
    ratios = sums[0] - sums[1]
    z0 = ratios[3:].mean().clamp(min=0)
    assert z0 > 0
    x = 0.1 * (ratios[:3] - z0)
    loss = torch.where(labels > 0.5, torch.sigmoid(-x), torch.sigmoid(x)).sum() / 6
    found = algorithms.build("kto", {})(given, {})
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-5)
    right = torch.where(labels > 0.5, x > 0, x < 0)
    assert float(found.metrics["reward_accuracy"]) == pytest.approx(float(right.sum()) / 6)

    labels = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    given = given._replace(numbers={"label": labels, "density_ratio": torch.full((6,), 2.0, dtype=torch.float64)})
    rewards = 0.1 * ratios
    now = (rewards[labels > 0.5].mean() + rewards[labels < 0.5].mean()) / 2
    for state, delta in (({}, now), ({"delta": torch.tensor(0.3)}, 0.9 * 0.3 + 0.1 * now)):
        found = algorithms.build("bco", {})(given, state)
        y = rewards - delta
        each = torch.where(labels > 0.5, -torch.nn.functional.logsigmoid(y), -2 * torch.nn.functional.logsigmoid(-y))
        assert float(found.state["delta"]) == pytest.approx(float(delta), rel=1e-5)
        assert float(found.loss) == pytest.approx(float(each.mean()), rel=1e-5)


def test_the_mean_over_kept_pairs():
    """β-DPO's loss is the mean over the pairs that the step keeps."""
    given = batch((), {})
    found = algorithms.build("beta_dpo", {"kept": 0.4})(given, {})
    sides, boundaries = pairs(given)
    each = losses.dpo(*sides, **boundaries, beta=1.0).margins
    statistics = losses.beta_dpo_statistics(each, kept=0.4, generator=torch.Generator().manual_seed(0))
    assert int(statistics.keep.sum()) == 1
    expected = -torch.nn.functional.logsigmoid(statistics.batch_beta * each[statistics.keep]).mean()
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)
