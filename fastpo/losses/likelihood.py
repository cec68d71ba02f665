"""Weighted and masked likelihood: demonstrations that are imitated as far as they are good, or unlearnt."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.objective import mean_denominator
from fastpo.kernels.token_logprobs import token_logprobs
from fastpo.losses._tokens import check_layout, check_like, check_mask, counted, number_in, tokens
from fastpo.reference.sequence import sequence_sum

Average = Literal["token_mean", "seq_mean"]


class LikelihoodOutput(NamedTuple):
    """What an objective of weighted likelihood returns; 0-dimensional.

    Attributes:
        loss: the only differentiable field.
        nll: the unweighted mean of -log p over the tokens that count, as for a perplexity.
        mean_weight: the mean weight of these tokens.
    """

    loss: Tensor
    nll: Tensor
    mean_weight: Tensor


class AwrOutput(NamedTuple):
    """What `awr` returns; 0-dimensional.

    Attributes:
        loss: the only differentiable field.
        nll, mean_weight: as in LikelihoodOutput.
        value_loss: the mean of (R - V)².
    """

    loss: Tensor
    nll: Tensor
    mean_weight: Tensor
    value_loss: Tensor


def _over(total: Tensor, count: Tensor, num_items: float | Tensor | None, like: Tensor) -> Tensor:
    """A sum over its number, or over that of the whole batch."""
    denominator = mean_denominator("mean", num_items, 1, like, "logprobs")
    if isinstance(num_items, Tensor):
        return total / num_items.to(total.dtype)
    return total / (count.clamp(min=1) if denominator is None else denominator)


class _Batch(NamedTuple):
    """Checked log-probs: themselves, 0 where they do not count; which count; their layout."""

    logprobs: Tensor
    counts: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    rows: int
    given: Tensor

    def spread(self, name: str, value: Tensor) -> Tensor:
        """A constant per token, or one per sequence, (B,), for each of its tokens; 0 where they do not count."""
        _checks.tensor(name, value, _checks.FLOATS)
        _checks.same_device(name, value, "logprobs", self.given)
        # per sequence, also where there are as many tokens
        if value.dim() == 1 and len(value) == self.rows:
            row = tokens(self.given, self.mask, self.cu_seqlens).row
            value = torch.cat([value, value.new_zeros(1)])[row].view_as(self.given)
        else:
            _checks.shape(name, value, self.given.shape, f"it must match logprobs, or be ({self.rows},)")
        dtype = torch.promote_types(self.logprobs.dtype, value.dtype)
        return torch.where(self.counts, value.to(dtype), 0)

    def mean(self, values: Tensor, num_items: float | Tensor | None = None) -> Tensor:
        return _over(values.sum(), self.counts.sum(), num_items, self.given)

    def sums(self, values: Tensor) -> Tensor:
        return sequence_sum(values, self.mask, self.cu_seqlens)[0]


def _batch(logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> _Batch:
    rows = check_layout("logprobs", logprobs, mask, cu_seqlens)
    counts = counted(mask, logprobs, cu_seqlens)
    values = torch.where(counts, logprobs.to(torch.promote_types(logprobs.dtype, torch.float32)), 0)
    return _Batch(values, counts, mask, cu_seqlens, rows, logprobs)


def _output(loss: Tensor, batch: _Batch, weight: Tensor) -> LikelihoodOutput:
    return LikelihoodOutput(loss, batch.mean(-batch.logprobs.detach()), batch.mean(weight))


def sft(
    logprobs: Tensor,
    weights: Tensor | None = None,
    *,
    average: Average = "token_mean",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: float | Tensor | None = None,
) -> LikelihoodOutput:
    """The mean of -w log p over tokens; or, over sequences, of Σ -w log p / Σ w.

    The first without weights is PHF's MLE, on `conditional_tokens` its conditional training, and under
    `document_filter` its filtering. The second is what `tl_token_weights` are for.

    Source: PHF, arXiv:2302.08582, §2; TL-Training, arXiv:2412.15495, whose code has one sample per batch.

    Args:
        logprobs: of the demonstrations' tokens, fp32, bf16, fp16 or fp64: padded (B, T), or packed (N,) with
            cu_seqlens.
        weights: in the shape of logprobs, or (B,); constants of at least 0. None: 1.
        average: "token_mean", over the tokens that count, whatever they weigh; "seq_mean", over sequences of the mean
            by weight. A sequence without weight has the loss 0, and counts.
        mask: bool, of the shape of logprobs, True where a token counts. What stands elsewhere has no influence, NaN
            included.
        cu_seqlens: int32 (B + 1,), boundaries of the packed sequences.
        num_items: the denominator instead of the batch's own (a number or 0-dimensional tensor): tokens, or sequences,
            of the whole batch, so that micro-batches and ranks add up to one gradient.

    Returns:
        LikelihoodOutput, fp32 (fp64 for fp64 input).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes or devices do not match, average is unknown, or a weight is negative.
    """
    batch = _batch(logprobs, mask, cu_seqlens)
    if average not in ("token_mean", "seq_mean"):
        raise ValueError(f"average must be 'token_mean' or 'seq_mean', got {average!r}")
    given = batch.counts.to(batch.logprobs.dtype) if weights is None else batch.spread("weights", weights.detach())
    if _checks.readable(given) and bool((given < 0).any()):
        raise ValueError("weights must be at least 0")
    each = -given * batch.logprobs
    if average == "token_mean":
        return _output(batch.mean(each, num_items), batch, given)
    weight = batch.sums(given)
    ratio = torch.where(weight > 0, batch.sums(each) / torch.where(weight > 0, weight, 1), 0)
    count = torch.tensor(batch.rows, device=ratio.device)
    return _output(_over(ratio.sum(), count, num_items, logprobs), batch, given)


def _log_complement(logprobs: Tensor, floor: float) -> Tensor:
    """log max(1 - p, floor) to all digits of log p, with no gradient where the floor is."""
    saturated = -torch.expm1(logprobs) <= floor
    inside = torch.where(saturated, -1.0, logprobs)
    near = inside > -math.log(2)
    # each form where it keeps its digits, and where its gradient is finite
    large = torch.log(-torch.expm1(torch.where(near, inside, -0.5)))
    small = torch.log1p(-torch.exp(torch.where(near, -1.0, inside)))
    return torch.where(saturated, math.log(floor), torch.where(near, large, small))


def unlikelihood(
    logprobs: Tensor,
    scores: Tensor,
    *,
    threshold: float | None = 5.6e-4,
    alpha: float = 1.0,
    floor: float = 1e-20,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: float | Tensor | None = None,
) -> LikelihoodOutput:
    """The mean of -log p where the score is at most the threshold, and -α log max(1 - p, floor) above it.

    Where good and bad tokens come with weights g and b, p is where g/p - α b/(1 - p) is the same for all good ones, and
    what is only bad goes to 0.

    Source: PHF, arXiv:2302.08582, §2, whose code takes a threshold of 0 for none.

    Args:
        logprobs, mask, cu_seqlens, num_items: as in `sft`.
        scores: of the predicted tokens, how bad they are; in the shape of logprobs, or (B,); constants.
        threshold: the paper's for toxicity. None: (1 - s) of the first and s of the second, scores in [0, 1].
        alpha: at least 0; the paper's are 1, and 0.01 for PEP8.
        floor: in (0, 1); at p above 1 - floor there is no gradient.

    Returns:
        LikelihoodOutput; its weights are the shares of the first.

    Raises:
        TypeError, ValueError: as `sft`; or a number or a score is outside its domain.
    """
    batch = _batch(logprobs, mask, cu_seqlens)
    number_in("alpha", alpha, 0, math.inf, closed="low")
    number_in("floor", floor, 0, 1)
    bad = batch.spread("scores", scores.detach())
    if threshold is None:
        if _checks.readable(bad) and not bool(((bad >= 0) & (bad <= 1)).all()):
            raise ValueError("scores must be in [0, 1] without a threshold")
        good = 1 - bad
    else:
        good = (bad <= number_in("threshold", threshold, -math.inf, math.inf)).to(batch.logprobs.dtype)
    good = torch.where(batch.counts, good, 0)
    each = -good * batch.logprobs - alpha * (1 - good) * _log_complement(batch.logprobs, floor)
    return _output(batch.mean(torch.where(batch.counts, each, 0), num_items), batch, good)


def sequence_unlikelihood(
    logprobs: Tensor,
    repeats: Tensor,
    *,
    floor: float = 1e-20,
    average: Literal["token_mean", "sum"] = "token_mean",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: float | Tensor | None = None,
) -> LikelihoodOutput:
    """-log max(1 - p, floor) of the tokens of the model's own continuations that repeat, over the number of all tokens.

    Source: Neural text generation with unlikelihood training, arXiv:1908.04319, Eq. 7 (its number is from memory).

    Args:
        logprobs, mask, cu_seqlens, num_items: as in `sft`; num_items is of "token_mean".
        repeats: bool, of the shape of logprobs, as from `repeated_ngrams`.
        floor: as in `unlikelihood`.
        average: "token_mean", over all tokens that count, as in the official code; or "sum".

    Returns:
        LikelihoodOutput; its weights are 1 for the repeats.

    Raises:
        TypeError, ValueError: as `sft`; or num_items with "sum".
    """
    batch = _batch(logprobs, mask, cu_seqlens)
    number_in("floor", floor, 0, 1)
    check_mask("repeats", repeats, "logprobs", logprobs)
    if average not in ("token_mean", "sum"):
        raise ValueError(f"average must be 'token_mean' or 'sum', got {average!r}")
    if average == "sum" and num_items is not None:
        raise ValueError("num_items is the denominator of average='token_mean', got average='sum'")
    chosen = batch.counts & repeats
    each = torch.where(chosen, -_log_complement(batch.logprobs, floor), 0)
    loss = each.sum() if average == "sum" else batch.mean(each, num_items)
    return _output(loss, batch, chosen.to(each.dtype))


def token_unlikelihood(
    logits: Tensor,
    targets: Tensor,
    candidates: Tensor,
    *,
    alpha: float = 1.0,
    floor: float = 1e-5,
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
) -> LikelihoodOutput:
    """The mean over tokens of -log p(y_t) + α Σ_(c in C_t) -log max(1 - p(c), floor), in one pass over the logits.

    Source: arXiv:1908.04319, Eq. 4 (its number is from memory); the floor is the official code's, whose candidates leak
    from one sequence of a batch into the next.

    Args:
        logits: (..., V), fp32, bf16, fp16 or fp64.
        targets: int64 or int32 (...), the next tokens; ignore_index for none.
        candidates: of the dtype of targets, (..., K), what is not to be said here; ignore_index for none.
            `previous_tokens` are the paper's.
        alpha: at least 0.
        floor: in (0, 1).
        ignore_index: as in `fastpo.token_logprobs`.
        num_items: the number of targets of the whole batch, instead of this one's.

    Returns:
        LikelihoodOutput, fp32 (fp64 for fp64 input); its weights are the numbers of candidates.

    Raises:
        TypeError, ValueError, IndexError: as `fastpo.token_logprobs`; or a number is outside its domain.
    """
    number_in("alpha", alpha, 0, math.inf, closed="low")
    number_in("floor", floor, 0, 1)
    _checks.tensor("logits", logits, _checks.FLOATS)
    _checks.tensor("targets", targets, _checks.INTEGERS)
    _checks.tensor("candidates", candidates, (targets.dtype,))
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}, expected {tuple(logits.shape[:-1])} for logits")
    if candidates.shape[:-1] != targets.shape or candidates.dim() != targets.dim() + 1:
        raise ValueError(
            f"candidates has shape {tuple(candidates.shape)}, expected {(*targets.shape, 'K')} for targets"
        )
    counts = targets != ignore_index
    banned = torch.where(counts[..., None], candidates, ignore_index)
    found = token_logprobs(logits, torch.cat([targets[..., None], banned], -1), ignore_index=ignore_index)
    there = banned != ignore_index
    return unlikely_tokens(found[..., 0], found[..., 1:], there, counts, alpha=alpha, floor=floor, num_items=num_items)


def unlikely_tokens(
    chosen: Tensor,
    others: Tensor,
    there: Tensor,
    counts: Tensor | None = None,
    *,
    alpha: float = 1.0,
    floor: float = 1e-5,
    num_items: float | Tensor | None = None,
) -> LikelihoodOutput:
    """`token_unlikelihood` from log-probs: of the targets (...), and of the candidates (..., K) that are `there`.

    Targets outside `counts` have the log-prob 0 and no candidates.
    """
    pushed = torch.where(there, -_log_complement(torch.where(there, others, -1.0), floor), 0).sum(-1)
    number = torch.tensor(chosen.numel(), device=chosen.device) if counts is None else counts.sum()
    loss = _over((-chosen + alpha * pushed).sum(), number, num_items, chosen)
    total = (-chosen.detach()).sum() / number.clamp(min=1)
    return LikelihoodOutput(loss, total, (there.sum() / number.clamp(min=1)).to(loss.dtype))


def _exp_weight(advantages: Tensor, beta: float, max_weight: float) -> Tensor:
    """min(e^(A/β), max), without overflow."""
    return (advantages / beta).clamp(max=math.log(max_weight)).exp()


def rwr(
    logprobs: Tensor,
    rewards: Tensor,
    *,
    beta: float = 10.0,
    max_weight: float = 1000.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: float | Tensor | None = None,
) -> LikelihoodOutput:
    """Reward-weighted regression: the mean of -w log p, w = min(e^(R/β), max_weight); it leads to data · w / Z.

    Source: PHF, arXiv:2302.08582, §2. Its code is AWR with a value head as initialised, V = -1/2, which is a factor.

    Args:
        logprobs, mask, cu_seqlens, num_items: as in `sft`.
        rewards: in the shape of logprobs, or (B,), minus the scores of misalignment; constants.
        beta, max_weight: positive and finite.

    Returns:
        LikelihoodOutput.

    Raises:
        TypeError, ValueError: as `sft`; or a number is outside its domain.
    """
    number_in("beta", beta, 0, math.inf)
    number_in("max_weight", max_weight, 0, math.inf)
    batch = _batch(logprobs, mask, cu_seqlens)
    weight = torch.where(batch.counts, _exp_weight(batch.spread("rewards", rewards.detach()), beta, max_weight), 0)
    return _output(batch.mean(-weight * batch.logprobs, num_items), batch, weight)


def awr(
    logprobs: Tensor,
    values: Tensor,
    rewards: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 10.0,
    max_weight: float = 1000.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: float | Tensor | None = None,
) -> AwrOutput:
    """Advantage-weighted regression: α mean(-w log p) + (1 - α) mean((R - V)²), w = min(e^((R - V)/β), max_weight).

    The weight is constant and is not normalised. Where V is the mean reward, it leads to data · w / Z.

    Source: PHF, arXiv:2302.08582, §2; (α, β) of its appendix: (0.5, 10) for toxicity, (0.05, 1) for PEP8, (0.5, 0.1)
    for PII.

    Args:
        logprobs, rewards, mask, cu_seqlens, num_items: as in `rwr`.
        values: of the state in which each token is chosen, laid out as logprobs; differentiable.
        alpha: in [0, 1].
        beta, max_weight: positive and finite.

    Returns:
        AwrOutput.

    Raises:
        TypeError, ValueError: as `rwr`.
    """
    number_in("alpha", alpha, 0, 1, closed="both")
    number_in("beta", beta, 0, math.inf)
    number_in("max_weight", max_weight, 0, math.inf)
    batch = _batch(logprobs, mask, cu_seqlens)
    check_like("values", values, "logprobs", logprobs)
    reward = batch.spread("rewards", rewards.detach())
    value = torch.where(batch.counts, values.to(torch.promote_types(values.dtype, reward.dtype)), 0)
    weight = torch.where(batch.counts, _exp_weight(reward - value.detach(), beta, max_weight), 0)
    regression = batch.mean((reward - value).square(), num_items)
    loss = alpha * batch.mean(-weight * batch.logprobs, num_items) + (1 - alpha) * regression
    own = batch.mean((reward - value).detach().square())
    return AwrOutput(loss, batch.mean(-batch.logprobs.detach()), batch.mean(weight), own)


def chain_of_hindsight(
    logprobs: Tensor,
    pretraining_logprobs: Tensor | None = None,
    *,
    weight: float = 1.5,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    pretraining_mask: Tensor | None = None,
    num_items: float | Tensor | None = None,
) -> LikelihoodOutput:
    """The mean over rows of the mean -log p of the model's outputs, and weight times that of tokens of pretraining.

    A row is "prompt, feedback phrase, output, feedback phrase, output"; the mask is True on the outputs alone. A row
    without any has the loss 0, and counts. `forgetful_mask` hides past tokens from the attention.

    Source: Chain of hindsight, arXiv:2302.02676, and its code; the paper's weight is from memory, its code's is 0.01.

    Args:
        logprobs, mask, cu_seqlens: as in `sft`.
        pretraining_logprobs: of the tokens of other texts, (B, T) or (N,), under pretraining_mask.
        weight: at least 0.
        num_items: the number of rows of the whole batch, instead of this one's.

    Returns:
        LikelihoodOutput; nll and weight are those of the first term.

    Raises:
        TypeError, ValueError: as `sft`.
    """
    number_in("weight", weight, 0, math.inf, closed="low")
    out = sft(logprobs, average="seq_mean", mask=mask, cu_seqlens=cu_seqlens, num_items=num_items)
    if pretraining_logprobs is None:
        if pretraining_mask is not None:
            raise ValueError("pretraining_mask is given without pretraining_logprobs")
        return out
    text = _checks.tensor("pretraining_logprobs", pretraining_logprobs, _checks.FLOATS)
    counts = torch.ones_like(text, dtype=torch.bool) if pretraining_mask is None else pretraining_mask
    check_mask("pretraining_mask", counts, "pretraining_logprobs", text)
    wide = torch.where(counts, text.to(torch.promote_types(text.dtype, torch.float32)), 0)
    return out._replace(loss=out.loss - weight * wide.sum() / counts.sum().clamp(min=1))


class RegretOutput(NamedTuple):
    """What `regret_loss` returns.

    Attributes:
        loss: 0-dimensional; differentiable.
        regrets: (N,), R_j of each sequence.
        weights: (N,), what each counts in the loss, softmax(k R).
    """

    loss: Tensor
    regrets: Tensor
    weights: Tensor


def regret_loss(loss_vectors: Tensor, policies: Tensor, *, k: float = 1.0, mask: Tensor | None = None) -> RegretOutput:
    """Σ_j softmax(k R)_j max(0, R_j)², R = Σ_t ⟨ℓ_t, π_t⟩ - min_a Σ_t ℓ_ta: the regret of the worst sequences.

    π_t must be a prediction from ℓ before t alone. The larger k, the more it is the largest regret.

    Source: Do LLM agents have regret?, arXiv:2403.16843; this f = e^(kR) and h = max(0, R)² are examples of its class,
    from memory.

    Args:
        loss_vectors: ℓ (N, T, d), d > 0; constants.
        policies: π (N, T, d), distributions over the last dimension; differentiable.
        k: at least 0.
        mask: bool (N, T), which rounds were played.

    Returns:
        RegretOutput, fp32 (fp64 for fp64 input).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes or devices do not match, there is no sequence, k is negative, or a policy has a negative
            probability or does not sum to 1 (to 1/100).
    """
    number_in("k", k, 0, math.inf, closed="low")
    _checks.tensor("loss_vectors", loss_vectors, _checks.FLOATS)
    if loss_vectors.dim() != 3 or 0 in (loss_vectors.shape[0], loss_vectors.shape[2]):
        raise ValueError(f"loss_vectors has shape {tuple(loss_vectors.shape)}, expected (N, T, d), N and d positive")
    check_like("policies", policies, "loss_vectors", loss_vectors)
    played = torch.ones(loss_vectors.shape[:2], dtype=torch.bool, device=loss_vectors.device) if mask is None else mask
    check_mask("mask", played, "the rounds of loss_vectors", loss_vectors[..., 0])
    dtype = torch.promote_types(torch.promote_types(loss_vectors.dtype, policies.dtype), torch.float32)
    cost = torch.where(played[..., None], loss_vectors.detach().to(dtype), 0)
    pi = torch.where(played[..., None], policies.to(dtype), 0)
    if _checks.readable(pi):
        whole = pi.detach().sum(-1)
        if bool((pi < 0).any()) or bool((played & ((whole - 1).abs() > 1e-2)).any()):
            raise ValueError("policies must be distributions: at least 0, and 1 in sum over the last dimension")
    regrets = (cost * pi).sum((1, 2)) - cost.sum(1).amin(-1)
    # with its gradient: the weights are part of the loss
    weights = torch.softmax(k * regrets, 0)
    return RegretOutput((weights * regrets.clamp(min=0).square()).sum(), regrets.detach(), weights.detach())
