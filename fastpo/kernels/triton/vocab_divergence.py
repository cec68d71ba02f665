# mypy: allow-untyped-defs
"""`vocab_divergence` in Triton: rows of two streams of logits, read from memory once for the KL, twice for the others.
See csrc/cpu/vocab_divergence.inc for the sums, S, Q, U, W and G there, why there are five, and for the formulas of a
column; fastpo/kernels/vocab_divergence.py for the schemas.

How a row is cut is in softmax.py. Each of the TILE accumulators has its own running maxima and fp32 sums. Rows are cut
by the vectors of the policy's logits, or, in the backward, by those of the gradients; the streams that begin elsewhere
in a vector are read by single elements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels import vocab_divergence
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

KL, JSD, SKEW_KL, TOTAL_VARIATION, ALPHA = (tl.constexpr(i) for i in vocab_divergence.STATE_ROWS)
NEAR_ZERO = tl.constexpr(LN_2.value / 2)
LEAST = torch.finfo(torch.float32).tiny


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
def _log1p_tail(f):
    """log(1 + f) - f for 1 + f in [sqrt(1/2), sqrt(2)), as log1p_tail of csrc/formulas/math.h."""
    s = f / (f + 2.0)
    z = s * s
    p = 2.0 / 9 * z + 2.0 / 7
    p = p * z + 2.0 / 5
    p = p * z + 2.0 / 3
    return s * (z * p - f)


@triton.jit
def _log1p(u, f):
    """log(1 + f) and what it is beyond f, for 1 + f given as u > 0."""
    near = (u > 0.7071067811865476) & (u < 1.4142135623730951)
    tail = _log1p_tail(f)
    value = tl.where(near, f + tail, tl.log(u))
    return value, tl.where(near, tail, value - f)


@triton.jit
def _mixture(p, q, x, excess, weight, rest):
    """Of a column log(p / m) and log(q / m) for m = weight p + rest q, and the terms of KL(p || m) and KL(q || m), as
    Mixture of csrc/cpu/vocab_divergence.inc."""
    size = tl.abs(x)
    p_larger = x > 0
    larger = tl.where(p_larger, p, q)
    smaller = tl.where(p_larger, q, p)
    own = tl.where(p_larger, weight, rest)
    other = tl.where(p_larger, rest, weight)
    y = tl.maximum(-size, -87.0)
    quotient = tl.exp(y)
    less = tl.where(size <= NEAR_ZERO, y + y * y * _exp_tail(y), quotient - 1)
    more = own * (-less / quotient)
    larger_log, larger_rest = _log1p(own + other * quotient, other * less)
    near = more < 1
    smaller_log, smaller_rest = _log1p(1 + more, more)
    smaller_log = tl.where(near, smaller_log, size + larger_log)
    larger_term = tl.where(larger > 0, -larger * larger_rest, 0.0)
    far_term = own * tl.abs(excess) - tl.where(smaller > 0, smaller * smaller_log, 0.0)
    smaller_term = tl.where(near, -smaller * smaller_rest, far_term)
    p_log = -tl.where(p_larger, larger_log, smaller_log)
    q_log = -tl.where(p_larger, smaller_log, larger_log)
    p_term = tl.where(p_larger, larger_term, smaller_term)
    q_term = tl.where(p_larger, smaller_term, larger_term)
    return p_log, q_log, p_term, q_term


@triton.jit
def _relative(p, q, excess, weight, rest):
    """(q - p) / m, and 0 where neither is possible."""
    m = weight * p + rest * q
    return tl.where(m > 0, excess / tl.where(m > 0, m, 1.0), 0.0)


@triton.jit
def _signed_half(excess, v):
    """v times half the sign of q - p."""
    half = 0.5 * v
    return tl.where(excess > 0, half, tl.where(excess < 0, -half, 0.0))


@triton.jit
def _alpha(p, q, x, p_log, q_log, excess, alpha, rest):
    """Of a column p F, q E and the term of the α-divergence, as AlphaDivergence of csrc/cpu/vocab_divergence.inc."""
    power = alpha * p_log + rest * q_log
    product = tl.where(power == power, tl.exp(power), 0.0)
    up = alpha * x
    down = -rest * x
    up_near = tl.abs(up) <= NEAR_ZERO
    up_tail = alpha * _exp_tail(up)
    policy = tl.where(up_near, q * (x + x * x * up_tail), (product - q) / alpha)
    down_near = tl.abs(down) <= NEAR_ZERO
    reference = tl.where(down_near, p * (x - rest * (x * x * _exp_tail(down))), (p - product) / rest)
    near = up_near & (tl.abs(x) <= NEAR_ZERO)
    term = tl.where(near, q * (x * x) * (_exp_tail(x) - up_tail), -excess - policy) / rest
    return reference, policy, term


@triton.jit
def _terms(a, b, p_max, q_max, inverse, scale, log_ratio, ratio, weight, rest, KIND: tl.constexpr):
    """Of a column, the terms of both sums of a divergence that is not the KL."""
    p, q, x, excess, _, _ = _column(a, b, p_max, q_max, inverse, scale, log_ratio, ratio)
    if KIND == TOTAL_VARIATION:
        term_0 = _signed_half(excess, excess)
        term_1 = _signed_half(excess, p)
    elif KIND == ALPHA:
        p_log = (a - p_max) * inverse
        q_log = (b - q_max) * inverse + log_ratio
        _, _, term_0 = _alpha(p, q, x, p_log, q_log, excess, weight, rest)
        term_1 = tl.zeros_like(term_0)
    else:
        _, _, term_0, term_1 = _mixture(p, q, x, excess, weight, rest)
        if KIND == SKEW_KL:
            term_1 = excess * _relative(p, q, excess, weight, rest)
    return term_0, term_1


@triton.jit
def _slopes(
    a, b, p_max, q_max, inverse, scale, log_ratio, ratio, divergence, extra_0, extra_1, weight, rest, KIND: tl.constexpr
):
    """The gradients to the reference's and the policy's logits, over the row's common factor."""
    p, q, x, excess, _, _ = _column(a, b, p_max, q_max, inverse, scale, log_ratio, ratio)
    if KIND == JSD:
        p_log, q_log, _, _ = _mixture(p, q, x, excess, weight, rest)
        to_reference = tl.where(p > 0, p * (p_log - extra_0), 0.0) * weight
        to_policy = tl.where(q > 0, q * (q_log - extra_1), 0.0) * rest
    elif KIND == SKEW_KL:
        p_log, _, _, _ = _mixture(p, q, x, excess, weight, rest)
        e = -rest * _relative(p, q, excess, weight, rest)
        near = rest * e - p_log * p_log * _exp_tail(p_log)
        h = tl.where(tl.abs(p_log) <= NEAR_ZERO, near, p_log - weight * e)
        to_reference = tl.where(p > 0, p * (h - rest * extra_0 - divergence), 0.0)
        to_policy = q * (extra_0 - e) * rest
    elif KIND == TOTAL_VARIATION:
        to_reference = p * extra_0 - _signed_half(excess, p)
        to_policy = _signed_half(excess, q) - q * (extra_0 + divergence)
    elif KIND == ALPHA:
        p_log = (a - p_max) * inverse
        q_log = (b - q_max) * inverse + log_ratio
        to_reference, to_policy, _ = _alpha(p, q, x, p_log, q_log, excess, weight, rest)
        to_reference -= p * (weight * divergence)
        to_policy = -to_policy - q * (rest * divergence)
    else:
        to_reference = tl.where(p > 0, p * (x - divergence), 0.0)
        to_policy = excess
    return to_reference, to_policy


@triton.jit
def _lower(p_shift, q_shift, s, q, u, w, g, WEIGHTED: tl.constexpr):
    """Sums for offsets that are higher by the shifts, in units of log 2; W and G if WEIGHTED."""
    p_factor = tl.exp2(-p_shift)
    x = (p_shift - q_shift) * LN_2
    near = tl.abs(x) <= NEAR_ZERO
    tail = x * x * _exp_tail(x)
    if WEIGHTED:
        # +inf stays: a column that only p has
        w = tl.where(w == INFINITY, w, tl.where(p_factor > 0, p_factor * (w - x * s), 0.0))
        near_g = p_factor * (g + x * u + tail * q)
    near_u = p_factor * (u + (x + tail) * q)
    s = p_factor * s
    q = tl.exp2(-q_shift) * q
    u = tl.where(near, near_u, q - s)
    if WEIGHTED:
        g = tl.where(near, near_g, u + w)
    return s, q, u, w, g


@triton.jit
def _shift(old, new, scale):
    """How much higher the new maximum is; no matter where there was none."""
    return tl.where(old == new, 0.0, tl.where(old == -INFINITY, 0.0, (new - old) * scale))


@triton.jit
def _accumulate(p_max, q_max, s, q, u, w, g, a, b, inverse, scale, WEIGHTED: tl.constexpr):
    """Add a[i, :] and b[i, :], logits of the reference and the policy, to accumulator i."""
    p_new = tl.maximum(p_max, tl.max(a, 1))
    q_new = tl.maximum(q_max, tl.max(b, 1))
    s, q, u, w, g = _lower(_shift(p_max, p_new, scale), _shift(q_max, q_new, scale), s, q, u, w, g, WEIGHTED)
    # nothing but -inf so far: any finite number gives 2^-inf
    p_top = tl.maximum(p_new, LOWEST_FLOAT)[:, None]
    q_top = tl.maximum(q_new, LOWEST_FLOAT)[:, None]
    p, other, _, excess, weighted, second = _column(a, b, p_top, q_top, inverse, scale, 0.0, 1.0)
    s += tl.sum(p, 1)
    q += tl.sum(other, 1)
    u += tl.sum(excess, 1)
    if WEIGHTED:
        w += tl.sum(weighted, 1)
        g += tl.sum(second, 1)
    return p_new, q_new, s, q, u, w, g


_FORWARD_NUMBERS = ["inverse", "scale", "parameter", "rest", "rows", "columns"]
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
    parameter,
    rest,
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
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """A row. ALIKE: those of both streams begin equally far from a multiple of 16 bytes.

    A KIND that is not the KL reads it again when its sums are known. `rest` is 1 - parameter.
    """
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
        p_max, q_max, s, q, u, w, g = _accumulate(p_max, q_max, s, q, u, w, g, a, b, inverse, scale, KIND == KL)
    if EDGES:
        column, inside = edge_columns(lane, head, vectors, width, 2 * E, E)
        a = tl.load(reference + p_start + column, mask=inside, other=-INFINITY).to(tl.float32)[:, None]
        b = tl.load(logits + start + column, mask=inside, other=-INFINITY).to(tl.float32)[:, None]
        p_max, q_max, s, q, u, w, g = _accumulate(p_max, q_max, s, q, u, w, g, a, b, inverse, scale, KIND == KL)

    p_top = tl.max(p_max, 0)
    q_top = tl.max(q_max, 0)
    s, q, u, w, g = _lower(_shift(p_max, p_top, scale), _shift(q_max, q_top, scale), s, q, u, w, g, KIND == KL)
    s = tl.sum(s, 0)
    q = tl.sum(q, 0)
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
    if KIND == KL:
        w = tl.sum(w, 0)
        out = tl.where(similar, tl.sum(g, 0) / s - r * (u - odd), w / s - log_ratio)
        # what rounding leaves of nothing; a NaN is none
        out = tl.where(out < 0, 0.0, out)
        out = tl.where(w == INFINITY, INFINITY, out)
    else:
        ratio = tl.exp(log_ratio)
        sum_0 = tl.zeros((TILE,), tl.float32)
        sum_1 = tl.zeros((TILE,), tl.float32)
        # names of the first loop keep their types
        for i in range(0, vectors, TILE):
            within = (i + lane < vectors)[:, None]
            x = tl.load(p_body + i * E + at_tile, mask=within, other=-INFINITY).to(tl.float32)
            y = tl.load(body + i * E + at_tile, mask=within, other=-INFINITY).to(tl.float32)
            term_0, term_1 = _terms(x, y, p_top, q_top, inverse, scale, log_ratio, ratio, parameter, rest, KIND)
            sum_0 += tl.sum(term_0, 1)
            sum_1 += tl.sum(term_1, 1)
        if EDGES:
            column, inside = edge_columns(lane, head, vectors, width, 2 * E, E)
            a = tl.load(reference + p_start + column, mask=inside, other=-INFINITY).to(tl.float32)
            b = tl.load(logits + start + column, mask=inside, other=-INFINITY).to(tl.float32)
            edge_0, edge_1 = _terms(a, b, p_top, q_top, inverse, scale, log_ratio, ratio, parameter, rest, KIND)
            sum_0 += edge_0
            sum_1 += edge_1
        total_0 = tl.sum(sum_0, 0) / s
        total_1 = tl.sum(sum_1, 0) / s
        if KIND == JSD:
            out = parameter * total_0 + rest * total_1
            tl.store(state + 4 * rows + row, tl.where(keep, total_0, 0.0))
            tl.store(state + 5 * rows + row, tl.where(keep, total_1, 0.0))
        elif KIND == ALPHA:
            out = tl.where(total_0 < 0, 0.0, total_0)
        else:
            out = total_0
            if KIND == SKEW_KL:
                total_1 = -parameter * rest * total_1
            tl.store(state + 4 * rows + row, tl.where(keep, total_1, 0.0))
    # NaN or inf in either stream, or nothing but -inf in one
    out = tl.where((s > 0) & (q > 0) & (s < INFINITY) & (q < INFINITY), out, float("nan"))
    tl.store(divergence + row, tl.where(keep, out, 0.0))
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
    parameter,
    rest,
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
    KIND: tl.constexpr,
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
    result = tl.load(divergence + row)
    extra_0 = 0.0
    extra_1 = 0.0
    if KIND != KL and KIND != ALPHA:
        extra_0 = tl.load(state + 4 * rows + row)
    if KIND == JSD:
        extra_1 = tl.load(state + 5 * rows + row)
    factor = tl.load(grad + row) * inverse / tl.load(state + 2 * rows + row)
    # a row that has no divergence has no gradient either
    factor = tl.where(keep, tl.where(result == result, factor, result), 0.0)

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
        to_reference, to_policy = _slopes(
            a, b, p_max, q_max, inverse, scale, log_ratio, ratio, result, extra_0, extra_1, parameter, rest, KIND
        )
        at = first * E + i * E + at_tile
        inside = (i + lane < end)[:, None]
        if grad_logits is not None:
            tl.store(grad_logits + at, (to_policy * factor).to(grad_logits.dtype.element_ty), mask=inside)
        if grad_reference is not None:
            tl.store(grad_reference + at, (to_reference * factor).to(grad_reference.dtype.element_ty), mask=inside)
    if EDGES:
        lanes = tl.where(chunk == 0, 2 * E, 0)
        column, inside = edge_columns(lane, head, vectors, columns, lanes, E)
        read = inside & (column < tl.where(keep, columns, 0))
        a = tl.load(reference + p_start + column, mask=read, other=0.0).to(tl.float32)
        b = tl.load(logits + q_start + column, mask=read, other=0.0).to(tl.float32)
        to_reference, to_policy = _slopes(
            a, b, p_max, q_max, inverse, scale, log_ratio, ratio, result, extra_0, extra_1, parameter, rest, KIND
        )
        at = start + column
        if grad_logits is not None:
            tl.store(grad_logits + at, (to_policy * factor).to(grad_logits.dtype.element_ty), mask=inside)
        if grad_reference is not None:
            tl.store(grad_reference + at, (to_reference * factor).to(grad_reference.dtype.element_ty), mask=inside)


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


def _weights(parameter: float) -> tuple[float, float]:
    """The parameter and what it is short of 1, of which fp32 holds the log."""
    return math.copysign(max(abs(parameter), LEAST), parameter), max(1 - parameter, LEAST)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def forward(
    logits: Tensor,
    reference: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    kind: int,
    parameter: float,
    *,
    config: Forward | None = None,
) -> tuple[Tensor, Tensor]:
    """fastpo::vocab_divergence. `config` is one of FORWARD_CONFIGS; by default it is chosen from the sizes."""
    columns = logits.shape[-1]
    divergence = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    count = divergence.numel()
    state = logits.new_empty((vocab_divergence.STATE_ROWS[kind], count), dtype=torch.float32)
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
            *_weights(parameter),
            *p[1:],
            *q[1:],
            count,
            columns,
            E=vector,
            EDGES=any((*q.starts(vector), columns % vector)),
            ALIKE=_alike(p, q, vector),
            KIND=kind,
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
    kind: int,
    parameter: float,
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
            *_weights(parameter),
            *p[1:],
            *q[1:],
            count,
            columns,
            chunks,
            E=vector,
            EDGES=columns % vector != 0,
            P_ALIKE=_alike(p, out, vector),
            Q_ALIKE=_alike(q, out, vector),
            KIND=kind,
            TILE=config.tile,
            TILES=config.tiles,
        )
    return grad_logits, grad_reference
