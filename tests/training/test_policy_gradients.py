"""The policy gradients: what they make of a turn."""

from __future__ import annotations

import pytest
import torch

from fastpo import advantages, algorithms, rewards
from fastpo.algorithms import Batch, Completions, Group, Sample, Turn
from fastpo.cli import main
from fastpo.training import task

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")


def turn_of(lengths, scores, groups=None, *, ended=None, begun=None, several=None, version=0, longest=9, **streams):
    """A turn of completions with these rewards; what is not given is random."""
    generator = torch.Generator().manual_seed(len(lengths))
    count = sum(lengths)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    names = ("old", "reference", "rollout", "old_value")
    drawn = {name: torch.randn(count, generator=generator) - 1 for name in names}
    numbers = torch.tensor(scores, dtype=torch.float64)
    batch = Batch(
        {**drawn, **streams},
        Completions(tuple(lengths), torch.tensor(starts, dtype=torch.int32), (1,) * len(lengths)),
        {"reward": numbers},
        len(lengths),
        0,
        count,
        longest,
    )
    groups = torch.arange(len(lengths)) if groups is None else torch.tensor(groups)
    return Turn(
        batch,
        groups,
        [f"prompt {n}" for n in range(int(groups.max()) + 1)],
        torch.tensor(ended or [True] * len(lengths)),
        torch.tensor(begun or [0] * len(lengths)),
        {name: torch.tensor(of, dtype=torch.float64) for name, of in (several or {}).items()},
        version,
    )


def prepared(name, turn, state=None, **hyper):
    return algorithms.build(name, hyper).prepare(turn, state or {})


def near(ours, theirs):
    # fp32 sums of a few tokens
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


def test_rto_adds_the_bounded_ratio_of_the_other_model():
    turn = turn_of([2, 3], [1.0, 20.0])
    aux = turn.batch.streams["reference"] + torch.tensor([0.4, -0.2, 5.0, -7.0, 0.0])
    turn = turn._replace(batch=turn.batch._replace(streams={**turn.batch.streams, "aux": aux}))
    found = prepared("rto", turn, beta=0.1, lam=1.0)
    kl = turn.batch.streams["old"] - turn.batch.streams["reference"]
    tokens = torch.tensor([0.02, -0.01, 0.05, -0.05, 0.0]) - 0.1 * kl + torch.tensor([0, 1.0, 0, 0, 10.0])
    returns = torch.stack([tokens[:2].sum(), tokens[1], tokens[2:].sum(), tokens[3:].sum(), tokens[4]])
    near(found.streams["returns"], returns)
    near(found.streams["advantages"], advantages.whiten(returns - turn.batch.streams["old_value"]))
    assert algorithms.build("rto", {}).anchors(1) == {"old": "turn", "reference": "start", "aux": "aux"}


def test_hapo_remembers_the_shortest_right_answer_of_each_prompt():
    first = turn_of([4, 2, 3, 5], [1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1])
    found = prepared("hapo", first)
    # without a history only correctness counts
    near(found.streams["advantages"][:4], torch.full((4,), 0.5 / (0.5**0.5 + 1e-4)))
    assert found.metrics["known_prompts"] == 2 and found.metrics["length_reward"] == 0
    again = prepared("hapo", turn_of([2, 8, 3, 6], [1.0, 1.0, 1.0, 0.0], [0, 0, 1, 1]), found.state)
    # of histories 4 and 3: cos(π/4), the floor, cos(π/2), and min(0, cos π)
    shaped = torch.tensor([1 + 0.5**0.5, 1 - 0.7, 1.0, -1.0])
    near(again.metrics["length_reward"] * torch.ones(4), (shaped - torch.tensor([1.0, 1, 1, 0])).mean() * torch.ones(4))
    expected = advantages.grpo(shaped, torch.tensor([0, 0, 1, 1]), eps=1e-4)
    near(again.streams["advantages"], expected.repeat_interleave(torch.tensor([2, 8, 3, 6])))
    # the prompt's number in the turn is not what is remembered
    assert sorted(again.state["history"][:, 0].tolist()) == [2.0, 3.0]


def test_constraints_mix_normalised_advantages_and_move_their_multipliers():
    turn = turn_of([2, 3], [0.0, 0.0], several={"right": [1.0, 0.0], "near": [0.5, 0.25]})
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    turn = turn._replace(batch=turn.batch._replace(streams={**turn.batch.streams, "old_value": values}))
    hyper = {"thresholds": "0.9,0.1", "lam": 1.0, "multiplier_rate": 3.0}
    found = prepared("constrained_ppo", turn, **hyper)
    of = turn.batch.streams
    kl = of["reference"] - of["old"]
    owed = torch.stack([kl[:2].sum(), kl[1], kl[2:].sum(), kl[3:].sum(), kl[4]])
    returns = torch.stack([owed, torch.tensor([1.0, 1, 0, 0, 0]), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25])], 1)
    near(found.streams["returns"], returns)
    own, right, close = (advantages.whiten(a) for a in (returns - values).T)
    mu = [found.metrics[f"multiplier_{name}"] for name in ("right", "near")]
    near(found.streams["advantages"], (2 - sum(mu)) * own + mu[0] * right + mu[1] * close)
    # 0.4 of the tokens' rewards to go are 0.5 below the first threshold, and the second is passed
    again = prepared("constrained_ppo", turn, found.state, **hyper)
    assert again.metrics["multiplier_right"] > mu[0] and again.metrics["multiplier_near"] < mu[1]
    with pytest.raises(ValueError, match="thresholds must be 2 finite numbers"):
        prepared("constrained_ppo", turn, thresholds="1,2,3")
    algorithm = algorithms.build("constrained_ppo", {})
    assert algorithm.critic == "each" and algorithm.needs == "rewards"


def group_of(scores):
    samples = [Sample("p", str(i), [0], [i], True, {}) for i in range(len(scores))]
    return Group(samples, scores, lambda i, j: 0.5, [0.0] * len(scores), torch.Generator())


def test_inf_align_counts_the_references_worse_answers():
    algorithm = algorithms.build("inf_align", {"samples": 2, "references": 4})
    assert [(draw.source, draw.times) for draw in algorithm.draws] == [("policy", 2), ("reference", 4)]
    given = group_of([0.5, 2.0, 0.0, 0.5, 1.0, 0.5])
    # one worse and two equal, and all worse
    assert [draft.numbers for draft in algorithm.drafts(given)] == [(0.5,), (1.0,)]
    assert [draft.completions for draft in algorithm.drafts(given)] == [(0,), (1,)]
    best = algorithms.build("inf_align", {"samples": 2, "references": 4, "target": "best_of_n", "t": 2.0})
    assert [d.numbers[0] for d in best.drafts(given)] == pytest.approx([torch.e, torch.e**2])


def test_maxmin_follows_the_reward_whose_mean_is_least():
    several = {"one": [3.0, 0.0, 1.0], "other": [0.0, 1.0, 0.5]}
    turn = turn_of([1, 2, 2], [9.0, 9.0, 9.0], several=several)
    found = prepared("maxmin_ppo", turn)
    assert found.metrics["reward_one"] == pytest.approx(4 / 3) and found.metrics["reward_other"] == 0.5
    alone = prepared("ppo", turn._replace(batch=turn.batch._replace(numbers={"reward": turn.rewards["other"]})))
    assert torch.equal(found.streams["advantages"], alone.streams["advantages"])


def test_rluf_weighs_the_rewards():
    several = {"one": [3.0, 0.0, 1.0], "other": [0.0, 1.0, 0.5]}
    turn = turn_of([1, 2, 2], [9.0, 9.0, 9.0], [0, 0, 0], several=several)
    found = prepared("rluf", turn, weights="1,-2")
    total = torch.tensor([3.0, -2.0, 0.0])
    expected = advantages.grpo(total, torch.zeros(3, dtype=torch.int64), eps=1e-4).repeat_interleave(
        torch.tensor([1, 2, 2])
    )
    near(found.streams["advantages"], expected)
    with pytest.raises(ValueError, match="weights must be 2 finite numbers"):
        prepared("rluf", turn, weights="1,b")


def test_a_rubrics_scores_can_be_relative_to_its_version():
    first = prepared("meta_po", turn_of([1, 2], [4.0, 6.0], version=0), normalize="version", beta=0.0, lam=1.0)
    near(first.streams["returns"], torch.tensor([-1.0, 1.0, 1.0]) / 2**0.5)
    turn = turn_of([1, 2], [40.0, 60.0], version=1)
    second = prepared("meta_po", turn, first.state, normalize="version", beta=0.0, lam=1.0)
    near(second.streams["returns"], torch.tensor([-1.0, 1.0, 1.0]) / 2**0.5)
    assert second.state["versions"][:, 0].tolist() == [0, 1] and second.metrics["rubric"] == 1
    plain = prepared("meta_po", turn, beta=0.0, lam=1.0)
    near(plain.streams["returns"], torch.tensor([40.0, 60.0, 60.0]))


def test_the_tasks_rubric_becomes_stricter_when_it_tells_nothing():
    rubric = task.Rubric()
    samples = [Sample("3+4=", text, [], [], True, {}) for text in ("7", "17", "8", "x")]
    assert rubric(samples) == [2, 1, 2, 1]  # a number, with one digit
    rubric.refine(samples, rubric(samples))
    assert rubric.version == 1 and rubric(samples) == [3, 2, 2, 1]
    rubric.refine(samples[3:], [1.0])
    assert rubric.version == 1  # what scores low is told apart
    copy = task.Rubric()
    copy.load_state_dict(rubric.state_dict())
    assert copy(samples) == rubric(samples)


def test_t_ppo_is_ppo_where_everything_is_finished():
    turn = turn_of([2, 3, 1], [1.0, 0.0, 0.5], ended=[True, False, True], longest=3)
    ours, theirs = (prepared(name, turn, lam=1.0).streams for name in ("t_ppo", "ppo"))
    near(ours["advantages"], theirs["advantages"])
    near(ours["returns"], theirs["returns"])
    assert ours["trained"].all() and (ours["valued"] == 1).all()


def test_t_ppo_trains_every_token_once_and_values_of_what_is_finished():
    turn = turn_of([2, 3], [1.0, 0.0], ended=[True, False], begun=[1, 0])
    found = prepared("t_ppo", turn, beta=0.0, lam=1.0).streams
    v = turn.batch.streams["old_value"]
    # of the unfinished one the value behind the last token is that of the last
    raw = torch.stack([1 - v[1], v[4] - v[2], v[4] - v[3], v[4] - v[4]])
    # four of five tokens, whose mean is asked for over five
    near(found["advantages"], torch.cat([torch.zeros(1), advantages.whiten(raw) * 5 / 4]))
    assert found["trained"].tolist() == [False, True, True, True, True]
    near(found["valued"], torch.tensor([2.5, 2.5, 0, 0, 0]))
    near(found["returns"][:2], torch.ones(2))
    assert algorithms.build("t_ppo", {"window": 5}).window == 5


def test_masks_of_tokens_give_the_losses_of_what_is_left():
    algorithm = algorithms.build("t_ppo", {"value_coefficient": 1.0})
    generator = torch.Generator().manual_seed(3)
    streams = {name: torch.randn(5, generator=generator) for name in ("advantages", "old_value", "returns")}
    leaves = [torch.randn(5, generator=generator, requires_grad=True) for _ in range(2)]
    trained, valued = torch.tensor([0, 1, 1, 0, 1]).bool(), torch.tensor([1, 1, 0, 0, 0]).bool()
    masked = {**streams, "old": leaves[0].detach(), "policy": leaves[0], "policy_value": leaves[1]}
    masked |= {"trained": trained, "valued": valued * 2.5, "advantages": streams["advantages"] * 5 / 3}
    batch = Batch(masked, Completions((2, 3), torch.tensor([0, 2, 5], dtype=torch.int32), (1, 1)), {}, 2, 0, 5, 9)
    algorithm(batch, {}).loss.backward()
    near(leaves[0].grad, torch.where(trained, -streams["advantages"] / 3, 0))
    # unless the old value's neighbourhood is farther from the return
    near_old = streams["old_value"] + (leaves[1].detach() - streams["old_value"]).clamp(-0.2, 0.2)
    error = leaves[1].detach() - streams["returns"]
    active = (error.abs() >= (near_old - streams["returns"]).abs()) & valued
    near(leaves[1].grad, torch.where(active, error / 2, 0))


def test_corrections_weigh_by_what_the_sampler_said():
    generator = torch.Generator().manual_seed(4)
    streams = {name: torch.randn(7, generator=generator) - 1 for name in ("advantages", "old", "reference")}
    # off by so much that of the three sequences every correction bounds or drops another set of tokens
    streams["rollout"] = streams["old"] + torch.tensor([0.1, -0.2, 2.5, 0.3, -3.0, -0.9, 1.0])
    logr = streams["old"] - streams["rollout"]
    sums = torch.stack([part.sum() for part in logr.split([2, 1, 4])])
    each, mean = (of.repeat_interleave(torch.tensor([2, 1, 4])) for of in (sums, sums / torch.tensor([2.0, 1, 4])))
    ratio, sequence, average = logr.exp(), each.exp(), mean.exp()
    weights = {
        "none": torch.ones(7),
        "tis": ratio.clamp(max=2.0),
        "sequence_tis": sequence.clamp(max=2.0),
        "sequence_mean_tis": average.clamp(max=2.0),
        "mis": sequence * (sequence <= 3.0),
        "icepop": ratio * ((ratio >= 0.5) & (ratio <= 5.0)),
        "sequence_mask": ratio * ((average >= 0.5) & (average <= 5.0)),
    }
    assert tuple(weights) == algorithms.build("grpo", {}).recipe.choices()["correction"]
    assert len({tuple(weight.tolist()) for weight in weights.values()}) == len(weights)
    for name, weight in weights.items():
        policy = streams["old"].clone().requires_grad_()
        batch = Batch(
            {**streams, "policy": policy},
            Completions((2, 1, 4), torch.tensor([0, 2, 3, 7], dtype=torch.int32), (1, 1, 1)),
            {},
            3,
            0,
            7,
            9,
        )
        algorithm = algorithms.build("grpo", {"correction": name, "beta": 0.0, "aggregation": "token_mean"})
        assert algorithm.anchors(1) == ({} if name == "none" else {"old": "turn"})
        algorithm(batch, {}).loss.backward()
        # the ratio to the old policy is 1, so that the slope is the weighted advantage
        near(policy.grad, -streams["advantages"] * weight / 7)


def test_xrpo_gives_the_rest_to_whom_it_tells_most():
    algorithm = algorithms.build("xrpo", {"samples": 6, "first": 4, "rounds": 3, "exploration": 0.01})
    assert algorithm.draws[0].times == 4
    known = [[1.0, 1, 1, 1], [0.0, 1, 0, 1], [0.0, 0, 0, 0]]
    given = [algorithm.allocate(known, n) for n in range(4)]
    assert [sum(of) for of in given] == [2, 2, 2, 0] and given[3] == []
    # what is sure already waits
    assert given[0] == [0, 2, 0]
    assert algorithms.build("xrpo", {"samples": 4}).allocate(known, 0) == []


def test_xrpo_sharpens_what_is_right_and_unlikely():
    old = torch.tensor([-2.0, -4.0, -0.5, -0.1, -0.2])
    turn = turn_of([2, 1, 1, 1], [1.0, 0.0, 1.0, 0.0], [0, 0, 0, 0], old=old)
    plain = prepared("xrpo", turn, novelty=0.0).streams["advantages"]
    found = prepared("xrpo", turn).streams["advantages"]
    # its mean log-prob is -3, the group's -0.95; half of the advantage is the most
    near(found, torch.cat([1.5 * plain[:2], plain[2:]]))


def test_the_penalty_follows_the_divergence():
    turn = turn_of([2, 3], [1.0, 0.0])
    hyper = {"kl_control": "adaptive", "kl_target": 0.1, "kl_horizon": 20.0, "beta": 0.2}
    streams = turn.batch.streams
    kl = float((streams["old"] - streams["reference"]).sum()) / 2
    found = prepared("ppo", turn, **hyper)
    expected = rewards.AdaptiveKLController(0.2, target=0.1, horizon=20)
    expected.update(kl, 2)
    assert found.metrics["kl_coefficient"] == pytest.approx(expected.value) != 0.2
    again = prepared("ppo", turn, found.state, **hyper)
    near(again.streams["returns"], prepared("ppo", turn, beta=expected.value).streams["returns"])
    with pytest.raises(ValueError, match="beta must be positive"):
        algorithms.build("ppo", {"kl_control": "adaptive", "beta": 0.0})


def test_nlpo_takes_what_sampled_for_the_old_policy():
    algorithm = algorithms.build("nlpo", {})
    assert algorithm.anchors(4)["old"] == "rollout" and algorithm.draws[0].source == "masked"
    with pytest.raises(ValueError, match="mask_top_p"):
        algorithms.build("nlpo", {"mask_top_p": 0.0})


def test_a_further_model_must_be_asked_for_and_given(model_folder, write, capsys, tmp_path):
    data = write([{"prompt": "ab"}] * 8)
    given = ["--model", str(model_folder), "--data", data, "--output", str(tmp_path / "run")]
    assert main(["train", "rto", *given]) == 2
    assert "rto needs --aux" in capsys.readouterr().err
    assert main(["train", "ppo", *given, "--aux", str(model_folder)]) == 2
    assert "--aux: ppo asks no further model" in capsys.readouterr().err
    assert main(["train", "t_ppo", *given, "--rollout.stop", '["x"]']) == 2
    assert "--rollout.stop" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_a_bonus_that_would_have_no_gradient_is_refused(name):
    with pytest.raises(ValueError, match=f"entropy_coefficient must be 0 for {name}"):
        algorithms.build(name, {"entropy_coefficient": 0.1})
