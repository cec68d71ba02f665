"""`token_logprobs`: log-probabilities of chosen tokens from rows of logits, with statistics, in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.reference import vocabulary
from fastpo.reference.vocabulary import TokenLogprobs

Statistic = Literal["entropy", "logsumexp", "log_sum_p2", "top1"]
STATISTICS: tuple[Statistic, ...] = ("entropy", "logsumexp", "log_sum_p2", "top1")

# targets are (..., K) here; a statistic that was not asked for (a bit of `stats` not set) is an empty tensor.
# `state` (2, rows) is what the backward needs of a row: its largest logit and Σ exp((x - max) / T).
torch.library.define(
    "fastpo::token_logprobs",
    "(Tensor logits, Tensor targets, Tensor? temperatures, float temperature, int ignore_index, int stats, "
    "Tensor? allowed=None) -> "
    "(Tensor logprobs, Tensor state, Tensor entropy, Tensor logsumexp, Tensor log_sum_p2, Tensor top1)",
)
_BACKWARD_ARGUMENTS = (
    "Tensor targets, Tensor state, Tensor? entropy, Tensor? temperatures, float temperature, int ignore_index, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_logsumexp, Tensor? allowed=None"
)
torch.library.define("fastpo::token_logprobs_backward", f"(Tensor logits, {_BACKWARD_ARGUMENTS}) -> Tensor")
torch.library.define("fastpo::token_logprobs_backward_", f"(Tensor(a!) logits, {_BACKWARD_ARGUMENTS}) -> ()")


@torch.library.register_fake("fastpo::token_logprobs")
def _fake(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    stats: int,
    allowed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = math.prod(logits.shape[:-1])

    def statistic(bit: int, dtype: torch.dtype) -> Tensor:
        return logits.new_empty(logits.shape[:-1] if stats >> bit & 1 else (0,), dtype=dtype)

    return (
        logits.new_empty(targets.shape, dtype=dtype),
        logits.new_empty((2, rows), dtype=dtype),
        statistic(0, dtype),
        statistic(1, dtype),
        statistic(2, dtype),
        statistic(3, torch.int64),
    )


@torch.library.register_fake("fastpo::token_logprobs_backward")
def _fake_backward(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastpo::token_logprobs_backward_")
def _fake_backward_inplace(logits: Tensor, *_: Any) -> None:
    return None


_native.on_cuda("token_logprobs", _native.why_not_triton, by="Triton")


@torch.library.impl("fastpo::token_logprobs", "CUDA")
def _cuda(*args: Any) -> tuple[Tensor, ...]:
    from fastpo.kernels.triton import token_logprobs as kernels

    return kernels.forward(*args)


@torch.library.impl("fastpo::token_logprobs_backward", "CUDA")
def _cuda_backward(*args: Any) -> Tensor:
    from fastpo.kernels.triton import token_logprobs as kernels

    return kernels.backward(*args)


@torch.library.impl("fastpo::token_logprobs_backward_", "CUDA")
def _cuda_backward_inplace(*args: Any) -> None:
    from fastpo.kernels.triton import token_logprobs as kernels

    kernels.backward_inplace(*args)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        ignore_index: int,
        stats: int,
        inplace_backward: bool,
        allowed: Tensor | None,
    ) -> tuple[Tensor, ...]:
        logprobs, state, entropy, logsumexp, log_sum_p2, top1 = torch.ops.fastpo.token_logprobs(
            logits, targets, temperatures, temperature, ignore_index, stats, allowed
        )
        ctx.temperature, ctx.ignore_index, ctx.stats, ctx.inplace = (
            temperature,
            ignore_index,
            stats,
            inplace_backward,
        )
        ctx.mark_non_differentiable(log_sum_p2, top1)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, temperatures, allowed, state, entropy if stats & 1 else None)
        return logprobs, entropy, logsumexp, log_sum_p2, top1

    @staticmethod
    def backward(
        ctx: Any,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        grad_logsumexp: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 7
        # the empty tensor that stands for a statistic not asked for has a gradient of no meaning
        upstream = (
            grad_logprobs,
            grad_entropy if ctx.stats & 1 else None,
            grad_logsumexp if ctx.stats & 2 else None,
        )
        if all(g is None for g in upstream):
            return (None, *nothing)
        logits, targets, temperatures, allowed, state, entropy = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return (_differentiable_backward(ctx, logits, targets, temperatures, allowed, upstream), *nothing)
        rest = (targets, state, entropy, temperatures, ctx.temperature, ctx.ignore_index, *upstream, allowed)
        if ctx.inplace and not torch.compiler.is_compiling():
            torch.ops.fastpo.token_logprobs_backward_(logits, *rest)
            # a second backward would read gradients where it expects logits: let autograd see the write
            torch.autograd.graph.increment_version(logits)
            return (logits, *nothing)
        return (torch.ops.fastpo.token_logprobs_backward(logits, *rest), *nothing)


def _differentiable_backward(
    ctx: Any,
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    allowed: Tensor | None,
    upstream: tuple[Tensor | None, ...],
) -> Tensor:
    """The gradient as a function that can be differentiated again (create_graph), from the reference."""
    names = tuple(name for name, g in zip(("entropy", "logsumexp"), upstream[1:], strict=True) if g is not None)
    out = vocabulary.token_logprobs(
        logits,
        targets,
        temperature=ctx.temperature if temperatures is None else temperatures,
        ignore_index=ctx.ignore_index,
        stats=names,
        allowed=allowed,
    )
    pairs = [(getattr(out, n), g) for n, g in zip(("logprobs", "entropy", "logsumexp"), upstream, strict=True)]
    used = [(o, g) for o, g in pairs if g is not None]
    (grad,) = torch.autograd.grad([o for o, _ in used], logits, [g for _, g in used], create_graph=True)
    return grad


def _check(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    stats: tuple[str, ...],
    allowed: Tensor | None,
) -> None:
    _checks.tensor("logits", logits, _checks.FLOATS)
    _checks.tensor("targets", targets, _checks.INTEGERS)
    _checks.same_device("targets", targets, "logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits must have a vocabulary dimension, got a 0-dimensional tensor")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: the vocabulary (last dimension) is empty")
    _checks.targets(targets, logits.shape[:-1], f"logits of shape {tuple(logits.shape)}")
    _checks.temperature(temperature, logits.shape[:-1], "logits", logits)
    _checks.ignore_index(ignore_index)
    _checks.statistics(stats, STATISTICS)
    _checks.allowed(allowed, logits.shape[:-1], logits.shape[-1], "logits", logits)


def _check_inplace(logits: Tensor) -> None:
    if logits.is_leaf and logits.requires_grad:
        raise ValueError("inplace_backward=True would overwrite logits, a leaf that requires grad")
    spans = sorted((stride, size) for stride, size in zip(logits.stride(), logits.shape, strict=True) if size > 1)
    reach = 0
    for stride, size in spans:
        if stride <= reach:
            raise ValueError(
                "inplace_backward=True needs logits whose elements do not share memory (an expanded view?)"
            )
        reach += stride * (size - 1)


@overload
def token_logprobs(  # type: ignore[overload-overlap]  # an empty tuple is an Iterable too
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    stats: tuple[()] = (),
    allowed: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    stats: Iterable[Statistic],
    allowed: Tensor | None = None,
    inplace_backward: bool = False,
) -> TokenLogprobs: ...


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    stats: Iterable[Statistic] = (),
    allowed: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor | TokenLogprobs:
    """Log-probabilities log softmax(logits / T)[target], read from the logits in one pass.

    Nothing of the size of the logits is allocated in the forward; the backward writes one such tensor, the
    gradient g · (onehot - softmax) / T, or overwrites the logits with it. On a GPU that holds of the strides which
    (B, T, V)[:, :-1] has; logits whose rows need more than two strides, or whose vocabulary is not contiguous, are
    copied first.

    Args:
        logits: (..., V), fp32, bf16, fp16 or fp64, any strides. Unnormalised; -inf marks an impossible token.
        targets: (...) one id per row, or (..., K) several; int64 or int32, in [0, V) or `ignore_index`.
        temperature: a positive number, or a tensor (...) of one per row. No gradient flows to it.
        ignore_index: targets of this value are skipped: log-prob 0, gradient 0, and no arithmetic is spent on
            a row that has no other, so it may hold anything.
        stats: statistics of softmax(logits / T) to return as well, of shape (...): "entropy" in nats and
            "logsumexp", both differentiable; "log_sum_p2", the log of Σ p², and "top1", the most likely id
            (the lowest of equals), which are not.
        allowed: a set of tokens, int32 (W,) for all rows or (..., W), one per row, W = ceil(V / 32): token v is allowed
            where bit v % 32 of word v // 32 is set, as in the token bitmasks of xgrammar and llguidance (see
            `pack_allowed`). Bits behind the last token say nothing. Log-probs, statistics and gradients are those of
            the softmax over the allowed tokens; the logits of others, NaN and inf included, have no influence and the
            gradient 0. A target outside has the log-prob -inf, through which no gradient flows. None allows every
            token.
        inplace_backward: let the backward overwrite the logits with their gradient, which saves a tensor of
            their size. A second backward then raises. Without effect under torch.compile, which plans memory
            itself, under create_graph, and in the reference.

    Returns:
        the log-probs, of the shape of `targets`, fp32 (fp64 for fp64 logits); with `stats`, a `TokenLogprobs`
        tuple. A row of only -inf, or with a NaN or +inf, gives NaN in that row alone.

    Raises:
        TypeError: a dtype or type is not one of the above.
        ValueError: shapes do not match, T is not positive and finite, `inplace_backward` cannot be honoured, or a row
            with a target has no allowed token; the last on the CPU (a RuntimeError under torch.compile), elsewhere with
            FASTPO_DEBUG=1; without it, such a row has NaN and the gradient 0.
        IndexError: a target is out of range; the message names its place. On the CPU (a RuntimeError under
            torch.compile), elsewhere with FASTPO_DEBUG=1; without it, such a target has the log-prob NaN there.
    """
    stats = tuple(stats)
    _check(logits, targets, temperature, ignore_index, stats, allowed)
    if inplace_backward:
        _check_inplace(logits)
    per_row = isinstance(temperature, Tensor)
    native = _native.serves("token_logprobs", logits.device, logits.dtype)
    if not native or logits.device.type != "cpu":
        _checks.values(targets, temperature, ignore_index, logits.shape[-1])
        if allowed is not None and _checks.readable(allowed):
            valid = targets != ignore_index
            asked = valid if targets.dim() < logits.dim() else valid.any(-1)
            _checks.some_allowed(asked, vocabulary.any_allowed(allowed, logits.shape[-1]))
    if not native:
        out = vocabulary.token_logprobs(
            logits, targets, temperature=temperature, ignore_index=ignore_index, stats=stats, allowed=allowed
        )
        return out if stats else out.logprobs
    many = targets.dim() == logits.dim()
    logprobs, *found = _native.call(
        _TokenLogprobs.apply,
        logits,
        targets if many else targets.unsqueeze(-1),
        temperature if per_row else None,
        1.0 if per_row else float(temperature),
        ignore_index,
        sum(1 << bit for bit, name in enumerate(STATISTICS) if name in stats),
        inplace_backward,
        allowed,
    )
    logprobs = logprobs if many else logprobs.squeeze(-1)
    if not stats:
        return logprobs
    return TokenLogprobs(logprobs, *(t if name in stats else None for name, t in zip(STATISTICS, found, strict=True)))
