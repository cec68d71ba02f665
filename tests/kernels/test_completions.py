"""completion_logprobs and sequence_logprobs: positions, masks and heads, against a loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastpo
from fastpo.kernels.completions import head_of

SIZE, VOCAB = 16, 50


def make(batch: int = 3, length: int = 7, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(batch, length, SIZE, generator=g, dtype=torch.float64).to(dtype),
        "head": torch.randn(VOCAB, SIZE, generator=g, dtype=torch.float64).to(dtype),
        "input_ids": torch.randint(VOCAB, (batch, length), generator=g),
        "completion_mask": torch.rand(batch, length, generator=g) < 0.6,
    }


def by_hand(given: dict[str, Tensor], shift: int = 1, temperature: Tensor | None = None) -> Tensor:
    """One token at a time."""
    out = torch.zeros(given["input_ids"].shape, dtype=torch.float64)
    for b, t in given["completion_mask"].nonzero().tolist():
        if t >= shift:
            logits = given["head"].double() @ given["hidden"][b, t - shift].double()
            logits = logits if temperature is None else logits / temperature[b, t]
            out[b, t] = logits.log_softmax(0)[given["input_ids"][b, t]]
    return out


def packed(given: dict[str, Tensor], lengths: list[int]) -> dict[str, Tensor]:
    """The first tokens of each sequence in one row, with some that belong to none after them."""
    pieces = {n: [given[n][b, :k] for b, k in enumerate(lengths)] for n in ("hidden", "input_ids", "completion_mask")}
    extra = {n: [given[n][0, :2]] for n in pieces}
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return {"head": given["head"], "cu_seqlens": ends} | {n: torch.cat(p + extra[n]) for n, p in pieces.items()}


class TestPositions:
    @pytest.mark.parametrize("shift", [0, 1, 2, 6, 7, 9])
    def test_padded(self, shift):
        given = make()
        found = fastpo.completion_logprobs(**given, shift=shift)
        torch.testing.assert_close(found, by_hand(given, shift), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("shift", [0, 1, 2, 5])
    @pytest.mark.parametrize("lengths", [[7, 3, 5], [0, 7, 0], [1, 1, 1]], ids=str)
    def test_packed(self, shift, lengths):
        """No sequence sees another, and tokens after the last boundary count for none."""
        given = make()
        given["completion_mask"][:] = True
        want = [by_hand(given, shift)[b, :k] for b, k in enumerate(lengths)]
        found = fastpo.completion_logprobs(**packed(given, lengths), shift=shift)
        torch.testing.assert_close(
            found, torch.cat([*want, torch.zeros(2, dtype=torch.float64)]), rtol=1e-12, atol=1e-12
        )

    def test_only_the_mask_matters(self):
        """Hidden states that predict nothing that counts, and ids that do not, may hold anything."""
        given = make()
        want = fastpo.completion_logprobs(**given)
        used = torch.zeros_like(given["completion_mask"])
        used[:, :-1] = given["completion_mask"][:, 1:]
        given["hidden"][~used] = torch.nan
        given["input_ids"][~given["completion_mask"]] = 10**6
        hidden = given.pop("hidden").requires_grad_()
        found = fastpo.completion_logprobs(hidden, **given)
        assert torch.equal(found, want)
        (grad,) = torch.autograd.grad(found.sum(), hidden)
        assert (grad[~used] == 0).all() and grad[used].isfinite().all() and grad[used].any()

    def test_statistics_and_temperature(self):
        given = make()
        temperature = torch.rand(3, 7, dtype=torch.float64) + 0.5
        out = fastpo.completion_logprobs(**given, temperature=temperature, stats=("entropy", "top1"))
        torch.testing.assert_close(out.logprobs, by_hand(given, 1, temperature), rtol=1e-12, atol=1e-12)
        p = (given["hidden"] @ given["head"].t())[:, :-1] / temperature[:, 1:, None]
        mask = given["completion_mask"][:, 1:]
        entropy = torch.where(mask, -(p.softmax(-1) * p.log_softmax(-1)).sum(-1), 0)
        torch.testing.assert_close(out.entropy[:, 1:], entropy, rtol=1e-12, atol=1e-12)
        assert torch.equal(out.top1[:, 1:], torch.where(mask, p.argmax(-1), -1))
        assert (out.entropy[:, 0] == 0).all() and (out.top1[:, 0] == -1).all() and out.logsumexp is None

    @pytest.mark.parametrize("shift", [0, 1, 3])
    def test_allowed_tokens(self, shift):
        """The set of a token goes with the hidden state that predicts it."""
        given = make()
        mask = torch.rand(3, 7, VOCAB, generator=torch.Generator().manual_seed(1)) < 0.5
        mask.scatter_(-1, given["input_ids"][..., None], True)
        want = torch.zeros(3, 7, dtype=torch.float64)
        for b, t in given["completion_mask"].nonzero().tolist():
            if t >= shift:
                logits = (given["head"] @ given["hidden"][b, t - shift]).masked_fill(~mask[b, t], -math.inf)
                want[b, t] = logits.log_softmax(0)[given["input_ids"][b, t]]
        words = fastpo.pack_allowed(mask)
        found = fastpo.completion_logprobs(**given, shift=shift, allowed=words)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
        rest = {n: given[n].flatten(0, 1) for n in ("hidden", "input_ids", "completion_mask")}
        rest |= {"head": given["head"], "cu_seqlens": torch.tensor([0, 7, 14, 21], dtype=torch.int32)}
        found = fastpo.completion_logprobs(**rest, allowed=words.flatten(0, 1), shift=shift)
        torch.testing.assert_close(found, want.flatten(), rtol=1e-12, atol=1e-12)
        every = torch.full_like(words[0, 0], -1)
        found = fastpo.sequence_logprobs(**given, allowed=every)
        torch.testing.assert_close(found, fastpo.sequence_logprobs(**given), rtol=1e-12, atol=1e-12)


class TestSequences:
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_padded_and_packed(self, reduction):
        given = make()
        given["completion_mask"][1] = False
        tokens = by_hand(given)
        counted = given["completion_mask"][:, 1:].sum(1).clamp(min=1)
        want = tokens.sum(1) / (counted if reduction == "mean" else 1)
        found = fastpo.sequence_logprobs(**given, reduction=reduction)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
        assert found[1] == 0
        found = fastpo.sequence_logprobs(**packed(given, [7, 7, 7]), reduction=reduction)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)

    def test_gradient(self):
        given = make(2, 4)
        ids, mask = given["input_ids"], given["completion_mask"]
        leaves = [given["hidden"].requires_grad_(), given["head"].requires_grad_()]
        for layout in ({}, {"cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32)}):

            def function(hidden, weight, layout=layout):
                if layout:
                    hidden = hidden.flatten(0, 1)
                tokens = (ids.flatten(), mask.flatten()) if layout else (ids, mask)
                return fastpo.sequence_logprobs(hidden, weight, *tokens, reduction="mean", **layout)

            assert torch.autograd.gradcheck(function, leaves)

    def test_sums_in_double(self):
        """Sixty thousand equal log-probs: fp32 partial sums would be off by their last digits."""
        count = 60_000
        ids, mask = torch.zeros(1, count, dtype=torch.int64), torch.ones(1, count, dtype=torch.bool)
        found = fastpo.sequence_logprobs(torch.zeros(1, count, 1), torch.zeros(3, 1), ids, mask)
        one = torch.tensor(-math.log(3)).double()
        assert found.dtype == torch.float32 and abs(found.item() / ((count - 1) * one) - 1) < 2**-22


class TestHeads:
    def logits(self, head: nn.Module, given: dict[str, Tensor]) -> Tensor:
        logits = head(given["hidden"])[:, :-1].log_softmax(-1)
        taken = logits.gather(-1, given["input_ids"][:, 1:, None])[..., 0]
        return torch.where(given["completion_mask"][:, 1:], taken, 0)

    def check(self, head: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        """Values, and the gradients of every parameter that learns, are those of the module's own forward."""
        given = make(dtype=dtype)
        del given["head"]
        given["hidden"].requires_grad_()
        learning = {"hidden": given["hidden"]} | {n: p for n, p in head.named_parameters() if p.requires_grad}
        results = []
        for out in (
            self.logits(head, given),
            fastpo.completion_logprobs(given["hidden"], head, *list(given.values())[1:]),
        ):
            grads = torch.autograd.grad(out.sum(), list(learning.values()), allow_unused=True)
            results.append([out if out.shape[1] == 6 else out[:, 1:], *grads])
        for name, theirs, ours in zip(("logprobs", *learning), *results, strict=True):
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    def test_linear(self):
        for bias in (False, True):
            self.check(nn.Linear(SIZE, VOCAB, bias=bias).double())

    def peft_head(self, **config) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = nn.ModuleDict({"body": nn.Linear(SIZE, SIZE), "lm_head": nn.Linear(SIZE, VOCAB)}).double()
        config = {"r": 3, "target_modules": ["lm_head"], "init_lora_weights": False} | config
        model = get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=False)
        return model.base_model.model["lm_head"]

    @pytest.mark.parametrize(
        "config", [{}, {"use_rslora": True, "lora_alpha": 4}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str
    )
    def test_lora(self, config):
        head = self.peft_head(**config)
        head.eval()
        self.check(head)

    def test_lora_states(self):
        head = self.peft_head()
        plain, adapted = head_of(head.get_base_layer()), head_of(head)
        assert adapted.lora is not None and adapted.weight is plain.weight
        head.enable_adapters(False)
        assert head_of(head).lora is None
        self.check(head)
        head.enable_adapters(True)
        head.merge()
        assert head_of(head).lora is None
        self.check(head)
        head._disable_adapters = True
        with pytest.raises(ValueError, match="merged into the weight"):
            head_of(head)

    def test_several_adapters(self):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = nn.ModuleDict({"body": nn.Linear(SIZE, SIZE), "lm_head": nn.Linear(SIZE, VOCAB)}).double()
        common = {"target_modules": ["lm_head"], "init_lora_weights": False}
        model = get_peft_model(model, LoraConfig(r=3, **common), autocast_adapter_dtype=False)
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=5, **common), autocast_adapter_dtype=False)
        model.base_model.set_adapter(["default", "second"])
        head = model.base_model.model["lm_head"]
        assert head_of(head).lora[0].shape == (5, SIZE)
        self.check(head)

    def test_a_copy_that_is_trained(self):
        head = self.peft_head(target_modules=["body"], modules_to_save=["lm_head"])
        with torch.no_grad():
            head.modules_to_save["default"].weight.add_(1)
        assert head_of(head).weight is head.modules_to_save["default"].weight
        self.check(head)

    def test_adapter_in_fp32(self):
        """PEFT's default under a bf16 model: the adapter's gradients come back in its own dtype."""
        head = self.peft_head().to(torch.bfloat16)
        head.lora_A.float()
        head.lora_B.float()
        given = make(dtype=torch.bfloat16)
        given.pop("head")
        fastpo.completion_logprobs(head=head, **given).sum().backward()
        assert head.lora_A["default"].weight.grad.dtype == torch.float32
        assert head.lora_B["default"].weight.grad.any()

    def test_refused(self):
        with pytest.raises(ValueError, match="variant of LoRA"):
            head_of(self.peft_head(use_dora=True))
        with pytest.raises(ValueError, match=r"lora_dropout=0\.5, which is not applied here"):
            head_of(self.peft_head(lora_dropout=0.5).train())

        class Scaled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        patched, hooked = nn.Linear(2, 3), nn.Linear(2, 3)
        patched.forward = lambda x: 2 * x
        hooked.register_forward_hook(lambda module, given, out: 2 * out)
        for bad in (patched, hooked):
            with pytest.raises(TypeError, match="got Linear with hooks or a forward of its own"):
                head_of(bad)
        for bad in (Scaled(2, 3), nn.Embedding(2, 3), nn.Sequential(nn.Linear(2, 3)), "head"):
            with pytest.raises(TypeError, match=r"head must be a weight.*got"):
                head_of(bad)


def test_autocast():
    """As a linear layer under autocast; the gradients of fp32 parameters are fp32."""
    given = make(dtype=torch.float32)
    head = nn.Linear(SIZE, VOCAB)
    given.pop("head")
    given["hidden"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastpo.completion_logprobs(head=head, **given)
    narrow = nn.Linear(SIZE, VOCAB).bfloat16()
    narrow.load_state_dict(head.state_dict())
    same = fastpo.completion_logprobs(head=narrow, **{**given, "hidden": given["hidden"].bfloat16()})
    assert torch.equal(out, same)
    out.sum().backward()
    assert head.weight.grad.dtype == given["hidden"].grad.dtype == torch.float32


def test_compiled():
    torch._dynamo.reset()
    given = make(dtype=torch.float32)
    ids, mask = given["input_ids"], given["completion_mask"]
    leaves = [given["hidden"].requires_grad_(), given["head"].requires_grad_()]

    def step(hidden, weight):
        return fastpo.sequence_logprobs(hidden, weight, ids, mask) * 2

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out = f(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for ours, compiled in zip(*results, strict=True):
        torch.testing.assert_close(ours, compiled, rtol=1e-6, atol=1e-6)


def test_bad_input():
    given = make()
    ids, mask, hidden = given["input_ids"], given["completion_mask"], given["hidden"]
    ends = torch.tensor([0, 7], dtype=torch.int32)
    for function in (fastpo.completion_logprobs, fastpo.sequence_logprobs):
        for change, error, message in (
            ({"hidden": hidden[0]}, ValueError, r"hidden has shape \(7, 16\), expected \(B, T, H\)"),
            ({"cu_seqlens": ends}, ValueError, r"hidden has shape \(3, 7, 16\), expected \(N, H\) with cu_seqlens"),
            ({"input_ids": ids[:, 1:]}, ValueError, r"input_ids has shape \(3, 6\), expected \(3, 7\)"),
            ({"completion_mask": mask.long()}, TypeError, "completion_mask must have dtype bool"),
            ({"completion_mask": mask[:2]}, ValueError, "completion_mask has shape"),
            ({"shift": -1}, ValueError, "shift must not be negative"),
            ({"shift": 1.0}, TypeError, "shift must be an int"),
            (
                {"head": nn.Linear(SIZE, VOCAB).double(), "bias": torch.zeros(VOCAB)},
                TypeError,
                "bias goes with a weight",
            ),
            ({"rows": torch.tensor([0])}, TypeError, "rows is not an option here"),
            ({"temperature": torch.ones(3)}, ValueError, "temperature has shape"),
            ({"input_ids": torch.where(mask, -100, ids)}, IndexError, "is -100, out of range"),
            ({"input_ids": ids + VOCAB}, IndexError, "out of range for a vocabulary of 50"),
        ):
            with pytest.raises(error, match=message):
                function(**given | change)
    flat = {"hidden": hidden[0], "input_ids": ids[0], "completion_mask": mask[0], "head": given["head"]}
    for bad in (torch.tensor([0, 8]), torch.tensor([1, 7]), torch.tensor([0, 5, 3])):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to at most 7"):
            fastpo.completion_logprobs(**flat, cu_seqlens=bad.int())
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'max'"):
        fastpo.sequence_logprobs(**given, reduction="max")
    with pytest.raises(TypeError, match="stats are per token"):
        fastpo.sequence_logprobs(**given, stats=("entropy",))
