"""Which examples go where."""

from __future__ import annotations

import random

import pytest
import torch

from fastpo.training.batches import check_budget, collate, places, plan, step_indices, step_layout
from fastpo.training.data import Example
from fastpo.training.errors import UserError


@pytest.mark.parametrize(("size", "count"), [(3, 10), (4, 8), (7, 3), (5, 1)])
def test_steps_walk_through_whole_epochs(size, count):
    walked = [i for step in range(4 * count) for i in step_indices(step, size, count, seed=1)]
    epochs = [walked[i : i + count] for i in range(0, len(walked) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count == 1 or len({tuple(epoch) for epoch in epochs}) > 1


def test_order_depends_on_the_seed():
    assert step_indices(5, 8, 100, seed=0) == step_indices(5, 8, 100, seed=0) != step_indices(5, 8, 100, seed=1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 12, 61])
def test_plan_gives_every_rank_as_many_forwards_within_the_budget(ranks, count):
    rng = random.Random(count)
    lengths = [rng.randint(1, 40) for _ in range(count)]
    shares = plan(lengths, 100, ranks)
    assert len(shares) == ranks and len({len(share) for share in shares}) == 1
    forwards = [forward for share in shares for forward in share]
    assert sorted(i for forward in forwards for i in forward) == list(range(count))
    assert all(sum(lengths[i] for i in forward) <= 100 for forward in forwards)
    assert all(forwards) or count % ranks


def test_collate_lays_out_first_all_chosen():
    examples = [Example([1, 2], ([3], [4, 5]), (0.5, 2.0)), Example([6], ([7, 8], [9]), (1.5, 3.0))]
    batch = collate(examples, torch.device("cpu"))
    assert batch.input_ids.tolist() == [1, 2, 3, 6, 7, 8, 1, 2, 4, 5, 6, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert batch.targets.tolist() == [3, 7, 8, 4, 5, 9]
    assert batch.predictors.tolist() == [1, 3, 4, 7, 8, 10]
    assert batch.completions.lengths == (1, 2, 2, 1)
    assert batch.completions.cu_seqlens.tolist() == [0, 1, 3, 5, 6]
    assert batch.completions.cu_seqlens.dtype == torch.int32
    assert batch.numbers.tolist() == [[0.5, 2.0], [1.5, 3.0]]


def test_places_find_the_tokens_of_some_examples_among_all():
    cpu = torch.device("cpu")
    examples = [
        Example([1], (list(range(10 * i, 10 * i + n)), [100 * i] * k)) for i, n, k in ((1, 2, 3), (2, 1, 1), (3, 4, 2))
    ]
    whole, everything = step_layout(examples, cpu), collate(examples, cpu).targets
    for members in ([0], [2, 0], [1, 2], [2, 1, 0]):
        chosen = [examples[i] for i in members]
        assert everything[places(whole, members)].tolist() == collate(chosen, cpu).targets.tolist()
        first = [e._replace(completions=e.completions[:1]) for e in chosen]
        assert everything[places(whole, members, 1)].tolist() == collate(first, cpu).targets.tolist()


def test_an_example_above_the_budget_is_named():
    examples = [Example([1], ([2], [3]), row=1), Example([1] * 5, ([2], [3]), row=2)]
    check_budget(examples, 12, "data")
    with pytest.raises(UserError, match=r"data, row 2: the example has 12 tokens, .* --batch.tokens 11"):
        check_budget(examples, 11, "data")


def ragged():
    """A pair, a list of three and a single completion, parts of which are not trained on."""
    return [
        Example([1], ([2, 3], [4]), each=((0.1,), (0.2,)), marks=(((1.0,), (2.0,)), ((3.0,),))),
        Example(
            [5, 6],
            ([7], [8, 9], [10]),
            each=((0.3,), (0.4,), (0.5,)),
            marks=(((4.0,),), ((5.0,), (6.0,)), ((7.0,),)),
            learnt=((True,), (False, True), (True,)),
        ),
        Example([11], ([12, 13, 14],), each=((0.6,),), marks=(((8.0,), (9.0,), (10.0,)),)),
    ]


def test_collate_lays_out_lists_of_different_lengths():
    batch = collate(ragged(), torch.device("cpu"))
    assert batch.targets.tolist() == [2, 3, 7, 12, 13, 14, 4, 9, 10]
    assert batch.input_ids[batch.predictors].tolist() == [1, 2, 6, 11, 12, 13, 1, 8, 6]
    assert batch.input_ids[batch.predictors + 1].tolist() == batch.targets.tolist()
    assert batch.completions.lengths == (2, 1, 3, 1, 1, 1)
    assert batch.completions.counts == (2, 3, 1)
    assert batch.completions.slots() == [[0, 3], [1, 4, 5], [2]]
    assert batch.each[:, 0].tolist() == [0.1, 0.3, 0.6, 0.2, 0.4, 0.5]
    assert batch.marks[:, 0].tolist() == [1, 2, 4, 8, 9, 10, 3, 6, 7]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0, 1, 2]


def test_places_in_lists_of_different_lengths():
    cpu, examples = torch.device("cpu"), ragged()
    whole, everything = step_layout(examples, cpu), collate(examples, cpu).targets
    for members in ([1], [2, 0], [0, 1], [2, 1, 0]):
        chosen = [examples[i] for i in members]
        assert everything[places(whole, members)].tolist() == collate(chosen, cpu).targets.tolist()
    # the last completion of each left out
    assert everything[places(whole, [1, 0], 1)].tolist() == [7, 2, 3, 9]
