"""The benchmarks of the scans and of the group statistics, `fastpo.advantages`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastpo import advantages
from fastpo.bench.harness import Expected, Problem, Provider, Run, UnavailableError, compiled, read
from fastpo.reference import scan as reference
from fastpo.reference import segments

_GAMMA, _LAM, _EPS = 1.0, 0.95, 1e-6


@dataclass(frozen=True)
class GaeCase:
    """Advantages and returns of (rows, tokens). `ragged` rows are padded under a mask; `packed`, the same without the
    padding."""

    PROVIDERS: ClassVar[tuple[str, ...]] = ("fastpo", "eager", "compile", "torchrl", "read", "copy")

    rows: int = 64
    tokens: int = 1024
    layout: str = "dense"  # or "ragged", "packed"
    seed: int = 0

    @property
    def name(self) -> str:
        return f"GAE {self.rows} x {self.tokens} {self.layout}, float32"

    def build(self) -> Problem:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.tokens)
        rewards, values = (torch.randn(shape, generator=generator) for _ in range(2))
        lengths = torch.full((self.rows,), self.tokens)
        if self.layout != "dense":
            lengths = torch.randint(self.tokens // 4, self.tokens + 1, (self.rows,), generator=generator)
        mask = torch.arange(self.tokens) < lengths[:, None]
        boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        flat = rewards[mask], values[mask]

        def own() -> Sequence[Tensor]:
            if self.layout == "packed":
                return advantages.gae(*flat, gamma=_GAMMA, lam=_LAM, cu_seqlens=boundaries)
            return advantages.gae(
                rewards, values, gamma=_GAMMA, lam=_LAM, mask=None if self.layout == "dense" else mask
            )

        def shown(run: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]) -> Run:
            def call() -> Sequence[Tensor]:
                found = run(rewards, values, mask)
                return [f[mask] for f in found] if self.layout == "packed" else found

            return call

        inputs = torch.cat([t.reshape(-1) for t in (flat if self.layout == "packed" else (rewards, values))])
        count = inputs.numel() * inputs.element_size()
        return Problem(
            [
                Provider("fastpo", "fastpo", lambda: own),
                Provider("eager", "a loop over the tokens, reversed", lambda: shown(_loop)),
                Provider("compile", "torch.compile of the loop", lambda: self._compiled(shown)),
                Provider("torchrl", "torchrl's vectorised estimator", lambda: self._torchrl(shown)),
                Provider("read", "floor: a read of the inputs, as one block", lambda: read(inputs), floor=True),
                Provider(
                    "copy", "floor: a copy of the inputs, as one block", lambda: lambda: [inputs.clone()], floor=True
                ),
            ],
            expected=lambda: self._expected(rewards, values, mask),
            bytes=2 * count,
            bar=("read",),
        )

    def _compiled(self, shown: Callable[..., Run]) -> Run:
        if self.tokens > 256:
            raise UnavailableError("unrolls the loop: minutes of compiling above 256 tokens")
        return shown(compiled(_loop))

    def _torchrl(self, shown: Callable[..., Run]) -> Run:
        try:
            from torchrl.objectives.value.functional import vec_generalized_advantage_estimate as estimate
        except Exception as error:  # a torchrl built for another torch fails in its own ways
            raise UnavailableError(f"torchrl: {error}") from None
        if self.layout != "dense":
            raise UnavailableError("torchrl takes no mask")

        def run(rewards: Tensor, values: Tensor, mask: Tensor) -> Sequence[Tensor]:
            following = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], 1)
            done = torch.zeros_like(mask)
            done[:, -1] = True
            rows = (values, following, rewards, done, done)
            return [t.squeeze(-1) for t in estimate(_GAMMA, _LAM, *(t.unsqueeze(-1) for t in rows))]

        return shown(run)

    def _expected(self, rewards: Tensor, values: Tensor, mask: Tensor) -> dict[str, Expected]:
        exact = reference.advantages(rewards.double(), values.double(), mask=mask, gamma=_GAMMA, lam=_LAM)
        found = {}
        for name, value in zip(("advantages", "returns"), exact, strict=True):
            # a sum of 1 / (1 - λ) terms of the size of the largest
            largest = value.abs().max().item()
            found[name] = Expected(value[mask] if self.layout == "packed" else value, magnitude=largest)
        return found


def _loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Sequence[Tensor]:
    """GAE as trainers write it; the mask is that of padding at the end."""
    rewards, values = rewards * mask, values * mask
    last, found = torch.zeros_like(rewards[:, 0]), []
    length = rewards.shape[1]
    for t in reversed(range(length)):
        following = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + _GAMMA * following - values[:, t]
        last = delta + _GAMMA * _LAM * last
        found.append(last)
    advantage = torch.stack(found[::-1], 1)
    return [advantage * mask, (advantage + values) * mask]


@dataclass(frozen=True)
class GroupCase:
    """Rewards normalised in ragged groups of 4 to 16, adjacent or in any order."""

    PROVIDERS: ClassVar[tuple[str, ...]] = ("fastpo", "eager", "loop", "compile", "read")

    rewards: int = 65_536
    shuffled: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        return f"group_normalize {self.rewards} rewards{' shuffled' * self.shuffled}, float32"

    def build(self) -> Problem:
        generator = torch.Generator().manual_seed(self.seed)
        sizes = torch.randint(4, 17, (self.rewards // 4 + 1,), generator=generator)
        ids = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[: self.rewards]
        if self.shuffled:
            ids = ids[torch.randperm(self.rewards, generator=generator)]
        groups = int(ids.max()) + 1
        rewards = torch.randn(self.rewards, generator=generator)

        def scatter(rewards: Tensor, ids: Tensor) -> Sequence[Tensor]:
            return [_scatter(rewards, ids, groups)]

        fast = compiled(scatter)
        return Problem(
            [
                Provider("fastpo", "fastpo", lambda: lambda: [advantages.grpo(rewards, ids, eps=_EPS)]),
                Provider("eager", "eager torch, by index_add", lambda: lambda: scatter(rewards, ids)),
                Provider("loop", "a loop over the groups", lambda: lambda: _groups(rewards, ids, groups)),
                Provider("compile", "torch.compile of eager", lambda: lambda: fast(rewards, ids)),
                Provider("read", "floor: a read of rewards and ids", lambda: _read_both(rewards, ids), floor=True),
            ],
            expected=lambda: {"advantages": _exact(rewards, ids)},
            bytes=rewards.numel() * 16,
            bar=("read",),
        )


def _read_both(rewards: Tensor, ids: Tensor) -> Run:
    first, second = read(rewards), read(ids)
    return lambda: [*first(), *second()]


def _exact(rewards: Tensor, ids: Tensor) -> Expected:
    order, boundaries = segments.group_members(ids, -1)
    arguments = (rewards.double(), None, None, order, boundaries, "standardize", 1, _EPS, True, False)
    _, value, _ = segments.segment_stats(*arguments)  # type: ignore[arg-type]
    return Expected(value, magnitude=value.abs().max().item())


def _scatter(rewards: Tensor, ids: Tensor, groups: int) -> Tensor:
    """As one writes it who knows the number of groups; groups of one are not looked at."""
    zero = rewards.new_zeros(groups)
    counts = zero.index_add(0, ids, torch.ones_like(rewards))
    centred = rewards - (zero.index_add(0, ids, rewards) / counts)[ids]
    variance = zero.index_add(0, ids, centred.square()) / (counts - 1).clamp(min=1)
    return centred / (variance.sqrt()[ids] + _EPS)


def _groups(rewards: Tensor, ids: Tensor, groups: int) -> Sequence[Tensor]:
    """A loop as in trainers: a dictionary of the members, then each group by itself."""
    members: dict[int, list[int]] = {}
    for place, group in enumerate(ids.tolist()):
        members.setdefault(group, []).append(place)
    out = torch.empty_like(rewards)
    for places in members.values():
        index = torch.tensor(places)
        group = rewards[index]
        # the deviation of one is NaN
        out[index] = (group - group.mean()) / (group.std() + _EPS) if len(places) > 1 else torch.zeros_like(group)
    return [out]
