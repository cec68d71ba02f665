"""The training loop. It knows neither the algorithm nor the model nor the task."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpo.algorithms import Algorithm
from fastpo.training.batches import MicroBatch, collate, plan, staged_indices
from fastpo.training.data import Example
from fastpo.training.model import policy_inputs

# per example, the log-probs of each of its completions under a model that is not trained, on the CPU
Constants = Mapping[int, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Job:
    """What is trained, on what and how.

    Attributes:
        accelerator: devices, processes and precision.
        policy: the prepared `Policy`.
        optimizer, schedule: stepped together.
        algorithm: the loss.
        examples: the training data.
        constants: for every model of the algorithm but the policy, its log-probs of the examples.
        steps, size, tokens, seed, max_norm: as in the configuration.
        stages: equal parts of the run, each with a part of the examples.
        before_step: called with the job and the number of steps done, before each step.
    """

    accelerator: Any
    policy: Any
    optimizer: Any
    schedule: Any
    algorithm: Algorithm
    examples: Sequence[Example]
    constants: Mapping[str, Constants]
    steps: int
    size: int
    tokens: int
    seed: int
    max_norm: float
    stages: int = 1
    before_step: Callable[[Job, int], None] | None = None

    def indices(self, step: int) -> list[int]:
        """The examples of a step."""
        return staged_indices(step, self.steps, self.size, len(self.examples), self.seed, self.stages)


def train(
    job: Job,
    start: int,
    *,
    log: Callable[[int, dict[str, float]], None],
    evaluate: Callable[[], dict[str, float]],
    save: Callable[[int], object],
    eval_every: int,
    checkpoint_every: int,
) -> int:
    """Do the steps from `start` on; returns how many were done in all, fewer if a signal asked to stop."""
    with _stop_signal() as stopped:
        for step in range(start, job.steps):
            if job.before_step is not None:
                job.before_step(job, step)
            metrics = optimizer_step(job, step)
            done = step + 1
            if done == job.steps or (eval_every and done % eval_every == 0):
                metrics |= {f"eval_{name}": value for name, value in evaluate().items()}
            log(done, metrics)
            stop = _anywhere(job.accelerator, stopped.is_set())
            if stop or done == job.steps or (checkpoint_every and done % checkpoint_every == 0):
                save(done)
            if stop:
                return done
    return job.steps


def optimizer_step(job: Job, step: int) -> dict[str, float]:
    """One step on one batch; returns its metrics, summed over micro-batches and ranks."""
    begin = time.perf_counter()
    accelerator = job.accelerator
    indices = job.indices(step)
    batches = list(micro_batches(accelerator, job.examples, indices, job.tokens))
    total: dict[str, Tensor] = {}
    for n, (members, batch) in enumerate(batches):
        # gradients cross the ranks once, with the last micro-batch
        last = n + 1 == len(batches)
        with contextlib.nullcontext() if last else accelerator.no_sync(job.policy):
            out = job.algorithm(_logprobs(job, members, batch), batch.completions, len(indices))
            # DDP and FSDP average the ranks' gradients, but the losses already share one denominator
            accelerator.backward(out.loss * accelerator.num_processes)
        for name, value in out.metrics.items():
            total[name] = total.get(name, 0) + value
    norm = accelerator.clip_grad_norm_(job.policy.parameters(), job.max_norm)
    rate = job.schedule.get_last_lr()[0]
    job.optimizer.step()
    job.schedule.step()
    job.optimizer.zero_grad()
    metrics = _summed(accelerator, total)
    metrics |= {"grad_norm": float(norm), "lr": rate, "epoch": (step + 1) * job.size / len(job.examples)}
    metrics["tokens"] = sum(job.examples[i].tokens for i in indices)
    return metrics | {"seconds": time.perf_counter() - begin}


def micro_batches(
    accelerator: Any, examples: Sequence[Example], indices: Sequence[int], tokens: int
) -> Iterator[tuple[list[int], MicroBatch]]:
    """This rank's share of the examples as forwards: the examples in each, and their tensors.

    No examples mean a forward that is only there so that all ranks have equally many.
    """
    lengths = [examples[i].tokens for i in indices]
    for forward in plan(lengths, tokens, accelerator.num_processes)[accelerator.process_index]:
        members = [indices[i] for i in forward]
        yield members, collate([examples[i] for i in members or indices[:1]], accelerator.device)


def _logprobs(job: Job, members: Sequence[int], batch: MicroBatch) -> dict[str, Tensor]:
    found = {"policy": job.policy(*policy_inputs(batch))}
    for model, constants in job.constants.items():
        parts = [constants[i][k] for k in range(len(constants[members[0]])) for i in members]
        found[model] = torch.cat(parts).to(batch.targets.device)
    return found


@torch.no_grad()
def evaluate_examples(job: Job, examples: Sequence[Example], constants: Mapping[str, Constants]) -> dict[str, float]:
    """The algorithm's loss and metrics on examples that are not trained on."""
    held_out = Job(**{**vars(job), "examples": examples, "constants": constants})
    total: dict[str, Tensor] = {}
    for members, batch in micro_batches(job.accelerator, examples, range(len(examples)), job.tokens):
        shown = members or [0]
        out = job.algorithm(_logprobs(held_out, shown, batch), batch.completions, len(examples))
        for name, value in out.metrics.items():
            total[name] = total.get(name, 0) + (value if members else 0 * value)
    return _summed(job.accelerator, total)


@torch.no_grad()
def constant_logprobs(
    accelerator: Any, model: Any, examples: Sequence[Example], indices: Sequence[int], tokens: int
) -> dict[int, tuple[Tensor, ...]]:
    """Log-probs of the examples' completions under a frozen model, once for the whole run.

    One forward per example whatever the number of epochs, and the model need not stay in memory afterwards.
    """
    mine: dict[int, tuple[Tensor, ...]] = {}
    for members, batch in micro_batches(accelerator, examples, indices, tokens):
        parts = model(*policy_inputs(batch)).cpu().split(list(batch.completions.lengths))
        for n, i in enumerate(members):
            # clones, because a split keeps the whole forward's storage alive
            mine[i] = tuple(part.clone() for part in parts[n :: len(members)])
    if accelerator.num_processes == 1:
        return mine
    from accelerate.utils import gather_object

    return dict(gather_object(list(mine.items())))


def _summed(accelerator: Any, values: Mapping[str, Tensor]) -> dict[str, float]:
    """The sums over all ranks, read in one transfer."""
    stacked = accelerator.reduce(torch.stack([v.float() for v in values.values()]), reduction="sum")
    return dict(zip(values, stacked.tolist(), strict=True))


def _anywhere(accelerator: Any, flag: bool) -> bool:
    """Whether the flag is set on any rank: all must stop after the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum"))


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that the step is finished; a second Ctrl-C ends at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number: int, _: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
