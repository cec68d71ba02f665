"""What the loop and an algorithm say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor


class Completions(NamedTuple):
    """Where the completions of a micro-batch lie in its packed log-probs.

    Of a data kind with k completions per example, all the first ones come first, then all the second ones.

    Attributes:
        lengths: tokens of every completion, on the host.
        cu_seqlens: int32 (len(lengths) + 1,), their running sum, on the device.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor


class StepOutput(NamedTuple):
    """What one micro-batch adds to the step.

    Attributes:
        loss: scalar to differentiate, its denominator the number of examples in the whole step.
        metrics: detached scalars with the same denominator, so that micro-batches and ranks add up.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Algorithm(Protocol):
    """A training method.

    Attributes:
        name: as on the command line.
        kind: the data it eats, as in the registry ("pairwise": a chosen and a rejected completion).
        models: whose log-probs it needs, "policy" first.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def models(self) -> tuple[str, ...]: ...

    def __call__(self, logprobs: Mapping[str, Tensor], completions: Completions, num_items: int) -> StepOutput:
        """The loss of one micro-batch.

        Args:
            logprobs: for every model, the packed (N,) log-probs of all completion tokens.
            completions: where each completion lies in them.
            num_items: examples in the whole step, over micro-batches and ranks.
        """
        ...
