"""Methods whose target is known up to a factor: what they hand to their losses, what they remember, what they learn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastpo import algorithms
from fastpo.algorithms import Batch, Draft, Group, Sample, Turn
from fastpo.training.batches import step_layout
from fastpo.training.candidates import Candidate
from fastpo.training.data import Example
from fastpo.training.rollouts import Rollout, Sampling

from .conftest import summary

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("threads")

MATCHING = ("dpg", "gdc", "gdc_plus_plus", "f_dpg")
DIVERGENCES = algorithms.choices("f_dpg")["divergence"]


def batch_of(algorithm, lengths, which=None, seed=0):
    """Examples of completions of these lengths, with random streams, or a forward of some of them."""
    generator = torch.Generator().manual_seed(seed)
    which = range(len(lengths)) if which is None else which

    def draw(tokens, scale, shift):
        return (scale * torch.randn(tokens, generator=generator, dtype=torch.float64) + shift).float()

    names = {"policy": -1.0, "rollout": -1.0, "old": -1.0, "reference": -1.5, "policy_value": 0.0}
    each = {name: [[draw(n, 0.3, shift) for n in of] for of in lengths] for name, shift in names.items()}
    rewards = [torch.rand(len(algorithm.columns), generator=generator, dtype=torch.float64).tolist() for _ in lengths]
    rewards[0][0] = 0.0
    examples = [Example([1], tuple([0] * n for n in of), tuple(row)) for of, row in zip(lengths, rewards, strict=True)]
    parts = range(len(lengths[0]))
    streams = {name: torch.cat([of[i][k] for k in parts for i in which]) for name, of in each.items()}
    return Batch(
        streams=streams,
        completions=step_layout([examples[i] for i in which], torch.device("cpu")),
        numbers={
            column.name: torch.tensor([rewards[i][n] for i in which], dtype=torch.float64)
            for n, column in enumerate(algorithm.columns)
        },
        num_items=len(lengths),
        seed=0,
        num_tokens=sum(map(sum, lengths)),
        max_length=4,
    )


def gradient(algorithm, batch, state):
    policy, values = (batch.streams[name].clone().requires_grad_() for name in ("policy", "policy_value"))
    streams = {**batch.streams, "policy": policy, "policy_value": values}
    out = algorithm(batch._replace(streams=streams), state)
    out.loss.backward()
    return out, [t.grad if t.grad is not None else torch.zeros_like(t) for t in (policy, values)]


def turn_of(batch, groups, prompts):
    return Turn(batch, torch.tensor(groups), prompts, torch.ones(len(groups), dtype=torch.bool))


def prepared(algorithm, batch, groups=None, state=None, prompts="abcdefgh"):
    groups = groups or [i % 2 for i in range(len(batch.completions.lengths))]
    return algorithm.prepare(turn_of(batch, groups, list(prompts[: max(groups) + 1])), state or {})


SINGLE = [[3], [1], [4], [2], [2], [3]]
LISTS = [[3, 1, 2], [1, 1, 4], [2, 2, 2], [4, 3, 1]]
CASES = [
    ("online_brain", {"samples": 3}),
    *((name, {"target": target}) for name in MATCHING for target in ("tilted", "constraint")),
    *(("f_dpg", {"divergence": each}) for each in DIVERGENCES),
    ("f_dpg", {"divergence": "reverse_kl", "target": "constraint"}),
    *(("online_gflownet", {"objective": each}) for each in ("subtb", "tb", "db")),
]


@pytest.mark.parametrize("name, hyper", CASES)
def test_any_division_into_forwards_gives_one_gradient(name, hyper):
    algorithm = algorithms.build(name, {"beta": 0.5, **hyper})
    lengths = LISTS if name == "online_brain" else SINGLE
    whole = batch_of(algorithm, lengths)
    constants = {}
    if name in MATCHING:
        constants = dict(prepared(algorithm, whole).streams)
    out, (policy, values) = gradient(algorithm, whole._replace(streams={**whole.streams, **constants}), {})
    assert policy.abs().sum() > 0 and (values.abs().sum() > 0) == algorithm.critic
    total, found = 0.0, torch.zeros_like(policy)
    order = torch.arange(len(policy)).split(list(whole.completions.lengths))
    for members in ([0], [2, 1], range(3, len(lengths))):
        places = torch.cat([order[k * len(lengths) + i] for k in range(len(lengths[0])) for i in members])
        part = batch_of(algorithm, lengths, members)
        streams = {**part.streams, **{key: stream[places] for key, stream in constants.items()}}
        torch.testing.assert_close(streams["policy"], whole.streams["policy"][places])
        more, (slopes, _) = gradient(algorithm, part._replace(streams=streams), {})
        found[places] += slopes
        total += float(more.loss.detach())
    assert total == pytest.approx(float(out.loss.detach()), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found, policy, rtol=1e-5, atol=1e-7)


def test_brain_weighs_the_samples_of_a_prompt():
    """-Σ (a_i - b_i) ∇ log π(y_i), a = softmax(log p + r/β - log q'), b = softmax(log π - log q'), mean of prompts."""
    algorithm = algorithms.build("online_brain", {"samples": 3, "beta": 0.4})
    batch = batch_of(algorithm, LISTS)
    out, (slopes, _) = gradient(algorithm, batch, {})
    pieces = {name: stream.double().split(list(batch.completions.lengths)) for name, stream in batch.streams.items()}
    found = slopes.split(list(batch.completions.lengths))
    loss, effective, count = 0.0, 0.0, len(LISTS)
    for i in range(count):
        sums = {name: torch.stack([pieces[name][k * count + i].sum() for k in range(3)]) for name in pieces}
        rewards = torch.stack([batch.numbers[f"reward_{k + 1}"][i] for k in range(3)])
        a = (sums["reference"] + rewards / 0.4 - sums["rollout"]).softmax(0)
        b = (sums["policy"] - sums["rollout"]).softmax(0)
        loss += float((a * (a / b).log()).sum()) / count
        effective += float(1 / a.square().sum()) / count
        for k in range(3):
            expected = ((b - a)[k] / count).float().expand(LISTS[i][k])
            torch.testing.assert_close(found[k * count + i], expected, rtol=1e-4, atol=1e-6)
    assert float(out.loss.detach()) == pytest.approx(loss, rel=1e-4)
    assert float(out.metrics["effective_samples"]) == pytest.approx(effective, rel=1e-4)


def test_the_samples_of_a_prompt_are_one_example_of_brain():
    samples = [Sample("", "", [5], [i], True, {}) for i in range(3)]
    given = Group(samples, [0.5, 1.0, 0.0], lambda i, j: 0.5, [0.0] * 3, torch.Generator())
    algorithm = algorithms.build("online_brain", {"samples": 3})
    assert algorithm.drafts(given) == [Draft((0, 1, 2), (0.5, 1.0, 0.0))]
    assert [column.name for column in algorithm.columns] == ["reward_1", "reward_2", "reward_3"]
    assert algorithms.build("gdc", {}).drafts(given) == [Draft((i,), (r,)) for i, r in enumerate((0.5, 1.0, 0.0))]


def sums(stream, batch):
    return torch.stack([part.double().sum() for part in stream.split(list(batch.completions.lengths))])


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_z_is_estimated_over_all_turns(decay):
    """By prompt and not by its place in a turn; what is remembered is tensors."""
    algorithm = algorithms.build("gdc", {"beta": 0.5, "decay": decay})
    first, second = (batch_of(algorithm, SINGLE, seed=seed) for seed in (0, 1))
    one = prepared(algorithm, first, [0, 0, 1, 1, 1, 0], prompts="ab")
    assert all(isinstance(value, torch.Tensor) for value in one.state.values())
    two = prepared(algorithm, second, [1, 0, 0, 0, 1, 1], one.state, prompts="bc")

    def weights(batch):
        return (
            sums(batch.streams["reference"], batch)
            + batch.numbers["reward"] / 0.5
            - sums(batch.streams["rollout"], batch)
        ).exp()

    old, new = weights(first), weights(second)
    b = (decay * old[[2, 3, 4]].sum() + new[[1, 2, 3]].sum()) / (decay * 3 + 3)
    expected = torch.stack([new[[0, 4, 5]].mean(), b, b, b, new[[0, 4, 5]].mean(), new[[0, 4, 5]].mean()]).log()
    starts = second.completions.cu_seqlens[:-1].long()
    torch.testing.assert_close(two.streams["log_z"][starts], expected, rtol=1e-5, atol=1e-5)
    # a stream holds the number at every token
    lengths = torch.tensor(second.completions.lengths)
    assert torch.equal(two.streams["log_z"], two.streams["log_z"][starts].repeat_interleave(lengths))
    assert two.metrics["log_z"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert 0 < two.metrics["effective_samples"] <= 6


def test_the_baseline_is_the_mean_of_the_turns_before():
    algorithm = algorithms.build("f_dpg", {"beta": 0.5, "divergence": "jsd"})
    batches = [batch_of(algorithm, SINGLE, seed=seed) for seed in range(3)]
    state, means, seen = {}, [], []
    for batch in batches:
        found = prepared(algorithm, batch, state=state)
        means.append(float(found.streams["baseline"][0]))
        log_z = found.streams["log_z"][batch.completions.cu_seqlens[:-1].long()]
        log_t = sums(batch.streams["old"], batch) - (
            sums(batch.streams["reference"], batch) + batch.numbers["reward"] / 0.5 - log_z
        )
        seen.append(torch.nn.functional.softplus(-log_t) - math.log(2))
        state = found.state
    assert means[0] == 0
    assert means[1:] == pytest.approx([float(seen[0].mean()), float(torch.cat(seen[:2]).mean())], rel=1e-4)
    none = algorithms.build("f_dpg", {"beta": 0.5, "baseline": "none"})
    assert not prepared(none, batches[1], state=prepared(none, batches[0]).state).streams["baseline"].any()


@pytest.mark.parametrize("name", MATCHING)
def test_weights(name):
    """The slope at each token is -weight / B: P/q, p/q, p/q - π/q, and π/q (-f' - baseline)."""
    algorithm = algorithms.build(name, {"beta": 0.5} | ({"divergence": "forward_chi2"} if name == "f_dpg" else {}))
    batch = batch_of(algorithm, SINGLE)
    state = prepared(algorithm, batch_of(algorithm, SINGLE, seed=5)).state
    streams = dict(prepared(algorithm, batch, state=state).streams)
    _, (slopes, _) = gradient(algorithm, batch._replace(streams={**batch.streams, **streams}), {})
    starts = batch.completions.cu_seqlens[:-1].long()
    z, baseline = (streams[key][starts] for key in ("log_z", "baseline"))
    policy, proposal, reference = (sums(batch.streams[key], batch) for key in ("policy", "rollout", "reference"))
    target = reference + batch.numbers["reward"] / 0.5
    t = (policy - target + z).exp()
    weight = {
        "dpg": (target - proposal).exp(),
        "gdc": (target - z - proposal).exp(),
        "gdc_plus_plus": (target - z - proposal).exp() - (policy - proposal).exp(),
        "f_dpg": (policy - proposal).exp() * (t**-2 - 1 - baseline),
    }[name]
    expected = (-weight / len(SINGLE)).repeat_interleave(torch.tensor(batch.completions.lengths))
    torch.testing.assert_close(slopes.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_constraint_forbids_what_is_not_rewarded():
    algorithm = algorithms.build("gdc", {"target": "constraint"})
    batch = batch_of(algorithm, SINGLE)
    batch.numbers["reward"][:] = torch.tensor([0.0, 1.0, 0.0, -1.0, 0.5, 0.0])
    # no sample of the second prompt is allowed
    found = prepared(algorithm, batch, [0, 0, 1, 1, 0, 1])
    streams = {**batch.streams, **found.streams}
    _, (slopes, _) = gradient(algorithm, batch._replace(streams=streams), {})
    moved = [bool(part.any()) for part in slopes.split(list(batch.completions.lengths))]
    assert moved == [False, True, False, False, True, False] and slopes.isfinite().all()
    assert torch.isneginf(streams["log_z"][batch.completions.cu_seqlens[:-1].long()]).tolist() == [
        False, False, True, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("objective", ["subtb", "tb", "db"])
def test_a_flow_balances_at_the_tilted_reference(objective):
    """All texts of two tokens: π ∝ π_ref e^(r/β), log F(s) - log π_ref(s) = log E_ref[e^(r/β) | s]."""
    generator = torch.Generator().manual_seed(0)
    reference = (
        torch.randn(3, generator=generator).log_softmax(0),
        torch.randn(3, 3, generator=generator).log_softmax(1),
    )
    rewards = torch.rand(3, 3, generator=generator)
    beta = 0.3
    tilted = reference[1] + rewards / beta
    middle = tilted.logsumexp(1)
    start = (reference[0] + middle).logsumexp(0)
    texts = list(itertools.product(range(3), range(3)))
    examples = [Example([1], (list(text),), ()) for text in texts]

    def loss(change=0.0):
        policy = [((reference[0][i] + middle[i] - start), tilted[i, j] - middle[i]) for i, j in texts]
        batch = Batch(
            streams={
                "policy": torch.tensor([x + change * k for pair in policy for k, x in enumerate(pair)]),
                "reference": torch.tensor([x for i, j in texts for x in (reference[0][i], reference[1][i, j])]),
                "policy_value": torch.tensor([x for i, _ in texts for x in (start, middle[i])]),
            },
            completions=step_layout(examples, torch.device("cpu")),
            numbers={"reward": torch.tensor([rewards[i, j] for i, j in texts], dtype=torch.float64)},
            num_items=len(texts),
            seed=0,
            num_tokens=18,
            max_length=2,
        )
        return algorithms.build("online_gflownet", {"beta": beta, "objective": objective})(batch, {})

    found = loss()
    assert float(found.loss) < 1e-10
    assert float(found.metrics["log_z"]) == pytest.approx(float(start), rel=1e-5)
    assert float(loss(0.1).loss) > 1e-3


@pytest.mark.parametrize(
    "name, key, value", [("gdc", "decay", 0.0), ("online_brain", "beta", 0.0), ("dpg", "samples", 0)]
)
def test_hyper_parameters_have_domains(name, key, value):
    with pytest.raises(ValueError, match=f"{key} must be in .* for {name}, got {value:g}"):
        algorithms.build(name, {key: value})


def test_words_are_checked():
    with pytest.raises(ValueError, match="target must be one of tilted, constraint for dpg, got other"):
        algorithms.build("dpg", {"target": "other"})


def test_a_constraint_is_learnt(trained):
    """By another divergence than the test of every algorithm has."""
    run = trained("f_dpg", "--algorithm.divergence", "jsd", "--algorithm.target", "constraint")
    assert summary(run)["gain_after"] > 3 * summary(run)["gain_error_after"]


class Echo:
    """Answers with what it read, and the stop token."""

    def __init__(self):
        self.asked = []

    def update(self, policy):
        pass

    def generate(self, prompts, n, sampling, keys=None):
        self.asked.append((prompts, n, sampling))
        return [[Rollout([*ids, 0], torch.zeros(len(ids) + 1), True)] for ids in prompts]


@pytest.mark.parametrize("begin, read", [(9, [[9, 4, 5, 1, 2], [9, 3, 1, 2]]), (None, [[4, 5, 9, 1, 2], [3, 9, 1, 2]])])
def test_a_candidate_reads_the_preamble_before_the_prompt(begin, read):
    engine, scored = Echo(), []

    def scorer(samples):
        scored.extend(samples)
        return [float(len(sample.ids)) for sample in samples]

    decode = lambda ids: "".join(map(str, ids))  # noqa: E731
    candidate = Candidate(engine, Sampling(7, temperature=0.7, stop=(0,), seed=3), decode, scorer, begin)
    samples = [
        Sample("prompt", "45", [9, 1, 2], [4, 5, 0], True, {"x": 1}),
        Sample("prompt", "3", [9, 1, 2], [3], False, {"x": 2}),  # cut, so that its last token is not one that ends it
    ]
    assert candidate(samples) == [6.0, 5.0]
    ((prompts, n, sampling),) = engine.asked
    assert prompts == read and n == 1 and sampling == Sampling(7, temperature=0.0, stop=(0,), seed=3)
    # judged as answers to the bare prompt
    assert [(s.prompt, s.prompt_ids, s.completion, s.ids, s.ended, s.row) for s in scored] == [
        ("prompt", [9, 1, 2], decode([*ids, 0]), [*ids, 0], True, sample.row)
        for ids, sample in zip(read, samples, strict=True)
    ]
