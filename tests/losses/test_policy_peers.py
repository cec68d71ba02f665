"""Agreement with Liger's code for the loss types of GRPO, which follows TRL's, where they are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo import losses
from fastpo.losses import RolloutCorrection

ppo_loss_fn = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction.ppo_loss_fn
ROWS, TOKENS = 5, 12


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, TOKENS)
    base = -torch.rand(shape, generator=generator, dtype=torch.float64)
    names = ("logprobs", "old", "reference", "rollout")
    out = {n: base + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for n in names}
    out["advantages"] = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([12, 1, 7, 12, 3])
    out["mask"] = torch.arange(TOKENS) < lengths[:, None]
    return out


def liger(batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    leaf, mask = batch["logprobs"].clone().requires_grad_(), batch["mask"].double()
    streams = {"ref_per_token_logps": batch["reference"], "old_per_token_logps": batch["old"]}
    loss, metrics = ppo_loss_fn(leaf, mask, batch["advantages"], mask, **streams, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], metrics


def ours(name: str, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Any]:
    leaf = batch["logprobs"].clone().requires_grad_()
    streams = {"old_logprobs": batch["old"], "reference_logprobs": batch["reference"]}
    out = getattr(losses, name)(leaf, batch["advantages"], mask=batch["mask"], **streams, **options)
    return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0], out.metrics


SEQUENCE = {"importance_sampling_level": "sequence"}
WIDE = {"epsilon_low": 0.05, "epsilon_high": 0.06}


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("grpo", {}, {"loss_type": "grpo"}),
        (
            "grpo",
            {"delta": 1.4, "kl_corrected": True},
            {"loss_type": "grpo", "delta": 1.4, "use_bias_correction_kl": True},
        ),
        ("grpo", {"aggregation": "token_mean"}, {"loss_type": "bnpo"}),
        ("dapo", {"num_items": 50}, {"loss_type": "dapo", "epsilon_high": 0.28, "num_items_in_batch": 50}),
        ("dr_grpo", {"max_length": 20}, {"loss_type": "dr_grpo", "max_completion_length": 20}),
        ("gspo", WIDE, {"loss_type": "grpo", **SEQUENCE, **WIDE}),
        (
            "gspo",
            {**WIDE, "kl_corrected": True},
            {"loss_type": "grpo", "use_bias_correction_kl": True, **SEQUENCE, **WIDE},
        ),
        # the cap itself, and without a penalty no padding in the mean
        ("cispo", {"epsilon_high": 0.3}, {"loss_type": "cispo", "epsilon_high": 1.3, "num_items_in_batch": 35}),
        ("luspo", {**WIDE, "beta": 0.0}, {"loss_type": "luspo", "beta": 0.0, **SEQUENCE, **WIDE}),
        ("sapo", {}, {"loss_type": "sapo"}),
        ("vespo", {}, {"loss_type": "vespo", "num_items_in_batch": 35}),
    ],
    ids=["grpo", "delta", "bnpo", "dapo", "dr_grpo", "gspo", "gspo corrected", "cispo", "luspo", "sapo", "vespo"],
)
def test_liger(batch, name, options, theirs):
    beta = {"beta": 0.04}
    loss, grad, metrics = ours(name, batch, **{**beta, **options})
    want, want_grad, want_metrics = liger(batch, **{**beta, **theirs})
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad, want_grad)
    if theirs.get("beta") != 0.0:
        torch.testing.assert_close(metrics.kl, want_metrics[0])
    if name in ("grpo", "dapo", "dr_grpo", "gspo") and "delta" not in options:
        torch.testing.assert_close(metrics.clip_fraction_high + metrics.clip_fraction_low, want_metrics[-1])


def test_liger_weights(batch):
    """Its argument vllm_is_ratio is our weight."""
    ratio = (batch["old"] - batch["rollout"]).exp()
    for correction, weight in (
        (RolloutCorrection.tis(1.2), ratio.clamp(max=1.2)),
        (RolloutCorrection.icepop(0.8, 1.2), ratio * ((ratio >= 0.8) & (ratio <= 1.2))),
    ):
        options = {"beta": 0.04, "rollout_logprobs": batch["rollout"], "correction": correction}
        loss, grad, _ = ours("grpo", batch, **options)
        want, want_grad, _ = liger(batch, beta=0.04, loss_type="grpo", vllm_is_ratio=weight)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(grad, want_grad)


def test_where_liger_differs(batch):
    """With a penalty, its luspo averages over padding: a wider batch has another loss, of the same data."""
    wide = {k: torch.cat([v, torch.zeros_like(v)], 1) if v.dim() == 2 else v for k, v in batch.items()}
    theirs = [liger(b, loss_type="luspo", beta=0.04, **SEQUENCE, **WIDE)[0] for b in (batch, wide)]
    assert (theirs[0] - theirs[1]).abs() > 1e-3
    mine = [ours("luspo", b, beta=0.04, **WIDE)[0] for b in (batch, wide)]
    torch.testing.assert_close(*mine)
