# mypy: allow-untyped-defs
"""The tiles of `linear_logprobs` in Triton: the two kernels between its matrix products.

See fastpo/kernels/linear_logprobs.py for the products, and softmax.py for how a row is cut and summed. What a row
carries from tile to tile is in fp64, arithmetic on elements is in fp32. A tile is not cut along its rows for the sums:
where it has too few rows to fill a device, the product that made it, which reads a slice of the head's weight for them,
takes longer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels.triton.softmax import (
    INFINITY,
    LOG2_E,
    LOWEST_POWER,
    NO_COLUMN,
    accumulate,
    add_at_ids,
    bit_of,
    bits_of,
    choose,
    common_gradient,
    edge_columns,
    first_nan,
    launch,
    lead_of,
    merge,
    on_device,
    vector_of,
    whole_vectors,
)


class Fold(NamedTuple):
    """How fold_tile is cut: vectors of 16 bytes that a program adds at a time, warps."""

    tile: int
    warps: int


class Gradient(NamedTuple):
    """How dlogits_tile is cut: vectors that a program handles at a time, how many times, warps."""

    tile: int
    tiles: int
    warps: int


# the default first, the one for narrow tiles last; a benchmark may sweep the others
FOLD_CONFIGS = (Fold(256, 4), Fold(512, 4), Fold(512, 8), Fold(128, 2))
GRADIENT_CONFIGS = (Gradient(256, 4, 4), Gradient(512, 4, 8), Gradient(256, 8, 4), Gradient(128, 4, 2))


@triton.jit
def softcap(x, cap, inner):
    """cap · tanh(inner · x), which the softmax is taken of, and its derivative.

    tanh has a relative error below 2.3e-7 everywhere, if the exponential's is 2^-22.5 and the division's 2^-22: from
    e = exp(-2 |z|) it is 1 - 2 e / (1 + e), which cancels for small z; below 1 a minimax polynomial takes its place.
    Its derivative 4 e / (1 + e)² cancels nowhere.
    """
    z = inner * x
    size = tl.abs(z)
    e = tl.exp2(size * (-2 * LOG2_E))
    r = 1.0 / (1.0 + e)
    far = 1.0 - 2.0 * e * r
    s = z * z
    p = 0.001070201882459973 * s - 0.006294631382225274
    p = p * s + 0.020398602171607126
    p = p * s - 0.05351813358956449
    p = p * s + 0.13326833523358683
    p = p * s - 0.33333017003807125
    # a NaN takes the second way, where e has it
    tanh = tl.where(size < 1.0, z * s * p + z, tl.where(z < 0.0, -far, far))
    return cap * tanh, cap * inner * (4.0 * e * r * r)


@triton.jit
def _capped(x, cap, inner):
    if cap is not None:
        x, _ = softcap(x, cap, inner)
    return x


@triton.jit
def _row_scale(inverse, row):
    """1 / (T ln 2) of a row."""
    return (tl.load(inverse + row) * tl.full((), LOG2_E, tl.float64)).to(tl.float32)


_FOLD_NUMBERS = ["cap", "inner", "first_column", "lead", "stride", "rows", "columns", "ids", "allowed_stride"]


@triton.jit(do_not_specialize=_FOLD_NUMBERS)
def fold_kernel(
    tile,
    targets,
    inverse,
    state,
    taken,
    top1,
    total,
    allowed,
    cap,
    inner,
    first_column,
    lead,
    stride,
    rows,
    columns,
    ids,
    allowed_stride,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    IDS: tl.constexpr,
    TILE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """A row of the tile, whose columns are those of the logits from `first_column` on, into the row's sums."""
    row = tl.program_id(0)
    scale = _row_scale(inverse, row)
    start = lead + row.to(tl.int64) * stride
    base = tile + start
    if allowed is not None:
        allowed += row.to(tl.int64) * allowed_stride

    k = tl.arange(0, IDS)
    at = row.to(tl.int64) * ids + k
    # in this tile's columns, of which an id that is not valid, -1, is none
    place = tl.load(targets + at, mask=k < ids, other=-1) - first_column
    inside = (k < ids) & (place >= 0) & (place < columns)
    x_at_ids = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(taken + at, _capped(x_at_ids, cap, inner).to(tl.float64), mask=inside)

    largest = tl.load(state + row)
    s_before = tl.load(state + rows + row)
    lane = tl.arange(0, TILE)
    # relative to the largest logit so far, which only few tiles raise
    m = tl.zeros((TILE,), tl.float32) + largest.to(tl.float32)
    s = tl.zeros((TILE,), tl.float32)
    w = tl.zeros((TILE,), tl.float32)
    q = tl.zeros((TILE,), tl.float32)
    plain = tl.zeros((TILE,), tl.float32)
    best = tl.full((TILE,), NO_COLUMN, tl.int32)
    TOP1: tl.constexpr = top1 is not None

    first, head, vectors = whole_vectors(start, columns, E, EDGES)
    body = tile + first * E
    at_tile = (lane * E)[:, None] + tl.arange(0, E)[None, :]
    whole = vectors // TILE * TILE
    for i in range(0, whole, TILE):
        x = _capped(tl.load(body + i * E + at_tile).to(tl.float32), cap, inner)
        if allowed is not None:
            bits = bits_of(allowed, head + (i + lane) * E, None, E, EDGES)
            if total is not None:
                plain += tl.sum(tl.where(bits, x, 0.0), 1)
            x = tl.where(bits, x, -INFINITY)
        elif total is not None:
            plain += tl.sum(x, 1)
        m, s, w, q, best = accumulate(m, s, w, q, best, x, head + (i + lane) * E, scale, WEIGHTED, SQUARED, TOP1)
    # what is not there is 0 in the plain sum, where the cap leaves it, and then nothing in the others
    mask = (whole + lane < vectors)[:, None]
    x = _capped(tl.load(body + whole * E + at_tile, mask=mask, other=0.0).to(tl.float32), cap, inner)
    if allowed is not None:
        mask &= bits_of(allowed, head + (whole + lane) * E, whole + lane < vectors, E, EDGES)
        x = tl.where(mask, x, 0.0)
    if total is not None:
        plain += tl.sum(x, 1)
    x = tl.where(mask, x, -INFINITY)
    m, s, w, q, best = accumulate(m, s, w, q, best, x, head + (whole + lane) * E, scale, WEIGHTED, SQUARED, TOP1)
    if EDGES:
        column, mask = edge_columns(lane, head, vectors, columns, 2 * E, E)
        x = _capped(tl.load(base + column, mask=mask, other=0.0).to(tl.float32), cap, inner)
        if allowed is not None:
            mask &= bit_of(allowed, column, mask)
            x = tl.where(mask, x, 0.0)
        if total is not None:
            plain += x
        x = tl.where(mask, x, -INFINITY)
        if TOP1:
            # a maximum that this tile has not raised belongs to an earlier one
            best = tl.where((x == m) & (column < best) & (best != NO_COLUMN), column, best)
        m, s, w, q, best = accumulate(m, s, w, q, best, x[:, None], column, scale, WEIGHTED, SQUARED, TOP1)
    m, s, w, q, best = merge(m, s, w, q, best, scale)

    # of fp64 only the difference needs the range: where 2^shift is not as exact, it is next to nothing
    new = m.to(tl.float64)
    shift = tl.maximum((largest - new) * scale.to(tl.float64), LOWEST_POWER)
    factor = tl.exp2(shift.to(tl.float32)).to(tl.float64)
    tl.store(state + row, new)
    tl.store(state + rows + row, factor * s_before + s.to(tl.float64))
    if WEIGHTED:
        w_before = tl.load(state + 2 * rows + row)
        tl.store(state + 2 * rows + row, factor * (shift * s_before + w_before) + w.to(tl.float64))
    if SQUARED:
        q_before = tl.load(state + 3 * rows + row)
        tl.store(state + 3 * rows + row, factor * factor * q_before + q.to(tl.float64))
    if total is not None:
        tl.store(total + row, tl.load(total + row) + tl.sum(plain.to(tl.float64), 0))
    if TOP1:
        # the first NaN, or +inf, of a row stays
        clean = s_before == s_before
        nan = columns * 0 + NO_COLUMN
        if clean & (s != s):
            nan = first_nan(base, allowed, columns, TILE)
        # of the vector that begins at `best`, the first element that is its maximum
        place = tl.where(best == NO_COLUMN, columns, best) + tl.arange(0, E)
        there = place < columns
        x = _capped(tl.load(base + place, mask=there, other=0.0).to(tl.float32), cap, inner)
        if allowed is not None:
            there &= bit_of(allowed, place, there)
        x = tl.where(there, x, -INFINITY)
        highest = tl.min(tl.where(x == tl.max(x, 0), place, NO_COLUMN), 0)
        column = tl.where(nan == NO_COLUMN, highest, nan).to(tl.int64) + first_column
        tl.store(top1 + row, column, mask=clean & ((best != NO_COLUMN) | (nan != NO_COLUMN)))


_GRADIENT_NUMBERS = ["cap", "inner", "first_column", "lead", "stride", "out_lead", "out_stride"]
_GRADIENT_NUMBERS += ["columns", "ids", "chunks", "allowed_stride"]


@triton.jit(do_not_specialize=_GRADIENT_NUMBERS)
def gradient_kernel(
    tile,
    out,
    targets,
    inverse,
    state,
    at,
    slope,
    grads,
    allowed,
    cap,
    inner,
    first_column,
    lead,
    stride,
    out_lead,
    out_stride,
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

    `out` may be the tile. ALIKE: where a vector of `out` begins, one of the tile does; else only stores are vectors.
    """
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    start = lead + row.to(tl.int64) * stride
    out_start = out_lead + row.to(tl.int64) * out_stride
    first, head, vectors = whole_vectors(out_start, columns, E, EDGES)
    scale = _row_scale(inverse, row)
    if allowed is not None:
        allowed += row.to(tl.int64) * allowed_stride
    m = tl.load(state + row).to(tl.float32)
    common = tl.load(at + row).to(tl.float32)
    weight = common
    if slope is not None:
        weight = tl.load(slope + row).to(tl.float32)

    begin = chunk * (TILE * TILES)
    end = tl.minimum(begin + TILE * TILES, vectors)
    k = tl.arange(0, IDS)
    own_targets = targets + row.to(tl.int64) * ids
    own_grads = grads + row.to(tl.int64) * ids
    place = tl.load(own_targets + k, mask=k < ids, other=-1) - first_column
    inside = (place >= head + begin * E) & (place < head + end * E)
    if EDGES:
        inside |= ((place >= 0) & (place < head)) | ((place >= head + vectors * E) & (place < columns))
    near = tl.max((inside & (k < ids)).to(tl.int32), 0) > 0

    lane = tl.arange(0, TILE)
    at_tile = (lane * E)[:, None] + tl.arange(0, E)[None, :]
    out_body = out + first * E
    if ALIKE:
        OWN: tl.constexpr = 128 // tile.dtype.element_ty.primitive_bitwidth
        body = tile + (start + head) // OWN * OWN
    else:
        body = tile + start + head
    # every thread writes only where it has read, so that the gradient may take the place of the logits
    for i in range(begin, end, TILE):
        mask = (i + lane < end)[:, None]
        x = tl.load(body + i * E + at_tile, mask=mask, other=0.0).to(tl.float32)
        derivative = x
        if cap is not None:
            x, derivative = softcap(x, cap, inner)
        g = common_gradient(x, m, scale, common, weight, slope is not None)
        if near:
            low = first_column + head + i * E
            g = add_at_ids(g, low, low, low + TILE * E, own_targets, own_grads, ids, -1, 1.0)
        if cap is not None:
            g *= derivative
        if allowed is not None:
            g = tl.where(bits_of(allowed, head + (i + lane) * E, i + lane < end, E, EDGES), g, 0.0)
        tl.store(out_body + i * E + at_tile, g.to(out.dtype.element_ty), mask=mask)
    if EDGES:
        lanes = tl.where(chunk == 0, 2 * E, 0)
        column, mask = edge_columns(lane[:, None], head, vectors, columns, lanes, E)
        x = tl.load(tile + start + column, mask=mask, other=0.0).to(tl.float32)
        derivative = x
        if cap is not None:
            x, derivative = softcap(x, cap, inner)
        g = common_gradient(x, m, scale, common, weight, slope is not None)
        if near:
            low = first_column
            body_end = low + head + vectors * E
            g = add_at_ids(g, low, low, low + head, own_targets, own_grads, ids, -1, 1.0)
            g = add_at_ids(g, body_end - E, body_end, low + columns, own_targets, own_grads, ids, -1, 1.0)
        if cap is not None:
            g *= derivative
        if allowed is not None:
            g = tl.where(bit_of(allowed, column, mask), g, 0.0)
        tl.store(out + out_start + column, g.to(out.dtype.element_ty), mask=mask)


class _Place(NamedTuple):
    """Where the rows of a tile are, in elements, counted from a place aligned to 16 bytes where there is one."""

    base: Tensor
    lead: int
    stride: int

    def starts(self, vector: int) -> tuple[int, int]:
        """How far rows may begin from a multiple of `vector` elements: the first row, and what each adds."""
        return self.lead % vector, self.stride % vector


def _place(t: Tensor) -> _Place:
    if t.stride(1) != 1 and t.shape[1] > 1:
        raise ValueError("fastpo::linear_logprobs: the columns of a tile must be adjacent")
    lead = lead_of(t)
    base = t.as_strided((1,), (1,), t.storage_offset() - lead)
    return _Place(base, lead, t.stride(0) if t.shape[0] > 1 else 0)


def _check(dtype: torch.dtype, **numbers: tuple[Tensor | None, int]) -> None:
    for name, (t, count) in numbers.items():
        if t is not None and (t.dtype != dtype or t.numel() != count or not t.is_contiguous()):
            raise ValueError(f"fastpo::linear_logprobs: {name} has the wrong dtype, size or strides")


def _sets(allowed: Tensor | None, rows: int, columns: int) -> tuple[Tensor | None, int]:
    """The sets of a tile and how many words they are apart."""
    if allowed is None:
        return None, 0
    words = triton.cdiv(columns, 32)
    if (
        allowed.dtype != torch.int32
        or allowed.shape not in ((1, words), (rows, words))
        or (allowed.stride(1) != 1 and words > 1)
    ):
        raise ValueError("fastpo::linear_logprobs: allowed has the wrong dtype, size or strides")
    return allowed, 0 if len(allowed) == 1 else allowed.stride(0)


def _cap(logit_scale: float, cap: float) -> tuple[float | None, float | None]:
    return (cap, logit_scale / cap) if cap else (None, None)


def fold_tile(
    tile: Tensor,
    first: int,
    targets: Tensor,
    inverse: Tensor,
    logit_scale: float,
    cap: float,
    state: Tensor,
    taken: Tensor,
    top1: Tensor | None,
    total: Tensor | None,
    weighted: bool,
    squared: bool,
    allowed: Tensor | None = None,
    *,
    config: Fold | None = None,
) -> None:
    """fastpo::fold_tile: a tile (rows, columns) of logits into what its rows carry, in place.

    A row's result does not depend on the number of rows. Tiles whose rows begin and end at multiples of 16 bytes are
    read in vectors alone; of others, each row has edges, which take as long as one more vector of each thread.

    Args:
        config: one of FOLD_CONFIGS; by default chosen from the width.
    """
    rows, columns = tile.shape
    ids = targets.shape[1]
    _check(torch.float64, inverse=(inverse, rows), state=(state, 4 * rows), taken=(taken, rows * ids))
    _check(torch.float64, total=(total, rows))
    _check(torch.int64, targets=(targets, rows * ids), top1=(top1, rows))
    if tile.numel() == 0:
        return
    vector, place = vector_of(tile), _place(tile)
    allowed, allowed_stride = _sets(allowed, rows, columns)
    config = config or choose(FOLD_CONFIGS, columns // vector)
    with on_device(tile):
        launch(
            fold_kernel,
            rows,
            config.warps,
            place.base,
            targets,
            inverse,
            state,
            taken,
            top1,
            total,
            allowed,
            *_cap(logit_scale, cap),
            first,
            place.lead,
            place.stride,
            rows,
            columns,
            ids,
            allowed_stride,
            E=vector,
            EDGES=any((*place.starts(vector), columns % vector)),
            IDS=triton.next_power_of_2(max(ids, 1)),
            TILE=config.tile,
            WEIGHTED=weighted,
            SQUARED=squared,
        )


def dlogits_tile(
    tile: Tensor,
    first: int,
    targets: Tensor,
    inverse: Tensor,
    logit_scale: float,
    cap: float,
    state: Tensor,
    at: Tensor,
    slope: Tensor | None,
    grads: Tensor,
    out: Tensor | None = None,
    allowed: Tensor | None = None,
    *,
    config: Gradient | None = None,
) -> None:
    """fastpo::dlogits_tile: the gradient in place of a tile (rows, columns) of logits, or in `out`, of its shape.

    Args:
        config: one of GRADIENT_CONFIGS; by default chosen from the width.
    """
    rows, columns = tile.shape
    ids = targets.shape[1]
    _check(torch.float64, inverse=(inverse, rows), state=(state, 4 * rows), at=(at, rows), slope=(slope, rows))
    _check(torch.float64, grads=(grads, rows * ids))
    _check(torch.int64, targets=(targets, rows * ids))
    out = tile if out is None else out
    if out.shape != tile.shape:
        raise ValueError(f"fastpo::dlogits_tile: out has shape {tuple(out.shape)}, the tile {tuple(tile.shape)}")
    if tile.numel() == 0:
        return
    place, out_place = _place(tile), _place(out)
    allowed, allowed_stride = _sets(allowed, rows, columns)
    # of the narrower dtype, whose stores are then whole vectors; a thread loads several of the wider
    own, vector = vector_of(tile), max(vector_of(tile), vector_of(out))
    config = config or choose(GRADIENT_CONFIGS, columns // vector)
    chunks = max(1, triton.cdiv(columns // vector, config.tile * config.tiles))
    with on_device(tile):
        launch(
            gradient_kernel,
            rows * chunks,
            config.warps,
            place.base,
            out_place.base,
            targets,
            inverse,
            state,
            at,
            slope,
            grads,
            allowed,
            *_cap(logit_scale, cap),
            first,
            place.lead,
            place.stride,
            out_place.lead,
            out_place.stride,
            columns,
            ids,
            chunks,
            allowed_stride,
            E=vector,
            EDGES=any((*out_place.starts(vector), columns % vector)),
            ALIKE=place.starts(own) == out_place.starts(own),
            IDS=triton.next_power_of_2(max(ids, 1)),
            TILE=config.tile,
            TILES=config.tiles,
        )
