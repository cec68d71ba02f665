"""Which tokens of demonstrations count, and how much: what `fastpo.losses.sft` and its like take, from data alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.losses._tokens import check_mask, counted, number_in, tokens
from fastpo.reference.sequence import sequence_sum


def document_filter(scores: Tensor, *, threshold: float = 5.6e-4, mask: Tensor | None = None) -> Tensor:
    """PHF's filtering: which documents are kept, those whose average score is at most the threshold.

    Args:
        scores: (B, T), how bad each token is, or (B,), each document.
        threshold: the paper's for toxicity.
        mask: bool, of the shape of scores (B, T), the tokens that count. A document without any is kept.

    Returns:
        bool (B,): `mask & kept[:, None]` is what `fastpo.losses.sft` takes.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes.

    Source: PHF, arXiv:2302.08582, §2.
    """
    _checks.tensor("scores", scores, _checks.FLOATS)
    number_in("threshold", threshold, -float("inf"), float("inf"))
    if scores.dim() not in (1, 2):
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected (B, T) or (B,)")
    if mask is not None:
        check_mask("mask", mask, "scores", scores)
        if scores.dim() == 1:
            raise ValueError("mask is for scores of tokens, but scores is (B,)")
    sums, counts = sequence_sum(scores.double(), mask)
    return sums <= threshold * (1 if counts is None else counts)


def conditional_tokens(
    segments: Sequence[Sequence[int]],
    scores: Sequence[float],
    *,
    aligned: int,
    misaligned: int,
    threshold: float = 5.6e-4,
    drop: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """PHF's conditional training: every segment behind a control token that says whether it is good.

    Args:
        segments: token ids of the sentences of one document.
        scores: one per segment, how bad it is.
        aligned, misaligned: ids of the control tokens, for scores of at most the threshold and above it. They need
            embeddings of their own; prompts of the trained model end in the first.
        threshold: the paper's for toxicity.
        drop: the probability that a control token is left out, in [0, 1]; the paper's is 0.01, and 0.1 for PEP8.
        generator: draws what is left out.

    Returns:
        the ids int64 (N,), and bool (N,), False at the control tokens: they are context and not imitated.

    Raises:
        ValueError: there are not as many scores as segments, or drop is outside [0, 1].

    Source: PHF, arXiv:2302.08582, §2.
    """
    if len(segments) != len(scores):
        raise ValueError(f"scores has {len(scores)} entries, segments has {len(segments)}: one per segment")
    number_in("drop", drop, 0, 1, closed="both")
    dropped = torch.rand(len(segments), generator=generator, dtype=torch.float64) < drop
    ids: list[int] = []
    learnt: list[bool] = []
    for segment, score, left_out in zip(segments, scores, dropped.tolist(), strict=True):
        if not left_out:
            ids.append(aligned if score <= threshold else misaligned)
            learnt.append(False)
        ids += segment
        learnt += [True] * len(segment)
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(learnt, dtype=torch.bool)


def _sequences(ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, which count, and the place of each, one row per sequence: (B, K), the places beyond N where nothing is."""
    _checks.tensor("targets", ids, _checks.INTEGERS)
    if ids.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"targets has shape {tuple(ids.shape)}, expected (B, T), or (N,) with cu_seqlens")
    if mask is not None:
        check_mask("mask", mask, "targets", ids)
    if cu_seqlens is None:
        counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        return ids, counts, torch.arange(ids.numel(), device=ids.device).view_as(ids)
    _checks.cu_seqlens("cu_seqlens", cu_seqlens, "targets", ids)
    _checks.rising("cu_seqlens", cu_seqlens, len(ids))
    lengths = cu_seqlens.long().diff()
    longest = int(lengths.max()) if len(lengths) else 0
    place = cu_seqlens[:-1].long()[:, None] + torch.arange(longest, device=ids.device)
    inside = torch.arange(longest, device=ids.device) < lengths[:, None]
    place = torch.where(inside, place, len(ids))
    padded = torch.cat([ids, ids.new_zeros(1)])[place]
    kept = inside if mask is None else inside & torch.cat([mask, mask.new_zeros(1)])[place]
    return padded, kept, place


def previous_tokens(
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The candidates of `token_unlikelihood`: what a sequence has said before, each once, without the current token.

    Args:
        targets: int64 or int32, padded (B, T), or packed (N,) with cu_seqlens; ignore_index for none.
        mask: bool, of the shape of targets, True where a token counts; the others are no candidates and have none.
        cu_seqlens: int32 (S + 1,), boundaries of the packed sequences.
        ignore_index: stands where there is no candidate.

    Returns:
        of the dtype of targets, (B, T, T); or (N, longest sequence). For texts of thousands of tokens, take a part.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes.

    Source: arXiv:1908.04319, §5.
    """
    ids, counts, place = _sequences(targets, mask, cu_seqlens)
    counts = counts & (ids != ignore_index)
    same = (ids[:, :, None] == ids[:, None, :]) & counts[:, :, None] & counts[:, None, :]
    before = torch.ones(same.shape[1:], dtype=torch.bool, device=ids.device).tril(-1)
    first = counts & ~(same & before).any(2)
    there = before & first[:, None, :] & counts[:, :, None] & ~same
    out = torch.where(there, ids[:, None, :], ignore_index)
    if cu_seqlens is None:
        return out
    flat = torch.full((len(targets) + 1, out.shape[2]), ignore_index, dtype=ids.dtype, device=ids.device)
    flat[place.flatten()] = out.flatten(0, 1)
    return flat[:-1]


def repeated_ngrams(
    targets: Tensor, *, n: int = 4, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The `repeats` of `sequence_unlikelihood`: the tokens of n-grams that the sequence has had before.

    The official code leaves out the last n-gram.

    Args:
        targets: int64 or int32, the continuation, padded (B, T), or packed (N,) with cu_seqlens.
        n: at least 1; the paper's is 4.
        mask: bool, of the shape of targets; no n-gram has a token that does not count.
        cu_seqlens: int32 (S + 1,), boundaries of the packed sequences.

    Returns:
        bool, of the shape of targets.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or n is less than 1.

    Source: arXiv:1908.04319, §5.2.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an int, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    ids, counts, place = _sequences(targets, mask, cu_seqlens)
    windows = ids.shape[1] - n + 1
    repeated = torch.zeros_like(counts)
    if windows > 0:
        equal = (ids[:, :, None] == ids[:, None, :]) & counts[:, :, None] & counts[:, None, :]
        same = torch.ones_like(equal[:, :windows, :windows]).tril(-1)
        for k in range(n):
            same = same & equal[:, k : k + windows, k : k + windows]
        begins = same.any(2)
        for k in range(n):
            repeated[:, k : k + windows] |= begins
    if cu_seqlens is None:
        return repeated
    flat = torch.zeros(len(targets) + 1, dtype=torch.bool, device=ids.device)
    flat[place.flatten()] = repeated.flatten()
    return flat[:-1]


def forgetful_mask(mask: Tensor, *, ratio: float = 0.15, generator: torch.Generator | None = None) -> Tensor:
    """Which tokens later ones may attend to: each is hidden with a probability, but the first of its row never.

    It is a mask of keys, to be combined with the causal one, in which a token sees itself; targets are not masked.

    Args:
        mask: bool (B, T), the tokens that are there.
        ratio: in [0, 1]; 0.15 is the paper's from memory, its code's 0.
        generator: draws what is hidden.

    Returns:
        bool (B, T), False where a token is hidden or not there.

    Raises:
        TypeError, ValueError: mask is no bool (B, T), or ratio is outside [0, 1].

    Source: Chain of hindsight, arXiv:2302.02676, §2.
    """
    _checks.tensor("mask", mask, (torch.bool,))
    if mask.dim() != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (B, T)")
    number_in("ratio", ratio, 0, 1, closed="both")
    hidden = torch.rand(mask.shape, generator=generator, device=mask.device, dtype=torch.float64) < ratio
    return mask & (~hidden | (mask.cumsum(1) == 1))


def tl_token_weights(
    keys: Tensor,
    *,
    parameters: Tensor | None = None,
    cap: float = 9.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """TL-Training's weights of tokens: a key token weighs as much as min(others / keys, cap) others, which weigh 1.

    Args:
        keys: bool, padded (B, T), or packed (N,) with cu_seqlens: the tokens that decide which tool is called, as from
            `tl_key_tokens`.
        parameters: bool, of the same shape: tokens of arguments, which weigh 1 but are not counted among the others,
            as in the official code.
        cap: at least 1.
        mask: bool, of the same shape, the tokens that count.
        cu_seqlens: int32 (B + 1,), boundaries of the packed sequences.

    Returns:
        fp32, of the shape of keys, 0 where a token does not count; for `sft` with average="seq_mean". A sequence with
        no key, or with as many as others, has the weight 1 throughout.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or cap is below 1.

    Source: TL-Training, arXiv:2412.15495, and its code.
    """
    _checks.tensor("keys", keys, (torch.bool,))
    number_in("cap", cap, 1, float("inf"), closed="low")
    if keys.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"keys has shape {tuple(keys.shape)}, expected (B, T), or (N,) with cu_seqlens")
    for name, given in (("parameters", parameters), ("mask", mask)):
        if given is not None:
            check_mask(name, given, "keys", keys)
    if cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, "keys", keys)
        _checks.rising("cu_seqlens", cu_seqlens, len(keys))
    like = keys.float()
    counts = counted(mask, like, cu_seqlens)
    key = counts & keys
    other = counts & ~keys if parameters is None else counts & ~keys & ~parameters
    numbers = [sequence_sum(side.double(), None, cu_seqlens)[0] for side in (key, other)]
    ratio = (numbers[1] / numbers[0].clamp(min=1)).clamp(max=cap)
    weight = torch.where((numbers[0] > 0) & (numbers[0] < numbers[1]), ratio, 1.0).float()
    row = tokens(like, mask, cu_seqlens).row.view_as(keys)
    each = torch.cat([weight, weight.new_ones(1)])[row]
    return torch.where(key, each, 1.0) * counts


def tl_key_tokens(name: Sequence[int], others: Sequence[Sequence[int]]) -> list[bool]:
    """Which tokens of a tool's name decide: the first, and those at which another tool's name leaves it.

    Args:
        name: token ids of the name, not empty, with what stands behind it (the bracket) if a longer name of another
            tool may begin with it.
        others: those of the other tools there were.

    Returns:
        one per token of the name.

    Raises:
        ValueError: name is empty.

    Source: TL-Training, arXiv:2412.15495, and its code.
    """
    if not name:
        raise ValueError("name is empty")
    keys = [i == 0 for i in range(len(name))]
    for other in others:
        if list(other) == list(name):
            continue
        shared = 0
        while shared < min(len(name), len(other)) and name[shared] == other[shared]:
            shared += 1
        if shared < len(name):
            keys[shared] = True
    return keys


# what tools say when a call fails; the official code's are of this kind
TOOL_ERRORS = (
    "error",
    "exception",
    "is not defined",
    "unexpected keyword",
    "positional argument",
    "not supported",
    "invalid",
)


def adverse_turns(
    messages: Sequence[Mapping[str, str]],
    *,
    keywords: Sequence[str] = TOOL_ERRORS,
    roles: Sequence[str] = ("function", "tool", "ipython"),
) -> list[bool]:
    """Which turns of a trace are to be left out: the assistant's calls whose answer is an error.

    Args:
        messages: {"role", "content"} in their order.
        keywords: what an answer that is an error contains, whatever the case and everything but letters and digits.
        roles: who answers for the tools.

    Returns:
        one per message; True only for an assistant's, directly before such an answer. The tokens of such a turn get no
        loss.

    Raises:
        ValueError: keywords has an empty one, which everything would contain.

    Source: TL-Training, arXiv:2412.15495 (MAE), and its code, whose list of keywords is its own data's.
    """

    def plain(text: str) -> str:
        return re.sub(r"[\W_]", "", text.lower())

    words = [plain(word) for word in keywords]
    if not all(words):
        raise ValueError("keywords has one without letters or digits")
    adverse = [False] * len(messages)
    for i in range(len(messages) - 1):
        answer = messages[i + 1]
        if messages[i]["role"] == "assistant" and answer["role"] in roles:
            adverse[i] = any(word in plain(answer["content"]) for word in words)
    return adverse
