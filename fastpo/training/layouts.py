"""How a model takes several sequences at once: in one row that computes shared prefixes once, in one row, or padded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Layout = Literal["shared", "packed", "padded"]

# the name of `attention` in transformers' registries, and that of its argument
ATTENTION = "fastpo"
ROW = "fastpo_row"
# shorter prefixes are computed again: what stands behind one cannot take its keys and values where they lie
LEAST_PREFIX = 16


def run(layout: Layout, model: Any, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
    """Logits or hidden states (n, ...) of sequences, each attending to itself alone.

    Args:
        layout: as `find_layout` has it.
        model: a transformers model.
        input_ids: (N,), the sequences one behind the other.
        position_ids: (N,), restarting at 0 with every sequence.
        keep: (n,) the positions of the N that are wanted.
    """
    return {"shared": _shared, "packed": _packed, "padded": _padded}[layout](model, input_ids, position_ids, keep)


@torch.no_grad()
def find_layout(model: Any) -> Layout:
    """The best way in which every sequence gets the logits that it has alone: asked of the model itself.

    Architectures differ (recurrent states, own masks), and one that mixes sequences does so without an error. A model
    that can do with it takes `attention` from here on, also for all else that it does.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    first, *others = (torch.randint(config.vocab_size, (n,), generator=generator) for n in (LEAST_PREFIX + 5, 3, 4, 8))
    # one that continues a part of another, as completions of one prompt do; some models know no positions so far
    longest = getattr(config, "max_position_embeddings", None)
    parts = [first, others[0], torch.cat([first[: LEAST_PREFIX + 1], others[1]]), others[2]]
    parts = [part[:longest].to(device) for part in parts]
    ids = torch.cat(parts)
    positions = torch.cat([torch.arange(len(p), device=device) for p in parts])
    everything = torch.arange(len(positions), device=device)
    alone = torch.cat([model(input_ids=p[None], use_cache=False).logits[0] for p in parts])
    found = first_layout(model, lambda layout: close(run(layout, model, ids, positions, everything), alone))
    return found or "padded"


def first_layout(model: Any, fits: Callable[[Layout], bool]) -> Layout | None:
    """The best layout that fits and does not raise, if there is one; the model then has the attention for it."""
    before = model.config._attn_implementation
    layouts: tuple[Layout, ...] = ("shared", "packed", "padded")
    for layout in layouts[not _takes_attention(model) :]:
        try:
            if fits(layout):
                return layout
        except (AttributeError, TypeError, ValueError, RuntimeError):
            pass
        if layout == "shared":
            model.set_attn_implementation(before)
    return None


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether the model's numbers are the same up to rounding."""
    error = F.mse_loss(ours.float(), theirs.float()).sqrt() / theirs.float().std()
    # a model in half precision has rounded its logits
    return bool(error < (1e-4 if theirs.dtype in (torch.float32, torch.float64) else 1e-2))


def sequences(position_ids: Tensor) -> Tensor:
    """The number of each token's sequence (N,)."""
    return (position_ids == 0).cumsum(0) - 1


def rectangle(input_ids: Tensor, position_ids: Tensor, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Packed sequences side by side, padded on the right, and the mask of what they are."""
    sequence = sequences(position_ids)
    shape = (int(sequence[-1]) + 1, int(position_ids.max()) + 1)
    padded, mask = input_ids.new_full(shape, fill), input_ids.new_zeros(shape)
    padded[sequence, position_ids] = input_ids
    mask[sequence, position_ids] = 1
    return padded, mask


def positions(layout: Layout | None, lengths: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Those of sequences of these lengths of prompt and completion, and those of the row or rectangle they lie in.

    What a shared prefix spares is not counted: it is no padding.
    """
    wholes = [prompt + completion for prompt, completion in lengths]
    return sum(wholes), sum(wholes) if layout in ("shared", "packed") else len(wholes) * max(wholes)


class Row(NamedTuple):
    """Sequences in one row, in which tokens that begin several of them stand once.

    Attributes:
        kept: (M,) of the N tokens of the sequences one behind the other, those that stand in the row, in its order.
        place: (N,) where in the row each of the N is.
        counts: of each sequence, in the order of the row, its own tokens there; copies are left out.
        lengths: all its tokens.
        seen: (sum(lengths),) where in the row those stand; None if all are their own.
    """

    kept: Tensor
    place: Tensor
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    seen: Tensor | None


def share(input_ids: Tensor, position_ids: Tensor) -> Row:
    """The row of sequences (N,) that lie one behind the other; positions restart at 0 with every one.

    Beside each other in the order of their tokens, sequences have their longest common prefixes.
    """
    ids, device = input_ids.tolist(), input_ids.device
    starts = [i for i, position in enumerate(position_ids.tolist()) if position == 0]
    spans = [(start, ids[start:end]) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    kept: list[int] = []
    place = [0] * len(ids)
    seen: list[int] = []
    counts, lengths = [], []
    before: list[int] = []
    where: list[int] = []
    for start, tokens in sorted(spans, key=lambda span: span[1]):
        same = _common(before, tokens)
        own = range(start + same, start + len(tokens))
        where = where[:same] + list(range(len(kept), len(kept) + len(own)))
        kept += own
        place[start : start + len(tokens)] = where
        if own:
            counts.append(len(own))
            lengths.append(len(tokens))
            seen += where
        before = tokens
    shared = len(kept) < len(ids)
    return Row(
        torch.tensor(kept, device=device),
        torch.tensor(place, device=device),
        tuple(counts),
        tuple(lengths),
        torch.tensor(seen, device=device) if shared else None,
    )


def _common(before: Sequence[int], tokens: Sequence[int]) -> int:
    """So many first tokens are taken from the sequence before; of a copy all, whose numbers then are the same bits."""
    limit = min(len(before), len(tokens))
    same = next((i for i in range(limit) if before[i] != tokens[i]), limit)
    return same if same >= LEAST_PREFIX or same == len(tokens) else 0


def _shared(model: Any, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
    row = share(input_ids, position_ids)
    # asked again for a copy of what was asked, a critic's; other attention would ignore the row, and mix sequences
    if not _takes_attention(model):
        raise ValueError(f"shared prefixes need sdpa attention, the model has {model.config._attn_implementation}")
    # four dimensions: a mask of one's own, of which transformers makes no other
    nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    found = {"attention_mask": nothing, ROW: row}
    return _one_row(model, input_ids[row.kept], position_ids[row.kept], row.place[keep], **found)


def _packed(model: Any, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
    """transformers makes the block-diagonal mask where position ids restart and no attention mask is given."""
    return _one_row(model, input_ids, position_ids, keep)


def _one_row(model: Any, input_ids: Tensor, position_ids: Tensor, keep: Tensor, **more: Any) -> Tensor:
    row = {"input_ids": input_ids[None], "position_ids": position_ids[None], "use_cache": False, **more}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return last(model(**row, logits_to_keep=keep))[0]
    return last(model(**row))[0, keep]


def _padded(model: Any, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
    """For models that cannot tell packed sequences apart."""
    padded, mask = rectangle(input_ids, position_ids)
    out = last(model(input_ids=padded, attention_mask=mask, use_cache=False))
    return out[sequences(position_ids)[keep], position_ids[keep]]


def last(out: Any) -> Tensor:
    """The logits of a language model, or the last hidden states of what is below its head."""
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def _takes_attention(model: Any) -> bool:
    """Give a model `attention`, if it has the attention that this one is made of."""
    if model.config._attn_implementation == ATTENTION:
        return True
    if model.config._attn_implementation != "sdpa":
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    return True


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' scaled dot-product attention, for a `Row` sequence by sequence.

    Each attends from its own tokens to all of its tokens: the work and the memory are those of the sequences, where a
    mask of the whole row would take the square of its length.

    Args:
        module: the layer.
        query: (1, heads, M, width); key and value (1, heads of theirs, M, width).
        attention_mask: without a `Row`, what `sdpa_attention_forward` takes.
        options: likewise, and the `Row`.

    Raises:
        ValueError: the model wants of its attention what is not done here.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    row: Row | None = options.pop(ROW, None)
    if row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            raise ValueError(f"{name} is not known to the attention over shared prefixes")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ValueError("attention over shared prefixes is causal")
    window = options.get("sliding_window")
    if row.seen is not None:
        key, value = key.index_select(2, row.seen), value.index_select(2, row.seen)
    # not in batches of one shape: which thread takes a head would depend on what else is in the row, and with it, on
    # CPUs, the last bits of narrow heads; a policy that has not moved would differ from its reference
    out = []
    parts = (query.split(row.counts, 2), key.split(row.lengths, 2), value.split(row.lengths, 2))
    for q, k, v in zip(*parts, strict=True):
        mask = _mask(q.shape[2], k.shape[2], window, q.device)
        out.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(out, 1), None


def _mask(own: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of its tokens (1, 1, own, length) the last ones of a sequence see; None where attention knows it itself."""
    if own in (1, length) and (window is None or window >= length):
        return None
    distance = torch.arange(length - own, length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < (length if window is None else window)))[None, None]
