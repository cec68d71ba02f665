"""The policy's packed log-probs against each sequence alone."""

from __future__ import annotations

import pytest
import torch

from fastpo.training.batches import collate
from fastpo.training.data import Example
from fastpo.training.errors import UserError
from fastpo.training.model import Policy, policy_inputs, recompute_layers
from tests.memory import peak_allocated

from .conftest import tiny_model

EXAMPLES = [
    Example([1, 2, 3], ([4, 5], [6])),
    Example([7], ([8], [9, 10, 11, 12])),
    Example([3, 2], ([1, 0, 5], [4])),
]


def one_by_one(model, examples):
    """Log-probs of all completions, in packed order, by plain torch."""
    out = []
    for k in range(2):
        for prompt, completions, *_ in examples:
            ids = torch.tensor([prompt + completions[k]])
            logprobs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            first = len(prompt) - 1
            out += [logprobs[first + i, token] for i, token in enumerate(completions[k])]
    return torch.stack(out)


def architectures():
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        MambaConfig,
        MambaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    qwen = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    yield "qwen2", "shared", lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=20, **qwen, num_key_value_heads=1))
    gpt2 = dict(n_embd=16, n_layer=2, n_head=2)
    yield "gpt2", "shared", lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, **gpt2))
    # ALiBi positions and recurrent states run through a packed row
    bloom = dict(hidden_size=16, n_layer=2, n_head=2)
    yield "bloom", "padded", lambda: BloomForCausalLM(BloomConfig(vocab_size=20, **bloom))
    mamba = dict(hidden_size=16, num_hidden_layers=2, state_size=4)
    yield "mamba", "padded", lambda: MambaForCausalLM(MambaConfig(vocab_size=20, **mamba))
    yield "llama", "shared", lambda: tiny_model(20)


@pytest.mark.parametrize("name, layout, build", [pytest.param(*a, id=a[0]) for a in architectures()])
def test_packed_equals_one_by_one(name, layout, build):
    torch.manual_seed(0)
    model = build().eval()
    policy = Policy(model)
    assert policy.layout == layout
    found = policy(*policy_inputs(collate(EXAMPLES, torch.device("cpu"))))
    expected = one_by_one(model, EXAMPLES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name, layout, build", [pytest.param(*a, id=a[0]) for a in architectures()])
def test_what_a_forward_computes(name, layout, build):
    """All positions of a row of sequences, or of a rectangle that is as long as the longest one: counted by a hook."""
    policy, shapes = Policy(build().eval()), []
    policy.model.get_input_embeddings().register_forward_hook(lambda *given: shapes.append(given[1][0].shape))
    policy(*policy_inputs(collate(EXAMPLES, torch.device("cpu"))))
    lengths = [(len(example.prompt), len(c)) for example in EXAMPLES for c in example.completions]
    there, computed = policy.computed(lengths)
    assert there == sum(map(sum, lengths)) == 24 and computed == shapes[0].numel() == (30 if layout == "padded" else 24)


def saved_bytes(function):
    """What a forward leaves for its backward, and the forward's result."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(storage.nbytes() for storage in storages.values()), result


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name, layout, build", [pytest.param(*a, id=a[0]) for a in architectures()])
def test_layers_are_computed_again(name, layout, build, adapters):
    """With the same values and gradients, and dropout as it was: switched off."""
    torch.manual_seed(0)
    model = build().eval()
    if adapters:
        from peft import LoraConfig, get_peft_model

        targets = {"gpt2": "c_fc", "bloom": "query_key_value", "mamba": "in_proj"}.get(name, "v_proj")
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=[targets], init_lora_weights=False, fan_in_fan_out=name == "gpt2")
        ).eval()
    policy = Policy(model)
    inputs = policy_inputs(collate(EXAMPLES, torch.device("cpu")))
    parameters = [p for p in policy.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, 12)
    before, expected = saved_bytes(lambda: policy(*inputs))
    slopes = torch.autograd.grad(expected @ weights, parameters, allow_unused=True)
    recompute_layers(policy)
    after, found = saved_bytes(lambda: policy(*inputs))
    assert torch.equal(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found @ weights, parameters, allow_unused=True), slopes, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))
    # what is left is the weights around the layers, and the head's
    assert after < before / 2
    assert not any(module.training for module in model.modules())


def test_generation_keeps_its_cache():
    """Layers are computed again only where there is a backward."""
    model = tiny_model(20)
    ids = torch.tensor([[1, 2, 3]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    recompute_layers(model)
    with torch.no_grad():
        assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 3
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), expected)


def test_a_model_without_layers():
    with pytest.raises(UserError, match="names no layers"):
        recompute_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_gradients_too(layout):
    model = tiny_model(20)
    weights = torch.randn(12, generator=torch.Generator().manual_seed(0))
    found = Policy(model, layout)(*policy_inputs(collate(EXAMPLES, torch.device("cpu"))))
    expected = one_by_one(model, EXAMPLES)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found @ weights, parameters),
        torch.autograd.grad(expected @ weights, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def scaled_heads():
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
        PhiConfig,
        PhiForCausalLM,
    )

    size = dict(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    grouped = size | {"num_key_value_heads": 2}
    for name, scale, config, model in (
        ("gemma2", (1.0, 3.0), Gemma2Config(**grouped, head_dim=8, final_logit_softcapping=3.0), Gemma2ForCausalLM),
        ("cohere", (0.25, None), CohereConfig(**grouped, logit_scale=0.25), CohereForCausalLM),
        ("granite", (0.125, None), GraniteConfig(**grouped, logits_scaling=8.0), GraniteForCausalLM),
        ("neox", (1.0, None), GPTNeoXConfig(**size), GPTNeoXForCausalLM),
        # a head with a bias
        ("phi", (1.0, None), PhiConfig(**grouped), PhiForCausalLM),
    ):
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        yield pytest.param(scale, lambda config=config, model=model: model(config), id=name)


def check_policy(model, scale):
    policy = Policy(model.eval())
    assert policy.scale == scale
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    batch = policy_inputs(collate(EXAMPLES, torch.device("cpu")))
    found, expected = policy(*batch), one_by_one(model, EXAMPLES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(12, generator=torch.Generator().manual_seed(0))
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(out @ weights, parameters, allow_unused=True) for out in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("scale, build", list(scaled_heads()))
def test_what_models_do_to_their_logits(scale, build):
    torch.manual_seed(0)
    check_policy(build(), scale)


@pytest.mark.parametrize("tied", [False, True])
def test_no_logits(tied):
    """A model with a large vocabulary: the head adds its gradient and the driver's buffer to what is below it."""
    model = tiny_model(20_000, tied=tied)
    batch = collate([Example([1] * 20, ([2] * 40, [3] * 40))] * 8, torch.device("cpu"))
    policy, inputs = Policy(model), policy_inputs(batch)
    policy(*inputs).sum().backward()

    def step():
        policy(*inputs).sum().backward()

    def without_head():
        ids, positions = inputs[:2]
        out = model.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        out.last_hidden_state.sum().backward()

    head = model.get_output_embeddings().weight.numel() * 4
    logits = len(batch.targets) * 20_000 * 4
    peaks = []
    for function in (step, without_head):
        model.zero_grad()
        peaks.append(peak_allocated(function))
    added = peaks[0] - peaks[1]
    # the buffer, hidden states and their gradient, a few numbers per row
    assert added < head + (torch.get_num_threads() << 20) + len(batch.targets) * (4 * 16 * 4 + 200) < logits / 10


def test_unknown_heads_take_the_logits():
    """What comes after the head is not guessed."""

    class Odd(type(tiny_model(20))):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits - out.logits.abs()
            return out

    torch.manual_seed(0)
    check_policy(Odd(tiny_model(20).config), None)


@pytest.mark.parametrize("target", [["q_proj", "lm_head"], ["q_proj"], ["embed_tokens"]], ids=str)
def test_adapters(target):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=target, init_lora_weights=False)
    check_policy(get_peft_model(tiny_model(20), config), (1.0, None))


@pytest.mark.parametrize("known", [True, False])
def test_values_and_several_tokens(known):
    """A head of the algorithm's own on the hidden states, and log-probs of K tokens at each place."""
    model = tiny_model(20)
    own = torch.nn.Sequential(torch.nn.Linear(16, 1), torch.nn.Flatten(0))
    policy = Policy(model, own=own)
    if not known:
        policy.scale = None
    batch = policy_inputs(collate(EXAMPLES, torch.device("cpu")))
    more = torch.stack([batch[3], batch[3].flip(0), torch.full_like(batch[3], -100)], 1)
    found = policy(*batch[:3], more, values=True)
    torch.testing.assert_close(found["logprobs"][:, 0], one_by_one(model, EXAMPLES), rtol=1e-5, atol=1e-5)
    out = model(input_ids=batch[0][None], position_ids=batch[1][None], use_cache=False, output_hidden_states=True)
    p = out.logits[0, batch[2]].log_softmax(-1)
    torch.testing.assert_close(found["logprobs"][:, 1], p.gather(1, more[:, 1:2])[:, 0], rtol=1e-5, atol=1e-5)
    assert found["logprobs"][:, 2].eq(0).all()
    values = own(out.hidden_states[-1][0, batch[2]])
    torch.testing.assert_close(found["values"], values, rtol=1e-5, atol=1e-5)
    weights, parameters = torch.linspace(-1, 2, len(values)), list(policy.parameters())
    ours, theirs = (
        torch.autograd.grad(value @ weights + logprobs @ weights, parameters, retain_graph=True)
        for value, logprobs in (
            (found["values"], found["logprobs"][:, 1]),
            (values, p.gather(1, more[:, 1:2])[:, 0]),
        )
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
