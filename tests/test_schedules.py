"""fastpo.schedules: rates step by step, against transformers', and after a checkpoint."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from fastpo import schedules


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    """Of the first group, in the first steps."""
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


class TestWarmupStableDecay:
    def test_exponential(self):
        """The paper's: it halves every `decay` steps, and goes on."""
        scheduler = schedules.WarmupStableDecay(optimizer(0.01), warmup=4, stable_end=6, decay=3)
        want = [0, 0.25, 0.5, 0.75, 1, 1, 1, *(0.5 ** (k / 3) for k in range(1, 14))]
        assert rates(scheduler, 20) == pytest.approx([0.01 * w for w in want])

    @pytest.mark.parametrize(
        ("form", "middle"),
        [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - math.sqrt(0.5)), ("exponential", 0.5**0.5)],
    )
    def test_forms(self, form, middle):
        scheduler = schedules.WarmupStableDecay(optimizer(1.0), warmup=0, stable_end=2, decay=4, form=form, floor=0.1)
        found = rates(scheduler, 12)
        assert found[:3] == [1.0] * 3
        if form == "exponential":
            assert found[4] == pytest.approx(middle) and found[6] == pytest.approx(0.5) and min(found) >= 0.1
        else:
            assert found[4] == pytest.approx(0.1 + 0.9 * middle) and found[6:] == pytest.approx([0.1] * 6)
        assert all(a >= b for a, b in itertools.pairwise(found))

    @pytest.mark.parametrize("form", ["linear", "cosine", "1-sqrt"])
    def test_transformers(self, form):
        from transformers.optimization import get_wsd_schedule

        theirs = get_wsd_schedule(
            optimizer(0.3), num_warmup_steps=3, num_stable_steps=4, num_decay_steps=5, decay_type=form, min_lr_ratio=0.2
        )
        ours = schedules.WarmupStableDecay(optimizer(0.3), warmup=3, stable_end=7, decay=5, form=form, floor=0.2)
        # their warmup begins at the floor
        assert rates(ours, 16)[3:] == pytest.approx(rates(theirs, 16)[3:])

    def test_bad_input(self):
        ok = {"warmup": 2, "stable_end": 4}
        for change, error, message in (
            ({"stable_end": 1}, ValueError, "stable_end must be at least warmup, 2; got 1"),
            ({"warmup": -1}, ValueError, "warmup must be at least 0, got -1"),
            ({"warmup": 1.5}, TypeError, "warmup must be an int, got float"),
            ({"decay": 0}, ValueError, "decay must be at least 1, got 0"),
            (
                {"form": "sqrt"},
                ValueError,
                "form must be one of 'exponential', .*'1-sqrt'; got 'sqrt'",
            ),
            ({"floor": 2.0}, ValueError, r"floor must be in \[0, 1\], got 2"),
        ):
            with pytest.raises(error, match=message):
                schedules.WarmupStableDecay(optimizer(0.1), **{**ok, **change})


class TestPower:
    def test_law(self):
        """128 sequences after 1e9 tokens: 128 · 4.6 · 1e9^-0.51, about 0.015; η before the law has fallen to it."""
        scheduler = schedules.PowerScheduler(optimizer(0.02, 0.001), batch_size=128, tokens_per_step=1e8, a=4.6)
        found = rates(scheduler, 11)
        assert found[0] == found[1] == 0.02
        assert found[10] == pytest.approx(128 * 4.6 * 1e9**-0.51) == pytest.approx(0.015, rel=0.02)
        # each group has its own largest rate
        assert scheduler.get_last_lr()[1] == 0.001

    def test_warmup_and_decay(self):
        """To the law's value at the end of the warmup, not to η; then down from its value where the decay begins."""
        scheduler = schedules.PowerScheduler(
            optimizer(0.5), batch_size=1.0, tokens_per_step=10.0, a=1.0, b=-0.5, warmup=4, decay_begin=9, decay=2
        )
        law = [min(0.5, (10 * s) ** -0.5) for s in range(1, 20)]
        law.insert(0, 0.5)
        want = [k / 4 * law[4] for k in range(4)] + law[4:10] + [law[9] * 0.5 ** (k / 2) for k in range(1, 6)]
        assert rates(scheduler, 15) == pytest.approx(want)

    def test_bad_input(self):
        ok = {"batch_size": 8, "tokens_per_step": 100}
        for change, message in (
            ({"batch_size": 0}, "batch_size must be positive and finite, got 0"),
            ({"tokens_per_step": math.inf}, "tokens_per_step must be positive and finite, got inf"),
            ({"b": 0.5}, "b must be negative and finite, got 0.5"),
            ({"warmup": 5, "decay_begin": 3}, "decay_begin must be at least warmup, 5; got 3"),
        ):
            with pytest.raises(ValueError, match=message):
                schedules.PowerScheduler(optimizer(0.1), **{**ok, **change})


@pytest.mark.parametrize("kind", ["wsd", "power"])
def test_state(kind):
    """A run continued from a checkpoint has the rates of one that was not interrupted."""

    def make() -> torch.optim.lr_scheduler.LRScheduler:
        if kind == "wsd":
            return schedules.WarmupStableDecay(optimizer(0.3), warmup=3, stable_end=5, decay=4)
        more = {"batch_size": 1.0, "tokens_per_step": 10.0, "a": 1.0, "warmup": 2, "decay_begin": 6}
        return schedules.PowerScheduler(optimizer(0.3), decay=3, **more)

    whole = rates(make(), 14)
    first = make()
    rates(first, 6)
    second = make()
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert rates(second, 8) == whole[6:]


def test_step_law():
    found = schedules.step_law(1e9, 1e11)
    assert found.learning_rate == pytest.approx(
        math.exp(math.log(1.79) - 0.713 * math.log(1e9) + 0.307 * math.log(1e11))
    )
    assert found.batch_tokens == pytest.approx(0.58 * 1e11**0.571)
    # plausible: a rate of 1e-3, a batch of a million tokens
    assert 5e-4 < found.learning_rate < 5e-3 and 5e5 < found.batch_tokens < 2e6
    with pytest.raises(ValueError, match="tokens must be positive and finite, got 0"):
        schedules.step_law(1e9, 0)
