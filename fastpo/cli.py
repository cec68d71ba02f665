"""The command line: fastpo train | compare | bench | info | algorithms."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import field, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastpo import algorithms
from fastpo.training import checkpoint
from fastpo.training.config import PRESETS, TrainConfig, built_in_defaults, is_built_in
from fastpo.training.errors import Interrupted, UserError

TRAIN_PACKAGES = ("transformers", "accelerate", "datasets", "jsonargparse", "matplotlib", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 2 for what the user can put right, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="fastpo", description="Preference optimisation with fused kernels.")
    commands = {"train": _train, "compare": _compare, "bench": _bench, "info": _info, "algorithms": _algorithms}
    parser.add_argument("command", choices=commands, help="what to do; fastpo COMMAND --help says more")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    try:
        given = parser.parse_args(argv)
        return commands[given.command](given.rest)
    except UserError as error:
        return _fail(str(error), 2)
    except Interrupted as stop:
        return _fail(str(stop), 130)
    except KeyboardInterrupt:
        return _fail("interrupted; --resume continues from the last checkpoint, if there is one", 130)


def _fail(message: str, code: int) -> int:
    """One line on stderr, from the first of several processes; torchrun gets those of all, and repeats them.

    Another process may fail so much sooner that torchrun ends the first before it has spoken.
    """
    message = " ".join(message.split())
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"fastpo: {message}", file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(UserError(message))
    return code


def _need(packages: Iterable[str], extra: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f'{", ".join(missing)} is not installed: pip install "fastpo[{extra}]"')


def _nearest(word: str, words: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(words), 1, cutoff=0.4)
    return f", did you mean {found[0]}?" if found else ""


def _train(argv: list[str]) -> int:
    names = algorithms.names()
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, names))
        print("usage: fastpo train ALGORITHM [options]\n\nalgorithms:")
        print("\n".join(f"  {name:<{width}}  {algorithms.title(name)}" for name in names))
        print("\nfastpo train ALGORITHM --help lists the options; with none it trains on a built-in task.")
        return 0 if argv else 2
    name, *rest = algorithms.ALIASES.get(argv[0], argv[0]), *argv[1:]
    if name not in names:
        raise UserError(f"there is no algorithm {name!r}{_nearest(name, names)} (there are: {', '.join(names)})")
    _need(TRAIN_PACKAGES, "train")
    hyper, config, resume = _parse(name, rest)

    from fastpo.training.run import run

    run(name, hyper, config, resume)
    return 0


def _parser(name: str) -> Any:
    import jsonargparse

    composed = {row.name for row in algorithms.composed()}
    parser = jsonargparse.ArgumentParser(
        prog=f"fastpo train {name}",
        description=f"Train a {'reward' if name in composed else 'causal language'} model: {algorithms.title(name)}.",
        epilog="Defaults of the built-in task: " + ", ".join(f"{k} {v}" for k, v in built_in_defaults(name).items()),
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of options; those on the command line win.")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="Folder of a run to continue with its own options (default: the newest one of this algorithm).",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="Defaults of the built-in task: task, or ci, runs of seconds as the tests have them (default: task).",
    )
    phrases = algorithms.describe(name)
    defaults = algorithms.defaults(name)
    words = {key: Literal[values] for key, values in algorithms.choices(name).items()}
    hyper = make_dataclass(name, [(k, words.get(k, type(v)), field(default=v)) for k, v in defaults.items()])
    arguments = "".join(f"    {k}: {text}.\n" for k, text in phrases.items())
    hyper.__doc__ = f"{algorithms.title(name)}.\n\nArgs:\n{arguments}"
    parser.add_class_arguments(hyper, "algorithm")
    parser.add_class_arguments(TrainConfig)
    return parser


def _parse(name: str, argv: list[str]) -> tuple[dict[str, Any], TrainConfig, Path | None]:
    """Hyper-parameters, configuration and the run to resume, from defaults < YAML < command line."""
    import jsonargparse

    parser = _parser(name)
    try:
        given = parser.parse_args(argv)
        resume = None if given.resume is None else _run_to_resume(name, given.resume)
        if resume is not None:
            # before the options of another algorithm are read
            checkpoint.check_algorithm(checkpoint.latest(resume), name)
            argv = ["--config", str(resume / "config.yaml"), *argv]
        if is_built_in(given.model, given.data):
            parser.set_defaults(PRESETS[given.preset or "task"](name))
        elif given.preset is not None:
            raise UserError("--preset is of the built-in task, which --model and --data replace")
        given = parser.instantiate(parser.parse_args(argv))
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(_tidy(str(error), parser)) from error
    values = vars(given)
    hyper = vars(values.pop("algorithm"))
    for key in ("config", "preset", "resume"):
        values.pop(key)
    return hyper, TrainConfig(**values), resume


def _tidy(message: str, parser: Any) -> str:
    """jsonargparse's message on one line, with the option that was probably meant."""
    found = re.search(r"unrecognized arguments: --([\w.]+)", message)
    found = found or re.search(r"Group '([\w.]+)' does not accept option '(\w+)'", message)
    if found is None:
        return message
    known = (option.lstrip("-") for action in parser._actions for option in action.option_strings)
    return message + _nearest(".".join(found.groups()), known)


def _run_to_resume(name: str, given: str) -> Path:
    if given:
        run = Path(given)
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run}: there is no run in this folder")
        return run
    runs = [path.parent for path in Path("runs").glob(f"{name}*/config.yaml")]
    if not runs:
        raise UserError(f"there is no run of {name} under runs/; --resume RUN names its folder")
    return max(runs, key=lambda run: (run / "config.yaml").stat().st_mtime)


def _compare(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastpo compare", description="Runs side by side: configurations, summaries and curves."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", default="compare.png", help="the figure (default: compare.png)")
    given = parser.parse_args(argv)
    _need(TRAIN_PACKAGES, "train")

    from fastpo.training.compare import compare

    compare(given.runs, Path(given.output))
    return 0


def _bench(argv: list[str]) -> int:
    from fastpo import bench

    return bench.main(argv)


def _info(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastpo info",
        description="What was built, what serves each op, and what is wrong, with the command that mends it.",
        epilog="It ends with 1 where something that is here does not work; what is absent, plain torch serves.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for a bug report")
    given = parser.parse_args(argv)
    import fastpo

    found = fastpo.info()
    print(json.dumps(found.as_dict(), indent=2) if given.json else found)
    return int(found.broken)


def _algorithms(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fastpo algorithms", description="The registry of objectives.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(argv)
    from fastpo.algorithms.given import ROWS
    from fastpo.reference import objectives
    from fastpo.reference.listwise import list_objectives
    from fastpo.reference.policy import policies

    objects = (*objectives(), *algorithms.composed())
    rows = [*map(_row, objects), *map(_policy_row, policies()), *map(_list_row, list_objectives())]
    rows += map(_method_row, ROWS.values())
    trained = [_trained_row(name) for name in algorithms.names()]
    if given.json:
        print(json.dumps({"objectives": rows, "algorithms": trained}, indent=2, ensure_ascii=False))
        return 0
    _need(["rich"], "train")
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "data", "models"):
        table.add_column(column, no_wrap=True)
    for column in ("defaults", "theory", "source"):
        table.add_column(column)
    for row in rows:
        options = [f"{name}={values[0]}" for name, values in row["options"].items()]
        numbers = {name: value for name, value in row["defaults"].items() if name in row["domains"]}
        hyper = [f"{name}={float(value):g} in {row['domains'][name]}" for name, value in numbers.items()]
        hyper += [f"{name}={value!r}" for name, value in row["defaults"].items() if name not in row["domains"]]
        table.add_row(
            row["name"],
            "\n".join([row["data"], *row["columns"]]),
            "\n".join(row["models"]),
            "\n".join([*hyper, *options]),
            row["theory"],
            f"{row['title']}, {row['paper']}, {row['equation']}",
        )
    methods = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("fastpo train", "data", "loss", "method"):
        methods.add_column(column, no_wrap=column == "fastpo train")
    for row in trained:
        methods.add_row(row["name"], row["data"], "\n".join(row["losses"]), row["title"])
    console = Console()
    console.print(table)
    console.print()
    console.print(methods)
    return 0


def _trained_row(name: str) -> dict[str, Any]:
    """What is known of an algorithm: it is a loss of the registry, on its data."""
    return {
        "name": name,
        "title": algorithms.title(name),
        "data": algorithms.kind(name),
        "losses": list(algorithms.losses(name)),
        "defaults": {n: v if v != float("inf") else "inf" for n, v in algorithms.defaults(name).items()},
        "options": {n: list(values) for n, values in algorithms.choices(name).items()},
    }


def _data(row: Any) -> str:
    """The data kind in words."""
    kinds = {"pairwise": "pairs", "unpaired": "single completions", "policy": "samples"}
    return kinds[row.kind] + " of the policy" * row.online


def _row(row: Any) -> dict[str, Any]:
    """What is known of a preference objective."""
    return {
        "name": row.name,
        "title": row.title,
        "kind": row.kind,
        "data": _data(row),
        "columns": [column.name for column in algorithms.columns(row.name)],
        "inputs": {given.name: given.about for given in row.inputs},
        "options": {name: list(values) for name, values in row.options.items()},
        **_common(row),
    }


def _policy_row(row: Any) -> dict[str, Any]:
    """What is known of a policy objective, in the same words."""
    from fastpo.reference.policy import AGGREGATIONS, ESTIMATORS
    from fastpo.reference.registry import NOT_NEGATIVE

    inputs = {"returns" if row.values else "advantages": "constants, one per sequence or per token"}
    options = {"aggregation": [row.aggregation, *(name for name in AGGREGATIONS if name != row.aggregation)]}
    found = _common(row)
    if row.selected:
        inputs["selected"] = row.selected
    if not row.values:
        options["kl"] = list(ESTIMATORS[::-1])
        found["defaults"]["beta"], found["domains"]["beta"] = row.beta, str(NOT_NEGATIVE)
    return {
        "name": row.name,
        "title": row.title,
        "kind": "rollouts",
        "data": "rollouts",
        "columns": [],
        "inputs": inputs,
        "options": options,
        **found,
    }


def _list_row(row: Any) -> dict[str, Any]:
    """What is known of an objective on lists, in the same words."""
    from fastpo.reference.listwise import DISCOUNTS

    options = {"loss": list(row.kinds)} if len(row.kinds) > 1 else {}
    if row.discounts:
        options["discount"] = list(DISCOUNTS)
    return {
        "name": row.name,
        "title": row.title,
        "kind": "lists",
        "data": "lists",
        "columns": [column.name for column in algorithms.columns(row.name)],
        "inputs": {name: row.tensors[name] for name in row.names if name not in row.models},
        "options": options,
        **_common(row),
    }


def _method_row(row: Any) -> dict[str, Any]:
    """What is known of a method on other given data, in the same words."""
    data = {"hindsight": "pairs or lists", "tools": "tool calls"}
    columns = [column.name for column in algorithms.columns(row.name)]
    return {
        "name": row.name,
        "title": row.title,
        "kind": row.kind,
        "data": data.get(row.kind, row.kind),
        # which tokens are key tokens is found by the names of the tools
        "columns": ["tools" if name == "key" else name for name in columns],
        "inputs": dict(row.phrases),
        "options": {name: list(values) for name, values in row.options.items()},
        **_common(row),
    }


def _common(row: Any) -> dict[str, Any]:
    return {
        "paper": row.paper,
        "equation": row.equation,
        "models": list(row.models),
        "theory": row.theory,
        # JSON has no infinity; what has no default must be given
        "defaults": {n: "inf" if v == float("inf") else v for n, v in row.defaults.items() if v is not None},
        "domains": {name: str(domain) for name, domain in row.domains.items()},
        "aliases": dict(row.aliases),
        "description": row.doc,
    }


if __name__ == "__main__":
    sys.exit(main())
