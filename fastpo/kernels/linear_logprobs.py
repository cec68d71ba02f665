"""`linear_logprobs`: log-probabilities of chosen tokens from hidden states and a head's weight, without the logits.

The logits exist one tile at a time, rows x a slice of the vocabulary, in one buffer that is used again: a matrix
product of the vendor's library fills it, `fold_tile` adds it to the rows' sums, and in the backward, which computes
it again, `dlogits_tile` turns it into its gradient in place, for two more products to consume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.reference import vocabulary
from fastpo.reference.vocabulary import LinearLogprobs

Statistic = Literal["entropy", "logsumexp", "log_sum_p2", "top1", "mean_logit"]
STATISTICS: tuple[Statistic, ...] = ("entropy", "logsumexp", "log_sum_p2", "top1", "mean_logit")

# of the buffer; it stays in a core's second-level cache between the product and the kernel
_TILE_BYTES = 1 << 20
_TILE_ROWS = 512
# elements of the logits up to which a second derivative is made by the reference, which holds them all
_MOST_LOGITS = 1 << 26

torch.library.define(
    "fastpo::fold_tile",
    "(Tensor tile, int first, Tensor targets, Tensor inverse, float logit_scale, float cap, Tensor(a!) state, "
    "Tensor(b!) taken, Tensor(c!)? top1, Tensor(d!)? total, bool weighted, bool squared) -> ()",
)
# in place, or into `out`, of a narrower dtype, for products of narrow matrices with wide results
torch.library.define(
    "fastpo::dlogits_tile",
    "(Tensor(a!) tile, int first, Tensor targets, Tensor inverse, float logit_scale, float cap, Tensor state, "
    "Tensor at, Tensor? slope, Tensor grads, Tensor(b!)? out=None) -> ()",
)
# hidden (N, H), targets (N, K); cap 0 stands for none. `state` (2, N): the largest number under the softmax, and the
# sum of the exponentials relative to it. Statistics that are not asked for (a bit of `stats` not set) are empty.
# `expected` (N, H) is, if asked for, the gradient of the logarithm of that sum with respect to hidden: with it the
# backward to hidden alone needs no product
torch.library.define(
    "fastpo::linear_logprobs",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? temperatures, float temperature, "
    "float logit_scale, float cap, int ignore_index, int stats, bool wide, bool expected) -> "
    "(Tensor logprobs, Tensor state, Tensor expected, Tensor entropy, Tensor logsumexp, Tensor log_sum_p2, "
    "Tensor top1, Tensor mean_logit)",
)
# `needed`: bits for the gradients of hidden, weight and bias; the others come back empty
torch.library.define(
    "fastpo::linear_logprobs_backward",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor state, Tensor? entropy, "
    "Tensor? temperatures, float temperature, float logit_scale, float cap, int ignore_index, Tensor? grad_logprobs, "
    "Tensor? grad_entropy, Tensor? grad_logsumexp, bool wide, int needed) -> (Tensor, Tensor, Tensor)",
)


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
def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    cap: float,
    ignore_index: int,
    stats: int,
    wide: bool,
    expected: bool,
) -> tuple[Tensor, ...]:
    rows, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    dtypes = (dtype, dtype, dtype, torch.int64, dtype)
    return (
        hidden.new_empty(targets.shape, dtype=dtype),
        hidden.new_empty((2, rows), dtype=torch.float64),
        hidden.new_empty(hidden.shape if expected else (0,), dtype=dtype),
        *(hidden.new_empty((rows if stats >> bit & 1 else 0,), dtype=d) for bit, d in enumerate(dtypes)),
    )


@torch.library.register_fake("fastpo::linear_logprobs_backward")
def _fake_backward(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    needed = rest[-1]
    return tuple(
        (t.new_empty(t.shape) if needed >> i & 1 else hidden.new_empty((0,)))  # type: ignore[union-attr]
        for i, t in enumerate((hidden, weight, bias))
    )


class _Problem:
    """The rows that somebody asks about, and their tiles."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        temperatures: Tensor | None,
        temperature: float,
        logit_scale: float,
        cap: float,
        ignore_index: int,
        wide: bool,
    ):
        self.weight, self.bias, self.logit_scale, self.cap = weight, bias, logit_scale, cap
        self.wide = torch.float32 if wide and hidden.dtype != torch.float64 else hidden.dtype
        valid = targets != ignore_index
        keep = valid.any(-1)
        # no arithmetic is spent on the other rows
        self.index = None if bool(keep.all()) else keep.nonzero().squeeze(-1)
        self.valid = self.take(valid)
        self.hidden = self.take(hidden).to(self.wide).contiguous()
        self.targets = torch.where(self.valid, self.take(targets), -1).long().contiguous()
        self.rows = self.hidden.shape[0]
        inverse = torch.full((self.rows,), temperature, dtype=torch.float64, device=hidden.device)
        if temperatures is not None:
            inverse = self.take(temperatures).double()
        # with a cap the scale is inside of it
        self.inverse = (1.0 if cap else logit_scale) / inverse

    def take(self, t: Tensor) -> Tensor:
        return t if self.index is None else t.index_select(0, self.index)

    def put(self, t: Tensor, rows: int, fill: float = 0, dtype: torch.dtype | None = None) -> Tensor:
        """The rows back among those that were left out."""
        t = t.to(dtype or t.dtype)
        if self.index is None:
            return t
        return t.new_full((rows, *t.shape[1:]), fill).index_copy_(0, self.index, t)

    def slices(self) -> Iterator[tuple[int, Tensor, Tensor | None, list[tuple[int, Tensor]]]]:
        """Per slice of the vocabulary: its first column, weight, bias, and per block of rows its start and buffer."""
        vocab, height = self.weight.shape[0], min(self.rows, _TILE_ROWS)
        width = max(64, _TILE_BYTES // (max(height, 1) * self.wide.itemsize))
        buffer = self.hidden.new_empty(height * min(width, vocab))
        for first in range(0, vocab, width):
            weight = self.weight[first : first + width].to(self.wide)
            bias = None if self.bias is None else self.bias[first : first + width].to(self.wide)
            columns = weight.shape[0]
            starts = range(0, self.rows, height) if height else ()
            sizes = ((start, min(height, self.rows - start)) for start in starts)
            yield first, weight, bias, [(s, buffer[: n * columns].view(n, columns)) for s, n in sizes]

    def logits(self, start: int, weight: Tensor, bias: Tensor | None, tile: Tensor) -> None:
        """Fill a tile."""
        hidden = self.hidden[start : start + tile.shape[0]]
        if bias is None:
            torch.mm(hidden, weight.t(), out=tile)
        else:
            torch.addmm(bias, hidden, weight.t(), out=tile)


@torch.library.impl("fastpo::linear_logprobs", "CPU")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    cap: float,
    ignore_index: int,
    stats: int,
    wide: bool,
    expected: bool,
) -> tuple[Tensor, ...]:
    p = _Problem(hidden, weight, targets, bias, temperatures, temperature, logit_scale, cap, ignore_index, wide)
    state = p.inverse.new_zeros((p.rows, 4))
    state[:, 0] = -math.inf
    taken = p.inverse.new_zeros(p.targets.shape)
    top1 = p.targets.new_zeros(p.rows) if stats & 8 else None
    total = p.inverse.new_zeros(p.rows) if stats & 16 else None
    blocks = [slice(s, s + _TILE_ROWS) for s in range(0, p.rows, _TILE_ROWS)]
    # of each block its own, as the kernel wants them: (4, rows)
    states = [state[b].t().contiguous() for b in blocks]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = torch.zeros(p.hidden.shape, dtype=dtype, device=hidden.device) if expected else hidden.new_empty(0)
    for first, w, b, tiles in p.slices():
        for (start, tile), s in zip(tiles, states, strict=True):
            rows = slice(start, start + tile.shape[0])
            p.logits(start, w, b, tile)
            layout = (first, p.targets[rows], p.inverse[rows], logit_scale, cap)
            before = s[0].clone() if expected else s[0]
            torch.ops.fastpo.fold_tile(
                tile,
                *layout,
                s,
                taken[rows],
                None if top1 is None else top1[rows],
                None if total is None else total[rows],
                bool(stats & 1),
                bool(stats & 4),
            )
            if expected:
                # the logits become their exponentials, relative to the largest so far, to which the sums are brought
                one, nothing = torch.ones_like(before), torch.zeros_like(taken[rows])
                torch.ops.fastpo.dlogits_tile(tile, *layout, s, one, None, nothing)
                factor = torch.where(before == s[0], 1.0, torch.exp((before - s[0]) * p.inverse[rows]))
                sums[rows] *= factor[:, None].to(dtype)
                _add_product(sums[rows], tile, w)
    largest, s, weighted, squared = torch.cat([*states, state.new_empty(4, 0)], 1)
    log_sum = s.log()
    logprobs = (taken - largest[:, None]) * p.inverse[:, None] - log_sum[:, None]
    found: list[Tensor | None] = [
        log_sum - math.log(2) * weighted / s,
        largest * p.inverse + log_sum,
        squared.log() - 2 * log_sum,
        top1,
        None if total is None else total * p.inverse / weight.shape[0],
    ]
    count = hidden.shape[0]
    return (
        p.put(torch.where(p.valid, logprobs, 0), count, dtype=dtype),
        p.put(torch.stack([largest, s], 1), count).t().contiguous(),
        p.put(sums * (p.inverse / s)[:, None].to(dtype), count) if expected else sums.to(dtype),
        *(
            p.put(t, count, -1 if bit == 3 else 0, torch.int64 if bit == 3 else dtype)
            if stats >> bit & 1 and t is not None
            else hidden.new_empty(0, dtype=torch.int64 if bit == 3 else dtype)
            for bit, t in enumerate(found)
        ),
    )


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, where out is fp32 and a, b may be narrower."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b)


@torch.library.impl("fastpo::linear_logprobs_backward", "CPU")
def _backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    state: Tensor,
    entropy: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    cap: float,
    ignore_index: int,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    wide: bool,
    needed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    p = _Problem(hidden, weight, targets, bias, temperatures, temperature, logit_scale, cap, ignore_index, wide)
    largest_and_sum = p.take(state.t())
    s = largest_and_sum[:, 1]
    zero = torch.zeros_like(s)
    grads = torch.zeros(p.targets.shape, dtype=torch.float64, device=hidden.device)
    if grad_logprobs is not None:
        grads = torch.where(p.valid, p.take(grad_logprobs).double(), 0)
    upstream = zero if grad_logsumexp is None else p.take(grad_logsumexp).double()
    at = upstream - grads.sum(-1)
    slope = None
    if grad_entropy is not None:
        assert entropy is not None
        # p (at - g (log p + H)) / T with log p = t ln 2 - log S
        g = p.take(grad_entropy).double()
        at = at - g * (p.take(entropy).double() - s.log())
        slope = -math.log(2) * g * p.inverse / s
    at = at * p.inverse / s
    grads = grads * p.inverse[:, None]

    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    nothing = hidden.new_empty(0)
    d_hidden = torch.zeros(p.hidden.shape, dtype=accumulate, device=hidden.device) if needed & 1 else nothing
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needed & 2 else nothing
    d_bias = torch.zeros_like(bias, dtype=accumulate) if needed & 4 and bias is not None else nothing
    states = [largest_and_sum[s : s + _TILE_ROWS].t() for s in range(0, p.rows, _TILE_ROWS)]
    states = [torch.cat([s, torch.zeros_like(s)]).contiguous() for s in states]
    for first, w, b, tiles in p.slices():
        columns = slice(first, first + w.shape[0])
        # over the blocks of rows, in fp32 whatever the weight's dtype
        d_slice = torch.zeros(w.shape, dtype=accumulate, device=w.device) if needed & 2 else nothing
        for (start, tile), block in zip(tiles, states, strict=True):
            rows = slice(start, start + tile.shape[0])
            p.logits(start, w, b, tile)
            part = None if slope is None else slope[rows]
            layout = (first, p.targets[rows], p.inverse[rows], logit_scale, cap, block)
            torch.ops.fastpo.dlogits_tile(tile, *layout, at[rows], part, grads[rows])
            if needed & 1:
                _add_product(d_hidden[rows], tile, w)
            if needed & 2:
                _add_product(d_slice, tile.t(), p.hidden[rows])
            if needed & 4:
                d_bias[columns] += tile.sum(0, dtype=accumulate)
        if needed & 2:
            d_weight[columns] = d_slice
    if needed & 1:
        d_hidden = p.put(d_hidden, hidden.shape[0], dtype=hidden.dtype)
    return d_hidden, d_weight, d_bias.to(weight.dtype)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperatures: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        stats, wide = options[-2:]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # the entropy's gradient would take a third product here, as many as computing the logits again
        ctx.frozen = needs_hidden and not (needs_weight or needs_bias) and not stats & 1
        logprobs, state, expected, *found = torch.ops.fastpo.linear_logprobs(
            hidden, weight, targets, bias, temperatures, *options[:-2], stats, wide, ctx.frozen
        )
        ctx.options = options
        ctx.mark_non_differentiable(*found[2:])
        ctx.set_materialize_grads(False)
        extra = (expected, logprobs) if ctx.frozen else (found[0] if stats & 1 else None,)
        ctx.save_for_backward(hidden, weight, bias, targets, temperatures, state, *extra)
        return logprobs, *found

    @staticmethod
    def backward(
        ctx: Any,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        grad_logsumexp: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        *options, stats, wide = ctx.options
        # the empty tensor that stands for a statistic not asked for has a gradient of no meaning
        upstream = (grad_logprobs, grad_entropy if stats & 1 else None, grad_logsumexp if stats & 2 else None)
        needed = ctx.needs_input_grad[:3]
        grads: list[Tensor | None] = [None] * 3
        if any(g is not None for g in upstream) and any(needed):
            hidden, weight, bias, targets, temperatures, state, *extra = ctx.saved_tensors
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                grads = _differentiable_backward(ctx, hidden, weight, bias, targets, temperatures, upstream)
            elif ctx.frozen:
                expected, logprobs = extra
                grad = _frozen_backward(weight, targets, temperatures, state, expected, logprobs, options, upstream)
                grads[0] = grad.to(hidden.dtype)
            else:
                bits = sum(1 << i for i, n in enumerate(needed) if n)
                found = torch.ops.fastpo.linear_logprobs_backward(
                    hidden, weight, targets, bias, state, *extra, temperatures, *options, *upstream, wide, bits
                )
                grads = [g if n else None for g, n in zip(found, needed, strict=True)]
        return *grads, *[None] * (len(ctx.needs_input_grad) - 3)


def _frozen_backward(
    weight: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    state: Tensor,
    expected: Tensor,
    logprobs: Tensor,
    options: list[Any],
    upstream: tuple[Tensor | None, ...],
) -> Tensor:
    """Hidden's gradient where the head has none: of the weight only the rows of the targets are read."""
    temperature, logit_scale, cap, ignore_index = options
    grad_logprobs, _, grad_logsumexp = upstream
    valid = targets != ignore_index
    total = torch.zeros_like(expected[:, 0]) if grad_logsumexp is None else grad_logsumexp
    if grad_logprobs is None:
        return torch.where(valid.any(-1, keepdim=True), total[:, None] * expected, 0)
    g = torch.where(valid, grad_logprobs, 0)
    t = temperature if temperatures is None else temperatures.double()[:, None]
    slope = torch.full_like(logprobs, logit_scale, dtype=torch.float64) / t
    if cap:
        capped = logprobs * t + state[0, :, None] + t * state[1, :, None].log()
        slope = slope * (1 - (capped / cap) ** 2)
    rows = weight[torch.where(valid, targets, 0)].to(expected.dtype)
    at_targets = ((g * torch.where(valid, slope, 0)).to(expected.dtype)[..., None] * rows).sum(1)
    return torch.where(valid.any(-1, keepdim=True), at_targets + (total - g.sum(-1))[:, None] * expected, 0)


def _differentiable_backward(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    upstream: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """The gradients as functions that can be differentiated again (create_graph), from the reference."""
    if hidden.shape[0] * weight.shape[0] > _MOST_LOGITS:
        raise RuntimeError(
            f"linear_logprobs: a second derivative holds all {hidden.shape[0]} x {weight.shape[0]} logits; "
            f"it is made for at most {_MOST_LOGITS} (create_graph=True)"
        )
    temperature, logit_scale, cap, ignore_index, _, _ = ctx.options
    names = tuple(name for name, g in zip(("entropy", "logsumexp"), upstream[1:], strict=True) if g is not None)
    # views, so that each gradient is that of its own argument, also where one is made from the other
    inputs = [None if t is None else t.view_as(t) for t in (hidden, weight, bias)]
    assert inputs[0] is not None and inputs[1] is not None
    out = vocabulary.linear_logprobs(
        inputs[0],
        inputs[1],
        targets,
        inputs[2],
        temperature=temperature if temperatures is None else temperatures,
        logit_scale=logit_scale,
        softcap=cap or None,
        ignore_index=ignore_index,
        stats=names,
    )
    pairs = [(getattr(out, n), g) for n, g in zip(("logprobs", "entropy", "logsumexp"), upstream, strict=True)]
    used = [(o, g) for o, g in pairs if g is not None]
    wanted = [t for t, n in zip(inputs, ctx.needs_input_grad[:3], strict=True) if n and t is not None]
    found = iter(torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used], create_graph=True))
    return [next(found) if n else None for n in ctx.needs_input_grad[:3]]


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
) -> None:
    _checks.tensor("hidden", hidden, _checks.FLOATS)
    _checks.tensor("weight", weight, _checks.FLOATS)
    _checks.tensor("targets", targets, _checks.INTEGERS)
    _checks.same_device("weight", weight, "hidden", hidden)
    _checks.same_device("targets", targets, "hidden", hidden)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, hidden {hidden.dtype}: they must be of one dtype")
    if hidden.dim() == 0:
        raise ValueError("hidden must have shape (..., H), got a 0-dimensional tensor")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (V, {hidden.shape[-1]}) for hidden of shape "
            f"{tuple(hidden.shape)}; an empty or flat weight is a shard that has to be gathered first"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: the vocabulary (first dimension) is empty")
    if bias is not None:
        _checks.tensor("bias", bias, _checks.FLOATS)
        _checks.same_device("bias", bias, "hidden", hidden)
        _checks.shape("bias", bias, weight.shape[:1], "one number per row of weight")
        if bias.dtype != hidden.dtype:
            raise TypeError(f"bias has dtype {bias.dtype}, hidden {hidden.dtype}: they must be of one dtype")
    _checks.targets(targets, hidden.shape[:-1], f"hidden of shape {tuple(hidden.shape)}")
    _checks.temperature(temperature, hidden.shape[:-1], "hidden", hidden)
    if not 0 < _checks.number("logit_scale", logit_scale) < math.inf:
        raise ValueError(f"logit_scale must be positive and finite, got {logit_scale}")
    if softcap is not None and not 0 < _checks.number("softcap", softcap) < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    _checks.ignore_index(ignore_index)
    _checks.statistics(stats, STATISTICS)


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
    logits_dtype: Literal["auto", "float32"] = "auto",
) -> Tensor | LinearLogprobs:
    """Log-probabilities of chosen tokens from hidden states and the head's weight; the logits never exist at once.

    With z = hidden weightᵀ + bias, they are log softmax(c(z) / T)[target], where c(z) = logit_scale · z, or with a
    softcap c(z) = softcap · tanh(logit_scale · z / softcap). Beside its results the function takes a buffer of about
    a megabyte, and in the backward the gradients: of the hidden states, and of a slice of the weight, in fp32. The
    backward computes the logits again: four matrix products in all. Where only `hidden` needs a gradient (a frozen
    head) and the entropy is not asked for, two products do, nothing is computed again, and the forward keeps one fp32
    tensor of hidden's shape.

    Args:
        hidden: (..., H), fp32, bf16, fp16 or fp64.
        weight: (V, H), of the dtype of `hidden`, as in a transformers lm_head.
        targets: (...) one id per row, or (..., K) several; int64 or int32, in [0, V) or `ignore_index`.
        bias: (V,), or None.
        temperature: a positive number, or a tensor (...) of one per row. No gradient flows to it.
        logit_scale: a positive number that multiplies the logits.
        softcap: the bound of the logits, or None for none.
        ignore_index: targets of this value are skipped: log-prob 0, gradient 0. Rows that have no other are left out
            of every matrix product, so that a batch of which half is prompt costs half; they may hold anything.
        stats: as in `token_logprobs`, and "mean_logit", the mean of c(z) / T over the vocabulary, which is not
            differentiable.
        logits_dtype: dtype of the tiles. "auto" is that of `hidden`: torch's CPU has no product of bf16 matrices with
            an fp32 result, so bf16 logits are rounded to bf16 there. "float32" makes them exact, at the price of a
            product in fp32.

    Returns:
        the log-probs, of the shape of `targets`, fp32 (fp64 for fp64 input); with `stats`, a `LinearLogprobs` tuple.
        No shift of positions: hidden[..., t, :] speaks about targets[..., t].

    Raises:
        TypeError: a dtype or type is not one of the above.
        ValueError: shapes or devices do not match, or a number is not in its domain.
        IndexError: a target is out of range; the message names its place. On other devices than the CPU only with
            FASTPO_DEBUG=1.
        RuntimeError: a second derivative of more than 2^26 logits is asked for (create_graph).
    """
    stats = tuple(stats)
    _check(hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, stats)
    if logits_dtype not in ("auto", "float32"):
        raise ValueError(f"logits_dtype must be 'auto' or 'float32', got {logits_dtype!r}")
    _checks.values(targets, temperature, ignore_index, weight.shape[0])
    if not _native.serves("linear_logprobs", hidden.device, hidden.dtype):
        out = vocabulary.linear_logprobs(
            hidden,
            weight,
            targets,
            bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=ignore_index,
            stats=stats,
        )
        return out if stats else out.logprobs
    rows, ids = hidden.shape[:-1], targets.shape[-1] if targets.dim() == hidden.dim() else 1
    count = math.prod(rows)
    logprobs, *found = _native.call(
        _LinearLogprobs.apply,
        hidden.reshape(count, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(count, ids),
        temperature.reshape(count) if isinstance(temperature, Tensor) else None,
        1.0 if isinstance(temperature, Tensor) else float(temperature),
        float(logit_scale),
        0.0 if softcap is None else float(softcap),
        ignore_index,
        sum(1 << bit for bit, name in enumerate(STATISTICS) if name in stats),
        logits_dtype == "float32",
    )
    logprobs = logprobs.view(targets.shape)
    if not stats:
        return logprobs
    named = zip(STATISTICS, found, strict=True)
    return LinearLogprobs(logprobs, *(t.view(rows) if name in stats else None for name, t in named))
