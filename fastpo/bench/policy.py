"""The benchmark of the policy objectives, `fastpo.losses.grpo` and its like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastpo import losses
from fastpo.bench.harness import Expected, Problem, Provider, Run, UnavailableError, compiled, read, with_backward

# of log-probs, advantages, those of the old policy and of the reference, and the mask
Function = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class PolicyCase:
    """GRPO with its penalty and what a trainer logs beside it, on right-padded log-probs of sampled tokens.

    The metrics are those of TRL's trainer, KL and clip fractions low, high and of both, and the mean ratio. TRL's own
    code logs more and not the ratio; Liger's has KL and the fraction of both.
    """

    PROVIDERS: ClassVar[tuple[str, ...]] = ("fastpo", "eager", "compile", "trl", "liger", "read")

    sequences: int = 64
    tokens: int = 4096
    dtype: str = "float32"
    backward: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        size = f"{self.sequences} sequences x {self.tokens} tokens"
        return f"grpo {size} {self.dtype}, forward{' + backward' * self.backward}"

    def build(self) -> Problem:
        dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.sequences, self.tokens)

        def model() -> Tensor:
            # multiples of 1/64, away from the bounds of the ratio
            return torch.randint(-15, 16, shape, generator=generator) / 64

        base = -torch.randint(16, 256, shape, generator=generator) / 64
        logprobs, old, reference = ((base + model()).to(dtype) for _ in range(3))
        advantages = torch.randn(self.sequences, generator=generator).to(dtype)
        lengths = torch.randint(self.tokens // 4, self.tokens, (self.sequences,), generator=generator)
        mask = torch.arange(self.tokens) < lengths[:, None]
        logprobs.requires_grad_(self.backward)
        streams = [logprobs, old, reference, mask, advantages]
        upstream = [torch.tensor(0.7, dtype=torch.promote_types(dtype, torch.float32))]

        def timed(forward: Function) -> Run:
            def run() -> Sequence[Tensor]:
                return forward(logprobs, advantages, old, reference, mask)

            return with_backward(run, [logprobs], upstream) if self.backward else run

        def traffic() -> Run:
            once = read(torch.ones(_bytes(streams), dtype=torch.uint8))
            gradient = torch.ones(_bytes([logprobs]), dtype=torch.uint8)
            return (lambda: [*once(), gradient.clone()]) if self.backward else once

        def expected() -> dict[str, Expected]:
            leaf = logprobs.detach().double().requires_grad_(self.backward)
            values = _eager(leaf, advantages.double(), old.double(), reference.double(), mask)
            named = {n: Expected(v.detach()) for n, v in zip(NAMES, values, strict=True)}
            if self.backward:
                (grad,) = torch.autograd.grad(values[0], leaf, upstream[0].double())
                # relative to the largest
                named["gradient"] = Expected(grad, weight=grad.abs().max().item())
            return named

        def gives(names: Sequence[str]) -> tuple[str, ...]:
            return (*names, *["gradient"] * self.backward)

        moves = "a read of the inputs" + ", a copy of the policy's" * self.backward + ", as one block"
        return Problem(
            [
                Provider("fastpo", "fastpo", lambda: timed(_fastpo)),
                Provider("eager", "eager torch", lambda: timed(_eager)),
                Provider("compile", "torch.compile of eager", lambda: timed(compiled(_eager))),
                Provider("trl", "TRL's GRPOTrainer._compute_loss", lambda: timed(_trl()), outputs=gives(NAMES[:-1])),
                Provider("liger", "Liger's ppo_loss_fn", lambda: timed(_liger()), outputs=gives(LIGER)),
                Provider("read", f"floor: {moves}", traffic, floor=True),
            ],
            expected=expected,
            bytes=_bytes(streams) + self.backward * _bytes([logprobs]),
            bar=("read",),
        )


NAMES = ("loss", "kl", "clipped low", "clipped high", "clipped", "ratio")
LIGER = ("loss", "kl", "clipped")


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _fastpo(logprobs: Tensor, advantages: Tensor, old: Tensor, reference: Tensor, mask: Tensor) -> Sequence[Tensor]:
    out = losses.grpo(logprobs, advantages, old, reference, mask=mask)
    m = out.metrics
    low, high = m.clip_fraction_low, m.clip_fraction_high
    return [out.loss, m.kl, low, high, low + high, m.ratio_mean]


def _eager(logprobs: Tensor, advantages: Tensor, old: Tensor, reference: Tensor, mask: Tensor) -> Sequence[Tensor]:
    """The loss as trainers write it."""
    logprobs, old, reference = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (logprobs, old, reference))
    a, m = advantages[:, None].to(logprobs.dtype), mask.to(logprobs.dtype)
    ratio = torch.exp(logprobs - old)
    surrogate = torch.min(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a)
    kl = torch.exp(reference - logprobs) - (reference - logprobs) - 1
    each = -surrogate + 0.04 * kl
    loss = ((each * m).sum(-1) / m.sum(-1).clamp(min=1)).mean()
    with torch.no_grad():
        count = m.sum().clamp(min=1)
        low, high = (ratio < 0.8) & (a < 0), (ratio > 1.2) & (a > 0)
        logged = [(x.to(m.dtype) * m).sum() / count for x in (kl, low, high, low | high, ratio)]
    return [loss, *logged]


def _trl() -> Function:
    """The trainer's method as it is, with log-probs in the place of its model; its metrics are numbers."""
    try:
        from trl import GRPOTrainer
    except ImportError as error:
        raise UnavailableError(f"TRL's GRPOTrainer cannot be imported: {error}") from error
    model = torch.nn.Module()

    def function(
        logprobs: Tensor, advantages: Tensor, old: Tensor, reference: Tensor, mask: Tensor
    ) -> Sequence[Tensor]:
        metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
        trainer = SimpleNamespace(
            model=model,
            accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
            # it logs an entropy: of what numbers makes no difference
            _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, old, None),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level="token",
            loss_type="grpo",
            beta=0.04,
            epsilon_low=0.2,
            epsilon_high=0.2,
            use_vllm=False,
            current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False,
            _metrics=metrics,
        )
        inputs: dict[str, Any] = {
            # of prompts and ids it takes the shapes alone
            "prompt_ids": mask[:, :0],
            "prompt_mask": mask[:, :0],
            "completion_ids": mask,
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
        }
        loss = GRPOTrainer._compute_loss(trainer, model, inputs)
        logged = metrics["train"]
        ratios = [logged[f"clip_ratio/{name}_mean"] for name in ("low", "high", "region")]
        return [loss, *(torch.tensor(values[0]) for values in (logged["kl"], *ratios))]

    return function


def _liger() -> Function:
    try:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
    except ImportError as error:
        raise UnavailableError(f"Liger's GRPO loss cannot be imported: {error}") from error

    def function(
        logprobs: Tensor, advantages: Tensor, old: Tensor, reference: Tensor, mask: Tensor
    ) -> Sequence[Tensor]:
        counts = mask.to(logprobs.dtype)
        loss, metrics = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logprobs, counts, advantages, counts, reference, old, loss_type="grpo"
        )
        return [loss, *metrics]

    return function
