"""Which examples go into a step, a rank and a forward, and the packed tensors of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from fastpo.algorithms import Completions
from fastpo.kernels.packing import balance, pack
from fastpo.training.data import Example
from fastpo.training.errors import UserError

T = TypeVar("T")


def step_indices(step: int, size: int, count: int, seed: int) -> list[int]:
    """The examples of a step: `size` of the endless row of epochs, each a new permutation of `count`.

    It depends on nothing but its arguments, so that a resumed run needs only the number of the step.
    """
    out: list[int] = []
    while len(out) < size:
        epoch, start = divmod(step * size + len(out), count)
        out += _epoch(count, seed, epoch)[start : start + size - len(out)]
    return out


def stage(step: int, steps: int, stages: int) -> int:
    """In which of `stages` equal parts of the run a step is; what comes after the run, in the last."""
    return min(step * stages // steps, stages - 1)


def staged_indices(step: int, steps: int, size: int, count: int, seed: int, stages: int) -> list[int]:
    """The examples of a step where each stage of the run has a part of them, in their order: `step_indices` of it."""
    now = stage(step, steps, stages)
    # the first step of a stage is the first whose share reaches it, and so are its examples
    first, begin, end = (-(-k * n // stages) for k, n in ((now, steps), (now, count), (now + 1, count)))
    return [begin + i for i in step_indices(step - first, size, end - begin, seed + now)]


@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def plan(lengths: Sequence[int], budget: int, ranks: int) -> list[list[list[int]]]:
    """Distribute items over ranks and forwards: `plan(...)[rank][forward]` are positions in `lengths`.

    Every rank gets the same number of forwards, as sharded models need. Where that takes more forwards than
    there are items, some are empty; never if the number of items is a multiple of `ranks`.
    """
    bins = pack(lengths, budget)
    while len(bins) % ranks:
        widest = max(bins, key=lambda b: (len(b) > 1, sum(lengths[i] for i in b)))
        if len(widest) < 2:
            bins.append([])
            continue
        bins.remove(widest)
        halves = balance([lengths[i] for i in widest], 2)
        bins += [[widest[i] for i in half] for half in halves]
    totals = [sum(lengths[i] for i in b) for b in bins]
    return [[bins[i] for i in share] for share in balance(totals, ranks, equal_size=True)]


def together(examples: Sequence[Example], budget: int) -> list[list[int]]:
    """The positions of the examples, those of one prompt together as far as the budget allows.

    In one forward the prompt is computed once, see `fastpo.training.layouts`.
    """
    open_units: dict[tuple[int, ...], list[int]] = {}
    room: dict[tuple[int, ...], int] = {}
    out: list[list[int]] = []
    for i, example in enumerate(examples):
        prompt = tuple(example.prompt)
        if prompt not in room or room[prompt] < example.tokens:
            open_units[prompt], room[prompt] = [], budget
            out.append(open_units[prompt])
        open_units[prompt].append(i)
        room[prompt] -= example.tokens
    return out


def check_budget(examples: Sequence[Example], budget: int, name: str) -> None:
    """Raise UserError if one example does not fit into a forward."""
    longest = max(range(len(examples)), key=lambda i: examples[i].tokens)
    if examples[longest].tokens > budget:
        raise UserError(
            f"{name}, row {examples[longest].row}: the example has {examples[longest].tokens:,} tokens, "
            f"which is more than --batch.tokens {budget:,}"
        )


@dataclass(frozen=True)
class MicroBatch:
    """One forward: all sequences in one row, first all first completions with their prompts, and so on.

    Attributes:
        input_ids: (N,).
        position_ids: (N,), restarting at 0 with every sequence.
        predictors: (n,) positions in the row whose logits predict a completion token that is trained on.
        targets: (n,) those tokens.
        completions: how the n tokens fall into completions.
        numbers: (examples, columns) what the data say of each beside.
        each: (completions, columns) what they say of each completion.
        marks: (n, columns) what they say of each token, in single precision like its log-prob.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    completions: Completions
    numbers: Tensor
    each: Tensor
    marks: Tensor


def interleaved(rows: Sequence[Sequence[T]]) -> list[T]:
    """All first entries of the rows, then all second ones of those that have a second one, and so on."""
    return [row[k] for k in range(max(map(len, rows), default=0)) for row in rows if k < len(row)]


def collate(examples: Sequence[Example], device: torch.device) -> MicroBatch:
    """The packed tensors of some examples."""
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    marks: list[tuple[float, ...]] = []
    for example, k in interleaved([[(example, k) for k in range(len(example.completions))] for example in examples]):
        completion, trained = example.completions[k], example.trained(k)
        first = len(ids) + len(example.prompt) - 1
        predictors += [first + i for i in trained]
        ids += example.prompt + completion
        positions += range(len(example.prompt) + len(completion))
        targets += [completion[i] for i in trained]
        marks += [example.marks[k][i] if example.marks else () for i in trained]
    return MicroBatch(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(predictors, device=device),
        torch.tensor(targets, device=device),
        step_layout(examples, device),
        *example_numbers(examples, device),
        torch.tensor(marks, dtype=torch.float32).to(device),
    )


def example_numbers(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """What the data say of each example and of each completion, fp64 (examples, columns), (completions, columns)."""
    numbers = torch.tensor([example.numbers for example in examples], dtype=torch.float64)
    each = torch.tensor(interleaved([example.each for example in examples]), dtype=torch.float64)
    return numbers.to(device), each.to(device)


def step_layout(examples: Sequence[Example], device: torch.device) -> Completions:
    """The completions of all examples of a step as one micro-batch would have them."""
    lengths = interleaved([[len(e.trained(k)) for k in range(len(e.completions))] for e in examples])
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
    return Completions(tuple(lengths), ends, tuple(len(example.completions) for example in examples))


def places(whole: Completions, positions: Sequence[int], drop: int = 0) -> Tensor:
    """Where the tokens of some examples stand among those of the step, in the order in which `collate` has them.

    Args:
        whole: the layout of the step.
        positions: of the examples among them.
        drop: so many completions at the end of each are left out.
    """
    starts = [0, *accumulate(whole.lengths)]
    slots = whole.slots()
    kept = interleaved([slots[position][: len(slots[position]) - drop] for position in positions])
    found = [torch.arange(starts[slot], starts[slot + 1]) for slot in kept]
    return torch.cat(found).to(whole.cu_seqlens.device)
