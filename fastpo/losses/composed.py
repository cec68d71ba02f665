"""Objectives that are made of others in a few lines: weighted mixtures, and losses with a second kind of data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.objective import PairwiseOutput
from fastpo.losses._build import built
from fastpo.reference.registry import Objective, objectives

Reduction = Literal["mean", "sum", "none"]


_MIXABLE = {row.name: row for row in objectives("pairwise") if row.scores == "policy"}
# here, and not in a call, since what is compiled may not build functions
_FUNCTIONS: dict[str, Callable[..., PairwiseOutput]] = {name: built(row) for name, row in _MIXABLE.items()}


def mixture(
    weights: Mapping[str, float],
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    hyper: Mapping[str, Mapping[str, Any]] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    **common: Any,
) -> PairwiseOutput:
    """Σ weight · loss over pairwise objectives of the same pairs.

    Args:
        weights: the weight of each objective, by its name in `fastpo.losses`; finite numbers.
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: as in the objectives; the reference's only
            where one of them has a reference model.
        hyper: hyper-parameters and options of single objectives, by name.
        inputs: the further tensors that the objectives take (win rates, delta, previous_chosen, ...), by argument.
        chosen_lengths, rejected_lengths: for the objectives that need lengths, where log-probs are summed.
        common: masks, cu_seqlens, reduction and num_items, for all.

    Returns:
        PairwiseOutput: the weighted sum of the losses, and the rewards of the first objective.

    Raises:
        ValueError: no objective, one that is not pairwise, a weight that is not finite, or hyper-parameters of an
            objective that has no weight; and what the objectives raise.
        TypeError: a weight is no number.
    """
    known = _MIXABLE
    if not weights:
        raise ValueError("weights is empty: name at least one objective")
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(f"weights names {name!r}, which is no pairwise objective; there are {', '.join(known)}")
        if not abs(_checks.number(f"weights[{name!r}]", weight)) < float("inf"):
            raise ValueError(f"weights[{name!r}] must be finite, got {weight}")
    if unknown := set(hyper or {}) - set(weights):
        raise ValueError(f"hyper names {min(unknown)!r}, which has no weight")
    outputs = []
    for name in weights:
        row = known[name]
        tensors = [policy_chosen, policy_rejected]
        tensors += [reference_chosen, reference_rejected] * row.reference_model  # type: ignore[list-item]
        own = {key: value for key, value in (inputs or {}).items() if key in _extra(row)}
        given = dict((hyper or {}).get(name, {}))
        takes_lengths = row.lengths in ("average", "count") or given.get("length_norm") or given.get("convention")
        if takes_lengths and chosen_lengths is not None and given.get("sft") != "cumulative":
            given |= {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        outputs.append(_FUNCTIONS[name](*tensors, **own, **given, **common))
    loss = functools.reduce(torch.add, (w * out.loss for w, out in zip(weights.values(), outputs, strict=True)))
    return outputs[0]._replace(loss=loss)


def _extra(row: Objective) -> set[str]:
    previous = {"previous_chosen", "previous_rejected"} if row.previous_model else set()
    return {given.name for given in row.inputs} | previous


def diffusion_dpo(
    prediction_chosen: Tensor,
    prediction_rejected: Tensor,
    reference_prediction_chosen: Tensor,
    reference_prediction_rejected: Tensor,
    target_chosen: Tensor,
    target_rejected: Tensor,
    *,
    beta: float = 5000.0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> PairwiseOutput:
    """-log σ(-β/2 [(m_w - m_l) - (m_ref_w - m_ref_l)]), m the mean squared error of a denoiser's prediction.

    DPO with -m in place of the log-prob, and β/2. A pair has one timestep; in the official code also one noise, in
    the paper's Eq. 14 two. β absorbs the number of elements: it does not carry over from mean to sum.

    Source: Diffusion-DPO, arXiv:2311.12908, Eq. 14 (its text is not verified; the form and the default are the official
    code's).

    Args:
        prediction_chosen, prediction_rejected: the denoiser's predictions (B, ...), floats.
        reference_prediction_chosen, reference_prediction_rejected: the reference denoiser's; constants.
        target_chosen, target_rejected: what is to be predicted (noise, or v); constants.
        beta: in (0, inf).
        reduction, num_items: as in `fastpo.losses.dpo`.

    Returns:
        PairwiseOutput; the rewards are β/2 times how much the squared error fell.

    Raises:
        TypeError, ValueError: as `fastpo.losses.dpo`; and shapes that do not match.
    """

    def score(name: str, prediction: Tensor, target: Tensor, other: str) -> Tensor:
        _checks.tensor(name, prediction, _checks.FLOATS)
        _checks.tensor(other, target, _checks.FLOATS)
        _checks.same_device(other, target, name, prediction)
        _checks.shape(other, target, prediction.shape, f"it must match {name}")
        if prediction.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(prediction.shape)}, expected (B, ...)")
        # bf16 means of 1e5 elements would lose the difference
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return -(prediction.to(wide) - target.detach().to(wide)).square().flatten(1).mean(1)

    if not 0 < _checks.number("beta", beta) < float("inf"):
        raise ValueError(f"beta must be in (0, inf) for diffusion_dpo, got {beta:g}")
    return _FUNCTIONS["dpo"](
        score("prediction_chosen", prediction_chosen, target_chosen, "target_chosen"),
        score("prediction_rejected", prediction_rejected, target_rejected, "target_rejected"),
        score("reference_prediction_chosen", reference_prediction_chosen.detach(), target_chosen, "target_chosen"),
        score(
            "reference_prediction_rejected", reference_prediction_rejected.detach(), target_rejected, "target_rejected"
        ),
        beta=beta / 2,
        reduction=reduction,
        num_items=num_items,
    )


def hypo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    online_policy: Tensor,
    online_reference: Tensor,
    *,
    beta: float = 0.1,
    lambda_: float = 1e-4,
    **common: Any,
) -> PairwiseOutput:
    """-log σ(βh) + λ Σ_j sg(K_j - mean of the other K) log π(y_j) / k: DPO offline, the reverse KL on online samples.

    K_j is the log-ratio to the reference of the j-th of k samples of the policy for a prompt. Differentiating K itself
    would have the expectation 0: this is its REINFORCE form with leave-one-out baselines, none for k = 1. Its value
    is a surrogate.

    Source: HyPO, arXiv:2406.01462, Alg. 1; k = 2 and λ are not verified. The HyPO of 2026 is another method.

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: as in `fastpo.losses.dpo`.
        online_policy, online_reference: summed log-probs (P, k) of k samples for each of P prompts, P > 0. The prompts
            may be others than those of the pairs.
        beta: in (0, inf).
        lambda_: in [0, inf).
        common: masks, cu_seqlens, reduction and num_items of the pairs. The online term is a mean over prompts; with
            reduction="none" it is added to each pair.

    Returns:
        PairwiseOutput of the pairs.

    Raises:
        TypeError, ValueError: as `fastpo.losses.dpo`; and shapes that do not match.
    """
    _checks.tensor("online_policy", online_policy, _checks.FLOATS)
    _checks.tensor("online_reference", online_reference, _checks.FLOATS)
    _checks.same_device("online_policy", online_policy, "policy_chosen", policy_chosen)
    _checks.same_device("online_reference", online_reference, "online_policy", online_policy)
    _checks.shape("online_reference", online_reference, online_policy.shape, "it must match online_policy")
    if online_policy.dim() != 2 or online_policy.numel() == 0:
        raise ValueError(f"online_policy has shape {tuple(online_policy.shape)}, expected (P, k), not empty")
    if not 0 <= _checks.number("lambda_", lambda_) < float("inf"):
        raise ValueError(f"lambda_ must be in [0, inf) for hypo, got {lambda_:g}")
    out = _FUNCTIONS["dpo"](policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta, **common)
    wide = torch.promote_types(online_policy.dtype, torch.float32)
    policy = online_policy.to(wide)
    ratio = (policy - online_reference.to(wide)).detach()
    k = ratio.shape[1]
    baseline = (ratio.sum(1, keepdim=True) - ratio) / (k - 1) if k > 1 else torch.zeros_like(ratio)
    surrogate = ((ratio - baseline) * policy).mean()
    return out._replace(loss=out.loss + lambda_ * surrogate.to(out.loss.dtype))
