"""Loading models, the policy, whose forward returns log-probs of completions, and reward models, which give scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpo.kernels import linear_logprobs, token_kl, token_logprobs
from fastpo.kernels.completions import head_of
from fastpo.reference.vocabulary import head_logits
from fastpo.training.batches import MicroBatch
from fastpo.training.errors import UserError
from fastpo.training.layouts import Layout, close, find_layout, first_layout, last, positions, rectangle, run, sequences


def _source(name: str) -> dict[str, str]:
    """Where transformers finds a model: a .gguf file is named apart from its folder."""
    path = Path(name)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": name}
    if not path.is_file():
        raise UserError(f"{name}: no such file")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _load(auto: Any, name: str, **options: Any) -> Any:
    # which transformers then knows like its own
    import fastpo.nn.language  # noqa: F401

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


def load_reward_model(name: str, *, trained: bool = False) -> Any:
    """A sequence classification model with one label and fp32 weights, in evaluation mode.

    Of a causal language model it takes what is below the head, and a new head, drawn from torch's generator. Without a
    padding token it gets the tokenizer's, or else EOS: transformers reads the score at the last token that is not it.

    Args:
        name: folder or name on the hub.
        trained: whether it must bring its head.

    Raises:
        UserError: it cannot be loaded, has several labels, or has no head and must have one.
    """
    import transformers

    labels = _load(transformers.AutoConfig, name).num_labels
    options = {"num_labels": 1, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, found = _load(transformers.AutoModelForSequenceClassification, name, **options)
    except RuntimeError as error:
        # weights of another shape
        raise UserError(f"{name}: is no reward model: its head has {labels} labels, one is needed") from error
    if trained and found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise UserError(f"{name}: is no trained reward model: there are no weights for {missing}")
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        tokenizer = load_tokenizer(name)
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return model.eval()


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
        self,
        model: Any,
        layout: Layout | None = None,
        *,
        temperature: float = 1.0,
        critic: Critic | None = None,
        own: nn.Module | None = None,
    ) -> None:
        """
        Args:
            model: a transformers causal language model.
            layout: how it takes several sequences, if not as it is found to take them.
            temperature: of the distributions, as they are sampled from.
            critic: what answers to the statistic "value"; trained with the model.
            own: what the algorithm learns beside the model (`Algorithm.module`): from hidden states to numbers.
        """
        super().__init__()
        self.model = model
        self.own = own
        self.layout: Layout = layout or find_layout(model)
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
        allowed: Tensor | None = None,
        values: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The log-probs (n,) of the targets; or, if more is asked for, a dictionary of them and it, each (n,).

        Args:
            input_ids, position_ids, predictors, targets: of a `MicroBatch`; targets may be (n, K), and so are then the
                log-probs.
            statistics: of the distributions: "log_sum_p2", "entropy", or "normalised_entropy", which is over log V; and
                "value", the critic's, of the states in which the targets are chosen; (n, heads) if it has several.
            reference_logits: (n, V) at the predictors; then "kl", KL(reference || policy), is there too. It takes the
                policy's logits, all n at once.
            allowed: (n, words), packed sets of tokens; all is under the distributions among these.
            values: what `own` answers is there too.
        """
        stats = tuple(s.removeprefix("normalised_") for s in statistics if s != "value")
        hidden = None
        if self.scale is None or reference_logits is not None:
            logits = run(self.layout, self.model, input_ids, position_ids, predictors)
            size = logits.shape[-1]
            # nobody else reads the logits, so their gradient may take their place; the divergence would read them
            alone = reference_logits is None and logits.requires_grad
            out = token_logprobs(
                logits,
                targets,
                temperature=self.temperature,
                stats=stats,  # type: ignore[arg-type]
                allowed=allowed,
                inplace_backward=alone,
            )
        else:
            hidden = run(self.layout, _backbone(self.model), input_ids, position_ids, predictors)
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
                allowed=allowed,
                memory_budget=0,
            )
        logprobs = out if isinstance(out, Tensor) else out.logprobs
        if not statistics and reference_logits is None and not values:
            return logprobs
        found = {s: getattr(out, s.removeprefix("normalised_")) for s in statistics if s != "value"}
        if "normalised_entropy" in found:
            found["normalised_entropy"] = found["normalised_entropy"] / math.log(size)
        if reference_logits is not None:
            found["kl"] = token_kl(logits, reference_logits.to(logits.dtype))
        if "value" in statistics:
            assert self.critic is not None
            states = run(self.layout, self.critic.backbone, input_ids, position_ids, predictors)
            numbers = self.critic.head(states).float()
            found["value"] = numbers[:, 0] if numbers.shape[1] == 1 else numbers
        if values:
            assert self.own is not None
            if hidden is None:
                hidden = run(self.layout, _backbone(self.model), input_ids, position_ids, predictors)
            found["values"] = self.own(hidden)
        return {"logprobs": logprobs, **found}

    def computed(self, lengths: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Of a forward of sequences of these lengths of prompt and completion: their positions, and those computed."""
        return positions(self.layout, lengths)

    def inside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, *arguments): what FSDP sees as a forward, so that it may use weights that are sharded."""
        return function(self.model, *arguments)


class Critic(nn.Module):
    """Values for every state of a language model: its hidden states and numbers of each, 0 at the beginning.

    Attributes:
        backbone: a copy of the model's, with weights of its own.
        head: the numbers.
    """

    def __init__(self, model: Any, heads: int = 1) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(_backbone(model)).requires_grad_()
        weight = model.get_output_embeddings().weight
        self.head = nn.Linear(weight.shape[1], heads, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of transformers models in it, inner modules first."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names][::-1]


def recompute_layers(model: nn.Module) -> None:
    """Keep only the inputs of each layer for the backward pass, which then computes the layer once more.

    Not by transformers' own switch, which works in training mode only, with its dropout, and takes the cache from
    whatever generates.

    Raises:
        UserError: transformers names no layers of it.
    """
    found = layers(model)
    if not found:
        raise UserError("--gradient_checkpointing: transformers names no layers of this model")
    for layer in found:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    # nothing is drawn in evaluation mode
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


def with_adapters(model: Any, rank: int, alpha: float, targets: str | list[str]) -> Any:
    """The model with LoRA adapters, which alone are trained; it computes what it did until they are.

    Raises:
        UserError: PEFT is not installed, or there are no such layers.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError('--lora.rank: peft is not installed: pip install "fastpo[lora]"') from error
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        return peft.get_peft_model(model, config).eval()
    except ValueError as error:
        raise UserError(f"--lora.targets: {str(error).strip().splitlines()[0]}") from error


def with_adapters_merged(model: Any, adapters: Path) -> Any:
    """The model with the update of saved adapters in its own weights."""
    import peft

    return peft.PeftModel.from_pretrained(model, str(adapters)).merge_and_unload()


class WithoutAdapters:
    """A prepared `Policy` as it is with its adapters switched off: a reference without weights of its own."""

    def __init__(self, accelerator: Any, policy: Any) -> None:
        self.policy, self.model = policy, accelerator.unwrap_model(policy).model

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self.model.disable_adapter():
            return self.policy(*arguments, **options)


class Logits(nn.Module):
    """A frozen causal language model that answers with its logits (n, V) where completion tokens are predicted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.layout: Layout = find_layout(model)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, position_ids: Tensor, predictors: Tensor) -> Tensor:
        return run(self.layout, self.model, input_ids, position_ids, predictors)


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
        hidden = last(_backbone(model)(input_ids=ids, use_cache=False))
        weight, bias, lora = head_of(model.get_output_embeddings())
        for scale in _scales(model.config.get_text_config()):
            ours = head_logits(hidden, weight, bias, logit_scale=scale.factor, softcap=scale.softcap, lora=lora)
            if ours.shape == logits.shape and close(ours, logits):
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


def policy_inputs(batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `Policy.forward` takes, as plain tensors."""
    return batch.input_ids, batch.position_ids, batch.predictors, batch.targets


class Scores(nn.Module):
    """Reward models that answer with one number per sequence.

    In a batch it stands at the completion's last token, as the reward of a rollout does, and 0 at the others: the sum
    over a completion is its score, and completions lie in the stream as they do in a policy's log-probs.
    """

    def __init__(self, models: Sequence[Any]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.layout = _score_layout(models[0])

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        predictors: Tensor,
        targets: Tensor,
        *,
        statistics: tuple[str, ...] = (),
    ) -> Tensor | dict[str, Tensor]:
        """The scores (n,) by the first model at the targets that are last, else 0; of several models, a dictionary.

        Args:
            input_ids, position_ids, predictors, targets: of a `MicroBatch`.
            statistics: numbers of the other models whose scores are asked for, "1" and so on, their names in the
                dictionary; the first one's is "logprobs", as where a policy answers.
        """
        starts = position_ids == 0
        # a token is its sequence's last if the next one begins another
        last = torch.cat([starts[1:], starts.new_ones(1)])[predictors + 1]
        streams = []
        for which in (0, *map(int, statistics)):
            scores = self.of_sequences(which, input_ids, position_ids)
            streams.append(scores.new_zeros(len(targets)).masked_scatter(last, scores))
        return dict(zip(("logprobs", *statistics), streams, strict=True)) if statistics else streams[0]

    def computed(self, lengths: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """As `Policy.computed`."""
        return positions(self.layout, lengths)

    def of_sequences(self, which: int, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The score of each packed sequence by one of the models."""
        return _scores(self.models[which], self.layout, input_ids, position_ids)


def _scores(model: Any, layout: Layout | None, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """One number per sequence, read where transformers' sequence classification reads it."""
    pad = model.config.get_text_config().pad_token_id
    if layout is None:
        padded, mask = rectangle(input_ids, position_ids, pad or 0)
        return model(input_ids=padded, attention_mask=mask).logits[:, 0]
    hidden = run(layout, _backbone(model), input_ids, position_ids, _score_places(input_ids, position_ids, pad))
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return whole.score(hidden)[:, 0]


def _score_places(input_ids: Tensor, position_ids: Tensor, pad: int | None) -> Tensor:
    """The last token of each sequence that is no padding; of one that is nothing else, its first."""
    starts = (position_ids == 0).nonzero()[:, 0]
    counts = position_ids if pad is None else torch.where(input_ids != pad, position_ids, 0)
    return starts + torch.zeros_like(starts).scatter_reduce(0, sequences(position_ids), counts, "amax")


@torch.no_grad()
def _score_layout(model: Any) -> Layout | None:
    """How scores can be had that are the model's own; None: by its own forward.

    Asked of the model itself, as `find_layout` does; heads other than a layer called `score` are its own affair.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    parts = [torch.randint(config.vocab_size, (n,), generator=generator).to(device) for n in (5, 3, 8, 6)]
    if config.pad_token_id is not None:
        parts[1][-1] = config.pad_token_id
    positions = torch.cat([torch.arange(len(p), device=device) for p in parts])
    alone = torch.cat([model(input_ids=p[None]).logits[:, 0] for p in parts])
    ids = torch.cat(parts)
    return first_layout(model, lambda layout: close(_scores(model, layout, ids, positions), alone))
