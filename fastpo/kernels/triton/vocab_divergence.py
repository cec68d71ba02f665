# mypy: allow-untyped-defs
"""`vocab_divergence` in Triton: rows of two streams of logits, read from memory once. See csrc/cpu/vocab_divergence.inc
for the sums, S, Q, U, W and G there, and why there are five; fastpo/kernels/vocab_divergence.py for the schemas.

How a row is cut is in softmax.py. Each of the TILE accumulators has its own running maxima and fp32 sums. Rows are cut
by the vectors of the policy's logits, or, in the backward, by those of the gradients; the streams that begin elsewhere
in a vector are read by single elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels.triton.softmax import (
    INFINITY,
    LN_2,
    LOWEST_FLOAT,
    Rows,
    choose,
    edge_columns,
    launch,
    on_device,
    row_scale,
    row_start,
    rows_of,
    scales,
    vector_of,
    whole_vectors,
)


class Forward(NamedTuple):
    """How the forward is cut: vectors of 16 bytes in a tile of one stream, threads."""

    tile: int
    threads: int


class Backward(NamedTuple):
    """How the backward is cut: vectors of 16 bytes in a tile of one stream, tiles that a program walks, threads."""

    tile: int
    tiles: int
    threads: int


# The default first, the one for short rows last; a benchmark may sweep the others. With two streams, one vector of each
# is as much as a thread should hold, whether there are 32 or 64 in a warp.
FORWARD_CONFIGS = (Forward(256, 256), Forward(128, 128), Forward(64, 64))
BACKWARD_CONFIGS = (Backward(256, 4, 256), Backward(128, 8, 128), Backward(64, 4, 64))

NEAR_ZERO = tl.constexpr(LN_2.value / 2)


@triton.jit
def _exp_tail(r):
    """(e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, as exp_tail of csrc/formulas/math.h."""
    p = 1.0 / 5040 * r + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    return p * r + 0.5


@triton.jit
def _column(a, b, p_max, q_max, inverse, scale, log_ratio, ratio):
    """Of a column p, x = log p - log q, q - p, p x, and q - p + p x, in units of 1 / S.

    p = 0 adds nothing to p x whatever q is, and q = 0 alone is infinite even if p is too small for fp32.
    """
    a = a - p_max
    b = b - q_max
    x = (a - b) * inverse - log_ratio
    p = tl.exp2(a * scale)
    q = tl.exp2(b * scale) * ratio
    near = tl.abs(x) <= NEAR_ZERO
    tail = x * x * _exp_tail(-x)
    excess = tl.where(near, p * (tail - x), q - p)
    weighted = tl.where(p > 0, p * x, tl.where(x == INFINITY, x, 0.0))
    second = tl.where(near, p * tail, excess + weighted)
    return p, q, x, excess, weighted, second


@triton.jit
def _lower(p_shift, q_shift, s, q, u, w, g):
    """Sums for offsets that are higher by the shifts, in units of log 2."""
    p_factor = tl.exp2(-p_shift)
    x = (p_shift - q_shift) * LN_2
    near = tl.abs(x) <= NEAR_ZERO
    tail = x * x * _exp_tail(x)
    # +inf stays: a column that only p has
    w = tl.where(w == INFINITY, w, tl.where(p_factor > 0, p_factor * (w - x * s), 0.0))
    near_g = p_factor * (g + x * u + tail * q)
    near_u = p_factor * (u + (x + tail) * q)
    s = p_factor * s
    q = tl.exp2(-q_shift) * q
    u = tl.where(near, near_u, q - s)
    g = tl.where(near, near_g, u + w)
    return s, q, u, w, g


@triton.jit
def _shift(old, new, scale):
    """How much higher the new maximum is; no matter where there was none."""
    return tl.where(old == new, 0.0, tl.where(old == -INFINITY, 0.0, (new - old) * scale))


@triton.jit
def _accumulate(p_max, q_max, s, q, u, w, g, a, b, inverse, scale):
    """Add a[i, :] and b[i, :], logits of the reference and the policy, to accumulator i."""
    p_new = tl.maximum(p_max, tl.max(a, 1))
    q_new = tl.maximum(q_max, tl.max(b, 1))
    s, q, u, w, g = _lower(_shift(p_max, p_new, scale), _shift(q_max, q_new, scale), s, q, u, w, g)
    # nothing but -inf so far: any finite number gives 2^-inf
    p_top = tl.maximum(p_new, LOWEST_FLOAT)[:, None]
    q_top = tl.maximum(q_new, LOWEST_FLOAT)[:, None]
    p, other, _, excess, weighted, second = _column(a, b, p_top, q_top, inverse, scale, 0.0, 1.0)
    s += tl.sum(p, 1)
    q += tl.sum(other, 1)
    u += tl.sum(excess, 1)
    w += tl.sum(weighted, 1)
    g += tl.sum(second, 1)
    return p_new, q_new, s, q, u, w, g


_FORWARD_NUMBERS = ["inverse", "scale", "rows", "columns"]
for _stream in ("p", "q"):
    _FORWARD_NUMBERS += [f"{_stream}_{name}" for name in ("lead", "outer_stride", "inner_stride", "inner")]


@triton.jit(do_not_specialize=_FORWARD_NUMBERS)
def forward_kernel(
    reference,
    logits,
    mask,
    temperatures,
    divergence,
    state,
    inverse,
    scale,
    p_lead,
    p_outer_stride,
    p_inner_stride,
    p_inner,
    q_lead,
    q_outer_stride,
    q_inner_stride,
    q_inner,
    rows,
    columns,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    ALIKE: tl.constexpr,
    TILE: tl.constexpr,
):
    """A row. ALIKE: those of both streams begin equally far from a multiple of 16 bytes."""
    row = tl.program_id(0)
    keep = row >= 0
    if mask is not None:
        keep = tl.load(mask + row) != 0
    inverse, scale = row_scale(temperatures, row, keep, inverse, scale)
    start = row_start(row, q_lead, q_outer_stride, q_inner_stride, q_inner)
    p_start = row_start(row, p_lead, p_outer_stride, p_inner_stride, p_inner)

    # a row that does not count has no columns
    width = tl.where(keep, columns, 0)
    first, head, vectors = whole_vectors(start, width, E, EDGES)
    body = logits + first * E
    if ALIKE:
        p_body = reference + (p_start + head) // E * E
    else:
        p_body = reference + p_start + head

    lane = tl.arange(0, TILE)
    at_tile = (lane * E)[:, None] + tl.arange(0, E)[None, :]
    p_max = tl.full((TILE,), -INFINITY, tl.float32)
    q_max = tl.full((TILE,), -INFINITY, tl.float32)
    s = tl.zeros((TILE,), tl.float32)
    q = tl.zeros((TILE,), tl.float32)
    u = tl.zeros((TILE,), tl.float32)
    w = tl.zeros((TILE,), tl.float32)
    g = tl.zeros((TILE,), tl.float32)
    for i in range(0, vectors, TILE):
        inside = (i + lane < vectors)[:, None]
        a = tl.load(p_body + i * E + at_tile, mask=inside, other=-INFINITY).to(tl.float32)
        b = tl.load(body + i * E + at_tile, mask=inside, other=-INFINITY).to(tl.float32)
        p_max, q_max, s, q, u, w, g = _accumulate(p_max, q_max, s, q, u, w, g, a, b, inverse, scale)
    if EDGES:
        column, inside = edge_columns(lane, head, vectors, width, 2 * E, E)
        a = tl.load(reference + p_start + column, mask=inside, other=-INFINITY).to(tl.float32)[:, None]
        b = tl.load(logits + start + column, mask=inside, other=-INFINITY).to(tl.float32)[:, None]
        p_max, q_max, s, q, u, w, g = _accumulate(p_max, q_max, s, q, u, w, g, a, b, inverse, scale)

    p_top = tl.max(p_max, 0)
    q_top = tl.max(q_max, 0)
    s, q, u, w, g = _lower(_shift(p_max, p_top, scale), _shift(q_max, q_top, scale), s, q, u, w, g)
    s = tl.sum(s, 0)
    q = tl.sum(q, 0)
    w = tl.sum(w, 0)
    u = tl.sum(u, 0) / s
    # log(1 + u) = 2 atanh(r) = 2 r + r³ (2/3 + 2/5 r² + ...), and u - 2 r = u r
    r = u / (2 + u)
    z = r * r
    odd = z * (2.0 / 17) + 2.0 / 15
    odd = odd * z + 2.0 / 13
    odd = odd * z + 2.0 / 11
    odd = odd * z + 2.0 / 9
    odd = odd * z + 2.0 / 7
    odd = odd * z + 2.0 / 5
    odd = (odd * z + 2.0 / 3) * z
    similar = tl.abs(u) < 0.5
    log_ratio = tl.where(similar, -r * (2 + odd), -tl.log(q / s))
    kl = tl.where(similar, tl.sum(g, 0) / s - r * (u - odd), w / s - log_ratio)
    # what rounding leaves of nothing; a NaN is none
    kl = tl.where(kl < 0, 0.0, kl)
    kl = tl.where(w == INFINITY, INFINITY, kl)
    # NaN or inf in either stream, or nothing but -inf in one
    kl = tl.where((s > 0) & (q > 0) & (s < INFINITY) & (q < INFINITY), kl, float("nan"))
    tl.store(divergence + row, tl.where(keep, kl, 0.0))
    tl.store(state + row, tl.where(keep, p_top, 0.0))
    tl.store(state + rows + row, tl.where(keep, q_top, 0.0))
    tl.store(state + 2 * rows + row, tl.where(keep, s, 0.0))
    tl.store(state + 3 * rows + row, tl.where(keep, log_ratio, 0.0))


_BACKWARD_NUMBERS = [*_FORWARD_NUMBERS, "chunks"]


@triton.jit(do_not_specialize=_BACKWARD_NUMBERS)
def backward_kernel(
    reference,
    logits,
    grad_reference,
    grad_logits,
    grad,
    divergence,
    state,
    mask,
    temperatures,
    inverse,
    scale,
    p_lead,
    p_outer_stride,
    p_inner_stride,
    p_inner,
    q_lead,
    q_outer_stride,
    q_inner_stride,
    q_inner,
    rows,
    columns,
    chunks,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    P_ALIKE: tl.constexpr,
    Q_ALIKE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """One of the `chunks` of a row, TILES tiles long; the first has the edges too. The gradients are contiguous."""
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    keep = row >= 0
    if mask is not None:
        keep = tl.load(mask + row) != 0
    inverse, scale = row_scale(temperatures, row, keep, inverse, scale)
    p_start = row_start(row, p_lead, p_outer_stride, p_inner_stride, p_inner)
    q_start = row_start(row, q_lead, q_outer_stride, q_inner_stride, q_inner)
    start = row.to(tl.int64) * columns
    first, head, vectors = whole_vectors(start, columns, E, EDGES)

    p_max = tl.load(state + row)
    q_max = tl.load(state + rows + row)
    log_ratio = tl.load(state + 3 * rows + row)
    ratio = tl.exp(log_ratio)
    kl = tl.load(divergence + row)
    factor = tl.load(grad + row) * inverse / tl.load(state + 2 * rows + row)
    # a row that has no divergence has no gradient either
    factor = tl.where(keep, tl.where(kl == kl, factor, kl), 0.0)

    begin = chunk * (TILE * TILES)
    end = tl.minimum(begin + TILE * TILES, vectors)
    readable = tl.where(keep, end, 0)
    lane = tl.arange(0, TILE)
    at_tile = (lane * E)[:, None] + tl.arange(0, E)[None, :]
    p_body = reference + p_start + head
    if P_ALIKE:
        p_body = reference + (p_start + head) // E * E
    q_body = logits + q_start + head
    if Q_ALIKE:
        q_body = logits + (q_start + head) // E * E
    for i in range(begin, end, TILE):
        inside = (i + lane < readable)[:, None]
        a = tl.load(p_body + i * E + at_tile, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(q_body + i * E + at_tile, mask=inside, other=0.0).to(tl.float32)
        p, _, x, excess, _, _ = _column(a, b, p_max, q_max, inverse, scale, log_ratio, ratio)
        to = first * E + i * E + at_tile
        inside = (i + lane < end)[:, None]
        if grad_logits is not None:
            tl.store(grad_logits + to, (excess * factor).to(grad_logits.dtype.element_ty), mask=inside)
        if grad_reference is not None:
            slope = tl.where(p > 0, p * (x - kl), 0.0) * factor
            tl.store(grad_reference + to, slope.to(grad_reference.dtype.element_ty), mask=inside)
    if EDGES:
        lanes = tl.where(chunk == 0, 2 * E, 0)
        column, inside = edge_columns(lane, head, vectors, columns, lanes, E)
        read = inside & (column < tl.where(keep, columns, 0))
        a = tl.load(reference + p_start + column, mask=read, other=0.0).to(tl.float32)
        b = tl.load(logits + q_start + column, mask=read, other=0.0).to(tl.float32)
        p, _, x, excess, _, _ = _column(a, b, p_max, q_max, inverse, scale, log_ratio, ratio)
        if grad_logits is not None:
            to = (excess * factor).to(grad_logits.dtype.element_ty)
            tl.store(grad_logits + start + column, to, mask=inside)
        if grad_reference is not None:
            slope = tl.where(p > 0, p * (x - kl), 0.0) * factor
            tl.store(grad_reference + start + column, slope.to(grad_reference.dtype.element_ty), mask=inside)


# of CDNA, 64 lanes
_WARP = 64 if torch.version.hip else 32


def _rows(t: Tensor) -> Rows:
    """Rows with other strides than two, or with elements apart, are copied first."""
    rows = rows_of(t) or rows_of(t.contiguous())
    assert rows is not None
    return rows


def _alike(a: Rows, b: Rows, vector: int) -> bool:
    """Whether rows of both begin equally far from a multiple of 16 bytes."""
    starts = a.starts(vector)
    return starts == b.starts(vector) and (not any(starts) or a.inner == b.inner)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def forward(
    logits: Tensor,
    reference: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    *,
    config: Forward | None = None,
) -> tuple[Tensor, Tensor]:
    """fastpo::vocab_divergence. `config` is one of FORWARD_CONFIGS; by default it is chosen from the sizes."""
    columns = logits.shape[-1]
    divergence = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    count = divergence.numel()
    state = logits.new_empty((4, count), dtype=torch.float32)
    if count == 0:
        return divergence, state
    p, q, vector = _rows(reference), _rows(logits), vector_of(logits)
    config = config or choose(FORWARD_CONFIGS, columns // vector)
    temperatures, inverse, scale = scales(temperatures, temperature)
    with on_device(logits):
        launch(
            forward_kernel,
            count,
            config.threads // _WARP,
            p.base,
            q.base,
            _bytes(mask),
            temperatures,
            divergence,
            state,
            inverse,
            scale,
            *p[1:],
            *q[1:],
            count,
            columns,
            E=vector,
            EDGES=any((*q.starts(vector), columns % vector)),
            ALIKE=_alike(p, q, vector),
            TILE=config.tile,
        )
    return divergence, state


def backward(
    logits: Tensor,
    reference: Tensor,
    grad: Tensor,
    divergence: Tensor,
    state: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    to_logits: bool,
    to_reference: bool,
    *,
    config: Backward | None = None,
) -> tuple[Tensor, Tensor]:
    """fastpo::vocab_divergence_backward. `config` is one of BACKWARD_CONFIGS."""
    grad_logits, grad_reference = (logits.new_empty(logits.shape if w else (0,)) for w in (to_logits, to_reference))
    columns, count = logits.shape[-1], divergence.numel()
    if count == 0:
        return grad_logits, grad_reference
    p, q, vector = _rows(reference), _rows(logits), vector_of(logits)
    out = Rows(logits, 0, 0, columns, count)
    config = config or choose(BACKWARD_CONFIGS, columns // vector)
    chunks = max(1, triton.cdiv(columns // vector, config.tile * config.tiles))
    temperatures, inverse, scale = scales(temperatures, temperature)
    with on_device(logits):
        launch(
            backward_kernel,
            count * chunks,
            config.threads // _WARP,
            p.base,
            q.base,
            grad_reference if to_reference else None,
            grad_logits if to_logits else None,
            grad.contiguous(),
            divergence.contiguous(),
            state.contiguous(),
            _bytes(mask),
            temperatures,
            inverse,
            scale,
            *p[1:],
            *q[1:],
            count,
            columns,
            chunks,
            E=vector,
            EDGES=columns % vector != 0,
            P_ALIKE=_alike(p, out, vector),
            Q_ALIKE=_alike(q, out, vector),
            TILE=config.tile,
            TILES=config.tiles,
        )
    return grad_logits, grad_reference
