"""Distillation by the generalised Jensen-Shannon divergence."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastpo import token_jsd, token_kl, token_logprobs
from fastpo.integrations.liger._common import Fused
from fastpo.kernels.linear_divergence import Head, of_logits


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    true_labels: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    compiled: bool = True,
    chunk_size: int = 1024,
    return_soft_hard_loss: bool = False,
) -> Any:
    """Distillation by the generalised Jensen-Shannon divergence: `LigerFusedLinearJSDFunction.apply`.

    With m = (1 - β) student + β teacher it is β KL(teacher ‖ m) + (1 - β) KL(student ‖ m), KL(teacher ‖ student) for
    β = 0 and KL(student ‖ teacher) for β = 1, averaged over the labelled rows, and the cross entropy of the labels. The
    temperature is that of the divergence alone. A student of a smaller vocabulary has logits 0 for the rest, which is
    Liger's convention.

    The logits of `chunk_size` rows at a time are there, and computed again in the backward.

    Args:
        student_input, teacher_input: (N, H) each.
        student_weight, teacher_weight: (V, H) each; no gradient goes to the teacher.
        true_labels: (N,), `ignore_index` where nothing counts.

    Returns:
        the loss; with `return_soft_hard_loss` a tuple of it, the divergence and the cross entropy, both constants.

    Raises:
        ValueError: beta is not in [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    counts = true_labels != ignore_index
    hard_is_asked = weight_hard_loss != 0 or return_soft_hard_loss

    def compute(logits: Tensor, others: Tensor, rows: slice) -> tuple[Tensor, ...]:
        hard: tuple[Tensor, ...] = ()
        if hard_is_asked:
            hard = (-token_logprobs(logits, true_labels[rows], ignore_index=ignore_index),)
        if logits.shape[-1] < others.shape[-1]:
            logits = nn.functional.pad(logits, (0, others.shape[-1] - logits.shape[-1]))
        common: dict[str, Any] = {"mask": counts[rows], "temperature": temperature}
        if beta in (0, 1):
            return token_kl(logits, others, direction="reverse" if beta else "forward", **common), *hard
        return token_jsd(logits, others, beta=beta, **common), *hard

    student = Head(student_input, student_weight, student_bias)
    teacher = Head(teacher_input, teacher_weight, teacher_bias)
    found = [part.sum() / counts.sum().clamp(min=1) for part in of_logits(student, teacher, compute, chunk_size)]
    soft, hard = found[0], found[1] if hard_is_asked else found[0].new_zeros(())
    loss = weight_soft_loss * soft + (weight_hard_loss * hard if weight_hard_loss != 0 else 0)
    return (loss, soft.detach(), hard.detach()) if return_soft_hard_loss else loss


class LigerFusedLinearJSDLoss(Fused):
    """`liger_fused_linear_jsd` with its options kept; called with its tensors in the same order."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Any:
        return liger_fused_linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            true_labels,
            student_bias,
            teacher_bias,
            **self.options,
        )
