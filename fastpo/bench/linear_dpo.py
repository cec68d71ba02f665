"""The benchmark of DPO on the head: from hidden states to the loss and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import losses
from fastpo.bench.harness import Expected, Problem, Provider, Run, UnavailableError, compiled, with_backward
from fastpo.bench.linear_logprobs import (
    IGNORED,
    LABELS,
    Head,
    cce,
    core,
    eager,
    exact,
    fastpo_head,
    gathered,
    gradients,
    products,
    trl,
)
from fastpo.reference.pairwise import Side, pairwise_objective
from fastpo.reference.registry import objective

Function = Callable[[Tensor, Tensor], Sequence[Tensor]]

_BETA = 0.1


@dataclass(frozen=True)
class LinearDpoCase:
    """DPO with the reference's forward, from the hidden states of both models and their heads' weights.

    The first half of the sequences is chosen, the second rejected; of each the first half is prompt. Backward to
    the policy's hidden states and weight.
    """

    PROVIDERS: ClassVar[tuple[str, ...]] = (
        "fastpo",
        "fastpo_kept",
        "eager",
        "compile",
        "core",
        "trl",
        "cce",
        "liger",
        "products",
        "products_kept",
    )

    sequences: int = 8
    tokens: int = 128
    hidden: int = 576
    vocab: int = 49_152
    seed: int = 0

    @property
    def name(self) -> str:
        size = f"{self.sequences} x {self.tokens} x {self.hidden} x {self.vocab} float32"
        return f"dpo on the head {size}, 50% prompt, forward + backward"

    def build(self) -> Problem:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        size = (self.sequences, self.tokens, self.hidden)
        hidden, weight = normal(*size), normal(self.vocab, self.hidden).div_(self.hidden**0.5)
        # the policy has moved a little
        reference = hidden + normal(*size) / 16, weight + normal(*weight.shape) / (16 * self.hidden**0.5)
        targets = torch.randint(self.vocab, size[:2], generator=generator)
        targets[:, : self.tokens // 2] = IGNORED
        hidden.requires_grad_()
        weight.requires_grad_()
        upstream = [torch.tensor(1.0)]
        rows = (targets != IGNORED).flatten().nonzero()[:, 0]

        def timed(function: Function) -> Run:
            return with_backward(lambda: function(hidden, weight), [hidden, weight], upstream)

        def by_fastpo(name: str) -> Function:
            head, mask, pairs = fastpo_head(name), targets != IGNORED, self.sequences // 2

            def run(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
                policy = head(hidden, weight, targets)
                with torch.no_grad():
                    constant = head(*reference, targets)
                sides = (t[part] for t in (policy, constant) for part in (slice(pairs), slice(pairs, None)))
                out = losses.dpo(*sides, beta=_BETA, chosen_mask=mask[:pairs], rejected_mask=mask[pairs:])
                return [out.loss, out.chosen_rewards, out.rejected_rewards]

            return run

        def by(head: Head) -> Function:
            def run(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
                policy = head(hidden, weight, targets).sum(-1)
                with torch.no_grad():
                    constant = head(*reference, targets).sum(-1)
                chosen, rejected = (_BETA * (policy - constant)).chunk(2)
                return [-F.logsigmoid(chosen - rejected).mean(), chosen.detach(), rejected.detach()]

            return run

        def by_rows(head: Head) -> Function:
            """Those that take (N, H) alone, on the rows that have targets."""

            def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
                found = gathered(head, rows)(hidden.flatten(0, 1), weight, targets.flatten())
                return found.view(targets.shape)

            return by(run)

        def by_liger() -> Function:
            loss = _liger()(ignore_index=IGNORED, beta=_BETA)

            def run(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
                value, (*_, chosen, rejected) = loss(
                    weight, hidden, targets, ref_input=reference[0], ref_weight=reference[1]
                )
                return [value, chosen, rejected]

            return run

        def alone(logits: int) -> Run:
            # the logits of the reference take one more
            flat = hidden.detach().flatten(0, 1)[rows]
            return products(flat, weight.detach(), logits + 1, True, True)

        return Problem(
            [
                Provider("fastpo", LABELS["fastpo"], lambda: timed(by_fastpo("fastpo"))),
                Provider("fastpo_kept", LABELS["fastpo_kept"], lambda: timed(by_fastpo("fastpo_kept"))),
                Provider("eager", "eager torch", lambda: timed(by(eager))),
                Provider("compile", "torch.compile of eager", lambda: timed(compiled(by(eager)))),
                Provider(
                    "core", "F.linear_cross_entropy on gathered rows", lambda: timed(by_rows(core(chunked=False)))
                ),
                Provider("trl", "TRL's ChunkedLogProbFunction on gathered rows", lambda: timed(by_rows(trl()))),
                Provider("cce", "cut-cross-entropy's torch_compile", lambda: timed(by(cce()))),
                Provider("liger", "Liger's LigerFusedLinearDPOLoss", lambda: timed(by_liger())),
                Provider("products", "floor: its 5 matrix products", lambda: alone(2), floor=True),
                Provider(
                    "products_kept", "floor: the 4 matrix products with kept logits", lambda: alone(1), floor=True
                ),
            ],
            expected=lambda: _expected(hidden, weight, reference, targets),
            bytes=0,
            bar=("products",),
        )


def _liger() -> Any:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise UnavailableError(f"Liger's LigerFusedLinearDPOLoss cannot be imported: {error}") from error
    return LigerFusedLinearDPOLoss


def _expected(hidden: Tensor, weight: Tensor, reference: tuple[Tensor, Tensor], targets: Tensor) -> dict[str, Expected]:
    """The reference in fp64."""
    policy = exact(hidden, weight, targets, None)
    logprobs, constant = policy.logprobs.requires_grad_(), exact(*reference, targets, None).logprobs
    sides = [Side(*side) for side in zip(*(t.chunk(2) for t in (logprobs, constant, targets != IGNORED)), strict=True)]
    each, chosen, rejected = pairwise_objective(objective("dpo"), sides[0], sides[1], {"beta": _BETA})
    (upstream,) = torch.autograd.grad(each.mean(), logprobs)
    # the numbers that are rounded: sums of log-probs, of which the loss and its slopes see a tenth
    eps = torch.finfo(torch.float32).eps
    largest = max(1.0, _BETA * logprobs.detach().sum(-1).abs().max().item())
    values = {"loss": each.mean(), "chosen_rewards": chosen, "rejected_rewards": rejected}
    expected = {name: Expected(value.detach(), magnitude=largest, eps=eps) for name, value in values.items()}
    found = exact(hidden, weight, targets, upstream)
    return expected | gradients(found.hidden, found.weight, (max(largest, found.logprob), eps))
