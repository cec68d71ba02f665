"""Loading causal language models, and the policy: a module whose forward returns log-probs of completions."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpo.kernels import linear_logprobs, token_kl, token_logprobs
from fastpo.kernels.completions import head_of
from fastpo.reference.vocabulary import head_logits
from fastpo.training.batches import MicroBatch
from fastpo.training.errors import UserError

Layout = Literal["packed", "padded"]


def _source(name: str) -> dict[str, str]:
    """Where transformers finds a model: a .gguf file is named apart from its folder."""
    path = Path(name)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": name}
    if not path.is_file():
        raise UserError(f"{name}: no such file")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _load(auto: Any, name: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(**_source(name), **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{name}: cannot be loaded: {reason[0] if reason else type(error).__name__}") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, name)


def stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's EOS, and what the model's own settings add (chat models)."""
    # a masked language model has no such settings
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])}
    return tuple(sorted(token for token in found if token is not None))


def load_model(name: str) -> Any:
    """A causal language model with fp32 weights, in evaluation mode.

    It stays in that mode while it is trained: dropout would put noise into every ratio to the reference.
    """
    import transformers

    if not name.endswith(".gguf"):
        return _load(transformers.AutoModelForCausalLM, name, dtype=torch.float32).eval()
    options: dict[str, Any] = {"dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        # recent releases may keep the weights in the file's blocks, which cannot be trained
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = _load(transformers.AutoModelForCausalLM, name, **options).eval()
    if getattr(model, "hf_quantizer", None) is not None:
        # the weights are ordinary ones now, to be saved as such
        model.hf_quantizer.remove_quantization_config(model)
    return model


def load_denoiser(name: str) -> Any:
    """The same of a masked language model."""
    import transformers

    return _load(transformers.AutoModelForMaskedLM, name, dtype=torch.float32).eval()


def check_same_vocabulary(model: str, reference: str) -> None:
    """Raise UserError unless both tokenizers give every id the same meaning."""
    ours, theirs = load_tokenizer(model).get_vocab(), load_tokenizer(reference).get_vocab()
    if ours != theirs:
        different = len(ours.items() ^ theirs.items())
        raise UserError(
            f"{reference}: the reference has another vocabulary than {model} "
            f"({len(theirs):,} and {len(ours):,} tokens, {different:,} entries differ)"
        )


class Policy(nn.Module):
    """A causal language model that answers with the packed log-probs (n,) of completion tokens.

    The whole computation, head included, is in `forward`, where DDP and FSDP see it. Logits are made a tile at a time,
    unless the model makes something else of its hidden states than `head_scale` finds: then by the model itself.
    """

    def __init__(
        self, model: Any, layout: Layout | None = None, *, temperature: float = 1.0, critic: Critic | None = None
    ) -> None:
        """
        Args:
            model: a transformers causal language model.
            layout: how it takes several sequences, if not as it is found to take them.
            temperature: of the distributions, as they are sampled from.
            critic: what answers to the statistic "value"; trained with the model.
        """
        super().__init__()
        self.model = model
        self.layout: Layout = layout or ("packed" if _separates_packed(model) else "padded")
        self.scale = head_scale(model)
        self.temperature = temperature
        self.critic = critic

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        predictors: Tensor,
        targets: Tensor,
        *,
        statistics: tuple[str, ...] = (),
        reference_logits: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The log-probs (n,) of the targets; or, if more is asked for, a dictionary of them and it, each (n,).

        Args:
            input_ids, position_ids, predictors, targets: of a `MicroBatch`.
            statistics: of the distributions: "log_sum_p2", "entropy", or "normalised_entropy", which is over log V; and
                "value", the critic's, of the states in which the targets are chosen.
            reference_logits: (n, V) at the predictors; then "kl", KL(reference || policy), is there too. It takes the
                policy's logits, all n at once.
        """
        run = _packed if self.layout == "packed" else _padded
        stats = tuple(s.removeprefix("normalised_") for s in statistics if s != "value")
        if self.scale is None or reference_logits is not None:
            logits = run(self.model, input_ids, position_ids, predictors)
            size = logits.shape[-1]
            # nobody else reads the logits, so their gradient may take their place; the divergence would read them
            alone = reference_logits is None and logits.requires_grad
            out = token_logprobs(
                logits,
                targets,
                temperature=self.temperature,
                stats=stats,  # type: ignore[arg-type]
                inplace_backward=alone,
            )
        else:
            hidden = run(_backbone(self.model), input_ids, position_ids, predictors)
            weight, bias, lora = head_of(self.model.get_output_embeddings())
            size = len(weight)
            out = linear_logprobs(
                hidden,
                weight,
                targets,
                bias,
                lora=lora,
                temperature=self.temperature,
                logit_scale=self.scale.factor,
                softcap=self.scale.softcap,
                stats=stats,  # type: ignore[arg-type]
                memory_budget=0,
            )
        logprobs = out if isinstance(out, Tensor) else out.logprobs
        if not statistics and reference_logits is None:
            return logprobs
        found = {s: getattr(out, s.removeprefix("normalised_")) for s in statistics if s != "value"}
        if "normalised_entropy" in found:
            found["normalised_entropy"] = found["normalised_entropy"] / math.log(size)
        if reference_logits is not None:
            found["kl"] = token_kl(logits, reference_logits.to(logits.dtype))
        if "value" in statistics:
            assert self.critic is not None
            states = run(self.critic.backbone, input_ids, position_ids, predictors)
            found["value"] = self.critic.head(states)[:, 0].float()
        return {"logprobs": logprobs, **found}

    def generate(self, *arguments: Any, **options: Any) -> Tensor:
        """As the model does: what shards this module's weights gathers them around a method of its own."""
        return self.model.generate(*arguments, **options)


class Critic(nn.Module):
    """A value for every state of a language model: its hidden states and a number of each, 0 at the beginning.

    Attributes:
        backbone: a copy of the model's, with weights of its own.
        head: the number.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(_backbone(model)).requires_grad_()
        weight = model.get_output_embeddings().weight
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


class Logits(nn.Module):
    """A frozen causal language model that answers with its logits (n, V) where completion tokens are predicted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.layout: Layout = "packed" if _separates_packed(model) else "padded"

    @torch.no_grad()
    def forward(self, input_ids: Tensor, position_ids: Tensor, predictors: Tensor) -> Tensor:
        return (_packed if self.layout == "packed" else _padded)(self.model, input_ids, position_ids, predictors)


class HeadScale(NamedTuple):
    """What a model does to the logits of its head."""

    factor: float = 1.0
    softcap: float | None = None


def _backbone(model: Any) -> Any:
    """What makes the last hidden states; PEFT's adapters are inside."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return whole.base_model


@torch.no_grad()
def head_scale(model: Any) -> HeadScale | None:
    """How the model's logits come from its last hidden states and its head; None if in another way than those known.

    Asked of the model itself, with a few tokens: configurations name the factors differently, and not all of them.
    """
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 7), generator=torch.Generator().manual_seed(0)).to(device)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = _last(_backbone(model)(input_ids=ids, use_cache=False))
        weight, bias, lora = head_of(model.get_output_embeddings())
        for scale in _scales(model.config.get_text_config()):
            ours = head_logits(hidden, weight, bias, logit_scale=scale.factor, softcap=scale.softcap, lora=lora)
            if ours.shape == logits.shape and _close(ours, logits):
                return scale
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return None


def _scales(config: Any) -> Iterator[HeadScale]:
    """What the configuration may mean, as Gemma, Cohere and Granite name it."""
    caps = [getattr(config, "final_logit_softcapping", None), None]
    factor, divisor = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    for cap in caps:
        for value in (factor, divisor and 1 / divisor, 1.0):
            if isinstance(value, (int, float)) and value > 0:
                yield HeadScale(float(value), cap)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    error = F.mse_loss(ours.float(), theirs.float()).sqrt() / theirs.float().std()
    # a model in half precision has rounded its logits
    return bool(error < (1e-4 if theirs.dtype in (torch.float32, torch.float64) else 1e-2))


def policy_inputs(batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `Policy.forward` takes, as plain tensors."""
    return batch.input_ids, batch.position_ids, batch.predictors, batch.targets


def _last(out: Any) -> Tensor:
    """The logits of a language model, or the last hidden states of what is below its head."""
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def _packed(model: Any, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
    """Logits or hidden states (n, ...) at the positions `keep` of one row of sequences, each attending to itself alone.

    transformers makes the block-diagonal mask where position ids restart and no attention mask is given.
    """
    row = {"input_ids": input_ids[None], "position_ids": position_ids[None], "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return _last(model(**row, logits_to_keep=keep))[0]
    return _last(model(**row))[0, keep]


def _padded(model: Any, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
    """The same from a rectangle (sequences, longest), for models that cannot tell packed sequences apart."""
    sequence = (position_ids == 0).cumsum(0) - 1
    shape = (int(sequence[-1]) + 1, int(position_ids.max()) + 1)
    padded, mask = input_ids.new_zeros(shape), input_ids.new_zeros(shape)
    padded[sequence, position_ids] = input_ids
    mask[sequence, position_ids] = 1
    out = _last(model(input_ids=padded, attention_mask=mask, use_cache=False))
    return out[sequence[keep], position_ids[keep]]


@torch.no_grad()
def _separates_packed(model: Any) -> bool:
    """Whether a packed row gives every sequence the logits that it has alone: asked of the model itself.

    Architectures differ (recurrent states, own masks), and one that mixes sequences does so without an error.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    parts = [torch.randint(vocabulary, (n,), generator=generator).to(device) for n in (5, 3, 8)]
    positions = torch.cat([torch.arange(len(p), device=device) for p in parts])
    everything = torch.arange(len(positions), device=device)
    try:
        together = _packed(model, torch.cat(parts), positions, everything)
    except (TypeError, ValueError, RuntimeError):
        return False
    alone = torch.cat([model(input_ids=p[None], use_cache=False).logits[0] for p in parts])
    return _close(together, alone)
