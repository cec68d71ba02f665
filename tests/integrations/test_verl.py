"""verl's registries with our functions in them: verl's numbers, or where it is not installed a stand-in's."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpo.integrations import verl as ours
from fastpo.kernels import _native
from tests.integrations import verl_standin

pytestmark = pytest.mark.once

ROWS, WIDTH = 7, 9
INDEX = np.array(["a", "b", "a", "c", "b", "a", "b"], dtype=object)


try:
    REAL: Any = importlib.import_module(verl_standin.CORE)
except ImportError:
    REAL = None


@pytest.fixture
def core(monkeypatch):
    if REAL is None:
        for name, module in verl_standin.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module(verl_standin.CORE)
    ours.unregister()


@pytest.fixture
def functions(core):
    return importlib.import_module(verl_standin.FUNCTIONS)


class Config(types.SimpleNamespace):
    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def actor(**more: Any) -> Any:
    """verl's own configuration where it is, as it asserts the type."""
    policy = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 1.0, "kl_cov_ratio": 0.2, "ppo_kl_coef": 0.3}
    policy["dro_beta"] = 0.7
    settings = {"clip_ratio": 0.2, "clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 1.3}
    settings |= {"tau_pos": 1.0, "tau_neg": 1.05, "global_batch_info": {}, **more}
    if REAL is None:
        return Config(**settings, policy_loss=Config(**policy))
    config = importlib.import_module("verl.workers.config")
    batch = {"strategy": "fsdp", "ppo_mini_batch_size": 4, "ppo_micro_batch_size_per_gpu": 4, "rollout_n": 1}
    return config.ActorConfig(**batch, **settings, policy_loss=config.PolicyLossConfig(**policy))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mask = (torch.arange(WIDTH) < torch.tensor([9, 4, 1, 6, 3, 9, 2])[:, None]).long()
    # a tool's answer between
    mask[0, 3:5] = 0
    old = -draw(ROWS, WIDTH).abs()
    return {
        "mask": mask,
        "old": old,
        # of probabilities
        "new": (old + 0.3 * draw(ROWS, WIDTH)).clamp(max=-0.01),
        "advantages": draw(ROWS, WIDTH),
        "weights": draw(ROWS, WIDTH).abs() + 0.1,
        "rewards": draw(ROWS, WIDTH) * mask,
        "values": draw(ROWS, WIDTH),
        "baselines": draw(ROWS),
    }


def both_ways(core: Any, registry: str, name: str, call: Any) -> tuple[Any, Any]:
    held = getattr(core, registry)
    theirs = call(held[name])
    original = held[name]
    ours.register()
    assert held[name] is not original
    mine = call(held[name])
    ours.unregister()
    assert held[name] is original
    return theirs, mine


INFO = {"dp_size": 2, "batch_num_tokens": 91, "global_batch_size": 16, "loss_scale_factor": 13}


@pytest.mark.parametrize(
    ("name", "mode", "more"),
    [
        *[("vanilla", mode, {}) for mode in ours._MODES],
        *[("vanilla", mode, {"global_batch_info": INFO}) for mode in ours._MODES],
        *[(name, "token-mean", {}) for name in ours._LOSSES if name != "vanilla"],
        *[(name, "", {}) for name in ("gspo", "vanilla", "geo_mean")],
        ("gspo", "seq-mean-token-mean", {"global_batch_info": INFO}),
        ("sapo", "token-mean", {"global_batch_info": INFO}),
    ],
    ids=lambda x: x if isinstance(x, str) else "global" if x else "",
)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_policy_losses(core, name, mode, more, weighted, monkeypatch):
    if weighted and not ours._LOSSES[name].takes_weights:
        pytest.skip("stays verl's")
    x, config = batch(), actor(**more)
    leaf = x["new"].requires_grad_()
    weights = x["weights"] if weighted else None
    calls = []
    call = _native.call
    monkeypatch.setattr(_native, "call", lambda op, *args: calls.append(op.__self__.__name__) or call(op, *args))

    def graded(loss: Any) -> Any:
        value, metrics = loss(
            old_log_prob=x["old"],
            log_prob=leaf,
            advantages=x["advantages"],
            response_mask=x["mask"],
            config=config,
            rollout_is_weights=weights,
            # without one, each loss has a default of its own
            **({"loss_agg_mode": mode} if mode else {}),
        )
        return value.detach(), torch.autograd.grad(value, leaf)[0], metrics

    theirs, mine = both_ways(core, "POLICY_LOSS_REGISTRY", name, graded)
    assert calls == ["_PolicyObjective"]
    # fp32 sums of 32 tokens
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-5, atol=1e-6)
    assert mine[2] == pytest.approx(theirs[2], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_what_has_moved_too_far(core, name):
    """4,096 tokens on both sides of both bounds."""
    generator = torch.Generator().manual_seed(4)
    old, noise, a = torch.randn(3, 64, 64, generator=generator)
    old = -old.abs() - 0.1
    new = (old + 0.4 * noise).clamp(max=-0.01)
    mask = torch.ones(64, 64, dtype=torch.int64)
    results = both_ways(
        core,
        "POLICY_LOSS_REGISTRY",
        name,
        lambda loss: loss(old, new, a, mask, "token-mean", actor(clip_ratio_low=0.07)),
    )
    (want, theirs), (found, mine) = results
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert mine == pytest.approx(theirs, rel=1e-5) and 0.1 < mine["actor/pg_clipfrac"] < 0.9


@pytest.mark.parametrize("name", [name for name, loss in ours._LOSSES.items() if not loss.takes_weights])
def test_penalties_with_weights_stay(core, name):
    x = batch()
    original = core.POLICY_LOSS_REGISTRY[name]
    arguments = (x["old"], x["new"], x["advantages"], x["mask"], "token-mean", actor(), x["weights"])
    want = original(*arguments)[0]
    ours.register()
    with pytest.warns(UserWarning, match="keeps verl's own loss"):
        assert core.POLICY_LOSS_REGISTRY[name](*arguments)[0] == want


@pytest.mark.parametrize("name", list(ours._ESTIMATORS))
def test_estimators(core, name):
    x = batch()
    # in pass@k a group has two
    index = np.where(INDEX == "c", "b", INDEX) if name == "grpo_passk" else INDEX
    takes = ours._ESTIMATORS[name].takes
    given = {
        "token_level_rewards": x["rewards"],
        "response_mask": x["mask"],
        "index": index,
        "values": x["values"],
        "gamma": 0.9,
        "lam": 0.8,
        "reward_baselines": x["baselines"],
        "config": Config(gamma=0.9, norm_adv_by_std_in_grpo=True),
        "f_norm": 1.3,
    }
    found = both_ways(
        core,
        "ADV_ESTIMATOR_REGISTRY",
        name,
        lambda estimate: estimate(
            **{k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items() if k in takes}
        ),
    )
    valid = x["mask"].bool()
    for theirs, mine in zip(*found, strict=True):
        # whitening in fp32 over 32 numbers
        torch.testing.assert_close(mine[valid], theirs[valid], rtol=2e-5, atol=2e-6)
        if name != "gae":
            assert not mine[~valid].any()


@pytest.mark.parametrize("name", ["grpo", "grpo_vectorized"])
def test_grpo_without_scale(core, name):
    x = batch()
    call = lambda estimate: estimate(x["rewards"], x["mask"], INDEX, norm_adv_by_std_in_grpo=False)[0]  # noqa: E731
    torch.testing.assert_close(*both_ways(core, "ADV_ESTIMATOR_REGISTRY", name, call), rtol=1e-5, atol=1e-6)


def test_functions(core, functions):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 17, generator=generator).requires_grad_()
    labels = torch.randint(17, (4, 5), generator=generator)

    squares: list[Tensor] = []

    def everything() -> list[Tensor]:
        flat = logits.reshape(-1, 17)
        out = [
            functions.logprobs_from_logits(logits, labels),
            functions.entropy_from_logits(logits),
            functions.entropy_from_logits_with_chunking(flat, chunk_size=3),
        ]
        squares.append(functions.calculate_sum_pi_squared_from_logits(logits).detach())
        return [*out, *(torch.autograd.grad(t.square().sum(), logits)[0] for t in out)]

    theirs = everything()
    ours.register()
    for a, b in zip(theirs, everything(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(*squares, rtol=1e-5, atol=2e-6)
    assert functions.logprobs_from_logits(logits.bfloat16(), labels).dtype == torch.float32
    ours.unregister()
    assert functions.logprobs_from_logits is not ours.logprobs_from_logits


def test_fused_head(core, monkeypatch):
    """Of impl_backend=torch, without the logits."""
    head = importlib.import_module(verl_standin.FUSED).FusedLinearForPPO()
    generator = torch.Generator().manual_seed(0)
    hidden, weight = leaves = [torch.randn(*s, 8, generator=generator).requires_grad_() for s in ((4, 5), (17,))]
    ids = torch.randint(17, (4, 5), generator=generator)

    def everything() -> list[Tensor]:
        logps, entropy = head.forward(hidden_states=hidden, vocab_weights=weight, input_ids=ids, temperature=0.7)
        loss = (logps * torch.arange(5)).sum() + entropy.square().sum()
        return [logps.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]

    theirs, calls, call = everything(), [], _native.call
    monkeypatch.setattr(_native, "call", lambda op, *args: calls.append(op.__self__.__name__) or call(op, *args))
    ours.register()
    for a, b in zip(theirs, everything(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    assert calls == ["_LinearLogprobs"]


def test_functions_of_the_module(core):
    """The trainer calls some of them by name, past the registry."""
    before = core.compute_grpo_outcome_advantage
    ours.register()
    ours.register()
    assert core.compute_grpo_outcome_advantage is core.ADV_ESTIMATOR_REGISTRY["grpo"] is not before
    ours.unregister()
    ours.unregister()
    assert core.compute_grpo_outcome_advantage is before


def test_registered_again_since(core, monkeypatch):
    """A plug-in of the user's stays."""
    monkeypatch.setitem(core.POLICY_LOSS_REGISTRY, "gspo", core.POLICY_LOSS_REGISTRY["gspo"])
    ours.register()
    theirs = core.POLICY_LOSS_REGISTRY["gspo"] = lambda *_: None
    with pytest.warns(UserWarning, match="verl's gspo was registered again"):
        ours.unregister()
    assert core.POLICY_LOSS_REGISTRY["gspo"] is theirs


@pytest.mark.parametrize("what", ["loss", "estimator", "function"])
def test_another_version(core, what, monkeypatch):
    held = {"loss": core.POLICY_LOSS_REGISTRY, "estimator": core.ADV_ESTIMATOR_REGISTRY}
    before = {name: dict(registry) for name, registry in held.items()}
    if what == "loss":
        monkeypatch.delitem(core.POLICY_LOSS_REGISTRY, "gspo")
        message = "POLICY_LOSS_REGISTRY with gspo"
    elif what == "estimator":
        monkeypatch.setattr(core, "compute_rloo_outcome_advantage", lambda rewards: rewards)
        message = r"compute_rloo_outcome_advantage takes \(rewards\)"
    else:
        monkeypatch.delattr(importlib.import_module(verl_standin.FUNCTIONS), "entropy_from_logits")
        message = "has no verl.utils.torch_functional.entropy_from_logits"
    with pytest.raises(ImportError, match=message):
        ours.register()
    assert all(registry[n] is before[name][n] for name, registry in held.items() for n in registry)


def test_bad_options(core):
    ours.register()
    x = batch()
    loss = core.POLICY_LOSS_REGISTRY["vanilla"]
    arguments = (x["old"], x["new"], x["advantages"], x["mask"])
    with pytest.raises(ValueError, match="config must be given"):
        loss(*arguments)
    with pytest.raises(ValueError, match="loss_agg_mode must be one of token-mean"):
        loss(*arguments, "median", actor())
    with pytest.raises(ValueError, match=r"on 2 ranks needs global_batch_info\['batch_num_tokens'\]"):
        loss(*arguments, "token-mean", actor(global_batch_info={"dp_size": 2}))


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match="needs verl"):
        ours.register()
