"""Liger's fused linear losses by their names, constructors and calls, computed by fastpo, on CPUs too.

    from fastpo.integrations.liger import LigerFusedLinearDPOLoss

    loss, metrics = LigerFusedLinearDPOLoss(beta=0.1)(lm_head.weight, hidden, labels, None, ref_hidden, ref_weight)

The classes are those of `liger_kernel.chunked_loss` 0.8.5, the functions those of its `functional`, which take what
`LigerFusedLinear...Function.apply` takes; Liger itself is not needed. The numbers are Liger's, with its conventions:
pairs are stacked with the chosen ones first, targets are shifted by the caller, losses are averaged over the pairs, the
negative log-likelihood over all chosen tokens, and the second result holds Liger's metrics in its order, constants.

What differs:

- Nothing is compiled or cut into chunks of pairs: log-probs come from `fastpo.linear_logprobs`, in a buffer of a few
  megabytes. `compiled` and `chunk_size` are accepted, and say nothing here, but for the rows of logits that JSD holds.
- Log-probs and losses are fp32 for bf16 and fp16 inputs, fp64 for fp64. On a GPU no logits are rounded to bf16.
- A batch without a valid token has loss 0, where Liger divides 0 by 0. ORPO's log(1 - p) is exact near p = 1.
- An option that Liger ignores raises: label_smoothing with other DPO losses than "exo_pair" and "robust".
- "luspo" with a penalty or weights per token is a mean over sequences; Liger's is over padding too, and so depends on
  its width.
- The gradient is right for any upstream gradient, in a second backward, and, by the reference, of second order.

There is no cosine similarity loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpo import linear_logprobs, losses, token_jsd, token_kl, token_logprobs

_DPO = {
    "sigmoid": "dpo",
    "hinge": "hinge",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "robust": "robust_dpo",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
}
_SMOOTHED = ("exo_pair", "robust")


def _check_dpo(loss_type: str, label_smoothing: float) -> None:
    if loss_type not in _DPO:
        raise ValueError(f"loss_type must be one of {', '.join(_DPO)}; got {loss_type!r}")
    if label_smoothing and loss_type not in _SMOOTHED:
        raise ValueError(
            f"label_smoothing={label_smoothing:g} has no meaning for loss_type={loss_type!r}, and Liger ignores it: "
            "see fastpo.losses.cdpo"
        )
    if loss_type == "exo_pair" and not label_smoothing > 0:
        raise ValueError("label_smoothing must be positive for loss_type='exo_pair'; the paper's is 1e-3")
    if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5) for loss_type='robust', got {label_smoothing:g}")


def _reduced(logprobs: Tensor, valid: Tensor, average: bool) -> Tensor:
    """(B,): sums of token log-probs, which are 0 where nothing counts, or means."""
    sums = logprobs.sum(-1)
    return sums / valid.sum(-1).clamp(min=1) if average else sums


@torch.no_grad()
def _sum_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of all positions and tokens, without the logits: (Σ hidden) · (Σ weight) + N Σ bias."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    total = rows.sum(0, dtype=torch.float32) @ weight.sum(0, dtype=torch.float32)
    return total if bias is None else total + len(rows) * bias.float().sum()


class _Pairs:
    """Log-probs of stacked pairs and what Liger tells of them."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        average: bool,
        compute_nll_loss: bool,
        nll_target: Tensor | None = None,
    ) -> None:
        half = target.shape[0] // 2
        valid = target != ignore_index
        if nll_target is None:
            per_token = nll_token = linear_logprobs(hidden, weight, target, bias, ignore_index=ignore_index)
            counted = valid[:half]
        else:
            # both labels of a position from one product
            both = torch.stack([target, nll_target.to(target.dtype)], -1)
            per_token, nll_token = linear_logprobs(hidden, weight, both, bias, ignore_index=ignore_index).unbind(-1)
            counted = nll_target[:half] != ignore_index
        sums = _reduced(per_token, valid, average)
        self.chosen, self.rejected = sums[:half], sums[half:]
        self.nll = sums.new_zeros(())
        if compute_nll_loss:
            self.nll = -nll_token[:half].sum() / counted.sum().clamp(min=1)
        positions = max(half * target.shape[1] * weight.shape[0], 1)
        self._logits = [_sum_of_logits(part, weight, bias) / positions for part in (hidden[:half], hidden[half:])]

    def results(self, loss: Tensor, alpha: float, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        metrics = (self.chosen, self.rejected, *self._logits, self.nll, *more)
        return alpha * self.nll + loss, tuple(m.detach() for m in metrics)


def liger_fused_linear_dpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    alpha: float = 1.0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """DPO and its variants on stacked pairs: `LigerFusedLinearDPOFunction.apply`.

    Args:
        _input: (2 B, T, H), the chosen completions first.
        weight: (V, H).
        target: (2 B, T), `ignore_index` where nothing counts.
        bias: (V,) or None.
        ref_input, ref_weight, ref_bias: the same of the reference model.
        use_ref_model: False for log-ratios to a uniform reference.
        average_log_prob: means over tokens instead of sums.
        compute_nll_loss, alpha: add alpha times the negative log-likelihood of the chosen tokens.

    Returns:
        the loss, and: log-probs of chosen and rejected (B,), means of their logits, the negative log-likelihood,
        rewards of chosen and rejected (B,).

    Raises:
        ValueError: an unknown loss_type, a label_smoothing outside its domain or ignored, or what
            `linear_logprobs` raises.
    """
    _check_dpo(loss_type, label_smoothing)
    pairs = _Pairs(_input, weight, target, bias, ignore_index, average_log_prob, compute_nll_loss)
    reference = [torch.zeros_like(pairs.chosen), torch.zeros_like(pairs.rejected)]
    if use_ref_model:
        if ref_input is None or ref_weight is None:
            raise ValueError("use_ref_model=True needs ref_input and ref_weight")
        with torch.no_grad():
            half = len(pairs.chosen)
            per_token = linear_logprobs(ref_input, ref_weight, target, ref_bias, ignore_index=ignore_index)
            sums = _reduced(per_token, target != ignore_index, average_log_prob)
            reference = [sums[:half], sums[half:]]
    more: dict[str, float] = {"beta": beta}
    if loss_type in _SMOOTHED:
        more["label_smoothing"] = label_smoothing
    if loss_type == "discopop":
        more["tau"] = discopop_tau
    # which Liger does not have
    shift = [pairs.chosen.new_zeros(())] if loss_type == "bco_pair" else []
    out = getattr(losses, _DPO[loss_type])(pairs.chosen, pairs.rejected, *reference, *shift, **more)
    rewards = [beta * (p.detach() - r) for p, r in zip((pairs.chosen, pairs.rejected), reference, strict=True)]
    return pairs.results(out.loss, alpha, *rewards)


def _smoothed(pairs: _Pairs, beta: float, margin: float, label_smoothing: float) -> Tensor:
    """-(1 - ε) log σ(β Δ - margin) - ε log σ(margin - β Δ), the mean."""
    shift = torch.full_like(pairs.chosen, margin / beta)
    return losses.cdpo(
        pairs.chosen,
        pairs.rejected,
        shift,
        torch.zeros_like(shift),
        beta=beta,
        label_smoothing=label_smoothing,
    ).loss


def liger_fused_linear_cpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = True,
    compiled: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """CPO on stacked pairs: `LigerFusedLinearCPOFunction.apply`. Results as of `liger_fused_linear_dpo`."""
    pairs = _Pairs(_input, weight, target, bias, ignore_index, average_log_prob, compute_nll_loss)
    loss = _smoothed(pairs, beta, 0.0, label_smoothing)
    return pairs.results(loss, alpha, beta * pairs.chosen, beta * pairs.rejected)


def liger_fused_linear_simpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    gamma: float = 0.5,
    chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """SimPO on stacked pairs: `LigerFusedLinearSimPOFunction.apply`. Results as of `liger_fused_linear_dpo`.

    The class adds the negative log-likelihood unless told otherwise, this function does not; both are Liger's defaults.
    """
    pairs = _Pairs(_input, weight, target, bias, ignore_index, True, compute_nll_loss)
    loss = _smoothed(pairs, beta, gamma, label_smoothing)
    return pairs.results(loss, alpha, beta * pairs.chosen, beta * pairs.rejected)


def liger_fused_linear_orpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = True,
    nll_target: Tensor | None = None,
    compiled: bool = True,
    chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """ORPO on stacked pairs: `LigerFusedLinearORPOFunction.apply`.

    Results as of `liger_fused_linear_dpo`, and the means of log σ(log-odds ratio) and of the log-odds ratio. The
    negative log-likelihood is that of `nll_target` (2 B, T) if it is given.
    """
    pairs = _Pairs(_input, weight, target, bias, ignore_index, True, compute_nll_loss, nll_target)
    chosen, rejected = pairs.chosen, pairs.rejected
    one = torch.ones_like(chosen, dtype=torch.int64)
    out = losses.orpo(chosen, rejected, lambda_=beta, chosen_lengths=one, rejected_lengths=one)
    # which has the mean negative log-likelihood of each completion in it, where Liger's is that of all tokens
    odds_term = out.loss + chosen.mean()
    with torch.no_grad():
        odds = (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
        ratio = nn.functional.logsigmoid(odds)
    return pairs.results(odds_term, 1.0, beta * chosen, beta * rejected, ratio.mean(), odds.mean())


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
    policy = _reduced(linear_logprobs(_input, weight, target, bias, ignore_index=ignore_index), valid, average_log_prob)
    reference = torch.zeros_like(policy)
    if use_ref_model:
        if ref_input is None or ref_weight is None:
            raise ValueError("use_ref_model=True needs ref_input and ref_weight")
        with torch.no_grad():
            per_token = linear_logprobs(ref_input, ref_weight, target, ref_bias, ignore_index=ignore_index)
            reference = _reduced(per_token, valid, average_log_prob)
    level = policy.new_zeros(()) if kl is None else kl.detach().to(policy.dtype)
    level = level.squeeze() if level.numel() == 1 else level
    out = losses.kto(policy, reference, labels, level, beta=beta)
    rewards = beta * (policy.detach() - reference)
    metrics = [torch.where(side, policy.detach(), 0).sum() for side in (labels, ~labels)]
    metrics += [_sum_of_logits(_input[side], weight, bias) for side in (labels, ~labels)]
    metrics += [torch.where(side, rewards, 0).sum() for side in (labels, ~labels)]
    return out.loss, tuple(metrics)


_AGGREGATIONS: dict[str, Any] = {
    "grpo": "seq_mean_token_mean",
    "sapo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
    "dr_grpo": "const_norm",
    "luspo": "seq_mean_token_sum",
}


def _check_grpo(
    loss_type: str,
    level: str,
    epsilon_high: float,
    delta: float | None,
    max_completion_length: int | None,
    weighted: bool,
) -> None:
    if loss_type not in _AGGREGATIONS:
        raise ValueError(f"loss_type must be one of {', '.join(_AGGREGATIONS)}; got {loss_type!r}")
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
    if delta is not None and not own and (level == "sequence" or delta <= 1 + epsilon_high):
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
    more: dict[str, Any] = {"aggregation": _AGGREGATIONS[loss_type], "count_empty": True}
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
    counted = (true_labels != ignore_index).sum().clamp(min=1)
    hard_is_asked = weight_hard_loss != 0 or return_soft_hard_loss

    def part(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = nn.functional.linear(student, student_weight, student_bias)
        with torch.no_grad():
            others = nn.functional.linear(teacher, teacher_weight, teacher_bias)
        hard = logits.new_zeros((), dtype=torch.float32)
        if hard_is_asked:
            hard = -token_logprobs(logits, labels, ignore_index=ignore_index).sum()
        if logits.shape[-1] < others.shape[-1]:
            logits = nn.functional.pad(logits, (0, others.shape[-1] - logits.shape[-1]))
        common: dict[str, Any] = {"mask": labels != ignore_index, "temperature": temperature}
        if beta in (0, 1):
            each = token_kl(logits, others, direction="reverse" if beta else "forward", **common)
        else:
            each = token_jsd(logits, others, beta=beta, **common)
        return each.sum(), hard

    soft = hard = student_input.new_zeros((), dtype=torch.float32)
    teacher_input = teacher_input.detach()
    for rows in zip(*(t.split(chunk_size) for t in (student_input, teacher_input, true_labels)), strict=True):
        found: Any = checkpoint(part, *rows, use_reentrant=False, preserve_rng_state=False)
        soft, hard = soft + found[0], hard + found[1]
    soft, hard = soft / counted, hard / counted
    loss = weight_soft_loss * soft + (weight_hard_loss * hard if weight_hard_loss != 0 else 0)
    return (loss, soft.detach(), hard.detach()) if return_soft_hard_loss else loss


class LigerFusedLinearDPOLoss(nn.Module):
    """`liger_fused_linear_dpo` with its options kept; called with (lin_weight, _input, target, bias, ref_...)."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        _check_dpo(loss_type, label_smoothing)
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss, self.compiled, self.use_ref_model = compute_nll_loss, compiled, use_ref_model
        self.average_log_prob, self.chunk_size, self.loss_type = average_log_prob, chunk_size, loss_type
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_dpo(
            _input,
            lin_weight,
            target,
            bias,
            ref_input,
            ref_weight,
            ref_bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            compute_nll_loss=self.compute_nll_loss,
            use_ref_model=self.use_ref_model,
            average_log_prob=self.average_log_prob,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            discopop_tau=self.discopop_tau,
            alpha=self.alpha,
        )


class LigerFusedLinearCPOLoss(nn.Module):
    """`liger_fused_linear_cpo` with its options kept; called with (lin_weight, _input, target, bias)."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled = compute_nll_loss, compiled
        self.average_log_prob, self.chunk_size = average_log_prob, chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_cpo(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            compute_nll_loss=self.compute_nll_loss,
            average_log_prob=self.average_log_prob,
        )


class LigerFusedLinearSimPOLoss(nn.Module):
    """`liger_fused_linear_simpo` with its options kept; called with (lin_weight, _input, target, bias).

    Liger's default adds the negative log-likelihood, which SimPO has not: compute_nll_loss=False is the paper's.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled, self.gamma = compute_nll_loss, compiled, gamma
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_simpo(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            compute_nll_loss=self.compute_nll_loss,
            gamma=self.gamma,
        )


class LigerFusedLinearORPOLoss(nn.Module):
    """`liger_fused_linear_orpo` with its options kept; called with (lin_weight, _input, target, bias, nll_target)."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_orpo(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            compute_nll_loss=self.compute_nll_loss,
            nll_target=nll_target,
        )


class LigerFusedLinearKTOLoss(nn.Module):
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
        super().__init__()
        self.ignore_index, self.beta, self.compiled = ignore_index, beta, compiled
        self.use_ref_model, self.average_log_prob, self.chunk_size = use_ref_model, average_log_prob, chunk_size

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
            ignore_index=self.ignore_index,
            beta=self.beta,
            use_ref_model=self.use_ref_model,
            average_log_prob=self.average_log_prob,
        )


class LigerFusedLinearGRPOLoss(nn.Module):
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
        super().__init__()
        _check_grpo(loss_type, importance_sampling_level, epsilon_high, delta, max_completion_length, False)
        self.beta, self.compiled, self.use_ref_model, self.chunk_size = beta, compiled, use_ref_model, chunk_size
        self.epsilon_low, self.epsilon_high, self.loss_type = epsilon_low, epsilon_high, loss_type
        self.max_completion_length, self.importance_sampling_level = max_completion_length, importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.temperature, self.delta, self.use_bias_correction_kl = temperature, delta, use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg

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
            beta=self.beta,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            loss_type=self.loss_type,
            max_completion_length=self.max_completion_length,
            importance_sampling_level=self.importance_sampling_level,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            temperature=self.temperature,
            use_ref_model=self.use_ref_model,
            vllm_is_ratio=vllm_is_ratio,
            delta=self.delta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            vespo_k_pos=self.vespo_k_pos,
            vespo_lambda_pos=self.vespo_lambda_pos,
            vespo_k_neg=self.vespo_k_neg,
            vespo_lambda_neg=self.vespo_lambda_neg,
            num_items_in_batch=num_items_in_batch,
        )


class LigerFusedLinearJSDLoss(nn.Module):
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
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature, self.compiled = ignore_index, temperature, compiled
        self.chunk_size, self.return_soft_hard_loss = chunk_size, return_soft_hard_loss

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
            weight_hard_loss=self.weight_hard_loss,
            weight_soft_loss=self.weight_soft_loss,
            beta=self.beta,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            chunk_size=self.chunk_size,
            return_soft_hard_loss=self.return_soft_hard_loss,
        )
