"""What the loop and an algorithm say to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastpo.reference.registry import Domain

Hyper = Mapping[str, float | bool | str | None]
# what an algorithm remembers of the steps before, by name; saved with checkpoints
State = dict[str, Tensor]


class Completions(NamedTuple):
    """Where the completions of a batch lie in its packed log-probs.

    All the first ones of the examples come first, then all the second ones of those that have a second one, and so on.

    Attributes:
        lengths: tokens of every completion that are trained on, on the host.
        cu_seqlens: int32 (len(lengths) + 1,), their running sum, on the device.
        counts: completions of every example.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    counts: tuple[int, ...]

    def slots(self) -> list[list[int]]:
        """For each example, the places of its completions among all of them."""
        found: list[list[int]] = [[] for _ in self.counts]
        place = 0
        for k in range(max(self.counts, default=0)):
            for slots, count in zip(found, self.counts, strict=True):
                if k < count:
                    slots.append(place)
                    place += 1
        return found

    def by_example(self) -> tuple[Tensor, Tensor]:
        """What brings completions together that belong to one example, on the device.

        Returns:
            int64 (len(lengths),), the places of the completions, one example behind the other; and int32
            (examples + 1,), the boundaries of the examples among them.
        """
        device = self.cu_seqlens.device
        order = torch.tensor([place for slots in self.slots() for place in slots], dtype=torch.int64)
        bounds = torch.tensor([0, *self.counts]).cumsum(0, dtype=torch.int32)
        return order.to(device), bounds.to(device)


# of what there is one number: each example, each of its completions, each token of a completion; or each segment of a
# completion, the number standing at its last token and 0 at the others
Level = Literal["example", "completion", "token", "segment"]


class Column(NamedTuple):
    """A number that the data give for every example, or for parts of it.

    Attributes:
        name: of the column.
        boolean: whether it is a label.
        default: where the data have no such column; None if they must.
        category: whether it names something, by a string or an integer, whose number is its place among the names.
        level: of what there is one.
        domain: what is looked at when the data are read; what an algorithm refuses only together is its `problem`.
    """

    name: str
    boolean: bool = False
    default: float | None = None
    category: bool = False
    level: Level = "example"
    domain: Domain = Domain()


class Control(NamedTuple):
    """What becomes of completions, or segments of them, according to their rewards, before they are trained on.

    Attributes:
        good: said before those whose reward is at least the threshold; an answer is asked for with it.
        bad: said before the others; None: completions whose mean reward is below the threshold are left out.
        threshold: of the rewards.
        drop: the probability that nothing is said.
    """

    good: str
    bad: str | None
    threshold: float = 0.0
    drop: float = 0.0


class Batch(NamedTuple):
    """What an algorithm sees of some examples: those of one forward, or of the whole step.

    Attributes:
        streams: packed (N,) numbers of all completion tokens, by name: "policy" and "reference" are log-probs, a
            statistic of a model's distributions is MODEL_STATISTIC, "kl" is KL(reference || policy), "values" is what
            `Algorithm.module` answers, "ids" are the tokens themselves, "policy_candidates", (N, K), the log-probs of
            `Algorithm.candidates`, and the others are columns of tokens and what `Algorithm.draw` gave.
        completions: where each completion lies in them.
        numbers: (B,) numbers of the examples, or (completions,) of their completions in the order of `completions`, by
            column.
        num_items: examples in the whole step, over forwards and ranks.
        seed: of what is drawn for this step.
        num_tokens: tokens of their completions that are trained on, likewise.
        max_length: most tokens that a completion of this run can have, if completions are sampled.
    """

    streams: Mapping[str, Tensor]
    completions: Completions
    numbers: Mapping[str, Tensor]
    num_items: int
    seed: int
    num_tokens: int = 0
    max_length: int = 0


class StepOutput(NamedTuple):
    """What a batch adds to the step.

    Attributes:
        loss: scalar to differentiate, its denominator the number of examples in the whole step.
        metrics: detached scalars with the same denominator, so that micro-batches and ranks add up.
        state: what is to be remembered.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    state: State


class Algorithm(Protocol):
    """A training method.

    Attributes:
        name: as on the command line.
        kind: the data it eats, as in the registry ("pairwise": a chosen and a rejected completion; "unpaired": one), or
            as in `fastpo.training.data` ("lists", "demonstrations" and so on).
        models: whose log-probs it needs, "policy" first.
        columns: the numbers that it needs of every example.
        statistics: by model, what it needs of the distributions beside log-probs.
        divergence: whether it needs KL(reference || policy) at every token, through which a gradient flows.
        mismatched: whether each example has, as a further completion that is not trained on, that of another prompt.
        unlearns: whether it takes all its data for undesirable.
        whole_step: whether its loss couples the examples of a step, so that it must see all of them at once.
        control: what becomes of good and bad completions before they are trained on, None for nothing.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def models(self) -> tuple[str, ...]: ...

    @property
    def columns(self) -> tuple[Column, ...]: ...

    @property
    def statistics(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def divergence(self) -> bool: ...

    @property
    def mismatched(self) -> bool: ...

    @property
    def unlearns(self) -> bool: ...

    @property
    def whole_step(self) -> bool: ...

    @property
    def control(self) -> Control | None: ...

    def module(self, width: int) -> nn.Module | None:
        """What it learns beside the policy: from hidden states (N, width) where tokens are predicted to numbers (N,).

        It is called inside the policy's forward, trained and saved with the policy, and not exported with the model.
        """
        ...

    def candidates(self, ids: Tensor, completions: Completions) -> Tensor | None:
        """Tokens (N, K) beside the targets `ids` (N,) whose log-probs it needs too; -100 where there are fewer."""
        ...

    def problem(self, numbers: Sequence[Sequence[float]]) -> tuple[int, str] | None:
        """The first example (one number per column) that the loss would refuse, and why."""
        ...

    def draw(self, completions: Completions, seed: int) -> dict[str, Tensor]:
        """Streams that are drawn anew for every step, for all its completions, on the CPU."""
        ...

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        """The loss of a batch: of the whole step if `whole_step`, else of any part of it."""
        ...

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The step's metrics from the sums of `StepOutput.metrics` over its batches."""
        ...


class Sample(NamedTuple):
    """A completion of a prompt.

    Attributes:
        prompt: as text, the chat template's if it was a conversation.
        completion: as text, without special tokens.
        prompt_ids: the prompt's tokens.
        ids: the completion's, with its EOS if it has one.
        ended: whether it ended itself, before the limit.
        row: the columns of the prompt's row in the data; "prompt" in it is a list if it is a conversation.
    """

    prompt: str
    completion: str
    prompt_ids: list[int]
    ids: list[int]
    ended: bool
    row: Mapping[str, Any]


class Search(NamedTuple):
    """How a tree of segments is grown behind each prompt: `fastpo.training.tree`.

    Attributes:
        width: segments that are drawn behind a leaf.
        segment: tokens of one.
        exploration: what a prior weighs against a value, in units of the reward.
    """

    width: int
    segment: int
    exploration: float


class Draw(NamedTuple):
    """Completions of each prompt of a turn.

    Attributes:
        source: "policy"; "greedy", its most probable tokens; "reference"; "mixture", of policy and reference, by the
            hyper-parameter `mixture`, the reference's share; "average", as in `Online.anchors`; "masked", of the policy
            among the tokens that a copy of it allows, by `mask_top_p`, `mask_min_tokens` and `mask_every`, the turns
            after which the copy is renewed; "search", the segments of a tree, the only draw then.
        times: how many; of a search, how often a leaf is looked for.
        search: how.
    """

    source: str
    times: int
    search: Search | None = None


class Group(NamedTuple):
    """The completions of one prompt.

    Attributes:
        samples: in the order of the algorithm's draws, and behind them those that the data have; of a search the
            segments, each with all that stands before it as its prompt.
        rewards: of the samples; empty without reward functions; of segments the mean reward of what went on from them.
        wins: the probability that one sample, by its place, is preferred to another; of those that are compared.
        logprobs: of each sample under what it was drawn from, summed.
        generator: seeded for this prompt and turn.
        stage: the part of the run in which the turn lies, see `Online.anchors`.
        visits: of segments, how many completions went on from them.
    """

    samples: Sequence[Sample]
    rewards: Sequence[float]
    wins: Callable[[int, int], float]
    logprobs: Sequence[float]
    generator: torch.Generator
    stage: int = 0
    visits: Sequence[int] = ()


class Draft(NamedTuple):
    """An example to be trained on.

    Attributes:
        completions: places in the group's samples, as many as the algorithm's data kind has, all of one prompt.
        numbers: of it, in the order of the algorithm's columns.
        prompt: the tokens before the completions, if not those that they were sampled behind; negative where a token is
            hidden from a masked-diffusion model.
    """

    completions: tuple[int, ...]
    numbers: tuple[float, ...] = ()
    prompt: tuple[int, ...] | None = None


class Turn(NamedTuple):
    """All examples of a turn, of all ranks, before they are trained on.

    Attributes:
        batch: of them, with the streams of the models that are held fixed: `Online.anchors`, "rollout" (the log-probs
            under what sampled) and, with a critic, "old_value".
        groups: int64 (B,), the number of the prompt in the turn.
        prompts: their texts.
        ended: bool, of the completions, in their order.
        begun: int64, of each completion, its tokens that are older than the turn; of a `Windowed` algorithm.
        rewards: by the name of each of several reward functions, fp64 of the completions.
        version: of the rubric that rewarded them, if that is rewritten during the run.
    """

    batch: Batch
    groups: Tensor
    prompts: Sequence[str]
    ended: Tensor
    begun: Tensor | None = None
    rewards: Mapping[str, Tensor] = {}
    version: int = 0


class Prepared(NamedTuple):
    """What an algorithm makes of a turn.

    Attributes:
        streams: per token, constants of the steps that follow.
        metrics: of the turn.
        state: what is to be remembered.
        keep: bool (B,), the examples that are trained on; None for all.
    """

    streams: Mapping[str, Tensor]
    metrics: Mapping[str, float]
    state: State
    keep: Tensor | None = None


def check_hyper(
    name: str, hyper: Hyper, domains: Mapping[str, Domain], options: Mapping[str, Sequence[str | None]]
) -> None:
    """Raise ValueError for a hyper-parameter of the algorithm `name` that is outside its domain."""
    for key, domain in domains.items():
        value = hyper[key]
        if value not in domain:  # type: ignore[operator]
            raise ValueError(f"{key} must be in {domain} for {name}, got {value:g}")
    for key, values in options.items():
        if hyper[key] not in values:
            raise ValueError(f"{key} must be one of {', '.join(map(str, values))} for {name}, got {hyper[key]}")


class Online(Algorithm, Protocol):
    """A method that trains on completions which it samples, turn by turn.

    A turn: completions of some prompts are sampled and judged, examples are drafted of them, the models that are held
    fixed say their log-probs, the algorithm prepares what the steps need, and steps on parts of the examples follow.

    Attributes:
        draws: the completions of each prompt.
        critic: whether there is one: True of one value, "each" of one for the divergence and one for each reward.
        demonstrations: how many completions the data have for every prompt: 1, "completion"; 2, "chosen" and
            "rejected"; or 0.
        needs: "reward", "rewards" of which each counts by itself, "judge", or "answer", a reward of what the model
            before training answers when it has read a completion: what must be given beside the prompts; None for
            nothing.
    """

    @property
    def draws(self) -> tuple[Draw, ...]: ...

    @property
    def critic(self) -> bool | str: ...

    @property
    def demonstrations(self) -> int: ...

    @property
    def needs(self) -> str | None: ...

    def anchors(self, steps: int) -> Mapping[str, str]:
        """Streams of log-probs that stay constant in a turn of so many steps, and whose they are.

        "start", the model before training; "turn", the policy at the turn's beginning; "average", a moving average of
        the policy's weights, of which a step keeps the hyper-parameter `decay`; "stage", the policy where the stage of
        the run began in which the turn lies: 0, or 1 after the hyper-parameter `first_stage`, a share of the steps;
        "rollout", what sampled; "aux", a further model that the user gives.
        """
        ...

    def compared(self, count: int) -> Sequence[tuple[int, int]]:
        """Of a prompt's so many samples those, two and two, that the judge compares; only if it needs one."""
        ...

    def drafts(self, group: Group) -> list[Draft]:
        """The examples that are made of a prompt's completions."""
        ...

    def prepare(self, turn: Turn, state: State) -> Prepared:
        """What is computed once for all of a turn's examples."""
        ...


@runtime_checkable
class Windowed(Protocol):
    """An `Online` algorithm whose completions grow by some tokens each turn; unfinished ones go on in the next.

    Attributes:
        window: most tokens that a turn adds to a completion.
    """

    @property
    def window(self) -> int: ...


@runtime_checkable
class Allocating(Protocol):
    """An `Online` algorithm that decides, when a turn's first completions are rewarded, whose prompts get more.

    Attributes:
        solved: the reward from which a completion solves its prompt.
        exemplars: solved prompts that stand before an unsolved one when more of it is sampled; 0 for none.
    """

    @property
    def solved(self) -> float: ...

    @property
    def exemplars(self) -> int: ...

    def allocate(self, rewards: Sequence[Sequence[float]], round: int) -> list[int]:
        """How many more completions of each prompt of the turn, by the rewards so far; none to end the sampling."""
        ...


@runtime_checkable
class Refining(Protocol):
    """An `Online` algorithm that has the rubric of its rewards rewritten during the run.

    Attributes:
        refine_every: turns between.
        episodes: samples that are shown.
    """

    @property
    def refine_every(self) -> int: ...

    @property
    def episodes(self) -> int: ...
