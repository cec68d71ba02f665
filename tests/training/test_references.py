"""References that follow the policy: TR-DPO's updates and sDPO's stages, in the loop and in whole runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastpo.cli import main
from fastpo.training import loop
from fastpo.training.batches import stage, staged_indices, step_indices
from fastpo.training.loop import Job, constant_streams, optimizer_step, train
from fastpo.training.model import Policy

from .conftest import pairs, tiny_model
from .test_loop import make_job
from .test_run import assert_same_run, metrics, options

pytest.importorskip("accelerate")
LOG2 = math.log(2)


def following(steps: int = 6, stages: int = 1, **sync) -> tuple[Job, object]:
    """A job whose reference is a copy of the policy that follows it."""
    from fastpo.training.references import MovingReference

    job = make_job()
    reference = Policy(tiny_model(job.policy.model.config.vocab_size))
    follows = MovingReference(job.accelerator, reference, **sync)
    return replace(job, steps=steps, stages=stages, constants=follows.constants, before_step=follows), follows


def weights(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def run(job: Job, seen=lambda done: None) -> list[dict[str, float]]:
    """All steps of a job; `seen` is called after each."""
    found = []

    def log(done: int, measured: dict[str, float]) -> None:
        found.append(measured)
        seen(done)

    nothing = {"eval_every": 0, "checkpoint_every": 0, "save": lambda step: None, "evaluate": dict}
    assert train(job, 0, log=log, **nothing) == job.steps
    return found


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_updates(alpha):
    """Before the steps 2 and 4 the reference is alpha policy + (1 - alpha) reference, and nothing moves it between."""
    job, follows = following(every=2, alpha=alpha)
    policies, references = [weights(job.policy)], [weights(follows.model)]

    def seen(done: int) -> None:
        policies.append(weights(job.policy))
        references.append(weights(follows.model))

    measured = run(job, seen)
    for step in range(6):
        # what served in the step is seen after it
        before, now = references[step], references[step + 1]
        for old, new, policy in zip(before, now, policies[step], strict=True):
            if step in (2, 4):
                torch.testing.assert_close(new, alpha * policy + (1 - alpha) * old, rtol=1e-5, atol=1e-7)
                assert not torch.equal(new, old)
            else:
                assert torch.equal(new, old)
    at = [m["loss"] == pytest.approx(LOG2, abs=1e-5) for m in measured]
    # a policy that is its own reference has the loss log 2
    assert at == [True, False, alpha == 1, False, alpha == 1, False]


def test_log_probs_are_never_stale():
    """In each step they are those of the reference as it is, of the step's examples and no others."""
    job, follows = following(every=1, alpha=0.6)
    checked = []
    real = loop.optimizer_step

    def checking(job: Job, step: int) -> dict[str, float]:
        everything = range(len(job.examples))
        now = constant_streams(job.accelerator, follows.model, job.examples, everything, 4096)["reference"]
        held = job.constants["reference"]
        assert set(held) == set(job.indices(step))
        for i, parts in held.items():
            torch.testing.assert_close(torch.cat(parts), torch.cat(now[i]), rtol=1e-5, atol=1e-5)
        checked.append({i: torch.cat(parts) for i, parts in held.items()})
        return real(job, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimizer_step", checking)
        run(job)
    # an example of the first epoch and the second: a cache would have kept the first numbers
    again = set(checked[0]) & set(checked[-1])
    assert len(checked) == 6 and again
    assert all(not torch.allclose(checked[0][i], checked[-1][i], atol=1e-4) for i in again)


@pytest.mark.parametrize("name", ["mallows_po", "tdpo"])
def test_what_else_is_known_of_the_reference(name):
    """Statistics of its distributions move with it, and so does a model that is asked at every step."""
    from fastpo.training.references import MovingReference

    job = make_job(name, reference_seed=1)
    frozen = Policy(tiny_model(job.policy.model.config.vocab_size, 1)) if job.reference is None else job.reference
    statistics = None if job.algorithm.divergence else job.algorithm.statistics["reference"]
    follows = MovingReference(job.accelerator, frozen, every=1, alpha=1.0, statistics=statistics)
    job = replace(job, constants=follows.constants, before_step=follows)
    margins = [m["reward_margin"] for m in run(job)]
    # from the first update on the policy is its own reference
    assert abs(margins[0]) > 1e-3
    assert margins[1:] == pytest.approx([0] * 3, abs=1e-5)
    streams = {"reference"} | {f"reference_{s}" for s in statistics} if statistics is not None else set()
    assert set(follows.constants) == streams


def test_stages():
    """Each stage has its part of the data, and the policy with which it began as its reference."""
    job, follows = following(steps=6, stages=3)
    policies, references, used = [weights(job.policy)], [], []

    def seen(done: int) -> None:
        policies.append(weights(job.policy))
        references.append(weights(follows.model))
        used.append(set(follows.constants["reference"]))

    measured = run(job, seen)
    for step in range(6):
        part = step // 2
        assert used[step] <= set(range(8 * part, 8 * part + 8))
        assert all(torch.equal(a, b) for a, b in zip(references[step], policies[2 * part], strict=True))
    at = [m["loss"] == pytest.approx(LOG2, abs=1e-5) for m in measured]
    assert at == [True, False] * 3


def test_without_updates_it_is_the_fixed_reference():
    job, _ = following(every=0)
    plain = make_job()
    for step, measured in enumerate(run(job)):
        want = optimizer_step(plain, step)
        # an accuracy jumps where rounding decides a tie
        smooth = [key for key in want if key not in ("seconds", "reward_accuracy")]
        assert {k: measured[k] for k in smooth} == pytest.approx({k: want[k] for k in smooth}, rel=1e-4, abs=1e-6)


def test_indices_of_stages():
    """One stage is the plain order; more of them share out steps and examples, each example in one stage."""
    for step in range(9):
        assert staged_indices(step, 9, 4, 10, 3, 1) == step_indices(step, 4, 10, 3)
    for steps, count, stages in ((7, 10, 3), (5, 5, 5), (12, 100, 4)):
        stage_of: dict[int, int] = {}
        for step in range(steps):
            for i in staged_indices(step, steps, 40, count, 0, stages):
                assert stage_of.setdefault(i, stage(step, steps, stages)) == stage(step, steps, stages)
        # in the file's order, and none left out by steps that are long enough
        assert sorted(stage_of) == list(range(count))
        order = [stage_of[i] for i in range(count)]
        assert order == sorted(order) and set(order) == set(range(stages))


def test_refused():
    from fastpo.training.references import MovingReference

    for given, message in (
        ({"every": -1}, "every must be at least 0, got -1"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], got 0"),
        ({"alpha": 1.5}, r"alpha must be in \(0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            MovingReference(None, None, **given)
    job, follows = following(every=1)
    with pytest.raises(ValueError, match=r"the reference cannot follow the policy: model\.model\.embed_tokens\.weight"):
        follows.move(Policy(tiny_model(job.policy.model.config.vocab_size + 1)), 1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import json

    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(20)))
    return str(path)


@pytest.mark.parametrize("sync", [("--sync.every", "2"), ("--sync.stages", "2", "--sync.alpha", "1")], ids=str)
def test_resuming_is_bitwise_the_straight_run(sync, model_folder, data, tmp_path, monkeypatch):
    """Stopped where an update is due: the checkpoint holds the reference."""
    more = ("--eval_data", data, "--checkpoint_every", "4", *sync)
    straight, output = tmp_path / "straight", tmp_path / "run"
    assert main(options(model_folder, data, straight, *more)) == 0
    plain = tmp_path / "plain"
    assert main(options(model_folder, data, plain, "--eval_data", data)) == 0
    assert metrics(straight) != metrics(plain)

    steps, real = [], loop.optimizer_step

    def four_steps(job, step):
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(step)
        return real(job, step)

    monkeypatch.setattr(loop, "optimizer_step", four_steps)
    assert main(options(model_folder, data, output, *more)) == 130
    monkeypatch.undo()
    assert main(["train", "dpo", "--resume", str(output)]) == 0
    assert_same_run(straight, output)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sync.every", "-1"), "--sync.every must be at least 0, got -1"),
        (("--sync.alpha", "0"), "--sync.alpha must be in (0, 1], got 0"),
        (("--sync.stages", "0"), "--sync.stages must be at least 1, got 0"),
        (("--sync.stages", "7"), "--sync.stages 7 is more than there are steps (6)"),
        (("--sync.stages", "21", "--steps", "30"), "--sync.stages 21 is more than there are examples (20)"),
    ],
)
def test_bad_options(more, message, model_folder, data, tmp_path, capsys):
    assert main(options(model_folder, data, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err


def test_what_an_algorithm_learns_beside_the_policy_is_not_the_references():
    job, follows = following(every=1)
    own = torch.nn.Linear(16, 1)
    follows.move(Policy(tiny_model(job.policy.model.config.vocab_size, 5), own=own), 1.0)
    expected = tiny_model(job.policy.model.config.vocab_size, 5).parameters()
    assert all(torch.equal(a, b) for a, b in zip(follows.model.parameters(), expected, strict=True))
