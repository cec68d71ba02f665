"""Affine scans over the tokens of each row, and the returns and advantages that are such scans, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """Packed sequences as padded rows, and back; padded rows as they are."""

    def __init__(self, like: Tensor, cu_seqlens: Tensor | None):
        self.shape, self.packed = like.shape, cu_seqlens is not None
        self.inside: Tensor | None = None
        self.index = torch.zeros(0, dtype=torch.int64, device=like.device)
        self.rows, self.length = (like.shape[0], like.shape[1]) if cu_seqlens is None else (0, 0)
        if cu_seqlens is not None:
            starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
            self.rows, self.length = len(lengths), int(lengths.max()) if len(lengths) else 0
            offset = torch.arange(self.length, device=like.device)
            self.inside = offset < lengths[:, None]
            self.index = torch.where(self.inside, starts[:, None] + offset, 0)

    def pad(self, values: Tensor) -> Tensor:
        """(B, T) of packed values; what is in no sequence is 0."""
        if self.inside is None:
            return values
        if values.numel() == 0:
            return values.new_zeros(self.inside.shape)
        return torch.where(self.inside, values[self.index], values.new_zeros(()))

    def mask(self, mask: Tensor | None, like: Tensor) -> Tensor:
        """(B, T), True for the tokens that count."""
        if mask is None:
            mask = torch.ones(self.shape, dtype=torch.bool, device=like.device)
        return self.pad(mask)

    def unpad(self, values: Tensor) -> Tensor:
        """The padded values in the layout that was given; 0 for tokens in no sequence."""
        if self.inside is None:
            return values
        return values.new_zeros(self.shape).index_put((self.index[self.inside],), values[self.inside])


def _scan(slopes: Tensor, shifts: Tensor, x: Tensor, reverse: bool = True) -> Tensor:
    """The states behind each step of (B, T) slopes and shifts, from x, (B,)."""
    # a slope of 0 forgets also what is inf or NaN
    steps = list(zip(*(t.unbind(1) for t in (slopes, shifts, slopes == 0)), strict=True))
    states: list[Tensor] = []
    for slope, shift, forgets in reversed(steps) if reverse else steps:
        x = slope * torch.where(forgets, x.nan_to_num(0, 0, 0), x) + shift
        states.append(x)
    return torch.stack(states[::-1] if reverse else states, 1) if states else shifts


def affine_scan(
    a: Tensor,
    b: Tensor,
    *,
    initial: Tensor | None = None,
    reverse: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """x_t = a_t x_(t+1) + b_t, as `fastpo.affine_scan` documents it."""
    accumulate = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if initial is not None:
        accumulate = torch.promote_types(accumulate, initial.dtype)
    rows = Rows(b, cu_seqlens)
    counts = rows.mask(mask, b)
    # what is masked keeps the state
    slopes, shifts = (torch.where(counts, rows.pad(t).to(accumulate), keep) for t, keep in ((a, 1), (b, 0)))
    x = shifts.new_zeros(rows.rows) if initial is None else initial.to(accumulate)
    return rows.unpad(torch.where(counts, _scan(slopes, shifts, x, reverse), 0))


def advantages(
    rewards: Tensor,
    values: Tensor | None = None,
    *,
    next_values: Tensor | None = None,
    log_ratios: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    repeat: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    skip: bool = True,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, the recursions of GAE (1506.02438 eq. 16) and V-trace (1802.01561 eq. 1) in one.

    δ_t = ρ_t (r_t + γ V_(t+1) - V_t) and x_t = δ_t + γ λ c_t x_(t+1); returns are x + V. Without log-ratios ρ = c = 1
    and the advantages are x; with them they are ρ_t (r_t + γ (V_(t+1) + x_(t+1)) - V_t).

    Args:
        rewards, values, next_values, log_ratios: floats (B, T), or (N,) with `cu_seqlens`; without values they are 0.
        terminated: bool, like rewards: nothing comes behind the token.
        truncated: bool: what comes behind it has a value, but is not carried.
        mask: what is masked is passed over (`skip`), or, between tokens that count, a step without reward and value.
        bootstrap: (B,), the value behind the last token that counts; without values, the return there.
        repeat: bool (B,), the value behind it is the last token's own.
    """
    given = [t for t in (rewards, values, next_values, log_ratios, bootstrap) if t is not None]
    accumulate = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    rows = Rows(rewards, cu_seqlens)
    counts = rows.mask(mask, rewards)

    def floats(t: Tensor | None) -> Tensor:
        return (
            torch.zeros(counts.shape, dtype=accumulate, device=rewards.device)
            if t is None
            else torch.where(counts, rows.pad(t).to(accumulate), 0)
        )

    def flags(t: Tensor | None) -> Tensor:
        return torch.zeros_like(counts) if t is None else rows.pad(t) & counts

    r, v, next_v, log_ratio = (floats(t) for t in (rewards, values, next_values, log_ratios))
    ends = flags(terminated)
    stops = ends | flags(truncated)
    zero = r.new_zeros(rows.rows)
    behind = zero if bootstrap is None else bootstrap.to(accumulate)
    x, following = (zero, behind) if values is not None else (behind, zero)
    later = counts.flip(1).cumsum(1).flip(1) > counts.long()
    step = counts if skip else counts | later
    # the next step of each token; behind the last one is T, where the bootstrap stands
    place = torch.where(step, torch.arange(rows.length, device=step.device), rows.length)
    place = torch.cat([place[:, 1:], place.new_full((rows.rows, min(rows.length, 1)), rows.length)], 1)
    ahead = place.flip(1).cummin(1).values.flip(1)

    def next_of(each: Tensor, last: Tensor) -> Tensor:
        return torch.cat([each, last[:, None]], 1).gather(1, ahead)

    if next_values is None:
        next_v = next_of(v, following)
        if repeat is not None:
            next_v = torch.where(repeat[:, None] & ~later, v, next_v)
    gained = torch.where(ends, 0, gamma * next_v)
    carried = torch.where(stops, 0, gamma * torch.ones_like(r))
    ratio = log_ratio.exp()
    rho, slope = (1, 1) if log_ratios is None else (ratio.clamp(max=rho_bar), ratio.clamp(max=c_bar))
    delta = rho * (r + gained - v)
    found = _scan(torch.where(step, carried * lam * slope, 1), torch.where(step, delta, 0), x)
    advantage = found
    if log_ratios is not None:
        push = rho * carried
        advantage = delta + torch.where(push == 0, 0, push * next_of(found, x))
    advantage, target = (rows.unpad(torch.where(counts, t, 0)) for t in (advantage, found + v))
    return advantage, target
