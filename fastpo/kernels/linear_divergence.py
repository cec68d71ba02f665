"""`linear_divergence`: divergences between two models' next-token distributions from hidden states and their heads.

Any function of two models' logits, row by row, is computed some rows at a time, and again in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpo.kernels import _checks
from fastpo.kernels._tiles import MULTIPLIED_ON_CPUS, add_product, multiplies_into_wide
from fastpo.kernels.linear_logprobs import cast, default_budget
from fastpo.kernels.vocab_divergence import token_kl

# logits of one model that are there at a time, and columns of a narrow weight that are widened for a product
_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}
_COLUMNS = 1 << 15

_Rows = Callable[[Tensor, Tensor, slice], tuple[Tensor, ...]]


class Head(NamedTuple):
    """A model's last hidden states (N, H) and its head: weight (V, H), bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """Of the logits, which are not rounded to the dtype of the head: fp32 (fp64 for fp64)."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def room(self, rows: int) -> Tensor:
        """For the logits of so many rows."""
        return self.hidden.new_empty((rows, len(self.weight)), dtype=self.wide)

    def logits(self, rows: slice, room: Tensor | None = None) -> Tensor:
        """(rows, V), without a gradient; in a place that is there, or a new one."""
        hidden = self.hidden[rows]
        out = self.room(len(hidden)) if room is None else room[: len(hidden)]
        if hidden.dtype == self.wide:
            torch.mm(hidden, self.weight.t(), out=out)
        elif multiplies_into_wide(hidden):
            torch.mm(hidden, self.weight.t(), out_dtype=self.wide, out=out)
        else:
            for columns in _blocks(len(self.weight), _COLUMNS):
                out[:, columns] = hidden.to(self.wide) @ self.weight[columns].to(self.wide).t()
        return out if self.bias is None else out.add_(self.bias)


def _blocks(length: int, size: int) -> Iterator[slice]:
    """At least one."""
    for first in range(0, max(length, 1), size):
        yield slice(first, min(first + size, length))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compute: _Rows,
        size: int,
        kept: bool,
        teacher: Head,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.compute, ctx.size = compute, size
        student = Head(hidden, weight, bias)
        parts: list[Any] = []
        logits: list[Tensor] = []
        rooms = (None, None) if kept else _rooms(student, teacher, size)
        for rows in _blocks(len(hidden), size):
            pair = [head.logits(rows, room) for head, room in zip((student, teacher), rooms, strict=True)]
            # copies of what may be a part of logits, whose place is that of the next ones
            parts.append([t.clone() for t in compute(pair[0], pair[1], rows)])
            logits += pair if kept else []
        ctx.save_for_backward(*student, *teacher, *logits)
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        student, teacher, kept = Head(*saved[:3]), Head(*saved[3:6]), [*saved[6:]]
        hidden, weight, bias = student
        needed = ctx.needs_input_grad[4:]
        if all(g is None for g in grads):
            return (None,) * 7
        if torch.is_grad_enabled():
            return None, None, None, None, *_differentiable(ctx, student, teacher, needed, grads)
        # sums over blocks of rows are fp32, rounded once
        wide = student.wide
        # of the products' operands
        narrow = wide if hidden.device.type == "cpu" and hidden.dtype not in MULTIPLIED_ON_CPUS else hidden.dtype
        to_hidden = torch.empty_like(hidden) if needed[0] else None
        to_weight = torch.empty_like(weight, dtype=wide) if needed[1] else None
        to_bias = torch.zeros_like(bias, dtype=wide) if needed[2] and bias is not None else None
        rooms = (None, None) if kept else _rooms(student, teacher, ctx.size)
        for i, rows in enumerate(_blocks(len(hidden), ctx.size)):
            pair = kept[2 * i : 2 * i + 2]
            if not kept:
                pair = [head.logits(rows, room) for head, room in zip((student, teacher), rooms, strict=True)]
            found = _gradient(ctx, rows, pair, grads)
            if to_bias is not None:
                to_bias += found.sum(0)
            found = found.to(narrow)
            if to_hidden is not None:
                to_hidden[rows] = _product(found, weight)
            if to_weight is not None:
                add_product(to_weight, found.t(), hidden[rows].to(narrow), first=i == 0)
            # before there is the next one
            del found
        sums = [None if t is None else t.to(weight.dtype) for t in (to_weight, to_bias)]
        return None, None, None, None, to_hidden, *sums


def _rooms(student: Head, teacher: Head, size: int) -> tuple[Tensor, Tensor]:
    """For one block's logits after the other's: fresh memory costs a sixth of the time on a CPU."""
    rows = min(size, len(student.hidden))
    return student.room(rows), teacher.room(rows)


def _gradient(ctx: Any, rows: slice, pair: list[Tensor], grads: tuple[Tensor | None, ...]) -> Tensor:
    """Of the student's logits."""
    with torch.enable_grad():
        leaf = pair[0].detach().requires_grad_()
        out = ctx.compute(leaf, pair[1], rows)
    given = [(o, g[rows]) for o, g in zip(out, grads, strict=True) if g is not None]
    (found,) = torch.autograd.grad([o for o, _ in given], leaf, [g for _, g in given])
    return found


def _product(a: Tensor, weight: Tensor) -> Tensor:
    """a · weight (rows, H), summed in fp32 (fp64); a weight that is narrower than `a` is widened part by part."""
    out = a.new_empty((len(a), weight.shape[1]), dtype=torch.promote_types(a.dtype, torch.float32))
    for columns in _blocks(len(weight), len(weight) if weight.dtype == a.dtype else _COLUMNS):
        add_product(out, a[:, columns], weight[columns].to(a.dtype), first=columns.start == 0)
    return out


def _differentiable(
    ctx: Any, student: Head, teacher: Head, needed: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients as functions that can be differentiated again (create_graph): all logits are there."""
    given = [(t.view_as(t) if n and t is not None else t) for t, n in zip(student, needed, strict=True)]
    cast: Any = [None if t is None else t.to(student.wide) for t in given]
    everything = slice(0, len(student.hidden))
    with torch.no_grad():
        constants = teacher.logits(everything)
    out = ctx.compute(nn.functional.linear(*cast), constants, everything)
    pairs = [(o, g) for o, g in zip(out, grads, strict=True) if g is not None]
    inputs = [t for t, n in zip(given, needed, strict=True) if n and t is not None]
    found = iter(torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], create_graph=True))
    return [next(found) if n and t is not None else None for t, n in zip(given, needed, strict=True)]


def _traced(student: Head, teacher: Head, compute: _Rows, size: int) -> tuple[Tensor, ...]:
    """The same for torch.compile, which follows no backward that differentiates: products are in fp32."""
    (hidden, *own), (others, *fixed) = (
        [None if t is None else t.to(student.wide) for t in h] for h in (student, teacher)
    )
    assert hidden is not None and others is not None
    parts: list[Any] = []
    for rows in _blocks(len(hidden), size):

        def block(h: Tensor, o: Tensor, rows: slice = rows) -> tuple[Tensor, ...]:
            return compute(nn.functional.linear(h, *own), nn.functional.linear(o, *fixed), rows)  # type: ignore[arg-type]

        parts.append(checkpoint(block, hidden[rows], others[rows], use_reentrant=False, preserve_rng_state=False))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def shaped(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """Logits that a model scales and caps."""
    logits = logits if scale == 1.0 else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def of_logits(
    student: Head, teacher: Head, compute: _Rows, rows: int | None = None, memory_budget: int = 0
) -> tuple[Tensor, ...]:
    """`compute(student_logits, teacher_logits, rows)` of all rows, without the logits of all.

    Args:
        student: differentiable.
        teacher: of as many rows; constants.
        compute: from logits (n, V) each, fp32 (fp64 for fp64), and the slice of rows that they are of, to tensors (n,),
            each differentiable by the first.
        rows: at a time; by default as many as make 2^27 logits of a model on a GPU, 2^24 on a CPU.
        memory_budget: bytes of logits that may be kept for the backward, which computes them again if they are more.

    Returns:
        the tensors of all rows, (N,).
    """
    device = student.hidden.device.type
    largest = max(len(student.weight), len(teacher.weight), 1)
    size = rows or max(_LOGITS["cpu" if device == "cpu" else "cuda"] // largest, 1)
    if torch.is_autocast_enabled(device):
        # as by a linear layer
        dtype = torch.get_autocast_dtype(device)
        student, teacher = (Head(*(cast(t, dtype) for t in head)) for head in (student, teacher))
    fixed = Head(*(t if t is None else t.detach() for t in teacher))  # type: ignore[arg-type]
    with torch.autocast(device, enabled=False):
        if torch.compiler.is_compiling():
            return _traced(student, fixed, compute, size)
        elements = len(student.hidden) * (len(student.weight) + len(teacher.weight))
        kept = torch.is_grad_enabled() and 0 < elements * student.wide.itemsize <= memory_budget
        return _Chunked.apply(compute, size, kept, fixed, *student)


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    *,
    divergence: Callable[..., Tensor] = token_kl,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float | tuple[float, float] = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """A divergence between the next-token distributions of two models from their hidden states, for every token.

    It is divergence(c(z), c(z_ref), temperature=temperature) with z = hidden weightᵀ + bias, likewise z_ref of the
    reference model, which may be wider or narrower but has the same vocabulary, and c(z) = logit_scale · z, or with a
    softcap c(z) = softcap · tanh(logit_scale · z / softcap): the loss of distillation on states (GKD, DistiLLM; see
    `token_jsd`, `token_kl`) and the full KL penalty, without the logits of all tokens in memory.

    Rows that do not count are left out of every matrix product. Beside results and gradients there are the logits of
    two models, fp32, and the gradient of one, for a block of rows: 2^24 numbers each on a CPU, 2^27 on a GPU, a few
    more with a softcap. Matrix products, forward and backward together: four where the logits of the rows that count
    fit into `memory_budget`, six where the backward computes them again. The reference is a constant.

    Logits are exact to the products' fp32 sums, whatever the dtype: those of bf16 and fp16 are not rounded to it. Of
    their gradient the products' operands are rounded to that dtype where the device multiplies in it, sums over tokens
    and the vocabulary are fp32 and rounded once.

    Args:
        hidden: (..., H), fp32, bf16, fp16 or fp64. Under torch.autocast all tensors are cast, as by a linear layer.
        weight: (V, H), of the dtype of `hidden`, as in a transformers lm_head.
        reference_hidden: (..., H_ref), a constant.
        reference_weight: (V, H_ref), of the dtype of `reference_hidden`, which is fp64 if `hidden` is.
        bias: (V,), or None.
        reference_bias: (V,), or None.
        divergence: `token_kl`, `token_jsd`, `token_tv` or `token_alpha_divergence`, with options of theirs as
            `functools.partial(token_jsd, beta=0.1)`, or another function of (n, V) logits, (n, V) reference logits and
            the keywords `mask`, (n,) or None, and `temperature`, that returns (n,).
        mask: (...) bool, True where a token counts; None counts all. Other rows have the divergence 0 and the gradient
            0, and may hold anything. On a GPU it is waited for, to count its rows.
        temperature: a positive number, or a tensor (...) of one per row. No gradient flows to it.
        logit_scale: a positive number that multiplies the logits of both models, or one for each.
        softcap: the bound of the logits of both models, or None for none, or one of them for each.
        memory_budget: bytes of logits that the forward may keep for the backward; by default 1/32 of the device's
            memory. Results and gradients are the same bits, kept or not. Under torch.compile nothing is kept.

    Returns:
        (...), fp32 (fp64 for fp64 hidden states), in nats, as of the divergence.

    Raises:
        TypeError: a dtype or type is not one of the above.
        ValueError: shapes or devices do not match, a number is not in its domain, or `reference_hidden` requires grad.
    """
    ours, others = Head(hidden, weight, bias), Head(reference_hidden, reference_weight, reference_bias)
    if isinstance(hidden, Tensor) and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        ours, others = (Head(*(cast(t, dtype) for t in head)) for head in (ours, others))
    _check(ours, others, mask, temperature)
    caps = softcap if isinstance(softcap, tuple) else (softcap, softcap)
    scales = logit_scale if isinstance(logit_scale, tuple) else (logit_scale, logit_scale)
    _check_shaping(caps, scales)
    _checks.memory_budget(memory_budget)
    if not callable(divergence):
        raise TypeError(f"divergence must be a function such as fastpo.token_kl, got {type(divergence).__name__}")
    leading = hidden.shape[:-1]
    count = math.prod(leading)
    states = [head.hidden.reshape(count, head.hidden.shape[-1]) for head in (ours, others)]
    per_row = temperature.reshape(count) if isinstance(temperature, Tensor) else None
    counts, chosen = None if mask is None else mask.reshape(count), None
    if counts is not None and torch.compiler.is_compiling():
        # all are computed, but what is multiplied by 0 must be finite
        states = [torch.where(counts[:, None], t, 0) for t in states]
    elif counts is not None and not bool(counts.all()):
        chosen, counts = counts.nonzero()[:, 0], None
        states = [t[chosen] for t in states]
        per_row = per_row if per_row is None else per_row[chosen]
    else:
        counts = None

    def compute(logits: Tensor, others: Tensor, rows: slice) -> tuple[Tensor]:
        given = [shaped(z, *how) for z, how in zip((logits, others), zip(scales, caps, strict=True), strict=True)]
        found = divergence(
            *given,
            mask=None if counts is None else counts[rows],
            temperature=temperature if per_row is None else per_row[rows],
        )
        if found.shape != logits.shape[:1]:
            raise ValueError(
                f"divergence must return one number for each of {len(logits)} rows, got shape {tuple(found.shape)}"
            )
        return (found,)

    budget = 0
    if not torch.compiler.is_compiling():
        budget = default_budget(hidden.device) if memory_budget is None else memory_budget
    ours, others = (head._replace(hidden=rows) for head, rows in zip((ours, others), states, strict=True))
    (found,) = of_logits(ours, others, compute, memory_budget=budget)
    if chosen is not None:
        found = found.new_zeros(count).index_put((chosen,), found)
    return found.reshape(leading)


def _check(ours: Head, others: Head, mask: Tensor | None, temperature: float | Tensor) -> None:
    for prefix, head in (("", ours), ("reference_", others)):
        for name, value in head._asdict().items():
            if _checks.is_dtensor(value):
                raise TypeError(f"{prefix}{name} is a DTensor, but must be local: gather it with full_tensor()")
        _checks.head(*head, prefix=prefix)
    hidden, reference = ours.hidden, others.hidden
    _checks.same_device("reference_hidden", reference, "hidden", hidden)
    if (reference.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise TypeError(
            f"reference_hidden has dtype {reference.dtype}, hidden {hidden.dtype}: fp64 goes with fp64 only"
        )
    if reference.requires_grad and torch.is_grad_enabled():
        raise ValueError("reference_hidden requires grad, but the reference is a constant: pass its .detach()")
    _checks.shape(
        "reference_hidden", reference, (*hidden.shape[:-1], reference.shape[-1]), "one row for each of hidden's"
    )
    sizes = len(ours.weight), len(others.weight)
    if sizes[0] != sizes[1]:
        raise ValueError(f"reference_weight has {sizes[1]} rows, weight {sizes[0]}: the vocabulary must be one")
    if mask is not None:
        _checks.tensor("mask", mask, (torch.bool,))
        _checks.same_device("mask", mask, "hidden", hidden)
        _checks.shape("mask", mask, hidden.shape[:-1], "one per token")
    _checks.temperature(temperature, hidden.shape[:-1], "hidden", hidden)
    _checks.temperatures(temperature)


def _check_shaping(caps: tuple[Any, ...], scales: tuple[Any, ...]) -> None:
    for name, values in (("softcap", caps), ("logit_scale", scales)):
        if len(values) != 2:
            raise ValueError(f"{name} must be one for both models, or a tuple of two, got {len(values)}")
    for scale in scales:
        _checks.logit_scale(scale)
    for cap in caps:
        _checks.softcap(cap)
