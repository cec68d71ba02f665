"""Which completions become training data: rejection sampling, pairs from scores, splits, filters, best of n, groups.

Scores come as (P, n), n completions for each of P prompts, or (n,) for one prompt: tensors, arrays or lists. A `mask`
says which completions there are, where prompts have unequally many; what stands elsewhere has no influence. Results
are indices into the columns. NaN among the scores is an error: it compares as false, which would decide silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.kernels import _checks


def _tensor(name: str, value: Any) -> Tensor:
    """A tensor of what is one, or an array or a list of numbers."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor, an array or a list of numbers, got {type(value).__name__}") from None
    return tensor.detach()


def _scores(name: str, value: Any) -> Tensor:
    """Scores in fp32 or fp64."""
    scores = _tensor(name, value)
    if scores.dtype in _checks.INTEGERS:
        # above 2^24 fp32 would make ties
        return scores.double()
    _checks.tensor(name, scores, _checks.FLOATS)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _no_nan(name: str, scores: Tensor, counts: Tensor | None = None) -> None:
    bad = scores.isnan() if counts is None else scores.isnan() & counts
    if bad.any():
        raise ValueError(f"{name}{bad.nonzero()[0].tolist()} is NaN")


def _lists(name: str, value: Any, mask: Any | None) -> tuple[Tensor, Tensor, bool]:
    """Scores (P, n), which of them there are, and whether the prompts' dimension was missing."""
    scores = _scores(name, value)
    if scores.dim() not in (1, 2):
        raise ValueError(f"{name} has shape {tuple(scores.shape)}, expected (P, n) or (n,)")
    there = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        there = _checks.tensor("mask", _tensor("mask", mask), (torch.bool,))
        _checks.same_device("mask", there, name, scores)
        _checks.shape("mask", there, scores.shape, f"it must match {name}")
    single = scores.dim() == 1
    if single:
        scores, there = scores[None], there[None]
    _no_nan(name, scores, there)
    return scores, there, single


def _integer(name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def _not_negative(name: str, value: object) -> float:
    number = _checks.number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be in [0, inf), got {number:g}")
    return number


class RejectionSamples(NamedTuple):
    """What `rso_rejection_sample` accepted.

    Attributes:
        indices: int64 (P, num_samples) or (num_samples,), columns of the rewards in the order of acceptance.
        sweeps: int64 (P,) or (), how many times the candidates were gone through.
        acceptance: fp64 (P,) or (), the accepted share of all that was tried.
    """

    indices: Tensor
    sweeps: Tensor
    acceptance: Tensor


def rso_rejection_sample(
    rewards: Any,
    num_samples: int,
    *,
    beta: float = 0.5,
    candidates: Any | None = None,
    mask: Any | None = None,
    generator: torch.Generator | None = None,
) -> RejectionSamples:
    """Statistical rejection sampling: of each prompt's candidates as many as are wanted, towards π_ref exp(r/β).

    Candidates are gone through in their order, each accepted with probability exp((r - r_max)/β) and then taken out,
    r_max the largest reward of those that were left when the sweep began; sweeps follow until enough are accepted.
    Sampling stops inside a sweep, at the last sample that is wanted.

    Algorithm 1 keeps candidates in a map: equal ones are one candidate, at the place of the first, with the reward of
    the last. On a small vocabulary, where candidates repeat, the law of what is accepted is then not π_ref exp(r/β):
    far from it, if every answer is among them. Without `candidates` duplicates stay candidates of their own, and the
    first accepted sample has that law up to an error that falls geometrically in n.

    Source: RSO, arXiv:2309.06657, Algorithm 1.

    Args:
        rewards: (P, n) or (n,), infinite ones included: what is at r_max is always accepted.
        num_samples: of each prompt, at least 1 and at most the number of its (distinct) candidates.
        beta: in [0, inf). At 0 the best are taken, ties in their order. It is not the β of the losses.
        candidates: int of the shape of rewards, equal where candidates of a prompt are the same: duplicates collapse.
        mask: bool of the shape of rewards, which candidates there are.
        generator: draws, on the device of the rewards.

    Returns:
        RejectionSamples. Of collapsed duplicates the index is the last one's, whose reward counted.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a reward is NaN, beta is outside its domain, shapes do not match, or a prompt has fewer distinct
            candidates than num_samples.
    """
    values, there, single = _lists("rewards", rewards, mask)
    values = values.double()
    wanted, temperature = _integer("num_samples", num_samples, 1), _not_negative("beta", beta)
    prompts, n = values.shape
    position = torch.arange(n, device=values.device).expand(prompts, n)
    place, index = position, position
    if candidates is not None:
        there, place, index = _collapsed(candidates, there, single)
    if (there.sum(1) < wanted).any():
        row = int((there.sum(1) < wanted).nonzero()[0])
        kind = "candidates" if candidates is None else "distinct candidates"
        raise ValueError(f"num_samples is {wanted}, but rewards[{row}] has {int(there[row].sum())} {kind}")
    # in the order of the sweep
    order = torch.where(there, place, n).argsort(dim=1, stable=True)
    values, left, index = values.gather(1, order), there.gather(1, order), index.gather(1, order)

    indices = values.new_zeros((prompts, wanted + 1), dtype=torch.int64)
    accepted, tried, sweeps = (torch.zeros(prompts, dtype=torch.int64, device=values.device) for _ in range(3))
    while (open_ := accepted < wanted).any():
        largest = values.masked_fill(~left, -math.inf).amax(1, keepdim=True)
        exponent = torch.where(values == largest, 0, (values - largest) / temperature)
        uniform = torch.rand(values.shape, generator=generator, device=values.device, dtype=torch.float64)
        taken = left & open_[:, None] & (uniform.log() < exponent)
        rank = accepted[:, None] + taken.cumsum(1)
        # who comes after the last sample that is wanted is not tried any more
        reached = left & open_[:, None] & (rank - taken.long() < wanted)
        taken &= reached
        indices.scatter_(1, torch.where(taken, rank - 1, wanted), index)
        left = left & ~taken
        accepted, tried, sweeps = accepted + taken.sum(1), tried + reached.sum(1), sweeps + open_
    found = indices[:, :wanted], sweeps, accepted / tried.clamp(min=1).double()
    return RejectionSamples(*(t[0] for t in found)) if single else RejectionSamples(*found)


def _collapsed(candidates: Any, there: Tensor, single: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A map's entries, each at the column of its last occurrence: the place of the first one, and that column."""
    ids = _checks.tensor("candidates", _tensor("candidates", candidates), _checks.INTEGERS)
    _checks.same_device("candidates", ids, "rewards", there)
    _checks.shape("candidates", ids, there[0].shape if single else there.shape, "one id per reward")
    ids = ids[None] if single else ids
    n = ids.shape[1]
    column = torch.arange(n, device=ids.device).expand_as(ids)
    # what is not there is equal to nothing: each stands behind the others in a group of its own
    order = ids.argsort(dim=1, stable=True)
    order = order.gather(1, (~there).gather(1, order).long().argsort(dim=1, stable=True))
    sorted_ids, sorted_there = ids.gather(1, order), there.gather(1, order)
    new = torch.ones_like(there)
    new[:, 1:] = (sorted_ids[:, 1:] != sorted_ids[:, :-1]) | ~sorted_there[:, 1:]
    last = torch.ones_like(there)
    last[:, :-1] = new[:, 1:]
    begins = torch.where(new, column, 0).cummax(1).values
    first = order.gather(1, begins)
    back = order.argsort(1)
    return (last & sorted_there).gather(1, back), first.gather(1, back), column


class Pairs(NamedTuple):
    """Pairs of completions, by prompt.

    Attributes:
        prompts: int64 (M,), rows of the scores; 0 where there is one prompt.
        chosen: int64 (M,), columns.
        rejected: int64 (M,), columns.
        margins: (M,), by how much the chosen score is the larger, or P(chosen preferred) - 1/2: 0 where the two were
            tied, and the first of the pair was chosen.
    """

    prompts: Tensor
    chosen: Tensor
    rejected: Tensor
    margins: Tensor


class _Judge:
    """Who wins: by scores (P, n), or by the probabilities of winning (P, n, n)."""

    def __init__(self, scores: Any | None, win_probability: Any | None) -> None:
        if (scores is None) == (win_probability is None):
            raise ValueError("give either scores or win_probability")
        if scores is not None:
            self.values, _, _ = _lists("scores", scores, None)
            return
        values = _scores("win_probability", win_probability)
        if values.dim() not in (2, 3) or values.shape[-1] != values.shape[-2]:
            raise ValueError(f"win_probability has shape {tuple(values.shape)}, expected (P, n, n) or (n, n)")
        # NaN is not in the interval either
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("win_probability must be in [0, 1]")
        self.values = values[None] if values.dim() == 2 else values

    def pairs(self, first: Tensor, second: Tensor) -> Pairs:
        """Of two columns each (P, m), flat."""
        prompts = torch.arange(len(first), device=first.device)[:, None].expand_as(first)
        if self.values.dim() == 2:
            margins = self.values[prompts, first] - self.values[prompts, second]
            # two infinite scores
            margins = torch.where(self.values[prompts, first] == self.values[prompts, second], 0, margins)
        else:
            margins = self.values[prompts, first, second] - 0.5
        won = margins >= 0
        sides = torch.where(won, first, second), torch.where(won, second, first)
        return Pairs(*(t.flatten() for t in (prompts, *sides, margins.abs())))

    def shuffled(self, generator: torch.Generator | None) -> Tensor:
        shape = self.values.shape[:2]
        keys = torch.rand(shape, generator=generator, device=self.values.device, dtype=torch.float64)
        return keys.argsort(1)


def first_round_pairs(
    scores: Any | None = None, *, win_probability: Any | None = None, generator: torch.Generator | None = None
) -> Pairs:
    """Each prompt's completions in ⌊n/2⌋ random pairs, each labelled by its scores: RSO's first-round-rank.

    Source: RSO, arXiv:2309.06657, Sec. 3.

    Args:
        scores: (P, n) or (n,), the larger wins.
        win_probability: (P, n, n) or (n, n) in its stead, entry i, j the probability that i is preferred to j: above
            1/2, i wins. Of a pair one entry is looked at.
        generator: shuffles, on the device of the scores.

    Returns:
        Pairs, ⌊n/2⌋ for every prompt; of an odd number of completions one is in no pair.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: both or neither of scores and win_probability, NaN, or a wrong shape.
    """
    judge = _Judge(scores, win_probability)
    order = judge.shuffled(generator)
    half = order.shape[1] // 2
    return judge.pairs(order[:, :half], order[:, half : 2 * half])


def tournament_pairs(
    scores: Any | None = None, *, win_probability: Any | None = None, generator: torch.Generator | None = None
) -> Pairs:
    """Each prompt's completions in a knock-out tournament, whose n - 1 matches are the pairs: RSO's tournament-rank.

    The first round pairs at random; winners meet in the next one, and of an odd number one passes without a match.
    Every completion but the winner is rejected exactly once.

    Source: RSO, arXiv:2309.06657, Sec. 3; who passes without a match is not verified (here the last in the order).

    Args:
        scores, win_probability, generator: as in `first_round_pairs`.

    Returns:
        Pairs, n - 1 for every prompt, prompt by prompt in the order of the rounds.

    Raises:
        TypeError, ValueError: as `first_round_pairs`.
    """
    judge = _Judge(scores, win_probability)
    players = judge.shuffled(generator)
    rounds: list[Pairs] = []
    while players.shape[1] > 1:
        prompts, half = len(players), players.shape[1] // 2
        pairs = judge.pairs(players[:, :half], players[:, half : 2 * half])
        rounds.append(Pairs(*(t.view(prompts, half) for t in pairs)))
        players = torch.cat([rounds[-1].chosen, players[:, 2 * half :]], 1)
    if not rounds:
        return judge.pairs(players[:, :0], players[:, :0])
    return Pairs(*(torch.cat(parts, 1).flatten() for parts in zip(*rounds, strict=True)))


def large_margin_filter(scores: Any, margin: float, *, mask: Any | None = None) -> Pairs:
    """All pairs of a prompt's completions whose scores differ by more than `margin`: DNO-Prct's filter.

    The scores of DNO-Prct are win rates against the policy's own samples, r̂(y) = the share of K samples that y beats.
    The paper's threshold is not verified.

    Source: DNO, arXiv:2404.03715, Algorithm 2.

    Args:
        scores: (P, n) or (n,).
        margin: in [0, inf). At 0 all pairs but the tied ones stay.
        mask: bool of the shape of scores, which completions there are.

    Returns:
        Pairs, by prompt, then by chosen and by rejected column; none if no pair passes.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a score is NaN, margin is outside its domain, or shapes do not match.
    """
    values, there, _ = _lists("scores", scores, mask)
    least = _not_negative("margin", margin)
    # an infinite score less itself is NaN, which passes nothing
    gaps = values[:, :, None] - values[:, None]
    kept = (gaps > least) & there[:, :, None] & there[:, None]
    prompts, chosen, rejected = kept.nonzero().unbind(1)
    return Pairs(prompts, chosen, rejected, gaps[kept])


class Split(NamedTuple):
    """Rows of a data set in two parts, int64 indices in ascending order."""

    easy: Tensor
    hard: Tensor


def mixed_split(margins: Any, threshold: float) -> Split:
    """Pairs that a reward model tells apart by more than the threshold, and the rest: Mixed Preference Optimization.

    The easy ones are for DPO, the prompts of the hard ones for PPO from the model that DPO gave, which is also its
    reference. |margin| counts, also where the model prefers the rejected response: the paper's rule for such pairs is
    not verified, nor is its threshold (2.0 and 1.0 are quoted). InternVL's MPO is another method (`losses.mixture`).

    Source: arXiv:2403.19443.

    Args:
        margins: (B,), the rewards of the chosen less those of the rejected responses.
        threshold: in [0, inf); a margin of just this size is hard.

    Returns:
        Split; a part may be empty.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a margin is NaN, threshold is outside its domain, or margins is not (B,).
    """
    values, limit = _scores("margins", margins), _not_negative("threshold", threshold)
    if values.dim() != 1:
        raise ValueError(f"margins has shape {tuple(values.shape)}, expected (B,)")
    _no_nan("margins", values)
    easy = values.abs() > limit
    return Split(easy.nonzero()[:, 0], (~easy).nonzero()[:, 0])


def select_best_of_n(rewards: Any, *, mask: Any | None = None) -> Tensor:
    """The column of each prompt's largest reward, of equal ones the first.

    With log π_base(y) as the reward, training on the selected responses is SFT-sharpening. Their law is that of the
    best of n, F(r)ⁿ - F₋(r)ⁿ shared within a tie as the base shares it; not a Gibbs policy.

    Source: arXiv:2412.01951, Sec. 4.1.

    Args:
        rewards: (P, n) or (n,).
        mask: bool of the shape of rewards, which samples there are.

    Returns:
        int64 (P,) or ().

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a reward is NaN, shapes do not match, or a prompt has no sample.
    """
    values, there, single = _lists("rewards", rewards, mask)
    if not (full := there.any(1)).all():
        raise ValueError(f"rewards[{int((~full).nonzero()[0])}] has no sample to select")
    # argmax does not promise the first
    largest = values.masked_fill(~there, -math.inf).amax(1, keepdim=True) if values.numel() else values
    best = (there & (values == largest)).long().cumsum(1).eq(0).sum(1)
    return best[0] if single else best


def ches_scores(
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    *,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
    length_norm: bool = False,
) -> Tensor:
    """⟨H_w, H_l⟩ - ‖H_w‖², H the sum of a response's hidden states: high where training would lower the chosen one.

    The pairs with the highest scores are those to drop. The hidden states are what multiplies the head, at the
    positions that predict the response's tokens: from the last token of the prompt to the last but one of the
    response; of the policy before training.

    Source: centered hidden embedding similarity, arXiv:2410.08847, Definition 2, which two other implementations
    quote.

    Args:
        chosen_hidden, rejected_hidden: (B, T, d), or packed (N, d) with cu_seqlens; fp32, bf16, fp16 or fp64. The two
            may differ in T and N.
        chosen_mask, rejected_mask: bool (B, T) or (N,), True where a position counts. What stands elsewhere has no
            influence, NaN included.
        chosen_cu_seqlens, rejected_cu_seqlens: int32 (B + 1,), boundaries of the packed responses.
        length_norm: divide H by its number of positions: ⟨H_w, H_l⟩/(|w| |l|) - ‖H_w‖²/|w|².

    Returns:
        (B,), fp32 (fp64 for fp64 input), without gradient. Equal responses give 0, and so does a chosen response
        without positions.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes or devices do not match, or boundaries do not rise.
    """
    w, n_w = _summed_hidden("chosen", chosen_hidden, chosen_mask, chosen_cu_seqlens)
    other, n_l = _summed_hidden("rejected", rejected_hidden, rejected_mask, rejected_cu_seqlens)
    _checks.same_device("rejected_hidden", rejected_hidden, "chosen_hidden", chosen_hidden)
    _checks.shape("the sum of rejected_hidden", other, w.shape, "as many responses of the same width as chosen_hidden")
    if length_norm:
        w, other = w / n_w.clamp(min=1)[:, None], other / n_l.clamp(min=1)[:, None]
    # the two terms are of the size 1e6 and cancel: their difference first
    score = (w.double() * (other.double() - w.double())).sum(1)
    return score.to(torch.promote_types(w.dtype, other.dtype))


def _summed_hidden(side: str, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of a side's hidden states (B, d) in at least fp32, and how many they are."""
    name = f"{side}_hidden"
    _checks.tensor(name, hidden, _checks.FLOATS)
    packed = cu_seqlens is not None
    if hidden.dim() != (2 if packed else 3):
        expected = f"(N, d) with {side}_cu_seqlens" if packed else "(B, T, d)"
        raise ValueError(f"{name} has shape {tuple(hidden.shape)}, expected {expected}")
    hidden = hidden.detach()
    counts = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    if mask is not None:
        counts = _checks.tensor(f"{side}_mask", mask, (torch.bool,))
        _checks.same_device(f"{side}_mask", counts, name, hidden)
        _checks.shape(f"{side}_mask", counts, hidden.shape[:-1], f"one for each position of {name}")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden = torch.where(counts[..., None], hidden, 0)
    if cu_seqlens is None:
        return hidden.sum(1, dtype=wide), counts.sum(1)
    _checks.cu_seqlens(f"{side}_cu_seqlens", cu_seqlens, name, hidden)
    _checks.rising(f"{side}_cu_seqlens", cu_seqlens, len(hidden))
    rows = len(cu_seqlens) - 1
    position = torch.arange(len(hidden), device=hidden.device)
    # a position behind the last boundary is in none of the rows, which is one more
    row = torch.searchsorted(cu_seqlens[1:].long(), position, right=True)
    sums = torch.zeros((rows + 1, hidden.shape[1]), dtype=wide, device=hidden.device)
    numbers = torch.zeros(rows + 1, dtype=torch.int64, device=hidden.device)
    return sums.index_add(0, row, hidden.to(wide))[:-1], numbers.index_add(0, row, counts.long())[:-1]


class MaxMinGroups(NamedTuple):
    """What `maxmin_em` found.

    Attributes:
        models: int64 (H,), the model of each user, in the order of the sorted users' ids.
        users: int64 (H,), those ids.
        sizes: int64 (U,), how many users each model has.
        log_likelihoods: fp64 (U, H), of each user's choices under each model.
        history: the log-likelihood of all choices, each under its user's model, after every fit.
        converged: whether no user changed the model in the last step.
    """

    models: Tensor
    users: Tensor
    sizes: Tensor
    log_likelihoods: Tensor
    history: tuple[float, ...]
    converged: bool


def _choices(margins: Any, user: Tensor, count: int) -> Tensor:
    """Σ log σ(margin) over each user's pairs: (U, B) to (U, H)."""
    values = _scores("margins", margins).to(user.device, torch.float64)
    if values.dim() != 2 or values.shape[1] != len(user):
        raise ValueError(f"margins has shape {tuple(values.shape)}, expected (U, {len(user)}): one for each pair")
    _no_nan("margins", values)
    return values.new_zeros((len(values), count)).index_add(1, user, F.logsigmoid(values))


def _users(users: Any) -> tuple[Tensor, Tensor]:
    """The distinct ids in ascending order, and the place among them of each pair's."""
    ids = _checks.tensor("users", _tensor("users", users), _checks.INTEGERS)
    if ids.dim() != 1 or len(ids) == 0:
        raise ValueError(f"users has shape {tuple(ids.shape)}, expected (B,), not empty")
    return ids.unique(return_inverse=True)


def maxmin_assign(margins: Any, users: Any, *, reseed: bool = False) -> Tensor:
    """The model of each user: that under which the user's choices are likeliest, of equals the first.

    One E-step of `maxmin_em`, for who holds the margins of all models.

    Source: MaxMin-RLHF, arXiv:2402.08925, Algorithm 2; its details are not verified.

    Args:
        margins: (U, B), r_u(y_w) - r_u(y_l) of each pair under each of U reward models.
        users: int (B,), whose pair it is.
        reseed: whether a model without users is given one, as in `maxmin_em`; needs as many users as models.

    Returns:
        int64 (H,), one model for each of the sorted distinct users.

    Raises:
        TypeError, ValueError: a wrong type, dtype or shape, a margin is NaN, or there are too few users.
    """
    known, user = _users(users)
    each = _choices(margins, user, len(known))
    models = _first_largest(each)
    if reseed:
        if len(each) > len(known):
            raise ValueError(f"margins are those of {len(each)} models, but there are {len(known)} users")
        _reseed(models, each / torch.bincount(user), len(each))
    return models


def _first_largest(log_likelihoods: Tensor) -> Tensor:
    """The first row that is largest, by column."""
    return (log_likelihoods == log_likelihoods.amax(0)).long().cumsum(0).eq(0).sum(0)


def maxmin_em(
    users: Any,
    fit: Callable[[int, Tensor], Any],
    num_models: int,
    *,
    start: Any | None = None,
    max_steps: int = 50,
    generator: torch.Generator | None = None,
) -> MaxMinGroups:
    """Group users by whose preferences they share, with a reward model for each group: hard EM on Bradley-Terry.

    A step fits each model to the pairs of its users, then gives each user the model under which Σ log σ(margin) of
    their choices is largest. The models are the caller's: `fit` trains one and says what it thinks of all pairs. If it
    returns a maximiser of the likelihood, that of all choices never falls.

    A model that has lost all its users is given the one who is worst described, per pair, of those whose model has
    others. The policy then maximises min over u of the batch's mean reward r_u: a minimum of means, not a mean of
    minima, so the rewards of the models must be on one scale.

    Source: MaxMin-RLHF, arXiv:2402.08925, Algorithm 2; what it does with an empty group is not verified.

    Args:
        users: int (B,), whose pair it is; any ids.
        fit: of a model's number and the indices int64 (n,) of its users' pairs: trains it on them, and returns the
            margins (B,), r(y_w) - r(y_l), of all pairs.
        num_models: at least 1 and at most the number of users.
        start: int (H,), the model of each of the sorted distinct users to begin with; by default at random, as equal
            in size as can be.
        max_steps: at least 1.
        generator: of the random start.

    Returns:
        MaxMinGroups; the models that `fit` trained last are those of `models` if it converged, and else those of the
        step before.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: users is empty, a number is outside its domain, start names no such model or leaves one without
            users, or margins have a wrong shape or are NaN.
    """
    known, user = _users(users)
    count, pairs = len(known), torch.bincount(user)
    number, most = _integer("num_models", num_models, 1), _integer("max_steps", max_steps, 1)
    if number > count:
        raise ValueError(f"num_models is {number}, but there are {count} users")
    if start is None:
        device = user.device if generator is None else generator.device
        models = torch.randperm(count, generator=generator, device=device).to(user.device) % number
    else:
        models = _checks.tensor("start", _tensor("start", start), _checks.INTEGERS).to(user.device, torch.int64)
        _checks.shape("start", models, (count,), "one model for each distinct user")
        if models.min() < 0 or models.max() >= number or len(models.unique()) < number:
            raise ValueError(f"start must hold every number from 0 to {number - 1}, and no other")
    history: list[float] = []
    for _ in range(most):
        margins = []
        for u in range(number):
            found = _scores("what fit returned", fit(u, (models[user] == u).nonzero()[:, 0]))
            _checks.shape("what fit returned", found, (len(user),), "one margin for each pair")
            margins.append(found.to(user.device, torch.float64))
        each = _choices(torch.stack(margins), user, count)
        history.append(float(each.gather(0, models[None]).sum()))
        before, models = models, _first_largest(each)
        _reseed(models, each / pairs, number)
        if converged := torch.equal(before, models):
            break
    return MaxMinGroups(models, known, torch.bincount(models, minlength=number), each, tuple(history), converged)


def _reseed(models: Tensor, per_pair: Tensor, number: int) -> None:
    """Give each model without users one, in place."""
    for empty in range(number):
        sizes = torch.bincount(models, minlength=number)
        if sizes[empty] == 0:
            own = per_pair.gather(0, models[None])[0].masked_fill(sizes[models] < 2, math.inf)
            models[own.argmin()] = empty


__all__ = [
    "MaxMinGroups",
    "Pairs",
    "RejectionSamples",
    "Split",
    "ches_scores",
    "first_round_pairs",
    "large_margin_filter",
    "maxmin_assign",
    "maxmin_em",
    "mixed_split",
    "rso_rejection_sample",
    "select_best_of_n",
    "tournament_pairs",
]
