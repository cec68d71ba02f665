"""Every algorithm on the built-in task, from one fitted reference: accuracy, KL, speed and memory, as a JSON.

    python benchmarks/methods.py [NAME ...] [--seeds 3] [--jobs 2] [--rest] [--output benchmarks/results]

Each run is a process of its own with one thread, as `--preset ci` has it; --jobs of them go side by side. Peak memory
is the process's, most of it torch and transformers; masked-diffusion models have a reference of their own. methods.json
is written after every method, and --rest keeps what it has and runs what is missing. `make tables` makes
docs/training/methods.md of it.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEPT = (
    "accuracy_before",
    "accuracy_after",
    "reward_accuracy_before",
    "reward_accuracy_after",
    "kl",
    "tokens_per_second",
    "bytes",
)


def fitted(name: str, seed: int, folder: Path) -> tuple[Any, Path]:
    """The task of a method, and the folder of its reference, which is fitted if it is not there."""
    import torch

    from fastpo import algorithms
    from fastpo.training import denoising_task, task

    torch.set_num_threads(1)
    built = denoising_task if algorithms.denoises(name) else task
    reference = folder / f"{built.__name__}-{seed}"
    if not reference.exists():
        built.build(reference, seed, lambda *_: None)
    return built, reference


def child(name: str, seed: int, folder: Path) -> None:
    """One run; prints what it came to."""
    from fastpo.cli import main

    built, reference = fitted(name, seed, folder)
    built.build = lambda to, *_: shutil.copytree(reference, to, dirs_exist_ok=True)
    run = folder / f"{name}-{seed}"
    if main(["train", name, "--preset", "ci", "--output", str(run), "--seed", str(seed)]):
        raise SystemExit(1)
    found = json.loads((run / "summary.json").read_text())
    shutil.rmtree(run)
    found["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT", json.dumps(found))


def started(what: str, name: str, seed: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process for a fit or a run."""
    return subprocess.run(
        [sys.executable, __file__, what, name, str(seed), str(folder)], capture_output=True, text=True
    )


def fit_references(names: Sequence[str], seeds: int, folder: Path) -> None:
    """Before any run, so that those side by side do not both do it."""
    from fastpo import algorithms

    # a method for each of the tasks
    for name in {algorithms.denoises(name): name for name in names}.values():
        for seed in range(seeds):
            done = started("--fit", name, seed, folder)
            if done.returncode:
                sys.exit(f"the reference of {name} was not fitted:\n{done.stderr[-2000:]}")


def measured(name: str, seeds: int, folder: Path) -> dict[str, float] | None:
    """Medians over the seeds; None if a run failed, which is said."""
    found = []
    for seed in range(seeds):
        done = started("--child", name, seed, folder)
        results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not results:
            print(f"{name} failed: {done.stderr[-2000:]}", file=sys.stderr)
            return None
        found.append(json.loads(results[-1].removeprefix("RESULT ")))
    return {key: statistics.median(each[key] for each in found) for key in KEPT if key in found[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods, by default all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--rest", action="store_true", help="keep what methods.json has, and run what is missing")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of methods.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--fit", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child or given.fit:
        name, seed, where = given.child or given.fit
        (child if given.child else fitted)(name, int(seed), Path(where))
        return 0
    from report import commit

    from fastpo import algorithms
    from fastpo.bench import environment

    path = given.output / "methods.json"
    report: dict[str, Any] = {"environment": {**environment(), "git_commit": commit()}}
    report |= {"seeds": given.seeds, "jobs": given.jobs, "methods": {}}
    if given.rest and path.exists():
        before = json.loads(path.read_text())
        if before["seeds"] != given.seeds:
            parser.error(f"{path} is of {before['seeds']} seeds; the rest must be, too")
        report["methods"] = before["methods"]
        commits = [commit for e in (before, report) for commit in str(e["environment"]["git_commit"]).split(", ")]
        report["environment"]["git_commit"] = ", ".join(dict.fromkeys(commits))
    every = algorithms.names()
    names = [name for name in given.names or every if name not in report["methods"]]
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        fit_references(names, given.seeds, Path(folder))
        pool = ThreadPoolExecutor(given.jobs)
        running = {pool.submit(measured, name, given.seeds, Path(folder)): name for name in names}
        try:
            for done in as_completed(running):
                if found := done.result():
                    report["methods"][running[done]] = found
                    # in the order of the registry, whoever is ready first
                    report["methods"] = {name: report["methods"][name] for name in every if name in report["methods"]}
                    path.write_text(json.dumps(report, indent=2) + "\n")
                    print(f"{running[done]:<32}", *(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
        finally:
            # what is interrupted starts no other
            pool.shutdown(cancel_futures=True)
    return int(any(name not in report["methods"] for name in names))


if __name__ == "__main__":
    sys.exit(main())
