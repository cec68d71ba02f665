"""Training on what the policy writes: completions are sampled and judged, and become the examples of some steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from fastpo.algorithms import Allocating, Batch, Draw, Group, Online, Refining, Sample, State, Turn, Windowed
from fastpo.training.batches import check_budget, step_indices, step_layout
from fastpo.training.data import Example, Prompt
from fastpo.training.loop import Constants, Job, constant_streams
from fastpo.training.parallel import together
from fastpo.training.references import MovingReference
from fastpo.training.rollouts import Engine, Mask, Mixture, Rollout, Sampling, draw_seed
from fastpo.training.scorers import Combined, Judge, Scorer
from fastpo.training.tree import grow


@runtime_checkable
class Rubric(Scorer, Protocol):
    """Rewards by a rubric that can be rewritten, in the main process; its state goes to the others.

    Attributes:
        version: how often it was.
    """

    version: int

    def refine(self, samples: Sequence[Sample], rewards: Sequence[float]) -> None:
        """Rewrite it, by samples and what it gave them."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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
        context: most tokens of a prompt, what stands before it, and its completion.
    """

    size: int
    minibatches: int
    epochs: int
    rounds: int
    tokens: int
    seed: int
    context: int = 1024

    @property
    def steps(self) -> int:
        """Of a turn."""
        return self.minibatches * self.epochs


class _Reward(NamedTuple):
    """Of a sample: in one, and by each of several reward functions."""

    total: float = 0.0
    each: tuple[float, ...] = ()


class _Made(NamedTuple):
    """An example, with what is known of its completions from their sampling."""

    group: int
    prompt: str
    example: Example
    rollouts: tuple[Rollout, ...]
    rewards: tuple[_Reward, ...]
    begun: int


class _Seen(NamedTuple):
    """What the metrics need of a sampled completion, and what rewrites a rubric the sample."""

    group: int
    reward: float
    length: int
    ended: bool
    sample: Sample | None


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
        average: MovingReference | None = None,
        lagged: MovingReference | None = None,
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
            average: the moving average of the policy's weights, or the policy at a stage's beginning, if the algorithm
                has one; also among the anchors.
            lagged: the bare copy of the policy that says which tokens are sampled from.
        """
        self.accelerator, self.algorithm, self.prompts = accelerator, algorithm, prompts
        self.engine, self.sampling, self.plan, self.decode = engine, sampling, plan, decode
        self.scorer, self.judge, self.anchors, self.companion = scorer, judge, anchors or {}, companion
        self.average, self.lagged = average, lagged
        self.window = algorithm.window if isinstance(algorithm, Windowed) else 0
        # of unfinished completions, the prompt's place in the data and what there is
        self.begun: list[tuple[int, Rollout]] = []
        self.names: tuple[str, ...] = ()
        self.examples: list[Example] = []
        self.constants: dict[str, Constants] = {}
        self.state: State = {}
        self.turn = -1
        self.stage = 0
        self.last: Mapping[str, float] = {}

    def __call__(self, job: Job, done: int) -> dict[str, float]:
        """What is due before the step that follows `done` steps; the turn's metrics with its first step."""
        turn = done // self.plan.steps
        if self.average is not None and done:
            self._move(self.average, job, done)
        if turn == self.turn:
            return {}
        self.engine.update(job.policy)
        self.stage = 0 if self.average is None else self._stage(job, turn)
        if self.lagged is not None and turn % int(self._hyper("mask_every")) == 0:
            self.lagged.move(self.accelerator.unwrap_model(job.policy).model, 1.0)
        made, seen = self._sampled(turn)
        self._fill(job, made, turn)
        self._refine(seen, turn)
        self.turn = turn
        return self._metrics(seen, made) | {"epoch": (turn + 1) * self.plan.size / len(self.prompts)}

    def _move(self, average: MovingReference, job: Job, done: int) -> None:
        """The moving average takes its part of the policy after a step; or, by stages, all of it where one begins."""
        hyper = self.algorithm.hyper  # type: ignore[attr-defined]
        if "decay" in hyper:
            average.move(job.policy, 1 - float(hyper["decay"]))
        elif self._stage(job, done // self.plan.steps) != self._stage(job, (done - 1) // self.plan.steps):
            average.move(job.policy, 1.0)

    def _stage(self, job: Job, turn: int) -> int:
        first = self.algorithm.hyper.get("first_stage", 1.0)  # type: ignore[attr-defined]
        return int(turn * self.plan.steps >= first * job.steps)

    def order(self, step: int) -> list[int]:
        """The examples of a step: of each pass another permutation, cut into equal parts."""
        epoch, part = divmod(step % self.plan.steps, self.plan.minibatches)
        count, seed = len(self.examples), draw_seed(self.plan.seed, self.turn, epoch)
        mixed = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        first, last = (count * n // self.plan.minibatches for n in (part, part + 1))
        return sorted(mixed[first:last])

    # of checkpoints, which restore tensors, numbers and containers of them
    def state_dict(self) -> dict[str, Any]:
        examples = [[e.prompt, [*e.completions], [*e.numbers], e.row] for e in self.examples]
        constants = {name: [list(streams[i]) for i in range(len(examples))] for name, streams in self.constants.items()}
        out = {"turn": self.turn, "examples": examples, "constants": constants, "state": dict(self.state)}
        out["begun"] = [[number, rollout.ids, rollout.logprobs] for number, rollout in self.begun]
        return out | ({"rubric": self.scorer.state_dict()} if isinstance(self.scorer, Rubric) else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turn, self.state = state["turn"], dict(state["state"])
        self.examples[:] = [Example(p, tuple(c), tuple(n), row) for p, c, n, row in state["examples"]]
        self.begun = [(number, Rollout(ids, logprobs, False)) for number, ids, logprobs in state["begun"]]
        if isinstance(self.scorer, Rubric):
            self.scorer.load_state_dict(state["rubric"])
        self.constants.clear()
        for name, streams in state["constants"].items():
            self.constants[name] = {i: tuple(parts) for i, parts in enumerate(streams)}

    def sampled(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, source: str, n: int) -> Any:
        """Completions of prompts, with the numbers of their draws."""
        texts, keys = [prompt.ids for _, prompt in prompts], [number for number, _ in prompts]
        if source in ("policy", "greedy"):
            how = replace(sampling, temperature=0.0) if source == "greedy" else sampling
            return self.engine.generate(texts, n, how, keys)
        if source == "masked":
            assert self.lagged is not None
            model = self.accelerator.unwrap_model(self.lagged.model)
            mask = Mask(model, self._hyper("mask_top_p"), int(self._hyper("mask_min_tokens")))
            return self.engine.generate(texts, n, sampling, keys, mask=mask)  # type: ignore[call-arg]
        # another model alone is a mixture of which the policy has no share
        how = replace(sampling, seed=sampling.seed ^ 1 << 40)
        model = self._average() if source == "average" else self.companion
        mixture = Mixture(model, self._hyper("mixture") if source == "mixture" else 1.0)
        return self.engine.generate(texts, n, how, keys, mixture=mixture)  # type: ignore[call-arg]

    def _hyper(self, name: str) -> float:
        return float(self.algorithm.hyper[name])  # type: ignore[attr-defined]

    def _average(self) -> Any:
        """The bare model of the moving average."""
        assert self.average is not None
        return self.accelerator.unwrap_model(self.average.model).model

    def evaluate(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """The mean reward and length of one completion of each prompt."""
        mine = list(enumerate(prompts))[self.accelerator.process_index :: self.accelerator.num_processes]
        rollouts = self.sampled(mine, replace(self.sampling, seed=draw_seed(self.plan.seed, -1, 0)), "policy", 1)
        samples = [self._sample(prompt, found[0]) for (_, prompt), found in zip(mine, rollouts, strict=True)]
        given = [] if self.scorer is None else [reward.total for reward in self._rewards(samples)]
        scores = [score for score in given if not math.isnan(score)]
        sums = torch.tensor([sum(scores), len(scores), sum(len(s.ids) for s in samples), len(samples)])
        reward, scored, length, count = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").tolist()
        return {**({"reward": reward / scored} if scored else {}), "length": length / count}

    def _sampled(self, turn: int) -> tuple[list[_Made], list[_Seen]]:
        """What all ranks made of the turn's prompts, in the order of the prompts."""
        if self.window:
            return self._grown(turn)
        made: list[_Made] = []
        seen: list[_Seen] = []
        for attempt in range(self.plan.rounds):
            number = turn * self.plan.rounds + attempt
            indices = step_indices(number, self.plan.size, len(self.prompts), self.plan.seed)
            everything = [(attempt * self.plan.size + n, self.prompts[i]) for n, i in enumerate(indices)]
            missing = self.plan.size - len({each.group for each in made})
            with together(self.accelerator):
                found = self._round(self._share(everything), turn)
            groups, more = self._gathered(found)
            wanted = sorted({each.group for each in groups})[:missing]
            made += [each for each in groups if each.group in wanted]
            seen += more
            if len(wanted) == missing:
                break
        return made, seen

    def _grown(self, turn: int) -> tuple[list[_Made], list[_Seen]]:
        """The same of completions that go on from turn to turn: what is begun, and new ones in the places left."""
        old = [i for i, _ in self.begun]
        places = self.plan.size - -(-len(old) // self.algorithm.draws[0].times)
        new = step_indices(turn, self.plan.size, len(self.prompts), self.plan.seed)[: max(0, places)]
        everything = [(n, self.prompts[i]) for n, i in enumerate([*old, *new])]
        begun = {n: rollout for n, (_, rollout) in enumerate(self.begun)}
        with together(self.accelerator):
            found = self._round(self._share(everything), turn, begun)
        made, seen = self._gathered(found)
        rest = ((each.group, each.rollouts[0]) for each in made if not self._finished(each.rollouts[0]))
        self.begun = [([*old, *new][n], rollout) for n, rollout in rest]
        return made, seen

    def _share(self, prompts: Sequence[tuple[int, Prompt]]) -> Sequence[tuple[int, Prompt]]:
        """This rank's."""
        return prompts[self.accelerator.process_index :: self.accelerator.num_processes]

    def _finished(self, rollout: Rollout) -> bool:
        return rollout.ended or len(rollout.ids) >= self.sampling.max_new_tokens

    def _gathered(self, found: tuple[list[_Made], list[_Seen]]) -> tuple[list[_Made], list[_Seen]]:
        if self.accelerator.num_processes == 1:
            return found
        from accelerate.utils import gather_object

        parts = gather_object([found])
        made = sorted((each for part, _ in parts for each in part), key=lambda each: each.group)
        return made, sorted((each for _, part in parts for each in part), key=lambda each: each.group)

    def _round(
        self, prompts: Sequence[tuple[int, Prompt]], turn: int, begun: Mapping[int, Rollout] | None = None
    ) -> tuple[list[_Made], list[_Seen]]:
        """Sample, judge and draft: of this rank's prompts."""
        sampling = replace(self.sampling, seed=draw_seed(self.plan.seed, turn, 0))
        if self.algorithm.draws[0].search is not None:
            return self._searched(prompts, sampling, self.algorithm.draws[0], turn)
        rollouts: list[list[Rollout]] = [[] for _ in prompts]
        if self.window:
            rollouts = self._windows(prompts, sampling, begun or {})
        else:
            for draw in self.algorithm.draws:
                for of, found in zip(rollouts, self.sampled(prompts, sampling, draw.source, draw.times), strict=True):
                    of += found
        if self.algorithm.demonstrations:
            for (_, prompt), of in zip(prompts, rollouts, strict=True):
                of += [Rollout(each, torch.zeros(len(each)), True) for each in prompt.completions]
        samples, rewards = self._judged(prompts, rollouts)
        if isinstance(self.algorithm, Allocating):
            self._allocate(self.algorithm, prompts, rollouts, samples, rewards, turn)
        totals = [[] if self.scorer is None else [reward.total for reward in of] for of in rewards]
        wins = self._wins(samples, totals)
        made: list[_Made] = []
        seen: list[_Seen] = []
        drawn = self.algorithm.draws[0].times
        keeps = isinstance(self.algorithm, Refining)
        for n, ((place, prompt), of, won) in enumerate(zip(prompts, rollouts, wins, strict=True)):
            old = 0 if begun is None or place not in begun else len(begun[place].ids)
            made += self._drafted(place, prompt, samples[n], of, rewards[n], won, turn, old=old)
            seen += [
                _Seen(place, rewards[n][i].total, len(each.ids), each.ended, samples[n][i] if keeps else None)
                for i, each in enumerate(of[:drawn])
                if self._finished(each)
            ]
        return made, seen

    def _windows(
        self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, begun: Mapping[int, Rollout]
    ) -> list[list[Rollout]]:
        """The next tokens of what is begun, and the first ones of new completions."""
        out: list[list[Rollout]] = [[] for _ in prompts]
        samples = self.algorithm.draws[0].times
        by_room: dict[tuple[int, int], list[int]] = {}
        for n, (place, _) in enumerate(prompts):
            done = len(begun[place].ids) if place in begun else 0
            room = min(self.window, sampling.max_new_tokens - done)
            by_room.setdefault((room, 1 if place in begun else samples), []).append(n)
        for (room, times), members in by_room.items():
            none = Rollout([], torch.zeros(0), False)
            before = [begun.get(prompts[n][0], none) for n in members]
            texts = [prompts[n][1].ids + each.ids for n, each in zip(members, before, strict=True)]
            how = replace(sampling, max_new_tokens=room)
            found = self.engine.generate(texts, times, how, [prompts[n][0] for n in members])
            for n, old, new in zip(members, before, found, strict=True):
                out[n] = [Rollout(old.ids + r.ids, torch.cat([old.logprobs, r.logprobs]), r.ended) for r in new]
        return out

    def _judged(
        self, prompts: Sequence[tuple[int, Prompt]], rollouts: Sequence[Sequence[Rollout]]
    ) -> tuple[list[list[Sample]], list[list[_Reward]]]:
        """Samples and rewards of rollouts; one that is not finished has none yet."""
        samples = [
            [self._sample(prompt, each) for each in of] for (_, prompt), of in zip(prompts, rollouts, strict=True)
        ]
        # what an algorithm does not sample in windows is never unfinished
        done = [[not self.window or self._finished(each) for each in of] for of in rollouts]
        flat = [
            sample for of, ends in zip(samples, done, strict=True) for sample, end in zip(of, ends, strict=True) if end
        ]
        scores = iter(self._rewards(flat))
        return samples, [[next(scores) if end else _Reward() for end in ends] for ends in done]

    def _rewards(self, samples: Sequence[Sample]) -> list[_Reward]:
        if self.scorer is None:
            return [_Reward()] * len(samples)
        if self.algorithm.needs != "rewards":
            return [_Reward(score) for score in self.scorer(samples)]
        assert isinstance(self.scorer, Combined)
        each = self.scorer.each(samples)
        self.names = tuple(each)
        rows = zip(*each.values(), strict=True)
        return [_Reward(*of) for of in zip(self.scorer.combine(each), rows, strict=True)]

    def _allocate(
        self,
        algorithm: Allocating,
        prompts: Sequence[tuple[int, Prompt]],
        rollouts: Sequence[list[Rollout]],
        samples: Sequence[list[Sample]],
        rewards: Sequence[list[_Reward]],
        turn: int,
    ) -> None:
        """More completions of some prompts, put behind those that they have."""
        for round in count():
            mine = [
                (
                    place,
                    [r.total for r in of],
                    [s for s, r in zip(given, of, strict=True) if r.total >= algorithm.solved],
                )
                for (place, _), of, given in zip(prompts, rewards, samples, strict=True)
            ]
            known = sorted(self._everybodys(mine), key=lambda each: each[0])
            more = algorithm.allocate([totals for _, totals, _ in known], round)
            if not more:
                return
            counts = {place: n for (place, _, _), n in zip(known, more, strict=True)}
            solved = [found[0] for _, _, found in known if found]
            open_ = {place for place, _, found in known if not found}
            sampling = replace(self.sampling, seed=draw_seed(self.plan.seed, turn, 0, round + 1))
            # of all ranks, as rewards may be of all of them together
            for times in sorted({*more} - {0}):
                members = [n for n, (place, _) in enumerate(prompts) if counts[place] == times]
                texts = [
                    self._behind(solved, prompts[n][1], algorithm.exemplars)
                    if prompts[n][0] in open_
                    else prompts[n][1].ids
                    for n in members
                ]
                found = self.engine.generate(texts, times, sampling, [prompts[n][0] for n in members])
                given, scores = self._judged([prompts[n] for n in members], found)
                for i, n in enumerate(members):
                    rollouts[n].extend(found[i])
                    samples[n].extend(given[i])
                    rewards[n].extend(scores[i])

    def _behind(self, solved: Sequence[Sample], prompt: Prompt, count: int) -> list[int]:
        """A prompt behind those of the turn's solved ones that have most of its tokens, while there is room."""
        own = Counter(prompt.ids)

        def overlap(sample: Sample) -> float:
            other = Counter(sample.prompt_ids)
            return (own & other).total() / (own | other).total()

        room = self.plan.context - len(prompt.ids) - self.sampling.max_new_tokens
        ids: list[int] = []
        # the nearest one last; of equals the first
        for sample in sorted(solved, key=overlap, reverse=True)[:count]:
            if len(ids) + len(sample.prompt_ids) + len(sample.ids) <= room:
                ids = sample.prompt_ids + sample.ids + ids
        return ids + prompt.ids

    def _everybodys(self, mine: list[Any]) -> list[Any]:
        """What all ranks have."""
        if self.accelerator.num_processes == 1:
            return mine
        from accelerate.utils import gather_object

        return gather_object(mine)

    def _refine(self, seen: Sequence[_Seen], turn: int) -> None:
        """Rewrite the rubric if it is due, by the turn's first samples."""
        algorithm, rubric = self.algorithm, self.scorer
        if not isinstance(algorithm, Refining) or not isinstance(rubric, Rubric):
            return
        if (turn + 1) % algorithm.refine_every:
            return
        if self.accelerator.is_main_process:
            episodes = seen[: algorithm.episodes]
            rubric.refine([e.sample for e in episodes if e.sample is not None], [e.reward for e in episodes])
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            rubric.load_state_dict(broadcast_object_list([rubric.state_dict()])[0])

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
            rollouts, values = [node.segment for node in nodes], [_Reward(node.value) for node in nodes]
            made += self._drafted(place, prompt, samples, rollouts, values, _no_judge, turn, visits)
            seen += [_Seen(place, reward, len(each.ids), each.ended, None) for each, reward in tree.complete]
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
        rewards: Sequence[_Reward],
        wins: Callable[[int, int], float],
        turn: int,
        visits: Sequence[int] = (),
        old: int = 0,
    ) -> list[_Made]:
        """The examples of a group, of whose completions the first so many tokens are older than the turn."""
        generator = torch.Generator().manual_seed(draw_seed(self.plan.seed, turn, place + 1))
        logprobs = [float(each.logprobs.double().sum()) for each in rollouts]
        totals = [] if self.scorer is None else [reward.total for reward in rewards]
        made = []
        for draft in self.algorithm.drafts(Group(samples, totals, wins, logprobs, generator, self.stage, visits)):
            chosen = tuple(rollouts[i] for i in draft.completions)
            start = samples[draft.completions[0]].prompt_ids if draft.prompt is None else list(draft.prompt)
            example = Example(start, tuple(each.ids for each in chosen), draft.numbers, prompt.number)
            scores = tuple(rewards[i] for i in draft.completions)
            made.append(_Made(place, prompt.text, example, chosen, scores, old))
        return made

    def _wins(
        self, samples: Sequence[Sequence[Sample]], rewards: Sequence[Sequence[float]]
    ) -> list[Callable[[int, int], float]]:
        """Of each group, who is preferred to whom; all pairs are asked for at once."""
        if self.algorithm.needs != "judge":
            return [_no_judge] * len(samples)
        pairs = [(n, i, j) for n, of in enumerate(samples) for i, j in self.algorithm.compared(len(of))]
        if self.judge is None:
            # Bradley-Terry on the rewards
            gaps = [rewards[n][i] - rewards[n][j] for n, i, j in pairs]
            found = torch.tensor(gaps, dtype=torch.float64).sigmoid().tolist()
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
        constants: dict[str, Constants] = {
            "rollout": {i: tuple(of.logprobs for of in each.rollouts) for i, each in enumerate(made)}
        }
        if made[0].rollouts[0].allowed is not None:
            constants["allowed"] = {i: tuple(of.allowed for of in each.rollouts) for i, each in enumerate(made)}  # type: ignore[misc]
        everything = range(len(examples))
        anchors = self.algorithm.anchors(self.plan.steps)
        for name, whose in anchors.items():
            if whose == "rollout" or (name == "old" and self.algorithm.critic):
                continue  # known already, or with the values
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
        constants |= {name: constants["rollout"] for name, whose in anchors.items() if whose == "rollout"}
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
            draw_seed(self.plan.seed, turn, 0),
            sum(completions.lengths),
            self.sampling.max_new_tokens,
        )
        names = sorted({each.group for each in made})
        prompt_of = {each.group: each.prompt for each in made}
        groups = torch.tensor([names.index(each.group) for each in made])
        turn_ = Turn(
            batch,
            groups,
            [prompt_of[n] for n in names],
            torch.tensor([each.rollouts[k].ended for k in parts for each in made]),
            torch.tensor([each.begun for _ in parts for each in made]),
            {
                name: torch.tensor([each.rewards[k].each[n] for k in parts for each in made], dtype=torch.float64)
                for n, name in enumerate(self.names)
            },
            self.scorer.version if isinstance(self.scorer, Rubric) else 0,
        )
        prepared = self.algorithm.prepare(turn_, self.state)
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
        out = {"examples": float(len(self.examples))}
        if seen:
            # in windows there may be nothing that is finished
            out["length"] = sum(each.length for each in seen) / len(seen)
            out["truncated"] = sum(not each.ended for each in seen) / len(seen)
        if self.scorer is not None and seen:
            scores = torch.tensor([each.reward for each in seen], dtype=torch.float64)
            scores = scores[~scores.isnan()]
            groups: dict[int, list[float]] = {}
            for each in seen:
                groups.setdefault(each.group, []).append(each.reward)
            same = sum(len(set(of)) == 1 for of in groups.values()) / len(groups)
            out |= {"reward": float(scores.mean()), "reward_std": float(scores.std(correction=0)), "same_reward": same}
            out |= {f"reward_{name}": mean for name, mean in getattr(self.scorer, "means", {}).items()}
        # of pairs, which are no samples of the policy, it would be none
        single = bool(self.examples) and len(self.examples[0].completions) == 1
        if single and {"old", "reference"} <= self.constants.keys():
            old, reference = (self.constants[name] for name in ("old", "reference"))
            total = sum(float((o - r).sum()) for i in old for o, r in zip(old[i], reference[i], strict=True))
            out["kl"] = total / len(self.examples)
        return out | dict(self.last)


def _no_judge(i: int, j: int) -> float:
    raise RuntimeError("this algorithm did not say that it needs a judge")
