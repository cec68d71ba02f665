"""A search for better completions: trees of segments that the policy writes, grown towards those of high reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from fastpo.algorithms import Search
from fastpo.training.errors import UserError
from fastpo.training.rollouts import Engine, Rollout, Sampling

# the rewards of complete rollouts, each with the place of its prompt
Score = Callable[[Sequence[tuple[int, Rollout]]], list[float]]

_NOTHING = Rollout([], torch.zeros(0), False)


@dataclass(eq=False)
class Node:
    """A segment, and what was found of the completions that go on from it.

    Attributes:
        before: what stands between the prompt and the segment.
        segment: at least one token; none at the root.
        closed: whether nothing can follow.
        prior: its probability among its siblings.
        parent: None at the root.
        children: distinct segments that were drawn behind it.
        visits: completions that went through it.
        total: the sum of their rewards.
    """

    before: Rollout
    segment: Rollout
    closed: bool
    prior: float = 1.0
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0

    @property
    def whole(self) -> Rollout:
        """All behind the prompt."""
        return _joined(self.before, self.segment)

    @property
    def value(self) -> float:
        """The mean reward, once there is one."""
        return self.total / self.visits

    def bound(self, exploration: float) -> float:
        """PUCT: value + exploration · prior · √(visits of the parent) / (1 + visits)."""
        assert self.parent is not None
        return self.value + exploration * self.prior * math.sqrt(self.parent.visits) / (1 + self.visits)

    def count(self, reward: float) -> None:
        """Take the reward of a completion into this node and all above."""
        node: Node | None = self
        while node is not None:
            node.visits += 1
            node.total += reward
            node = node.parent

    def expand(self, segments: Sequence[Rollout], longest: int) -> None:
        """Put the distinct ones behind this node; completions have at most `longest` tokens."""
        before = self.whole
        distinct = {tuple(segment.ids): segment for segment in segments}.values()
        weights = torch.stack([segment.logprobs.double().sum() for segment in distinct]).softmax(0).tolist()
        for segment, prior in zip(distinct, weights, strict=True):
            closed = segment.ended or len(before.ids) + len(segment.ids) == longest
            self.children.append(Node(before, segment, closed, prior, self))

    def below(self) -> Iterator[Node]:
        """All nodes behind this one, each before what follows it."""
        for child in self.children:
            yield child
            yield from child.below()


class Tree:
    """Of one prompt.

    Attributes:
        root: nothing but the prompt.
        complete: the completions that were rewarded, with their rewards.
    """

    def __init__(self) -> None:
        self.root = Node(_NOTHING, _NOTHING, closed=False)
        self.complete: list[tuple[Rollout, float]] = []

    def leaf(self, exploration: float) -> Node:
        """Where the bounds lead to, the first of equal ones."""
        node = self.root
        while node.children:
            node = max(node.children, key=lambda child: child.bound(exploration))
        return node

    def nodes(self) -> list[Node]:
        """All but the root."""
        return list(self.root.below())


def grow(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    sampling: Sampling,
    score: Score,
    times: int,
    how: Search,
) -> list[Tree]:
    """A tree behind each prompt, all grown in the same forwards.

    So many times a leaf is looked for by PUCT. If it can be continued, segments are drawn behind it, and each distinct
    one is completed once, the reward of the whole being counted in it and in all above; if not, its reward is counted
    once more. The prior of a segment is its probability under what was sampled from, over that of all beside it.

    Source: MCTS boosts reasoning via iterative preference learning, 2405.00451 (from memory). There the value of a leaf
    is a judgement by the policy itself; here it is the reward of a completion.

    Args:
        engine: samples.
        prompts: token ids.
        keys: one per prompt; its tree depends on them and the seed, and on no other prompt.
        sampling: of the completions.
        score: rewards.
        times: how often.
        how: the search.

    Raises:
        UserError: the engine's processes must generate together, while each has trees of its own; or a text ends
            completions, which may begin in one segment and end in the next.
    """
    if getattr(engine, "largest", None) is not None:
        raise UserError("a tree search samples as its trees grow, so that processes cannot share the policy's weights")
    if sampling.stop_strings:
        raise UserError("--rollout.stop: a tree search ends completions by tokens only")
    trees = [Tree() for _ in prompts]
    for time in range(times):
        leaves = [tree.leaf(how.exploration) for tree in trees]
        for leaf in leaves:
            if leaf.closed:
                leaf.count(leaf.value)
        found = [i for i, leaf in enumerate(leaves) if not leaf.closed]
        starts = [(prompts[i], leaves[i].whole.ids, keys[i]) for i in found]
        # every time and both kinds of draws have numbers of their own
        now = replace(sampling, seed=sampling.seed + (2 * time + 1 << 40))
        for i, segments in zip(found, _drawn(engine, starts, how.width, now, how.segment), strict=True):
            leaves[i].expand(segments, sampling.max_new_tokens)
        new = [(i, j, node) for i in found for j, node in enumerate(leaves[i].children)]
        starts = [(prompts[i], n.whole.ids, keys[i] * how.width + j) for i, j, n in new if not n.closed]
        now = replace(sampling, seed=sampling.seed + (2 * time + 2 << 40))
        rest = iter(_drawn(engine, starts, 1, now, sampling.max_new_tokens))
        complete = [(i, node.whole if node.closed else _joined(node.whole, next(rest)[0])) for i, _, node in new]
        for (i, rollout), (_, _, node), reward in zip(complete, new, score(complete), strict=True):
            trees[i].complete.append((rollout, reward))
            node.count(reward)
    return trees


def _drawn(
    engine: Engine, starts: Sequence[tuple[Sequence[int], Sequence[int], int]], n: int, sampling: Sampling, longest: int
) -> list[list[Rollout]]:
    """`n` continuations of at most so many tokens behind each prompt and tokens of the policy's, with their keys."""
    rooms = [min(longest, sampling.max_new_tokens - len(before)) for _, before, _ in starts]
    out: list[list[Rollout]] = [[] for _ in starts]
    for room in sorted(set(rooms)):
        here = [i for i, each in enumerate(rooms) if each == room]
        texts, keys = [[*starts[i][0], *starts[i][1]] for i in here], [starts[i][2] for i in here]
        found = engine.generate(texts, n, replace(sampling, max_new_tokens=room), keys)
        for i, rollouts in zip(here, found, strict=True):
            out[i] = rollouts
    return out


def _joined(first: Rollout, second: Rollout) -> Rollout:
    return Rollout([*first.ids, *second.ids], torch.cat([first.logprobs, second.logprobs]), second.ended)
