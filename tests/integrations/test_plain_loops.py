"""Loops of one's own, against the same loops in plain torch: DPO on hidden states, PPO and distillation on logits.

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
from fastpo.kernels.completions import head_of

pytestmark = pytest.mark.once

VOCAB, SIZE, PAIRS, LENGTH, RANKS = 37, 16, 4, 7, 2


class Batch(NamedTuple):
    """Chosen above rejected; targets are shifted, -100 where nothing counts."""

    ids: Tensor
    targets: Tensor
    reference: Tensor
    old: Tensor
    teacher: Tensor

    @property
    def counts(self) -> Tensor:
        return self.targets >= 0

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
    reference = -10 * torch.rand(2 * PAIRS, generator=generator)
    # near the first policy's, so that some ratios are clipped and some are not
    old = -3.6 + 0.5 * torch.randn(2 * PAIRS, LENGTH, generator=generator)
    teacher = torch.randn(2 * PAIRS, LENGTH, VOCAB, generator=generator)
    return Batch(ids[:, :-1], targets, reference, old, teacher)


# the head as a module, or its weight
Head = Any
Score = Callable[[Head, Tensor, Batch], Tensor]


def logits_of(head: Head, hidden: Tensor) -> Tensor:
    return head(hidden) if isinstance(head, nn.Module) else nn.functional.linear(hidden, head)


def log_softmax(head: Head, hidden: Tensor) -> Tensor:
    return logits_of(head, hidden).float().log_softmax(-1)


def chosen(logs: Tensor, batch: Batch) -> Tensor:
    return logs.gather(-1, batch.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * batch.counts


class Loop(NamedTuple):
    """A number per token from the head, and the loss of them, by ours and by torch.

    `items` is what the loss is divided by, of the whole batch.
    """

    score: Score
    loss: Callable[[Tensor, Batch, int | None], Tensor]
    torch_score: Score
    torch_loss: Callable[[Tensor, Batch], Tensor]
    items: Callable[[Batch], int]


def linear_score(head: Head, hidden: Tensor, batch: Batch) -> Tensor:
    found = head_of(head)
    return fastpo.linear_logprobs(hidden, found.weight, batch.targets, found.bias, lora=found.lora)


def dpo(logprobs: Tensor, batch: Batch, items: int | None) -> Tensor:
    win, lose = logprobs.chunk(2)
    masks = dict(zip(("chosen_mask", "rejected_mask"), batch.counts.chunk(2), strict=True))
    reference = [r.unsqueeze(1).expand_as(win) / LENGTH for r in batch.reference.chunk(2)]
    return losses.dpo(win, lose, *reference, **masks, num_items=items).loss


def torch_dpo(logprobs: Tensor, batch: Batch) -> Tensor:
    reference = (batch.reference.unsqueeze(1) / LENGTH * batch.counts).sum(1)
    win, lose = (logprobs.sum(1) - reference).chunk(2)
    return -nn.functional.logsigmoid(0.1 * (win - lose)).mean()


def ppo(logprobs: Tensor, batch: Batch, items: int | None) -> Tensor:
    return losses.ppo(logprobs, batch.reference + 5, batch.old, mask=batch.counts, num_items=items).loss


def torch_ppo(logprobs: Tensor, batch: Batch) -> Tensor:
    ratio, a = (logprobs - batch.old).exp(), batch.reference.unsqueeze(1) + 5
    each = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    return each[batch.counts].mean()


def kl_score(head: Head, hidden: Tensor, batch: Batch) -> Tensor:
    logits = logits_of(head, hidden)
    return fastpo.token_kl(logits, batch.teacher.to(logits.dtype), mask=batch.counts)


def torch_kl_score(head: Head, hidden: Tensor, batch: Batch) -> Tensor:
    p = batch.teacher.log_softmax(-1)
    return (p.exp() * (p - log_softmax(head, hidden))).sum(-1) * batch.counts


def over_tokens(each: Tensor, batch: Batch, items: int | None = None) -> Tensor:
    return each.sum() / (items or batch.counts.sum())


LOOPS = {
    "pairs": Loop(
        linear_score,
        dpo,
        lambda head, hidden, batch: chosen(log_softmax(head, hidden), batch),
        torch_dpo,
        lambda batch: PAIRS,
    ),
    "policy": Loop(
        lambda head, hidden, batch: fastpo.token_logprobs(logits_of(head, hidden), batch.targets),
        ppo,
        lambda head, hidden, batch: chosen(log_softmax(head, hidden), batch),
        torch_ppo,
        lambda batch: int(batch.counts.sum()),
    ),
    "distillation": Loop(kl_score, over_tokens, torch_kl_score, over_tokens, lambda batch: int(batch.counts.sum())),
}
every = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)


class Model(nn.Module):
    """The head is inside `forward`, where wrappers see it; with `whole` as a module, which may be an adapter's."""

    def __init__(self, score: Score, tied: bool = False, whole: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score, self.checkpointed, self.whole = score, "", whole
        self.embedding = nn.Embedding(VOCAB, SIZE)
        self.body = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
        self.head = nn.Linear(SIZE, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.body(self.embedding(batch.ids))
        head = self.head if self.whole else self.head.weight
        if not self.checkpointed:
            return self.score(head, hidden, batch)
        how = {"use_reentrant": self.checkpointed == "reentrant"}
        return checkpoint(self.score, head, hidden, batch, **how)  # type: ignore[return-value]


def loss_of(loop: Loop, model: Any, batch: Batch, items: int | None = None) -> Tensor:
    return loop.loss(model(batch), batch, items)


def torch_loss_of(loop: Loop, model: Any, batch: Batch) -> Tensor:
    return loop.torch_loss(model(batch), batch)


def grads_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def wanted(loop: Loop, tied: bool = False) -> list[Tensor]:
    model = Model(loop.torch_score, tied)
    torch_loss_of(loop, model, make()).backward()
    return grads_of(model)


def check(found: list[Tensor], want: list[Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """fp32 sums of 37 logits and 56 tokens."""
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@every
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_loop(loop, tied):
    model = Model(loop.score, tied)
    loss_of(loop, model, make()).backward()
    check(grads_of(model), wanted(loop, tied))


@every
def test_autocast(loop):
    """bf16 in the products, fp32 in log-probs, loss and gradients: as far from fp32 as torch's own loop, twice."""
    errors = {}
    for name, score, loss in (("ours", loop.score, loss_of), ("torch", loop.torch_score, torch_loss_of)):
        model = Model(score)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(loop, model, make())
        assert value.dtype == torch.float32
        value.backward()
        assert {g.dtype for g in grads_of(model)} == {torch.float32}
        pairs = zip(grads_of(model), wanted(loop), strict=True)
        errors[name] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    assert errors["ours"] < 2 * errors["torch"]


@every
def test_compile(loop):
    """The whole step in one graph."""
    torch._dynamo.reset()
    model = Model(loop.score)
    step = torch.compile(lambda batch: loss_of(loop, model, Batch(*batch)), fullgraph=True, backend="aot_eager")
    step(tuple(make())).backward()
    check(grads_of(model), wanted(loop))


@every
@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_activation_checkpointing(loop, how):
    """Computed again, with the same bits."""
    models = Model(loop.score), Model(loop.score)
    models[1].checkpointed = how
    for model in models:
        loss_of(loop, model, make()).backward()
    for a, b in zip(*map(grads_of, models), strict=True):
        assert torch.equal(a, b)


@every
def test_gradient_accumulation(loop):
    """Micro-batches of unlike size, each with the denominator of the whole."""
    model, batch = Model(loop.score), make()
    for rows in (slice(0, 1), slice(1, PAIRS)):
        loss_of(loop, model, batch.part(rows), loop.items(batch)).backward()
    check(grads_of(model), wanted(loop))


@every
def test_second_backward(loop):
    """A retained graph gives the same again, by any upstream gradient."""
    model = Model(loop.score)
    loss = loss_of(loop, model, make())
    loss.backward(retain_graph=True)
    once = [g.clone() for g in grads_of(model)]
    model.zero_grad()
    (3 * loss).backward()
    check(grads_of(model), [3 * g for g in once])


@every
def test_penalty_on_the_gradient(loop):
    """create_graph through head and loss."""
    found = []
    for score, loss in ((loop.score, loss_of), (loop.torch_score, torch_loss_of)):
        model = Model(score)
        grads = torch.autograd.grad(loss(loop, model, make()), list(model.parameters()), create_graph=True)
        torch.stack([g.square().sum() for g in grads]).sum().backward()
        found.append(grads_of(model))
    check(*found, rtol=1e-4)


@every
def test_lora(loop):
    """PEFT's adapter on the head, and on the body, trained through both."""
    peft = pytest.importorskip("peft")
    found = []
    for score, loss in ((loop.score, loss_of), (loop.torch_score, torch_loss_of)):
        config = peft.LoraConfig(r=3, target_modules=["head", "body.0"], init_lora_weights=False)
        torch.manual_seed(3)
        model = peft.get_peft_model(Model(score, whole=True), config)
        loss(loop, model, make()).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    check(*found)


def rank_rows() -> slice:
    half = PAIRS // RANKS
    return slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)


def ddp(loop: Loop) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(Model(loop.score))
    (loss_of(loop, model, make().part(rank_rows()), loop.items(make())) * RANKS).backward()
    check(grads_of(model.module), wanted(loop))


def fsdp2(loop: Loop) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (RANKS,)), Model(loop.score)
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    (loss_of(loop, model, make().part(rank_rows()), loop.items(make())) * RANKS).backward()
    check(grads_of(model), wanted(loop))


def gathered_head(loop: Loop) -> None:
    """As under ZeRO-3: each rank has a share of the head's rows and other tokens, and gathers the head for its use."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    model, batch = Model(loop.score), make()
    share = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Shard(0)]))

    def score(_: Head, hidden: Tensor, batch: Batch) -> Tensor:
        return loop.score(share.full_tensor(grad_placements=[Partial()]), hidden, batch)

    model.score = score
    loss_of(loop, model, batch.part(rank_rows()), loop.items(batch)).backward()
    assert isinstance(share.grad, DTensor) and share.grad.to_local().shape[0] < VOCAB
    # the head is the last of the parameters
    check([share.grad.full_tensor()], wanted(loop)[-1:])
    if loop is LOOPS["pairs"]:
        # without gathering, the ranks' tokens differ
        model.score = lambda _, hidden, batch: fastpo.linear_logprobs(hidden, share, batch.targets)
        with pytest.raises(ValueError, match="has to be gathered"):
            model(batch.part(rank_rows()))


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=store)
    for case in (ddp, fsdp2, gathered_head):
        for name, loop in LOOPS.items():
            case(loop)
            Path(folder, f"{case.__name__}-{name}-{rank}").touch()
    dist.destroy_process_group()


def test_several_processes(tmp_path):
    """DDP, FSDP2 and a head that is gathered, in two processes."""
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=RANKS)
    assert len(list(tmp_path.glob("*-*"))) == 3 * len(LOOPS) * RANKS
