"""What a run shows people: a progress bar, and then metrics.jsonl, curve.png and summary.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastpo.training.errors import UserError

Record = dict[str, float]

# panels of the figure: label of the axis, metrics in it
PANELS = (
    ("loss", ("loss", "eval_loss")),
    ("reward", ("reward", "eval_reward")),
    ("implicit reward", ("chosen_reward", "rejected_reward", "reward_margin", "eval_reward_margin")),
    ("share", ("reward_accuracy", "eval_reward_accuracy", "eval_accuracy")),
    ("KL to the reference, nats", ("kl", "eval_kl")),
    ("entropy, nats", ("entropy",)),
    ("share of clipped tokens", ("clip_fraction_high", "clip_fraction_low")),
    ("tokens of a completion", ("length", "eval_length")),
)
COLUMNS = 4
# what fits beside a bar on 80 columns, and what a line per evaluation holds
BESIDE_BAR = {"loss": "loss", "reward": "reward", "reward_margin": "margin", "eval_kl": "KL"}
SHOWN = (
    *("loss", "reward", "reward_margin", "reward_accuracy"),
    *("eval_loss", "eval_reward", "eval_reward_margin", "eval_reward_accuracy", "eval_accuracy", "eval_kl"),
)


class Journal:
    """metrics.jsonl: one record per step, and the evaluation before training as step 0."""

    def __init__(self, path: Path, done: int | None) -> None:
        """Continue after `done` steps, dropping what was written later; None begins anew."""
        self.path = path
        self.records: list[Record] = []
        if done is not None:
            self.records = [r for r in read_records(path) if r["step"] <= done]
        replace_text(path, "".join(json.dumps(r) + "\n" for r in self.records))

    def add(self, step: int, metrics: Record) -> None:
        """Write one record at once, so that a killed run leaves all it knew."""
        self.records.append({"step": step, **metrics})
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[-1]) + "\n")


def read_records(path: Path) -> list[Record]:
    """The records of a journal, without a last line that was not finished.

    Raises:
        UserError: there is no such file, or it is damaged before its last line.
    """
    try:
        lines = path.read_text().split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    out: list[Record] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            out.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is not JSON") from error
    return out


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is at every moment the old one or the new one."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text)
    os.replace(partial, path)


def summary(records: Sequence[Record]) -> dict[str, float]:
    """First and last values of what was evaluated, and of the training metrics over a tenth of the steps.

    Of the padding, the mean of all steps.
    """
    steps = [r for r in records if r["step"] > 0]
    evaluated = [r for r in records if any(key.startswith("eval_") for key in r)]
    out: dict[str, float] = {}
    if evaluated:
        for key in (k for k in evaluated[0] if k.startswith("eval_")):
            name = key.removeprefix("eval_")
            out |= {f"{name}_before": evaluated[0][key], f"{name}_after": evaluated[-1][key]}
    if "kl_after" in out:
        out["kl"] = out["kl_after"]
    few = max(1, len(steps) // 10)
    for key in ("loss", "reward", "reward_margin", "reward_accuracy", "entropy", "length"):
        values = [r[key] for r in steps if key in r]
        if values:
            ends = values[:few], values[-few:]
            out |= {f"{key}_{when}": sum(v) / len(v) for when, v in zip(("first", "last"), ends, strict=True)}
    padding = [r["padding"] for r in steps if "padding" in r]
    if padding:
        out["padding"] = sum(padding) / len(padding)
    out["tokens_per_second"] = sum(r["tokens"] for r in steps) / max(sum(r["seconds"] for r in steps), 1e-9)
    return out


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """The curves of a run as a PNG, those that belong together in one panel."""
    panels = [(label, {key.replace("_", " "): curve(records, key) for key in keys}) for label, keys in PANELS]
    _figure(panels, path, title)


def plot_runs(runs: Mapping[str, Sequence[Record]], path: Path) -> None:
    """The curves of several runs as a PNG, a panel for each metric."""
    panels = [
        (key.replace("_", " "), {name: curve(records, key) for name, records in runs.items()})
        for _, keys in PANELS
        for key in keys
    ]
    _figure(panels, path, None)


def curve(records: Sequence[Record], key: str) -> list[tuple[float, float]]:
    """The steps at which a metric was taken, and its values."""
    return [(r["step"], r[key]) for r in records if key in r]


def _figure(
    panels: Sequence[tuple[str, Mapping[str, list[tuple[float, float]]]]], path: Path, title: str | None
) -> None:
    """Panels in rows, of those that have points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(label, lines) for label, lines in panels if any(lines.values())]
    columns, rows = min(COLUMNS, len(panels)), -(-len(panels) // COLUMNS)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (label, lines) in zip(axes.flat, panels, strict=False):
        for number, (name, points) in enumerate(lines.items()):
            if not points:
                continue
            # evaluations are far apart
            marker = "o" if len(points) < 50 else None
            # a run has one colour, also where another has no curve
            axis.plot(*zip(*points, strict=True), label=name, marker=marker, ms=3, color=f"C{number}")
        axis.set(xlabel="step", ylabel=label)
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


class Display:
    """Progress on the terminal; without a terminal, one line per evaluation. Only the first rank speaks."""

    def __init__(self, enabled: bool) -> None:
        from rich.console import Console

        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Any]:
        """A progress bar; yields what takes (done, metrics)."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
        )
        latest: Record = {}
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(label, total=total, completed=done, metrics="")

            def update(done: int, metrics: Record | None = None) -> None:
                latest.update(metrics or {})
                beside = "  ".join(f"{label} {latest[k]:.3f}" for k, label in BESIDE_BAR.items() if k in latest)
                progress.update(task, completed=done, metrics=beside)
                if metrics and any(key.startswith("eval_") for key in metrics):
                    line = "  ".join(f"{k.replace('_', ' ')} {latest[k]:.3f}" for k in SHOWN if k in latest)
                    self.say(f"step {done:>4}  {line}")

            yield update


def write_summary(path: Path, values: dict[str, Any]) -> None:
    """summary.json."""
    path.write_text(json.dumps(values, indent=2) + "\n")
