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
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FORKED = multiprocessing.get_context("forkserver")
KEPT = (
    "accuracy_before",
    "accuracy_after",
    "reward_accuracy_before",
    "reward_accuracy_after",
    "kl",
    "tokens_per_second",
)


def fitted(name: str, seed: int, folder: Path) -> tuple[Any, Path]:
    """The task of a method, and the folder of its reference, which is fitted if it is not there."""
    from fastpo import algorithms
    from fastpo.training import denoising_task, task

    built = denoising_task if algorithms.denoises(name) else task
    reference = folder / f"{built.__name__}-{seed}"
    if not reference.exists():
        built.build(reference, seed, lambda *_: None)
    return built, reference


def trained(name: str, seed: int, folder: Path) -> dict[str, float]:
    """The numbers of one run."""
    from fastpo.cli import main

    built, reference = fitted(name, seed, folder)
    built.build = lambda to, *_: shutil.copytree(reference, to, dirs_exist_ok=True)
    run = folder / f"{name}-{seed}"
    if main(["train", name, "--preset", "ci", "--output", str(run), "--seed", str(seed)]):
        raise SystemExit(1)
    found = json.loads((run / "summary.json").read_text())
    shutil.rmtree(run)
    # in kilobytes, on macOS in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {key: found[key] for key in KEPT if key in found} | {"bytes": peak}


def child(work: Callable[[str, int, Path], Any], name: str, seed: int, folder: Path, log: Path, result: Any) -> None:
    """Works with one thread, and without a word to the terminal."""
    import torch

    torch.set_num_threads(1)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        found = work(name, seed, folder)
    result.send(None if work is fitted else found)


def worked(work: Callable[[str, int, Path], Any], name: str, seed: int, folder: Path) -> Any:
    """What work came to in a process of its own, which begins with torch and transformers imported.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    log = folder / f"{name}-{seed}.log"
    receiver, sender = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=child, args=(work, name, seed, folder, log, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{name} failed: {log.read_text()[-2000:] if log.exists() else 'it was killed'}") from None
    finally:
        process.join()


def fit_references(names: Sequence[str], seeds: int, folder: Path) -> None:
    """Before any run, so that those side by side do not both do it."""
    from fastpo import algorithms

    # a method for each of the tasks
    for name in {algorithms.denoises(name): name for name in names}.values():
        for seed in range(seeds):
            worked(fitted, name, seed, folder)


def measured(name: str, seeds: int, folder: Path) -> dict[str, float] | None:
    """Medians over the seeds; None if a run failed, which is said."""
    try:
        found = [worked(trained, name, seed, folder) for seed in range(seeds)]
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return None
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods, by default all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--rest", action="store_true", help="keep what methods.json has, and run what is missing")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of methods.json")
    given = parser.parse_args(arguments)
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
    FORKED.set_forkserver_preload(["torch", "transformers", "fastpo.cli", "fastpo.training.run"])
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
