"""The benchmark of the fused objectives, `fastpo.losses`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastpo import losses
from fastpo.bench.harness import Expected, Problem, Provider, Run, compiled, read, with_backward
from fastpo.reference.pairwise import Pair, Side, pairwise_objective
from fastpo.reference.registry import Domain, Input, Objective, Variant, objective, objectives
from fastpo.reference.sequence import Summed, per_token

Sides = tuple[Side, Side]
Inputs = Mapping[str, Tensor]
Function = Callable[[Sides], Sequence[Tensor]]
Options = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class ObjectiveCase:
    """A pairwise loss with what a trainer logs beside it: rewards of both sides and their accuracies.

    `tokens` > 0 gives per-token log-probs (pairs, tokens), right-padded under a mask; 0 gives summed ones. `options`
    are those of the row that choose a variant.
    """

    PROVIDERS: ClassVar[tuple[str, ...]] = ("fastpo", "eager", "compile", "read")

    pairs: int = 65_536
    tokens: int = 0
    formula: str = "dpo"
    dtype: str = "float32"
    backward: bool = False
    seed: int = 0
    options: Options = ()

    @property
    def name(self) -> str:
        size = f"{self.pairs} pairs" + (f" x {self.tokens} tokens" if self.tokens else "")
        chosen = "".join(f" {value}" for _, value in self.options)
        return f"{self.formula}{chosen} {size} {self.dtype}, forward{' + backward' * self.backward}"

    @staticmethod
    def takes(row: Objective) -> bool:
        """Whether numbers per pair are all that the objective eats."""
        return row.kind == "pairwise" and row.scores == "policy" and not row.tokens

    @classmethod
    def formulas(cls) -> list[tuple[str, Options]]:
        """A row and its options for each compiled formula on pairs that a public function reaches."""
        found: dict[str, tuple[str, Options]] = {}
        for row in filter(cls.takes, objectives("pairwise")):
            for values in row.variants or [()]:
                options = tuple(zip(row.options, values, strict=True))
                found.setdefault(_variant(row, options)[0].kernel, (row.name, options))
        return list(found.values())

    def build(self) -> Problem:
        dtype, row = getattr(torch, self.dtype), objective(self.formula)
        generator = torch.Generator().manual_seed(self.seed)
        sides = self._side(row, dtype, generator), self._side(row, dtype, generator)
        inputs = {i.name: example_input(i, generator, self.pairs, sides[0].policy) for i in row.inputs}
        # Log-probs are multiples of 1/64, which anyone sums without error. The offset keeps every margin away
        # from ties and from kinks of the formulas, where the last bit would decide about accuracy or slope.
        first = sides[0].policy
        (first[:, 0] if self.tokens else first).sub_(1 / 128)
        leaves = [s.policy.requires_grad_(self.backward) for s in sides]
        upstream = [torch.tensor(0.7, dtype=dtype)]

        def timed(function: Function) -> Run:
            def forward() -> Sequence[Tensor]:
                return function(sides)

            return with_backward(forward, leaves, upstream) if self.backward else forward

        def fastpo_(sides: Sides) -> Sequence[Tensor]:
            return _fastpo(row, self.options, sides, inputs)

        def eager(sides: Sides) -> Sequence[Tensor]:
            return _eager(row, self.options, sides, inputs)

        streams = [t for s in sides for t in (s.policy, s.reference, s.previous, s.mask, s.lengths) if t is not None]
        streams += inputs.values()

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
            expected=lambda: _expected(row, self.options, sides, inputs, upstream if self.backward else []),
            bytes=_bytes(streams) + self.backward * _bytes(leaves),
            bar=("read",),
        )

    def _side(self, row: Objective, dtype: torch.dtype, generator: torch.Generator) -> Side:
        shape = (self.pairs, self.tokens) if self.tokens else (self.pairs,)
        # a token has about -4 nats and the policy moved by 1/32; a sequence -100, moved by 2
        deepest, moved = (512, 4) if self.tokens else (12_800, 256)
        # odd, so that averages of chosen and rejected do not tie
        longest = self.tokens or 128
        lengths = 2 * torch.randint(longest // 8, (longest + 1) // 2, (self.pairs,), generator=generator) + 1
        # a log-prob is negative
        reference = -torch.randint(moved + 1, deepest, shape, generator=generator) / 64

        def model() -> Tensor:
            return (reference + torch.randint(-moved, moved + 1, shape, generator=generator) / 64).to(dtype)

        taken, variant = _variant(row, self.options)
        needed = not self.tokens and (variant.length_norm or taken.lengths in ("average", "count"))
        return Side(
            model(),
            reference.to(dtype) if row.reference_model else None,
            torch.arange(self.tokens) < lengths[:, None] if self.tokens else None,
            lengths=lengths if needed else None,
            previous=model() if row.previous_model else None,
        )


def example_input(given: Input, generator: torch.Generator, rows: int, like: Tensor) -> Tensor:
    """Random numbers for a tensor beside the log-probs, inside its domain, and a better score for the chosen."""
    shape = tuple(like.shape) if given.side is not None else () if given.shared else (rows,)
    if given.boolean:
        return torch.rand(shape, generator=generator) < 0.6
    domain = Domain(0.0, 1.0) if given.side is not None else given.domain
    low = domain.low if math.isfinite(domain.low) else -1.0
    high = domain.high if math.isfinite(domain.high) else low + 2.0
    values = low + (high - low) * (0.1 + 0.8 * torch.rand(shape, generator=generator))
    if "log_sum_p2" in given.name:
        values = -values
    if given.name == "rejected_score":
        values = values.abs() + 0.2
    if given.name == "chosen_score":
        values = values.abs() + 2.5
    return values.to(like.dtype)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _variant(row: Objective, options: Options) -> tuple[Objective, Variant]:
    """The row whose formula is evaluated, and how."""
    if not row.options:
        return row, Variant(row.name)
    given = dict(options)
    variant = row.variants[tuple(given.get(name, known[0]) for name, known in row.options.items())]
    return objective(variant.row), variant


def _fastpo(row: Objective, options: Options, sides: Sides, inputs: Inputs) -> Sequence[Tensor]:
    chosen, rejected = sides
    models = ((s.policy, s.reference, s.previous) for s in sides)
    streams = [stream for model in zip(*models, strict=True) for stream in model if stream is not None]
    lengths = {"chosen_lengths": chosen.lengths, "rejected_lengths": rejected.lengths}
    out = getattr(losses, row.name)(
        *streams,
        **inputs,
        **dict(options),
        **({} if chosen.lengths is None else lengths),
        chosen_mask=chosen.mask,
        rejected_mask=rejected.mask,
    )
    return [out.loss, out.chosen_rewards, out.rejected_rewards, out.accuracies]


def _eager(row: Objective, options: Options, sides: Sides, inputs: Inputs) -> Sequence[Tensor]:
    """The loss as trainers write it."""
    taken, variant = _variant(row, options)
    hyper = variant.hyper(dict(row.defaults))
    columns = tuple(inputs.values())
    if taken.prepare is not None:
        sides, columns = taken.prepare(sides, inputs, hyper)
    hyper = taken.formula_hyper(hyper)
    sums = [_summed(side) for side in sides]
    averages = [per_token(s) for s in sums] if variant.length_norm or taken.lengths == "average" else sums
    pair = Pair(*(value for field in zip(*averages, strict=True) for value in field))
    loss = taken.formula(pair, *(c.to(pair.chosen.dtype) for c in columns), **hyper).mean()
    rewarded = averages if taken.lengths == "average" else sums
    chosen_rewards, rejected_rewards = (hyper.get("beta", 1.0) * s.logratio.detach() for s in rewarded)
    return [loss, chosen_rewards, rejected_rewards, (chosen_rewards > rejected_rewards).to(loss.dtype)]


def _summed(side: Side) -> Summed:
    """Sums by a product with the mask."""

    def total(t: Tensor) -> Tensor:
        return t if side.mask is None else (t * side.mask).sum(-1)

    policy = total(side.policy)
    ratio, step = (None if t is None else policy - total(t) for t in (side.reference, side.previous))
    length = side.lengths if side.mask is None else side.mask.sum(-1)
    return Summed(policy, policy if ratio is None else ratio, step, None if length is None else length.to(policy.dtype))


def _expected(
    row: Objective, options: Options, sides: Sides, inputs: Inputs, upstream: Sequence[Tensor]
) -> dict[str, Expected]:
    """The reference in fp64."""

    def wide(t: Tensor | None) -> Tensor | None:
        return t.detach().double() if t is not None and t.is_floating_point() else t

    eps = torch.finfo(sides[0].policy.dtype).eps
    leaves = [s.policy.detach().double().requires_grad_(bool(upstream)) for s in sides]
    exact: tuple[Side, ...] = tuple(Side(leaf, *map(wide, s[1:])) for leaf, s in zip(leaves, sides, strict=True))
    given = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    taken, variant = _variant(row, options)
    hyper = variant.hyper(dict(row.defaults))
    columns = tuple(given.values())
    if taken.prepare is not None:
        exact, columns = taken.prepare(exact, given, hyper)
    chosen, rejected = exact
    losses_, chosen_rewards, rejected_rewards = pairwise_objective(
        taken, chosen, rejected, taken.formula_hyper(hyper), length_norm=variant.length_norm, columns=columns
    )
    values = {
        "loss": losses_.mean(),
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "accuracies": (chosen_rewards > rejected_rewards).double(),
    }
    # the numbers that are rounded: rewards, their difference, and the losses of the pairs
    largest = max(1.0, *(v.abs().max().item() for v in (2 * chosen_rewards, 2 * rejected_rewards, losses_)))
    expected = {name: Expected(value.detach(), magnitude=largest, eps=eps) for name, value in values.items()}
    if upstream:
        gradients = torch.autograd.grad(values["loss"], leaves, upstream[0].double())
        for name, gradient in zip(("chosen_gradient", "rejected_gradient"), gradients, strict=True):
            # the sigmoids of some formulas nearly cancel in it, and a sigmoid's own slope is what is rounded
            slope = 0.25 * hyper.get("beta", 1.0) * upstream[0].item() / len(losses_)
            weight = gradient.abs().max().clamp_min(slope)
            expected[name] = Expected(gradient, weight, largest, eps)
    return expected
