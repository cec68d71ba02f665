"""What a run shows people: a progress bar, and then metrics.jsonl, curve.png and summary.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, float]

# panels of the figure: label of the axis, metrics in it
PANELS = (
    ("loss", ("loss", "eval_loss")),
    ("implicit reward", ("chosen_reward", "rejected_reward", "reward_margin", "eval_reward_margin")),
    ("share", ("reward_accuracy", "eval_reward_accuracy", "eval_accuracy")),
    ("KL to the reference, nats", ("eval_kl",)),
)
# what fits beside a bar on 80 columns, and what a line per evaluation holds
BESIDE_BAR = {"loss": "loss", "reward_margin": "margin", "eval_kl": "KL"}
SHOWN = (
    *("loss", "reward_margin", "reward_accuracy"),
    *("eval_loss", "eval_reward_margin", "eval_reward_accuracy", "eval_accuracy", "eval_kl"),
)


class Journal:
    """metrics.jsonl: one record per step, and the evaluation before training as step 0."""

    def __init__(self, path: Path, done: int | None) -> None:
        """Continue after `done` steps, dropping what was written later; None begins anew."""
        self.path = path
        self.records: list[Record] = []
        if done is not None:
            lines = path.read_text().splitlines()
            self.records = [r for r in map(json.loads, lines) if r["step"] <= done]
        path.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def add(self, step: int, metrics: Record) -> None:
        """Write one record at once, so that a killed run leaves all it knew."""
        self.records.append({"step": step, **metrics})
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[-1]) + "\n")


def summary(records: Sequence[Record]) -> dict[str, float]:
    """First and last values of what was evaluated, and of the training metrics over a tenth of the steps."""
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
    for key in ("loss", "reward_margin", "reward_accuracy"):
        values = [r[key] for r in steps if key in r]
        if values:
            ends = values[:few], values[-few:]
            out |= {f"{key}_{when}": sum(v) / len(v) for when, v in zip(("first", "last"), ends, strict=True)}
    out["tokens_per_second"] = sum(r["tokens"] for r in steps) / max(sum(r["seconds"] for r in steps), 1e-9)
    return out


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """The curves as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    present = {key for record in records for key in record}
    panels = [(label, [k for k in keys if k in present]) for label, keys in PANELS]
    panels = [(label, keys) for label, keys in panels if keys]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (label, keys) in zip(axes[0], panels, strict=True):
        for key in keys:
            points = [(r["step"], r[key]) for r in records if key in r]
            sparse = key.startswith("eval_")
            axis.plot(*zip(*points, strict=True), label=key.replace("_", " "), marker="o" if sparse else None, ms=3)
        axis.set(xlabel="step", ylabel=label)
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
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
