"""The benchmark of `fastpo.linear_divergence`: distillation on the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.bench.harness import Expected, Problem, Provider, Run, UnavailableError, compiled, with_backward
from fastpo.bench.linear_logprobs import BUDGETS, IGNORED, LABELS, gradients, products, prompts
from fastpo.bench.vocab_divergence import DIVERGENCES, Divergence
from fastpo.kernels import linear_divergence, vocab_divergence
from fastpo.reference import vocabulary

Function = Callable[[Tensor, Tensor], Sequence[Tensor]]

# logits of a model that the exact results are made of at a time
_BLOCK = 1 << 23


@dataclass(frozen=True)
class LinearDivergenceCase:
    """The mean divergence over the rows that are no prompt, from the hidden states of a policy and a reference of equal
    size and their heads' weights, and back to the policy's.

    The divergences are those of `VocabDivergenceCase`; logits are normal, and the reference's differ from them.
    """

    PROVIDERS: ClassVar[tuple[str, ...]] = (
        "fastpo",
        "fastpo_kept",
        "eager",
        "compile",
        "trl",
        "liger",
        "products",
        "products_kept",
    )

    rows: int = 1024
    hidden: int = 576
    vocab: int = 49_152
    divergence: str = "forward"
    prompt: float = 0.5
    seed: int = 0

    @property
    def name(self) -> str:
        name = f"{self.divergence} KL" if self.divergence in ("forward", "reverse", "skew") else self.divergence
        size = f"{self.rows} x {self.hidden} x {self.vocab} float32"
        return f"{name} on the head {size}, {self.prompt:.0%} prompt, forward + backward"

    @property
    def of(self) -> Divergence:
        return DIVERGENCES[self.divergence]

    def build(self) -> Problem:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        hidden, weight = normal(self.rows, self.hidden), normal(self.vocab, self.hidden).div_(self.hidden**0.5)
        reference = hidden + normal(*hidden.shape) / 2, weight + normal(*weight.shape) / (2 * self.hidden**0.5)
        hidden.requires_grad_()
        weight.requires_grad_()
        mask = ~prompts(self.rows, self.prompt)
        rows = mask.nonzero()[:, 0]

        def timed(function: Function) -> Run:
            return with_backward(lambda: function(hidden, weight), [hidden, weight], [torch.tensor(1.0)])

        def by_fastpo(name: str) -> Function:
            divergence = partial(getattr(vocab_divergence, self.of.function), **self.of.options)

            def run(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
                options: dict[str, Any] = {"divergence": divergence, "mask": mask, "memory_budget": BUDGETS[name]}
                return [linear_divergence(hidden, weight, *reference, **options).sum() / len(rows)]

            return run

        def eager(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
            """What people write."""
            policy = F.log_softmax(F.linear(hidden, weight), -1)
            with torch.no_grad():
                constant = F.log_softmax(F.linear(*reference), -1)
            return [(self.of.eager(constant, policy) * mask).sum() / len(rows)]

        def by_trl() -> Function:
            apply, beta = _trl(), self._beta("TRL")

            def run(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
                each, _ = apply(hidden[rows], weight, None, reference[0][rows], reference[1], None, beta)
                return [each.mean()]

            return run

        def by_liger() -> Function:
            loss = _liger()(0.0, 1.0, self._beta("Liger"), IGNORED)
            # any label counts
            labels = torch.zeros(self.rows, dtype=torch.int64).masked_fill_(~mask, IGNORED)
            return lambda hidden, weight: [loss(hidden, weight, *reference, labels)]

        def alone(logits: int) -> Run:
            # those of the reference are of the same size
            return products(hidden.detach()[rows], weight.detach(), 2 * logits, True, True)

        return Problem(
            [
                Provider("fastpo", LABELS["fastpo"], lambda: timed(by_fastpo("fastpo"))),
                Provider("fastpo_kept", LABELS["fastpo_kept"], lambda: timed(by_fastpo("fastpo_kept"))),
                Provider("eager", "eager torch", lambda: timed(eager)),
                Provider("compile", "torch.compile of eager", lambda: timed(compiled(eager))),
                Provider("trl", "TRL's ChunkedDivergenceFunction on gathered rows", lambda: timed(by_trl())),
                Provider("liger", "Liger's LigerFusedLinearJSDLoss", lambda: timed(by_liger())),
                Provider("products", "floor: its 6 matrix products", lambda: alone(2), floor=True),
                Provider(
                    "products_kept", "floor: the 4 matrix products with kept logits", lambda: alone(1), floor=True
                ),
            ],
            expected=lambda: self._expected(hidden, weight, reference, rows),
            bytes=0,
            bar=("products",),
        )

    def _beta(self, whose: str) -> float:
        if self.of.beta is None:
            raise UnavailableError(f"{whose}'s loss has no such divergence")
        return self.of.beta

    def _expected(
        self, hidden: Tensor, weight: Tensor, reference: tuple[Tensor, Tensor], rows: Tensor
    ) -> dict[str, Expected]:
        """The reference in fp64, by some rows at a time."""
        hidden, weight = hidden.detach(), weight.detach()
        wide, wide_reference, sizes = weight.double(), reference[1].double(), weight.abs()
        d_hidden, hidden_terms = torch.zeros(hidden.shape, dtype=torch.float64), torch.zeros(hidden.shape)
        d_weight, weight_terms = torch.zeros_like(wide), torch.zeros_like(weight)
        total, largest = 0.0, 1.0
        for part in rows.split(max(1, _BLOCK // self.vocab)):
            h = hidden[part].double()
            x, y = (h @ wide.t()).requires_grad_(), reference[0][part].double() @ wide_reference.t()
            each = getattr(vocabulary, self.of.function)(x, y, **self.of.options)
            total += float(each.detach().sum())
            (d,) = torch.autograd.grad(each.sum() / len(rows), x)
            log_q, log_p = x.detach().log_softmax(-1), y.log_softmax(-1)
            largest = max(largest, log_q.abs().max().item(), log_p.abs().max().item())
            # of p - q, or of q (log q - log p - KL) and the like
            size = ((log_q.exp() + log_p.exp()) / len(rows)).float()
            d_hidden[part], hidden_terms[part] = d @ wide, size @ sizes
            d_weight.addmm_(d.t(), h)
            weight_terms.addmm_(size.t(), h.float().abs())
        eps = torch.finfo(torch.float32).eps
        factor = 1.0 if self.divergence == "forward" else 2 * largest
        expected = {"loss": Expected(torch.tensor(total / len(rows)).double(), magnitude=largest, eps=eps)}
        found = (d_hidden, hidden_terms * factor), (d_weight, weight_terms * factor)
        return expected | gradients(*found, (largest, eps))


def _trl() -> Any:
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        raise UnavailableError(f"TRL's ChunkedDivergenceFunction cannot be imported: {error}") from error
    return ChunkedDivergenceFunction.apply


def _liger() -> Any:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise UnavailableError(f"Liger's LigerFusedLinearJSDLoss cannot be imported: {error}") from error
    return LigerFusedLinearJSDLoss
