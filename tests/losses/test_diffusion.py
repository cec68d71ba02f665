"""Masked diffusion: quadrature, masks, the bound against its definition, and a tiny model that learns from rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastpo import advantages, losses

NAN = math.nan
MASK_ID, VOCAB, LENGTH = 4, 4, 3


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_quadrature(n):
    """Exact up to t^(2n-1), and not beyond; never at the ends."""
    times, weights = losses.elbo_nodes(n)
    for power in range(2 * n):
        assert (weights * times**power).sum().item() == pytest.approx(1 / (power + 1), rel=1e-13)
    assert abs((weights * times ** (2 * n)).sum().item() - 1 / (2 * n + 1)) > 1e-9
    assert 0 < times.min() and times.max() < 1 and (weights > 0).all()


class TestMasks:
    tokens = torch.arange(40).view(4, 10)
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[0], mask[1, 3:], mask[2, 9] = True, True, True

    def test_counts(self):
        """max(1, round(t L)) of those that count, for every time; no more in a row without any."""
        times = torch.tensor([0.01, 0.5, 0.5, 0.99])
        noised = losses.noise_tokens(self.tokens, times, -1, mask=self.mask)
        want = [[max(1, round(t * n)) if n else 0 for n in (10, 7, 1, 0)] for t in (0.01, 0.5, 0.5, 0.99)]
        assert noised.masked.sum(2).tolist() == want
        assert torch.equal(noised.tokens == -1, noised.masked) and not (noised.masked & ~self.mask).any()
        assert torch.equal(torch.where(noised.masked, self.tokens, noised.tokens), self.tokens.expand(4, 4, 10))
        assert (noised.masked[1] != noised.masked[2]).any()

    def test_seed(self):
        """The same seed gives the same masks, as the three models need."""
        masks = [
            losses.noise_tokens(
                self.tokens, torch.tensor([0.5]), -1, mask=self.mask, generator=torch.Generator().manual_seed(s)
            ).masked
            for s in (3, 3, 4)
        ]
        assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])

    def test_uniform(self):
        noised = losses.noise_tokens(torch.zeros(4000, 4, dtype=torch.int64), torch.tensor([0.5]), 1)
        share = noised.masked.double().mean((0, 1))
        assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(4000)

    def test_prompts(self):
        prompt = torch.zeros(1, 4000, dtype=torch.bool)
        prompt[:, :3000] = True
        completion = torch.zeros_like(prompt)
        completion[:, 3500:] = True
        given = {"prompt_mask": prompt, "completion_mask": completion}
        tokens = torch.ones(1, 4000, dtype=torch.int64)
        found = losses.diffu_grpo_tokens(tokens, 9, **given) == 9
        assert found[completion].all() and not found[:, 3000:3500].any()
        assert abs(found[prompt].double().mean() - 0.15) < 5 * math.sqrt(0.15 * 0.85 / 3000)
        with pytest.raises(ValueError, match="prompt_mask and completion_mask overlap"):
            losses.diffu_grpo_tokens(tokens, 9, prompt_mask=prompt, completion_mask=prompt)

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"times must be \(n,\) in \[0, 1\]"):
            losses.noise_tokens(self.tokens, torch.tensor([1.5]), -1)
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            losses.elbo_nodes(0)


class TestElbo:
    def test_definition(self):
        generator = torch.Generator().manual_seed(0)
        nodes = losses.elbo_nodes(2)
        masked = torch.rand(2, 3, 5, generator=generator) < 0.5
        masked[:, 2] = False
        logprobs = -torch.rand(2, 3, 5, generator=generator, dtype=torch.float64)
        want = sum(nodes.weights[k] / nodes.times[k] * torch.where(masked[k], logprobs[k], 0).sum(1) for k in range(2))
        dirty = logprobs.masked_fill(~masked, NAN).requires_grad_()
        found = losses.elbo(dirty, masked, nodes)
        torch.testing.assert_close(found, want)
        (grad,) = torch.autograd.grad(found.sum(), dirty)
        factor = (nodes.weights / nodes.times)[:, None, None]
        torch.testing.assert_close(grad, torch.where(masked, factor, 0).double())
        half = losses.elbo(logprobs.bfloat16(), masked, nodes)
        assert half.dtype == torch.float32 and found[2] == 0

    def test_independent_tokens(self):
        """Where no token depends on another, the bound is log p; by count for every mask and length, by time nearly."""
        nodes, tokens = losses.elbo_nodes(3), torch.zeros(6, 100, dtype=torch.int64)
        mask = torch.arange(100) < torch.tensor([100, 50, 10, 2, 1, 0])[:, None]
        masked = losses.noise_tokens(tokens, nodes.times, 1, mask=mask).masked
        logprobs = torch.full((3, 6, 100), -0.7, dtype=torch.float64)
        want = -0.7 * mask.sum(1).double()
        torch.testing.assert_close(losses.elbo(logprobs, masked, nodes, rate="count", mask=mask), want)
        by_time = losses.elbo(logprobs, masked, nodes)
        assert abs(by_time[0] / want[0] - 1) < 0.02
        # of one token, hidden at every time, 1/t counts too much
        assert by_time[4] / want[4] > 2

    def test_bad_input(self):
        nodes = losses.elbo_nodes(2)
        x, m = torch.zeros(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"nodes\.times has shape \(2,\), expected \(1,\)"):
            losses.elbo(x[:1], m[:1], nodes)
        with pytest.raises(ValueError, match=r"nodes\.times must be positive"):
            losses.elbo(x, m, losses.ElboNodes(torch.tensor([0.0, 0.5]), nodes.weights))
        with pytest.raises(ValueError, match="mask is of rate='count'"):
            losses.elbo(x, m, nodes, mask=m[0])


class TestSequenceRatio:
    def test_closed_form(self):
        """One ratio per sequence, clipped; the length divides outside only; no length, no loss."""
        now = torch.tensor([-10.0, -20.0, -5.0, 1.0], requires_grad=True)
        old, a = torch.tensor([-10.1, -19.0, -6.0, 0.0]), torch.tensor([2.0, -1.0, 3.0, 5.0])
        lengths = torch.tensor([4, 2, 8, 0])
        out = losses.diffusion_gdpo(now, a, old, lengths, reduction="none")
        r = [math.exp(0.1), math.exp(-1.0), math.exp(1.0)]
        assert out.loss.tolist() == pytest.approx([-r[0] * 2 / 4, 0.8 / 2, -1.2 * 3 / 8, 0.0], rel=1e-6)
        (grad,) = torch.autograd.grad(out.loss.sum(), now)
        assert grad.tolist() == pytest.approx([-r[0] * 2 / 4, 0.0, 0.0, 0.0], rel=1e-6)
        mean = losses.diffusion_gdpo(now, a, old, lengths, num_items=8)
        torch.testing.assert_close(mean.loss, out.loss.sum() / 8)
        assert mean.metrics.clip_fraction_high.item() == pytest.approx(1 / 3)

    def test_penalty(self):
        """k3 of the sequence, over the length."""
        now, reference = torch.tensor([-3.0]), torch.tensor([-2.5])
        out = losses.diffusion_gdpo(now, torch.zeros(1), None, torch.tensor([2]), reference_elbos=reference, beta=0.3)
        assert out.loss.item() == pytest.approx(0.3 * (math.exp(0.5) - 1 - 0.5) / 2, rel=1e-5)

    def test_diffu_grpo_is_grpo(self):
        generator = torch.Generator().manual_seed(0)
        now, old, reference = (-torch.rand(3, 4, generator=generator) for _ in range(3))
        a, mask = torch.tensor([1.0, -1.0, 0.5]), torch.rand(3, 4, generator=generator) < 0.7
        found = losses.diffu_grpo(now, a, old, reference, mask=mask)
        ratio = (now - old).exp()
        surrogate = torch.minimum(ratio * a[:, None], ratio.clamp(0.5, 1.5) * a[:, None])
        k3 = (reference - now).exp() - 1 - (reference - now)
        want = torch.where(mask, -surrogate + 0.04 * k3, 0).sum() / mask.sum()
        torch.testing.assert_close(found.loss, want)
        with pytest.raises(ValueError, match="reference_logprobs"):
            losses.diffu_grpo(now, a, old)

    def test_bad_input(self):
        x = torch.zeros(3)
        with pytest.raises(ValueError, match=r"elbos has shape \(1, 3\), expected \(B,\)"):
            losses.diffusion_gdpo(x[None], x, None, torch.ones(3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"old_elbos has shape \(2,\), expected \(3,\)"):
            losses.diffusion_gdpo(x, x, x[:2], torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["diffusion_gdpo", "diffu_grpo", "elbo"])
def test_compiled_is_eager(name):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(4, generator=generator) for _ in range(3)]
    lengths, nodes = torch.tensor([1, 2, 0, 3]), losses.elbo_nodes(2)
    tokens = -torch.rand(2, 4, 3, generator=generator)

    def step(leaf: Tensor) -> Tensor:
        if name == "diffusion_gdpo":
            return losses.diffusion_gdpo(leaf[0, :, 0], rows[1], rows[2], lengths).loss
        if name == "diffu_grpo":
            return losses.diffu_grpo(leaf[0], rows[0], tokens[1], beta=0.0, mask=tokens[1] < -0.3).loss
        return losses.elbo(leaf, tokens < -0.5, nodes).square().sum()

    leaf = tokens.clone().requires_grad_()
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(leaf)
    torch.testing.assert_close(found, step(leaf))
    torch.testing.assert_close(torch.autograd.grad(found, leaf), torch.autograd.grad(step(leaf), leaf))


class TinyDiffusion(torch.nn.Module):
    """A masked-diffusion model of three tokens: every position predicted from what is not hidden of all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(LENGTH * (VOCAB + 1), 32), torch.nn.Tanh(), torch.nn.Linear(32, LENGTH * VOCAB)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        seen = torch.nn.functional.one_hot(tokens, VOCAB + 1).float().flatten(-2)
        return self.body(seen).unflatten(-1, (LENGTH, VOCAB)).log_softmax(-1)

    @torch.no_grad()
    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """Unmasked one by one, in random order."""
        tokens = torch.full((number, LENGTH), MASK_ID)
        order = torch.rand(number, LENGTH, generator=generator).argsort(1)
        for k in range(LENGTH):
            drawn = self(tokens).exp().flatten(0, 1).multinomial(1, generator=generator).view(number, LENGTH)
            tokens.scatter_(1, order[:, k : k + 1], drawn.gather(1, order[:, k : k + 1]))
        return tokens


def chosen(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens.expand(logprobs.shape[:-1])[..., None])[..., 0]


def gdpo_loss(model: TinyDiffusion, tokens: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """The loss of GDPO for given advantages; the old bound is taken on the same masks, before the updates."""
    nodes = losses.elbo_nodes(2)
    noised = losses.noise_tokens(tokens, nodes.times, MASK_ID, generator=generator)
    lengths = torch.full((len(tokens),), LENGTH)

    def bound() -> Tensor:
        return losses.elbo(chosen(model(noised.tokens), tokens), noised.masked, nodes, rate="count")

    old = bound().detach()
    return lambda a: losses.diffusion_gdpo(bound(), a, old, lengths).loss


def diffu_loss(model: TinyDiffusion, tokens: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    everything = torch.ones_like(tokens, dtype=torch.bool)
    hidden = losses.diffu_grpo_tokens(
        tokens, MASK_ID, prompt_mask=~everything, completion_mask=everything, generator=generator
    )
    old = chosen(model(hidden), tokens).detach()
    return lambda a: losses.diffu_grpo(chosen(model(hidden), tokens), a, old, beta=0.0, mask=everything).loss


# for diffu-GRPO, which sees nothing but hidden completions, what can be learnt without looking at other tokens
TASKS = {
    "gdpo": (gdpo_loss, lambda tokens: (tokens[:, 0] == tokens[:, 2]).float()),
    "diffu_grpo": (diffu_loss, lambda tokens: (tokens == 2).float().mean(1)),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations wait for threads longer than they work, where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.usefixtures("one_thread")
def test_a_tiny_model_learns(name, sign):
    """The reward rises from a quarter to nearly all; with the advantages' sign turned it falls."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    make, reward = TASKS[name]
    model = TinyDiffusion()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = reward(model.sample(500, generator)).mean()
    for _ in range(40 if sign > 0 else 15):
        tokens = model.sample(128, generator)
        a = sign * advantages.dr_grpo(reward(tokens)[None])[0]
        loss = make(model, tokens, generator)
        for _ in range(2):
            optimizer.zero_grad()
            loss(a).backward()
            optimizer.step()
    after = reward(model.sample(500, generator)).mean()
    assert 0.15 < before < 0.35
    assert after > 0.85 if sign > 0 else after < before / 2
