"""The policy's packed log-probs against each sequence alone."""

from __future__ import annotations

import pytest
import torch

from fastpo.training.batches import collate
from fastpo.training.data import Example
from fastpo.training.model import Policy, policy_inputs

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
        for prompt, completions in examples:
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
    yield "qwen2", "packed", lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=20, **qwen, num_key_value_heads=1))
    gpt2 = dict(n_embd=16, n_layer=2, n_head=2)
    yield "gpt2", "packed", lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, **gpt2))
    # ALiBi positions and recurrent states run through a packed row
    bloom = dict(hidden_size=16, n_layer=2, n_head=2)
    yield "bloom", "padded", lambda: BloomForCausalLM(BloomConfig(vocab_size=20, **bloom))
    mamba = dict(hidden_size=16, num_hidden_layers=2, state_size=4)
    yield "mamba", "padded", lambda: MambaForCausalLM(MambaConfig(vocab_size=20, **mamba))
    yield "llama", "packed", lambda: tiny_model(20)


@pytest.mark.parametrize("name, layout, build", [pytest.param(*a, id=a[0]) for a in architectures()])
def test_packed_equals_one_by_one(name, layout, build):
    torch.manual_seed(0)
    model = build().eval()
    policy = Policy(model)
    assert policy.layout == layout
    found = policy(*policy_inputs(collate(EXAMPLES, torch.device("cpu"))))
    expected = one_by_one(model, EXAMPLES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("layout", ["packed", "padded"])
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
