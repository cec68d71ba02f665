# mypy: allow-untyped-defs
"""Sums of exponentials over rows of logits in Triton: what token_logprobs and linear_logprobs share.

A tile is (TILE, E), where E elements are 16 bytes: one thread loads a row of it as one vector, and reductions along
it need no other thread. Each of the TILE accumulators has its own running maximum; they meet after the loop. In units
of log 2, with t = (x - maximum) / (T ln 2), the sums are S = Σ 2^t, W = Σ t 2^t (for the entropy) and Q = Σ 4^t (for
Σ p²).

A row need not begin or end at a multiple of 16 bytes: the fewer than E elements before the first whole vector and
after the last are its edges, read one by one.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# below this 2^t is nothing next to the row's largest term 1
LOWEST_POWER = tl.constexpr(-126.0)
LOWEST_FLOAT = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def accumulate(m, s, w, q, best, x, column, scale, ENTROPY: tl.constexpr, P2: tl.constexpr, TOP1: tl.constexpr):
    """Add x[i, :], whose first element is in `column[i]`, to accumulator i.

    A NaN is passed over by the maxima and shows in the sums, as does +inf (inf - inf).
    """
    largest = tl.max(x, 1)
    if TOP1:
        best = tl.where(largest > m, column, best)
    new = tl.maximum(m, largest)
    # nothing but -inf so far: any finite number gives 2^-inf
    t = (x - tl.maximum(new, LOWEST_FLOAT)[:, None]) * scale
    e = tl.exp2(t)
    # -inf - -inf is clamped too: the sums are 0 then
    shift = tl.maximum((m - new) * scale, LOWEST_POWER)
    factor = tl.exp2(shift)
    if ENTROPY:
        # where e is 0, t may be -inf: an impossible token adds nothing
        w = factor * (shift * s + w) + tl.sum(e * tl.maximum(t, LOWEST_POWER), 1)
    if P2:
        q = factor * factor * q + tl.sum(e * e, 1)
    s = factor * s + tl.sum(e, 1)
    return new, s, w, q, best


@triton.jit
def merge(m, s, w, q, best, scale):
    """One accumulator from a vector of them."""
    top = tl.max(m, 0)
    shift = tl.maximum((m - top) * scale, LOWEST_POWER)
    factor = tl.exp2(shift)
    w = tl.sum(factor * (shift * s + w), 0)
    q = tl.sum(factor * factor * q, 0)
    s = tl.sum(factor * s, 0)
    best = tl.min(tl.where(m == top, best, NO_COLUMN), 0)
    return top, s, w, q, best


@triton.jit
def whole_vectors(start, columns, E: tl.constexpr, EDGES: tl.constexpr):
    """First whole vector of a row (counted from the aligned base), elements before it, number of whole vectors."""
    if EDGES:
        first = (start + (E - 1)) // E
        head = tl.minimum((first * E - start).to(tl.int32), columns)
    else:
        first = start // E
        head = columns * 0
    return first, head, (columns - head) // E


@triton.jit
def edge_columns(lane, head, vectors, columns, lanes, E: tl.constexpr):
    """The columns of the edges, one for each lane of the first 2 E, and which of the first `lanes` have one."""
    column = tl.where(lane < E, lane, head + vectors * E + lane - E)
    mask = (lane < head) | ((lane >= E) & (column < columns))
    return column, mask & (lane < lanes)


@triton.jit
def _word_of(words, column, mask):
    if mask is None:
        word = tl.load(words + column // 32)
    else:
        word = tl.load(words + column // 32, mask=mask, other=0)
    return word


@triton.jit
def bit_of(words, column, mask):
    """Whether columns are allowed: bit c % 32 of word c / 32 is column c's. Without a mask, all are there."""
    return ((_word_of(words, column, mask) >> (column % 32)) & 1) != 0


@triton.jit
def bits_of(words, column, mask, E: tl.constexpr, EDGES: tl.constexpr):
    """Which of the E columns from each `column` on are allowed: one word has them all, two if rows have edges."""
    at = column[:, None] + tl.arange(0, E)[None, :]
    word = _word_of(words, column, mask)[:, None]
    if EDGES:
        last = _word_of(words, column + (E - 1), mask)[:, None]
        word = tl.where(at // 32 == column[:, None] // 32, word, last)
    return ((word >> (at % 32)) & 1) != 0


@triton.jit
def first_nan(base, allowed, columns, WIDTH: tl.constexpr):
    found = tl.full((WIDTH,), NO_COLUMN, tl.int32)
    lane = tl.arange(0, WIDTH)
    for c in range(0, columns, WIDTH):
        x = tl.load(base + c + lane, mask=c + lane < columns, other=0.0).to(tl.float32)
        if allowed is not None:
            x = tl.where(bit_of(allowed, c + lane, c + lane < columns), x, 0.0)
        found = tl.minimum(found, tl.where(x != x, c + lane, NO_COLUMN))
    return tl.min(found, 0)


@triton.jit
def common_gradient(x, m, scale, at, slope, ENTROPY: tl.constexpr):
    """2^t (at + slope t): the part of the gradient that every column has."""
    t = (x - m) * scale
    if ENTROPY:
        at += slope * tl.maximum(t, LOWEST_POWER)
    return tl.exp2(t) * at


@triton.jit
def add_at_ids(g, origin, low, high, targets, grads, ids, ignore_index, inverse):
    """Add the upstream gradients of the ids in low ... high to their columns, of which g holds those from `origin`."""
    E: tl.constexpr = g.shape[1]
    lane = tl.arange(0, g.shape[0])[:, None]
    element = tl.arange(0, E)[None, :]
    for j in range(ids):
        id = tl.load(targets + j).to(tl.int64)
        if (id >= low) & (id < high) & (id != ignore_index):
            place = (id - origin).to(tl.int32)
            here = (lane == place // E) & (element == place % E)
            g += tl.where(here, (tl.load(grads + j) * inverse).to(tl.float32), 0.0)
    return g


@triton.jit
def row_start(row, lead, outer_stride, inner_stride, inner):
    return lead + (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def row_scale(temperatures, row, keep, inverse, scale):
    """1 / T and 1 / (T ln 2) of a row, rounded once, as the host rounds those of a common T."""
    if temperatures is not None:
        temperature = tl.load(temperatures + row, mask=keep, other=1.0).to(tl.float64)
        inverse = (tl.full((), 1.0, tl.float64) / temperature).to(tl.float32)
        scale = (tl.full((), LOG2_E, tl.float64) / temperature).to(tl.float32)
    return inverse, scale


def vector_of(t: Tensor) -> int:
    """Elements in 16 bytes."""
    return 16 // t.element_size()


def lead_of(t: Tensor) -> int:
    """Elements between a place aligned to 16 bytes and the first; 0 where the storage has no such place."""
    lead = t.data_ptr() % 16 // t.element_size()
    return lead if lead <= t.storage_offset() else 0


class Rows(NamedTuple):
    """Where the rows of a tensor are, in elements, counted from a place aligned to 16 bytes where there is one."""

    base: Tensor
    lead: int
    outer_stride: int
    inner_stride: int
    inner: int

    def starts(self, vector: int) -> tuple[int, int, int]:
        """How far rows may begin from a multiple of `vector` elements: the first row, and what each stride adds."""
        return self.lead % vector, self.outer_stride % vector, self.inner_stride % vector


def rows_of(t: Tensor) -> Rows | None:
    """The rows of (..., n) as two strides; None if they need more, or if the elements of a row are apart."""
    if t.numel() == 0:
        return Rows(t, 0, 0, 0, 1)
    if t.stride(-1) != 1 and t.shape[-1] > 1:
        return None
    dims: list[tuple[int, int]] = []
    for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return None
    (_, outer_stride), (inner, inner_stride) = [(1, 0), (1, 0), *dims][-2:]
    lead = lead_of(t)
    base = t.as_strided((1,), (1,), t.storage_offset() - lead)
    return Rows(base, lead, outer_stride, inner_stride, inner)


def scales(temperatures: Tensor | None, temperature: float) -> tuple[Tensor | None, float, float]:
    if temperatures is None:
        return None, 1 / temperature, LOG2_E.value / temperature
    return temperatures.to(torch.float32).contiguous(), 1.0, 1.0


def choose(configs: tuple[Any, ...], vectors: int) -> Any:
    return configs[-1] if vectors <= configs[-1].tile else configs[0]


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def launch(kernel: Any, programs: int, warps: int, *arguments: Any, **constants: Any) -> None:
    kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=1, enable_fp_fusion=True)
