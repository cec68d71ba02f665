"""Learning rates over a run, as torch schedulers, and what scaling laws suggest for it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from fastpo.kernels import _checks

Decay = Literal["exponential", "linear", "cosine", "1-sqrt"]


def _whole(name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def _positive(name: str, value: object) -> float:
    number = _checks.number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {number:g}")
    return number


def _decay(form: str, floor: float) -> None:
    if form not in get_args(Decay):
        raise ValueError(f"form must be one of {', '.join(map(repr, get_args(Decay)))}; got {form!r}")
    if not 0 <= _checks.number("floor", floor) <= 1:
        raise ValueError(f"floor must be in [0, 1], got {floor:g}")


def _decayed(form: str, floor: float, past: int, period: int) -> float:
    """The factor `past` steps after the decay began."""
    if past <= 0:
        return 1.0
    if form == "exponential":
        return max(0.5 ** (past / period), floor)
    x = min(past / period, 1.0)
    left = {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "1-sqrt": 1 - math.sqrt(x)}[form]
    return floor + (1 - floor) * left


class WarmupStableDecay(LRScheduler):
    """WSD: s/W of the optimiser's rate for the first W steps, all of it to step T, and then a decay.

    The paper's is "exponential", 0.5^((s - T)/decay): the rate halves every `decay` steps, for as long as the run goes
    on, but not below floor. The common others reach floor after `decay` steps and stay there: "linear", "cosine", and
    "1-sqrt", 1 - √((s - T)/decay).

    Args:
        optimizer: its rates are the largest ones.
        warmup: W, at least 0.
        stable_end: T, at least W; the paper's letter also stands for the period of the decay.
        decay: at least 1; the paper's is 5,000 steps.
        form: as above. transformers' default is "cosine".
        floor: a share of the largest rate, in [0, 1].
        last_epoch: as in torch.

    Raises:
        TypeError, ValueError: a number is outside its domain, or form is unknown.

    Source: MiniCPM (2404.06395) eq. 1. Elsewhere: transformers: get_wsd_schedule, without the exponential one.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        warmup: int,
        stable_end: int,
        decay: int = 5000,
        form: Decay = "exponential",
        floor: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.warmup = _whole("warmup", warmup, 0)
        self.stable_end = _whole("stable_end", stable_end, 0)
        if stable_end < warmup:
            raise ValueError(f"stable_end must be at least warmup, {warmup}; got {stable_end}")
        self.decay = _whole("decay", decay, 1)
        _decay(form, floor)
        self.form, self.floor = form, floor
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """The share of the largest rate in a step; the first is 0."""
        if step < self.warmup:
            return step / self.warmup
        return _decayed(self.form, self.floor, step - self.stable_end, self.decay)

    def get_lr(self) -> list[float | Tensor]:
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]


class PowerScheduler(LRScheduler):
    """min(η, β a n^b) after n tokens, the same for any length of the run, and a decay of what it is when that begins.

    η is the optimiser's rate (the paper's is 0.02, from memory), β the sequences per batch. The warmup is linear to
    what the law gives at its end. dolomite-engine's ignores the decay and fails without a warmup.

    Args:
        optimizer: its rates are the largest ones.
        batch_size: β, in sequences.
        tokens_per_step: of the whole batch, over all ranks.
        warmup: steps, at least 0.
        decay_begin: the step at which the decay begins; None for none.
        decay, form, floor: as in `WarmupStableDecay`; shares are of the rate at that step.
        a, b: of the law, a positive and b negative; 4 and -0.51 are from memory.
        last_epoch: as in torch.

    Raises:
        TypeError, ValueError: a number is outside its domain, or form is unknown.

    Source: Power scheduler (2408.13359). Elsewhere: dolomite-engine: PowerScheduler, with β in its a.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: float,
        tokens_per_step: float,
        warmup: int = 0,
        decay_begin: int | None = None,
        decay: int = 5000,
        form: Decay = "exponential",
        floor: float = 0.0,
        a: float = 4.0,
        b: float = -0.51,
        last_epoch: int = -1,
    ) -> None:
        self.batch_size = _positive("batch_size", batch_size)
        self.tokens_per_step = _positive("tokens_per_step", tokens_per_step)
        self.warmup = _whole("warmup", warmup, 0)
        if decay_begin is not None and _whole("decay_begin", decay_begin, 0) < warmup:
            raise ValueError(f"decay_begin must be at least warmup, {warmup}; got {decay_begin}")
        self.decay_begin = decay_begin
        self.decay = _whole("decay", decay, 1)
        _decay(form, floor)
        self.form, self.floor = form, floor
        self.a = _positive("a", a)
        if not -math.inf < _checks.number("b", b) < 0:
            raise ValueError(f"b must be negative and finite, got {b:g}")
        self.b = b
        super().__init__(optimizer, last_epoch)

    def _law(self, step: int, largest: float) -> float:
        # before the first token it is inf
        if step == 0:
            return largest
        return min(largest, self.batch_size * self.a * (step * self.tokens_per_step) ** self.b)

    def rate(self, step: int, largest: float) -> float:
        """The rate in a step, for a largest one."""
        if step < self.warmup:
            return step / self.warmup * self._law(self.warmup, largest)
        if self.decay_begin is None or step <= self.decay_begin:
            return self._law(step, largest)
        past = step - self.decay_begin
        return self._law(self.decay_begin, largest) * _decayed(self.form, self.floor, past, self.decay)

    def get_lr(self) -> list[float | Tensor]:
        return [self.rate(self.last_epoch, float(base)) for base in self.base_lrs]


class StepLaw(NamedTuple):
    """A learning rate, and a batch size in tokens."""

    learning_rate: float
    batch_tokens: float


def step_law(parameters: float, tokens: float) -> StepLaw:
    """1.79 N^-0.713 D^0.307, and 0.58 D^0.571 tokens per batch: the best of both for pretraining.

    Args:
        parameters: N, without embeddings. The law was fitted from 59M to 1B (from memory); outside it is a guess.
        tokens: D, of the whole run.

    Raises:
        TypeError, ValueError: a number is not positive.

    Source: Predictable scale, Part I (2503.04715), whose rate ends at 1e-5 (from memory).
    """
    n, d = _positive("parameters", parameters), _positive("tokens", tokens)
    return StepLaw(1.79 * n**-0.713 * d**0.307, 0.58 * d**0.571)
