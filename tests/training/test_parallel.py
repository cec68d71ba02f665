"""The policy under DDP and FSDP2, two gloo processes: the gradients of one."""

from __future__ import annotations

import os
import traceback

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastpo.training.batches import MicroBatch, collate
from fastpo.training.data import Example
from fastpo.training.model import Policy, Scores, policy_inputs
from fastpo.training.scorers import Combined, Part, Sample

from .conftest import tiny_model, tiny_reward_model

RANKS = 2
EXAMPLES = [
    Example([1, 2, 3], ([4, 5], [6])),
    Example([7], ([8], [9, 10, 11, 12])),
    Example([3, 2], ([1, 0, 5], [4])),
    Example([5, 5, 5, 5], ([2, 7, 1], [13, 4, 4])),
]


def batch_of(examples: list[Example]) -> MicroBatch:
    return collate(examples, torch.device("cpu"))


def loss_of(policy: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """Not symmetric in the tokens, and the same function of an example wherever it is."""
    return (policy(*policy_inputs(batch)) * (batch.targets + 1)).sum()


def build(tied: bool, adapted: bool) -> Policy:
    model = tiny_model(20, tied=tied)
    if adapted:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    return Policy(model)


def one_process(tied: bool, adapted: bool) -> dict[str, Tensor]:
    policy = build(tied, adapted)
    loss_of(policy, batch_of(EXAMPLES)).backward()
    return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


def wrapped(policy: Policy, how: str) -> torch.nn.Module:
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(policy)
    from fastpo.training.parallel import _sharded

    whole = sum(p.numel() for p in policy.parameters())
    runs = _sharded(policy, "cpu")
    # nothing is left whole, and a layer is gathered apart from the others
    held = sum(p.to_local().numel() for p in policy.parameters())
    assert whole / RANKS <= held < 0.6 * whole
    layers = policy.model.get_base_model() if hasattr(policy.model, "get_base_model") else policy.model
    assert all(isinstance(layer, FSDPModule) for layer in layers.model.layers)
    return runs


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]), use_cache=False).logits


def check(how: str, tied: bool, adapted: bool) -> None:
    want = one_process(tied, adapted)
    policy = build(tied, adapted)
    logits = policy.inside(logits_of)
    runs = wrapped(policy, how)
    rank = dist.get_rank()
    # also before the first forward of the wrapper, and with layers whose shards are gathered one by one
    assert torch.allclose(policy.inside(logits_of), logits, rtol=1e-5, atol=1e-5)
    for _ in range(2):  # the second time after a forward and a backward of the wrapper
        runs.zero_grad()
        # the gradients of the ranks are averaged
        (loss_of(runs, batch_of(EXAMPLES[rank::RANKS])) * RANKS).backward()
        found = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        assert found.keys() == want.keys()
        for name, grad in found.items():
            full = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            assert torch.allclose(full, want[name], rtol=1e-4, atol=1e-5 * want[name].abs().max()), (how, name)
        assert torch.allclose(policy.inside(logits_of), logits, rtol=1e-5, atol=1e-5)
        assert how == "ddp" or all(hasattr(p, "full_tensor") for p in policy.parameters())


def check_scores(how: str) -> None:
    """Two reward models, of which each sequence trains one."""

    def build() -> Scores:
        return Scores([tiny_reward_model(20, seed) for seed in (0, 1)])

    def loss_of(scores: torch.nn.Module, batch: MicroBatch) -> Tensor:
        streams = torch.stack([*scores(*policy_inputs(batch), statistics=("1",)).values()])
        return (streams.gather(0, batch.targets[None] % 2)[0] * (batch.targets + 1)).sum()

    alone, scores = build(), build()
    loss_of(alone, batch_of(EXAMPLES)).backward()
    if how == "ddp":
        runs: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(scores)
    else:
        from fastpo.training.parallel import _sharded

        runs = _sharded(scores, "cpu")
        assert all(isinstance(layer, FSDPModule) for model in scores.models for layer in model.model.layers)
    (loss_of(runs, batch_of(EXAMPLES[dist.get_rank() :: RANKS])) * RANKS).backward()
    for (name, found), want in zip(scores.named_parameters(), alone.parameters(), strict=True):
        full = found.grad.full_tensor() if hasattr(found.grad, "full_tensor") else found.grad
        assert torch.allclose(full, want.grad, rtol=1e-4, atol=1e-5 * want.grad.abs().max()), (how, name)


def rewards_of_all_ranks() -> None:
    """What is combined by its mean, is by that of the samples of all ranks; the second one has a single sample."""
    rank = dist.get_rank()
    given = {"a": [[5.0, 7.0], [0.0]], "b": [[1.0, 2.0], [12.0]]}
    parts = [Part(name, lambda samples, of=of: of[rank][: len(samples)]) for name, of in given.items()]
    samples = [Sample("", "", [], [], True, {})] * (2 - rank)
    least = Combined(parts, "min", process_group=True)
    assert least(samples) == given["a"][rank] and least.means == {"a": 4.0, "b": 5.0}
    # of the first rank's alone it is the other one
    assert Combined(parts, "min")(samples) == given["ba"[rank]][rank]
    found = torch.tensor(Combined(parts, "normalized", process_group=True)(samples), dtype=torch.float64)
    whole = [torch.tensor([*of[0], *of[1]], dtype=torch.float64) for of in given.values()]
    expected = sum((v - v.mean()) / v.std() for v in whole)
    assert torch.allclose(found, expected[:2] if rank == 0 else expected[2:], atol=1e-6)
    # a rank without samples takes part
    alone = Combined(parts, "min", process_group=True)
    assert alone(samples if rank == 0 else []) == (given["b"][0] if rank == 0 else [])
    assert alone.means == {"a": 6.0, "b": 1.5}


def sharded_outside_the_forward() -> None:
    """A head that FSDP2 has sharded is not taken for one whose vocabulary is: the ranks have different rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import fastpo

    head = fully_shard(torch.nn.Linear(16, 20, bias=False), mesh=init_device_mesh("cpu", (RANKS,)))
    try:
        fastpo.linear_logprobs(torch.zeros(3, 16), head.weight, torch.tensor([1, 2, 3]) + dist.get_rank())
    except ValueError as error:
        assert "inside the forward of the module that was wrapped" in str(error)
    else:
        raise AssertionError("no error")


CASES = [
    (how, tied, adapted) for how in ("ddp", "fsdp2") for tied, adapted in ((False, False), (True, False), (False, True))
]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        for case in CASES:
            check(*case)
        for how in ("ddp", "fsdp2"):
            check_scores(how)
        rewards_of_all_ranks()
        sharded_outside_the_forward()
        with open(f"{folder}/{rank}", "w") as done:
            done.write("all")
    except BaseException:
        traceback.print_exc()
        # the other rank may be waiting for this one
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_as_one(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=RANKS)
    assert [(tmp_path / str(rank)).read_text() for rank in range(RANKS)] == ["all"] * RANKS
