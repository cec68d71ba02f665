"""TRL's log-probabilities, entropies and losses, computed by fastpo.

    from fastpo.integrations import trl

    trl.patch()          # before or after a trainer is constructed
    trainer.train()
    trl.unpatch()

    with trl.patch():    # or for a while
        trainer.train()

What is replaced, in TRL 1.16:

- `trl.trainer.utils.selective_log_softmax`, `entropy_from_logits` and `selective_log_softmax_and_entropy`, and the
  function of the last name in `trl.kernels`, by `fastpo.token_logprobs`;
- `trl.kernels.ChunkedLogProbFunction`, which the fused heads of all trainers apply, by `fastpo.linear_logprobs`; the
  heads then leave tokens without a label out of every product, on a CPU too;
- `ChunkedDivergenceFunction` of its distillation trainer, by `fastpo.token_kl` and `token_jsd`, a few rows of logits at
  a time;
- the losses of DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer and RewardTrainer, by those of `fastpo.losses`.

The numbers are TRL's, up to the rounding of fp32 sums, and so are its conventions: which tokens count, denominators,
IPO's averages, the cap of CISPO, the dtype of log-probs of bf16 logits. `patch(fix=True)` has ours instead where TRL's
are wrong, and prints what that changes (`FIXES`).

A patched loss runs TRL's own `_compute_loss` on log-probs without gradient, so that what is logged is by TRL's code
and names, and computes the loss, and its gradient, by ours from the same log-probs. DPO's formulas are left out of
TRL's run; of the others' what is computed twice is elementwise, on numbers per token, and without gradient: there is
no second forward of any model. A combination of options that ours do not have keeps TRL's loss, with a warning that
names it, and so does a batch whose log-ratios pass 20, where ours are cut and TRL's are not. An option that TRL accepts
and does not read raises ValueError at the first loss.

Where numbers differ by more than that rounding: exponents of f-divergences stop at 80, before fp32 overflows. On a GPU
the tiles of a bf16 head's logits are fp32, where TRL's are rounded to bf16. Under autocast a head's gradients are
rounded to bf16, as a linear layer's are, where TRL's are fp32.

Under DeepSpeed's ZeRO-3 the head's weight is there only while it is gathered, which `linear_logprobs` does not know of:
such a head is computed by TRL's functions. The SFT loss of the fused head beyond its log-probs stays TRL's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo import linear_logprobs, losses, token_jsd, token_kl, token_logprobs
from fastpo.integrations._grpo import AGGREGATION_OF
from fastpo.integrations._swaps import Swap, Swaps
from fastpo.kernels.linear_divergence import Head, of_logits, shaped

FIXES = {
    "half precision": "log-probs, entropies and reward losses of bf16 and fp16 logits are fp32, not rounded to them",
    "DPO, sigmoid with label_smoothing": "is conservative DPO; TRL does not read label_smoothing there",
    "DPO, alpha_divergence": "has the paper's exponent -alpha; TRL's is alpha - 1, so its alpha is 1 - alpha",
    "DPO, bco_pair": "has the paper's reward shift, a moving average over steps; TRL has none",
    "DPO, sppo_hard": "is the official loss; TRL's is twice that",
    "DPO, aot and aot_unpaired": "sort the pairs of all processes; TRL sorts each micro-batch of each process alone",
}

# no id of a token, so that what stands in an index is an id or an error
_SKIPPED = -(2**62)
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_STATISTICS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_p2",
    "mean_logits": "mean_logit",
    "is_top1": "top1",
}
_HALVES = (torch.bfloat16, torch.float16)


class _Function:
    """Stands for a `torch.autograd.Function`, whose `apply` it has."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _as_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A head of the hidden states' dtype; autocast casts both."""
    if torch.is_autocast_enabled(hidden.device.type):
        return weight, bias
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


class _Heads(_Function):
    """Stands for `ChunkedLogProbFunction`."""

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        # a weight that ZeRO-3 has partitioned; a scale that is no scale
        if hasattr(weight, "ds_id") or not logit_scale > 0:
            options = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            return self._original.apply(hidden, weight, bias, targets, *options)
        weight, bias = _as_hidden(hidden, weight, bias)
        asked: Any = tuple(_STATISTICS[name] for name in _OUTPUTS if name in outputs)
        found: Any = linear_logprobs(
            hidden,
            weight,
            targets,
            bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            ignore_index=_SKIPPED,
            # an empty tuple would return the log-probs alone
            stats=asked or ("logsumexp",),
        )
        statistics = [getattr(found, name) if name in asked else None for name in _STATISTICS.values()]
        if statistics[-1] is not None:
            statistics[-1] = statistics[-1] == targets
        return (found.logprobs, *statistics)


class _Divergences(_Function):
    """Stands for `ChunkedDivergenceFunction`."""

    def apply(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        shapes = (student_logit_scale, student_final_logit_softcapping)
        teachers_shapes = (teacher_logit_scale, teacher_final_logit_softcapping)
        student = (student_hidden, student_weight, student_bias)
        teacher = (teacher_hidden, teacher_weight, teacher_bias)
        if any(hasattr(weight, "ds_id") for weight in (student_weight, teacher_weight)):
            return self._original.apply(*student, *teacher, beta, temperature, *shapes, *teachers_shapes)

        def compute(logits: Tensor, others: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            logits, others = shaped(logits, *shapes), shaped(others, *teachers_shapes)
            if beta in (0, 1):
                each = token_kl(logits, others, direction="reverse" if beta else "forward", temperature=temperature)
            else:
                each = token_jsd(logits, others, beta=beta, temperature=temperature)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                # of the backward: the entropy has no gradient
                return each, each.detach()
            index = torch.zeros_like(each, dtype=torch.int64)
            found = token_logprobs(logits, index, temperature=temperature, stats=("entropy",))
            assert found.entropy is not None
            return each, found.entropy

        ours, others = (Head(hidden, *_as_hidden(hidden, weight, bias)) for hidden, weight, bias in (student, teacher))
        divergence, entropy = of_logits(ours, others, compute)
        return divergence, entropy.detach()


def _scored(logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, entropy: bool) -> Any:
    if temperature <= 0:
        raise ValueError("temperature must be positive")
    targets = index.long()
    if row_mask is not None:
        targets = targets.masked_fill(row_mask == 0, _SKIPPED)
    statistic: Any = "entropy" if entropy else "logsumexp"
    return token_logprobs(logits, targets, temperature=temperature, ignore_index=_SKIPPED, stats=(statistic,))


def _functions(fix: bool) -> dict[str, Callable[[Any], Any]]:
    """What stands for TRL's functions of logits, by name."""

    def rounded(values: Tensor, logits: Tensor, one_id: bool = True) -> Tensor:
        # TRL's kernel, which it takes for one id per row on a GPU, has fp32 results; its torch code those of the logits
        if fix or logits.dtype not in _HALVES or (one_id and logits.device.type in ("cuda", "xpu")):
            return values
        return values.to(logits.dtype)

    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        found = _scored(logits, index, temperature, row_mask, False)
        return rounded(found.logprobs, logits, index.dim() < logits.dim())

    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        return rounded(_scored(logits, index, 1.0, None, True).entropy, logits)

    def both(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        found = _scored(logits, index, temperature, row_mask, True)
        entropy = found.entropy if row_mask is None else found.entropy.masked_fill(row_mask == 0, 0)
        entropy = entropy if entropy_requires_grad else entropy.detach()
        return rounded(found.logprobs, logits), rounded(entropy, logits)

    def fused(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return both(logits, index, True, temperature, row_mask)

    return {
        "selective_log_softmax": lambda _: selective_log_softmax,
        "entropy_from_logits": lambda _: entropy_from_logits,
        "selective_log_softmax_and_entropy": lambda _: both,
        "fused": lambda _: fused,
    }


def _detached(output: Any) -> Any:
    return type(output)(**{k: v.detach() if isinstance(v, Tensor) else v for k, v in output.items()})


class _Policy:
    """The model that TRL's loss calls: what it returns is kept, and given on without a gradient."""

    def __init__(self, model: Any, scored: Callable[[dict[str, Any]], bool]) -> None:
        self._model, self._scored = model, scored
        self.outputs: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._model(*args, **kwargs)
        if not self._scored(kwargs):
            return output
        self.outputs.append(output)
        return _detached(output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _by_the_head(kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("fused_lm_head"))


@contextlib.contextmanager
def _for_a_while(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object's own; afterwards what it had, or what its class has."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def _references(trainer: Any) -> Iterator[list[Any]]:
    """What the trainer's models return: the last is the reference's, which may be the policy without its adapter."""
    seen: list[Any] = []

    def note(_: Any, __: Any, output: Any) -> None:
        if getattr(output, "log_probs", None) is not None:
            seen.append(output)

    models = [m for m in (trainer.model, getattr(trainer, "ref_model", None)) if m is not None]
    handles = [m.register_forward_hook(note) for m in models]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _left_to_trl(trainer: Any, why: str) -> None:
    warnings.warn(
        f"fastpo: {type(trainer).__name__} with {why} keeps TRL's own loss, on fastpo's log-probs", stacklevel=4
    )


_Models = tuple[Tensor, Tensor, Tensor, Tensor]


class _Pairs(NamedTuple):
    """Chosen and rejected completions.

    Attributes:
        policy: log-probs per token, 0 where nothing counts.
        reference: the same, or their sums, where TRL has computed them before.
        masks: which tokens count.
        lengths: TRL's, of the masks before they are shifted.
        log_sum_p2: per token, or None.
    """

    policy: tuple[Tensor, ...]
    reference: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    lengths: tuple[Tensor, ...]
    log_sum_p2: tuple[Tensor, ...] | None

    @property
    def sums(self) -> _Models:
        chosen, rejected, ref_chosen, ref_rejected = (
            t.sum(1) if t.dim() == 2 else t for t in (*self.policy, *self.reference)
        )
        return chosen, rejected, ref_chosen, ref_rejected

    @property
    def models(self) -> _Models:
        """Log-probs of the policy and the reference, per token if both are there so."""
        if self.reference[0].dim() != 2:
            return self.sums
        return self.policy[0], self.policy[1], self.reference[0], self.reference[1]

    @property
    def layout(self) -> dict[str, Tensor]:
        """The masks of `models`."""
        if self.reference[0].dim() != 2:
            return {}
        return {"chosen_mask": self.masks[0], "rejected_mask": self.masks[1]}


# what reads an option, of the loss types of DPOTrainer
_SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
_DIVERGENT = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
# whose names are ours
_PLAIN = ("hinge", "nca_pair", "sppo_hard", "apo_zero", "apo_down")
_DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "jsd", "alpha_divergence": "alpha"}


def _check_dpo(trainer: Any, fix: bool) -> str | None:
    """Why the loss is left to TRL, or None; ValueError for options that nothing reads."""
    types = trainer.loss_types
    if trainer.ld_alpha is not None and set(types) == {"sft"}:
        raise ValueError(f"TRL does not read ld_alpha={trainer.ld_alpha:g} with loss_type={types}")
    if trainer.label_smoothing and not any(t in _SMOOTHED or (fix and t == "sigmoid") for t in types):
        more = ": trl.patch(fix=True) makes it conservative DPO" if "sigmoid" in types else ""
        raise ValueError(f"TRL does not read label_smoothing={trainer.label_smoothing:g} with loss_type={types}{more}")
    divergence = trainer.f_divergence_type
    if divergence != "reverse_kl" and not any(t in _DIVERGENT for t in types):
        raise ValueError(f"TRL does not read f_divergence_type={divergence!r} with loss_type={types}")
    options = [f"f_divergence_type={divergence!r}"] * (divergence != "reverse_kl")
    options += [f"ld_alpha={trainer.ld_alpha}"] * (trainer.ld_alpha is not None)
    options += ["use_weighting"] * bool(trainer.use_weighting)
    options += ["label_smoothing"] * bool(fix and trainer.label_smoothing and "sigmoid" in types)
    if len(options) > 1 or (options and types != ["sigmoid"]):
        return f"loss_type={types} and {', '.join(options)}"
    if trainer.precompute_ref_logps and (trainer.ld_alpha is not None or trainer.use_weighting):
        return f"precomputed references and {options[0]}"
    if unknown := set(types) - {*_PLAIN, *_DIVERGENT, *_SMOOTHED, "bco_pair", "sft"}:
        return f"loss_type={sorted(unknown)}"
    return None


def _dpo_loss(trainer: Any, loss_type: str, pairs: _Pairs, fix: bool) -> Tensor:
    smoothing = trainer.label_smoothing
    common: dict[str, Any] = {"beta": trainer.beta, **pairs.layout}
    if loss_type == "sft":
        return losses.sft(pairs.policy[0], mask=pairs.masks[0]).loss
    if loss_type in ("ipo", "sigmoid_norm"):
        named: dict[str, Any] = {"beta": trainer.beta}
        named |= {"chosen_lengths": pairs.lengths[0], "rejected_lengths": pairs.lengths[1]}
        if loss_type == "ipo":
            return losses.ipo(*pairs.sums, convention="trl", **named).loss
        return losses.dpo_norm(*pairs.sums, **named).loss
    if loss_type == "sigmoid":
        return _sigmoid(trainer, pairs, common, fix)
    if loss_type == "exo_pair":
        return losses.exo_pair(*pairs.models, label_smoothing=smoothing, **common).loss
    if loss_type == "robust":
        return losses.robust_dpo(*pairs.models, label_smoothing=smoothing, **common).loss
    if loss_type == "discopop":
        return losses.discopop(*pairs.models, tau=trainer.args.discopop_tau, **common).loss
    if loss_type in ("aot", "aot_unpaired"):
        common |= {"label_smoothing": smoothing, "process_group": (fix and _distributed()) or None}
        return getattr(losses, loss_type)(*pairs.models, **common).loss
    if loss_type == "bco_pair":
        delta = _bco_delta(trainer, pairs) if fix else pairs.policy[0].new_zeros((), dtype=torch.float32)
        return losses.bco_pair(*pairs.models, delta, **common).loss
    loss = getattr(losses, loss_type)(*pairs.models, **common).loss
    return 0.5 * loss if fix and loss_type == "sppo_hard" else loss


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@torch.no_grad()
def _bco_delta(trainer: Any, pairs: _Pairs) -> Tensor:
    """The reward shift of this step, kept at the trainer; it begins anew with the trainer."""
    chosen, rejected, ref_chosen, ref_rejected = pairs.sums
    rewards = trainer.beta * torch.cat([chosen - ref_chosen, rejected - ref_rejected])
    labels = torch.arange(len(rewards), device=rewards.device) < len(chosen)
    previous = getattr(trainer, "_fastpo_bco_delta", None)
    delta = losses.bco_delta(rewards, labels, previous=previous, process_group=_distributed() or None)
    if trainer.model.training:
        trainer._fastpo_bco_delta = delta
    return delta


def _sigmoid(trainer: Any, pairs: _Pairs, common: dict[str, Any], fix: bool) -> Tensor:
    if trainer.use_weighting:
        assert pairs.log_sum_p2 is not None
        # TRL does not clamp the weights
        return losses.wpo(*pairs.models, *pairs.log_sum_p2, max_weight=math.inf, **common).loss
    if trainer.ld_alpha is not None:
        return losses.ld_dpo(*pairs.models, alpha=trainer.ld_alpha, **common).loss
    alpha = trainer.f_alpha_divergence_coef
    divergence = trainer.f_divergence_type
    if divergence == "alpha_divergence" and abs(alpha - (0 if fix else 1)) < 1e-6:
        divergence = "reverse_kl"
    if divergence != "reverse_kl":
        common["divergence"] = _DIVERGENCES[divergence]
        if divergence == "alpha_divergence":
            common |= {"alpha": alpha, "convention": None if fix else "trl"}
        return losses.f_dpo(*pairs.models, **common).loss
    if fix and trainer.label_smoothing:
        return losses.cdpo(*pairs.models, label_smoothing=trainer.label_smoothing, **common).loss
    return losses.dpo(*pairs.models, **common).loss


def _with_aux(trainer: Any, loss: Tensor, aux_loss: Tensor | None, share: float = 1.0) -> Tensor:
    if not trainer.aux_loss_enabled or aux_loss is None:
        return loss
    return loss + trainer.router_aux_loss_coef * aux_loss / share


def _dpo(original: Any, fix: bool) -> Any:
    @functools.wraps(original)
    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if (why := _check_dpo(self, fix)) is not None:
            _left_to_trl(self, why)
            return original(self, model, inputs, return_outputs)
        policy = _Policy(model, _by_the_head)
        # TRL's run is for what it logs: without its formulas
        nothing = _for_a_while(self, "loss_types", []), _for_a_while(self, "loss_weights", [])
        with _references(self) as references, nothing[0], nothing[1]:
            result = original(self, policy, inputs, return_outputs)
        output = policy.outputs[0]
        completion = inputs["completion_mask"]
        mask = completion[:, 1:].bool()
        width = mask.shape[1]
        logprobs = output.log_probs[:, -width:]
        if self.precompute_ref_logps:
            reference: tuple[Tensor, ...] = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        else:
            reference = references[-1].log_probs[:, -width:].chunk(2)
        sums = output.log_sum_sq_probs
        pairs = _Pairs(
            logprobs.chunk(2),
            reference,
            mask.chunk(2),
            tuple(m.sum(1).clamp(min=1) for m in completion.chunk(2)),
            None if sums is None else sums[:, -width:].chunk(2),
        )
        parts = [
            weight * _dpo_loss(self, loss_type, pairs, fix)
            for loss_type, weight in zip(self.loss_types, self.loss_weights, strict=True)
        ]
        loss = _with_aux(self, functools.reduce(torch.add, parts), output.aux_loss)
        return (loss, result[1]) if return_outputs else loss

    return _compute_loss


def _kto(original: Any) -> Any:
    @functools.wraps(original)
    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.loss_type not in ("kto", "apo_zero_unpaired"):
            _left_to_trl(self, f"loss_type={self.loss_type!r}")
            return original(self, model, inputs, return_outputs)
        policy = _Policy(model, _by_the_head)
        with _references(self) as references:
            result = original(self, policy, inputs, return_outputs)
        # the completions of others, for the KL, are before
        output = policy.outputs[-1]
        device = output.log_probs.device
        mask = inputs["completion_mask"][:, 1:].bool().to(device)
        width = mask.shape[1]
        labels = torch.as_tensor(inputs["label"], dtype=torch.bool, device=device)
        logprobs = output.log_probs[:, -width:]
        if self.precompute_ref_logps:
            logprobs, reference, layout = logprobs.sum(1), inputs["ref_logps"].to(device), {}
        else:
            reference, layout = references[-1].log_probs[:, -width:], {"mask": mask}
        weights = {"lambda_desirable": self.desirable_weight, "lambda_undesirable": self.undesirable_weight}
        if self.loss_type == "kto":
            # over all processes, as TRL has just logged it
            kl = torch.tensor(self._metrics["train" if self.model.training else "eval"]["kl"][-1], device=device)
            out = losses.kto(logprobs, reference, labels, kl, beta=self.beta, reduction="none", **weights, **layout)
            each = out.loss
        else:
            out = losses.apo_zero_unpaired(logprobs, reference, labels, beta=self.beta, reduction="none", **layout)
            each = out.loss * torch.where(labels, float(self.desirable_weight), float(self.undesirable_weight))
        loss = _with_aux(self, each.nanmean(), output.aux_loss)
        return (loss, result[1]) if return_outputs else loss

    return _compute_loss


class _Seen:
    """What the policy's log-probs and entropies are when TRL's loss asks for them.

    Attributes:
        left: why TRL's loss is kept, or None.
        chosen: TRL's mask of tokens of high entropy, if it made one.
    """

    logps: Tensor
    entropies: Tensor
    aux_loss: Tensor | None
    left: str | None = None
    chosen: Tensor | None = None


@contextlib.contextmanager
def _scores(trainer: Any, farthest: Callable[[Tensor], Tensor]) -> Iterator[_Seen]:
    """TRL's loss gets log-probs and entropies without a gradient, unless `farthest` of the log-probs is above 20."""
    seen = _Seen()

    def noted(*args: Any, **kwargs: Any) -> Any:
        out = ask(*args, **kwargs)
        seen.logps, seen.entropies, seen.aux_loss = out
        if farthest(seen.logps.detach()) > _FARTHEST:
            seen.left = f"log-ratios above {_FARTHEST:g}"
            return out
        return tuple(None if t is None else t.detach() for t in out)

    def kept(*args: Any, **kwargs: Any) -> Any:
        seen.chosen = choose(*args, **kwargs)
        return seen.chosen

    ask: Any = trainer._get_per_token_logps_and_entropies
    choose: Any = getattr(trainer, "get_high_entropy_mask", None)
    with _for_a_while(trainer, "_get_per_token_logps_and_entropies", noted):
        if choose is None:
            yield seen
        else:
            with _for_a_while(trainer, "get_high_entropy_mask", kept):
                yield seen


# at which ours cut log-ratios; below -20 they are nothing under an exponential
_FARTHEST = 20.0


def _check_grpo(trainer: Any, inputs: dict[str, Any]) -> str | None:
    """Why the loss is left to TRL, or None; ValueError for options that nothing reads."""
    name, level, high = trainer.loss_type, trainer.importance_sampling_level, trainer.epsilon_high
    delta = trainer.args.delta
    if delta is not None and name in ("cispo", "sapo", "vespo"):
        raise ValueError(f"TRL does not read delta={delta:g} with loss_type={name!r}")
    if name not in AGGREGATION_OF or level not in ("token", "sequence"):
        return f"loss_type={name!r} and importance_sampling_level={level!r}"
    if level == "sequence" and name in ("cispo", "sapo", "vespo"):
        return f"loss_type={name!r} and importance_sampling_level='sequence'"
    if name == "cispo" and high < 1:
        return f"loss_type='cispo' and epsilon_high={high:g}, a cap on the ratio below 1"
    if name == "vespo" and inputs.get("importance_sampling_ratio") is not None:
        return "loss_type='vespo' and importance ratios of the sampler"
    if delta is not None and (level == "sequence" or delta <= 1 + high):
        return f"delta={delta:g}, importance_sampling_level={level!r} and epsilon_high={high:g}"
    if name not in ("cispo", "sapo", "vespo") and not 0 <= trainer.epsilon_low <= 1:
        return f"epsilon={trainer.epsilon_low:g}"
    return None


def _grpo_method(trainer: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Our function, and the hyper-parameters that are the method's own."""
    name, args = trainer.loss_type, trainer.args
    if name == "cispo":
        # TRL's epsilon_high is the cap itself, and it has no lower bound
        return losses.cispo, {"epsilon_low": 1.0, "epsilon_high": trainer.epsilon_high - 1}
    if name == "sapo":
        return losses.sapo, {"tau_positive": args.sapo_temperature_pos, "tau_negative": args.sapo_temperature_neg}
    if name == "vespo":
        theirs = {"k_positive": "k_pos", "k_negative": "k_neg"}
        theirs |= {"lambda_positive": "lambda_pos", "lambda_negative": "lambda_neg"}
        return losses.vespo, {ours: getattr(args, f"vespo_{their}") for ours, their in theirs.items()}
    clip = {"epsilon_low": trainer.epsilon_low, "epsilon_high": trainer.epsilon_high}
    if trainer.importance_sampling_level == "sequence":
        return losses.gspo, clip
    return losses.grpo, {**clip, "delta": math.inf if args.delta is None else args.delta}


def _entropy_coefficient(trainer: Any) -> float:
    """Of this step: TRL's run may change it for the next one."""
    if not trainer._entropy_bonus_enabled:
        return 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return float(trainer.entropy_coef)


def _grpo(original: Any) -> Any:
    @functools.wraps(original)
    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        if (why := _check_grpo(self, inputs)) is not None:
            _left_to_trl(self, why)
            return original(self, model, inputs)
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        counts, old = mask.bool(), inputs.get("old_per_token_logps")

        def farthest(logps: Tensor) -> Tensor:
            ratios = [] if old is None else [logps - old]
            if self.beta != 0.0:
                ratios.append(inputs["ref_per_token_logps"] - logps)
            return max((torch.where(counts, r, 0).amax() for r in ratios), default=logps.new_zeros(()))

        coefficient = _entropy_coefficient(self)
        with _scores(self, farthest) as seen:
            result = original(self, model, inputs)
        if seen.left is not None:
            _left_to_trl(self, seen.left)
            return result
        logps = seen.logps
        training = self.model.training
        window = self.current_gradient_accumulation_steps if training else 1.0
        loss, own = _grpo_method(self)
        options: dict[str, Any] = {"aggregation": AGGREGATION_OF[self.loss_type], "count_empty": True}
        if self.loss_type in ("cispo", "dapo", "vespo"):
            # of the whole generation, hence its share in this step
            items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            options["num_items"] = items * window / self.args.steps_per_generation if training else items
        elif self.loss_type == "dr_grpo":
            options["max_length"] = self.max_completion_length
        if seen.chosen is not None:
            options["policy_mask"] = seen.chosen.bool()
        if self.beta != 0.0:
            options["reference_logprobs"] = inputs["ref_per_token_logps"]
            options["kl_corrected"] = bool(self.args.use_bias_correction_kl)
        if self.off_policy_mask_threshold is not None:
            options["off_policy_threshold"] = self.off_policy_mask_threshold
            old = logps.detach() if old is None else old
            if (sampled := inputs.get("sampling_per_token_logps")) is not None:
                # what the sampler could not score says nothing
                options["rollout_logprobs"] = torch.where(sampled.isnan(), logps.detach(), sampled)
        advantages = inputs["advantages"]
        if self.use_vllm and self.vllm_importance_sampling_correction and self.loss_type != "vespo":
            # every method's loss is proportional to |A|
            weighted = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
            advantages = (weighted * inputs["importance_sampling_ratio"]).expand_as(logps)
        out = loss(logps, advantages, old, mask=counts, beta=self.beta, **own, **options)
        scaled = out.loss if "num_items" in options else out.loss / window
        if coefficient:
            acted = counts if seen.chosen is None else counts & seen.chosen.bool()
            bonus = torch.where(acted, seen.entropies, 0).sum() / acted.sum().clamp(min=1)
            scaled = scaled - coefficient * bonus / window
        return _with_aux(self, scaled, seen.aux_loss, window)

    return _compute_loss


def _rloo(original: Any) -> Any:
    @functools.wraps(original)
    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        if not 0 <= self.epsilon_low <= 1:
            _left_to_trl(self, f"epsilon={self.epsilon_low:g}")
            return original(self, model, inputs)
        old = inputs["old_logps"].unsqueeze(1)

        def total(logps: Tensor) -> Tensor:
            return torch.where(inputs["completion_mask"].bool(), logps, 0).sum(1, keepdim=True)

        with _scores(self, lambda logps: (total(logps) - old).amax()) as seen:
            result = original(self, model, inputs)
        if seen.left is not None:
            _left_to_trl(self, seen.left)
            return result
        # PPO of completions, each of which is one action
        out = losses.ppo(
            total(seen.logps),
            inputs["advantages"],
            old,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
        )
        return _with_aux(self, out.loss, seen.aux_loss)

    return _compute_loss


def _reward(original: Any, fix: bool) -> Any:
    @functools.wraps(original)
    def compute_loss(
        self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        policy = _Policy(model, lambda _: True)
        original(self, policy, inputs, return_outputs, num_items_in_batch)
        output = policy.outputs[0]
        chosen, rejected = output.logits.squeeze(-1).chunk(2)
        loss = losses.bradley_terry(chosen, rejected, margin=inputs.get("margin", 0.0)).loss
        if (centre := self.args.center_rewards_coefficient) is not None:
            loss = loss + centre * (chosen + rejected).square().mean()
        # of bf16 scores TRL's is bf16
        loss = loss if fix else loss.to(chosen.dtype)
        return (loss, output) if return_outputs else loss

    return compute_loss


def _swaps(fix: bool) -> list[Swap]:
    utils, functions = "trl.trainer.utils", _functions(fix)
    scored = ("logits", "index", "temperature", "row_mask")
    trainer = ("self", "model", "inputs")
    return [
        Swap(utils, "selective_log_softmax", functions["selective_log_softmax"], scored),
        Swap(utils, "entropy_from_logits", functions["entropy_from_logits"], ("logits", "chunk_size")),
        Swap(
            utils,
            "selective_log_softmax_and_entropy",
            functions["selective_log_softmax_and_entropy"],
            ("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
        ),
        # it is there where Triton is
        Swap(
            "trl.kernels.logprob_entropy",
            "selective_log_softmax_and_entropy",
            functions["fused"],
            scored,
            optional=True,
        ),
        Swap("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", _Heads),
        Swap("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", _Divergences),
        # whether heads and divergences are given only the tokens that count
        *(
            Swap(module, "_use_triton", lambda _: lambda device: True, ("device",), everywhere=False)
            for module in (utils, "trl.trainer.distillation_trainer")
        ),
        Swap(
            "trl.trainer.dpo_trainer",
            "DPOTrainer._compute_loss",
            functools.partial(_dpo, fix=fix),
            (*trainer, "return_outputs"),
        ),
        Swap("trl.trainer.kto_trainer", "KTOTrainer._compute_loss", _kto, (*trainer, "return_outputs")),
        Swap("trl.trainer.grpo_trainer", "GRPOTrainer._compute_loss", _grpo, trainer),
        Swap("trl.trainer.rloo_trainer", "RLOOTrainer._compute_loss", _rloo, trainer),
        Swap(
            "trl.trainer.reward_trainer",
            "RewardTrainer.compute_loss",
            functools.partial(_reward, fix=fix),
            (*trainer, "return_outputs", "num_items_in_batch"),
        ),
    ]


_active: Swaps | None = None


class Patched(contextlib.AbstractContextManager["Patched"]):
    """What `patch` returns: at the end of its `with` block TRL is as it was."""

    def __exit__(self, *_: object) -> None:
        unpatch()


def patch(*, fix: bool = False) -> Patched:
    """Let TRL compute by fastpo, in trainers that exist and those to come.

    Args:
        fix: compute as `FIXES` says instead of as TRL does, and print the list.

    Returns:
        a context manager that calls `unpatch` at its end; it need not be used as one.

    Raises:
        ImportError: TRL is not installed, or one that has other names or signatures than those that are replaced
            (written for 1.16); the message names the version and the name, and nothing was changed.
        RuntimeError: TRL is patched already.
    """
    global _active
    if _active is not None:
        raise RuntimeError("trl is patched already: call fastpo.integrations.trl.unpatch() first")
    try:
        version = importlib.import_module("trl").__version__
    except ModuleNotFoundError as error:
        raise ImportError("fastpo.integrations.trl needs TRL: pip install 'trl>=1.16'") from error
    _active = Swaps("trl", version, _swaps(fix))
    if fix:
        print("fastpo computes otherwise than TRL:")
        for name, change in FIXES.items():
            print(f"  {name} {change}" if name.startswith("DPO") else f"  {name}: {change}")
    return Patched()


def unpatch() -> None:
    """TRL as it was. Without effect if it is not patched."""
    global _active
    if _active is not None:
        _active.undo()
        _active = None
