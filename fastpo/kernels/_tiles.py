"""The driver of `linear_logprobs`: the head's logits one tile at a time, by the vendor's matrix product.

A tile is a block of rows x a slice of the vocabulary. The forward fills it and `fold_tile` adds it to the rows' sums.
The backward fills it again, or finds it kept; `dlogits_tile` turns it into its gradient, which two products consume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.reference.vocabulary import any_allowed, are_allowed, count_allowed, unpack_allowed

LN2 = math.log(2)
# elements of a tile that are handled in fp64 by torch at a time
_WIDE = 1 << 20


class Tiling(NamedTuple):
    """Rows of a tile, and bytes of the buffer that holds one: on a CPU for each thread."""

    rows: int
    bytes: int


def _multiplied_on_cpus() -> frozenset[torch.dtype]:
    """The dtypes whose products a CPU's torch leaves to a library.

    Those of bf16 and fp16 matrices are oneDNN's where the processor has the instructions for it, and else loops of
    torch's own, of which the slowest were seen to take a hundred times as long as products of fp32.
    """
    found = {torch.float32, torch.float64}
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")):
        supported = getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None
        if supported is not None and supported():
            found.add(dtype)
    return frozenset(found)


MULTIPLIED_ON_CPUS = _multiplied_on_cpus()

# On a CPU each core's share of a tile stays in its second-level cache between the product and the kernel. On a GPU a
# tile is large enough for the product to run at full speed
TILINGS = {"cpu": Tiling(512, 1 << 20), "cuda": Tiling(8192, 256 << 20)}


class Found(NamedTuple):
    """What the forward returns. What was not asked for has no elements.

    `state` (2, N): the largest number under the softmax, and the sum of the exponentials relative to it. `shard`, on
    the CPU: the id of the weight's first row, and the columns of a slice. `expected` (N, H): the gradient with respect
    to hidden of the logarithm of that sum, without the targets' own terms. `slopes` (N, K): the derivative by the logit
    of what is under the softmax, at the targets. `kept`: the logits of the rows that count, tile after tile. `peaks`:
    per slice and row, the largest number under the softmax.
    """

    logprobs: Tensor
    state: Tensor
    shard: Tensor
    expected: Tensor
    slopes: Tensor
    kept: Tensor
    peaks: Tensor
    entropy: Tensor
    logsumexp: Tensor
    log_sum_p2: Tensor
    top1: Tensor
    mean_logit: Tensor


class Slice(NamedTuple):
    """A part of the vocabulary; `first` counts from the weight's first row."""

    first: int
    weight: Tensor
    bias: Tensor | None
    lora_b: Tensor | None

    @property
    def columns(self) -> int:
        return self.weight.shape[0]


class Tile(NamedTuple):
    """A block of rows of a slice, and where its logits begin among all that are kept."""

    rows: slice
    start: int
    shape: tuple[int, int]

    def within(self, storage: Tensor, start: int = 0) -> Tensor:
        return storage[start : start + self.shape[0] * self.shape[1]].view(self.shape)


class Problem:
    """The rows that somebody asks about, compacted, and their tiles."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        rows: Tensor | None,
        temperatures: Tensor | None,
        allowed: Tensor | None,
        temperature: float,
        logit_scale: float,
        cap: float,
        lora_scale: float,
        ignore_index: int,
        group: str | None,
        wide: bool,
        *,
        first: int,
        width: int | None = None,
    ):
        self.count = hidden.shape[0]
        self.accumulate = torch.promote_types(hidden.dtype, torch.float32)
        mixed = multiplies_into_wide(hidden)
        # of the products' operands
        self.narrow = self.accumulate if wide and not mixed else hidden.dtype
        self.tile_dtype = self.accumulate if mixed else self.narrow
        self.group = group
        self.weight, self.bias, self.logit_scale, self.cap = weight, bias, logit_scale, cap
        targets = targets.contiguous()
        valid = targets != ignore_index
        if rows is None:
            # no arithmetic is spent on the other rows
            keep = valid.any(-1)
            rows = None if bool(keep.all()) else keep.nonzero().squeeze(-1)
        self.index = rows
        self.valid = self.take(valid)
        self.hidden = self.take(hidden).to(self.narrow).contiguous()
        self.targets = torch.where(self.valid, self.take(targets).long() - first, -1).contiguous()
        # which targets' log-probs have a gradient
        self.moved = self.valid
        self.allowed = self.outside = None
        if allowed is not None:
            self.allowed = (allowed if len(allowed) == 1 else self.take(allowed)).contiguous()
            self.outside = outside(self.allowed, self.targets, weight.shape[0], group)
            self.moved = self.valid & ~self.outside
            self.targets = torch.where(self.outside, -1, self.targets)
        self.rows = self.hidden.shape[0]
        inverse = torch.full((self.rows,), temperature, dtype=torch.float64, device=hidden.device)
        if temperatures is not None:
            inverse = self.take(temperatures).double()
        # with a cap the scale is inside of it
        self.inverse = (1.0 if cap else logit_scale) / inverse
        self.lora_a, self.lora_b, self.lora_scale = lora_a, lora_b, lora_scale
        self.low = None
        if lora_a is not None:
            self.low = (self.hidden @ lora_a.to(self.narrow).t()) * lora_scale
        self.tiling = TILINGS[hidden.device.type]
        self.height = min(self.rows, self.tiling.rows)
        threads = torch.get_num_threads() if hidden.device.type == "cpu" else 1
        if width is None:
            width = self.tiling.bytes * threads // (max(self.height, 1) * self.tile_dtype.itemsize)
            # whole vectors, and rows that begin at multiples of them
            width = max(64, width // 64 * 64)
        # the backward has the forward's, whose logits may be kept, whatever the number of threads has become
        self.width = width
        self.buffer = hidden.new_empty(self.height * min(self.width, weight.shape[0]), dtype=self.tile_dtype)
        self.gradient = None
        if self.tile_dtype != self.narrow:
            self.gradient = torch.empty_like(self.buffer, dtype=self.narrow)

    def take(self, t: Tensor) -> Tensor:
        return t if self.index is None else t.index_select(0, self.index)

    def put(self, t: Tensor, fill: float = 0, dtype: torch.dtype | None = None) -> Tensor:
        """The rows back among those that were left out."""
        t = t.to(dtype or t.dtype)
        if self.index is None:
            return t
        return t.new_full((self.count, *t.shape[1:]), fill).index_copy_(0, self.index, t)

    def check_allowed(self) -> None:
        """Every row has an allowed token, where values may be looked at; of a process group, on some rank."""
        if self.allowed is None or (self.group is None and not _checks.readable(self.allowed)):
            return
        some = all_reduce(any_allowed(self.allowed, self.weight.shape[0]).int(), self.group) > 0
        every = torch.ones(self.rows, dtype=torch.bool, device=some.device)
        _checks.some_allowed(self.put(every, False), self.put(some & every, True))

    def sets(self, s: Slice, rows: slice) -> Tensor | None:
        """The packed sets of a tile, whose first column is that of a word: (1 or rows, words)."""
        if self.allowed is None:
            return None
        words = self.allowed[:, s.first // 32 : -(-(s.first + s.columns) // 32)]
        return words if len(words) == 1 else words[rows]

    def slices(self) -> Iterator[Slice]:
        """Each valid until the next."""
        vocab, size = self.weight.shape
        widened = None
        if self.weight.dtype != self.narrow:
            widened = self.weight.new_empty(min(self.width, vocab), size, dtype=self.narrow)
        for first in range(0, vocab, self.width):
            part = slice(first, first + self.width)
            weight = self.weight[part]
            yield Slice(
                first,
                weight if widened is None else widened[: len(weight)].copy_(weight),
                None if self.bias is None else self.bias[part].to(self.tile_dtype),
                None if self.lora_b is None else self.lora_b[part].to(self.narrow),
            )

    def tiles(self, s: Slice) -> Iterator[Tile]:
        for row in range(0, self.rows, max(self.height, 1)):
            height = min(self.height, self.rows - row)
            yield Tile(slice(row, row + height), s.first * self.rows + row * s.columns, (height, s.columns))

    def fill(self, out: Tensor, s: Slice, rows: slice) -> None:
        """The logits of a tile, without scale and cap."""
        hidden = self.hidden[rows]
        if out.dtype == self.narrow:
            if s.bias is None:
                torch.mm(hidden, s.weight.t(), out=out)
            else:
                torch.addmm(s.bias, hidden, s.weight.t(), out=out)
        else:
            torch.mm(hidden, s.weight.t(), out_dtype=out.dtype, out=out)
            if s.bias is not None:
                out.add_(s.bias)
        if self.low is not None and s.lora_b is not None:
            add_product(out, self.low[rows], s.lora_b.t())

    def layout(self, s: Slice, rows: slice) -> tuple[Any, ...]:
        """What both tile kernels take beside the tile."""
        return s.first, self.targets[rows], self.inverse[rows], self.logit_scale, self.cap

    def capped(self, logits: Tensor) -> Tensor:
        logits = logits.double()
        return self.cap * torch.tanh(self.logit_scale / self.cap * logits) if self.cap else logits


def multiplies_into_wide(t: Tensor) -> bool:
    """Whether there are products of narrow matrices with an fp32 result, so that logits are not rounded."""
    return t.is_cuda


def add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool = False) -> None:
    """out += a b, where out may be wider than a and b; or out = a b for the `first` one."""
    if first and a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif first and multiplies_into_wide(a):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif first:
        out.copy_(a @ b)
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    elif multiplies_into_wide(a):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(a @ b)


def outside(allowed: Tensor, ids: Tensor, columns: int, group: str | None) -> Tensor:
    """Which ids (N, K), counted from the weight's first row, some rank has in its columns but not in its sets."""
    here = (ids >= 0) & (ids < columns)
    if columns:
        here &= ~are_allowed(allowed.expand(len(ids), -1), torch.where(here, ids, 0))
    return here if group is None else all_reduce(here.int(), group) > 0


def resolve(group: str) -> Any:
    """The process group of a name."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group)  # type: ignore[arg-type]


def all_reduce(t: Tensor, group: str | None) -> Tensor:
    """The sum over the group, in place."""
    if group is not None:
        torch.distributed.all_reduce(t, group=resolve(group))
    return t


def gather(t: Tensor, group: str) -> Tensor:
    """(ranks, ...) of every rank's tensor of one shape."""
    ranks = resolve(group)
    out = t.new_empty(ranks.size() * t.numel())
    torch.distributed.all_gather_into_tensor(out, t.contiguous().view(-1), group=ranks)
    return out.view(ranks.size(), *t.shape)


def _checksum(t: Tensor | None) -> Tensor | int:
    """A number that depends on every bit and on the order; it wraps around."""
    if t is None:
        return 0
    bits = t.double().view(torch.int64) if t.is_floating_point() else t.long()
    place = torch.arange(1, t.numel() + 1, device=t.device)
    return (bits.reshape(-1) * (place * 0x9E3779B1)).sum()


def shard_of(
    weight: Tensor, targets: Tensor, rows: Tensor | None, temperatures: Tensor | None, options: int, group: str | None
) -> tuple[int, int]:
    """The id of this rank's first row of the weight, and the size of the whole vocabulary.

    Raises on every rank if their rows or options (of which `options` is a hash) are not the same: then the weight is
    sharded for another reason.
    """
    if group is None:
        return 0, weight.shape[0]
    mine: list[Any] = [weight.shape[0], *targets.shape, 0 if rows is None else len(rows), options]
    mine += [_checksum(t) for t in (targets, rows, temperatures)]
    ranks = gather(torch.stack([torch.as_tensor(n, device=targets.device) for n in mine]), group).tolist()
    if any(r[1:] != ranks[0][1:] for r in ranks):
        raise ValueError(
            "process_group: its ranks hold different targets, rows, temperatures or options. With a weight sharded "
            "over the vocabulary every rank has the same; a weight sharded by FSDP or ZeRO has to be gathered first, "
            "as it is inside the forward of the module that was wrapped"
        )
    sizes = [r[0] for r in ranks]
    return sum(sizes[: resolve(group).rank()]), sum(sizes)


def forward(
    p: Problem, first: int, vocabulary: int, stats: int, expected: bool, budget: int, skip: float
) -> tuple[Tensor, ...]:
    device = p.hidden.device
    states = [p.inverse.new_zeros((4, min(p.height, p.rows - r))) for r in range(0, p.rows, max(p.height, 1))]
    for state in states:
        state[0] = -math.inf
    # a target that no rank has gives NaN
    taken = torch.full(p.targets.shape, math.nan, dtype=torch.float64, device=device)
    top1 = p.targets.new_zeros(p.rows) if stats & 8 else None
    total = p.inverse.new_zeros(p.rows) if stats & 16 else None
    logits = p.rows * p.weight.shape[0]
    kept = p.buffer.new_empty(logits if 0 < logits * p.tile_dtype.itemsize <= budget else 0)
    expected = expected and not kept.numel()
    sums = torch.zeros((p.rows if expected else 0, p.hidden.shape[1]), dtype=p.accumulate, device=device)
    peaks = []
    for s in p.slices():
        if skip:
            peaks.append(p.inverse.new_empty(p.rows))
        for tile, state in zip(p.tiles(s), states, strict=True):
            rows = tile.rows
            data = tile.within(kept, tile.start) if kept.numel() else tile.within(p.buffer)
            p.fill(data, s, rows)
            if skip:
                sets = p.sets(s, rows)
                among = data if sets is None else torch.where(unpack_allowed(sets, s.columns), data, -math.inf)
                peaks[-1][rows] = p.capped(among.amax(1))
            before = state[0].clone() if expected else state[0]
            torch.ops.fastpo.fold_tile(
                data,
                *p.layout(s, rows),
                state,
                taken[rows],
                None if top1 is None else top1[rows],
                None if total is None else total[rows],
                bool(stats & 1),
                bool(stats & 4),
                p.sets(s, rows),
            )
            if expected:
                _add_expected(p, s, tile, data, before, state, sums[rows])
    state = torch.cat([*states, p.inverse.new_empty(4, 0)], 1)
    found = (p.targets >= 0) & (p.targets < p.weight.shape[0])
    if p.group is not None:
        state, taken, top1, total = _merge(p, first, state, taken, found, top1, total)
    if p.outside is not None:
        taken = torch.where(p.outside, -math.inf, taken)
    if p.allowed is not None and total is not None:
        counts = count_allowed(p.allowed, p.weight.shape[0])
        total = total * (vocabulary / all_reduce(counts, p.group).double())
    largest, s, weighted, squared = state
    log_sum = s.log()
    slopes = p.inverse[:, None].expand(p.targets.shape) if expected else taken[:0]
    if p.cap and expected:
        slopes = slopes * p.logit_scale * (1 - (taken / p.cap) ** 2)
    logprobs = (taken - largest[:, None]) * p.inverse[:, None] - log_sum[:, None]
    statistics: list[Tensor | None] = [
        log_sum - LN2 * weighted / s,
        largest * p.inverse + log_sum,
        squared.log() - 2 * log_sum,
        top1,
        None if total is None else total * p.inverse / vocabulary,
    ]
    dtypes = [torch.int64 if bit == 3 else p.accumulate for bit in range(len(statistics))]
    return Found(
        p.put(torch.where(p.valid, logprobs, 0), dtype=p.accumulate),
        p.put(torch.stack([largest, s], 1)).t().contiguous(),
        torch.tensor([first, p.width]),
        p.put(sums * (p.inverse / s)[:, None].to(p.accumulate)) if expected else sums,
        p.put(slopes) if expected else slopes,
        kept,
        torch.stack(peaks) if peaks else p.inverse.new_empty((0, 0)),
        *(
            p.put(t, -1 if bit == 3 else 0, dtypes[bit])
            if stats >> bit & 1 and t is not None
            else torch.empty(0, dtype=dtypes[bit], device=device)
            for bit, t in enumerate(statistics)
        ),
    )


def _add_expected(p: Problem, s: Slice, tile: Tile, data: Tensor, before: Tensor, state: Tensor, sums: Tensor) -> None:
    """Add Σ exp · weight of a folded tile, relative to the largest number so far, to which the sums are brought."""
    rows = tile.rows
    targets = p.targets[rows]
    one, zero = torch.ones_like(before), torch.zeros(targets.shape, dtype=torch.float64, device=data.device)
    # nothing but -inf so far: any finite number gives 0
    relative = state.clone()
    relative[0].clamp_(min=torch.finfo(torch.float32).min)
    data = _dlogits(p, s, tile, data, relative, one, None, zero)
    # The targets' own terms are added where they can be exact: of a token that is nearly certain, they cancel all but
    # the last digits
    column = targets - s.first
    inside = (column >= 0) & (column < s.columns)
    # the least of what is there and 0, or, for an id of another slice, infinity
    least = torch.where(inside, 0.0, math.inf).to(data.dtype)
    data.scatter_reduce_(1, torch.where(inside, column, 0), least, "amin")
    factor = torch.where(before == state[0], 1.0, torch.exp((before - state[0]) * p.inverse[rows]))
    sums *= factor[:, None].to(sums.dtype)
    add_product(sums, data, s.weight)


def _dlogits(
    p: Problem, s: Slice, tile: Tile, data: Tensor, state: Tensor, at: Tensor, slope: Tensor | None, grads: Tensor
) -> Tensor:
    """A tile's gradient in the dtype of the products, in the tile's own place if it fits there."""
    out = None if p.gradient is None else tile.within(p.gradient)
    sets = p.sets(s, tile.rows)
    torch.ops.fastpo.dlogits_tile(data, *p.layout(s, tile.rows), state, at, slope, grads, out, sets)
    return data if out is None else out


def _merge(
    p: Problem, first: int, state: Tensor, taken: Tensor, found: Tensor, top1: Tensor | None, total: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The rows' sums over the whole vocabulary, from those over each rank's part. One collective."""
    assert p.group is not None
    parts = [*state, *taken.t(), *found.t().double()]
    parts += [] if top1 is None else [(top1 + first).double()]
    parts += [] if total is None else [total]
    every = gather(torch.stack(parts), p.group)
    m, s, w, q = every[:, :4].unbind(1)
    largest = m.max(0).values
    delta = torch.where(m == largest, 0, (m - largest) * p.inverse / LN2)
    factor = torch.exp2(delta)
    # a rank all of whose logits are -inf adds 0, not 0 · inf; one with a NaN adds that
    s, w, q = (
        torch.where(factor == 0, t * 0, factor * moved).sum(0)
        for t, moved in ((s, s), (w, w + delta * s), (q, factor * q))
    )
    ids = taken.shape[1]
    there = every[:, 4 + ids : 4 + 2 * ids] > 0
    values = torch.where(there, every[:, 4 : 4 + ids], 0).sum(0)
    taken = torch.where(there.any(0), values, math.nan).t().contiguous()
    at = 4 + 2 * ids
    if top1 is not None:
        # the lowest id of equals; a NaN comes first
        winner = torch.where(every[:, 1].isnan(), math.inf, m).argmax(0)
        top1 = every[:, at].gather(0, winner[None])[0].long()
        at += 1
    if total is not None:
        total = every[:, at].sum(0)
    return torch.stack([largest, s, w, q]), taken, top1, total


def backward(
    p: Problem,
    state: Tensor,
    kept: Tensor,
    peaks: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    skip: float,
    needed: int,
) -> tuple[Tensor, ...]:
    """The gradients of hidden, weight, bias, lora_a and lora_b: those of which a bit of `needed` is set."""
    device = p.hidden.device
    largest_and_sum = p.take(state.t())
    s = largest_and_sum[:, 1]
    grads = torch.zeros(p.targets.shape, dtype=torch.float64, device=device)
    if grad_logprobs is not None:
        grads = torch.where(p.moved, p.take(grad_logprobs).double(), 0).contiguous()
    at = -grads.sum(-1)
    if grad_logsumexp is not None:
        at = at + p.take(grad_logsumexp).double()
    slope = None
    if grad_entropy is not None:
        assert entropy is not None
        # p (at - g (log p + H)) / T with log p = t ln 2 - log S
        g = p.take(grad_entropy).double()
        at = at - g * (p.take(entropy).double() - s.log())
        slope = -LN2 * g * p.inverse / s
    at = at * p.inverse / s
    grads = grads * p.inverse[:, None]
    skipped = _skipped(p, largest_and_sum[:, 0], peaks, at, slope, skip) if skip and peaks.numel() else None

    def zeros(wanted: int, like: Tensor | None) -> Tensor:
        shape = like.shape if needed & wanted and like is not None else (0,)
        return torch.zeros(shape, dtype=p.accumulate, device=device)

    low = p.low is not None and bool(needed & 25)
    d_hidden, d_bias = zeros(1, p.hidden), zeros(4, p.bias)
    d_low = torch.zeros_like(p.low, dtype=p.accumulate) if low and p.low is not None else None
    d_weight, d_lora_b = SliceGradient(p, p.weight, needed & 2), SliceGradient(p, p.lora_b, needed & 16)
    states = [largest_and_sum[r : r + p.height].t() for r in range(0, p.rows, max(p.height, 1))]
    states = [torch.cat([t, torch.zeros_like(t)]).contiguous() for t in states]
    for n, part in enumerate(p.slices()):
        columns = slice(part.first, part.first + part.columns)
        d_weight.begin(columns)
        d_lora_b.begin(columns)
        for m, (tile, block) in enumerate(zip(p.tiles(part), states, strict=True)):
            if skipped is not None and skipped[n][m]:
                continue
            rows, data = tile.rows, tile.within(p.buffer)
            if kept.numel():
                # a copy: there may be a second backward
                data.copy_(tile.within(kept, tile.start))
            else:
                p.fill(data, part, rows)
            bend = None if slope is None else slope[rows]
            data = _dlogits(p, part, tile, data, block, at[rows], bend, grads[rows])
            if needed & 1:
                add_product(d_hidden[rows], data, part.weight)
            if needed & 2:
                d_weight.add(data.t(), p.hidden[rows])
            if needed & 4:
                d_bias[columns] += data.sum(0, dtype=p.accumulate)
            if d_low is not None and part.lora_b is not None:
                add_product(d_low[rows], data, part.lora_b)
            if needed & 16 and p.low is not None:
                d_lora_b.add(data.t(), p.low[rows])
        d_weight.end()
        d_lora_b.end()
    d_lora_a = zeros(8, p.lora_a)
    if d_low is not None and p.lora_a is not None:
        d_low = all_reduce(d_low, p.group) * p.lora_scale
        if needed & 8:
            d_lora_a = d_low.t() @ p.hidden.to(p.accumulate)
    if needed & 1:
        d_hidden = all_reduce(d_hidden, p.group)
        if d_low is not None and p.lora_a is not None:
            d_hidden.addmm_(d_low, p.lora_a.to(p.accumulate))
        d_hidden = p.put(d_hidden)
    dtype = p.weight.dtype
    return d_hidden.to(dtype), d_weight.out, d_bias.to(dtype), d_lora_a.to(dtype), d_lora_b.out


def variance(p: Problem, state: Tensor, entropy: Tensor) -> Tensor:
    """Per row, the variance of what is under the softmax, in fp64, from logits that are computed again."""
    largest, s = p.take(state.t()).unbind(1)
    largest, log_sum = largest * p.inverse, s.log()
    mean = largest + log_sum - p.take(entropy)
    out = torch.zeros_like(mean)
    for part in p.slices():
        # in fp64 there are a few copies
        height = max(1, _WIDE // part.columns)
        for tile in p.tiles(part):
            data = tile.within(p.buffer)
            p.fill(data, part, tile.rows)
            for r in range(0, len(data), height):
                rows = slice(tile.rows.start + r, min(tile.rows.start + r + height, tile.rows.stop))
                x = p.capped(data[r : r + height]) * p.inverse[rows, None]
                probability = torch.exp(x - (largest[rows] + log_sum[rows])[:, None])
                if (sets := p.sets(part, rows)) is not None:
                    probability = torch.where(unpack_allowed(sets, part.columns), probability, 0)
                # an impossible token adds 0, not 0 · inf
                off = torch.where(probability == 0, 0, x - mean[rows, None])
                out[rows] += (probability * off.square()).sum(1)
    return p.put(all_reduce(out, p.group))


class SliceGradient:
    """The gradient of a matrix with a row per token, slice by slice: summed in fp32 whatever its dtype.

    A sum of that dtype, or of one block of rows, is made in its place. `wanted` 0: nothing is made, `out` is empty.
    """

    def __init__(self, p: Problem, like: Tensor | None, wanted: int):
        self.wanted = bool(wanted) and like is not None
        like = p.weight if like is None else like
        self.out = like.new_empty(like.shape if self.wanted else 0)
        apart = self.wanted and like.dtype != p.accumulate and p.rows > p.height
        self.sums = like.new_empty((min(p.width, len(like)), like.shape[1]) if apart else 0, dtype=p.accumulate)

    def begin(self, columns: slice) -> None:
        self.part = self.out[columns]
        self.sum = self.sums[: len(self.part)] if self.sums.numel() else self.part
        self.empty = True

    def add(self, a: Tensor, b: Tensor) -> None:
        add_product(self.sum, a, b, first=self.empty)
        self.empty = False

    def end(self) -> None:
        if self.empty:
            self.part.zero_()
        elif self.sum is not self.part:
            self.part.copy_(self.sum)


def _skipped(p: Problem, largest: Tensor, peaks: Tensor, at: Tensor, slope: Tensor | None, skip: float) -> list[Any]:
    """Per slice and block of rows, whether no element of the gradient is larger than `skip`."""
    # below the range of an exponent, a tile without an allowed token included, it is nothing
    t = ((peaks - largest) * (p.inverse / LN2)).clamp(min=-2048)
    bound = torch.exp2(t) * at.abs()
    if slope is not None:
        # 2^t |t| grows up to t = -1/ln 2
        bound += torch.where(t < -1 / LN2, torch.exp2(t) * t.abs(), 1 / (math.e * LN2)) * slope.abs()
    if p.cap:
        bound *= p.logit_scale
    small = bound <= skip
    slices = torch.arange(len(peaks), device=peaks.device)[:, None, None]
    own = (torch.div(p.targets, p.width, rounding_mode="floor") == slices) & p.moved
    small &= ~own.any(-1)
    blocks = small.split(max(p.height, 1), 1)
    return torch.stack([b.all(1) for b in blocks], 1).tolist()
