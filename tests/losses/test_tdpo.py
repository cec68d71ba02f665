"""TDPO from the logits of two models: token_logprobs and token_kl into losses.tdpo, against fp64 autograd of it all."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastpo
from tests.tolerance import assert_within

IGNORE = -100
BETA, ALPHA = 0.3, 0.7


class Side(NamedTuple):
    """One completion per pair: logits of both models (B, T, V), labels (B, T) with -100 where no token counts."""

    logits: Tensor
    reference: Tensor
    labels: Tensor


def make_side(seed: int, length: int, dtype: torch.dtype, vocab: int = 37) -> Side:
    """Prompts and paddings of different lengths, whose logits are NaN."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, length, vocab)
    logits = torch.randn(shape, generator=generator) * 2
    reference = logits + 0.5 * torch.randn(shape, generator=generator)
    labels = torch.randint(vocab, shape[:-1], generator=generator)
    place = torch.arange(length)
    begin, end = torch.tensor([0, 1, 2, 3])[:, None], torch.tensor([length, length - 2, length - 1, 4])[:, None]
    labels[(place < begin) | (place >= end)] = IGNORE
    logits[labels == IGNORE] = math.nan
    reference[labels == IGNORE] = math.nan
    return Side(logits.to(dtype), reference.to(dtype), labels)


def through_fastpo(sides: list[Side], version: str) -> Tensor:
    """The chain of the README."""
    logps, ref_logps, kls, masks = [], [], [], []
    for side in sides:
        masks.append(side.labels != IGNORE)
        logps.append(fastpo.token_logprobs(side.logits, side.labels))
        ref_logps.append(fastpo.token_logprobs(side.reference, side.labels))
        kls.append(fastpo.token_kl(side.logits, side.reference, mask=masks[-1]))
    out = fastpo.losses.tdpo(
        *logps,
        *ref_logps,
        *kls,
        beta=BETA,
        alpha=ALPHA,
        version=version,
        chosen_mask=masks[0],
        rejected_mask=masks[1],
        reduction="none",
    )
    return out.loss


def written_out(sides: list[Side], version: str, dtype: torch.dtype) -> Tensor:
    """The paper's loss in plain torch."""
    ratios, divergences = [], []
    for side in sides:
        mask = side.labels != IGNORE
        pi, ref = (torch.where(mask[..., None], t, 0).to(dtype).log_softmax(-1) for t in (side.logits, side.reference))
        ids = torch.where(mask, side.labels, 0)[..., None]
        ratios.append(((pi - ref).gather(-1, ids)[..., 0] * mask).sum(-1))
        divergences.append(((ref.exp() * (ref - pi)).sum(-1) * mask).sum(-1))
    margin = divergences[1] - divergences[0]
    if version == "tdpo2":
        margin = ALPHA * (divergences[1] - divergences[0].detach())
    return -torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1] - margin))


def rounded(side: Side) -> Tensor:
    """Σ (|log π| + |log π_ref|) of the labels (B,): by how many eps the margin is off, over β."""
    keep = (side.labels != IGNORE)[..., None]
    logs = [torch.where(keep, t.double(), 0).log_softmax(-1) for t in (side.logits, side.reference)]
    ids = torch.where(keep, side.labels[..., None], 0)
    return sum(torch.where(keep, log.gather(-1, ids).abs(), 0).sum((1, 2)) for log in logs)


def sizes(side: Side, slope: Tensor) -> Tensor:
    """Of the two terms of the gradient, of which each is rounded to the dtype of the logits before they are added: that
    of the log-prob, slope (1[y] - π), and that of the divergence, slope (π - π_ref), each with the error of log π."""
    keep = (side.labels != IGNORE)[..., None]
    logs = [torch.where(keep, t.double(), 0).log_softmax(-1) for t in (side.logits, side.reference)]
    pi, ref = ((1 - log) * log.exp() for log in logs)
    taken = torch.zeros_like(pi).scatter_(-1, torch.where(keep[..., 0], side.labels, 0)[..., None], 1.0)
    return torch.where(keep, slope.abs()[:, None, None] * (taken + 2 * pi + ref), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_loss_and_gradients(backend, version, dtype):
    sides = [make_side(0, 9, dtype), make_side(1, 7, dtype)]
    upstream = torch.tensor([0.5, -1.0, 2.0, 0.25])

    def evaluate(loss_of, accumulate: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [side.logits.detach().clone().requires_grad_() for side in sides]
        loss = loss_of([side._replace(logits=leaf) for side, leaf in zip(sides, leaves, strict=True)])
        return (loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(accumulate)))

    accumulate = torch.promote_types(dtype, torch.float32)
    with fastpo.use_backend(backend):
        ours = evaluate(lambda s: through_fastpo(s, version), accumulate)
    torch_ = evaluate(lambda s: written_out(s, version, accumulate), accumulate)
    sides = [side._replace(logits=side.logits.double(), reference=side.reference.double()) for side in sides]
    truth = evaluate(lambda s: written_out(s, version, torch.float64), torch.float64)
    off = BETA * sum(rounded(side) for side in sides)
    assert_within(ours[0], truth[0], torch_[0], name="loss", terms=off.numpy())
    slope = BETA * torch.expm1(-truth[0]) * upstream.double() * (1 + off)
    for i, name in enumerate(("chosen", "rejected")):
        got, want = ours[1 + i], truth[1 + i]
        assert got.dtype == dtype
        skipped = sides[i].labels == IGNORE
        assert not got[skipped].any() and want[~skipped].any()
        assert_within(got, want, torch_[1 + i], name=name, terms=sizes(sides[i], slope).numpy())


def test_the_divergence_of_the_chosen_is_constant_in_tdpo2():
    """And in TDPO1 it is not: what the gradient would be without token_kl's part of it."""
    sides = [make_side(0, 9, torch.float64), make_side(1, 7, torch.float64)]
    keep = sides[0].labels != IGNORE
    gradients = []
    for version in ("tdpo1", "tdpo2"):
        leaf = sides[0].logits.clone().requires_grad_()
        loss = through_fastpo([sides[0]._replace(logits=leaf), sides[1]], version)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        slope = -BETA * -torch.expm1(-loss.detach())
        pi, ref = (t[keep].softmax(-1) for t in (sides[0].logits, sides[0].reference))
        taken = torch.nn.functional.one_hot(sides[0].labels[keep], pi.shape[-1]).double()
        expected = taken - pi + (pi - ref if version == "tdpo1" else 0)
        weight = slope[:, None].expand(keep.shape)[keep][:, None]
        assert torch.allclose(grad[keep], weight * expected, rtol=0, atol=1e-14)
        gradients.append(grad[keep])
    assert (gradients[0] - gradients[1]).abs().max() > 1e-2
