"""The benchmark of `fastpo.token_logprobs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastpo.bench.harness import (
    Expected,
    Problem,
    Provider,
    Run,
    UnavailableError,
    compiled,
    read,
    with_backward,
)
from fastpo.kernels.token_logprobs import token_logprobs
from fastpo.reference import vocabulary

Function = Callable[[Tensor, Tensor], Sequence[Tensor]]

# the differentiable outputs
_DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp")
# rows of the cached floor: stays in a core's second-level cache beside everything else
_CACHED_BYTES = 256 * 1024


@dataclass(frozen=True)
class TokenLogprobsCase:
    """Log-probs of one target per row of (rows, vocab) normal logits, with statistics and backward if asked.

    The logits are two-dimensional, TRL's fastest form for log-probs; its entropy is faster on (B, T, V).
    """

    PROVIDERS: ClassVar[tuple[str, ...]] = (
        "fastpo",
        "fastpo_float32",
        "eager",
        "compile",
        "trl",
        "read",
        "cached",
    )

    rows: int = 512
    vocab: int = 50_000
    dtype: str = "float32"
    stats: tuple[str, ...] = ()
    backward: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        what = " + ".join(["forward", *self.stats, *["backward"] * self.backward])
        return f"token_logprobs {self.rows} x {self.vocab} {self.dtype}, {what}"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, those with a gradient first."""
        names = ("logprobs", *self.stats)
        return (*(n for n in _DIFFERENTIABLE if n in names), *(n for n in names if n not in _DIFFERENTIABLE))

    def build(self) -> Problem:
        dtype = getattr(torch, self.dtype)
        accumulate = torch.promote_types(dtype, torch.float32)
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.randn(self.rows, self.vocab, generator=generator).to(dtype)
        targets = torch.randint(self.vocab, (self.rows,), generator=generator)
        differentiable = [n for n in self.outputs if n in _DIFFERENTIABLE] if self.backward else []
        upstream = [torch.randn(self.rows, generator=generator).to(accumulate) for _ in differentiable]
        given = dict(zip(differentiable, upstream, strict=True))
        logits.requires_grad_(self.backward)
        nbytes = logits.numel() * logits.element_size()

        def timed(function: Function, logits: Tensor = logits) -> Run:
            def forward() -> Sequence[Tensor]:
                return function(logits, targets)

            return with_backward(forward, [logits], upstream) if self.backward else forward

        def trl() -> Run:
            return timed(self._trl())

        def upcast() -> Run:
            return timed(self._fastpo, logits.float())

        def cached() -> Run:
            # one short row, repeated with stride 0: as many elements in one call, all from the cache
            parts = -(-self.vocab * logits.element_size() // _CACHED_BYTES)
            width = -(-self.vocab // parts)
            row = logits.detach()[0, :width].clone().expand(self.rows * parts, width)
            ids = torch.zeros(self.rows * parts, dtype=torch.int64)
            return lambda: self._fastpo(row, ids)

        def traffic() -> Run:
            """Logits read by the forward; read again, and the fresh gradient written, by the backward."""
            once = read(logits)
            return (lambda: [*once(), logits.detach().clone()]) if self.backward else once

        moves = "a read, then a copy, of the logits" if self.backward else "one read of the logits"
        providers = [
            Provider("fastpo", "fastpo", lambda: timed(self._fastpo)),
            Provider("eager", "eager torch", lambda: timed(self._eager)),
            Provider("compile", "torch.compile of eager", lambda: timed(compiled(self._eager))),
            Provider("trl", "TRL", trl),
            Provider("read", f"floor: {moves}", traffic, floor=True),
        ]
        if not self.backward:
            if dtype in (torch.bfloat16, torch.float16):
                # the same values at twice the bytes
                label = "fastpo on the logits as float32"
                providers.insert(1, Provider("fastpo_float32", label, upcast, bytes=2 * nbytes))
            label = "floor: fastpo itself on cached logits"
            providers.append(Provider("cached", label, cached, floor=True, bytes=0))
        return Problem(
            providers,
            expected=lambda: self._expected(logits, targets, given),
            bytes=nbytes * (1 + self.backward),
            bar=("read",) if self.backward else ("read", "cached"),
        )

    def _fastpo(self, logits: Tensor, targets: Tensor) -> Sequence[Tensor]:
        if not self.stats:
            return [token_logprobs(logits, targets)]
        out = token_logprobs(logits, targets, stats=self.stats)  # type: ignore[arg-type]
        return [getattr(out, name) for name in self.outputs]

    def _eager(self, logits: Tensor, targets: Tensor) -> Sequence[Tensor]:
        """What people write; bf16 and fp16 logits in fp32."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs = torch.log_softmax(logits, -1)
        found = [logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)]
        for name in self.outputs[1:]:
            if name == "entropy":
                found.append(-(logprobs.exp() * logprobs).sum(-1))
            elif name == "logsumexp":
                found.append(logits.logsumexp(-1))
            elif name == "log_sum_p2":
                found.append((2 * logprobs).logsumexp(-1))
            else:
                found.append(logits.argmax(-1))
        return found

    def _trl(self) -> Function:
        if self.stats not in ((), ("entropy",)):
            raise UnavailableError("TRL has no function for these statistics")
        try:
            from trl.trainer.utils import entropy_from_logits, selective_log_softmax
        except ImportError as error:
            raise UnavailableError(f"TRL's selective_log_softmax cannot be imported: {error}") from error

        def function(logits: Tensor, targets: Tensor) -> Sequence[Tensor]:
            found = [selective_log_softmax(logits, targets)]
            return [*found, entropy_from_logits(logits)] if self.stats else found

        return function

    def _expected(self, logits: Tensor, targets: Tensor, upstream: dict[str, Tensor]) -> dict[str, Expected]:
        """The reference in fp64, by 64 rows."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.outputs}
        gradients: list[Tensor] = []
        sizes: list[Tensor] = []
        largest = 1.0
        for start in range(0, self.rows, 64):
            rows = slice(start, start + 64)
            x, ids = logits.detach()[rows].double().requires_grad_(self.backward), targets[rows]
            out = vocabulary.token_logprobs(x, ids, stats=self.stats)
            grads = {name: g[rows].double() for name, g in upstream.items()}
            if grads:
                gradients += torch.autograd.grad([getattr(out, n) for n in grads], x, list(grads.values()))
            for name, part in parts.items():
                part.append(getattr(out, name).detach())
            logprobs = x.detach().log_softmax(-1)
            largest = max(largest, logprobs.abs().max().item())
            if grads:
                sizes.append(terms(logprobs, ids, grads).float())
        eps = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).eps
        # An implementation rounds x - max and logsumexp, which are as large as the log-probs. In a gradient
        # that error of log p is a relative error of p.
        expected = {name: Expected(torch.cat(part), magnitude=largest, eps=eps) for name, part in parts.items()}
        if upstream:
            weight = torch.cat(sizes).clamp_min_(torch.finfo(torch.float32).tiny)
            expected["gradient"] = Expected(torch.cat(gradients), weight, largest, eps)
        return expected


def terms(logprobs: Tensor, targets: Tensor, upstream: dict[str, Tensor]) -> Tensor:
    """Σ |terms| of the gradient: g (onehot - p), -g p (log p + H) of the entropy, g p of logsumexp."""
    p = logprobs.exp()
    total = torch.zeros_like(p)
    for name, g in upstream.items():
        size = g.abs().unsqueeze(-1)
        if name == "entropy":
            entropy = -(p * logprobs).sum(-1, keepdim=True)
            total += size * p * (logprobs.abs() + entropy)
        else:
            total += size * p
        if name == "logprobs":
            total.scatter_add_(-1, targets.unsqueeze(-1), size)
    return total
