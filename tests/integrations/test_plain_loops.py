"""A training loop of one's own: DPO on hidden states, against the same loop in plain torch.

What has its test elsewhere: PEFT's adapters on a head, autocast of a head and torch.compile of each function in
tests/kernels; the trainer under DDP and FSDP2 in tests/training/test_processes.py; a vocabulary over a process group in
tests/kernels/test_linear_logprobs_sharded.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastpo
from fastpo import losses

pytestmark = pytest.mark.once

VOCAB, SIZE, PAIRS, LENGTH, RANKS = 37, 16, 4, 7, 2


class Batch(NamedTuple):
    """Chosen above rejected; targets are shifted, -100 where nothing counts."""

    ids: Tensor
    targets: Tensor
    reference: Tensor

    def part(self, rows: slice) -> Batch:
        """Some of the pairs."""
        sides = [t.unflatten(0, (2, -1))[:, rows].flatten(0, 1) for t in self]
        return Batch(*sides)


def make() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2 * PAIRS, LENGTH + 1), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (2 * PAIRS, 1), generator=generator)
    positions = torch.arange(LENGTH)
    targets = ids[:, 1:].masked_fill((positions >= lengths) | (positions < 1), -100)
    return Batch(ids[:, :-1], targets, -10 * torch.rand(2 * PAIRS, generator=generator))


def by_ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return fastpo.linear_logprobs(hidden, weight, targets)


def by_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logs = (hidden @ weight.T).float().log_softmax(-1)
    return logs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (targets >= 0)


class Model(nn.Module):
    """The head is inside `forward`, where wrappers see it."""

    def __init__(self, score: Callable[..., Tensor] = by_ours, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score, self.checkpointed = score, ""
        self.embedding = nn.Embedding(VOCAB, SIZE)
        self.body = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
        self.head = nn.Linear(SIZE, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.body(self.embedding(ids))
        if not self.checkpointed:
            return self.score(hidden, self.head.weight, targets)
        how = {"use_reentrant": self.checkpointed == "reentrant"}
        return checkpoint(self.score, hidden, self.head.weight, targets, **how)  # type: ignore[return-value]


def loss_of(model: Any, batch: Batch, **more: Any) -> Tensor:
    chosen, rejected = model(batch.ids, batch.targets).chunk(2)
    masks = dict(zip(("chosen_mask", "rejected_mask"), (batch.targets >= 0).chunk(2), strict=True))
    reference = [r.unsqueeze(1).expand_as(chosen) / LENGTH for r in batch.reference.chunk(2)]
    return losses.dpo(chosen, rejected, *reference, **masks, **more).loss


def plain_loss(model: Any, batch: Batch) -> Tensor:
    counted = batch.targets >= 0
    reference = (batch.reference.unsqueeze(1) / LENGTH * counted).sum(1)
    chosen, rejected = (model(batch.ids, batch.targets).sum(1) - reference).chunk(2)
    return -nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def grads_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def wanted(tied: bool = False) -> list[Tensor]:
    model = Model(by_torch, tied)
    plain_loss(model, make()).backward()
    return grads_of(model)


def check(found: list[Tensor], want: list[Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """fp32 sums of 37 logits and 56 tokens."""
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_loop(tied):
    model = Model(tied=tied)
    loss_of(model, make()).backward()
    check(grads_of(model), wanted(tied))


def test_autocast():
    """bf16 in the products, fp32 in log-probs, loss and gradients: as far from fp32 as torch's own loop, twice."""
    errors = {}
    for name, score, loss in (("ours", by_ours, loss_of), ("torch", by_torch, plain_loss)):
        model = Model(score)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model, make())
        assert value.dtype == torch.float32
        value.backward()
        assert {g.dtype for g in grads_of(model)} == {torch.float32}
        pairs = zip(grads_of(model), wanted(), strict=True)
        errors[name] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    assert errors["ours"] < 2 * errors["torch"]


def test_compile():
    """The whole step in one graph."""
    torch._dynamo.reset()
    model = Model()
    step = torch.compile(lambda batch: loss_of(model, Batch(*batch)), fullgraph=True, backend="aot_eager")
    step(tuple(make())).backward()
    check(grads_of(model), wanted())


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_activation_checkpointing(how):
    """Computed again, with the same bits."""
    models = Model(), Model()
    models[1].checkpointed = how
    for model in models:
        loss_of(model, make()).backward()
    for a, b in zip(*map(grads_of, models), strict=True):
        assert torch.equal(a, b)


def test_gradient_accumulation():
    """Micro-batches of unlike size, each with the denominator of the whole."""
    model, batch = Model(), make()
    for rows in (slice(0, 1), slice(1, PAIRS)):
        loss_of(model, batch.part(rows), num_items=PAIRS).backward()
    check(grads_of(model), wanted())


def test_second_backward():
    """A retained graph gives the same again, by any upstream gradient."""
    model = Model()
    loss = loss_of(model, make())
    loss.backward(retain_graph=True)
    once = [g.clone() for g in grads_of(model)]
    model.zero_grad()
    (3 * loss).backward()
    check(grads_of(model), [3 * g for g in once])


def test_penalty_on_the_gradient():
    """create_graph through head and loss."""
    found = []
    for score, loss in ((by_ours, loss_of), (by_torch, plain_loss)):
        model = Model(score)
        grads = torch.autograd.grad(loss(model, make()), list(model.parameters()), create_graph=True)
        torch.stack([g.square().sum() for g in grads]).sum().backward()
        found.append(grads_of(model))
    check(*found, rtol=1e-4)


def test_lora():
    """PEFT's adapter on the head, and on the body, trained through both."""
    peft = pytest.importorskip("peft")

    def adapted(head: Any, x: Tensor, targets: Tensor) -> Tensor:
        ours = fastpo.kernels.completions.head_of(head)
        return fastpo.linear_logprobs(x, ours.weight, targets, ours.bias, lora=ours.lora)

    class Adapted(Model):
        def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
            hidden = self.body(self.embedding(ids))
            if self.score is by_ours:
                return adapted(self.head, hidden, targets)
            logs = self.head(hidden).log_softmax(-1)
            return logs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (targets >= 0)

    found = []
    for score, loss in ((by_ours, loss_of), (by_torch, plain_loss)):
        config = peft.LoraConfig(r=3, target_modules=["head", "body.0"], init_lora_weights=False)
        torch.manual_seed(3)
        model = peft.get_peft_model(Adapted(score), config)
        loss(model, make()).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    check(*found)


def ddp() -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(Model())
    half = PAIRS // RANKS
    loss_of(model, make().part(slice(dist.get_rank() * half, (dist.get_rank() + 1) * half))).backward()
    check(grads_of(model.module), wanted())


def fsdp2() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (RANKS,)), Model()
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    half = PAIRS // RANKS
    loss_of(model, make().part(slice(dist.get_rank() * half, (dist.get_rank() + 1) * half))).backward()
    check(grads_of(model), wanted())


def gathered_head() -> None:
    """As under ZeRO-3: each rank has a share of the head's rows and other tokens, and gathers the head for its use."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    model = Model()
    share = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Shard(0)]))

    def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return fastpo.linear_logprobs(hidden, share.full_tensor(grad_placements=[Partial()]), targets)

    model.score = score
    half = PAIRS // RANKS
    rows = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    loss_of(model, make().part(rows), num_items=PAIRS).backward()
    assert isinstance(share.grad, DTensor) and share.grad.to_local().shape[0] < VOCAB
    # the head is the last of the parameters
    check([share.grad.full_tensor()], wanted()[-1:])
    # without gathering, the ranks' tokens differ
    model.score = lambda hidden, weight, targets: fastpo.linear_logprobs(hidden, share, targets)
    with pytest.raises(ValueError, match="has to be gathered"):
        loss_of(model, make().part(rows))


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=store)
    for case in (ddp, fsdp2, gathered_head):
        case()
        Path(folder, f"{case.__name__}-{rank}").touch()
    dist.destroy_process_group()


def test_several_processes(tmp_path):
    """DDP, FSDP2 and a head that is gathered, in two processes."""
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=RANKS)
    assert len(list(tmp_path.glob("*-*"))) == 3 * RANKS
