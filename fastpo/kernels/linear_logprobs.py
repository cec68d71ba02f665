"""`linear_logprobs`: log-probabilities of chosen tokens from hidden states and a head's weight, without the logits.

The driver is in _tiles.py.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native, _tiles
from fastpo.reference import vocabulary
from fastpo.reference.vocabulary import LinearLogprobs

Statistic = Literal["entropy", "logsumexp", "log_sum_p2", "top1", "mean_logit"]
STATISTICS: tuple[Statistic, ...] = ("entropy", "logsumexp", "log_sum_p2", "top1", "mean_logit")

# elements of the logits up to which a second derivative is made by the reference, which holds them all
_MOST_LOGITS = 1 << 26
# the part of a device's memory that kept logits may take by default
_BUDGET = 1 / 32

# `allowed` (1 or rows, words): the packed sets of a tile's columns, outside of which no target is
torch.library.define(
    "fastpo::fold_tile",
    "(Tensor tile, int first, Tensor targets, Tensor inverse, float logit_scale, float cap, Tensor(a!) state, "
    "Tensor(b!) taken, Tensor(c!)? top1, Tensor(d!)? total, bool weighted, bool squared, Tensor? allowed=None) -> ()",
)
# in place, or into `out`, of a narrower dtype, for products of narrow matrices with wide results
torch.library.define(
    "fastpo::dlogits_tile",
    "(Tensor(a!) tile, int first, Tensor targets, Tensor inverse, float logit_scale, float cap, Tensor state, "
    "Tensor at, Tensor? slope, Tensor grads, Tensor(b!)? out=None, Tensor? allowed=None) -> ()",
)
# hidden (N, H), targets (N, K), allowed (1 or N, W); cap 0 stands for none
_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? rows, "
    "Tensor? temperatures, Tensor? allowed, float temperature, float logit_scale, float cap, float lora_scale, "
    "int ignore_index, str? group, bool wide"
)
# `stats`: a bit per statistic; `budget`: bytes of logits that may be kept; `skip`: 0, or a threshold for which the
# peaks are noted. See _tiles.Found
torch.library.define(
    "fastpo::linear_logprobs",
    f"({_PROBLEM}, int stats, bool expected, int budget, float skip) -> "
    "(Tensor logprobs, Tensor state, Tensor shard, Tensor expected, Tensor slopes, Tensor kept, Tensor peaks, "
    "Tensor entropy, Tensor logsumexp, Tensor log_sum_p2, Tensor top1, Tensor mean_logit)",
)
# `needed`: bits for the gradients of hidden, weight, bias, lora_a and lora_b; the others come back empty
torch.library.define(
    "fastpo::linear_logprobs_backward",
    f"({_PROBLEM}, Tensor state, Tensor shard, Tensor kept, Tensor peaks, Tensor? entropy, Tensor? grad_logprobs, "
    "Tensor? grad_entropy, Tensor? grad_logsumexp, float skip, int needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
# what the gradient of the entropy with respect to temperature needs beside what there is: (N,), fp64
torch.library.define(
    "fastpo::linear_logprobs_variance", f"({_PROBLEM}, Tensor state, Tensor shard, Tensor entropy) -> Tensor"
)


class _Options(NamedTuple):
    """What both ops take after their tensors; the order of the schema."""

    temperature: float
    logit_scale: float
    cap: float
    lora_scale: float
    ignore_index: int
    group: str | None
    wide: bool


@torch.library.register_fake("fastpo::fold_tile")
@torch.library.register_fake("fastpo::dlogits_tile")
def _fake_tile(*_: Any) -> None:
    return None


@torch.library.impl("fastpo::fold_tile", "CUDA")
def _cuda_fold_tile(*args: Any) -> None:
    from fastpo.kernels.triton import linear_logprobs as kernels

    kernels.fold_tile(*args)


@torch.library.impl("fastpo::dlogits_tile", "CUDA")
def _cuda_dlogits_tile(*args: Any) -> None:
    from fastpo.kernels.triton import linear_logprobs as kernels

    kernels.dlogits_tile(*args)


@torch.library.register_fake("fastpo::linear_logprobs")
def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stats, expected, budget, skip = rest[-4:]
    wide = rest[-5] or hidden.device.type != "cpu"
    rows, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    dtypes = (dtype, dtype, dtype, torch.int64, dtype)

    def unknown() -> Any:
        return torch.library.get_ctx().new_dynamic_size()

    # what is kept, and so whether `expected` is needed, depends on how many rows count
    found = (unknown() if budget else rows) if expected else 0
    return (
        hidden.new_empty(targets.shape, dtype=dtype),
        hidden.new_empty((2, rows), dtype=torch.float64),
        hidden.new_empty(2, dtype=torch.int64, device="cpu"),
        hidden.new_empty((found, hidden.shape[1]), dtype=dtype),
        hidden.new_empty((found, targets.shape[1]), dtype=torch.float64),
        hidden.new_empty(unknown() if budget else 0, dtype=dtype if wide else hidden.dtype),
        hidden.new_empty((unknown(), unknown()) if skip else (0, 0), dtype=torch.float64),
        *(hidden.new_empty((rows if stats >> bit & 1 else 0,), dtype=d) for bit, d in enumerate(dtypes)),
    )


@torch.library.register_fake("fastpo::linear_logprobs_backward")
def _fake_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needed = rest[-1]
    return tuple(
        hidden.new_empty(t.shape if needed >> i & 1 and t is not None else (0,))
        for i, t in enumerate((hidden, weight, bias, lora_a, lora_b))
    )


@torch.library.register_fake("fastpo::linear_logprobs_variance")
def _fake_variance(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float64)


_native.on_cuda("linear_logprobs", _native.why_not_triton, by="Triton")


@torch.library.impl("fastpo::linear_logprobs", ("CPU", "CUDA"))
def _forward(*args: Any) -> tuple[Tensor, ...]:
    *problem, stats, expected, budget, skip = args
    weight, targets, rows, temperatures, allowed, ignore_index, group = (args[i] for i in (1, 2, 6, 7, 8, 13, 14))
    # of the sets, each rank has those of its own columns
    options = hash((*args[9:14], stats, 0 if allowed is None else len(allowed)))
    first, vocabulary = _tiles.shard_of(weight, targets, rows, temperatures, options, group)
    # in a graph nobody has looked at them yet, and of a shard nobody knew the size of the whole
    _checks.values(targets, temperatures, ignore_index, vocabulary)
    _check_rows(rows, len(targets))
    with torch.autocast(weight.device.type, enabled=False):
        p = _tiles.Problem(*problem, first=first)
        p.check_allowed()
        return _tiles.forward(p, first, vocabulary, stats, expected, budget, skip)


@torch.library.impl("fastpo::linear_logprobs_backward", ("CPU", "CUDA"))
def _backward(*args: Any) -> tuple[Tensor, ...]:
    problem, (state, shard, *rest) = args[:-10], args[-10:]
    with torch.autocast(state.device.type, enabled=False):
        first, width = shard.tolist()
        return _tiles.backward(_tiles.Problem(*problem, first=first, width=width), state, *rest)


@torch.library.impl("fastpo::linear_logprobs_variance", ("CPU", "CUDA"))
def _variance(*args: Any) -> Tensor:
    *problem, state, shard, entropy = args
    with torch.autocast(state.device.type, enabled=False):
        first, width = shard.tolist()
        return _tiles.variance(_tiles.Problem(*problem, first=first, width=width), state, entropy)


class _LinearLogprobs(torch.autograd.Function):
    """Arguments: hidden, weight, targets, bias, lora_a, lora_b, rows, temperatures, allowed, then the options."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        tensors, (options, stats, budget, skip, enabled) = args[:9], args[9:]
        # which says nothing of no_grad
        needs = [enabled and n for n in ctx.needs_input_grad]
        ctx.needed = [needs[i] for i in (0, 1, 3, 4, 5)]
        ctx.frozen = ctx.needed[0] and not any(ctx.needed[1:]) and tensors[4] is None and options.group is None
        computed = stats | needs[7]
        found = _tiles.Found(
            *torch.ops.fastpo.linear_logprobs(
                *tensors,
                *options,
                computed,
                ctx.frozen,
                # the gradient of the log-probs from `expected` takes less than the logits, and as few products; that
                # of the entropy takes the logits
                budget if any(ctx.needed) and not (ctx.frozen and not computed & 1) else 0,
                skip if any(ctx.needed) and not ctx.frozen else 0.0,
            )
        )
        ctx.options, ctx.stats, ctx.skip = options, stats, skip
        statistics = found[7:]
        ctx.mark_non_differentiable(*([] if stats & 1 else statistics[:1]), *statistics[2:])
        ctx.set_materialize_grads(False)
        # a copy, since the result may be changed in place
        logprobs = found.logprobs.clone() if ctx.frozen or needs[7] else None
        entropy = found.entropy if computed & 1 else None
        ctx.save_for_backward(*tensors, *found[1:7], entropy, logprobs)
        return found.logprobs, *statistics

    @staticmethod
    def backward(
        ctx: Any,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        grad_logsumexp: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        # the empty tensor that stands for a statistic not asked for has a gradient of no meaning
        upstream = (
            grad_logprobs,
            grad_entropy if ctx.stats & 1 else None,
            grad_logsumexp if ctx.stats & 2 else None,
        )
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if all(g is None for g in upstream):
            return tuple(grads)
        saved = ctx.saved_tensors
        tensors, (state, shard, expected, slopes, kept, peaks, entropy, logprobs) = saved[:9], saved[9:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with torch.autocast(state.device.type, enabled=False):
                return _differentiable_backward(ctx, tensors, upstream)
        if ctx.frozen and upstream[1] is None and expected.numel():
            grads[0] = _frozen_backward(tensors, ctx.options, expected, slopes, logprobs, upstream)
        elif any(ctx.needed):
            bits = sum(1 << i for i, n in enumerate(ctx.needed) if n)
            rest = (state, shard, kept, peaks, entropy, *upstream, ctx.skip, bits)
            found = torch.ops.fastpo.linear_logprobs_backward(*tensors, *ctx.options, *rest)
            for at, grad, needed in zip((0, 1, 3, 4, 5), found, ctx.needed, strict=True):
                grads[at] = grad if needed else None
        if ctx.needs_input_grad[7]:
            grads[7] = _temperature_gradient(tensors, ctx.options, state, shard, logprobs, entropy, upstream)
        return tuple(grads)


def _frozen_backward(
    tensors: tuple[Tensor | None, ...],
    options: _Options,
    expected: Tensor,
    slopes: Tensor,
    logprobs: Tensor,
    upstream: tuple[Tensor | None, ...],
) -> Tensor:
    """Hidden's gradient where the head has none: of the weight only the rows of the targets are read.

    Σ_k g_k (c_k W[y_k] - Σ_j p_j c_j W[j]), where c is the slope of the numbers under the softmax; `expected` has the
    inner sum but for the targets.
    """
    hidden, weight, targets, *_, rows, _, allowed = tensors
    assert hidden is not None and weight is not None and targets is not None
    grad_logprobs, _, grad_logsumexp = upstream
    valid = counted = _counted(targets, rows, options)
    if allowed is not None:
        # the log-prob of a target outside is -inf whatever the logits are
        valid = valid & ~_tiles.outside(allowed, targets, len(weight), None)
    g = torch.zeros_like(slopes) if grad_logprobs is None else torch.where(valid, grad_logprobs.double(), 0)
    upward = torch.zeros_like(slopes[:, 0]) if grad_logsumexp is None else grad_logsumexp.double()
    total = g.sum(-1)
    out = (upward - total).to(expected.dtype)[:, None] * expected
    # a target that is not in range has given NaN already
    ids = torch.where(valid, targets, 0).clamp(0, len(weight) - 1)
    for k in range(targets.shape[1]):
        g_k, logprob = g[:, k], logprobs[:, k].double()
        # an id that several targets name is once in the sum
        again = (targets[:, :k] == targets[:, k : k + 1]).any(-1)
        once = (upward - (total - g_k)) * logprob.exp() - g_k * torch.expm1(logprob)
        at = torch.where(valid[:, k], torch.where(again, g_k, once) * slopes[:, k], 0).to(expected.dtype)
        out = out.addcmul(at[:, None], weight[ids[:, k]].to(expected.dtype))
    return torch.where(counted.any(-1, keepdim=True), out, 0).to(hidden.dtype)


def _counted(targets: Tensor, rows: Tensor | None, options: _Options) -> Tensor:
    """Which targets are computed."""
    valid = targets != options.ignore_index
    return valid if rows is None else valid & _members(rows, len(targets))[:, None]


def _temperature_gradient(
    tensors: tuple[Tensor | None, ...],
    options: _Options,
    state: Tensor,
    shard: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    upstream: tuple[Tensor | None, ...],
) -> Tensor:
    """d/dT log p = -(log p + H) / T, d/dT logsumexp = -(logsumexp - H) / T, d/dT H = Var[z / T] / T."""
    targets, rows, temperatures, allowed = tensors[2], *tensors[6:]
    assert targets is not None and temperatures is not None
    grad_logprobs, grad_entropy, grad_logsumexp = upstream
    valid = _counted(targets, rows, options)
    total = torch.zeros_like(entropy)
    if grad_logprobs is not None:
        # that of a target outside is -inf at every temperature
        moved = valid if allowed is None else valid & (logprobs != -math.inf)
        total = total - torch.where(moved, grad_logprobs * (logprobs + entropy[:, None]), 0).sum(-1)
    if grad_logsumexp is not None:
        scale = 1.0 if options.cap else options.logit_scale
        logsumexp = state[0] * scale / temperatures.double() + state[1].log()
        total = total - grad_logsumexp * (logsumexp - entropy)
    if grad_entropy is not None:
        spread = torch.ops.fastpo.linear_logprobs_variance(*tensors, *options, state, shard, entropy)
        total = total + grad_entropy * spread
    return torch.where(valid.any(-1), total / temperatures, 0).to(temperatures.dtype)


def _members(rows: Tensor, count: int) -> Tensor:
    """bool (count,): which rows are named."""
    return torch.zeros(count, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)


def _differentiable_backward(
    ctx: Any, tensors: tuple[Tensor | None, ...], upstream: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients as functions that can be differentiated again (create_graph), from the reference."""
    options: _Options = ctx.options
    hidden, weight = tensors[:2]
    assert hidden is not None and weight is not None
    if options.group is not None:
        raise RuntimeError("linear_logprobs: no second derivative (create_graph=True) over a process_group")
    if hidden.shape[0] * weight.shape[0] > _MOST_LOGITS:
        raise RuntimeError(
            f"linear_logprobs: a second derivative holds all {hidden.shape[0]} x {weight.shape[0]} logits; "
            f"it is made for at most {_MOST_LOGITS} (create_graph=True)"
        )
    names = tuple(name for name, g in zip(("entropy", "logsumexp"), upstream[1:], strict=True) if g is not None)
    # views, so that each gradient is that of its own argument, also where one is made from the other
    needs = ctx.needs_input_grad[:9]
    inputs = [t.view_as(t) if n and t is not None else t for t, n in zip(tensors, needs, strict=True)]
    out = _reference(inputs, options, names)
    pairs = [(getattr(out, n), g) for n, g in zip(("logprobs", "entropy", "logsumexp"), upstream, strict=True)]
    used = [(o, g) for o, g in pairs if g is not None]
    wanted = [t for t, n in zip(inputs, needs, strict=True) if n and t is not None]
    found = iter(torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used], create_graph=True))
    return tuple(next(found) if n else None for n in ctx.needs_input_grad)


def _reference(tensors: Iterable[Tensor | None], options: _Options, stats: tuple[str, ...]) -> LinearLogprobs:
    """The reference on the op's arguments."""
    hidden, weight, targets, bias, lora_a, lora_b, rows, temperatures, allowed = tensors
    assert hidden is not None and weight is not None and targets is not None
    if rows is not None:
        targets = torch.where(_members(rows, len(targets))[:, None], targets, options.ignore_index)
    return vocabulary.linear_logprobs(
        hidden,
        weight,
        targets,
        bias,
        temperature=options.temperature if temperatures is None else temperatures,
        logit_scale=options.logit_scale,
        softcap=options.cap or None,
        ignore_index=options.ignore_index,
        stats=stats,
        lora=None if lora_a is None or lora_b is None else (lora_a, lora_b, options.lora_scale),
        allowed=allowed[0] if allowed is not None and len(allowed) == 1 else allowed,
    )


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    stats: tuple[str, ...],
    lora: tuple[Tensor, Tensor, float] | None,
    rows: Tensor | None,
    allowed: Tensor | None,
    sharded: bool,
) -> None:
    _checks.tensor("targets", targets, _checks.INTEGERS)
    for name, value in (("hidden", hidden), ("targets", targets), ("bias", bias), ("rows", rows), ("allowed", allowed)):
        if _checks.is_dtensor(value):
            raise TypeError(f"{name} is a DTensor, but " + ("must be local" if sharded else "weight is none"))
    _checks.head(hidden, weight, bias, sharded=sharded)
    _checks.same_device("targets", targets, "hidden", hidden)
    _checks.targets(targets, hidden.shape[:-1], f"hidden of shape {tuple(hidden.shape)}")
    _checks.temperature(temperature, hidden.shape[:-1], "hidden", hidden, differentiable=True)
    _checks.logit_scale(logit_scale)
    _checks.softcap(softcap)
    _checks.ignore_index(ignore_index)
    _checks.statistics(stats, STATISTICS)
    if lora is not None:
        if not isinstance(lora, tuple) or len(lora) != 3:
            raise TypeError(f"lora must be a tuple (A, B, scaling), got {type(lora).__name__}")
        _checks.beside("lora[0]", lora[0], "hidden", hidden)
        _checks.beside("lora[1]", lora[1], "hidden", hidden)
        rank = lora[0].shape[0] if lora[0].dim() else 0
        _checks.shape("lora[0]", lora[0], (rank, hidden.shape[-1]), "A of an adapter is (rank, H)")
        _checks.shape("lora[1]", lora[1], (weight.shape[0], rank), "B of an adapter is (V, rank)")
        if not math.isfinite(_checks.number("lora[2]", lora[2])):
            raise ValueError(f"lora[2], the scaling, must be finite, got {lora[2]}")
    if rows is not None:
        _checks.tensor("rows", rows, (torch.int64,))
        _checks.same_device("rows", rows, "hidden", hidden)
        if rows.dim() != 1:
            raise ValueError(f"rows must have shape (M,), got {tuple(rows.shape)}")
        _check_rows(rows, math.prod(hidden.shape[:-1]))
    _checks.allowed(allowed, hidden.shape[:-1], weight.shape[0], "hidden", hidden)


def _check_rows(rows: Tensor | None, count: int) -> None:
    if rows is None or not _checks.readable(rows):
        return
    if ((rows < 0) | (rows >= count)).any() or len(rows.unique()) != len(rows):
        raise ValueError(f"rows must be different numbers in [0, {count})")


@functools.lru_cache
def default_budget(device: torch.device) -> int:
    """Bytes of logits that may be kept."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(memory * _BUDGET)


def cast(t: Any, dtype: torch.dtype) -> Any:
    """What torch.nn.functional.linear makes of its arguments under autocast."""
    casts = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if casts else t


def _local(name: str, t: Any, sharded: bool) -> tuple[Any, Any]:
    """The local part of a DTensor, and its mesh; other tensors as they are."""
    if not _checks.is_dtensor(t):
        return t, None
    (placement, *others) = t.placements
    good = placement.is_shard(0) if sharded else placement.is_replicate()
    if others or not good:
        expected = "sharded on its first dimension, the vocabulary," if sharded else "replicated"
        raise ValueError(
            f"{name} must be {expected} over a mesh of one dimension, got a DTensor with the placements {t.placements}"
        )
    # the gradients that come back are those of the shards, or the same on every rank
    return t.to_local(grad_placements=t.placements), t.device_mesh


@overload
def linear_logprobs(  # type: ignore[overload-overlap]  # an empty tuple is an Iterable too
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    stats: tuple[()] = (),
    lora: tuple[Tensor, Tensor, float] | None = None,
    process_group: Any = None,
    memory_budget: int | None = None,
    skip_below: float = 0.0,
    rows: Tensor | None = None,
    allowed: Tensor | None = None,
    logits_dtype: Literal["auto", "float32"] = "auto",
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    stats: Iterable[Statistic],
    lora: tuple[Tensor, Tensor, float] | None = None,
    process_group: Any = None,
    memory_budget: int | None = None,
    skip_below: float = 0.0,
    rows: Tensor | None = None,
    allowed: Tensor | None = None,
    logits_dtype: Literal["auto", "float32"] = "auto",
) -> LinearLogprobs: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    stats: Iterable[Statistic] = (),
    lora: tuple[Tensor, Tensor, float] | None = None,
    process_group: Any = None,
    memory_budget: int | None = None,
    skip_below: float = 0.0,
    rows: Tensor | None = None,
    allowed: Tensor | None = None,
    logits_dtype: Literal["auto", "float32"] = "auto",
) -> Tensor | LinearLogprobs:
    """Log-probabilities of chosen tokens from hidden states and the head's weight, without the logits in memory.

    With z = hidden weightᵀ + bias (and scaling · hidden Aᵀ Bᵀ of an adapter), they are log softmax(c(z) / T)[target],
    where c(z) = logit_scale · z, or with a softcap c(z) = softcap · tanh(logit_scale · z / softcap).

    Matrix products, forward and backward together: three where the logits of the rows that count fit into
    `memory_budget`, four where the backward computes them again (also under torch.compile), two where only `hidden`
    needs a gradient (a frozen head), one where nothing does. The gradient of the entropy under a frozen head takes two
    with kept logits, else four; that with respect to temperature one more.

    Memory beside inputs, results and their gradients, with n the rows that count, b the bytes of an element of
    `hidden` and a those of an accumulator (4, or 8 for fp64): a buffer of 1 MiB per thread on a CPU, 256 MiB on a GPU
    (half as much again for bf16 and fp16); n·H·b for the rows that count, unless all do, and as long n·V/8 for their
    allowed sets; about 130 + 34·K bytes for each; kept from the forward to the backward n·V·b (on a GPU n·V·a) if that
    is at most `memory_budget`, or N·H·a for a frozen head; in the backward n·H·a for hidden's gradient and, for a bf16
    or fp16 weight's, H·a per column of the buffer where the rows are more than the buffer's (512, on a GPU 8,192). On a
    CPU products of bf16 and fp16 take up to one more buffer, or, where they are made in fp32 (`logits_dtype`), b is 4
    and there is H·4 more per column of the buffer.

    Args:
        hidden: (..., H), fp32, bf16, fp16 or fp64. Under torch.autocast it and the head are cast, as by a linear layer.
        weight: (V, H), of the dtype of `hidden`, as in a transformers lm_head. Over a process group: this rank's rows,
            in the order of the ranks; or a DTensor sharded on its first dimension, which brings its group.
        targets: (...) one id per row, or (..., K) several; int64 or int32, in [0, V) or `ignore_index`.
        bias: (V,), or None; sharded as the weight.
        temperature: a positive number, or a tensor (...) of one per row, to which the gradients of log-probs and
            logsumexp flow.
        logit_scale: a positive number that multiplies the logits.
        softcap: the bound of the logits, or None for none.
        ignore_index: targets of this value are skipped: log-prob 0, gradient 0. Rows that have no other are left out
            of every matrix product, so that a batch of which half is prompt costs half; they may hold anything.
        stats: as in `token_logprobs`, and "mean_logit", the mean of c(z) / T over the vocabulary, or over its allowed
            part, which is not differentiable.
        lora: (A, B, scaling) of an adapter on the head: A (rank, H), B (V, rank), sharded as the weight.
        process_group: the ranks whose shards make up the vocabulary. All have the same hidden states, targets, rows,
            temperatures and options (which are compared, but for the hidden states, in a small collective that
            synchronises) and get the same results; hidden's gradient is the sum over the shards.
        memory_budget: bytes of logits that the forward may keep for the backward; by default 1/32 of the device's
            memory. Results and gradients are the same bits, kept or not (but for a frozen head's).
        skip_below: leave tiles (512 rows x some 1,000 columns on a CPU) out of the backward in which no element of the
            logits' gradient is larger than this; off by default. The error of hidden's gradient is then at most
            skip_below · Σ_v |weight[v, h]| over the skipped columns v (with an adapter, of the weight that it makes),
            that of the weight's gradient at most skip_below · Σ_n |hidden[n, h]| over the rows n. Without effect under
            a frozen head and torch.compile. On a GPU it synchronises.
        rows: int64 (M,), all different, the rows to be computed (counted over all leading dimensions); all others are
            taken as ignored. Without it a GPU is synchronised with, to count the rows that have targets.
        allowed: packed sets of tokens, int32 (W,) for all rows or (..., W), one per row, W = ceil(V / 32), as in
            `token_logprobs`; over a process group those of this rank's columns. The numbers under the softmax of other
            tokens, NaN and inf included, have no influence; their rows of the weight must be finite all the same, since
            in hidden's gradient they are multiplied by 0. No product is saved.
        logits_dtype: dtype of the tiles. On a GPU they are fp32. On a CPU "auto" is the dtype of `hidden` where the
            processor multiplies in it (bf16: x86 with AVX-512): torch's CPU has no product of bf16 matrices with an
            fp32 result, so bf16 logits are rounded to bf16 there. On other CPUs torch's products of bf16 and fp16 are
            loops that take up to a hundred times as long as those of fp32, and "auto" is "float32": exact logits, at
            the price of products in fp32.

    Returns:
        the log-probs, of the shape of `targets`, fp32 (fp64 for fp64 input); with `stats`, a `LinearLogprobs` tuple.
        No shift of positions: hidden[..., t, :] speaks about targets[..., t]. See `completion_logprobs` for that.

    Raises:
        TypeError: a dtype or type is not one of the above.
        ValueError: shapes or devices do not match, a number is not in its domain, the ranks of the process group hold
            different targets, or a row with a target has no allowed token (on other devices than the CPU only with
            FASTPO_DEBUG=1; without it, such a row has NaN).
        IndexError: a target is out of range; the message names its place. On other devices than the CPU only with
            FASTPO_DEBUG=1; without it, such a target has the log-prob NaN there.
        RuntimeError: a second derivative (create_graph) is asked for of more than 2^26 logits or over a process group.
    """
    stats = tuple(stats)
    sharded = process_group is not None
    if sharded and not hasattr(process_group, "group_name"):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this rank belongs to, got "
            f"{type(process_group).__name__}"
        )
    if _checks.is_dtensor(weight):
        weight, mesh = _local("weight", weight, True)
        sharded, process_group = True, process_group or mesh.get_group()
    if sharded:
        hidden, _ = _local("hidden", hidden, False)
        if bias is not None:
            bias, _ = _local("bias", bias, True)
        if lora is not None:
            lora = (_local("lora[0]", lora[0], False)[0], _local("lora[1]", lora[1], True)[0], lora[2])
    if isinstance(hidden, Tensor) and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = cast(hidden, dtype), cast(weight, dtype), cast(bias, dtype)
        if isinstance(lora, tuple):
            lora = tuple(cast(part, dtype) for part in lora)
    numbers = (temperature, logit_scale, softcap, ignore_index)
    _check(hidden, weight, targets, bias, *numbers, stats, lora, rows, allowed, sharded)
    _checks.memory_budget(memory_budget)
    if not 0 <= _checks.number("skip_below", skip_below) < math.inf:
        raise ValueError(f"skip_below must be at least 0 and finite, got {skip_below}")
    if logits_dtype not in ("auto", "float32"):
        raise ValueError(f"logits_dtype must be 'auto' or 'float32', got {logits_dtype!r}")
    if not sharded:
        # here, where a message can name the place; of a whole vocabulary only the op knows the size
        _checks.values(targets, temperature, ignore_index, weight.shape[0])
    ids = targets.shape[-1] if targets.dim() == hidden.dim() else 1
    leading = hidden.shape[:-1]
    count = math.prod(leading)
    per_row = isinstance(temperature, Tensor)
    on_cpu = hidden.device.type == "cpu"
    options = _Options(
        1.0 if isinstance(temperature, Tensor) else float(temperature),
        float(logit_scale),
        0.0 if softcap is None else float(softcap),
        0.0 if lora is None else float(lora[2]),
        ignore_index,
        process_group.group_name if sharded else None,
        logits_dtype == "float32" or (on_cpu and hidden.dtype not in _tiles.MULTIPLIED_ON_CPUS),
    )
    tensors = (
        hidden.reshape(count, hidden.shape[-1]),
        weight,
        targets.reshape(count, ids),
        bias,
        None if lora is None else lora[0],
        None if lora is None else lora[1],
        rows,
        temperature.reshape(count) if per_row else None,  # type: ignore[union-attr]
        None if allowed is None else allowed.reshape(1 if allowed.dim() == 1 else count, allowed.shape[-1]),
    )
    if not _native.serves("linear_logprobs", hidden.device, hidden.dtype):
        if sharded:
            raise RuntimeError("linear_logprobs: process_group needs the compiled kernel; see `fastpo info`")
        if allowed is not None and _checks.readable(allowed):
            asked = _counted(targets.reshape(count, ids), rows, options).any(-1)
            _checks.some_allowed(asked, vocabulary.any_allowed(allowed, weight.shape[0]).reshape(-1))
        found: Any = _reference(tensors, options, stats)
    else:
        # under a trace nothing is kept: it would have no shape that is known before
        budget, skip = 0, 0.0
        if not torch.compiler.is_compiling():
            budget = default_budget(hidden.device) if memory_budget is None else memory_budget
            skip = float(skip_below)
        found = _native.call(
            _LinearLogprobs.apply,
            *tensors,
            options,
            sum(1 << bit for bit, name in enumerate(STATISTICS) if name in stats),
            budget,
            skip,
            torch.is_grad_enabled(),
        )
    logprobs = found[0].view(targets.shape)
    if not stats:
        return logprobs
    named = zip(STATISTICS, found[1:], strict=True)
    return LinearLogprobs(logprobs, **{name: t.view(leading) for name, t in named if name in stats})
