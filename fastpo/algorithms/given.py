"""Training on demonstrations and other given data whose losses are compositions in torch: likelihood, flows, regret.

The registry has no rows of them, so the table is here: what each method reads, learns and minimises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpo import losses
from fastpo.algorithms.base import Batch, Column, Completions, Control, Hyper, State, StepOutput, check_hyper
from fastpo.algorithms.plain import Plain
from fastpo.losses.likelihood import unlikely_tokens
from fastpo.reference import Domain
from fastpo.reference.registry import ANY, NOT_NEGATIVE, POSITIVE, PROBABILITY, Theory
from fastpo.reference.sequence import sequence_sum

# of all hyper-parameters, as the row declares them
Values = Mapping[str, Any]


class Found(NamedTuple):
    """A loss, and (examples,) or (tokens,) numbers to be logged as means over examples or tokens of the step."""

    loss: Tensor
    examples: Mapping[str, Tensor] = {}
    tokens: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as on the command line.
        title, paper, equation: where it is from.
        kind: the data it eats, as in `fastpo.training.data`.
        loss: from a batch and the hyper-parameters to loss and metrics.
        about: what is minimised.
        theory: what is known of its optimum.
        models: whose log-probs it needs.
        columns: the numbers it reads; or from the hyper-parameters to them.
        defaults, domains: of the hyper-parameters that are numbers; those without a domain are phrases.
        options: of those that are words, their admissible values, the first being the default.
        phrases: help texts of what needs one.
        control: from the hyper-parameters to what becomes of good and bad completions.
        learns: how many times as fast as the policy it learns a number of every state; 0: it learns none.
        candidates: whether it needs the log-probs of all earlier tokens.
        coupled: whether its loss couples the examples of a step.
        aliases: name of the same method in other libraries.
    """

    name: str
    title: str
    paper: str
    equation: str
    kind: str
    loss: Callable[[Batch, Values], Found]
    about: str
    theory: Theory = "property"
    models: tuple[str, ...] = ("policy",)
    columns: tuple[Column, ...] | Callable[[Values], tuple[Column, ...]] = ()
    defaults: Mapping[str, float | str] = field(default_factory=dict)
    domains: Mapping[str, Domain] = field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    phrases: Mapping[str, str] = field(default_factory=dict)
    control: Callable[[Values], Control] | None = None
    learns: float = 0.0
    candidates: bool = False
    coupled: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def doc(self) -> str:
        return self.about


class StateValue(nn.Module):
    """A number of every state, linear in its hidden state; 0 before training.

    The value function of AWR and of implicit rewards, the flows of a GFlowNet, and, in the state before the first
    token, log Z of the prompt.

    Args:
        width: of hidden states.
        speed: a factor on the answer: under Adam, whose steps have one size, how many times as fast it moves.
    """

    def __init__(self, width: int, speed: float = 1.0) -> None:
        super().__init__()
        self.speed = speed
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) to (...), fp32."""
        return self.speed * self.linear(hidden.to(self.linear.weight.dtype))[..., 0].float()


def _policy(batch: Batch) -> Tensor:
    return batch.streams["policy"]


def _ends(batch: Batch) -> Tensor:
    return batch.completions.cu_seqlens


def _weighted(batch: Batch, loss: Tensor, **more: Tensor) -> Found:
    """With the perplexity's logarithm, and more numbers of tokens."""
    return Found(loss, {}, {"nll": -_policy(batch), **more})


def _sft(batch: Batch, hyper: Values) -> Found:
    average = hyper["average"]
    number = batch.num_tokens if average == "token_mean" else batch.num_items
    out = losses.sft(_policy(batch), average=average, cu_seqlens=_ends(batch), num_items=number)
    return _weighted(batch, out.loss)


def _likelihood(batch: Batch, _: Values) -> Found:
    return _sft(batch, {"average": "token_mean"})


def _rwr(batch: Batch, hyper: Values) -> Found:
    rewards = batch.streams["reward"]
    out = losses.rwr(_policy(batch), rewards, **_regression(batch, hyper))
    return _weighted(batch, out.loss, reward=rewards)


def _regression(batch: Batch, hyper: Values) -> dict[str, Any]:
    return {**hyper, "cu_seqlens": _ends(batch), "num_items": batch.num_tokens}


def _awr(batch: Batch, hyper: Values) -> Found:
    rewards, values = batch.streams["reward"], batch.streams["values"]
    out = losses.awr(_policy(batch), values, rewards, **_regression(batch, hyper))
    return _weighted(batch, out.loss, reward=rewards, value_loss=(rewards - values).square())


def _unlikelihood(batch: Batch, hyper: Values) -> Found:
    scores = -batch.streams["reward"]
    out = losses.unlikelihood(
        _policy(batch),
        scores,
        threshold=hyper["threshold"] if hyper["rule"] == "threshold" else None,
        alpha=hyper["alpha"],
        cu_seqlens=_ends(batch),
        num_items=batch.num_tokens,
    )
    return _weighted(batch, out.loss, reward=-scores)


def _token_unlikelihood(batch: Batch, hyper: Values) -> Found:
    candidates = _candidates(batch.streams["ids"], batch.completions)
    out = unlikely_tokens(
        _policy(batch),
        batch.streams["policy_candidates"],
        candidates != _NONE,
        alpha=hyper["alpha"],
        num_items=batch.num_tokens,
    )
    repeated = losses.repeated_ngrams(batch.streams["ids"], n=1, cu_seqlens=_ends(batch))
    return _weighted(batch, out.loss, repeated=torch.where(repeated, _policy(batch).exp(), 0))


def _sequence_unlikelihood(batch: Batch, hyper: Values) -> Found:
    repeats = losses.repeated_ngrams(batch.streams["ids"], n=int(hyper["n"]), cu_seqlens=_ends(batch))
    out = losses.sequence_unlikelihood(_policy(batch), repeats, cu_seqlens=_ends(batch), num_items=batch.num_tokens)
    likelihood = _sft(batch, {"average": "token_mean"}).loss
    return _weighted(
        batch, out.loss + hyper["mle"] * likelihood, repeated=torch.where(repeats, _policy(batch).exp(), 0)
    )


_NONE = -100


def _candidates(ids: Tensor, completions: Completions) -> Tensor:
    return losses.previous_tokens(ids, cu_seqlens=completions.cu_seqlens, ignore_index=_NONE)


def _hindsight(batch: Batch, _: Values) -> Found:
    out = losses.chain_of_hindsight(_policy(batch), cu_seqlens=_ends(batch), num_items=batch.num_items)
    return _weighted(batch, out.loss)


def _tool_use(batch: Batch, hyper: Values) -> Found:
    keys, ends = batch.streams["key"] > 0.5, _ends(batch)
    weights = losses.tl_token_weights(keys, cap=hyper["cap"], cu_seqlens=ends)
    out = losses.sft(_policy(batch), weights, average="seq_mean", cu_seqlens=ends, num_items=batch.num_items)
    return _weighted(batch, out.loss, key=keys)


def _implicit_reward(batch: Batch, hyper: Values) -> Found:
    out = losses.implicit_reward_sft(
        _policy(batch),
        batch.streams["reference"],
        batch.streams["values"],
        divergence=hyper["divergence"],
        beta=hyper["beta"],
        cu_seqlens=_ends(batch),
        num_items=batch.num_items,
    )
    return Found(out.loss, {"chosen_reward": out.rewards, "value": out.values}, {"nll": -_policy(batch)})


def _flow(name: str) -> Callable[[Batch, Values], Found]:
    """A balance of flows; rewards arrive at the ends of segments, and energies are what has arrived so far.

    With a prior, all flows are over the reference's probability of what has been said, which takes the place of PB.
    """
    balance: Callable[..., losses.FlowOutput] = getattr(losses, name)

    def loss(batch: Batch, hyper: Values) -> Found:
        prior = batch.streams["reference"] if hyper["prior"] == "reference" else None
        decay = {"lambda_": hyper["lambda_"]} if "lambda_" in hyper else {}
        ends, gains, flows = _ends(batch), batch.streams["log_reward"], batch.streams["values"]
        totals = sequence_sum(gains, None, ends)[0]
        if name == "trajectory_balance":
            arguments = [flows[ends[:-1].long()], totals]
        elif name.startswith("fl_"):
            before = gains.double().cumsum(0) - gains
            start = before[ends[:-1].long()].repeat_interleave(ends.diff())
            arguments = [flows, (start - before).to(gains.dtype), -totals]
        else:
            arguments = [flows, totals]
        out = balance(_policy(batch), *arguments, **decay, backward=prior, cu_seqlens=ends, num_items=batch.num_items)
        return Found(out.loss, {"log_z": out.log_z, "residual": out.residuals.abs(), "log_reward": totals})

    return loss


def _regret(batch: Batch, hyper: Values) -> Found:
    order, bounds = batch.completions.by_example()
    actions = int(batch.numbers["actions"][0])
    rounds = bounds.diff() // actions
    played = torch.arange(int(rounds.max()), device=order.device) < rounds[:, None]
    logits = sequence_sum(_policy(batch), None, _ends(batch))[0][order].view(-1, actions)
    # of rounds that were not played, any distribution
    policies = logits.new_full((*played.shape, actions), 1 / actions)
    policies = policies.masked_scatter(played[..., None].expand_as(policies), logits.softmax(1))
    cost = policies.new_zeros(policies.shape, requires_grad=False)
    cost = cost.masked_scatter(played[..., None].expand_as(cost), batch.numbers["losses"][order].to(cost.dtype))
    out = losses.regret_loss(cost, policies, k=hyper["k"], mask=played)
    return Found(out.loss, {"regret": out.regrets})


_PHF: dict[str, Any] = {
    "title": "Pretraining Language Models with Human Preferences",
    "paper": "arXiv:2302.08582",
    "equation": "§2",
}
_REWARD = Column("reward", level="token")
_GAIN = Column("log_reward", level="segment")
_THRESHOLD = {"threshold": "the largest misalignment, minus the reward, of what is good"}
_TRAJECTORY: dict[str, Any] = {"title": "Trajectory balance", "paper": "arXiv:2201.13259"}
_PARTIAL: dict[str, Any] = {"title": "Learning GFlowNets from partial episodes", "paper": "arXiv:2209.12782"}
_LOCAL: dict[str, Any] = {"title": "Better training of GFlowNets with local credit", "paper": "arXiv:2302.01687"}
_LAMBDA: dict[str, Any] = {"defaults": {"lambda_": 0.9}, "domains": {"lambda_": Domain(0.0, 1.0, low_open=True)}}
_REPEATS: dict[str, Any] = {"title": "Neural text generation with unlikelihood training", "paper": "arXiv:1908.04319"}


def _flow_row(name: str, source: Mapping[str, Any], equation: str, about: str, **more: Any) -> Method:
    return Method(
        name=name,
        **source,
        equation=equation,
        kind="demonstrations",
        loss=_flow(name),
        about=about,
        theory="gibbs",
        models=("policy", "reference"),
        columns=(_GAIN,),
        options={"prior": ("reference", "none")},
        phrases={"prior": "what the rewards are factors of: the reference's probability, or 1"},
        # log Z is usually given a rate ten times the policy's, or more: it has a long way to go
        learns=10.0,
        **more,
    )


ROWS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            name="sft",
            **{**_PHF, "title": "Supervised fine-tuning (PHF's MLE)"},
            kind="demonstrations",
            loss=_sft,
            about="The mean of -log p of the demonstrations.",
            theory="average",
            options={"average": ("token_mean", "seq_mean")},
            phrases={"average": "over all tokens, or over sequences of their tokens' mean"},
        ),
        Method(
            name="filtering",
            **{**_PHF, "title": "PHF: filtering"},
            kind="demonstrations",
            loss=_likelihood,
            about="SFT on the documents whose misalignment, on average over their tokens, is at most a threshold.",
            theory="average",
            columns=(_REWARD,),
            defaults={"threshold": 5.6e-4},
            domains={"threshold": ANY},
            phrases=_THRESHOLD,
            control=lambda h: Control("", None, -h["threshold"]),
        ),
        Method(
            name="conditional_training",
            **{**_PHF, "title": "PHF: conditional training"},
            kind="demonstrations",
            loss=_likelihood,
            about="SFT on segments behind a control token that says whether they are good; answers are asked for with "
            "the first. The tokens must be the tokenizer's: it is not extended.",
            columns=(_REWARD,),
            defaults={"aligned": "<|aligned|>", "misaligned": "<|misaligned|>", "threshold": 5.6e-4, "drop": 0.01},
            domains={"threshold": ANY, "drop": PROBABILITY},
            phrases={
                "aligned": "the control token before what is good",
                "misaligned": "the control token before the rest",
                "drop": "the probability that a control token is left out, in [0, 1]",
                **_THRESHOLD,
            },
            control=lambda h: Control(h["aligned"], h["misaligned"], -h["threshold"], h["drop"]),
        ),
        Method(
            name="rwr",
            **{**_PHF, "title": "PHF: reward-weighted regression"},
            kind="demonstrations",
            loss=_rwr,
            about="The mean of -w log p, w = min(e^(R/β), max_weight).",
            theory="gibbs",
            columns=(_REWARD,),
            defaults={"beta": 10.0, "max_weight": 1000.0},
            domains={"beta": POSITIVE, "max_weight": POSITIVE},
        ),
        Method(
            name="awr",
            **{**_PHF, "title": "PHF: advantage-weighted regression"},
            kind="demonstrations",
            loss=_awr,
            about="α mean(-w log p) + (1 - α) mean((R - V)²), w = min(e^((R - V)/β), max_weight), V linear in the "
            "hidden state.",
            theory="gibbs",
            columns=(_REWARD,),
            defaults={"alpha": 0.5, "beta": 10.0, "max_weight": 1000.0},
            domains={"alpha": PROBABILITY, "beta": POSITIVE, "max_weight": POSITIVE},
            learns=1.0,
        ),
        Method(
            name="unlikelihood",
            **{**_PHF, "title": "PHF: unlikelihood"},
            kind="demonstrations",
            loss=_unlikelihood,
            about="-log p of good tokens, -α log(1 - p) of bad ones; or both, shared by the misalignment in [0, 1].",
            columns=lambda h: ((_REWARD if h["rule"] == "threshold" else _REWARD._replace(domain=Domain(-1.0, 0.0))),),
            defaults={"threshold": 5.6e-4, "alpha": 1.0},
            domains={"threshold": ANY, "alpha": NOT_NEGATIVE},
            options={"rule": ("threshold", "share")},
            phrases={"rule": "what makes a token bad: the threshold, or a share of it the misalignment", **_THRESHOLD},
        ),
        Method(
            name="token_unlikelihood",
            **_REPEATS,
            equation="Eq. 4 (its number is from memory)",
            kind="demonstrations",
            loss=_token_unlikelihood,
            about="-log p of each token, and -α log(1 - p) of those that the completion has had before.",
            defaults={"alpha": 1.0},
            domains={"alpha": NOT_NEGATIVE},
            candidates=True,
        ),
        Method(
            name="sequence_unlikelihood",
            **_REPEATS,
            equation="Eq. 7 (its number is from memory)",
            kind="demonstrations",
            loss=_sequence_unlikelihood,
            about="-log(1 - p) of the tokens of n-grams that the completion, the model's own, has had before, and mle "
            "times -log p of all tokens, which the paper takes in every other step.",
            defaults={"n": 4, "mle": 1.0},
            domains={"n": Domain(1.0), "mle": NOT_NEGATIVE},
            phrases={"n": "tokens of an n-gram, at least 1", "mle": "weight of the likelihood, at least 0"},
        ),
        Method(
            name="chain_of_hindsight",
            title="Chain of Hindsight",
            paper="arXiv:2302.02676",
            equation="§2",
            kind="hindsight",
            loss=_hindsight,
            about="SFT on a good and a bad completion one behind the other, each behind a phrase that says which it "
            "is; answers are asked for with the first. Neither are past tokens hidden nor is there text of "
            "pretraining.",
            defaults={"good": " A good answer: ", "bad": " A bad answer: "},
            phrases={"good": "what is said before the better completion", "bad": "what is said before the worse one"},
            control=lambda h: Control(h["good"], h["bad"]),
        ),
        Method(
            name="tl_training",
            title="TL-Training",
            paper="arXiv:2412.15495",
            equation="the weights of its code",
            kind="tools",
            loss=_tool_use,
            about="SFT on the calls that did not fail, the tokens that decide on the tool weighing more.",
            columns=(Column("key", level="token"),),
            defaults={"cap": 9.0},
            domains={"cap": Domain(1.0)},
            phrases={"cap": "the largest weight of a token, at least 1"},
        ),
        Method(
            name="implicit_reward_sft",
            title="derived from Implicit Reward as the Bridge",
            paper="arXiv:2507.00018",
            equation="not verified",
            kind="demonstrations",
            loss=_implicit_reward,
            about="-Σ φ(r_t) + V(s_0), r_t = β log π/π_ref + V(s_t) - V(s_(t+1)), V linear in the hidden state. The "
            "divergences whose φ has a bounded domain are left out: a step may leave it.",
            models=("policy", "reference"),
            defaults={"beta": 1.0},
            domains={"beta": POSITIVE},
            options={"divergence": ("total_variation", "pearson_chi2", "reverse_kl")},
            learns=1.0,
        ),
        Method(
            name="regret",
            title="Do LLM agents have regret?",
            paper="arXiv:2403.16843",
            equation="from memory",
            kind="decisions",
            loss=_regret,
            about="The regret of the worst sequences of decisions against the best action in hindsight, π over the "
            "actions' log-probs.",
            columns=(Column("actions"), Column("losses", level="completion")),
            defaults={"k": 1.0},
            domains={"k": NOT_NEGATIVE},
            phrases={"k": "the larger, the more the largest regret alone counts; at least 0"},
            coupled=True,
        ),
        _flow_row(
            "trajectory_balance",
            _TRAJECTORY,
            "Eq. 14 (its number is from memory)",
            "(log Z + Σ log π/π_ref - log R)²: it leads to π_ref R/Z. log Z is linear in the last hidden state of the "
            "prompt.",
        ),
        _flow_row(
            "detailed_balance",
            {"title": "GFlowNet Foundations", "paper": "arXiv:2111.09266"},
            "the detailed balance loss",
            "The mean over the tokens of (log F(s_t) + log π/π_ref - log F(s_(t+1)))², log F linear in the hidden "
            "state.",
        ),
        _flow_row(
            "subtrajectory_balance",
            _PARTIAL,
            "SubTB(λ)",
            "The mean over all parts of a completion of their squared residuals, weighted by λ^length.",
            **_LAMBDA,
        ),
        _flow_row(
            "fl_detailed_balance",
            _LOCAL,
            "forward-looking",
            "Detailed balance of F(s) = F̃(s) times the rewards of the segments that s has.",
        ),
        _flow_row(
            "fl_subtrajectory_balance",
            _LOCAL,
            "forward-looking",
            "SubTB(λ) of F(s) = F̃(s) times the rewards of the segments that s has.",
            **_LAMBDA,
        ),
    )
}


def defaults(row: Method) -> dict[str, Any]:
    """All hyper-parameters with their default values."""
    return {**row.defaults, **{name: values[0] for name, values in row.options.items()}}


@dataclass(frozen=True)
class Given(Plain):
    """A method of the table.

    Attributes:
        row: of the table.
        hyper: all of `defaults(row)`.
    """

    row: Method
    hyper: Hyper

    def __post_init__(self) -> None:
        check_hyper(self.name, self.hyper, self.row.domains, self.row.options)

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def kind(self) -> str:
        return self.row.kind

    @property
    def models(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("policy",) if self.hyper.get("prior") == "none" else self.row.models

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.row.columns(self.hyper) if callable(self.row.columns) else self.row.columns

    @property
    def whole_step(self) -> bool:  # type: ignore[override]
        return self.row.coupled

    @property
    def control(self) -> Control | None:  # type: ignore[override]
        return None if self.row.control is None else self.row.control(self.hyper)

    def module(self, width: int) -> nn.Module | None:
        return StateValue(width, self.row.learns) if self.row.learns else None

    def candidates(self, ids: Tensor, completions: Completions) -> Tensor | None:
        return _candidates(ids, completions) if self.row.candidates else None

    def problem(self, numbers: Sequence[Sequence[float]]) -> tuple[int, str] | None:
        if self.kind == "decisions":
            for i, (actions, *_) in enumerate(numbers):
                if actions != numbers[0][0]:
                    return i, f"there are {actions:g} actions, but the first row has {numbers[0][0]:g}"
        return None

    def __call__(self, batch: Batch, state: State) -> StepOutput:
        found = self.row.loss(batch, self.hyper)
        metrics = {name: values.detach().sum() / batch.num_items for name, values in found.examples.items()}
        metrics |= {name: values.detach().sum() / batch.num_tokens for name, values in found.tokens.items()}
        return StepOutput(found.loss, {"loss": found.loss.detach(), **metrics}, {})
