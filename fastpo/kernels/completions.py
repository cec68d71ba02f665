"""Log-probabilities of completions: `linear_logprobs` with the shift of positions, a mask, and a head taken apart."""

from __future__ import annotations

import sys
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpo.kernels import _checks
from fastpo.kernels.linear_logprobs import linear_logprobs
from fastpo.reference.vocabulary import LinearLogprobs

# no id that a tokenizer or a collator has, so that -100 where the mask is True is an error
_IGNORED = -(2**62)


class Head(NamedTuple):
    """What `linear_logprobs` takes of a language model's head."""

    weight: Tensor
    bias: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None


def head_of(head: Tensor | nn.Module) -> Head:
    """The weight, the bias and the adapter of a head.

    Args:
        head: a weight (V, H); a torch.nn.Linear; or one that PEFT has wrapped, as it is active now: with LoRA adapters
            (several add up), with adapters disabled or merged, or as a copy that is trained (`modules_to_save`).

    Raises:
        TypeError: the module computes something else than a linear map.
        ValueError: the adapter computes something that is not an adapter's A and B: DoRA and other variants, dropout
            while training.
    """
    if isinstance(head, Tensor):
        return Head(head)
    if not isinstance(head, nn.Module):
        raise TypeError(f"head must be a weight or a torch.nn.Linear, got {type(head).__name__}")
    # a wrapped head's wrapper has been imported
    if "peft" in sys.modules:
        from peft.tuners.lora import LoraLayer
        from peft.utils import ModulesToSaveWrapper

        if isinstance(head, ModulesToSaveWrapper):
            active = [] if head.disable_adapters else head.active_adapters
            return head_of(head.modules_to_save[active[0]] if active else head.original_module)
        if isinstance(head, LoraLayer):
            return _with_adapters(head)
    own = "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks
    if own or not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            "head must be a weight, a torch.nn.Linear, or one wrapped by PEFT's LoRA, got "
            f"{type(head).__name__}{' with hooks or a forward of its own' if own else ''}"
        )
    return Head(head.weight, head.bias)


def _with_adapters(head: Any) -> Head:
    base = head_of(head.get_base_layer())
    if head.disable_adapters:
        if head.merged:
            raise ValueError("head: its adapters are disabled, but merged into the weight: call unmerge() on it first")
        return base
    if head.merged:
        return base
    names = [name for name in head.active_adapters if name in head.lora_A]
    bias, parts = base.bias, []
    for name in names:
        if name in getattr(head, "lora_variant", {}) or getattr(head, "use_dora", {}).get(name):
            raise ValueError(
                f"head: adapter {name!r} is a variant of LoRA (DoRA or another), which has no A and B alone"
            )
        dropout = head.lora_dropout[name]
        if head.training and getattr(dropout, "p", 0.0) > 0:
            raise ValueError(
                f"head: adapter {name!r} has lora_dropout={dropout.p}, which is not applied here: set it to 0 for the "
                "head, or put the head into evaluation mode"
            )
        a, b, scaling = head.lora_A[name], head.lora_B[name], float(head.scaling[name])
        if b.bias is not None:
            bias = b.bias * scaling if bias is None else bias + b.bias * scaling
        # PEFT keeps adapters in fp32 by default
        parts.append((a.weight.to(base.weight.dtype), b.weight.to(base.weight.dtype), scaling))
    if bias is not None:
        bias = bias.to(base.weight.dtype)
    if not parts:
        return base
    if len(parts) == 1:
        return Head(base.weight, bias, parts[0])
    a, b = torch.cat([a for a, _, _ in parts]), torch.cat([b * scaling for _, b, scaling in parts], 1)
    return Head(base.weight, bias, (a, b, 1.0))


def _check(
    hidden: Tensor, input_ids: Tensor, completion_mask: Tensor, cu_seqlens: Tensor | None, shift: int
) -> torch.Size:
    _checks.tensor("hidden", hidden, _checks.FLOATS)
    _checks.tensor("input_ids", input_ids, _checks.INTEGERS)
    _checks.tensor("completion_mask", completion_mask, (torch.bool,))
    _checks.same_device("input_ids", input_ids, "hidden", hidden)
    _checks.same_device("completion_mask", completion_mask, "hidden", hidden)
    shape = hidden.shape[:-1]
    dims, name = (2, "(B, T, H)") if cu_seqlens is None else (1, "(N, H) with cu_seqlens")
    if len(shape) != dims:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, expected {name}")
    _checks.shape("input_ids", input_ids, shape, "one id per position of hidden")
    _checks.shape("completion_mask", completion_mask, shape, "it must match input_ids")
    if cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, "hidden", hidden)
        _checks.rising("cu_seqlens", cu_seqlens, shape[0])
    if isinstance(shift, bool) or not isinstance(shift, int):
        raise TypeError(f"shift must be an int, got {type(shift).__name__}")
    if shift < 0:
        raise ValueError(f"shift must not be negative, got {shift}")
    return shape


def _predicted(completion_mask: Tensor, cu_seqlens: Tensor | None, shift: int) -> Tensor:
    """Which tokens count and have a hidden state before them in their sequence."""
    length = completion_mask.shape[-1]
    position = torch.arange(length, device=completion_mask.device)
    if cu_seqlens is None:
        return completion_mask & (position >= shift)
    bounds = cu_seqlens.long()
    after = torch.searchsorted(bounds, position, right=True)
    start = bounds[(after - 1).clamp(min=0)]
    return completion_mask & (after > 0) & (after < len(bounds)) & (position - start >= shift)


def completion_logprobs(
    hidden: Tensor,
    head: Tensor | nn.Module,
    input_ids: Tensor,
    completion_mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: int = 1,
    temperature: float | Tensor = 1.0,
    allowed: Tensor | None = None,
    **options: Any,
) -> Tensor | LinearLogprobs:
    """Log-probabilities of the tokens of completions, from the hidden states of the whole sequences.

    The result is aligned with `input_ids`: at [..., t] stands log p(input_ids[..., t]), for which the hidden state at
    t - shift is responsible; so masks need no shift of their own. Only positions that the mask names take part in any
    matrix product.

    Args:
        hidden: (B, T, H), or packed (N, H) with `cu_seqlens`; fp32, bf16, fp16 or fp64.
        head: the weight (V, H), a torch.nn.Linear, or one wrapped by PEFT (see `head_of`), whose adapter is never
            passed over.
        input_ids: (B, T) or (N,), int64 or int32. Where the mask is False they may hold anything.
        completion_mask: bool, of the same shape: True for the tokens whose log-probs are wanted. Tokens without a
            hidden state before them in their sequence, the first `shift`, have none.
        cu_seqlens: int32 (B + 1,), the boundaries of packed sequences.
        shift: how many positions before a token its hidden state stands: 1 for the hidden states of a causal language
            model, 0 if they have been shifted already.
        temperature: a positive number, or a tensor of the shape of `input_ids`: that of each token.
        allowed: packed sets of tokens as in `token_logprobs`: one for all, or one for each token of `input_ids`, that
            from which it came.
        options: `logit_scale`, `softcap`, `stats`, `process_group`, `memory_budget`, `skip_below`, `logits_dtype` of
            `linear_logprobs`; with a weight as head also `bias` and `lora`.

    Returns:
        log-probs of the shape of `input_ids`, 0 where the mask is False; with `stats`, a `LinearLogprobs` tuple, each
        statistic that of the distribution from which the token at its position came.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `linear_logprobs` and `head_of`.
    """
    _check(hidden, input_ids, completion_mask, cu_seqlens, shift)
    weight, bias, lora = head_of(head)
    if not isinstance(head, Tensor):
        given = [name for name in ("bias", "lora") if name in options]
        if given:
            raise TypeError(f"{given[0]} goes with a weight as head; {type(head).__name__} has its own")
        options |= {"bias": bias, "lora": lora}
    taken = [name for name in ("targets", "rows", "ignore_index") if name in options]
    if taken:
        raise TypeError(f"{taken[0]} is not an option here: it comes from input_ids and completion_mask")
    wanted = _predicted(completion_mask, cu_seqlens, shift)
    targets = torch.where(wanted, input_ids.long(), _IGNORED)
    if isinstance(temperature, Tensor):
        _checks.shape("temperature", temperature, input_ids.shape, "one temperature per token")
        temperature = _shifted(temperature, -shift, 1.0)
    if isinstance(allowed, Tensor) and allowed.dim() > 1:
        # sequences are along the last but one dimension
        allowed = _shifted(allowed.movedim(-1, 0), -shift, -1).movedim(0, -1)
    out = linear_logprobs(
        hidden,
        weight,
        _shifted(targets, -shift, _IGNORED),
        temperature=temperature,
        ignore_index=_IGNORED,
        allowed=allowed,
        **options,
    )
    if isinstance(out, Tensor):
        return _shifted(out, shift, 0)
    logprobs, *statistics = (
        None if t is None else _shifted(t, shift, -1 if name == "top1" else 0) for name, t in out._asdict().items()
    )
    assert logprobs is not None
    return LinearLogprobs(logprobs, *statistics)


def _shifted(t: Tensor, by: int, fill: float) -> Tensor:
    """t[..., i - by] at [..., i]; where there is none, `fill`."""
    by = max(-t.shape[-1], min(by, t.shape[-1]))
    return F.pad(t, (by, -by), value=fill) if by else t


def sequence_logprobs(
    hidden: Tensor,
    head: Tensor | nn.Module,
    input_ids: Tensor,
    completion_mask: Tensor,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    cu_seqlens: Tensor | None = None,
    shift: int = 1,
    **options: Any,
) -> Tensor:
    """Log-probability of each completion, (B,): the sum over its tokens, or their mean.

    Args:
        reduction: "sum", which preference objectives take, or "mean" over the tokens that have a log-prob. A sequence
            without any gives 0.
        cu_seqlens: int32 (B + 1,), the boundaries of packed sequences; without it, sequences are the rows of (B, T).
        hidden, head, input_ids, completion_mask, shift, options: as in `completion_logprobs`, but no `stats`.

    Returns:
        fp32 (B,), fp64 for fp64 input; summed in fp64.

    Raises:
        ValueError: `reduction` is neither; and as `completion_logprobs`.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    if "stats" in options:
        raise TypeError("stats are per token: completion_logprobs has them")
    logprobs = completion_logprobs(
        hidden, head, input_ids, completion_mask, cu_seqlens=cu_seqlens, shift=shift, **options
    )
    assert isinstance(logprobs, Tensor)

    def total(t: Tensor) -> Tensor:
        if cu_seqlens is None:
            return t.double().sum(1)
        # unlike index_add, in one order on every device
        return torch.segment_reduce(t.double(), "sum", offsets=cu_seqlens.long(), initial=0)

    sums = total(logprobs)
    if reduction == "mean":
        sums = sums / total(_predicted(completion_mask, cu_seqlens, shift)).clamp(min=1)
    return sums.to(logprobs.dtype)
