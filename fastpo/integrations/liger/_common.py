"""What Liger's losses share: modules that keep their options, and log-probs of whole completions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpo import linear_logprobs


class Fused(nn.Module):
    """A function with its options kept, as attributes of Liger's names.

    The constructor of a subclass has Liger's signature, and passes its `locals()` on.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self._names = [name for name in given if name not in ("self", "__class__")]
        for name in self._names:
            setattr(self, name, given[name])

    @property
    def options(self) -> dict[str, Any]:
        """As they are now, by name."""
        return {name: getattr(self, name) for name in self._names}


def reduced(logprobs: Tensor, valid: Tensor, average: bool) -> Tensor:
    """(B,): sums of token log-probs, which are 0 where nothing counts, or means."""
    sums = logprobs.sum(-1)
    return sums / valid.sum(-1).clamp(min=1) if average else sums


@torch.no_grad()
def sum_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of all positions and tokens, without the logits: (Σ hidden) · (Σ weight) + N Σ bias."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    total = rows.sum(0, dtype=torch.float32) @ weight.sum(0, dtype=torch.float32)
    return total if bias is None else total + len(rows) * bias.float().sum()


@torch.no_grad()
def of_reference(
    hidden: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    average: bool,
) -> Tensor:
    """(B,): what `reduced` gives of the reference model."""
    if hidden is None or weight is None:
        raise ValueError("use_ref_model=True needs ref_input and ref_weight")
    per_token = linear_logprobs(hidden, weight, target, bias, ignore_index=ignore_index)
    return reduced(per_token, target != ignore_index, average)
