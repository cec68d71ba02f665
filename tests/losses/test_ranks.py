"""The statistics of the batch over two processes are those of one process with both batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastpo import losses


def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """Two log-probs and a label per row; the first half has one class alone, and a negative mean."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    return policy + torch.tensor([-1.0] * 4 + [2.0] * 4), reference, torch.arange(8) >= 4


def statistics(rows: slice, group: bool) -> list[Tensor]:
    policy, reference, labels = (t[rows] for t in numbers())
    margins = policy - reference
    generator = torch.Generator().manual_seed(1)
    of_beta = losses.beta_dpo_statistics(margins, generator=generator, process_group=group)
    return [
        losses.kto_kl(policy, reference, process_group=group),
        losses.bco_delta(margins, labels, process_group=group),
        *losses.alpha_dpo_statistics(margins, process_group=group),
        of_beta.batch_beta,
        *of_beta.moments,
        of_beta.keep,
    ]


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(statistics(slice(4 * rank, 4 * rank + 4), True), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")
def test_two_ranks(tmp_path: Path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    whole = statistics(slice(None), False)
    for place, want in enumerate(whole[:-1]):
        for found in ranks:
            torch.testing.assert_close(found[place], want, rtol=1e-14, atol=1e-15)
    # a rank keeps its own rows of the draw
    assert torch.equal(torch.cat([found[-1] for found in ranks]), whole[-1])
    # a mean of means that were clamped on each rank would be another number
    policy, reference, _ = numbers()
    clamped = sum(losses.kto_kl(policy[a : a + 4], reference[a : a + 4]) for a in (0, 4)) / 2
    assert abs(clamped - whole[0]) > 0.1
