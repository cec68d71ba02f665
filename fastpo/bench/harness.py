"""One process's share of a benchmark: check every provider's result, then time them in turns."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

OWN, BASELINE = "fastpo", "eager"
# seconds of a call that is timed once
_LONG = 10.0

Run = Callable[[], Sequence[Tensor]]


class UnavailableError(Exception):
    """A provider cannot take part: it is not installed, or does not do what the case asks for."""


class CheckFailedError(Exception):
    """fastpo's own result is wrong, so that nothing about the case may be reported."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case's outputs, or a floor: work that any way has to do at least.

    `prepare` returns the function to be timed; it may raise `UnavailableError`. A floor's outputs mean
    nothing. `bytes` is what GB/s counts where that is not the case's number; 0 for no GB/s. `outputs` names those that
    it gives, where they are not all.
    """

    name: str
    label: str
    prepare: Callable[[], Run]
    floor: bool = False
    bytes: int | None = None
    outputs: Sequence[str] | None = None


@dataclass(frozen=True)
class Expected:
    """The exact value of one output, in fp64, and what its error is measured in.

    Attributes:
        value: the exact output.
        weight: errors are divided by it. 1 gives absolute errors; for a gradient, the sum of the magnitudes
            of its terms gives relative ones that cancellation does not blow up.
        magnitude: how large, in units of `weight`, the numbers are that an implementation has to round.
        eps: machine epsilon of the dtype in which the kernel accumulates.
    """

    value: Tensor
    weight: Tensor | float = 1.0
    magnitude: float = 1.0
    eps: float = torch.finfo(torch.float32).eps

    def error(self, got: Tensor) -> float:
        """The largest weighted error; inf for a wrong shape or a NaN."""
        if got.shape != self.value.shape:
            return math.inf
        if got.numel() == 0:
            return 0.0
        difference = torch.where(got == self.value, 0.0, (got.double() - self.value).abs() / self.weight)
        return difference.nan_to_num(nan=math.inf, posinf=math.inf).max().item()

    def allowed(self, dtype: torch.dtype, baseline_error: float | None = None) -> float:
        """The error that an implementation returning `dtype` may have.

        One rounding is what numbers of size `magnitude` lose on the way, eps · magnitude. fastpo may err by
        two of them more than eager torch, whose error is `baseline_error`; or by two of the result's own,
        where a narrower dtype makes those larger. For the others, whose accuracy is shown but not judged,
        up to a hundred are rounding and no mistake: a plain fp32 sum of a million terms loses some.
        """
        step = self.eps * self.magnitude
        largest = (self.value.abs() / self.weight).max().item() if self.value.numel() else 0.0
        cast = torch.finfo(dtype).eps * largest if dtype.is_floating_point else 0.0
        if baseline_error is None:
            return 100 * step + 2 * cast
        return baseline_error + 2 * max(step, cast)


@dataclass(frozen=True)
class Problem:
    """A case with its inputs: `expected()` gives one entry per output of a run, in that order; None where that would
    take too long, and nothing is checked.

    `bytes` is what GB/s counts: every input once, and with a backward every gradient once.
    `bar` names the floors of which the slower one bounds the time from below.
    """

    providers: Sequence[Provider]
    expected: Callable[[], dict[str, Expected]] | None
    bytes: int
    bar: tuple[str, ...] = ()


class Case(Protocol):
    """A frozen dataclass of sizes and options, so that it can be sent to another process."""

    PROVIDERS: ClassVar[tuple[str, ...]]
    """Names of all providers that `build` may list."""

    @property
    def name(self) -> str: ...

    def build(self) -> Problem: ...


@dataclass
class Outcome:
    """What one process found out about one provider; `status` is "ok", "failed", "skipped" or "floor".

    `result_bytes` are those of the outputs, which are part of the peak.
    """

    label: str
    bytes: int
    status: str = "ok"
    reason: str | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    result_bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """What one process found out about one case."""

    case: str
    bar: tuple[str, ...]
    outcomes: dict[str, Outcome]


def with_backward(forward: Run, leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> Run:
    """Forward, then freshly allocated gradients of `leaves` for given gradients of the first outputs."""

    def run() -> Sequence[Tensor]:
        outputs = forward()
        return [*outputs, *torch.autograd.grad(outputs[: len(upstream)], leaves, upstream)]

    return run


def check(
    problem: Problem,
    outcomes: dict[str, Outcome],
    only: Collection[str] | None,
    skip: Mapping[str, str] | None = None,
) -> dict[str, Run]:
    """Prepare and check the providers; returns those to be timed. `outcomes` is filled in."""
    expected = None if problem.expected is None else problem.expected()
    baseline_errors: dict[str, float] = {}
    runs: dict[str, Run] = {}
    # the bound on fastpo's errors is made of the baseline's
    for provider in sorted(problem.providers, key=lambda p: p.name != BASELINE):
        if only is not None and provider.name not in {*only, OWN, BASELINE}:
            continue
        outcome = outcomes[provider.name] = Outcome(
            provider.label, problem.bytes if provider.bytes is None else provider.bytes
        )
        if skip and provider.name in skip:
            outcome.status, outcome.reason = "skipped", skip[provider.name]
            continue
        try:
            run = provider.prepare()
            outputs = [o.detach() for o in run()]
        except UnavailableError as error:
            outcome.status, outcome.reason = "skipped", str(error)
            continue
        except Exception as error:
            if provider.name in (OWN, BASELINE):
                raise
            lines = str(error).strip().splitlines() or [""]
            outcome.status, outcome.reason = "failed", f"{type(error).__name__}: {lines[0]}"
            continue
        if provider.floor:
            outcome.status = "floor"
            runs[provider.name] = run
            continue
        outcome.result_bytes = sum(o.nbytes for o in outputs)
        wrong = []
        given = expected or {}
        if expected is not None and provider.outputs is not None:
            given = {name: expected[name] for name in provider.outputs}
        for (name, exact), got in zip(given.items(), outputs, strict=True) if expected is not None else ():
            off = outcome.errors[name] = exact.error(got)
            allowed = exact.allowed(got.dtype, baseline_errors.get(name) if provider.name == OWN else None)
            if off > allowed:
                wrong.append(f"{name}: error {off:.2e} against fp64, {allowed:.2e} allowed")
        if provider.name == BASELINE:
            baseline_errors = outcome.errors
        if wrong:
            outcome.status, outcome.reason = "failed", "; ".join(wrong)
            if provider.name in (OWN, BASELINE):
                raise CheckFailedError(f"{provider.label} gives a wrong result: {outcome.reason}")
            continue
        runs[provider.name] = run
    return runs


def interleave(runs: dict[str, Run], repetitions: int, least_seconds: float = 5e-3) -> dict[str, float]:
    """Median seconds of a call. Each repetition times every provider once, in a new random order.

    Short calls are repeated within one sample until it lasts about `least_seconds`; those of more than 10 seconds are
    timed once.
    """
    numbers = {}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        seconds = _timed(run, 1)
        if seconds > _LONG:
            samples[name].append(seconds)
            continue
        # the first call of a short one says little
        seconds = seconds if seconds > 1 else _timed(run, 1)
        numbers[name] = max(1, math.ceil(least_seconds / seconds))
    order, shuffle = list(numbers), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(repetitions):
            shuffle(order)
            for name in order:
                samples[name].append(_timed(runs[name], numbers[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: statistics.median(times) for name, times in samples.items()}


def _timed(run: Run, calls: int) -> float:
    """Seconds of a call."""
    start = perf_counter()
    for _ in range(calls):
        run()
    return (perf_counter() - start) / calls


class _Clock:
    """A run that notes its seconds."""

    def __init__(self, run: Run):
        self.run, self.seconds = run, 0.0

    def __call__(self) -> Sequence[Tensor]:
        start = perf_counter()
        out = self.run()
        self.seconds = perf_counter() - start
        return out


def peak_bytes(run: Run) -> int | None:
    """How far one call raises the process's resident memory above where it stood, its results included.

    Just before the call, memory that malloc keeps from earlier calls is handed back and the system's
    high-water mark (VmHWM) is reset, so whatever the call touches counts, by any allocator, and nothing from
    before it. None where there is no such mark (other than Linux, or /proc not writable). To about 1 MB.
    """

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None
    outputs = run()
    peak = status("VmHWM")
    del outputs
    return max(0, peak - before)


def measure(
    case: Case,
    *,
    only: Collection[str] | None = None,
    repetitions: int = 9,
    skip: Mapping[str, str] | None = None,
) -> Measurement:
    """Check, time and weigh the providers of a case in this process.

    Args:
        case: what to run.
        only: names of the providers to run, besides fastpo and eager torch; None for all.
        repetitions: samples per provider; 0 takes the time of the one call whose memory is weighed.
        skip: names of providers that would take too much here, and why; eager torch may be among them.

    Raises:
        CheckFailedError: fastpo's own result (or the baseline's) is wrong.
    """
    problem = case.build()
    outcomes: dict[str, Outcome] = {}
    try:
        runs = check(problem, outcomes, only, skip)
    except CheckFailedError as error:
        raise CheckFailedError(f"{case.name}: {error}") from None
    if repetitions:
        for name, seconds in interleave(runs, repetitions).items():
            outcomes[name].seconds = seconds
    for name, run in runs.items():
        if outcomes[name].status != "floor" or not repetitions:
            clock = _Clock(run)
            outcomes[name].peak_bytes = peak_bytes(clock)
            outcomes[name].seconds = outcomes[name].seconds or clock.seconds
    listed = {p.name: outcomes[p.name] for p in problem.providers if p.name in outcomes}
    return Measurement(case.name, problem.bar, listed)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for exactly these shapes, as if nothing had been compiled before in this process."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def read(data: Tensor) -> Run:
    """One read of the tensor's bytes by all threads: the sum of them as 64-bit integers.

    Integers have no slow values (denormals) whatever the bytes are. On the machine where it was compared with
    torch's other reductions of the same bytes, only the fp32 sum was as fast.
    """
    flat = data.detach().reshape(-1).view(torch.uint8)
    words = flat[: flat.numel() // 8 * 8].view(torch.int64)
    return lambda: [words.sum()]
