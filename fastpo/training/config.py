"""The configuration of a run: one tree of dataclasses, filled from defaults, YAML and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from fastpo import algorithms
from fastpo.training.errors import UserError

# a model of the built-in task is BUILT_IN and one of these: a Llama, which is the default, or one of S4 layers
BUILT_IN = "builtin:"
ARCHITECTURES = ("llama", "s4")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate.

    Args:
        lr: peak learning rate.
        schedule: shape of the learning rate after the warm-up.
        warmup: share of the steps in which the learning rate rises from 0.
        weight_decay: decoupled weight decay.
        max_norm: the gradient is scaled down to this norm.
    """

    lr: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_norm: float = 1.0


@dataclass(frozen=True)
class BatchConfig:
    """How much goes into a step and into one forward.

    Args:
        size: examples (pairs, lists, single completions) per optimiser step, or prompts per turn, over all processes.
        tokens: most tokens that one forward holds; examples are packed into this budget.
    """

    size: int = 32
    tokens: int = 4096


@dataclass(frozen=True)
class LoraConfig:
    """Adapters (PEFT) that are trained in place of the model's own weights, which then are the reference's.

    Args:
        rank: of the updates; 0 trains the whole model.
        alpha: the update's scale times the rank.
        targets: names of the linear layers, or all of them but the head.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str | list[str] = "all-linear"


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled, by algorithms that learn from the policy's own.

    A turn samples completions for --batch.size prompts; some optimiser steps on them follow.

    Args:
        max_new_tokens: most tokens of a completion.
        temperature: of the policy, when it is sampled and in the loss.
        top_p: the probability of the nucleus that is sampled from.
        stop: texts that end a completion, beside the tokenizer's EOS.
        minibatches: optimiser steps into which a pass over a turn's completions is divided.
        epochs: passes over them.
        rounds: how often prompts are drawn until a turn has enough that teach something.
        tokens: most tokens, of prompts with all that they may become, that are generated at once.
        engine: what samples: transformers' generate, or vLLM in the same process (its log-probs are not quite the
            policy's: see --algorithm.correction).
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    minibatches: int = 1
    epochs: int = 1
    rounds: int = 3
    tokens: int = 16384
    engine: Literal["transformers", "vllm"] = "transformers"


@dataclass(frozen=True)
class RewardConfig:
    """What judges sampled completions. Each is SPEC or SPEC*WEIGHT, or a list of them; see fastpo.training.scorers.

    Args:
        of: functions (FILE.py:NAME or MODULE:NAME) and reward models.
        judge: what prefers one completion to another: a function, or rewards for a Bradley-Terry judge. Default: those
            of the reward.
        how: what several rewards give: their weighted sum, that of normalised ones, or the one of least mean.
        unscored: what becomes of completions without a reward (NaN or None).
    """

    of: str | list[str] | None = None
    judge: str | list[str] | None = None
    how: Literal["sum", "normalized", "min"] = "sum"
    unscored: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class SyncConfig:
    """How the reference model follows the policy; by default it does not.

    Args:
        every: steps between updates of the reference (TR-DPO); 0 for none.
        alpha: the policy's share in an update, the rest being the old reference's; 1 replaces it.
        stages: parts of the run, each with its part of the data in the file's order; the policy at the end of one is
            the reference of the next (sDPO).
    """

    every: int = 0
    alpha: float = 0.6
    stages: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """The run; without --model and --data, a tiny transformer is trained on a built-in task.

    Args:
        model: causal language model to train: a folder, a .gguf file or a name on the hub; or builtin:llama or
            builtin:s4 for a tiny one on the built-in task.
        reference: what the policy is measured against, if not the model as it is before training.
        aux: a further model that some methods ask; of rto the one trained by DPO.
        data: what the algorithm trains on, in TRL's formats, .jsonl or .parquet.
        eval_data: more of them, to measure on and not to train on.
        output: folder of the run, if not runs/ALGORITHM (with a number where that holds one).
        max_length: most tokens of prompt and completion; longer completions are cut, longer prompts refused.
        steps: optimiser steps, if not as many as the epochs need.
        epochs: passes over the data; only without --steps.
        eval_every: steps between evaluations; 0 for before and after only.
        checkpoint_every: steps between checkpoints; 0 for the end only.
        seed: of initialisation, order and sampling.
        precision: of the forward and backward; weights stay in fp32.
        gradient_checkpointing: keep only what goes into each layer of the model for the backward, which computes the
            layer again: less memory, about a third more time.
        parallel: what each of several processes holds: ddp a copy of the models, fsdp2 a share of every tensor.
        tracker: where metrics go besides metrics.jsonl.
        optim: the optimiser.
        batch: the batches.
        sync: a reference model that follows the policy.
        rollout: how completions are sampled.
        reward: what judges them.
        lora: adapters instead of the whole model.
    """

    model: str | None = None
    reference: str | None = None
    aux: str | None = None
    data: str | None = None
    eval_data: str | None = None
    output: str | None = None
    max_length: int = 1024
    steps: int | None = None
    epochs: float = 1.0
    eval_every: int = 50
    checkpoint_every: int = 100
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def built_in(self) -> bool:
        """Whether this is the built-in task."""
        return is_built_in(self.model, self.data)

    @property
    def architecture(self) -> str:
        """That of the built-in task's model."""
        return ARCHITECTURES[0] if self.model is None else self.model.removeprefix(BUILT_IN)

    def check(self) -> None:
        """Raise UserError for values that make no run."""
        if self.model is not None and self.model.startswith(BUILT_IN):
            if self.architecture not in ARCHITECTURES:
                known = " and ".join(BUILT_IN + name for name in ARCHITECTURES)
                raise UserError(f"--model {self.model}: there is no such model, but {known}")
            if self.data is not None:
                raise UserError(
                    f"--model {self.model} is of the built-in task, which has its own data: leave out --data"
                )
        elif (self.model is None) != (self.data is None):
            given, missing = ("model", "data") if self.data is None else ("data", "model")
            raise UserError(f"--{given} needs --{missing}; without both, the built-in task is trained")
        if self.built_in and (self.reference or self.aux or self.eval_data):
            raise UserError("--reference, --aux and --eval_data need --model and --data")
        if self.parallel == "fsdp2" and self.precision == "fp16":
            raise UserError("--precision fp16 scales gradients, and --parallel fsdp2 shards them: take bf16")
        for name, value, low in (
            ("max_length", self.max_length, 2),
            ("steps", self.steps, 1),
            ("eval_every", self.eval_every, 0),
            ("checkpoint_every", self.checkpoint_every, 0),
            ("batch.size", self.batch.size, 1),
            ("batch.tokens", self.batch.tokens, 1),
            ("optim.weight_decay", self.optim.weight_decay, 0),
            ("sync.every", self.sync.every, 0),
            ("sync.stages", self.sync.stages, 1),
            ("lora.rank", self.lora.rank, 0),
            ("rollout.max_new_tokens", self.rollout.max_new_tokens, 1),
            ("rollout.minibatches", self.rollout.minibatches, 1),
            ("rollout.epochs", self.rollout.epochs, 1),
            ("rollout.rounds", self.rollout.rounds, 1),
            ("rollout.tokens", self.rollout.tokens, 1),
        ):
            if value is not None and value < low:
                raise UserError(f"--{name} must be at least {low}, got {value:g}")
        for name, value in (
            ("epochs", self.epochs),
            ("optim.lr", self.optim.lr),
            ("optim.max_norm", self.optim.max_norm),
            ("rollout.temperature", self.rollout.temperature),
            ("lora.alpha", self.lora.alpha),
        ):
            if not value > 0:
                raise UserError(f"--{name} must be positive, got {value:g}")
        if self.lora.rank and (self.sync.every or self.sync.stages > 1):
            raise UserError("--sync moves all weights, and --lora.rank trains adapters: choose one")
        if not 0 < self.rollout.top_p <= 1:
            raise UserError(f"--rollout.top_p must be in (0, 1], got {self.rollout.top_p:g}")
        if not 0 < self.sync.alpha <= 1:
            raise UserError(f"--sync.alpha must be in (0, 1], got {self.sync.alpha:g}")
        if not 0 <= self.optim.warmup < 1:
            raise UserError(f"--optim.warmup must be in [0, 1), got {self.optim.warmup:g}")


# a second pass over a turn's examples leaves the last iterate; half as many turns are twice as large
_TWICE = {"rollout.epochs": 2, "batch.size": 64}
_TARGETS = ("online_brain", "dpg", "gdc", "gdc_plus_plus", "f_dpg", "online_gflownet")

# what the built-in task takes for some methods in place of β = 1 and the rate of the others
_BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "ipo": {"algorithm.beta": 0.1},
    "hinge": {"algorithm.beta": 0.3},
    # the margin of a noisy label is log((1-ε)/ε) / β, the targets are ±1/(2β)
    "mcts_dpo": {"algorithm.beta": 0.3},
    "cal_dpo": {"algorithm.beta": 0.25},
    # ranks over all prompts keep a prompt's own answers apart only while margins are small
    "aot_unpaired": {"algorithm.beta": 3.0},
    # averages of two or three tokens have the scale of averages of hundreds
    "dpo_norm": {"algorithm.beta": 5.0},
    "simpo": {"algorithm.beta": 2.0},
    "alpha_po": {"algorithm.beta": 2.5},
    "alpha_dpo": {"algorithm.beta": 2.5},
    # without a reference, the pairs that the model ranks rightly already still have a margin to reach
    "slic": {"algorithm.delta": 10.0},
    "rso_hinge": {"algorithm.beta": 0.1},
    # the share of β that the published defaults have
    "flex_dpo": {"algorithm.beta_rejected": 0.8},
    # with a smaller one the slope at the start, βh = 0, points the other way (see the loss)
    "discopop": {"algorithm.tau": 1.0},
    # nothing but the size of the step keeps what is not to be unlearned
    "npo": {"algorithm.beta": 3.0, "optim.lr": 4e-5},
    # a pair teaches less than a group of eight, so there are as many completions
    "online_dpo": {"algorithm.samples": 8, "algorithm.beta": 1.0},
    "xpo": {"algorithm.samples": 4, "algorithm.beta": 1.0},
    "p3o": {"algorithm.samples": 8, "algorithm.beta": 0.05},
    "copg": {"algorithm.samples": 8},
    "sharpening_xpo": {"algorithm.samples": 4, "algorithm.beta": 1.0},
    # the targets of the margins are ±1/(2β), (P - ½)/β, (r - r')/β and 1/(2η)
    "online_ipo": {"algorithm.samples": 8, "algorithm.beta": 0.1},
    "ipo_md": {"algorithm.samples": 8, "algorithm.beta": 0.1},
    "sppo": {"algorithm.beta": 0.1, **_TWICE},
    "sppo_hard": {"algorithm.beta": 0.1, **_TWICE},
    "dno": {"algorithm.beta": 0.2, **_TWICE},
    # all pairs of a prompt are many already
    "dno_prct": {"algorithm.beta": 1.0, "rollout.epochs": 2},
    "inpo": {"algorithm.beta": 0.05, "algorithm.eta": 0.2, **_TWICE},
    "spin": {"algorithm.beta": 1.0, **_TWICE},
    # an average over a thousand steps would still be the start after sixty
    "nash_ema": {"algorithm.samples": 8, "algorithm.decay": 0.9},
    "nash_mp": {"algorithm.samples": 8, "algorithm.decay": 0.9},
    "nash_md": {"algorithm.samples": 8},
    # two or three tokens have a hundredth of the KL that hundreds have
    "hypo": {"algorithm.beta": 1.0, "algorithm.lambda_": 0.1},
    # with so few answers there are, duplicates must count for what is accepted to follow the rewards
    "rso": {
        "algorithm.samples": 16,
        "algorithm.duplicates": "keep",
        "algorithm.ranking": "tournament",
        "algorithm.beta": 1.0,
    },
    # the scores of the pairs differ by 0.5 to 1
    "mpo": {"algorithm.samples": 8, "algorithm.dpo_beta": 1.0, "algorithm.threshold": 0.8},
    # of 13 tokens
    "nlpo": {"algorithm.mask_min_tokens": 1, "algorithm.mask_every": 5},
    # a multiplier moves once a turn, of which there are few
    "constrained_ppo": {"algorithm.multiplier_rate": 5.0, "algorithm.thresholds": "0.6,0.7"},
    # with a smaller window its last token, which has no advantage, would be the last digit
    "t_ppo": {"algorithm.window": 3, "rollout.max_new_tokens": 4},
    # the model has never seen two sums in a row
    "xrpo": {"algorithm.exemplars": 0, "algorithm.exploration": 0.1},
    "meta_po": {"algorithm.refine_every": 2},
    # labels about 1/2 for all: as scores to be reached they leave no contrast, as probabilities they do
    "lipo_point": {"algorithm.loss": "sigmoid", "algorithm.beta": 0.3},
    # the labels, win rates among four, are the targets: ψ^{1/β} tells them apart
    "lipo_softmax": {"algorithm.beta": 0.1},
    # scores are in [0, 1], and half of that tells a right sum from one beside it
    "info_nca": {"algorithm.alpha": 0.2},
    "nca": {"algorithm.alpha": 0.2},
    "exo": {"algorithm.beta_r": 0.2},
    "brain": {"algorithm.beta": 0.2},
    "rwr": {"algorithm.beta": 0.2},
    "awr": {"algorithm.beta": 0.2},
    # two thirds of the answers are bad; the paper's where that is so
    "unlikelihood": {"algorithm.alpha": 0.01},
    # characters that the model knows, but not in this place: more is to be learnt
    "conditional_training": {
        "algorithm.aligned": "=",
        "algorithm.misaligned": "+",
        "batch.size": 128,
        "optim.lr": 4e-4,
    },
    "chain_of_hindsight": {"algorithm.good": "=", "algorithm.bad": "+", "batch.size": 128, "optim.lr": 4e-4},
    # no answer has four tokens
    "sequence_unlikelihood": {"algorithm.n": 1},
    # with the other, which is plain SFT, nothing is implied
    "implicit_reward_sft": {"algorithm.divergence": "pearson_chi2"},
    # a share of three tokens is rarely whole
    "diffusion_gdpo": {"algorithm.rate": "count"},
    # a segment of one of an answer's three tokens
    "online_mcts_dpo": {"algorithm.segment": 1, "algorithm.beta": 0.3},
    "itool": {"algorithm.segment": 1, "algorithm.beta": 0.3},
    # the target is right in 95% where the reference is in 24%
    **{name: {"algorithm.beta": 0.25} for name in _TARGETS},
}


def is_built_in(model: str | None, data: str | None) -> bool:
    """Whether these options ask for the built-in task."""
    return data is None and (model is None or model.startswith(BUILT_IN))


def built_in_defaults(algorithm: str) -> dict[str, Any]:
    """Defaults of the built-in task: its model is five orders of magnitude smaller than the generic ones expect.

    Its answers have two or three tokens, so a margin of a few nats separates them. The published β ask for margins
    that suit hundreds of tokens, and reach them here by moving the mass to answers that nobody rejected.
    """
    if algorithms.kind(algorithm) == "prompts":
        hyper = algorithms.defaults(algorithm)
        return {
            # 32 answers tell too little of what is right, and the only reward is at the end of three tokens
            **({"algorithm.samples": 8} if hyper.get("samples") in (1, 2) else {}),
            **({"algorithm.lam": 1.0} if "lam" in hyper else {}),
            **({"algorithm.value_coefficient": 0.5} if hyper.get("value_coefficient") == 0.1 else {}),
            "steps": 60,
            "eval_every": 10,
            "optim.lr": 5e-4,
            "batch.size": 32,
            "batch.tokens": 2048,
            "rollout.max_new_tokens": 3,
            **_BUILT_IN.get(algorithm, {}),
        }
    return {
        "steps": 200,
        "eval_every": 25,
        **({"algorithm.beta": 1.0} if "beta" in algorithms.defaults(algorithm) else {}),
        "optim.lr": 2e-4,
        # four completions each, as many as 64 pairs have
        "batch.size": 32 if algorithms.kind(algorithm) in ("lists", "decisions") else 64,
        "batch.tokens": 2048,
        **_BUILT_IN.get(algorithm, {}),
    }


# of --preset ci: steps and the rate's factor on that of the built-in task, of given data and of what samples; short,
# but long enough for gains of many standard errors
_CI_LENGTHS = {False: (24, 5.0), True: (12, 2.0)}

# what needs more steps, or smaller ones
_CI: Mapping[str, Mapping[str, Any]] = {
    # its ranks over all prompts, as above
    "aot_unpaired": {"optim.lr": 5e-4},
    # both answers of a pair fall fast, and then part
    "apo_down": {"steps": 64, "optim.lr": 5e-4},
    # a fall of the loss is to be seen through that every batch has other examples
    "detailed_balance": {"steps": 48},
    # the probability of an answer is learnt from its end to its beginning
    **{name: {"steps": 64, "optim.lr": 4e-4} for name in ("fl_detailed_balance", "subtrajectory_balance")},
    # their margins would take probability from right answers too
    **{name: {"optim.lr": 6e-4} for name in ("rso_hinge", "mallows_po", "first_ranknet")},
    # a head that is drawn may rank well already; of two models it is to be found who is described by which
    "reward_model": {"steps": 40},
    "reaction_model": {"steps": 80},
    "maxmin": {"steps": 48},
    # first of all, what the words for good and bad are
    "conditional_training": {"steps": 96},
    "chain_of_hindsight": {"steps": 56},
    # two steps a turn, or few of its samples teach something
    **{name: {"steps": 18} for name in ("sppo", "sppo_hard", "inpo", "dno", "nash_md", "nash_ema", "ipo_md")},
    **{
        name: {"steps": 18}
        for name in ("nlpo", "p3o", "copg", "xrpo", "pass_at_k", "online_mcts_dpo", "itool", "meta_po")
    },
    **{name: {"steps": 20} for name in ("preamble_rl", "diffu_grpo")},
}


def ci_defaults(algorithm: str) -> dict[str, Any]:
    """Defaults of the built-in task under --preset ci: a run of about two seconds, measured before and after."""
    steps, factor = _CI_LENGTHS[algorithms.kind(algorithm) == "prompts"]
    task = built_in_defaults(algorithm)
    rate = {"steps": steps, "optim.lr": factor * task["optim.lr"]}
    return {**task, **rate, "eval_every": 0, **_CI.get(algorithm, {})}


PRESETS = {"task": built_in_defaults, "ci": ci_defaults}


def as_tree(value: Any) -> Any:
    """Nested dataclasses as plain dictionaries, in the order of their fields."""
    if is_dataclass(value):
        return {f.name: as_tree(getattr(value, f.name)) for f in fields(value)}
    return dict(value) if isinstance(value, Mapping) else value
