"""Contrastive losses between vectors of one batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.listwise import ListwiseOutput
from fastpo.kernels.objective import mean_denominator, mean_of
from fastpo.kernels.token_logprobs import token_logprobs


def rank_gen(
    prefixes: Tensor,
    suffixes: Tensor,
    generated: Tensor | None = None,
    *,
    negatives: Literal["batch", "own"] = "batch",
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: float | Tensor | None = None,
) -> ListwiseOutput:
    """-log(e^{p_i·c_i} / (Σ_j e^{p_i·c_j} + Σ_j e^{p_i·g_j})): each prefix's own suffix among those of the batch.

    Neither a temperature nor a norm: products of tens or hundreds are common. Without `generated` this is InBook, with
    it also Generative. Equal suffixes in a batch are negatives of each other. One prefix alone without `generated` has
    loss 0. The matrix of products is kept, the softmax over it is one pass of `token_logprobs`.

    Source: RankGen, arXiv:2205.09726 (from memory; whether the generated suffixes of other prefixes are negatives could
    not be verified: `negatives` chooses).

    Args:
        prefixes: vectors p (B, D), fp32, bf16, fp16 or fp64; differentiable.
        suffixes: vectors c (B, D) of the true suffixes; differentiable.
        generated: vectors g (B, D) of suffixes that a model wrote; differentiable.
        negatives: "batch": the generated suffixes of all prefixes; "own": that of the prefix itself.
        reduction, num_items: as in `fastpo.losses.dpo`.

    Returns:
        ListwiseOutput(loss, rewards), fp32 (fp64 for fp64 input); the rewards are the products, (B, B) and those of the
        generated suffixes behind.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices, an unknown option, or the mean of no prefixes.
    """
    _checks.tensor("prefixes", prefixes, _checks.FLOATS)
    if prefixes.dim() != 2:
        raise ValueError(f"prefixes has shape {tuple(prefixes.shape)}, expected (B, D)")
    given = {"suffixes": suffixes} | ({} if generated is None else {"generated": generated})
    for name, value in given.items():
        _checks.tensor(name, value, _checks.FLOATS)
        _checks.same_device(name, value, "prefixes", prefixes)
        _checks.shape(name, value, prefixes.shape, "it must match prefixes")
    if negatives not in ("batch", "own"):
        raise ValueError(f"negatives must be one of 'batch', 'own', got {negatives!r}")
    batch = prefixes.shape[0]
    denominator = mean_denominator(reduction, num_items, batch, prefixes, "prefixes")
    dtype = torch.float32
    for value in (prefixes, *given.values()):
        dtype = torch.promote_types(dtype, value.dtype)
    p, c = prefixes.to(dtype), suffixes.to(dtype)
    columns = [p @ c.T]
    if generated is not None:
        g = generated.to(dtype)
        columns.append(p @ g.T if negatives == "batch" else (p * g).sum(1, keepdim=True))
    products = torch.cat(columns, 1) if len(columns) > 1 else columns[0]
    each = -token_logprobs(products, torch.arange(batch, device=products.device))
    loss = each if reduction == "none" else mean_of(each, denominator)
    if isinstance(num_items, Tensor):
        loss = loss / num_items.to(loss.dtype)
    return ListwiseOutput(loss, products.detach())
