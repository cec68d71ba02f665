"""One run from its configuration to its report: everything is put together here."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml
from accelerate.utils import broadcast_object_list, set_seed

from fastpo import algorithms
from fastpo.algorithms.reward import ANNOTATOR
from fastpo.training import checkpoint, denoising_task, parallel, task
from fastpo.training.annotators import Annotators
from fastpo.training.batches import check_budget, step_indices
from fastpo.training.candidates import Candidate
from fastpo.training.config import OptimConfig, TrainConfig, as_tree
from fastpo.training.data import Encoder, Example, Prompt, load_examples, load_prompts, with_mismatched
from fastpo.training.denoising import Denoiser, DenoisingEngine, mask_token
from fastpo.training.errors import Interrupted, UserError
from fastpo.training.loop import Constants, Job, Memory, constant_streams, evaluate_examples, train
from fastpo.training.model import (
    Critic,
    Logits,
    Policy,
    Scores,
    WithoutAdapters,
    check_same_vocabulary,
    load_denoiser,
    load_model,
    load_reward_model,
    load_tokenizer,
    recompute_layers,
    stop_tokens,
    with_adapters,
    with_adapters_merged,
)
from fastpo.training.references import MovingReference
from fastpo.training.report import Display, Journal, plot, replace_text, summary, write_summary
from fastpo.training.rollouts import Engine, Sampling, TransformersEngine
from fastpo.training.scorers import Judge, Scorer, load_function, load_judge, load_scorer
from fastpo.training.turns import Plan, Rubric, Turns
from fastpo.training.vllm import VLLMEngine

CONFIG, METRICS, CURVE, SUMMARY, MODEL = "config.yaml", "metrics.jsonl", "curve.png", "summary.json", "model"
ADAPTER = "adapter"
# in the folder of several reward models: the number of the one that describes each annotator
ANNOTATORS = "annotators.json"

Evaluate = Callable[[], dict[str, float]]


def run(name: str, hyper: Mapping[str, Any], config: TrainConfig, resume: Path | None = None) -> Path:
    """Train with the algorithm `name`; returns the run's folder.

    Args:
        name: of the algorithm.
        hyper: its hyper-parameters.
        config: everything else.
        resume: folder of the run to continue.

    Raises:
        UserError: something that the user can put right.
        Interrupted: a signal stopped the run; it can be resumed.
    """
    begin = time.perf_counter()
    # what these report about files and defaults would tear the progress bar
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if config.built_in:
        # its tensors are too small to share, and waiting for a second thread on a busy machine is slow
        torch.set_num_threads(1)
    config.check()
    try:
        algorithm = algorithms.build(name, hyper)
    except ValueError as error:
        raise UserError(f"--algorithm.{error}") from error
    if config.reference is not None and "reference" not in algorithm.models:
        raise UserError(f"--reference: {name} has no reference model")
    if (
        config.built_in
        and config.architecture != "llama"
        and (algorithms.denoises(name) or isinstance(algorithm, algorithms.RewardModel))
    ):
        raise UserError(f"--model {config.model}: {name} trains no causal language model, which this is")
    aux = algorithm.kind == "prompts" and "aux" in algorithm.anchors(1).values()  # type: ignore[attr-defined]
    if config.aux is not None and not aux:
        raise UserError(f"--aux: {name} asks no further model")
    if config.aux is None and aux and not config.built_in:
        raise UserError(f"{name} needs --aux, a further model")
    if isinstance(algorithm, algorithms.Windowed) and config.rollout.stop:
        raise UserError(f"--rollout.stop: {name} samples in windows, between which a text may be divided")
    before = checkpoint.latest(resume) if resume else None
    accelerator = parallel.start(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(resume or config.output or "runs"),
    )
    if config.batch.size % accelerator.num_processes:
        raise UserError(
            f"--batch.size {config.batch.size} is not a multiple of the {accelerator.num_processes} processes"
        )
    display = Display(accelerator.is_main_process)
    folder = resume or _new_folder(accelerator, name, config)
    set_seed(config.seed)
    if config.built_in and not resume and accelerator.is_main_process:
        built = denoising_task if algorithms.denoises(name) else task
        with display.bar("fitting the reference", built.FIT_STEPS) as bar:
            if built is task:
                task.build(folder, config.seed, bar, config.architecture)
            else:
                denoising_task.build(folder, config.seed, bar)
            task.write_data(folder, config.seed, algorithm)
        if aux:
            task.prefer(folder, config.seed)
    accelerator.wait_for_everyone()

    with parallel.together(accelerator):
        source = _source(display, folder, config, algorithm)
    prepare = _prepare_online if algorithm.kind == "prompts" else _prepare
    job, evaluate = prepare(accelerator, algorithm, config, source)  # type: ignore[arg-type]
    assert job.parts is not None
    with parallel.together(accelerator):
        start = checkpoint.load(accelerator, before, job.parts) if before else 0
    if start >= job.steps:
        raise UserError(f"{folder}: the run has done its {job.steps} steps; more are asked for with --steps")
    if accelerator.is_main_process:
        tree = {"algorithm": dict(hyper), **as_tree(config)}
        replace_text(folder / CONFIG, yaml.safe_dump(tree, sort_keys=False))

    try:
        done = _train(job, evaluate, config, folder, display, start)
    except RuntimeError as error:
        if not parallel.lost(accelerator, error):
            raise
        raise Interrupted(f"another process has ended; to continue: fastpo train {name} --resume {folder}") from error
    if done < job.steps:
        raise Interrupted(f"stopped after step {done}; to continue: fastpo train {name} --resume {folder}")
    _export(job, source, folder)
    if accelerator.is_main_process:
        _report(job, config, folder, display, time.perf_counter() - begin)
    accelerator.end_training()
    return folder


def _new_folder(accelerator: Any, name: str, config: TrainConfig) -> Path:
    """A folder that holds no run yet, chosen once for all ranks."""
    folder = Path(config.output or f"runs/{name}")
    if config.output is None:
        number = 1
        while (folder / CONFIG).exists():
            number += 1
            folder = Path(f"runs/{name}-{number}")
    elif (folder / CONFIG).exists():
        raise UserError(f"{folder}: holds a run already; --resume {folder} continues it, another --output starts anew")
    accelerator.wait_for_everyone()
    chosen = [str(folder)]
    broadcast_object_list(chosen)
    folder = Path(chosen[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Source(NamedTuple):
    """Where a run starts from: names of the models, the tokenizer, the examples or prompts to train and measure on.

    `digest` is that of the file that is trained on, `categories` are the names that the examples have as numbers, by
    column.
    """

    model: str
    reference: str | None
    tokenizer: Any
    examples: list[Example]
    eval_examples: list[Example]
    digest: str
    categories: Mapping[str, Mapping[str | int, int]]
    prompts: Sequence[Prompt] = ()
    eval_prompts: Sequence[Prompt] = ()
    aux: str | None = None


def _source(display: Display, folder: Path, config: TrainConfig, algorithm: algorithms.Algorithm) -> Source:
    model = str(folder / task.REFERENCE) if config.built_in or config.model is None else config.model
    data = config.data or str(folder / task.DATA[algorithm.kind])
    tokenizer = load_tokenizer(model)
    held_out = config.eval_data
    if config.built_in and isinstance(algorithm, algorithms.RewardModel):
        # it gives no answers to measure
        held_out = str(folder / task.HELD_OUT)
    files = [file for file in (data, held_out) if file is not None]
    for other in (config.reference, config.aux):
        if other is not None:
            check_same_vocabulary(model, other)
    if algorithm.kind == "prompts":
        given = algorithm.demonstrations  # type: ignore[attr-defined]
        encoder = Encoder(tokenizer, model, config.max_length, "pairwise" if given == 2 else "demonstrations")
        more: dict[str, Any] = {"room": config.rollout.max_new_tokens, "demonstrations": given}
        found = [load_prompts(file, encoder, **more) for file in files]
        held = found[1] if len(found) > 1 else []
        aux = str(folder / task.PREFERRED) if config.built_in else config.aux
        return Source(model, config.reference, tokenizer, [], [], checkpoint.digest(data), {}, found[0], held, aux)
    encoder = Encoder(tokenizer, model, config.max_length, algorithm.kind, algorithm.columns, algorithm.control)
    loaded = []
    for file in files:
        examples = load_examples(file, encoder, algorithm.problem)
        loaded.append(with_mismatched(examples, config.max_length) if algorithm.mismatched else examples)
        check_budget(loaded[-1], config.batch.tokens, file)
    if encoder.cut:
        display.say(f"{encoder.cut} completions were cut to --max_length {config.max_length}")
    held_out_examples = loaded[1] if len(loaded) > 1 else []
    digest = checkpoint.digest(data)
    return Source(model, config.reference, tokenizer, loaded[0], held_out_examples, digest, encoder.categories)


class Trained(NamedTuple):
    """What is stepped together."""

    policy: Any
    optimizer: Any
    schedule: Any


def _trained(accelerator: Any, policy: torch.nn.Module, steps: int, config: TrainConfig) -> Trained:
    if config.gradient_checkpointing:
        recompute_layers(policy)
    prepared = parallel.prepare(accelerator, policy, config.parallel)
    # its weights may have been replaced by shares of them
    weights = [weight for weight in prepared.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.optim.lr, weight_decay=config.optim.weight_decay)
    optimizer = accelerator.prepare_optimizer(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps, config.optim))
    return Trained(prepared, optimizer, schedule)


def _adapted(model: Any, config: TrainConfig) -> Any:
    lora = config.lora
    return with_adapters(model, lora.rank, lora.alpha, lora.targets) if lora.rank else model


def _prepare_online(
    accelerator: Any, algorithm: algorithms.Online, config: TrainConfig, source: Source
) -> tuple[Job, Evaluate]:
    """The same for an algorithm that samples its completions: models, optimiser, engine, rewards."""
    rollout = config.rollout
    plan = Plan(
        size=config.batch.size,
        minibatches=rollout.minibatches,
        epochs=rollout.epochs,
        rounds=rollout.rounds,
        tokens=config.batch.tokens,
        seed=config.seed,
        context=config.max_length,
    )
    turns = config.epochs * len(source.prompts) / config.batch.size
    steps = config.steps or math.ceil(turns) * plan.steps
    denoises = algorithms.denoises(algorithm.name)
    load = load_denoiser if denoises else load_model

    def denoiser(model: Any) -> Denoiser:
        mask = mask_token(source.tokenizer, source.model)
        hyper = algorithm.hyper  # type: ignore[attr-defined]
        # a bound on the likelihood, or one step of unmasking
        bound = {name: hyper[name] for name in ("nodes", "rate") if name in hyper}
        return Denoiser(model, mask, rollout.max_new_tokens, temperature=rollout.temperature, **bound)

    def policy_of(model: Any, critic: Critic | None = None) -> Policy:
        return denoiser(model) if denoises else Policy(model, temperature=rollout.temperature, critic=critic)

    model = load(source.model)
    # what answers reads the prompt and a completion, and writes another
    texts = 2 if algorithm.needs == "answer" else 1
    longest = max(len(p.ids) for p in (*source.prompts, *source.eval_prompts)) + texts * rollout.max_new_tokens
    _check_length(model, longest, source.model)
    limit = getattr(model.config, "max_position_embeddings", None)
    plan = replace(plan, context=min(plan.context, limit or plan.context))
    scorer, judge = _judges(accelerator, algorithm, config, source)
    heads = 1 + len(scorer.names) if algorithm.critic == "each" else 1  # type: ignore[union-attr]
    critic = Critic(model, heads) if algorithm.critic else None
    trained = _trained(accelerator, policy_of(_adapted(model, config), critic), steps, config)
    changes = {"policy": trained.policy}
    wanted = {*algorithm.anchors(plan.steps).values()}
    companion = None
    anchors: dict[str, Any] = {}
    draws = {draw.source for draw in algorithm.draws}
    if "start" in wanted and config.lora.rank and source.reference is None:
        anchors["start"] = WithoutAdapters(accelerator, trained.policy)
    elif "start" in wanted:
        frozen = policy_of(load(source.reference or source.model))
        anchors["start"] = parallel.prepare(accelerator, frozen, config.parallel, frozen=True)
    if "aux" in wanted:
        assert source.aux is not None
        anchors["aux"] = parallel.prepare(accelerator, policy_of(load(source.aux)), config.parallel, frozen=True)
    # what generates beside the policy is whole, also where the others are sharded
    if texts > 1 or draws & {"reference", "mixture"}:
        companion = load(source.reference or source.model).to(accelerator.device)
    moves = (wanted | draws) & {"average", "stage"}
    if config.lora.rank and (moves or "masked" in draws):
        raise UserError(f"--lora.rank: {algorithm.name} has a model that follows all weights")
    average = lagged = None
    if moves:
        moving = parallel.prepare(accelerator, policy_of(load(source.model)), "ddp", frozen=True)
        average = MovingReference(accelerator, moving)
        anchors |= dict.fromkeys(moves, moving)
        changes["average"] = moving
    if "masked" in draws:
        copied = accelerator.prepare_model(load(source.model), evaluation_mode=True)
        lagged = MovingReference(accelerator, copied)
        changes["lagged"] = copied
    sampling = Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        stop=stop_tokens(model, source.tokenizer),
        stop_strings=tuple(rollout.stop),
    )
    sharded = config.parallel == "fsdp2" and accelerator.num_processes > 1
    engine: Engine = TransformersEngine(
        lambda function: parallel.inside(accelerator, trained.policy, function),
        tokens=rollout.tokens,
        tokenizer=source.tokenizer,
        largest=parallel.largest(accelerator) if sharded else None,
    )
    if denoises:
        if sharded:
            raise UserError(f"--parallel fsdp2: {algorithm.name} samples from whole weights")
        engine = DenoisingEngine(accelerator.unwrap_model(trained.policy), tokens=rollout.tokens)
    if rollout.engine == "vllm":
        others = sorted(draws - {"policy", "greedy", "search"})
        if others or denoises:
            what = "is of masked-diffusion models" if denoises else f"also samples from the {others[0]}"
            raise UserError(f"--rollout.engine vllm: {algorithm.name} {what}")
        engine = VLLMEngine(source.model, max_length=longest)
    decode = partial(source.tokenizer.decode, skip_special_tokens=True)
    if scorer is not None and algorithm.needs == "answer":
        answers = TransformersEngine(
            lambda function: function(companion), tokens=rollout.tokens, tokenizer=source.tokenizer
        )
        scorer = Candidate(answers, sampling, decode, scorer, source.tokenizer.bos_token_id)
    taught = Turns(
        accelerator,
        algorithm,
        source.prompts,
        engine,
        sampling,
        plan,
        decode=decode,
        scorer=scorer,
        judge=judge,
        anchors=anchors,
        companion=companion,
        average=average,
        lagged=lagged,
    )
    remembers = {"schedule": trained.schedule, "turns": taught}
    job = Job(
        accelerator=accelerator,
        policy=trained.policy,
        optimizer=trained.optimizer,
        schedule=trained.schedule,
        algorithm=algorithm,
        examples=taught.examples,
        constants=taught.constants,
        reference=None,
        memory=Memory(),
        steps=steps,
        size=config.batch.size,
        tokens=config.batch.tokens,
        seed=config.seed,
        max_norm=config.optim.max_norm,
        before_step=taught,
        order=taught.order,
        max_length=rollout.max_new_tokens,
        parts=checkpoint.Parts(algorithm.name, source.digest, changes, trained.optimizer, remembers),
    )
    if config.built_in and denoises:
        before = denoiser(load(source.model)).to(accelerator.device)
        inner = accelerator.unwrap_model(trained.policy)
        return job, lambda: denoising_task.evaluate(inner, before, config.seed)
    if config.built_in:
        measured = _of_the_task(job, source.model, config.seed)
        if texts == 1:
            return job, measured
        # who answers is not the policy
        ids = {text: source.tokenizer(text)["input_ids"] for text in task.prompts(config.seed)[1]}
        held_out = [Prompt(text, ids[text], (), {}, 0) for text in ids]
        return job, lambda: {"accuracy": taught.evaluate(held_out)["reward"], "kl": measured()["kl"]}
    if not source.eval_prompts:
        return job, dict
    return job, lambda: taught.evaluate(source.eval_prompts)


def _judges(
    accelerator: Any, algorithm: algorithms.Online, config: TrainConfig, source: Source
) -> tuple[Scorer | None, Judge | None]:
    """What the algorithm's completions are judged by."""
    given = config.reward
    options: dict[str, Any] = {"device": accelerator.device, "tokens": config.batch.tokens}
    scorer: Scorer | None = task.scorer(algorithm) if config.built_in else None
    judge: Judge | None = task.judge() if config.built_in else None
    if given.of:
        specs = [given.of] if isinstance(given.of, str) else given.of
        if isinstance(algorithm, algorithms.Refining):
            rubric = load_function(specs[0])
            if not isinstance(rubric, Rubric) or len(specs) > 1:
                raise UserError(
                    f"--reward.of: {algorithm.name} has its rubric rewritten: one object with version, refine, "
                    "state_dict and load_state_dict is needed"
                )
            return rubric, None
        # a search asks as often as its trees need, which is not equally often in all processes
        together = accelerator.num_processes > 1 and algorithm.draws[0].search is None
        group = True if together else None
        more: dict[str, Any] = {"how": given.how, "unscored": given.unscored, "process_group": group}
        scorer = load_scorer(specs, source.tokenizer, **more, **options)
        judge = None
    if given.judge:
        specs = [given.judge] if isinstance(given.judge, str) else given.judge
        judge = load_judge(specs, source.tokenizer, **options)
    if algorithm.needs in ("reward", "rewards", "answer") and scorer is None:
        raise UserError(f"--reward.of: {algorithm.name} needs a function (FILE.py:NAME) or a reward model")
    if algorithm.needs == "judge" and judge is None and given.unscored == "skip":
        raise UserError(f"--reward.unscored skip: {algorithm.name} compares completions by their rewards and needs all")
    if algorithm.needs == "judge" and scorer is None and judge is None:
        raise UserError(f"--reward.judge: {algorithm.name} needs a judge, or rewards (--reward.of) to make one of")
    return scorer, judge


def _of_the_task(job: Job, reference: str, seed: int, asked: str = "") -> Evaluate:
    """Accuracy and KL on the built-in task."""
    frozen = load_model(reference).to(job.accelerator.device)
    return lambda: parallel.inside(job.accelerator, job.policy, partial(task.evaluate, asked=asked), frozen, seed)


def _prepare(
    accelerator: Any, algorithm: algorithms.Algorithm, config: TrainConfig, source: Source
) -> tuple[Job, Evaluate]:
    """Models, optimiser and the log-probs of the reference."""
    if isinstance(algorithm, algorithms.RewardModel):
        if config.lora.rank:
            raise UserError(f"--lora.rank: {algorithm.name} trains whole models")
        rewards = [load_reward_model(source.model) for _ in range(algorithm.groups)]
        for each in rewards:
            each.config.problem_type = algorithm.problem_type
        trains: Any = Scores(rewards)
        model = rewards[0]
    else:
        model = _adapted(load_model(source.model), config)
        trains = Policy(model, own=algorithm.module(model.config.get_text_config().hidden_size))
    sequences = (len(e.prompt) + len(c) for e in source.examples + source.eval_examples for c in e.completions)
    _check_length(model, max(sequences), source.model)
    steps = config.steps or math.ceil(config.epochs * len(source.examples) / config.batch.size)
    policy, optimizer, schedule = _trained(accelerator, trains, steps, config)
    changes: dict[str, Any] = {"policy": policy}
    remembers: dict[str, Any] = {"schedule": schedule}
    constants: Mapping[str, Constants] = {}
    eval_constants: dict[str, Constants] = {}
    follows: MovingReference | None = None
    reference: Any = None
    syncs = bool(config.sync.every) or config.sync.stages > 1
    if syncs:
        _check_sync(algorithm, config, steps, len(source.examples))
    if syncs or algorithm.divergence:
        # with weights of its own
        model = load_model(source.reference or source.model)
        frozen: Any = Logits(model) if algorithm.divergence else Policy(model)
        frozen = parallel.prepare(accelerator, frozen, config.parallel, frozen=True)
        reference = frozen if algorithm.divergence else None
        if syncs:
            changes["reference"] = frozen
            # what is asked at every step is not kept
            kept = None if algorithm.divergence else algorithm.statistics["reference"]
            every, alpha = config.sync.every, config.sync.alpha
            follows = MovingReference(accelerator, frozen, every=every, alpha=alpha, statistics=kept)
            constants = follows.constants
    elif "reference" in algorithm.models:
        frozen = policy
        if source.reference is not None:
            frozen = Policy(load_model(source.reference))
            frozen = parallel.prepare(accelerator, frozen, config.parallel, frozen=True)
        count, needed = len(source.examples), steps * config.batch.size
        order = sorted(step_indices(0, min(needed, count), count, config.seed))
        more: dict[str, Any] = {"tokens": config.batch.tokens, "statistics": algorithm.statistics["reference"]}
        constants = constant_streams(accelerator, frozen, source.examples, order, **more)
        if source.eval_examples:
            everything = range(len(source.eval_examples))
            eval_constants = constant_streams(accelerator, frozen, source.eval_examples, everything, **more)
    memory = Memory()
    annotators: Annotators | None = None
    if isinstance(algorithm, algorithms.MaxMin):
        annotators = Annotators(algorithm, source.examples, source.eval_examples, config.seed)
        memory.state = annotators.start()
    if algorithm.whole_step or annotators is not None:
        remembers["memory"] = memory
    job = Job(
        accelerator=accelerator,
        policy=policy,
        optimizer=optimizer,
        schedule=schedule,
        algorithm=algorithm,
        examples=source.examples,
        constants=constants,
        reference=reference,
        memory=memory,
        steps=steps,
        size=config.batch.size,
        tokens=config.batch.tokens,
        seed=config.seed,
        max_norm=config.optim.max_norm,
        stages=config.sync.stages,
        before_step=follows or annotators,
        parts=checkpoint.Parts(algorithm.name, source.digest, changes, optimizer, remembers),
    )
    if config.built_in and not isinstance(algorithm, algorithms.RewardModel):
        asked = "" if algorithm.control is None else algorithm.control.good
        return job, _of_the_task(job, source.model, config.seed, asked)
    if not source.eval_examples:
        return job, dict
    if follows is None:
        return job, lambda: evaluate_examples(job, source.eval_examples, eval_constants)
    moving, held_out = follows, source.eval_examples

    def evaluate() -> dict[str, float]:
        now = moving.of(held_out, range(len(held_out)), job.tokens)
        return evaluate_examples(job, held_out, now)

    return job, evaluate


def _check_sync(algorithm: algorithms.Algorithm, config: TrainConfig, steps: int, examples: int) -> None:
    if "reference" not in algorithm.models:
        raise UserError(f"--sync needs a reference model, and {algorithm.name} has none")
    for what, number in (("steps", steps), ("examples", examples)):
        if config.sync.stages > number:
            raise UserError(f"--sync.stages {config.sync.stages} is more than there are {what} ({number})")


def _check_length(model: Any, longest: int, name: str) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserError(f"{name}: the model takes {limit:,} tokens, but a sequence has {longest:,}; lower --max_length")


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """The factor on the peak learning rate in the step that follows `step` steps."""
    rise = round(optim.warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    progress = (step - rise) / max(1, steps - rise)
    shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return shapes[optim.schedule]


def _train(job: Job, evaluate: Evaluate, config: TrainConfig, folder: Path, display: Display, start: int) -> int:
    """The loop with its journal and progress bar."""
    accelerator = job.accelerator
    main = accelerator.is_main_process
    journal = Journal(folder / METRICS, start or None) if main else None
    parts = job.parts
    assert parts is not None
    if config.tracker != "none":
        accelerator.init_trackers("fastpo", config={"algorithm": job.algorithm.name})

    with display.bar(job.algorithm.name, job.steps, start) as bar:

        def log(step: int, metrics: dict[str, float]) -> None:
            if journal is not None:
                journal.add(step, metrics)
            accelerator.log(metrics, step=step)
            bar(step, metrics)

        if start == 0:
            measured = evaluate()
            if measured:
                log(0, {f"eval_{key}": value for key, value in measured.items()})
        return train(
            job,
            start,
            log=log,
            evaluate=evaluate,
            save=lambda step: checkpoint.save(accelerator, folder, step, parts),
            eval_every=config.eval_every,
            checkpoint_every=config.checkpoint_every,
        )


def _export(job: Job, source: Source, folder: Path) -> None:
    """The trained model as transformers loads it; several reward models in folders of their numbers."""
    trained = job.accelerator.unwrap_model(job.policy)
    state = {}
    for name, tensor in checkpoint.weights(trained).items():
        # one at a time, as every process gets the whole
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if job.accelerator.is_main_process:
            state[name] = whole.cpu()
    if not job.accelerator.is_main_process:
        return
    parts = {"model.": (trained.model, folder / MODEL)} if hasattr(trained, "model") else {}
    if isinstance(trained, Scores):
        alone = len(trained.models) == 1
        for u, model in enumerate(trained.models):
            parts[f"models.{u}."] = model, folder / MODEL / ("" if alone else str(u))
    for prefix, (model, to) in parts.items():
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if hasattr(model, "disable_adapter"):
            model.save_pretrained(folder / ADAPTER, state_dict=weights)
            model = with_adapters_merged(load_model(source.model), folder / ADAPTER)
            weights = model.state_dict()
        model.save_pretrained(to, state_dict=weights)
        source.tokenizer.save_pretrained(to)
    if isinstance(job.algorithm, algorithms.MaxMin):
        models = job.memory.state["models"].tolist()
        found = {str(name): models[n] for name, n in source.categories[ANNOTATOR.name].items() if n < len(models)}
        (folder / MODEL / ANNOTATORS).write_text(json.dumps(found, indent=2) + "\n")


def _report(job: Job, config: TrainConfig, folder: Path, display: Display, seconds: float) -> None:
    """summary.json, curve.png and the closing lines."""
    records: Sequence[dict[str, float]] = Journal(folder / METRICS, job.steps).records
    found = summary(records)
    write_summary(
        folder / SUMMARY,
        {
            "algorithm": job.algorithm.name,
            "steps": job.steps,
            **({} if job.algorithm.kind == "prompts" else {"examples": len(job.examples)}),
            **found,
            "seconds": seconds,
        },
    )
    plot(records, folder / CURVE, f"{job.algorithm.name}, {config.model or 'built-in task'}")
    if "accuracy_before" in found:
        display.say(f"accuracy    {found['accuracy_before']:.1%} -> {found['accuracy_after']:.1%}  {task.ACCURACY}")
        display.say(f"KL          {found['kl']:.3f} nats per answer  {task.KL}")
    else:
        for key in ("loss", "reward_margin", "reward_accuracy"):
            ends = [f"{key}_before", f"{key}_after"] if f"{key}_before" in found else [f"{key}_first", f"{key}_last"]
            # single completions may all have one label, and then there is no margin
            if not set(ends) <= set(found):
                continue
            data = {"pairwise": "pairs", "lists": "lists"}.get(job.algorithm.kind, "completions")
            where = (
                f"held-out {data}"
                if ends[0].endswith("before")
                else f"training {data}, first and last tenth of the steps"
            )
            display.say(f"{key.replace('_', ' '):<16}{found[ends[0]]:.3f} -> {found[ends[1]]:.3f}  ({where})")
    display.say(f"speed       {found['tokens_per_second']:,.0f} tokens/s in training, {seconds:.0f} s in all")
    last = checkpoint.latest(folder)
    for label, path in (
        ("metrics", folder / METRICS),
        ("curve", folder / CURVE),
        ("checkpoint", last),
        ("model", folder / MODEL),
        ("summary", folder / SUMMARY),
    ):
        display.say(f"{label:<12}{path}")
