"""Statistics of the batch, and transport over it, in two processes: as in one process with both batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastpo import losses, rewards
from fastpo.reference.policy import AGGREGATIONS, PolicyObjective, policies
from tests.kernels import test_policy


def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """Two log-probs and a label per row; the first half has one class alone, and a negative mean."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    return policy + torch.tensor([-1.0] * 4 + [2.0] * 4), reference, torch.arange(8) >= 4


def statistics(rows: slice, group: bool) -> list[Tensor]:
    policy, reference, labels = (t[rows] for t in numbers())
    margins = policy - reference
    generator = torch.Generator().manual_seed(1)
    of_beta = losses.beta_dpo_statistics(margins, generator=generator, process_group=group)
    return [
        losses.kto_kl(policy, reference, process_group=group),
        losses.bco_delta(margins, labels, process_group=group),
        *losses.alpha_dpo_statistics(margins, process_group=group),
        of_beta.batch_beta,
        *of_beta.moments,
        of_beta.keep,
    ]


def pasts(rows: slice, group: bool) -> tuple[list[dict], list[Tensor]]:
    """The states of what knows the past after two batches, and rewards whitened over the batch, of these rows."""
    policy, reference, labels = (t[rows] for t in numbers())
    estimate, baseline = losses.PartitionEstimate(decay=0.9), losses.RewardBaseline(10)
    history, versions = rewards.HapoHistory(statistic="mean"), rewards.VersionNormalizer()
    contexts = torch.tensor([3, 3, 5, 3, 5, 8, 3, 8])[rows]
    for batch in (policy, reference.masked_fill(labels, -torch.inf)):
        estimate.update(batch, contexts, process_group=group)
    for batch in (policy, reference):
        baseline.update(batch, process_group=group)
        versions.update(batch, 2, process_group=group)
        history.update(contexts.tolist(), (10 * batch.exp()).long(), labels, process_group=group)
    several = torch.stack([policy, reference], 1)
    whitened = [
        rewards.weighted_rewards(several, [1.0, 0.5], normalize=True, process_group=group),
        rewards.multi_objective(several, group_ids=labels.long(), process_group=group),
    ]
    return [s.state_dict() for s in (estimate, baseline, history, versions)], whitened


# pairs of the first rank, of eight: ranks need not have equally many
FIRST = 3


def aot(name: str, rows: slice, group: bool) -> tuple[Tensor, ...]:
    """Loss per pair, gradients of the sum over 8, and a second derivative, of what stands in these rows."""
    generator = torch.Generator().manual_seed(5)
    given = [3 * torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(4)]
    policies = [t[rows].clone().requires_grad_() for t in given[:2]]
    arguments = (*policies, given[2][rows], given[3][rows])
    function, more = getattr(losses, name), {"beta": 0.3, "label_smoothing": 0.1, "process_group": group}
    each = function(*arguments, reduction="none", **more).loss
    loss = function(*arguments, num_items=8, **more).loss
    grads = torch.autograd.grad(loss, policies, create_graph=True)
    # in every rank's sum all ranks' rows may have a part
    weights = torch.linspace(-1, 2, 8, dtype=torch.float64)[rows]
    second = torch.autograd.grad(sum((weights * g * g).sum() for g in grads), policies)
    return tuple(t.detach() for t in (each, *grads, *second))


def policy_step(row: PolicyObjective, aggregation: str, rows: slice, group: bool, whole: bool = True) -> list[Tensor]:
    """Loss, the gradient of a parameter that all tokens share, sums and maxima, over all ranks.

    With everything that a method adds switched on; `whole`: by the denominator of all ranks.
    """
    given = {name: value[rows] for name, value in test_policy.make(row, "padded", 8, 7, seed=3).items()}
    name, mask = test_policy.leaves_of(row)[0], given["mask"]
    items = {"token_mean": mask.sum(), "const_norm": torch.tensor(len(mask))}.get(aggregation, mask.any(1).sum())

    def over_ranks(value: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        value = value.detach().clone()
        if group:
            dist.all_reduce(value, op)
        return value

    shift = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    options = test_policy.settings(row, aggregation=aggregation)
    out = getattr(losses, row.name)(
        **{**given, name: given[name] + shift}, **options, num_items=over_ranks(items) if whole else None
    )
    (grad,) = torch.autograd.grad(out.loss, shift)
    maxima = over_ranks(out.metrics.maxima, dist.ReduceOp.MAX)
    return [over_ranks(out.loss), over_ranks(grad), over_ranks(out.metrics.sums), maxima]


def chosen_tokens(rows: slice, group: bool) -> list[Tensor]:
    """What the filters choose of these rows' tokens, twice where one rank has none; and the mean of weights."""
    generator = torch.Generator().manual_seed(2)
    logprobs, advantages, entropy = (torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(8, 6, generator=generator) < 0.8
    late = mask & (torch.arange(8) >= FIRST)[:, None]
    p, a, e, m, few = (t[rows] for t in (2 * logprobs, advantages, entropy, mask, late))
    draws = torch.Generator().manual_seed(3)
    # each rank has its own part of one draw
    torch.rand(rows.start or 0, 6, generator=draws, dtype=torch.float64)
    options = {"mask": m, "process_group": group}
    return [
        losses.clip_cov_tokens(p, a, fraction=0.1, low=0.0, generator=draws, **options),
        losses.clip_cov_tokens(p, a, old_logprobs=p - 0.5, fraction=1.0, low=0.0, **options),
        losses.kl_cov_tokens(p, a, fraction=0.2, **options),
        losses.kl_cov_tokens(p, a, fraction=0.2, mask=few, process_group=group),
        losses.entropy_mask(e, 0.3, **options),
        losses.entropy_mask(e, 0.3, mask=few, process_group=group),
        losses.mean_rollout_weight(p, e, losses.RolloutCorrection.tis(), **options),
    ]


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(0, FIRST) if rank == 0 else slice(FIRST, 8)
    steps = {(row.name, a): policy_step(row, a, rows, True) for row in policies() for a in AGGREGATIONS}
    torch.save(steps, f"{folder}/policy-{rank}")
    torch.save(chosen_tokens(rows, True), f"{folder}/tokens-{rank}")
    torch.save([aot(name, rows, True) for name in ("aot", "aot_unpaired")], f"{folder}/aot-{rank}")
    torch.save(statistics(slice(4 * rank, 4 * rank + 4), True), f"{folder}/{rank}")
    torch.save(pasts(slice(4 * rank, 4 * rank + 4), True), f"{folder}/pasts-{rank}")
    # a batch of nothing on one rank
    zero = torch.zeros(3 * rank, requires_grad=True)
    out = losses.aot_unpaired(zero, zero, zero.detach(), zero.detach(), num_items=3, process_group=True)
    assert abs(out.loss.item() - rank * 0.6931472) < 1e-6
    out.loss.backward()
    # and on all of them
    nothing = torch.zeros(0, requires_grad=True)
    losses.aot_unpaired(*[nothing] * 4, num_items=3, process_group=True).loss.backward()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left."""
    if not dist.is_available():
        pytest.skip("this torch has no distributed")
    path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (str(path),), nprocs=2)
    return path


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_transport_over_ranks(name: str, folder: Path):
    """Two ranks' pairs are one batch: losses, the gradients of their sum, and the derivatives of those."""
    parts = [torch.load(folder / f"aot-{rank}")[("aot", "aot_unpaired").index(name)] for rank in (0, 1)]
    whole = aot(name, slice(None), False)
    for place, want in enumerate(whole):
        found = torch.cat([part[place] for part in parts])
        torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-15)
    # each rank by itself is another transport
    alone = [aot(name, rows, False) for rows in (slice(0, FIRST), slice(FIRST, 8))]
    assert (torch.cat([part[1] for part in alone]) - whole[1]).abs().max() > 1e-3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("row", list(policies()), ids=lambda row: row.name)
def test_policy_gradients_add_up(row: PolicyObjective, aggregation: str, folder: Path):
    """Two ranks' sequences are one batch: the sum of their gradients is its gradient, and so are loss and metrics."""
    want = policy_step(row, aggregation, slice(None), False, whole=False)
    for rank in (0, 1):
        found = torch.load(folder / f"policy-{rank}")[row.name, aggregation]
        for ours, exact in zip(found, want, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)
    # a mean of the ranks' means is something else: they have not equally many tokens, nor sequences
    alone = [policy_step(row, aggregation, rows, False, whole=False)[1] for rows in (slice(0, FIRST), slice(FIRST, 8))]
    assert (sum(alone) / 2 - want[1]).abs().max() > 1e-4


def test_filters_choose_over_ranks(folder: Path):
    parts = [torch.load(folder / f"tokens-{rank}") for rank in (0, 1)]
    alone = [chosen_tokens(rows, False) for rows in (slice(0, FIRST), slice(FIRST, 8))]
    *chosen, weight = chosen_tokens(slice(None), False)
    for part, own in zip(parts, alone, strict=True):
        torch.testing.assert_close(part[-1], weight, rtol=1e-14, atol=0)
        assert abs(own[-1] - weight) > 1e-3
    for place, want in enumerate(chosen):
        assert torch.equal(torch.cat([part[place] for part in parts]), want), place
        assert want.any() and not want.all()
        # one rank's tokens, of which there are none on the other, are the batch
        assert torch.equal(torch.cat([part[place] for part in alone]), want) == (place in (3, 5)), place


def test_what_is_no_group():
    x = torch.zeros(2)
    for choose in (losses.kl_cov_tokens, losses.clip_cov_tokens):
        with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup"):
            choose(x, x, process_group="world")
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup"):
        losses.entropy_mask(x, 0.5, process_group="world")
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup .* got str"):
        losses.aot(x, x, x, x, process_group="world")


def test_two_ranks(folder: Path):
    ranks = [torch.load(folder / str(rank)) for rank in (0, 1)]
    whole = statistics(slice(None), False)
    for place, want in enumerate(whole[:-1]):
        for found in ranks:
            torch.testing.assert_close(found[place], want, rtol=1e-14, atol=1e-15)
    # a rank keeps its own rows of the draw
    assert torch.equal(torch.cat([found[-1] for found in ranks]), whole[-1])
    # a mean of means that were clamped on each rank would be another number
    policy, reference, _ = numbers()
    clamped = sum(losses.kto_kl(policy[a : a + 4], reference[a : a + 4]) for a in (0, 4)) / 2
    assert abs(clamped - whole[0]) > 0.1


def numbers_of(state: object) -> list[float]:
    """All numbers of a state, in the order of its keys."""
    if isinstance(state, dict):
        return [
            x for key in sorted(state) for x in [float(key) if isinstance(key, int) else 0.0, *numbers_of(state[key])]
        ]
    if isinstance(state, (list, tuple)):
        return [x for part in state for x in numbers_of(part)]
    return [float(state)]


def test_pasts_over_ranks(folder: Path):
    """All ranks have the states that one process has; groups here are of one rank each."""
    ranks = [torch.load(folder / f"pasts-{rank}") for rank in (0, 1)]
    states, whitened = pasts(slice(None), False)
    for found, _ in ranks:
        assert numbers_of(found) == pytest.approx(numbers_of(states), rel=1e-13)
    for place, want in enumerate(whitened):
        torch.testing.assert_close(torch.cat([rank[1][place] for rank in ranks]), want, rtol=1e-12, atol=1e-14)
    alone = pasts(slice(0, 4), False)
    assert numbers_of(alone[0]) != pytest.approx(numbers_of(states))
    assert (alone[1][0] - whitened[0][:4]).abs().max() > 1e-3
