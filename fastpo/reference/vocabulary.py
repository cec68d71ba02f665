"""Log-probabilities and statistics of rows of logits, in plain torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """What `token_logprobs` returns when statistics are asked for; those not asked for are None.

    Shapes: `logprobs` as the targets, the others as the logits without the vocabulary. `top1` is int64, the
    rest fp32 (fp64 for fp64 logits). Rows without a valid target hold 0, and -1 in `top1`.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    log_sum_p2: Tensor | None = None
    top1: Tensor | None = None


def pack_allowed(mask: Tensor) -> Tensor:
    """A bit per token, as `fastpo.pack_allowed` documents it."""
    vocabulary = mask.shape[-1]
    words = -(-vocabulary // 32)
    # by way of bytes, which take an eighth of what a word for every token would
    bits = F.pad(mask, (0, 32 * words - vocabulary)).view(*mask.shape[:-1], 4 * words, 8)
    place = torch.arange(8, dtype=torch.uint8, device=mask.device)
    octets = (bits.to(torch.uint8) << place).sum(-1, dtype=torch.uint8).view(*mask.shape[:-1], words, 4)
    shift = 8 * torch.arange(4, dtype=torch.int32, device=mask.device)
    return (octets.to(torch.int32) << shift).sum(-1, dtype=torch.int32)


def unpack_allowed(words: Tensor, vocabulary: int) -> Tensor:
    """bool (..., vocabulary) of words (..., W), where 32 W is at least `vocabulary`."""
    bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return (bits != 0).flatten(-2)[..., :vocabulary]


def are_allowed(words: Tensor, ids: Tensor) -> Tensor:
    """Which of ids (..., K), none of them behind the words, are in the sets: words (W,) for all rows, or (..., W)."""
    ids = ids.long()
    word = words[ids // 32] if words.dim() == 1 else words.gather(-1, ids // 32)
    return (word >> (ids % 32).to(torch.int32) & 1) != 0


def any_allowed(words: Tensor, vocabulary: int) -> Tensor:
    """Which sets (..., W) are not empty."""
    if vocabulary == 0:
        return torch.zeros(words.shape[:-1], dtype=torch.bool, device=words.device)
    # bits behind the vocabulary say nothing
    last = words[..., -1] & (-1 if vocabulary % 32 == 0 else (1 << vocabulary % 32) - 1)
    rest = words[..., :-1]
    return (last != 0) if rest.shape[-1] == 0 else (last != 0) | (rest.amax(-1) != 0) | (rest.amin(-1) != 0)


def count_allowed(words: Tensor, vocabulary: int) -> Tensor:
    """How many of the first tokens, `vocabulary` of them, each set (..., W) holds."""
    bits = words.long() & 0xFFFFFFFF
    if vocabulary % 32:
        bits[..., -1] &= (1 << vocabulary % 32) - 1
    # of pairs, of fours, of eights, of all
    bits = bits - (bits >> 1 & 0x55555555)
    bits = (bits & 0x33333333) + (bits >> 2 & 0x33333333)
    bits = bits + (bits >> 4) & 0x0F0F0F0F
    return (bits * 0x01010101 >> 24 & 0xFF).sum(-1)


def top_p_allowed(
    logits: Tensor, top_p: float, *, min_tokens: int = 1, always: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """The packed set, as `fastpo.top_p_allowed` documents it; `always` is (..., K)."""
    order = logits.sort(dim=-1, descending=True, stable=True)
    probability = order.values.double().softmax(-1)
    # what the tokens before one have together; of all together 1 need not come out
    before = probability.cumsum(-1) - probability
    kept = (order.values > -torch.inf) if top_p == 1 else before < top_p
    kept = kept | (torch.arange(logits.shape[-1], device=logits.device) < min_tokens)
    mask = torch.zeros_like(kept).scatter_(-1, order.indices, kept)
    if always is not None:
        valid = always != ignore_index
        # an id that is none adds nothing: it names the most likely token, which is there
        ids = torch.where(valid, always.long(), order.indices[..., :1])
        mask.scatter_(-1, ids, True)
    return pack_allowed(mask)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    stats: tuple[str, ...] = (),
    allowed: Tensor | None = None,
) -> TokenLogprobs:
    """log softmax(logits / temperature) at the targets, as `fastpo.token_logprobs` documents it."""
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    many = targets.dim() == logits.dim()
    ids = targets if many else targets.unsqueeze(-1)
    valid = ids != ignore_index
    row = valid.any(-1, keepdim=True)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(accumulate).unsqueeze(-1)
        temperature = torch.where(row, temperature, 1)
    # rows that nobody asks about may hold anything: they are replaced, not multiplied away
    scaled = torch.where(row, logits.to(accumulate), 0) / temperature
    known = torch.where(valid, ids, 0).long()
    if allowed is not None:
        scaled = torch.where(unpack_allowed(allowed, logits.shape[-1]) | ~row, scaled, -torch.inf)
    logprobs = scaled.log_softmax(-1)
    taken = logprobs.gather(-1, known)
    if allowed is not None:
        # that of a token outside is -inf whatever the logits are: it has no gradient
        taken = torch.where(are_allowed(allowed, known), taken, taken.detach())
    taken = torch.where(valid, taken, 0)
    keep = row.squeeze(-1)

    def entropy() -> Tensor:
        # 0 · -inf: an impossible token adds nothing
        p = logprobs.exp()
        return -torch.where(p == 0, 0, p * torch.where(p == 0, 0, logprobs)).sum(-1)

    compute = {
        "entropy": entropy,
        "logsumexp": lambda: scaled.logsumexp(-1),
        "log_sum_p2": lambda: (2 * logprobs.detach()).logsumexp(-1),
        "top1": lambda: scaled.argmax(-1),
    }
    found = {name: torch.where(keep, compute[name](), -1 if name == "top1" else 0) for name in stats}
    return TokenLogprobs(taken if many else taken.squeeze(-1), **found)


def _both_logprobs(
    logits: Tensor, reference_logits: Tensor, mask: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """log softmax of both streams, in the accumulator's dtype."""
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    divisor = temperature.to(accumulate).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature

    def logprobs(x: Tensor) -> Tensor:
        x = x.to(accumulate)
        # rows that nobody asks about may hold anything: they are replaced, not multiplied away
        x = x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)
        return (x / divisor).log_softmax(-1)

    return logprobs(logits), logprobs(reference_logits)


def _expected_difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p - log q), where 0 · anything is 0."""
    p = log_p.exp()
    none = p == 0
    return torch.where(none, 0, p * (torch.where(none, 0, log_p) - torch.where(none, 0, log_q))).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q)."""
    # logaddexp has no gradient where both are impossible
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_p, log_q = (torch.where(neither, 0, log) for log in (log_p, log_q))
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def token_kl(
    logits: Tensor,
    reference_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    direction: str = "forward",
    skew: float = 0.0,
) -> Tensor:
    """The Kullback-Leibler divergence of every row, as `fastpo.token_kl` documents it."""
    log_q, log_p = _both_logprobs(logits, reference_logits, mask, temperature)
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    if skew:
        kl = _expected_difference(log_p, _log_mixture(log_p, log_q, skew))
        return kl if mask is None else torch.where(mask, kl, 0)
    kl = _expected_difference(log_p, log_q)
    # infinite also where what p can draw and q cannot has less than the dtype's least number
    impossible = ((log_p.exp() == 0) & (log_p > -torch.inf) & (log_q == -torch.inf)).any(-1)
    kl = kl + torch.where(impossible, torch.inf, 0.0)
    return kl if mask is None else torch.where(mask, kl, 0)


def token_jsd(
    logits: Tensor,
    reference_logits: Tensor,
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """The generalised Jensen-Shannon divergence of every row, as `fastpo.token_jsd` documents it."""
    log_q, log_p = _both_logprobs(logits, reference_logits, mask, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    jsd = beta * _expected_difference(log_p, log_m) + (1 - beta) * _expected_difference(log_q, log_m)
    return jsd if mask is None else torch.where(mask, jsd, 0)


def token_tv(
    logits: Tensor,
    reference_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """The total variation distance of every row, as `fastpo.token_tv` documents it."""
    log_q, log_p = _both_logprobs(logits, reference_logits, mask, temperature)
    # the derivative of |0| is 0
    tv = (log_q.exp() - log_p.exp()).abs().sum(-1) / 2
    return tv if mask is None else torch.where(mask, tv, 0)


def token_alpha_divergence(
    logits: Tensor,
    reference_logits: Tensor,
    *,
    alpha: float = 0.5,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """The α-divergence of every row, α not 0 or 1, as `fastpo.token_alpha_divergence` documents it."""
    log_q, log_p = _both_logprobs(logits, reference_logits, mask, temperature)
    if alpha > 0.5:
        log_p, log_q, alpha = log_q, log_p, 1 - alpha
    # p^α q^(1 - α) - q, which is nothing where p and q are, and has the digits of α log(p / q) where that is small
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_p, log_q = (torch.where(neither, 0, log) for log in (log_p, log_q))
    small = (alpha * (log_p - log_q)).abs() < 1
    near = log_q.exp() * torch.expm1(alpha * torch.where(small, log_p - log_q, 0))
    far = (alpha * log_p + (1 - alpha) * log_q).exp() - log_q.exp()
    terms = torch.where(neither, 0, torch.where(small, near, far))
    divergence = terms.sum(-1) / (alpha * (alpha - 1))
    return divergence if mask is None else torch.where(mask, divergence, 0)


class LinearLogprobs(NamedTuple):
    """What `linear_logprobs` returns when statistics are asked for; those not asked for are None.

    As `TokenLogprobs`, and `mean_logit`, the mean over the vocabulary, or over the allowed part of it, of the numbers
    whose softmax is taken.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    log_sum_p2: Tensor | None = None
    top1: Tensor | None = None
    mean_logit: Tensor | None = None


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """cap · tanh(scale · (hidden weightᵀ + bias) / cap), in fp32 (fp64 for fp64 input); without a cap, its argument.

    An adapter (A, B, s) on the head makes the weight weight + s B A.
    """
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    bias = None if bias is None else bias.to(accumulate)
    hidden = hidden.to(accumulate)
    logits = F.linear(hidden, weight.to(accumulate), bias)
    if lora is not None:
        a, b, scaling = lora
        logits = logits + scaling * F.linear(F.linear(hidden, a.to(accumulate)), b.to(accumulate))
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    stats: tuple[str, ...] = (),
    lora: tuple[Tensor, Tensor, float] | None = None,
    allowed: Tensor | None = None,
) -> LinearLogprobs:
    """`token_logprobs` of a head's logits, as `fastpo.linear_logprobs` documents it."""
    many = targets.dim() == hidden.dim()
    row = ((targets if many else targets.unsqueeze(-1)) != ignore_index).any(-1)
    # rows that nobody asks about may hold anything
    hidden = torch.where(row.unsqueeze(-1), hidden, 0)
    logits = head_logits(hidden, weight, bias, logit_scale=logit_scale, softcap=softcap, lora=lora)
    rest = tuple(name for name in stats if name != "mean_logit")
    out = token_logprobs(
        logits, targets, temperature=temperature, ignore_index=ignore_index, stats=rest, allowed=allowed
    )
    mean = None
    if "mean_logit" in stats:
        divisor = temperature.to(logits.dtype) if isinstance(temperature, Tensor) else temperature
        mean = logits.detach().mean(-1)
        if allowed is not None:
            among = unpack_allowed(allowed, logits.shape[-1])
            mean = torch.where(among, logits.detach(), 0).sum(-1) / among.sum(-1)
        mean = torch.where(row, mean / divisor, 0)
    return LinearLogprobs(*out, mean)
