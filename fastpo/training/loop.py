"""The training loop. It knows neither the algorithm nor the model nor the task."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpo.algorithms import Algorithm, Batch, Column, State
from fastpo.kernels import token_logprobs
from fastpo.training.batches import (
    MicroBatch,
    collate,
    example_numbers,
    interleaved,
    places,
    plan,
    staged_indices,
    step_layout,
    together,
)
from fastpo.training.checkpoint import Parts
from fastpo.training.data import Example
from fastpo.training.model import policy_inputs

# per example, a stream of each of its completions, of what is not trained, on the CPU
Constants = Mapping[int, tuple[Tensor, ...]]


class Memory:
    """What the algorithm remembers of past steps, saved with checkpoints."""

    def __init__(self) -> None:
        self.state: State = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


@dataclass(frozen=True)
class Job:
    """What is trained, on what and how.

    Attributes:
        accelerator: devices, processes and precision.
        policy: the prepared `Policy`.
        optimizer, schedule: stepped together.
        algorithm: the loss.
        examples: the training data.
        constants: by the name of the stream ("reference": its log-probs), what is computed once for all examples.
        reference: the model itself, where its distributions are needed at every step: a `Logits`.
        memory: of the algorithm.
        steps, size, tokens, seed, max_norm: as in the configuration.
        stages: equal parts of the run, each with a part of the examples.
        before_step: called with the job and the number of steps done, before each step; what it returns is added to
            the step's metrics.
        order: the examples of a step, where they are not drawn from one file of them.
        max_length: most tokens of a sampled completion.
        parts: what a checkpoint holds.
    """

    accelerator: Any
    policy: Any
    optimizer: Any
    schedule: Any
    algorithm: Algorithm
    examples: Sequence[Example]
    constants: Mapping[str, Constants]
    reference: Any
    memory: Memory
    steps: int
    size: int
    tokens: int
    seed: int
    max_norm: float
    stages: int = 1
    before_step: Callable[[Job, int], Mapping[str, float] | None] | None = None
    order: Callable[[int], list[int]] | None = None
    max_length: int = 0
    parts: Parts | None = None

    def indices(self, step: int) -> list[int]:
        """The examples of a step."""
        if self.order is not None:
            return self.order(step)
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
            begin = time.perf_counter()
            before = None if job.before_step is None else job.before_step(job, step)
            metrics = {**optimizer_step(job, step), **(before or {})}
            metrics["seconds"] = time.perf_counter() - begin
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
    indices = job.indices(step)
    rate = job.schedule.get_last_lr()[0]
    if not indices:
        # a turn may have nothing to learn from; without gradients no weight moves
        job.optimizer.step()
        job.schedule.step()
        return {"lr": rate, "tokens": 0}
    add_gradients = _whole_step if job.algorithm.whole_step else _by_micro_batches
    totals, job.memory.state = add_gradients(job, indices, job.seed * 1_000_003 + step)
    norm = job.accelerator.clip_grad_norm_(job.policy.parameters(), job.max_norm)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    job.optimizer.step()
    job.schedule.step()
    job.optimizer.zero_grad()
    metrics = job.algorithm.finish(totals)
    metrics |= {"grad_norm": float(norm), "lr": rate}
    if job.order is None:
        metrics["epoch"] = (step + 1) * job.size / len(job.examples)
    examples = [job.examples[i] for i in indices]
    return metrics | {"tokens": sum(example.tokens for example in examples), "padding": _padding(job, examples)}


def micro_batches(accelerator: Any, examples: Sequence[Example], tokens: int) -> Iterator[tuple[list[int], MicroBatch]]:
    """This rank's share of the examples as forwards: the places of the examples in each, and their tensors.

    No examples mean a forward that is only there so that all ranks have equally many.
    """
    for members in _forwards(examples, tokens, accelerator.num_processes)[accelerator.process_index]:
        yield members, collate([examples[i] for i in members or [0]], accelerator.device)


def _forwards(examples: Sequence[Example], tokens: int, ranks: int) -> list[list[list[int]]]:
    """The places of the examples in each forward of each rank."""
    units = together(examples, tokens)
    lengths = [sum(examples[i].tokens for i in unit) for unit in units]
    return [[[i for unit in chosen for i in units[unit]] for chosen in rank] for rank in plan(lengths, tokens, ranks)]


def _padding(job: Job, examples: Sequence[Example]) -> float:
    """The share of the positions, in the forwards of a step over all ranks, that are there to fill a rectangle."""
    policy = job.accelerator.unwrap_model(job.policy)
    forwards = _forwards(examples, job.tokens, job.accelerator.num_processes)
    found = [
        policy.computed([(len(examples[i].prompt), len(c)) for i in members for c in examples[i].completions])
        for members in itertools.chain(*forwards)
        if members
    ]
    there, computed = (sum(part) for part in zip(*found, strict=True))
    return 1 - there / computed


def _by_micro_batches(job: Job, indices: Sequence[int], seed: int) -> tuple[dict[str, float], State]:
    """The gradient of a loss that is a sum over the examples: forward and backward of each micro-batch."""
    accelerator = job.accelerator
    examples = [job.examples[i] for i in indices]
    batches = list(micro_batches(accelerator, examples, job.tokens))
    drawn = _Drawn(job, examples, seed)
    total: dict[str, Tensor] = {}
    for n, (members, batch) in enumerate(batches):
        with _sync(job, last=n + 1 == len(batches)):
            streams = _streams(job, [indices[i] for i in members or [0]], batch) | drawn.of(members or [0])
            out = job.algorithm(_batch(job, streams, batch, examples, seed), job.memory.state)
            # DDP and FSDP average the ranks' gradients, but the losses already share one denominator
            accelerator.backward(out.loss * (accelerator.num_processes if members else 0))
        _add(total, out.metrics, counts=bool(members))
    return _summed(accelerator, total), job.memory.state


def _whole_step(job: Job, indices: Sequence[int], seed: int) -> tuple[dict[str, float], State]:
    """The gradient of a loss that couples the examples of a step.

    All log-probs of the step first, without a graph; then the loss and its slope at every token; then forward and
    backward of each micro-batch with these slopes. One forward more than a sum takes, unless all is in one micro-batch,
    and exact however the step is divided.
    """
    accelerator = job.accelerator
    examples = [job.examples[i] for i in indices]
    drop = int(job.algorithm.mismatched)
    trained = [e._replace(completions=e.completions[: len(e.completions) - drop]) for e in examples]
    batches = list(micro_batches(accelerator, trained, job.tokens))
    # of one micro-batch the graph is kept, as the backward would make it again
    whole, graphs = _all_streams(job, indices, seed, graph=len(batches) == 1 and not drop)
    policy = whole.streams["policy"].requires_grad_()
    out = job.algorithm(whole, job.memory.state)
    (slopes,) = torch.autograd.grad(out.loss, policy)
    for n, (members, batch) in enumerate(batches):
        with _sync(job, last=n + 1 == len(batches)):
            logprobs = graphs[n] if graphs else job.policy(*policy_inputs(batch))
            of = slopes[places(whole.completions, members or [0], drop)]
            loss = (logprobs * of).sum()
            accelerator.backward(loss * (accelerator.num_processes if members else 0))
    return {name: float(value) for name, value in out.metrics.items()}, out.state


def _sync(job: Job, *, last: bool) -> Any:
    """Under DDP, gradients cross the ranks once, with the last micro-batch."""
    return contextlib.nullcontext() if last else job.accelerator.no_sync(job.policy)


class _Drawn:
    """What the algorithm draws for a step, and each micro-batch's part of it."""

    def __init__(self, job: Job, examples: Sequence[Example], seed: int) -> None:
        self.device = job.accelerator.device
        self.whole = step_layout(examples, torch.device("cpu"))
        self.streams = job.algorithm.draw(self.whole, seed)

    def of(self, members: Sequence[int]) -> dict[str, Tensor]:
        if not self.streams:
            return {}
        at = places(self.whole, members)
        return {name: stream[at].to(self.device) for name, stream in self.streams.items()}


def _streams(job: Job, indices: Sequence[int], batch: MicroBatch) -> dict[str, Tensor]:
    """The streams of a forward."""
    more: dict[str, Any] = {}
    found: dict[str, Tensor] = {}
    if job.reference is not None:
        more["reference_logits"] = job.reference(*policy_inputs(batch)[:3])
        found["reference"] = token_logprobs(more["reference_logits"], batch.targets)
    statistics = job.algorithm.statistics["policy"]
    if statistics:
        more["statistics"] = statistics
    if "allowed" in job.constants:
        more["allowed"] = _constant(job.constants["allowed"], indices, batch)
    if getattr(job.accelerator.unwrap_model(job.policy), "own", None) is not None:
        more["values"] = True
    inputs, candidates = policy_inputs(batch), job.algorithm.candidates(batch.targets, batch.completions)
    if candidates is not None:
        inputs = (*inputs[:3], torch.cat([batch.targets[:, None], candidates], 1))
    out = job.policy(*inputs, **more)
    if isinstance(out, dict):
        found |= {f"policy_{name}": out[name] for name in statistics} | {"policy": out["logprobs"]}
        found |= {name: out[name] for name in ("kl", "values") if name in out}
    else:
        found["policy"] = out
    if candidates is not None:
        found["policy_candidates"], found["policy"] = found["policy"][:, 1:], found["policy"][:, 0]
    found |= {name: _constant(constants, indices, batch) for name, constants in job.constants.items()}
    found |= {column.name: batch.marks[:, n] for n, column in enumerate(_of_level(job, "token", "segment"))}
    return found | {"ids": batch.targets}


def _constant(constants: Constants, indices: Sequence[int], batch: MicroBatch) -> Tensor:
    return torch.cat(interleaved([constants[i] for i in indices])).to(batch.targets.device)


def _of_level(job: Job, *levels: str) -> list[Column]:
    return [column for column in job.algorithm.columns if column.level in levels]


def _batch(job: Job, streams: Mapping[str, Tensor], batch: MicroBatch, examples: Sequence[Example], seed: int) -> Batch:
    """A forward of a step of these examples, as the algorithm sees it."""
    numbers = _numbers(job, batch.numbers, batch.each)
    return Batch(streams, batch.completions, numbers, len(examples), seed, _trained_tokens(examples), job.max_length)


def _trained_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.trained(k)) for example in examples for k in range(len(example.completions)))


def _numbers(job: Job, numbers: Tensor, each: Tensor) -> dict[str, Tensor]:
    parts = (("example", numbers), ("completion", each))
    return {column.name: of[:, n] for level, of in parts for n, column in enumerate(_of_level(job, level))}


def _all_streams(job: Job, indices: Sequence[int], seed: int, *, graph: bool = False) -> tuple[Batch, list[Tensor]]:
    """The streams of all ranks' examples, on every rank; and if asked for, this rank's log-probs with their graphs."""
    accelerator = job.accelerator
    examples = [job.examples[i] for i in indices]
    completions = step_layout(examples, accelerator.device)
    whole: dict[str, Tensor] = {}
    graphs: list[Tensor] = []
    for members, batch in micro_batches(accelerator, examples, job.tokens):
        with torch.set_grad_enabled(graph):
            found = _streams(job, [indices[i] for i in members or [0]], batch)
        if graph:
            graphs.append(found["policy"])
        at = places(completions, members) if members else None
        for name, stream in found.items():
            here = whole.setdefault(name, stream.new_zeros(sum(completions.lengths), *stream.shape[1:]))
            if at is not None:
                here[at] = stream.detach()
    # every place is 0 on all ranks but one
    streams = {name: accelerator.reduce(stream, reduction="sum") for name, stream in whole.items()}
    numbers = _numbers(job, *example_numbers(examples, accelerator.device))
    size = len(examples), seed, _trained_tokens(examples), job.max_length
    return Batch(streams, completions, numbers, *size), graphs


@torch.no_grad()
def evaluate_examples(job: Job, examples: Sequence[Example], constants: Mapping[str, Constants]) -> dict[str, float]:
    """The algorithm's loss and metrics on examples that are not trained on.

    What it computes from a whole step, it computes here from all these examples, and forgets it.
    """
    held_out = Job(**{**vars(job), "examples": examples, "constants": constants})
    everything = range(len(examples))
    if job.algorithm.whole_step:
        out = job.algorithm(_all_streams(held_out, everything, job.seed)[0], job.memory.state)
        return job.algorithm.finish({name: float(value) for name, value in out.metrics.items()})
    total: dict[str, Tensor] = {}
    drawn = _Drawn(held_out, examples, job.seed)
    for members, batch in micro_batches(job.accelerator, examples, job.tokens):
        streams = _streams(held_out, members or [0], batch) | drawn.of(members or [0])
        out = job.algorithm(_batch(held_out, streams, batch, examples, job.seed), job.memory.state)
        _add(total, out.metrics, counts=bool(members))
    return job.algorithm.finish(_summed(job.accelerator, total))


@torch.no_grad()
def constant_streams(
    accelerator: Any,
    model: Any,
    examples: Sequence[Example],
    indices: Sequence[int],
    tokens: int,
    name: str = "reference",
    statistics: tuple[str, ...] = (),
) -> dict[str, Constants]:
    """Streams of the examples' completions under a frozen model, once for the whole run: its log-probs, and statistics.

    One forward per example whatever the number of epochs, and the model need not stay in memory afterwards.

    Args:
        accelerator: devices and processes.
        model: a `Policy`.
        examples, indices: which of them.
        tokens: most of a forward.
        name: of the stream of log-probs; those of statistics are NAME_STATISTIC.
        statistics: as in `Policy.forward`.
    """
    mine: dict[str, dict[int, tuple[Tensor, ...]]] = {n: {} for n in (name, *(f"{name}_{s}" for s in statistics))}
    for members, batch in micro_batches(accelerator, [examples[i] for i in indices], tokens):
        out = model(*policy_inputs(batch), **({"statistics": statistics} if statistics else {}))
        found = {f"{name}_{s}": out[s] for s in statistics} | {name: out["logprobs"] if statistics else out}
        for stream, values in found.items():
            parts = values.cpu().split(list(batch.completions.lengths))
            # of no members there is the forward of one example
            for i, slots in zip(members, batch.completions.slots(), strict=False):
                # clones, because a split keeps the whole forward's storage alive
                mine[stream][indices[i]] = tuple(parts[slot].clone() for slot in slots)
    if accelerator.num_processes == 1:
        return dict(mine)
    from accelerate.utils import gather_object

    return {stream: dict(gather_object(list(values.items()))) for stream, values in mine.items()}


def _add(total: dict[str, Tensor], metrics: Mapping[str, Tensor], *, counts: bool) -> None:
    for name, value in metrics.items():
        total[name] = total.get(name, 0) + (value if counts else 0 * value)


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
