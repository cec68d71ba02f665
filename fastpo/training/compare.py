"""Runs side by side: where their configurations differ, how they ended, and their curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastpo.training.errors import UserError
from fastpo.training.report import Record, plot_runs, read_records, summary
from fastpo.training.run import CONFIG, METRICS, SUMMARY


def compare(folders: Sequence[str], output: Path) -> None:
    """Print two or more runs as the columns of two tables, and write their curves as a PNG.

    A run that is not at its end is summed up as far as it went.

    Raises:
        UserError: a folder holds no run, or is named twice.
    """
    from rich.console import Console
    from rich.table import Table

    if len(folders) < 2:
        raise UserError("compare needs two runs or more")
    runs = {folder: _read(Path(folder)) for folder in folders}
    if len(runs) < len(folders):
        raise UserError(f"compare: {next(f for f in folders if folders.count(f) > 1)} is named twice")
    console = Console(highlight=False)
    for title, tables in (
        ("configuration, where it differs", differences([_flat(config) for config, _, _ in runs.values()])),
        ("summary", rows([found for _, found, _ in runs.values()])),
    ):
        table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        table.add_column("")
        for folder in runs:
            table.add_column(folder, justify="right", overflow="fold")
        for name, values in tables.items():
            table.add_row(name, *map(_shown, values))
        console.print(table)
    if not any(records for *_, records in runs.values()):
        raise UserError("compare: none of the runs has done a step")
    plot_runs({folder: records for folder, (*_, records) in runs.items()}, output)
    console.print(f"\ncurves  {output}", markup=False)


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The options that do not have one value in all configurations, with their values; None where there is none."""
    return {name: values for name, values in rows(configs).items() if any(v != values[0] for v in values)}


def rows(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of each name, in the order in which the names come up; None where there is none."""
    return {name: [column.get(name) for column in columns] for name in dict.fromkeys(n for c in columns for n in c)}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[Record]]:
    """Configuration, summary and records of a run."""
    for file in (CONFIG, METRICS):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: there is no run in this folder ({file} is missing)")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
        ended = json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).is_file() else {}
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{folder}: {CONFIG} or {SUMMARY} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder}: {CONFIG} holds no options")
    records = read_records(folder / METRICS)
    done = max((int(r["step"]) for r in records), default=0)
    if ended.get("steps") != done:
        ended = {"steps": done, **(summary(records) if done else {})}
    return config, ended, records


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options as they are called on the command line."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
