"""The products of state-space layers, S4 and S4D, in plain torch: every term is held, (..., L, N) of them."""

from __future__ import annotations

import torch
from torch import Tensor


def quotient(v: Tensor, d: Tensor) -> Tensor:
    """v / d. Where d is 0, inf with the signs of v, in the components that v has; NaN where v is 0 too."""
    pole = d == 0
    found = v / torch.where(pole, 1, d)
    # inf times a component of 0 would be NaN
    parts = torch.view_as_real(v.resolve_conj()).detach()
    limit = torch.view_as_complex(torch.where(parts == 0, parts, parts * torch.inf))
    limit = torch.where(v == 0, complex(torch.nan, torch.nan), limit)
    return torch.where(pole, limit, found)


def cauchy(v: Tensor, z: Tensor, w: Tensor, *, symmetric: bool = True) -> Tensor:
    """Σ_n v_n / (z_l - w_n), as `fastpo.cauchy` documents it."""
    v, z, w = v.unsqueeze(-2), z.unsqueeze(-1), w.unsqueeze(-2)
    found = quotient(v, z - w).sum(-1)
    return found + quotient(v.conj(), z - w.conj()).sum(-1) if symmetric else found


def _powers(x: Tensor, length: int) -> Tensor:
    """e^(x_n l), (..., L, N), in complex128: in single precision the phase x l has no digits left where l is large."""
    steps = torch.arange(length, dtype=torch.float64, device=x.device)
    return torch.exp(x.to(torch.complex128).unsqueeze(-2) * steps[:, None])


def vandermonde(v: Tensor, x: Tensor, length: int, *, symmetric: bool = True) -> Tensor:
    """Σ_n v_n e^(x_n l), as `fastpo.vandermonde` documents it."""
    found = (v.to(torch.complex128).unsqueeze(-2) * _powers(x, length)).sum(-1)
    dtype = torch.promote_types(v.dtype, x.dtype)
    return (2 * found.real).to(dtype.to_real()) if symmetric else found.to(dtype)


def vandermonde_transpose(u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """v_n Σ_l u_l e^(x_n l), as `fastpo.vandermonde_transpose` documents it."""
    moment = (u.to(torch.complex128).unsqueeze(-1) * _powers(x, u.shape[-1])).sum(-2)
    dtype = torch.promote_types(torch.promote_types(u.dtype, v.dtype), x.dtype)
    return (v.to(torch.complex128) * moment).to(dtype)
