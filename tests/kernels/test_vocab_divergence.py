"""vocab_divergence: the compiled kernel against 80-bit formulas, and the reference against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpo
from tests.device import to_device
from tests.memory import peak_allocated
from tests.tolerance import assert_within

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("divergence", "grad_logits", "grad_reference")
FUNCTIONS = {
    "kl": fastpo.token_kl,
    "jsd": fastpo.token_jsd,
    "tv": fastpo.token_tv,
    "alpha": fastpo.token_alpha_divergence,
}
DIRECTIONS = ("forward", "reverse")
# the divergences for which a row is read twice
MEMBERS = {
    "jsd 0.5": {"kind": "jsd", "beta": 0.5},
    "jsd 0.1": {"kind": "jsd", "beta": 0.1},
    "jsd near 0": {"kind": "jsd", "beta": 1e-6},
    "jsd near 1": {"kind": "jsd", "beta": 1 - 2.0**-20},
    "jsd below an eps": {"kind": "jsd", "beta": 1e-30},
    "skew": {"kind": "kl", "skew": 0.1},
    "skew reverse": {"kind": "kl", "skew": 0.1, "direction": "reverse"},
    "skew near 0": {"kind": "kl", "skew": 1e-6},
    "skew near 1": {"kind": "kl", "skew": 1 - 2.0**-20},
    "tv": {"kind": "tv"},
    "alpha 0.5": {"kind": "alpha", "alpha": 0.5},
    "alpha 0.3": {"kind": "alpha", "alpha": 0.3},
    "alpha near 0": {"kind": "alpha", "alpha": 1e-6},
    "alpha below 0": {"kind": "alpha", "alpha": -1e-30},
    "alpha near 1": {"kind": "alpha", "alpha": 1 - 2.0**-20},
    "chi2": {"kind": "alpha", "alpha": 2.0},
    "chi2 reverse": {"kind": "alpha", "alpha": -1.0},
}
# one of each kind
KINDS = [MEMBERS[name] for name in ("jsd 0.1", "skew", "tv", "alpha 0.3")]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The logits' dtype; a module that runs these cases over another backend has its own."""
    return request.param


def upstream(like: Tensor) -> Tensor:
    """A fixed random upstream gradient, of numbers of fp32 so that every dtype gets the same."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(3)).to(like.dtype)


def evaluate(
    logits: Tensor, reference_logits: Tensor, backend: str = "native", kind: str = "kl", **options
) -> dict[str, Tensor]:
    """The divergence and both gradients for a random upstream one."""
    leaves = [to_device(t).detach().requires_grad_() for t in (logits, reference_logits)]
    options = {name: to_device(value) for name, value in options.items()}
    with fastpo.use_backend(backend):
        out = FUNCTIONS[kind](*leaves, **options)
    grads = torch.autograd.grad(out, leaves, to_device(upstream(out)))
    return dict(zip(NAMES, (t.detach().cpu() for t in (out, *grads)), strict=True))


def polynomial(x: np.ndarray, *coefficients: np.longdouble) -> np.ndarray:
    """That begins with the square; 80-bit powers would take longer than all else here."""
    out = np.zeros_like(x)
    for c in reversed(coefficients):
        out = out * x + c
    return out * x * x


def mixture(p: np.ndarray, q: np.ndarray, x: np.ndarray, weight: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For m = weight p + (1 - weight) q, log(p / m) and log(q / m), 0 where p or q is, KL(p || m) and KL(q || m), all
    to 80 bits of themselves."""
    w = np.longdouble(weight)
    m = w * p + (1 - w) * q
    logs, kls = [], []
    for d, other, y in ((p, 1 - w, -x), (q, w, x)):
        # m / d - 1, if that is small
        more = other * np.expm1(y)
        near = np.abs(more) < 0.5
        logs.append(np.where(d > 0, np.where(near, -np.log1p(more), np.log(d / m)), 0))
        terms = np.where(near, more - np.log1p(more), logs[-1] + np.where(d > 0, m / d, 0) - 1)
        series = polynomial(-more, *(1 / np.longdouble(k) for k in range(2, 9)))
        terms = d * np.where(near & (np.abs(more) < 1e-3), series, terms)
        kls.append(np.where(d > 0, terms, m).sum(-1, keepdims=True))
    return logs, kls


def exact(
    logits: Tensor,
    reference_logits: Tensor,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    kind: str = "kl",
    direction: str = "forward",
    beta: float = 0.5,
    skew: float = 0.0,
    alpha: float = 0.5,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The textbook formulas in 80-bit floats, without torch: the truth, for the reference as well.

    Also returns by which size each result's eps is to be scaled. A logit's rounding relative to the row's largest makes
    a relative error of (1 + |log p|) eps in p, and moves the divergence by its gradient times that.
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rows = math.prod(shape)
    t = temperature.double().numpy().reshape(-1, 1) if isinstance(temperature, Tensor) else temperature
    t = np.broadcast_to(np.asarray(t, dtype=np.longdouble), (rows, 1))
    keep = np.ones(rows, bool) if mask is None else mask.numpy().reshape(-1)

    def distribution(x: Tensor) -> tuple[np.ndarray, ...]:
        z = x.to(torch.float64).numpy().astype(np.longdouble).reshape(rows, vocab)
        z = np.where(keep[:, None], z, 0) / t
        z = z - z.max(-1, keepdims=True)
        log = z - np.log(np.exp(z).sum(-1, keepdims=True))
        p = np.exp(log)
        relative = 1 + np.abs(np.where(p > 0, log, 0))
        return log, p, relative, (p * relative).sum(-1, keepdims=True)

    def total(terms: np.ndarray) -> np.ndarray:
        return terms.sum(-1, keepdims=True)

    first, second = (reference_logits, logits) if direction == "forward" else (logits, reference_logits)
    (log_p, p, relative_p, mean_p), (log_q, q, relative_q, mean_q) = distribution(first), distribution(second)
    own = [(q, relative_q, mean_q), (p, relative_p, mean_p)]
    # by how many eps x = log p - log q is off
    off = relative_p + mean_p + relative_q + mean_q

    def of_mean(i: int, h: np.ndarray, means: tuple[np.ndarray, ...], steep: np.ndarray) -> tuple[np.ndarray, ...]:
        """The slope d (h(x) - mean of h), d = q or p, and its size, in which h, of several operations, and the parts of
        its mean are rounded; |h'| is `steep`."""
        d, relative, mean_relative = own[i]
        away = h - sum(means)
        slope = np.where(d > 0, d * away, 0)
        mean_size = total(np.where(d > 0, d * (steep * off + np.abs(away) * relative), 0))
        rounded = 2 * np.abs(h) + sum(np.abs(mean) for mean in means)
        size = np.where(d > 0, d * (rounded + steep * off + mean_size), 0)
        return slope, np.abs(slope) * (relative + mean_relative) + size

    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        x = np.where((p > 0) | (q > 0), log_p - log_q, 0)
        if kind == "kl" and skew:
            m = skew * p + (1 - np.longdouble(skew)) * q
            (log, _), (value, _) = mixture(p, q, x, skew)
            weights = np.longdouble(skew), 1 - np.longdouble(skew)
            # p / m - 1, from terms that are not negative its mean under q, and its slope in x
            e = np.where(m > 0, weights[1] * (p - q) / m, 0)
            mean = -weights[0] * weights[1] * total(np.where(m > 0, (p - q) ** 2 / m, 0))
            steep = np.where(m > 0, weights[1] * p * q / m**2, 0)
            of_q = tuple(weights[1] * v for v in of_mean(0, -e, (-mean,), steep))
            h = np.where(p > 0, log - weights[0] * e, 0)
            steep = np.where(m > 0, weights[1] * q / m, 0) + weights[0] * steep
            found = [of_q, of_mean(1, h, (value, weights[1] * mean), steep)]
        elif kind == "kl":
            x = np.where(p > 0, x, 0)
            # terms that are not negative: those of p x cancel down to the 80 bits of a log-prob
            near = np.abs(x) < 1
            value = total(np.where(near, p * (x + np.expm1(np.where(near, -x, 0))), p * x + (q - p)))
            slope = p * (x - value)
            p_terms, q_terms = p * (relative_p + mean_p), q * (relative_q + mean_q)
            size = p_terms * (np.abs(x) + np.abs(value)) + p * (relative_q + mean_q)
            found = [(q - p, p_terms + q_terms), (slope, size)]
        elif kind == "tv":
            excess = np.where(np.abs(x) < 1, p * np.expm1(np.clip(-x, -1, 1)), q - p)
            s = np.sign(excess) / 2
            value, mean = total(np.abs(excess)) / 2, total(p * s)
            # where rounding decides on the sign, the slope may jump by 1; 2 eps are allowed of a size
            eps = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).eps
            steep = np.where((np.abs(x) < 2 * eps * off) & (x != 0), 1 / (2 * eps * off), 0)
            found = [of_mean(0, s, (mean, value), steep), of_mean(1, -s, (-mean,), steep)]
        elif kind == "alpha":
            exchanged = alpha > 0.5
            if exchanged:
                # D_α(p, q) = D_(1 - α)(q, p)
                (log_p, p), (log_q, q) = (log_q, q), (log_p, p)
                x, alpha, own = -x, 1 - alpha, own[::-1]
            a = np.longdouble(alpha)
            product = np.where((p > 0) & (q > 0), np.exp(a * log_p + (1 - a) * log_q), 0)
            # q E, p F and (p - q - q E) / (1 - α), of which nothing is lost near x = 0
            y = np.where(np.isfinite(x), x, 0)
            qe = np.where((np.abs(a * x) < 1) & (q > 0), q * np.expm1(a * y) / a, (product - q) / a)
            pf = np.where((np.abs((1 - a) * x) < 1) & (p > 0), -p * np.expm1((a - 1) * y), p - product) / (1 - a)
            series = polynomial(y, *((1 - a ** (k - 1)) / math.factorial(k) for k in range(2, 12)))
            small = np.abs(x) * max(1, abs(alpha)) < 1e-2
            value = total(np.where(small, q * series, p - q - qe)) / (1 - a)
            of_q = of_mean(0, np.where(q > 0, -qe / q, 0), ((1 - a) * value,), np.where(q > 0, product / q, 0))
            of_p = of_mean(1, np.where(p > 0, pf / p, 0), (a * value,), np.where(p > 0, product / p, 0))
            found = [of_p, of_q] if exchanged else [of_q, of_p]
        else:
            m = beta * p + (1 - np.longdouble(beta)) * q
            logs, parts = mixture(p, q, x, beta)
            weights = np.longdouble(beta), 1 - np.longdouble(beta)
            value = weights[0] * parts[0] + weights[1] * parts[1]
            # d log(q / m) / dx and d log(p / m) / dx
            steep = [np.where(m > 0, w * d / m, 0) for w, d in zip(weights, (p, q), strict=True)]
            found = [
                tuple(weights[1 - i] * v for v in of_mean(i, logs[1 - i], (parts[1 - i],), steep[i])) for i in range(2)
            ]
    like = torch.float64 if logits.dtype == torch.float64 else torch.float32
    g = upstream(torch.empty(shape, dtype=like)).double().numpy().reshape(-1, 1)
    # where a row is read twice, q is normalised before terms are added up
    roundings = 1 if kind == "kl" and not skew else 2
    size = total(np.abs(found[1][0]) * relative_p + np.abs(found[0][0]) * relative_q) + roundings * np.abs(value)
    values = [np.where(keep[:, None], v, 0) for v in (value, *(g * slope / t for slope, _ in found))]
    sizes = [size, *(np.abs(g) / t * terms for _, terms in found)]
    if direction == "reverse":
        values[1:], sizes[1:] = values[:0:-1], sizes[:0:-1]
    shapes = (shape, logits.shape, logits.shape)
    return (
        {n: v.reshape(s) for n, v, s in zip(NAMES, values, shapes, strict=True)},
        {n: np.where(keep[:, None], v, 0).reshape(s) for n, v, s in zip(NAMES, sizes, shapes, strict=True)},
    )


def compare(logits: Tensor, reference_logits: Tensor, **options) -> dict[str, Tensor]:
    """The native result and the reference's, checked against the truth; returns the native one."""
    ours = evaluate(logits, reference_logits, **options)
    same = evaluate(logits, reference_logits, "reference", **options)
    truth, sizes = exact(logits, reference_logits, **options)
    for name, value in ours.items():
        wanted = torch.promote_types(logits.dtype, torch.float32) if name == "divergence" else logits.dtype
        assert value.dtype == same[name].dtype == wanted
        assert_within(value, truth[name], same[name], name=name, terms=sizes[name])
    assert (ours["divergence"] >= 0).all()
    return ours


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 3.0, apart: float = 1.0):
    """Logits, and a reference's that differ from them by noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * spread
    reference = logits + apart * torch.randn(shape, generator=generator)
    return logits.to(dtype), reference.to(dtype)


@pytest.mark.once
class TestReference:
    """The oracle itself, against results that need no torch."""

    P, Q = (0.5, 0.25, 0.125, 0.125), (0.7, 0.1, 0.1, 0.1)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize("backend", ["native", "reference"])
    def test_given_distributions(self, backend, temperature):
        """The direction: the expectation is under the reference, forward."""

        def logits(p):
            return torch.tensor([[temperature * math.log(w) + 7 for w in p]], dtype=torch.float64)

        policy, reference = logits(self.Q), logits(self.P)
        forward = sum(p * math.log(p / q) for p, q in zip(self.P, self.Q, strict=True))
        reverse = sum(q * math.log(q / p) for p, q in zip(self.P, self.Q, strict=True))
        assert abs(forward - reverse) > 0.01
        with fastpo.use_backend(backend):
            found = [
                fastpo.token_kl(policy, reference, temperature=temperature).item(),
                fastpo.token_kl(policy, reference, temperature=temperature, direction="reverse").item(),
            ]
        assert found == pytest.approx([forward, reverse], abs=1e-14)

    def test_gradient_of_tdpo(self):
        """d KL(π_ref ‖ π) / dz = (π - π_ref) / T (catalogue: TDPO)."""
        logits, reference = make(4, 11, dtype=torch.float64)
        leaf = logits.clone().requires_grad_()
        with fastpo.use_backend("reference"):
            (grad,) = torch.autograd.grad(fastpo.token_kl(leaf, reference, temperature=0.7).sum(), leaf)
        want = (torch.softmax(logits / 0.7, -1) - torch.softmax(reference / 0.7, -1)) / 0.7
        assert torch.allclose(grad, want, atol=1e-15)

    def test_torchs_kl_div(self):
        logits, reference = (t.log_softmax(-1) for t in make(4, 100, dtype=torch.float64))
        want = torch.nn.functional.kl_div(logits, reference, log_target=True, reduction="none").sum(-1)
        assert torch.allclose(fastpo.token_kl(logits, reference), want, rtol=1e-13)


class TestValues:
    @pytest.mark.parametrize("vocab", [1, 2, 3, 15, 16, 17, 63, 64, 65, 1000, 4095, 4096, 4097, 8192, 50257])
    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_vocabulary_sizes(self, dtype, vocab, direction):
        compare(*make(5, vocab, dtype=dtype, seed=vocab), direction=direction)

    def test_long_vocabulary(self, dtype):
        compare(*make(2, 151_936, dtype=dtype))

    @pytest.mark.parametrize("rows", [0, 1, 2, 63])
    def test_row_counts(self, dtype, rows):
        ours = compare(*make(rows, 33, dtype=dtype))
        assert ours["divergence"].shape == (rows,)

    @pytest.mark.parametrize("apart", [0.0, 1e-4, 1e-2, 0.3, 10.0, 100.0])
    def test_near_and_far(self, dtype, apart):
        compare(*make(6, 3000, dtype=dtype, apart=apart))

    @pytest.mark.parametrize("temperature", [1e-2, 0.3, 5.0, 1e4])
    def test_temperature(self, dtype, temperature):
        compare(*make(4, 700, dtype=dtype), temperature=temperature)

    def test_temperature_per_token(self, dtype):
        logits, reference = make(3, 5, 200, dtype=dtype)
        temperature = torch.linspace(0.2, 3, 15).view(3, 5)
        both = compare(logits, reference, temperature=temperature)
        one = compare(logits[1:2, 2:3], reference[1:2, 2:3], temperature=temperature[1, 2].item())
        assert torch.equal(both["divergence"][1, 2], one["divergence"][0, 0])

    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_peaked_against_flat(self, dtype, direction):
        """Sums that differ by the vocabulary's size, from the first block or only later."""
        for column in (0, 9000):
            peaked = torch.full((2, 10_000), -5.0).to(dtype)
            peaked[:, column] = 20
            compare(torch.zeros_like(peaked), peaked, direction=direction)

    def test_mass_in_other_blocks(self, dtype):
        """What one stream has in its first block the other has in its last; and maxima that rise with every block, by
        little and by more than the range of a float's exponent."""
        logits, reference = make(3, 12_300, dtype=dtype)
        logits[:, :4000] += 30
        reference[:, -4000:] += 30
        compare(logits, reference)
        for step in (0.01, 1.0, 40.0):
            rising = torch.arange(20_000).float().div(4096).floor().mul(step)[None].to(dtype)
            other = make(1, 20_000, dtype=dtype, spread=0.1)[0]
            for pair in (
                (rising, other),
                (rising, rising.flip(-1)),
                (rising, (rising.float() + other.float()).to(dtype)),
            ):
                compare(*(t.contiguous() for t in pair))
                compare(*(t.contiguous() for t in pair), direction="reverse")


class TestAccuracy:
    @pytest.mark.parametrize("apart", [1e-5, 1e-3, 0.1])
    @pytest.mark.parametrize("vocab", [2, 65, 4097, 50_257])
    def test_small_divergences(self, vocab, apart):
        """Held to the rounding of the logits alone, without what torch is allowed for."""
        logits, reference = make(8, vocab, apart=apart)
        divergence = evaluate(logits, reference)["divergence"]
        truth, sizes = exact(logits, reference)
        error = np.abs(divergence.double().numpy() - truth["divergence"])
        assert (error <= 2 * torch.finfo(torch.float32).eps * sizes["divergence"]).all()
        # which is far below it: torch's error is that of log-probs
        if apart < 1e-2:
            assert (sizes["divergence"] < 20 * apart).all()

    def test_small_gradients(self):
        """π - π_ref is taken without cancellation: its relative error does not grow as the streams draw together."""
        logits, reference = make(4, 1000, apart=1e-4)
        ours = evaluate(logits, reference)["grad_logits"].double().numpy()
        truth = exact(logits, reference)[0]["grad_logits"]
        # x = log π_ref - log π is a difference of logits of the size 3 · 4, each rounded once when the largest is taken
        allowed = 12 * torch.finfo(torch.float32).eps * np.abs(upstream(torch.empty(4)).numpy())[:, None]
        p = torch.softmax(reference.double(), -1).numpy()
        assert (np.abs(ours - truth) <= allowed * p * 3 + 4 * torch.finfo(torch.float32).eps * np.abs(truth)).all()

    def test_equal_streams(self, dtype):
        for vocab in (1, 65, 5000):
            logits = make(4, vocab, dtype=dtype)[0]
            ours = evaluate(logits, logits.clone())
            assert not any(value.any() for value in ours.values())

    @pytest.mark.parametrize("offsets", [(1e4, 1e4), (-1e4, 1e4), (1e4, 0.0)])
    def test_common_offsets(self, dtype, offsets):
        """Offsets of whole rows are taken off before anything is rounded."""
        logits, reference = make(4, 3000)
        shifted = [(t + offset).to(dtype) for t, offset in zip((logits, reference), offsets, strict=True)]
        ours = compare(*shifted)
        if dtype in (torch.float32, torch.float64):
            back = evaluate(*((t.double() - o).to(dtype) for t, o in zip(shifted, offsets, strict=True)))
            assert all(torch.equal(ours[name], back[name]) for name in NAMES)

    def test_nothing_of_the_logits_size_is_allocated(self, dtype):
        logits, reference = make(64, 5000, dtype=dtype)
        assert peak_allocated(lambda: fastpo.token_kl(logits, reference)) <= 64 * 8 * 8


class TestLayouts:
    def layouts(self, dtype) -> dict[str, tuple[Tensor, Tensor]]:
        base, other = make(4, 6, 130, dtype=dtype)
        return {
            "shifted": (base[:, :-1], other[:, :-1]),
            "shifted differently": (base[:, :-1], other[:, 1:]),
            "rows strided": (base[::2, 1::2], other[::2, 1::2]),
            "vocabulary sliced": (base[..., 3:100], other[..., 2:99]),
            "vocabulary strided": (base[..., ::3], other[..., :44]),
            "vocabulary first": (base, other.movedim(-1, 0).contiguous().movedim(0, -1)),
            "expanded": (base[:1].expand(5, 6, 130), other[0].expand(5, 6, 130)),
            "one dimension": (base[0, 0], other[0, 0]),
            "unaligned": (base.flatten()[1 : 1 + 7 * 130].view(7, 130), other.flatten()[: 7 * 130].view(7, 130)),
        }

    def test_strides(self, dtype):
        for name, pair in self.layouts(dtype).items():
            ours, plain = compare(*pair), evaluate(*(t.contiguous() for t in pair))
            assert all(torch.equal(ours[key], plain[key]) for key in plain), name

    def test_strided_mask_and_temperature(self, dtype):
        logits, reference = make(4, 6, 50, dtype=dtype)
        mask = torch.arange(24).view(6, 4).t() % 3 > 0
        temperature = torch.linspace(0.5, 2, 24).view(6, 4).t()
        compare(logits, reference, mask=mask, temperature=temperature)


class TestExtremeRows:
    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_impossible_tokens(self, dtype, direction):
        """Impossible to both, and to the first distribution alone: nothing is added there."""
        logits, reference = make(6, 9000, dtype=dtype)
        first = reference if direction == "forward" else logits
        first[:, 100:4800] = -math.inf
        first[1, :8000] = -math.inf
        (logits if direction == "forward" else reference)[:3, 200:4700] = -math.inf
        ours = compare(logits, reference, direction=direction)
        assert ours["divergence"].isfinite().all()
        of_first = ours["grad_reference" if direction == "forward" else "grad_logits"]
        assert (of_first[:, 100:4800] == 0).all()

    @pytest.mark.parametrize("column", [0, 8, 4999])
    @pytest.mark.parametrize("likely", [True, False])
    def test_impossible_to_the_policy(self, dtype, column, likely):
        """+inf, also where the reference's probability is below the dtype's range; the policy's gradient is finite."""
        logits, reference = make(3, 5000, dtype=dtype)
        clean = evaluate(logits, reference)
        logits[1, column] = -math.inf
        if not likely:
            reference[1, column] = -2e4
        for backend in ("native", "reference"):
            ours = evaluate(logits, reference, backend)
            assert ours["divergence"][1] == math.inf, backend
            assert ours["grad_logits"].isfinite().all()
        ours = evaluate(logits, reference)
        truth, sizes = exact(logits, reference)
        assert_within(
            ours["grad_logits"][1],
            truth["grad_logits"][1],
            evaluate(logits, reference, "reference")["grad_logits"][1],
            terms=sizes["grad_logits"][1],
        )
        for name, value in ours.items():
            assert torch.equal(value[[0, 2]], clean[name][[0, 2]]), name

    def test_one_certain_token(self, dtype):
        certain, other = (torch.full((1, 300), -math.inf, dtype=dtype) for _ in range(2))
        certain[0, 7] = 3.0
        other[0, 7] = -2.0
        assert evaluate(certain, other)["divergence"].item() == 0
        other[0, 8] = -2.0
        assert evaluate(other, certain)["divergence"].item() == pytest.approx(math.log(2), rel=1e-6)
        assert evaluate(certain, other)["divergence"].item() == math.inf

    @pytest.mark.parametrize("bad", [math.nan, math.inf, "nothing possible"])
    @pytest.mark.parametrize("column", [0, 4500])
    @pytest.mark.parametrize("which", [0, 1])
    def test_bad_row_stays_alone(self, dtype, bad, column, which):
        pair = make(3, 5000, dtype=dtype)
        clean = evaluate(*pair)
        if bad == "nothing possible":
            pair[which][1] = -math.inf
        else:
            pair[which][1, column] = bad
            # beside what would make it infinite
            pair[0][1, 30] = -math.inf
        for backend in ("native", "reference"):
            ours = evaluate(*pair, backend)
            assert ours["divergence"][1].isnan(), backend
        ours = evaluate(*pair)
        for name, value in ours.items():
            assert value[1].isnan().all(), name
            assert torch.equal(value[[0, 2]], clean[name][[0, 2]]), name

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_masked_rows(self, dtype, bad):
        """Whatever they hold: 0, and the others as if they were alone."""
        logits, reference = make(5, 64, dtype=dtype)
        clean = evaluate(logits, reference)
        mask = torch.tensor([True, False, True, False, True])
        logits[~mask], reference[~mask] = bad, math.nan
        for direction in ("forward", "reverse"):
            ours = compare(logits, reference, mask=mask, direction=direction)
            assert not any(value[~mask].any() for value in ours.values())
        ours = evaluate(logits, reference, mask=mask)
        assert all(torch.equal(value[mask][0], clean[name][0]) for name, value in ours.items())


@pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
class TestMembers:
    @pytest.mark.parametrize("apart", [1e-3, 1.0, 30.0])
    def test_near_and_far(self, dtype, apart, member):
        # a χ² of far ones overflows
        apart = min(apart, 3.0) if abs(member.get("alpha", 0.5)) >= 1 else apart
        compare(*make(6, 700, dtype=dtype, apart=apart), temperature=0.7, **member)

    @pytest.mark.parametrize("apart", [1e-4, 1e-2, 1.0])
    def test_small_divergences(self, apart, member):
        """As of the KL: held to the rounding of the logits alone."""
        logits, reference = make(8, 3000, apart=apart)
        ours = evaluate(logits, reference, **member)
        truth, sizes = exact(logits, reference, **member)
        for name, value in ours.items():
            error = np.abs(value.double().numpy() - truth[name])
            allowed = 2 * torch.finfo(torch.float32).eps * sizes[name] + torch.finfo(torch.float32).tiny
            assert (error <= allowed).all(), (name, (error / allowed).max())

    def test_equal_streams(self, dtype, member):
        for vocab in (1, 65, 5000):
            logits = make(4, vocab, dtype=dtype)[0]
            logits[:, vocab // 2 + 1 :] = -math.inf
            ours = evaluate(logits, logits.clone(), **member)
            assert not any(value.any() for value in ours.values())

    @pytest.mark.once
    def test_gradcheck(self, member):
        inputs = tuple(t.requires_grad_() for t in make(2, 3, 7, dtype=torch.float64))
        mask = torch.tensor([[True, True, False], [True, False, True]])
        options = {name: value for name, value in member.items() if name != "kind"}

        def function(x, y):
            return FUNCTIONS[member["kind"]](x, y, mask=mask, temperature=0.8, **options)

        with fastpo.use_backend("native"):
            assert torch.autograd.gradcheck(function, inputs)
            assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("member", KINDS, ids=lambda member: member["kind"] + " skew" * ("skew" in member))
class TestKinds:
    """What does not depend on numbers."""

    @pytest.mark.parametrize("vocab", [1, 2, 63, 65, 4097, 9001])
    def test_vocabulary_sizes(self, dtype, vocab, member):
        compare(*make(5, vocab, dtype=dtype, seed=vocab), **member)

    def test_long_vocabulary(self, dtype, member):
        compare(*make(1, 151_936, dtype=dtype), **member)

    def test_layouts(self, dtype, member):
        for name, pair in TestLayouts().layouts(dtype).items():
            ours = compare(*pair, **member)
            assert ours["grad_logits"].shape == pair[0].shape, name

    def test_temperature_per_token(self, dtype, member):
        logits, reference = make(3, 5, 200, dtype=dtype)
        temperature = torch.linspace(0.2, 3, 15).view(3, 5)
        both = compare(logits, reference, temperature=temperature, **member)
        one = compare(logits[1:2, 2:3], reference[1:2, 2:3], temperature=temperature[1, 2].item(), **member)
        assert torch.equal(both["divergence"][1, 2], one["divergence"][0, 0])

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("which", [0, 1])
    def test_bad_row_stays_alone(self, dtype, bad, which, member):
        pair = make(3, 5000, dtype=dtype)
        clean = evaluate(*pair, **member)
        pair[which][1, 17 if bad == bad and bad > 0 else slice(None)] = bad
        for name, value in evaluate(*pair, **member).items():
            assert value[1].isnan().all(), name
            assert torch.equal(value[[0, 2]], clean[name][[0, 2]]), name
        assert evaluate(*pair, "reference", **member)["divergence"][1].isnan()
        mask = torch.tensor([True, False, True])
        ours = compare(*pair, mask=mask, **member)
        assert not any(value[1].any() for value in ours.values())

    @pytest.mark.once
    def test_only_the_gradients_that_are_needed(self, member):
        options = {name: value for name, value in member.items() if name != "kind"}
        logits, reference = make(3, 50)
        clean = evaluate(logits, reference, **member)
        for i in range(2):
            leaves = [logits.clone(), reference.clone()]
            leaves[i].requires_grad_()
            out = FUNCTIONS[member["kind"]](*leaves, **options)
            out.backward(upstream(out))
            assert torch.equal(leaves[i].grad, clean[NAMES[1 + i]]) and leaves[1 - i].grad is None

    @pytest.mark.once
    def test_compiled(self, member):
        options = {name: value for name, value in member.items() if name != "kind"}

        def function(x, y):
            return FUNCTIONS[member["kind"]](2 * x, y, **options)

        results = []
        for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaves = [t.requires_grad_() for t in make(4, 50)]
            out = f(*leaves)
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
        for eager, compiled in zip(*results, strict=True):
            assert torch.equal(eager, compiled)


class TestJensenShannon:
    def test_given_distributions(self):
        """Between certainties of two tokens: the entropy of beta."""
        logits = torch.full((2, 5), -math.inf, dtype=torch.float64)
        logits[0, 1], logits[1, 3] = 2.0, -4.0
        for backend in ("native", "reference"):
            for beta in (0.3, 1e-9):
                with fastpo.use_backend(backend):
                    found = fastpo.token_jsd(logits, logits.flip(0), beta=beta)
                entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
                assert found.tolist() == pytest.approx([entropy, entropy], rel=1e-14)

    def test_limits_and_symmetry(self):
        logits, reference = make(4, 300, dtype=torch.float64)
        for direction in ("forward", "reverse"):
            kl = fastpo.token_kl(logits, reference, direction=direction)
            for beta in (1e-6, 1e-12):
                jsd = fastpo.token_jsd(logits, reference, beta=beta if direction == "forward" else 1 - beta)
                # 1 - beta is rounded to an eps
                assert torch.allclose(jsd / beta, kl, rtol=30 * beta + 2e-16 / beta)
        swapped = fastpo.token_jsd(reference, logits, beta=0.75)
        assert torch.allclose(fastpo.token_jsd(logits, reference, beta=0.25), swapped, rtol=1e-14)
        assert (fastpo.token_jsd(logits, reference) < math.log(2)).all()

    def test_the_gradient_as_beta_vanishes(self):
        """D / beta and its gradients tend to those of the KL, in fp32 too."""
        logits, reference = make(4, 300, apart=3.0)
        for direction, beta in (("forward", 1e-9), ("reverse", 1 - 2.0**-30)):
            ours = evaluate(logits, reference, kind="jsd", beta=beta)
            kl = evaluate(logits, reference, direction=direction)
            small = min(beta, 1 - beta)
            for name in NAMES:
                found, limit = ours[name] / small, kl[name]
                assert torch.allclose(found, limit, rtol=1e-4, atol=1e-5 * limit.abs().max().item()), name

    @pytest.mark.parametrize("beta", [1e-30, 0.4, 1 - 2.0**-20])
    def test_impossible_tokens(self, dtype, beta):
        """To either and to both; the divergence and both gradients stay finite."""
        logits, reference = make(5, 5000, dtype=dtype)
        logits[:, 10:2000] = -math.inf
        reference[:, 1000:4500] = -math.inf
        ours = compare(logits, reference, kind="jsd", beta=beta)
        assert all(value.isfinite().all() for value in ours.values())

    @pytest.mark.once
    def test_messages(self):
        logits = torch.zeros(2, 5)
        for backend in ("native", "reference"):
            with fastpo.use_backend(backend):
                for bad in (0, 1.0, -0.5, math.nan):
                    with pytest.raises(ValueError, match=r"beta must be in \(0, 1\), got .*token_kl"):
                        fastpo.token_jsd(logits, logits, beta=bad)
                with pytest.raises(TypeError, match="beta must be a number, got str"):
                    fastpo.token_jsd(logits, logits, beta="0.5")


class TestSkew:
    def test_given_distributions(self):
        p, q = TestReference.P, TestReference.Q
        logits, reference = (torch.tensor([[math.log(w) for w in d]], dtype=torch.float64) for d in (q, p))
        forward = sum(a * math.log(a / (0.2 * a + 0.8 * b)) for a, b in zip(p, q, strict=True))
        reverse = sum(b * math.log(b / (0.2 * b + 0.8 * a)) for a, b in zip(p, q, strict=True))
        assert abs(forward - reverse) > 1e-3
        for backend in ("native", "reference"):
            with fastpo.use_backend(backend):
                found = [fastpo.token_kl(logits, reference, skew=0.2, direction=d).item() for d in DIRECTIONS]
            assert found == pytest.approx([forward, reverse], abs=1e-14)

    def test_limits(self):
        """λ = 0 is the KL, also with its gradients in the limit; D / (1 - λ)² tends to half of chi² under p."""
        logits, reference = make(4, 300, dtype=torch.float64)
        for direction in DIRECTIONS:
            kl = evaluate(logits, reference, direction=direction)
            near = evaluate(logits, reference, direction=direction, skew=1e-9)
            for name in NAMES:
                assert torch.allclose(near[name], kl[name], rtol=1e-6, atol=1e-10), name
        rest = 2.0**-20
        p, q = reference.softmax(-1), logits.softmax(-1)
        half_chi2 = ((p - q) ** 2 / p).sum(-1) / 2
        found = fastpo.token_kl(logits, reference, skew=1 - rest) / rest**2
        assert torch.allclose(found, half_chi2, rtol=1e-3)

    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    @pytest.mark.parametrize("skew", [1e-30, 0.4, 1 - 2.0**-20])
    def test_impossible_tokens(self, dtype, skew, direction):
        """To either and to both; the divergence and both gradients stay finite, at most -log λ."""
        logits, reference = make(5, 5000, dtype=dtype)
        logits[:, 10:2000] = -math.inf
        reference[:, 1000:4500] = -math.inf
        ours = compare(logits, reference, skew=skew, direction=direction)
        assert all(value.isfinite().all() for value in ours.values())
        assert (ours["divergence"] <= -math.log(skew)).all()

    @pytest.mark.once
    def test_messages(self):
        logits = torch.zeros(2, 5)
        for backend in ("native", "reference"):
            with fastpo.use_backend(backend):
                for bad in (1.0, -0.5, math.nan):
                    with pytest.raises(ValueError, match=r"skew must be in \[0, 1\), got"):
                        fastpo.token_kl(logits, logits, skew=bad)
                with pytest.raises(TypeError, match="skew must be a number, got str"):
                    fastpo.token_kl(logits, logits, skew="0.5")


class TestTotalVariation:
    def test_given_distributions(self):
        p, q = TestReference.P, TestReference.Q
        logits, reference = (torch.tensor([[math.log(w) for w in d]], dtype=torch.float64) for d in (q, p))
        for backend in ("native", "reference"):
            with fastpo.use_backend(backend):
                assert fastpo.token_tv(logits, reference).item() == pytest.approx(0.2, abs=1e-15)

    def test_bounds(self):
        """1 between certainties of two tokens, with no gradient, and bounded by the KL (Pinsker)."""
        logits = torch.full((2, 5), -math.inf)
        logits[0, 1], logits[1, 3] = 2.0, -4.0
        for backend in ("native", "reference"):
            ours = evaluate(logits, logits.flip(0), backend, kind="tv")
            assert ours["divergence"].tolist() == [1.0, 1.0]
            assert not ours["grad_logits"].any() and not ours["grad_reference"].any()
        pair = make(50, 300, apart=0.3)
        assert (fastpo.token_tv(*pair) <= (fastpo.token_kl(*pair) / 2).sqrt()).all()

    def test_impossible_tokens(self, dtype):
        logits, reference = make(5, 5000, dtype=dtype)
        logits[:, 10:2000] = -math.inf
        reference[:, 1000:4500] = -math.inf
        ours = compare(logits, reference, kind="tv")
        assert all(value.isfinite().all() for value in ours.values())


class TestAlpha:
    @pytest.mark.parametrize("alpha", [-1.0, -0.3, 0.2, 0.5, 0.8, 1.4, 2.0, 3.0])
    def test_given_distributions(self, alpha):
        p, q = TestReference.P, TestReference.Q
        logits, reference = (torch.tensor([[math.log(w) for w in d]], dtype=torch.float64) for d in (q, p))
        want = (sum(a**alpha * b ** (1 - alpha) for a, b in zip(p, q, strict=True)) - 1) / (alpha * (alpha - 1))
        for backend in ("native", "reference"):
            with fastpo.use_backend(backend):
                found = fastpo.token_alpha_divergence(logits, reference, alpha=alpha).item()
            assert found == pytest.approx(want, rel=1e-13)

    @pytest.mark.once
    def test_names(self):
        """χ² and Hellinger's distance by their own formulas, and both KLs, which are also the limits."""
        logits, reference = make(4, 300, dtype=torch.float64)
        p, q = reference.softmax(-1), logits.softmax(-1)
        named = {
            2.0: ((p - q) ** 2 / q).sum(-1) / 2,
            -1.0: ((p - q) ** 2 / p).sum(-1) / 2,
            0.5: 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(-1),
        }
        for alpha, want in named.items():
            assert torch.allclose(fastpo.token_alpha_divergence(logits, reference, alpha=alpha), want, rtol=1e-12)
        for alpha, direction in ((1, "forward"), (0, "reverse")):
            kl = evaluate(logits, reference, direction=direction)
            same = evaluate(logits, reference, kind="alpha", alpha=alpha)
            assert all(torch.equal(same[name], kl[name]) for name in NAMES)
            for near in (alpha - 1e-9, alpha + 1e-9):
                found = evaluate(logits, reference, kind="alpha", alpha=near)
                assert all(torch.allclose(found[name], kl[name], rtol=1e-6, atol=1e-7) for name in NAMES)

    @pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9, 1e-30])
    def test_impossible_tokens(self, dtype, alpha):
        """To either and to both; between 0 and 1 the divergence and both gradients stay finite."""
        logits, reference = make(5, 5000, dtype=dtype)
        logits[:, 10:2000] = -math.inf
        if alpha > 1e-3:
            reference[:, 1000:4500] = -math.inf
        else:
            reference[:, 1000:2000] = -math.inf
        ours = compare(logits, reference, kind="alpha", alpha=alpha)
        assert all(value.isfinite().all() for value in ours.values())

    def test_infinite(self, dtype):
        """Outside [0, 1], where one distribution excludes what the other does not; alone in its row."""
        for alpha, which in ((2.0, 0), (1.5, 0), (-1.0, 1), (-0.1, 1)):
            pair = make(3, 500, dtype=dtype)
            clean = evaluate(*pair, kind="alpha", alpha=alpha)
            pair[0][1, 3] = pair[1][1, 3] = -math.inf
            finite = compare(*pair, kind="alpha", alpha=alpha)
            assert all(value.isfinite().all() for value in finite.values())
            pair[which][1, 7] = -math.inf
            for backend in ("native", "reference"):
                ours = evaluate(*pair, backend, kind="alpha", alpha=alpha)
                assert ours["divergence"][1] == math.inf
            ours = evaluate(*pair, kind="alpha", alpha=alpha)
            for name in NAMES:
                assert torch.equal(ours[name][[0, 2]], clean[name][[0, 2]]), name

    @pytest.mark.once
    def test_messages(self):
        logits = torch.zeros(2, 5)
        for backend in ("native", "reference"):
            with fastpo.use_backend(backend):
                for bad in (math.inf, math.nan):
                    with pytest.raises(ValueError, match="alpha must be finite, got"):
                        fastpo.token_alpha_divergence(logits, logits, alpha=bad)
                with pytest.raises(TypeError, match="alpha must be a number, got str"):
                    fastpo.token_alpha_divergence(logits, logits, alpha="0.5")


@pytest.mark.once
class TestAutograd:
    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    @pytest.mark.parametrize("per_token", [False, True])
    def test_gradcheck(self, per_token, direction):
        logits, reference = make(2, 3, 7, dtype=torch.float64)
        mask = torch.tensor([[True, True, False], [True, False, True]])
        options = {
            "mask": mask,
            "temperature": torch.linspace(0.5, 2, 6).double().view(2, 3) if per_token else 0.8,
            "direction": direction,
        }
        inputs = (logits.requires_grad_(), reference.requires_grad_())
        with fastpo.use_backend("native"):
            assert torch.autograd.gradcheck(lambda *x: fastpo.token_kl(*x, **options), inputs)
            assert torch.autograd.gradgradcheck(lambda *x: fastpo.token_kl(*x, **options), inputs)

    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_only_the_gradients_that_are_needed(self, direction):
        logits, reference = make(3, 50)
        both = [t.clone().requires_grad_() for t in (logits, reference)]
        expected = torch.autograd.grad(fastpo.token_kl(*both, direction=direction).sum(), both)
        for i in range(2):
            leaves = [logits.clone(), reference.clone()]
            leaves[i].requires_grad_()
            fastpo.token_kl(*leaves, direction=direction).sum().backward()
            assert torch.equal(leaves[i].grad, expected[i]) and leaves[1 - i].grad is None
        assert not fastpo.token_kl(logits, reference).requires_grad

    def test_second_backward(self):
        logits, reference = make(3, 50)
        leaf = logits.requires_grad_()
        out = fastpo.token_kl(leaf, reference)
        first = torch.autograd.grad(out, leaf, torch.ones(3), retain_graph=True)[0]
        second = torch.autograd.grad(out, leaf, 2 * torch.ones(3))[0]
        assert torch.equal(2 * first, second)

    def test_create_graph_through_a_network(self):
        """A constant gradient would make the second derivative silently wrong."""
        torch.manual_seed(0)
        x, weight, reference = torch.randn(4, 3).double(), torch.randn(3, 9).double(), torch.randn(4, 9).double()
        penalties = []
        for backend in ("native", "reference"):
            w = weight.clone().requires_grad_()
            with fastpo.use_backend(backend):
                loss = fastpo.token_kl((x @ w).tanh() * 3, reference).mean()
                (grad,) = torch.autograd.grad(loss, w, create_graph=True)
            penalties += torch.autograd.grad(grad.square().sum(), w)
        assert torch.allclose(*penalties, rtol=1e-12)
        assert penalties[0].abs().max() > 1e-3

    def test_batch_invariance_and_determinism(self):
        """A row's result does not depend on its neighbours, on repetition or on the number of threads."""
        logits, reference = make(300, 777)
        whole = evaluate(logits, reference)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            single = evaluate(logits, reference)
        finally:
            torch.set_num_threads(threads)
        alone = evaluate(logits[123:124], reference[123:124])
        assert all(torch.equal(whole[name], single[name]) for name in NAMES)
        assert torch.equal(whole["divergence"][123:124], alone["divergence"])


@pytest.mark.once
class TestCompile:
    def test_inductor_equals_eager(self):
        logits, reference = make(6, 130)
        temperature, mask = torch.linspace(0.5, 2, 6), torch.arange(6) != 2

        def function(x, y):
            forward = fastpo.token_kl(x * 2, y, temperature=temperature, mask=mask)
            return (forward * fastpo.token_kl(x, y, direction="reverse")).sum()

        results = []
        for f in (function, torch.compile(function, fullgraph=True)):
            leaves = [logits.clone().requires_grad_(), reference.clone().requires_grad_()]
            loss = f(*leaves)
            loss.backward()
            results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
        for eager, compiled in zip(*results, strict=True):
            assert torch.allclose(eager, compiled, atol=8 * torch.finfo(torch.float32).eps * eager.abs().max())

    def test_dynamic_shapes(self):
        function = torch.compile(lambda x, y: fastpo.token_kl(x, y), fullgraph=True, dynamic=True, backend="aot_eager")
        for rows, vocab in ((3, 50), (4, 70), (9, 33)):
            pair = make(rows, vocab)
            assert torch.equal(function(*pair), fastpo.token_kl(*pair))

    def test_opcheck(self, dtype):
        logits, reference = make(2, 3, 17, dtype=dtype)
        mask, temperatures = torch.rand(2, 3) < 0.7, torch.rand(2, 3) + 0.5
        op, backward = torch.ops.fastpo.vocab_divergence.default, torch.ops.fastpo.vocab_divergence_backward.default
        plain, with_mask = (None, None, 0.7), (mask, None, 0.7)
        numbers = [(*plain, 0, 0.0), (mask, temperatures, 1.0, 0, 0.0), (*with_mask, 3, 0.0)]
        for options in [*numbers, *((*with_mask, kind, 0.3) for kind in (1, 2, 4))]:
            torch.library.opcheck(op, (logits, reference, *options))
            divergence, state = op(logits, reference, *options)
            grad = torch.randn_like(divergence)
            for wanted in ((True, False), (False, True), (True, True)):
                torch.library.opcheck(backward, (logits, reference, grad, divergence, state, *options, *wanted))


@pytest.mark.once
class TestBadInput:
    def test_messages(self):
        logits = torch.zeros(2, 3, 5)
        call = fastpo.token_kl
        for backend in ("native", "reference"):
            with fastpo.use_backend(backend):
                with pytest.raises(TypeError, match=r"logits must be a torch.Tensor, got list"):
                    call([[0.0]], logits)
                with pytest.raises(TypeError, match=r"logits must have dtype .*got int64"):
                    call(logits.long(), logits)
                with pytest.raises(TypeError, match=r"reference_logits must have dtype float32, got bfloat16"):
                    call(logits, logits.bfloat16())
                with pytest.raises(ValueError, match=r"reference_logits has shape \(2, 3, 4\), expected \(2, 3, 5\)"):
                    call(logits, logits[..., :4])
                with pytest.raises(ValueError, match="reference_logits is on meta, logits on cpu"):
                    call(logits, logits.to("meta"))
                with pytest.raises(ValueError, match="vocabulary"):
                    call(torch.tensor(1.0), torch.tensor(0.0))
                with pytest.raises(ValueError, match=r"vocabulary.*is empty"):
                    call(torch.zeros(2, 0), torch.zeros(2, 0))
                with pytest.raises(TypeError, match="mask must have dtype bool, got int64"):
                    call(logits, logits, mask=torch.ones(2, 3, dtype=torch.int64))
                with pytest.raises(ValueError, match=r"mask has shape \(3,\), expected \(2, 3\)"):
                    call(logits, logits, mask=torch.ones(3, dtype=torch.bool))
                for bad in (0.0, -1.0, math.nan, math.inf):
                    with pytest.raises(ValueError, match="temperature must be positive and finite"):
                        call(logits, logits, temperature=bad)
                    with pytest.raises(ValueError, match="temperature must be positive and finite"):
                        call(logits, logits, temperature=torch.tensor([1.0, 1.0, bad]).expand(2, 3))
                with pytest.raises(ValueError, match="no gradient flows"):
                    call(logits, logits, temperature=torch.ones(2, 3, requires_grad=True))
                with pytest.raises(ValueError, match="direction must be 'forward' or 'reverse', got 'backward'"):
                    call(logits, logits, direction="backward")
