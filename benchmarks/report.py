"""`make bench`: the standard cases over fresh processes, as a table, JSON and plots, and the targets.

--quick runs two processes instead of five and leaves out the objective at a million pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cases import GROUPS, TARGETS

from fastpo.bench import CheckFailedError, ObjectiveCase, environment, measure_in_processes, summarise, table
from fastpo.bench.processes import LEGEND, columns, heading

HERE = Path(__file__).parent
COLOURS = {
    "eager": "tab:gray",
    "compile": "tab:orange",
    "trl": "tab:blue",
    "fastpo": "tab:green",
    "fastpo_float32": "tab:olive",
}


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

    figure, (speed, memory) = plt.subplots(
        1, 2, figsize=(13, 1.2 + 1.1 * len(summaries)), sharey=True, layout="constrained"
    )
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
    figure.legend(list(bars.values()), list(bars), loc="outside lower center", ncols=len(bars), fontsize=8)
    figure.suptitle(
        f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, fastpo {where['fastpo_kernels']}",
        fontsize=9,
    )
    path = folder / f"{kernel}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two processes, without the largest objective")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the JSON and plots")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    where = {**environment(), "git_commit": commit()}
    print(heading(where), end="\n\n", flush=True)
    summaries: dict[str, dict[str, Any]] = {}
    pictures = []
    for kernel, cases in GROUPS.items():
        if args.quick:
            cases = tuple(c for c in cases if not (isinstance(c, ObjectiveCase) and c.pairs > 100_000))
        try:
            measured = measure_in_processes(cases, 2 if args.quick else 5)
        except CheckFailedError as error:
            print(f"{error}; nothing is reported", file=sys.stderr)
            return 1
        group = [summarise(runs) for runs in measured]
        summaries |= {summary["case"]: summary for summary in group}
        for summary in group:
            print(table(summary), end="\n\n", flush=True)
        pictures.append(plot(kernel, group, where, args.output))
    targets = check_targets(summaries)
    print(LEGEND, targets_table(targets), sep="\n\n")
    report = args.output / "report.json"
    contents = {"environment": where, "cases": list(summaries.values()), "targets": targets}
    report.write_text(json.dumps(contents, indent=2) + "\n")
    print(
        "\nwritten:",
        *[path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path for path in (report, *pictures)],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
