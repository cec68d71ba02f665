"""The accuracy rule of every kernel test."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Exact = Tensor | np.ndarray


def _extended(values: Exact) -> np.ndarray:
    """As an array of 80-bit floats, in which fp64 results can be judged."""
    if isinstance(values, Tensor):
        values = values.detach().to(torch.float64).numpy()
    return values.astype(np.longdouble)


def assert_within(
    ours: Tensor,
    truth: Exact,
    same_dtype_torch: Tensor,
    eps_dtype: torch.dtype | None = None,
    name: str = "",
    terms: float | np.ndarray = 0.0,
) -> None:
    """Our error is at most that of the same computation in same-dtype torch, plus 2 eps.

    Args:
        ours: the result.
        truth: in more digits than `ours` has: fp64, or for fp64 results an array of np.longdouble. Entries that are
            nan or infinite here must be so in ours.
        same_dtype_torch: torch's result in the dtype of `ours`.
        eps_dtype: the dtype whose eps is meant, by default that of `ours`.
        name: what failed.
        terms: the size of the terms whose sum the result is, for a small result of large terms; one for all entries
            or one for each. 2 eps is relative to the largest of this, the entry, and the root mean square of all
            entries (in a tensor of like terms, small entries carry the rounding errors of the large ones).
    """
    assert ours.shape == tuple(truth.shape), f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    eps = torch.finfo(eps_dtype or ours.dtype).eps
    value, exact, torch_value = (
        _extended(ours).ravel(),
        _extended(truth).ravel(),
        _extended(same_dtype_torch).ravel(),
    )
    # what overflows the dtype in torch overflows in ours
    exact = np.where(np.isfinite(exact) & np.isinf(torch_value), torch_value, exact)
    special = ~np.isfinite(exact)
    np.testing.assert_array_equal(value[special], exact[special], err_msg=f"{name}: nan or inf")
    floor = np.broadcast_to(terms, ours.shape).ravel()[~special]
    value, exact, torch_value = value[~special], exact[~special], torch_value[~special]
    if exact.size == 0:
        return
    size = np.maximum(np.maximum(np.abs(exact), np.sqrt(np.mean(exact**2))), floor)
    allowed = np.abs(torch_value - exact) + 2 * eps * size
    # written so that a nan in ours fails
    outside = ~(np.abs(value - exact) <= allowed)
    assert not outside.any(), (
        f"{name}: {outside.sum()} of {outside.size}; error {np.abs(value - exact)[outside][0]:.3e} exceeds "
        f"{allowed[outside][0]:.3e} at {np.flatnonzero(outside)[0]} (exact {exact[outside][0]:.6e})"
    )
