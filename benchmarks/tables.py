"""`make tables`: the tables of README.md and docs/ that show benchmarks, from the JSON files of benchmarks/results.

    python benchmarks/tables.py [--check] [--results FOLDER] [--output FOLDER]

What stands on a page between `<!-- benchmark: NAME -->` and `<!-- end of benchmark -->` is written here and never by
hand; NAME is one of BLOCKS. --check writes nothing, and ends with 1 if a page is not what the results make of it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cases import BACKWARD, CAUCHY, DPO, GROUPS, HALF, POLICY, SWEEPS, VANDERMONDE
from report import check_targets, extra_bytes
from s4_generation import AT
from s4_generation import LABELS as WAYS

from fastpo.bench.harness import BASELINE, OWN
from fastpo.bench.processes import spread

HERE = Path(__file__).parent
ROOT = HERE.parent
NOT_MEASURED = "Not measured."
BLOCK = re.compile(r"^<!-- benchmark: (.+?) -->\n(.*?)^<!-- end of benchmark -->$", re.MULTILINE | re.DOTALL)
# cases of the README, beside the formulas and the trainers
HEADLINES = {
    "token_logprobs": (BACKWARD,),
    "linear_dpo": (DPO,),
    "linear_logprobs": (HALF,),
    "policy": (POLICY[1],),
    "state_space": (CAUCHY[1], VANDERMONDE[1]),
}
# the file of a sweep, by its kernel
SWEPT = {kernel: "sweep" if kernel == "linear_logprobs" else f"sweep_{kernel}" for kernel in SWEEPS}


@dataclass(frozen=True)
class Results:
    """What was measured, for one page: `link` leads from it to the folder's pictures."""

    folder: Path
    link: str = "results"

    def read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def cases(self, name: str) -> list[dict[str, Any]]:
        return (self.read(name) or {"cases": []})["cases"]

    def picture(self, name: str, text: str) -> list[str]:
        """The lines that show it, none if there is no such file."""
        return ["", f"![{text}]({self.link}/{name}.png)"] if (self.folder / f"{name}.png").is_file() else []


def cell(text: str) -> str:
    """The first line of a text, so that a table survives it."""
    first = text.strip().splitlines()[0] if text.strip() else ""
    return textwrap.shorten(first, 120).replace("|", "\\|")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def number(value: float) -> str:
    """About three digits of a ratio."""
    return f"{value:,.{0 if value >= 9.95 else 1 if value >= 1.995 else 2}f}"


def ratio(found: dict[str, float], unit: str = "x") -> str:
    """The median, and the range if there is one."""
    middle = number(found["median"]) + unit
    return middle if found["min"] == found["max"] else f"{middle} ({number(found['min'])} .. {number(found['max'])})"


def seconds(value: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def size(count: float) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    # the mark of peak memory is good to a megabyte
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else "under 1 MB"


def between(values: set[Any]) -> str:
    return " to ".join(map(str, dict.fromkeys((min(values), max(values)))))


def processes(report: dict[str, Any]) -> set[int]:
    """In how many fresh processes it was measured; empty where the file does not say."""
    if "trainers" in report:
        return {len(runs) for trainers in report["trainers"].values() for runs in trainers.values()}
    return {case["processes"] for case in report.get("cases", [])}


def measured_on(*reports: dict[str, Any]) -> list[str]:
    """Machine, processes, date and commit of measurements that are shown together."""
    places = [report["environment"] for report in reports]
    texts = {
        f"{e['cpu']}, {e['cores']} cores, {e['instruction_set']}, torch {e['torch']}"
        + ", plain torch in place of the kernels" * (not e["fastpo_kernels"].startswith("native"))
        for e in places
    }
    counts = set().union(*map(processes, reports))
    commits = list(dict.fromkeys(str(e.get("git_commit") or "unknown") for e in places))
    parts = [
        "; ".join(sorted(texts)),
        *([f"{between(counts)} fresh process{'es' * (counts != {1})}"] if counts else []),
        between({e["date"][:10] for e in places}),
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}",
    ]
    return ["", f"Measured: {'; '.join(parts)}."]


def is_floor(row: dict[str, Any]) -> bool:
    return row["status"] == "floor" or row["label"].startswith("floor: ")


def is_own(name: str) -> bool:
    """fastpo, or it with other options."""
    return name == OWN or name.startswith(f"{OWN}_")


def peers(summary: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Who else was timed in a case, and is no floor."""
    for name, row in summary["providers"].items():
        if "speed" in row and not is_own(name) and not is_floor(row):
            yield name, row


def outcome(name: str, row: dict[str, Any] | None) -> str:
    """What a table says of a provider in a case."""
    if row is None:
        return ""
    if "seconds" not in row:
        return cell(f"{row['status']}: {row['reason']}")
    parts = [seconds(row["seconds"]["median"]) if name == OWN else ratio(row["speed"])]
    parts += [] if row["peak_bytes"] is None else [size(row["peak_bytes"])]
    parts += [f"error {max(row['errors'].values()):.1e}"] if name == OWN and row.get("errors") else []
    return ", ".join(parts)


def over_floor(summary: dict[str, Any]) -> str:
    bar = summary["bar"]
    if not bar:
        return ""
    labels = [summary["providers"][name]["label"].removeprefix("floor: ") for name in bar["floors"]]
    return ratio(bar, "") + " times " + "the longer of " * (len(labels) > 1) + cell(" and ".join(labels))


def group(name: str, results: Results) -> list[str]:
    """All cases of a group and all who were measured in them, the longer of the two downwards."""
    report = results.read(name)
    if not report or not report["cases"]:
        return [NOT_MEASURED]
    cases = report["cases"]
    labels: dict[str, str] = {}
    for case in cases:
        for provider, row in case["providers"].items():
            if not is_floor(row):
                labels.setdefault(provider, cell(row["label"]))
    lines = [["", *(cell(case["case"]) for case in cases)]]
    lines += [
        [label, *(outcome(provider, case["providers"].get(provider)) for case in cases)]
        for provider, label in labels.items()
    ]
    if any(case["bar"] for case in cases):
        lines.append(["ours, over the floor", *map(over_floor, cases)])
    if len(labels) <= len(cases):
        lines = [list(line) for line in zip(*lines, strict=True)]
    return [
        *markdown(lines[0], lines[1:]),
        *measured_on(report),
        *results.picture(name, f"{name}: time over ours, and peak memory"),
    ]


def by_size(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Of the cases of all formulas: size, provider, and the row of each formula."""
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for case in cases:
        match = re.match(r"(.+?) (\d+ pairs(?: x \d+ tokens)?) ", case["case"])
        if match is None:
            raise ValueError(f"{case['case']} names no formula and size")
        for name, row in peers(case):
            found.setdefault(match[2], {}).setdefault(name, {})[match[1]] = row
    return found


def overall(rows: dict[str, dict[str, Any]]) -> tuple[float, str, str]:
    """The geometric mean of the formulas' medians, and the names of the worst and the best."""
    speeds = {formula: row["speed"]["median"] for formula, row in rows.items()}
    mean = math.exp(statistics.fmean(map(math.log, speeds.values())))
    return mean, min(speeds, key=speeds.__getitem__), max(speeds, key=speeds.__getitem__)


def formulas(results: Results) -> list[str]:
    """Every compiled formula on pairs, as one row for each size."""
    report = results.read("formulas")
    if not report or not report["cases"]:
        return [NOT_MEASURED]
    lines = []
    for pairs, providers in by_size(report["cases"]).items():
        for rows in providers.values():
            mean, *ends = overall(rows)
            shown = [f"{ratio(rows[end]['speed'])}, `{end}`" for end in ends]
            lines.append([pairs, str(len(rows)), cell(next(iter(rows.values()))["label"]), f"{number(mean)}x", *shown])
    header = ["pairs", "formulas", "against", "geometric mean", "the worst", "the best"]
    return [*markdown(header, lines), *measured_on(report), *results.picture("formulas", "all formulas")]


def sweep(kernel: str, results: Results) -> list[str]:
    """Who could be measured at how many sizes, how fast, and in what memory."""
    name = SWEPT[kernel]
    report = results.read(name)
    if not report or not report["cases"]:
        return [NOT_MEASURED]
    cases, swept = report["cases"], SWEEPS[kernel]
    found: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        for provider, row in case["providers"].items():
            if not is_floor(row):
                found.setdefault(provider, []).append(row)
    lines = []
    for provider, rows in found.items():
        timed = [row for row in rows if "seconds" in row]
        speeds = [row["speed"]["median"] for row in timed]
        memory = [extra for row in timed for extra in [extra_bytes(row)] if extra is not None]
        left_out = [row["reason"] for row in rows if "seconds" not in row]
        lines.append(
            [
                cell(rows[0]["label"]),
                f"{len(timed)} of {len(cases)}",
                "" if provider == OWN or not speeds else ratio(spread(speeds)),
                size(max(memory)) if memory else "",
                cell(f"{left_out[-1]} at the largest") if left_out else "",
            ]
        )
    ranges = [f"{swept.over} {between({c[swept.over] for c in cases})}", f"{swept.across} {{}}"]
    values = ", ".join(str(value) for value in dict.fromkeys(c[swept.across] for c in cases))
    return [
        f"{kernel}: {ranges[0]}, {ranges[1].format(values)}.",
        "",
        *markdown(["", "sizes measured", "time over ours", "memory beside the results, at most", "left out"], lines),
        *measured_on(report),
        *results.picture(name, f"{kernel}: memory and time over {swept.over} and {swept.across}"),
    ]


def generation(results: Results) -> list[str]:
    report = results.read("s4_generation")
    if not report:
        return [NOT_MEASURED]
    found = report["seconds_per_token"]
    lines = []
    for position, own in found["state"].items():
        shown = [f"{1e3 * own['median']:.3g} ms ({1e3 * own['min']:.3g} .. {1e3 * own['max']:.3g})"]
        for way in list(WAYS)[1:]:
            other = found[way][position]["median"]
            shown.append(f"{1e3 * other:.3g} ms, {number(other / own['median'])}x")
        lines.append([f"{int(position):,}", *shown])
    sizes = {name: f"{count / 1e6:.1f}M" for name, count in report["environment"]["parameters"].items()}
    return [
        f"Time per token at batch 1; {sizes['s4']} parameters, the Llama {sizes['llama']}:",
        "",
        *markdown(["position", *WAYS.values()], lines),
        *measured_on(report),
        *results.picture("s4_generation", "time per token over the position"),
    ]


def trained(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, list[dict[str, float]]], dict[str, float], float]]:
    """Of each algorithm: the runs, TRL's time over ours by pairs of processes, its memory over ours."""
    for algorithm, runs in report["trainers"].items():
        pairs = list(zip(runs["fastpo"], runs["trl"], strict=True))
        times = spread([theirs["seconds"] / ours["seconds"] for ours, theirs in pairs])
        ours, theirs = (statistics.median(run["bytes"] for run in runs[name]) for name in ("fastpo", "trl"))
        yield algorithm, runs, times, theirs / ours


def trainers(results: Results) -> list[str]:
    report = results.read("trainers")
    if not report:
        return [NOT_MEASURED]

    def step(runs: list[dict[str, float]]) -> str:
        taken = spread([run["seconds"] for run in runs])
        memory = size(statistics.median(run["bytes"] for run in runs))
        return f"{taken['median']:.1f} s ({taken['min']:.1f} .. {taken['max']:.1f}), {memory}"

    lines = [
        [f"`{algorithm}`", step(runs["fastpo"]), step(runs["trl"]), ratio(times), f"{number(memory)} times"]
        for algorithm, runs, times, memory in trained(report)
    ]
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in report["settings"].items())
    header = ["a step of", "ours", "TRL's trainer", "its time over ours", "its memory over ours"]
    return [*markdown(header, lines), "", f"Settings: {settings}.", *measured_on(report)]


def targets(results: Results) -> list[str]:
    """What is asked of the kernels, and what was measured."""
    summaries = {case["case"]: case for name in GROUPS for case in results.cases(name)}
    rows = check_targets(summaries) if summaries else []
    lines = []
    for row in rows:
        found = row["measured"]
        said = "not measured" if found is None else "met" if row["met"] else "**MISSED**"
        shown = ratio(found, "") if found else ""
        lines.append(
            [f"{cell(row['case'])}: {row['what']}", f"{'≥≤'[not row['at_least']]} {row['asked']:.3g}", shown, said]
        )
    generated = results.read("s4_generation")
    if generated and "target" in generated:
        target = generated["target"]
        what = f"a token of the S4 model at position {AT:,}: speed over the convolution"
        said = "met" if target["met"] else "**MISSED**"
        lines.append([what, f"≥ {target['asked']:.3g}", number(target["measured"]), said])
    return markdown(["target", "asked", "measured", ""], lines) if lines else [NOT_MEASURED]


@dataclass(frozen=True)
class Comparison:
    """Ours and another in one case: its time over ours, and the memory of both where it is known."""

    case: str
    other: str
    speed: dict[str, float]
    memory: tuple[float | None, float | None] = (None, None)


def comparisons(results: Results) -> Iterator[Comparison]:
    """All that was measured beside another: no floors, and not fastpo with other options."""
    for name in (*GROUPS, *SWEPT.values()):
        for case in results.cases(name):
            for _, row in peers(case):
                memory = (case["providers"][OWN]["peak_bytes"], row["peak_bytes"])
                yield Comparison(case["case"], row["label"], row["speed"], memory)
    if report := results.read("s4_generation"):
        found = report["seconds_per_token"]
        for way, label in list(WAYS.items())[1:]:
            for position, other in found[way].items():
                speed = spread([other["median"] / found["state"][position]["median"]])
                yield Comparison(f"a token of the S4 model at position {int(position):,}", label, speed)
    if report := results.read("trainers"):
        for algorithm, runs, times, _ in trained(report):
            ours, theirs = (statistics.median(run["bytes"] for run in runs[name]) for name in ("fastpo", "trl"))
            yield Comparison(f"a step of `fastpo train {algorithm}`", "TRL's trainer", times, (ours, theirs))


def slower(results: Results) -> list[str]:
    """Where another takes less time than ours."""
    every = list(comparisons(results))
    if not every:
        return [NOT_MEASURED]
    found = [c for c in every if c.speed["median"] < 1]
    first = f"Of {len(every):,} comparisons, ours is the slower one in {len(found):,}."
    if not found:
        return [first]
    lines = []
    for c in sorted(found, key=lambda c: c.speed["median"]):
        taken = {"median": 1 / c.speed["median"], "min": 1 / c.speed["max"], "max": 1 / c.speed["min"]}
        memory = ", ".join(size(count) if count is not None else "?" for count in c.memory)
        known = any(count is not None for count in c.memory)
        lines.append([cell(c.case), cell(c.other), f"{ratio(taken, '')} times its time", memory if known else ""])
    return [first, "", *markdown(["what", "against", "ours takes", "peak memory, ours and its"], lines)]


def headlines(results: Results) -> list[str]:
    """The rows of the README."""
    lines, missing, shown = [], [], []

    def of(row: dict[str, Any]) -> str:
        return f"{number(row['speed']['median'])}x"

    def over(ours: dict[str, Any], row: dict[str, Any]) -> str:
        pairs = zip(ours["seconds_each"], row["seconds_each"], strict=True)
        return f"{number(statistics.median(other / own for own, other in pairs))}x"

    for name, cases in HEADLINES.items():
        found = {case["case"]: case for case in results.cases(name)}
        for case in cases:
            others = dict(peers(found[case.name])) if case.name in found else {}
            if not others:
                missing.append(case.name)
                continue
            shown.append(name)
            eager, compiled = others.pop(BASELINE, None), others.pop("compile", None)
            fastest = min(others.values(), key=lambda row: row["speed"]["median"], default=None)
            # ours with other options, if it was timed
            for own, label in (OWN, ""), (f"{OWN}_kept", ", logits kept"):
                if "seconds" not in (ours := found[case.name]["providers"].get(own, {})):
                    continue
                shown_of = [over(ours, row) if row else "" for row in (eager, compiled, fastest)]
                shown_of[-1] = f"{cell(fastest['label'])}: {shown_of[-1]}" if fastest else ""
                lines.append([cell(case.name) + label, *shown_of])
    sizes = by_size(results.cases("formulas"))
    for pairs in list(dict.fromkeys([*list(sizes)[:1], *list(sizes)[-1:]])):
        if rows := sizes[pairs].get(BASELINE):
            mean, worst, _ = overall(rows)
            what = f"{len(rows)} formulas on {pairs}, geometric mean"
            lines.append([what, f"{number(mean)}x, the worst {of(rows[worst])}", "", ""])
            shown.append("formulas")
    if not sizes:
        missing.append("formulas on pairs")
    if report := results.read("trainers"):
        for algorithm, _, times, memory in trained(report):
            last = f"TRL's trainer: {number(times['median'])}x, with {number(memory)} times the memory"
            lines.append([f"a step of `fastpo train {algorithm}`, {report['settings']['model']}", "", "", last])
        shown.append("trainers")
    else:
        missing.append("whole trainers")
    every = list(comparisons(results))
    if not every:
        return [NOT_MEASURED]
    text = markdown(["", "eager torch", "`torch.compile`", "the fastest of the others"], lines) if lines else []
    if lines:
        text += [*measured_on(*(report for name in dict.fromkeys(shown) if (report := results.read(name)))), ""]
    if missing:
        text += [f"Not measured: {'; '.join(missing)}.", ""]
    worst_of_all = min(every, key=lambda c: c.speed["median"])
    count = sum(c.speed["median"] < 1 for c in every)
    text.append(f"Ours is the slower one in {count:,} of {len(every):,} comparisons, sweeps over sizes included.")
    if count:
        longer = number(1 / worst_of_all.speed["median"])
        text[-1] += f" At worst it takes {longer} times the time of: {worst_of_all.other}, in {worst_of_all.case}."
    picture = results.picture("sweep", "linear_logprobs: memory and time over rows and vocabulary")
    return [*text, *picture]


def methods(results: Results) -> list[str]:
    report = results.read("methods")
    if not report or not report["methods"]:
        return [NOT_MEASURED]
    lines = []
    for name, found in report["methods"].items():
        # reward models rank, and write nothing
        what = "accuracy" if "accuracy_after" in found else "reward_accuracy"
        keys = {f"{what}_before": ".2f", f"{what}_after": ".2f", "kl": ".2f", "tokens_per_second": ",.0f"}
        shown = [format(found[key], form) if found.get(key) is not None else "" for key, form in keys.items()]
        lines.append([f"`{name}`", *shown, size(found["bytes"])])
    seeds = f"{report['seeds']} seed{'s' * (report['seeds'] > 1)}, {report['jobs']} at a time"
    return [
        *markdown(["method", "before", "after", "KL, nats", "tokens/s", "peak memory"], lines),
        *measured_on(report),
        "",
        f"{len(lines)} methods, {seeds}.",
    ]


BLOCKS: dict[str, Callable[[Results], list[str]]] = {
    **{name: partial(group, name) for name in GROUPS if name != "formulas"},
    **{name: partial(sweep, kernel) for kernel, name in SWEPT.items()},
    "formulas": formulas,
    "generation": generation,
    "trainers": trainers,
    "targets": targets,
    "slower": slower,
    "headlines": headlines,
    "methods": methods,
}


def rewritten(text: str, results: Results) -> str:
    """A page with its blocks made anew.

    Raises:
        ValueError: a block is not closed, or is none of BLOCKS.
    """

    def made(match: re.Match[str]) -> str:
        if match[1] not in BLOCKS:
            raise ValueError(f"no benchmark is named {match[1]}; there are {', '.join(BLOCKS)}")
        lines = "\n".join(BLOCKS[match[1]](results))
        return f"<!-- benchmark: {match[1]} -->\n\n{lines}\n\n<!-- end of benchmark -->"

    if text.count("<!-- benchmark:") != len(BLOCK.findall(text)) or any(
        "<!-- benchmark:" in match[2] for match in BLOCK.finditer(text)
    ):
        raise ValueError("a benchmark's block is not closed by <!-- end of benchmark -->")
    return BLOCK.sub(made, text)


def pages(root: Path, folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Of each page with blocks: its path from the root, its text, and the text that it should have."""
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        text = path.read_text()
        if "<!-- benchmark:" not in text:
            continue
        relative = path.relative_to(root)
        # docs/generate.py makes the pictures files of the site
        link = "benchmarks/results" if relative.parts[0] != "docs" else "../" * (len(relative.parts) - 2) + "results"
        try:
            yield relative, text, rewritten(text, Results(folder, link))
        except ValueError as error:
            raise ValueError(f"{relative}: {error}") from None


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a page is stale")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON and the pictures")
    parser.add_argument("--output", type=Path, help="folder for copies of the pages, which are else written in place")
    given = parser.parse_args(arguments)
    stale = 0
    for path, before, after in pages(root, given.results):
        if given.check:
            if before != after:
                stale += 1
                print(f"{path} is not what the results make of it: make tables", file=sys.stderr)
        elif given.output or before != after:
            to = (given.output or root) / path
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(after)
            print(f"written: {path}")
    return min(stale, 1)


if __name__ == "__main__":
    sys.exit(main())
