"""Losses on stacked pairs, the chosen completions first: DPO and its variants, CPO, SimPO, ORPO."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpo import linear_logprobs, losses
from fastpo.integrations.liger._common import Fused, of_reference, reduced, sum_of_logits

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
        sums = reduced(per_token, valid, average)
        self.chosen, self.rejected = sums[:half], sums[half:]
        self.nll = sums.new_zeros(())
        if compute_nll_loss:
            self.nll = -nll_token[:half].sum() / counted.sum().clamp(min=1)
        positions = max(half * target.shape[1] * weight.shape[0], 1)
        self._logits = [sum_of_logits(part, weight, bias) / positions for part in (hidden[:half], hidden[half:])]

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
        sums = of_reference(ref_input, ref_weight, target, ref_bias, ignore_index, average_log_prob)
        reference = list(sums.split(len(pairs.chosen)))
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


class LigerFusedLinearDPOLoss(Fused):
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
        super().__init__(locals())
        _check_dpo(loss_type, label_smoothing)

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
        return liger_fused_linear_dpo(_input, lin_weight, target, bias, ref_input, ref_weight, ref_bias, **self.options)


class LigerFusedLinearCPOLoss(Fused):
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
        super().__init__(locals())

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_cpo(_input, lin_weight, target, bias, **self.options)


class LigerFusedLinearSimPOLoss(Fused):
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
        super().__init__(locals())

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_simpo(_input, lin_weight, target, bias, **self.options)


class LigerFusedLinearORPOLoss(Fused):
    """`liger_fused_linear_orpo` with its options kept; called with (lin_weight, _input, target, bias, nll_target)."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_orpo(_input, lin_weight, target, bias, nll_target=nll_target, **self.options)
