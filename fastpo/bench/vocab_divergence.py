"""The benchmark of `fastpo.token_kl`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.bench.harness import Expected, Problem, Provider, Run, UnavailableError, compiled, read, with_backward
from fastpo.kernels.vocab_divergence import token_kl
from fastpo.reference import vocabulary

Function = Callable[[Tensor, Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class VocabDivergenceCase:
    """The KL of every row of (rows, vocab) normal logits from a reference's, which differ from them by as much noise.

    The backward is to the policy's logits alone, as in training against a frozen reference.
    """

    PROVIDERS: ClassVar[tuple[str, ...]] = ("fastpo", "eager", "compile", "trl", "read")

    rows: int = 256
    vocab: int = 50_000
    dtype: str = "float32"
    direction: Literal["forward", "reverse"] = "forward"
    backward: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        what = "forward" + " + backward" * self.backward
        return f"vocab_divergence {self.direction} KL {self.rows} x {self.vocab} {self.dtype}, {what}"

    def build(self) -> Problem:
        dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.randn(self.rows, self.vocab, generator=generator)
        reference = (logits + torch.randn(self.rows, self.vocab, generator=generator)).to(dtype)
        logits = logits.to(dtype).requires_grad_(self.backward)
        upstream = torch.randn(self.rows, generator=generator).to(torch.promote_types(dtype, torch.float32))
        nbytes = logits.numel() * logits.element_size()

        def timed(function: Function) -> Run:
            def forward() -> Sequence[Tensor]:
                return function(logits, reference)

            return with_backward(forward, [logits], [upstream]) if self.backward else forward

        def traffic() -> Run:
            """Both streams read by the forward; read again, and the fresh gradient written, by the backward."""
            streams = read(logits), read(reference)
            if not self.backward:
                return lambda: [*streams[0](), *streams[1]()]
            return lambda: [*streams[0](), *streams[1](), *streams[1](), logits.detach().clone()]

        moves = "both streams read" + ", and again with a copy of one" * self.backward
        return Problem(
            [
                Provider("fastpo", "fastpo", lambda: timed(self._fastpo)),
                Provider("eager", "eager torch", lambda: timed(self._eager)),
                Provider("compile", "torch.compile of eager", lambda: timed(compiled(self._eager))),
                Provider("trl", "TRL's GKD loss", lambda: timed(self._trl())),
                Provider("read", f"floor: {moves}", traffic, floor=True),
            ],
            expected=lambda: self._expected(logits, reference, upstream),
            bytes=nbytes * (2 + self.backward),
            bar=("read",),
        )

    def _fastpo(self, logits: Tensor, reference: Tensor) -> Sequence[Tensor]:
        return [token_kl(logits, reference, direction=self.direction)]

    def _eager(self, logits: Tensor, reference: Tensor) -> Sequence[Tensor]:
        """What people write; bf16 and fp16 logits in fp32."""
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        policy, other = (F.log_softmax(t.to(accumulate), -1) for t in (logits, reference))
        first, second = (other, policy) if self.direction == "forward" else (policy, other)
        return [(first.exp() * (first - second)).sum(-1)]

    def _trl(self) -> Function:
        try:
            from trl.experimental.gkd import GKDTrainer
        except ImportError as error:
            raise UnavailableError(f"TRL's GKDTrainer cannot be imported: {error}") from error
        beta = 0 if self.direction == "forward" else 1

        def function(logits: Tensor, reference: Tensor) -> Sequence[Tensor]:
            terms = GKDTrainer.generalized_jsd_loss(logits, reference, beta=beta, reduction="none")
            return [terms.sum(-1)]

        return function

    def _expected(self, logits: Tensor, reference: Tensor, upstream: Tensor) -> dict[str, Expected]:
        """The reference in fp64, by 64 rows."""
        divergence: list[Tensor] = []
        gradients: list[Tensor] = []
        terms: list[Tensor] = []
        largest = 1.0
        for start in range(0, self.rows, 64):
            rows = slice(start, start + 64)
            x = logits.detach()[rows].double().requires_grad_(self.backward)
            y = reference[rows].double()
            out = vocabulary.token_kl(x, y, direction=self.direction)
            divergence.append(out.detach())
            log_q, log_p = x.detach().log_softmax(-1), y.log_softmax(-1)
            largest = max(largest, log_q.abs().max().item(), log_p.abs().max().item())
            if self.backward:
                gradients += torch.autograd.grad(out, x, upstream[rows].double())
                terms.append(upstream[rows].double().abs().unsqueeze(-1) * (log_q.exp() + log_p.exp()))
        eps = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).eps
        # an implementation may round log-probs; in a gradient that error of log p is a relative error of p
        expected = {"divergence": Expected(torch.cat(divergence), magnitude=largest, eps=eps)}
        if self.backward:
            if self.direction == "reverse":
                # q (log q - log p - KL)
                terms = [t * 2 * largest for t in terms]
            weight = torch.cat(terms).clamp_min_(torch.finfo(torch.float32).tiny)
            expected["gradient"] = Expected(torch.cat(gradients), weight, largest, eps)
        return expected
