"""token_logprobs: the compiled kernel against the fp64 reference, and the reference against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels.token_logprobs import STATISTICS
from fastpo.reference import vocabulary
from tests.device import to_device
from tests.tolerance import assert_within

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The logits' dtype; a module that runs these cases over another backend has its own."""
    return request.param


def upstream(name: str, like: Tensor) -> Tensor:
    """A fixed random upstream gradient for an output, a number of fp32 so that every dtype gets the same."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def evaluate(logits: Tensor, targets: Tensor, backend: str = "native", **options) -> dict[str, Tensor]:
    """All outputs, and the gradient for random upstream gradients of the differentiable ones."""
    stats = options.pop("stats", STATISTICS)
    leaf = to_device(logits).detach().requires_grad_()
    options = {name: to_device(value) for name, value in options.items()}
    with fastpo.use_backend(backend):
        out = fastpo.token_logprobs(leaf, to_device(targets), stats=stats, **options)
    named = {"logprobs": out} if isinstance(out, Tensor) else out._asdict()
    outputs = {name: t for name, t in named.items() if t is not None}
    used = [n for n in DIFFERENTIABLE if n in outputs]
    grads = [to_device(upstream(n, outputs[n])) for n in used]
    (grad,) = torch.autograd.grad([outputs[n] for n in used], leaf, grads)
    return {**{name: t.detach().cpu() for name, t in outputs.items()}, "grad": grad.cpu()}


def exact(
    logits: Tensor, targets: Tensor, temperature=1.0, ignore_index=-100, stats=STATISTICS, allowed=None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The textbook formulas in 80-bit floats, without torch: the truth, for the reference as well.

    Also returns by which size each result's eps is to be scaled. p = exp(z) has the condition number |z|: with z
    rounded, p has the relative error (1 + |log p|) eps, and a result has the sum of what its p contribute.
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    x = logits.to(torch.float64).numpy().astype(np.longdouble).reshape(-1, vocab)
    if allowed is not None:
        bits = np.unpackbits(np.ascontiguousarray(allowed.numpy()).view(np.uint8), axis=-1, bitorder="little")[
            ..., :vocab
        ]
        x = np.where(bits.reshape(-1, vocab), x, -np.inf)
    y = targets.numpy().reshape(len(x), -1)
    t = temperature.double().numpy().reshape(-1, 1) if isinstance(temperature, Tensor) else temperature
    z = x / np.asarray(t, dtype=np.longdouble)
    top = z.max(-1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(-1, keepdims=True))
    logp = z - lse
    p = np.exp(logp)
    safe = np.where(p > 0, logp, 0)
    entropy = -(p * safe).sum(-1, keepdims=True)
    valid = y != ignore_index
    keep = valid.any(-1)
    ids = np.where(valid, y, 0)
    logprobs = np.where(valid, np.take_along_axis(logp, ids, -1), 0)
    values = {
        "logprobs": logprobs.reshape(targets.shape),
        "entropy": np.where(keep, entropy[:, 0], 0).reshape(shape),
        "logsumexp": np.where(keep, lse[:, 0], 0).reshape(shape),
        "log_sum_p2": np.where(keep, np.log((p * p).sum(-1)), 0).reshape(shape),
        "top1": np.where(keep, x.argmax(-1), -1).reshape(shape),
    }
    values = {name: v for name, v in values.items() if name in ("logprobs", *stats)}
    like = torch.float64 if logits.dtype == torch.float64 else torch.float32
    g = {
        n: upstream(n, torch.empty(values[n].shape, dtype=like)).double().numpy() for n in DIFFERENTIABLE if n in values
    }
    per_id = np.where(valid, g["logprobs"].reshape(y.shape), 0)
    grad = -per_id.sum(-1, keepdims=True) * p
    grad_terms = np.abs(per_id).sum(-1, keepdims=True) * p
    for k in range(y.shape[1]):
        np.add.at(grad, (np.arange(len(x)), ids[:, k]), per_id[:, k])
        np.add.at(grad_terms, (np.arange(len(x)), ids[:, k]), np.abs(per_id[:, k]))
    if "entropy" in g:
        grad -= g["entropy"].reshape(-1, 1) * p * (safe + entropy)
        grad_terms += np.abs(g["entropy"].reshape(-1, 1)) * p * (np.abs(safe) + entropy)
    if "logsumexp" in g:
        grad += g["logsumexp"].reshape(-1, 1) * p
        grad_terms += np.abs(g["logsumexp"].reshape(-1, 1)) * p
    grad = np.where(keep[:, None], grad / t, 0)
    relative = 1 + np.abs(safe)
    mean_relative = (p * relative).sum(-1)
    square = p * p
    sizes = {
        "logprobs": np.where(valid, 1 + np.abs(logprobs) + mean_relative[:, None], 0).reshape(targets.shape),
        "entropy": (p * np.abs(safe) * relative).sum(-1).reshape(shape) + 1,
        "logsumexp": np.maximum(np.abs(lse[:, 0]), mean_relative).reshape(shape),
        "log_sum_p2": 2 * ((square * relative).sum(-1) / square.sum(-1) + mean_relative).reshape(shape),
        "grad": (grad_terms / t * (relative + mean_relative[:, None])).reshape(logits.shape),
    }
    return {**values, "grad": grad.reshape(logits.shape)}, sizes


def compare(logits: Tensor, targets: Tensor, **options) -> dict[str, Tensor]:
    """The native result and the reference's, checked against the truth; returns the native one."""
    ours, same = evaluate(logits, targets, **options), evaluate(logits, targets, "reference", **options)
    truth, sizes = exact(logits, targets, **options)
    assert set(ours) == set(same) == set(truth)
    for name, value in ours.items():
        assert torch.equal(value.isnan(), same[name].isnan())
        if name == "top1":
            assert np.array_equal(value.numpy(), truth[name]) and np.array_equal(same[name].numpy(), truth[name])
            continue
        assert value.dtype == (logits.dtype if name == "grad" else torch.promote_types(logits.dtype, torch.float32))
        assert_within(value, truth[name], same[name], name=name, terms=sizes[name])
    return ours


def make(*shape: int, dtype: torch.dtype = torch.float32, ids: int = 0, seed: int = 0, spread: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator) * spread).to(dtype)
    targets = torch.randint(0, shape[-1], (*shape[:-1], *([ids] if ids else [])), generator=generator)
    return logits, targets


@pytest.mark.once
class TestReference:
    """The oracle itself, against results that need no torch."""

    def test_uniform(self):
        vocabulary_size = 1000
        out = evaluate(torch.zeros(2, vocabulary_size, dtype=torch.float64), torch.tensor([3, 999]), "reference")
        log_v = math.log(vocabulary_size)
        assert torch.allclose(out["logprobs"], torch.full((2,), -log_v, dtype=torch.float64), rtol=1e-14)
        assert torch.allclose(out["entropy"], torch.full((2,), log_v, dtype=torch.float64), rtol=1e-14)
        assert torch.allclose(out["log_sum_p2"], torch.full((2,), -log_v, dtype=torch.float64), rtol=1e-14)
        assert out["top1"].tolist() == [0, 0]

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_given_distribution(self, temperature):
        p = [0.5, 0.25, 0.125, 0.125]
        logits = torch.tensor([[temperature * math.log(q) + 7 for q in p]], dtype=torch.float64)
        out = evaluate(logits, torch.tensor([[2, 0]]), "reference", temperature=temperature)
        assert out["logprobs"][0].tolist() == pytest.approx([math.log(0.125), math.log(0.5)], abs=1e-14)
        assert out["entropy"].item() == pytest.approx(-sum(q * math.log(q) for q in p), abs=1e-14)
        assert out["log_sum_p2"].item() == pytest.approx(math.log(sum(q * q for q in p)), abs=1e-14)
        assert out["logsumexp"].item() == pytest.approx(7 / temperature, abs=1e-14)

    def test_gradient_formula(self):
        """d logp / dz = (onehot - p) / T, dH / dz = -p (log p + H) / T, d lse / dz = p / T."""
        logits, targets = make(4, 11, dtype=torch.float64)
        temperature = 0.7
        p = torch.softmax(logits / temperature, -1)
        entropy = -(p * p.log()).sum(-1, keepdim=True)
        expected = {
            "logprobs": (torch.nn.functional.one_hot(targets, 11) - p) / temperature,
            "entropy": -p * (p.log() + entropy) / temperature,
            "logsumexp": p / temperature,
        }
        for name, want in expected.items():
            leaf = logits.clone().requires_grad_()
            out = vocabulary.token_logprobs(leaf, targets, temperature=temperature, stats=STATISTICS)
            (grad,) = torch.autograd.grad(getattr(out, name).sum(), leaf)
            assert torch.allclose(grad, want, atol=1e-15)


class TestValues:
    @pytest.mark.parametrize("vocab", [1, 2, 3, 15, 16, 17, 63, 64, 65, 1000, 4095, 4096, 4097, 8192, 50257])
    def test_vocabulary_sizes(self, dtype, vocab):
        compare(*make(5, vocab, dtype=dtype, seed=vocab))

    @pytest.mark.parametrize("vocab", [151_936, 256_000])
    def test_long_vocabularies(self, dtype, vocab):
        compare(*make(2, vocab, dtype=dtype))

    @pytest.mark.parametrize("rows", [0, 1, 2, 63])
    def test_row_counts(self, dtype, rows):
        ours = evaluate(*make(rows, 33, dtype=dtype))
        assert ours["logprobs"].shape == (rows,)
        if rows:
            compare(*make(rows, 33, dtype=dtype))

    @pytest.mark.parametrize("ids", [1, 2, 7])
    def test_several_ids(self, dtype, ids):
        logits, targets = make(3, 4, 100, dtype=dtype, ids=ids)
        targets[0, 0, :] = 5  # the same id several times
        targets[1, 1, 0] = -100
        ours = compare(logits, targets)
        assert ours["logprobs"].shape == (3, 4, ids)

    @pytest.mark.parametrize("stats", [(), ("entropy",), ("logsumexp",), ("log_sum_p2",), ("top1", "entropy")])
    def test_statistics_asked_for(self, dtype, stats):
        ours = compare(*make(6, 300, dtype=dtype), stats=stats)
        assert set(ours) == {"logprobs", "grad", *stats}

    @pytest.mark.parametrize("temperature", [1e-3, 0.3, 1.0, 5.0, 1e4])
    def test_temperature(self, dtype, temperature):
        compare(*make(4, 700, dtype=dtype), temperature=temperature)

    def test_temperature_per_token(self, dtype):
        logits, targets = make(3, 5, 200, dtype=dtype)
        temperature = torch.linspace(0.2, 3, 15).view(3, 5)
        both = compare(logits, targets, temperature=temperature)
        one = compare(logits[1:2, 2:3], targets[1:2, 2:3], temperature=temperature[1, 2].item())
        assert torch.equal(both["logprobs"][1, 2], one["logprobs"][0, 0])

    @pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
    def test_target_dtypes(self, dtype, index):
        logits, targets = make(4, 50, dtype=dtype)
        compare(logits, targets.to(index))

    @pytest.mark.parametrize("offset", [1e4, -1e4])
    def test_common_offset(self, dtype, offset):
        """A large common offset is subtracted before anything is rounded: it must not change the result."""
        logits, targets = make(4, 3000, dtype=torch.float32)
        shifted = (logits + offset).to(dtype)
        if dtype is torch.float16:
            assert shifted.isfinite().all()
        ours = compare(shifted, targets)
        # bitwise what the same numbers give without the offset, if they can be represented there
        back = evaluate((shifted.double() - offset).to(dtype), targets)
        if dtype in (torch.float32, torch.float64):
            for name in ("logprobs", "entropy", "log_sum_p2", "grad"):
                assert torch.equal(ours[name], back[name]), name

    def test_rising_row(self, dtype):
        """Every block raises the maximum, by little and by more than the range of a float's exponent."""
        for step in (0.01, 40.0):
            logits = torch.arange(20_000).float().div(4096).floor().mul(step)[None].to(dtype)
            compare(logits, torch.tensor([19_999]))
            compare(logits.flip(-1).contiguous(), torch.tensor([0]))


class TestLayouts:
    def layouts(self, dtype) -> dict[str, Tensor]:
        base, _ = make(4, 6, 130, dtype=dtype)
        return {
            "shifted": base[:, :-1],
            "rows strided": base[::2, 1::2],
            "vocabulary sliced": base[..., 3:100],
            "vocabulary strided": base[..., ::3],
            "transposed rows": base.transpose(0, 1),
            "vocabulary first": base.movedim(-1, 0).contiguous().movedim(0, -1),
            "expanded": base[:1].expand(5, 6, 130),
            "one dimension": base[0, 0],
            "unaligned": base.flatten()[1 : 1 + 7 * 130].view(7, 130),
        }

    def test_strides(self, dtype):
        for name, logits in self.layouts(dtype).items():
            targets = torch.arange(math.prod(logits.shape[:-1])).view(logits.shape[:-1]) % logits.shape[-1]
            strided, plain = evaluate(logits, targets), evaluate(logits.contiguous(), targets)
            for key in plain:
                assert torch.equal(strided[key], plain[key]), (name, key)
            compare(logits, targets)

    def test_strided_targets(self, dtype):
        logits, _ = make(4, 6, 50, dtype=dtype)
        targets = torch.randint(0, 50, (6, 4)).t()
        assert torch.equal(evaluate(logits, targets)["logprobs"], evaluate(logits, targets.contiguous())["logprobs"])


class TestExtremeRows:
    def test_impossible_tokens(self, dtype):
        logits, targets = make(6, 5000, dtype=dtype)
        logits[:, 100:4800] = -math.inf
        logits[1, :99] = -math.inf  # first block without a finite logit but its last columns
        targets[:] = torch.tensor([0, 99, 50, 4900, 4999, 99])
        ours = compare(logits, targets)
        assert (ours["grad"][:, 100:4800] == 0).all()

    def test_impossible_target(self, dtype):
        logits, targets = make(2, 40, dtype=dtype)
        logits[0, targets[0]] = -math.inf
        ours = evaluate(logits, targets, stats=())
        assert ours["logprobs"][0] == -math.inf and ours["logprobs"][1].isfinite()

    def test_one_certain_token(self, dtype):
        """Log-prob exactly 0, entropy exactly 0."""
        logits = torch.full((1, 300), -math.inf, dtype=dtype)
        logits[0, 7] = 3.0
        ours = evaluate(logits, torch.tensor([7]))
        assert ours["logprobs"].item() == 0 and ours["entropy"].item() == 0 and ours["top1"].item() == 7

    @pytest.mark.parametrize("bad", [math.nan, math.inf, "nothing possible"])
    @pytest.mark.parametrize("column", [0, 4500])
    def test_bad_row_stays_alone(self, dtype, bad, column):
        logits, targets = make(3, 5000, dtype=dtype)
        clean = evaluate(logits, targets)
        if bad == "nothing possible":
            logits[1] = -math.inf
        else:
            logits[1, column] = bad
        ours, reference = evaluate(logits, targets), evaluate(logits, targets, "reference")
        for name, value in ours.items():
            assert torch.equal(value[0], clean[name][0]) and torch.equal(value[2], clean[name][2]), name
        for name in ("logprobs", "entropy", "log_sum_p2"):
            assert ours[name][1].isnan(), name
        assert ours["grad"][1].isnan().all()
        assert torch.equal(ours["logsumexp"][1].isnan(), reference["logsumexp"][1].isnan())
        if not ours["logsumexp"][1].isnan():
            assert ours["logsumexp"][1] == reference["logsumexp"][1]
        assert ours["top1"][1] == reference["top1"][1]

    def test_top1_takes_the_lowest_of_equals(self, dtype):
        logits = torch.zeros(2, 9000, dtype=dtype)
        logits[0, [8000, 4096, 5000]] = 2.0
        assert evaluate(logits, torch.tensor([0, 0]))["top1"].tolist() == [4096, 0]

    def test_ignored_rows(self, dtype):
        logits, targets = make(5, 64, dtype=dtype)
        clean = evaluate(logits, targets)
        targets[[1, 3]] = -100
        logits[1], logits[3, 5] = math.nan, math.inf
        for backend in ("native", "reference"):
            ours = evaluate(logits, targets, backend)
            assert (ours["logprobs"][[1, 3]] == 0).all() and (ours["grad"][[1, 3]] == 0).all()
            assert (ours["entropy"][[1, 3]] == 0).all() and (ours["logsumexp"][[1, 3]] == 0).all()
            assert (ours["top1"][[1, 3]] == -1).all() and (ours["log_sum_p2"][[1, 3]] == 0).all()
            if backend == "native":
                assert torch.equal(ours["logprobs"][[0, 2, 4]], clean["logprobs"][[0, 2, 4]])

    def test_other_ignore_index(self, dtype):
        logits, targets = make(4, 20, dtype=dtype)
        targets[2] = 0
        assert evaluate(logits, targets, ignore_index=0)["logprobs"][2] == 0


@pytest.mark.once
class TestAutograd:
    @pytest.mark.parametrize("per_token", [False, True])
    def test_gradcheck(self, per_token):
        logits, targets = make(2, 3, 7, dtype=torch.float64, ids=2)
        targets[0, 0] = torch.tensor([4, -100])
        targets[1, 1] = -100
        temperature = torch.linspace(0.5, 2, 6).double().view(2, 3) if per_token else 0.8

        def function(x):
            out = fastpo.token_logprobs(x, targets, temperature=temperature, stats=("entropy", "logsumexp"))
            return out.logprobs, out.entropy, out.logsumexp

        with fastpo.use_backend("native"):
            assert torch.autograd.gradcheck(function, logits.requires_grad_())
            assert torch.autograd.gradgradcheck(function, logits)

    def test_only_some_outputs_are_used(self):
        logits, targets = make(3, 50)
        for name in DIFFERENTIABLE:
            grads = []
            for backend in ("native", "reference"):
                leaf = logits.clone().requires_grad_()
                with fastpo.use_backend(backend):
                    out = fastpo.token_logprobs(leaf, targets, stats=("entropy", "logsumexp", "top1", "log_sum_p2"))
                assert not out.top1.requires_grad and not out.log_sum_p2.requires_grad
                grads += torch.autograd.grad(getattr(out, name).sum(), leaf)
            assert torch.allclose(*grads, atol=4 * torch.finfo(torch.float32).eps)

    def test_second_backward(self):
        logits, targets = make(3, 50)
        leaf = logits.requires_grad_()
        out = fastpo.token_logprobs(leaf, targets)
        first = torch.autograd.grad(out, leaf, torch.ones(3), retain_graph=True)[0]
        second = torch.autograd.grad(out, leaf, 2 * torch.ones(3))[0]
        assert torch.equal(2 * first, second)

    def test_create_graph_through_a_network(self):
        """A constant gradient would make the second derivative silently wrong."""
        torch.manual_seed(0)
        x, weight, targets = torch.randn(4, 3).double(), torch.randn(3, 9).double(), torch.randint(0, 9, (4,))
        penalties = []
        for backend in ("native", "reference"):
            w = weight.clone().requires_grad_()
            with fastpo.use_backend(backend):
                loss = -fastpo.token_logprobs((x @ w).tanh() * 3, targets).mean()
                (grad,) = torch.autograd.grad(loss, w, create_graph=True)
            penalties += torch.autograd.grad(grad.square().sum(), w)
        assert torch.allclose(*penalties, rtol=1e-12)
        assert penalties[0].abs().max() > 1e-3

    def test_no_gradient_asked_for(self):
        logits, targets = make(3, 50)
        assert not fastpo.token_logprobs(logits, targets).requires_grad

    def test_batch_invariance_and_determinism(self):
        """A row's result does not depend on its neighbours, on repetition or on the number of threads."""
        logits, targets = make(300, 777)
        whole = evaluate(logits, targets)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            single = evaluate(logits, targets)
        finally:
            torch.set_num_threads(threads)
        alone = evaluate(logits[123:124], targets[123:124], stats=("entropy",))
        for name in whole:
            assert torch.equal(whole[name], single[name])
        assert torch.equal(whole["logprobs"][123:124], alone["logprobs"])
        assert torch.equal(whole["entropy"][123:124], alone["entropy"])


class TestInplaceBackward:
    def run(self, logits: Tensor, targets: Tensor, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        given = leaf * 1.0
        out = fastpo.token_logprobs(given, targets, stats=("entropy",), inplace_backward=inplace)
        (out.logprobs.sum() + out.entropy.square().sum()).backward()
        return leaf.grad, given, out.logprobs

    def test_same_gradient_in_the_logits_storage(self, dtype):
        logits, targets = make(6, 5000, dtype=dtype, ids=3)
        targets[0, 1] = targets[0, 0]
        targets[2] = -100
        ours, given, _ = self.run(logits, targets, inplace=True)
        expected, untouched, _ = self.run(logits, targets, inplace=False)
        assert torch.equal(ours, expected)
        assert torch.equal(given.detach(), expected) and torch.equal(untouched.detach(), logits)

    def test_strided(self):
        base, targets = make(4, 6, 50)
        leaf = base.clone().requires_grad_()
        view = (leaf * 1)[:, :-1, ::2]
        fastpo.token_logprobs(view, targets[:, :-1] % 25, inplace_backward=True).sum().backward()
        other = base.clone().requires_grad_()
        fastpo.token_logprobs(other[:, :-1, ::2], targets[:, :-1] % 25).sum().backward()
        assert torch.equal(leaf.grad, other.grad)

    @pytest.mark.once
    def test_second_backward_raises(self):
        logits, targets = make(3, 40)
        given = logits.requires_grad_() * 1
        out = fastpo.token_logprobs(given, targets, inplace_backward=True).sum()
        out.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()

    @pytest.mark.once
    def test_refuses_what_it_cannot_honour(self):
        logits, targets = make(3, 40)
        with pytest.raises(ValueError, match="leaf"):
            fastpo.token_logprobs(logits.requires_grad_(), targets, inplace_backward=True)
        with pytest.raises(ValueError, match="share memory"):
            fastpo.token_logprobs(torch.zeros(1, 40).expand(3, 40), targets, inplace_backward=True)


@pytest.mark.once
class TestCompile:
    @pytest.mark.parametrize("inplace", [False, True])
    def test_inductor_equals_eager(self, inplace):
        logits, targets = make(6, 130)
        temperature = torch.linspace(0.5, 2, 6)

        def function(x):
            out = fastpo.token_logprobs(
                x * 2, targets, temperature=temperature, stats=STATISTICS, inplace_backward=inplace
            )
            return (out.logprobs * out.entropy).sum() + out.logsumexp.square().sum(), out.top1, out.log_sum_p2

        results = []
        for f in (function, torch.compile(function, fullgraph=True)):
            leaf = logits.clone().requires_grad_()
            loss, top1, p2 = f(leaf)
            loss.backward()
            results.append((loss.detach(), top1, p2, leaf.grad))
        for eager, compiled in zip(*results, strict=True):
            assert torch.allclose(eager, compiled, atol=8 * torch.finfo(torch.float32).eps * eager.abs().max())

    def test_dynamic_shapes(self):
        function = torch.compile(
            lambda x, t: fastpo.token_logprobs(x, t, stats=("entropy",)),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        for rows, vocab in ((3, 50), (4, 70), (9, 33)):
            logits, targets = make(rows, vocab)
            assert torch.equal(function(logits, targets).logprobs, fastpo.token_logprobs(logits, targets))

    def test_target_out_of_range_stays_a_runtime_error(self):
        function = torch.compile(lambda x, t: fastpo.token_logprobs(x, t), fullgraph=True, backend="aot_eager")
        with pytest.raises(RuntimeError, match="out of range"):
            function(torch.zeros(2, 5), torch.tensor([1, 5]))

    def test_opcheck(self, dtype):
        logits, targets = make(2, 3, 17, dtype=dtype, ids=2)
        temperatures = torch.rand(2, 3) + 0.5
        op = torch.ops.fastpo.token_logprobs.default
        for stats in (0, 5, 15):
            torch.library.opcheck(op, (logits, targets, None, 0.7, -100, stats))
        torch.library.opcheck(op, (logits, targets, temperatures, 1.0, -100, 15))
        logprobs, state, entropy, *_ = op(logits, targets, None, 0.7, -100, 15)
        rest = (
            targets,
            state,
            entropy,
            None,
            0.7,
            -100,
            torch.randn_like(logprobs),
            torch.randn_like(entropy),
            None,
        )
        torch.library.opcheck(torch.ops.fastpo.token_logprobs_backward.default, (logits, *rest))
        torch.library.opcheck(torch.ops.fastpo.token_logprobs_backward_.default, (logits.clone(), *rest))


def allow(logits: Tensor, targets: Tensor, share: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Random sets, one per row, that hold the row's targets: the logits with anything outside, the packed sets, with
    every bit behind the vocabulary set, and the mask."""
    vocab = logits.shape[-1]
    mask = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < share
    ids = targets if targets.dim() == logits.dim() else targets.unsqueeze(-1)
    mask.scatter_(-1, ids.clamp(min=0), True)
    words = fastpo.pack_allowed(mask)
    if vocab % 32:
        words[..., -1] |= -1 << vocab % 32
    anything = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(logits.dtype).max], dtype=logits.dtype)
    return torch.where(mask, logits, anything[torch.arange(vocab) % 4]), words, mask


class TestAllowed:
    @pytest.mark.parametrize("share", [0.02, 0.6])
    @pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 63, 65, 1000, 4097, 8225])
    def test_values(self, dtype, vocab, share):
        logits, targets = make(3, vocab, dtype=dtype, ids=2, seed=vocab)
        targets[1, 0] = -100
        logits, words, mask = allow(logits, targets, share)
        ours = compare(logits, targets, allowed=words)
        assert (ours["grad"][~mask] == 0).all()

    @pytest.mark.parametrize("stats", [(), ("entropy",), ("log_sum_p2",)])
    def test_statistics_asked_for(self, dtype, stats):
        logits, targets = make(2, 3, 300, dtype=dtype)
        logits, words, _ = allow(logits, targets)
        compare(logits, targets, allowed=words, stats=stats, temperature=torch.linspace(0.3, 2, 6).view(2, 3))

    def test_is_the_softmax_of_the_columns_alone(self, dtype):
        logits, targets = make(1, 500, dtype=dtype)
        logits, words, mask = allow(logits, targets, 0.2)
        columns = mask[0].nonzero()[:, 0]
        ours = evaluate(logits, targets, allowed=words, temperature=0.7)
        alone = evaluate(logits[:, columns], torch.searchsorted(columns, targets), temperature=0.7)
        ours["grad"] = ours["grad"][:, columns]
        alone["top1"] = columns[alone["top1"]]
        for name, value in ours.items():
            # a hundred terms in another order
            eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0
            torch.testing.assert_close(value, alone[name], rtol=8 * eps, atol=8 * eps, msg=name)

    def test_one_set_for_all_rows(self, dtype):
        logits, targets = make(2, 3, 200, dtype=dtype)
        targets[:] = 7
        words = allow(logits[0, 0], targets[0, 0])[1]
        shared = evaluate(logits, targets, allowed=words)
        own = evaluate(logits, targets, allowed=words.expand(2, 3, -1))
        assert all(torch.equal(value, own[name]) for name, value in shared.items())
        compare(logits, targets, allowed=words)

    def test_every_token(self, dtype):
        logits, targets = make(3, 5000, dtype=dtype)
        ours = evaluate(logits, targets, allowed=torch.full((157,), -1, dtype=torch.int32))
        for name, value in evaluate(logits, targets).items():
            # bf16 is taken apart in another order where there are sets, and its terms added up in another
            eps = 0 if dtype != torch.bfloat16 or name == "top1" else torch.finfo(value.dtype).eps
            torch.testing.assert_close(ours[name], value, rtol=8 * eps, atol=8 * eps, msg=name)

    def test_layouts(self, dtype):
        base, _ = make(4, 6, 330, dtype=dtype)
        for logits in (base[:, :-1], base[..., ::3], base.transpose(0, 1), base[..., 5:90], base[0, 0]):
            targets = torch.arange(math.prod(logits.shape[:-1])).view(logits.shape[:-1]) % logits.shape[-1]
            words = allow(logits, targets)[1]
            apart = torch.stack([words, ~words], -1)[..., 0]
            compare(logits, targets, allowed=apart)

    def test_inplace_backward(self, dtype):
        logits, targets = make(3, 5000, dtype=dtype, ids=2)
        logits, words, _ = allow(logits, targets)
        grads = []
        for inplace in (False, True):
            leaf = logits.clone().requires_grad_()
            out = fastpo.token_logprobs(leaf * 1, targets, allowed=words, inplace_backward=inplace)
            grads += torch.autograd.grad(out.sum(), leaf)
        assert torch.equal(*grads)

    def test_target_outside(self, dtype):
        """Its log-prob is -inf, and whatever comes back to it is lost; to other ids of its row it is as if ignored."""
        logits, targets = make(4, 70, dtype=dtype, ids=2)
        _, words, mask = allow(logits, targets)
        targets[:, 0] = 3
        mask[:, 3] = False
        targets[1, 1], targets[2, 1] = 3, -100
        targets[3, 1] = 60
        mask[0, targets[0, 1]] = mask[3, 60] = True
        words = fastpo.pack_allowed(mask)
        ignored = torch.where(targets == 3, -100, targets)
        for backend in ("native", "reference"):
            grads, found = [], []
            for ids in (targets, ignored):
                leaf = logits.clone().requires_grad_()
                with fastpo.use_backend(backend):
                    out = fastpo.token_logprobs(leaf, ids, allowed=words, stats=("entropy",))
                up = torch.where(ids == 3, math.nan, 2.0).to(out.logprobs.dtype)
                grads += torch.autograd.grad(out.logprobs, leaf, up)
                found.append(out)
            assert (found[0].logprobs[targets == 3] == -math.inf).all()
            assert torch.equal(found[0].logprobs[ignored != -100], found[1].logprobs[ignored != -100])
            assert (found[0].entropy > 0).all()
            assert torch.equal(*grads) and not grads[0][[1, 2]].any() and grads[0][[0, 3]].any(-1).all()

    def test_one_token(self, dtype):
        """Log-prob and entropy exactly 0, and no gradient."""
        logits, targets = make(3, 100, dtype=dtype)
        _, words, mask = allow(logits, targets, share=0.0)
        assert (mask.sum(-1) == 1).all()
        for backend in ("native", "reference"):
            ours = evaluate(logits, targets, backend, allowed=words, stats=("entropy", "log_sum_p2", "top1"))
            assert not any(ours[name].any() for name in ("logprobs", "entropy", "log_sum_p2", "grad"))
            assert torch.equal(ours["top1"], targets)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_bad_numbers_inside(self, dtype, bad):
        logits, targets = make(3, 5000, dtype=dtype)
        logits, words, mask = allow(logits, targets)
        if bad == -math.inf:
            logits[1, mask[1]] = bad
        else:
            logits[1, mask[1].nonzero()[100]] = bad
        ours, reference = (
            evaluate(logits, targets, allowed=words),
            evaluate(logits, targets, "reference", allowed=words),
        )
        for name, value in ours.items():
            assert torch.equal(value.isnan(), reference[name].isnan()), name
        assert ours["logprobs"].isnan().tolist() == [False, True, False] and (ours["grad"][~mask] == 0).all()
        assert ours["grad"][1, mask[1]].isnan().all()
        if bad != -math.inf:
            assert ours["top1"][1] == reference["top1"][1] == mask[1].nonzero()[100]

    def test_ignored_rows_need_no_set(self, dtype):
        logits, targets = make(3, 40, dtype=dtype)
        words = torch.full((3, 2), -1, dtype=torch.int32)
        words[1], targets[1] = 0, -100
        ours, plain = evaluate(logits, targets, allowed=words), evaluate(logits, targets)
        same = evaluate(logits, targets, "reference", allowed=words)
        for name, value in ours.items():
            assert torch.equal(value[1], plain[name][1]) and torch.equal(same[name][1], plain[name][1]), name

    def test_empty_set(self):
        logits, targets = make(2, 3, 40)
        words = torch.full((2, 3, 2), -1, dtype=torch.int32)
        words[1, 1] = torch.tensor([0, -1 << 8])
        for backend in ("native", "reference"):
            with fastpo.use_backend(backend):
                with pytest.raises(ValueError, match="allowed holds no token for row 4, which has a target"):
                    fastpo.token_logprobs(logits, targets, allowed=words)
                with pytest.raises(ValueError, match="allowed holds no token for row 0"):
                    fastpo.token_logprobs(logits, targets, allowed=torch.zeros(2, dtype=torch.int32))

    def test_gradcheck(self):
        logits, targets = make(2, 3, 40, dtype=torch.float64, ids=2)
        targets[0, 0], targets[1, 1] = torch.tensor([4, -100]), -100
        words, mask = allow(logits, targets, 0.3)[1:]
        targets[1, 0, 1] = (~mask[1, 0]).nonzero()[0]

        def function(x):
            out = fastpo.token_logprobs(x, targets, temperature=0.8, stats=("entropy", "logsumexp"), allowed=words)
            return out.logprobs[mask_of_finite], out.entropy, out.logsumexp

        mask_of_finite = torch.ones(targets.shape, dtype=torch.bool)
        mask_of_finite[1, 0, 1] = False
        with fastpo.use_backend("native"):
            assert torch.autograd.gradcheck(function, logits.requires_grad_())
            assert torch.autograd.gradgradcheck(function, logits)

    @pytest.mark.once
    def test_opcheck(self, dtype):
        logits, targets = make(2, 3, 70, dtype=dtype, ids=2)
        words = allow(logits, targets)[1]
        for sets in (words, words[0, 0] | 1):
            arguments = (logits, targets, None, 0.7, -100, 15, sets)
            torch.library.opcheck(torch.ops.fastpo.token_logprobs.default, arguments)
            logprobs, state, entropy, *_ = torch.ops.fastpo.token_logprobs(*arguments)
            up = (torch.randn_like(logprobs), torch.randn_like(entropy), None)
            rest = (targets, state, entropy, None, 0.7, -100, *up, sets)
            torch.library.opcheck(torch.ops.fastpo.token_logprobs_backward.default, (logits, *rest))
            torch.library.opcheck(torch.ops.fastpo.token_logprobs_backward_.default, (logits.clone(), *rest))

    @pytest.mark.once
    def test_compiled(self):
        logits, targets = make(6, 130)
        words = allow(logits, targets)[1]

        def function(x, words):
            out = fastpo.token_logprobs(x * 2, targets, stats=STATISTICS, allowed=words)
            return (out.logprobs * out.entropy).sum() + out.logsumexp.square().sum(), out.top1, out.log_sum_p2

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = []
        for f in (function, compiled):
            leaf = logits.clone().requires_grad_()
            loss, *rest = f(leaf, words)
            results.append((loss.detach(), *rest, *torch.autograd.grad(loss, leaf)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        with pytest.raises(RuntimeError, match="allowed holds no token for row 0"):
            compiled(logits, words * 0)

    def test_messages(self):
        logits, targets = make(2, 3, 40)
        words = torch.full((2, 3, 2), -1, dtype=torch.int32)
        for allowed, error, message in (
            ([1], TypeError, "allowed must be a torch.Tensor, got list"),
            (words.long(), TypeError, "allowed must have dtype int32, got int64"),
            (words[..., :1], ValueError, r"allowed has shape \(2, 3, 1\), expected \(2,\) or \(2, 3, 2\): one bit for"),
            (words[0], ValueError, r"allowed has shape \(3, 2\), expected \(2,\) or \(2, 3, 2\)"),
            (words.to("meta"), ValueError, "allowed is on meta, logits on cpu"),
        ):
            for backend in ("native", "reference"):
                with fastpo.use_backend(backend), pytest.raises(error, match=message):
                    fastpo.token_logprobs(logits, targets, allowed=allowed)


@pytest.mark.once
class TestBadInput:
    def test_messages(self):
        logits, targets = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
        call = fastpo.token_logprobs
        for backend in ("native", "reference"):
            with fastpo.use_backend(backend):
                with pytest.raises(TypeError, match=r"logits must be a torch.Tensor, got list"):
                    call([[0.0]], targets)
                with pytest.raises(TypeError, match=r"logits must have dtype .*got int64"):
                    call(logits.long(), targets)
                with pytest.raises(TypeError, match="targets must have dtype int64, int32, got float32"):
                    call(logits, targets.float())
                with pytest.raises(ValueError, match=r"targets has shape \(3, 2\), expected \(2, 3\)"):
                    call(logits, targets.t())
                with pytest.raises(ValueError, match="vocabulary"):
                    call(torch.tensor(1.0), torch.tensor(0))
                with pytest.raises(ValueError, match=r"vocabulary.*is empty"):
                    call(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64))
                with pytest.raises(ValueError, match="targets is on meta, logits on cpu"):
                    call(logits, targets.to("meta"))
                for bad in (0.0, -1.0, math.nan, math.inf):
                    with pytest.raises(ValueError, match="temperature must be positive and finite"):
                        call(logits, targets, temperature=bad)
                    with pytest.raises(ValueError, match="temperature must be positive and finite"):
                        call(logits, targets, temperature=torch.tensor([1.0, 1.0, bad]).expand(2, 3))
                with pytest.raises(TypeError, match="temperature must be a number, got str"):
                    call(logits, targets, temperature="1")
                with pytest.raises(ValueError, match=r"temperature has shape \(3,\), expected \(2, 3\)"):
                    call(logits, targets, temperature=torch.ones(3))
                with pytest.raises(ValueError, match="no gradient flows"):
                    call(logits, targets, temperature=torch.ones(2, 3, requires_grad=True))
                with pytest.raises(ValueError, match=r"stats may hold entropy.*got 'variance'"):
                    call(logits, targets, stats=("variance",))
                with pytest.raises(TypeError, match="ignore_index must be an int, got float"):
                    call(logits, targets, ignore_index=-100.0)

    @pytest.mark.parametrize("bad", [5, -1, -101, 2**40])
    def test_target_out_of_range_names_its_place(self, bad):
        for backend in ("native", "reference"):
            with fastpo.use_backend(backend):
                targets = torch.zeros(2, 3, dtype=torch.int64)
                targets[1, 2] = bad
                with pytest.raises(IndexError, match=rf"targets\[1, 2\] is {bad}, out of range for a vocabulary of 5"):
                    fastpo.token_logprobs(torch.zeros(2, 3, 5), targets)
                targets = torch.zeros(2, 3, 4, dtype=torch.int64)
                targets[0, 1, 3] = bad
                with pytest.raises(IndexError, match=rf"targets\[0, 1, 3\] is {bad}"):
                    fastpo.token_logprobs(torch.zeros(2, 3, 5), targets)
