"""GFlowNet objectives: the flow into a state of a trajectory equals the flow out of it.

A trajectory is a sequence of tokens: state s_t is the prompt with the tokens before t, log PF(s_t -> s_(t+1)) the
log-prob of token t, and the state behind the last token is x. Where one state can be reached from one other alone, as
when text is written from left to right, PB is 1. With d_t = log F(s_t) + log PF - log F(s_(t+1)) - log PB, everything
is a function of the d_t alone, in double.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.affine_scan import affine_scan
from fastpo.kernels.objective import Reduction
from fastpo.losses._tokens import Tokens, check_layout, check_like, check_rows, number_in, reducer, tokens
from fastpo.reference.sequence import sequence_sum


class FlowOutput(NamedTuple):
    """What a flow objective returns.

    Attributes:
        loss: scalar, or (B,) with `reduction="none"`; the only differentiable field.
        log_z: (B,), log F of the state before the first token; at the optimum log Z. 0 for a sequence without tokens.
        residuals: (B,), the residual of the whole trajectory, log F(s_0) + Σ (log PF - log PB) - log F(x).
    """

    loss: Tensor
    log_z: Tensor
    residuals: Tensor


class _Steps(NamedTuple):
    """The steps of trajectories, checked.

    Attributes:
        differences: d_t in fp64, of the shape of the log-probs; 0 where nothing counts.
        counts: int64 (B,), the steps of each trajectory.
        log_z: fp64 (B,).
        dtype: of the results.
    """

    differences: Tensor
    counts: Tensor
    log_z: Tensor
    dtype: torch.dtype


def _wide(value: Tensor, places: Tokens | None) -> Tensor:
    """In fp64, 0 where a token does not count; flat where there are places."""
    return value.double() if places is None else torch.where(places.counts, value.flatten().double(), 0)


def _along(value: Tensor, last: Tensor, places: Tokens | None) -> tuple[Tensor, Tensor]:
    """What a token-level quantity falls by at each token, and what it is before the first; `last` is behind all."""
    if places is None:
        states = torch.cat([value.double(), last.double()[:, None]], 1)
        return states[:, :-1] - states[:, 1:], states[:, 0]
    n = len(places.row)
    states = torch.cat([_wide(value, places), last.double(), value.new_zeros(1, dtype=torch.float64)])
    # the state behind the last token of a sequence stands behind all tokens
    following = torch.where(places.following < n, places.following, n + places.row)
    first = torch.where(places.first < n, places.first, n + places.rows)
    return torch.where(places.counts, states[:n] - states[following], 0), states[first]


def _steps(
    forward: Tensor,
    flows: Tensor | None,
    last: Tensor,
    last_name: str,
    backward: Tensor | None,
    energies: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> _Steps:
    rows = check_layout("forward", forward, mask, cu_seqlens)
    check_rows(last_name, last, "forward", forward, rows)
    for name, value in (("flows", flows), ("backward", backward)):
        if value is not None:
            check_like(name, value, "forward", forward)
    given = [t for t in (forward, flows, last, backward) if t is not None]
    if energies is not None:
        check_like("energies", energies[0], "forward", forward)
        check_rows("final_energies", energies[1], "forward", forward, rows)
        given += energies
    # of rows without padding, neighbours are the next ones
    places = None if mask is None and cu_seqlens is None else tokens(forward, mask, cu_seqlens)
    if places is None:
        counts = torch.full((rows,), forward.shape[1], dtype=torch.int64, device=forward.device)
    else:
        counts = torch.zeros(rows + 1, dtype=torch.int64, device=forward.device)
        counts = counts.index_add(0, places.row, places.counts.long())[:rows]
    if _checks.readable(last):
        bad = (~last.isfinite() & (counts > 0)).nonzero()
        if len(bad):
            at = int(bad[0])
            raise ValueError(
                f"{last_name}[{at}] is {last[at].item()}: the flow into a state must be finite and positive; "
                "give a reward of 0 a floor"
            )
    # a trajectory without steps has no balance, whatever its reward
    last = torch.where(counts > 0, last.double(), 0)
    step = _wide(forward, places)
    if backward is not None:
        step = step - _wide(backward, places)
    log_z = last
    if flows is not None:
        falls, log_z = _along(flows, last, places)
        step = step + falls
    if energies is not None:
        falls, energy = _along(energies[0].detach(), energies[1].detach(), places)
        step, log_z = step - falls, log_z - energy
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    return _Steps(step.view_as(forward), counts, torch.where(counts > 0, log_z, 0).detach(), dtype)


def _output(
    each: Tensor, steps: _Steps, reduce: Callable[[Tensor], Tensor], mask: Tensor | None, cu_seqlens: Tensor | None
) -> FlowOutput:
    residuals = sequence_sum(steps.differences.detach(), mask, cu_seqlens)[0]
    loss = reduce(each.to(steps.dtype))
    return FlowOutput(loss, steps.log_z.to(steps.dtype), residuals.to(steps.dtype))


def _detailed(
    steps: _Steps, reduce: Callable[[Tensor], Tensor], mask: Tensor | None, cu_seqlens: Tensor | None
) -> FlowOutput:
    total = sequence_sum(steps.differences.square(), mask, cu_seqlens)[0]
    return _output(total / steps.counts.clamp(min=1), steps, reduce, mask, cu_seqlens)


def _sub_trajectories(
    steps: _Steps, decay: float, reduce: Callable[[Tensor], Tensor], mask: Tensor | None, cu_seqlens: Tensor | None
) -> FlowOutput:
    """Σ_(i<j) λ^(j-i) (b_j - b_i)² / Σ_(i<j) λ^(j-i), b the running sum of d, by three scans.

    M0, M1, M2 of a state are the sums over the states i before it of λ^(j-i) (b_j - b_i)^k. From one state to the next,
    whose b is larger by d:

        M0 <- λ (M0 + 1),  M1 <- λ M1 + d M0,  M2 <- λ M2 + 2 d M1 - d² M0,  each with the new ones

    The sums are about b_j itself. About 0, they would be as large as the square of b, whose size is log Z.
    """
    d = steps.differences

    def scan(b: Tensor) -> Tensor:
        return affine_scan(decay, b, reverse=False, mask=mask, cu_seqlens=cu_seqlens)

    zeroth = scan(torch.full_like(d.detach(), decay))
    first = scan(d * zeroth)
    second = scan(2 * d * first - d.square() * zeroth)
    total, weight = (sequence_sum(m, mask, cu_seqlens)[0] for m in (second, zeroth))
    return _output(total / torch.where(steps.counts > 0, weight, 1), steps, reduce, mask, cu_seqlens)


def detailed_balance(
    forward: Tensor,
    flows: Tensor,
    log_rewards: Tensor,
    *,
    backward: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> FlowOutput:
    """The mean over the steps of (log F(s_t) + log PF - log F(s_(t+1)) - log PB)², F(x) = R(x).

    Where every trajectory has a weight, it is 0 for the policy R/Z alone. torchgfn takes the mean over the steps of all
    trajectories together.

    Source: GFlowNet Foundations, arXiv:2111.09266; Trajectory balance, arXiv:2201.13259, Eq. 7 (its number is from
    memory). Elsewhere: torchgfn: DBGFlowNet.

    Args:
        forward: log PF of each token, fp32, bf16, fp16 or fp64: padded (B, T), or packed (N,) with cu_seqlens.
        flows: log F of the state in which each token is chosen, laid out as forward.
        log_rewards: (B,), log R of the whole; or, of a trajectory that was cut, log F of the state where it was.
        backward: log PB of each step, laid out as forward; None: every state has one parent.
        mask: bool, of the shape of forward, True where a token counts; a step leads from one that counts to the next.
            What stands elsewhere has no influence, NaN included.
        cu_seqlens: int32 (B + 1,), boundaries of the packed sequences.
        reduction, num_items: as in `fastpo.losses.dpo`.

    Returns:
        FlowOutput, fp32 (fp64 if an argument is); differentiable in forward, backward, flows and log_rewards. A
        sequence without tokens has the loss 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes or devices do not match, or log_rewards is not finite: a reward of 0 has no balance.
    """
    steps = _steps(forward, flows, log_rewards, "log_rewards", backward, None, mask, cu_seqlens)
    reduce = reducer(reduction, num_items, len(steps.counts), forward, "forward")
    return _detailed(steps, reduce, mask, cu_seqlens)


def trajectory_balance(
    forward: Tensor,
    log_z: Tensor,
    log_rewards: Tensor,
    *,
    backward: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> FlowOutput:
    """(log Z + Σ (log PF - log PB) - log R)².

    Source: Trajectory balance, arXiv:2201.13259, Eq. 14 (its number is from memory). Elsewhere: torchgfn: TBGFlowNet.

    Args:
        forward: log PF of each token, padded (B, T), or packed (N,) with cu_seqlens.
        log_z: (), or (B,) where each prompt has its own; learnt with the policy.
        log_rewards, backward, mask, cu_seqlens, reduction, num_items: as in `detailed_balance`.

    Returns, raises: as `detailed_balance`; differentiable in log_z too.
    """
    steps = _steps(forward, None, log_rewards, "log_rewards", backward, None, mask, cu_seqlens)
    rows = len(steps.counts)
    check_rows("log_z", log_z, "forward", forward, rows, shared=True)
    reduce = reducer(reduction, num_items, rows, forward, "forward")
    dtype = torch.float64 if log_z.dtype == torch.float64 else steps.dtype
    there = steps.counts > 0
    start = torch.where(there, log_z.double(), 0)
    total = sequence_sum(steps.differences, mask, cu_seqlens)[0]
    # differences without flows are the steps alone
    residual = (start - torch.where(there, log_rewards.double(), 0)) + total
    loss = reduce(residual.square().to(dtype))
    return FlowOutput(loss, start.detach().to(dtype), residual.detach().to(dtype))


def subtrajectory_balance(
    forward: Tensor,
    flows: Tensor,
    log_rewards: Tensor,
    *,
    lambda_: float = 0.9,
    backward: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> FlowOutput:
    """SubTB(λ): Σ_(i<j) λ^(j-i) r_ij² / Σ_(i<j) λ^(j-i), r_ij the residual of the part from state i to state j.

    In O(T), by three scans; exact to rounding also where log Z is in the thousands. Small λ leads to detailed balance;
    λ = 1 weighs all parts alike.

    Source: Learning GFlowNets from partial episodes, arXiv:2209.12782. Elsewhere: torchgfn: SubTBGFlowNet with
    "geometric_within" weights, which is NaN for λ = 1 there.

    Args:
        forward, flows, log_rewards, backward, mask, cu_seqlens, reduction, num_items: as in `detailed_balance`.
        lambda_: in (0, 1]; 0.9 is torchgfn's.

    Returns, raises: as `detailed_balance`.
    """
    number_in("lambda_", lambda_, 0, 1, closed="high")
    steps = _steps(forward, flows, log_rewards, "log_rewards", backward, None, mask, cu_seqlens)
    reduce = reducer(reduction, num_items, len(steps.counts), forward, "forward")
    return _sub_trajectories(steps, lambda_, reduce, mask, cu_seqlens)


def _forward_looking(
    forward: Tensor,
    flows: Tensor,
    energies: Tensor,
    final_energies: Tensor,
    final_flows: Tensor | None,
    backward: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> _Steps:
    if final_flows is None:
        final_flows = torch.zeros_like(_checks.tensor("final_energies", final_energies, _checks.FLOATS))
    for name, value in (("energies", energies), ("final_energies", final_energies)):
        _checks.tensor(name, value, _checks.FLOATS)
    energy = energies, final_energies
    return _steps(forward, flows, final_flows, "final_flows", backward, energy, mask, cu_seqlens)


def fl_detailed_balance(
    forward: Tensor,
    flows: Tensor,
    energies: Tensor,
    final_energies: Tensor,
    *,
    final_flows: Tensor | None = None,
    backward: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> FlowOutput:
    """Forward-looking detailed balance: that of log F(s) = log F̃(s) - E(s), R(x) = exp(-E(x)).

    The residual of a step is log F̃(s_t) + log PF - log F̃(s_(t+1)) - log PB + E(s_(t+1)) - E(s_t): it has a reward of
    its own, so that trajectories need no end. F̃ of a complete one is 1, whereas the official set code leaves it learnt.

    Source: Better training of GFlowNets with local credit, arXiv:2302.01687. Elsewhere: torchgfn:
    DBGFlowNet(forward_looking=True).

    Args:
        forward, backward, mask, cu_seqlens, reduction, num_items: as in `detailed_balance`.
        flows: log F̃ of the state in which each token is chosen, laid out as forward.
        energies: E of those states, laid out as forward; 0 where it is not defined; constants.
        final_energies: (B,), E of the state behind the last token; constants.
        final_flows: (B,), log F̃ there, for trajectories that were cut; None: 0 for all, which are complete.

    Returns, raises: as `detailed_balance`; log_z is log F̃(s_0) - E(s_0).
    """
    steps = _forward_looking(forward, flows, energies, final_energies, final_flows, backward, mask, cu_seqlens)
    reduce = reducer(reduction, num_items, len(steps.counts), forward, "forward")
    return _detailed(steps, reduce, mask, cu_seqlens)


def fl_subtrajectory_balance(
    forward: Tensor,
    flows: Tensor,
    energies: Tensor,
    final_energies: Tensor,
    *,
    lambda_: float = 0.9,
    final_flows: Tensor | None = None,
    backward: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> FlowOutput:
    """Forward-looking SubTB(λ): `subtrajectory_balance` of log F(s) = log F̃(s) - E(s).

    Source: arXiv:2302.01687.

    Args, returns, raises: as `fl_detailed_balance` and `subtrajectory_balance`.
    """
    number_in("lambda_", lambda_, 0, 1, closed="high")
    steps = _forward_looking(forward, flows, energies, final_energies, final_flows, backward, mask, cu_seqlens)
    reduce = reducer(reduction, num_items, len(steps.counts), forward, "forward")
    return _sub_trajectories(steps, lambda_, reduce, mask, cu_seqlens)
