"""Agreement with TRL's own code, run on stubs of its trainers: where it is right, and where it has a convention."""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

from fastpo import losses

B, T = 6, 9


class Batch:
    """Padded tokens of B pairs as TRL holds them: chosen above rejected, a prompt in front."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        lengths = torch.randint(1, T - 1, (2 * B, 1), generator=generator)
        # the first token is the prompt; log-probs are those of the next token
        self.mask = (torch.arange(T) < lengths + 1) & (torch.arange(T) > 0)
        self.shifted = self.mask[:, 1:]
        self.reference = -draw(2 * B, T - 1) * self.shifted
        self.policy = (self.reference + (draw(2 * B, T - 1) - 0.5) * self.shifted).requires_grad_()
        self.log_sum_p2 = -draw(2 * B, T - 1) * self.shifted

    def outputs(self, log_probs: Tensor) -> Any:
        zeros = torch.zeros_like(self.policy)
        return SimpleNamespace(
            log_probs=log_probs,
            log_sum_sq_probs=self.log_sum_p2,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )

    def ours(self, name: str, **more: Any) -> Tensor:
        """The mean loss of our function from the same tokens."""
        tensors = {"policy": self.policy, "reference": self.reference, "mask": self.shifted, "sums": self.log_sum_p2}
        chosen, rejected = ({name: t.split(B)[side] for name, t in tensors.items()} for side in (0, 1))
        inputs = [chosen["sums"], rejected["sums"]] if name == "wpo" else []
        inputs += [torch.zeros(())] if name == "bco_pair" else []
        out = getattr(losses, name)(
            chosen["policy"],
            rejected["policy"],
            chosen["reference"],
            rejected["reference"],
            *inputs,
            chosen_mask=chosen["mask"],
            rejected_mask=rejected["mask"],
            **more,
        )
        return out.loss

    def theirs(self, loss_type: str, beta: float, **settings: Any) -> Tensor:
        model = torch.nn.Module()
        model.is_gradient_checkpointing = False
        trainer = SimpleNamespace(
            model=model,
            ref_model=lambda **_: self.outputs(self.reference),
            accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x),
            args=SimpleNamespace(discopop_tau=settings.pop("tau", 0.05), gradient_checkpointing_kwargs=None),
            beta=beta,
            loss_types=[loss_type],
            loss_weights=[1.0],
            label_smoothing=settings.pop("label_smoothing", 0.0),
            f_divergence_type=settings.pop("divergence", "reverse_kl"),
            f_alpha_divergence_coef=settings.pop("alpha", 0.5),
            ld_alpha=settings.pop("ld_alpha", None),
            use_weighting=settings.pop("use_weighting", False),
            precompute_ref_logps=False,
            aux_loss_enabled=False,
            _metrics={"train": collections.defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        assert not settings
        inputs = {
            "input_ids": torch.zeros(2 * B, T, dtype=torch.int64),
            "attention_mask": torch.ones(2 * B, T, dtype=torch.int64),
            "completion_mask": self.mask.long(),
        }
        return DPOTrainer._compute_loss(trainer, lambda **_: self.outputs(self.policy * self.shifted), inputs, False)


def agree(batch: Batch, ours: Tensor, theirs: Tensor) -> None:
    """Losses and gradients of every token, to the roundings of fp32 sums."""
    grads = [torch.autograd.grad(loss, batch.policy, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "name", "settings", "more"),
    [
        ("sigmoid", "dpo", {}, {}),
        ("hinge", "hinge", {}, {}),
        ("ipo", "ipo", {}, {"convention": "trl"}),
        ("exo_pair", "exo_pair", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("nca_pair", "nca_pair", {}, {}),
        ("robust", "robust_dpo", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("bco_pair", "bco_pair", {}, {}),
        ("sppo_hard", "sppo_hard", {}, {}),
        ("aot", "aot", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("aot_unpaired", "aot_unpaired", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("apo_zero", "apo_zero", {}, {}),
        ("apo_down", "apo_down", {}, {}),
        ("discopop", "discopop", {"tau": 0.3}, {"tau": 0.3}),
        ("sigmoid_norm", "dpo_norm", {}, {}),
        ("sigmoid", "f_dpo", {"divergence": "forward_kl"}, {"divergence": "forward_kl"}),
        ("sigmoid", "f_dpo", {"divergence": "js_divergence"}, {"divergence": "jsd"}),
        (
            "sigmoid",
            "f_dpo",
            {"divergence": "alpha_divergence", "alpha": 0.3},
            {"divergence": "alpha", "alpha": 0.3, "convention": "trl"},
        ),
        ("sigmoid", "f_dpo", {"divergence": "alpha_divergence"}, {"divergence": "alpha"}),
        ("sigmoid", "ld_dpo", {"ld_alpha": 0.6}, {"alpha": 0.6}),
        # TRL does not clamp the weights
        ("sigmoid", "wpo", {"use_weighting": True}, {"max_weight": float("inf")}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_trainer(loss_type, name, settings, more, beta):
    batch = Batch()
    agree(batch, batch.ours(name, beta=beta, **more), batch.theirs(loss_type, beta, **settings))


@pytest.mark.parametrize(
    ("loss_type", "name", "settings", "more"),
    [
        # sums there, averages in its DPO trainer
        ("ipo", "ipo", {}, {}),
        # u^(alpha - 1) there, u^-alpha in the paper
        ("sigmoid", "f_dpo", {"divergence": "alpha_divergence", "alpha": 0.3}, {"divergence": "alpha", "alpha": 0.3}),
        # label_smoothing is not read
        ("sigmoid", "cdpo", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ],
)
def test_where_the_paper_differs(loss_type, name, settings, more):
    batch = Batch()
    ours, theirs = batch.ours(name, beta=0.3, **more), batch.theirs(loss_type, 0.3, **settings)
    assert abs(ours - theirs) > 1e-3 * abs(theirs)


def cpo_stub(**settings: Any) -> Any:
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    defaults = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5}
    return SimpleNamespace(**{**defaults, **settings}, accelerator=accelerator)


@pytest.mark.parametrize(
    ("name", "settings", "more"),
    [
        ("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.4}, {"beta": 2.0, "gamma": 1.4}),
        ("cpo", {"loss_type": "sigmoid", "beta": 0.3}, {"beta": 0.3, "alpha": 0.0}),
        ("rso_hinge", {"loss_type": "hinge", "beta": 0.3}, {"beta": 0.3}),
        (
            "alpha_po",
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.4, "alpha": 0.3},
            {"beta": 2.0, "gamma": 0.4, "alpha": 0.3},
        ),
    ],
)
def test_cpo_trainer(name, settings, more):
    """Its NLL, which is a mean over the batch's tokens, is apart from this function."""
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = (-3 * torch.rand(40, generator=generator) for _ in range(2))
    theirs, *rewards = CPOTrainer.cpo_loss(cpo_stub(**settings), chosen, rejected)
    ones = torch.ones(40, dtype=torch.int64)
    averages = {"chosen_lengths": ones, "rejected_lengths": ones} if name in ("simpo", "alpha_po") else {}
    out = getattr(losses, name)(chosen, rejected, **more, **averages, reduction="none")
    torch.testing.assert_close(out.loss, theirs, rtol=1e-5, atol=1e-6)
    if name != "alpha_po":
        torch.testing.assert_close(out.chosen_rewards, rewards[0])
        torch.testing.assert_close(out.rejected_rewards, rewards[1])


def test_orpo_trainer():
    """Its odds ratio; the NLL is ours per completion, theirs over the prompt too."""
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = (-3 * torch.rand(40, generator=generator) for _ in range(2))
    theirs, *_ = ORPOTrainer.odds_ratio_loss(cpo_stub(beta=0.4), chosen, rejected)
    ones = torch.ones(40, dtype=torch.int64)
    out = losses.orpo(chosen, rejected, lambda_=0.4, chosen_lengths=ones, rejected_lengths=ones, reduction="none")
    torch.testing.assert_close(out.loss, -chosen - theirs, rtol=1e-5, atol=1e-6)
