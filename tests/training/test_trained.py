"""Every algorithm on the built-in task, as `--preset ci` trains it: with what it is told, and with that shuffled.

What rises is measured on held-out prompts, and its standard error is that of the differences from the reference, prompt
by prompt; where a run measures only itself, two binomial errors are the bound.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastpo import algorithms
from fastpo.training import checkpoint, denoising_task, task
from fastpo.training.batches import collate
from fastpo.training.config import ci_defaults
from fastpo.training.data import Example
from fastpo.training.denoising import Denoiser
from fastpo.training.model import Policy, load_denoiser, load_model, load_tokenizer, policy_inputs
from fastpo.training.scorers import Sample, load_scorer

from .conftest import summary

pytest.importorskip("accelerate")

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
# standard errors: a rise has more of them, and what is told nothing does not
SURE = 3.0

# what is told nothing that could be shuffled
UNTOLD = {
    "npo": "it is given wrong answers alone, and whichever number is unlearned, the right one gains",
    "sharpening_rebel": "the rewards of its pairs are the reference's own log-probs",
    "sharpening_sft": "it learns which of the reference's samples the reference finds likeliest",
    "sharpening_xpo": "the rewards of its samples are the reference's own log-probs",
}
# they also raise the likelihood of what is called chosen, which is right half of the time if labels are drawn: they get
# the pairs of other prompts
LIKELIHOOD = ("cpo", "orpo", "rrhf", "rpo", "iterative_rpo", "slic", "dpop", "hypo", "mpo")

# what rises in place of accuracy
MARGINS = {
    "apo_down": "its minimum is where both answers of a pair are impossible, and the wrong one sooner",
    "first_ranknet": "it ranks first characters, and knows nothing of what follows them",
}
# its flows come into balance, but on data that are given it leaves probability to answers that they lack; every step
# has examples that it has not seen
BALANCES = ("detailed_balance",)

# the reference tilted by rewards is their target, and its KL the ceiling of theirs
TARGETS = ("dpg", "gdc", "gdc_plus_plus", "f_dpg", "online_brain", "online_gflownet")
# bands of the KL that nothing known bounds
STATED = {
    "npo": (0.02, 0.3),  # small: unlearning says nothing of what else to answer
    "apo_down": (0.5, 12.0),  # large, up to 4 a token: mass goes where no answer was sampled from
    "detailed_balance": (0.02, 4.0),  # mass goes where no answer was given, too
    "preamble_rl": (0.1, 8.0),  # of what the frozen model reads: three tokens of thirteen, log 13³ = 7.7
}


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A context in which what an algorithm is told, by data, rewards or judges, says nothing about right and wrong."""

    @contextmanager
    def shuffled(name: str) -> Iterator[None]:
        rng = random.Random(5)

        def mixed(function: Callable[..., list[float]]) -> Callable[..., list[float]]:
            # within the batch that is judged
            return lambda *given: rng.sample(found := function(*given), len(found))

        def write(path: Path, rows: list[dict[str, Any]], real: Any = task.write_rows) -> None:
            real(path, rows if path.name == Path(task.HELD_OUT).name else unlabelled(rows, name, rng))

        def pairs(*given: Any, real: Any = task._preferences) -> list[dict[str, Any]]:
            return unlabelled(real(*given), name, rng)

        with monkeypatch.context() as patched:
            patched.setattr(task, "write_rows", write)
            patched.setattr(task, "verify", mixed(task.verify))
            patched.setattr(task, "near", mixed(task.near))
            patched.setattr(task.Rubric, "__call__", mixed(task.Rubric.__call__))
            if name == "rto":
                # what its further model is trained on
                patched.setattr(task, "_preferences", pairs)
            yield

    return shuffled


def unlabelled(rows: list[dict[str, Any]], name: str, rng: random.Random) -> list[dict[str, Any]]:
    """The same rows, of which other ones are called good; demonstrations without a word are those of others."""
    told = {"reward", "log_reward", "answer", "label"} & rows[0].keys()
    others = told or {"completion"} & rows[0].keys()
    if name in LIKELIHOOD:
        others |= {"chosen", "rejected"}
    orders = {column: rng.sample([row[column] for row in rows], len(rows)) for column in sorted(others)}
    mixed = [{**row, **{column: order[n] for column, order in orders.items()}} for n, row in enumerate(rows)]
    for row in mixed:
        for values in (row.get("scores", []), row.get("ranks", []), *row.get("losses", [])):
            rng.shuffle(values)
        if "chosen" in row and rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return mixed


class Rise(NamedTuple):
    """Of what is to rise, and the standard error."""

    gain: float
    error: float

    @classmethod
    def of(cls, ours: list[float], theirs: list[float]) -> Rise:
        found = task.gain(ours, theirs)
        return cls(found["gain"], found["gain_error"])


@torch.no_grad()
def logprobs(model: Any, question: str) -> Tensor:
    """Of all numbers that a sum can be, as answers."""
    prompt = task._ids(question)
    texts = [[*task._ids(str(n)), task.EOS] for n in range(2 * task.LARGEST + 1)]
    # what stands behind EOS does not change what is before it
    answers = torch.tensor([[*text, *[task.EOS] * (task.ANSWER_LENGTH - len(text))] for text in texts])
    ids = torch.cat([torch.tensor([prompt] * len(texts)), answers], 1)
    each = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    ended = torch.arange(task.ANSWER_LENGTH) >= torch.tensor([[len(text)] for text in texts])
    return each.masked_fill(ended, 0).sum(1)


def margins(name: str, model: Any, answers: Mapping[str, list[str]], seed: int) -> list[float]:
    """By how much the right answer to each held-out prompt is likelier than the wrong ones, as often as they are given.

    Where only first characters are ranked, by how much its first character is.
    """
    out = []
    for question in task.prompts(seed)[1]:
        scores, right = logprobs(model, question), int(task.answer(question))
        given = [int(text) for text in answers[question] if text.isdigit() and int(text) < len(scores)]
        if name == "first_ranknet":
            begins = [[n for n in range(len(scores)) if str(n).startswith(str(digit))] for digit in range(10)]
            scores = torch.stack([scores[numbers].logsumexp(0) for numbers in begins])
            right, *given = [int(str(n)[0]) for n in (right, *given)]
        wrong = [n for n in given if n != right]
        if wrong:
            out.append(float(scores[right] - scores[wrong].mean()))
    return out


def ranked(name: str, run: Path) -> list[float]:
    """Of reward models: the share of held-out pairs that are in their order, prompt by prompt."""
    parts = [run / "model" / part for part in (("0", "1") if name == "maxmin" else ("",))]
    scorer = load_scorer([str(part) for part in parts], load_tokenizer(str(parts[0])))
    groups = json.loads((run / "model" / "annotators.json").read_text()) if name == "maxmin" else {}
    shares: dict[str, list[float]] = {}
    rows = [json.loads(line) for line in (run / task.HELD_OUT).read_text().splitlines()]
    if name == "reaction_model":
        sides = {side: [row for row in rows if row["label"] is side] for side in (True, False)}
        rows = [
            {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
            for one, other in zip(sides[True], sides[False], strict=True)
        ]
    given = {}
    for side in ("chosen", "rejected"):
        samples = [Sample(r["prompt"], r[side], *map(task._ids, (r["prompt"], r[side])), True, {}) for r in rows]
        for sample in samples:
            sample.ids.append(task.EOS)
        given[side] = list(scorer.each(samples).values())
    for n, row in enumerate(rows):
        which = groups.get(row.get("annotator"), 0)
        shares.setdefault(row["prompt"], []).append(given["chosen"][which][n] > given["rejected"][which][n])
    return [sum(of) / len(of) for of in shares.values()]


def risen(name: str, run: Path, untrained: Path, answers: Mapping[str, list[str]], seed: int, told: bool) -> Rise:
    """What the method is for, on held-out prompts."""
    found = summary(run)
    if name in MARGINS:
        before, after = (margins(name, load_model(str(run / at)), answers, seed) for at in (task.REFERENCE, "model"))
        return Rise.of(after, before)
    if name in BALANCES and told:
        losses = [r["loss"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
        # a fall from the first quarter to the last, of batches that are all different
        count = len(losses) // 4
        first, last = (torch.tensor(part, dtype=torch.float64) for part in (losses[:count], losses[-count:]))
        return Rise(
            float(first.mean() - last.mean()), float(sum(part.var() / len(part) for part in (first, last)) ** 0.5)
        )
    if "gain_after" in found:
        return Rise(found["gain_after"], found["gain_error_after"])
    if "accuracy_after" not in found:
        return Rise.of(ranked(name, run), ranked(name, untrained))
    # one answer to each prompt: two binomial errors are at least that of their difference
    shares = found["accuracy_before"], found["accuracy_after"]
    count = len(task.prompts(seed)[1])
    return Rise(shares[1] - shares[0], sum((p * (1 - p) / count) ** 0.5 for p in shares))


@torch.no_grad()
def right(reference: Path, seed: int, denoises: bool) -> Tensor:
    """The reference's log-probs of the right answers to the held-out prompts."""
    if denoises:
        # at the step that the KL is of, where all is hidden
        policy: Policy = Denoiser(load_denoiser(str(reference)), denoising_task.MASK, task.ANSWER_LENGTH)
    else:
        policy = Policy(load_model(str(reference)))
    texts = {question: [*task._ids(task.answer(question)), task.EOS] for question in task.prompts(seed)[1]}
    examples = [Example(task._ids(question), (text,)) for question, text in texts.items()]
    tokens = policy(*policy_inputs(collate(examples, torch.device("cpu"))))
    return torch.stack([each.sum() for each in tokens.split([len(text) for text in texts.values()])]).double()


def band(name: str, run: Path, seed: int) -> tuple[float, float]:
    """Where the KL to the reference must be, in nats per answer.

    From below: whatever makes the right answer so much more frequent has at least the KL of right to wrong (data
    processing), here of three errors less than the accuracy found. From above: what learns that the right answer is
    the best is on its way to where it is the only one, at KL = E[-log π_ref(right)], and not past it; nor past the
    reference tilted by rewards, where that is the target.
    """
    if name in STATED:
        return STATED[name]
    denoises, found = algorithms.denoises(name), summary(run)
    known = right(run / task.REFERENCE, seed, denoises)
    high = -float(known.mean())
    if name in TARGETS:
        # rewards are 1 and 0
        p, tilt = known.exp(), 1 / ci_defaults(name)["algorithm.beta"]
        tilted = (tilt + known).exp() / (1 + p * torch.tensor(tilt).expm1())
        high = float((tilted * tilt - (p * torch.tensor(tilt).expm1()).log1p()).mean())
    if denoises or name in MARGINS or name in BALANCES:
        # of what does not become right, or of one step of several
        return 0.01, high
    base = found["accuracy_after"] - found["gain_after"]
    least = found["accuracy_after"] - SURE * found["gain_error_after"]
    return least * math.log(least / base) + (1 - least) * math.log((1 - least) / (1 - base)), high


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_learns_what_it_is_told_and_nothing_else(name, seed, trained, shuffled, answers, monkeypatch):
    # there are tests of checkpoints, which take as long as some steps
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)
    monkeypatch.setattr(checkpoint, "latest", lambda *_: None)
    run = trained(name, "--seed", str(seed))
    untrained = run
    if isinstance(algorithms.build(name, {}), algorithms.RewardModel):
        # a head that is drawn tells some right answers from wrong ones, too
        untrained = trained(name, "--seed", str(seed), "--steps", "1", "--optim.lr", "1e-12", output="untrained")
    rise = risen(name, run, untrained, answers(seed), seed, told=True)
    assert rise.gain > SURE * rise.error
    if "kl" in summary(run):
        low, high = band(name, run, seed)
        assert low < summary(run)["kl"] < high
    if name in UNTOLD:
        return
    with shuffled(name):
        run = trained(name, "--seed", str(seed), output="shuffled")
    rise = risen(name, run, untrained, answers(seed), seed, told=False)
    assert rise.gain < SURE * rise.error


def test_the_tables_name_algorithms():
    named = {*UNTOLD, *LIKELIHOOD, *MARGINS, *BALANCES, *TARGETS, *STATED}
    assert named <= {*algorithms.names()}
