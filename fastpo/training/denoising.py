"""Masked-diffusion language models: the policy at one step of unmasking, and the sampling of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpo.kernels import token_logprobs
from fastpo.training.errors import UserError
from fastpo.training.model import Policy
from fastpo.training.rollouts import Rollout, Sampling, batches, nucleus, uniforms


def mask_token(tokenizer: Any, name: str) -> int:
    """What stands for a hidden token; UserError if the tokenizer has none."""
    if tokenizer.mask_token_id is None:
        raise UserError(f"{name}: the tokenizer has no mask token, so the model is no masked-diffusion model")
    return tokenizer.mask_token_id


class Denoiser(Policy):
    """A masked language model that answers with the packed log-probs (n,) of completion tokens, all of them hidden.

    Behind each prompt it sees as many hidden tokens as a completion can have, and nothing of the completion: the
    estimate of diffu-GRPO. Negative ids in a prompt are hidden too.
    """

    def __init__(self, model: Any, mask: int, room: int, *, temperature: float = 1.0) -> None:
        """
        Args:
            model: a transformers masked language model.
            mask: what stands for a hidden token, and is never an answer.
            room: most tokens of a completion.
            temperature: of the distributions, as they are sampled from.
        """
        super().__init__(model, "padded", temperature=temperature)
        self.mask, self.room = mask, room

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
        logits = self.logits(prompts, lengths, prompts.new_full((len(lengths), self.room), self.mask))
        row, place = sequence[predictors + 1], position_ids[predictors + 1]
        rows = logits[row, place - lengths[row]]
        if not statistics:
            return token_logprobs(rows, targets, temperature=self.temperature)
        out = token_logprobs(rows, targets, temperature=self.temperature, stats=statistics)  # type: ignore[arg-type]
        return {"logprobs": out.logprobs, **{name: getattr(out, name) for name in statistics}}

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
