"""The built-in task: a character-level transformer that adds small numbers, and often adds them wrongly.

A reference is fitted: first it learns to add, then from answers of which a share is wrong that the right sum
is only one thing to say. Data are sampled from it: of its answers to one prompt, a right one is chosen and a wrong one
rejected, as a verifier says; single completions are the two sides of these pairs with their labels; lists are four
answers with their scores; demonstrations are all its answers with rewards, or only the right ones.
The optimum is known: always the right sum. A fifth of the prompts has no preferences and is what accuracy is
measured on. Reward models are measured by how they rank such pairs of the held-out prompts. Of annotators, where there
are any, a few prefer the wrong answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import losses
from fastpo.algorithms import Algorithm, Online, Refining, RewardModel, Sample
from fastpo.reference.sequence import sequence_sum
from fastpo.rewards import rubric_score
from fastpo.training.batches import collate
from fastpo.training.data import Example, write_rows
from fastpo.training.model import Policy, load_model, policy_inputs
from fastpo.training.scorers import BradleyTerryJudge, Combined, Part

LARGEST = 19
WRONG_SHARE = 0.6
ANSWER_LENGTH = 3  # two digits and EOS
CHARACTERS = "0123456789+="
EOS = len(CHARACTERS)
IGNORE = -100

# in the run's folder
REFERENCE = "task/reference"
PREFERRED = "task/preferred"
DATA = {
    "pairwise": "task/pairs.jsonl",
    "unpaired": "task/completions.jsonl",
    "lists": "task/lists.jsonl",
    "identifiers": "task/identifiers.jsonl",
    "demonstrations": "task/demonstrations.jsonl",
    "hindsight": "task/pairs.jsonl",
    "tools": "task/calls.jsonl",
    "decisions": "task/decisions.jsonl",
    "prompts": "task/prompts.jsonl",
}
HELD_OUT = "task/held_out.jsonl"
ANNOTATORS = 8
# those of them who prefer what is wrong
CONTRARY = (1, 4, 6)

# told the number of steps done and their metrics
Progress = Callable[[int, dict[str, float]], None]

# what two of the numbers of `evaluate` are
ACCURACY = "(answers sampled at temperature 1 for held-out prompts)"
KL = "(of the policy to the reference, exact over the vocabulary, on those answers)"

PREFER_STEPS = 30
PREFER_BATCH = 32
PREFER_LR = 5e-4

FIT_STEPS = 800
CLEAN_STEPS = 600  # of them on right answers only
FIT_BATCH = 128
FIT_LR = 3e-3
SAMPLES_PER_PROMPT = 16
LIST = 4  # answers in one list
# that of the right sum; flows of 0, as before training, are then below all others, and leave no probability over for
# answers that the data lack
LOG_REWARD = 5.0


def prompts(seed: int) -> tuple[list[str], list[str]]:
    """All prompts in two parts: those that preferences are made for, and a fifth that is held out."""
    everything = [f"{a}+{b}=" for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(seed).shuffle(everything)
    cut = len(everything) // 5
    return everything[cut:], everything[:cut]


def answer(prompt: str) -> str:
    """The verifier's knowledge."""
    a, b = prompt[:-1].split("+")
    return str(int(a) + int(b))


def _ids(text: str) -> list[int]:
    return [CHARACTERS.index(c) for c in text]


def _new_model(architecture: str) -> Any:
    if architecture == "s4":
        from fastpo.nn import S4Config, S4LanguageModel

        # prompts and answers have 9 characters at most, which a step of 1/10 of the memory's length can see
        return S4LanguageModel(
            S4Config(
                vocab_size=EOS + 1,
                hidden_size=64,
                num_hidden_layers=2,
                intermediate_size=128,
                d_state=16,
                dt_min=0.02,
                dt_max=0.5,
                max_position_embeddings=16,
                eos_token_id=EOS,
                pad_token_id=EOS,
                tie_word_embeddings=False,
            )
        )
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=EOS + 1,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def new_tokenizer() -> Any:
    """One token per character, in a form that transformers loads like any other tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(CHARACTERS)} | {"<eos>": EOS}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()  # without it, spaces stand between the characters
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def _fit(model: Any, seed: int, progress: Progress) -> None:
    """Supervised fitting: right answers, then answers of which a share is a random number."""
    rng = random.Random(seed)
    everything = [p for part in prompts(seed) for p in part]
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIT_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FIT_LR, total_steps=FIT_STEPS, pct_start=0.1)
    for step in range(FIT_STEPS):
        share = WRONG_SHARE if step >= CLEAN_STEPS else 0.0
        rows = []
        for prompt in rng.choices(everything, k=FIT_BATCH):
            text = str(rng.randint(0, 2 * LARGEST)) if rng.random() < share else answer(prompt)
            rows.append((_ids(prompt), [*_ids(text), EOS]))
        longest = max(len(p) + len(a) for p, a in rows)
        ids = torch.tensor([p + a + [EOS] * (longest - len(p) - len(a)) for p, a in rows])
        labels = torch.tensor([[IGNORE] * len(p) + a + [IGNORE] * (longest - len(p) - len(a)) for p, a in rows])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step + 1, {"loss": loss.item()})


@torch.no_grad()
def sample(model: Any, questions: Sequence[str], times: int, seed: int) -> list[tuple[list[str], Tensor, Tensor]]:
    """Answers at temperature 1, `times` per question.

    Returns, for the questions of each length together: the question of each row, the tokens (rows, length) of
    question and answer, and a mask (rows, ANSWER_LENGTH) of the answer's tokens up to and with EOS.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    out = []
    for length in sorted({len(q) for q in questions}):
        same = [q for q in questions if len(q) == length for _ in range(times)]
        ids = torch.tensor([_ids(q) for q in same], device=device)
        for _ in range(ANSWER_LENGTH):
            probabilities = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float().softmax(-1)
            # drawn on the CPU, so that every device draws the same
            ids = torch.cat([ids, torch.multinomial(probabilities.cpu(), 1, generator=generator).to(device)], 1)
        ended = (ids[:, length:] == EOS).cumsum(1)
        counts = (ended == 0) | ((ended == 1) & (ids[:, length:] == EOS))
        out.append((same, ids, counts))
    return out


def _texts(ids: Tensor, counts: Tensor) -> list[str]:
    """The answers as text; one that does not end in time has three digits, which no sum here has."""
    rows = zip(ids[:, -ANSWER_LENGTH:].tolist(), counts.tolist(), strict=True)
    return ["".join((*CHARACTERS, "")[t] for t, keep in zip(*row, strict=True) if keep) for row in rows]


def score(question: str, text: str) -> float:
    """1 for the right sum, the less the farther from it; an answer that is no number is as far as can be."""
    right = answer(question)
    if text == right:
        return 1.0
    off = abs(int(text) - int(right)) if text.isdigit() else 2 * LARGEST
    # the right number in other digits, as 07, is no right answer
    return 1 / (1 + max(off, 1))


def _answers(model: Any, questions: Sequence[str], seed: int) -> dict[str, list[str]]:
    """What the reference answers to each question, as often as it is asked."""
    given: dict[str, list[str]] = {q: [] for q in questions}
    for same, ids, counts in sample(model, questions, SAMPLES_PER_PROMPT, seed):
        for question, text in zip(same, _texts(ids, counts), strict=True):
            given[question].append(text)
    return given


def _preferences(model: Any, questions: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Pairs of a right and a wrong answer that the reference itself gave, as often as it gave them.

    Each with the scores of its answers, and how often the reference gave them among its samples: their visits.
    """
    given = _answers(model, questions, seed)
    rows: list[dict[str, Any]] = []
    for question, texts in given.items():
        right = answer(question)
        wrong = [text for text in texts if text != right]
        visits = Counter(texts)
        rows += [
            {
                "prompt": question,
                "chosen": right,
                "rejected": w,
                "chosen_score": 1.0,
                "rejected_score": score(question, w),
                "chosen_visits": visits[right],
                "rejected_visits": visits[w],
            }
            for w in wrong[: texts.count(right)]
        ]
    random.Random(seed).shuffle(rows)
    return rows


def _eaten(rows: Sequence[dict[str, Any]], algorithm: Algorithm) -> list[dict[str, Any]]:
    """Pairs in the form of the algorithm's data, with its columns."""
    if algorithm.kind == "unpaired":
        sides = [("rejected", False)] if algorithm.unlearns else [("chosen", True), ("rejected", False)]
        return [{"prompt": r["prompt"], "completion": r[side], "label": label} for r in rows for side, label in sides]
    columns = [column.name for column in algorithm.columns]
    if algorithm.kind == "prompts":
        columns, rows = ["margin"], [{**r, "margin": r["chosen_score"] - r["rejected_score"]} for r in rows]
    return [{key: row[key] for key in ("prompt", "chosen", "rejected", *columns) if key in row} for row in rows]


def _annotated(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same pairs, each as one of the annotators has them."""
    out = []
    for i, row in enumerate(rows):
        who = i % ANNOTATORS
        sides = ("rejected", "chosen") if who in CONTRARY else ("chosen", "rejected")
        chosen, rejected = (row[side] for side in sides)
        out.append({**row, "chosen": chosen, "rejected": rejected, "annotator": f"annotator {who}"})
    return out


def build(folder: Path, seed: int, progress: Progress, architecture: str = "llama") -> None:
    """Fit the reference, a Llama or of S4 layers, and write it into the run's folder."""
    torch.manual_seed(seed)
    model = _new_model(architecture)
    _fit(model, seed, progress)
    model.save_pretrained(folder / REFERENCE)
    new_tokenizer().save_pretrained(folder / REFERENCE)


def verify(samples: Sequence[Sample]) -> list[float]:
    """The verifier's reward of completions: 1 for the right sum, else 0."""
    return [float(sample.completion == answer(sample.prompt)) for sample in samples]


def near(samples: Sequence[Sample]) -> list[float]:
    """A graded reward: 1 for the right sum, the less the farther from it."""
    return [score(sample.prompt, sample.completion) for sample in samples]


class Rubric:
    """A judge with a rubric that a meta-judge makes stricter, in the place of two language models.

    The judge writes down a score of 0 or 1 for each item of the rubric, which are read from its text. The meta-judge
    adds an item when the answers that it is shown have most of the score, and so are no longer told apart.

    Attributes:
        version: how often the rubric was rewritten.
        items: how many of ITEMS are in it.
    """

    ITEMS: tuple[Callable[[str, str], bool], ...] = (
        lambda right, given: given.isdigit(),
        lambda right, given: len(given) == len(right),
        lambda right, given: given[-1:] == right[-1:],
        lambda right, given: given == right,
    )
    ENOUGH = 0.6

    def __init__(self) -> None:
        self.version, self.items = 0, 2

    def judgement(self, sample: Sample) -> str:
        right = answer(sample.prompt)
        scores = (int(item(right, sample.completion)) for item in self.ITEMS[: self.items])
        return "\n".join(f"<score>{score}</score>" for score in scores)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(rubric_score(self.judgement(sample))) for sample in samples]

    def refine(self, samples: Sequence[Sample], rewards: Sequence[float]) -> None:
        if self.items < len(self.ITEMS) and sum(rewards) >= self.ENOUGH * self.items * len(samples):
            self.items += 1
            self.version += 1

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, "items": self.items}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version, self.items = state["version"], state["items"]


def scorer(algorithm: Online) -> Any:
    """The rewards of an algorithm that samples."""
    if isinstance(algorithm, Refining):
        return Rubric()
    return Combined([Part("right", verify), Part("near", near)]) if algorithm.needs == "rewards" else verify


def prefer(folder: Path, seed: int) -> None:
    """Train a model by DPO on right and wrong answers of the reference, and write it into the run's folder."""
    frozen, model = (load_model(str(folder / REFERENCE)) for _ in range(2))
    policies = [Policy(each) for each in (model, frozen)]
    pairs = _preferences(frozen, prompts(seed)[0], seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PREFER_LR)
    for step in range(PREFER_STEPS):
        rows = [pairs[(step * PREFER_BATCH + n) % len(pairs)] for n in range(PREFER_BATCH)]
        sides = ("chosen", "rejected")
        batch = collate(
            [Example(_ids(r["prompt"]), tuple([*_ids(r[side]), EOS] for side in sides)) for r in rows],
            torch.device("cpu"),
        )
        ends = batch.completions.cu_seqlens
        ours, theirs = (sequence_sum(policy(*policy_inputs(batch)), None, ends)[0].view(2, -1) for policy in policies)
        losses.dpo(*ours, *theirs.detach(), beta=1.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / PREFERRED)
    new_tokenizer().save_pretrained(folder / PREFERRED)


def _lists(given: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The answers to a question as they came, in lists, with their scores; without lists of equal ones."""
    rows: list[dict[str, Any]] = []
    for question, texts in given.items():
        for i in range(0, len(texts), LIST):
            few = list(texts[i : i + LIST])
            scores = [score(question, text) for text in few]
            if len(set(scores)) > 1:
                rows.append({"prompt": question, "completions": few, "scores": scores})
    return rows


def _identifiers(given: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The first characters of the answers, each once: that of the right one ranks first."""
    rows = []
    for question, texts in given.items():
        first = sorted({text[0] for text in texts if text})
        right = answer(question)[0]
        if right in first and len(first) > 1:
            rows.append({"prompt": question, "completions": first, "ranks": [1 + (c != right) for c in first]})
    return rows


def _demonstrations(given: Mapping[str, Sequence[str]], wanted: Sequence[str]) -> list[dict[str, Any]]:
    """All answers with what an algorithm wants to know of them; if it is nothing, the right ones.

    Half the log-reward of a right sum is for its first digit: what is forward-looking learns from it at once.
    """
    rows: list[dict[str, Any]] = []
    for question, texts in given.items():
        for text in texts:
            found = score(question, text)
            if "log_reward" in wanted:
                begins = LOG_REWARD / 2 * (text[:1] == answer(question)[:1])
                gains = [begins, LOG_REWARD * found - begins]
                rows.append({"prompt": question, "completion": [text[:1], text[1:]], "log_reward": gains})
            elif wanted:
                rows.append({"prompt": question, "completion": text, "reward": found - 1})
            elif found == 1:
                rows.append({"prompt": question, "completion": text})
    return rows


def _calls(given: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Answers as the names of tools: those that the reference knows for a question; a wrong one fails."""
    return [
        {
            "prompt": question,
            "completion": text,
            "tools": sorted({*texts} - {""}),
            "answer": "ok" if text == answer(question) else "error",
        }
        for question, texts in given.items()
        for text in texts
    ]


def _decisions(given: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """One round each: which of some answers to give, at the loss of its distance from the right one."""
    rows: list[dict[str, Any]] = []
    for question, texts in given.items():
        actions = sorted({*texts})[:LIST]
        if len(actions) == LIST and answer(question) in actions:
            rows.append({"prompt": question, "actions": actions, "losses": [[1 - score(question, a) for a in actions]]})
    return rows


def write_data(folder: Path, seed: int, algorithm: Algorithm) -> None:
    """Sample what the algorithm eats from the reference, and write it into the run's folder."""
    if algorithm.kind == "prompts" and algorithm.demonstrations < 2:  # type: ignore[attr-defined]
        write_rows(folder / DATA["prompts"], [{"prompt": q, "completion": answer(q)} for q in prompts(seed)[0]])
        return
    model, questions = load_model(str(folder / REFERENCE)), prompts(seed)[0]
    columns = [column.name for column in algorithm.columns]
    if algorithm.kind not in ("prompts", "pairwise", "unpaired", "hindsight"):
        given = _answers(model, questions, seed)
        if algorithm.kind == "demonstrations":
            rows = _demonstrations(given, columns)
        else:
            make = {"lists": _lists, "identifiers": _identifiers, "tools": _calls, "decisions": _decisions}
            rows = make[algorithm.kind](given)
        random.Random(seed).shuffle(rows)
        write_rows(folder / DATA[algorithm.kind], rows)
        return
    rows = _preferences(model, questions, seed)
    if isinstance(algorithm, RewardModel):
        held_out = _preferences(model, prompts(seed)[1], seed)
        if "annotator" in columns:
            rows, held_out = _annotated(rows), _annotated(held_out)
        write_rows(folder / HELD_OUT, _eaten(held_out, algorithm))
    write_rows(folder / DATA[algorithm.kind], _eaten(rows, algorithm))


# σ(2) for the right sum against a neighbour
TEMPERATURE = 0.25


def judge() -> BradleyTerryJudge:
    """The task's preferences: Bradley-Terry in the graded reward, so that the best policy is that of the reward."""
    return BradleyTerryJudge(near, TEMPERATURE)


class CyclicJudge:
    """Preferences without a best answer: numbers by their remainder modulo 3, of which 0 beats 1 beats 2 beats 0.

    The winner is preferred with probability 0.9, and any number to what is none. The Nash equilibrium gives each
    remainder a third.
    """

    def __call__(self, first: Sequence[Sample], second: Sequence[Sample]) -> list[float]:
        return [self._probability(one.completion, other.completion) for one, other in zip(first, second, strict=True)]

    def _probability(self, one: str, other: str) -> float:
        if not (one.isdigit() and other.isdigit()):
            return 0.5 + 0.4 * (one.isdigit() - other.isdigit())
        return (0.5, 0.9, 0.1)[(int(other) - int(one)) % 3]


def gain(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """By how much the first exceed the second, on average of the same prompts, and the standard error of that.

    The error is that of the mean of the differences, prompt by prompt: what is hard for both does not count, and that
    there are other prompts, and that the answers are sampled, both do.
    """
    differences = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    error = differences.std() / len(differences) ** 0.5
    return {"gain": float(differences.mean()), "gain_error": float(error)}


def _shares(sampled: Sequence[tuple[list[str], Tensor, Tensor]], asked: str = "") -> list[float]:
    """Of each prompt, how many of its sampled answers are right."""
    right: dict[str, list[bool]] = {}
    for same, ids, counts in sampled:
        for asking, text in zip(same, _texts(ids, counts), strict=True):
            question = asking.removesuffix(asked)
            right.setdefault(question, []).append(text == answer(question))
    return [sum(right[question]) / len(right[question]) for question in sorted(right)]


@torch.no_grad()
def evaluate(policy: Any, reference: Any, seed: int, times: int = 8, asked: str = "") -> dict[str, float]:
    """Accuracy of answers sampled for the held-out prompts, and KL(policy || reference) in nats per answer.

    The KL is exact over the vocabulary at every token, averaged over the sampled answers. The gain is in accuracy over
    the reference, which answers with the same draws. The policy alone is asked with `asked` behind each prompt.
    """
    questions = prompts(seed)[1]
    sampled = sample(policy, [question + asked for question in questions], times, seed)
    kl, rows = 0.0, 0
    for same, ids, counts in sampled:
        plain = torch.tensor([_ids(question.removesuffix(asked)) for question in same], device=ids.device)
        plain = torch.cat([plain, ids[:, -ANSWER_LENGTH:]], 1)
        p, q = (
            m(input_ids=given, use_cache=False).logits[:, -ANSWER_LENGTH - 1 : -1].float().log_softmax(-1)
            for m, given in ((policy, ids), (reference, plain))
        )
        per_token = (p.exp() * (p - q)).sum(-1)
        kl += torch.where(counts, per_token, 0).sum().item()
        rows += len(same)
    ours, theirs = _shares(sampled, asked), _shares(sample(reference, questions, times, seed))
    return {"accuracy": sum(ours) / len(ours), "kl": kl / rows, **gain(ours, theirs)}
