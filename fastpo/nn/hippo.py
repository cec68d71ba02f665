"""State matrices that S4 begins with: HiPPO's, their normal plus low-rank form, and the diagonal ones of S4D.

All in fp64 on the CPU, once for each layer that is built.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MEASURES = ("legs", "legt", "fout")
DIAGONALS = ("lin", "inv", "inv2", "quad", "legs", "real")


class NPLR(NamedTuple):
    """One half, that of the eigenvalues with negative imaginary parts, of A = V (diag(w) - Σ_r p_r p_r*) V*.

    Attributes:
        w: complex128 (N/2,), the eigenvalues of the normal part, by their imaginary parts, the most negative first.
        p: complex128 (R, N/2), V* P of the real low-rank factors.
        b: complex128 (N/2,), V* B; its phases, which are those of the eigenvectors, are chosen so that b >= 0.
        v: complex128 (N, N/2), orthonormal eigenvectors; the other half are their conjugates.
    """

    w: Tensor
    p: Tensor
    b: Tensor
    v: Tensor


def _check_state(d_state: int, even: bool = True) -> None:
    if isinstance(d_state, bool) or not isinstance(d_state, int):
        raise TypeError(f"d_state must be an int, got {type(d_state).__name__}")
    if d_state < (2 if even else 1):
        raise ValueError(f"d_state must be at least {2 if even else 1}, got {d_state}")
    if even and d_state % 2:
        raise ValueError(f"d_state must be even, as eigenvalues come in conjugate pairs, got {d_state}")


def _known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def transition(measure: str, d_state: int) -> tuple[Tensor, Tensor]:
    """HiPPO's x' = A x + B u, whose state holds the coefficients of the past of u in a basis of polynomials or waves.

    - "legs", scaled Legendre: A_nk = -√(2n+1)√(2k+1) for n > k, -(n+1) for n = k, else 0; B_n = √(2n+1).
    - "legt", translated Legendre on a window of length 2: A_nk = -½ √(2n+1)√(2k+1) (1 for n >= k, else (-1)^(n-k));
      B_n = ½ √(2n+1).
    - "fout", truncated Fourier on a window of length 1: A = π S - B Bᵀ with S coupling 2n and 2n + 1 by n, skew;
      B = 1 at 0, √2 at the other even places, else 0.

    Args:
        measure: "legs", "legt" or "fout".
        d_state: N; even for "fout".

    Returns:
        A (N, N) and B (N,), fp64.

    Raises:
        TypeError: d_state is no int.
        ValueError: an unknown measure, or d_state is too small or odd.

    Source: HiPPO (2008.07669) and How to Train Your HiPPO (2206.12037); the scales of "legt" and "fout" are those of
    the code of state-spaces/s4.
    """
    _known("measure", measure, MEASURES)
    _check_state(d_state, even=measure == "fout")
    n = torch.arange(d_state, dtype=torch.float64)
    if measure == "fout":
        even = 1 - n % 2
        b = math.sqrt(2) * even
        b[0] = 1.0
        couplings = (math.pi * (n // 2) * even)[:-1]
        return torch.diag(couplings, -1) - torch.diag(couplings, 1) - torch.outer(b, b), b
    b = (2 * n + 1).sqrt()
    below = n[:, None] - n
    if measure == "legs":
        return -torch.where(below > 0, torch.outer(b, b), torch.diag(n + 1)), b
    signs = torch.where(below >= 0, 1.0, 1.0 - 2.0 * (below % 2))
    return -0.5 * torch.outer(b, b) * signs, 0.5 * b


def rank_correction(measure: str, d_state: int) -> Tensor:
    """P (R, N), fp64, with A + Σ_r P_r P_rᵀ a multiple of the identity plus a skew matrix; R is 2 for "legt", else 1.

    Raises:
        TypeError, ValueError: as by `transition`.
    """
    _known("measure", measure, MEASURES)
    _check_state(d_state, even=measure == "fout")
    if measure == "fout":
        return transition(measure, d_state)[1][None]
    n = torch.arange(d_state, dtype=torch.float64)
    p = (n + 0.5).sqrt()
    # the window's other end has opposite signs at odd degrees, which leaves the terms of equal parity
    return p[None] if measure == "legs" else torch.stack([p * (n % 2), p * (1 - n % 2)])


@lru_cache(maxsize=16, typed=True)
def nplr(measure: str, d_state: int) -> NPLR:
    """The normal plus low-rank form of `transition`.

    The normal part A + P Pᵀ is diagonalised, being a multiple of the identity plus a skew matrix; A itself has
    eigenvectors that no precision could hold. Where the original clamps the imaginary parts of b to ±2, which depends
    on phases that LAPACK is free to choose, here the phases are chosen and nothing is clamped.

    Raises:
        TypeError, ValueError: as by `transition`; d_state is odd.

    Source: S4 (2111.00396), Theorem 1.
    """
    _known("measure", measure, MEASURES)
    _check_state(d_state)
    a, b = transition(measure, d_state)
    p = rank_correction(measure, d_state)
    half = d_state // 2
    if measure == "fout":
        # blocks of two rows; written down, since of the two eigenvalues 0 any basis would be found
        frequencies = torch.arange(half - 1, -1, -1)
        w = torch.complex(torch.zeros(half, dtype=torch.float64), -math.pi * frequencies.double())
        v = torch.zeros(d_state, half, dtype=torch.complex128)
        v[2 * frequencies, torch.arange(half)] = math.sqrt(0.5)
        v.imag[2 * frequencies + 1, torch.arange(half)] = math.sqrt(0.5)
    else:
        normal = a + p.T @ p
        imaginary, vectors = torch.linalg.eigh(-1j * normal)
        w, v = torch.complex(normal.diagonal().mean().expand(half), imaginary[:half]), vectors[:, :half]
    found = v.mH @ b.to(v.dtype)
    v = v * (found / found.abs())
    return NPLR(w, p.to(v.dtype) @ v.conj(), found.abs().to(v.dtype), v)


@lru_cache(maxsize=16, typed=True)
def diagonal(init: str, d_state: int) -> tuple[Tensor, Tensor]:
    """The eigenvalues and the inputs of S4D's diagonal systems, one half of each.

    With n = 0 .. N/2 - 1, real part -½ and b = 1, the imaginary parts are -πn ("lin"), -(N/π)(N/(2n+1) - 1) ("inv"),
    -(N/π)(N/(n+1) - 1) ("inv2"), -(1+2n)²/π ("quad"). "legs" has the eigenvalues of HiPPO-LegS's normal part and half
    its b, as the paper's theorem has it and the original's code has not. "real" is -(n+1).

    Args:
        init: its name.
        d_state: N, even: that of the whole system, conjugates included.

    Returns:
        a and b, complex128 (N/2,).

    Raises:
        TypeError: d_state is no int.
        ValueError: an unknown init, or d_state is odd or less than 2.

    Source: S4D (2206.11893), as in the code of state-spaces/s4.
    """
    _known("init", init, DIAGONALS)
    _check_state(d_state)
    if init == "legs":
        form = nplr("legs", d_state)
        return form.w, form.b / 2
    n = torch.arange(d_state // 2, dtype=torch.float64)
    ones = torch.ones_like(n)
    size = float(d_state)
    if init == "real":
        real, imaginary = -(n + 1), torch.zeros_like(n)
    else:
        real = -0.5 * ones
        imaginary = {
            "lin": math.pi * n,
            "inv": size / math.pi * (size / (2 * n + 1) - 1),
            "inv2": size / math.pi * (size / (n + 1) - 1),
            "quad": (1 + 2 * n) ** 2 / math.pi,
        }[init]
    return torch.complex(real, -imaginary), torch.complex(ones, torch.zeros_like(n))
