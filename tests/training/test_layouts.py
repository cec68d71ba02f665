"""How models take several sequences: every one has what it has alone, and shared prefixes are computed once."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastpo.training.batches import together
from fastpo.training.data import Example
from fastpo.training.layouts import LEAST_PREFIX, ROW, attention, find_layout, run, share
from fastpo.training.model import Policy

from .conftest import tiny_model

pytestmark = pytest.mark.usefixtures("threads")
VOCABULARY = 13
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def flat(sequences):
    """Ids and positions of sequences one behind the other."""
    positions = [torch.arange(len(s)) for s in sequences]
    return torch.tensor([i for s in sequences for i in s]), torch.cat(positions)


def prefixed() -> list[list[int]]:
    """Completions of two prompts, one that goes on where another ends, one twice, one too short to share."""
    one, two, *rest = tokens(LEAST_PREFIX + 4, LEAST_PREFIX, 3, 7, 1, 5, 2)
    return [
        one + rest[0],
        two + rest[1],
        one + rest[2],
        one + rest[0] + rest[3],
        one[: LEAST_PREFIX - 1] + rest[4],
        two + rest[1],
        rest[3],
    ]


@pytest.fixture(scope="module")
def model():
    # doubles, as far as the model lets them
    return tiny_model(VOCABULARY).double()


def test_every_sequence_has_what_it_has_alone(model):
    assert find_layout(model) == "shared"
    sequences = prefixed()
    ids, positions = flat(sequences)
    weights = torch.linspace(-1, 2, len(ids) * VOCABULARY, dtype=torch.float64).view(len(ids), -1)
    parameters = list(model.parameters())

    def gradients(logits):
        return torch.autograd.grad((logits.log_softmax(-1) * weights).sum(), parameters)

    alone = torch.cat([model(input_ids=torch.tensor([s]), use_cache=False).logits[0] for s in sequences])
    together = run("shared", model, ids, positions, torch.arange(len(ids)))
    torch.testing.assert_close(together, alone)
    for ours, theirs in zip(gradients(together), gradients(alone), strict=True):
        # the model's norms and rotations are in single precision: sums of some 100 tokens' gradients in another order
        assert (ours - theirs).norm() < 100 * 2.0**-24 * theirs.norm()


def test_a_prefix_stands_once():
    sequences = prefixed()
    row = share(*flat(sequences))
    # beside the first of each prompt: what follows the prompt; of a copy nothing
    first, second = LEAST_PREFIX + 4, LEAST_PREFIX
    expected = (first + 3) + (second + 7) + 1 + 5 + (LEAST_PREFIX - 1 + 2) + 5
    assert len(row.kept) == sum(row.counts) == expected
    assert sorted(row.lengths) == sorted(map(len, {tuple(s) for s in sequences}))
    ids, positions = flat(sequences)
    # every token is where a token like it is, at its position, and every place is one's
    assert torch.equal(ids[row.kept][row.place], ids) and torch.equal(positions[row.kept][row.place], positions)
    assert torch.equal(row.place[row.kept], torch.arange(expected))


def test_copies_are_equal_to_the_bit(model):
    one, two, three = tokens(5, 30, 7)
    ids, positions = flat([one, two, three, two, one])
    found = run("shared", model.model, ids, positions, torch.arange(len(ids))).split([5, 30, 7, 30, 5])
    assert torch.equal(found[0], found[4]) and torch.equal(found[1], found[3])


def test_nothing_is_gathered_where_nothing_is_shared():
    row = share(*flat(tokens(5, 20, 3)))
    assert row.seen is None and sorted(row.counts) == [3, 5, 20]


def test_the_model_computes_the_prompt_once(model):
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    (prompt, *rest) = tokens(40, 2, 3, 4)
    ids, positions = flat([prompt + r for r in rest])
    run("shared", model, ids, positions, torch.tensor([0]))
    hook.remove()
    assert seen == [40 + 2 + 3 + 4]


@pytest.mark.parametrize("window", [4, 64])
def test_windows(window):
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, sliding_window=window)
    model = transformers.MistralForCausalLM(config).double().eval()
    assert find_layout(model) == "shared"
    sequences = prefixed()
    ids, positions = flat(sequences)
    alone = torch.cat([model(input_ids=torch.tensor([s]), use_cache=False).logits[0] for s in sequences])
    torch.testing.assert_close(run("shared", model, ids, positions, torch.arange(len(ids))), alone)


def test_attention_that_the_user_chose_stays():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SIZES, query_pre_attn_scalar=4, attn_implementation="eager")
    model = transformers.Gemma2ForCausalLM(config).eval()
    layout = find_layout(model)
    assert layout in ("packed", "padded") and model.config._attn_implementation == "eager"
    ids, positions = flat(prefixed())
    found = run(layout, model, ids, positions, torch.arange(len(ids)))
    alone = torch.cat([model(input_ids=torch.tensor([s])).logits[0] for s in prefixed()])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"is_causal": False}])
def test_attention_that_is_not_known_here_is_refused(option):
    row = share(*flat(prefixed()))
    q, k = torch.zeros(1, 4, len(row.kept), 8), torch.zeros(1, 2, len(row.kept), 8)
    with pytest.raises(ValueError, match="shared prefixes"):
        attention(torch.nn.Module(), q, k, k, None, **{ROW: row}, **option)


def test_a_model_of_other_attention_is_refused_and_not_mixed_up():
    model = tiny_model(VOCABULARY)
    model.set_attn_implementation("eager")
    ids, positions = flat(prefixed())
    with pytest.raises(ValueError, match="the model has eager"):
        run("shared", model, ids, positions, torch.arange(len(ids)))


def test_recurrent_models_are_padded():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert find_layout(transformers.MambaForCausalLM(config).eval()) == "padded"


def test_models_of_few_positions_are_asked_with_few_tokens():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=10)
    assert find_layout(transformers.GPT2LMHeadModel(config).eval()) == "shared"


def test_the_chosen_attention_is_not_saved(model, tmp_path):
    find_layout(model)
    model.save_pretrained(tmp_path)
    assert "fastpo" not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_policies_of_copies(model):
    """A critic's backbone, or any copy, takes the layout that was found for the policy."""
    policy = Policy(model)
    copied = tiny_model(VOCABULARY).double()
    assert copied.config._attn_implementation == "sdpa"
    ids, positions = flat(prefixed())
    keep = torch.arange(len(ids))
    torch.testing.assert_close(
        run(policy.layout, copied, ids, positions, keep), run(policy.layout, model, ids, positions, keep)
    )


def test_examples_of_one_prompt_go_together():
    def example(prompt: int, length: int) -> Example:
        return Example([prompt] * 10, ([0] * length,))

    examples = [example(1, 5), example(2, 5), example(1, 5), example(1, 5), example(2, 5)]
    assert together(examples, 1000) == [[0, 2, 3], [1, 4]]
    # 15 tokens each: two fit
    assert together(examples, 30) == [[0, 2], [1, 4], [3]]
    assert together(examples, 15) == [[0], [1], [2], [3], [4]]
