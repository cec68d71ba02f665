# mypy: allow-untyped-defs
"""`token_logprobs` in Triton: rows of logits, read from memory once. See fastpo/kernels/token_logprobs.py.

How a row is cut and summed is in softmax.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels.triton.softmax import (
    INFINITY,
    LN_2,
    NO_COLUMN,
    Rows,
    accumulate,
    add_at_ids,
    bit_of,
    bits_of,
    choose,
    common_gradient,
    edge_columns,
    first_nan,
    launch,
    merge,
    on_device,
    row_scale,
    row_start,
    rows_of,
    scales,
    vector_of,
    whole_vectors,
)


class Forward(NamedTuple):
    """How the forward is cut: vectors of 16 bytes in a tile, tiles under way in shared memory (1: none), warps."""

    tile: int
    stages: int
    warps: int


class Backward(NamedTuple):
    """How the backward is cut: vectors of 16 bytes in a tile, tiles that a program walks, warps."""

    tile: int
    tiles: int
    warps: int


# the default first, the one for short rows last; a benchmark may sweep the others
FORWARD_CONFIGS = (Forward(256, 1, 4), Forward(256, 3, 4), Forward(512, 3, 8), Forward(512, 1, 4), Forward(128, 1, 2))
BACKWARD_CONFIGS = (Backward(256, 8, 4), Backward(512, 4, 4), Backward(512, 4, 8), Backward(128, 4, 2))

# programs that keep one multiprocessor busy in the forward, twice over for an even finish
_PROGRAMS_PER_PROCESSOR = 16
# a program with fewer tiles than this spends its time on starting and ending
_TILES_PER_PROGRAM = 4
_MOST_PARTS = 128


@triton.jit
def _row_ids(targets, row, ids, ignore_index, IDS: tl.constexpr):
    """The ids of a row, which of them are to be read, and whether any is."""
    k = tl.arange(0, IDS)
    id = tl.load(targets + row.to(tl.int64) * ids + k, mask=k < ids, other=0).to(tl.int64)
    valid = (k < ids) & (id != ignore_index)
    return id, valid, tl.max(valid.to(tl.int32), 0) > 0


@triton.jit
def _at_ids(base, allowed, id, valid, columns):
    """Logits at the ids; -inf for an id that is not allowed, NaN for one out of range, which is not read."""
    inside = valid & (id >= 0) & (id < columns)
    x = tl.load(base + tl.where(inside, id, 0), mask=inside, other=float("nan")).to(tl.float32)
    if allowed is not None:
        x = tl.where(inside & ~bit_of(allowed, tl.where(inside, id, 0), inside), -INFINITY, x)
    return x


@triton.jit
def _finish(
    m,
    s,
    w,
    q,
    best,
    x_at_ids,
    valid,
    keep,
    inverse,
    base,
    allowed,
    row,
    rows,
    columns,
    ids,
    logprobs,
    state,
    entropy,
    logsumexp,
    log_sum_p2,
    top1,
    E: tl.constexpr,
    IDS: tl.constexpr,
    TILE: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
    P2: tl.constexpr,
    TOP1: tl.constexpr,
):
    """The outputs of a row from its sums; 0, and -1 for `top1`, for a row that has only ignored ids."""
    log_sum = tl.log(s)
    k = tl.arange(0, IDS)
    taken = (x_at_ids - m) * inverse - log_sum
    tl.store(logprobs + row.to(tl.int64) * ids + k, tl.where(valid, taken, 0.0), mask=k < ids)
    tl.store(state + row, tl.where(keep, m, 0.0))
    tl.store(state + rows + row, tl.where(keep, s, 0.0))
    if ENTROPY:
        tl.store(entropy + row, tl.where(keep, log_sum - LN_2 * (w / s), 0.0))
    if P2:
        tl.store(log_sum_p2 + row, tl.where(keep, tl.log(q) - 2 * log_sum, 0.0))
    if LOGSUMEXP or TOP1:
        nan = columns * 0 + NO_COLUMN
        if s != s:
            nan = first_nan(base, allowed, columns, TILE)
        if LOGSUMEXP:
            value = m * inverse + log_sum
            value = tl.where((s != s) & (nan == NO_COLUMN), INFINITY, value)
            tl.store(logsumexp + row, tl.where(keep, value, 0.0))
        if TOP1:
            # of the vector that begins at `best`, the first element that is the maximum; 0 where all are -inf
            place = tl.where(m == -INFINITY, 0, best) + tl.arange(0, E)
            there = place < tl.where(keep, columns, 0)
            x = tl.load(base + place, mask=there, other=-INFINITY).to(tl.float32)
            if allowed is not None:
                x = tl.where(bit_of(allowed, place, there), x, -INFINITY)
            column = tl.min(tl.where(x == m, place, NO_COLUMN), 0)
            column = tl.where(m == -INFINITY, 0, column)
            column = tl.where(nan == NO_COLUMN, column, nan)
            tl.store(top1 + row, tl.where(keep, column, -1).to(tl.int64))


_FORWARD_NUMBERS = ["inverse", "scale", "ignore_index", "lead", "outer_stride", "inner_stride"]
_FORWARD_NUMBERS += ["inner", "rows", "columns", "ids", "parts", "allowed_stride"]


@triton.jit(do_not_specialize=_FORWARD_NUMBERS)
def forward_kernel(
    logits,
    targets,
    temperatures,
    allowed,
    logprobs,
    state,
    entropy,
    logsumexp,
    log_sum_p2,
    top1,
    sums,
    inverse,
    scale,
    ignore_index,
    lead,
    outer_stride,
    inner_stride,
    inner,
    rows,
    columns,
    ids,
    parts,
    allowed_stride,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    IDS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
    P2: tl.constexpr,
    TOP1: tl.constexpr,
):
    """A row, or with `sums` one of the `parts` of a row, whose sums then go there."""
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    id, valid, keep = _row_ids(targets, row, ids, ignore_index, IDS)
    inverse, scale = row_scale(temperatures, row, keep, inverse, scale)
    start = row_start(row, lead, outer_stride, inner_stride, inner)
    base = logits + start
    if allowed is not None:
        allowed += row.to(tl.int64) * allowed_stride
    x_at_ids = _at_ids(base, allowed, id, valid, columns)

    # a row that nobody asks about has no columns
    width = tl.where(keep, columns, 0)
    first, head, vectors = whole_vectors(start, width, E, EDGES)
    body = logits + first * E
    span = tl.cdiv(tl.cdiv(vectors, parts), TILE) * TILE
    begin = tl.minimum(part * span, vectors)
    end = tl.minimum(begin + span, vectors)

    lane = tl.arange(0, TILE)
    element = tl.arange(0, E)
    m = tl.full((TILE,), -INFINITY, tl.float32)
    s = tl.zeros((TILE,), tl.float32)
    w = tl.zeros((TILE,), tl.float32)
    q = tl.zeros((TILE,), tl.float32)
    best = tl.full((TILE,), NO_COLUMN, tl.int32)
    at_tile = (lane * E)[:, None] + element[None, :]
    whole = begin + (end - begin) // TILE * TILE
    for i in tl.range(begin, whole, TILE, num_stages=STAGES):
        x = tl.load(body + i * E + at_tile).to(tl.float32)
        if allowed is not None:
            x = tl.where(bits_of(allowed, head + (i + lane) * E, None, E, EDGES), x, -INFINITY)
        m, s, w, q, best = accumulate(m, s, w, q, best, x, head + (i + lane) * E, scale, ENTROPY, P2, TOP1)
    x = tl.load(body + whole * E + at_tile, mask=(whole + lane < end)[:, None], other=-INFINITY).to(tl.float32)
    if allowed is not None:
        x = tl.where(bits_of(allowed, head + (whole + lane) * E, whole + lane < end, E, EDGES), x, -INFINITY)
    m, s, w, q, best = accumulate(m, s, w, q, best, x, head + (whole + lane) * E, scale, ENTROPY, P2, TOP1)
    if EDGES:
        column, mask = edge_columns(lane, head, vectors, width, tl.where(part == 0, 2 * E, 0), E)
        x = tl.load(base + column, mask=mask, other=-INFINITY).to(tl.float32)
        if allowed is not None:
            x = tl.where(bit_of(allowed, column, mask), x, -INFINITY)
        if TOP1:
            best = tl.where((x == m) & (column < best), column, best)
        m, s, w, q, best = accumulate(m, s, w, q, best, x[:, None], column, scale, ENTROPY, P2, TOP1)

    m, s, w, q, best = merge(m, s, w, q, best, scale)
    if sums is not None:
        at = sums + tl.program_id(0) * 5
        tl.store(at, m)
        tl.store(at + 1, s)
        tl.store(at + 2, w)
        tl.store(at + 3, q)
        tl.store(at + 4, best.to(tl.float32, bitcast=True))
    else:
        _finish(
            m,
            s,
            w,
            q,
            best,
            x_at_ids,
            valid,
            keep,
            inverse,
            base,
            allowed,
            row,
            rows,
            columns,
            ids,
            logprobs,
            state,
            entropy,
            logsumexp,
            log_sum_p2,
            top1,
            E,
            IDS,
            TILE,
            ENTROPY,
            LOGSUMEXP,
            P2,
            TOP1,
        )


@triton.jit(do_not_specialize=_FORWARD_NUMBERS)
def combine_kernel(
    logits,
    targets,
    temperatures,
    allowed,
    logprobs,
    state,
    entropy,
    logsumexp,
    log_sum_p2,
    top1,
    sums,
    inverse,
    scale,
    ignore_index,
    lead,
    outer_stride,
    inner_stride,
    inner,
    rows,
    columns,
    ids,
    parts,
    allowed_stride,
    E: tl.constexpr,
    IDS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
    P2: tl.constexpr,
    TOP1: tl.constexpr,
):
    """A row from the sums of its parts, always in the same order."""
    row = tl.program_id(0)
    id, valid, keep = _row_ids(targets, row, ids, ignore_index, IDS)
    inverse, scale = row_scale(temperatures, row, keep, inverse, scale)
    base = logits + row_start(row, lead, outer_stride, inner_stride, inner)
    if allowed is not None:
        allowed += row.to(tl.int64) * allowed_stride
    x_at_ids = _at_ids(base, allowed, id, valid, columns)
    part = tl.arange(0, PARTS)
    at = sums + (row * parts + part) * 5
    mask = part < parts
    m = tl.load(at, mask=mask, other=-INFINITY)
    s = tl.load(at + 1, mask=mask, other=0.0)
    w = tl.load(at + 2, mask=mask, other=0.0)
    q = tl.load(at + 3, mask=mask, other=0.0)
    best = tl.load(at + 4, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    m, s, w, q, best = merge(m, s, w, q, best, scale)
    _finish(
        m,
        s,
        w,
        q,
        best,
        x_at_ids,
        valid,
        keep,
        inverse,
        base,
        allowed,
        row,
        rows,
        columns,
        ids,
        logprobs,
        state,
        entropy,
        logsumexp,
        log_sum_p2,
        top1,
        E,
        IDS,
        TILE,
        ENTROPY,
        LOGSUMEXP,
        P2,
        TOP1,
    )


_BACKWARD_NUMBERS = ["inverse", "scale", "ignore_index", "lead", "outer_stride", "inner_stride"]
_BACKWARD_NUMBERS += ["out_lead", "out_outer_stride", "out_inner_stride", "inner", "rows", "columns", "ids", "chunks"]
_BACKWARD_NUMBERS += ["allowed_stride"]


@triton.jit(do_not_specialize=_BACKWARD_NUMBERS)
def backward_kernel(
    logits,
    gradient,
    targets,
    state,
    entropy,
    temperatures,
    allowed,
    grad_logprobs,
    grad_entropy,
    grad_logsumexp,
    inverse,
    scale,
    ignore_index,
    lead,
    outer_stride,
    inner_stride,
    out_lead,
    out_outer_stride,
    out_inner_stride,
    inner,
    rows,
    columns,
    ids,
    chunks,
    allowed_stride,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    ALIKE: tl.constexpr,
    IDS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """One of the `chunks` of a row, TILES tiles long; the first has the edges too.

    `gradient` may be the logits. ALIKE: rows of both begin equally far from a multiple of 16 bytes; else only the
    stores are vectors.
    """
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    id, valid, keep = _row_ids(targets, row, ids, ignore_index, IDS)
    inverse, scale = row_scale(temperatures, row, keep, inverse, scale)
    start = row_start(row, lead, outer_stride, inner_stride, inner)
    base = logits + start
    out_start = row_start(row, out_lead, out_outer_stride, out_inner_stride, inner)
    out = gradient + out_start
    first, head, vectors = whole_vectors(out_start, columns, E, EDGES)

    if allowed is not None:
        allowed += row.to(tl.int64) * allowed_stride
    m = tl.load(state + row)
    s = tl.load(state + rows + row)
    total = s * 0
    if grad_logsumexp is not None:
        total = tl.load(grad_logsumexp + row)
    if grad_logprobs is not None:
        k = tl.arange(0, IDS)
        known = valid
        if allowed is not None:
            # of an id that is not allowed there is no gradient
            inside = valid & (id >= 0) & (id < columns)
            known &= ~inside | bit_of(allowed, tl.where(inside, id, 0), inside)
        upstream = tl.load(grad_logprobs + row.to(tl.int64) * ids + k, mask=known, other=0.0)
        total -= tl.sum(upstream, 0)
    at = total
    slope = s * 0
    if grad_entropy is not None:
        # p (total - grad_entropy (log p + H)) / T with log p = t ln 2 - log S
        weight = tl.load(grad_entropy + row)
        at = total - weight * (tl.load(entropy + row) - tl.log(s))
        slope = -LN_2 * weight * inverse / s
    at = at * inverse / s
    # rows that are not to be read are all 0, which gives 2^0 (0 + 0 · 0)
    at = tl.where(keep, at, 0.0)
    slope = tl.where(keep, slope, 0.0)

    begin = chunk * (TILE * TILES)
    end = tl.minimum(begin + TILE * TILES, vectors)
    near = chunk < 0
    if grad_logprobs is not None:
        own_targets = targets + row.to(tl.int64) * ids
        own_grads = grad_logprobs + row.to(tl.int64) * ids
        inside = (id >= head + begin * E) & (id < head + end * E)
        if EDGES:
            inside |= (id < head) | (id >= head + vectors * E)
        near = tl.max((valid & inside).to(tl.int32), 0) > 0

    lane = tl.arange(0, TILE)
    element = tl.arange(0, E)
    at_tile = (lane * E)[:, None] + element[None, :]
    out_body = gradient + first * E
    if ALIKE:
        body = logits + (start + head) // E * E
    else:
        body = base + head
    # every thread writes only where it has read, so that the gradient may take the place of the logits
    readable = tl.where(keep, end, 0)
    for i in range(begin, end, TILE):
        x = tl.load(body + i * E + at_tile, mask=(i + lane < readable)[:, None], other=0.0).to(tl.float32)
        g = common_gradient(x, m, scale, at, slope, grad_entropy is not None)
        if grad_logprobs is not None:
            if near:
                low = head + i * E
                g = add_at_ids(g, low, low, low + TILE * E, own_targets, own_grads, ids, ignore_index, inverse)
        if allowed is not None:
            g = tl.where(bits_of(allowed, head + (i + lane) * E, i + lane < end, E, EDGES), g, 0.0)
        tl.store(out_body + i * E + at_tile, g.to(gradient.dtype.element_ty), mask=(i + lane < end)[:, None])
    if EDGES:
        lanes = tl.where(chunk == 0, 2 * E, 0)
        column, mask = edge_columns(lane[:, None], head, vectors, columns, lanes, E)
        x = tl.load(base + column, mask=mask & (column < tl.where(keep, columns, 0)), other=0.0).to(tl.float32)
        g = common_gradient(x, m, scale, at, slope, grad_entropy is not None)
        if grad_logprobs is not None:
            if near:
                tail = head + vectors * E
                g = add_at_ids(g, 0, 0, head, own_targets, own_grads, ids, ignore_index, inverse)
                g = add_at_ids(g, tail - E, tail, columns, own_targets, own_grads, ids, ignore_index, inverse)
        if allowed is not None:
            g = tl.where(bit_of(allowed, column, mask), g, 0.0)
        tl.store(out + column, g.to(gradient.dtype.element_ty), mask=mask)


@functools.lru_cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def parts_of_a_row(rows: int, vectors: int, processors: int, tile: int) -> int:
    """Into how many parts the forward cuts a row, so that few long rows occupy the device too.

    The order of a row's sums follows from this, so that its last bits may depend on the number of rows where there are
    fewer than a device needs to be full.
    """
    wanted = -(-_PROGRAMS_PER_PROCESSOR * processors // max(rows, 1))
    return max(1, min(wanted, vectors // (_TILES_PER_PROGRAM * tile), _MOST_PARTS))


def _set_stride(allowed: Tensor | None) -> int:
    """Words from the set of a row to the next; 0 for one that all share."""
    return 0 if allowed is None or allowed.dim() == 1 else allowed.shape[-1]


def forward(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    stats: int,
    allowed: Tensor | None = None,
    *,
    config: Forward | None = None,
    parts: int | None = None,
) -> tuple[Tensor, ...]:
    """fastpo::token_logprobs. Rows with other strides than two, or with elements apart, are copied first.

    Args:
        config: one of FORWARD_CONFIGS; by default chosen from the sizes.
        parts: parts of a row, by default as `parts_of_a_row` says.
    """
    columns, ids = logits.shape[-1], targets.shape[-1]
    count = logits.numel() // columns

    def output(bit: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty(logits.shape[:-1] if stats >> bit & 1 else (0,), dtype=dtype)

    logprobs = logits.new_empty(targets.shape, dtype=torch.float32)
    state = logits.new_empty((2, count), dtype=torch.float32)
    outputs = (logprobs, state, output(0), output(1), output(2), output(3, torch.int64))
    if count == 0:
        return outputs
    rows = rows_of(logits) or rows_of(logits.contiguous())
    assert rows is not None
    vector = vector_of(logits)
    config = config or choose(FORWARD_CONFIGS, columns // vector)
    if parts is None:
        processors = _processors(logits.get_device()) if logits.is_cuda else 1
        parts = parts_of_a_row(count, columns // vector, processors, config.tile)
    temperatures, inverse, scale = scales(temperatures, temperature)
    arguments = (
        rows.base,
        targets.contiguous(),
        temperatures,
        None if allowed is None else allowed.contiguous(),
        *outputs,
        logits.new_empty(count * parts * 5, dtype=torch.float32) if parts > 1 else None,
        inverse,
        scale,
        ignore_index,
        *rows[1:],
        count,
        columns,
        ids,
        parts,
        _set_stride(allowed),
    )
    constants = dict(
        E=vector,
        IDS=triton.next_power_of_2(max(ids, 1)),
        TILE=config.tile,
        **{name: bool(stats >> bit & 1) for bit, name in enumerate(("ENTROPY", "LOGSUMEXP", "P2", "TOP1"))},
    )
    edges = any((*rows.starts(vector), columns % vector))
    with on_device(logits):
        stages = config.stages
        launch(forward_kernel, count * parts, config.warps, *arguments, EDGES=edges, STAGES=stages, **constants)
        if parts > 1:
            launch(combine_kernel, count, config.warps, *arguments, PARTS=triton.next_power_of_2(parts), **constants)
    return outputs


def _write_gradient(
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor,
    state: Tensor,
    entropy: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    upstream: tuple[Tensor | None, ...],
    allowed: Tensor | None,
    config: Backward | None,
) -> None:
    """The gradient into `gradient`, which is contiguous or the logits themselves."""
    columns, ids = logits.shape[-1], targets.shape[-1]
    count = logits.numel() // columns
    if count == 0:
        return
    rows = rows_of(logits)
    assert rows is not None
    out = rows
    if gradient is not logits:
        out = Rows(gradient, 0, rows.inner * columns if count > rows.inner else 0, columns, rows.inner)
    vector = vector_of(logits)
    config = config or choose(BACKWARD_CONFIGS, columns // vector)
    chunks = max(1, triton.cdiv(columns // vector, config.tile * config.tiles))
    temperatures, inverse, scale = scales(temperatures, temperature)
    grad_logprobs, grad_entropy, grad_logsumexp = (None if g is None else g.contiguous() for g in upstream)
    with on_device(logits):
        launch(
            backward_kernel,
            count * chunks,
            config.warps,
            rows.base,
            out.base,
            targets.contiguous(),
            state.contiguous(),
            None if grad_entropy is None or entropy is None else entropy.contiguous(),
            temperatures,
            None if allowed is None else allowed.contiguous(),
            grad_logprobs,
            grad_entropy,
            grad_logsumexp,
            inverse,
            scale,
            ignore_index,
            rows.lead,
            rows.outer_stride,
            rows.inner_stride,
            out.lead,
            out.outer_stride,
            out.inner_stride,
            rows.inner,
            count,
            columns,
            ids,
            chunks,
            _set_stride(allowed),
            E=vector,
            EDGES=any((*out.starts(vector), columns % vector)),
            ALIKE=rows.starts(vector) == out.starts(vector),
            IDS=triton.next_power_of_2(max(ids, 1)),
            TILE=config.tile,
            TILES=config.tiles,
        )


def backward(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    entropy: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    allowed: Tensor | None = None,
    *,
    config: Backward | None = None,
) -> Tensor:
    """fastpo::token_logprobs_backward. Logits that the forward copies are copied here too."""
    if rows_of(logits) is None:
        logits = logits.contiguous()
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    upstream = (grad_logprobs, grad_entropy, grad_logsumexp)
    rest = (targets, state, entropy, temperatures, temperature, ignore_index, upstream, allowed, config)
    _write_gradient(logits, gradient, *rest)
    return gradient


def backward_inplace(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    entropy: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    allowed: Tensor | None = None,
    *,
    config: Backward | None = None,
) -> None:
    """fastpo::token_logprobs_backward_. Logits that the forward copies are written by a copy."""
    upstream = (grad_logprobs, grad_entropy, grad_logsumexp)
    rest = (targets, state, entropy, temperatures, temperature, ignore_index, upstream, allowed, config)
    to = logits if rows_of(logits) is not None else logits.contiguous()
    _write_gradient(to, to, *rest)
    if to is not logits:
        logits.copy_(to)
