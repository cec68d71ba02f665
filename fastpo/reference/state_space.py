"""The products of state-space layers, S4 and S4D, in plain torch: every term is held, (..., L, N) of them."""

from __future__ import annotations

import torch
from torch import Tensor


def _quotient(v: Tensor, d: Tensor, residue: Tensor) -> Tensor:
    """v / d; where d is 0, inf in the components that the residue has, with its signs, or NaN if that is 0."""
    pole = d == 0
    parts = torch.view_as_real(residue.detach().resolve_conj())
    # inf times a component of 0 would be NaN
    infinite = torch.where(parts == 0, parts, parts * torch.inf)
    limit = torch.view_as_complex(torch.where((residue == 0).unsqueeze(-1), torch.nan, infinite))
    return torch.where(pole, limit, v / torch.where(pole, 1, d))


def cauchy(v: Tensor, z: Tensor, w: Tensor, *, symmetric: bool = True) -> Tensor:
    """Σ_n v_n / (z_l - w_n), as `fastpo.cauchy` documents it."""
    v, z, w = v.unsqueeze(-2), z.unsqueeze(-1), w.unsqueeze(-2)
    if not symmetric:
        return _quotient(v, z - w, v).sum(-1)
    # a real pole and its conjugate are one
    real = w.imag == 0
    found = _quotient(v, z - w, torch.where(real, 2 * v.real, v))
    other = z - w.conj()
    return (found + torch.where(real & (other == 0), 0, _quotient(v.conj(), other, v.conj()))).sum(-1)


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
