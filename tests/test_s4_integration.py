"""fastpo.integrations.s4 against what the original's functions are defined as, on a CPU."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from fastpo.integrations import s4

# names and defaults as at commit 43f5b0c of state-spaces/s4; `symmetric` is that of its first release
SIGNATURES = {
    "cauchy_mult": {"v": None, "z": None, "w": None, "symmetric": True},
    "vandermonde_mult": {"v": None, "x": None, "L": None, "conj": True},
    "log_vandermonde": {"v": None, "x": None, "L": None, "conj": True},
    "log_vandermonde_transpose": {"u": None, "v": None, "x": None, "L": None},
}


def case(*leading: int, count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(*leading, count, dtype=torch.complex128, generator=generator)
    w = torch.randn(*leading, count, dtype=torch.complex128, generator=generator)
    return v, torch.complex(-w.real.abs(), w.imag)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    found = inspect.signature(getattr(s4, name)).parameters
    assert {k: None if p.default is p.empty else p.default for k, p in found.items()} == SIGNATURES[name]


@pytest.mark.parametrize("symmetric", [True, False])
def test_cauchy_mult(symmetric: bool) -> None:
    v, w = case(3, 1, 2)[0], case(4, 2, seed=1)[1]
    z = 1j * torch.linspace(-3, 3, 7, dtype=torch.float64)
    want = (v[..., None, :] / (z[:, None] - w[..., None, :])).sum(-1)
    if symmetric:
        want = want + (v.conj()[..., None, :] / (z[:, None] - w.conj()[..., None, :])).sum(-1)
    assert torch.allclose(s4.cauchy_mult(v, z, w, symmetric), want, rtol=1e-13)
    with pytest.raises(ValueError, match=r"z has shape \(1, 7\), expected \(L,\)"):
        s4.cauchy_mult(v, z[None], w)


@pytest.mark.parametrize("conj", [True, False])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_vandermonde(conj: bool, dtype: torch.dtype) -> None:
    v, x = case(2, 3)
    steps = torch.arange(40)
    want = (v[..., None, :] * torch.exp(x[..., None, :] * steps[:, None])).sum(-1)
    want = 2 * want.real if conj else want
    close = 1e-12 if dtype == torch.complex128 else 1e-5
    v, x = v.to(dtype), x.to(dtype)
    found = s4.log_vandermonde(v, x, 40, conj)
    assert found.is_complex() != conj and torch.allclose(found.to(want.dtype), want, rtol=close, atol=close)
    powers = s4.vandermonde_mult(v, x.exp(), 40, conj)
    assert powers.dtype == dtype and torch.allclose(powers.to(torch.complex128), want + 0j, rtol=close, atol=close)


def test_a_base_of_zero() -> None:
    """0^0 is 1."""
    x, v = torch.tensor([0j, 0.5 + 0j]), torch.tensor([2 + 1j, 1 + 0j])
    found = s4.vandermonde_mult(v, x, 3, conj=False)
    assert torch.allclose(found, torch.tensor([3 + 1j, 0.5 + 0j, 0.25 + 0j]))


def test_transpose() -> None:
    (v, x), u = case(3), torch.randn(2, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = v * (u[..., None] * torch.exp(x[:, None] * torch.arange(20)[:, None])).sum(-2)
    assert torch.allclose(s4.log_vandermonde_transpose(u, v, x, 20), want, rtol=1e-12)
    # as the original takes it, in the dtype of x
    assert torch.allclose(s4.log_vandermonde_transpose(u.to(x), v, x, 20), want, rtol=1e-12)
    with pytest.raises(ValueError, match=r"u has shape \(2, 3, 20\), expected \(..., 21\)"):
        s4.log_vandermonde_transpose(u, v, x, 21)


def test_gradients_flow() -> None:
    v, x = ((0.1 * t).requires_grad_() for t in case(2))
    z = torch.tensor([0.5j, 2j], dtype=torch.complex128, requires_grad=True)
    out = (
        s4.cauchy_mult(v, z, x).abs().sum()
        + s4.log_vandermonde(v, x, 9).sum()
        + s4.vandermonde_mult(v, x, 3).real.sum()
    )
    assert all(g.abs().min() > 0 for g in torch.autograd.grad(out, (v, x, z)))
