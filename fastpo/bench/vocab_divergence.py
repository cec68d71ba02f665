"""The benchmark of `fastpo.token_kl` and the other divergences over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.bench.harness import Expected, Problem, Provider, Run, UnavailableError, compiled, read, with_backward
from fastpo.kernels import vocab_divergence
from fastpo.reference import vocabulary

Function = Callable[[Tensor, Tensor], Sequence[Tensor]]


class Divergence(NamedTuple):
    """A divergence: the function of fastpo and of its reference, what people write of the log-probs of the reference
    and the policy, and the beta of TRL's and Liger's losses, where those have it."""

    function: str
    options: dict[str, Any]
    eager: Callable[[Tensor, Tensor], Tensor]
    beta: float | None = None


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def _jsd(reference: Tensor, policy: Tensor) -> Tensor:
    mixture = torch.logaddexp(reference, policy) - math.log(2)
    return (_kl(reference, mixture) + _kl(policy, mixture)) / 2


def _skew(reference: Tensor, policy: Tensor) -> Tensor:
    return _kl(reference, torch.logaddexp(reference + math.log(0.1), policy + math.log(0.9)))


def _tv(reference: Tensor, policy: Tensor) -> Tensor:
    return (reference.exp() - policy.exp()).abs().sum(-1) / 2


def _chi2(reference: Tensor, policy: Tensor) -> Tensor:
    return ((2 * reference - policy).exp().sum(-1) - 1) / 2


DIVERGENCES = {
    "forward": Divergence("token_kl", {}, _kl, 0.0),
    "reverse": Divergence("token_kl", {"direction": "reverse"}, lambda reference, policy: _kl(policy, reference), 1.0),
    "jsd": Divergence("token_jsd", {"beta": 0.5}, _jsd, 0.5),
    "skew": Divergence("token_kl", {"skew": 0.1}, _skew),
    "tv": Divergence("token_tv", {}, _tv),
    "chi2": Divergence("token_alpha_divergence", {"alpha": 2.0}, _chi2),
}


@dataclass(frozen=True)
class VocabDivergenceCase:
    """A divergence of every row of (rows, vocab) normal logits from a reference's, which differ from them by as much
    noise: KL(π_ref ‖ π) or its reverse, GKD's at β = 1/2, the skew KL at 0.1, the total variation, χ²(π_ref ‖ π) / 2.

    The backward is to the policy's logits alone, as in training against a frozen reference.
    """

    PROVIDERS: ClassVar[tuple[str, ...]] = ("fastpo", "eager", "compile", "trl", "read")

    rows: int = 256
    vocab: int = 50_000
    dtype: str = "float32"
    divergence: str = "forward"
    backward: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        what = "forward" + " + backward" * self.backward
        name = f"{self.divergence} KL" if self.divergence in ("forward", "reverse", "skew") else self.divergence
        return f"vocab_divergence {name} {self.rows} x {self.vocab} {self.dtype}, {what}"

    @property
    def of(self) -> Divergence:
        return DIVERGENCES[self.divergence]

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
        return [getattr(vocab_divergence, self.of.function)(logits, reference, **self.of.options)]

    def _eager(self, logits: Tensor, reference: Tensor) -> Sequence[Tensor]:
        """What people write; bf16 and fp16 logits in fp32."""
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        policy, other = (F.log_softmax(t.to(accumulate), -1) for t in (logits, reference))
        return [self.of.eager(other, policy)]

    def _trl(self) -> Function:
        try:
            from trl.experimental.gkd import GKDTrainer
        except ImportError as error:
            raise UnavailableError(f"TRL's GKDTrainer cannot be imported: {error}") from error
        beta = self.of.beta
        if beta is None:
            raise UnavailableError("TRL's GKD loss has no such divergence")

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
            out = getattr(vocabulary, self.of.function)(x, y, **self.of.options)
            divergence.append(out.detach())
            log_q, log_p = x.detach().log_softmax(-1), y.log_softmax(-1)
            largest = max(largest, log_q.abs().max().item(), log_p.abs().max().item())
            if self.backward:
                gradients += torch.autograd.grad(out, x, upstream[rows].double())
                term = upstream[rows].double().abs().unsqueeze(-1) * (log_q.exp() + log_p.exp())
                if self.divergence == "tv":
                    # where the streams meet the slope jumps, and rounding decides
                    term = torch.where((log_q - log_p).abs() < 1e-4, torch.inf, term)
                terms.append(term)
        eps = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).eps
        # an implementation may round log-probs; in a gradient that error of log p is a relative error of p
        expected = {"divergence": Expected(torch.cat(divergence), magnitude=largest, eps=eps)}
        if self.backward:
            if self.divergence != "forward":
                # q (log q - log p - KL), or the like
                terms = [t * 2 * largest for t in terms]
            weight = torch.cat(terms).clamp_min_(torch.finfo(torch.float32).tiny)
            expected["gradient"] = Expected(torch.cat(gradients), weight, largest, eps)
        return expected
