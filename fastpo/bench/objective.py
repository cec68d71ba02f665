"""The benchmark of the fused objectives, `fastpo.losses`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastpo import losses
from fastpo.bench.harness import Expected, Problem, Provider, Run, compiled, read, with_backward
from fastpo.reference.pairwise import Pair, Side, pairwise_objective
from fastpo.reference.registry import Objective, objective

Function = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class ObjectiveCase:
    """A pairwise loss with what a trainer logs beside it: rewards of both sides and their accuracies.

    `tokens` > 0 gives per-token log-probs (pairs, tokens), right-padded under a mask; 0 gives summed ones.
    """

    PROVIDERS: ClassVar[tuple[str, ...]] = ("fastpo", "eager", "compile", "read")

    pairs: int = 65_536
    tokens: int = 0
    formula: str = "dpo"
    dtype: str = "float32"
    backward: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        size = f"{self.pairs} pairs" + (f" x {self.tokens} tokens" if self.tokens else "")
        return f"{self.formula} {size} {self.dtype}, forward{' + backward' * self.backward}"

    @staticmethod
    def takes(row: Objective) -> bool:
        """Whether log-probs are all that the objective eats."""
        return row.kernel == row.name and row.lengths in ("none", "optional") and not (row.inputs or row.previous_model)

    def build(self) -> Problem:
        dtype, row = getattr(torch, self.dtype), objective(self.formula)
        chosen, rejected = self._sides(dtype)
        # Log-probs are multiples of 1/64, which anyone sums without error. The offset keeps every margin away
        # from ties and from kinks of the formulas, where the last bit would decide about accuracy or slope.
        (chosen.policy[:, 0] if self.tokens else chosen.policy).sub_(1 / 128)
        leaves = [s.policy.requires_grad_(self.backward) for s in (chosen, rejected)]
        upstream = [torch.tensor(0.7, dtype=dtype)]

        def timed(function: Function) -> Run:
            def forward() -> Sequence[Tensor]:
                return function(chosen, rejected)

            return with_backward(forward, leaves, upstream) if self.backward else forward

        def fastpo_(chosen: Side, rejected: Side) -> Sequence[Tensor]:
            return _fastpo(row, chosen, rejected)

        def eager(chosen: Side, rejected: Side) -> Sequence[Tensor]:
            return _eager(row, chosen, rejected)

        streams = [t for s in (chosen, rejected) for t in (s.policy, s.reference, s.mask) if t is not None]

        def traffic() -> Run:
            once = read(torch.ones(_bytes(streams), dtype=torch.uint8))
            if not self.backward:
                return once
            gradients = torch.ones(_bytes(leaves), dtype=torch.uint8)
            return lambda: [*once(), gradients.clone()]

        moves = "a read of the inputs" + ", a copy of the policy's" * self.backward + ", as one block"
        return Problem(
            [
                Provider("fastpo", "fastpo", lambda: timed(fastpo_)),
                Provider("eager", "eager torch", lambda: timed(eager)),
                Provider("compile", "torch.compile of eager", lambda: timed(compiled(eager))),
                Provider("read", f"floor: {moves}", traffic, floor=True),
            ],
            expected=lambda: _expected(row, chosen, rejected, upstream if self.backward else []),
            bytes=_bytes(streams) + self.backward * _bytes(leaves),
            bar=("read",),
        )

    def _sides(self, dtype: torch.dtype) -> tuple[Side, Side]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.pairs, self.tokens) if self.tokens else (self.pairs,)
        # a token has about -4 nats and the policy moved by 1/32; a sequence -100, moved by 2
        deepest, moved = (512, 4) if self.tokens else (12_800, 256)

        def side() -> Side:
            reference = -torch.randint(deepest, shape, generator=generator) / 64
            move = torch.randint(-moved, moved + 1, shape, generator=generator) / 64
            mask = None
            if self.tokens:
                shortest = max(1, self.tokens // 4)
                lengths = torch.randint(shortest, self.tokens + 1, (self.pairs, 1), generator=generator)
                mask = torch.arange(self.tokens) < lengths
            return Side((reference + move).to(dtype), reference.to(dtype), mask)

        return side(), side()


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _fastpo(row: Objective, chosen: Side, rejected: Side) -> Sequence[Tensor]:
    references = (chosen.reference, rejected.reference) if row.reference_model else ()
    out = getattr(losses, row.name)(
        chosen.policy, rejected.policy, *references, chosen_mask=chosen.mask, rejected_mask=rejected.mask
    )
    return [out.loss, out.chosen_rewards, out.rejected_rewards, out.accuracies]


def _eager(row: Objective, chosen: Side, rejected: Side) -> Sequence[Tensor]:
    """The loss as trainers write it."""

    def sums(values: Tensor, mask: Tensor | None) -> Tensor:
        return values if mask is None else (values * mask).sum(-1)

    policies = [sums(s.policy, s.mask) for s in (chosen, rejected)]
    logratios = list(policies)
    if row.reference_model:
        references = [sums(s.reference, s.mask) for s in (chosen, rejected) if s.reference is not None]
        logratios = [p - r for p, r in zip(policies, references, strict=True)]
    hyper = row.formula_hyper(row.defaults)
    loss = row.formula(Pair(*policies, *logratios), **hyper).mean()
    chosen_rewards, rejected_rewards = (hyper.get("beta", 1.0) * a.detach() for a in logratios)
    return [loss, chosen_rewards, rejected_rewards, (chosen_rewards > rejected_rewards).to(loss.dtype)]


def _expected(row: Objective, chosen: Side, rejected: Side, upstream: Sequence[Tensor]) -> dict[str, Expected]:
    """The reference in fp64."""

    def exact(side: Side) -> Side:
        reference = None if side.reference is None or not row.reference_model else side.reference.double()
        return Side(side.policy.detach().double().requires_grad_(bool(upstream)), reference, side.mask)

    sides = exact(chosen), exact(rejected)
    losses_, chosen_rewards, rejected_rewards = pairwise_objective(row, *sides, row.formula_hyper(row.defaults))
    values = {
        "loss": losses_.mean(),
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "accuracies": (chosen_rewards > rejected_rewards).double(),
    }
    eps = torch.finfo(chosen.policy.dtype).eps
    # the numbers that are rounded: rewards, their difference, and the losses of the pairs
    largest = max(1.0, *(v.abs().max().item() for v in (2 * chosen_rewards, 2 * rejected_rewards, losses_)))
    expected = {name: Expected(value.detach(), magnitude=largest, eps=eps) for name, value in values.items()}
    if upstream:
        leaves = [s.policy for s in sides]
        gradients = torch.autograd.grad(values["loss"], leaves, upstream[0].double())
        for name, gradient in zip(("chosen_gradient", "rejected_gradient"), gradients, strict=True):
            weight = gradient.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            expected[name] = Expected(gradient, weight, largest, eps)
    return expected
