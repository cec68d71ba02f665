"""What the loop and an algorithm say to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

Hyper = Mapping[str, float | bool | str | None]
# what an algorithm remembers of the steps before, by name; saved with checkpoints
State = dict[str, Tensor]


class Completions(NamedTuple):
    """Where the completions of a batch lie in its packed log-probs.

    Of a data kind with k completions per example, all the first ones come first, then all the second ones.

    Attributes:
        lengths: tokens of every completion, on the host.
        cu_seqlens: int32 (len(lengths) + 1,), their running sum, on the device.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor


class Column(NamedTuple):
    """A number that the data give for every example.

    Attributes:
        name: of the column.
        boolean: whether it is a label.
        default: where the data have no such column; None if they must.
        category: whether it names something, by a string or an integer, whose number is its place among the names.
    """

    name: str
    boolean: bool = False
    default: float | None = None
    category: bool = False


class Batch(NamedTuple):
    """What an algorithm sees of some examples: those of one forward, or of the whole step.

    Attributes:
        streams: packed (N,) numbers of all completion tokens, by name: "policy" and "reference" are log-probs, a
            statistic of a model's distributions is MODEL_STATISTIC, "kl" is KL(reference || policy), and the others
            are what `Algorithm.draw` gave.
        completions: where each completion lies in them.
        numbers: (B,) numbers of the examples, by column.
        num_items: examples in the whole step, over forwards and ranks.
        seed: of what is drawn for this step.
    """

    streams: Mapping[str, Tensor]
    completions: Completions
    numbers: Mapping[str, Tensor]
    num_items: int
    seed: int


class StepOutput(NamedTuple):
    """What a batch adds to the step.

    Attributes:
        loss: scalar to differentiate, its denominator the number of examples in the whole step.
        metrics: detached scalars with the same denominator, so that micro-batches and ranks add up.
        state: what is to be remembered.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    state: State


class Algorithm(Protocol):
    """A training method.

    Attributes:
        name: as on the command line.
        kind: the data it eats, as in the registry ("pairwise": a chosen and a rejected completion; "unpaired": one).
        models: whose log-probs it needs, "policy" first.
        columns: the numbers that it needs of every example.
        statistics: by model, what it needs of the distributions beside log-probs.
        divergence: whether it needs KL(reference || policy) at every token, through which a gradient flows.
        mismatched: whether each example has, as a further completion that is not trained on, that of another prompt.
        unlearns: whether it takes all its data for undesirable.
        whole_step: whether its loss couples the examples of a step, so that it must see all of them at once.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def models(self) -> tuple[str, ...]: ...

    @property
    def columns(self) -> tuple[Column, ...]: ...

    @property
    def statistics(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def divergence(self) -> bool: ...

    @property
    def mismatched(self) -> bool: ...

    @property
    def unlearns(self) -> bool: ...

    @property
    def whole_step(self) -> bool: ...

    def problem(self, numbers: Sequence[Sequence[float]]) -> tuple[int, str] | None:
        """The first example (one number per column) that the loss would refuse, and why."""
        ...

    def draw(self, completions: Completions, seed: int) -> dict[str, Tensor]:
        """Streams that are drawn anew for every step, for all its completions, on the CPU."""
        ...

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        """The loss of a batch: of the whole step if `whole_step`, else of any part of it."""
        ...

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The step's metrics from the sums of `StepOutput.metrics` over its batches."""
        ...
