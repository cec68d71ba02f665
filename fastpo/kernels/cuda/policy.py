"""The op `policy_objective` on CUDA devices without the compiled library: its launch, restated from
csrc/cuda/policy.cuh and csrc/torch/policy.h. Tests compare structs, and run both over the same cases."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpo.kernels.cuda.arguments import DTYPES, blocks
from fastpo.kernels.cuda.nvrtc import Launcher
from fastpo.kernels.cuda.objective import Layout, Stream
from fastpo.reference.policy import MAXIMA, SUMS

_MAX_NUMBERS, _MAX_CHOICES, _THREADS = 32, 16, 256


class PolicyObjective(ctypes.Structure):
    _fields_ = (
        ("layout", Layout),
        ("selected", ctypes.c_void_p),
        ("logprobs", Stream),
        ("old", Stream),
        ("reference", Stream),
        ("rollout", Stream),
        ("entropy", Stream),
        ("advantages", Stream),
        ("advantage_per_row", ctypes.c_bool),
        ("use_threshold", ctypes.c_bool),
        ("is_double", ctypes.c_bool),
        ("formula", ctypes.c_int),
        ("numbers", ctypes.c_double * _MAX_NUMBERS),
        ("choices", ctypes.c_int * _MAX_CHOICES),
        ("rows", ctypes.c_int64),
        ("row_loss", ctypes.c_void_p),
        ("row_sums", ctypes.c_void_p),
        ("row_maxima", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("entropy_slopes", ctypes.c_void_p),
    )


class PolicySum(ctypes.Structure):
    _fields_ = (
        ("row_loss", ctypes.c_void_p),
        ("row_sums", ctypes.c_void_p),
        ("row_maxima", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("loss", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("maxima", ctypes.c_void_p),
        ("is_double", ctypes.c_bool),
        ("reduce", ctypes.c_bool),
    )


def forward(
    launcher: Launcher,
    formula: int,
    logprobs: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    rollout: Tensor | None,
    entropy: Tensor | None,
    advantages: Tensor,
    per_row: bool,
    mask: Tensor | None,
    selected: Tensor | None,
    cu_seqlens: Tensor | None,
    numbers: list[float],
    choices: list[int],
    use_threshold: bool,
    entropy_gradient: bool,
    reduce: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op returns: loss, slopes, entropy slopes, sums, maxima."""
    # the tokens of a row must be adjacent
    given = [logprobs, old, reference, rollout, entropy, advantages]
    streams = [t.contiguous() if t is not None and t.stride(-1) != 1 else t for t in given[: 5 if per_row else 6]]
    streams += [advantages] * per_row
    mask, selected, cu_seqlens = (None if t is None else t.contiguous() for t in (mask, selected, cu_seqlens))
    rows = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    is_double = any(t is not None and t.dtype == torch.float64 for t in streams[: 5 if per_row else 6])
    dtype = torch.float64 if is_double else torch.float32
    slopes = logprobs.new_empty(logprobs.shape, dtype=dtype)
    entropy_slopes = slopes.new_empty(logprobs.shape if entropy_gradient else (0,))
    if cu_seqlens is not None:
        slopes.zero_()  # tokens that no sequence has
        entropy_slopes.zero_()
    loss = slopes.new_empty(() if reduce else (rows,))
    of_rows = [slopes.new_empty((rows, n), dtype=torch.float64) for n in (1, len(SUMS), len(MAXIMA))]
    sums, maxima = (slopes.new_empty(len(names), dtype=torch.float64) for names in (SUMS, MAXIMA))
    tokens = logprobs.shape[1] if cu_seqlens is None else 1
    layout = Layout(
        mask=None if mask is None else mask.data_ptr(),
        mask_stride=tokens,
        boundaries=None if cu_seqlens is None else cu_seqlens.data_ptr(),
        tokens=tokens,
        total=logprobs.numel(),
    )
    at = [Stream() if t is None else Stream(t.data_ptr(), t.stride(0), DTYPES[t.dtype]) for t in streams]
    o = PolicyObjective(
        layout,
        None if selected is None else selected.data_ptr(),
        *at,
        per_row,
        use_threshold,
        is_double,
        formula,
        rows=rows,
        row_loss=of_rows[0].data_ptr(),
        row_sums=of_rows[1].data_ptr(),
        row_maxima=of_rows[2].data_ptr(),
        slopes=slopes.data_ptr(),
        entropy_slopes=entropy_slopes.data_ptr() if entropy_gradient else None,
    )
    o.numbers[: len(numbers)] = numbers
    o.choices[: len(choices)] = choices
    if rows:
        launcher.launch(
            "policy_f64" if is_double else "policy_f32",
            blocks(rows, 1),
            _THREADS,
            [o],
            reads=[*streams, mask, selected, cu_seqlens],
            writes=[*of_rows, slopes, entropy_slopes],
        )
    total = PolicySum(
        *(t.data_ptr() for t in of_rows), rows, loss.data_ptr(), sums.data_ptr(), maxima.data_ptr(), is_double, reduce
    )
    launcher.launch("policy_sum", 1, _THREADS, [total], reads=of_rows, writes=[loss, sums, maxima])
    return loss, slopes, entropy_slopes, sums, maxima
