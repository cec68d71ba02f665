"""The documentation: every code block of the README and of docs/ is run, and what it says of the code is so.

A page's blocks run one after another, in one namespace and in a folder of their own. Python in a comment
(`<!-- python ... -->`) prepares what the reader has. In shells, `fastpo` is run in this process; what else stands
there is not, and must say so. A comment before a block says what becomes of it:

    <!-- test: not run (why) -->        nothing
    <!-- test: parsed -->               `fastpo train`, up to the training: options, names and types are checked
    <!-- test: needs MODULE -->         it is run where the module can be imported
"""

from __future__ import annotations

import ast
import collections
import functools
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import fastpo
from fastpo import _diagnosis, _remedies, algorithms, cli, kernels, losses
from fastpo.kernels import _native, vocab_divergence
from fastpo.reference import registry
from tests.losses.test_fixed_points import PAIRWISE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
pytestmark = pytest.mark.once

# what is not run: by page and mark, how many blocks
NOT_RUN = collections.Counter(
    {
        ("README.md", "needs trl"): 1,
        ("README.md", "not run"): 2,
        ("README.md", "parsed"): 1,
        ("docs/gallery.md", "not run"): 1,
        ("docs/guides/trl.md", "needs trl"): 2,
        ("docs/guides/verl.md", "needs verl"): 1,
        ("docs/index.md", "not run"): 1,
        ("docs/install.md", "not run"): 2,
        ("docs/training/data.md", "parsed"): 1,
        ("docs/training/distributed.md", "not run"): 2,
        ("docs/training/index.md", "not run"): 1,
        ("docs/training/index.md", "parsed"): 1,
    }
)

by_page = pytest.mark.parametrize("page", list(PAGES))


class Block(NamedTuple):
    """A fence, or a comment with Python."""

    language: str
    text: str
    line: int
    mark: str


def blocks(page: str) -> Iterator[Block]:
    """The code of a page, by the number of its first line."""
    mark, language, end, found, start = "", "", "", [], 0
    for number, line in enumerate(PAGES[page].read_text().splitlines(), 1):
        if end:
            if line == end:
                yield Block(language, "\n".join(found), start, mark)
                mark, end = "", ""
            else:
                found.append(line)
        elif line == "<!-- python" or line.startswith("```"):
            language, end = ("python", "-->") if line == "<!-- python" else (line[3:], "```")
            found, start = [], number + 1
        elif said := re.fullmatch(r"<!-- test: (.*) -->", line):
            mark = said[1]


def commands(text: str) -> Iterator[list[str]]:
    """The lines of a shell, continued ones as one, without prompts and comments."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a page is: a folder with the files that its commands name, and a registry that it may add to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(registry, "_ROWS", dict(registry._ROWS))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


def run_shell(block: Block, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line, which must be one of fastpo's."""
    for words in commands(block.text):
        where = f"{page}:{block.line}: {shlex.join(words)}"
        assert words[0] == "fastpo", f"{where}: only fastpo is run; say <!-- test: not run (why) -->"
        if block.mark == "parsed":
            assert words[1] == "train", f"{where}: only trainings are merely parsed"
            name = algorithms.ALIASES.get(words[2], words[2])
            assert name in algorithms.names(), where
            with monkeypatch.context() as patch:
                # whether there is a run to be resumed
                patch.setattr(cli, "_run_to_resume", lambda *_: None)
                _, config, _ = cli._parse(name, words[3:])
            config.check()
            # whole names, where the parser takes beginnings
            known = {option for action in cli._parser(name)._actions for option in action.option_strings}
            assert {word for word in words if word.startswith("--")} <= known, where
        else:
            try:
                code = cli.main(words[1:])
            except SystemExit as end:  # --help
                code = end.code
            assert code == 0, where


@by_page
def test_blocks_run(page, folder, monkeypatch):
    namespace: dict[str, object] = {"__name__": page}
    before = torch.random.get_rng_state()
    try:
        for block in blocks(page):
            needed = block.mark.removeprefix("needs ") if block.mark.startswith("needs ") else None
            if block.mark.startswith("not run") or (needed and importlib.util.find_spec(needed) is None):
                continue
            if block.language == "python":
                # a traceback names the page and its line
                code = "\n" * (block.line - 1) + block.text
                exec(compile(code, str(PAGES[page]), "exec"), namespace)
            elif block.language in ("bash", "console"):
                run_shell(block, page, monkeypatch)
            else:
                assert block.language in ("yaml", "json", "cpp", "text"), f"{page}:{block.line}: {block.language}"
    finally:
        torch.random.set_rng_state(before)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_what_is_not_run():
    """So that nothing is taken out of the tests by the way."""
    marks = collections.Counter(
        (page, block.mark.split(" (")[0]) for page in PAGES for block in blocks(page) if block.mark
    )
    assert marks == NOT_RUN
    for page in PAGES:
        for block in blocks(page):
            assert re.fullmatch(r"(|parsed|not run \(.+\)|needs [\w.]+)", block.mark), (page, block.line, block.mark)


class TestReferences:
    @by_page
    def test_named_tests_exist(self, page):
        """tests/FILE.py::Class::test, wherever a page names one."""
        for path, names in re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)*)`", PAGES[page].read_text()):
            assert_test_exists(path, names)

    def test_objectives(self):
        """Every theorem of the registry has its point and its test, and every note its objective."""
        notes = yaml.safe_load((DOCS / "objectives.yaml").read_text())
        rows = {row["name"]: row for row in generator().rows()}
        assert set(notes) <= set(rows) | set(losses.__all__)
        for name, note in notes.items():
            assert set(note) <= {"point", "test", "elsewhere"}, name
            if "test" in note:
                path, *names = note["test"].split("::")
                assert_test_exists(path, "".join(f"::{n}" for n in names))
        for name, row in rows.items():
            if row["theory"] != "property":
                assert {"point", "test"} <= set(notes.get(name, {})), name
        # the test of many is one of this method
        minimised = {
            n for n, note in notes.items() if note.get("test") == "tests/losses/test_fixed_points.py::test_minimiser"
        }
        assert len(minimised) >= 15 and minimised <= {name for name, _ in PAIRWISE}

    def test_closed_forms(self):
        """Of rows without a theorem, where there is a table of them."""
        made = generator()
        rows = {row["name"]: row for row in made.rows()}
        assert made.closed_form(rows["slic"]) == "tests/losses/test_closed_forms.py"
        assert made.closed_form(rows["dpo"]) == ""
        found = [name for name, row in rows.items() if made.closed_form(row)]
        assert len(found) > 30 and all((ROOT / path).is_file() for path in made.CLOSED_FORMS.values())

    def test_the_page_has_every_objective(self):
        page = generator().objectives_page()
        for name in losses.__all__:
            function = getattr(losses, name)
            if callable(function) and name[0].islower():
                assert f"{{ #{name} }}" in page, name
        assert "log σ" in page and page.count("\n### ") > 100

    def test_every_kernel_is_in_the_table(self):
        """By its module's name, on the page that leads to the others."""
        table = (DOCS / "kernels" / "index.md").read_text()
        modules = {path.stem for path in Path(kernels.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
        # completions are on the page of linear_logprobs
        for name in (modules | {"policy_objective"}) - {"completions", "policy"}:
            assert f"`{name}`" in table, name
        linked = set(re.findall(r"\]\((\w+\.md)\) \|", table))
        assert linked == {path.name for path in (DOCS / "kernels").glob("*.md")} - {"index.md"}

    def test_results_of_a_gpu(self, tmp_path):
        """A table where there are results of the kernel, else what the page says."""
        seconds = {
            "fastpo": {"seconds": {"median": 2e-3}},
            "eager": {"seconds": {"median": 3e-3}},
            "TRL": {"status": "no"},
        }
        where = {"gpu": "X", "driver": "1", "torch": "2", "date": "2026-01-02T03:04"}
        report = {"environment": where, "cases": [{"case": "token_kl 4 x 9, forward", "providers": seconds}]}
        (tmp_path / "gpu-x.json").write_text(json.dumps(report))
        table = generator().gpu_results({"vocab_divergence", "token_kl"}, tmp_path)
        assert "**GPU: X**" in table and "| token_kl 4 x 9, forward | 2.000 | eager 1.50x |" in table
        assert generator().gpu_results({"listwise"}, tmp_path) == ""
        for path in (DOCS / "kernels").glob("*.md"):
            text = path.read_text()
            assert re.search(r"\*\*GPU(:\s+not\s+measured)?[.:]", text), path

    def test_everything_that_may_be_wrong(self):
        """Each row of `fastpo info`, filled in, with its remedy; and the command to which the table leads."""
        page = (DOCS / "install.md").read_text()
        table = generator().findings_table().splitlines()[2:]
        assert "<!-- findings -->" in page and len(table) == len(_remedies.ROWS)
        for line, row in zip(table, _remedies.ROWS.values(), strict=True):
            assert f"| *{row.check}{' (broken)' * row.broken}*: " in line and len(line.split(" | ")) == 3, line
        assert _diagnosis.reinstall("fastpo").replace(" && ", "\n") in page

    def test_every_function_is_documented_once(self):
        text = "\n".join(path.read_text() for path in DOCS.rglob("*.md"))
        for name in fastpo.__all__:
            value = getattr(fastpo, name)
            if callable(value) and name not in ("use_backend", "info", "SegmentStats"):
                assert text.count(f"::: fastpo.{name}\n") == 1, name

    def test_every_page_is_in_the_navigation(self):
        config = (ROOT / "mkdocs.yml").read_text()
        named = set(re.findall(r"[\w/]+\.md", config.split("\nnav:")[1]))
        assert named == {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} | {"objectives.md"}

    def test_nothing_is_fetched(self):
        """Neither fonts nor scripts, and no plugin that asks another host."""
        config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
        assert config["theme"]["font"] is False and "extra_javascript" not in config
        assert {p if isinstance(p, str) else next(iter(p)) for p in config["plugins"]} == {"search", "mkdocstrings"}
        for page, path in PAGES.items():
            assert not re.search(r"!\[[^]]*\]\(https?:", path.read_text()), page


def generator():
    """docs/generate.py, which mkdocs loads."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def assert_test_exists(path: str, names: str) -> None:
    body = parsed(path).body
    for name in filter(None, names.split("::")):
        node = next((n for n in body if getattr(n, "name", None) == name), None)
        assert node is not None, f"{path}{names}"
        body = node.body


class TestComplaints:
    def test_every_group_is_answered(self):
        """38 groups, each with a test of its own, a page, or the word that it does not work."""
        text = (DOCS / "complaints.md").read_text()
        rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
        assert [int(row[0].strip("| ")) for row in rows] == list(range(1, 39))
        for row in rows:
            assert row[2] in ("works", "in part", "no"), row
            assert "`tests/" in row[3] or "](" in row[3] or row[2] == "no", row


class TestVersions:
    def test_the_changelog_begins_with_this_version(self):
        text = (ROOT / "CHANGELOG.md").read_text()
        version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
        headings = re.findall(r"^## (\S+)", text, re.MULTILINE)
        assert headings[0] in (version, "Unreleased") and version in headings

    def test_kinds_are_only_appended(self):
        """A compiled graph holds a formula's number: those that were given keep their places."""
        if not _native.CPU.loaded:
            pytest.skip("there is no compiled library")
        committed = json.loads((ROOT / "tests" / "formulas.json").read_text())
        assert [getattr(vocab_divergence, name) for name in committed.pop("divergences")] == list(range(5))
        for table, names in committed.items():
            found = getattr(_native.CPU, table)
            found = list(found) if isinstance(found, tuple) else sorted(found, key=found.get)
            assert found[: len(names)] == names, f"{table}: only append, and add what is new to tests/formulas.json"
            assert len(found) == len(names), f"{table}: add {found[len(names) :]} to tests/formulas.json"
