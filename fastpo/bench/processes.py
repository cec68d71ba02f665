"""A benchmark over several fresh processes: running them, summarising, and printing."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from typing import Any

import torch

from fastpo._info import processor
from fastpo.bench.harness import OWN, Case, Measurement, Outcome, measure
from fastpo.kernels import _native


def _measure_all(
    cases: Sequence[Case], only: Collection[str] | None, repetitions: int, skip: Mapping[str, str] | None
) -> list[Measurement]:
    return [measure(case, only=only, repetitions=repetitions, skip=skip) for case in cases]


def measure_in_processes(
    cases: Sequence[Case],
    processes: int,
    *,
    only: Collection[str] | None = None,
    repetitions: int = 9,
    skip: Mapping[str, str] | None = None,
) -> list[list[Measurement]]:
    """Measure the cases in `processes` fresh processes, one after the other; with one, in this process.

    Returns:
        per case, the measurements of the processes.

    Raises:
        CheckFailedError: fastpo's own result is wrong in a case.
    """
    if processes == 1:
        return [[m] for m in _measure_all(cases, only, repetitions, skip)]
    found = []
    for number in range(1, processes + 1):
        names = f"{len(cases)} cases" if len(cases) > 1 else cases[0].name
        print(f"process {number} of {processes}: {names}", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(_measure_all, cases, only, repetitions, skip).result())
    return [list(runs) for runs in zip(*found, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """One case over its processes, ready for JSON.

    A provider's "speed" is how many times as fast as it fastpo is: its median time over fastpo's, taken per
    process, then the median over processes; "seconds_each" has the processes' times for other ratios. The case's
    "bar" is fastpo's time over that of the slowest floor named in the case, the same way. A provider that failed in
    any process has neither times nor ratios.
    """
    first = measurements[0]
    runs = [m.outcomes for m in measurements]
    providers: dict[str, Any] = {}
    for name in first.outcomes:
        outcomes = [run[name] for run in runs]
        worst = next((o for o in outcomes if o.status in ("failed", "skipped")), outcomes[0])
        row = providers[name] = {"label": worst.label, "status": worst.status, "reason": worst.reason}
        if all(o.errors for o in outcomes):
            row["errors"] = {key: max(o.errors[key] for o in outcomes) for key in outcomes[0].errors}
        if worst.status not in ("ok", "floor"):
            continue
        row["seconds_each"] = [_seconds(run, name) for run in runs]
        row["seconds"] = spread(row["seconds_each"])
        row["gb_per_s"] = worst.bytes / row["seconds"]["median"] / 1e9
        row["speed"] = spread([_seconds(run, name) / _seconds(run, OWN) for run in runs])
        peaks = [o.peak_bytes for o in outcomes if o.peak_bytes is not None]
        row["peak_bytes"] = statistics.median(peaks) if peaks else None
        row["result_bytes"] = worst.result_bytes
    bar = None
    if first.bar and all(providers.get(name, {}).get("status") == "floor" for name in first.bar):
        ratios = [_seconds(run, OWN) / max(_seconds(run, name) for name in first.bar) for run in runs]
        bar = {"floors": list(first.bar), **spread(ratios)}
    return {"case": first.case, "processes": len(measurements), "providers": providers, "bar": bar}


def _seconds(outcomes: dict[str, Outcome], name: str) -> float:
    seconds = outcomes[name].seconds
    assert seconds is not None
    return seconds


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    speed, peak = row["speed"], row["peak_bytes"]
    return [
        row["label"],
        "" if name == OWN else f"{speed['median']:.2f}x",
        "" if name == OWN else f"{speed['min']:.2f} .. {speed['max']:.2f}",
        f"{row['gb_per_s']:.1f}" if row["gb_per_s"] else "",
        "" if peak is None else f"{peak / 1e6:.0f} MB",
        f"{max(row['errors'].values()):.1e}" if row.get("errors") else "",
    ]


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns of text, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, *rows):
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def table(summary: dict[str, Any]) -> str:
    """A case as text."""
    providers, bar = summary["providers"], summary["bar"]
    header = ["", "fastpo is", "min .. max", "GB/s", "peak memory", "max error"]
    lines = [summary["case"]]
    lines.append(columns(header, [_cells(name, row) for name, row in providers.items() if "seconds" in row]))
    lines += [f"  {r['label']}: {r['status']}, {r['reason']}" for r in providers.values() if r["reason"]]
    if bar:
        floors = " and ".join(providers[name]["label"].removeprefix("floor: ") for name in bar["floors"])
        longer = f"the longer of {floors}" if len(bar["floors"]) > 1 else floors
        lines.append(f"  fastpo takes {bar['median']:.2f} ({bar['min']:.2f} .. {bar['max']:.2f}) times {longer}")
    return "\n".join(lines)


LEGEND = """\
"fastpo is 2x": the provider's time over fastpo's. In a process all take turns and the ratio is that of their
medians; shown are median, min and max of the ratio over fresh processes. GB/s: the inputs once and, with the
backward, their gradients once, over the time. Peak memory: how far one call raises the resident memory, its
result included. Max error: against fp64; of gradients, relative to the magnitudes of their terms."""


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    reason = _native.why_not("objective", torch.device("cpu"))
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "fastpo_kernels": "reference" if reason else f"native, {_native.CPU.text('fastpo_capability')}",
        "fastpo_fallback_reason": reason,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def heading(where: dict[str, Any]) -> str:
    """The environment as text."""
    kernels = where["fastpo_kernels"]
    if where["fastpo_fallback_reason"]:
        kernels += f" (plain torch, not the compiled kernels: {where['fastpo_fallback_reason']})"
    load = "" if where["load"] is None else f" (load {where['load']:.1f})"
    return (
        f"{where['date']}, {where['cpu']}, {where['cores']} cores{load}, {where['threads']} threads, "
        f"{where['instruction_set']}, torch {where['torch']}, fastpo: {kernels}"
    )
