"""Training on what the policy writes: completions are sampled and judged, and become the examples of some steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastpo.algorithms import Batch, Draft, Draw, Group, Online, Sample, State, Turn
from fastpo.training.batches import check_budget, step_indices, step_layout
from fastpo.training.data import Example, Prompt
from fastpo.training.loop import Constants, Job, constant_streams
from fastpo.training.rollouts import Engine, Mixture, Rollout, Sampling
from fastpo.training.tree import grow


class Scorer(Protocol):
    """Rewards of completions."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]: ...


class Judge(Protocol):
    """The probabilities that the first of two completions of one prompt is preferred to the second."""

    def __call__(self, first: Sequence[Sample], second: Sequence[Sample]) -> list[float]: ...


@dataclass(frozen=True)
class Plan:
    """How the turns of a run go.

    Attributes:
        size: prompts of a turn, over all ranks.
        minibatches: steps into which one pass over a turn's examples is divided.
        epochs: passes.
        rounds: how often prompts are drawn for a turn whose groups give no examples.
        tokens: most of a forward.
        seed: of order and sampling.
    """

    size: int
    minibatches: int
    epochs: int
    rounds: int
    tokens: int
    seed: int

    @property
    def steps(self) -> int:
        """Of a turn."""
        return self.minibatches * self.epochs


class _Made(NamedTuple):
    """An example, with what is known of its completions from their sampling."""

    group: int
    prompt: str
    example: Example
    logprobs: tuple[Tensor, ...]
    ended: tuple[bool, ...]


class _Seen(NamedTuple):
    """What the metrics need of a sampled completion."""

    group: int
    reward: float
    length: int
    ended: bool


class Turns:
    """Samples a turn's examples before its first step: `before_step` and `order` of a `Job`.

    The ranks share the prompts and exchange what they made of them, so that everything behind is the same as in one
    process. What is drawn depends on the seed, the turn and the prompt.

    Attributes:
        examples: the job's, of the turn at hand.
        constants: the job's, of them.
    """

    def __init__(
        self,
        accelerator: Any,
        algorithm: Online,
        prompts: Sequence[Prompt],
        engine: Engine,
        sampling: Sampling,
        plan: Plan,
        *,
        decode: Callable[[Sequence[int]], str],
        scorer: Scorer | None = None,
        judge: Judge | None = None,
        anchors: Mapping[str, Any] | None = None,
        companion: Any = None,
    ) -> None:
        """
        Args:
            accelerator: devices and processes.
            algorithm: what is trained.
            prompts: of the data.
            engine: samples the policy; for other draws it must be that of transformers.
            sampling: of the policy.
            plan: of the turns.
            decode: token ids to text, without the tokens that end it.
            scorer, judge: as the algorithm needs.
            anchors: the prepared models of the streams that are not the policy's own.
            companion: the bare reference model, for draws from it or from mixtures with it.
        """
        self.accelerator, self.algorithm, self.prompts = accelerator, algorithm, prompts
        self.engine, self.sampling, self.plan, self.decode = engine, sampling, plan, decode
        self.scorer, self.judge, self.anchors, self.companion = scorer, judge, anchors or {}, companion
        self.examples: list[Example] = []
        self.constants: dict[str, Constants] = {}
        self.state: State = {}
        self.turn = -1
        self.last: Mapping[str, float] = {}

    def __call__(self, job: Job, done: int) -> dict[str, float]:
        """What is due before the step that follows `done` steps; the turn's metrics with its first step."""
        turn = done // self.plan.steps
        if turn == self.turn:
            return {}
        self.engine.update(job.policy)
        made, seen = self._sampled(turn)
        self._fill(job, made, turn)
        self.turn = turn
        return self._metrics(seen, made) | {"epoch": (turn + 1) * self.plan.size / len(self.prompts)}

    def order(self, step: int) -> list[int]:
        """The examples of a step: of each pass another permutation, cut into equal parts."""
        epoch, part = divmod(step % self.plan.steps, self.plan.minibatches)
        count, seed = len(self.examples), _seed(self.plan.seed, self.turn, epoch)
        mixed = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        first, last = (count * n // self.plan.minibatches for n in (part, part + 1))
        return sorted(mixed[first:last])

    # of checkpoints: accelerate restores tensors, numbers and containers of them
    def state_dict(self) -> dict[str, Any]:
        examples = [[e.prompt, [*e.completions], [*e.numbers], e.row] for e in self.examples]
        constants = {name: [list(streams[i]) for i in range(len(examples))] for name, streams in self.constants.items()}
        return {"turn": self.turn, "examples": examples, "constants": constants, "state": dict(self.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turn, self.state = state["turn"], dict(state["state"])
        self.examples[:] = [Example(p, tuple(c), tuple(n), row) for p, c, n, row in state["examples"]]
        self.constants.clear()
        for name, streams in state["constants"].items():
            self.constants[name] = {i: tuple(parts) for i, parts in enumerate(streams)}

    def sampled(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, source: str, n: int) -> Any:
        """Completions of prompts, with the numbers of their draws."""
        texts, keys = [prompt.ids for _, prompt in prompts], [number for number, _ in prompts]
        if source in ("policy", "greedy"):
            how = replace(sampling, temperature=0.0) if source == "greedy" else sampling
            return self.engine.generate(texts, n, how, keys)
        share = 1.0 if source == "reference" else float(self.algorithm.hyper["mixture"])  # type: ignore[attr-defined]
        # the reference alone is a mixture of which the policy has no share
        how = replace(sampling, seed=sampling.seed ^ 1 << 40)
        mixture = Mixture(self.companion, share)
        return self.engine.generate(texts, n, how, keys, mixture=mixture)  # type: ignore[call-arg]

    def evaluate(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """The mean reward and length of one completion of each prompt."""
        mine = list(enumerate(prompts))[self.accelerator.process_index :: self.accelerator.num_processes]
        rollouts = self.sampled(mine, replace(self.sampling, seed=_seed(self.plan.seed, -1, 0)), "policy", 1)
        samples = [self._sample(prompt, found[0]) for (_, prompt), found in zip(mine, rollouts, strict=True)]
        scores = [0.0] * len(samples) if self.scorer is None else self.scorer(samples)
        sums = torch.tensor([sum(scores), sum(len(s.ids) for s in samples), len(samples)], dtype=torch.float64)
        total = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").tolist()
        found = {"length": total[1] / total[2]}
        return found if self.scorer is None else {"reward": total[0] / total[2], **found}

    def _sampled(self, turn: int) -> tuple[list[_Made], list[_Seen]]:
        """What all ranks made of the turn's prompts, in the order of the prompts."""
        made: list[_Made] = []
        seen: list[_Seen] = []
        for attempt in range(self.plan.rounds):
            number = turn * self.plan.rounds + attempt
            indices = step_indices(number, self.plan.size, len(self.prompts), self.plan.seed)
            places = range(attempt * self.plan.size, (attempt + 1) * self.plan.size)
            everything = [(place, self.prompts[i]) for place, i in zip(places, indices, strict=True)]
            missing = self.plan.size - len({each.group for each in made})
            found = self._round(everything[self.accelerator.process_index :: self.accelerator.num_processes], turn)
            groups, more = self._gathered(found)
            wanted = sorted({each.group for each in groups})[:missing]
            made += [each for each in groups if each.group in wanted]
            seen += more
            if len(wanted) == missing:
                break
        return made, seen

    def _gathered(self, found: tuple[list[_Made], list[_Seen]]) -> tuple[list[_Made], list[_Seen]]:
        if self.accelerator.num_processes == 1:
            return found
        from accelerate.utils import gather_object

        parts = gather_object([found])
        made = sorted((each for part, _ in parts for each in part), key=lambda each: each.group)
        return made, sorted((each for _, part in parts for each in part), key=lambda each: each.group)

    def _round(self, prompts: Sequence[tuple[int, Prompt]], turn: int) -> tuple[list[_Made], list[_Seen]]:
        """Sample, judge and draft: of this rank's prompts."""
        sampling = replace(self.sampling, seed=_seed(self.plan.seed, turn, 0))
        if self.algorithm.draws[0].search is not None:
            return self._searched(prompts, sampling, self.algorithm.draws[0], turn)
        rollouts: list[list[Rollout]] = [[] for _ in prompts]
        for draw in self.algorithm.draws:
            for of, found in zip(rollouts, self.sampled(prompts, sampling, draw.source, draw.times), strict=True):
                of += found
        if self.algorithm.demonstrations:
            for (_, prompt), of in zip(prompts, rollouts, strict=True):
                assert prompt.completion is not None
                of.append(Rollout(prompt.completion, torch.zeros(len(prompt.completion)), True))
        samples = [
            [self._sample(prompt, each) for each in of] for (_, prompt), of in zip(prompts, rollouts, strict=True)
        ]
        flat = [sample for of in samples for sample in of]
        scores = iter([] if self.scorer is None else self.scorer(flat))
        rewards = [[] if self.scorer is None else [next(scores) for _ in of] for of in samples]
        wins = self._wins(samples, rewards)
        made: list[_Made] = []
        seen: list[_Seen] = []
        for (place, prompt), of, given, score, won in zip(prompts, rollouts, samples, rewards, wins, strict=True):
            made += self._drafted(place, prompt, given, of, score, won, turn)
            drawn = self.algorithm.draws[0].times
            seen += [
                _Seen(place, score[i] if score else 0.0, len(each.ids), each.ended) for i, each in enumerate(of[:drawn])
            ]
        return made, seen

    def _searched(
        self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, draw: Draw, turn: int
    ) -> tuple[list[_Made], list[_Seen]]:
        """The same, of the segments of a tree behind each prompt."""
        assert draw.search is not None and self.scorer is not None

        def score(complete: Sequence[tuple[int, Rollout]]) -> list[float]:
            assert self.scorer is not None
            return self.scorer([self._sample(prompts[i][1], rollout) for i, rollout in complete])

        starts, keys = [prompt.ids for _, prompt in prompts], [place for place, _ in prompts]
        made: list[_Made] = []
        seen: list[_Seen] = []
        trees = grow(self.engine, starts, keys, sampling, score, draw.times, draw.search)
        for (place, prompt), tree in zip(prompts, trees, strict=True):
            nodes = tree.nodes()
            samples = [self._sample(prompt, node.segment, node.before.ids) for node in nodes]
            visits = [node.visits for node in nodes]
            rollouts, values = [node.segment for node in nodes], [node.value for node in nodes]
            made += self._drafted(place, prompt, samples, rollouts, values, _no_judge, turn, visits)
            seen += [_Seen(place, reward, len(each.ids), each.ended) for each, reward in tree.complete]
        return made, seen

    def _sample(self, prompt: Prompt, rollout: Rollout, before: Sequence[int] = ()) -> Sample:
        """A completion of the prompt and some tokens of the policy's behind it."""
        text = prompt.text + (self.decode(before) if before else "")
        start = [*prompt.ids, *before]
        return Sample(text, self.decode(rollout.ids), start, rollout.ids, rollout.ended, prompt.row)

    def _drafted(
        self,
        place: int,
        prompt: Prompt,
        samples: Sequence[Sample],
        rollouts: Sequence[Rollout],
        rewards: Sequence[float],
        wins: Callable[[int, int], float],
        turn: int,
        visits: Sequence[int] = (),
    ) -> list[_Made]:
        """The examples of a group."""
        generator = torch.Generator().manual_seed(_seed(self.plan.seed, turn, place + 1))
        logprobs = [float(each.logprobs.double().sum()) for each in rollouts]
        drafts = self.algorithm.drafts(Group(samples, rewards, wins, logprobs, generator, visits=visits))
        return [self._made(place, prompt, samples, rollouts, draft) for draft in drafts]

    def _made(
        self, place: int, prompt: Prompt, samples: Sequence[Sample], rollouts: Sequence[Rollout], draft: Draft
    ) -> _Made:
        chosen = [rollouts[i] for i in draft.completions]
        start = samples[draft.completions[0]].prompt_ids if draft.prompt is None else list(draft.prompt)
        example = Example(start, tuple(each.ids for each in chosen), draft.numbers, prompt.number)
        return _Made(
            place, prompt.text, example, tuple(each.logprobs for each in chosen), tuple(each.ended for each in chosen)
        )

    def _wins(
        self, samples: Sequence[Sequence[Sample]], rewards: Sequence[Sequence[float]]
    ) -> list[Callable[[int, int], float]]:
        """Of each group, who is preferred to whom; all pairs are asked for at once."""
        if self.algorithm.needs != "judge":
            return [_no_judge] * len(samples)
        pairs = [(n, i, j) for n, of in enumerate(samples) for i, j in combinations(range(len(of)), 2)]
        if self.judge is None:
            # Bradley-Terry on the rewards
            found = [1 / (1 + torch.tensor(rewards[n][j] - rewards[n][i]).double().exp().item()) for n, i, j in pairs]
        else:
            found = self.judge([samples[n][i] for n, i, _ in pairs], [samples[n][j] for n, _, j in pairs])
        table = dict(zip(pairs, found, strict=True))

        def of(n: int) -> Callable[[int, int], float]:
            return lambda i, j: table[n, i, j] if i < j else 1 - table[n, j, i] if j < i else 0.5

        return [of(n) for n in range(len(samples))]

    def _fill(self, job: Job, made: Sequence[_Made], turn: int) -> None:
        """The turn's examples and what stays constant of them."""
        examples = [each.example for each in made]
        self.examples[:] = examples
        self.constants.clear()
        self.last = {}
        if not examples:
            return
        check_budget(examples, self.plan.tokens, "what was sampled for the data")
        constants: dict[str, Constants] = {"rollout": {i: each.logprobs for i, each in enumerate(made)}}
        everything = range(len(examples))
        for name, whose in self.algorithm.anchors(self.plan.steps).items():
            model = job.policy if whose == "turn" else self.anchors[whose]
            constants |= constant_streams(self.accelerator, model, examples, everything, self.plan.tokens, name=name)
        if self.algorithm.critic:
            more = {"name": "old", "statistics": ("value",)}
            constants |= constant_streams(
                self.accelerator,
                job.policy,
                examples,
                everything,
                self.plan.tokens,
                **more,  # type: ignore[arg-type]
            )
        cpu = torch.device("cpu")
        completions = step_layout(examples, cpu)
        parts = range(len(examples[0].completions))
        streams = {name: torch.cat([of[i][k] for k in parts for i in everything]) for name, of in constants.items()}
        columns = [column.name for column in self.algorithm.columns]
        numbers = torch.tensor([e.numbers for e in examples], dtype=torch.float64).reshape(len(examples), -1)
        batch = Batch(
            streams,
            completions,
            {name: numbers[:, n] for n, name in enumerate(columns)},
            len(examples),
            _seed(self.plan.seed, turn, 0),
            sum(completions.lengths),
            self.sampling.max_new_tokens,
        )
        names = sorted({each.group for each in made})
        prompt_of = {each.group: each.prompt for each in made}
        groups = torch.tensor([names.index(each.group) for each in made])
        ended = torch.tensor([each.ended[k] for k in parts for each in made])
        prepared = self.algorithm.prepare(Turn(batch, groups, [prompt_of[n] for n in names], ended), self.state)
        self.state = dict(prepared.state)
        kept = everything if prepared.keep is None else prepared.keep.nonzero()[:, 0].tolist()
        for name, stream in prepared.streams.items():
            split = stream.split(list(completions.lengths))
            constants[name] = {i: tuple(split[k * len(examples) + i].clone() for k in parts) for i in everything}
        self.examples[:] = [examples[i] for i in kept]
        for name, of in constants.items():
            self.constants[name] = {n: of[i] for n, i in enumerate(kept)}
        self.last = prepared.metrics

    def _metrics(self, seen: Sequence[_Seen], made: Sequence[_Made]) -> dict[str, float]:
        lengths = torch.tensor([float(each.length) for each in seen])
        out = {
            "length": float(lengths.mean()),
            "truncated": sum(not each.ended for each in seen) / len(seen),
            "examples": float(len(self.examples)),
        }
        if self.scorer is not None:
            scores = torch.tensor([each.reward for each in seen], dtype=torch.float64)
            groups: dict[int, list[float]] = {}
            for each in seen:
                groups.setdefault(each.group, []).append(each.reward)
            same = sum(len(set(of)) == 1 for of in groups.values()) / len(groups)
            out |= {"reward": float(scores.mean()), "reward_std": float(scores.std(correction=0)), "same_reward": same}
        if {"old", "reference"} <= self.constants.keys() and self.examples:
            old, reference = (self.constants[name] for name in ("old", "reference"))
            total = sum(float((o - r).sum()) for i in old for o, r in zip(old[i], reference[i], strict=True))
            out["kl"] = total / sum(len(e.completions) for e in self.examples)
        return out | dict(self.last)


def _no_judge(i: int, j: int) -> float:
    raise RuntimeError("this algorithm did not say that it needs a judge")


def _seed(*numbers: int) -> int:
    """One seed of several numbers; 31 bits, so that sums of it stay in 64."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "big") >> 1
