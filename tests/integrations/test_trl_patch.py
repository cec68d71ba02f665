"""TRL's own trainers, patched and unpatched: equal losses, by our ops."""

from __future__ import annotations

import collections
import functools
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl
from trl.trainer import utils

import fastpo
from fastpo.integrations import trl as ours
from fastpo.kernels import _native
from tests.training.conftest import character_tokenizer, tiny_model, tiny_reward_model

pytestmark = pytest.mark.once

STEPS = 2
WORDS = ["ab", "b c", "cad", "dd e", "ea", "f g h", "gg", "h"]


@pytest.fixture
def ops(monkeypatch):
    """How often each of our kernels is called."""
    counts: collections.Counter[str] = collections.Counter()
    call = _native.call

    def counted(op: Any, *args: Any) -> Any:
        counts[op.__self__.__name__.strip("_")] += 1
        return call(op, *args)

    monkeypatch.setattr(_native, "call", counted)
    return counts


@pytest.fixture(autouse=True)
def as_it_was():
    threads = torch.get_num_threads()
    # models of a few kilobytes
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    ours.unpatch()


@pytest.fixture(scope="module")
def tokenizer():
    out = character_tokenizer(eos_token="[E]", pad_token=".")
    out.chat_template = None
    return out


def prompts(kind: str) -> datasets.Dataset:
    rows = [{"prompt": w + " ", "chosen": w + "a" * (i % 4), "rejected": "b" + w} for i, w in enumerate(WORDS)]
    if kind == "kto":
        rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 > 0} for i, r in enumerate(rows)]
    if kind in ("grpo", "rloo", "distillation"):
        rows = [{"prompt": r["prompt"]} for r in rows]
    return datasets.Dataset.from_list(rows)


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(c.count("a")) - 0.3 * c.count("b") + 0.1 * (i % 3) for i, c in enumerate(completions)]


def run(kind: str, tokenizer: Any, folder: Any, peft: bool = False, **options: Any) -> list[dict[str, Any]]:
    """What a trainer of TRL logs of each step."""
    vocabulary = len(tokenizer)
    common = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    if kind in ("grpo", "rloo"):
        common |= {"max_completion_length": 6, "num_generations": 2, "gradient_checkpointing": False}
    if kind == "distillation":
        common |= {"max_completion_length": 6, "gradient_checkpointing": False}
    if kind == "reward":
        # an accuracy that is not of the padding
        model = tiny_reward_model(vocabulary, pad=tokenizer.pad_token_id)
    else:
        # a folder, since the reference is loaded from it again
        saved = tiny_model(vocabulary)
        saved.generation_config.eos_token_id = tokenizer.eos_token_id
        saved.save_pretrained(folder / "model")
        model = type(saved).from_pretrained(folder / "model")
    name = {"reward": "Reward", "distillation": "Distillation"}.get(kind, kind.upper())
    args = getattr(trl, f"{name}Config")(**{**common, **options})
    more: dict[str, Any] = {"reward_funcs": length_reward} if kind in ("grpo", "rloo") else {}
    if kind == "distillation":
        more["teacher_model"] = tiny_model(vocabulary, seed=5)
    if "eval_steps" in options:
        more["eval_dataset"] = prompts(kind)
    if peft:
        # its reference is the policy without its adapter
        more["peft_config"] = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    trainer = getattr(trl, f"{name}Trainer")(
        model=model, args=args, train_dataset=prompts(kind), processing_class=tokenizer, **more
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    return [*logged, {"weights": weights}]


# wall-clock; and at the first step the policy is the reference, so that rewards are ties but for rounding
LEFT_OUT = ("runtime", "per_second", "step_time", "rewards/accuracies")


def same(theirs: list[dict[str, Any]], mine: list[dict[str, Any]]) -> None:
    """fp32 losses of a few dozen tokens, through steps of Adam: 1e-2 of a step's 1e-2 in the weights."""
    assert len(theirs) == len(mine) > STEPS
    torch.testing.assert_close(mine[-1]["weights"], theirs[-1]["weights"], rtol=0, atol=1e-4)
    for a, b in zip(theirs[:-1], mine[:-1], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not any(t in key for t in LEFT_OUT):
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize(
    ("kind", "options", "kernel"),
    [
        ("dpo", {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [1.0, 0.5, 0.2]}, "Objective"),
        ("dpo", {"precompute_ref_log_probs": True, "loss_type": "apo_zero"}, "Objective"),
        ("dpo", {"peft": True, "eval_strategy": "steps", "eval_steps": 1}, "Objective"),
        ("kto", {"undesirable_weight": 0.7}, "Objective"),
        ("kto", {"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True}, "Objective"),
        ("grpo", {"gradient_accumulation_steps": 2}, "PolicyObjective"),
        ("grpo", {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "delta": 1.5}, "PolicyObjective"),
        ("rloo", {"beta": 0.1, "num_iterations": 2}, "PolicyObjective"),
        ("reward", {"center_rewards_coefficient": 0.1}, "Objective"),
        ("distillation", {"beta": 0.3}, "VocabDivergence"),
    ],
    ids=lambda x: x if isinstance(x, str) else ", ".join(x),
)
def test_trainers(kind, options, kernel, tokenizer, tmp_path, ops):
    theirs = run(kind, tokenizer, tmp_path, **options)
    assert not ops
    with ours.patch():
        mine = run(kind, tokenizer, tmp_path, **options)
    same(theirs, mine)
    assert ops[kernel] >= STEPS
    assert ops["LinearLogprobs"] >= (0 if kind in ("reward", "distillation") else STEPS)


B, T = 6, 9


class Model(torch.nn.Module):
    """Returns what it is given, as TRL's fused head returns it."""

    is_gradient_checkpointing = False

    def __init__(self, **outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, **_: Any) -> Any:
        return utils.FusedCausalLMOutput(**self.outputs)


def accelerator() -> Any:
    return types.SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, **_: x,
        num_processes=1,
        sync_gradients=True,
    )


def tokens(seed: int, rows: int = 2 * B) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T - 1, (rows, 1), generator=generator)
    # the first token is the prompt; log-probs are those of the next token
    mask = (torch.arange(T) < lengths + 1) & (torch.arange(T) > 0)
    shifted = mask[:, 1:]
    names = ("reference", "policy", "log_sum_p2", "entropy", "old", "sampled")
    out = {name: -torch.rand(rows, T - 1, generator=generator) * shifted for name in names}
    return {**out, "mask": mask, "shifted": shifted, "advantages": torch.randn(rows, generator=generator)}


def dpo_trainer(batch: dict[str, Tensor], loss_type: str, **options: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    zeros = torch.zeros_like(batch["policy"])
    rest = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool(), "log_sum_sq_probs": batch["log_sum_p2"]}
    settings = {"beta": 0.3, "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False, "tau": 0.3}
    settings |= {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, **options}
    policy = Model(log_probs=batch["policy"], **rest)
    trainer = types.SimpleNamespace(
        model=policy,
        ref_model=Model(log_probs=batch["reference"], **rest),
        accelerator=accelerator(),
        args=types.SimpleNamespace(discopop_tau=settings.pop("tau"), gradient_checkpointing_kwargs=None),
        loss_types=[loss_type],
        loss_weights=[1.0],
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    inputs = {
        "input_ids": torch.zeros(2 * B, T, dtype=torch.int64),
        "attention_mask": torch.ones(2 * B, T, dtype=torch.int64),
        "completion_mask": batch["mask"].long(),
    }
    return trainer, policy, inputs


def both_ways(loss: Any, leaf: Tensor, **patching: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Loss and gradient by TRL, and patched."""

    def graded() -> tuple[Tensor, Tensor]:
        value = loss()
        return value.detach(), torch.autograd.grad(value, leaf, retain_graph=True)[0]

    theirs = graded()
    with ours.patch(**patching):
        return theirs, graded()


def close(theirs: tuple[Tensor, Tensor], mine: tuple[Tensor, Tensor]) -> None:
    """To the roundings of fp32 sums."""
    torch.testing.assert_close(mine[0], theirs[0], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(mine[1], theirs[1], rtol=2e-5, atol=1e-6)


def dpo_both(loss_type: str, options: dict[str, Any], **patching: Any) -> Any:
    batch = tokens(5)
    leaf = batch["policy"].requires_grad_()
    batch["policy"] = leaf * batch["shifted"]
    trainer, model, inputs = dpo_trainer(batch, loss_type, **options)
    step = lambda: trl.DPOTrainer._compute_loss(trainer, model, inputs, False)  # noqa: E731
    return both_ways(step, leaf, **patching)


DPO = [
    ("sigmoid", {}),
    ("hinge", {}),
    ("ipo", {}),
    ("exo_pair", {"label_smoothing": 0.1}),
    ("nca_pair", {}),
    ("robust", {"label_smoothing": 0.1}),
    ("bco_pair", {}),
    ("sppo_hard", {}),
    ("aot", {"label_smoothing": 0.1}),
    ("aot_unpaired", {}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("discopop", {}),
    ("sft", {}),
    ("sigmoid_norm", {}),
    ("sigmoid", {"f_divergence_type": "forward_kl"}),
    ("sigmoid", {"f_divergence_type": "js_divergence"}),
    ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    ("sigmoid", {"ld_alpha": 0.6}),
    ("sigmoid", {"use_weighting": True}),
]


@pytest.mark.parametrize(("loss_type", "options"), DPO, ids=lambda x: x if isinstance(x, str) else ", ".join(x))
def test_dpo_losses(loss_type, options, ops):
    close(*dpo_both(loss_type, options))
    assert ops["Objective"] == (loss_type != "sft")


def test_what_ours_lack_stays_trls(ops):
    with pytest.warns(UserWarning, match="ld_alpha=0.6 keeps TRL's own loss"):
        close(*dpo_both("hinge", {"ld_alpha": 0.6}))
    assert not ops


@pytest.mark.parametrize(
    ("loss_type", "options", "message"),
    [
        ("sigmoid", {"label_smoothing": 0.1}, r"does not read label_smoothing=0.1 .*patch\(fix=True\)"),
        ("apo_zero", {"f_divergence_type": "forward_kl"}, "does not read f_divergence_type='forward_kl'"),
        ("sft", {"ld_alpha": 0.5}, "does not read ld_alpha=0.5"),
    ],
)
def test_options_that_trl_ignores(loss_type, options, message):
    with pytest.raises(ValueError, match=message):
        dpo_both(loss_type, options)


@pytest.mark.parametrize(
    ("loss_type", "options", "name", "more"),
    [
        ("sigmoid", {"label_smoothing": 0.1}, "cdpo", {"label_smoothing": 0.1}),
        (
            "sigmoid",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
            "f_dpo",
            {"divergence": "alpha", "alpha": 0.3},
        ),
        ("sppo_hard", {}, "sppo", {}),
        ("bco_pair", {}, "bco_pair", {}),
    ],
)
def test_fix(loss_type, options, name, more, capsys):
    theirs, mine = dpo_both(loss_type, options, fix=True)
    printed = capsys.readouterr().out
    assert all(change in printed for change in ours.FIXES.values())
    batch = tokens(5)
    chosen, rejected = batch["shifted"].split(B)
    models = [t for key in ("policy", "reference") for t in batch[key].split(B)]
    extra: list[Tensor] = []
    if name == "sppo":
        extra = [torch.ones(B), torch.zeros(B)]
    if name == "bco_pair":
        a, b, ref_a, ref_b = (t.sum(1) for t in models)
        extra = [(0.3 * (a - ref_a)).mean() / 2 + (0.3 * (b - ref_b)).mean() / 2]
    want = getattr(fastpo.losses, name)(*models, *extra, beta=0.3, chosen_mask=chosen, rejected_mask=rejected, **more)
    torch.testing.assert_close(mine[0], want.loss, rtol=2e-5, atol=1e-6)
    assert abs(mine[0] - theirs[0]) > 1e-4 * abs(theirs[0])


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_fix_sorts_over_all_ranks(loss_type, monkeypatch):
    """What that changes with several is in tests/losses/test_ranks.py."""
    groups = []
    sort = getattr(fastpo.losses, loss_type)
    monkeypatch.setattr(ours, "_distributed", lambda: True)
    monkeypatch.setattr(
        ours.losses,
        loss_type,
        lambda *args, process_group, **kwargs: groups.append(process_group) or sort(*args, **kwargs),
    )
    for fix in (False, True):
        dpo_both(loss_type, {}, fix=fix)
    assert groups == [None, True]


GRPO = [
    {"loss_type": "grpo", "beta": 0.1},
    {"loss_type": "bnpo", "delta": 1.5},
    {"loss_type": "dr_grpo", "beta": 0.1, "kl_corrected": True},
    {"loss_type": "dapo"},
    {"loss_type": "cispo", "epsilon_high": 1.3},
    {"loss_type": "sapo", "beta": 0.1},
    {"loss_type": "luspo", "beta": 0.1},
    {"loss_type": "vespo"},
    {"loss_type": "luspo", "level": "sequence"},
    {"loss_type": "dapo", "level": "sequence", "beta": 0.1, "kl_corrected": True},
    {"loss_type": "grpo", "off_policy": 0.05},
    {"loss_type": "grpo", "quantile": 0.5, "beta": 0.1},
    {"loss_type": "dapo", "sampler": True, "beta": 0.1},
    {"loss_type": "grpo", "sampler": True, "off_policy": 0.05, "training": False},
    {"loss_type": "luspo", "sampler": "sequence", "level": "sequence"},
    {"loss_type": "cispo", "epsilon_high": 1.3, "sampler": "sequence", "beta": 0.1},
    {"loss_type": "dapo", "bonus": 0.2, "quantile": 0.5},
    {"loss_type": "grpo", "bonus": 0.2, "adaptive": True},
]


def grpo_both(case: dict[str, Any]) -> Any:
    batch = tokens(7, B)
    batch["shifted"][2] = False
    batch["old"] = batch["old"] - case.get("far", 0.0)
    mask = batch["shifted"].long()
    leaf = batch["policy"].requires_grad_()
    policy = trl.GRPOTrainer
    sampler = case.get("sampler", False)
    model = torch.nn.Module().train(case.get("training", True))
    mode = "train" if model.training else "eval"
    names = ["get_gamma_weights", "get_off_policy_mask", "get_high_entropy_mask"]
    trainer = types.SimpleNamespace(
        model=model,
        accelerator=accelerator(),
        args=types.SimpleNamespace(
            delta=case.get("delta"),
            use_bias_correction_kl=case.get("kl_corrected", False),
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
            steps_per_generation=4,
            entropy_target=10.0,
            entropy_coef_delta=0.0,
            entropy_coef_min=0.0,
            entropy_coef_max=1.0,
        ),
        loss_type=case["loss_type"],
        importance_sampling_level=case.get("level", "token"),
        epsilon_low=0.1,
        epsilon_high=case.get("epsilon_high", 0.15),
        beta=case.get("beta", 0.0),
        top_entropy_quantile=case.get("quantile", 1.0),
        off_policy_mask_threshold=case.get("off_policy"),
        _entropy_bonus_enabled="bonus" in case,
        use_adaptive_entropy=case.get("adaptive", False),
        entropy_coef=case.get("bonus", 0.0),
        _last_world_entropy=0.1,
        _entropy_window_stats=None,
        use_vllm=sampler,
        vllm_importance_sampling_correction=sampler,
        current_gradient_accumulation_steps=2,
        max_completion_length=11,
        aux_loss_enabled=True,
        router_aux_loss_coef=0.1,
        _metrics={mode: collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=None,
    )
    for name in names:
        function = getattr(policy, name)
        bound = isinstance(vars(policy)[name], staticmethod)
        setattr(trainer, name, function if bound else functools.partial(function, trainer))

    class Trainer(types.SimpleNamespace):
        def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> Any:
            return leaf, -batch["entropy"] * (1 + leaf), leaf.sum() * 0.01

    del trainer._get_per_token_logps_and_entropies
    trainer = Trainer(**vars(trainer))
    ids = torch.zeros(B, T - 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(B, 1, dtype=torch.int64),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old"],
        "ref_per_token_logps": batch["reference"],
        "num_items_in_batch": torch.tensor(70),
    }
    if sampler:
        logratio = batch["old"] - batch["sampled"]
        logratio = logratio.sum(1, keepdim=True) if sampler == "sequence" else logratio
        # truncated, or masked where it is far
        inputs["importance_sampling_ratio"] = logratio.exp().clamp(max=1.2).masked_fill(logratio < -0.5, 0)
        inputs["sampling_per_token_logps"] = batch["sampled"].clone()
        inputs["sampling_per_token_logps"][0, 0] = torch.nan
    return both_ways(lambda: policy._compute_loss(trainer, None, inputs), leaf)


@pytest.mark.parametrize("case", GRPO, ids=lambda c: ", ".join(f"{v}" for v in c.values()))
def test_grpo_losses(case, ops):
    close(*grpo_both(case))
    assert ops["PolicyObjective"] == 1


def test_far_log_ratios_stay_trls(ops):
    """Ours are cut at 20; TRL's exponential is not."""
    with pytest.warns(UserWarning, match="log-ratios above 20 keeps TRL's own loss"):
        close(*grpo_both({"loss_type": "grpo", "far": 25.0}))
    assert not ops


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"loss_type": "new"}, "loss_type='new'"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "'sapo' and importance_sampling_level"),
        ({"loss_type": "cispo"}, "epsilon_high=0.2, a cap on the ratio below 1"),
        ({"delta": 1.1}, "delta=1.1"),
        ({"delta": 2.0, "importance_sampling_level": "sequence"}, "delta=2"),
        ({"epsilon_low": 1.5}, "epsilon=1.5"),
        ({"loss_type": "vespo", "ratio": torch.ones(1)}, "importance ratios of the sampler"),
        ({"loss_type": "sapo", "delta": 2.0}, ValueError("does not read delta=2 with loss_type='sapo'")),
        ({}, None),
    ],
    ids=str,
)
def test_what_grpo_leaves_to_trl(change, why):
    defaults = {"loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2}
    settings = {"delta": None, "ratio": None, **defaults, **change}
    args = types.SimpleNamespace(delta=settings.pop("delta"))
    inputs = {"importance_sampling_ratio": settings.pop("ratio")}
    trainer = types.SimpleNamespace(args=args, **settings)
    if isinstance(why, ValueError):
        with pytest.raises(ValueError, match=str(why)):
            ours._check_grpo(trainer, inputs)
    else:
        found = ours._check_grpo(trainer, inputs)
        assert found is None if why is None else why in found


@pytest.mark.parametrize("fix", [False, True])
def test_rewards_in_half_precision(fix):
    """TRL's loss of bf16 scores is bf16; `fix` leaves it in fp32."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    scores = torch.linspace(-1, 2, 2 * B).bfloat16()
    model = torch.nn.Module()
    model.forward = lambda **_: SequenceClassifierOutput(logits=scores.unsqueeze(-1))
    trainer = types.SimpleNamespace(
        model=model,
        accelerator=accelerator(),
        args=types.SimpleNamespace(center_rewards_coefficient=0.1),
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    step = lambda: trl.RewardTrainer.compute_loss(trainer, model, {"attention_mask": torch.ones(1)})  # noqa: E731
    theirs = step()
    with ours.patch(fix=fix):
        mine = step()
    assert theirs.dtype == torch.bfloat16 and mine.dtype == (torch.float32 if fix else torch.bfloat16)
    torch.testing.assert_close(mine.float(), theirs.float(), rtol=2**-6, atol=0)


def test_functions_of_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 17, generator=generator).requires_grad_()
    index = torch.randint(17, (3, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [0], [2]])
    up = torch.randn(3, 5, generator=generator)

    def everything() -> list[Tensor]:
        logps, entropy = utils.selective_log_softmax_and_entropy(logits, index, temperature=0.7, row_mask=mask)
        out = [
            utils.selective_log_softmax(logits, index, 0.7),
            utils.selective_log_softmax(logits, index, row_mask=mask),
            utils.selective_log_softmax(logits, index.unsqueeze(-1).expand(3, 5, 4)).sum(-1),
            utils.entropy_from_logits(logits, chunk_size=3),
            logps,
            entropy,
        ]
        assert not utils.selective_log_softmax_and_entropy(logits, index, False)[1].requires_grad
        half = utils.selective_log_softmax(logits.bfloat16(), index)
        assert half.dtype == utils.entropy_from_logits(logits.bfloat16()).dtype == torch.bfloat16
        return [*out, *(torch.autograd.grad(t, logits, up, retain_graph=True)[0] for t in out)]

    theirs = everything()
    with ours.patch():
        mine = everything()
        with pytest.raises(ValueError, match="temperature must be positive"):
            utils.selective_log_softmax(logits, index, 0.0)
    # sums over 17 logits in fp32
    for a, b in zip(theirs, mine, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-6)
    with ours.patch(fix=True):
        assert utils.selective_log_softmax(logits.bfloat16(), index).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
def test_fused_head(dtype, ops):
    """All outputs, softcap, scale, bias and temperature; without any label the gradient is 0."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    dtype = torch.float32 if dtype == "autocast" else dtype
    heads = utils._ChunkedLogProbFunction
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 8), (19, 8), (19,)]
    hidden, weight, bias = leaves = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    targets = torch.randint(19, (7,), generator=generator)

    def everything() -> list[Tensor]:
        options = (0.8, 16, 30.0, 0.5, ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
        with autocast:
            logps, entropy, *others = utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *options)
        grads = torch.autograd.grad((logps * torch.arange(7)).sum() + entropy.sum(), leaves)
        return [logps, entropy, *others, *grads]

    theirs = everything()
    with ours.patch():
        assert utils._ChunkedLogProbFunction is not heads
        mine = everything()
        out = utils._ChunkedLogProbFunction.apply(hidden[:0], weight, bias, targets[:0], 1.0, 16, None, 1.0, ())
        assert out[1:] == (None,) * 4
        assert not any(g.any() for g in torch.autograd.grad(out[0].sum(), leaves))
    assert utils._ChunkedLogProbFunction is heads and ops["LinearLogprobs"] == 2
    # bf16 logits are rounded by both, but not at the same places: a few eps of the largest term
    rounded = dtype != torch.float32 or autocast._enabled
    tolerance = {"rtol": 4e-2, "atol": 4e-2} if rounded else {}
    for a, b in zip(theirs, mine, strict=True):
        torch.testing.assert_close(b, a, **tolerance)


DIVERGENCES = [
    {"beta": 0.0, "student_final_logit_softcapping": 2.0},
    {"beta": 1.0, "teacher_logit_scale": 0.5, "temperature": 0.7},
    {"beta": 0.3, "student_logit_scale": 2.0, "teacher_final_logit_softcapping": 3.0},
]


@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda o: f"{o['beta']:g}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergences(options, dtype, ops, monkeypatch):
    """Of a student and a wider teacher, in blocks of rows; without any row the gradient is 0."""
    from trl.trainer import distillation_trainer

    monkeypatch.setattr(sys.modules["fastpo.kernels.linear_divergence"], "_LOGITS", {"cpu": 4 * 19})
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 8), (19, 8), (19,), (7, 12), (19, 12), (19,)]
    heads = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    leaves = [t.requires_grad_() for t in heads[:3]]
    order = ("temperature", "student_logit_scale", "student_final_logit_softcapping")
    order += ("teacher_logit_scale", "teacher_final_logit_softcapping")
    values = {**dict.fromkeys(order, 1.0), **{n: None for n in order if "softcapping" in n}, **options}
    upstream = torch.arange(1.0, 8)

    def everything() -> list[Tensor]:
        apply = distillation_trainer.ChunkedDivergenceFunction.apply
        divergence, entropy = apply(*heads, options["beta"], *(values[name] for name in order))
        assert not entropy.requires_grad
        return [divergence.detach(), entropy, *torch.autograd.grad((divergence * upstream).sum(), leaves)]

    theirs = everything()
    with ours.patch():
        mine = everything()
        empty = [heads[0][:0], *heads[1:3], heads[3][:0], *heads[4:]]
        out = distillation_trainer.ChunkedDivergenceFunction.apply(*empty, options["beta"])
        assert not any(g.any() for g in torch.autograd.grad(out[0].sum(), leaves))
    assert ops["VocabDivergence"] > 2
    # TRL's KL is a difference of sums of some tens, in fp32; both widen bf16 before products, and round gradients
    grads = {"rtol": 5e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for i, (a, b) in enumerate(zip(theirs, mine, strict=True)):
        torch.testing.assert_close(b, a, **(grads if i > 1 else {"rtol": 2e-5, "atol": 2e-6}))


def test_second_derivative_of_a_divergence():
    head = [torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    other = torch.randn(5, 4, dtype=torch.float64)

    def divergence(hidden: Tensor, weight: Tensor) -> Tensor:
        apply = ours._Divergences(None).apply
        return apply(hidden, weight, None, other, other, None, 0.4, 0.9, 1.0, 3.0)[0]

    assert torch.autograd.gradcheck(divergence, head) and torch.autograd.gradgradcheck(divergence, head)


class Doubled(trl.DPOTrainer):
    def __init__(self, trainer: Any) -> None:
        vars(self).update(vars(trainer))

    def _compute_loss(self, *args: Any) -> Any:
        return 2 * super()._compute_loss(*args)


def test_the_context(ops):
    """An error ends it; trainers that were there before are in it, and so is what a subclass inherits."""
    names = ("DPO", "KTO", "GRPO", "RLOO", "Reward")
    before = {name: dict(vars(getattr(trl, f"{name}Trainer"))) for name in names}
    batch = tokens(5)
    trainer, model, inputs = dpo_trainer(batch, "sigmoid")
    with pytest.raises(ZeroDivisionError), ours.patch():
        mine = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
        torch.testing.assert_close(Doubled(trainer)._compute_loss(model, inputs, False), 2 * mine)
        assert ops["Objective"] == 2
        1 / 0  # noqa: B018
    for name, attributes in before.items():
        assert dict(vars(getattr(trl, f"{name}Trainer"))) == attributes
    torch.testing.assert_close(mine, trl.DPOTrainer._compute_loss(trainer, model, inputs, False))
    assert ops["Objective"] == 2 and trainer.loss_types == ["sigmoid"] and trainer.loss_weights == [1.0]


def test_replaced_by_another_since(monkeypatch):
    """Their replacement stays."""
    monkeypatch.setattr(utils, "entropy_from_logits", utils.entropy_from_logits)
    ours.patch()
    theirs = lambda logits, chunk_size=128: logits  # noqa: E731
    utils.entropy_from_logits = theirs
    with pytest.warns(UserWarning, match="entropy_from_logits was replaced again since fastpo did"):
        ours.unpatch()
    assert utils.entropy_from_logits is theirs


def test_names_imported_elsewhere(monkeypatch):
    """Modules that imported a function by name, before the patch and during it."""
    original = utils.selective_log_softmax
    for name in ("before", "during"):
        monkeypatch.setitem(sys.modules, f"trl.{name}", types.ModuleType(f"trl.{name}"))
    sys.modules["trl.before"].function = original
    with ours.patch():
        assert sys.modules["trl.before"].function is utils.selective_log_softmax is not original
        sys.modules["trl.during"].function = utils.selective_log_softmax
        with pytest.raises(RuntimeError, match="patched already"):
            ours.patch()
    assert all(sys.modules[f"trl.{name}"].function is original for name in ("before", "during"))
    ours.unpatch()


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (trl.GRPOTrainer, "_compute_loss", None, "trl 9.9 has no trl.trainer.grpo_trainer.GRPOTrainer._compute_loss"),
        (utils, "entropy_from_logits", lambda logits: logits, r"9.9: .*entropy_from_logits takes \(logits\)"),
    ],
)
def test_another_version(owner, name, value, message, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "9.9")
    before = utils.selective_log_softmax, trl.DPOTrainer._compute_loss
    if value is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value)
    with pytest.raises(ImportError, match=message):
        ours.patch()
    assert (utils.selective_log_softmax, trl.DPOTrainer._compute_loss) == before


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="needs TRL"):
        ours.patch()


def test_imports_nothing():
    """Importing an integration imports no peer."""
    code = (
        "import sys, fastpo, fastpo.integrations.trl, fastpo.integrations.verl, fastpo.integrations.liger\n"
        "assert not {'trl', 'verl', 'liger_kernel', 'transformers', 'peft', 'triton', 'cupy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
