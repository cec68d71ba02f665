"""Every method of the registry as a case with inputs for it: for the tests that go over all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.bench.objective import example_input
from fastpo.reference.registry import Objective, objective, objectives
from tests.device import to_device

# no hyper-parameter is at a special value; log-ratios below are of order 1
HYPER = {
    "beta": 0.3,
    "label_smoothing": 0.15,
    "alpha": 0.4,
    "gamma": 0.7,
    "delta": 1.3,
    "eta": 0.45,
    "tau": 0.6,
    "lambda_": 0.35,
    "beta_rejected": 0.2,
    "r_max": 2.5,
    "lambda_desirable": 1.2,
    "lambda_undesirable": 0.8,
    "max_weight": 0.9,
    "dispersion": 0.29,
    "margin": 0.25,
    "epsilon": 0.3,
}


@dataclass(frozen=True)
class Case:
    """A public function under one choice of its options."""

    row: Objective
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return "-".join([self.row.name, *map(str, self.options.values())])

    @property
    def taken(self) -> Objective:
        """The row whose formula is evaluated."""
        if not self.row.options:
            return self.row
        values = tuple(self.options.get(name, known[0]) for name, known in self.row.options.items())
        return objective(self.row.variants[values].row)

    @property
    def needs_lengths(self) -> bool:
        averaged = self.row.length_norm and self.options.get("convention") == "trl"
        return averaged or self.taken.lengths in ("average", "count")

    @property
    def needs_tokens(self) -> bool:
        return self.row.tokens or self.taken.tokens

    def hyper(self) -> dict[str, float]:
        return {name: HYPER[name] for name in self.row.defaults}


def _cases() -> list[Case]:
    found = []
    for row in objectives():
        keys = list(row.variants) or [()]
        found += [Case(row, dict(zip(row.options, key, strict=True))) for key in keys]
    return found


CASES = _cases()
# a stop-gradient inside: differences of the loss are not its gradient
DETACHED = {"alpha_dpo", "nash_md", "nash_ema", "nash_mp", "p3o", "wpo"}


def arguments(case: Case, layout: str, rows: int, tokens: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Named tensors for a case: layout is "summed", "padded" or "packed"."""
    generator = torch.Generator().manual_seed(1000 * seed + len(case.id))
    row, out = case.row, {}
    # sums of many tokens would saturate what is not an average
    scale = 1.0 if layout == "summed" else 1.0 / math.sqrt(max(tokens, 1))
    for side in row.sides:
        names = {model: f"{model}_{side}" if side else model for model in row.models}
        at = {what: f"{side}_{what}" if side else what for what in ("mask", "cu_seqlens", "lengths")}
        lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
        shape: tuple[int, ...] = (rows,)
        if layout == "padded":
            shape = (rows, tokens)
            out[at["mask"]] = torch.rand(shape, generator=generator) < 0.8
            out[at["mask"]][:, 0] = True
        elif layout == "packed":
            shape = (int(lengths.sum()),)
            out[at["cu_seqlens"]] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
        elif case.needs_lengths:
            out[at["lengths"]] = lengths
        base = -(0.3 + torch.rand(shape, generator=generator))
        for model in row.models:
            noise = torch.randn(shape, generator=generator) * scale
            out[names[model]] = (base + noise if model != "reference" else base).to(dtype)
        if row.scores == "policy" and not row.reference_model:
            out[names["policy"]] = base.to(dtype)
    for given in row.inputs:
        side = row.sides[given.side or 0]
        like = out[f"{row.scores}_{side}" if side else row.scores]
        out[given.name] = example_input(given, generator, rows, like)
    return out


def policies(case: Case) -> list[str]:
    """The arguments through which a gradient flows."""
    first = [f"{case.row.scores}_{side}" if side else case.row.scores for side in case.row.sides]
    return first + [given.name for given in case.row.inputs if given.gradient]


def call(case: Case, given: dict[str, Tensor], backend: str = "native", **more: Any) -> Any:
    with fastpo.use_backend(backend):
        return getattr(losses, case.row.name)(**{**given, **case.hyper(), **case.options, **more})


def evaluate(case: Case, given: dict[str, Tensor], backend: str = "native", **more: Any) -> dict[str, Tensor]:
    """Outputs, and the gradients of what is differentiable under an upstream gradient of both signs."""
    names = policies(case)
    given = {name: to_device(value) for name, value in given.items()}
    leaves = {name: given[name].detach().clone().requires_grad_() for name in names}
    out = call(case, {**given, **leaves}, backend, **more)
    upstream = torch.linspace(-1.5, 2.0, max(out.loss.numel(), 1)).to(out.loss).view_as(out.loss)
    grads = torch.autograd.grad(out.loss, list(leaves.values()), upstream, allow_unused=True)
    found = dict(zip(out._fields, (value.detach() for value in out), strict=True))
    for name, grad in zip(names, grads, strict=True):
        found[f"grad of {name}"] = torch.zeros_like(given[name]) if grad is None else grad
    return {name: value.cpu() for name, value in found.items()}


def as_double(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.dtype.is_floating_point else value for name, value in given.items()}
