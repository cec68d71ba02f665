"""Where rewards and preferences come from: functions of the user, reward models, and what is made of several.

On the command line a reward is SPEC or SPEC*WEIGHT. SPEC is a Python function, `path/to/file.py:function` or
`package.module:function`, or else a folder or a name on the hub: of a reward model (a sequence classification model of
transformers with one label), or of a causal language model, an autoregressive reward model, whose reward is the
log-prob of the completion.

A function is called as TRL calls reward functions, with lists that have an entry for each sample: `prompts`,
`completions`, `completion_ids`, and one list per column of the data, by its name. Of these it gets all if it takes
**kwargs, and else those that it names. Of conversations the prompts and completions are lists of {"role", "content"}.
It returns a list of numbers; None or NaN is an error, or with unscored="skip" a sample that is left out.

An asynchronous function (`async def`) is awaited, in an event loop in a thread of its own that lives as long as the
process, so that it may keep sessions. Several rewards begin together: asynchronous ones wait for what they ask while
the others are computed.

A judge's SPEC is a function of `prompts`, `first`, `second` and columns that returns probabilities of the first being
preferred, or what a reward's may be: a Bradley-Terry judge, which prefers by the difference of rewards.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch

from fastpo.algorithms import Sample
from fastpo.kernels.packing import pack
from fastpo.reference.ranks import summed_over
from fastpo.rewards import weighted_rewards
from fastpo.training.batches import collate
from fastpo.training.data import Example
from fastpo.training.errors import UserError
from fastpo.training.model import Policy, Scores, load_model, load_reward_model, load_tokenizer, policy_inputs

if TYPE_CHECKING:
    from fastpo.reference.ranks import Group

Unscored = Literal["error", "skip"]
How = Literal["sum", "normalized", "min"]


class Scorer(Protocol):
    """Rewards of samples, one each; NaN for one that has none."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]: ...


class Judge(Protocol):
    """For pairs of samples of one prompt each, the probability that the first is preferred."""

    def __call__(self, first: Sequence[Sample], second: Sequence[Sample]) -> list[float]: ...


def _turns(sample: Sample) -> tuple[Any, Any]:
    """Prompt and completion as the data have them: texts, or lists of role and content."""
    prompt = sample.row.get("prompt")
    if isinstance(prompt, list):
        return prompt, [{"role": "assistant", "content": sample.completion}]
    return sample.prompt, sample.completion


def _columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """The data's columns, a list each."""
    names = dict.fromkeys(name for sample in samples for name in sample.row if name != "prompt")
    return {name: [sample.row.get(name) for sample in samples] for name in names}


def _tell(sample: Sample) -> str:
    """A sample in an error."""
    prompt, completion = (text if len(text) <= 60 else text[:57] + "..." for text in sample[:2])
    return f"the completion {completion!r} of the prompt {prompt!r}"


def _finite(value: Any) -> float | None:
    """A number as such, NaN and None as NaN; None for what is no number, infinities included."""
    if value is None:
        return math.nan
    if hasattr(value, "item") and not isinstance(value, (bool, int, float)):
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            return None
    if not isinstance(value, (bool, int, float)):
        return None
    return None if math.isinf(value) else float(value)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The loop of all asynchronous functions. The caller's thread may have one of its own, as notebooks do."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fastpo-rewards", daemon=True).start()
    return loop


# what waits for something that has begun, and gives what it returns or raises what it raises
_Begun = Callable[[], Any]


@contextlib.contextmanager
def _beginning() -> Iterator[Callable[..., _Begun]]:
    """What begins a call of an asynchronous function with keywords; at the end, what nobody waited for is cancelled."""
    begun = []

    async def called(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        return await function(**given)

    def begin(function: Callable[..., Any], /, **given: Any) -> _Begun:
        begun.append(asyncio.run_coroutine_threadsafe(called(function, given), _loop()))
        return begun[-1].result

    try:
        yield begin
    finally:
        for future in begun:
            future.cancel()


class _Function:
    """A function of the user, called with lists by name; whatever goes wrong is a UserError that names it."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: what it takes cannot be told: {error}") from error
        self.all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.takes = {p.name for p in by_name}
        self.needs = {p.name for p in by_name if p.default is p.empty}
        # of an object that is called, its method is
        self.asynchronous = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))

    def __call__(self, lists: Mapping[str, list[Any]], samples: Sequence[Sample]) -> list[float]:
        """Its numbers, NaN where there is none."""
        with _beginning() as begin:
            return self.begin(lists, samples, begin)()

    def begin(
        self, lists: Mapping[str, list[Any]], samples: Sequence[Sample], begin: Callable[..., _Begun]
    ) -> Callable[[], list[float]]:
        """What gives its numbers; if it is asynchronous, it has begun by `begin`."""
        if not samples:
            return list
        missing = sorted(self.needs - lists.keys())
        if missing:
            raise UserError(f"{self.name}: it takes {', '.join(missing)}, but the data have only: {', '.join(lists)}")
        given = lists if self.all else {name: values for name, values in lists.items() if name in self.takes}
        wait = (begin if self.asynchronous else partial)(self.function, **given)
        return lambda: self._numbers(wait, given, samples)

    def _numbers(self, wait: _Begun, given: Mapping[str, list[Any]], samples: Sequence[Sample]) -> list[float]:
        try:
            returned = wait()
        except Exception as error:
            raise self._raised(error, given, samples) from error
        if isinstance(returned, (str, bytes, Mapping)) or not hasattr(returned, "__len__"):
            raise UserError(f"{self.name}: it must return a list of numbers, got {type(returned).__name__}")
        if len(returned) != len(samples):
            raise UserError(f"{self.name}: it returned {len(returned)} numbers for {len(samples)} samples")
        numbers = []
        for value, sample in zip(returned, samples, strict=True):
            number = _finite(value)
            if number is None:
                raise UserError(f"{self.name}: {value!r:.60} is no finite number, for {_tell(sample)}")
            numbers.append(number)
        return numbers

    def _raised(self, error: Exception, given: Mapping[str, list[Any]], samples: Sequence[Sample]) -> UserError:
        """The error with its place, and the sample: the first one that raises alone."""
        of = f"a batch of {len(samples)} samples"
        with _beginning() as begin:
            ask = begin if self.asynchronous else partial
            for i, sample in enumerate(samples):
                try:
                    ask(self.function, **{name: values[i : i + 1] for name, values in given.items()})()
                except Exception as alone:
                    error, of = alone, _tell(sample)
                    break
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return UserError(f"{self.name}: raised {what} (line {frame.lineno} of {frame.filename}), for {of}")


def _scored(name: str, numbers: Sequence[float], samples: Sequence[Sample], unscored: Unscored) -> list[float]:
    if unscored == "error":
        for number, sample in zip(numbers, samples, strict=True):
            if math.isnan(number):
                raise UserError(f"{name}: there is no reward (None or NaN) for {_tell(sample)}")
    return list(numbers)


class FunctionScorer:
    """A reward function in TRL's form.

    Args:
        function: of keywords, see above.
        name: in errors.
        unscored: what None and NaN among its numbers are.

    Raises:
        UserError: it raises, or returns something else than a finite number for each sample; when called.
    """

    def __init__(self, function: Callable[..., Any], name: str, unscored: Unscored = "error") -> None:
        self.name, self.unscored = name, unscored
        self._call = _Function(function, name)

    @property
    def asynchronous(self) -> bool:
        """Whether it is awaited."""
        return self._call.asynchronous

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        with _beginning() as begin:
            return self.begin(samples, begin)()

    def begin(self, samples: Sequence[Sample], begin: Callable[..., _Begun]) -> Callable[[], list[float]]:
        """What gives the rewards; of an asynchronous function, it has begun by `begin`."""
        turns = [_turns(sample) for sample in samples]
        lists = {
            **_columns(samples),
            "prompts": [prompt for prompt, _ in turns],
            "completions": [completion for _, completion in turns],
            "completion_ids": [sample.ids for sample in samples],
        }
        numbers = self._call.begin(lists, samples, begin)
        return lambda: _scored(self.name, numbers(), samples, self.unscored)


class FunctionJudge:
    """A function of `prompts`, `first`, `second` and columns that returns probabilities of the first being preferred.

    Args:
        function: of keywords, see above.
        name: in errors.

    Raises:
        UserError: it raises, or returns something else than a number in [0, 1] for each pair; when called.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.name = name
        self._call = _Function(function, name)

    def __call__(self, first: Sequence[Sample], second: Sequence[Sample]) -> list[float]:
        _check_pairs(first, second)
        lists = {
            **_columns(first),
            "prompts": [_turns(sample)[0] for sample in first],
            "first": [_turns(sample)[1] for sample in first],
            "second": [_turns(sample)[1] for sample in second],
        }
        found = self._call(lists, first)
        for probability, sample, other in zip(found, first, second, strict=True):
            if not 0 <= probability <= 1:
                raise UserError(
                    f"{self.name}: {probability:g} is no probability, for {_tell(sample)} against {other.completion!r}"
                )
        return found


class BradleyTerryJudge:
    """σ((r_1 - r_2) / temperature).

    Args:
        scorer: r; it may not leave a sample without reward.
        temperature: positive and finite.

    Raises:
        ValueError: the temperature is outside its domain; when called, there is a sample without reward.
    """

    def __init__(self, scorer: Scorer, temperature: float = 1.0) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        self.scorer, self.temperature = scorer, temperature

    def __call__(self, first: Sequence[Sample], second: Sequence[Sample]) -> list[float]:
        _check_pairs(first, second)
        rewards = self.scorer([*first, *second])
        for reward, sample in zip(rewards, [*first, *second], strict=True):
            if math.isnan(reward):
                raise ValueError(f"a judge needs a reward for every sample, there is none for {_tell(sample)}")
        ours, theirs = torch.tensor(rewards, dtype=torch.float64).view(2, len(first))
        return torch.sigmoid((ours - theirs) / self.temperature).tolist()


def _check_pairs(first: Sequence[Sample], second: Sequence[Sample]) -> None:
    if len(first) != len(second):
        raise ValueError(f"second has {len(second)} samples, first has {len(first)}: they are pairs")
    for one, other in zip(first, second, strict=True):
        if one.prompt_ids != other.prompt_ids:
            raise ValueError(f"the samples of a pair have different prompts: {one.prompt!r} and {other.prompt!r}")


class ModelScorer:
    """A reward model: what it says of prompt and completion, in forwards of a token budget.

    Its score; or of a classifier, whose `problem_type` is "multi_label_classification", the probability σ(score).

    It reads the policy's tokens if its tokenizer gives them the same meaning, and else the text, a conversation in its
    own chat template if it has one.

    Args:
        name: folder or name on the hub, a sequence classification model with one label.
        tokenizer: the policy's.
        device: where it runs.
        tokens: most of a forward; a longer sequence has one of its own.
        unscored: what NaN among its scores is.

    Raises:
        UserError: it cannot be loaded or has no trained head of one label; when called, a sequence is longer than it
            takes, or a score is not finite.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        *,
        device: torch.device | str = "cpu",
        tokens: int = 4096,
        unscored: Unscored = "error",
    ) -> None:
        self.name, self.tokens, self.unscored, self.device = name, tokens, unscored, device
        self.tokenizer = load_tokenizer(name)
        self._same_ids = self.tokenizer.get_vocab() == tokenizer.get_vocab()
        self._same_chat = self.tokenizer.chat_template in (None, tokenizer.chat_template)
        model = load_reward_model(name, trained=True).to(device).requires_grad_(False)
        self._classifies = model.config.problem_type == "multi_label_classification"
        self.scores = Scores([model])

    def _ids(self, sample: Sample) -> list[int]:
        """The sequence as the model's own tokens."""
        prompt = sample.row.get("prompt")
        chat = isinstance(prompt, list)
        if self._same_ids and (self._same_chat or not chat):
            return sample.prompt_ids + sample.ids
        tokenizer = self.tokenizer
        if chat and tokenizer.chat_template is not None:
            assert isinstance(prompt, list)
            # an answer that is begun already is one turn with what continues it
            begun = prompt[-1]["content"] if prompt and prompt[-1]["role"] == "assistant" else ""
            turn = {"role": "assistant", "content": begun + sample.completion}
            text = tokenizer.apply_chat_template([*prompt[: len(prompt) - bool(begun)], turn], tokenize=False)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(sample.prompt + sample.completion)["input_ids"]
        if sample.ended and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            # a tokenizer that closes the text with a token of its own wants no other
            closes = tokenizer("")["input_ids"][-1:] not in ([], [tokenizer.bos_token_id])
            ids = ids if closes else [*ids, tokenizer.eos_token_id]
        return ids

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        sequences = [self._ids(sample) for sample in samples]
        _check_lengths(self.name, self.scores.models[0], sequences, samples)
        found = [math.nan] * len(samples)
        for members in _forwards([len(ids) for ids in sequences], self.tokens):
            ids = torch.tensor([i for n in members for i in sequences[n]], device=self.device)
            positions = torch.cat([torch.arange(len(sequences[n])) for n in members]).to(self.device)
            scores = self.scores.of_sequences(0, ids, positions)
            rewards = scores.sigmoid() if self._classifies else scores
            for n, score in zip(members, rewards.tolist(), strict=True):
                if math.isinf(score):
                    raise UserError(f"{self.name}: its score is {score}, for {_tell(samples[n])}")
                found[n] = score
        return _scored(self.name, found, samples, self.unscored)


class LikelihoodScorer:
    """An autoregressive reward model: Σ log π_r(y_t | x, y_<t) of the completion, its EOS included.

    Args:
        name: folder or name on the hub of a causal language model.
        tokenizer: the policy's, whose tokens it must share.
        device, tokens: as of `ModelScorer`.

    Raises:
        UserError: it cannot be loaded or has another vocabulary; when called, a sequence is longer than it takes.

    Source: GenARM, arXiv:2410.08193.
    """

    def __init__(self, name: str, tokenizer: Any, *, device: torch.device | str = "cpu", tokens: int = 4096) -> None:
        if load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{name}: an autoregressive reward model must have the policy's vocabulary")
        self.name, self.budget, self.device = name, tokens, torch.device(device)
        self.policy = Policy(load_model(name).to(device).requires_grad_(False))

    @torch.no_grad()
    def tokens(self, samples: Sequence[Sample]) -> list[list[float]]:
        """The reward of each token of each completion."""
        sequences = [sample.prompt_ids + sample.ids for sample in samples]
        _check_lengths(self.name, self.policy.model, sequences, samples)
        found: list[list[float]] = [[] for _ in samples]
        for members in _forwards([len(ids) for ids in sequences], self.budget):
            batch = collate([Example(samples[n].prompt_ids, (samples[n].ids,)) for n in members], self.device)
            parts = self.policy(*policy_inputs(batch)).split(list(batch.completions.lengths))
            for n, part in zip(members, parts, strict=True):
                found[n] = part.tolist()
        return found

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [math.fsum(rewards) for rewards in self.tokens(samples)]


def _forwards(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    return pack(lengths, max([tokens, *lengths]))


def _check_lengths(name: str, model: Any, sequences: Sequence[Sequence[int]], samples: Sequence[Sample]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for ids, sample in zip(sequences, samples, strict=True):
        if limit is not None and len(ids) > limit:
            raise UserError(f"{name}: the model takes {limit:,} tokens, but there are {len(ids):,}, in {_tell(sample)}")


class Part(NamedTuple):
    """One of several rewards."""

    name: str
    scorer: Scorer
    weight: float = 1.0


class Combined:
    """Several rewards in one: their weighted sum, or for MaxMin-RLHF the one whose mean over the samples is least.

    A reward that could not be had (NaN) is left out of the sum; a sample without any has NaN.

    Args:
        parts: at least one, each with its own name.
        how: "sum", Σ_k w_k r_k; "normalized", the same of rewards less their mean, over their deviation, over all
            samples; or "min" of the w_k r_k. The minimum is that of means, not of each sample's rewards, so their
            scales must be comparable; of equal ones it is the first.
        process_group: ranks whose samples of one call are taken together, for means, "normalized" and "min"; all must
            call, also with none.
        device: of what crosses the ranks.

    Raises:
        ValueError: there is no part, names are not distinct, a weight is not finite, or `how` is another word.

    Source: RLUF, arXiv:2505.14946, whose sum this is; MaxMin-RLHF, arXiv:2402.08925, from memory.

    Attributes:
        means: of the last call, the mean of each reward over the samples that have it, without its weight; NaN if none.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        how: How = "sum",
        *,
        process_group: Group = None,
        device: torch.device | str = "cpu",
    ) -> None:
        names = [part.name for part in parts]
        if not parts or len({*names}) < len(names):
            raise ValueError(f"parts must have distinct names, at least one; got {names}")
        if not all(math.isfinite(part.weight) for part in parts):
            raise ValueError(f"weights must be finite, got {[part.weight for part in parts]}")
        if how not in get_args(How):
            raise ValueError(f"how must be one of {', '.join(map(repr, get_args(How)))}, got {how!r}")
        self.parts, self.how = tuple(parts), how
        self.process_group, self.device = process_group, device
        self.means: dict[str, float] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rewards."""
        return tuple(part.name for part in self.parts)

    def each(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        """Every reward of every sample, by name."""
        with _beginning() as begin:
            begun, found = {}, {}
            for name, scorer, _ in self.parts:
                if isinstance(scorer, FunctionScorer) and scorer.asynchronous:
                    begun[name] = scorer.begin(samples, begin)
            for name, scorer, _ in self.parts:
                if name not in begun:
                    found[name] = scorer(samples)
            return {name: begun[name]() if name in begun else found[name] for name in self.names}

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return self.combine(self.each(samples))

    def combine(self, each: Mapping[str, Sequence[float]]) -> list[float]:
        """What `each` gave, in one."""
        count = len(next(iter(each.values())))
        rewards = torch.tensor([*each.values()], dtype=torch.float64).view(len(each), count).T.to(self.device)
        there = ~rewards.isnan()
        sums = torch.stack([torch.where(there, rewards, 0).sum(0), there.sum(0)])
        sums, counts = summed_over(sums, self.process_group)
        self.means = dict(zip(each, (sums / counts).tolist(), strict=True))
        weights = [part.weight for part in self.parts]
        if self.how != "min":
            normalize = self.how == "normalized"
            return weighted_rewards(rewards, weights, normalize=normalize, process_group=self.process_group).tolist()
        known = [k for k, name in enumerate(each) if not math.isnan(self.means[name])]
        if not known:
            return [math.nan] * len(rewards)
        least = min(known, key=lambda k: weights[k] * self.means[self.parts[k].name])
        return (weights[least] * rewards[:, least]).tolist()


_FUNCTION = re.compile(r"(?P<module>.+):(?P<function>[A-Za-z_]\w*)")


def _weighted(spec: str) -> tuple[str, float]:
    """SPEC*WEIGHT in its parts."""
    what, star, weight = spec.rpartition("*")
    if not star:
        return spec.strip(), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not what.strip() or not math.isfinite(number):
        raise UserError(f"{spec}: what follows the * must be a finite number, and a function or a model precede it")
    return what.strip(), number


def _module(name: str) -> ModuleType:
    """A module by its file or its dotted name; those in the working directory are found too."""
    if not name.endswith(".py"):
        here = os.getcwd()
        sys.path.append(here)
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(here)
    if not Path(name).is_file():
        raise UserError(f"{name}: no such file")
    path = Path(name).resolve()
    # dataclasses and pickle look a class's module up, and two functions of one file share it
    key = f"fastpo_user:{path}"
    if key not in sys.modules:
        found = importlib.util.spec_from_file_location(key, path)
        assert found is not None and found.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(found)
        try:
            found.loader.exec_module(sys.modules[key])
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` or `package.module:function` names.

    Raises:
        UserError: there is none, or its module raises.
    """
    match = _FUNCTION.fullmatch(spec)
    if match is None:
        raise UserError(f"{spec}: a function is given as path/to/file.py:function or package.module:function")
    try:
        module = _module(match["module"])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{spec}: cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, match["function"], None)
    if not callable(function):
        known = sorted(name for name, value in vars(module).items() if inspect.isfunction(value))
        raise UserError(f"{spec}: there is no function {match['function']} (there are: {', '.join(known)})")
    return function


def _scorer(spec: str, tokenizer: Any, unscored: Unscored, **options: Any) -> Scorer:
    if _FUNCTION.fullmatch(spec):
        return FunctionScorer(load_function(spec), spec, unscored)
    kinds = architectures(spec)
    if any("ForSequenceClassification" in kind for kind in kinds):
        return ModelScorer(spec, tokenizer, unscored=unscored, **options)
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        return LikelihoodScorer(spec, tokenizer, **options)
    raise UserError(
        f"{spec}: it is a {', '.join(kinds) or 'model of an unknown class'}, "
        "neither a sequence classification model nor a causal language model"
    )


def architectures(name: str) -> list[str]:
    """The classes that a model was saved from."""
    from transformers import AutoConfig

    try:
        return list(AutoConfig.from_pretrained(name).architectures or [])
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise UserError(f"{name}: is no function (FILE.py:NAME), and no model can be loaded: {reason[0]}") from error


def load_scorer(
    specs: Sequence[str],
    tokenizer: Any,
    *,
    device: torch.device | str = "cpu",
    tokens: int = 4096,
    unscored: Unscored = "error",
    how: How = "sum",
    process_group: Group = None,
) -> Combined:
    """Rewards from their specifications on the command line, see above.

    Args:
        specs: SPEC or SPEC*WEIGHT, at least one.
        tokenizer: the policy's.
        device: where models run.
        tokens: most of a model's forward.
        unscored: whether a sample without a reward is an error, or is skipped.
        how, process_group: as of `Combined`.

    Raises:
        UserError: one of them cannot be had.
    """
    given = [_weighted(spec) for spec in specs]
    names = [what for what, _ in given]
    # a function's own name, or a folder's, where that is enough
    short = [_FUNCTION.sub(r"\g<function>", name) if _FUNCTION.fullmatch(name) else Path(name).name for name in names]
    if len({*short}) < len(short):
        short = names
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"{name}: is given twice")
    scorers = [_scorer(what, tokenizer, unscored, device=device, tokens=tokens) for what in names]
    parts = zip(short, scorers, (weight for _, weight in given), strict=True)
    return Combined([Part(*part) for part in parts], how, process_group=process_group, device=device)


def load_judge(
    specs: Sequence[str], tokenizer: Any, *, device: torch.device | str = "cpu", tokens: int = 4096
) -> Judge:
    """A judge from its specification: one function of `first` and `second`, or rewards for a Bradley-Terry judge.

    Args:
        specs: one function, or SPEC*WEIGHT of rewards, whose weights are inverse temperatures.
        tokenizer, device, tokens: as of `load_scorer`.

    Raises:
        UserError: it cannot be had.
    """
    if len(specs) == 1 and _FUNCTION.fullmatch(specs[0]):
        function = load_function(specs[0])
        if {"first", "second"} <= _Function(function, specs[0]).takes:
            return FunctionJudge(function, specs[0])
    return BradleyTerryJudge(load_scorer(specs, tokenizer, device=device, tokens=tokens))
