"""linear_divergence: against fp64 formulas of whole logits and against closed forms; blocks, masks, memory."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels._tiles import MULTIPLIED_ON_CPUS
from tests.device import to_device
from tests.memory import peak_allocated

module: Any = sys.modules["fastpo.kernels.linear_divergence"]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "kl": fastpo.token_kl,
    "reverse kl": partial(fastpo.token_kl, direction="reverse"),
    "skew": partial(fastpo.token_kl, skew=0.1),
    "jsd": partial(fastpo.token_jsd, beta=0.3),
    "tv": fastpo.token_tv,
    "chi2": partial(fastpo.token_alpha_divergence, alpha=2.0),
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one for both": {"softcap": 2.0, "logit_scale": 0.5},
    "each its own": {"softcap": (None, 1.5), "logit_scale": (0.7, 1.3), "temperature": 0.8},
}
NAMES = ("hidden", "weight", "reference_hidden", "reference_weight", "bias", "reference_bias")
ROWS, WIDTH, REFERENCE_WIDTH, VOCAB = 11, 8, 12, 83


def make(*leading: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Logits of about 1 in two models that differ by as much."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leading = leading or (ROWS,)
    found = (
        normal(*leading, WIDTH),
        normal(VOCAB, WIDTH) / WIDTH**0.5,
        normal(*leading, REFERENCE_WIDTH),
        normal(VOCAB, REFERENCE_WIDTH) / REFERENCE_WIDTH**0.5,
        normal(VOCAB),
        normal(VOCAB),
    )
    return {name: t.to(dtype) for name, t in zip(NAMES, found, strict=True)}


def upstream(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(like)


def evaluate(given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The divergence, and the gradients of the policy's tensors for a random upstream one."""
    given = {name: to_device(t).detach() for name, t in given.items()}
    leaves = {name: given[name].requires_grad_() for name in ("hidden", "weight", "bias") if name in given}
    out = fastpo.linear_divergence(**given, **{name: to_device(value) for name, value in options.items()})
    grads = torch.autograd.grad(out, [*leaves.values()], upstream(out))
    return {"divergence": out.detach().cpu(), **{name: g.cpu() for name, g in zip(leaves, grads, strict=True)}}


def exact(
    given: dict[str, Tensor],
    divergence: Callable[..., Tensor] = fastpo.token_kl,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: Any = 1.0,
    softcap: Any = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """From whole logits in fp64, by the reference's divergence; and the magnitudes of the gradients' products."""
    given = {name: t.double() for name, t in given.items()}
    if mask is not None:
        given |= {name: given[name].masked_fill(~mask[..., None], 0) for name in ("hidden", "reference_hidden")}

    def of(value: Any, i: int) -> Any:
        return value[i] if isinstance(value, tuple) else value

    logits, shaped = [], []
    for i, prefix in enumerate(("", "reference_")):
        z = given[f"{prefix}hidden"] @ given[f"{prefix}weight"].t() + given.get(f"{prefix}bias", 0)
        logits.append(z.requires_grad_())
        z, cap = z * of(logit_scale, i), of(softcap, i)
        shaped.append(z if cap is None else cap * torch.tanh(z / cap))
    with fastpo.use_backend("reference"):
        out = divergence(*shaped, mask=mask, temperature=temperature)
    (g,) = torch.autograd.grad(out, logits[0], upstream(out))
    flat, hidden = g.reshape(-1, VOCAB), given["hidden"].reshape(-1, WIDTH)

    def products(g: Tensor, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return {"hidden": (g @ weight).view_as(given["hidden"]), "weight": g.t() @ hidden, "bias": g.sum(0)}

    found = {"divergence": out.detach(), **products(flat, hidden, given["weight"])}
    sizes = products(flat.abs(), hidden.abs(), given["weight"].abs())
    return found, {"divergence": out.detach().clamp(min=1e-2), **sizes}


def compare(given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Of a matrix, the norm of the errors against that of the magnitudes.

    A logit is off by the rounding of its H products and of what shapes it: δ in all, which in both streams moves a
    divergence and its gradient by some δ of themselves, for they are of order 1. Halves are rounded as operands of the
    gradient's products and as results, and those products of halves that a CPU's library makes are rounded once more.
    """
    plain = {name: value for name, value in options.items() if name != "memory_budget"}
    ours, (truth, sizes) = evaluate(given, **options), exact(given, **plain)
    dtype = given["hidden"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert ours["divergence"].dtype == wide
    largest = max(
        (given[f"{prefix}hidden"].nan_to_num().double().abs() @ given[f"{prefix}weight"].double().abs().t()).max()
        for prefix in ("", "reference_")
    )
    delta = torch.finfo(wide).eps * (REFERENCE_WIDTH + 8) * float(largest)
    half = 0.0 if dtype == wide else 3 * torch.finfo(dtype).eps / 2
    for name, found in ours.items():
        assert found.dtype == (wide if name == "divergence" else dtype) and found.shape == truth[name].shape
        allowed = (4 * delta + (0 if name == "divergence" else half)) * sizes[name].norm()
        error = (found.double() - truth[name]).norm()
        assert error <= allowed, f"{name}: {error:.2e} is above {allowed:.2e}"
    return ours


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """So many rows at a time."""

    def blocks(rows: int) -> None:
        monkeypatch.setattr(module, "_LOGITS", {"cpu": rows * VOCAB, "cuda": rows * VOCAB})
        # which cuts the weight, too
        monkeypatch.setattr(module, "_COLUMNS", 32)

    return blocks


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class TestValues:
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
    def test_blocks_of_rows(self, dtype, divergence, shape, blocks):
        blocks(4)
        compare(make(dtype=dtype), divergence=divergence, **shape)

    def test_products_of_narrow_operands(self, dtype, monkeypatch):
        """Whether this processor multiplies in every dtype, or in none but fp32 and fp64."""
        for multiplied in (MULTIPLIED_ON_CPUS | {torch.bfloat16, torch.float16}, {torch.float32, torch.float64}):
            monkeypatch.setattr(module, "MULTIPLIED_ON_CPUS", multiplied)
            compare(make(dtype=dtype))

    @pytest.mark.parametrize("rows", [1, 4, ROWS])
    def test_kept_or_computed_again(self, dtype, rows, blocks):
        blocks(rows)
        wide = torch.promote_types(dtype, torch.float32)
        enough = ROWS * VOCAB * 2 * wide.itemsize
        given = make(dtype=dtype)
        kept, again = (evaluate(given, softcap=3.0, memory_budget=budget) for budget in (enough, enough - 1))
        assert all(torch.equal(kept[name], again[name]) for name in again)

    def test_leading_dimensions(self, dtype):
        one, flat = (compare(make(*leading, dtype=dtype)) for leading in ((2, 3, 4), (24,)))
        assert torch.equal(one["divergence"].flatten(), flat["divergence"])
        assert fastpo.linear_divergence(**{k: t[0] if "hidden" in k else t for k, t in make().items()}).shape == ()

    def test_without_biases(self, dtype):
        given = make(dtype=dtype)
        compare({name: t for name, t in given.items() if "bias" not in name})
        compare({name: t for name, t in given.items() if name != "bias"})

    def test_temperatures_of_rows(self, dtype, blocks):
        blocks(3)
        temperature = torch.linspace(0.5, 2, ROWS)
        compare(make(dtype=dtype), temperature=temperature)
        compare(make(dtype=dtype), temperature=temperature, mask=torch.arange(ROWS) % 3 > 0)

    def test_known_distributions(self):
        """Rows that pick two known distributions from a table: KL(p ‖ q) and its reverse, written out."""
        p, q = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
        one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
        found = fastpo.linear_divergence(one, q.log()[:, None], one, p.log()[:, None])
        assert float(found) == pytest.approx(0.5 * math.log(2.5) + 0.25 * math.log(1.25) + 0.25 * math.log(0.25 / 0.6))
        # a hidden state of 0 is the uniform distribution
        uniform = fastpo.linear_divergence(one, p.log()[:, None], zero, q.log()[:, None])
        assert float(uniform) == pytest.approx(-math.log(3) - float(p.log().mean()))
        scaled = fastpo.linear_divergence(one, q.log()[:, None], one, 2 * p.log()[:, None], logit_scale=(1.0, 0.5))
        torch.testing.assert_close(scaled, found)

    def test_one_model_is_exactly_0(self, dtype):
        given = make(dtype=dtype)
        same = {name: given[name.removeprefix("reference_")] for name in NAMES}
        found = evaluate(same, softcap=5.0)
        assert not any(t.any() for t in found.values())

    def test_small_divergences_keep_their_digits(self):
        """In fp32, where it is far below the rounding of a log-prob; with one head what is shared cancels."""
        given = make(dtype=torch.float32)
        given["reference_hidden"] = given["hidden"] * (1 + 2.0**-14)
        given["reference_weight"], given["reference_bias"] = given["weight"], given["bias"]
        found, (truth, _) = fastpo.linear_divergence(**given), exact(given)
        assert truth["divergence"].max() < 1e-8
        # logits differ by 2^-14 of themselves, and each is off by a few 2^-24: 2^-8 of that, squared
        torch.testing.assert_close(found.double(), truth["divergence"], rtol=2.0**-6, atol=0)


class TestMasks:
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_other_rows_may_hold_anything(self, dtype, shape, blocks):
        blocks(3)
        given = make(2, 9, dtype=dtype)
        mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.6
        clean = compare(given, mask=mask, **shape)
        for name in ("hidden", "reference_hidden"):
            given[name][~mask] = math.nan
        poisoned = evaluate(given, mask=mask, **shape)
        assert all(torch.equal(clean[name], poisoned[name]) for name in clean)
        assert not poisoned["divergence"][~mask].any() and not poisoned["hidden"][~mask].any()

    def test_they_take_no_product(self, monkeypatch):
        seen = []
        logits = module.Head.logits

        def counted(self: Any, *args: Any) -> Tensor:
            seen.append(len(self.hidden))
            return logits(self, *args)

        monkeypatch.setattr(module.Head, "logits", counted)
        evaluate(make(), mask=torch.arange(ROWS) < 3, memory_budget=0)
        assert seen == [3] * 4

    def test_no_row_counts(self, dtype):
        given = make(dtype=dtype)
        given["hidden"][:] = math.nan
        found = evaluate(given, mask=torch.zeros(ROWS, dtype=torch.bool))
        assert not any(t.any() for t in found.values())

    def test_no_row_at_all(self, dtype):
        for leading in ((0,), (3, 0)):
            found = evaluate(make(*leading, dtype=dtype))
            assert found["divergence"].shape == leading and not found["weight"].any() and not found["bias"].any()
            evaluate(make(*leading, dtype=dtype), mask=torch.zeros(leading, dtype=torch.bool))


class TestGradients:
    @pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
    def test_gradcheck(self, divergence, blocks):
        blocks(2)
        given = make(3, seed=1)
        given = {name: t[:5] if "hidden" not in name else t for name, t in given.items()}
        leaves = [given[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        others = {name: given[name] for name in NAMES if "reference" in name}

        def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            mask = torch.tensor([True, False, True])
            own = {"hidden": hidden, "weight": weight, "bias": bias}
            return fastpo.linear_divergence(**own, **others, divergence=divergence, mask=mask, softcap=2.0)

        assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)

    @pytest.mark.parametrize("needed", [("hidden",), ("weight",), ("bias",), ("hidden", "weight")], ids=" and ".join)
    def test_only_what_is_needed(self, needed):
        given = make()
        every = evaluate(given)
        leaves = [given[name].detach().requires_grad_() for name in needed]
        out = fastpo.linear_divergence(**given | dict(zip(needed, leaves, strict=True)))
        for name, g in zip(needed, torch.autograd.grad(out, leaves, upstream(out)), strict=True):
            assert torch.equal(g, every[name])

    @pytest.mark.parametrize("memory_budget", [0, None])
    def test_second_backward(self, memory_budget):
        given = make()
        weight = given["weight"].requires_grad_()
        out = fastpo.linear_divergence(**given, memory_budget=memory_budget).sum()
        first, second = (torch.autograd.grad(out, weight, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize("name", ["weight", "reference_hidden", "reference_weight"])
    def test_what_the_backward_needs_is_not_overwritten(self, name):
        given = make()
        leaf = given["hidden"].requires_grad_()
        out = fastpo.linear_divergence(**given, memory_budget=0)
        given[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), leaf)

    def test_the_reference_is_a_constant(self):
        given = make()
        with pytest.raises(ValueError, match="reference_hidden requires grad"):
            fastpo.linear_divergence(**given | {"reference_hidden": given["reference_hidden"].requires_grad_()})
        with torch.no_grad():
            fastpo.linear_divergence(**given)
        # a head that both have, and that is trained: as the reference's it is a constant
        weight = given["weight"].requires_grad_()
        given |= {"reference_hidden": given["hidden"] + 1, "reference_weight": weight}
        (tied,) = torch.autograd.grad(fastpo.linear_divergence(**given).sum(), weight)
        given["reference_weight"] = weight.detach()
        (apart,) = torch.autograd.grad(fastpo.linear_divergence(**given).sum(), weight)
        assert torch.equal(tied, apart)


class TestCompile:
    def test_compiled_equals_eager(self, blocks):
        blocks(4)
        torch._dynamo.reset()
        shape = SHAPES["each its own"]
        given, mask = make(dtype=torch.float32), torch.arange(ROWS) % 3 > 0
        eager = evaluate(given, mask=mask, **shape)
        for name in ("hidden", "reference_hidden"):
            given[name][~mask] = math.nan
        leaves = [given[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        out = torch.compile(fastpo.linear_divergence, fullgraph=True)(**given, mask=mask, **shape)
        grads = torch.autograd.grad(out, leaves, upstream(out))
        for mine, theirs in zip((out.detach(), *grads), eager.values(), strict=True):
            # two orders of a sum of VOCAB numbers of order 1, or of its gradients' products
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=VOCAB * 2.0**-24)


class TestAutocast:
    def test_all_tensors_are_cast(self):
        given, half = make(dtype=torch.float32), make(dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            found = evaluate(given)
            # as it comes from layers under autocast
            mixed = fastpo.linear_divergence(**given | {"hidden": half["hidden"]})
        expected = evaluate(half)
        assert torch.equal(found["divergence"], expected["divergence"])
        assert torch.equal(mixed, expected["divergence"])
        assert torch.equal(found["weight"], expected["weight"].float())


class TestMemory:
    def test_never_the_logits_of_all(self, monkeypatch):
        rows, vocab = 256, 4096
        monkeypatch.setattr(module, "_LOGITS", {"cpu": 16 * vocab})
        generator = torch.Generator().manual_seed(0)
        hidden, others = (torch.randn(rows, 8, generator=generator) for _ in range(2))
        weight = torch.randn(vocab, 8, generator=generator).requires_grad_()

        def run() -> Any:
            out = fastpo.linear_divergence(hidden, weight, others, weight, memory_budget=0)
            return torch.autograd.grad(out.sum(), weight)

        # two models' logits of a block, the gradient of one, and the weight's with a temporary of it
        block = 16 * vocab * 4
        assert peak_allocated(run) < 3.2 * block + 2 * weight.numel() * 4 < rows * vocab * 4


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor"),
    "integers": ({"hidden": torch.ones(ROWS, WIDTH).long()}, TypeError, "hidden must have dtype"),
    "another dtype": ({"weight": torch.ones(VOCAB, WIDTH)}, TypeError, "weight has dtype torch.float32, hidden"),
    "its reference's": (
        {"reference_bias": torch.ones(VOCAB)},
        TypeError,
        "reference_bias has dtype torch.float32, ref",
    ),
    "a flat weight": ({"weight": torch.ones(0).double()}, ValueError, "weight has shape (0,), expected (V, 8)"),
    "no vocabulary": (
        {"weight": torch.ones(0, WIDTH).double()},
        ValueError,
        "the vocabulary (first dimension) is empty",
    ),
    "another vocabulary": (
        {"reference_weight": torch.ones(VOCAB + 1, REFERENCE_WIDTH).double(), "reference_bias": None},
        ValueError,
        "reference_weight has 84 rows, weight 83",
    ),
    "a bias": ({"bias": torch.ones(3).double()}, ValueError, "bias has shape (3,), expected (83,)"),
    "other rows": (
        {"reference_hidden": torch.ones(3, REFERENCE_WIDTH).double()},
        ValueError,
        "reference_hidden has shape (3, 12), expected (11, 12)",
    ),
    "fp64 with fp32": (
        {
            "reference_hidden": torch.ones(ROWS, REFERENCE_WIDTH),
            "reference_weight": torch.ones(VOCAB, REFERENCE_WIDTH),
            "reference_bias": None,
        },
        TypeError,
        "reference_hidden has dtype torch.float32, hidden torch.float64",
    ),
    "a mask of numbers": ({"mask": torch.ones(ROWS)}, TypeError, "mask must have dtype bool"),
    "a mask's shape": ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask has shape (3,), expected (11,)"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    "temperatures": ({"temperature": torch.zeros(ROWS)}, ValueError, "temperature must be positive"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    "softcaps": ({"softcap": (1.0, 2.0, 3.0)}, ValueError, "softcap must be one for both models, or a tuple of two"),
    "scale": ({"logit_scale": (1.0, math.inf)}, ValueError, "logit_scale must be positive"),
    "scale of a tensor": ({"logit_scale": torch.ones(())}, TypeError, "logit_scale must be a number"),
    "budget": ({"memory_budget": -1}, ValueError, "memory_budget must not be negative"),
    "a name": ({"divergence": "kl"}, TypeError, "divergence must be a function"),
    "a sum": (
        {"divergence": lambda a, b, mask, temperature: (a - b).sum()},
        ValueError,
        "divergence must return one number for each of 11 rows, got shape ()",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(changed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastpo.linear_divergence(**make() | changed)


def test_a_function_of_ones_own():
    def squared(logits: Tensor, others: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
        return ((logits - others) / temperature).square().sum(-1)

    given = make()
    z = given["hidden"] @ given["weight"].t() + given["bias"]
    others = given["reference_hidden"] @ given["reference_weight"].t() + given["reference_bias"]
    found = fastpo.linear_divergence(**given, divergence=squared, temperature=2.0)
    torch.testing.assert_close(found, ((z - others) / 2).square().sum(-1))


def test_a_part_of_the_logits(blocks):
    """What a block returns stays when the next one's logits take its place."""
    blocks(4)
    given = make()
    found = fastpo.linear_divergence(
        **given, divergence=lambda logits, others, mask, temperature: logits[:, 3], memory_budget=0
    )
    torch.testing.assert_close(found, given["hidden"] @ given["weight"][3] + given["bias"][3])
