"""A causal language model of S4 layers, as transformers has them: its cache is a state, of constant size.

Importing it registers the model with transformers' AutoConfig and AutoModelForCausalLM.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from fastpo.nn.s4 import Recurrence, S4Kernel, S4Layer, _Kernel


class S4Config(PretrainedConfig):
    """Sizes of an `S4LanguageModel`.

    Args:
        vocab_size: tokens.
        hidden_size: H.
        num_hidden_layers: blocks of an S4 layer and an MLP.
        intermediate_size: of the MLP; 4 H if None.
        d_state: N of every system, even.
        kernel: "dplr" (S4) or "diag" (S4D).
        init: of the kernel's A.
        dt_min, dt_max: where steps are drawn.
        max_position_embeddings: tokens that one forward takes, which is the length of the kernels. Generation may go
            beyond.
        dropout: behind the embedding and in the blocks, while training.
        layer_norm_epsilon: of the layer norms.
        initializer_range: standard deviation of weights at the beginning.
        tie_word_embeddings: whether the head is the embedding.
        use_cache: whether forwards return their state.
    """

    model_type = "fastpo_s4"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 50_257,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        intermediate_size: int | None = None,
        d_state: int = 64,
        kernel: Literal["dplr", "diag"] = "dplr",
        init: str = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        max_position_embeddings: int = 1024,
        dropout: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **rest: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.d_state = d_state
        self.kernel = kernel
        self.init = init
        self.dt_min = dt_min
        self.dt_max = dt_max
        self.max_position_embeddings = max_position_embeddings
        self.dropout = dropout
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **rest)


class S4Cache(Cache):
    """The states of all layers after the tokens that were seen: in place of keys and values, and of constant size.

    It keeps the recurrences of the parameters as they were at its first forward.

    Attributes:
        states: complex (batch, H, n) of each layer, None before the first forward.
        recurrences: of each layer.
        seen: how many positions it has behind it, padding included.
    """

    def __init__(self, layers: int) -> None:
        # what transformers' own keeps by layer is empty
        super().__init__(layers=[])
        self.states: list[Tensor | None] = [None] * layers
        self.recurrences: list[tuple[Recurrence, Recurrence] | None] = [None] * layers
        self.seen = 0

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self)}, seen={self.seen})"

    @property
    def batch_size(self) -> int:
        """Of the states; -1 before the first forward."""
        return -1 if self.states[0] is None else len(self.states[0])

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.states[0] is not None

    @property
    def is_croppable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions were seen."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is none."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: there is none."""
        return -1

    def _select(self, function: Any) -> None:
        self.states = [None if state is None else function(state) for state in self.states]

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.seen = [None] * len(self), 0
        self.recurrences = [None] * len(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the states of other rows, as beam search does."""
        self._select(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._select(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._select(lambda state: state[indices.to(state.device)])

    def crop(self, *_: Any) -> None:
        """Refused: a state does not tell what it was.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("an S4Cache holds a state, from which single tokens cannot be taken back")


class S4Block(nn.Module):
    """x + S4(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        h, eps = config.hidden_size, config.layer_norm_epsilon
        self.norm = nn.LayerNorm(h, eps=eps)
        self.s4 = S4Layer(
            h,
            config.max_position_embeddings,
            kernel=config.kernel,
            d_state=config.d_state,
            init=config.init,
            dt_min=config.dt_min,
            dt_max=config.dt_max,
            dropout=config.dropout,
        )
        self.mlp_norm = nn.LayerNorm(h, eps=eps)
        self.up, self.down = nn.Linear(h, config.intermediate_size), nn.Linear(config.intermediate_size, h)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, keep: Tensor | None, cache: S4Cache | None, place: int) -> Tensor:
        u = self.norm(x)
        if keep is not None:
            # an input of 0 leaves no trace in the state
            u = u.masked_fill(~keep, 0)
        x = x + self.dropout(self._mixed(u, cache, place))
        return x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))

    def _mixed(self, u: Tensor, cache: S4Cache | None, place: int) -> Tensor:
        if cache is None:
            return self.s4(u)
        state, recurrences = cache.states[place], cache.recurrences[place]
        if recurrences is None:
            cache.recurrences[place] = recurrences = self.s4.setup_step()
        if u.shape[1] == 1 and state is not None:
            y, cache.states[place] = self.s4.step(u[:, 0], state, recurrences)
            return y.unsqueeze(1)
        y, cache.states[place] = self.s4.extend(u, state, recurrences)
        return y


class S4PreTrainedModel(PreTrainedModel):
    """What transformers wants to know of the models here."""

    config_class = S4Config
    base_model_prefix = "model"
    _no_split_modules = ("S4Block",)
    # tokens cannot be taken back, which assisted generation does
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        named = dict(module.named_parameters(recurse=False))
        missing = {name: p for name, p in named.items() if not getattr(p, "_is_hf_initialized", False)}
        if isinstance(module, _Kernel):
            # C̃ belongs to the other parameters, and is drawn with them
            if missing and len(missing) < len(named):
                raise ValueError(f"the checkpoint has no {', '.join(missing)} of a kernel whose other weights it has")
            if missing:
                module.reset_parameters()
            return
        for name, parameter in missing.items():
            if name == "bias":
                parameter.zero_()
            elif isinstance(module, nn.LayerNorm):
                parameter.fill_(1)
            else:
                # a skip connection D is of the size of the convolution beside it
                parameter.normal_(0, 1.0 if name == "D" else self.config.initializer_range)


class S4Model(S4PreTrainedModel):
    """The embedding, the blocks, and a last norm."""

    def __init__(self, config: S4Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([S4Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: S4Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """See `S4LanguageModel.forward`; returns the last hidden states."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length, limit = x.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"a forward takes {limit:,} positions (config.max_position_embeddings), got {length:,}")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values
        if cache is None and use_cache:
            cache = S4Cache(len(self.layers))
        if cache is not None and not isinstance(cache, S4Cache):
            raise TypeError(f"past_key_values must be an S4Cache, got {type(cache).__name__}")
        keep = None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
                raise ValueError(
                    f"attention_mask must be (batch, at least {length}), got {tuple(attention_mask.shape)}"
                )
            # that of a continued sequence begins with what was seen
            keep = attention_mask[:, -length:].bool().unsqueeze(-1)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.dropout(x)
        states: list[Tensor] = []
        for place, layer in enumerate(self.layers):
            states.append(x)
            x = layer(x, keep, cache, place)
        if cache is not None:
            cache.seen += length
        x = self.norm(x)
        out = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*states, x) if output_hidden_states else None,
        )
        return out if return_dict is not False else out.to_tuple()


class S4LanguageModel(S4PreTrainedModel, GenerationMixin):
    """A causal language model of S4 layers, with the interface of those of transformers.

    `generate` keeps a state of constant size in place of keys and values, so that a token costs the same at every
    position; beams, several sequences and prompts padded on the left work as with the others. Position ids are ignored:
    packed sequences are not told apart.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: S4Config) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = S4Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate is to leave the cache to the first forward
        return False

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: S4Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **rest: Any,
    ) -> Any:
        """Logits of the next tokens, and the loss of labels.

        Args:
            input_ids: (batch, L), at most `config.max_position_embeddings` at a time.
            attention_mask: (batch, L) or, with a cache, (batch, seen + L); what is masked leaves no trace in the state.
                It may be padding on the left, and without a cache on the right.
            position_ids: ignored.
            past_key_values: the cache of what came before, which is changed.
            inputs_embeds: (batch, L, H) in place of input_ids.
            labels: (batch, L), shifted in here, -100 where there is no loss.
            use_cache: whether the cache is returned; by default as in the configuration, and not while training.
            output_hidden_states, return_dict: as of all models there.
            logits_to_keep: so many at the end, 0 for all, or positions.

        Returns:
            CausalLMOutputWithPast.

        Raises:
            ValueError: no inputs or two kinds, too many positions, or a mask of another shape.
            TypeError: another cache.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        hidden = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **rest)
        found = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return found if return_dict is not False else found.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: S4Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **rest: Any,
    ) -> dict[str, Any]:
        """What a step of `generate` gives to `forward`: the tokens that the cache has not seen."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if inputs_embeds is not None and not seen:
            inputs = {"inputs_embeds": inputs_embeds}
        elif "next_sequence_length" in rest:
            # of releases that count themselves
            new = rest["next_sequence_length"]
            inputs = {"input_ids": input_ids if new is None else input_ids[:, -new:]}
        elif seen and (attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]):
            inputs = {"input_ids": input_ids[:, seen:]}
        kept: dict[str, Any] = {
            name: rest[name] for name in ("use_cache", "logits_to_keep", "output_hidden_states") if name in rest
        }
        return {**inputs, **kept, "past_key_values": past_key_values, "attention_mask": attention_mask}

    @torch.no_grad()
    def double_length(self) -> None:
        """Let a forward take twice as many positions; what it gives up to now does not change."""
        for module in self.modules():
            if isinstance(module, S4Kernel):
                module.double_length()
        self.config.max_position_embeddings *= 2


AutoConfig.register(S4Config.model_type, S4Config, exist_ok=True)
AutoModelForCausalLM.register(S4Config, S4LanguageModel, exist_ok=True)
