"""Functions of two models' logits from hidden states: some rows at a time, and computed again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpo.kernels._tiles import add_product, multiplies_into_wide

# logits of one model that are there at a time, and columns of a narrow weight that are widened for a product
_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}
_COLUMNS = 1 << 15

_Rows = Callable[[Tensor, Tensor, slice], tuple[Tensor, ...]]


class Head(NamedTuple):
    """A model's last hidden states (N, H) and its head: weight (V, H), bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        """(rows, V), fp32 (fp64 for fp64): not rounded to the dtype of the head."""
        hidden = self.hidden[rows]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if hidden.dtype == wide:
            return nn.functional.linear(hidden, self.weight, self.bias)
        out = hidden.new_empty((len(hidden), len(self.weight)), dtype=wide)
        if multiplies_into_wide(hidden):
            torch.mm(hidden, self.weight.t(), out_dtype=wide, out=out)
        else:
            for columns in _blocks(len(self.weight), _COLUMNS):
                out[:, columns] = hidden.to(wide) @ self.weight[columns].to(wide).t()
        return out if self.bias is None else out.add_(self.bias)


def _blocks(length: int, size: int) -> Iterator[slice]:
    """At least one."""
    for first in range(0, max(length, 1), size):
        yield slice(first, min(first + size, length))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: _Rows, size: int, teacher: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.compute, ctx.size, ctx.teacher = compute, size, teacher
        ctx.save_for_backward(hidden, weight, bias)
        student = Head(hidden, weight, bias)
        parts = [compute(student.logits(r), teacher.logits(r), r) for r in _blocks(len(hidden), size)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        student = Head(*ctx.saved_tensors)
        needed = ctx.needs_input_grad[3:]
        if all(g is None for g in grads):
            return (None,) * 6
        if torch.is_grad_enabled():
            return None, None, None, *_differentiable(ctx, student, needed, grads)
        hidden, weight, bias = student
        # sums over blocks of rows are fp32, rounded once
        wide = torch.promote_types(weight.dtype, torch.float32)
        to_hidden = torch.empty_like(hidden) if needed[0] else None
        to_weight = torch.empty_like(weight, dtype=wide) if needed[1] else None
        to_bias = torch.zeros_like(bias, dtype=wide) if needed[2] and bias is not None else None
        for rows in _blocks(len(hidden), ctx.size):
            with torch.enable_grad():
                leaf = student.logits(rows).detach().requires_grad_()
                out = ctx.compute(leaf, ctx.teacher.logits(rows), rows)
            given = [(o, g[rows]) for o, g in zip(out, grads, strict=True) if g is not None]
            (found,) = torch.autograd.grad([o for o, _ in given], leaf, [g for _, g in given])
            narrow = found.to(hidden.dtype)
            if to_hidden is not None:
                add_product(to_hidden[rows], narrow, weight, first=True)
            if to_weight is not None:
                add_product(to_weight, narrow.t(), hidden[rows], first=rows.start == 0)
            if to_bias is not None:
                to_bias += found.sum(0)
        sums = [None if t is None else t.to(weight.dtype) for t in (to_weight, to_bias)]
        return None, None, None, to_hidden, *sums


def _differentiable(
    ctx: Any, student: Head, needed: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients as functions that can be differentiated again (create_graph): all logits are there."""
    wide = torch.promote_types(student.hidden.dtype, torch.float32)
    given = [(t.view_as(t) if n and t is not None else t) for t, n in zip(student, needed, strict=True)]
    cast: Any = [None if t is None else t.to(wide) for t in given]
    everything = slice(0, len(student.hidden))
    out = ctx.compute(Head(*cast).logits(everything), ctx.teacher.logits(everything), everything)
    pairs = [(o, g) for o, g in zip(out, grads, strict=True) if g is not None]
    inputs = [t for t, n in zip(given, needed, strict=True) if n and t is not None]
    found = iter(torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], create_graph=True))
    return [next(found) if n and t is not None else None for t, n in zip(given, needed, strict=True)]


def _traced(student: Head, teacher: Head, compute: _Rows, size: int) -> tuple[Tensor, ...]:
    """The same for torch.compile, which follows no backward that differentiates: products are in fp32."""
    wide = torch.promote_types(student.hidden.dtype, torch.float32)
    (hidden, *own), (others, *fixed) = ([None if t is None else t.to(wide) for t in h] for h in (student, teacher))
    assert hidden is not None and others is not None
    parts: list[Any] = []
    for rows in _blocks(len(hidden), size):

        def block(h: Tensor, o: Tensor, rows: slice = rows) -> tuple[Tensor, ...]:
            return compute(nn.functional.linear(h, *own), nn.functional.linear(o, *fixed), rows)  # type: ignore[arg-type]

        parts.append(checkpoint(block, hidden[rows], others[rows], use_reentrant=False, preserve_rng_state=False))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def of_logits(student: Head, teacher: Head, compute: _Rows, rows: int | None = None) -> tuple[Tensor, ...]:
    """`compute(student_logits, teacher_logits, rows)` of all rows, without the logits of all.

    Args:
        student: differentiable.
        teacher: of as many rows; constants.
        compute: from logits (n, V) each, fp32 (fp64 for fp64), and the slice of rows that they are of, to tensors (n,),
            each differentiable by the first.
        rows: at a time; by default as many as make 2^27 logits of a model on a GPU, 2^24 on a CPU.

    Returns:
        the tensors of all rows, (N,).
    """
    device = student.hidden.device.type
    largest = max(len(student.weight), len(teacher.weight), 1)
    size = rows or max(_LOGITS["cpu" if device == "cpu" else "cuda"] // largest, 1)
    if torch.is_autocast_enabled(device):
        # as by a linear layer
        dtype = torch.get_autocast_dtype(device)
        student, teacher = (Head(*(t if t is None else t.to(dtype) for t in head)) for head in (student, teacher))  # type: ignore[arg-type]
    fixed = Head(*(t if t is None else t.detach() for t in teacher))  # type: ignore[arg-type]
    with torch.autocast(device, enabled=False):
        if torch.compiler.is_compiling():
            return _traced(student, fixed, compute, size)
        return _Chunked.apply(compute, size, fixed, *student)
