"""linear_logprobs: the tiled computation against the reference in fp64, and the reference against explicit logits.

Hidden states and weights are small multiples of powers of two, so that the logits are exact in every dtype: then the
log-probs have to be as good as those of token_logprobs from the same logits, by the same rule.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels import _tiles
from fastpo.kernels.linear_logprobs import STATISTICS
from fastpo.reference import vocabulary
from tests.device import to_device
from tests.kernels.test_token_logprobs import allow, exact, upstream
from tests.memory import peak_allocated
from tests.tolerance import assert_within

# by its dotted name, the package has the function
module = sys.modules["fastpo.kernels.linear_logprobs"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


LEAVES = ("hidden", "weight", "bias", "lora_a", "lora_b")
SCALING = 0.5


def small_tiles(monkeypatch, rows: int, bytes: int) -> None:
    for device in _tiles.TILINGS:
        monkeypatch.setitem(_tiles.TILINGS, device, _tiles.Tiling(rows, bytes))


def make(
    *rows: int,
    vocab: int,
    size: int = 32,
    dtype: torch.dtype = torch.float32,
    ids: int = 0,
    bias: bool = False,
    rank: int = 0,
) -> dict[str, Tensor]:
    """Logits are multiples of 1/32 of less than 8: eight bits, which bf16 has too."""
    g = torch.Generator().manual_seed(0)
    count = torch.Size(rows)
    hidden = torch.randint(-2, 3, (*rows, size), generator=g) / 4
    weight = torch.randint(-2, 3, (vocab, size), generator=g) / 8
    # few of the products count, so that no sum is large
    hidden = hidden * (torch.rand(*rows, size, generator=g) < 0.6)
    found = {"hidden": hidden.to(dtype), "weight": weight.to(dtype)}
    found["targets"] = torch.randint(vocab, (*count, *([ids] if ids else [])), generator=g)
    if bias:
        found["bias"] = (torch.randint(-8, 9, (vocab,), generator=g) / 32).to(dtype)
    if rank:
        a = torch.randint(-1, 2, (rank, size), generator=g) * (torch.rand(rank, size, generator=g) < 0.1)
        found["lora_a"] = a.to(dtype)
        found["lora_b"] = (torch.randint(-1, 2, (vocab, rank), generator=g) / 4).to(dtype)
    logits = logits_of(found)
    assert torch.equal(logits.bfloat16().double(), logits)
    return found


@contextlib.contextmanager
def counted_products(monkeypatch):
    """The sizes of the matrix products that the driver makes."""
    sizes = []

    def counted(function):
        def run(out, *args, **options):
            if out.numel():
                sizes.append(tuple(out.shape))
            return function(out, *args, **options)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(_tiles, "add_product", counted(_tiles.add_product))
        fill = counted(lambda out, p, *rest: original(p, out, *rest))
        original = _tiles.Problem.fill
        patch.setattr(_tiles.Problem, "fill", lambda p, out, *rest: fill(out, p, *rest))
        yield sizes


def call(given: dict[str, Tensor], **options):
    rest = {n: t for n, t in given.items() if not n.startswith("lora")}
    lora = (given["lora_a"], given["lora_b"], SCALING) if "lora_a" in given else None
    return fastpo.linear_logprobs(**rest, lora=lora, **options)


def evaluate(given: dict[str, Tensor], backend: str = "native", stats=STATISTICS, **options) -> dict[str, Tensor]:
    """All outputs, and the gradients for random upstream gradients of the differentiable ones."""
    leaves = {n: to_device(given[n]).detach().requires_grad_() for n in LEAVES if n in given}
    options = {n: to_device(value) for n, value in options.items()}
    with fastpo.use_backend(backend):
        out = call(leaves | {"targets": to_device(given["targets"])}, stats=stats, **options)
    named = {"logprobs": out} if isinstance(out, Tensor) else out._asdict()
    outputs = {name: t for name, t in named.items() if t is not None}
    used = [n for n in DIFFERENTIABLE if n in outputs]
    up = [to_device(upstream(n, outputs[n])) for n in used]
    grads = torch.autograd.grad([outputs[n] for n in used], list(leaves.values()), up)
    found = {n: t.detach().cpu() for n, t in outputs.items()}
    return found | {f"d_{n}": g.cpu() for n, g in zip(leaves, grads, strict=True)}


def logits_of(given: dict[str, Tensor]) -> Tensor:
    logits = given["hidden"].double() @ given["weight"].double().t()
    if "lora_a" in given:
        logits += SCALING * given["hidden"].double() @ given["lora_a"].double().t() @ given["lora_b"].double().t()
    return logits + given["bias"].double() if "bias" in given else logits


def gradient_terms(given: dict[str, Tensor], stats, options) -> dict[str, Tensor]:
    """Σ |terms| of each gradient, each term weighted by the relative error of its p in eps.

    The logits' gradient is g (onehot - p), -g p (log p + H) of the entropy and g p of logsumexp, and p = exp(log p) has
    the relative error (1 + |log p| + that of the sum) eps.
    """
    hidden, weight = given["hidden"].double().flatten(0, -2), given["weight"].double()
    scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
    t = options.get("temperature", 1.0)
    t = t.double().view(-1, 1) if isinstance(t, Tensor) else t
    logits = (logits_of(given) * scale).flatten(0, -2)
    slope = torch.full_like(logits, scale)
    if cap is not None:
        slope = scale * (1 - torch.tanh(logits / cap) ** 2)
        logits = cap * torch.tanh(logits / cap)
    if "allowed" in options:
        among = fastpo.unpack_allowed(options["allowed"], logits.shape[-1]).reshape(-1, logits.shape[-1])
        logits, slope = torch.where(among, logits, -math.inf), torch.where(among, slope, 0)
    logp = (logits / t).log_softmax(-1)
    p, like = logp.exp(), torch.promote_types(given["hidden"].dtype, torch.float32)
    logp = torch.where(p > 0, logp, 0)
    targets = given["targets"].reshape(len(p), -1)
    valid = targets != options.get("ignore_index", -100)
    up = {n: torch.empty(given["targets"].shape if n == "logprobs" else hidden.shape[:1]) for n in DIFFERENTIABLE}
    up = {n: upstream(n, u.to(like)).double().abs().reshape(len(p), -1) for n, u in up.items()}
    g = torch.where(valid, up["logprobs"], 0)
    terms = g.sum(-1, keepdim=True) * p
    terms.scatter_add_(1, torch.where(valid, targets, 0), g)
    if "entropy" in stats:
        terms += up["entropy"] * p * (logp.abs() - (p * logp).sum(-1, keepdim=True))
    if "logsumexp" in stats:
        terms += up["logsumexp"] * p
    relative = 1 + logp.abs()
    d = terms / t * slope * (relative + (p * relative).sum(-1, keepdim=True))
    d = torch.where(valid.any(-1, keepdim=True), d, 0)
    found = {"d_hidden": d @ weight.abs(), "d_weight": d.t() @ hidden.abs(), "d_bias": d.sum(0)}
    if "lora_a" in given:
        a, b = SCALING * given["lora_a"].double().abs(), given["lora_b"].double().abs()
        found["d_hidden"] += d @ b @ a
        found["d_lora_a"] = SCALING * (d @ b).t() @ hidden.abs()
        found["d_lora_b"] = d.t() @ (hidden.abs() @ a.t())
    return found | {"d_hidden": found["d_hidden"].view(given["hidden"].shape)}


def compare(given: dict[str, Tensor], stats=STATISTICS, **options) -> dict[str, Tensor]:
    """The native results, checked by the accuracy rule."""
    dtype = given["hidden"].dtype
    ours, same = (evaluate(given, b, stats, **options) for b in ("native", "reference"))
    wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    truth = evaluate(wide, "reference", stats, **options)
    terms = gradient_terms(given, stats, options)
    in_double = dtype == torch.float64
    plain = set(options) <= {"temperature", "ignore_index", "allowed"}
    values, sizes = {}, {}
    if plain:  # judged as token_logprobs is
        rest = tuple(s for s in stats if s != "mean_logit")
        values, sizes = exact(logits_of(given), given["targets"], stats=rest, **options)
    for name, value in ours.items():
        assert value.dtype == same[name].dtype and value.shape == same[name].shape, name
        if name == "top1":
            assert torch.equal(value, truth[name])
        elif name.startswith("d_"):
            # 2 eps of the sum of the terms' magnitudes; in fp64 the truth has as much of an error
            assert_within(value, truth[name], same[name], name=name, terms=terms[name].numpy() * (1 + in_double))
        elif name in values:
            assert_within(value, values[name], same[name], name=name, terms=sizes[name])
        else:
            # the softcap's tanh and the scale round each logit of about ten once more
            assert_within(value, truth[name], same[name], name=name, terms=20.0)
        assert dtype == torch.float16 or value.isfinite().all() or name == "logprobs", name
    return ours


@pytest.mark.once
class TestReference:
    def test_is_token_logprobs_of_the_heads_logits(self):
        given = make(3, 4, vocab=50, dtype=torch.float64, bias=True)
        stats = ("entropy", "logsumexp", "log_sum_p2", "top1")
        ours = vocabulary.linear_logprobs(**given, temperature=0.7, logit_scale=0.5, stats=(*stats, "mean_logit"))
        want = vocabulary.token_logprobs(logits_of(given) * 0.5, given["targets"], temperature=0.7, stats=stats)
        for name in ("logprobs", *stats):
            assert torch.allclose(getattr(ours, name), getattr(want, name), rtol=1e-14, atol=1e-14)
        assert torch.allclose(ours.mean_logit, (logits_of(given) * 0.5 / 0.7).mean(-1), rtol=1e-14)

    def test_softcap(self):
        """Two tokens with the logits ±1 under a cap of 2: by hand."""
        hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        out = vocabulary.linear_logprobs(hidden, weight, torch.tensor([0]), softcap=2.0, logit_scale=3.0)
        margin = 2 * 2 * math.tanh(3 / 2)
        assert out.logprobs.item() == pytest.approx(-math.log1p(math.exp(-margin)), rel=1e-14)


@by_dtype
class TestValues:
    @pytest.mark.parametrize("vocab", [1, 2, 3, 63, 64, 65, 1000, 4097])
    def test_vocabulary_sizes(self, dtype, vocab):
        compare(make(5, vocab=vocab, dtype=dtype))

    @pytest.mark.parametrize("rows", [1, 2, 63, 511, 512, 513, 1100])
    def test_row_counts(self, dtype, rows):
        compare(make(rows, vocab=100, dtype=dtype), stats=("entropy",))

    def test_several_tiles_each_way(self, dtype, monkeypatch):
        """Tiles of a few rows and columns give what one tile gives."""
        given = make(29, vocab=500, dtype=dtype, bias=True)
        whole = compare(given)
        small_tiles(monkeypatch, 7, 1)
        tiled = compare(given)
        assert torch.equal(whole["top1"], tiled["top1"])

    @pytest.mark.parametrize("ids", [1, 2, 7])
    def test_several_ids(self, dtype, ids):
        given = make(3, 4, vocab=100, dtype=dtype, ids=ids)
        given["targets"][0, 0, :] = 5  # the same id several times
        given["targets"][1, 1, 0] = -100
        compare(given)

    @pytest.mark.parametrize("stats", [(), ("entropy",), ("logsumexp",), ("log_sum_p2", "top1"), ("mean_logit",)])
    def test_statistics_asked_for(self, dtype, stats):
        ours = compare(make(6, vocab=70, dtype=dtype), stats=stats)
        assert {n for n in ours if not n.startswith("d_")} == {"logprobs", *stats}

    @pytest.mark.parametrize("temperature", [0.3, 5.0])
    def test_temperature(self, dtype, temperature):
        compare(make(4, vocab=90, dtype=dtype), temperature=temperature)
        compare(make(2, 3, vocab=90, dtype=dtype), temperature=torch.linspace(0.5, temperature, 6).view(2, 3))

    @pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
    def test_scale_and_cap(self, dtype, softcap):
        for scale, temperature in ((0.5, 1.0), (4.0, 0.7)):
            options = {"logit_scale": scale, "temperature": temperature, "softcap": softcap}
            compare(make(9, vocab=300, dtype=dtype, bias=True), **options)


@by_dtype
class TestIgnored:
    def test_rows_left_out(self, dtype):
        """They may hold NaN, and what is left is as if they were not there."""
        given = make(40, vocab=120, dtype=dtype)
        out = torch.arange(40) % 3 == 0
        kept = {n: t[~out] if n != "weight" else t for n, t in given.items()}
        given["targets"][out] = -100
        given["hidden"][out] = torch.nan
        ours, alone = evaluate(given, stats=STATISTICS), evaluate(kept, stats=STATISTICS)
        for name in ("logprobs", *STATISTICS):
            fill = -1 if name == "top1" else 0
            assert (ours[name][out] == fill).all()
            assert torch.equal(ours[name][~out], alone[name]), name
        assert (ours["d_hidden"][out] == 0).all() and ours["d_weight"].isfinite().all()
        compare({**given, "hidden": given["hidden"].nan_to_num()})

    def test_all_rows(self, dtype, monkeypatch):
        """Zeros, and no product is made."""
        given = make(5, vocab=60, dtype=dtype, bias=True)
        given["targets"][:] = 7
        with counted_products(monkeypatch) as products:
            ours = evaluate(given, ignore_index=7)
        assert not products
        assert all((t == (-1 if n == "top1" else 0)).all() for n, t in ours.items())

    def test_no_rows(self, dtype):
        ours = evaluate(make(0, vocab=60, dtype=dtype))
        assert ours["logprobs"].shape == (0,) and ours["d_hidden"].shape == (0, 32)
        assert (ours["d_weight"] == 0).all()


@by_dtype
def test_views(dtype):
    given = make(6, 5, vocab=80, dtype=dtype, bias=True)
    plain = evaluate(given)
    shifted = torch.full((6, 6, 32), torch.nan, dtype=dtype)
    shifted[:, :-1] = given["hidden"]
    views = {
        "hidden": shifted[:, :-1],
        "weight": given["weight"].t().contiguous().t(),
        "targets": given["targets"].t().contiguous().t().int(),
        "bias": torch.stack([given["bias"]] * 2, 1)[:, 1],
    }
    ours = evaluate(views)
    for name, value in plain.items():
        assert torch.equal(value, ours[name]) or name.startswith("d_"), name
    compare(views)


def test_float32_tiles(monkeypatch):
    """bf16 input whose logits bf16 cannot hold: exact with tiles in fp32, also where the processor has no products of
    bf16, and rounded without."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 64).bfloat16(), torch.randn(500, 64).bfloat16()
    targets = torch.randint(500, (20,))
    with fastpo.use_backend("reference"):
        truth = fastpo.linear_logprobs(hidden.double(), weight.double(), targets)

    def error(logits_dtype: str, *multiplied: torch.dtype) -> float:
        monkeypatch.setattr(_tiles, "MULTIPLIED_ON_CPUS", frozenset(multiplied))
        found = fastpo.linear_logprobs(hidden, weight, targets, logits_dtype=logits_dtype)
        return (found - truth).abs().max().item()

    # 64 products of two eight-bit numbers, summed in fp32; logits of about 30 rounded to eight bits
    assert error("float32", *DTYPES) == error("auto", torch.float32) < 1e-4 < error("auto", *DTYPES) < 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
class TestOtherProcessors:
    """With products of bf16 and fp16 where this machine has none, and without where it has them."""

    @pytest.fixture(autouse=True)
    def other(self, monkeypatch):
        changed = _tiles.MULTIPLIED_ON_CPUS ^ {torch.bfloat16, torch.float16}
        monkeypatch.setattr(_tiles, "MULTIPLIED_ON_CPUS", changed)

    @pytest.mark.parametrize("budget", [0, 1 << 20])
    def test_values(self, dtype, budget, monkeypatch):
        given = make(29, vocab=500, dtype=dtype, bias=True, rank=2, ids=2)
        given["targets"][::4] = -100
        compare(given, memory_budget=budget)
        small_tiles(monkeypatch, 7, 1)
        compare(given, memory_budget=budget, temperature=0.7, softcap=3.0, logit_scale=1.5)

    def test_frozen_head(self, dtype, monkeypatch):
        TestFrozenHead().test_as_with_a_head_that_learns(dtype, {"softcap": 3.0, "temperature": 1.3}, monkeypatch)

    def test_memory(self, dtype):
        TestMemory().test_forward_alone(dtype)
        TestMemory().test_recomputed_and_kept(dtype)


@by_dtype
class TestLora:
    @pytest.mark.parametrize("rank", [1, 4])
    def test_adapter(self, dtype, rank, monkeypatch):
        given = make(33, vocab=300, dtype=dtype, bias=True, rank=rank, ids=2)
        given["targets"][3] = -100
        compare(given)
        small_tiles(monkeypatch, 8, 1)
        compare(given, temperature=0.7, softcap=3.0, logit_scale=1.5)

    def test_is_the_merged_weight(self, dtype):
        given = make(9, vocab=70, dtype=dtype, rank=2)
        a, b = given["lora_a"].double(), given["lora_b"].double()
        merged = {n: given[n] for n in ("hidden", "targets")}
        merged["weight"] = (given["weight"].double() + SCALING * b @ a).to(dtype)
        assert torch.equal(call(given), call(merged))

    def test_ignored_rows_may_hold_anything(self, dtype):
        given = make(9, vocab=70, dtype=dtype, rank=2)
        given["targets"][4] = -100
        clean = evaluate(given)
        given["hidden"][4] = torch.nan
        assert all(torch.equal(t, clean[n]) for n, t in evaluate(given).items())

    def test_only_the_adapter_learns(self, dtype):
        given = make(9, vocab=70, dtype=dtype, rank=2)
        whole = evaluate(given, stats=())
        leaves = {n: t.requires_grad_() if n.startswith("lora") else t for n, t in given.items()}
        out = call(leaves)
        out.backward(upstream("logprobs", out))
        assert leaves["hidden"].grad is None and leaves["weight"].grad is None
        for name in ("lora_a", "lora_b"):
            assert torch.equal(leaves[name].grad, whole[f"d_{name}"])


class TestKept:
    """Logits that are kept for the backward, and those that it computes again."""

    @by_dtype
    @pytest.mark.parametrize("stats", [(), STATISTICS], ids=["plain", "stats"])
    def test_the_same_bits(self, dtype, stats, monkeypatch):
        small_tiles(monkeypatch, 16, 4096)
        given = make(45, vocab=300, dtype=dtype, bias=True, rank=2)
        given["targets"][::4] = -100
        kept, again = (evaluate(given, stats=stats, memory_budget=b) for b in (1 << 30, 0))
        assert all(torch.equal(t, again[n]) for n, t in kept.items())

    @pytest.mark.once
    def test_products(self, monkeypatch):
        """Three where the logits of the rows that count fit, four where they do not."""
        given = make(10, vocab=60)
        given["targets"][5:] = -100
        fits = 5 * 60 * 4
        for budget, wanted in ((fits, 3), (fits - 1, 4), (0, 4), (None, 3)):
            with counted_products(monkeypatch) as products:
                evaluate(given, stats=("entropy",), memory_budget=budget)
            assert len(products) == wanted
        with counted_products(monkeypatch) as products:
            call(given, stats=STATISTICS)
        assert len(products) == 1

    def test_second_backward(self):
        given = make(5, vocab=60)
        hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
        out = call(given, stats=("entropy",))
        grads = [torch.autograd.grad(o.sum(), (hidden, weight), retain_graph=True) for o in (*out[:2], *out[:2])]
        for first, again in zip(grads[:2], grads[2:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


class TestRows:
    """The rows that are computed may be named."""

    @by_dtype
    def test_named(self, dtype):
        given = make(4, 5, vocab=60, dtype=dtype, ids=2)
        rows = torch.tensor([3, 11, 7, 19])
        given["targets"].view(20, 2)[7, 1] = -100
        ours = evaluate(given, rows=rows)
        ignored = given["targets"].clone().view(20, 2)
        ignored[[i for i in range(20) if i not in rows]] = -100
        want = evaluate({**given, "targets": ignored.view(4, 5, 2)})
        for name, value in ours.items():
            if name.startswith("d_"):  # summed in another order
                assert torch.allclose(value, want[name], rtol=0, atol=64 * torch.finfo(dtype).eps)
            else:
                assert torch.equal(value, want[name])

    def test_frozen_head_and_reference(self):
        given = make(20, vocab=60)
        rows = torch.tensor([3, 11, 7])
        grads = []
        for backend in ("native", "reference"):
            hidden = given["hidden"].clone().requires_grad_()
            with fastpo.use_backend(backend):
                out = call({**given, "hidden": hidden}, rows=rows)
            assert (out != 0).nonzero()[:, 0].tolist() == [3, 7, 11]
            grads.append(torch.autograd.grad(out.sum(), hidden)[0])
        assert torch.allclose(*grads, atol=1e-6)

    def test_no_rows(self):
        out = evaluate(make(20, vocab=60), rows=torch.empty(0, dtype=torch.int64))
        assert all((t == (-1 if n == "top1" else 0)).all() for n, t in out.items())


class TestSkipping:
    """Tiles whose gradient is nothing are left out of the backward."""

    # a vocabulary of which one part has all the probability
    def given(self, dtype=torch.float32) -> dict[str, Tensor]:
        given = make(40, vocab=640, dtype=dtype, bias=True)
        given["bias"][:128] += 16
        given["targets"] = given["targets"] % 128
        return given

    @pytest.mark.parametrize("stats", [(), ("entropy", "logsumexp")], ids=["plain", "stats"])
    @pytest.mark.parametrize("softcap", [None, 30.0])
    def test_error_is_within_the_bound(self, stats, softcap, monkeypatch):
        small_tiles(monkeypatch, 16, 1)
        given = {n: t.double() if t.is_floating_point() else t for n, t in self.given().items()}
        for budget in (0, 1 << 30):
            for threshold in (0.0, 1e-7, 1e-5, 1e-3):
                with counted_products(monkeypatch) as products:
                    options = {"stats": stats, "softcap": softcap, "logit_scale": 1.5, "memory_budget": budget}
                    ours = evaluate(given, skip_below=threshold, **options)
                if threshold == 0:
                    exact, most = ours, len(products)
                    continue
                assert all(torch.equal(ours[n], exact[n]) for n in ("logprobs", *stats))
                error = {n: (ours[n] - exact[n]).abs() for n in ("d_hidden", "d_weight", "d_bias")}
                assert (error["d_hidden"] <= threshold * given["weight"].abs().sum(0)).all()
                assert (error["d_weight"] <= threshold * given["hidden"].abs().sum(0)).all()
                assert (error["d_bias"] <= threshold * len(given["hidden"])).all()
                if threshold == 1e-3:
                    # 8 of the 10 slices: their products are not made, nor are their logits, and it shows
                    assert len(products) < most * 0.6 and error["d_hidden"].max() > 0
            assert len(products) <= most

    def test_a_target_keeps_its_tile(self, monkeypatch):
        small_tiles(monkeypatch, 16, 1)
        given = self.given()
        given["targets"][20] = 600
        ours, exact = (evaluate(given, stats=(), skip_below=t) for t in (1e-2, 0.0))
        assert torch.allclose(ours["d_weight"][600], exact["d_weight"][600], atol=1e-2) and exact["d_weight"][600].any()

    def test_nan_is_not_skipped(self, monkeypatch):
        small_tiles(monkeypatch, 16, 1)
        given = self.given()
        given["hidden"][3] = torch.nan
        assert evaluate(given, stats=(), skip_below=1.0)["d_weight"].isnan().any(1).all()


class TestTemperatureGradient:
    @pytest.mark.once
    def test_gradcheck(self):
        g = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((4, 3), (7, 3)))
        temperature = (torch.rand(4, generator=g, dtype=torch.float64) + 0.5).requires_grad_()
        targets = torch.tensor([[0, 6], [3, 3], [-100, -100], [5, -100]])
        for needs in (False, True):
            hidden.requires_grad_(needs)
            for options in ({"logit_scale": 1.7}, {"softcap": 3.0, "logit_scale": 1.7}):

                def function(hidden, t, options=options):
                    out = fastpo.linear_logprobs(
                        hidden, weight, targets, temperature=t, stats=("entropy", "logsumexp"), **options
                    )
                    return out.logprobs, out.logsumexp, out.entropy

                assert torch.autograd.gradcheck(function, (hidden, temperature))
                assert torch.autograd.gradgradcheck(function, (hidden, temperature))

    @by_dtype
    def test_of_the_entropy(self, dtype, monkeypatch):
        """Several tiles, whose rows are handled a few at a time; a banned token, a row that is certain."""
        monkeypatch.setitem(_tiles.TILINGS, "cpu", _tiles.Tiling(4, 2048))
        monkeypatch.setattr(_tiles, "_WIDE", 128)
        given = make(11, vocab=700, dtype=dtype, bias=True)
        given["bias"][3] = -math.inf
        given["hidden"][2] *= 100
        given["targets"][5] = -100
        temperature = torch.linspace(0.5, 2, 11, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
        out = call(given, temperature=temperature, stats=("entropy",)).entropy
        (ours,) = torch.autograd.grad(out.sum(), temperature)
        # Var[z] / T, where z are the logits over T
        divisor = temperature.detach().double()
        z = logits_of(given) / divisor[:, None]
        p = z.softmax(-1)
        z = torch.where(p == 0, 0, z)
        want = (p * (z - (p * z).sum(-1, keepdim=True)).square()).sum(-1) / divisor
        want[5] = 0
        assert want[0] > 0.01
        # of Var[z]/T^3: bf16 and fp16 logits of size 4 are rounded, each by eps relative; fp32 loses sqrt(H) roundings
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 16 * torch.finfo(dtype).eps)
        torch.testing.assert_close(ours.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.once
class TestAutograd:
    OPTIONS = ({}, {"softcap": 3.0, "logit_scale": 1.7}, {"temperature": 0.6, "logit_scale": 2.0})

    @pytest.mark.parametrize("options", OPTIONS)
    def test_gradcheck(self, options):
        g = torch.Generator().manual_seed(0)
        tensors = [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((4, 3), (7, 3), (7,))]
        targets = torch.tensor([[0, 6], [3, 3], [-100, -100], [5, -100]])

        def function(hidden, weight, bias):
            out = fastpo.linear_logprobs(hidden, weight, targets, bias, stats=("entropy", "logsumexp"), **options)
            return out[:3]

        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)

    def test_a_large_second_derivative_is_refused(self, monkeypatch):
        monkeypatch.setattr(module, "_MOST_LOGITS", 100)
        given = make(5, vocab=60)
        hidden = given["hidden"].requires_grad_()
        out = fastpo.linear_logprobs(hidden, given["weight"], given["targets"])
        with pytest.raises(RuntimeError, match="a second derivative holds all 5 x 60 logits"):
            torch.autograd.grad(out.sum(), hidden, create_graph=True)

    def test_only_what_is_needed(self):
        given = make(5, vocab=60, bias=True)
        whole = evaluate(given, stats=())
        for needed in itertools.product([False, True], repeat=3):
            leaves = {
                n: given[n].clone().requires_grad_(r) for n, r in zip(("hidden", "weight", "bias"), needed, strict=True)
            }
            out = fastpo.linear_logprobs(**leaves, targets=given["targets"])
            assert out.requires_grad == any(needed)
            if any(needed):
                out.backward(upstream("logprobs", out))
            for name, leaf in leaves.items():
                if not leaf.requires_grad:
                    assert leaf.grad is None
                elif needed == (True, False, False):  # computed in another way
                    assert torch.allclose(leaf.grad, whole[f"d_{name}"], rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(leaf.grad, whole[f"d_{name}"])

    def test_second_backward(self):
        given = make(5, vocab=60)
        hidden = given["hidden"].requires_grad_()
        out = fastpo.linear_logprobs(hidden, given["weight"], given["targets"], stats=("entropy",))
        first = [torch.autograd.grad(o.sum(), hidden, retain_graph=True)[0] for o in out[:2]]
        again = [torch.autograd.grad(o.sum(), hidden, retain_graph=True)[0] for o in out[:2]]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_repeats(self):
        given = make(300, vocab=2000)
        first = evaluate(given)
        assert all(torch.equal(v, evaluate(given)[n]) for n, v in first.items())

    def test_no_grad(self, monkeypatch):
        """Parameters, but nobody wants a gradient: one product, and nothing is kept."""
        given = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in make(5, vocab=60).items()}
        frozen = {**given, "weight": given["weight"].detach()}
        for context in (torch.no_grad, torch.inference_mode):
            for inputs in (given, frozen):
                with context(), counted_products(monkeypatch) as products:
                    out = call(inputs, stats=("entropy",))
                assert len(products) == 1 and not out.logprobs.requires_grad

    @pytest.mark.parametrize("budget", [0, 1 << 30])
    def test_number_of_threads_changes_before_the_backward(self, budget):
        threads = torch.get_num_threads()
        given = make(300, vocab=4000)
        want = evaluate(given, stats=(), memory_budget=budget)
        hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
        out = call(given, memory_budget=budget, skip_below=1e-30)
        try:
            torch.set_num_threads(threads + 1)
            grads = torch.autograd.grad(out, (hidden, weight), upstream("logprobs", out))
        finally:
            torch.set_num_threads(threads)
        for name, grad in zip(("d_hidden", "d_weight"), grads, strict=True):
            torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_targets_in_another_order_of_memory(self, compiled):
        torch._dynamo.reset()
        given = make(6, vocab=60, ids=3)
        plain = evaluate(given, stats=())
        given["targets"] = given["targets"].t().contiguous().t()
        leaves = [given["hidden"].requires_grad_(), given["weight"].requires_grad_()]

        def function(hidden, weight):
            return fastpo.linear_logprobs(hidden, weight, given["targets"])

        out = (torch.compile(function, fullgraph=True) if compiled else function)(*leaves)
        grads = torch.autograd.grad(out, leaves, upstream("logprobs", out).t().contiguous().t())
        assert torch.equal(out, plain["logprobs"])
        assert torch.equal(grads[0], plain["d_hidden"]) and torch.equal(grads[1], plain["d_weight"])

    def test_create_graph_under_autocast(self):
        given = make(5, vocab=60)
        hidden = given["hidden"].requires_grad_()
        out = call(given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (ours,) = torch.autograd.grad(out.sum(), hidden, create_graph=True)
        (want,) = torch.autograd.grad(call(given).sum(), hidden)
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)

    def test_tied_weight(self):
        """One tensor as embedding and head: both gradients arrive."""
        weight = make(1, vocab=60)["weight"].requires_grad_()
        ids = torch.arange(5)
        out = fastpo.linear_logprobs(weight[ids] * 2, weight, ids)
        (ours,) = torch.autograd.grad(out.sum(), weight)
        (want,) = torch.autograd.grad(((weight[ids] * 2) @ weight.t()).log_softmax(-1)[ids, ids].sum(), weight)
        assert torch.allclose(ours, want, atol=1e-6)


class TestFrozenHead:
    """Only hidden needs a gradient, as under LoRA or with a reference's head: two products in all."""

    def run(self, given: dict[str, Tensor], **options) -> dict[str, Tensor]:
        given = {n: to_device(t) for n, t in given.items()}
        hidden = given["hidden"].detach().requires_grad_()
        out = fastpo.linear_logprobs(**{**given, "hidden": hidden}, stats=("logsumexp",), **options)
        used = {"logprobs": out.logprobs, "logsumexp": out.logsumexp}
        up = [to_device(upstream(n, t)) for n, t in used.items()]
        (grad,) = torch.autograd.grad(list(used.values()), hidden, up)
        return {n: t.detach().cpu() for n, t in used.items()} | {"d_hidden": grad.cpu()}

    @by_dtype
    @pytest.mark.parametrize(
        "options",
        [{}, {"temperature": 0.6, "logit_scale": 2.0}, {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3}],
        ids=["plain", "scaled", "capped"],
    )
    def test_as_with_a_head_that_learns(self, dtype, options, monkeypatch):
        small_tiles(monkeypatch, 16, 4096)
        for ids, bias in ((0, False), (3, True)):
            given = make(37, vocab=700, dtype=dtype, ids=ids, bias=bias)
            given["targets"][::5] = -100
            ours, same = self.run(given, **options), evaluate(given, "reference", ("logsumexp",), **options)
            wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
            truth = evaluate(wide, "reference", ("logsumexp",), **options)["d_hidden"]
            # twice the terms: the part of the targets and that of the vocabulary are rounded before they meet
            terms = 2 * gradient_terms(given, ("logsumexp",), options)["d_hidden"].numpy()
            assert_within(ours["d_hidden"], truth, same["d_hidden"], name="d_hidden", terms=terms)
            learning = evaluate(given, stats=("logsumexp",), **options)
            assert all(torch.equal(ours[n], learning[n]) for n in ("logprobs", "logsumexp"))
            assert (ours["d_hidden"][::5] == 0).all()

    @pytest.mark.once
    def test_number_of_products(self, monkeypatch):
        given = make(5, vocab=60)
        with counted_products(monkeypatch) as products:
            self.run(given)
        assert len(products) == 2
        # the entropy's gradient, from logits that are kept, or computed again
        for used in ("logprobs", "entropy"):
            for budget, wanted in ((1 << 20, 2), (0, 2 if used == "logprobs" else 4)):
                with counted_products(monkeypatch) as products:
                    hidden = given["hidden"].detach().requires_grad_()
                    out = call({**given, "hidden": hidden}, stats=("entropy",), memory_budget=budget)
                    getattr(out, used).sum().backward()
                assert len(products) == wanted, (used, budget)

    def test_nearly_certain_targets(self):
        """What the target's own term cancels is not left to rounding: bf16 has 3 digits, and 1 - p is 1e-4 here."""
        g = torch.Generator().manual_seed(0)
        hidden = torch.full((4, 8), 0.5).bfloat16().requires_grad_()
        weight = torch.randint(-4, 5, (50, 8), generator=g).bfloat16() / 8
        bias = torch.zeros(50).bfloat16()
        bias[7] = 14
        grads = []
        for dtype in (torch.bfloat16, torch.float64):
            leaf = hidden.detach().to(dtype).requires_grad_()
            out = fastpo.linear_logprobs(leaf, weight.to(dtype), torch.full((4,), 7), bias.to(dtype))
            grads.append(torch.autograd.grad(out.sum(), leaf)[0].double())
        assert (grads[0] - grads[1]).abs().max() < 2**-6 * grads[1].abs().max() < 1e-3

    @pytest.mark.once
    def test_gradcheck(self):
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_()
        weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((7, 3), (7,)))
        targets = torch.tensor([[0, 6], [3, 3], [-100, -100], [5, -100]])
        for options in TestAutograd.OPTIONS:

            def function(h, options=options):
                out = fastpo.linear_logprobs(h, weight, targets, bias, stats=("logsumexp",), **options)
                return out.logprobs, out.logsumexp

            assert torch.autograd.gradcheck(function, hidden)
            assert torch.autograd.gradgradcheck(function, hidden)

    @pytest.mark.parametrize("targets", [[0, -100], [-100, 0], [64, 3], [3, 64], [64, 64], [0, 64]], ids=str)
    def test_targets_at_the_first_column_of_a_slice(self, targets, monkeypatch):
        """Beside targets of other slices, and ignored ones."""
        small_tiles(monkeypatch, 16, 1)
        given = make(5, vocab=200, dtype=torch.float64)
        given["targets"] = torch.tensor([targets] * 5)
        same = evaluate(given, "reference", ("logsumexp",))
        torch.testing.assert_close(self.run(given)["d_hidden"], same["d_hidden"], rtol=1e-12, atol=1e-12)

    def test_impossible_slices(self, monkeypatch):
        """A bias bans the tokens of the first slice, of a later one, and of the last."""
        small_tiles(monkeypatch, 16, 1)
        given = make(5, vocab=200, dtype=torch.float64, bias=True)
        given["targets"][:] = 150
        given["bias"][:100] = given["bias"][192:] = -math.inf
        same = evaluate(given, "reference", ("logsumexp",))
        torch.testing.assert_close(self.run(given)["d_hidden"], same["d_hidden"], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("temperature", [1.0, 1e3, 1e6])
    def test_slope_of_the_cap(self, temperature):
        given = make(5, vocab=200)
        options = {"softcap": 2.0, "temperature": temperature}
        ours, same = self.run(given, **options), evaluate(given, "reference", ("logsumexp",), **options)
        wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        truth = evaluate(wide, "reference", ("logsumexp",), **options)["d_hidden"]
        terms = 2 * gradient_terms(given, ("logsumexp",), options)["d_hidden"].numpy()
        assert_within(ours["d_hidden"], truth, same["d_hidden"], name="d_hidden", terms=terms)

    def test_result_changed_in_place(self):
        given = make(5, vocab=60)
        grads = []
        for inplace in (False, True):
            hidden = given["hidden"].detach().requires_grad_()
            out = call({**given, "hidden": hidden})
            out = out.mul_(2) if inplace else out * 2
            grads.append(torch.autograd.grad(out.sum(), hidden)[0])
        assert torch.equal(*grads)

    def test_extreme_logits(self):
        """Later tiles raise the maximum by more than the range of an exponent."""
        hidden = torch.ones(3, 1, dtype=torch.float64).requires_grad_()
        weight = torch.arange(-2000.0, 2000.0, dtype=torch.float64)[:, None]
        out = fastpo.linear_logprobs(hidden, weight, torch.tensor([3999, 0, 3998]))
        (grad,) = torch.autograd.grad(out.sum(), hidden)
        mean = (weight[:, 0].softmax(0) * weight[:, 0]).sum()
        assert torch.allclose(grad[:, 0], weight[[3999, 0, 3998], 0] - mean, rtol=1e-12, atol=1e-9)


class TestAllowed:
    OPTIONS = ({}, {"temperature": 0.6, "logit_scale": 2.0}, {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3})

    def sets(self, given: dict[str, Tensor], share: float = 0.4) -> Tensor:
        return allow(logits_of(given), given["targets"], share)[1]

    @by_dtype
    @pytest.mark.parametrize(("vocab", "share"), [(1, 0.0), (33, 0.4), (64, 0.0), (1000, 0.4)])
    def test_values(self, dtype, vocab, share):
        given = make(5, vocab=vocab, dtype=dtype, ids=2, bias=True)
        given["targets"][3, 0] = -100
        compare(given, allowed=self.sets(given, share))

    @by_dtype
    @pytest.mark.parametrize("options", OPTIONS, ids=["plain", "scaled", "capped"])
    def test_several_tiles(self, dtype, options, monkeypatch):
        """Kept or computed again, with rows left out."""
        small_tiles(monkeypatch, 8, 1)
        given = make(19, vocab=333, dtype=dtype, ids=2, bias=True, rank=2)
        given["targets"][::4] = -100
        words = self.sets(given)
        for budget in (0, 1 << 30):
            compare(given, allowed=words, memory_budget=budget, **options)
        rows = torch.tensor([1, 7, 18])
        ours, whole = (evaluate(given, allowed=words, **o) for o in ({"rows": rows}, {}))
        assert torch.equal(ours["entropy"][rows], whole["entropy"][rows]) and (ours["entropy"] > 0).sum() == 3

    @by_dtype
    def test_one_set_for_all_rows(self, dtype, monkeypatch):
        """What is under the softmax of other tokens may be NaN or infinite."""
        small_tiles(monkeypatch, 8, 1)
        given = make(9, vocab=200, dtype=dtype, bias=True)
        given["targets"][:] = torch.arange(9) % 3
        words = self.sets(given)[0] | 7
        among = fastpo.unpack_allowed(words, 200)
        anything = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
        given["bias"] = torch.where(among, given["bias"], anything[torch.arange(200) % 3])
        ours = compare(given, allowed=words)
        assert (ours["d_bias"][~among] == 0).all() and (ours["d_weight"][~among] == 0).all()
        own = evaluate(given, allowed=words.expand(9, -1))
        assert all(torch.equal(t, own[n]) for n, t in ours.items())
        banned = {**given, "bias": torch.where(among, given["bias"], -torch.inf)}
        for name, value in evaluate(banned).items():
            if name != "mean_logit":
                # sums in another order
                eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0
                torch.testing.assert_close(ours[name], value, rtol=8 * eps, atol=8 * eps, msg=name)

    def test_mean_over_the_set(self):
        given = make(6, vocab=100, dtype=torch.float64)
        words = self.sets(given)
        among = fastpo.unpack_allowed(words, 100)
        out = call(given, allowed=words, temperature=0.5, stats=("mean_logit",))
        want = [logits_of(given)[r, among[r]].mean() / 0.5 for r in range(6)]
        torch.testing.assert_close(out.mean_logit, torch.stack(want), rtol=1e-13, atol=1e-13)

    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("options", OPTIONS[1:], ids=["scaled", "capped"])
    def test_target_outside(self, frozen, options, monkeypatch):
        """As in token_logprobs: -inf, no gradient, and none of the temperature's."""
        small_tiles(monkeypatch, 4, 1)
        given = make(6, vocab=150, dtype=torch.float64, ids=2)
        mask = fastpo.unpack_allowed(self.sets(given), 150)
        given["targets"][1:4, 0] = given["targets"][2, 1] = 100
        mask[:, 100] = False
        words = fastpo.pack_allowed(mask)
        outside = given["targets"] == 100
        temperature = torch.linspace(0.5, 2, 6, dtype=torch.float64)
        rest = {n: v for n, v in options.items() if n != "temperature"}
        for backend in ("native", "reference"):
            found = []
            for targets in (given["targets"], torch.where(outside, -100, given["targets"])):
                leaves = [given["hidden"].clone().requires_grad_(), temperature.clone().requires_grad_(not frozen)]
                with fastpo.use_backend(backend):
                    out = fastpo.linear_logprobs(
                        leaves[0],
                        given["weight"].clone().requires_grad_(not frozen),
                        targets,
                        temperature=leaves[1],
                        stats=("logsumexp",),
                        allowed=words,
                        **rest,
                    )
                up = torch.where(outside, torch.nan, 2.0).double()
                wanted = [t for t in leaves if t.requires_grad]
                found.append([out.logprobs, *torch.autograd.grad(out.logprobs, wanted, up)])
            assert torch.equal(found[0][0] == -math.inf, outside) and outside[2].all()
            for a, b in zip(found[0][1:], found[1][1:], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
                assert not a[2].any() and a[0].any()

    @by_dtype
    @pytest.mark.parametrize("options", OPTIONS, ids=["plain", "scaled", "capped"])
    def test_frozen_head(self, dtype, options, monkeypatch):
        small_tiles(monkeypatch, 16, 1)
        given = make(21, vocab=333, dtype=dtype, ids=2, bias=True)
        given["targets"][::5] = -100
        options = {**options, "allowed": self.sets(given)}
        ours, same = TestFrozenHead().run(given, **options), evaluate(given, "reference", ("logsumexp",), **options)
        wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        truth = evaluate(wide, "reference", ("logsumexp",), **options)["d_hidden"]
        # twice the terms, as without sets
        terms = 2 * gradient_terms(given, ("logsumexp",), options)["d_hidden"].numpy()
        assert_within(ours["d_hidden"], truth, same["d_hidden"], name="d_hidden", terms=terms)

    @pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 1.7}], ids=["plain", "capped"])
    def test_gradcheck(self, options, monkeypatch):
        """The temperature's too, for which the variance is over the set."""
        small_tiles(monkeypatch, 2, 1)
        g = torch.Generator().manual_seed(0)
        tensors = [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((4, 2), (66, 2), (66,))]
        temperature = (torch.rand(4, generator=g, dtype=torch.float64) + 0.5).requires_grad_()
        targets = torch.tensor([[0, 65], [3, 3], [-100, -100], [5, -100]])
        words = allow(torch.zeros(4, 66), targets, 0.1)[1]

        def function(hidden, weight, bias, t):
            out = fastpo.linear_logprobs(
                hidden, weight, targets, bias, temperature=t, stats=("entropy", "logsumexp"), allowed=words, **options
            )
            return out[:3]

        assert torch.autograd.gradcheck(function, (*tensors, temperature))
        assert torch.autograd.gradgradcheck(function, (*tensors, temperature))

    @pytest.mark.parametrize("stats", [(), ("entropy", "logsumexp")], ids=["plain", "stats"])
    def test_tiles_without_an_allowed_token_are_skipped(self, stats, monkeypatch):
        small_tiles(monkeypatch, 16, 1)
        given = make(40, vocab=640, dtype=torch.float64, bias=True)
        given["bias"][128:] = 1e3
        given["targets"] = given["targets"] % 128
        words = torch.zeros(20, dtype=torch.int32)
        words[:4] = -1
        found = []
        for skip in (0.0, 1e-9):
            with counted_products(monkeypatch) as products:
                found.append(evaluate(given, stats=stats, allowed=words, skip_below=skip, memory_budget=0))
            found[-1]["products"] = torch.tensor(len(products))
        exact, ours = found
        # of three products in four, 8 of the 10 slices
        assert ours.pop("products") < 0.5 * exact.pop("products")
        assert all(torch.allclose(t, exact[n], rtol=0, atol=1e-7) for n, t in ours.items())

    def test_empty_set(self):
        given = make(2, 3, vocab=40)
        words = torch.full((2, 3, 2), -1, dtype=torch.int32)
        words[1, 1] = torch.tensor([0, -1 << 8])
        for backend in ("native", "reference"):
            with fastpo.use_backend(backend):
                with pytest.raises(ValueError, match="allowed holds no token for row 4, which has a target"):
                    call(given, allowed=words)
                ignored = given["targets"].clone()
                ignored[0, 0] = ignored[1, 1] = -100
                assert call({**given, "targets": ignored}, allowed=words).isfinite().all()
                with pytest.raises(ValueError, match="allowed holds no token for row 1"):
                    call({**given, "targets": ignored}, allowed=torch.zeros(2, dtype=torch.int32))

    def test_messages(self):
        given = make(2, 3, vocab=40)
        words = torch.full((2, 3, 2), -1, dtype=torch.int32)
        for allowed, error, message in (
            (words.long(), TypeError, "allowed must have dtype int32, got int64"),
            (words[..., :1], ValueError, r"allowed has shape \(2, 3, 1\), expected \(2,\) or \(2, 3, 2\)"),
            (words.to("meta"), ValueError, "allowed is on meta, hidden on cpu"),
        ):
            for backend in ("native", "reference"):
                with fastpo.use_backend(backend), pytest.raises(error, match=message):
                    call(given, allowed=allowed)

    @pytest.mark.once
    def test_compiled(self):
        torch._dynamo.reset()
        given = make(4, 6, vocab=90, bias=True)
        words = self.sets(given)
        leaves = [given[n].requires_grad_() for n in ("hidden", "weight", "bias")]
        leaves.append(torch.linspace(0.5, 2, 24).view(4, 6).requires_grad_())

        def step(hidden, weight, bias, temperature):
            out = fastpo.linear_logprobs(
                hidden, weight, given["targets"], bias, temperature=temperature, stats=("entropy",), allowed=words
            )
            return out.logprobs * 2, out.entropy

        results = []
        for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            out = f(*leaves)
            results.append([*out, *torch.autograd.grad([o.sum() for o in out], leaves)])
        for ours, compiled in zip(*results, strict=True):
            torch.testing.assert_close(ours, compiled, rtol=1e-6, atol=1e-6)

    @pytest.mark.once
    def test_opcheck(self):
        given = make(5, vocab=40, ids=2)
        words = self.sets(given)
        h, w, t = (given[n] for n in ("hidden", "weight", "targets"))
        for sets in (words, words[:1] | -1):
            common = (h, w, t, None, None, None, None, None, sets, 1.0, 1.0, 0.0, 0.0, -100, None, False)
            rest = (31, False, 0, 0.0)
            torch.library.opcheck(torch.ops.fastpo.linear_logprobs.default, (*common, *rest))
            out = torch.ops.fastpo.linear_logprobs(*common, *rest)
            torch.library.opcheck(torch.ops.fastpo.linear_logprobs_variance.default, (*common, out[1], out[2], out[7]))
            arguments = (*common, out[1], out[2], *out[5:8], torch.randn(5, 2), torch.randn(5), None, 0.0, 3)
            torch.library.opcheck(torch.ops.fastpo.linear_logprobs_backward.default, arguments)


@pytest.mark.once
class TestCompile:
    @pytest.mark.parametrize("frozen", [False, True])
    def test_temperature_that_learns(self, frozen):
        torch._dynamo.reset()
        given = make(4, vocab=60)
        leaves = [given["hidden"].requires_grad_(), torch.linspace(0.5, 2, 4).requires_grad_()]
        weight = given["weight"].requires_grad_(not frozen)

        def step(hidden, temperature):
            out = fastpo.linear_logprobs(hidden, weight, given["targets"], temperature=temperature, stats=("entropy",))
            return out.logprobs + out.entropy

        results = []
        for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            out = f(*leaves)
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
        for ours, compiled in zip(*results, strict=True):
            torch.testing.assert_close(ours, compiled, rtol=1e-6, atol=1e-6)

    def test_bad_values_in_a_graph(self):
        torch._dynamo.reset()
        given = make(4, vocab=60)
        h, w, t = (given[n] for n in ("hidden", "weight", "targets"))
        function = torch.compile(
            lambda t, rows: fastpo.linear_logprobs(h, w, t, rows=rows), fullgraph=True, backend="aot_eager"
        )
        with pytest.raises(ValueError, match="rows must be different numbers"):
            function(t, torch.tensor([2, 2]))
        with pytest.raises(IndexError, match="out of range for a vocabulary of 60"):
            function(t + 60, torch.tensor([2, 3]))

    def test_compiled_equals_eager(self):
        torch._dynamo.reset()
        given = make(4, 6, vocab=90, bias=True)
        leaves = [given[n].requires_grad_() for n in ("hidden", "weight", "bias")]

        def step(hidden, weight, bias):
            out = fastpo.linear_logprobs(hidden, weight, given["targets"], bias, stats=("entropy", "top1"))
            return out.logprobs * 2, out.entropy

        results = []
        for f in (step, torch.compile(step, fullgraph=True)):
            out = f(*leaves)
            results.append([*out, *torch.autograd.grad([o.sum() for o in out], leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @by_dtype
    def test_opcheck(self, dtype):
        given = make(5, vocab=40, dtype=dtype, ids=2, bias=True)
        h, w, b, t = (given[n] for n in ("hidden", "weight", "bias", "targets"))
        given["targets"][0] = -100
        like = torch.promote_types(dtype, torch.float32)
        temperatures = torch.rand(5) + 0.5
        options = (temperatures, None, 1.0, 0.5, 3.0, SCALING, -100)
        lora = torch.rand(2, 32).to(dtype), torch.rand(40, 2).to(dtype)
        rows = torch.tensor([1, 3])
        common = (h, w, t, b, *lora, rows, *options, None, False)
        for rest in ((31, False, 0, 0.0), (31, True, 0, 0.0), (31, True, 1 << 20, 1e-3), (0, False, 1 << 20, 0.0)):
            torch.library.opcheck(torch.ops.fastpo.linear_logprobs.default, (*common, *rest))
        for rest in ((31, False, 0, 0.0), (31, False, 1 << 20, 1e-3)):
            out = torch.ops.fastpo.linear_logprobs(*common, *rest)
            up = (torch.randn(5, 2, dtype=like), torch.randn(5, dtype=like), None)
            torch.library.opcheck(torch.ops.fastpo.linear_logprobs_variance.default, (*common, out[1], out[2], out[7]))
            for bits in (31, 2):
                arguments = (*common, out[1], out[2], *out[5:8], *up, rest[-1], bits)
                torch.library.opcheck(torch.ops.fastpo.linear_logprobs_backward.default, arguments)
        common = (*common[:-1], True)
        torch.library.opcheck(torch.ops.fastpo.linear_logprobs.default, (*common, 1, False, 1 << 20, 0.0))


@pytest.mark.once
class TestMemory:
    """What is allocated, against the formula of the docstring."""

    ROWS, SIZE, VOCAB = 900, 64, 20_000

    def measured(self, dtype: torch.dtype, learns: tuple[str, ...], **options) -> tuple[int, dict[str, int]]:
        g = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(k, self.SIZE, generator=g).to(dtype) for k in (self.ROWS, self.VOCAB))
        targets = torch.randint(self.VOCAB, (self.ROWS,), generator=g)
        targets[::3] = -100
        leaves = {"hidden": hidden, "weight": weight}
        wanted = [leaves[n].requires_grad_() for n in learns]

        def run() -> object:
            out = fastpo.linear_logprobs(hidden, weight, targets, **options)
            return (out, *torch.autograd.grad(out.sum(), wanted)) if wanted else out

        run()
        n, a, b = int((targets != -100).sum()), max(4, dtype.itemsize), dtype.itemsize
        # of the products' operands
        o = b if dtype in _tiles.MULTIPLIED_ON_CPUS else a
        buffer = torch.get_num_threads() << 20
        columns = buffer // (min(n, 512) * o) // 64 * 64
        parts = {
            "buffer": buffer,
            "compacted": n * self.SIZE * o,
            "widened": columns * self.SIZE * o * (o != b),
            "rows": n * (128 + 34) + self.ROWS * (16 + a),
            "logits": n * self.VOCAB * o,
            "expected": self.ROWS * self.SIZE * a,
            "d_hidden": n * self.SIZE * a,
            "d_slice": columns * self.SIZE * a,
            "results": sum(leaves[n].numel() * b for n in learns),
        }
        return peak_allocated(run), parts

    def check(self, dtype: torch.dtype, learns: tuple[str, ...], names: str, **options) -> None:
        peak, parts = self.measured(dtype, learns, **options)
        want = sum(parts[name] for name in names.split())
        # narrow products are made apart, before they are added in fp32, and those of bf16 turn the tile around first
        narrow = dtype.itemsize == 2 and dtype in _tiles.MULTIPLIED_ON_CPUS
        extra = parts["buffer"] if narrow and (learns or dtype == torch.bfloat16) else 0
        assert 0.97 * want < peak < 1.03 * want + extra, (peak, want)
        if "logits" not in names:
            assert peak - parts["results"] < parts["logits"] / 2

    @by_dtype
    def test_forward_alone(self, dtype):
        self.check(dtype, (), "buffer compacted widened rows")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_recomputed_and_kept(self, dtype):
        both, names = ("hidden", "weight"), "buffer compacted widened rows d_hidden results"
        # else it is summed where it belongs
        names += " d_slice" if dtype.itemsize == 2 else ""
        self.check(dtype, both, names, memory_budget=0)
        self.check(dtype, both, names + " logits", memory_budget=1 << 30)

    def test_frozen_head_with_many_ids(self):
        """The backward holds no (N, K, H)."""
        hidden, weight = torch.randn(256, 128, requires_grad=True), torch.randn(500, 128)
        targets = torch.randint(500, (256, 64))

        def run() -> object:
            return torch.autograd.grad(fastpo.linear_logprobs(hidden, weight, targets).sum(), hidden)

        run()
        assert peak_allocated(run) < (4 << 20) < 256 * 64 * 128 * 4

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_frozen_head(self, dtype):
        peak, parts = self.measured(dtype, ("hidden",))
        # in the forward, or in the backward, whose terms are as large as hidden
        assert peak < parts["buffer"] + parts["rows"] + 5 * parts["expected"] < parts["logits"] / 8


@pytest.mark.once
class TestBadInput:
    def test_messages(self):
        h, w, t, b = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(5)
        for change, error, message in (
            ({"hidden": h.long()}, TypeError, "hidden must have dtype"),
            ({"weight": w.double()}, TypeError, "weight has dtype torch.float64, hidden torch.float32"),
            ({"weight": torch.zeros(5, 3)}, ValueError, r"weight has shape \(5, 3\), expected \(V, 4\)"),
            ({"weight": torch.zeros(0)}, ValueError, "a shard of FSDP or ZeRO that has to be gathered first"),
            ({"weight": torch.zeros(0, 4)}, ValueError, "the vocabulary .* is empty"),
            ({"hidden": torch.tensor(1.0)}, ValueError, "0-dimensional"),
            ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\), expected \(5,\)"),
            ({"bias": b.double()}, TypeError, "bias has dtype"),
            ({"targets": t.float()}, TypeError, "targets must have dtype int64, int32"),
            ({"targets": t[:2]}, ValueError, r"targets has shape \(2,\), expected \(3,\) or \(3, 'K'\)"),
            ({"targets": t + 5}, IndexError, r"targets\[0\] is 5, out of range for a vocabulary of 5"),
            ({"targets": t - 1}, IndexError, r"targets\[0\] is -1"),
            ({"temperature": 0.0}, ValueError, "temperature must be positive"),
            ({"temperature": torch.zeros(3)}, ValueError, "temperature must be positive and finite for every token"),
            ({"temperature": torch.ones(2)}, ValueError, "temperature has shape"),
            ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive"),
            ({"logit_scale": "1"}, TypeError, "logit_scale must be a number"),
            ({"softcap": 0}, ValueError, "softcap must be positive and finite, or None, got 0"),
            ({"softcap": math.inf}, ValueError, "softcap must be positive"),
            ({"stats": ("entropie",)}, ValueError, "stats may hold .*mean_logit; got 'entropie'"),
            ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int"),
            ({"logits_dtype": "bfloat16"}, ValueError, "logits_dtype must be 'auto' or 'float32'"),
            ({"lora": (w, w)}, TypeError, r"lora must be a tuple \(A, B, scaling\)"),
            ({"lora": (torch.zeros(2, 3), torch.zeros(5, 2), 1.0)}, ValueError, r"lora\[0\] has shape \(2, 3\)"),
            ({"lora": (torch.zeros(2, 4), torch.zeros(5, 3), 1.0)}, ValueError, r"lora\[1\] has shape \(5, 3\)"),
            ({"lora": (torch.zeros(2, 4), torch.zeros(5, 2).half(), 1.0)}, TypeError, r"lora\[1\] has dtype"),
            ({"lora": (torch.zeros(2, 4), torch.zeros(5, 2), math.inf)}, ValueError, r"lora\[2\], the scaling"),
            ({"rows": torch.tensor([0, 0])}, ValueError, r"rows must be different numbers in \[0, 3\)"),
            ({"rows": torch.tensor([3])}, ValueError, "rows must be different numbers"),
            ({"rows": torch.tensor([True, False, True])}, TypeError, "rows must have dtype int64"),
            ({"memory_budget": -1}, ValueError, "memory_budget must not be negative"),
            ({"memory_budget": 1e9}, TypeError, "memory_budget must be a number of bytes"),
            ({"skip_below": -1e-3}, ValueError, "skip_below must be at least 0"),
            ({"weight": w.to("meta")}, ValueError, "weight is on meta, hidden on cpu"),
        ):
            for backend in ("native", "reference"):
                with fastpo.use_backend(backend), pytest.raises(error, match=message):
                    fastpo.linear_logprobs(**{"hidden": h, "weight": w, "targets": t, "bias": b} | change)

    def test_nan_stays_in_its_row(self):
        given = make(5, vocab=700)
        clean = evaluate(given)
        given["hidden"][2, 3] = torch.nan
        ours = evaluate(given)
        keep = np.arange(5) != 2
        for name in ("logprobs", "entropy", "logsumexp", "log_sum_p2", "mean_logit", "d_hidden"):
            assert torch.equal(ours[name][keep], clean[name][keep]) and ours[name][2].isnan().all(), name
        assert ours["top1"][2] == 0


@pytest.mark.once
@pytest.mark.parametrize("memory_budget", [0, None])
def test_blocks_of_rows_are_summed_in_fp32(memory_budget, monkeypatch):
    """Equal terms of 2,048 rows, in blocks of four: in bf16 a sum of them stops growing after 256 blocks."""
    small_tiles(monkeypatch, 4, 1 << 20)
    hidden = torch.ones(2048, 8, dtype=torch.bfloat16)
    weight = torch.zeros(16, 8, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(2048, dtype=torch.int64)
    out = fastpo.linear_logprobs(hidden, weight, targets, memory_budget=memory_budget)
    (grad,) = torch.autograd.grad(out.sum(), weight)
    # all numbers are multiples of powers of two
    want = torch.where(torch.arange(16) == 0, 2048 * 15 / 16, -2048 / 16).unsqueeze(1).expand(16, 8)
    assert torch.equal(grad.float(), want)
