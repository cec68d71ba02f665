"""HiPPO's matrices against what they are defined by, and their normal plus low-rank form put together again."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastpo.nn import hippo

pytestmark = pytest.mark.once

EPS = torch.finfo(torch.float64).eps


def gauss(count):
    """Nodes and weights of Gauss and Legendre on [-1, 1], exact to degree 2 count - 1, from Jacobi's matrix."""
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, 2 * vectors[0] ** 2


def legendre(x, count):
    """P_n(x) and P_n'(x) by their recursions, (count, points)."""
    p, d = [torch.ones_like(x), x], [torch.zeros_like(x), torch.ones_like(x)]
    for n in range(1, count):
        p.append(((2 * n + 1) * x * p[n] - n * p[n - 1]) / (n + 1))
        d.append(d[n - 1] + (2 * n + 1) * p[n])
    return torch.stack(p[:count]), torch.stack(d[:count])


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_legs_is_the_projection_on_all_of_the_past(size):
    """c_n = (1/t) ∫_0^t f g_n(s/t) ds, g_n = √(2n+1) P_n(2s/t - 1), has t c' = A c + B f(t) for every f."""
    x, w = gauss(size + 4)
    p, d = legendre(x, size)
    scale = (2 * torch.arange(size, dtype=torch.float64) + 1).sqrt()[:, None]
    # differentiated by t under the integral, with t = 1 and s = (x + 1)/2: f(t) g_n(1) - <f, g_n> - <f, (x+1) g_n'>
    monomials = x ** torch.arange(size, dtype=torch.float64)[:, None]
    moments = 0.5 * (scale * p * w) @ monomials.T
    change = scale - moments - 0.5 * (scale * d * (x + 1) * w) @ monomials.T
    a, b = hippo.transition("legs", size)
    size_of_terms = (a.abs() @ moments.abs()).max().item()
    torch.testing.assert_close(a @ moments + b[:, None], change, rtol=0, atol=32 * size * EPS * size_of_terms + EPS)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_legt_is_the_projection_on_a_window(size):
    """On [t-2, t], with f(t-2) read from the projection: c' = A c + B f(t) for every polynomial of its degree."""
    x, w = gauss(size + 4)
    p, d = legendre(x, size)
    scale = (2 * torch.arange(size, dtype=torch.float64) + 1).sqrt()[:, None]
    # orthonormal under the measure ½ on the window, where s = t - 1 + x
    monomials = x ** torch.arange(size, dtype=torch.float64)[:, None]
    moments = 0.5 * (scale * p * w) @ monomials.T
    ends = 0.5 * scale * (1 - (-1.0) ** torch.arange(size) * (-1.0) ** torch.arange(size)[:, None])
    change = ends - 0.5 * (scale * d * w) @ monomials.T
    a, b = hippo.transition("legt", size)
    size_of_terms = (a.abs() @ moments.abs()).max().item()
    torch.testing.assert_close(a @ moments + b[:, None], change, rtol=0, atol=32 * size * EPS * size_of_terms + EPS)


def test_fout_is_the_fourier_series_of_a_window():
    """On [t-1, t], with f(t-1) read from the series at its end: of waves of the window, c' is that of the shift."""
    size, points = 8, 64
    s = torch.arange(points, dtype=torch.float64) / points  # s = t - time
    waves = [torch.ones_like(s), torch.zeros_like(s)]
    for n in range(1, size // 2):
        waves += [math.sqrt(2) * (2 * math.pi * n * s).cos(), math.sqrt(2) * (2 * math.pi * n * s).sin()]
    basis = torch.stack(waves)
    a, b = hippo.transition("fout", size)
    assert a[1].count_nonzero() == 0 and b[1] == 0  # there is no sine of frequency 0
    # of a periodic f, f(t - 1) = f(t), so that both ends cancel and the coefficients turn
    turned = a + torch.outer(b, b)
    torch.testing.assert_close(turned, -turned.T)
    gram = basis @ basis.T / points
    torch.testing.assert_close(gram, torch.diag((gram.diagonal() > 0.5).double()), rtol=0, atol=points * EPS)
    for n in range(size // 2):
        block = turned[2 * n : 2 * n + 2, 2 * n : 2 * n + 2]
        torch.testing.assert_close(block, math.pi * n * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64))
    assert turned.count_nonzero() == 2 * (size // 2 - 1)
    torch.testing.assert_close(b, basis[:, 0])


@pytest.mark.parametrize("measure", hippo.MEASURES)
@pytest.mark.parametrize("size", [2, 4, 16, 64])
def test_reassembled(measure, size):
    a, b = hippo.transition(measure, size)
    p = hippo.rank_correction(measure, size)
    normal = a + p.T @ p
    level = normal.diagonal().mean()
    skew = normal - level * torch.eye(size)
    atol = 8 * size * EPS * a.abs().max().item()
    torch.testing.assert_close(skew, -skew.T, rtol=0, atol=atol)
    form = hippo.nplr(measure, size)
    assert form.w.shape == form.b.shape == (size // 2,) and form.v.shape == (size, size // 2)
    assert (form.w.imag <= 0).all() and (form.w.imag.diff() > 0).all()
    v, w = torch.cat([form.v, form.v.conj()], 1), torch.cat([form.w, form.w.conj()])
    low, inputs = torch.cat([form.p, form.p.conj()], 1), torch.cat([form.b, form.b.conj()])
    eye = torch.eye(size, dtype=v.dtype)
    torch.testing.assert_close(v.mH @ v, eye, rtol=0, atol=8 * size * EPS)
    whole = v @ (torch.diag(w) - low.T @ low.conj()) @ v.mH
    torch.testing.assert_close(whole, a.to(v.dtype), rtol=0, atol=atol)
    torch.testing.assert_close(v @ inputs, b.to(v.dtype), rtol=0, atol=atol)
    assert (form.b.imag == 0).all() and (form.b.real > 0).all()


def test_lapack_chooses_nothing(monkeypatch):
    """Other phases of the eigenvectors give the same form."""
    plain = hippo.nplr.__wrapped__("legs", 16)
    eigh = torch.linalg.eigh

    def turned(matrix):
        values, vectors = eigh(matrix)
        phases = torch.exp(1j * torch.linspace(0, 6, len(values), dtype=torch.float64))
        return values, vectors * phases

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    for ours, other in zip(plain, hippo.nplr.__wrapped__("legs", 16), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=64 * EPS * ours.abs().max().item())


def test_diagonals():
    n = torch.arange(4, dtype=torch.float64)
    expected = {
        "lin": math.pi * n,
        "inv": 8 / math.pi * (8 / (2 * n + 1) - 1),
        "inv2": 8 / math.pi * (8 / (n + 1) - 1),
        "quad": (1 + 2 * n) ** 2 / math.pi,
    }
    for name, imaginary in expected.items():
        a, b = hippo.diagonal(name, 8)
        torch.testing.assert_close(a, torch.complex(torch.full_like(n, -0.5), -imaginary))
        assert (b == 1).all()
    assert torch.equal(hippo.diagonal("real", 8)[0].real, -(n + 1))
    a, b = hippo.diagonal("legs", 8)
    form = hippo.nplr("legs", 8)
    assert torch.equal(a, form.w) and torch.equal(b, form.b / 2)
    # the paper's theorem: half of b gives the responses of the whole system where N is large (in the mean over time:
    # at 0 they differ by what is halved), and all of it twice as much
    a, b = hippo.diagonal("legs", 128)
    times = torch.linspace(0.1, 2, 20, dtype=torch.float64)
    ours = 2 * ((b * (a * times[:, None]).exp()) @ hippo.nplr("legs", 128).v.T).real[:, :4]
    whole, inputs = hippo.transition("legs", 128)
    exact = (torch.linalg.matrix_exp(whole * times[:, None, None]) @ inputs)[:, :4]
    scale = (ours * exact).sum() / (exact * exact).sum()
    assert 0.9 < scale < 1.1


def test_errors():
    for call in (hippo.nplr, hippo.diagonal, hippo.transition, hippo.rank_correction):
        name = "init" if call is hippo.diagonal else "measure"
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'hermite'"):
            call("hermite", 8)
    functions = (partial(hippo.nplr, "legs"), partial(hippo.diagonal, "lin"), partial(hippo.transition, "fout"))
    for call in functions:
        with pytest.raises(ValueError, match="d_state must be even, as eigenvalues come in conjugate pairs, got 7"):
            call(7)
        with pytest.raises(ValueError, match="d_state must be at least 2, got 0"):
            call(0)
        with pytest.raises(TypeError, match="d_state must be an int, got float"):
            call(8.0)
    with pytest.raises(ValueError, match="d_state must be at least 1, got -1"):
        hippo.transition("legs", -1)
    assert hippo.transition("legs", 7)[0].shape == (7, 7)
