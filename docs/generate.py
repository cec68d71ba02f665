"""What the documentation takes from the code: mkdocs calls these functions (`hooks` in mkdocs.yml).

What may be wrong with an installation is a table of fastpo/_remedies.py.

Written anew at every build: the page of all objectives, from the registry and docs/objectives.yaml; the table of the
gallery, from docs/gallery/runs.json. Figures of benchmarks/results are made files of the site.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
THEORY = {
    "gibbs": "its minimum is known",
    "step": "its exact next policy is known",
    "selfplay": "its fixed point is known",
    "average": "known on average",
    "property": "no theorem; its properties are tested",
}
# where the formulas of a kind of data are held to closed forms
CLOSED_FORMS = {
    "pairs": "tests/losses/test_closed_forms.py",
    "pairs of the policy": "tests/losses/test_closed_forms.py",
    "single completions": "tests/losses/test_closed_forms.py",
    "rollouts": "tests/kernels/test_policy.py",
    "lists": "tests/losses/test_lists.py",
}
LIBRARIES = {"trl": "TRL", "liger": "Liger", "verl": "verl", "openrlhf": "OpenRLHF", "rank_llm": "rank_llm"}


def notes() -> dict[str, dict[str, str]]:
    """What the registry does not know of an objective: the point of its theorem, the test, and who else has it."""
    return yaml.safe_load((ROOT / "docs" / "objectives.yaml").read_text())


def rows() -> list[dict[str, Any]]:
    """The objectives, as `fastpo algorithms --json` prints them."""
    import contextlib
    import io

    from fastpo.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["algorithms", "--json"])
    return json.loads(out.getvalue())["objectives"]


def trained() -> dict[str, list[str]]:
    """By objective, the algorithms of `fastpo train` that have it as their loss."""
    from fastpo import algorithms

    found: dict[str, list[str]] = {}
    for name in algorithms.names():
        for loss in algorithms.losses(name):
            found.setdefault(loss, []).append(name)
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def closed_form(row: Mapping[str, Any]) -> str:
    """The file that has the closed form of a row without a theorem, if it names it."""
    path = CLOSED_FORMS.get(row["data"], "")
    named = path and re.search(rf"\b{row['name']}\b", (ROOT / path).read_text())
    return path if named and row["theory"] == "property" else ""


def _code(text: object) -> str:
    return f"`{text}`"


def _text(description: str) -> str:
    """A docstring's text as Markdown: its symbols are no markup, but what stands between backticks is."""
    parts = description.split("`")
    for i in range(0, len(parts), 2):
        for symbol in "\\*_[]<>":
            parts[i] = parts[i].replace(symbol, f"\\{symbol}" if symbol not in "<>" else f"&{'lg'[symbol == '>']}t;")
    return "`".join(parts)


def _formula(description: str) -> tuple[str, str]:
    """The first sentence of a docstring, which has the formula, and the rest."""
    first, _, rest = description.partition("\n\n")
    return first.strip(), rest.strip()


def _elsewhere(row: Mapping[str, Any], note: Mapping[str, str]) -> str:
    known = [f"{LIBRARIES.get(library, library)}: {name}" for library, name in row["aliases"].items()]
    known += [note["elsewhere"]] if "elsewhere" in note else []
    return _text("; ".join(known)) if known else "none that was looked at"


def _call(function: Any) -> str:
    """How a function is called: its tensors, and of the options those that have no default."""
    tensors, more = [], False
    for given in inspect.signature(function).parameters.values():
        if given.kind is given.VAR_KEYWORD or given.kind is given.VAR_POSITIONAL:
            more = True
        elif given.kind is given.POSITIONAL_OR_KEYWORD or given.default is given.empty:
            tensors.append(given.name if given.default is given.empty else f"{given.name}={given.default}")
        else:
            more = True
    return f"{function.__name__}({', '.join([*tensors, *(['...'] if more else [])])})"


def _public(name: str) -> Any:
    """The function of this name in `fastpo.losses`, if there is one."""
    from fastpo import losses

    value = getattr(losses, name, None) if name in losses.__all__ else None
    return value if inspect.isroutine(value) else None


def objective(row: Mapping[str, Any], note: Mapping[str, str], algorithms: list[str]) -> Iterator[str]:
    """The section of one objective, by lines."""
    formula, rest = _formula(row["description"])
    yield f"### {row['name']} {{ #{row['name']} }}"
    yield ""
    yield f"{_text(row['title'])}: {_text(row['paper'])}, {_text(row['equation'])}."
    yield ""
    yield f"> {_text(formula)}".replace("\n", "\n> ")
    yield ""
    if rest:
        yield _text(rest)
        yield ""
    if function := _public(row["name"]):
        yield f"`{_call(function)}`"
        yield ""
    defaults = [f"`{n}={v}`" + (f" in {row['domains'][n]}" if n in row["domains"] else "") for n, v in _given(row)]
    options = [f"`{n}`: {', '.join(map(_code, values))}" for n, values in row["options"].items()]
    facts = {
        "data": row["data"] + (f", with {', '.join(map(_code, row['columns']))}" if row["columns"] else ""),
        "models": ", ".join(row["models"]),
        "defaults": ", ".join(defaults) or "none",
        "options": "; ".join(options),
        "inputs": "; ".join(f"`{name}`, {_text(about)}" for name, about in row["inputs"].items()),
        "fixed point": _text(note.get("point", THEORY[row["theory"]])),
        "proof": _code(note["test"]) if "test" in note else "",
        "closed form": _code(closed) if (closed := closed_form(row)) and "test" not in note else "",
        "elsewhere": _elsewhere(row, note),
        "trained by": ", ".join(map(_code, algorithms)),
    }
    yield "| | |"
    yield "|---|---|"
    for name, value in facts.items():
        if value:
            yield f"| {name} | {_cell(value)} |"
    yield ""


def _given(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row["defaults"].items():
        yield name, f"{value:g}" if isinstance(value, float) else value


def beside(known: Set[str]) -> Iterator[str]:
    """Functions of `fastpo.losses` that are no row: losses with a signature of their own, and what losses are given."""
    from fastpo import losses

    yield "## Beside the registry"
    yield ""
    yield "Losses whose arguments are of another kind, and functions that make or choose what a loss is given."
    yield ""
    for name in losses.__all__:
        if name in known or not (function := _public(name)):
            continue
        first, _ = _formula(inspect.getdoc(function) or "")
        yield f"### {name} {{ #{name} }}"
        yield ""
        yield f"`{_call(function)}`"
        yield ""
        yield f"> {_text(first)}".replace("\n", "\n> ")
        yield ""
        source = [line for line in (inspect.getdoc(function) or "").splitlines() if line.startswith("Source: ")]
        if source:
            yield _text(source[0])
            yield ""


INTRODUCTION = """\
# All objectives

Written from the registry, from which the functions, their checks, the tests, the benchmarks and the trainer are made
too: {count} objectives over {kinds} kinds of data. `fastpo algorithms` prints the same, with `--json` for programs.

The *fixed point* is the policy to which the objective provably leads, under full expectation on a softmax over single
answers (or a tree of two tokens), with r the reward, ref the reference, c or Z a normaliser and u = π/ref; *proof* is
the test that minimises the objective, compares the policy with it (a total variation below 1e-9 unless the test says
otherwise), and fails for a planted error. Some claims that are often read are false; what stands here is what was
enumerated. *closed form* is the file that holds a formula without a theorem to one. *Elsewhere* says which libraries
have it under which name, as far as they were read (TRL 1.16, Liger 0.8.5, verl of January 2026, OpenRLHF); it is no
list of all.

"""


def objectives_page() -> str:
    """The page of all objectives."""
    known, by_loss, found = notes(), trained(), rows()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(row["data"], []).append(row)
    lines = [INTRODUCTION.format(count=len(found), kinds=len(groups)), "| data | objectives |", "|---|---|"]
    for data, members in groups.items():
        lines.append(f"| {data} | {', '.join('[`{0}`](#{0})'.format(row['name']) for row in members)} |")
    lines.append("")
    for data, members in groups.items():
        lines += [f"## {data[0].upper()}{data[1:]}", ""]
        for row in members:
            lines += objective(row, known.get(row["name"], {}), by_loss.get(row["name"], []))
    lines += beside({row["name"] for row in found})
    return "\n".join(lines)


# what the checks of `fastpo info` would fill into their rows; the command for a checkout is another
REBUILD = "build again, as below"
NVRTC = {"nvrtc": "pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12"}
FOUND = {
    "torch": {"found": "2.9.1", "oldest": "2.10"},
    "not built": {
        "libraries": "_cpu and _host",
        "reason": "not built (no C++ compiler: there is no c++)",
        "compiler": "a C++20 compiler is needed, ...",
        "rebuild": REBUILD,
    },
    "library": {
        "file": "_host.cpython-310-x86_64-linux-gnu.so",
        "error": "there is none for this Python",
        "mismatch": "; it is for Python 3.10, and this is 3.12.1",
        "rebuild": REBUILD,
    },
    "version": {"file": "_cpu.abi3.so", "built": "0.1.0", "version": "0.2.0", "rebuild": REBUILD},
    "instruction set": {"forced": "default", "best": "avx512"},
    "driver": {
        "file": "_cuda.abi3.so",
        "built": "13.0",
        "driver": "12.8",
        "instead": "the reference serves",
        **NVRTC,
    },
    "architecture": {"device": "the GPU", "reason": "_cuda has no code for the compute capability 7.5", **NVRTC},
    "NVRTC": {
        "library": "not built (fastpo was built without nvcc)",
        "reason": "CuPy, which would compile it by NVRTC, is not installed",
        **NVRTC,
    },
    "CuPy": {"installed": "cupy-cuda13x", "wanted": "12", **NVRTC},
    "Triton": {"platform": "CUDA 12.8", "triton": "triton"},
    "kernel": {
        "function": "affine_scan",
        "device": "cpu",
        "reason": "the native kernel gives a wrong result",
        "rebuild": REBUILD,
    },
}


def findings_table() -> str:
    """What `fastpo info` may find, in words as they could be."""
    from fastpo._remedies import ROWS

    lines = ["| one sees | `fastpo info` says | what mends it |", "|---|---|---|"]
    for row in ROWS.values():
        says, remedy = (_text(text.format(**FOUND[row.check])) for text in (row.finding, row.remedy))
        says = f"*{row.check}{' (broken)' if row.broken else ''}*: {says}"
        lines.append(f"| {' | '.join(map(_cell, (_text(row.symptom), says, remedy)))} |")
    return "\n".join(lines)


def gallery_table() -> str:
    """First and last values of the runs of docs/gallery.py."""
    runs = json.loads((ROOT / "docs" / "gallery" / "runs.json").read_text())
    lines = ["| method | share that is right, before | after | KL to the reference, nats |", "|---|---|---|---|"]
    for name, run in runs.items():
        # of a reward model, of the held-out pairs
        right = "" if "accuracy_after" in run else "reward_"
        keys = (f"{right}accuracy_before", f"{right}accuracy_after", "kl")
        values = [f"{run[key]:.2f}" if key in run else "" for key in keys]
        lines.append(f"| [`{name}`](objectives.md#{name}) | {' | '.join(values)} |")
    return "\n".join(lines)


def gpu_results(names: Set[str], folder: Path = ROOT / "benchmarks" / "results") -> str:
    """What `make gpu-check` measured of kernels or functions, a table for each GPU; empty if it measured nothing."""
    lines = []
    for path in sorted(folder.glob("gpu-*.json")):
        report = json.loads(path.read_text())
        cases = [case for case in report["cases"] if case["case"].split()[0] in names]
        timed = [
            (case, {n: p["seconds"]["median"] for n, p in case["providers"].items() if "seconds" in p})
            for case in cases
        ]
        timed = [(case, seconds) for case, seconds in timed if "fastpo" in seconds]
        if not timed:
            continue
        where = report["environment"]
        lines += [
            f"**GPU: {where['gpu']}**, driver {where['driver']}, torch {where['torch']}, {where['date'][:10]}:",
            "our time, and the others' over ours, medians of calls in turns; below 1x the other is faster.",
            "",
            "| case | ms | others |",
            "|---|---|---|",
        ]
        for case, seconds in timed:
            own = seconds.pop("fastpo")
            others = ", ".join(f"{name} {value / own:.2f}x" for name, value in seconds.items())
            lines.append(f"| {_cell(case['case'])} | {1e3 * own:.3f} | {_cell(others)} |")
        lines.append("")
        if path.with_suffix(".png").is_file():
            lines += [f"![the same as bars](../results/{path.stem}.png)", ""]
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Add what is made: a page, and the figures of the benchmarks."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "objectives.md", content=objectives_page()))
    for figure in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in what pages ask for: the table of the gallery, the example, and a kernel's results on GPUs."""
    folder, _, name = page.file.src_uri.removesuffix(".md").rpartition("/")
    documented = {name, *re.findall(r"^::: fastpo\.(\w+)$", markdown, re.MULTILINE)}
    if folder == "kernels" and (measured := gpu_results(documented)):
        return re.sub(r"\*\*GPU:\s+not\s+measured\.\*\*", f"\n\n{measured}", markdown)
    if page.file.src_uri == "gallery.md":
        return markdown.replace("<!-- gallery -->", gallery_table())
    if page.file.src_uri == "adding.md":
        code = (ROOT / "examples" / "new_algorithm.py").read_text()
        return markdown.replace("<!-- example -->", f"```python\n{code}```")
    if page.file.src_uri == "install.md":
        return markdown.replace("<!-- findings -->", findings_table())
    return markdown
