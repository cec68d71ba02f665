"""linear_logprobs with the vocabulary over two processes (gloo), against one process."""

from __future__ import annotations

import os
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastpo
from fastpo.kernels import _tiles
from fastpo.kernels.linear_logprobs import STATISTICS
from tests.kernels.test_linear_logprobs import DIFFERENTIABLE, SCALING, make, upstream

RANKS = 2


def _evaluate(given: dict[str, Tensor], part: slice, stats=STATISTICS, **options) -> dict[str, Tensor]:
    """Outputs and gradients of a rank that has a part of the vocabulary."""
    leaves = {}
    for name, t in given.items():
        if name != "targets":
            t = t[part] if name in ("weight", "bias", "lora_b") else t
            leaves[name] = t.detach().clone().requires_grad_()
    lora = (leaves["lora_a"], leaves["lora_b"], SCALING) if "lora_a" in leaves else None
    plain = {n: t for n, t in leaves.items() if not n.startswith("lora")}
    out = fastpo.linear_logprobs(**plain, targets=given["targets"], lora=lora, stats=stats, **options)
    named = {"logprobs": out} if isinstance(out, Tensor) else out._asdict()
    outputs = {n: t for n, t in named.items() if t is not None}
    used = [n for n in DIFFERENTIABLE if n in outputs]
    grads = torch.autograd.grad(
        [outputs[n] for n in used], list(leaves.values()), [upstream(n, outputs[n]) for n in used]
    )
    return {n: t.detach() for n, t in outputs.items()} | {f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}


def _compare(given: dict[str, Tensor], sizes: tuple[int, int], **options) -> None:
    vocab, rank = given["weight"].shape[0], dist.get_rank()
    assert sum(sizes) == vocab
    part = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], vocab)
    ours = _evaluate(given, part, process_group=dist.group.WORLD, **options)
    want = _evaluate(given, slice(None), **options)
    eps = torch.finfo(given["hidden"].dtype).eps
    for name, value in want.items():
        if name in ("d_weight", "d_bias", "d_lora_b"):
            value = value[part]
        if name == "top1":
            assert torch.equal(ours[name], value)
        elif name.startswith("d_"):
            # sums of the same terms, of at most 8 each, in another order and rounded to the dtype
            assert torch.allclose(ours[name], value, rtol=4 * eps, atol=64 * eps, equal_nan=True), (name, options)
        else:
            # the sums are doubles; the exponentials are relative to another maximum
            accumulate = torch.finfo(value.dtype).eps
            assert torch.allclose(ours[name], value, rtol=8 * accumulate, atol=32 * accumulate, equal_nan=True), name


def values() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for sizes in ((40, 33), (1, 72), (73, 0), (0, 73)):
            given = make(9, vocab=73, dtype=dtype, bias=True, ids=2, rank=2)
            given["targets"][2] = -100
            given["targets"][3, 0] = -100
            _compare(given, sizes)
            _compare(given, sizes, temperature=0.7, softcap=3.0, logit_scale=1.5, memory_budget=0)
            _compare(given, sizes, temperature=torch.rand(9, generator=torch.Generator().manual_seed(1)) + 0.5)
            _compare(make(3, 3, vocab=73, dtype=dtype), sizes, stats=())


def several_tiles() -> None:
    _tiles.TILINGS["cpu"] = _tiles.Tiling(4, 1)
    _compare(make(9, vocab=300, bias=True), (170, 130))
    _compare(make(9, vocab=300, bias=True), (170, 130), skip_below=1e-30)
    _tiles.TILINGS["cpu"] = _tiles.Tiling(512, 1 << 20)


def extreme_rows() -> None:
    """Parts that are all -inf, NaN in one part, equal maxima, logits far apart."""
    given = make(5, vocab=20, bias=True, dtype=torch.float64)
    given["targets"] = torch.tensor([0, 19, 5, 15, 10])
    for change in (
        lambda b: b[:10].fill_(-torch.inf),
        lambda b: b[10:].fill_(-torch.inf),
        lambda b: b[12].fill_(torch.nan),
        lambda b: b[10:].fill_(2000.0),
        lambda b: b[:10].fill_(2000.0),
    ):
        now = {n: t.clone() for n, t in given.items()}
        change(now["bias"])
        _compare(now, (10, 10))
    given["hidden"].zero_()
    given["bias"].zero_()
    _compare(given, (10, 10))


def allowed_sets() -> None:
    """Each rank has the sets of its own columns, which need not hold a token; a target outside is known to both."""
    rank = dist.get_rank()
    given = make(6, vocab=73, bias=True, ids=2, dtype=torch.float64)
    mask = torch.rand(6, 73, generator=torch.Generator().manual_seed(1)) < 0.3
    given["targets"] = torch.tensor([[3, 60], [60, 3], [5, 6], [61, -100], [-100, -100], [7, 8]])
    mask[:, 3] = mask[:, 60] = True
    mask[0, 3] = mask[1, 60] = mask[2, 5] = False
    # no token of one rank's, or of any where nothing is asked
    mask[2, 40:] = mask[3, :40] = mask[4] = False
    mask[2, 6] = mask[3, 61] = True
    mask[5, [7, 8]] = False
    part = slice(0, 40) if rank == 0 else slice(40, 73)
    for sets in (mask, mask[0]):
        results = []
        for columns, group in ((part, dist.group.WORLD), (slice(None), None)):
            leaves = {n: given[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")}
            leaves["temperature"] = torch.linspace(0.5, 2, 6, dtype=torch.float64).requires_grad_()
            out = fastpo.linear_logprobs(
                **(leaves | {n: leaves[n][columns] for n in ("weight", "bias")}),
                targets=given["targets"],
                stats=STATISTICS,
                allowed=fastpo.pack_allowed(sets[..., columns]),
                process_group=group,
            )
            outputs = [getattr(out, n) for n in DIFFERENTIABLE]
            up = [upstream(n, o) for n, o in zip(DIFFERENTIABLE, outputs, strict=True)]
            up[0] = torch.where(out.logprobs == -torch.inf, torch.nan, up[0])
            grads = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), up), strict=True))
            results.append([*out, *(g[part] if n in ("weight", "bias") else g for n, g in grads.items())])
        for ours, want in zip(*results, strict=True):
            assert not want.isnan().any()
            assert torch.allclose(ours.double(), want.double(), rtol=1e-12, atol=1e-12)
        if sets is mask:
            outside = [[True, False], [True, False], [True, False], [False, False], [False, False], [True, True]]
            assert (results[0][0] == -torch.inf).tolist() == outside
    mask[3] = False
    with pytest.raises(ValueError, match="allowed holds no token for row 3, which has a target"):
        fastpo.linear_logprobs(
            given["hidden"],
            given["weight"][part],
            given["targets"],
            allowed=fastpo.pack_allowed(mask[:, part]),
            process_group=dist.group.WORLD,
        )


def nothing_to_do() -> None:
    given = make(5, vocab=20)
    given["targets"][:] = -100
    _compare(given, (12, 8))
    _compare(make(0, vocab=20), (12, 8))
    _compare(make(6, vocab=20), (12, 8), rows=torch.tensor([4, 1]))


def only_hidden_learns() -> None:
    given, rank = make(5, vocab=20), dist.get_rank()
    grads = []
    for weight, group in (
        (given["weight"][slice(0, 12) if rank == 0 else slice(12, 20)], dist.group.WORLD),
        (given["weight"], None),
    ):
        hidden = given["hidden"].clone().requires_grad_()
        out = fastpo.linear_logprobs(hidden, weight, given["targets"], process_group=group)
        grads.append(torch.autograd.grad(out.sum(), hidden)[0])
    assert torch.allclose(*grads, atol=1e-6)


def dtensor() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    given = make(5, vocab=21, bias=True)
    want = _evaluate(given, slice(None), stats=())
    weight, bias = (distribute_tensor(given[n], mesh, [Shard(0)]).requires_grad_() for n in ("weight", "bias"))
    for replicated in (False, True):
        hidden = given["hidden"].clone()
        hidden = DTensor.from_local(hidden, mesh, [Replicate()]) if replicated else hidden
        hidden.requires_grad_()
        out = fastpo.linear_logprobs(hidden, weight, given["targets"], bias)
        assert not isinstance(out, DTensor)
        grads = torch.autograd.grad(out, (hidden, weight, bias), upstream("logprobs", out))
        assert isinstance(grads[1], DTensor) and grads[1].placements == (Shard(0),)
        assert isinstance(grads[0], DTensor) == replicated
        for name, grad in zip(("hidden", "weight", "bias"), grads, strict=True):
            full = grad.full_tensor() if isinstance(grad, DTensor) else grad
            assert torch.allclose(full, want[f"d_{name}"], atol=1e-5), name
    for name, wrong in (("weight", Replicate()), ("weight", Shard(1))):
        bad = distribute_tensor(given["weight"], mesh, [wrong])
        with pytest.raises(ValueError, match=f"{name} must be sharded on its first dimension, the vocabulary"):
            fastpo.linear_logprobs(given["hidden"], bad, given["targets"])
    local = torch.zeros(4, dtype=torch.int64)
    for name, change in (
        ("hidden", {"hidden": distribute_tensor(torch.zeros(4, 32), mesh, [Replicate()])}),
        ("targets", {"targets": distribute_tensor(local, mesh, [Replicate()])}),
    ):
        with pytest.raises(TypeError, match=f"{name} is a DTensor, but weight is none"):
            fastpo.linear_logprobs(
                **{"hidden": torch.zeros(4, 32), "weight": given["weight"], "targets": local} | change
            )
    with pytest.raises(ValueError, match="hidden must be replicated"):
        hidden = distribute_tensor(torch.zeros(4, 32), mesh, [Shard(0)])
        fastpo.linear_logprobs(hidden, weight, torch.zeros(4, dtype=torch.int64))


def bad_input() -> None:
    given = make(5, vocab=20)
    part, group = slice(0, 10) if dist.get_rank() == 0 else slice(10, 20), dist.group.WORLD
    targets = given["targets"].clone()
    targets[0] = 20
    with pytest.raises(IndexError, match=r"is 20, out of range for a vocabulary of 20"):
        fastpo.linear_logprobs(given["hidden"], given["weight"][part], targets, process_group=group)
    # as under FSDP: every rank has its own rows
    for targets in ((given["targets"] + dist.get_rank()) % 20, given["targets"][: 5 - dist.get_rank()]):
        with pytest.raises(ValueError, match=r"its ranks hold different targets.*FSDP or ZeRO has to be gathered"):
            fastpo.linear_logprobs(given["hidden"][: len(targets)], given["weight"][part], targets, process_group=group)
    rank = dist.get_rank()
    for different in (
        {"rows": torch.tensor([1, 3]) + rank},
        {"temperature": torch.ones(5) + rank},
        {"temperature": 1.0 + rank},
        {"stats": ("entropy",) * rank},
    ):
        with pytest.raises(ValueError, match="its ranks hold different targets, rows, temperatures or options"):
            fastpo.linear_logprobs(
                given["hidden"], given["weight"][part], given["targets"], process_group=group, **different
            )
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup"):
        fastpo.linear_logprobs(given["hidden"], given["weight"], given["targets"], process_group="world")
    with pytest.raises(RuntimeError, match=r"no second derivative .* over a process_group"):
        hidden = given["hidden"].clone().requires_grad_()
        out = fastpo.linear_logprobs(hidden, given["weight"][part], given["targets"], process_group=group)
        torch.autograd.grad(out.sum(), hidden, create_graph=True)


CHECKS = (values, several_tiles, extreme_rows, allowed_sets, nothing_to_do, only_hidden_learns, dtensor, bad_input)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        for check in CHECKS:
            check()
            with open(f"{folder}/{rank}", "a") as done:
                done.write(check.__name__ + "\n")
    except BaseException:
        traceback.print_exc()
        # the other rank may be waiting for this one
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        assert (tmp_path / str(rank)).read_text().split() == [check.__name__ for check in CHECKS]
