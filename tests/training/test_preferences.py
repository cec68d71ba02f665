"""Methods on preferences among samples: what they make of them, their losses, the models they follow."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from fastpo import algorithms, losses
from fastpo.algorithms import Batch, Completions, Draft, Draw, Group, Sample, Turn
from fastpo.algorithms.preferences import METHODS
from fastpo.cli import main
from fastpo.training.batches import collate
from fastpo.training.data import Encoder, Example, Prompt, load_prompts
from fastpo.training.errors import UserError
from fastpo.training.model import Policy, load_tokenizer, policy_inputs
from fastpo.training.rollouts import Sampling, TransformersEngine
from fastpo.training.turns import Plan, Turns

from .conftest import tiny_model
from .test_run import assert_same_run

pytest.importorskip("accelerate")


def group(count=0, *, wins=None, rewards=(), logprobs=(), texts=None, row=None, seed=0, stage=0) -> Group:
    """Samples of one prompt; `wins` is a matrix, or probabilities of Bradley and Terry's model on the rewards."""
    texts = texts or [str(i) for i in range(count)]
    samples = [Sample("p", text, [0], [ord(c) for c in text], True, row or {}) for text in texts]

    def won(i: int, j: int) -> float:
        if wins is not None:
            return wins[i][j]
        return float(torch.tensor(rewards[i] - rewards[j], dtype=torch.float64).sigmoid())

    return Group(samples, rewards, won, logprobs, torch.Generator().manual_seed(seed), stage)


def drafts(name: str, given: Group, **hyper) -> list[Draft]:
    return algorithms.build(name, hyper).drafts(given)


def test_every_completion_is_in_one_pair_and_the_likelier_winner_is_chosen():
    found = drafts("online_dpo", group(7, rewards=[3.0, -1.0, 0.5, 2.0, 1.0, 1.0, 9.0]), samples=7)
    # of a tie the first is chosen, and of an odd number one is in no pair
    assert found == [Draft((0, 1)), Draft((3, 2)), Draft((4, 5))]


def test_drawn_labels_follow_the_probabilities():
    matrix = [[0.5, 0.8], [0.2, 0.5]]
    found = Counter(
        drafts("online_dpo", group(2, wins=matrix, seed=seed), label="drawn")[0].completions for seed in range(2000)
    )
    # four standard deviations of 2,000 draws
    assert abs(found[0, 1] / 2000 - 0.8) < 4 * (0.8 * 0.2 / 2000) ** 0.5


def test_soft_labels_are_of_the_pair_as_it_stands():
    matrix = [[0.5, 0.3, 0.9, 0.4], [0.7, 0.5, 0.6, 0.0], [0.1, 0.4, 0.5, 1.0], [0.6, 1.0, 0.0, 0.5]]
    for name in ("online_ipo", "ipo_md"):
        assert drafts(name, group(4, wins=matrix), samples=4) == [Draft((1, 0), (0.7,)), Draft((2, 3), (1.0,))]


def test_a_game_against_the_opponent_and_against_oneself():
    matrix = [[(1 + i * 4 + j) / 20 for j in range(4)] for i in range(4)]
    for name in ("nash_md", "nash_ema"):
        assert drafts(name, group(4, wins=matrix), samples=2) == [Draft((0,), (3 / 20,)), Draft((1,), (8 / 20,))]
    expected = [Draft((0,), (2 / 20,)), Draft((1,), (5 / 20,))]
    # of an odd number one has no opponent
    assert drafts("nash_mp", group(3, wins=matrix), samples=3) == expected


def test_who_is_sampled():
    draws = {name: algorithms.build(name, {}).draws for name in METHODS}
    others = {"nash_md": "mixture", "nash_ema": "average", "xpo": "reference", "sharpening_xpo": "reference"}
    alone = {"ipo_md": "mixture", "rso": "reference", "sharpening_sft": "reference"}
    for name, found in draws.items():
        times = algorithms.build(name, {}).hyper["samples"]
        first = Draw(alone.get(name, "policy"), times)
        assert found == ((first, Draw(others[name], times)) if name in others else (first,))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs == "judge"])
def test_the_judge_is_asked_about_every_pair_that_is_needed_and_no_other(name):
    algorithm = algorithms.build(name, {})
    count = sum(draw.times for draw in algorithm.draws) + algorithm.demonstrations
    asked, used = {frozenset(pair) for pair in algorithm.compared(count)}, set()
    assert len(asked) == len(algorithm.compared(count))

    def won(i: int, j: int) -> float:
        used.add(frozenset((i, j)))
        return 0.5

    algorithm.drafts(group(count)._replace(wins=won))
    assert {pair for pair in used if len(pair) == 2} == asked


def test_xpo_knows_which_side_is_the_references():
    matrix = [[0.5, 0.5, 0.9, 0.5], [0.5, 0.5, 0.5, 0.1], [0.1, 0.5, 0.5, 0.5], [0.5, 0.9, 0.5, 0.5]]
    assert drafts("xpo", group(4, wins=matrix), samples=2) == [Draft((0, 2), (0.0,)), Draft((3, 1), (1.0,))]
    # of a tie the policy's is chosen
    assert drafts("xpo", group(2, wins=[[0.5, 0.5], [0.5, 0.5]])) == [Draft((0, 1), (0.0,))]


def test_self_play_prefers_the_demonstration():
    assert drafts("spin", group(3), samples=2) == [Draft((2, 0)), Draft((2, 1))]


# the win rates of its rows are 0.6, 0.3 and 0.6; against the first two columns 0.45, 0.35 and 0.75
MATRIX = [[0.5, 0.4, 0.9], [0.6, 0.1, 0.2], [0.9, 0.6, 0.3]]


def test_win_rates_choose_and_rate_the_pair():
    given = group(3, wins=MATRIX)
    ((pair, rates, _),) = drafts("sppo", given, samples=3)
    assert pair == (0, 1) and rates == pytest.approx((0.6, 0.3), abs=1e-15)
    for name in ("sppo_hard", "inpo"):
        assert drafts(name, given, samples=3) == [Draft((0, 1))]
    for seed in range(10):
        ((pair, rates, _),) = drafts("dno", group(3, wins=MATRIX, seed=seed), samples=3)
        assert rates == pytest.approx([(0.6, 0.3, 0.6)[i] for i in pair], abs=1e-15) and rates[0] >= rates[1]


def test_what_is_tied_has_no_hard_label():
    even = group(3, wins=[[0.5] * 3] * 3)
    assert drafts("sppo", even, samples=3) == [Draft((0, 2), (0.5, 0.5))]
    assert drafts("sppo_hard", even, samples=3) == drafts("inpo", even, samples=3) == []


def test_large_margins_are_kept_and_the_demonstration_takes_part():
    found = drafts("dno_prct", group(3, wins=MATRIX), samples=2, margin=0.2)
    assert found == [Draft((2, 0)), Draft((2, 1))]
    assert drafts("dno_prct", group(3, wins=MATRIX), samples=2, margin=0.5) == []


def test_pairs_with_their_rewards():
    scores = [0.25, 2.0, -1.0, 0.5]
    for name in ("p3o", "copg"):
        found = drafts(name, group(4, rewards=scores), samples=4)
        assert len(found) == 2
        assert all(numbers == tuple(scores[i] for i in pair) and numbers[0] > numbers[1] for pair, numbers, _ in found)


def test_rejection_sampling_of_what_is_distinct():
    given = group(rewards=[0.0, 1.0, 5.0, 2.0], texts=["a", "b", "a", "c"])
    best = {"samples": 4, "accepted": 2, "sampler_beta": 0.0}
    # both a are one, with the reward of the last
    assert drafts("rso", given, **best) == [Draft((2, 3))]
    assert drafts(
        "rso", group(rewards=[4.0, 1.0, 5.0, 2.0], texts=["a", "b", "a", "c"]), **best, duplicates="keep"
    ) == [Draft((2, 0))]
    assert len(drafts("rso", given, **{**best, "accepted": 4}, ranking="tournament")) == 2
    assert drafts("rso", group(rewards=[1.0, 1.0], texts=["a", "a"]), samples=2) == []


def test_the_most_probable_sample_is_learnt():
    assert drafts("sharpening_sft", group(3, logprobs=[-3.0, -1.0, -1.0])) == [Draft((1,))]
    assert drafts("sharpening_xpo", group(4), samples=2) == [Draft((0, 2)), Draft((1, 3))]


def test_the_pair_of_the_data_and_samples_for_the_kl():
    assert drafts("hypo", group(5), samples=3) == [Draft((3, 4, 0, 1, 2))]


def test_a_mixed_run_takes_easy_pairs_first_and_then_the_prompts_of_hard_ones():
    hyper = {"samples": 2, "threshold": 1.0}
    easy, hard = [0.1, 0.2, 3.0, 1.0], [0.1, 0.2, 2.0, 1.0]
    assert drafts("mpo", group(4, rewards=easy), **hyper) == [Draft((2, 3), (2.0,))]
    assert drafts("mpo", group(4, rewards=hard), **hyper) == []
    assert drafts("mpo", group(4, rewards=easy, stage=1), **hyper) == []
    assert drafts("mpo", group(4, rewards=hard, stage=1), **hyper) == [Draft((0,), (0.1,)), Draft((1,), (0.2,))]
    # what the data say counts more
    assert drafts("mpo", group(4, rewards=hard, row={"margin": -1.5}), **hyper) == [Draft((2, 3), (-1.5,))]


# per example, the lengths of its completions
LENGTHS = [(3, 1, 2, 4), (1, 1, 5, 1), (2, 6, 1, 3), (4, 2, 2, 2)]


def streams_of(parts: int, *models: str) -> dict[str, list[list[torch.Tensor]]]:
    """Log-probs of the completions of some examples under some models, the policy's with gradients."""
    generator = torch.Generator().manual_seed(0)
    return {
        model: [
            [
                (-torch.rand(n, dtype=torch.float64, generator=generator)).requires_grad_(model == "policy")
                for n in lengths[:parts]
            ]
            for lengths in LENGTHS
        ]
        for model in models
    }


def batch_of(streams, numbers, members=(0, 1, 2, 3)) -> Batch:
    """Some of the examples as one forward has them."""
    parts = range(len(streams["policy"][0]))
    packed = {model: torch.cat([of[i][k] for k in parts for i in members]) for model, of in streams.items()}
    lengths = [LENGTHS[i][k] for k in parts for i in members]
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    some = {name: values[list(members)] for name, values in numbers.items()}
    tokens = sum(sum(each[: len(parts)]) for each in LENGTHS)
    return Batch(
        packed,
        Completions(tuple(lengths), ends, (len(parts),) * len(members)),
        some,
        len(LENGTHS),
        0,
        tokens,
    )


INPUTS = {
    "chosen_win_rate": [0.9, 0.5, 0.7, 0.6],
    "rejected_win_rate": [0.1, 0.5, 0.2, 0.4],
    "win_probability": [0.9, 0.5, 1.0, 0.6],
    "chosen_is_reference": [0.0, 1.0, 1.0, 0.0],
    "chosen_reward": [1.0, 0.5, 0.0, 2.0],
    "rejected_reward": [0.0, 0.5, -1.0, 1.0],
}
NUMBERS = {name: torch.tensor(values, dtype=torch.float64) for name, values in INPUTS.items()}
ROWS = {"rso": "rso_sigmoid"}


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"hypo", "sharpening_sft"}))
def test_the_loss_is_that_of_the_row(name):
    """With the models in their order, on sums that are made here."""
    algorithm = algorithms.build(name, {})
    parts = 1 if algorithm.learner.row.kind == "policy" else 2
    streams = streams_of(parts, "policy", "reference", "previous")
    given = batch_of(streams, {column.name: NUMBERS[column.name] for column in algorithm.columns})
    found = algorithm(given, {})
    sides = [torch.stack([of[k].sum() for of in streams[model]]) for model in algorithm.models for k in range(parts)]
    inputs = {c.name: NUMBERS[c.name] > 0.5 if c.boolean else NUMBERS[c.name] for c in algorithm.columns}
    row = ROWS.get(name, name)
    own = {key: value for key, value in algorithm.hyper.items() if key in ("beta", "alpha", "eta", "epsilon")}
    expected = getattr(losses, row)(*sides, **inputs, **own)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    leaves = [each for of in streams["policy"] for each in of]
    ours, theirs = (torch.autograd.grad(loss, leaves) for loss in (found.loss, expected.loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_policy_at_the_beginning_of_a_turn_of_one_step_is_the_policy():
    for name in ("sppo", "inpo", "p3o"):
        algorithm = algorithms.build(name, {})
        asked = {model for model, whose in algorithm.anchors(2).items() if whose == "turn"}
        assert asked == algorithm.anchors(2).keys() - algorithm.anchors(1).keys() and asked
        streams = streams_of(2, "policy", "reference", "previous")
        numbers = {column.name: NUMBERS[column.name] for column in algorithm.columns}
        without = {model: of for model, of in streams.items() if model not in asked}
        streams |= {model: [[t.detach() for t in of] for of in streams["policy"]] for model in asked}
        one, other = (algorithm(batch_of(each, numbers), {}).loss for each in (streams, without))
        leaves = [each for of in streams["policy"] for each in of]
        assert torch.equal(one, other)
        assert all(map(torch.equal, torch.autograd.grad(one, leaves), torch.autograd.grad(other, leaves)))


def hypo_by_hand(streams, beta: float, lambda_: float) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for policy, reference in zip(streams["policy"], streams["reference"], strict=True):
        a, b, *ratios = [(p - r).sum() for p, r in zip(policy, reference, strict=True)]
        total = total - torch.nn.functional.logsigmoid(beta * (a - b))
        for j, ratio in enumerate(ratios):
            baseline = sum(other for i, other in enumerate(ratios) if i != j) / (len(ratios) - 1)
            total = total + lambda_ * (ratio - baseline).detach() * policy[2 + j].sum() / len(ratios)
    return total / len(LENGTHS)


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 3], [1, 2]], [[2], [3, 0, 1]]])
def test_hypo_in_any_division(parts):
    """The leave-one-out KL of samples that stand behind the pair, from the formula."""
    streams = streams_of(4, "policy", "reference")
    algorithm = algorithms.build("hypo", {"beta": 0.7, "lambda_": 0.3})
    outputs = [algorithm(batch_of(streams, {}, members), {}) for members in parts]
    expected = hypo_by_hand(streams, 0.7, 0.3)
    torch.testing.assert_close(sum(out.loss for out in outputs), expected, rtol=1e-12, atol=0)
    leaves = [each for of in streams["policy"] for each in of]
    ours = torch.autograd.grad(sum(out.loss for out in outputs), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, leaves), rtol=1e-10, atol=1e-12)
    kl = sum((p - r).sum() for i in range(4) for p, r in zip(*(streams[m][i][2:] for m in streams), strict=True)) / 8
    assert sum(float(out.metrics["kl"]) for out in outputs) == pytest.approx(float(kl.detach()), rel=1e-12)


def test_sharpening_raises_the_sum_of_log_probs():
    streams = streams_of(1, "policy")
    out = algorithms.build("sharpening_sft", {})(batch_of(streams, {}), {})
    leaves = [of[0] for of in streams["policy"]]
    assert float(out.loss.detach()) == pytest.approx(
        -float(sum(t.detach().sum() for t in leaves)) / len(LENGTHS), rel=1e-12
    )
    assert all((slope == -1 / len(LENGTHS)).all() for slope in torch.autograd.grad(out.loss, leaves))


def test_the_stages_of_a_mixed_run_have_their_own_losses():
    algorithm = algorithms.build("mpo", {"dpo_beta": 0.5})
    streams = streams_of(2, "policy", "reference", "policy_value")
    values = [each.requires_grad_() for of in streams["policy_value"] for each in of]
    given = batch_of(streams, {"reward": torch.ones(4, dtype=torch.float64)})
    turn = Turn(given, torch.arange(4), ["p"] * 4, torch.ones(8, dtype=torch.bool))
    assert algorithm.prepare(turn, {}).streams == {}
    sides = [torch.stack([of[k].sum() for of in streams[model]]) for model in ("policy", "reference") for k in (0, 1)]
    out = algorithm(given, {})
    assert float(out.loss) == pytest.approx(float(losses.dpo(*sides, beta=0.5).loss), rel=1e-12)
    assert all((slope == 0).all() for slope in torch.autograd.grad(out.loss, values))
    assert algorithm.anchors(1)["reference"] == "stage"

    single = streams_of(1, "policy", "reference", "policy_value", "old", "old_value")
    given = batch_of(single, {"reward": torch.ones(4, dtype=torch.float64)})
    streams = algorithm.prepare(Turn(given, torch.arange(4), ["p"] * 4, torch.ones(4, dtype=torch.bool)), {}).streams
    assert streams.keys() == {"advantages", "returns"}
    assert "clip_fraction_high" in algorithm(given._replace(streams={**given.streams, **streams}), {}).metrics


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("inpo", {"beta": 0.1, "eta": 0.05}, "beta must be at most eta"),
        ("online_dpo", {"samples": 1}, r"samples must be in \[2, inf\) for online_dpo"),
        ("nash_ema", {"decay": 1.5}, "decay must be in"),
        ("rso", {"loss": "dpo"}, "loss must be one of rso_sigmoid, hinge, rso_hinge for rso"),
        ("mpo", {"first_stage": -0.5}, "first_stage must be in"),
    ],
)
def test_hyper_parameters_outside_their_domains(name, hyper, message):
    with pytest.raises(ValueError, match=message):
        algorithms.build(name, hyper)


def test_rso_without_a_reference_asks_no_model():
    assert algorithms.build("rso", {"loss": "rso_hinge"}).anchors(2) == {}
    assert algorithms.build("rso", {"loss": "hinge"}).anchors(2) == {"reference": "start"}


class Moves:
    """In place of the moving average: when it takes how much."""

    def __init__(self, model=None) -> None:
        self.model, self.seen = model, []

    def move(self, policy, share: float) -> None:
        self.seen.append((policy, share))


def turns_of(name: str, average, engine=None, **hyper) -> Turns:
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    plan = Plan(size=1, minibatches=2, epochs=1, rounds=1, tokens=64, seed=0)
    algorithm = algorithms.build(name, hyper)
    sampling = Sampling(max_new_tokens=4)
    return Turns(accelerator, algorithm, [], engine, sampling, plan, decode=str, average=average)


@pytest.mark.parametrize(
    ("name", "hyper", "expected"),
    [
        ("nash_ema", {"decay": 0.75}, {done: 0.25 for done in range(1, 8)}),
        ("nash_mp", {"decay": 0.0}, {done: 1.0 for done in range(1, 8)}),
        ("mpo", {"first_stage": 0.5}, {4: 1.0}),
        # stages begin where turns do
        ("mpo", {"first_stage": 0.3}, {4: 1.0}),
        ("mpo", {"first_stage": 1.0}, {}),
    ],
)
def test_when_the_moving_average_takes_how_much(name, hyper, expected):
    average = Moves()
    turns = turns_of(name, average, **hyper)
    found = {}
    for done in range(8):
        turns.turn = done // 2  # what is sampled does not matter here
        turns(SimpleNamespace(policy=done, steps=8), done)
        found |= {policy: share for policy, share in average.seen}
    assert found == expected


def test_opponents_are_of_the_average():
    policy, average = tiny_model(11), Policy(tiny_model(11, seed=5))
    turns = turns_of("nash_ema", Moves(average), TransformersEngine(lambda function: function(policy), tokens=1000))
    prompts = [(n, Prompt("", ids, (), {}, n)) for n, ids in enumerate([[1, 2, 3], [4]])]
    for (_, prompt), found in zip(prompts, turns.sampled(prompts, turns.sampling, "average", 3), strict=True):
        for rollout in found:
            with torch.no_grad():
                batch = collate([Example(prompt.ids, (rollout.ids,))], torch.device("cpu"))
                torch.testing.assert_close(rollout.logprobs, average(*policy_inputs(batch)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["nash_ema", "mpo"])
def test_resuming_restores_the_average_within_a_turn(name, trained, tmp_path, monkeypatch):
    """Three turns of two steps, and the same with a stop in the middle of the second."""
    from fastpo.training import loop

    hyper = {"nash_ema": ("--algorithm.decay", "0.5"), "mpo": ("--algorithm.first_stage", "0.3")}[name]
    more = (*hyper, "--batch.size", "8", "--rollout.minibatches", "2", "--checkpoint_every", "3")
    more = (*more, "--steps", "6")
    trained(name, *more)
    steps = []

    def three_steps(job, step, real=loop.optimizer_step):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(step)
        return real(job, step)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "optimizer_step", three_steps)
        with pytest.raises(AssertionError):
            trained(name, *more, output="stopped")
    assert main(["train", name, "--resume", str(tmp_path / "stopped")]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


@pytest.mark.parametrize(("kind", "count"), [("demonstrations", 0), ("demonstrations", 1), ("pairwise", 2)])
def test_prompts_come_with_the_completions_that_are_asked_for(kind, count, model_folder, write):
    row = {"prompt": "ab ", "completion": "cd", "chosen": "e", "rejected": "fgh", "margin": 0.5}
    encoder = Encoder(load_tokenizer(str(model_folder)), "model", 32, kind)
    (found,) = load_prompts(write([row]), encoder, room=8, demonstrations=count)
    names = ((), ("completion",), ("chosen", "rejected"))[count]
    ends = [encoder.tokenizer(row[name], add_special_tokens=False)["input_ids"] + [encoder.eos] for name in names]
    assert list(found.completions) == ends and found.row["margin"] == 0.5
    if count:
        with pytest.raises(UserError, match=f'row 1: there is no "{names[-1]}"'):
            load_prompts(write([{**row, names[-1]: None}]), encoder, room=8, demonstrations=count)
