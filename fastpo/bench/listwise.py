"""The benchmark of the objectives on lists, `fastpo.losses.list_mle` and its like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import losses
from fastpo.bench.harness import Expected, Problem, Provider, Run, compiled, read, with_backward

OBJECTIVES = ("list_mle", "lipo_lambda")


@dataclass(frozen=True)
class ListwiseCase:
    """ListMLE or the lambda loss with its rewards, from summed log-probs of a policy and a reference."""

    PROVIDERS: ClassVar[tuple[str, ...]] = ("fastpo", "eager", "compile", "read")

    objective: str = "list_mle"
    lists: int = 4096
    items: int = 16
    dtype: str = "float32"
    backward: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        size = f"{self.lists} lists x {self.items} items"
        return f"{self.objective} {size} {self.dtype}, forward{' + backward' * self.backward}"

    def build(self) -> Problem:
        dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.lists, self.items)
        # multiples of 1/64, so that the ranks are the same in every dtype
        policy, reference = ((-torch.randint(0, 129, shape, generator=generator) / 64).to(dtype) for _ in range(2))
        labels = torch.rand(shape, generator=generator).to(dtype)
        policy.requires_grad_(self.backward)
        upstream = [torch.tensor(0.7, dtype=torch.promote_types(dtype, torch.float32))]
        eager = {"list_mle": _list_mle, "lipo_lambda": _lambda}[self.objective]

        def fastpo(policy: Tensor, reference: Tensor, labels: Tensor) -> Sequence[Tensor]:
            return getattr(losses, self.objective)(policy, reference, labels, beta=0.5)

        def timed(forward: Callable[..., Sequence[Tensor]]) -> Run:
            def run() -> Sequence[Tensor]:
                return forward(policy, reference, labels)

            return with_backward(run, [policy], upstream) if self.backward else run

        size = sum(t.numel() * t.element_size() for t in (policy, reference, labels))

        def traffic() -> Run:
            once = read(torch.ones(size, dtype=torch.uint8))
            gradient = torch.ones(size // 3, dtype=torch.uint8)
            return (lambda: [*once(), gradient.clone()]) if self.backward else once

        def expected() -> dict[str, Expected]:
            leaf = policy.detach().double().requires_grad_(self.backward)
            values = eager(leaf, reference.double(), labels.double())
            named = {n: Expected(v.detach()) for n, v in zip(("loss", "rewards"), values, strict=True)}
            if self.backward:
                (grad,) = torch.autograd.grad(values[0], leaf, upstream[0].double())
                # relative to the largest
                named["gradient"] = Expected(grad, weight=grad.abs().max().item())
            return named

        moves = "a read of the inputs" + ", a copy of the policy's" * self.backward + ", as one block"
        return Problem(
            [
                Provider("fastpo", "fastpo", lambda: timed(fastpo)),
                Provider("eager", "eager torch", lambda: timed(eager)),
                Provider("compile", "torch.compile of eager", lambda: timed(compiled(eager))),
                Provider("read", f"floor: {moves}", traffic, floor=True),
            ],
            expected=expected,
            bytes=size + self.backward * size // 3,
            bar=("read",),
        )


def _scores(policy: Tensor, reference: Tensor) -> Tensor:
    dtype = torch.promote_types(policy.dtype, torch.float32)
    return 0.5 * (policy.to(dtype) - reference.to(dtype))


def _list_mle(policy: Tensor, reference: Tensor, labels: Tensor) -> Sequence[Tensor]:
    """As ranking libraries write it, with a stable logarithm of sums."""
    scores = _scores(policy, reference)
    ordered = scores.gather(1, labels.argsort(dim=1, descending=True, stable=True))
    sums = ordered.flip(1).logcumsumexp(1).flip(1)
    return [(sums - ordered).sum(1).mean(), scores.detach()]


def _lambda(policy: Tensor, reference: Tensor, labels: Tensor) -> Sequence[Tensor]:
    """As ranking libraries write it, on the matrix of pairs."""
    scores = _scores(policy, reference)
    labels = labels.to(scores.dtype)
    with torch.no_grad():
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(1) + 1
        gain, inverse = torch.exp2(labels) - 1, 1 / torch.log1p(rank.to(scores.dtype))
        delta = (gain[:, :, None] - gain[:, None]).abs() * (inverse[:, :, None] - inverse[:, None]).abs()
        weight = torch.where(labels[:, :, None] > labels[:, None], delta, 0)
    losses = F.softplus(scores[:, None] - scores[:, :, None])
    return [(weight * losses).sum((1, 2)).mean(), scores.detach()]
