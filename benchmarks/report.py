"""The standard cases over fresh processes, as a table, JSON and plots, and the targets.

Each kernel has a file of its own in the folder of results, written as soon as it is measured. --quick runs two
processes and leaves out the objective at a million pairs. --sweep instead measures how
a kernel and its peers grow, `linear_logprobs` with the vocabulary and the rows, `cauchy` and `vandermonde` with the
state and the length: one call of each after another one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cases import GROUPS, ONLY, OVERALL, REPETITIONS, SWEEPS, TARGETS, Sweep

from fastpo.bench import (
    CheckFailedError,
    ObjectiveCase,
    environment,
    measure_in_processes,
    summarise,
    table,
)
from fastpo.bench.harness import OWN
from fastpo.bench.processes import LEGEND, columns, heading

HERE = Path(__file__).parent
COLOURS = {
    "eager": "tab:gray",
    "compile": "tab:orange",
    "trl": "tab:blue",
    "fastpo": "tab:green",
    "fastpo_float32": "tab:olive",
    "fastpo_kept": "yellowgreen",
    "core": "tab:purple",
    "core_chunked": "tab:pink",
    "core_gathered": "mediumpurple",
    "trl_gathered": "lightskyblue",
    "cce": "teal",
    "liger": "tab:brown",
    "torchrl": "tab:cyan",
    "loop": "lightgray",
    "pykeops": "tab:red",
}
# what a provider may take in a sweep: bytes beside its results, seconds of a call
MOST_BYTES, MOST_SECONDS = 4e9, 15.0


def commit() -> str | None:
    """The commit of the checkout, with -dirty if files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def check_targets(summaries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Asked against measured; `met` is None where nothing was measured."""
    rows = []
    for target in TARGETS:
        summary = summaries.get(target.case.name)
        value = target.measured(summary) if summary else None
        rows.append(
            {
                "case": target.case.name,
                "asked": target.asked,
                "what": target.text,
                "at_least": target.kind == "speed",
                "measured": value and {key: value[key] for key in ("median", "min", "max")},
                "met": value and target.met(value["median"]),
            }
        )
    for overall in OVERALL:
        value = overall.measured(summaries)
        rows.append(
            {
                "case": overall.what,
                "asked": overall.asked,
                "what": "geometric mean of speed over eager" + (f", min: {value['worst']}" if value else ""),
                "at_least": True,
                "measured": value and {key: value[key] for key in ("median", "min", "max")},
                "met": value and value["median"] >= overall.asked,
            }
        )
    return rows


def targets_table(rows: list[dict[str, Any]]) -> str:
    """The targets as text."""
    cells = []
    for row in rows:
        what, value = f"{row['case']}: {row['what']}", row["measured"]
        asked = f"{'>=' if row['at_least'] else '<='} {row['asked']:g}"
        if value is None:
            cells.append([what, asked, "-", "-", "not measured"])
        else:
            between = f"{value['min']:.2f} .. {value['max']:.2f}"
            cells.append([what, asked, f"{value['median']:.2f}", between, "met" if row["met"] else "MISSED"])
    return columns(["Targets", "asked", "measured", "min .. max", ""], cells)


def plot(kernel: str, summaries: list[dict[str, Any]], where: dict[str, Any], folder: Path) -> Path:
    """Speed over each provider with its spread and, on the right, peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most = max(sum(r["status"] == "ok" for r in s["providers"].values()) for s in summaries)
    height = max(1.1, 0.22 * most) * len(summaries)
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(13, 1.2 + height), sharey=True, layout="constrained")
    bars: dict[str, Any] = {}
    for position, summary in enumerate(summaries):
        rows = {name: r for name, r in summary["providers"].items() if r["status"] == "ok"}
        height = 0.8 / len(rows)
        for i, (name, row) in enumerate(rows.items()):
            y = position + (i - (len(rows) - 1) / 2) * height
            style: dict[str, Any] = {"height": 0.9 * height, "color": COLOURS[name]}
            # without a mark of peak memory the bar is empty, and the legend still needs it
            bars[row["label"]] = memory.barh(y, (row["peak_bytes"] or 0) / 1e6, **style)
            if name == "fastpo":
                continue
            s = row["speed"]
            error = [[s["median"] - s["min"]], [s["max"] - s["median"]]]
            speed.barh(y, s["median"], xerr=error, **style)
            speed.annotate(
                f"{s['median']:.1f}x",
                (s["max"], y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    speed.axvline(1, color="black", linewidth=0.8)
    speed.set_xscale("log")
    speed.xaxis.set_major_formatter("{x:g}x")
    speed.set_xlabel(f"fastpo is x times as fast (median and range of {summaries[0]['processes']} processes)")
    speed.set_yticks(range(len(summaries)), [s["case"].replace(", ", "\n") for s in summaries], fontsize=8)
    speed.invert_yaxis()
    speed.margins(x=0.15)
    memory.set_xlabel("peak memory of one call, MB")
    figure.legend(list(bars.values()), list(bars), loc="outside lower center", ncols=min(len(bars), 5), fontsize=8)
    figure.suptitle(
        f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, fastpo {where['fastpo_kernels']}",
        fontsize=9,
    )
    path = folder / f"{kernel}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def extra_bytes(row: dict[str, Any]) -> float | None:
    """Peak memory beside the results."""
    return None if row.get("peak_bytes") is None else max(0, row["peak_bytes"] - row["result_bytes"])


def too_much(row: dict[str, Any], times: float) -> str | None:
    """Why a provider is left out of a case with so many times the work of one in which it was measured."""
    seconds, extra = times * row["seconds"]["median"], times * (extra_bytes(row) or 0)
    if extra > MOST_BYTES:
        return f"would take about {extra / 1e9:.3g} GB"
    return f"a call would take about {seconds:.0f} s" if seconds > MOST_SECONDS else None


def sweep(swept: Sweep) -> list[dict[str, Any]]:
    """Measures the cases, each provider as long as it would not take too much, and prints them."""
    found: list[dict[str, Any]] = []
    last: dict[str, tuple[int, dict[str, Any]]] = {}
    for case in swept.cases:
        work = swept.work_of(case)
        reasons = {name: too_much(row, work / before) for name, (before, row) in last.items() if name != OWN}
        skip = {name: reason for name, reason in reasons.items() if reason}
        (runs,) = measure_in_processes([case], 1, only=swept.providers, repetitions=0, skip=skip)
        summary = summarise(runs)
        found.append({**summary, **{name: getattr(case, name) for name in (swept.over, swept.across)}})
        last |= {name: (work, row) for name, row in summary["providers"].items() if "seconds" in row}
        print(table(summary), end="\n\n", flush=True)
    return found


def plot_sweep(swept: Sweep, summaries: list[dict[str, Any]], where: dict[str, Any], path: Path) -> Path:
    """Memory and time over one number of the cases, a column per value of the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = list(dict.fromkeys(s[swept.across] for s in summaries))
    figure, axes = plt.subplots(
        2, len(values), figsize=(13, 7), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    lines: dict[str, Any] = {}
    for column, value in enumerate(values):
        chosen = [s for s in summaries if s[swept.across] == value]
        for name in (OWN, "eager", *swept.providers):
            rows = [(s[swept.over], s["providers"][name]) for s in chosen if "seconds" in s["providers"].get(name, {})]
            style: dict[str, Any] = {"color": COLOURS[name], "marker": "o", "linestyle": "-"}
            # the mark of peak memory is good to a megabyte
            memory = [(n, max(extra_bytes(r) or 0, 1e6) / 1e6) for n, r in rows]
            times = [(n, r["seconds"]["median"]) for n, r in rows]
            for axis, points in zip(axes[:, column], (memory, times), strict=True):
                (line,) = axis.plot(*zip(*points, strict=True), **style) if points else (None,)
                if line is not None:
                    lines.setdefault(rows[0][1]["label"], line)
        axes[0, column].set_title(f"{swept.across} {value}", fontsize=9)
        axes[1, column].set_xlabel(swept.over)
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("peak memory beside the gradients, MB")
    axes[1, 0].set_ylabel("seconds, forward + backward")
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(
        f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, fastpo {where['fastpo_kernels']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def save(path: Path, contents: dict[str, Any]) -> Path:
    path.write_text(json.dumps(contents, indent=2) + "\n")
    return path


def written(*paths: Path) -> None:
    print("\nwritten:", *[p.relative_to(Path.cwd()) if p.is_relative_to(Path.cwd()) else p for p in paths])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two processes, without the largest objective")
    parser.add_argument("--processes", type=int, help="fresh processes of a kernel (default: 3, of --quick 2)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="KERNEL", help=f"of: {', '.join(GROUPS)}")
    names = ", ".join(SWEEPS)
    text = f"how a kernel grows, instead, of: {names}"
    parser.add_argument("--sweep", nargs="?", const="linear_logprobs", choices=SWEEPS, metavar="KERNEL", help=text)
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the JSON and plots")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    where = {**environment(), "git_commit": commit()}
    print(heading(where), end="\n\n", flush=True)
    if args.sweep:
        try:
            swept = sweep(SWEEPS[args.sweep])
        except CheckFailedError as error:
            print(f"{error}; nothing is reported", file=sys.stderr)
            return 1
        name = "sweep" if args.sweep == "linear_logprobs" else f"sweep_{args.sweep}"
        numbers = save(args.output / f"{name}.json", {"environment": where, "cases": swept})
        written(numbers, plot_sweep(SWEEPS[args.sweep], swept, where, args.output / f"{name}.png"))
        return 0
    summaries: dict[str, dict[str, Any]] = {}
    pictures = []
    for kernel, cases in GROUPS.items():
        if args.only and kernel not in args.only:
            continue
        if args.quick:
            cases = tuple(c for c in cases if not (isinstance(c, ObjectiveCase) and c.pairs > 100_000))
        try:
            processes = args.processes or (2 if args.quick else 3)
            measured = measure_in_processes(cases, processes, only=ONLY.get(kernel), repetitions=REPETITIONS[kernel])
        except CheckFailedError as error:
            print(f"{error}; nothing is reported", file=sys.stderr)
            return 1
        group = [summarise(runs) for runs in measured]
        contents = {"environment": {**environment(), "git_commit": where["git_commit"]}, "cases": group}
        written(save(args.output / f"{kernel}.json", contents))
        summaries |= {summary["case"]: summary for summary in group}
        # those of many cases are summed up by the targets
        if kernel != "formulas":
            for summary in group:
                print(table(summary), end="\n\n", flush=True)
            pictures.append(plot(kernel, group, where, args.output))
    targets = check_targets(summaries)
    print(LEGEND, targets_table(targets), sep="\n\n")
    written(*pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
