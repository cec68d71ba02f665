"""The built-in task for masked-diffusion language models: the same sums, the same prompts, as often wrong answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from fastpo.kernels import token_kl, token_logprobs
from fastpo.losses import ElboNodes, elbo, noise_tokens
from fastpo.training.denoising import Denoiser, DenoisingEngine
from fastpo.training.rollouts import Sampling
from fastpo.training.task import (
    ANSWER_LENGTH,
    CHARACTERS,
    EOS,
    FIT_LR,
    LARGEST,
    REFERENCE,
    WRONG_SHARE,
    Progress,
    answer,
    gain,
    new_tokenizer,
    prompts,
)

MASK = EOS + 1

FIT_STEPS = 700
CLEAN_STEPS = 600  # of them on right answers only
FIT_BATCH = 32


def _new_model() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=MASK + 1,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,
        eos_token_id=EOS,
    )
    return BertForMaskedLM(config).eval()


def _ids(text: str) -> list[int]:
    return [CHARACTERS.index(c) for c in text]


def _fit(model: Denoiser, seed: int, progress: Progress) -> None:
    """As the causal model is fitted; at every step all numbers of hidden tokens, by the bound on the likelihood."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    everything = [p for part in prompts(seed) for p in part]
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIT_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FIT_LR, total_steps=FIT_STEPS, pct_start=0.1)
    times = torch.arange(1, ANSWER_LENGTH + 1, dtype=torch.float64) / ANSWER_LENGTH
    nodes = ElboNodes(times, torch.full_like(times, 1 / ANSWER_LENGTH))
    for step in range(FIT_STEPS):
        share = WRONG_SHARE if step >= CLEAN_STEPS else 0.0
        questions = rng.choices(everything, k=FIT_BATCH)
        texts = [str(rng.randint(0, 2 * LARGEST)) if rng.random() < share else answer(q) for q in questions]
        answers = torch.tensor([[*_ids(text), *[EOS] * (ANSWER_LENGTH - len(text))] for text in texts])
        lengths = torch.tensor([len(q) for q in questions])
        padded = torch.tensor([[*_ids(q), *[EOS] * (int(lengths.max()) - len(q))] for q in questions])
        noised = noise_tokens(answers, times, MASK, generator=generator)
        logits = model.logits(
            padded.repeat(ANSWER_LENGTH, 1), lengths.repeat(ANSWER_LENGTH), noised.tokens.flatten(0, 1)
        )
        logprobs = token_logprobs(logits, answers.repeat(ANSWER_LENGTH, 1)).view_as(noised.tokens)
        loss = -elbo(logprobs, noised.masked, nodes, rate="count").mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step + 1, {"loss": loss.item()})


def build(folder: Path, seed: int, progress: Progress) -> None:
    """Fit the reference and write it into the run's folder."""
    torch.manual_seed(seed)
    model = _new_model()
    _fit(Denoiser(model, MASK, ANSWER_LENGTH), seed, progress)
    model.save_pretrained(folder / REFERENCE)
    tokenizer = new_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(folder / REFERENCE)


@torch.no_grad()
def evaluate(policy: Denoiser, reference: Denoiser, seed: int, times: int = 8) -> dict[str, float]:
    """Accuracy of answers sampled for the held-out prompts, and KL(policy || reference) where the answer is hidden.

    The KL, in nats per answer, is exact at that one step; of the steps that follow it knows nothing. The gain is in
    accuracy over the reference, which answers with the same draws.
    """
    questions = prompts(seed)[1]
    device = next(policy.parameters()).device
    sampling = Sampling(ANSWER_LENGTH, stop=(EOS,), seed=seed)
    characters = (*CHARACTERS, "", "")

    def shares(model: Denoiser) -> list[float]:
        found = DenoisingEngine(model, tokens=16384).generate([_ids(q) for q in questions], times, sampling)
        texts = [["".join(characters[token] for token in each.ids) for each in of] for of in found]
        return [sum(text == answer(q) for text in of) / times for q, of in zip(questions, texts, strict=True)]

    right = shares(policy)
    lengths = torch.tensor([len(q) for q in questions], device=device)
    padded = torch.tensor([[*_ids(q), *[EOS] * (int(lengths.max()) - len(q))] for q in questions], device=device)
    hidden = padded.new_full((len(questions), ANSWER_LENGTH), MASK)
    # the mask itself is no answer
    ours, theirs = (model.logits(padded, lengths, hidden)[..., :MASK].float() for model in (policy, reference))
    kl = token_kl(ours, theirs, direction="reverse").sum(1).mean()
    return {"accuracy": sum(right) / len(right), "kl": float(kl), **gain(right, shares(reference))}
