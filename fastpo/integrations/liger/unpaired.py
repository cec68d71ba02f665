"""KTO, on single completions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo import linear_logprobs, losses
from fastpo.integrations.liger._common import Fused, of_reference, reduced, sum_of_logits


def liger_fused_linear_kto(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    preference_labels: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """KTO on labelled completions (B, T, H): `LigerFusedLinearKTOFunction.apply`.

    Args:
        preference_labels: bool (B,), True for desirable ones.
        kl: one number, or (B,); 0 if None.

    Returns:
        the loss, and sums over desirable and over undesirable completions of log-probs, of logits and of rewards.
    """
    labels = preference_labels.bool()
    valid = target != ignore_index
    policy = reduced(linear_logprobs(_input, weight, target, bias, ignore_index=ignore_index), valid, average_log_prob)
    reference = torch.zeros_like(policy)
    if use_ref_model:
        reference = of_reference(ref_input, ref_weight, target, ref_bias, ignore_index, average_log_prob)
    level = policy.new_zeros(()) if kl is None else kl.detach().to(policy.dtype)
    level = level.squeeze() if level.numel() == 1 else level
    out = losses.kto(policy, reference, labels, level, beta=beta)
    rewards = beta * (policy.detach() - reference)
    metrics = [torch.where(side, policy.detach(), 0).sum() for side in (labels, ~labels)]
    metrics += [sum_of_logits(_input[side], weight, bias) for side in (labels, ~labels)]
    metrics += [torch.where(side, rewards, 0).sum() for side in (labels, ~labels)]
    return out.loss, tuple(metrics)


class LigerFusedLinearKTOLoss(Fused):
    """`liger_fused_linear_kto` with its options kept; called with (_input, lin_weight, target, bias, labels, ...)."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if preference_labels is None:
            raise ValueError("preference_labels must be given: bool (B,), True for desirable completions")
        return liger_fused_linear_kto(
            _input,
            lin_weight,
            target,
            preference_labels,
            bias,
            ref_input,
            ref_weight,
            ref_bias,
            kl,
            **self.options,
        )
