"""fastpo.formula: the parser, and that torch and the emitted C++ mean the same, judged by numpy's longdouble.

The C++ is compiled here for the host, over float and double and over the CPU's vectors, and by NVRTC for a GPU.
"""

from __future__ import annotations

import ast
import copy
import ctypes
import inspect
import math
import pickle
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.losses.formula import FUNCTIONS, VARIABLES
from fastpo.reference.pairwise import Pair, Side
from fastpo.reference.registry import objectives

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++")
L = np.longdouble
DTYPES = {"float": np.dtype(np.float32), "double": np.dtype(np.float64)}


def build(directory: Path, source: str) -> ctypes.CDLL:
    """A shared library from C++ text."""
    file, library = directory / "code.cpp", directory / "code.so"
    file.write_text(source)
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-ignored-attributes"]
    command = [str(COMPILER), "-O2", "-std=c++20", "-shared", "-fPIC", *warnings, f"-I{CSRC}", str(file), "-o"]
    out = subprocess.run([*command, str(library)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[:3000]
    return ctypes.CDLL(str(library))


def call(function: Callable[..., object], *arrays: np.ndarray) -> None:
    """Arrays by address, then the length of the last."""
    assert all(a.flags.c_contiguous for a in arrays)
    function(*(ctypes.c_void_p(a.ctypes.data) for a in arrays), ctypes.c_long(arrays[-1].shape[-1]))


class TestParser:
    @pytest.mark.parametrize(
        ("text", "hyper", "source"),
        [
            ("softplus(-beta*(w-l))", {"beta": 0.1}, "softplus(((-h[0]) * (w - l)))"),
            ("w*1/2", {}, "((w * 1.0) / 2.0)"),
            ("1/2*w", {}, "((1.0 / 2.0) * w)"),
            ("w + 1e-300 - 10000000000000000", {}, "((w + 1e-300) - 1e+16)"),
            # sorted, whatever their order is
            ("b*w + a*l", {"b": 1, "a": 2}, "((h[1] * w) + (h[0] * l))"),
            ("w**2 + w**3.0 + w**0", {}, "((power<2>(w) + power<3>(w)) + power<0>(w))"),
            ("w**-1 * w**1.5 * w**.5", {}, "(((1.0 / power<1>(w)) * power(w, 1.5)) * sqrt(w))"),
            ("-w**2", {}, "(-power<2>(w))"),
            ("w - -l", {}, "(w - (-l))"),
            ("where(w>l, 1, 2)*w", {}, "(detach(where((w > l), lift<D>(1.0), 2.0)) * w)"),
            ("where(b>=0, w, 2)", {"b": 1.0}, "where((h[0] >= 0.0), w, 2.0)"),
            # constants have no slopes, wherever an infinite derivative is
            ("w + log(-reference_w) * 2", {}, "(w + detach((log((-reference_w)) * 2.0)))"),
            ("detach(w) * l + reference_l", {}, "((detach(w) * l) + reference_l)"),
            (" ( w\n) ", {}, "w"),
        ],
    )
    def test_accepted(self, text, hyper, source):
        loss = fastpo.formula(text, **hyper)
        assert loss.source == source
        assert loss.expression == text and loss.hyper_parameters == hyper
        assert loss.hyper_names == tuple(sorted(hyper))

    @pytest.mark.parametrize(
        ("text", "hyper", "message"),
        [
            ("", {}, "the expression is empty"),
            (" \n", {}, "the expression is empty"),
            ("w +", {}, "'w \\+' is no expression"),
            ("w\nl", {}, "is no expression"),
            ("w\0", {}, "is no expression"),
            ("w = 1", {}, "is no expression"),
            ("w*" * 1000 + "w", {}, "2001 characters, more than 2000"),
            ("-" * 150 + "w", {}, "nested more than 100 deep"),
            ("exp(x=" + "-" * 1900 + "w)", {}, "nested more than 100 deep|nested too deeply"),
            ("+".join("w" * 101), {}, "nested more than 100 deep"),
            ("(" * 999 + "w" + ")" * 999, {}, "nested too deeply|is no expression"),
            ("w.real", {}, "'w.real' \\(Attribute\\)"),
            ("w[0]", {}, "\\(Subscript\\)"),
            ("'w'", {}, "'w' is not a number"),
            ("1j*w", {}, "1j is not a number"),
            ("True*w", {}, "True is not a number"),
            ("None*w", {}, "None is not a number"),
            ("(w, l)", {}, "\\(Tuple\\)"),
            ("lambda: w", {}, "\\(Lambda\\)"),
            ("w if w else l", {}, "\\(IfExp\\)"),
            ("(x := w)", {}, "\\(NamedExpr\\)"),
            ("f'{w}'", {}, "\\(JoinedStr\\)"),
            ("[w for w in l]", {}, "\\(ListComp\\)"),
            ("w and l", {}, "\\(BoolOp\\)"),
            ("not w", {}, "'not w' \\(UnaryOp\\)"),
            ("+w", {}, "'\\+w' \\(UnaryOp\\)"),
            ("w // l", {}, "'w // l' \\(BinOp\\)"),
            ("w % l", {}, "'w % l' \\(BinOp\\)"),
            ("w > l", {}, "'w > l' is not the condition of a where"),
            ("exp(w > l)", {}, "'w > l' is not the condition of a where"),
            ("where(w, w, l)", {}, "condition 'w' is not a comparison"),
            ("where(0 < w < l, w, l)", {}, "condition '0 < w < l' is not one of"),
            ("where(w == l, w, l)", {}, "condition 'w == l' is not one of"),
            ("eval(w)", {}, "'eval' is not a function"),
            ("torch.exp(w)", {}, "'torch.exp' is not a function"),
            ("__import__('os')", {}, "'__import__' is not a function"),
            ("w(l)", {}, "'w' is not a function"),
            ("exp", {}, "the function 'exp' has no arguments"),
            ("exp()", {}, "exp takes 1 arguments, got 0"),
            ("exp(w, l)", {}, "exp takes 1 arguments, got 2"),
            ("exp(x=w)", {}, "arguments are given by place"),
            ("exp(*w)", {}, "arguments are given by place"),
            ("clip(w, l, 1)", {}, "the bounds of clip are numbers"),
            ("beta*w", {}, "unknown name 'beta'"),
            ("w", {"beta": 0.1}, "the hyper-parameter 'beta' does not occur"),
            ("w*l", {"w": 0.1}, "the hyper-parameter 'w' has the name of a variable"),
            ("exp*w", {"exp": 0.1}, "the hyper-parameter 'exp' has the name of a function"),
            ("reduction*w", {"reduction": 0.1}, "the hyper-parameter 'reduction' has the name of an argument"),
            ("_row*w", {"_row": 0.1}, "the hyper-parameter '_row' has the name of a private name"),
            ("beta*w", {"beta": math.inf}, "beta must be finite, got inf"),
            ("beta*w", {"beta": math.nan}, "beta must be finite, got nan"),
            ("beta*w", {"beta": 10**400}, "beta must be finite, got inf"),
            ("w*1e400", {}, "the number .* must be finite, got inf"),
            ("w*1" + "0" * 400, {}, "the number 1.* must be finite, got inf"),
            ("w**l", {}, "the exponent of 'w \\*\\* l' is not a literal"),
            ("w**p", {"p": 2.0}, "the exponent of 'w \\*\\* p' is not a literal"),
            ("w**(1/2)", {}, "is not a literal"),
            ("w**65", {}, "the exponent of 'w \\*\\* 65' is too large"),
            ("w**-64.5", {}, "is too large"),
            ("w**True", {}, "True is not a number"),
            ("1", {}, "depends on no policy variable"),
            ("reference_w*2", {}, "depends on no policy variable"),
            ("detach(w) - exp(detach(l))", {}, "depends on no policy variable"),
            ("where(w > l, 1, 2)", {}, "depends on no policy variable"),
        ],
    )
    def test_refused(self, text, hyper, message):
        with pytest.raises(ValueError, match=message) as caught:
            fastpo.formula(text, **hyper)
        assert str(caught.value).startswith("formula: ")

    def test_what_is_allowed_is_listed(self):
        with pytest.raises(ValueError) as caught:
            fastpo.formula("w @ l")
        for name in (*VARIABLES, *FUNCTIONS, "**", "where"):
            assert name in str(caught.value)

    def test_types(self):
        with pytest.raises(TypeError, match="the expression must be a str, got int"):
            fastpo.formula(3)
        for value in ("1", None, True, torch.tensor(1.0), [1.0]):
            with pytest.raises(TypeError, match="formula: beta must be a number, got"):
                fastpo.formula("beta*w", beta=value)
        with pytest.raises(ValueError, match="65 hyper-parameters, more than 64"):
            fastpo.formula("+".join(f"h{i}*w" for i in range(65)), **{f"h{i}": 1.0 for i in range(65)})

    def test_every_function_is_known_to_the_tests(self):
        assert set(FUNCTIONS) == set(ONE_ARGUMENT) | {"minimum", "maximum", "clip", "where", "detach"}


DPO = "-log_sigmoid(beta*(w-l))"


def sides(layout: str, length_norm: bool = False) -> tuple[Side, Side]:
    """Chosen and rejected log-probs of 5 pairs, fp64."""
    made = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        shape = {"summed": (5,), "padded": (5, 7 + seed), "masked": (5, 7 + seed), "packed": (20 + seed,)}[layout]
        policy, reference = (-torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        mask = torch.rand(shape, generator=generator) < 0.7 if layout == "masked" else None
        cu_seqlens = torch.tensor([0, 3, 3, 9, 15, 20 + seed], dtype=torch.int32) if layout == "packed" else None
        lengths = torch.tensor([1, 0, 3, 4, 5]) if layout == "summed" and length_norm else None
        made.append(Side(policy.requires_grad_(), reference, mask, cu_seqlens, lengths))
    return made[0], made[1]


def evaluate(loss: Callable[..., losses.PairwiseOutput], pairs: tuple[Side, Side], **options) -> list[Tensor]:
    """Outputs and gradients by the reference."""
    for name, side in zip(("chosen", "rejected"), pairs, strict=True):
        layout = {"mask": side.mask, "cu_seqlens": side.cu_seqlens, "lengths": side.lengths}
        options |= {f"{name}_{key}": value for key, value in layout.items() if value is not None}
    with fastpo.use_backend("reference"):
        out = loss(*(s.policy for s in pairs), *(s.reference for s in pairs), **options)
    return [*out, *torch.autograd.grad(out.loss.sum(), [s.policy for s in pairs])]


class TestCall:
    @pytest.mark.parametrize("layout", ["summed", "padded", "masked", "packed"])
    @pytest.mark.parametrize(
        ("text", "name"),
        [
            (DPO, "dpo"),
            ("(w - l - 1/(2*beta))**2", "ipo"),
            ("relu(1 - beta*(w - l))", "hinge"),
        ],
    )
    def test_equals_the_catalogue(self, text, name, layout):
        loss, row_loss = fastpo.formula(text, beta=0.3), getattr(losses, name)
        norms = (False, True) if name == "ipo" else (False,)
        for length_norm in norms:
            pairs = sides(layout, length_norm)
            norm = {"length_norm": True} if length_norm else {}
            for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"num_items": 7}, {"beta": 0.7}):
                ours = evaluate(loss, pairs, **norm, **options)
                theirs = evaluate(row_loss, pairs, **norm, **{"beta": 0.3, **options})
                for a, b in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)

    def test_dtype_and_rewards(self):
        loss = fastpo.formula("beta*where(w > l, 2, 1/3)*(w - l)", beta=0.25)
        plain = fastpo.formula("where(gamma > 1, 1, policy_w) - exp(gamma)*policy_l", gamma=2.0)
        x, y, z = (torch.tensor(v) for v in ([1.0, 2.0], [2.0, 1.0], [0.5, 0.5]))
        out = loss(x, y, z, z, reduction="none")
        assert out.loss.dtype == torch.float32
        torch.testing.assert_close(out.loss, 0.25 * torch.tensor([-1 / 3, 2.0]))
        assert out.chosen_rewards.tolist() == [0.125, 0.375]
        # without a beta the rewards are the log-ratios, without a reference model the log-probs
        out = plain(x.bfloat16(), y.bfloat16(), reduction="none")
        assert out.loss.dtype == torch.float32 and out.rejected_rewards.tolist() == [2.0, 1.0]
        torch.testing.assert_close(out.loss, 1 - math.exp(2) * y)

    def test_reference_variables(self):
        loss = fastpo.formula("(policy_w - reference_w) * (policy_l - 2*reference_l)")
        x = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (-1.0, -2.0, -3.0, -5.0)]
        out = loss(*x)
        out.loss.backward()
        assert out.loss.item() == 2 * 8 and x[0].grad.item() == 8 and x[1].grad.item() == 2
        assert x[2].grad is None and x[3].grad is None

    def test_signature(self):
        simpo = fastpo.formula("softplus(gamma - beta*(policy_w - policy_l))", beta=2.0, gamma=1.0)
        ratio = fastpo.formula(DPO, beta=0.1)
        common = ["chosen_mask", "rejected_mask", "chosen_cu_seqlens", "rejected_cu_seqlens", "chosen_lengths"]
        common += ["rejected_lengths", "length_norm", "reduction", "num_items"]
        policies, references = ["policy_chosen", "policy_rejected"], ["reference_chosen", "reference_rejected"]
        assert list(inspect.signature(simpo).parameters) == [*policies, "beta", "gamma", *common]
        assert list(inspect.signature(ratio).parameters) == [*policies, *references, "beta", *common]
        assert inspect.signature(ratio).parameters["beta"].default == 0.1
        for text in (DPO, "Args:", "beta: in (-inf, inf).", "beta = 1"):
            assert text in ratio.__doc__
        assert list(inspect.signature(fastpo.formula).parameters) == ["expression", "hyper_parameters"]
        x = torch.zeros(2)
        with pytest.raises(TypeError, match="unexpected keyword argument 'bta'"):
            ratio(x, x, x, x, bta=1)
        with pytest.raises(ValueError, match="beta must be in \\(-inf, inf\\) for formula, got nan"):
            ratio(x, x, x, x, beta=math.nan)
        with pytest.raises(TypeError, match="reference_chosen"):
            ratio(x, x)

    def test_object(self):
        loss = fastpo.formula(DPO, beta=0.1)
        assert repr(loss) == f"fastpo.formula({DPO!r}, beta=0.1)"
        for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss), eval(repr(loss))):
            assert repr(other) == repr(loss) and other.source == loss.source
        with pytest.raises(FrozenInstanceError):
            loss.row = None
        with pytest.raises(TypeError):
            loss.hyper_parameters["beta"] = 1.0
        assert "formula" not in {row.name for row in objectives()}

    @pytest.mark.parametrize(
        "text",
        [
            DPO,
            "where(w > l, tanh(w)*l, log1p(w**2)) / (1 + beta*exp(l))",
            "maximum(w, beta*l) * clip(w, -1, 1) + log1mexp(-1 - w*w) + abs(l)**1.5 * sigmoid(policy_w)",
        ],
    )
    def test_gradients_of_both_orders(self, text):
        loss = fastpo.formula(text, beta=0.3)
        generator = torch.Generator().manual_seed(0)
        x = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(4)]
        x[0].requires_grad_(), x[1].requires_grad_()
        with fastpo.use_backend("reference"):
            assert torch.autograd.gradcheck(lambda a, b: loss(a, b, *x[2:]).loss, x[:2])
            assert torch.autograd.gradgradcheck(lambda a, b: loss(a, b, *x[2:]).loss, x[:2])

    def test_compiles(self):
        loss = fastpo.formula(
            "where(w > log(beta), softplus(-beta*(w - l)), exp(-w)**1.5) + clip(l, -1, 2*beta)", beta=0.1
        )
        x = [torch.randn(6, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in range(4)]
        whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
        inside = torch.compile(lambda *a, **k: loss(*a, **k).loss * 2, fullgraph=True, backend="aot_eager")
        for options in ({}, {"beta": 0.2}, {"beta": 0.3, "reduction": "none"}):
            eager = loss(*x, **options).loss
            torch.testing.assert_close(whole(*x, **options).loss, eager)
            torch.testing.assert_close(inside(*x, **options), 2 * eager)
            grads = torch.autograd.grad(whole(*x, **options).loss.sum(), x[:2])
            torch.testing.assert_close(grads, torch.autograd.grad(eager.sum(), x[:2]))

    def test_the_branch_not_taken_has_no_influence(self):
        loss = fastpo.formula("where(w > 0, where(l > 0, sqrt(w), log(-l)*sqrt(w)), l*w)")
        w = torch.tensor([4.0, 4.0, -4.0], dtype=torch.float64, requires_grad=True)
        loser = torch.tensor([1.0, -1.0, 3.0], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(3, dtype=torch.float64)
        loss(w, loser, zero, zero, reduction="sum").loss.backward()
        assert w.grad.tolist() == [0.25, 0.0, 3.0] and loser.grad.tolist() == [0.0, -2.0, -4.0]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def _log1mexp(x: np.ndarray) -> np.ndarray:
    return np.where(x > -0.69, np.log(0 - np.expm1(x)), np.log1p(-np.exp(x)))


@dataclass(frozen=True)
class Exact:
    """A function with its first two derivatives, in longdouble, and what is promised of the C++ one."""

    value: Callable[..., np.ndarray]
    first: Callable[..., np.ndarray]
    second: Callable[..., np.ndarray]
    # where it is tested
    domain: str
    # largest errors of value and slope, in ulp
    ulp: float
    slope_ulp: float
    # below and up to this it is not defined or not smooth
    edge: float = -math.inf


def _power(p: float) -> Exact:
    ulp = 1 + 0.85 * abs(p)
    return Exact(
        lambda x: np.power(x, L(p)),
        lambda x: L(p) * np.power(x, L(p - 1)) if p else 0 * x,
        lambda x: L(p) * L(p - 1) * np.power(x, L(p - 2)) if p not in (0, 1) else 0 * x,
        "moderate" if p.is_integer() else "positive",
        ulp if p not in (0, 1) else 0.0,
        ulp + 1.5,
        -math.inf if p.is_integer() else 0.0,
    )


def _kink(value: Callable[..., np.ndarray], first: Callable[..., np.ndarray]) -> Exact:
    return Exact(value, first, lambda x: 0 * x, "all", 0.0, 0.0, edge=math.nan)


ONE_ARGUMENT = {
    "exp": Exact(np.exp, np.exp, np.exp, "all", 1.2, 1.2),
    "expm1": Exact(np.expm1, np.exp, np.exp, "all", 2.0, 1.2),
    "log": Exact(np.log, lambda x: 1 / x, lambda x: -1 / x**2, "positive", 1.0, 0.6, edge=0.0),
    "log1p": Exact(np.log1p, lambda x: 1 / (1 + x), lambda x: -((1 + x) ** -2), "above -1", 1.6, 1.6, edge=-1.0),
    "log1mexp": Exact(
        _log1mexp,
        lambda x: np.exp(x) / np.expm1(x),
        lambda x: -np.exp(x) / np.expm1(x) ** 2,
        "negative",
        2.6,
        4.0,
        edge=0.0,
    ),
    "sqrt": Exact(
        np.sqrt, lambda x: 0.5 / np.sqrt(x), lambda x: -0.25 / x / np.sqrt(x), "positive", 0.5, 1.6, edge=0.0
    ),
    "square": Exact(np.square, lambda x: 2 * x, lambda x: 2 + 0 * x, "moderate", 0.5, 0.0),
    "abs": _kink(abs, np.sign),
    "relu": _kink(lambda x: np.where(x < 0, 0, x), lambda x: (1 - (x <= 0)).astype(L)),
    "sigmoid": Exact(
        _sigmoid,
        lambda x: _sigmoid(x) * _sigmoid(-x),
        lambda x: _sigmoid(x) * _sigmoid(-x) * (_sigmoid(-x) - _sigmoid(x)),
        "all",
        2.5,
        4.0,
    ),
    "softplus": Exact(
        lambda x: np.maximum(x, 0) + np.log1p(np.exp(-abs(x))),
        _sigmoid,
        lambda x: _sigmoid(x) * _sigmoid(-x),
        "all",
        2.2,
        2.5,
    ),
    "log_sigmoid": Exact(
        lambda x: np.minimum(x, 0) - np.log1p(np.exp(-abs(x))),
        lambda x: _sigmoid(-x),
        lambda x: -_sigmoid(x) * _sigmoid(-x),
        "all",
        2.2,
        2.5,
    ),
    "tanh": Exact(
        np.tanh,
        lambda x: 4 * _sigmoid(2 * x) * _sigmoid(-2 * x),
        lambda x: -8 * np.tanh(x) * _sigmoid(2 * x) * _sigmoid(-2 * x),
        "all",
        2.8,
        4.2,
    ),
}
POWERS = [0.0, 1.0, 2.0, 3.0, 4.0, 7.0, 15.0, 64.0, 1.5, 0.3, 2.7, 10.5, 63.5, -0.25, -1.5, -7.25]


def power_text(p: float) -> str:
    return f"power<{int(p)}>(x)" if p.is_integer() else f"power(x, {p!r})"


def sample(domain: str, dtype: np.dtype, n: int = 3000) -> np.ndarray:
    """Arguments over a whole domain: of all magnitudes that the dtype has, and densely where functions bend."""
    rng, info = np.random.default_rng(0), np.finfo(dtype)

    def magnitudes(low: float | np.floating, high: float | np.floating) -> np.ndarray:
        return np.exp(rng.uniform(float(np.log(L(low))), float(np.log(L(high))), n).astype(L))

    largest = float(np.log(L(info.max)))
    small = magnitudes(1e-30, 1)
    everywhere = np.concatenate([rng.uniform(-1.15 * largest, largest, n), rng.uniform(-3, 3, n), small, -small])
    positive = np.concatenate(
        [magnitudes(info.smallest_subnormal, info.max), rng.uniform(0.5, 2, n), 1 + small, 1 - small]
    )
    x = {
        "all": everywhere,
        "negative": -abs(everywhere),
        "positive": positive,
        "above -1": np.concatenate([positive, -small, rng.uniform(-1, 3, n)]),
        "moderate": np.concatenate([rng.uniform(-3, 3, n), small, -small]),
    }[domain].astype(dtype)
    return x[np.isfinite(x)]


SPECIAL = [
    0.0,
    1.0,
    -1.0,
    0.5,
    -0.5,
    25.0,
    -25.0,
    50.0,
    -50.0,
    1e4,
    -1e4,
    1e-30,
    -1e-30,
    200.0,
    -200.0,
    math.inf,
    -math.inf,
    math.nan,
]
# C++ text of x and y, and the same in torch
TWO_ARGUMENTS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "minimum": ("minimum(x, y)", torch.minimum),
    "maximum": ("maximum(x, y)", torch.maximum),
    "minimum_of_constant": (
        "minimum(x, 0.5) + minimum(1.0, y)",
        lambda x, y: torch.minimum(x, torch.full_like(x, 0.5)) + torch.minimum(torch.ones_like(y), y),
    ),
    "maximum_of_constant": (
        "maximum(x, 0.5) + maximum(1.0, y)",
        lambda x, y: torch.maximum(x, torch.full_like(x, 0.5)) + torch.maximum(torch.ones_like(y), y),
    ),
    "clip": (
        "clip(x, -0.5, 1.0) + clip(y, 1.0, 0.5)",
        lambda x, y: torch.clamp(x, -0.5, 1.0) + torch.clamp(y, 1.0, 0.5),
    ),
    "where": (
        "where(x < y, x, where(x >= 0.5, y, 2.0))",
        lambda x, y: torch.where(x < y, x, torch.where(x >= 0.5, y, 2.0)),
    ),
    "comparisons": (
        "where(x <= y, 1.0, 2.0 * x) + where(x > 0.5, x, where(0.5 < y, x, y)) + where(true, y, x)",
        lambda x, y: torch.where(x <= y, 1.0, 2 * x) + torch.where(x > 0.5, x, torch.where(y > 0.5, x, y)) + y,
    ),
    "product": ("x * y", torch.mul),
    "quotient": ("x / y", torch.div),
    "constants": (
        "1.0 / x + (y * 2.0 + 1.0) / 4.0 - (1.0 + x)",
        lambda x, y: torch.ones_like(x) / x + (2 * y + 1) / 4 - (1 + x),
    ),
    "detached": ("detach(x) * y + 1.0 - detach(y)", lambda x, y: x.detach() * y + 1 - y.detach()),
}
# those that take |x| <= 80
NEAR = {"exp_near": "exp_near(x)", "expm1_near": "chain(x, expm1_near(x.value), exp_near(x.value))"}
# forward and backward mode have NaNs of their own where a factor is infinite
ARITHMETIC = ("product", "quotient", "constants", "detached")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Each function of x and y: value and both slopes, of numbers and of vectors of the CPU."""
    functions = {name: f"{name}(x)" for name in ONE_ARGUMENT}
    functions |= {f"power_{i}": power_text(p) for i, p in enumerate(POWERS)}
    functions |= {name: text for name, (text, _) in TWO_ARGUMENTS.items()}
    functions |= NEAR
    parts = ['#include "cpu/isa/baseline.h"\n#include "cpu/vec.h"\n#include "formulas/dual.h"\n']
    parts.append("using namespace FASTPO_NAMESPACE;\n")
    for name, text in functions.items():
        for scalar in DTYPES:
            for kind, t, step in (("scalar", scalar, "1"), ("vector", f"Vec<{scalar}>", f"lanes<{scalar}>")):
                parts.append(
                    f'extern "C" __attribute__((visibility("default"), noinline)) void {name}_{scalar}_{kind}('
                    f"const {scalar}* a, const {scalar}* b, {scalar}* out, long n) {{\n"
                    f"  for (long i = 0; i < n; i += {step}) {{\n    {t} u, v;\n"
                    "    __builtin_memcpy(&u, a + i, sizeof u);\n    __builtin_memcpy(&v, b + i, sizeof v);\n"
                    "    [[maybe_unused]] const auto x = variable<2>(u, 0), y = variable<2>(v, 1);\n"
                    f"    const auto z = {text};\n    __builtin_memcpy(out + i, &z.value, sizeof u);\n"
                    "    for (int j = 0; j < 2; ++j)\n"
                    "      __builtin_memcpy(out + (j + 1) * n + i, &z.slope[j], sizeof u);\n  }\n}\n"
                )
    return build(tmp_path_factory.mktemp("functions"), "".join(parts))


@needs_compiler
class TestFunctions:
    def run(self, library: ctypes.CDLL, name: str, scalar: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(3, n): value and slopes; those of vectors must have the same bits."""
        n = len(x)
        # whole vectors
        x, y = (np.pad(v, (0, -n % 16)).astype(DTYPES[scalar]) for v in (x, y))
        out, vectors = (np.full((3, len(x)), math.nan, DTYPES[scalar]) for _ in range(2))
        call(library[f"{name}_{scalar}_scalar"], x, y, out)
        call(library[f"{name}_{scalar}_vector"], x, y, vectors)
        np.testing.assert_array_equal(vectors, out)
        return out[:, :n]

    @pytest.mark.parametrize("scalar", DTYPES)
    @pytest.mark.parametrize("name", [*ONE_ARGUMENT, *(f"power_{i}" for i in range(len(POWERS)))])
    def test_accuracy(self, library, name, scalar):
        exact = ONE_ARGUMENT[name] if name in ONE_ARGUMENT else _power(POWERS[int(name[6:])])
        dtype, info = DTYPES[scalar], np.finfo(DTYPES[scalar])
        x = sample(exact.domain, dtype)
        out = self.run(library, name, scalar, x, x)
        with np.errstate(all="ignore"):
            truths = exact.value(x.astype(L)), exact.first(x.astype(L))
            for what, got, truth, ulp in zip(
                ("value", "slope"), out, truths, (exact.ulp, exact.slope_ulp), strict=False
            ):
                # results that come close to overflow may
                fits = abs(truth) < 0.01 * L(info.max)
                assert np.isinf(got[abs(truth) > 1.01 * L(info.max)]).all()
                unit = np.spacing(abs(truth).astype(dtype)).astype(L)
                error = (abs(got - truth) / unit)[fits]
                assert error.size > 1000 and not np.isnan(error).any()
                at = error.argmax()
                assert error[at] <= ulp, f"{what}: {error[at]:.2f} ulp at {x[fits][at]!r}, promised {ulp}"

    def compare(self, ours: np.ndarray, torch_function: Callable[..., Tensor], x: np.ndarray, y: np.ndarray) -> None:
        """The same as torch: nan and inf where it has them, else within the errors of both."""
        a, b = (torch.from_numpy(v.copy()).requires_grad_() for v in (x, y))
        value = torch_function(a, b)
        grads = torch.autograd.grad(value.sum(), (a, b), materialize_grads=True)
        eps = np.finfo(x.dtype).eps
        for got, theirs in zip(ours, (value, *grads), strict=False):
            np.testing.assert_allclose(got, theirs.detach().numpy(), rtol=8 * eps, atol=8 * eps)

    @pytest.mark.parametrize("scalar", DTYPES)
    @pytest.mark.parametrize("name", [*ONE_ARGUMENT, *(f"power_{i}" for i in range(len(POWERS)))])
    def test_special_arguments(self, library, name, scalar):
        x = np.array(SPECIAL, DTYPES[scalar])
        if name in ONE_ARGUMENT:
            function = FUNCTIONS[name].torch
        else:
            p = POWERS[int(name[6:])]
            # what grows fast has rounding errors that are tested elsewhere
            x = x[(abs(x) <= 1) | ~np.isfinite(x)]
            if p == 1.5:  # torch takes the square root in the slope, which is NaN at -inf where a power of 0.5 is inf
                x = x[x != -math.inf]

            def function(v: Tensor) -> Tensor:
                return torch.pow(v, p)

        # not the slope that is 0, which an infinite derivative makes NaN
        self.compare(self.run(library, name, scalar, x, x)[:2], lambda a, b: function(a), x, x)

    @pytest.mark.parametrize("scalar", DTYPES)
    @pytest.mark.parametrize("name", NEAR)
    def test_near(self, library, name, scalar):
        """The same bits as of the function that takes every argument."""
        rng = np.random.default_rng(1)
        small = np.exp(rng.uniform(-60, 0, 1000))
        parts = [rng.uniform(-80, 80, 3000), rng.uniform(-1, 1, 1000), small, -small, [0, 80, -80, math.nan]]
        x = np.concatenate(parts).astype(DTYPES[scalar])
        every = self.run(library, name.removesuffix("_near"), scalar, x, x)
        np.testing.assert_array_equal(self.run(library, name, scalar, x, x), every)

    @pytest.mark.parametrize("scalar", DTYPES)
    @pytest.mark.parametrize("name", TWO_ARGUMENTS)
    def test_two_arguments(self, library, name, scalar):
        numbers = [v for v in SPECIAL if abs(v) not in (1e4, 1e-30)]
        if name in ARITHMETIC:
            numbers = [v for v in numbers if math.isfinite(v) and v]
        x, y = (np.array(v, DTYPES[scalar]).ravel() for v in np.meshgrid(numbers, numbers))
        self.compare(self.run(library, name, scalar, x, y), TWO_ARGUMENTS[name][1], x, y)


@dataclass
class Bounded:
    """The exact value and slopes of a subexpression for n pairs, and by how much evaluations may be off.

    What cannot be said (a comparison or kink within the error, a result near overflow) is not judged.
    """

    value: np.ndarray
    error: np.ndarray
    slopes: np.ndarray  # (2, n)
    slope_errors: np.ndarray
    # of literals and hyper-parameters alone, which are computed in double
    scalar: bool = False

    @property
    def known(self) -> np.ndarray:
        return ~np.isnan(self.error)

    @property
    def slopes_known(self) -> np.ndarray:
        return self.known & np.isfinite(self.slope_errors) & np.isfinite(self.slopes)


class Oracle:
    """Evaluates the text of an expression with its error bounds: first order in the errors, in longdouble.

    It has a parser of its own, so that it shares nothing with what it judges. In `error`, NaN is "anything", and an
    infinite or NaN value with an error of 0 is certain.
    """

    def __init__(self, dtype: np.dtype, variables: dict[str, np.ndarray], hyper: dict[str, float], torch: bool) -> None:
        self.info, self.variables, self.hyper = np.finfo(dtype), variables, hyper
        self.n = len(variables["w"])
        self.eps = L(self.info.eps)
        # 1 - y^2 and the like, from which torch makes slopes, have an error of an ulp of 1
        self.slope_floor = 2 * self.eps if torch else L(0)

    def __call__(self, text: str) -> Bounded:
        with np.errstate(all="ignore"):
            return self.visit(ast.parse(text.strip(), mode="eval").body)

    def constant(self, value: float) -> Bounded:
        zeros = np.zeros(self.n, L)
        return Bounded(zeros + L(value), zeros, np.zeros((2, self.n), L), np.zeros((2, self.n), L), True)

    def finish(self, *, value, error, slopes, slope_errors, scalar=False) -> Bounded:
        """Adds what underflow costs, and gives up near overflow."""
        tiny, huge = L(self.info.smallest_normal), L(self.info.max)
        error = np.where(np.isfinite(value), error + tiny * (error > 0), error)
        over = np.isfinite(value) & ~(abs(value) + error < huge / 8)
        certain = over & (abs(value) - error > 8 * huge)
        value = np.where(certain, np.sign(value) * math.inf, value)
        error = np.where(certain, 0, np.where(over, math.nan, error))
        error = np.where(np.isinf(error), math.nan, error)
        slope_errors = np.where(
            abs(slopes) + slope_errors < huge / 8, slope_errors + tiny * (slope_errors > 0), math.nan
        )
        return Bounded(value, error, slopes, slope_errors, scalar)

    def meet(self, x: Bounded) -> Bounded:
        """A scalar is rounded where it meets a dual."""
        if not x.scalar:
            return x
        return Bounded(x.value, x.error + self.eps * abs(x.value), x.slopes, x.slope_errors)

    def function(self, x: Bounded, f: Exact, ulp: float, slope_ulp: float) -> Bounded:
        around = [x.value, x.value - x.error, x.value + x.error]
        first = f.first(x.value)
        largest_first = np.max([abs(f.first(v)) for v in around], axis=0)
        largest_second = np.max([abs(f.second(v)) for v in around], axis=0)
        value = f.value(x.value)
        exact = x.error == 0
        error = np.where(exact, 0, largest_first * x.error) + ulp * self.eps * abs(value)
        error = np.where(np.isfinite(value), error, np.where(exact, 0, math.nan))
        slopes = first * x.slopes
        slope_errors = largest_first * x.slope_errors + np.where(exact, 0, largest_second * x.error) * abs(x.slopes)
        slope_errors += (slope_ulp * self.eps * abs(first) + self.slope_floor) * abs(x.slopes)
        if math.isnan(f.edge):
            slope_errors = np.where((abs(x.value) <= x.error) & ~exact, math.nan, slope_errors)
        else:
            near = (x.value - x.error <= f.edge) & (x.value + x.error >= f.edge) & ~exact
            error, slope_errors = np.where(near, math.nan, error), np.where(near, math.nan, slope_errors)
        # first order is enough only for small errors
        coarse = x.error > 1e-3 * (1 + abs(x.value))
        return self.finish(
            value=value,
            error=np.where(x.known & ~coarse, error, math.nan),
            slopes=slopes,
            slope_errors=np.where(coarse, math.nan, slope_errors),
            scalar=x.scalar,
        )

    def choose(self, condition: np.ndarray, certain: np.ndarray, a: Bounded, b: Bounded) -> Bounded:
        return Bounded(
            np.where(condition, a.value, b.value),
            np.where(certain, np.where(condition, a.error, b.error), math.nan),
            np.where(condition, a.slopes, b.slopes),
            np.where(certain, np.where(condition, a.slope_errors, b.slope_errors), math.nan),
            a.scalar and b.scalar,
        )

    def compare(self, a: Bounded, b: Bounded, scalar: bool) -> tuple[np.ndarray, np.ndarray]:
        """a - b for comparisons, and whether its sign is certain."""
        if not scalar:
            a, b = self.meet(a), self.meet(b)
        difference = np.where(a.value == b.value, 0, a.value - b.value)
        error = a.error + b.error
        # a rounded constant that is itself a number of the dtype has no error
        return difference, a.known & b.known & ((error == 0) | (abs(difference) > error) | np.isnan(difference))

    def extremum(self, a: Bounded, b: Bounded, sign: int) -> Bounded:
        scalar = a.scalar and b.scalar
        difference, certain = self.compare(a, b, scalar)
        if not scalar:
            a, b = self.meet(a), self.meet(b)
        better, tie = sign * difference > 0, difference == 0
        nan = np.isnan(a.value) | np.isnan(b.value)
        value = np.where(nan, math.nan, np.where(better, a.value, b.value))
        share_a, share_b = np.where(tie, 0.5, better | nan), np.where(tie, 0.5, ~better | nan)
        return Bounded(
            value,
            np.where(a.known & b.known, np.where(nan, 0, np.maximum(a.error, b.error)), math.nan),
            share_a * a.slopes + share_b * b.slopes,
            np.where(certain, share_a * a.slope_errors + share_b * b.slope_errors, math.nan),
            scalar,
        )

    def visit(self, node: ast.expr) -> Bounded:
        if isinstance(node, ast.Constant):
            return self.constant(float(node.value))
        if isinstance(node, ast.Name):
            if node.id in self.hyper:
                return self.constant(self.hyper[node.id])
            value = self.variables[node.id].astype(L)
            out = self.constant(0.0)
            error = out.error
            if node.id.startswith("reference"):  # a rounded difference
                parts = [abs(self.variables[f"{p}{node.id[-1]}"].astype(L)) for p in ("", "policy_")]
                error = np.where(np.isfinite(value), self.eps * np.where(np.isfinite(sum(parts)), sum(parts), 0), 0)
            else:
                out.slopes[0 if node.id.endswith("w") else 1] = 1
            return Bounded(value, error, out.slopes, out.slope_errors)
        if isinstance(node, ast.UnaryOp):
            x = self.visit(node.operand)
            return Bounded(-x.value, x.error, -x.slopes, x.slope_errors, x.scalar)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            p = float(ast.literal_eval(node.right))
            if p < 0 and (p.is_integer() or p == -0.5):
                return self.binary(ast.Div(), self.constant(1.0), self.power(self.visit(node.left), -p))
            return self.power(self.visit(node.left), p)
        if isinstance(node, ast.BinOp):
            return self.binary(node.op, self.visit(node.left), self.visit(node.right))
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        name = node.func.id
        if name == "where":
            condition = node.args[0]
            assert isinstance(condition, ast.Compare)
            a, b = self.visit(condition.left), self.visit(condition.comparators[0])
            scalar = a.scalar and b.scalar
            difference, certain = self.compare(a, b, scalar)
            operation = {ast.Lt: np.less, ast.LtE: np.less_equal, ast.Gt: np.greater, ast.GtE: np.greater_equal}
            truth = operation[type(condition.ops[0])](difference, 0)
            yes, no = self.visit(node.args[1]), self.visit(node.args[2])
            if not (scalar and yes.scalar and no.scalar):
                yes, no = self.meet(yes), self.meet(no)
            return self.choose(truth, certain, yes, no)
        arguments = [self.visit(a) for a in node.args]
        if name in ("minimum", "maximum"):
            return self.extremum(*arguments, 1 if name == "maximum" else -1)
        if name == "clip":
            x, low, high = arguments
            out = x
            for bound, sign in ((low, 1), (high, -1)):
                difference, certain = self.compare(out, bound, x.scalar)
                limit = bound if x.scalar else self.meet(bound)
                inside = ~(sign * difference < 0)
                clipped = self.choose(inside, certain, out, limit)
                # on either side of a bound the value is near it
                either = np.maximum(out.error, limit.error) + np.where(certain, 0, abs(difference))
                # as in torch, 0 times the slope, which may be infinite
                slopes, slope_errors = clipped.slopes + 0 * out.slopes, clipped.slope_errors + 0 * out.slope_errors
                out = Bounded(clipped.value, either, slopes, slope_errors, x.scalar)
            out.slope_errors = np.where(np.isnan(x.value), math.nan, out.slope_errors)
            return out
        (x,) = arguments
        if name == "detach":
            zero = self.constant(0.0)
            return Bounded(x.value, x.error, zero.slopes, zero.slopes, x.scalar)
        f = ONE_ARGUMENT[name]
        return self.function(x, f, f.ulp + 4, f.slope_ulp + 6)

    def power(self, x: Bounded, p: float) -> Bounded:
        f = ONE_ARGUMENT["sqrt"] if p == 0.5 else _power(p)
        return self.function(x, f, f.ulp + 2, f.slope_ulp + 4)

    def binary(self, operation: ast.operator, a: Bounded, b: Bounded) -> Bounded:
        scalar = a.scalar and b.scalar
        if not scalar:
            a, b = self.meet(a), self.meet(b)
        if isinstance(operation, (ast.Add, ast.Sub)):
            sign = 1 if isinstance(operation, ast.Add) else -1
            value = a.value + sign * b.value
            slopes, slope_errors = a.slopes + sign * b.slopes, a.slope_errors + b.slope_errors
            error = a.error + b.error
            slope_errors = slope_errors + self.eps * np.where(slope_errors > 0, abs(a.slopes) + abs(b.slopes), 0)
            slope_errors = slope_errors + self.eps * abs(slopes)
        elif isinstance(operation, ast.Mult):
            value = a.value * b.value
            error = abs(a.value) * b.error + abs(b.value) * a.error + a.error * b.error
            parts = abs(a.slopes * b.value) + abs(a.value * b.slopes)
            slopes = a.slopes * b.value + a.value * b.slopes
            slope_errors = a.slope_errors * (abs(b.value) + b.error) + abs(a.slopes) * b.error
            slope_errors = slope_errors + b.slope_errors * (abs(a.value) + a.error) + abs(b.slopes) * a.error
            slope_errors = slope_errors + 3 * self.eps * parts
        else:
            value = a.value / b.value
            least = abs(b.value) - b.error
            # the sign of a zero is nobody's promise
            least = np.where(least > 0, least, math.nan)
            error = (a.error + abs(value) * b.error) / least
            slopes = (a.slopes - value * b.slopes) / b.value
            parts = abs(a.slopes) + abs(value * b.slopes)
            top = a.slope_errors + abs(value) * b.slope_errors + error * (abs(b.slopes) + b.slope_errors)
            slope_errors = (top + parts * b.error / least) / least + 5 * self.eps * parts / abs(b.value)
        # a division by a constant is a product with its rounded inverse, hence two roundings
        error = np.where(np.isfinite(value), error + 2 * self.eps * abs(value), 0)
        # inf and NaN are certain where they come from an operand
        made_here = ~np.isfinite(value) & np.isfinite(a.value) & np.isfinite(b.value)
        error = np.where(made_here | ~a.known | ~b.known, math.nan, error)
        return self.finish(value=value, error=error, slopes=slopes, slope_errors=slope_errors, scalar=scalar)


HYPER_VALUES = {"beta": 0.3, "gamma": 1.7, "delta": -0.625}
LITERALS = ["0.5", "2", "1", "3", "0.1", "1e-3", "7.25"]
EXPONENTS = ["0", "1", "2", "3", "5", "1.5", "0.5", "0.3", "2.75", "-1", "-2", "-0.5", "-1.5"]


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(inner, inner)
    constants = st.sampled_from([*LITERALS, *HYPER_VALUES])
    return st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda x: f"(-{x})"),
        st.tuples(inner, st.sampled_from(EXPONENTS)).map(lambda t: f"({t[0]})**{t[1]}"),
        st.tuples(st.sampled_from([*ONE_ARGUMENT, "detach"]), inner).map(lambda t: f"{t[0]}({t[1]})"),
        st.tuples(st.sampled_from(["minimum", "maximum"]), pairs).map(lambda t: f"{t[0]}({t[1][0]}, {t[1][1]})"),
        st.tuples(inner, constants, constants).map(lambda t: f"clip({t[0]}, {t[1]}, {t[2]})"),
        st.tuples(pairs, st.sampled_from(["<", "<=", ">", ">="]), pairs).map(
            lambda t: f"where({t[0][0]} {t[1]} {t[0][1]}, {t[2][0]}, {t[2][1]})"
        ),
    )


EXPRESSIONS = st.recursive(
    st.sampled_from([*VARIABLES, *VARIABLES[:4], *LITERALS, *HYPER_VALUES]), larger, max_leaves=9
)


def well_formed(text: str) -> fastpo.losses.formula.Formula:
    """The formula of a text of the grammar; what has no gradient gets one."""
    hyper = {name: value for name, value in HYPER_VALUES.items() if name in text}
    try:
        return fastpo.formula(text, **hyper)
    except ValueError as error:
        assert "depends on no policy variable" in str(error)
        return fastpo.formula(f"{text} + w", **hyper)


def inputs() -> dict[str, np.ndarray]:
    """Pairs that float holds exactly: ordinary ones, and all pairs of special log-ratios."""
    rng = np.random.default_rng(0)
    special = [0.0, 1.0, -0.5, 50.0, -50.0, 1e4, -1e4, math.inf, -math.inf, math.nan]
    w, loser = (np.concatenate([rng.normal(0, 2, 60), v.ravel()]) for v in np.meshgrid(special, special))
    n = len(w)
    out = {"w": w, "l": loser, "policy_w": -abs(rng.normal(0, 10, n)), "policy_l": -abs(rng.normal(0, 10, n))}
    out = {name: np.asarray(v, np.float32).astype(np.float64) for name, v in out.items()}
    # a completion without tokens
    out["policy_w"][:3] = out["w"][:3] = 0.0
    for side in "wl":
        out[f"reference_{side}"] = out[f"policy_{side}"] - out[side]
    return out


def library_of(formulas: list[fastpo.losses.formula.Formula], directory: Path) -> ctypes.CDLL:
    """Emitted expressions, compiled as a kernel includes them: value and slopes of n pairs."""
    parts = [
        "#define FASTPO_NAMESPACE fastpo::host\n",
        '#include "formulas/pairwise.h"\nusing namespace fastpo::host;\n',
    ]
    for i, loss in enumerate(formulas):
        parts.append(f"""
struct F{i} {{
  template <class T>
  static FASTPO_FN Dual<T, 2> evaluate(const Row<T, 2>& row, [[maybe_unused]] const double* h) {{
    using D = Dual<T, 2>;
    [[maybe_unused]] const D w = row.logratio[0], l = row.logratio[1];
    [[maybe_unused]] const D policy_w = row.policy[0], policy_l = row.policy[1];
    [[maybe_unused]] const D reference_w = detach(policy_w - w), reference_l = detach(policy_l - l);
    return {loss.source};
  }}
}};
""")
        for scalar in DTYPES:
            parts.append(f"""
extern "C" __attribute__((visibility("default"), noinline)) void f{i}_{scalar}(const double* h, const {scalar}* in,
                                                                              {scalar}* out, long n) {{
  for (long i = 0; i < n; ++i) {{
    const auto at = [&](int row, int side) {{ return variable<2>(in[row * n + i], side); }};
    const Row<{scalar}, 2> row{{{{at(2, 0), at(3, 1)}}, {{at(0, 0), at(1, 1)}}, {{}}, {{}}, {{}}, {{}}}};
    const auto y = F{i}::evaluate(row, h);
    out[i] = y.value, out[n + i] = y.slope[0], out[2 * n + i] = y.slope[1];
  }}
}}
""")
    return build(directory, "".join(parts))


def by_torch(loss: fastpo.losses.formula.Formula, columns: dict[str, np.ndarray]) -> np.ndarray:
    """(3, n): value and slopes."""
    leaves = [torch.from_numpy(columns[v].copy()).requires_grad_() for v in ("policy_w", "policy_l", "w", "l")]
    value = loss.parsed(Pair(*leaves), **loss.hyper_parameters)
    policy_w, policy_l, w, loser = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
    return torch.stack([value.detach(), policy_w + w, policy_l + loser]).numpy()


def check(text: str, bounded: Bounded, got: np.ndarray, who: str, columns: dict[str, np.ndarray]) -> tuple[int, int]:
    """How many values and slopes were judged."""
    where = bounded.known
    wrong = np.zeros_like(where)
    with np.errstate(all="ignore"):
        finite = np.isfinite(bounded.value)
        near = abs(got[0] - bounded.value) <= 2 * bounded.error
        same = (got[0] == bounded.value) | (np.isnan(got[0]) & np.isnan(bounded.value))
        wrong = where & ~np.where(finite, near, same)
        slopes_wrong = (
            bounded.slopes_known & finite & where & ~(abs(got[1:] - bounded.slopes) <= 2 * bounded.slope_errors)
        )
    for name, bad, exact, error, result in (
        ("value", wrong, bounded.value, bounded.error, got[0]),
        ("slope 0", slopes_wrong[0], bounded.slopes[0], bounded.slope_errors[0], got[1]),
        ("slope 1", slopes_wrong[1], bounded.slopes[1], bounded.slope_errors[1], got[2]),
    ):
        if bad.any():
            i = bad.argmax()
            at = {v: c[i] for v, c in columns.items()}
            raise AssertionError(
                f"{name} of {text} by {who} at {at}: {result[i]}, exact {exact[i]} within {error[i]:.2e}"
            )
    return int(where.sum()), int((bounded.slopes_known & finite & where).sum())


@needs_compiler
class TestMeaning:
    @settings(
        max_examples=2,
        derandomize=True,
        deadline=None,
        database=None,
        # a smaller list of expressions is no simpler failure: the message has the expression
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(texts=st.lists(EXPRESSIONS, min_size=70, max_size=70, unique=True))
    def test_torch_and_cpp_agree_with_the_exact_result(self, tmp_path_factory, texts):
        formulas = [well_formed(text) for text in texts]
        library = library_of(formulas, tmp_path_factory.mktemp("formulas"))
        columns = inputs()
        n = len(columns["w"])
        judged = np.zeros(2)
        for i, loss in enumerate(formulas):
            hyper = np.array([loss.hyper_parameters[name] for name in loss.hyper_names] + [0.0])
            for scalar, dtype in DTYPES.items():
                given_columns = np.stack([columns[v] for v in VARIABLES[:4]]).astype(dtype)
                out = np.full((3, n), math.nan, dtype)
                call(library[f"f{i}_{scalar}"], hyper, given_columns, out)
                exact = Oracle(dtype, columns, dict(loss.hyper_parameters), torch=False)(loss.expression)
                judged += check(loss.expression, exact, out, f"C++ in {scalar}", columns)
            exact = Oracle(dtype, columns, dict(loss.hyper_parameters), torch=True)(loss.expression)
            judged += check(loss.expression, exact, by_torch(loss, columns), "torch", columns)
        # most of what is evaluated is finite and far from kinks
        assert (judged / (3 * n * len(formulas)) > (0.9, 2 * 0.7)).all()


def test_nvrtc_compiles_every_function():
    """For a GPU that need not be here, with the formula as the option that the launcher passes."""
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="no CuPy")
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")
    terms = [f"{name}(0.5*w - 2*l)*{name}(beta)" for name in ONE_ARGUMENT]
    terms += [f"(w*l){'**'}{p} + beta**{p}" for p in EXPONENTS]
    terms += ["clip(w/3, -beta, 1)", "clip(beta, 0, 1)/l", "minimum(w, 0.5)*minimum(1, l)*minimum(beta, 2)"]
    terms += ["maximum(w, l)*maximum(2, policy_l)*maximum(2, beta)", "detach(policy_w)*l - detach(beta) + reference_w"]
    terms += [
        "where(w<l, 1, 2)*w",
        "where(w<=2, w, 2)",
        "where(1>l, 2, l)",
        "where(beta>=2, w, 1)*where(beta<1, 1, beta)",
    ]
    loss = fastpo.formula(" + ".join(terms), beta=0.3)
    source = """
#define FASTPO_NAMESPACE fastpo::gpu
#include "pairwise.h"
namespace fastpo::gpu {
template <class T>
__device__ void evaluate(const T* in, const double* h, T* out) {
  using D = Dual<T, 2>;
  const D policy_w = variable<2>(in[0], 0), policy_l = variable<2>(in[1], 1), w = policy_w - 1.0, l = policy_l + 2.0;
  const D reference_w = detach(policy_w - w), reference_l = detach(policy_l - l);
  const D y = FASTPO_USER_FORMULA;
  out[0] = y.value, out[1] = y.slope[0], out[2] = y.slope[1] + reference_l.value;
}
}  // namespace fastpo::gpu
extern "C" __global__ void f(const float* in, const double* h, float* out) { fastpo::gpu::evaluate(in, h, out); }
extern "C" __global__ void d(const double* in, const double* h, double* out) { fastpo::gpu::evaluate(in, h, out); }
"""
    headers = sorted((CSRC / "formulas").glob("*.h"))
    program = nvrtc.createProgram(
        source, "user.cu", [h.read_bytes() for h in headers], [h.name.encode() for h in headers]
    )
    try:
        options = ("--gpu-architecture=sm_90", "--std=c++20", f"-DFASTPO_USER_FORMULA={loss.source}")
        nvrtc.compileProgram(program, options)
        assert nvrtc.getCUBIN(program)[:4] == b"\x7fELF"
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)
