"""The benchmarks of the products of state-space layers, `fastpo.cauchy` and `fastpo.vandermonde`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastpo.kernels as kernels
from fastpo.bench.harness import Expected, Problem, Provider, Run, UnavailableError, compiled

PRODUCTS = ("cauchy", "vandermonde")
Product = Callable[..., Tensor]


@dataclass(frozen=True)
class StateSpaceCase:
    """The convolution kernels of a layer, of one half of the conjugate pairs: `cauchy` at the nodes of S4, on the
    imaginary axis, `vandermonde` as of S4D; poles of S4D-Lin, time steps from 1e-3 to 0.1. With `backward`, the
    gradients of residues and poles."""

    PROVIDERS: ClassVar[tuple[str, ...]] = ("fastpo", "eager", "compile", "pykeops")

    product: str = "cauchy"
    channels: int = 256
    state: int = 32  # poles of one half
    length: int = 2048
    dtype: str = "complex64"
    backward: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        size = f"{self.channels} x {self.state} x {self.length}"
        return f"{self.product} {size} {self.dtype}, forward{' + backward' * self.backward}"

    def build(self) -> Problem:
        dtype: torch.dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        steps = torch.logspace(-3, -1, self.channels, dtype=torch.float64)[:, None]
        poles = (steps * (-0.5 + 1j * math.pi * torch.arange(self.state))).to(dtype)
        residues = torch.randn(self.channels, self.state, dtype=dtype, generator=generator)
        # half of the unit circle, but for the node at infinity
        nodes = 2j * torch.tan(math.pi * torch.arange(self.length, dtype=torch.float64) / (2 * self.length))
        leaves = [t.requires_grad_(self.backward) for t in (residues, poles)]
        shape = (self.channels, self.length)
        upstream = torch.randn(shape, dtype=dtype, generator=generator)
        z = nodes.to(dtype)
        if self.product == "vandermonde":
            upstream = upstream.real.contiguous()

        def timed(function: Product) -> Run:
            def run() -> Sequence[Tensor]:
                out = self._call(function, leaves[0], z, leaves[1])
                grads = torch.autograd.grad(out, leaves, upstream) if self.backward else ()
                return [_real(t) for t in (out, *grads)]

            return run

        def expected() -> dict[str, Expected]:
            return self._expected(residues, poles, z, upstream)

        own = kernels.cauchy if self.product == "cauchy" else kernels.vandermonde
        plain = cauchy if self.product == "cauchy" else vandermonde
        return Problem(
            [
                Provider("fastpo", "fastpo", lambda: timed(own)),
                Provider("eager", "eager torch, every term", lambda: timed(plain)),
                Provider("compile", "torch.compile of eager", lambda: timed(compiled(plain))),
                Provider("pykeops", "pykeops", lambda: timed(self._pykeops())),
            ],
            # minutes, beyond
            expected=expected if self.channels * self.state * self.length <= 2**28 else None,
            bytes=(1 + self.backward) * sum(t.nbytes for t in (*leaves, upstream)),
        )

    def _call(self, function: Product, v: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return function(v, z, w) if self.product == "cauchy" else function(v, w, self.length)

    def _expected(self, v: Tensor, w: Tensor, z: Tensor, upstream: Tensor) -> dict[str, Expected]:
        """Channel by channel, so that the terms of one alone are there."""
        double = torch.complex128
        found: list[list[Tensor]] = []
        for i in range(self.channels):
            leaves = [t[i : i + 1].detach().to(double).requires_grad_(self.backward) for t in (v, w)]
            plain = cauchy if self.product == "cauchy" else vandermonde
            out = self._call(plain, leaves[0], z.to(double), leaves[1])
            up = upstream[i : i + 1].to(out.dtype)
            grads = torch.autograd.grad(out, leaves, up) if self.backward else ()
            found.append([_real(t).detach() for t in (out, *grads)])
        whole = [torch.cat(parts) for parts in zip(*found, strict=True)]
        names = ("product", "residue_gradient", "pole_gradient")
        # phases in the dtype are rounded in proportion to their size, but not by fastpo
        phase = 1.0 if self.product == "cauchy" else max(1.0, w.abs().max().item() * self.length)
        eps = torch.finfo(v.dtype).eps
        return {
            name: Expected(value, weight=value.abs().max().item(), magnitude=phase, eps=eps)
            for name, value in zip(names, whole, strict=False)
        }

    def _pykeops(self) -> Product:
        try:
            from pykeops.torch import Genred
        except Exception as error:  # without a compiler it fails in its own ways
            raise UnavailableError(f"pykeops: {error}") from None
        if self.product == "cauchy":
            numerator = "z * ComplexReal(v) - Real2Complex(Sum(v * w))"
            formula = f"ComplexDivide({numerator}, ComplexMult(z - w, z - Conj(w)))"
            variables = ["v = Vj(2)", "z = Vi(2)", "w = Vj(2)"]
        else:
            formula = "ComplexMult(v, ComplexExp(ComplexMult(x, l)))"
            variables = ["v = Vj(2)", "x = Vj(2)", "l = Vi(2)"]
        reduction: Any = Genred(formula, variables, reduction_op="Sum", axis=1)

        def product(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
            parts = (torch.view_as_real(t).contiguous() for t in (v, z[None], w))
            return torch.view_as_complex(2 * reduction(*parts, backend="CPU"))

        def powers(v: Tensor, x: Tensor, length: int) -> Tensor:
            steps = torch.arange(length).to(x)[None]
            parts = (torch.view_as_real(t).contiguous() for t in (v, x, steps))
            return 2 * reduction(*parts, backend="CPU")[..., 0]

        return product if self.product == "cauchy" else powers


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """As one writes it in torch."""
    v, z, w = v.unsqueeze(-2), z.unsqueeze(-1), w.unsqueeze(-2)
    return (v / (z - w) + v.conj() / (z - w.conj())).sum(-1)


def vandermonde(v: Tensor, x: Tensor, length: int) -> Tensor:
    """As one writes it in torch."""
    powers = torch.exp(x.unsqueeze(-1) * torch.arange(length).to(x))
    return 2 * torch.einsum("...n,...nl->...l", v, powers).real
