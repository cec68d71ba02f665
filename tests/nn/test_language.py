"""The language model of S4 layers under transformers: a state in the place of keys and values."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fastpo.nn import S4Cache, S4Config, S4LanguageModel  # noqa: E402
from fastpo.training.batches import collate  # noqa: E402
from fastpo.training.data import Example  # noqa: E402
from fastpo.training.model import Critic, Policy, load_model, policy_inputs  # noqa: E402
from fastpo.training.rollouts import Mixture, Sampling, TransformersEngine  # noqa: E402

pytestmark = pytest.mark.once

KERNELS = {"s4": {"kernel": "dplr", "init": "legs"}, "s4d": {"kernel": "diag", "init": "inv"}}
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True, scope="module")
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(name="s4", seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "d_state": 8, "max_position_embeddings": 64}
    config = S4Config(**{**sizes, "initializer_range": 0.3, "eos_token_id": None, **KERNELS[name], **options})
    return S4LanguageModel(config).eval()


@pytest.fixture(params=KERNELS)
def model(request):
    return model_of(request.param)


# without the padding token
IDS = torch.randint(1, 20, (3, 11), generator=torch.Generator().manual_seed(1))


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def recomputed(model, ids, count, mask=None):
    """Greedy tokens, each from a forward over everything before it."""
    for _ in range(count):
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        before = None if mask is None else mask[:, :-1]
        logits = model(ids, attention_mask=before, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


def test_tokens_one_by_one_and_in_pieces(model):
    whole = model(IDS, use_cache=False)
    assert whole.past_key_values is None
    out = model(IDS[:, :5])
    cache = out.past_key_values
    assert isinstance(cache, S4Cache) and len(cache) == 2 and cache.get_seq_length() == 5 and cache.batch_size == 3
    logits = [out.logits, model(IDS[:, 5:8], past_key_values=cache).logits]
    logits += [model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(8, 11)]
    close(torch.cat(logits, 1), whole.logits)
    assert cache.get_seq_length() == 11 and cache.get_max_length() == -1
    sizes = {state.shape for state in cache.states}
    assert sizes == {(3, 16, 4)}


def test_generate_is_recomputation(model):
    expected = recomputed(model, IDS, 20)
    assert torch.equal(model.generate(IDS, max_new_tokens=20, **GREEDY), expected)
    assert torch.equal(model.generate(IDS, max_new_tokens=20, use_cache=False, **GREEDY), expected)
    # beyond what one forward takes
    assert model.generate(IDS, max_new_tokens=70, **GREEDY).shape == (3, 81)


def test_beams_and_several_sequences(model):
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, **GREEDY}
    cached = model.generate(IDS, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options)) and len(cached) == 6
    torch.manual_seed(0)
    sampled = model.generate(IDS, do_sample=True, num_return_sequences=4, max_new_tokens=6, pad_token_id=0)
    assert sampled.shape == (12, 17) and len({tuple(row.tolist()) for row in sampled}) > 3


def test_generation_continues_from_a_cache(model):
    cache = model(IDS[:, :9]).past_key_values
    found = model.generate(IDS, past_key_values=cache, max_new_tokens=6, **GREEDY)
    assert torch.equal(found, recomputed(model, IDS, 6))


def test_embeddings_in_place_of_tokens(model):
    embedded = model.get_input_embeddings()(IDS)
    close(model(inputs_embeds=embedded, use_cache=False).logits, model(IDS, use_cache=False).logits)
    found = model.generate(inputs_embeds=embedded, max_new_tokens=5, **GREEDY)
    assert torch.equal(found, recomputed(model, IDS, 5)[:, 11:])


def test_padding_on_the_left(model):
    whole = model(IDS, use_cache=False).logits
    padded = torch.cat([torch.randint(20, (3, 6)), IDS], 1)
    mask = torch.cat([torch.zeros(3, 6, dtype=torch.long), torch.ones(3, 11, dtype=torch.long)], 1)
    close(model(padded, attention_mask=mask, use_cache=False).logits[:, 6:], whole)
    expected = recomputed(model, IDS, 12)
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=12, **GREEDY)[:, 6:], expected)
    # rows of different lengths, each as alone
    lengths = [11, 4, 7]
    ragged, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate(lengths):
        ragged[row, 11 - length :], mask[row, 11 - length :] = IDS[row, :length], 1
    found = model.generate(ragged, attention_mask=mask, max_new_tokens=12, **GREEDY)
    for row, length in enumerate(lengths):
        alone = model.generate(IDS[row : row + 1, :length], max_new_tokens=12, **GREEDY)
        assert torch.equal(found[row, 11 - length :], alone[0])
    # what stands there does not matter, whatever it is
    embedded = model.get_input_embeddings()(padded).detach()
    embedded[:, :6] = torch.nan
    mask = torch.cat([torch.zeros(3, 6, dtype=torch.long), torch.ones(3, 11, dtype=torch.long)], 1)
    close(model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits[:, 6:], whole)


def test_padding_on_the_right(model):
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[:, 11:] = 0
    padded = torch.cat([IDS, torch.randint(20, (3, 5))], 1)
    found = model(padded, attention_mask=mask, use_cache=False).logits[:, :11]
    close(found, model(IDS, use_cache=False).logits)


def test_cache():
    model = model_of()
    cache = model(IDS).past_key_values
    states = [state.clone() for state in cache.states]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.states[0], states[0][[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(cache.states[1], states[1][[2, 0]])
    with pytest.raises(NotImplementedError, match="from which single tokens cannot be taken back"):
        cache.crop(3)
    assert not cache.is_compileable and not cache.is_croppable and cache.is_initialized and repr(cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.batch_size == -1 and not cache.is_initialized
    close(model(IDS, past_key_values=cache).logits, model(IDS, use_cache=False).logits)


def test_a_cache_keeps_its_weights():
    """Weights that change while a sequence is generated do not mix with its state."""
    model = model_of()
    cache = model(IDS).past_key_values
    kept = [system for _, system in cache.recurrences]
    with torch.no_grad():
        model.model.layers[0].s4.kernel.C.mul_(2)
    model(IDS)  # another one begins
    model(IDS[:, :1], past_key_values=cache)
    assert all(now is before for (_, now), before in zip(cache.recurrences, kept, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(tmp_path, tied):
    for name in KERNELS:
        model = model_of(name, tie_word_embeddings=tied)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        expected = model(IDS, use_cache=False).logits
        model.save_pretrained(tmp_path / name)
        loaded, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert type(loaded) is S4LanguageModel and not found["missing_keys"] and not found["unexpected_keys"]
        assert torch.equal(loaded(IDS, use_cache=False).logits, expected)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert torch.equal(load_model(str(tmp_path / name))(IDS, use_cache=False).logits, expected)
        # twice as long, and saved again
        loaded.double_length()
        close(loaded(IDS, use_cache=False).logits, expected)
        long = IDS.repeat(1, 10)
        before = loaded(long, use_cache=False).logits
        loaded.save_pretrained(tmp_path / "long")
        again = S4LanguageModel.from_pretrained(tmp_path / "long")
        assert again.config.max_position_embeddings == 128
        assert torch.equal(again(long, use_cache=False).logits, before)


def test_what_is_missing_is_drawn(tmp_path):
    """A checkpoint without some of the weights, as transformers loads it: the rest is there, and this is finite."""
    model = model_of()
    state = model.state_dict()
    missing = (".layers.1.", "embed_tokens", "lm_head")
    kept = {name: value for name, value in state.items() if not any(part in name for part in missing)}
    model.save_pretrained(tmp_path, state_dict=kept)
    torch.manual_seed(5)
    loaded = S4LanguageModel.from_pretrained(tmp_path)
    fresh = loaded.state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in kept.items())
    assert all(torch.isfinite(value).all() for value in fresh.values())
    assert torch.equal(fresh["model.layers.1.s4.layer.kernel.A_imag"], state["model.layers.1.s4.layer.kernel.A_imag"])
    assert (fresh["model.layers.1.norm.weight"] == 1).all() and (fresh["model.layers.1.up.bias"] == 0).all()
    assert 0.2 < fresh["model.embed_tokens.weight"].std() < 0.4
    close(loaded(IDS).logits, loaded(IDS, use_cache=False).logits)


@pytest.mark.skipif(transformers.__version__ < "5", reason="earlier ones note what is missing by modules")
def test_half_a_kernel_is_an_error(tmp_path):
    model = model_of()
    kept = model.state_dict()
    del kept["model.layers.0.s4.layer.kernel.P"]
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match="the checkpoint has no P of a kernel whose other weights it has"):
        S4LanguageModel.from_pretrained(tmp_path)


def test_loss(model):
    labels = IDS.clone()
    labels[:, :3] = -100
    out = model(IDS, labels=labels, use_cache=False)
    logprobs = out.logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    close(out.loss, -logprobs[:, 2:].mean())
    out.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.equal(model(IDS, labels=labels, return_dict=False)[0], out.loss)
    hidden = model(IDS, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    close(model.lm_head(hidden[-1]), out.logits)
    assert torch.equal(model(IDS, logits_to_keep=2, use_cache=False).logits, out.logits[:, -2:])


def test_dropout_only_while_training():
    model = model_of(dropout=0.3)
    assert torch.equal(model(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    model.train()
    out = model(IDS)
    assert out.past_key_values is None
    assert not torch.equal(out.logits, model(IDS).logits)


def test_policy_of_the_trainer(model):
    """Sequences side by side, since a packed row would be one sequence; log-probs and gradients as of each alone."""
    examples = [Example([1, 2, 3], ([4, 5], [6])), Example([7], ([8], [9, 10, 11, 12]))]
    # in fp64 what is left is rounding: the sequences beside one, and the length of the row, leave no trace
    for dtype, rtol in ((torch.float32, 1e-3), (torch.float64, 1e-11)):
        model.to(dtype)
        policy = Policy(model)
        assert policy.layout == "padded" and policy.scale is not None
        found = policy(*policy_inputs(collate(examples, torch.device("cpu"))))
        expected = []
        for k in range(2):
            for prompt, completions, *_ in examples:
                ids = torch.tensor([prompt + completions[k]])
                logprobs = model(ids, use_cache=False).logits[0].log_softmax(-1)
                expected += [logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(completions[k])]
        expected = torch.stack(expected)
        close(found, expected)
        weights, parameters = torch.linspace(-1, 1, len(found), dtype=dtype), list(model.parameters())
        grads = [torch.autograd.grad(each @ weights, parameters) for each in (found, expected)]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol / 10 * float(theirs.abs().max()))
    critic = Critic(model.float())
    assert critic.backbone(input_ids=IDS, use_cache=False).last_hidden_state.shape == (3, 11, 16)


def test_rollout_engine(model):
    """Left padding, a second model beside it, draws that do not depend on the batch; log-probs of what was drawn."""
    prompts, sampling = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], Sampling(max_new_tokens=6, seed=3, stop=(0,))
    other = model_of("s4", seed=1)
    for mixture in (None, Mixture(other, 0.4)):
        engine = TransformersEngine(lambda function: function(model), tokens=1000)
        together = engine.generate(prompts, 2, sampling, mixture=mixture)
        alone = TransformersEngine(lambda function: function(model), tokens=1).generate(
            prompts, 2, sampling, mixture=mixture
        )
        for rollouts, others, prompt in zip(together, alone, prompts, strict=True):
            for one, same in zip(rollouts, others, strict=True):
                assert one.ids == same.ids
                close(one.logprobs, same.logprobs)
                if mixture is None:
                    ids = torch.tensor([prompt + one.ids])
                    logprobs = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                    close(one.logprobs, logprobs.gather(1, torch.tensor(one.ids)[:, None])[:, 0].detach())


def test_a_prompt_is_computed_once(model):
    """The rows of a prompt begin with one state."""
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:2])))
    engine = TransformersEngine(lambda function: function(model), tokens=1000)
    engine.generate([[1, 2, 3, 4], [5, 6]], 3, Sampling(max_new_tokens=4))
    hook.remove()
    assert seen == [(2, 3)] + [(6, 1)] * 4


def test_adapters(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    before = model(IDS, use_cache=False).logits
    adapted = peft.get_peft_model(model, config).eval()
    assert (adapted(IDS, use_cache=False).logits - before).abs().max() > 0.01
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS, use_cache=False).logits, before)
    found = adapted.generate(input_ids=IDS, max_new_tokens=5, **GREEDY)
    assert torch.equal(found, recomputed(adapted, IDS, 5))


def test_errors():
    model = model_of()
    with pytest.raises(ValueError, match=r"a forward takes 64 positions \(config.max_position_embeddings\), got 65"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(TypeError, match="past_key_values must be an S4Cache, got DynamicCache"):
        model(IDS, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, at least 11\), got \(3, 5\)"):
        model(IDS, attention_mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="d_state must be even"):
        model_of(d_state=5)
    with pytest.raises(AttributeError, match=r"module 'fastpo\.nn' has no attribute 'S5'"):
        import fastpo

        fastpo.nn.S5  # noqa: B018
