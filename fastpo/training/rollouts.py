"""Sampling completions: what an engine does, and the engine on transformers' generate."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.kernels import top_p_allowed, unpack_allowed

_BLOCK = 256  # tokens


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    Attributes:
        max_new_tokens: most tokens of a completion, the one that ends it included.
        temperature: of the logits; 0 takes the most probable token.
        top_p: the most probable tokens that together have this probability are sampled from, at least one.
        stop: ids of the tokens that end a completion; they belong to it.
        stop_strings: texts that end it, and belong to it.
        seed: of the draws.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0


class Rollout(NamedTuple):
    """One completion.

    Attributes:
        ids: its tokens, at least one.
        logprobs: fp32 (len(ids),) on the CPU, under the distribution that was sampled from: with its temperature, over
            its nucleus.
        ended: whether it ended itself, and was not cut.
        allowed: int32 (len(ids), words) on the CPU, the packed set of tokens that each was sampled from, if a `Mask`
            restricted them.
    """

    ids: list[int]
    logprobs: Tensor
    ended: bool
    allowed: Tensor | None = None


class Engine(Protocol):
    """What samples completions: transformers in this process, or a server of its own."""

    def update(self, policy: Any) -> None:
        """Take the policy's weights, before the first completion and after every change of them."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, keys: Sequence[int] | None = None
    ) -> list[list[Rollout]]:
        """`n` completions of each prompt.

        Args:
            prompts: token ids, at least one each.
            n: at least 1.
            sampling: how.
            keys: numbers, one per prompt; what is drawn depends on them and the seed, and on no other prompt, so that
                any division of the prompts gives the same completions. Default: their positions.
        """
        ...


def draw_seed(*numbers: int) -> int:
    """One seed of several numbers, in the 63 bits that a generator takes."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def uniforms(seed: int, key: int, place: int, count: int) -> Tensor:
    """The draws of the `place`-th completion of a prompt: fp64 (count,) in [0, 1)."""
    generator = torch.Generator().manual_seed(draw_seed(seed, key, place))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The logits (rows, V), -inf outside the smallest set of most probable tokens whose probabilities reach top_p."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    # a token stays if those before it have not reached top_p
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[:, 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))


def draw(logits: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's distribution function passes its number in [0, 1), and that token's log-prob.

    Args:
        logits: fp32 (rows, V), -inf where nothing may be chosen.
        at: fp64 (rows, 1).

    Returns:
        int64 and fp32 (rows, 1).
    """
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).exp()
    if over := -weights.shape[-1] % _BLOCK:
        weights = F.pad(weights, (0, over))
    blocks = weights.unflatten(-1, (-1, _BLOCK))
    # sums of blocks first: a running sum in double precision of all V would take longer than the softmax
    block, within, total = _passed(blocks.sum(-1, dtype=torch.float64), at)
    rows = torch.arange(len(blocks), device=block.device)
    inside, *_ = _passed(blocks[rows, block[:, 0]].double(), within)
    chosen = block * _BLOCK + inside
    return chosen, logits.gather(-1, chosen) - largest - total.log().float()


def _passed(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the running sums (rows, n) pass a share (rows, 1) of the total; the share of that weight; the total."""
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    # rounded to the total it would pass nowhere, and what has no weight is never the first above
    amount = torch.minimum(share * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(sums, amount, right=True).clamp(max=weights.shape[-1] - 1)
    of = weights.gather(-1, place)
    return place, ((amount - sums.gather(-1, place)) / of + 1).clamp(0, 1), total


def batches(prompts: Sequence[Sequence[int]], n: int, room: int, tokens: int) -> Iterator[list[tuple[int, int]]]:
    """The places (prompt, completion) of `n` completions of each prompt, divided into batches.

    Each has at most so many tokens if all prompts are as long as its longest, with `room` for a completion; but at
    least one completion.
    """
    rows = [(i, place) for i in range(len(prompts)) for place in range(n)]
    # equal lengths beside each other need no padding
    rows.sort(key=lambda row: len(prompts[row[0]]))
    batch: list[tuple[int, int]] = []
    for row in rows:
        width = len(prompts[row[0]]) + room  # rows come by length: this is the longest
        if batch and (len(batch) + 1) * width > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class Mixture(NamedTuple):
    """The policy's distribution mixed with another model's at every token: p^(1-share) q^share / Z.

    Attributes:
        model: the other, a transformers causal LM with the policy's vocabulary.
        share: in [0, 1].
    """

    model: Any
    share: float


class Mask(NamedTuple):
    """The policy restricted at every token to those that another model finds likely, as by `top_p_allowed`.

    Attributes:
        model: the other, a transformers causal LM with the policy's vocabulary.
        top_p: in (0, 1], of its distribution at the sampling's temperature.
        min_tokens: how many of its likely tokens are in each set, whatever they have.
    """

    model: Any
    top_p: float
    min_tokens: int


class _Companion:
    """The logits of another model at the tokens that the first one generates, with a cache of its own.

    As the first one, it computes each prompt once.
    """

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, room: int) -> None:
        self.model, self.mask = model, mask
        self.cache = _begin(model, ids, mask, room, always=False).get("past_key_values")
        self.seen = 0 if self.cache is None else ids.shape[1] - 1

    def logits(self, input_ids: Tensor) -> Tensor:
        new = input_ids[:, self.seen :]
        missing = input_ids.shape[1] - self.mask.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), missing)], 1)
        positions = _positions(self.mask)[:, self.seen :]
        out = self.model(
            input_ids=new,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **_last_logits(self.model),
        )
        self.cache, self.seen = out.past_key_values, input_ids.shape[1]
        return out.logits[:, -1].float()


class _Draws:
    """Chooses the next token of every row, as a logits processor of transformers: all others become impossible.

    It is given the uniform numbers beforehand and inverts the distribution function, so that a row's tokens do not
    depend on the rows beside it. It notes the log-probs, and as a stopping criterion where each row ends.
    """

    def __init__(
        self,
        draws: Tensor,
        prompt: int,
        sampling: Sampling,
        decode: Callable[[list[int]], str] | None,
        other: Mixture | Mask | None,
        companion: _Companion | None,
    ) -> None:
        self.draws, self.prompt, self.sampling, self.decode = draws, prompt, sampling, decode
        self.other, self.companion = other, companion
        self.logprobs = torch.zeros(draws.shape)
        self.allowed: list[Tensor] = []  # of each step (rows, words)
        self.stop = torch.tensor(sampling.stop, dtype=torch.int64)
        self.length = torch.zeros(len(draws), dtype=torch.int64)  # of the rows that have ended, else 0

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt
        logits = scores.float()
        if self.companion is not None:
            logits = self._with(self.companion.logits(input_ids), logits)
        if self.sampling.temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            logits = nucleus(logits / self.sampling.temperature, self.sampling.top_p)
            # drawn on the CPU, so that every device draws the same
            chosen, logprobs = draw(logits, self.draws[:, step : step + 1].to(logits.device))
            self.logprobs[:, step] = logprobs[:, 0].cpu()
        return torch.full_like(scores, float("-inf")).scatter(-1, chosen, 0.0)

    def _with(self, theirs: Tensor, logits: Tensor) -> Tensor:
        """The logits that come of both models'."""
        if isinstance(self.other, Mixture):
            return torch.lerp(logits.log_softmax(-1), theirs.log_softmax(-1), self.other.share)
        assert self.other is not None
        sampling, (_, top_p, least) = self.sampling, self.other
        allowed = top_p_allowed(
            theirs / (sampling.temperature or 1.0),
            top_p,
            min_tokens=min(least, theirs.shape[-1]),
            always=sampling.stop or None,
        )
        self.allowed.append(allowed.cpu())
        return logits.masked_fill(~unpack_allowed(allowed, logits.shape[-1]), float("-inf"))

    def stopped(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, self.prompt :].cpu()
        ends = torch.isin(new[:, -1], self.stop)
        if self.decode is not None:
            for row in (~ends & (self.length == 0)).nonzero()[:, 0].tolist():
                text = self.decode(new[row].tolist())
                ends[row] = any(string in text for string in self.sampling.stop_strings)
        self.length = torch.where((self.length == 0) & ends, new.shape[1], self.length)
        return (self.length > 0).to(input_ids.device)


@cache
def _growing_layer() -> Any:
    """The class of a cache layer with all its memory at once; transformers' own copies everything at each token."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, room: int) -> None:
            super().__init__()
            self.lazy_initialization(keys, values)
            self.room = []
            for begun in (keys, values):
                shape = (len(rows), *begun.shape[1:-2], begun.shape[-2] + room, begun.shape[-1])
                self.room.append(begun.new_empty(shape))
                self.room[-1][..., : begun.shape[-2], :] = begun[rows]
            self._show(keys.shape[-2])

        def _show(self, length: int) -> None:
            self.keys, self.values = (all_of[..., :length, :] for all_of in self.room)

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            begin, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
            for all_of, new in zip(self.room, (key_states, value_states), strict=True):
                all_of[..., begin:end, :] = new
            self._show(end)
            return self.keys, self.values

    return GrowingLayer


def _positions(mask: Tensor) -> Tensor:
    """Of tokens that are padded on the left."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _last_logits(model: Any) -> dict[str, int]:
    """What spares a model the logits of all tokens but the last, if it has such an argument."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _begin(model: Any, ids: Tensor, mask: Tensor, room: int, *, always: bool) -> dict[str, Any]:
    """What `generate` takes as begun: the cache of all tokens of the prompts but the last, each prompt computed once.

    Args:
        model: a transformers causal LM.
        ids, mask: (rows, width), padded on the left.
        room: tokens that will be added.
        always: run the model, also if nothing can come of it: other processes wait for that.
    """
    width = ids.shape[1] - 1
    if not (width or always):
        return {}
    alone, rows = torch.unique(torch.stack([ids, mask], -1), dim=0, return_inverse=True)
    ids, mask = alone[:, : max(width, 1), 0], alone[:, : max(width, 1), 1]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(mask), "use_cache": True}
    cache = model(**inputs, **_last_logits(model)).past_key_values
    from transformers.cache_utils import DynamicCache, DynamicLayer

    from fastpo.nn.language import S4Cache

    if not width:
        return {}
    if isinstance(cache, S4Cache):
        cache.batch_select_indices(rows)
    elif type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [_growing_layer()(layer.keys, layer.values, rows, room + 1) for layer in cache.layers]
    else:
        # others, as of windows, know better
        return {}
    return {"past_key_values": cache}


class TransformersEngine:
    """Completions by transformers' generate with its KV cache, from the policy in this process.

    Prompts of a batch are padded on the left; the batch is as large as its tokens, prompts with all that they may
    become, allow.
    """

    def __init__(
        self,
        inside: Callable[[Callable[[Any], Any]], Any],
        *,
        tokens: int,
        tokenizer: Any = None,
        largest: Callable[[int], int] | None = None,
    ) -> None:
        """
        Args:
            inside: calls a function with the transformers causal LM, where its weights can be used.
            tokens: most of a batch; at least one completion is in it.
            tokenizer: for stop strings.
            largest: of sharded weights, for which all processes must run equally many forwards: the largest of a number
                of each process.
        """
        self.inside, self.tokens, self.tokenizer, self.largest = inside, tokens, tokenizer, largest

    def update(self, policy: Any) -> None:
        """Nothing: the model is the policy itself."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int] | None = None,
        *,
        mixture: Mixture | None = None,
        mask: Mask | None = None,
    ) -> list[list[Rollout]]:
        """See `Engine`; with `mixture`, from that, or with `mask`, under it."""
        other = mixture if mixture is not None else mask
        keys = range(len(prompts)) if keys is None else keys
        out: list[list[Rollout | None]] = [[None] * n for _ in prompts]
        parts = list(batches(prompts, n, sampling.max_new_tokens, self.tokens))
        if self.largest is not None:
            # some more, for nothing
            parts += [[]] * (self.largest(len(parts)) - len(parts))
        for batch in parts:
            found = self.inside(
                partial(
                    self._batch,
                    prompts=[prompts[i] for i, _ in batch] or [[0]],
                    keys=[(keys[i], place) for i, place in batch] or [(0, 0)],
                    sampling=sampling,
                    other=other,
                )
            )[: len(batch)]
            for (i, place), rollout in zip(batch, found, strict=True):
                out[i][place] = rollout
        return out  # type: ignore[return-value]

    def _batch(
        self,
        model: Any,
        *,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[tuple[int, int]],
        sampling: Sampling,
        other: Mixture | Mask | None,
    ) -> list[Rollout]:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        device = model.device
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        draws = torch.stack([uniforms(sampling.seed, *key, sampling.max_new_tokens) for key in keys])
        decode = self.tokenizer.decode if sampling.stop_strings else None
        room = sampling.max_new_tokens
        companion = None if other is None else _Companion(other.model, ids, mask, room)
        choice = _Draws(draws, width, sampling, decode, other, companion)
        # completions of one prompt have one beginning
        begun = _begin(model, ids, mask, room, always=self.largest is not None)
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=None,
        )
        out = model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([choice.choose]),
            stopping_criteria=StoppingCriteriaList([choice.stopped]),
            synced_gpus=self.largest is not None,
            **begun,
        )
        lengths = torch.where(choice.length > 0, choice.length, out.shape[1] - width).tolist()
        new = out[:, width:].tolist()
        sets = torch.stack(choice.allowed, 1) if choice.allowed else None
        return [
            Rollout(
                new[row][:length],
                choice.logprobs[row, :length].clone(),
                bool(choice.length[row] > 0),
                None if sets is None else sets[row, :length].clone(),
            )
            for row, length in enumerate(lengths)
        ]
