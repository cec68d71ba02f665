"""Liger's signatures and numbers, against Liger itself."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo.integrations import liger as ours

liger = pytest.importorskip("liger_kernel.chunked_loss")
functions = pytest.importorskip("liger_kernel.chunked_loss.functional")

pytestmark = pytest.mark.once

B, T, H, V = 4, 6, 8, 23
NAMES = ["DPO", "CPO", "SimPO", "ORPO", "KTO", "GRPO", "JSD"]


def leaves(dtype: torch.dtype = torch.float32, rows: int = 2 * B) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    out = {"hidden": draw(rows, T, H).requires_grad_(), "weight": draw(V, H).requires_grad_()}
    out |= {"bias": draw(V).requires_grad_(), "ref_hidden": draw(rows, T, H), "ref_weight": draw(V, H)}
    target = torch.randint(V, (rows, T), generator=generator)
    lengths = torch.tensor([6, 2, 4, 1] * (rows // 4))
    out |= {"target": target.masked_fill(torch.arange(T) >= lengths[:, None], -100), "ref_bias": draw(V)}
    return out


def compared(name: str, options: dict[str, Any], *tensors: Any, skip: int = 0, scale: float = 0.7, **more: Any) -> None:
    """Loss, metrics and gradients; `scale` is the upstream gradient. fp32 sums of 23 logits and 48 tokens."""
    found = []
    for library, own in ((liger, {"compiled": False}), (ours, {})):
        loss, metrics = getattr(library, f"LigerFusedLinear{name}Loss")(**options, **own)(*tensors, **more)
        wanted = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
        grads = torch.autograd.grad(scale * loss, wanted)
        found.append([loss.detach(), *(m.detach().float() for m in metrics), *grads])
    assert len(found[0]) == len(found[1])
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    """Names, order and defaults of constructors, calls and functions."""

    def parameters(function: Any, drop: int) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in list(inspect.signature(function).parameters.values())[drop:]]

    theirs, mine = (getattr(library, f"LigerFusedLinear{name}Loss") for library in (liger, ours))
    assert parameters(mine.__init__, 1) == parameters(theirs.__init__, 1)
    assert parameters(mine.forward, 1) == parameters(theirs.forward, 1)
    function = getattr(functions, f"liger_fused_linear_{name.lower()}").__self__
    # but for ctx
    assert parameters(getattr(ours, f"liger_fused_linear_{name.lower()}"), 0) == parameters(function.forward, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "hinge"},
        {"loss_type": "exo_pair", "label_smoothing": 0.1},
        {"loss_type": "nca_pair"},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "bco_pair"},
        {"loss_type": "sppo_hard"},
        {"loss_type": "apo_zero"},
        {"loss_type": "apo_down"},
        {"loss_type": "discopop", "discopop_tau": 0.3},
        {"compute_nll_loss": True, "alpha": 0.4, "average_log_prob": True},
        {"use_ref_model": False, "beta": 0.3},
    ],
    ids=lambda o: o.get("loss_type", ", ".join(o)),
)
def test_dpo(options):
    x = leaves()
    compared(
        "DPO",
        options,
        x["weight"],
        x["hidden"],
        x["target"],
        x["bias"],
        x["ref_hidden"],
        x["ref_weight"],
        x["ref_bias"],
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CPO", {"beta": 0.3}),
        ("CPO", {"label_smoothing": 0.1, "average_log_prob": True, "alpha": 0.3}),
        ("SimPO", {"beta": 2.0, "gamma": 1.4, "compute_nll_loss": False}),
        ("SimPO", {"beta": 2.0, "label_smoothing": 0.2, "alpha": 0.5}),
        ("ORPO", {"beta": 0.4}),
        ("ORPO", {"compute_nll_loss": False}),
    ],
    ids=str,
)
def test_without_reference(name, options):
    x = leaves()
    compared(name, options, x["weight"], x["hidden"], x["target"], x["bias"])


def test_orpo_nll_target():
    """The labels of the likelihood are others than those of the odds."""
    x = leaves()
    others = torch.where(torch.arange(T) < 5, torch.arange(T) + 3, -100).expand(2 * B, T).contiguous()
    compared("ORPO", {}, x["weight"], x["hidden"], x["target"], None, others)


@pytest.mark.parametrize("options", [{"use_ref_model": True}, {"beta": 0.4, "average_log_prob": True}], ids=str)
def test_kto(options):
    x = leaves()
    labels = torch.arange(2 * B) % 3 > 0
    reference = x["ref_hidden"], x["ref_weight"], x["ref_bias"]
    compared("KTO", options, x["hidden"], x["weight"], x["target"], x["bias"], labels, *reference, torch.tensor(0.3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "delta": 1.5, "use_bias_correction_kl": True, "temperature": 0.8},
        {"loss_type": "bnpo", "beta": 0.0},
        {"loss_type": "dr_grpo", "max_completion_length": 9},
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"loss_type": "sapo"},
        {"loss_type": "vespo"},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.06},
        {"use_ref_model": False},
        {"ratio": 2},
        {"ratio": 1, "num_items": 50},
        {"by_hidden": True, "loss_type": "grpo"},
    ],
    ids=str,
)
def test_grpo(options):
    x = leaves()
    generator = torch.Generator().manual_seed(1)
    options = dict(options)
    ratio, num_items, by_hidden = (options.pop(n, None) for n in ("ratio", "num_items", "by_hidden"))
    mask = (x["target"] >= 0).long()
    ids = x["target"].clamp(min=0)
    # near the policy's own, so that not all is clipped
    base = torch.log_softmax((x["hidden"] @ x["weight"].T + x["bias"]).detach() / options.get("temperature", 1.0), -1)
    base = base.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    old, reference = (base + 0.2 * torch.randn(2 * B, T, generator=generator) for _ in range(2))
    advantages = torch.randn(2 * B, generator=generator)
    weights = None
    if ratio is not None:
        weights = torch.rand(2 * B, T, generator=generator) if ratio == 2 else torch.rand(2 * B, generator=generator)
    compared(
        "GRPO",
        options,
        x["hidden"],
        x["weight"],
        ids,
        mask,
        advantages,
        x["bias"],
        None if by_hidden else reference,
        old,
        x["ref_hidden"],
        x["ref_weight"],
        x["ref_bias"],
        vllm_is_ratio=weights,
        num_items_in_batch=num_items,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.0, "temperature": 2.0},
        {"beta": 1.0, "weight_hard_loss": 0.0},
        {"beta": 0.2, "chunk_size": 7, "return_soft_hard_loss": True, "weight_soft_loss": 0.8},
        {"wider": True},
    ],
    ids=str,
)
def test_jsd(options):
    x = leaves()
    options = dict(options)
    weight = x["weight"].detach()[: V - 4].clone().requires_grad_() if options.pop("wider", False) else x["weight"]
    bias = x["bias"].detach()[: len(weight)].clone().requires_grad_()
    hidden, teacher, labels = x["hidden"].reshape(-1, H), x["ref_hidden"].reshape(-1, H), x["target"].reshape(-1)
    labels = torch.where(labels < len(weight), labels, -100)
    found = []
    for library, own in ((liger, {"compiled": False}), (ours, {})):
        out = library.LigerFusedLinearJSDLoss(**options, **own)(
            hidden, weight, teacher, x["ref_weight"], labels, bias, x["ref_bias"]
        )
        out = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(0.7 * out[0], [x["hidden"], weight, bias], retain_graph=True)
        found.append([*(o.detach() for o in out), *grads])
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=5e-6)


def test_jsd_sums_the_weights_gradient_in_fp32():
    """Over 48 blocks of one row: bf16 products, of which each is rounded, and a sum that is not."""
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        x = {name: t.detach().to(dtype) for name, t in leaves(torch.bfloat16).items() if t.is_floating_point()}
        weight, labels = x["weight"].requires_grad_(), leaves()["target"].reshape(-1)
        hidden, teacher = x["hidden"].reshape(-1, H), x["ref_hidden"].reshape(-1, H)
        loss = ours.LigerFusedLinearJSDLoss(chunk_size=1)(hidden, weight, teacher, x["ref_weight"], labels)
        found.append(torch.autograd.grad(loss, weight)[0].double())
    assert (found[0] - found[1]).norm() < 2**-8 * found[1].norm()


def test_jsd_compiled():
    """In one graph."""
    torch._dynamo.reset()
    x = leaves()
    hidden, teacher, labels = x["hidden"].reshape(-1, H), x["ref_hidden"].reshape(-1, H), x["target"].reshape(-1)
    module = ours.LigerFusedLinearJSDLoss(chunk_size=20)
    found = []
    for loss in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        value = loss(hidden, x["weight"], teacher, x["ref_weight"], labels, x["bias"], x["ref_bias"])
        wanted = [x["hidden"], x["weight"], x["bias"]]
        found.append([value.detach(), *torch.autograd.grad(value, wanted, retain_graph=True)])
    torch.testing.assert_close(found[1], found[0])


def test_options_are_attributes():
    """What is set afterwards counts, as with Liger's modules."""
    x = leaves()
    module = ours.LigerFusedLinearCPOLoss(beta=0.3)
    assert (module.beta, module.alpha, module.compiled, module.chunk_size) == (0.3, 1.0, True, 1)
    module.beta = 0.7
    arguments = x["weight"], x["hidden"], x["target"]
    assert module(*arguments)[0] == ours.LigerFusedLinearCPOLoss(beta=0.7)(*arguments)[0]


def test_functions_and_second_backward():
    """As autograd functions they are called by place; a frozen head, fp64 and gradgradcheck's domain work."""
    x = leaves(torch.float64)
    reference = x["ref_hidden"], x["ref_weight"], x["ref_bias"]
    loss, _ = ours.liger_fused_linear_dpo(
        x["hidden"], x["weight"].detach(), x["target"], x["bias"], *reference, -100, 0.1, True, False
    )
    assert loss.dtype == torch.float64
    once = torch.autograd.grad(loss, x["hidden"], retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(3 * loss, x["hidden"])[0], 3 * once)


def test_bf16():
    """Gradients come in the inputs' dtype, losses in fp32."""
    x = leaves(torch.bfloat16)
    loss, metrics = ours.LigerFusedLinearSimPOLoss()(x["weight"], x["hidden"], x["target"])
    assert loss.dtype == metrics[0].dtype == torch.float32
    assert {g.dtype for g in torch.autograd.grad(loss, [x["weight"], x["hidden"]])} == {torch.bfloat16}


def test_nothing_counts():
    """Liger divides 0 by 0; here the loss is that of log-ratios 0."""
    x = leaves()
    nothing = torch.full_like(x["target"], -100)
    loss, _ = ours.LigerFusedLinearDPOLoss(compute_nll_loss=True)(
        x["weight"], x["hidden"], nothing, None, x["ref_hidden"], x["ref_weight"]
    )
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    assert not torch.autograd.grad(loss, x["hidden"])[0].any()


@pytest.mark.parametrize("more", [{"beta": 0.04}, {"beta": 0.0}], ids=str)
def test_luspo_does_not_see_padding(more):
    """Liger's, with a penalty, does: its mean is over a width, not over sequences."""
    x = leaves()
    mask, ids = (x["target"] >= 0).long(), x["target"].clamp(min=0)
    advantages = torch.linspace(-1, 1, 2 * B)
    logps = torch.full((2 * B, T), -3.0)
    found = {}
    for library, own in ((liger, {"compiled": False}), (ours, {})):
        for pad in (0, 3):
            wide = [torch.nn.functional.pad(t, (0, pad)) for t in (ids, mask)]
            loss = library.LigerFusedLinearGRPOLoss(
                loss_type="luspo", importance_sampling_level="sequence", **more, **own
            )
            hidden = torch.nn.functional.pad(x["hidden"], (0, 0, 0, pad))
            old = torch.nn.functional.pad(logps, (0, pad))
            found[library is ours, pad] = loss(hidden, x["weight"], *wide, advantages, None, old, old)[0]
    torch.testing.assert_close(found[True, 0], found[True, 3])
    assert (abs(found[False, 0] - found[False, 3]) > 1e-3) == (more["beta"] > 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DPO", {"label_smoothing": 0.1}, "Liger ignores it"),
        ("DPO", {"loss_type": "ipo"}, "loss_type must be one of sigmoid"),
        ("DPO", {"loss_type": "exo_pair"}, "label_smoothing must be positive"),
        ("DPO", {"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ("GRPO", {"loss_type": "ppo"}, "loss_type must be one of grpo"),
        ("GRPO", {"loss_type": "dr_grpo"}, "needs max_completion_length"),
        ("GRPO", {"loss_type": "cispo"}, "epsilon_high is the cap"),
        ("GRPO", {"loss_type": "sapo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ("GRPO", {"importance_sampling_level": "word"}, "importance_sampling_level must be"),
        ("GRPO", {"delta": 1.1}, "delta must be above"),
        ("GRPO", {"delta": 2.0, "loss_type": "sapo"}, "delta=2 has no meaning for loss_type='sapo'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(ours, f"LigerFusedLinear{name}Loss")(**options)


def test_what_is_missing():
    x = leaves()
    with pytest.raises(ValueError, match="needs ref_input and ref_weight"):
        ours.LigerFusedLinearDPOLoss()(x["weight"], x["hidden"], x["target"])
    with pytest.raises(ValueError, match="preference_labels must be given"):
        ours.LigerFusedLinearKTOLoss()(x["hidden"], x["weight"], x["target"])
    mask = x["target"] >= 0
    with pytest.raises(ValueError, match="needs ref_per_token_logps, or"):
        ours.LigerFusedLinearGRPOLoss()(x["hidden"], x["weight"], x["target"].clamp(min=0), mask, torch.ones(2 * B))
    with pytest.raises(ValueError, match="beta must be in"):
        ours.LigerFusedLinearJSDLoss(beta=2.0)(x["hidden"][0], x["weight"], x["hidden"][0], x["weight"], x["target"][0])
