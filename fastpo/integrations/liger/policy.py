"""GRPO and its variants, on sampled completions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastpo import linear_logprobs, losses
from fastpo.integrations._grpo import AGGREGATION_OF
from fastpo.integrations.liger._common import Fused


def _check_grpo(
    loss_type: str,
    level: str,
    epsilon_high: float,
    delta: float | None,
    max_completion_length: int | None,
    weighted: bool,
) -> None:
    if loss_type not in AGGREGATION_OF:
        raise ValueError(f"loss_type must be one of {', '.join(AGGREGATION_OF)}; got {loss_type!r}")
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {level!r}")
    own = loss_type in ("cispo", "sapo", "vespo")
    if level == "sequence" and own:
        raise ValueError(f"importance_sampling_level='sequence' is not defined for loss_type={loss_type!r}")
    if loss_type == "cispo" and epsilon_high < 1:
        raise ValueError(
            f"epsilon_high is the cap on the ratio for loss_type='cispo', at least 1; got {epsilon_high:g}"
        )
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError("loss_type='dr_grpo' needs max_completion_length")
    if loss_type == "vespo" and weighted:
        raise ValueError("vllm_is_ratio with loss_type='vespo' is not there: its weight is a function of the ratio")
    if delta is not None and own:
        raise ValueError(f"delta={delta:g} has no meaning for loss_type={loss_type!r}, and Liger ignores it")
    if delta is not None and (level == "sequence" or delta <= 1 + epsilon_high):
        raise ValueError(
            f"delta must be above 1 + epsilon_high, at importance_sampling_level='token'; got delta={delta:g}, "
            f"epsilon_high={epsilon_high:g} and {level!r}"
        )


def _tokens(mask: Tensor, num_items: float | Tensor | None) -> Tensor:
    """Liger's denominator of token means: a rank's share of the tokens of all."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if several else 1
    if num_items is None:
        total = mask.sum().float()
        if several:
            torch.distributed.all_reduce(total)
    else:
        total = torch.as_tensor(num_items, dtype=torch.float32, device=mask.device).reshape(())
    return (total / ranks).clamp(min=1)


def liger_fused_linear_grpo(
    _input: Tensor,
    weight: Tensor,
    selected_token_ids: Tensor,
    attention_mask: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    compiled: bool = True,
    use_ref_model: bool = True,
    chunk_size: int = 1,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    num_items_in_batch: float | Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """GRPO and its variants on completions (B, T, H): `LigerFusedLinearGRPOFunction.apply`.

    Args:
        selected_token_ids: (B, T).
        attention_mask: (B, T), 0 where nothing counts; no product is spent there, and anything may stand there.
        advantages: (B,).
        vllm_is_ratio: weights of the policy term, (B,), (B, 1) or (B, T), not negative.
        epsilon_high: for "cispo" the cap on the ratio itself, else 1 + epsilon_high is.

    Returns:
        the loss, and: with beta the mean KL, and the fraction of tokens that are clipped.

    Raises:
        ValueError: a combination of options that is not defined; the message names them.
    """
    high = epsilon_high
    options = (loss_type, importance_sampling_level, high, delta, max_completion_length, vllm_is_ratio is not None)
    _check_grpo(*options)
    mask = attention_mask.bool()
    # an id that no tokenizer has
    ids = selected_token_ids.long().masked_fill(~mask, -(2**62))
    score: dict[str, Any] = {"temperature": temperature, "ignore_index": -(2**62)}
    logprobs = linear_logprobs(_input, weight, ids, bias, **score)
    reference = None
    if beta != 0.0:
        # without a reference model the penalty is that of the policy to itself
        reference = logprobs.detach()
        if use_ref_model and ref_per_token_logps is not None:
            reference = ref_per_token_logps
        elif use_ref_model:
            if ref_input is None or ref_weight is None:
                raise ValueError("use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight")
            with torch.no_grad():
                reference = linear_logprobs(ref_input, ref_weight, ids, ref_bias, **score)
    more: dict[str, Any] = {"aggregation": AGGREGATION_OF[loss_type], "count_empty": True}
    loss: Any
    own: dict[str, float]
    if loss_type == "cispo":
        loss, own = losses.cispo, {"epsilon_low": 1.0, "epsilon_high": high - 1}
    elif loss_type == "sapo":
        loss, own = losses.sapo, {"tau_positive": sapo_temperature_pos, "tau_negative": sapo_temperature_neg}
    elif loss_type == "vespo":
        loss = losses.vespo
        own = {"k_positive": vespo_k_pos, "lambda_positive": vespo_lambda_pos}
        own |= {"k_negative": vespo_k_neg, "lambda_negative": vespo_lambda_neg}
    elif importance_sampling_level == "sequence":
        loss, own = losses.gspo, {"epsilon_low": epsilon_low, "epsilon_high": high}
    else:
        loss, own = losses.grpo, {"epsilon_low": epsilon_low, "epsilon_high": high}
        own["delta"] = math.inf if delta is None else delta
    if loss_type in ("dapo", "cispo", "vespo"):
        more["num_items"] = _tokens(mask, num_items_in_batch)
    elif loss_type == "dr_grpo":
        more["max_length"] = max_completion_length
    weighted = advantages
    if vllm_is_ratio is not None:
        # every method's loss is proportional to |A|
        ratio = vllm_is_ratio.unsqueeze(1) if vllm_is_ratio.dim() == 1 else vllm_is_ratio
        weighted = (advantages.unsqueeze(1) * ratio).expand_as(logprobs)
    out = loss(
        logprobs,
        weighted,
        old_per_token_logps,
        reference,
        mask=mask,
        beta=beta,
        kl_corrected=use_bias_correction_kl,
        **own,
        **more,
    )
    clipped = _clipped_fraction(
        logprobs, old_per_token_logps, mask, advantages, loss_type, importance_sampling_level, epsilon_low, high
    )
    kl = [] if beta == 0.0 else [out.metrics.kl.float()]
    return out.loss, (*kl, clipped)


@torch.no_grad()
def _clipped_fraction(
    logprobs: Tensor,
    old: Tensor | None,
    mask: Tensor,
    advantages: Tensor,
    loss_type: str,
    level: str,
    low: float,
    high: float,
) -> Tensor:
    """Of the tokens, as Liger counts them: CISPO's only where A > 0; SAPO and VESPO clip none."""
    count = mask.sum().clamp(min=1)
    if old is None or loss_type in ("sapo", "vespo"):
        return logprobs.new_zeros(())
    logratio = torch.where(mask, logprobs - old, 0)
    if level == "sequence":
        logratio = (logratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logratio)
    ratio, a = logratio.exp(), advantages.unsqueeze(1)
    if loss_type == "cispo":
        outside = (ratio > high) & (a > 0)
    else:
        outside = ((ratio < 1 - low) & (a < 0)) | ((ratio > 1 + high) & (a > 0))
    return (outside & mask).sum() / count


class LigerFusedLinearGRPOLoss(Fused):
    """`liger_fused_linear_grpo` with its options kept; called with (_input, lin_weight, ids, mask, advantages, ...)."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__(locals())
        _check_grpo(loss_type, importance_sampling_level, epsilon_high, delta, max_completion_length, False)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_grpo(
            _input,
            lin_weight,
            selected_token_ids,
            attention_mask,
            advantages,
            bias,
            ref_per_token_logps,
            old_per_token_logps,
            ref_input,
            ref_weight,
            ref_bias,
            vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )
