"""Policy objectives: the compiled kernel against the reference, both against closed forms, aggregations, layouts,
corrections, metrics, and the places where other libraries differ."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.kernels import _native
from fastpo.losses import RolloutCorrection
from fastpo.reference.policy import MAXIMA, SUMS, policies, policy
from tests.device import to_device
from tests.tolerance import assert_within

ROWS = list(policies())
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
by_backend = pytest.mark.parametrize("backend", ["native", "reference"])
# at least one bound of each method is met by log-ratios of order 1/3; nothing is at a special value
HYPER = {
    "epsilon_low": 0.15,
    "epsilon_high": 0.25,
    "dual_clip": 1.6,
    "delta": 1.6,
    "epsilon": 0.2,
    "penalty": 0.7,
    "tau_positive": 0.9,
    "tau_negative": 1.3,
    "k_positive": 1.7,
    "lambda_positive": 1.1,
    "k_negative": 0.6,
    "lambda_negative": 0.4,
}
PENALTIES = [
    {},
    {"kl": "k1"},
    {"kl": "k2"},
    {"kl": "k3", "kl_gradient": "k2"},
    {"kl": "k3", "kl_corrected": True},
    {"kl": "k2", "kl_gradient": "k1", "kl_corrected": True},
    {"kl": "k1", "kl_gradient": "k2"},
]
CORRECTIONS = [
    RolloutCorrection(None),
    RolloutCorrection.tis(1.2),
    RolloutCorrection.tis(1.5, low=0.7, level="sequence"),
    RolloutCorrection.mis(0.3, 3.0),
    RolloutCorrection.icepop(0.8, 1.25),
    RolloutCorrection.sequence_mask(0.9, 1.2),
    RolloutCorrection.tis(1.1, low=0.95, level="sequence_mean"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(
    row, layout: str = "padded", rows: int = 5, tokens: int = 9, dtype=torch.float64, seed: int = 0
) -> dict[str, Any]:
    """Every tensor that a method takes, by the argument's name; one sequence has no tokens."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    if rows > 2:
        lengths[1], lengths[-1] = 0, tokens
    shape = (int(lengths.sum()),) if layout == "packed" else (rows, tokens)
    base = -(0.3 + torch.rand(shape, generator=generator, dtype=torch.float64))

    def near() -> Tensor:
        return (base + 0.3 * randn(*shape)).to(dtype)

    given: dict[str, Any] = {}
    if layout == "packed":
        given["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    else:
        given["mask"] = torch.arange(tokens) < lengths[:, None]
        # a hole, as of a tool's tokens
        given["mask"][:, tokens // 3] &= tokens < 5
    if row.values:
        return {**given, "values": near(), "returns": randn(*shape).to(dtype), "old_values": near()}
    if row.selected:
        given["selected"] = torch.rand(shape, generator=generator) < 0.6
    for name in ("logprobs", "old_logprobs", "reference_logprobs", "rollout_logprobs"):
        given[name] = near()
    given["entropy"] = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    given["advantages"] = randn(rows).to(dtype)
    return given


def leaves_of(row) -> list[str]:
    return ["values"] if row.values else ["logprobs", "entropy"]


def hyper_of(row) -> dict[str, float]:
    return {name: HYPER[name] for name in row.defaults}


def settings(row, **more: Any) -> dict[str, Any]:
    """All that a method adds, switched on."""
    out = hyper_of(row)
    if not row.values:
        out |= {"beta": 0.3, "entropy_coefficient": 0.2, "correction": RolloutCorrection.tis(1.2)}
    if more.get("aggregation", row.aggregation) == "const_norm":
        out["max_length"] = 17
    return {**out, **more}


def call(row, given: dict[str, Any], backend: str = "native", **options: Any):
    with fastpo.use_backend(backend):
        return getattr(losses, row.name)(**given, **options)


def evaluate(row, given: dict[str, Any], backend: str = "native", **options: Any) -> dict[str, Tensor]:
    """Loss, gradients under an upstream gradient of both signs, sums and maxima."""
    given = {name: to_device(value) for name, value in given.items()}
    names = [name for name in leaves_of(row) if given.get(name) is not None]
    leaves = {name: given[name].detach().clone().requires_grad_() for name in names}
    out = call(row, {**given, **leaves}, backend, **options)
    up = torch.linspace(-1.5, 2.0, max(1, out.loss.numel())).to(out.loss).view_as(out.loss)
    grads = torch.autograd.grad(out.loss, list(leaves.values()), up, allow_unused=True)
    found = {"loss": out.loss.detach(), "sums": out.metrics.sums, "maxima": out.metrics.maxima}
    found |= {f"grad of {n}": g for n, g in zip(names, grads, strict=True) if g is not None}
    return {name: value.cpu() for name, value in found.items()}


def as_double(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.dtype.is_floating_point else v for k, v in given.items()}


def sensitivities(row, given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """By how many eps results move when every log-ratio is off by one, in the worse direction; in fp64.

    Formulas on sums over a sequence exponentiate what its tokens' roundings add up to.
    """
    step, leaf = 2.0**-30, leaves_of(row)[0]
    truth = evaluate(row, given, "reference", **options)
    total = {name: torch.zeros_like(value) for name, value in truth.items()}
    for model in ("old_logprobs", "reference_logprobs", "rollout_logprobs", "old_values"):
        if given.get(model) is None:
            continue
        other = "old_logprobs" if model == "rollout_logprobs" and given.get("old_logprobs") is not None else leaf
        moved = given[model] - step * (given[other] - given[model]).abs()
        found = evaluate(row, {**given, model: moved}, "reference", **options)
        for name in total:
            change = torch.where(truth[name].isfinite(), found[name] - truth[name], 0)
            total[name] += change.abs() / step
    return total


def compare(row, given: dict[str, Any], **options: Any) -> None:
    """The native results by the accuracy rule. About eight rounded operations stand between log-ratios and result, on
    terms as large as the largest, or of order 1 where they cancel; sums have such terms for each token."""
    ours, same = (evaluate(row, given, backend, **options) for backend in ("native", "reference"))
    truth = evaluate(row, as_double(given), "reference", **options)
    moves = sensitivities(row, as_double(given), **options)
    tokens = max(1.0, truth["sums"][0].item())
    assert set(ours) == set(same)
    for name, value in ours.items():
        assert value.dtype == same[name].dtype and value.shape == same[name].shape, name
        working = torch.float64 if same["loss"].dtype == torch.float64 else torch.float32
        if name == "sums":
            terms = 4 * (tokens + truth[name].abs())
        else:
            finite = truth[name][truth[name].isfinite()]
            largest = finite.abs().max().item() if finite.numel() else 0.0
            terms = torch.full_like(truth[name], 4 * (largest + (not name.startswith("grad"))), dtype=torch.float64)
        eps = value.dtype if name.startswith("grad") else working
        terms = (terms + moves[name]).numpy()
        if working == torch.float64:
            # sums over a sequence are rounded in its own precision, the truth's too: a random walk
            terms = terms * math.sqrt(tokens)
        assert_within(value, truth[name], same[name], eps_dtype=eps, name=f"{row.name} {name}", terms=terms)


@by_row
class TestKernel:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_equals_the_reference(self, row, dtype):
        """Around the widths of vectors and chunks, in every layout, per sequence and per token."""
        for i, (rows, tokens) in enumerate([(1, 1), (3, 4), (4, 33), (3, 1024), (3, 1500)]):
            for layout in ("padded", "packed"):
                given = make(row, layout, rows, tokens, dtype, seed=i)
                compare(row, given, **settings(row), reduction=("mean", "none")[i % 2])
        if not row.values:
            given = make(row, "padded", 4, 21, dtype, seed=9)
            given["advantages"] = torch.randn(4, 21, generator=torch.Generator().manual_seed(1)).to(dtype)
            compare(row, given, **settings(row))

    def test_usual_call(self, row):
        """fp32 with an old policy, and a reference or none; rows are read up to their last token that counts, in
        chunks, and their tokens are counted by vectors."""
        for i, (rows, tokens) in enumerate([(1, 1), (4, 33), (3, 1500), (4, 2600)]):
            given = make(row, ("padded", "packed")[i == 1], rows, tokens, torch.float32, seed=40 + i)
            given = {k: v for k, v in given.items() if k not in ("rollout_logprobs", "entropy")}
            if row.values:
                compare(row, given, **hyper_of(row))
                continue
            options = {**hyper_of(row), "aggregation": "token_mean", "reduction": ("mean", "none")[i % 2]}
            compare(row, given, **options, beta=0.3)
            compare(row, {k: v for k, v in given.items() if k != "reference_logprobs"}, **options, beta=0.0)

    def test_choices(self, row):
        if row.values:
            pytest.skip("a critic has no penalty and no rollout")
        for i, (penalty, correction) in enumerate(zip(PENALTIES, CORRECTIONS, strict=True)):
            given = make(row, ("padded", "packed")[i % 2], 6, 30, torch.float64, seed=20 + i)
            given = {k: v for k, v in given.items() if (k, i % 3) != ("old_logprobs", 2)}
            for aggregation in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const_norm"):
                options = settings(row, aggregation=aggregation, **penalty, correction=correction)
                compare(row, given, **options, off_policy_threshold=0.02 if i % 2 else None)

    @pytest.mark.once
    def test_derivatives(self, row):
        """First and second ones, of both backends the same; by differences where there is no stop-gradient."""
        given = make(row, "padded", 3, 4, seed=5)
        names = leaves_of(row)
        leaves = [given[name].requires_grad_() for name in names]

        def loss(*values: Tensor) -> Tensor:
            out = call(row, {**given, **dict(zip(names, values, strict=True))}, **settings(row, reduction="none"))
            return out.loss

        if row.kernel in ("clipped", "gspo", "gmpo", "sapo", "kl_cov", "value_clip"):
            assert torch.autograd.gradcheck(loss, leaves, rtol=1e-6, atol=1e-8)
            assert torch.autograd.gradgradcheck(loss, leaves, rtol=1e-6, atol=1e-8)
        found = []
        for backend in ("native", "reference"):
            value = call(row, given, backend, **settings(row)).loss
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves[:1], allow_unused=True)
            found.append([g.detach() for g in (*grads, *again) if g is not None])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)

    def test_masked_places_have_no_influence(self, row):
        given = make(row, "padded", 4, 11, torch.float32, seed=6)
        floats = [k for k, v in given.items() if isinstance(v, Tensor) and v.shape == (4, 11) and v.is_floating_point()]
        for poison in (math.nan, math.inf, -math.inf):
            dirty = {k: v.masked_fill(~given["mask"], poison) if k in floats else v for k, v in given.items()}
            for backend in ("native", "reference"):
                clean, ours = (evaluate(row, g, backend, **settings(row)) for g in (given, dirty))
                for name, value in ours.items():
                    assert torch.equal(value, clean[name]), (backend, name)
                grad = ours[f"grad of {leaves_of(row)[0]}"]
                assert (grad[~given["mask"]] == 0).all() and (grad[given["mask"]] != 0).any()

    def test_long_padding(self, row):
        """Chunks in which nothing counts, before and between the tokens, and NaN in them."""
        given = make(row, "padded", 3, 4500, torch.float32, seed=4)
        given["mask"][0, :2100] = False
        given["mask"][2, 1000:3500] = False
        shape = given["mask"].shape
        for name, value in given.items():
            if value.shape == shape and value.is_floating_point():
                given[name] = value.masked_fill(~given["mask"], math.nan)
        compare(row, given, **settings(row))

    def test_layouts_agree(self, row):
        """Packed, padded and padded wider: the same loss and gradients; tokens behind the last sequence have none."""
        packed = make(row, "packed", 5, 8, seed=7)
        bounds = packed["cu_seqlens"].tolist()
        total = bounds[-1]
        mask = torch.zeros(5, 12, dtype=torch.bool)
        padded: dict[str, Any] = {"mask": mask}
        for i in range(5):
            mask[i, 2 : 2 + bounds[i + 1] - bounds[i]] = True
        for name, value in packed.items():
            if name == "cu_seqlens":
                continue
            if value.shape != (total,):
                padded[name] = value
                continue
            padded[name] = torch.zeros(5, 12, dtype=value.dtype).masked_scatter(mask, value)
        longer = {
            k: torch.cat([v, v.new_ones(3) if v.dtype == torch.bool else v.new_full((3,), math.nan)])
            if v.shape == (total,)
            else v
            for k, v in packed.items()
        }
        for backend in ("native", "reference"):
            one, two, three = (evaluate(row, g, backend, **settings(row)) for g in (packed, padded, longer))
            name = f"grad of {leaves_of(row)[0]}"
            torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(two["sums"], one["sums"], rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(two[name][mask], one[name], rtol=1e-13, atol=1e-14)
            assert torch.equal(three["loss"], one["loss"]) and torch.equal(three[name][:total], one[name])
            assert (three[name][total:] == 0).all()

    def test_views(self, row):
        given = make(row, "padded", 4, 12, torch.float32, seed=8)
        views = {k: v.t().contiguous().t() if v.dim() == 2 else v.repeat_interleave(2)[::2] for k, v in given.items()}
        plain, ours = (evaluate(row, g, **settings(row)) for g in (given, views))
        for name, value in ours.items():
            assert torch.equal(value, plain[name]), name

    @pytest.mark.once
    def test_micro_batches_add_up(self, row):
        """With the denominator of the whole batch, as a number or a tensor, any split has the same gradient."""
        given = make(row, "padded", 6, 7, seed=9)
        name = leaves_of(row)[0]
        for aggregation in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const_norm"):
            options = settings(row, aggregation=aggregation)
            items = int(given["mask"].sum()) if aggregation == "token_mean" else int(given["mask"].any(1).sum())
            items = 6 if aggregation == "const_norm" else items
            leaf = given[name].clone().requires_grad_()
            whole = call(row, {**given, name: leaf}, **options)
            (want,) = torch.autograd.grad(whole.loss, leaf)
            for parts, divisor in (((2, 4), items), ((1, 2, 3), torch.tensor(items))):
                grads, total, sums = [], 0.0, torch.zeros_like(whole.metrics.sums)
                for part in zip(*(v.split(parts) for v in given.values()), strict=True):
                    piece = dict(zip(given, part, strict=True))
                    leaf = piece[name].clone().requires_grad_()
                    out = call(row, {**piece, name: leaf}, **options, num_items=divisor)
                    grads.append(torch.autograd.grad(out.loss, leaf)[0])
                    total, sums = total + out.loss.item(), sums + out.metrics.sums
                torch.testing.assert_close(torch.cat(grads), want, rtol=1e-13, atol=1e-15)
                assert total == pytest.approx(whole.loss.item(), rel=1e-12, abs=1e-14)
                torch.testing.assert_close(sums, whole.metrics.sums, rtol=1e-13, atol=1e-13)

    def test_no_tokens(self, row):
        """Loss 0 and gradient 0, and no NaN; no rows at all need a denominator."""
        given = make(row, "padded", 3, 5, torch.float32)
        given["mask"] = torch.zeros(3, 5, dtype=torch.bool)
        none = {k: v[:0] for k, v in given.items()}
        for backend in ("native", "reference"):
            for aggregation in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const_norm"):
                options = settings(row, aggregation=aggregation)
                ours = evaluate(row, given, backend, **options)
                assert ours["loss"] == 0 and (ours["sums"] == 0).all() and (ours["maxima"] == -math.inf).all()
                assert (ours[f"grad of {leaves_of(row)[0]}"] == 0).all()
                assert call(row, given, backend, **options).metrics.ratio_mean == 0
                assert evaluate(row, none, backend, **options, num_items=3)["loss"] == 0
                with pytest.raises(ValueError, match="empty batch is undefined: pass num_items"):
                    call(row, none, backend, **options)

    @pytest.mark.once
    def test_compiles(self, row):
        """One graph, with the same numbers."""
        given = make(row, "padded", 4, 6, torch.float32)
        name = leaves_of(row)[0]
        options = settings(row)

        def step(leaf: Tensor) -> tuple[Tensor, ...]:
            out = getattr(losses, row.name)(**{**given, name: leaf}, **options)
            return out.loss, *out.metrics, out.metrics.ratio_mean, out.metrics.old_kl

        torch._dynamo.reset()
        leaf = given[name].requires_grad_()
        eager, compiled = step(leaf), torch.compile(step, fullgraph=True, backend="aot_eager")(leaf)
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
        assert torch.equal(*(torch.autograd.grad(out[0], leaf)[0] for out in (eager, compiled)))

    @pytest.mark.once
    def test_public(self, row):
        function = getattr(losses, row.name)
        parameters = inspect.signature(function).parameters
        assert all(f"{name}" in function.__doc__ for name in parameters)
        for name, default in row.defaults.items():
            assert parameters[name].default == default and default in row.domains[name]
            assert f"{name}: in {row.domains[name]}." in function.__doc__
        assert parameters["aggregation"].default == row.aggregation
        assert row.paper in function.__doc__ and row.equation in function.__doc__


@pytest.mark.once
def test_names():
    assert list(_native.CPU.policy_formulas) == list(dict.fromkeys(_native.CPU.policy_formulas))
    assert {row.kernel for row in ROWS} == set(_native.CPU.policy_formulas)
    assert _native.CPU.text("fastpo_policy_sums").split(",") == list(SUMS)
    assert _native.CPU.text("fastpo_policy_maxima").split(",") == list(MAXIMA)
    numbers = {name for row in ROWS for name in row.numbers(dict(row.defaults))}
    assert numbers < set(_native.CPU.policy_numbers)


@pytest.mark.once
def test_opcheck():
    given = make(policy("gspo"), "padded", 3, 5, torch.float32)
    streams = [given[f"{n}_logprobs"] for n in ("old", "reference", "rollout")]
    numbers, choices = [0.5] * len(_native.CPU.policy_numbers), [1] * len(_native.CPU.policy_choices)
    for boundaries, entropy in ((None, True), (torch.tensor([0, 2, 7], dtype=torch.int32), False)):
        flat = [t if boundaries is None else t.flatten() for t in (given["logprobs"], *streams, given["entropy"])]
        mask = given["mask"] if boundaries is None else given["mask"].flatten()
        rows = given["advantages"][: 3 if boundaries is None else 2]
        for reduce in (True, False):
            tensors = (1, *flat, rows, True, mask, None, boundaries, numbers, choices, True, entropy, reduce)
            torch.library.opcheck(torch.ops.fastpo.policy_objective.default, tensors)


# closed forms: one sequence of log-ratios d with advantage A; loss of each token and its slope by the log-prob, as the
# catalogue states them


def keep_of(a: float, r: float, low: float, high: float, dual: float = math.inf) -> float:
    return float(not ((a > 0 and r > 1 + high) or (a < 0 and r < 1 - low) or (a < 0 and r > dual)))


def surrogate(a: float, r: float, low: float, high: float, dual: float = math.inf) -> float:
    loss = max(-a * r, -a * min(max(r, 1 - low), 1 + high))
    return min(loss, -a * dual) if a < 0 else loss


def closed_clipped(d, a, p, h):
    dual = h.get("dual_clip", h.get("delta", math.inf))
    rs = [math.exp(x) for x in d]
    low, high = h["epsilon_low"], h["epsilon_high"]
    losses_ = [surrogate(a, r, low, high, dual) for r in rs]
    return losses_, [-a * r * keep_of(a, r, low, high, dual) for r in rs]


def closed_gspo(d, a, p, h):
    s = math.exp(sum(d) / len(d))
    low, high = h["epsilon_low"], h["epsilon_high"]
    # n tokens have this loss, and each log-prob moves the mean by 1/n
    return [surrogate(a, s, low, high)] * len(d), [-a * s * keep_of(a, s, low, high)] * len(d)


def closed_cispo(d, a, p, h):
    weights = [min(max(math.exp(x), 1 - h["epsilon_low"]), 1 + h["epsilon_high"]) for x in d]
    return [-w * a * x for w, x in zip(weights, p, strict=True)], [-w * a for w in weights]


def closed_gmpo(d, a, p, h):
    sign = (a > 0) - (a < 0)
    clipped = [sign * min(sign * x, sign * min(max(x, -h["epsilon_low"]), h["epsilon_high"])) for x in d]
    s = math.exp(sum(clipped) / len(d))
    keep = [float(not ((a > 0 and x > h["epsilon_high"]) or (a < 0 and x < -h["epsilon_low"]))) for x in d]
    return [-a * s] * len(d), [-a * s * k * bool(sign) for k in keep]


def closed_sapo(d, a, p, h):
    t = h["tau_positive"] if a > 0 else h["tau_negative"]
    rs = [math.exp(x) for x in d]
    sig = [1 / (1 + math.exp(-t * (r - 1))) for r in rs]
    return [-a * 4 / t * s for s in sig], [-a * 4 * s * (1 - s) * r for s, r in zip(sig, rs, strict=True)]


def closed_vespo(d, a, p, h):
    k, lam = (h[f"{n}_{'negative' if a < 0 else 'positive'}"] for n in ("k", "lambda"))
    x = min(max(sum(d), math.log(1e-8)), 20)
    phi = math.exp(lam + k * x - lam * math.exp(x))
    return [-phi * a * y for y in p], [-phi * a] * len(d)


def closed_reinforce(d, a, p, h):
    return [-a * x for x in p], [-a] * len(d)


def closed_kl_cov(d, a, p, h):
    """All tokens selected."""
    loss = [-a * math.exp(x) + h["penalty"] * abs(x) for x in d]
    return loss, [-a * math.exp(x) + h["penalty"] * ((x > 0) - (x < 0)) for x in d]


def closed_value(d, a, p, h):
    old = [v - x for v, x in zip(p, d, strict=True)]
    clipped = [o + min(max(x, -h["epsilon"]), h["epsilon"]) for o, x in zip(old, d, strict=True)]
    loss = [0.5 * max((v - a) ** 2, (c - a) ** 2) for v, c in zip(p, clipped, strict=True)]
    slope = [
        v - a if (v - a) ** 2 >= (c - a) ** 2 or abs(x) <= h["epsilon"] else 0.0
        for v, c, x in zip(p, clipped, d, strict=True)
    ]
    return loss, slope


CLOSED = {
    "clipped": closed_clipped,
    "gspo": closed_gspo,
    "gspo_token": closed_gspo,
    "cispo": closed_cispo,
    "gmpo": closed_gmpo,
    "sapo": closed_sapo,
    "vespo": closed_vespo,
    "reinforce": closed_reinforce,
    "kl_cov": closed_kl_cov,
    "value_clip": closed_value,
}
LOGRATIOS = [[0.0], [0.5], [-0.4], [0.1, -0.05, 0.02], [0.9, -0.7, 0.3], [-2.0, 0.1], [3.0, 1.0, -0.2, 0.05], [0.18]]


@by_backend
@by_row
def test_closed_forms(row, backend):
    for hyper in (hyper_of(row), dict(row.defaults)):
        for a in (1.3, -0.8, 0.0):
            for d in LOGRATIOS:
                old = [-0.5 - 0.1 * i for i in range(len(d))]
                p = [o + x for o, x in zip(old, d, strict=True)]
                leaf = torch.tensor([p], dtype=torch.float64).requires_grad_()
                before = torch.tensor([old], dtype=torch.float64)
                advantage = torch.tensor([a], dtype=torch.float64)
                given: dict[str, Any] = {"logprobs": leaf, "old_logprobs": before, "advantages": advantage}
                if row.values:
                    given = {"values": leaf, "old_values": before, "returns": advantage}
                options = {**hyper, "aggregation": "seq_mean_token_sum", "reduction": "none"}
                if not row.values:
                    options["beta"] = 0.0
                if row.selected:
                    given["selected"] = torch.ones(1, len(d), dtype=torch.bool)
                out = call(row, given, backend, **options)
                (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
                want, slopes = CLOSED[row.kernel](d, a, p, hyper)
                assert out.loss.item() == pytest.approx(sum(want), rel=1e-13, abs=1e-14), (hyper, a, d)
                assert grad[0].tolist() == pytest.approx(slopes, rel=1e-12, abs=1e-14), (hyper, a, d)


@by_backend
class TestShared:
    """What all methods have, on `reinforce` and `ppo`."""

    P = torch.tensor([[-0.5, -1.0, -0.7], [-0.2, -0.4, -0.1]], dtype=torch.float64)
    OLD = torch.tensor([[-0.6, -0.8, -0.7], [-0.5, -0.1, -0.3]], dtype=torch.float64)
    REF = torch.tensor([[-0.9, -0.6, -0.7], [-0.3, -0.2, -0.5]], dtype=torch.float64)
    ROLL = torch.tensor([[-0.3, -0.9, -1.7], [-0.5, -0.6, -0.2]], dtype=torch.float64)
    A = torch.tensor([1.0, -2.0], dtype=torch.float64)
    MASK = torch.tensor([[True, True, False], [True, True, True]])

    def run(self, name: str, backend: str, advantages: Tensor | None = None, **options: Any):
        leaf = self.P.clone().requires_grad_()
        with fastpo.use_backend(backend):
            out = getattr(losses, name)(leaf, self.A if advantages is None else advantages, mask=self.MASK, **options)
        return out, torch.autograd.grad(out.loss, leaf, torch.ones_like(out.loss))[0]

    @pytest.mark.parametrize(
        ("aggregation", "weights"),
        [
            ("token_mean", [[1 / 5] * 3, [1 / 5] * 3]),
            ("seq_mean_token_mean", [[1 / 4] * 3, [1 / 6] * 3]),
            ("seq_mean_token_sum", [[1 / 2] * 3, [1 / 2] * 3]),
            ("const_norm", [[1 / 20] * 3, [1 / 20] * 3]),
        ],
    )
    def test_aggregations(self, backend, aggregation, weights):
        more = {"max_length": 10} if aggregation == "const_norm" else {}
        out, grad = self.run("reinforce", backend, aggregation=aggregation, **more)
        weights = torch.tensor(weights, dtype=torch.float64) * self.MASK
        torch.testing.assert_close(grad, -self.A[:, None] * weights)
        torch.testing.assert_close(out.loss, (-self.A[:, None] * self.P * weights).sum())

    def test_fully_masked_rows(self, backend):
        """They are not counted, as in verl and OpenRLHF; TRL counts them."""
        mask = torch.tensor([[False] * 3, [True] * 3])
        found = {}
        for count_empty in (False, True):
            with fastpo.use_backend(backend):
                options = {"mask": mask, "aggregation": "seq_mean_token_mean", "count_empty": count_empty}
                found[count_empty] = losses.reinforce(self.P, self.A, **options).loss.item()
        assert found[False] == pytest.approx(2.0 * (-0.7 / 3)) and found[True] == pytest.approx(found[False] / 2)

    def test_estimators(self, backend):
        """Value and gradient of the penalty in the loss, and bias correction."""
        d, delta = self.P - self.OLD, self.P - self.REF
        values = {"k1": delta, "k2": delta**2 / 2, "k3": torch.exp(-delta) - 1 + delta}
        slopes = {"k1": torch.ones_like(delta), "k2": delta, "k3": 1 - torch.exp(-delta)}
        zero = torch.zeros(2, dtype=torch.float64)
        common = {"old_logprobs": self.OLD, "reference_logprobs": self.REF, "beta": 0.7}
        common["aggregation"] = "seq_mean_token_sum"
        for kl in values:
            for gradient in (None, "k1", "k2", "k3"):
                for corrected in (False, True):
                    options = {"kl": kl, "kl_gradient": gradient, "kl_corrected": corrected}
                    out, grad = self.run("ppo", backend, zero, **common, **options)
                    rho = torch.exp(d) if corrected else torch.ones_like(d)
                    value = rho * values[kl]
                    slope = rho * slopes[gradient or kl] + (value if corrected else 0)
                    torch.testing.assert_close(out.loss, 0.7 * (value * self.MASK).sum() / 2)
                    torch.testing.assert_close(grad, torch.where(self.MASK, 0.7 * slope / 2, 0))
                    torch.testing.assert_close(out.metrics.kl, (value * self.MASK).sum() / 5)
        # rho k3 has the slope rho delta: exact for the reverse KL
        _, grad = self.run("ppo", backend, zero, **common, kl_corrected=True)
        torch.testing.assert_close(grad, torch.where(self.MASK, 0.35 * d.exp() * delta, 0))

    def test_bias_corrected_penalty_of_a_sequence(self, backend):
        """s (1 - e^-delta_t) + s mean(k3): Liger's backward has s delta_t, which is something else."""
        d, delta = self.P - self.OLD, self.P - self.REF
        zero = torch.zeros(2, dtype=torch.float64)
        options = {"old_logprobs": self.OLD, "reference_logprobs": self.REF, "beta": 1.0, "kl_corrected": True}
        _, grad = self.run("gspo", backend, zero, **options, aggregation="seq_mean_token_sum")
        n = self.MASK.sum(1, keepdim=True)
        s = torch.exp((d * self.MASK).sum(1, keepdim=True) / n)
        k3 = torch.exp(-delta) - 1 + delta
        exact = s * (1 - torch.exp(-delta)) + s * (k3 * self.MASK).sum(1, keepdim=True) / n
        torch.testing.assert_close(grad, torch.where(self.MASK, exact / 2, 0))
        assert (grad - torch.where(self.MASK, s * delta / 2, 0)).abs().max() > 1e-2

    def test_entropy_bonus(self, backend):
        entropy = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        zero = torch.zeros(2, dtype=torch.float64)
        with fastpo.use_backend(backend):
            out = losses.ppo(self.P, zero, entropy=entropy, entropy_coefficient=0.4, mask=self.MASK)
        (grad,) = torch.autograd.grad(out.loss, entropy)
        torch.testing.assert_close(grad, -0.4 / 5 * self.MASK.double())
        torch.testing.assert_close(out.loss, -0.4 * out.metrics.entropy)

    @pytest.mark.parametrize(
        ("correction", "weigh"),
        [
            (RolloutCorrection.tis(1.1), lambda r, s, g: r.clamp(max=1.1)),
            (RolloutCorrection.tis(1.5, low=0.5), lambda r, s, g: r.clamp(0.5, 1.5)),
            (RolloutCorrection.tis(1.2, level="sequence"), lambda r, s, g: s.clamp(max=1.2) + 0 * r),
            (RolloutCorrection.mis(0.5, 1.5), lambda r, s, g: s * ((s >= 0.5) & (s <= 1.5)) + 0 * r),
            (RolloutCorrection.icepop(0.8, 1.2), lambda r, s, g: r * ((r >= 0.8) & (r <= 1.2))),
            (RolloutCorrection.sequence_mask(0.9, 1.1), lambda r, s, g: r * ((g >= 0.9) & (g <= 1.1))),
            (RolloutCorrection.tis(1.01, level="sequence_mean"), lambda r, s, g: g.clamp(max=1.01) + 0 * r),
            (RolloutCorrection("sequence_mean", reject="token", reject_high=1.1), lambda r, s, g: g * (r <= 1.1)),
            (RolloutCorrection(), lambda r, s, g: r),
        ],
        ids=["tis", "both sides", "tis sequence", "mis", "icepop", "sequence mask", "mean", "mean, mask", "decoupled"],
    )
    def test_corrections(self, backend, correction, weigh):
        """Constants on the policy term; not on the penalty. What is rejected stays in the denominator."""
        x = torch.where(self.MASK, self.OLD - self.ROLL, 0)
        n = self.MASK.sum(1, keepdim=True)
        r, s, g = x.exp(), x.sum(1, keepdim=True).exp(), (x.sum(1, keepdim=True) / n).exp()
        weight = weigh(r, s, g)
        common = {"old_logprobs": self.OLD, "reference_logprobs": self.REF, "beta": 0.3, "dual_clip": math.inf}
        _, plain = self.run("ppo", backend, **{**common, "beta": 0.0})
        _, penalty = self.run("ppo", backend, torch.zeros(2, dtype=torch.float64), **common)
        out, grad = self.run("ppo", backend, **common, rollout_logprobs=self.ROLL, correction=correction)
        torch.testing.assert_close(grad, torch.where(self.MASK, weight * plain + penalty, 0))
        m, w = out.metrics, weight.expand_as(r)[self.MASK]
        torch.testing.assert_close(m.weight_mean, w.mean())
        torch.testing.assert_close(m.weight_ess, w.mean() ** 2 / (w**2).mean())
        torch.testing.assert_close(m.rejected_fraction, (w == 0).double().mean())
        torch.testing.assert_close(m.rollout_kl, -x[self.MASK].mean())
        torch.testing.assert_close(m.rollout_k3, (r - 1 - x)[self.MASK].mean())
        raw = {"token": r, "sequence": s, "sequence_mean": g}[correction.level].expand_as(r)[self.MASK]
        torch.testing.assert_close(m.rollout_ratio_mean, raw.mean())
        torch.testing.assert_close(m.rollout_chi2, (raw**2).mean() - 1)
        assert m.rollout_ratio_max == raw.max() and m.rollout_ratio_min == raw.min()

    def test_bounds_are_of_the_ratio(self, backend):
        """verl's k1 statistic is minus the log-ratio: its "0.1_1.2" keeps a ratio of 5 and rejects one of 0.5."""
        old = torch.tensor([[math.log(5.0)], [math.log(0.5)]], dtype=torch.float64)
        zero = torch.zeros_like(old)
        with fastpo.use_backend(backend):
            correction = RolloutCorrection.icepop(0.1, 1.2)
            out = losses.ppo(old, self.A, old, None, zero, correction=correction, reduction="none")
        assert out.loss[0] == 0 and out.loss[1] == pytest.approx(1.0)

    def test_off_policy_threshold(self, backend):
        """Only tokens with a negative advantage, in sequences that moved; the denominator stays."""
        drift = ((self.ROLL - self.P) * self.MASK).sum(1) / self.MASK.sum(1)
        assert drift[0] > 0 > drift[1]
        for sign in (1.0, -1.0):
            common = {"old_logprobs": self.OLD, "rollout_logprobs": self.ROLL}
            _, plain = self.run("ppo", backend, sign * self.A, **common)
            out, grad = self.run("ppo", backend, sign * self.A, **common, off_policy_threshold=0.0)
            dropped = (sign * self.A < 0) & (drift > 0)
            torch.testing.assert_close(grad, torch.where(dropped[:, None], 0, plain))
            assert out.metrics.sum("dropped") == (dropped[:, None] & self.MASK).sum()

    def test_bounds_of_sequences_are_sharp(self, backend):
        """One that is inside by a ten thousandth stays, and one as far outside goes."""
        common = {"old_logprobs": self.OLD, "rollout_logprobs": self.ROLL}
        n = self.MASK.sum(1)
        product = torch.where(self.MASK, self.OLD - self.ROLL, 0).sum(1)
        for share, gone in ((1 + 1e-4, 0), (1 - 1e-4, 5)):
            for made, logs in ((RolloutCorrection.mis, product), (RolloutCorrection.sequence_mask, product / n)):
                assert logs[0] < 0 < logs[1]
                correction = made(*(share * logs).exp().tolist())
                out, _ = self.run("ppo", backend, **common, correction=correction)
                assert out.metrics.sum("rejected") == gone
        # of the rollout, or else of the old policy
        for given in (common, {"old_logprobs": self.OLD}):
            drift = ((given.get("rollout_logprobs", self.OLD) - self.P) * self.MASK).sum(1) / n
            assert drift[0] > 0 > drift[1]
            for share, gone in ((1 + 1e-4, 0), (1 - 1e-4, 2)):
                out, _ = self.run("ppo", backend, -self.A, **given, off_policy_threshold=share * drift[0].item())
                assert out.metrics.sum("dropped") == gone

    def test_policy_mask(self, backend):
        """Only the policy term; penalty and denominators stay."""
        chosen = torch.tensor([[True, False, True], [False, True, True]])
        common = {"old_logprobs": self.OLD, "reference_logprobs": self.REF}
        _, policy_term = self.run("ppo", backend, **common)
        _, penalty = self.run("ppo", backend, torch.zeros(2, dtype=torch.float64), **common, beta=0.5)
        _, grad = self.run("ppo", backend, **common, beta=0.5, policy_mask=chosen)
        torch.testing.assert_close(grad, torch.where(chosen, policy_term, 0) + penalty)

    def test_metrics(self, backend):
        d = torch.tensor([[0.4, 0.1, -0.5], [0.7, -0.3, 0.0]], dtype=torch.float64)
        leaf = self.OLD + d
        with fastpo.use_backend(backend):
            m = losses.ppo(leaf, self.A, self.OLD, dual_clip=1.9, mask=self.MASK).metrics
        r = d.exp()[self.MASK]
        assert m.tokens == 5 and m.sequences == 2
        # e^0.4 > 1.2 where A > 0; e^-0.3 < 0.8 and e^0.7 > 1.9 where A < 0
        assert (m.clip_fraction_high, m.clip_fraction_low, m.clip_fraction_dual) == (1 / 5, 1 / 5, 1 / 5)
        torch.testing.assert_close(m.ratio_mean, r.mean())
        torch.testing.assert_close(m.ratio_ess, r.mean() ** 2 / (r**2).mean())
        torch.testing.assert_close(m.ratio_max, r.max())
        torch.testing.assert_close(m.ratio_min, r.min())
        torch.testing.assert_close(m.old_kl, -d[self.MASK].mean())
        torch.testing.assert_close(m.old_k2, (d[self.MASK] ** 2).mean() / 2)
        # the sampled policy itself
        with fastpo.use_backend(backend):
            m = losses.ppo(leaf, self.A, mask=self.MASK).metrics
        assert m.ratio_mean == m.ratio_min == m.ratio_max == m.ratio_ess == 1 and m.old_kl == 0

    def test_old_is_the_policy_itself(self, backend):
        """Without old log-probs the ratio is 1 with the gradient -A, in every method but the value's."""
        for row in ROWS:
            if row.values:
                continue
            leaf = self.P.clone().requires_grad_()
            given = {"selected": torch.ones(2, 3, dtype=torch.bool)} if row.selected else {}
            out = call(
                row, {"logprobs": leaf, "advantages": self.A, **given, "mask": self.MASK}, backend, beta=0.0,
                aggregation="seq_mean_token_sum",
            )  # fmt: skip
            (grad,) = torch.autograd.grad(out.loss, leaf)
            torch.testing.assert_close(grad, torch.where(self.MASK, -self.A[:, None] / 2, 0), msg=row.name)


@by_backend
class TestTraps:
    """Where a library does something else."""

    def at(self, name: str, d: list[list[float]], a: list[float], backend: str, **options: Any) -> tuple[Any, Tensor]:
        old = torch.full((len(d), len(d[0])), -1.0, dtype=torch.float64)
        leaf = (old + torch.tensor(d, dtype=torch.float64)).requires_grad_()
        with fastpo.use_backend(backend):
            out = getattr(losses, name)(leaf, torch.tensor(a, dtype=torch.float64), old, **options)
        return out, torch.autograd.grad(out.loss, leaf)[0]

    def test_cispo_keeps_a_gradient_where_it_clips(self, backend):
        """torchrl differentiates through the clip, which leaves 0."""
        _, grad = self.at("cispo", [[3.0, -2.0]], [1.5], backend, epsilon_low=0.2, epsilon_high=0.3)
        torch.testing.assert_close(grad, torch.tensor([[-1.3 * 1.5 / 2, -0.8 * 1.5 / 2]], dtype=torch.float64))

    def test_luspo_does_not_average_padding(self, backend):
        """TRL and Liger average over padding once there is a penalty per token."""
        options = {"reference_logprobs": torch.full((1, 2), -1.2, dtype=torch.float64), "beta": 0.5}
        narrow, _ = self.at("luspo", [[0.1, 0.2]], [1.0], backend, **options, epsilon_high=1.0)
        options["reference_logprobs"] = torch.full((1, 5), -1.2, dtype=torch.float64)
        mask = torch.tensor([[True, True, False, False, False]])
        wide, _ = self.at("luspo", [[0.1, 0.2, 9.0, 9.0, 9.0]], [1.0], backend, **options, mask=mask, epsilon_high=1.0)
        torch.testing.assert_close(narrow.loss, wide.loss)
        s, delta = math.exp(0.15), [0.3, 0.4]
        k3 = sum(math.exp(-x) - 1 + x for x in delta)
        assert narrow.loss.item() == pytest.approx(2 * -s + 0.5 * k3)

    def test_gspo_and_its_token_form(self, backend):
        """The sum of the slopes over the tokens is -A s keep / N for both."""
        d, a = [[0.1, -0.3, 0.2], [0.5, 0.4, 0.6]], [1.0, -2.0]
        for name in ("gspo", "gspo_token"):
            _, grad = self.at(name, d, a, backend, epsilon_low=0.3, epsilon_high=0.4)
            want = [-a[i] * math.exp(sum(d[i]) / 3) / 2 for i in range(2)]
            assert grad.sum(1).tolist() == pytest.approx(want)

    def test_gmpo_leaves_out_masked_rows(self, backend):
        """verl's mean counts them."""
        mask = torch.tensor([[True, True], [False, False]])
        out, _ = self.at("gmpo", [[0.1, 0.3], [0.0, 0.0]], [1.0, 1.0], backend, mask=mask)
        assert out.loss.item() == pytest.approx(-math.exp(0.2))

    def test_dual_clip_is_delta(self, backend):
        for a in (1.0, -1.0):
            found = [
                self.at(name, [[1.5, -1.5, 0.3, 0.0]], [a], backend, aggregation="token_mean", **more)
                for name, more in (("ppo", {"dual_clip": 3.0}), ("grpo", {"delta": 3.0, "beta": 0.0}))
            ]
            assert torch.equal(found[0][1], found[1][1]) and found[0][0].loss == found[1][0].loss
            assert (found[0][1][0, 0] == 0).all()

    def test_far_log_ratios_are_cut(self, backend):
        """As verl and OpenRLHF do: finite, and without gradient beyond 20 nats."""
        _, grad = self.at("ppo", [[-500.0, 500.0, 0.0]], [1.0], backend)
        assert grad.isfinite().all() and grad[0, 0] == 0 and grad[0, 1] == 0 and grad[0, 2] != 0

    def test_rows_of_one_advantage_and_tokens(self, backend):
        """One number per sequence is that number at each token."""
        for name in ("gspo", "gmpo", "ppo"):
            d = [[0.1, -0.3, 0.2], [0.5, 0.4, 0.6]]
            old = torch.full((2, 3), -1.0, dtype=torch.float64)
            p = old + torch.tensor(d, dtype=torch.float64)
            a = torch.tensor([1.0, -2.0], dtype=torch.float64)
            with fastpo.use_backend(backend):
                found = [getattr(losses, name)(p, x, old).loss for x in (a, a[:, None].expand(2, 3))]
            assert torch.equal(*found)


@pytest.mark.once
class TestFilters:
    def test_clip_cov_tokens(self):
        generator = torch.Generator().manual_seed(0)
        p, a = torch.randn(20, 50, generator=generator), torch.randn(20, 50, generator=generator)
        mask = torch.rand(20, 50, generator=generator) < 0.8
        keep = losses.clip_cov_tokens(p, a, mask=mask, fraction=0.02, generator=generator)
        n = int(mask.sum())
        x, y = p[mask].double(), a[mask].double()
        covariance = torch.zeros(20, 50, dtype=torch.float64)
        covariance[mask] = (x - x.mean()) * (y - y.mean())
        dropped = ~keep
        assert dropped.sum() == int(0.02 * n) and not (dropped & ~mask).any()
        assert ((covariance[dropped] > 1) & (covariance[dropped] < 5)).all()
        again = losses.clip_cov_tokens(p, a, mask=mask, fraction=0.02, generator=generator)
        assert not torch.equal(again, keep)
        assert losses.clip_cov_tokens(0 * p, a, mask=mask).all()
        # what the ratio clips already is no candidate
        old = p - 1.0
        keep = losses.clip_cov_tokens(p, a, old_logprobs=old, mask=mask, fraction=1.0)
        assert keep[a > 0].all() and not keep[a < 0].all()

    def test_kl_cov_tokens(self):
        generator = torch.Generator().manual_seed(1)
        p, a = torch.randn(10, 40, generator=generator), torch.randn(10, 40, generator=generator)
        mask = torch.rand(10, 40, generator=generator) < 0.7
        chosen = losses.kl_cov_tokens(p, a, mask=mask, fraction=0.05)
        x, y = p[mask].double(), a[mask].double()
        covariance = (x - x.mean()) * (y - y.mean())
        k = int(0.05 * int(mask.sum()))
        assert chosen.sum() == k and set(covariance[chosen[mask]].tolist()) == set(covariance.topk(k).values.tolist())
        assert losses.kl_cov_tokens(p, a, mask=mask, fraction=0.0).sum() == 1
        assert losses.kl_cov_tokens(p, a, mask=torch.zeros_like(mask)).sum() == 0

    def test_entropy_mask(self):
        entropy = torch.rand(7, 30, generator=torch.Generator().manual_seed(2))
        mask = torch.rand(7, 30, generator=torch.Generator().manual_seed(3)) < 0.6
        for q in (0.0, 0.2, 0.55, 1.0):
            threshold = torch.quantile(entropy[mask].double(), 1 - q)
            want = mask & (entropy.double() >= threshold)
            assert torch.equal(losses.entropy_mask(entropy, q, mask=mask), want)
        assert not losses.entropy_mask(entropy, 0.5, mask=torch.zeros_like(mask)).any()

    def test_groups_and_lengths(self):
        correct = torch.tensor([True, False, True, True, False, False])
        groups = torch.tensor([7, 7, 3, 3, -1, -1])
        assert losses.mixed_groups(correct, groups).tolist() == [True, True, False, False, False, False]
        assert losses.mixed_groups(correct[:0], groups[:0]).shape == (0,)
        mask = torch.tensor([[True, True], [True, False]])
        assert losses.overlong_mask(mask, torch.tensor([True, False])).tolist() == [[False, False], [True, False]]
        masks = losses.tppo_masks(mask, torch.tensor([1, 0]), torch.tensor([False, True]))
        assert [m.tolist() for m in masks] == [[[False, True], [True, False]], [[False, False], [True, False]]]

    OLD = torch.tensor([[-1.0, -0.5, -2.0], [-0.3, -0.1, -9.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    ROLLOUT = torch.tensor([[-1.1, -0.7, -1.2], [-0.3, -0.2, math.nan], [-1.0, 1.0, -1.0]], dtype=torch.float64)
    COUNTS = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("estimator", ["k2", "k3"])
    def test_rejection_mask(self, estimator, packed):
        """Each limit just above and just below the statistic, of a token or of its sequence."""
        x = torch.where(self.COUNTS, self.OLD - self.ROLLOUT, 0)
        values = x.square() / 2 if estimator == "k2" else x.exp() - 1 - x
        lengths = self.COUNTS.sum(1, keepdim=True).clamp(min=1)
        total = values.sum(1, keepdim=True)
        each = {
            "token": values,
            "sequence": total,
            "sequence_mean": total / lengths,
            "sequence_max": values.amax(1, keepdim=True),
        }
        for level, statistic in each.items():
            statistic = statistic.expand(3, 3)
            for limit in (*statistic[self.COUNTS].tolist(), 0.0):
                for factor in (1 - 1e-9, 1 + 1e-9):
                    want = self.COUNTS & (statistic <= factor * limit)
                    options: dict[str, Any] = {"estimator": estimator, "level": level, "mask": self.COUNTS}
                    given = self.OLD, self.ROLLOUT
                    if packed:
                        # a token behind the last sequence
                        given = tuple(torch.cat([t[self.COUNTS], t[2, :1]]) for t in given)
                        want = torch.cat([want[self.COUNTS], torch.tensor([False])])
                        options |= {"mask": None, "cu_seqlens": torch.tensor([0, 3, 5, 5], dtype=torch.int32)}
                    assert torch.equal(losses.rejection_mask(*given, factor * limit, **options), want), (level, limit)

    def test_rejection_in_a_loss(self):
        """As the mask, what is rejected leaves the denominator; as the policy mask, it stays in it."""
        kept = losses.rejection_mask(self.OLD, self.ROLLOUT, 0.1, mask=self.COUNTS)
        assert 0 < kept.sum() < self.COUNTS.sum()
        grads = []
        for options in ({"mask": kept}, {"mask": self.COUNTS, "policy_mask": kept}):
            leaf = self.OLD.clone().requires_grad_()
            out = losses.ppo(leaf, torch.ones(3, dtype=torch.float64), **options)
            grads.append(torch.autograd.grad(out.loss, leaf)[0])
        torch.testing.assert_close(grads[0], -kept.double() / kept.sum())
        torch.testing.assert_close(grads[1], -kept.double() / self.COUNTS.sum())

    @pytest.mark.parametrize("correction", CORRECTIONS[1:], ids=str)
    def test_normalised_weights(self, correction):
        """The weights of the policy term then have the mean 1; the penalty is as it was."""
        given = make(policy("ppo"), seed=4)
        streams = given["old_logprobs"], given["rollout_logprobs"]
        mean = losses.mean_rollout_weight(*streams, correction, mask=given["mask"])
        assert mean.dtype == torch.float64 and mean.shape == ()
        options = {"mask": given["mask"], "correction": correction, "beta": 0.3}
        names = ("old_logprobs", "reference_logprobs", "rollout_logprobs")

        def step(advantages: Tensor, **more: Any) -> tuple[Tensor, Any]:
            leaf = given["logprobs"].clone().requires_grad_()
            out = losses.ppo(leaf, advantages, **{n: given[n] for n in names}, **{**options, **more})
            return torch.autograd.grad(out.loss, leaf)[0], out.metrics

        plain, metrics = step(given["advantages"], beta=0.0)
        torch.testing.assert_close(mean, metrics.weight_mean)
        penalty, _ = step(0 * given["advantages"])
        normalised, _ = step(given["advantages"] / mean)
        torch.testing.assert_close(normalised, plain / mean + penalty, rtol=1e-12, atol=1e-14)
        none = losses.mean_rollout_weight(*streams, RolloutCorrection.icepop(30.0, 40.0), mask=given["mask"])
        assert none == 1

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda m: losses.rejection_mask(m.float(), m.float(), -1.0), "limit must be at least 0, got -1"),
            (lambda m: losses.rejection_mask(m.float(), m.float(), 1.0, estimator="k1"), "estimator must be one of k2"),
            (
                lambda m: losses.rejection_mask(m.float(), m.float(), 1.0, level="seq"),
                "level must be one of token",
            ),
            (lambda m: losses.rejection_mask(m.float(), m.float()[0], 1.0), "rollout_logprobs has shape"),
            (lambda m: losses.rejection_mask(m[0].float(), m[0].float(), 1.0), r"expected \(B, T\), or \(N,\) with"),
            (
                lambda m: losses.mean_rollout_weight(m.float(), m.float(), RolloutCorrection("token", 2.0, 1.0)),
                "0 <= low <= high, got 2 and 1",
            ),
            (lambda m: losses.entropy_mask(m.float(), 1.5), r"quantile must be in \[0, 1\], got 1.5"),
            (lambda m: losses.clip_cov_tokens(m.float(), m.float()[0]), "advantages has shape"),
            (lambda m: losses.kl_cov_tokens(m.float(), m.float(), fraction=-1), "fraction must be in"),
            (lambda m: losses.overlong_mask(m, m[:, 0][:1]), "truncated has shape"),
            (lambda m: losses.mixed_groups(m, m.long()), "correct has shape"),
            (lambda m: losses.tppo_masks(m, m[:, 0].long()[:1], m[:, 0]), "begin has shape"),
        ],
    )
    def test_bad_input(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(torch.ones(3, 4, dtype=torch.bool))


@pytest.mark.once
class TestBadInput:
    P, A = torch.zeros(2, 3), torch.zeros(2)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"beta": 0.1}, ValueError, "beta is 0.1, but there are no reference_logprobs"),
            ({"beta": -1.0}, ValueError, "beta must be at least 0"),
            ({"entropy_coefficient": 0.1}, ValueError, "there is no entropy"),
            ({"epsilon_low": 1.5}, ValueError, r"epsilon_low must be in \[0, 1\] for grpo, got 1.5"),
            ({"delta": 1.1}, ValueError, r"grpo: delta must be above 1 \+ epsilon_high"),
            ({"kl": "k4"}, ValueError, "kl must be one of k1, k2, k3; got 'k4'"),
            ({"kl_gradient": "k0"}, ValueError, "kl_gradient must be one of"),
            ({"correction": RolloutCorrection()}, ValueError, "correction needs rollout_logprobs"),
            ({"correction": 3.0}, TypeError, "correction must be a fastpo.losses.RolloutCorrection"),
            ({"off_policy_threshold": 0.1}, ValueError, "off_policy_threshold needs old_logprobs or rollout_logprobs"),
            ({"aggregation": "mean"}, ValueError, "aggregation must be one of token_mean"),
            ({"aggregation": "const_norm"}, TypeError, "needs max_length, an int, got NoneType"),
            ({"max_length": 5}, ValueError, "max_length is for aggregation='const_norm'"),
            ({"reduction": "sum"}, ValueError, "reduction must be one of mean, none; got 'sum'"),
            ({"num_items": 0}, ValueError, "num_items must be positive and finite"),
            ({"num_items": 3, "reduction": "none"}, ValueError, "num_items is the denominator"),
            ({"num_items": torch.ones(2)}, ValueError, "num_items must be a number or 0-dimensional"),
            ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs has shape \(2, 4\), expected \(2, 3\)"),
            ({"entropy": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "entropy must have dtype float32"),
            ({"mask": torch.zeros(2, 3)}, TypeError, "mask must have dtype bool"),
            ({"policy_mask": torch.zeros(2, 2, dtype=torch.bool)}, ValueError, "policy_mask has shape"),
        ],
        ids=str,
    )
    def test_arguments(self, options, error, message):
        with pytest.raises(error, match=message):
            losses.grpo(self.P, self.A, **{"beta": 0.0, **options})

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"logprobs has shape \(6,\), expected \(B, T\), or \(N,\) with"):
            losses.ppo(torch.zeros(6), self.A)
        with pytest.raises(ValueError, match=r"advantages has shape \(3,\), expected \(2, 3\).*or \(2,\), one per seq"):
            losses.ppo(self.P, torch.zeros(3))
        with pytest.raises(ValueError, match="values has shape"):
            losses.value_clip(torch.zeros(3), torch.zeros(3), torch.zeros(3))
        for bad in ([0, 9], [1, 3], [0, 4, 2]):
            boundaries = torch.tensor(bad, dtype=torch.int32)
            for backend in ("native", "reference"):
                with pytest.raises(ValueError, match="cu_seqlens must rise"), fastpo.use_backend(backend):
                    losses.ppo(torch.zeros(6), torch.zeros(len(bad) - 1), cu_seqlens=boundaries)

    def test_correction(self):
        for correction, message in [
            (RolloutCorrection("row"), "correction.level must be one of token, sequence, sequence_mean; got 'row'"),  # type: ignore
            (RolloutCorrection("token", 2.0, 1.0), "0 <= low <= high, got 2 and 1"),
            (RolloutCorrection("token", reject="batch"), "correction.reject must be one of"),  # type: ignore
        ]:
            with pytest.raises(ValueError, match=message):
                losses.ppo(self.P, self.A, rollout_logprobs=self.P, correction=correction)

    def test_kl_reward(self):
        with pytest.raises(ValueError, match="beta must be at least 0"):
            losses.kl_reward(self.P, self.P, beta=-1.0)
        with pytest.raises(ValueError, match="reference_logprobs has shape"):
            losses.kl_reward(self.P, self.A, beta=1.0)


def test_deterministic_over_threads():
    row = policy("gspo")
    given = make(row, "padded", 40, 700, torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(evaluate(row, given, **settings(row)))
    torch.set_num_threads(1)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
