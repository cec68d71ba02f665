"""Sums and rows over the ranks of a process group, where a batch is spread over several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    # a torch without distributed has no such class; True is the default group, None and False are this process alone
    Group = dist.ProcessGroup | bool | None


def _process_group(group: Group) -> Any:
    if group is not True and not hasattr(group, "group_name"):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this rank belongs to, True for the default "
            f"one, or None, got {type(group).__name__}"
        )
    return None if group is True else group


def summed_over(values: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, without gradient."""
    if group is not None and group is not False:
        values = values.detach().clone()
        dist.all_reduce(values, group=_process_group(group))
    return values


def gathered(values: Tensor, group: Group) -> tuple[Tensor, int]:
    """All ranks' rows, of which each may have another number, and where ours begin.

    The gradient of a row is the sum of what all ranks make of it, and goes to the rank whose row it is: where one rank
    runs a backward through it, all must.
    """
    if group is None or group is False:
        return values, 0
    of = _process_group(group)
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size(of))]
    dist.all_gather(counts, count, group=of)
    sizes, rank = [int(n) for n in counts], dist.get_rank(of)
    if not any(sizes):
        return values, 0
    return _Gather.apply(values, sizes, rank, of), sum(sizes[:rank])


class _Gather(torch.autograd.Function):
    """Our rows to all ranks' rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: list[int], rank: int, group: Any) -> Tensor:
        ctx.place = sizes, rank, group
        # backends want parts of one size
        padded = values.new_zeros((max(sizes), *values.shape[1:]))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Scatter.apply(grads[0], *ctx.place), None, None, None


class _Scatter(torch.autograd.Function):
    """The sum over the ranks, of which each keeps its own rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: list[int], rank: int, group: Any) -> Tensor:
        ctx.place = sizes, rank, group
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(sizes)[rank].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Gather.apply(grads[0], *ctx.place), None, None, None
