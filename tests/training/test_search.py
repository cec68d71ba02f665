"""Tree search: the trees, the pairs that are made of them, and the turns of a run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastpo import algorithms
from fastpo.algorithms import Batch, Draft, Group, Sample, Search, Turn
from fastpo.training.batches import step_layout
from fastpo.training.data import Example, Prompt
from fastpo.training.errors import UserError
from fastpo.training.model import Policy
from fastpo.training.rollouts import Rollout, Sampling, TransformersEngine
from fastpo.training.tree import grow
from fastpo.training.turns import Plan, Turns

from .conftest import tiny_model

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")


class Scripted:
    """Writes 1 with probability 0.8 and 2 with 0.2: both where several are asked for, else only ones."""

    def update(self, policy):
        pass

    def generate(self, prompts, n, sampling, keys=None):
        def segment(place):
            ids = [place % 2 + 1] * sampling.max_new_tokens
            return Rollout(ids, torch.tensor([0.8, 0.2])[[i - 1 for i in ids]].log(), False)

        return [[segment(place) for place in range(n)] for _ in prompts]


def grown(times, exploration, width=4):
    def score(complete):
        return [float(rollout.ids[0] == 2) for _, rollout in complete]

    how = Search(width, 1, exploration)
    (tree,) = grow(Scripted(), [[7]], [0], Sampling(2), score, times, how)
    return tree


def test_a_tree_by_hand():
    tree = grown(1, 1.0)
    one, two = tree.root.children
    # four segments were drawn, two distinct ones
    assert [one.segment.ids, two.segment.ids] == [[1], [2]]
    assert (one.visits, one.value, two.visits, two.value, tree.root.visits) == (1, 0.0, 1, 1.0, 2)
    assert (one.prior, two.prior) == pytest.approx((0.8, 0.2))
    assert [rollout.ids for rollout, _ in tree.complete] == [[1, 1], [2, 1]]
    # 0 + 0.8 √2 / 2 against 1 + 0.2 √2 / 2
    assert [one.bound(1.0), two.bound(1.0)] == pytest.approx([0.4 * math.sqrt(2), 1 + 0.1 * math.sqrt(2)])

    one, two = grown(2, 1.0).root.children
    assert not one.children and [child.whole.ids for child in two.children] == [[2, 1], [2, 2]]
    assert (one.visits, two.visits, two.value) == (1, 3, 1.0) and all(child.closed for child in two.children)
    # with a weight of 4 the prior decides: 3.2 √2 / 2 against 1 + 0.8 √2 / 2
    one, two = grown(2, 4.0).root.children
    assert (one.visits, one.value, two.visits) == (3, 0.0, 1)

    # the third time, the likelier of two closed leaves of one value is found, and counted once more
    tree = grown(3, 1.0)
    one, two = tree.root.children
    assert (tree.root.visits, one.visits, two.visits, [child.visits for child in two.children]) == (5, 1, 4, [2, 1])
    assert len(tree.complete) == 4


PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5], [8, 9, 7, 9]]
STOP = 0


def trees(which=(0, 1, 2, 3, 4), seed=0, tokens=64):
    model = tiny_model(12)

    def score(complete):
        return [sum(rollout.ids) / 40 + which[i] / 10 for i, rollout in complete]

    sampling = Sampling(5, stop=(STOP,), seed=seed)
    engine = TransformersEngine(lambda function: function(model), tokens=tokens)
    return grow(engine, [PROMPTS[i] for i in which], [10 * i for i in which], sampling, score, 6, Search(3, 2, 0.5))


def described(tree):
    return [(node.whole.ids, node.visits, node.value, node.prior, node.closed) for node in tree.nodes()]


def test_a_tree_depends_on_its_prompt_and_the_seed_alone():
    together = [described(tree) for tree in trees()]
    alone = [described(tree) for i in range(len(PROMPTS)) for tree in trees([i], tokens=10_000)]
    for ours, theirs in zip(together, alone, strict=True):
        assert [each[:2] for each in ours] == [each[:2] for each in theirs]
        assert [each[2:] for each in ours] == [pytest.approx(each[2:], rel=1e-4) for each in theirs]
    assert [described(tree) for tree in trees(seed=1)] != together


def test_no_draw_is_made_twice():
    """Numbers of draws are of a seed, a key and a place: those of different segments must differ."""
    seen = []

    class Noting(Scripted):
        def generate(self, prompts, n, sampling, keys=None):
            seen.extend((sampling.seed, key, place) for key in keys for place in range(n))
            return super().generate(prompts, n, sampling, keys)

    prompts, keys = [[7], [7], [8]], [4, 5, 6]
    grow(Noting(), prompts, keys, Sampling(4), lambda found: [float(i) for i, _ in found], 5, Search(3, 1, 1.0))
    assert len(seen) == len(set(seen)) > 40


def test_the_books_of_a_tree_balance():
    model = tiny_model(12)
    for prompt, tree in zip(PROMPTS, trees(), strict=True):
        nodes = tree.nodes()
        assert tree.root.visits == sum(child.visits for child in tree.root.children)
        assert {len(node.whole.ids) for node in nodes} <= {1, 2, 3, 4, 5} and any(node.closed for node in nodes)
        for node in nodes:
            whole = node.whole
            through = [reward for rollout, reward in tree.complete if rollout.ids[: len(whole.ids)] == whole.ids]
            assert node.closed == (whole.ids[-1] == STOP or len(whole.ids) == 5)
            if node.children:
                assert not node.closed and node.visits == 1 + sum(child.visits for child in node.children)
                assert sum(child.prior for child in node.children) == pytest.approx(1)
                assert len({tuple(child.segment.ids) for child in node.children}) == len(node.children)
            if not any(below.closed for below in [node, *node.below()]):
                # no leaf below was counted again; another node's completion may pass here by chance
                assert node.visits <= len(through)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *whole.ids]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(whole.ids)[:, None])[:, 0]
            torch.testing.assert_close(whole.logprobs, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_search():
    more = ([[1]], [0], Sampling(2), lambda complete: [], 1, Search(2, 1, 1.0))
    synced = TransformersEngine(lambda function: function(None), tokens=8, largest=max)
    with pytest.raises(UserError, match="cannot share the policy's weights"):
        grow(synced, *more)
    with pytest.raises(UserError, match=r"--rollout\.stop"):
        grow(Scripted(), [[1]], [0], Sampling(2, stop_strings=("x",)), *more[3:])


def group(segments, seed=0):
    """Of (tokens before, value, visits)."""
    samples = [Sample("", "", [5, *before], [i], False, {}) for i, (before, _, _) in enumerate(segments)]
    values, visits = [v for _, v, _ in segments], [n for _, _, n in segments]
    nothing = SimpleNamespace()
    return Group(samples, values, nothing, [0.0] * len(samples), nothing, visits=visits)


def test_pairs_are_the_most_visited_and_the_worst_of_one_place():
    given = group(
        [
            ([], 0.5, 4),
            ([], 0.1, 2),
            ([1], 1.0, 1),
            ([1], 1.0, 3),  # equal values make no pair
            ([], 0.9, 4),  # as visited as the first, and better
            ([2, 3], 0.0, 1),  # alone
            ([4], 0.2, 5),
            ([4], 0.4, 1),  # better, but less visited than the worst, which is the most visited one
            ([6], 0.2, 1),
            ([6], 0.4, 3),
        ]
    )
    assert algorithms.build("online_mcts_dpo", {}).drafts(given) == [
        Draft((4, 1), (4.0, 2.0)),
        Draft((9, 8), (3.0, 1.0)),
    ]
    assert algorithms.build("itool", {}).drafts(given) == [Draft((4, 1)), Draft((9, 8))]


def test_the_hardest_prompts_are_kept():
    examples = [Example([1], ([1, 2], [3]), ()), Example([1], ([1], [2]), ()), Example([2], ([1], [2, 3]), ())]
    # of the chosen segments, then of the rejected ones
    reference = torch.tensor([-1.0, -3.0, -0.5, -1.8, -9.0, -9.0, -9.0, -9.0])
    layout = step_layout(examples, torch.device("cpu"))
    batch = Batch(
        streams={"reference": reference},
        completions=layout,
        numbers={},
        num_items=3,
        seed=0,
        num_tokens=8,
        max_length=2,
    )
    turn = Turn(batch, torch.tensor([0, 0, 1]), ["a", "b"], torch.zeros(6, dtype=torch.bool))
    found = algorithms.build("itool", {}).prepare(turn, {})
    # 4.5 / 3 nats a token against 1.8
    assert found.keep.tolist() == [False, False, True]
    assert found.metrics["perplexity"] == pytest.approx(math.exp(6.3 / 4))
    assert algorithms.build("itool", {"hardest": 1.0}).prepare(turn, {}).keep.all()
    assert algorithms.build("online_mcts_dpo", {}).prepare(turn, {}).keep is None


@pytest.mark.parametrize("name, value", [("width", 0), ("hardest", 0.0), ("exploration", -1.0), ("beta", 0.0)])
def test_hyper_parameters_have_domains(name, value):
    with pytest.raises(ValueError, match=f"{name} must be in .* for itool, got {value:g}"):
        algorithms.build("itool", {name: value})


def test_a_turn_learns_segments_behind_what_stands_before_them():
    accelerator = accelerate.Accelerator(cpu=True)
    model = tiny_model(12)
    policy = Policy(model)

    def taught():
        return Turns(
            accelerator,
            algorithms.build("online_mcts_dpo", {"segment": 2, "width": 3}),
            [Prompt(f"p{i}", ids, (), {}, i + 1) for i, ids in enumerate(PROMPTS)],
            TransformersEngine(policy.inside, tokens=64),
            Sampling(5, stop=(STOP,)),
            Plan(size=4, minibatches=2, epochs=1, rounds=1, tokens=256, seed=3),
            decode=lambda ids: " ".join(map(str, ids)),
            scorer=lambda samples: [sum(map(int, sample.completion.split())) / 40 for sample in samples],
        )

    turns = taught()
    metrics = turns(SimpleNamespace(policy=policy), 0)
    assert metrics["examples"] == len(turns.examples) > 4
    prefixes = set()
    for i, example in enumerate(turns.examples):
        prompt = PROMPTS[example.row - 1]
        assert example.prompt[: len(prompt)] == prompt
        prefixes.add(len(example.prompt) - len(prompt))
        assert example.completions[0] != example.completions[1] and min(example.numbers) >= 1
        for k, ids in enumerate(example.completions):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*example.prompt, *ids]])).logits[
                    0, len(example.prompt) - 1 : -1
                ]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            for stream in ("reference", "rollout"):
                torch.testing.assert_close(turns.constants[stream][i][k], expected, rtol=1e-4, atol=1e-5)
    assert prefixes == {0, 2, 4}

    # ranks that share the prompts make the same
    numbered = list(enumerate(turns.prompts[:4]))
    whole, parts = taught(), taught()
    made, seen = whole._round(numbered, 0)
    halves = [parts._round(numbered[rank::2], 0) for rank in (0, 1)]
    together = sorted((each for half, _ in halves for each in half), key=lambda each: each.group)
    assert [each.example for each in together] == [each.example for each in made]
    assert sorted(reward.group for _, half in halves for reward in half) == [reward.group for reward in seen]
