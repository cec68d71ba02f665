"""Log-probabilities and statistics of rows of logits, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
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


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    stats: tuple[str, ...] = (),
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
    logprobs = scaled.log_softmax(-1)
    taken = logprobs.gather(-1, torch.where(valid, ids, 0).long())
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
