"""GFlowNet objectives: closed forms, O(T) against O(T²), what they converge to on a tree, layouts, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.losses import FlowOutput
from tests.losses.test_fixed_points import descend, total_variation

NAN = math.nan
NAMES = [
    "detailed_balance",
    "trajectory_balance",
    "subtrajectory_balance",
    "fl_detailed_balance",
    "fl_subtrajectory_balance",
]
by_name = pytest.mark.parametrize("name", NAMES)


def given(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Five trajectories with holes, one of them empty."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(5, 7, generator=generator) < 0.7
    mask[3] = False
    x = {n: torch.randn(5, 7, generator=generator, dtype=torch.float64) for n in ("forward", "backward", "flows")}
    x["forward"] = -x["forward"].abs()
    x["energies"] = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    for n in ("log_rewards", "final_energies", "final_flows", "log_z"):
        x[n] = torch.randn(5, generator=generator, dtype=torch.float64)
    return {n: t.to(dtype) for n, t in x.items()} | {"mask": mask}


def packed(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens one behind the other, with two behind the last sequence."""
    mask = x["mask"]
    out = dict(x)
    for n in ("forward", "backward", "flows", "energies"):
        out[n] = torch.cat([x[n][mask], torch.full((2,), NAN, dtype=x[n].dtype)])
    del out["mask"]
    return out | {"cu_seqlens": torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()}


def call(name: str, x: dict[str, Tensor], **more: object) -> FlowOutput:
    names = ["forward", "flows", "backward", "mask", "cu_seqlens"]
    names += ["energies", "final_energies", "final_flows"] if name.startswith("fl_") else ["log_rewards"]
    if name == "trajectory_balance":
        names = [n for n in names if n != "flows"] + ["log_z"]
    return getattr(losses, name)(**{n: x[n] for n in names if n in x}, **more)


def by_hand(name: str, x: dict[str, Tensor], lambda_: float = 0.9) -> tuple[list[float], list[float]]:
    """Losses and log Z, trajectory by trajectory, by the definition."""
    found, start = [], []
    for row in range(5):
        places = x["mask"][row].nonzero()[:, 0].tolist()
        if not places:
            found.append(0.0)
            start.append(0.0)
            continue
        step = [float(x["forward"][row, t] - x["backward"][row, t]) for t in places]
        if name.startswith("fl_"):
            flow = [float(x["flows"][row, t] - x["energies"][row, t]) for t in places]
            flow.append(float(x["final_flows"][row] - x["final_energies"][row]))
        elif name == "trajectory_balance":
            flow = [float(x["log_z"][row]), float(x["log_rewards"][row])]
            step = [sum(step)]
        else:
            flow = [float(x["flows"][row, t]) for t in places] + [float(x["log_rewards"][row])]
        n = len(step)
        parts = [(i, j) for i in range(n + 1) for j in range(i + 1, n + 1)]
        if "sub" not in name:
            parts = [(i, i + 1) for i in range(n)]
        weights = [lambda_ ** (j - i) for i, j in parts]
        squares = [(flow[i] + sum(step[i:j]) - flow[j]) ** 2 for i, j in parts]
        found.append(sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights))
        start.append(flow[0])
    return found, start


@by_name
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_closed_form(name, backend):
    x = given()
    want, start = by_hand(name, x)
    for inputs in (x, packed(x)):
        with fastpo.use_backend(backend):
            out = call(name, inputs, reduction="none")
        assert out.loss.tolist() == pytest.approx(want, rel=1e-12, abs=1e-14)
        assert out.log_z.tolist() == pytest.approx(start, rel=1e-14)
        assert not out.residuals.requires_grad


@pytest.mark.parametrize("lambda_", [1e-9, 0.5, 1.0])
def test_weights_of_parts(lambda_):
    """Also λ = 1, where geometric series divide by 0; and towards 0 it is detailed balance."""
    x = given()
    out = call("subtrajectory_balance", x, lambda_=lambda_, reduction="none").loss
    assert out.tolist() == pytest.approx(by_hand("subtrajectory_balance", x, lambda_)[0], rel=1e-12, abs=1e-14)
    if lambda_ < 1e-8:
        torch.testing.assert_close(out, call("detailed_balance", x, reduction="none").loss, rtol=1e-7, atol=0)


def test_the_residual_of_the_whole():
    """What each method logs is trajectory balance's residual with its own log Z."""
    x = given()
    for name in ("detailed_balance", "subtrajectory_balance"):
        out = call(name, x)
        whole = call("trajectory_balance", x | {"log_z": out.log_z}, reduction="none")
        torch.testing.assert_close(out.residuals, whole.residuals, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.residuals.square(), whole.loss, rtol=1e-12, atol=1e-12)


@by_name
def test_only_ratios_of_flows_matter(name):
    """A constant added to every log F and log R changes nothing but log Z."""
    x = given()
    shift = 37.5
    moved = x | {n: x[n] + shift for n in ("flows", "log_rewards", "log_z", "final_flows")}
    before, after = call(name, x, reduction="none"), call(name, moved, reduction="none")
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(after.log_z, torch.where(x["mask"].any(1), before.log_z + shift, 0))


@by_name
def test_differences(name):
    """gradcheck, and the second derivative, in everything that is learnt; energies and masked tokens have none."""
    x = given()
    learnt = ["forward", "backward"]
    learnt += {"trajectory_balance": ["log_z", "log_rewards"]}.get(name, ["flows"])
    learnt += ["final_flows"] if name.startswith("fl_") else []
    leaves = [x[n].clone().requires_grad_() for n in learnt]

    def loss(*values: Tensor) -> Tensor:
        return call(name, x | dict(zip(learnt, values, strict=True)), reduction="none").loss

    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)
    grads = torch.autograd.grad(loss(*leaves).sum(), leaves)
    assert all((g[~x["mask"]] == 0).all() for g in grads if g.dim() == 2) and all(g.any() for g in grads)


def quadratic(d: Tensor, lambda_: float) -> Tensor:
    """SubTB(λ) of the differences (B, T) over all pairs of states, in their dtype."""
    b = torch.nn.functional.pad(d.cumsum(1), (1, 0))
    place = torch.arange(b.shape[1])
    apart = (place - place[:, None]).clamp(min=0)
    weight = torch.where(apart > 0, torch.tensor(lambda_, dtype=d.dtype) ** apart, 0)
    return ((b[:, None, :] - b[:, :, None]).square() * weight).sum((1, 2)) / weight.sum()


@pytest.mark.parametrize("near", [False, True])
def test_linear_is_quadratic_in_fp32(near):
    """At T = 1,024 and log Z = -2,000, far from and near to the optimum; sums about 0 lose all digits here."""
    generator = torch.Generator().manual_seed(0)
    forward = -torch.rand(2, 1024, generator=generator) * 4
    residuals = torch.randn(2, 1024, generator=generator) * (1e-3 if near else 1.0)
    # flows whose differences are the residuals, up to rounding to fp32: what is given is fp32
    flows = (-2000 + torch.nn.functional.pad((forward - residuals).double().cumsum(1), (1, 0))).float()
    rewards = flows[:, -1].clone()
    flows = flows[:, :-1].clone()
    leaves = [t.requires_grad_() for t in (forward, flows)]
    out = losses.subtrajectory_balance(*leaves, rewards, reduction="none").loss
    exact = [t.detach().double().requires_grad_() for t in leaves]
    d = exact[0] + exact[1] - torch.cat([exact[1][:, 1:], rewards[:, None].double()], 1)
    want = quadratic(d, 0.9)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(out.sum(), leaves)
    for found, right in zip(grads, torch.autograd.grad(want.sum(), exact), strict=True):
        # entries of one sign and another: relative to their size
        assert (found - right).abs().max() < 1e-5 * right.abs().max()
    # sums about 0, as one would first write them, are far off
    b = torch.cat([torch.zeros(2, 1), forward.cumsum(1)], 1) - torch.cat([flows, rewards[:, None]], 1)
    s0 = s1 = s2 = torch.zeros(2)
    total = torch.zeros(2)
    for j in range(1, 1025):
        s0, s1, s2 = 0.9 * (s0 + 1), 0.9 * (s1 + b[:, j - 1]), 0.9 * (s2 + b[:, j - 1].square())
        total = total + b[:, j].square() * s0 - 2 * b[:, j] * s1 + s2
    weight = sum((1025 - k) * 0.9**k for k in range(1, 1025))
    assert ((total / weight).double() / want - 1).abs().max() > 1e-2


class Tree:
    """Texts over {0, 1, 2} of one to three tokens; a node is a state, a leaf an x with a reward."""

    def __init__(self) -> None:
        self.paths = [(0,), (1, 0), (1, 1), (2, 0), (2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 2)]
        self.states = sorted({p[:t] for p in self.paths for t in range(len(p))})
        self.children = {s: sorted({p[len(s)] for p in self.paths if p[: len(s)] == s and p != s}) for s in self.states}
        generator = torch.Generator().manual_seed(5)
        n = len(self.paths)
        self.log_rewards = 1.5 * torch.randn(n, generator=generator, dtype=torch.float64)
        self.weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
        self.edges = [(s, c) for s in self.states for c in self.children[s]]
        self.size = len(self.edges) + len(self.states)
        self.mask = torch.tensor([[t < len(p) for t in range(3)] for p in self.paths])
        # E of the states between, arbitrary; of a leaf -log R
        self.energy = torch.randn(len(self.states), generator=generator, dtype=torch.float64)

    def _at(self, values: Tensor, of: list[tuple[int, ...]], padding: float) -> Tensor:
        empty = values.new_full((1,), padding)
        place = {s: i for i, s in enumerate(of)}
        index = [[place[p[:t]] if t < len(p) else len(of) for t in range(3)] for p in self.paths]
        return torch.cat([values, empty])[torch.tensor(index)]

    def read(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log PF and log F along each path (8, 3), NaN behind its end, and the log-probs of the paths."""
        edges, flow = theta[: len(self.edges)], theta[len(self.edges) :]
        logp, at = {}, 0
        for s in self.states:
            k = len(self.children[s])
            for c, value in zip(self.children[s], torch.log_softmax(edges[at : at + k], 0), strict=True):
                logp[s, c] = value
            at += k
        nan = theta.new_tensor(NAN)
        rows = [[logp[p[:t], p[t]] if t < len(p) else nan for t in range(3)] for p in self.paths]
        forward = torch.stack([torch.stack(row) for row in rows])
        return forward, self._at(flow, self.states, NAN), torch.where(self.mask, forward, 0).sum(1)

    def loss(self, name: str, theta: Tensor, log_rewards: Tensor) -> FlowOutput:
        forward, flows, _ = self.read(theta)
        if name == "trajectory_balance":
            return losses.trajectory_balance(
                forward, theta[len(self.edges)], log_rewards, mask=self.mask, reduction="none"
            )
        if name.startswith("fl_"):
            energies = self._at(self.energy, self.states, NAN)
            return getattr(losses, name)(forward, flows, energies, -log_rewards, mask=self.mask, reduction="none")
        return getattr(losses, name)(forward, flows, log_rewards, mask=self.mask, reduction="none")


@by_name
@pytest.mark.parametrize("far", [False, True])
def test_fixed_point(name, far):
    """R/Z and log F(s_0) = log Z whatever the weights of the paths; forward-looking, log F̃(s_0) = log Z + E(s_0)."""
    tree = Tree()
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(tree.size, generator=generator, dtype=torch.float64) * (2 if far else 0)
    found = descend(lambda theta: (tree.weights * tree.loss(name, theta, tree.log_rewards).loss).sum(), start)
    policy = tree.read(found)[2].exp()
    right = torch.softmax(tree.log_rewards, 0)
    log_z = torch.logsumexp(tree.log_rewards, 0)
    assert total_variation(policy, right) < 1e-9
    assert total_variation(policy, torch.softmax(2 * tree.log_rewards, 0)) > 1e-2
    out = tree.loss(name, found, tree.log_rewards)
    torch.testing.assert_close(out.log_z, log_z.expand(8), rtol=0, atol=1e-9)
    if name.startswith("fl_"):
        torch.testing.assert_close(found[len(tree.edges)], log_z + tree.energy[0], rtol=0, atol=1e-9)
    assert out.residuals.abs().max() < 1e-9 and out.loss.max() < 1e-18


def test_forward_looking_learns_from_parts():
    """Trajectories cut after one token: detailed balance of those steps alone, with F̃ where they were cut."""
    x = given()
    cut = {n: x[n][:, :1].contiguous() for n in ("forward", "flows", "energies")}
    out = losses.fl_detailed_balance(
        **cut, final_energies=x["energies"][:, 1], final_flows=x["flows"][:, 1], reduction="none"
    )
    e = x["energies"]
    want = x["forward"][:, 0] + x["flows"][:, 0] - x["flows"][:, 1] + e[:, 1] - e[:, 0]
    torch.testing.assert_close(out.loss, want.square(), rtol=1e-13, atol=1e-15)


@by_name
def test_padding_has_no_influence(name):
    x = given(torch.float32)
    dirty = {
        n: t.masked_fill(~x["mask"], NAN) if t.shape == x["mask"].shape and n != "mask" else t for n, t in x.items()
    }
    # the empty row
    for n in ("log_rewards", "final_flows", "final_energies", "log_z"):
        dirty[n] = dirty[n].clone()
        dirty[n][3] = -math.inf
    results = []
    for inputs in (x, dirty):
        leaves = {
            n: inputs[n].clone().requires_grad_() for n in ("forward", "backward", "flows", "log_z", "final_flows")
        }
        out = call(name, inputs | leaves)
        grads = torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)
        results.append([out.loss.detach(), out.log_z, out.residuals, *(g for g in grads if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@by_name
def test_reductions_and_dtypes(name):
    x = given()
    each = call(name, x, reduction="none").loss
    for more, want in (
        ({}, each.mean()),
        ({"reduction": "sum"}, each.sum()),
        ({"num_items": 8}, each.sum() / 8),
        ({"num_items": torch.tensor(8)}, each.sum() / 8),
    ):
        torch.testing.assert_close(call(name, x, **more).loss, want, rtol=1e-14, atol=0)
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in x.items()}
    half["forward"].requires_grad_()
    out = call(name, half)
    out.loss.backward()
    assert out.loss.dtype == out.log_z.dtype == torch.float32 and half["forward"].grad.dtype == torch.bfloat16
    assert call(name, given(torch.float32)).loss.dtype == torch.float32
    narrow = {n: t[:, :0] if t.dim() == 2 else t for n, t in x.items()}
    assert call(name, narrow).loss == 0
    nothing = {n: t[:0] for n, t in x.items()}
    assert call(name, nothing, reduction="sum").loss == 0


def test_compiled_is_eager():
    x = {n: x for n, x in given(torch.float32).items() if n in ("forward", "flows", "log_rewards", "mask")}

    def step(forward: Tensor, flows: Tensor, log_rewards: Tensor, mask: Tensor) -> Tensor:
        return losses.subtrajectory_balance(forward, flows, log_rewards, mask=mask).loss

    x["forward"].requires_grad_()
    want = step(**x)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(**x)
    torch.testing.assert_close(found, want)
    grads = [torch.autograd.grad(loss, x["forward"])[0] for loss in (want, found)]
    torch.testing.assert_close(*grads)


def test_bad_input():
    x = torch.zeros(2, 3)
    rewards = torch.zeros(2)
    ok = {"forward": x, "flows": x, "log_rewards": rewards}
    for change, error, message in (
        ({"forward": x[0]}, ValueError, r"forward has shape \(3,\), expected \(B, T\)"),
        ({"flows": x[:, :2]}, ValueError, r"flows has shape \(2, 2\), expected \(2, 3\): it must match forward"),
        ({"log_rewards": x}, ValueError, r"log_rewards has shape \(2, 3\), expected \(2,\): one per row of forward"),
        (
            {"log_rewards": torch.tensor([0.0, -math.inf])},
            ValueError,
            r"log_rewards\[1\] is -inf: .* 0 a floor",
        ),
        ({"backward": x.long()}, TypeError, "backward must have dtype"),
        ({"mask": x}, TypeError, "mask must have dtype bool"),
        ({"reduction": "median"}, ValueError, "reduction must be one of"),
        ({"lambda_": 0.0}, ValueError, r"lambda_ must be in \(0, 1\], got 0.0"),
        ({"lambda_": 1.5}, ValueError, r"lambda_ must be in \(0, 1\], got 1.5"),
    ):
        with pytest.raises(error, match=message):
            losses.subtrajectory_balance(**{**ok, **change})
    with pytest.raises(ValueError, match=r"log_z has shape \(3,\), expected \(2,\): one per row of forward, or one"):
        losses.trajectory_balance(x, x[0], rewards)
    with pytest.raises(ValueError, match=r"energies has shape \(3,\), expected \(2, 3\)"):
        losses.fl_detailed_balance(x, x, x[0], rewards)
    # a row without tokens needs no reward
    mask = torch.tensor([[True] * 3, [False] * 3])
    assert losses.subtrajectory_balance(**{**ok, "log_rewards": torch.tensor([0.0, -math.inf])}, mask=mask).loss == 0
