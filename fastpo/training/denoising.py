"""Masked-diffusion language models: the policy at one step of unmasking, and the sampling of completions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastpo.kernels import token_logprobs
from fastpo.losses import elbo_nodes, noise_tokens
from fastpo.training.errors import UserError
from fastpo.training.model import Policy
from fastpo.training.rollouts import Rollout, Sampling, batches, nucleus, uniforms


def mask_token(tokenizer: Any, name: str) -> int:
    """What stands for a hidden token; UserError if the tokenizer has none."""
    if tokenizer.mask_token_id is None:
        raise UserError(f"{name}: the tokenizer has no mask token, so the model is no masked-diffusion model")
    return tokenizer.mask_token_id


def _generators(prompts: Tensor, lengths: Tensor, completions: Tensor) -> Iterator[torch.Generator]:
    """One per sequence, seeded by its tokens, whatever stands beside them."""
    for prompt, length, completion in zip(prompts.tolist(), lengths.tolist(), completions.tolist(), strict=True):
        digest = hashlib.blake2b(repr((prompt[:length], completion)).encode(), digest_size=8).digest()
        yield torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Denoiser(Policy):
    """A masked language model that answers with numbers (n,) of completion tokens, packed.

    Without `nodes`, their log-probs where all of them are hidden: the estimate of diffu-GRPO. With `nodes`, what each
    adds to the bound on the log-probability of its completion: the estimate of GDPO, `fastpo.losses.elbo`. The masks of
    a completion depend on it and its prompt alone, so that all models see the same ones.

    Behind each prompt stand as many tokens as a completion can have; what is behind its end is hidden. Negative ids in
    a prompt are hidden too.
    """

    def __init__(
        self,
        model: Any,
        mask: int,
        room: int,
        *,
        temperature: float = 1.0,
        nodes: int = 0,
        rate: Literal["time", "count"] = "time",
    ) -> None:
        """
        Args:
            model: a transformers masked language model.
            mask: what stands for a hidden token, and is never an answer.
            room: most tokens of a completion.
            temperature: of the distributions, as they are sampled from.
            nodes: times at which completions are noised, 0 for none.
            rate: of the bound, as in `fastpo.losses.elbo`.
        """
        super().__init__(model, "padded", temperature=temperature)
        self.mask, self.room, self.nodes, self.rate = mask, room, nodes, rate

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        predictors: Tensor,
        targets: Tensor,
        *,
        statistics: tuple[str, ...] = (),
    ) -> Tensor | dict[str, Tensor]:
        """As `Policy.forward`, with "entropy" and "log_sum_p2" for statistics."""
        sequence = (position_ids == 0).cumsum(0) - 1
        given = torch.ones_like(position_ids, dtype=torch.bool)
        # a completion token is predicted at its own place, not at the one before
        given[predictors + 1] = False
        lengths = sequence[given].bincount()
        prompts = input_ids.new_full((len(lengths), int(lengths.max())), self.mask)
        prompts[sequence[given], position_ids[given]] = input_ids[given]
        row = sequence[predictors + 1]
        place = position_ids[predictors + 1] - lengths[row]
        if self.nodes:
            return self._bound(prompts, lengths, targets, row, place)
        rows = self.logits(prompts, lengths, prompts.new_full((len(lengths), self.room), self.mask))[row, place]
        if not statistics:
            return token_logprobs(rows, targets, temperature=self.temperature)
        out: Any = token_logprobs(rows, targets, temperature=self.temperature, stats=statistics)  # type: ignore[arg-type]
        return {"logprobs": out.logprobs, **{name: getattr(out, name) for name in statistics}}

    def _bound(self, prompts: Tensor, lengths: Tensor, targets: Tensor, row: Tensor, place: Tensor) -> Tensor:
        """What the targets, which are at these rows and places, add to the bounds of their completions."""
        nodes, count = elbo_nodes(self.nodes), len(lengths)
        tokens = prompts.new_full((count, self.room), self.mask)
        tokens[row, place] = targets
        there = torch.zeros_like(tokens, dtype=torch.bool)
        there[row, place] = True
        noised = [
            noise_tokens(tokens[i : i + 1].cpu(), nodes.times, self.mask, mask=there[i : i + 1].cpu(), generator=drawn)
            for i, drawn in enumerate(_generators(prompts, lengths, tokens))
        ]
        written = torch.cat([each.tokens for each in noised], 1).to(tokens.device)
        masked = torch.cat([each.masked for each in noised], 1).to(tokens.device)[:, row, place]
        times, weights = (t.to(tokens.device) for t in nodes)
        factor = (weights / times)[:, None]
        if self.rate == "count":
            sizes = there.sum(1)[row]
            hidden = (written == self.mask).sum(2)[:, row] - (self.room - sizes)
            factor = weights[:, None] * sizes / hidden
        logits = self.logits(prompts.repeat(self.nodes, 1), lengths.repeat(self.nodes), written.flatten(0, 1))
        rows = logits.view(self.nodes, count, self.room, -1)[:, row, place]
        # what is not hidden costs nothing
        logprobs = token_logprobs(rows, torch.where(masked, targets, -100), temperature=self.temperature)
        return (factor.to(logprobs.dtype) * logprobs).sum(0)

    def computed(self, lengths: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """As `Policy.computed`; the room behind every prompt is no padding, as hidden tokens are predicted in it."""
        prompts = [prompt + self.room for prompt, _ in lengths]
        return sum(prompts), len(prompts) * max(prompts)

    def logits(self, prompts: Tensor, lengths: Tensor, completions: Tensor) -> Tensor:
        """The logits (B, room, V) of the completions' places.

        Args:
            prompts: (B, P), padded on the right.
            lengths: (B,), of the prompts.
            completions: (B, room), with hidden tokens.
        """
        rows, room = completions.shape
        width = int(lengths.max()) + room
        places = lengths[:, None] + torch.arange(room, device=lengths.device)
        ids = prompts.new_full((rows, width), self.mask)
        ids[:, : prompts.shape[1]] = prompts
        ids = torch.where(ids < 0, self.mask, ids).scatter(1, places, completions)
        seen = torch.arange(width, device=lengths.device) < lengths[:, None] + room
        logits = self.model(input_ids=ids, attention_mask=seen.long()).logits
        found = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))
        return found.index_fill(-1, torch.tensor([self.mask], device=found.device), torch.finfo(found.dtype).min)


class DenoisingEngine:
    """Completions of a masked-diffusion model, one token a step.

    Of the hidden places that of the most probable token is uncovered next, with a token that is drawn there: so a
    rollout's log-probs are those of its draws, given the order. LLaDA draws at all places first and keeps the most
    probable draw. All of a completion's room is written, and cut behind the first token that ends it.
    """

    def __init__(self, model: Denoiser, *, tokens: int) -> None:
        """
        Args:
            model: the policy's.
            tokens: most of a batch; at least one completion is in it.
        """
        self.model, self.tokens = model, tokens

    def update(self, policy: Any) -> None:
        """Nothing: the model is the policy itself."""

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, keys: Sequence[int] | None = None
    ) -> list[list[Rollout]]:
        """See `Engine`; without stop strings."""
        if sampling.stop_strings:
            raise UserError("--rollout.stop: a masked-diffusion model ends completions by tokens only")
        keys = range(len(prompts)) if keys is None else keys
        out: list[list[Rollout | None]] = [[None] * n for _ in prompts]
        for batch in batches(prompts, n, sampling.max_new_tokens, self.tokens):
            found = self._batch([prompts[i] for i, _ in batch], [(keys[i], p) for i, p in batch], sampling)
            for (i, place), rollout in zip(batch, found, strict=True):
                out[i][place] = rollout
        return out  # type: ignore[return-value]

    def _batch(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int, int]], sampling: Sampling
    ) -> list[Rollout]:
        device = next(self.model.parameters()).device
        width, room, mask = max(map(len, prompts)), sampling.max_new_tokens, self.model.mask
        ids = torch.tensor([[*p, *[mask] * (width - len(p))] for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        draws = torch.stack([uniforms(sampling.seed, *key, room) for key in keys]).to(device)
        written = ids.new_full((len(prompts), room), mask)
        logprobs = torch.zeros(written.shape, device=device)
        for step in range(room):
            logits = self.model.logits(ids, lengths, written).float()
            best = logits.log_softmax(-1).amax(-1).masked_fill(written != mask, float("-inf"))
            place = best.argmax(-1, keepdim=True)
            chosen = logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))[:, 0]
            if sampling.temperature == 0:
                token = chosen.argmax(-1, keepdim=True)
            else:
                scores = nucleus(chosen / sampling.temperature, sampling.top_p).log_softmax(-1)
                cumulative = scores.double().exp().cumsum(-1)
                at = draws[:, step : step + 1] * cumulative[:, -1:]
                token = torch.searchsorted(cumulative, at, right=True).clamp(max=logits.shape[-1] - 1)
                logprobs.scatter_(1, place, scores.gather(-1, token))
            written.scatter_(1, place, token)
        return [_cut(row, of, sampling.stop) for row, of in zip(written.tolist(), logprobs.cpu(), strict=True)]


def _cut(ids: list[int], logprobs: Tensor, stop: Sequence[int]) -> Rollout:
    end = next((i + 1 for i, token in enumerate(ids) if token in stop), None)
    length = end or len(ids)
    return Rollout(ids[:length], logprobs[:length].clone(), end is not None)
