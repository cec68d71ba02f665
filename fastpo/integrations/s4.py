"""The kernels of state-spaces/s4 under the names and with the arguments they have there.

`cauchy_mult` is that of extensions/kernels/cauchy.py; `log_vandermonde` and `log_vandermonde_transpose` are those of
src/models/functional/vandermonde.py; `vandermonde_mult` is what is `vandermonde_naive` there. Any device, any N, float
and double, where the originals are CUDA, complex64 and powers of two, or pykeops. So models of that repository run on
fastpo with

    from fastpo.integrations import s4
    from src.models.sequence.kernels import ssm

    ssm.cauchy_cuda, ssm.log_vandermonde_cuda, ssm.has_cuda_extension = s4.cauchy_mult, s4.log_vandermonde, True

on a CUDA device. The signatures were read at commit 43f5b0c; this use of them has not been run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.kernels import cauchy, vandermonde, vandermonde_transpose


def cauchy_mult(v: Tensor, z: Tensor, w: Tensor, symmetric: bool = True) -> Tensor:
    """Σ v / (z - w): (..., L) of residues v and poles w, (..., N) broadcast against each other, and nodes z, (L,).

    With `symmetric`, v and w are the halves of conjugate pairs, as the original's kernel takes them, and both are added
    up. See `fastpo.cauchy`; gradients flow to z too, which the original does not give.
    """
    if z.dim() != 1:
        raise ValueError(f"z has shape {tuple(z.shape)}, expected (L,)")
    return cauchy(v, z, w, symmetric=symmetric)


def vandermonde_mult(v: Tensor, x: Tensor, L: int, conj: bool = True) -> Tensor:
    """Σ_n v_n x_n^l for l < L, complex (..., L), of v and x (..., N); with `conj`, the same of the conjugates added."""
    # in double: the logarithm is multiplied by l
    found = vandermonde(v.to(torch.complex128), x.to(torch.complex128).log(), L, symmetric=conj)
    dtype = torch.promote_types(torch.promote_types(v.dtype, x.dtype), torch.complex64)
    return found.to(dtype)


def log_vandermonde(v: Tensor, x: Tensor, L: int, conj: bool = True) -> Tensor:
    """Σ_n v_n e^(x_n l) for l < L, (..., L), of v and x (..., N): twice its real part with `conj`, complex without.

    See `fastpo.vandermonde`.
    """
    return vandermonde(v.to(torch.promote_types(v.dtype, x.dtype)), x, L, symmetric=conj)


def log_vandermonde_transpose(u: Tensor, v: Tensor, x: Tensor, L: int) -> Tensor:
    """v_n Σ_l u_l e^(x_n l), (..., N), of inputs u (..., L), v and x (..., N): see `fastpo.vandermonde_transpose`."""
    if u.shape[-1] != L:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (..., {L})")
    return vandermonde_transpose(u, v.to(torch.promote_types(v.dtype, x.dtype)), x)
