"""Imports inside fastpo point downward only; integrations may import anything, and nothing imports them."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import fastpo

from .fresh import python

PACKAGE = Path(fastpo.__file__).parent
# from the lowest floor to the highest; a module may import its own floor and those below
FLOORS = [
    {"_remedies"},
    {"reference"},
    {"kernels"},
    {"losses", "data", "advantages", "rewards", "schedules", "scores", "nn"},
    {"algorithms"},
    {"training"},
    # the front door and the tools stand above the library
    {"__init__", "_info", "_diagnosis"},
    {"bench", "cli"},
    {"integrations"},
]


def floor(room: str) -> int:
    found = [i for i, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"fastpo/{room} is on no floor: add it to FLOORS"
    return found[0]


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_direction():
    rooms = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for name in imported_modules(path):
            head, _, tail = name.partition(".")
            if head != "fastpo":
                continue
            target = tail.split(".")[0]
            target = target if target in rooms else "__init__"
            if name == "fastpo":  # `from fastpo import x`: x is judged by itself
                continue
            if floor(target) > floor(room_of(path)):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong


def test_only_kernels_name_the_ops():
    for path in PACKAGE.rglob("*.py"):
        if "torch.ops.fastpo" in path.read_text():
            assert room_of(path) == "kernels", path


def test_the_rule_sees_a_violation(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from fastpo.training import loop\nimport fastpo.cli\n")
    assert {"fastpo.training", "fastpo.cli"} <= imported_modules(bad)
    assert floor("training") > floor("losses") and floor("cli") > floor("training")


def test_what_importing_fastpo_imports():
    """Beside itself and what torch has imported already, the standard library; of torch no part that is large."""
    code = "import sys, json; had = set(sys.modules); import fastpo; print(json.dumps(sorted(set(sys.modules) - had)))"
    done = python(code, PACKAGE.parent)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    new = json.loads(done.stdout)
    others = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
    assert others <= {"fastpo", "torch"}
    assert sorted(n for n in new if n.startswith("torch.")) == []
    # each is a file that is opened on every import
    assert len(new) < 150, new
