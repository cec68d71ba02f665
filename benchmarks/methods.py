"""Every algorithm on the built-in task, from one fitted reference: accuracy, KL, speed and memory, as a table.

    python benchmarks/methods.py [NAME ...] [--seeds 3] [--output docs/training/methods.md]

Each run is a process of its own, one after the other, as `--preset ci` has it. Peak memory is the process's,
most of it torch and transformers; masked-diffusion models have a reference of their own.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
HEAD = """# All methods

Every method on the built-in task (sums, a model of 133,056 parameters) with `--preset ci`, from one fitted reference,
by `python benchmarks/methods.py`: the share of right answers on held-out prompts before and after (of reward models,
of held-out pairs in their order), the KL to the reference per answer, tokens per second in training on one core, and
the peak memory of the process, most of which is torch and transformers. The runs are as short as a test may be, and
say that a method works, not which is best.
""".splitlines()


def child(name: str, seed: int, folder: Path) -> None:
    """One run; prints what it came to."""
    import torch

    from fastpo import algorithms
    from fastpo.cli import main
    from fastpo.training import denoising_task, task

    torch.set_num_threads(1)
    built = denoising_task if algorithms.denoises(name) else task
    fitted = folder / f"{built.__name__}-{seed}"
    if not fitted.exists():
        built.build(fitted, seed, lambda *_: None)
    built.build = lambda to, *_: shutil.copytree(fitted, to, dirs_exist_ok=True)  # type: ignore[assignment]
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    if main(["train", name, "--preset", "ci", "--output", str(run), "--seed", str(seed)]):
        raise SystemExit(1)
    found = json.loads((run / "summary.json").read_text())
    found["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT", json.dumps(found))


def row(name: str, found: list[dict[str, float]]) -> str:
    """Of the table: medians over the seeds."""

    def middle(key: str, form: str) -> str:
        values = [each[key] for each in found if key in each]
        return format(statistics.median(values), form) if values else "-"

    # reward models rank, and write nothing
    what = "accuracy" if "accuracy_after" in found[0] else "reward_accuracy"
    shown = [middle(f"{what}_before", ".2f"), middle(f"{what}_after", ".2f"), middle("kl", ".2f")]
    return f"| `{name}` | " + " | ".join([*shown, middle("tokens_per_second", ",.0f"), middle("bytes", ".2e")]) + " |"


def main() -> None:
    from fastpo import algorithms

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "training" / "methods.md")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, seed, folder = given.child
        return child(name, int(seed), Path(folder))
    lines = [*HEAD, "| method | before | after | KL, nats | tokens/s | peak, bytes |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names or algorithms.names():
            found = []
            for seed in range(given.seeds):
                command = [sys.executable, __file__, "--child", name, str(seed), folder]
                done = subprocess.run(command, capture_output=True, text=True)
                results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not results:
                    print(f"{name}: {done.stderr[-2000:]}", file=sys.stderr)
                    continue
                found.append(json.loads(results[-1].removeprefix("RESULT ")))
            if found:
                lines.append(row(name, found))
                print(lines[-1], flush=True)
    given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
