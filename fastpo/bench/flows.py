"""The benchmark of SubTB(λ), `fastpo.losses.subtrajectory_balance`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastpo import losses
from fastpo.bench.harness import Expected, Problem, Provider, Run, compiled, read, with_backward

_LAMBDA = 0.9


@dataclass(frozen=True)
class SubTbCase:
    """SubTB(λ) over (rows, tokens), against the sum over all pairs of states. log Z is about -2,000."""

    PROVIDERS: ClassVar[tuple[str, ...]] = ("fastpo", "eager", "compile", "read")

    rows: int = 8
    tokens: int = 1024
    backward: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        return f"SubTB {self.rows} x {self.tokens} float32, forward{' + backward' * self.backward}"

    def build(self) -> Problem:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.tokens)
        forward = -torch.rand(shape, generator=generator) * 4
        residuals = torch.randn(shape, generator=generator)
        states = -2000 + torch.nn.functional.pad((forward - residuals).double().cumsum(1), (1, 0))
        flows, rewards = states[:, :-1].float(), states[:, -1].float()
        leaves = [t.requires_grad_(self.backward) for t in (forward, flows)]
        upstream = [torch.tensor(0.7)]

        def timed(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
            def run() -> Sequence[Tensor]:
                return [function(forward, flows, rewards)]

            return with_backward(run, leaves, upstream) if self.backward else run

        def traffic() -> Run:
            moved = torch.cat([t.detach().reshape(-1) for t in (*leaves, *leaves * self.backward)])
            return read(moved)

        def expected() -> dict[str, Expected]:
            wide = [t.detach().double().requires_grad_(self.backward) for t in leaves]
            # row by row, so that the pairs of one row alone are there
            parts = zip(*(t.split(1) for t in wide), rewards.double().split(1), strict=True)
            rows = [_pairs(a, b, c) for a, b, c in parts]
            loss = torch.stack(rows).mean()
            found = {"loss": Expected(loss.detach(), magnitude=loss.item())}
            if self.backward:
                for name, grad in zip(
                    ("forward", "flows"), torch.autograd.grad(loss, wide, upstream[0].double()), strict=True
                ):
                    found[name] = Expected(grad, weight=grad.abs().max().item())
            return found

        count = forward.numel() * 4
        fast = compiled(lambda a, b, c: [_pairs(a, b, c)])
        return Problem(
            [
                Provider("fastpo", "fastpo", lambda: timed(_fastpo)),
                Provider("eager", "eager torch, all pairs of states", lambda: timed(_pairs)),
                Provider("compile", "torch.compile of eager", lambda: timed(lambda a, b, c: fast(a, b, c)[0])),
                Provider("read", "floor: a read of the inputs, and of as much", traffic, floor=True),
            ],
            expected=expected,
            bytes=count * (4 if self.backward else 2),
            bar=("read",),
        )


def _fastpo(forward: Tensor, flows: Tensor, rewards: Tensor) -> Tensor:
    return losses.subtrajectory_balance(forward, flows, rewards, lambda_=_LAMBDA).loss


def _pairs(forward: Tensor, flows: Tensor, rewards: Tensor) -> Tensor:
    """The definition: the residual of every part of every trajectory, from running sums of the steps."""
    following = torch.cat([flows[:, 1:], rewards[:, None]], 1)
    sums = torch.nn.functional.pad((forward + (flows - following)).cumsum(1), (1, 0))
    place = torch.arange(sums.shape[1], device=sums.device)
    apart = (place - place[:, None]).clamp(min=0)
    weight = torch.where(apart > 0, _LAMBDA ** apart.to(sums.dtype), 0)
    squares = (sums[:, None, :] - sums[:, :, None]).square()
    return ((squares * weight).sum((1, 2)) / weight.sum()).mean()
