"""`vocab_divergence`: divergences over the vocabulary between rows of two streams of logits."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.reference import vocabulary

Direction = Literal["forward", "reverse"]

# What is computed of p = softmax(reference / T) and q = softmax(logits / T), by number, and what `parameter` is.
# Compiled graphs keep a number. KL(p || q); the generalised Jensen-Shannon divergence with the mixture
# m = parameter p + (1 - parameter) q; KL(p || m); Σ |p - q| / 2; the
# alpha-divergence for parameter <= 1/2.
KL, JSD, SKEW_KL, TOTAL_VARIATION, ALPHA = range(5)

# `state` (rows of it, rows) is what the backward needs of a row: the largest logit of the reference and of the policy,
# Σ exp((x - max) / T) of the reference, and the log of its ratio to the policy's; then, of the Jensen-Shannon
# divergence, KL(p || m) and KL(q || m), of KL(p || m) the mean of p / m - 1 under q, and of Σ |p - q| / 2 that of half
# the sign of q - p under p. A gradient that is not wanted is an empty tensor.
STATE_ROWS = {KL: 4, JSD: 6, SKEW_KL: 5, TOTAL_VARIATION: 5, ALPHA: 4}
torch.library.define(
    "fastpo::vocab_divergence",
    "(Tensor logits, Tensor reference, Tensor? mask, Tensor? temperatures, float temperature, int kind, "
    "float parameter) -> (Tensor divergence, Tensor state)",
)
torch.library.define(
    "fastpo::vocab_divergence_backward",
    "(Tensor logits, Tensor reference, Tensor grad, Tensor divergence, Tensor state, Tensor? mask, "
    "Tensor? temperatures, float temperature, int kind, float parameter, bool to_logits, bool to_reference) -> "
    "(Tensor grad_logits, Tensor grad_reference)",
)


@torch.library.register_fake("fastpo::vocab_divergence")
def _fake(
    logits: Tensor,
    reference: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    kind: int,
    parameter: float,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    divergence = logits.new_empty(logits.shape[:-1], dtype=dtype)
    return divergence, logits.new_empty((STATE_ROWS[kind], divergence.numel()), dtype=dtype)


@torch.library.register_fake("fastpo::vocab_divergence_backward")
def _fake_backward(
    logits: Tensor,
    reference: Tensor,
    grad: Tensor,
    divergence: Tensor,
    state: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    kind: int,
    parameter: float,
    to_logits: bool,
    to_reference: bool,
) -> tuple[Tensor, Tensor]:
    def gradient(wanted: bool) -> Tensor:
        return logits.new_empty(logits.shape if wanted else (0,))

    return gradient(to_logits), gradient(to_reference)


_native.on_cuda("vocab_divergence", _native.why_not_triton, by="Triton")


@torch.library.impl("fastpo::vocab_divergence", "CUDA")
def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from fastpo.kernels.triton import vocab_divergence as kernels

    return kernels.forward(*args)


@torch.library.impl("fastpo::vocab_divergence_backward", "CUDA")
def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from fastpo.kernels.triton import vocab_divergence as kernels

    return kernels.backward(*args)


class _VocabDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        reference: Tensor,
        mask: Tensor | None,
        temperatures: Tensor | None,
        temperature: float,
        kind: int,
        parameter: float,
    ) -> Tensor:
        ctx.options = (temperature, kind, parameter)
        divergence, state = torch.ops.fastpo.vocab_divergence(logits, reference, mask, temperatures, *ctx.options)
        ctx.save_for_backward(logits, reference, divergence, state, mask, temperatures)
        return divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, reference, divergence, state, mask, temperatures = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_backward(ctx, grad, wanted, logits, reference, mask, temperatures)
        else:
            grads = torch.ops.fastpo.vocab_divergence_backward(
                logits, reference, grad, divergence, state, mask, temperatures, *ctx.options, *wanted
            )
        return (*(g if w else None for g, w in zip(grads, wanted, strict=True)), *(None,) * 5)


def _differentiable_backward(
    ctx: Any,
    grad: Tensor,
    wanted: tuple[bool, bool],
    logits: Tensor,
    reference: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients as functions that can be differentiated again (create_graph), from the reference."""
    temperature, kind, parameter = ctx.options
    divisor = temperature if temperatures is None else temperatures
    if kind in (KL, SKEW_KL):
        out = vocabulary.token_kl(logits, reference, mask=mask, temperature=divisor, skew=parameter)
    elif kind == TOTAL_VARIATION:
        out = vocabulary.token_tv(logits, reference, mask=mask, temperature=divisor)
    elif kind == ALPHA:
        out = vocabulary.token_alpha_divergence(logits, reference, alpha=parameter, mask=mask, temperature=divisor)
    else:
        out = vocabulary.token_jsd(logits, reference, beta=parameter, mask=mask, temperature=divisor)
    inputs = [t for t, w in zip((logits, reference), wanted, strict=True) if w]
    found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
    return tuple(next(found) if w else None for w in wanted)


def _check(logits: Tensor, reference_logits: Tensor, mask: Tensor | None, temperature: float | Tensor) -> bool:
    """Checks what every divergence takes; whether the native kernel is to be taken."""
    _checks.tensor("logits", logits, _checks.FLOATS)
    _checks.tensor("reference_logits", reference_logits, (logits.dtype,))
    _checks.same_device("reference_logits", reference_logits, "logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits must have a vocabulary dimension, got a 0-dimensional tensor")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: the vocabulary (last dimension) is empty")
    _checks.shape("reference_logits", reference_logits, logits.shape, "that of logits")
    if mask is not None:
        _checks.tensor("mask", mask, (torch.bool,))
        _checks.same_device("mask", mask, "logits", logits)
        _checks.shape("mask", mask, logits.shape[:-1], "one per token")
    _checks.temperature(temperature, logits.shape[:-1], "logits", logits)
    native = _native.serves("vocab_divergence", logits.device, logits.dtype)
    if not native or logits.device.type != "cpu":
        _checks.temperatures(temperature)
    return native


def _call(
    logits: Tensor,
    reference_logits: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    kind: int,
    parameter: float,
) -> Tensor:
    per_row = isinstance(temperature, Tensor)
    return _native.call(
        _VocabDivergence.apply,
        logits,
        reference_logits,
        mask,
        temperature if per_row else None,
        1.0 if per_row else float(temperature),
        kind,
        parameter,
    )


def token_kl(
    logits: Tensor,
    reference_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    direction: Direction = "forward",
    skew: float = 0.0,
) -> Tensor:
    """The Kullback-Leibler divergence between the next-token distributions of two models, for every token.

    With π = softmax(logits / T) and π_ref = softmax(reference_logits / T),

    - direction="forward" is KL(π_ref ‖ π) = Σ π_ref (log π_ref - log π), whose sum over a response is the sequential
      KL of TDPO (arXiv:2404.11999, D_SeqKL(x, y; π_ref ‖ π)) and which is the loss of distillation from the reference;
    - direction="reverse" is KL(π ‖ π_ref) = Σ π (log π - log π_ref), the penalty of RLHF, in full rather than
      estimated from one token.

    With skew = λ > 0 the second distribution is mixed with the first: KL(π_ref ‖ λ π_ref + (1 - λ) π), and in reverse
    KL(π ‖ λ π + (1 - λ) π_ref), the skew KL and skew reverse KL of DistiLLM (arXiv:2402.03898, λ = 0.1 there), which
    are at most -log λ and finite with all gradients, whatever is impossible.

    One pass over both streams, or two with a skew, and nothing of the size of the logits is allocated; the backward
    reads both again and writes each gradient that is needed: forward, without a skew, (π - π_ref) / T to `logits` and
    π_ref (log π_ref - log π - KL) / T to `reference_logits`; in reverse, the same with the streams exchanged. A
    divergence is exact in its leading digits however small it is, not merely next to log-probs: it is a sum of terms
    that are not negative, so it is not negative itself, and exactly 0 for equal streams.

    Args:
        logits: the policy's, (..., V), fp32, bf16, fp16 or fp64, any strides. Unnormalised; -inf marks an impossible
            token. A common offset of a row changes nothing.
        reference_logits: the reference model's, of the shape and dtype of `logits`.
        mask: (...) bool, True where a token counts; None counts all. Rows that do not count are not read and have the
            divergence 0 and the gradient 0.
        temperature: a positive number, or a tensor (...) of one per row. No gradient flows to it.
        direction: "forward" or "reverse", as above.
        skew: the share of the first distribution in the second, in [0, 1).

    Returns:
        (...), fp32 (fp64 for fp64 logits), in nats. A token that is impossible under the first distribution of the
        divergence adds nothing; one that is impossible under the second alone makes the row +inf, with a finite
        gradient to the second and none of meaning to the first. A row with a NaN or +inf, or of only -inf in one of
        the streams, gives NaN in that row alone.

    Raises:
        TypeError: a dtype or type is not one of the above.
        ValueError: shapes or devices do not match, T is not positive and finite, `direction` is another word, or
            `skew` is out of its range.
    """
    native = _check(logits, reference_logits, mask, temperature)
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    if not 0 <= _checks.number("skew", skew) < 1:
        raise ValueError(f"skew must be in [0, 1), got {skew}")
    if not native:
        return vocabulary.token_kl(
            logits, reference_logits, mask=mask, temperature=temperature, direction=direction, skew=skew
        )
    policy, reference = (logits, reference_logits) if direction == "forward" else (reference_logits, logits)
    return _call(policy, reference, mask, temperature, SKEW_KL if skew else KL, float(skew))


def token_jsd(
    logits: Tensor,
    reference_logits: Tensor,
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """The generalised Jensen-Shannon divergence between the next-token distributions of two models, for every token.

    With π = softmax(logits / T), π_ref = softmax(reference_logits / T) and the mixture m = β π_ref + (1 - β) π,

        D = β KL(π_ref ‖ m) + (1 - β) KL(π ‖ m),

    the loss of generalised knowledge distillation (GKD, arXiv:2306.13649, Eq. 1) with the reference as the teacher. It
    is finite and vanishes as β goes to 0 or 1, where D / β tends to the forward and D / (1 - β) to the reverse KL;
    libraries that give those KLs for β = 0 and 1 are discontinuous there, and `token_kl` has them by name.

    Both streams are read twice, a row at a time, and nothing of the size of the logits is allocated; the backward reads
    them once and writes each gradient that is needed: (1 - β) π (log(π / m) - KL(π ‖ m)) / T to `logits` and
    β π_ref (log(π_ref / m) - KL(π_ref ‖ m)) / T to `reference_logits`. As in `token_kl`, a divergence is exact in its
    leading digits however small it is, not negative, and exactly 0 for equal streams.

    Args:
        logits: the policy's, (..., V), fp32, bf16, fp16 or fp64, any strides. Unnormalised; -inf marks an impossible
            token.
        reference_logits: the reference model's, of the shape and dtype of `logits`.
        beta: the weight of the reference in the mixture, in (0, 1).
        mask: (...) bool, True where a token counts, as in `token_kl`.
        temperature: a positive number, or a tensor (...) of one per row. No gradient flows to it.

    Returns:
        (...), fp32 (fp64 for fp64 logits), in nats. A row with a NaN or +inf, or of only -inf in one of the streams,
        gives NaN in that row alone.

    Raises:
        TypeError: a dtype or type is not one of the above.
        ValueError: shapes or devices do not match, or T or `beta` is out of its range.
    """
    native = _check(logits, reference_logits, mask, temperature)
    if not 0 < _checks.number("beta", beta) < 1:
        raise ValueError(f"beta must be in (0, 1), got {beta}: at its ends the divergence is 0, see token_kl")
    if not native:
        return vocabulary.token_jsd(logits, reference_logits, beta=beta, mask=mask, temperature=temperature)
    return _call(logits, reference_logits, mask, temperature, JSD, float(beta))


def token_tv(
    logits: Tensor,
    reference_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """The total variation distance between the next-token distributions of two models, for every token.

    With π = softmax(logits / T) and π_ref = softmax(reference_logits / T), D = ½ Σ |π_ref - π|, in [0, 1]: the share of
    the probability that would have to be moved. A metric, so it does not matter which model is which.

    Both streams are read twice, a row at a time, and nothing of the size of the logits is allocated; the backward reads
    them once and writes each gradient that is needed: with s = ½ sign(π - π_ref), 0 where they are equal,
    π (s - Σ π s) / T to `logits` and -π_ref (s - Σ π_ref s) / T to `reference_logits`. As in `token_kl`, a divergence
    is exact in its leading digits however small it is, and exactly 0, with the gradient 0, for equal streams.

    Args:
        logits: the policy's, (..., V), fp32, bf16, fp16 or fp64, any strides. Unnormalised; -inf marks an impossible
            token.
        reference_logits: the reference model's, of the shape and dtype of `logits`.
        mask: (...) bool, True where a token counts, as in `token_kl`.
        temperature: a positive number, or a tensor (...) of one per row. No gradient flows to it.

    Returns:
        (...), fp32 (fp64 for fp64 logits). A row with a NaN or +inf, or of only -inf in one of the streams, gives NaN
        in that row alone. Some libraries leave out the ½.

    Raises:
        TypeError: a dtype or type is not one of the above.
        ValueError: shapes or devices do not match, or T is not positive and finite.
    """
    if not _check(logits, reference_logits, mask, temperature):
        return vocabulary.token_tv(logits, reference_logits, mask=mask, temperature=temperature)
    return _call(logits, reference_logits, mask, temperature, TOTAL_VARIATION, 0.0)


def token_alpha_divergence(
    logits: Tensor,
    reference_logits: Tensor,
    *,
    alpha: float = 0.5,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """The α-divergence between the next-token distributions of two models, for every token.

    With π = softmax(logits / T) and π_ref = softmax(reference_logits / T),

        D = (Σ π_ref^α π^(1 - α) - 1) / (α (α - 1)).

    It goes from the reverse KL (α = 0) through four times the squared Hellinger distance (α = 1/2) to the forward KL
    (α = 1); α = 2 is χ²(π_ref ‖ π) / 2 and α = -1 is χ²(π ‖ π_ref) / 2. Other parametrisations are in use: Amari's α is
    1 - 2α or 2α - 1 here, Rényi's divergence is log(1 + α (α - 1) D) / (α - 1).

    Both streams are read twice, a row at a time, and nothing of the size of the logits is allocated; the backward reads
    them once and writes each gradient that is needed: with r = π_ref / π, -(π r^α - π Σ π r^α) / (α T) to `logits` and
    π_ref (r^(α - 1) - Σ π r^α) / ((α - 1) T) to `reference_logits`. As in `token_kl`, a divergence is exact in its
    leading digits however small it is, not negative, and exactly 0 for equal streams.

    Args:
        logits: the policy's, (..., V), fp32, bf16, fp16 or fp64, any strides. Unnormalised; -inf marks an impossible
            token.
        reference_logits: the reference model's, of the shape and dtype of `logits`.
        alpha: any finite number.
        mask: (...) bool, True where a token counts, as in `token_kl`.
        temperature: a positive number, or a tensor (...) of one per row. No gradient flows to it.

    Returns:
        (...), fp32 (fp64 for fp64 logits). At most 1 / (α (1 - α)) for α in (0, 1). For α >= 1 a token that is
        impossible under the policy alone makes the row +inf, for α <= 0 one that is so under the reference alone; so
        do, outside [0, 1], ratios that leave the dtype's range. Such a row has no gradient of meaning, but for α = 0
        and 1 see `token_kl`. A row with a NaN or +inf, or of only -inf in one of the streams, gives NaN in that row
        alone.

    Raises:
        TypeError: a dtype or type is not one of the above.
        ValueError: shapes or devices do not match, T is not positive and finite, or `alpha` is not finite.
    """
    native = _check(logits, reference_logits, mask, temperature)
    if not math.isfinite(_checks.number("alpha", alpha)):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if alpha in (0, 1):
        direction: Direction = "forward" if alpha == 1 else "reverse"
        return token_kl(logits, reference_logits, mask=mask, temperature=temperature, direction=direction)
    if not native:
        return vocabulary.token_alpha_divergence(
            logits, reference_logits, alpha=alpha, mask=mask, temperature=temperature
        )
    if alpha > 0.5:
        return _call(reference_logits, logits, mask, temperature, ALPHA, 1 - alpha)
    return _call(logits, reference_logits, mask, temperature, ALPHA, float(alpha))
