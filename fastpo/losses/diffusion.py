"""Policy optimisation of masked-diffusion language models: their likelihood estimated, then a policy objective on it.

Estimates of the policy, the old one and the reference must see the same masks: noise once, and evaluate each model on
that.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.policy import PolicyGradientOutput
from fastpo.losses import _policy
from fastpo.losses._tokens import check_mask, check_rows, number_in, reducer
from fastpo.reference.policy import policies


class ElboNodes(NamedTuple):
    """Times t in (0, 1) at which a sequence is noised, and their weights, fp64 (n,)."""

    times: Tensor
    weights: Tensor


class Noised(NamedTuple):
    """Sequences of which a part is hidden, (n, B, T).

    Attributes:
        tokens: the input of the model.
        masked: bool, what is hidden, and is to be predicted.
    """

    tokens: Tensor
    masked: Tensor


# built here: torch.compile does not trace the building of a function
_PPO, _GRPO = (_policy.build(row) for name in ("ppo", "grpo") for row in policies() if row.name == name)


def _number(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def elbo_nodes(n: int = 2) -> ElboNodes:
    """Gauss and Legendre's nodes and weights on [0, 1]: exact for polynomials in t of degree 2n - 1.

    They never touch t = 0, where the 1/t of the bound is infinite. Two or three take most of the variance that a random
    time has.

    Source: GDPO (2510.08554), which takes 2 or 3; the nodes by G. H. Golub and J. H. Welsch (1969).
    """
    k = torch.arange(1, _number("n", n), dtype=torch.float64)
    beside = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return ElboNodes((nodes + 1) / 2, vectors[0].square())


def noise_tokens(
    tokens: Tensor,
    times: Tensor,
    mask_id: int,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Noised:
    """Hide max(1, round(t L)) of the L tokens that count, drawn uniformly, for each time.

    A fixed number has less variance than one coin per token. Times may repeat, for several masks each.

    Args:
        tokens: int64 or int32 (B, T), prompt and completion.
        times: (n,), in [0, 1], as of `elbo_nodes`.
        mask_id: what stands for a hidden token.
        mask: bool (B, T), True on the completion; nothing else is hidden. A row without any stays as it is.
        generator: draws the masks; the same seed gives the same.

    Returns:
        Noised.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or a time outside [0, 1].

    Source: GDPO (2510.08554).
    """
    _checks.tensor("tokens", tokens, _checks.INTEGERS)
    _checks.tensor("times", times, _checks.FLOATS)
    if tokens.dim() != 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected (B, T)")
    if times.dim() != 1 or not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(f"times must be (n,) in [0, 1], got shape {tuple(times.shape)}")
    counts = torch.ones_like(tokens, dtype=torch.bool) if mask is None else check_mask("mask", mask, "tokens", tokens)
    length = counts.sum(1)
    hidden = (times.double().to(tokens.device)[:, None] * length).round().clamp(min=1)
    keys = torch.rand((len(times), *tokens.shape), generator=generator, dtype=torch.float64, device=tokens.device)
    # what does not count comes last
    order = torch.where(counts, keys, 2.0).argsort(-1)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(tokens.shape[1], device=order.device).expand_as(order)
    )
    masked = counts & (rank < hidden[..., None])
    return Noised(torch.where(masked, mask_id, tokens), masked)


def elbo(
    logprobs: Tensor,
    masked: Tensor,
    nodes: ElboNodes,
    *,
    rate: Literal["time", "count"] = "time",
    mask: Tensor | None = None,
) -> Tensor:
    """Σ_n w_n (1/t_n) Σ_(i masked) log p(y_i | y noised at t_n): an estimate of the bound on log p(y).

    Args:
        logprobs: (n, B, T), of the true tokens, each under the model's input at that time, fp32, bf16, fp16 or fp64;
            differentiable.
        masked: bool (n, B, T), as `noise_tokens` gives it; what is not has no influence, NaN included.
        nodes: of the n times.
        rate: "time", 1/t, the paper's; "count", L over the number that was hidden, which is right also where t L is far
            from whole, as in short sequences.
        mask: bool (B, T), the tokens that L counts, with "count"; None: all.

    Returns:
        (B,), fp32 (fp64 for fp64 input). A sequence without hidden tokens has 0.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or a time that is not positive.

    Source: GDPO (2510.08554).
    """
    _checks.tensor("logprobs", logprobs, _checks.FLOATS)
    if logprobs.dim() != 3:
        raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}, expected (n, B, T)")
    check_mask("masked", masked, "logprobs", logprobs)
    for name, value in zip(("nodes.times", "nodes.weights"), nodes, strict=True):
        _checks.tensor(name, value, _checks.FLOATS)
        _checks.shape(name, value, logprobs.shape[:1], "one per time, the first dimension of logprobs")
    if rate not in ("time", "count"):
        raise ValueError(f"rate must be 'time' or 'count', got {rate!r}")
    times, weights = (t.to(device=logprobs.device, dtype=torch.float64) for t in nodes)
    if _checks.readable(times) and not bool((times > 0).all()):
        raise ValueError("nodes.times must be positive: the bound has 1/t")
    total = torch.where(masked, logprobs.to(torch.promote_types(logprobs.dtype, torch.float32)), 0).sum(2)
    factor = (weights / times)[:, None]
    if rate == "count":
        if mask is not None:
            check_mask("mask", mask, "the rows of logprobs", logprobs[0])
        length = logprobs.shape[2] if mask is None else mask.sum(1)
        factor = weights[:, None] * length / masked.sum(2).clamp(min=1)
    elif mask is not None:
        raise ValueError("mask is of rate='count', got rate='time'")
    return (factor.to(total.dtype) * total).sum(0)


def diffusion_gdpo(
    elbos: Tensor,
    advantages: Tensor,
    old_elbos: Tensor | None,
    lengths: Tensor,
    *,
    reference_elbos: Tensor | None = None,
    epsilon: float = 0.2,
    beta: float = 0.0,
    kl: Literal["k1", "k2", "k3"] = "k3",
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: float | Tensor | None = None,
) -> PolicyGradientOutput:
    """-min(r A, clip(r, 1 - ε, 1 + ε) A)/|y| with r = e^(ELBO - old ELBO) of the sequence, and a penalty.

    It is PPO's formula with a sequence as its only token. The ratio has no mean over the length; the penalty is divided
    by the length as well, which the paper's formula leaves open. Advantages are r - mean of the group, without its
    deviation: `fastpo.advantages.dr_grpo`. The GDPO of 2026 is another method: `fastpo.rewards.multi_objective`.

    Source: Group diffusion policy optimization, GDPO (2510.08554), partly verified; ε and β are not.

    Args:
        elbos: (B,), as `elbo` gives them; differentiable.
        advantages: (B,), constants.
        old_elbos: (B,), of the policy at the begin of the update, on the same masks; constants. None: the ratio is 1.
        lengths: int (B,), |y|; a sequence of no length has the loss 0.
        reference_elbos: (B,), of the reference model, for the penalty; constants.
        epsilon: at least 0.
        beta, kl: of the penalty, as in `fastpo.losses.ppo`.
        reduction, num_items: as in `fastpo.losses.dpo`.

    Returns:
        PolicyGradientOutput, fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: as `fastpo.losses.ppo`; or shapes that do not match.
    """
    _checks.tensor("elbos", elbos, _checks.FLOATS)
    if elbos.dim() != 1:
        raise ValueError(f"elbos has shape {tuple(elbos.shape)}, expected (B,)")
    number_in("epsilon", epsilon, 0, math.inf, closed="low")
    rows = len(elbos)
    given = {"advantages": advantages, "old_elbos": old_elbos, "reference_elbos": reference_elbos}
    for name, value in given.items():
        if value is not None:
            check_rows(name, value, "elbos", elbos, rows)
    _checks.tensor("lengths", lengths, _checks.INTEGERS)
    _checks.shape("lengths", lengths, elbos.shape, "one per sequence")
    reduce = reducer(reduction, num_items, rows, elbos, "elbos")
    columns = [None if t is None else t[:, None] for t in (elbos, old_elbos, reference_elbos)]
    out = _PPO(
        columns[0],
        advantages,
        columns[1],
        columns[2],
        epsilon_low=epsilon,
        epsilon_high=epsilon,
        beta=beta,
        kl=kl,
        mask=(lengths > 0)[:, None],
        aggregation="seq_mean_token_sum",
        reduction="none",
    )
    return out._replace(loss=reduce(out.loss / lengths.clamp(min=1)))


def diffu_grpo_tokens(
    tokens: Tensor,
    mask_id: int,
    *,
    prompt_mask: Tensor,
    completion_mask: Tensor,
    probability: float = 0.15,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The one input at which diffu-GRPO evaluates a model: the whole completion hidden, and a part of the prompt.

    The log-probs there are of one step of unmasking, a biased estimate. Every inner iteration draws another prompt
    mask.

    Args:
        tokens: int64 or int32 (B, T).
        mask_id: what stands for a hidden token.
        prompt_mask, completion_mask: bool (B, T); elsewhere nothing changes.
        probability: of a prompt's token to be hidden, in [0, 1]; 0.15 is the runs', the code's default 0.3.
        generator: draws them; the same seed for the policy, the old one and the reference.

    Returns:
        of the shape and dtype of tokens.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, masks that overlap, or probability outside [0, 1].

    Source: d1 (2504.12216), as its official code has it.
    """
    _checks.tensor("tokens", tokens, _checks.INTEGERS)
    if tokens.dim() != 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected (B, T)")
    check_mask("prompt_mask", prompt_mask, "tokens", tokens)
    check_mask("completion_mask", completion_mask, "tokens", tokens)
    if _checks.readable(tokens) and bool((prompt_mask & completion_mask).any()):
        raise ValueError("prompt_mask and completion_mask overlap")
    number_in("probability", probability, 0, 1, closed="both")
    drawn = torch.rand(tokens.shape, generator=generator, device=tokens.device, dtype=torch.float64) < probability
    return torch.where(completion_mask | (prompt_mask & drawn), mask_id, tokens)


def diffu_grpo(
    logprobs: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    *,
    epsilon: float = 0.5,
    beta: float = 0.04,
    **options: Any,
) -> PolicyGradientOutput:
    """GRPO with its k3 penalty on the log-probs at `diffu_grpo_tokens`, a mean over all tokens.

    Source: d1 (2504.12216), as its official code has it, which fails for one inner iteration with β > 0.

    Args:
        logprobs, advantages, old_logprobs, reference_logprobs: as in `fastpo.losses.grpo`, the completion's tokens. The
            paper's advantages are `fastpo.advantages.dr_grpo`.
        epsilon: on both sides; beta: needs reference_logprobs unless 0. Both are the paper's.
        options: of `fastpo.losses.grpo`: mask, cu_seqlens, num_items and others.

    Returns, raises: as `fastpo.losses.grpo`.
    """
    options = {"aggregation": "token_mean", **options}
    bounds = {"epsilon_low": epsilon, "epsilon_high": epsilon, "beta": beta}
    return _GRPO(logprobs, advantages, old_logprobs, reference_logprobs, **bounds, **options)
