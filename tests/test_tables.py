"""The benchmarks' tables: the committed pages are what the results make of them, and what is made of which JSON."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "cpu": "A CPU",
    "cores": 2,
    "instruction_set": "AVX2",
    "fastpo_kernels": "native, avx2",
    "torch": "2.13.0",
    "git_commit": "abc",
}
pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def load():
    """Modules of benchmarks/, which import each other by their own names."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.fixture
def tables(load) -> ModuleType:
    return load("tables")


def spread(*values: float) -> dict[str, float]:
    return {"median": sorted(values)[len(values) // 2], "min": min(values), "max": max(values)}


def timed(
    label: str, *speeds: float, own: float = 2e-3, status: str = "ok", memory: float | None = 3e6
) -> dict[str, Any]:
    """A provider's row; its times over ours are `speeds`, by process."""
    each = [own * speed for speed in speeds]
    return {
        "label": label,
        "status": status,
        "reason": None,
        "errors": {"logprobs": 1.5e-6},
        "seconds_each": each,
        "seconds": spread(*each),
        "gb_per_s": 1.0,
        "speed": spread(*speeds),
        "peak_bytes": memory,
        "result_bytes": 1e6,
    }


def absent(label: str, status: str, reason: str) -> dict[str, Any]:
    return {"label": label, "status": status, "reason": reason}


def case(
    name: str, processes: int = 3, bar: dict[str, Any] | None = None, **providers: dict[str, Any]
) -> dict[str, Any]:
    own = timed("fastpo", *[1.0] * processes)
    return {"case": name, "processes": processes, "providers": {"fastpo": own, **providers}, "bar": bar}


def put(folder: Path, name: str, **contents: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"environment": ENVIRONMENT, **contents}))


def of(tables: ModuleType, name: str, folder: Path) -> str:
    return "\n".join(tables.BLOCKS[name](tables.Results(folder)))


class TestPages:
    def test_the_committed_ones_are_current(self, tables, capsys):
        assert tables.main(["--check"]) == 0, capsys.readouterr().err

    def test_every_block_is_on_a_page(self, tables):
        texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
        named = {match[1] for text in texts for match in tables.BLOCK.finditer(text)}
        assert named == set(tables.BLOCKS)

    def test_only_blocks_change(self, tables, tmp_path, capsys):
        (tmp_path / "docs" / "kernels").mkdir(parents=True)
        (tmp_path / "README.md").write_text("# Ours\n")
        page = tmp_path / "docs" / "kernels" / "flows.md"
        page.write_text("before\n\n<!-- benchmark: flows -->\nby hand\n<!-- end of benchmark -->\n\nbehind\n")
        results = tmp_path / "results"
        results.mkdir()
        where = ["--results", str(results)]
        assert tables.main([*where, "--check"], tmp_path) == 1 and "by hand" in page.read_text()
        assert "docs/kernels/flows.md" in capsys.readouterr().err
        assert tables.main([*where, "--output", str(tmp_path / "copies")], tmp_path) == 0
        assert "by hand" in page.read_text()
        assert tables.main(where, tmp_path) == 0
        assert page.read_text() == (
            "before\n\n<!-- benchmark: flows -->\n\nNot measured.\n\n<!-- end of benchmark -->\n\nbehind\n"
        )
        assert (tmp_path / "copies" / "docs" / "kernels" / "flows.md").read_text() == page.read_text()
        assert tables.main([*where, "--check"], tmp_path) == 0
        # the picture, once there is one, by a link from where the page is on the site
        put(results, "flows", cases=[case("SubTB", eager=timed("eager torch", 2.0, 2.0, 2.0))])
        (results / "flows.png").touch()
        assert tables.main(where, tmp_path) == 0
        assert "](../results/flows.png)" in page.read_text() and "2.0x" in page.read_text()

    @pytest.mark.parametrize(
        "text, message",
        [
            ("<!-- benchmark: flows -->\n", "not closed"),
            ("<!-- benchmark: flows -->\n<!-- benchmark: policy -->\n<!-- end of benchmark -->\n", "not closed"),
            ("<!-- benchmark: speed -->\n<!-- end of benchmark -->\n", "no benchmark is named speed"),
        ],
    )
    def test_bad_blocks(self, tables, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            tables.rewritten(text, tables.Results(tmp_path))


class TestGroups:
    def test_nothing_there(self, tables, tmp_path):
        assert {of(tables, name, tmp_path) for name in tables.BLOCKS} == {"Not measured."}

    def test_cells(self, tables, tmp_path):
        """Several processes, floors, memory, and who could not take part."""
        floor = timed("floor: a read | of the inputs", 0.5, 0.5, 0.5, status="floor")
        first = case(
            "token_logprobs, forward",
            bar={"floors": ["read"], **spread(1.1, 1.2, 1.3)},
            eager=timed("eager torch", 3.0, 12.0, 20.4, memory=307e6),
            compile=absent("torch.compile of eager", "failed", "no | compiler\nand a long story"),
            trl=timed("TRL", 0.8, 0.9, 1.1, memory=None),
            read=floor,
        )
        second = case("token_logprobs, backward", eager=timed("eager torch", 4.0, 4.0, 4.0, memory=2e9))
        third = case("token_logprobs, bfloat16", trl=absent("TRL", "skipped", "it is not installed"))
        fourth = case("token_logprobs, entropy")
        put(tmp_path, "token_logprobs", cases=[first, second, third, fourth])
        lines = of(tables, "token_logprobs", tmp_path).splitlines()
        # as many cases as providers, so that cases go downwards
        assert lines[0] == "|  | fastpo | eager torch | torch.compile of eager | TRL | ours, over the floor |"
        assert lines[2].split(" | ") == [
            "| token_logprobs, forward",
            "2 ms, 3 MB, error 1.5e-06",
            "12x (3.0 .. 20), 307 MB",
            r"failed: no \| compiler",
            "0.90x (0.80 .. 1.10)",
            r"1.20 (1.10 .. 1.30) times a read \| of the inputs |",
        ]
        assert lines[3].split(" | ")[2:] == ["4.0x, 2.0 GB", "", "", " |"]
        assert "skipped: it is not installed" in lines[4]
        assert lines[-1] == ("Measured: A CPU, 2 cores, AVX2, torch 2.13.0; 3 fresh processes; 2026-01-02; commit abc.")

    def test_more_providers_than_cases(self, tables, tmp_path):
        peers = {name: timed(name, 2.0) for name in ("eager", "cce", "liger_chunked")}
        put(tmp_path, "linear_dpo", cases=[case("dpo on the head", processes=1, **peers)])
        lines = of(tables, "linear_dpo", tmp_path).splitlines()
        assert lines[0] == "|  | dpo on the head |"
        assert [line.split(" | ")[0] for line in lines[2:6]] == ["| fastpo", "| eager", "| cce", "| liger_chunked"]
        assert "1 fresh process;" in lines[-1]

    def test_formulas(self, tables, tmp_path):
        """A row for each size: the mean of 0.5 and 2 is 1."""
        cases = [
            case("hinge 8 pairs float32, forward + backward", eager=timed("eager torch", 0.5, 0.5, 0.5)),
            case("f_dpo js 8 pairs float32, forward + backward", eager=timed("eager torch", 2.0, 2.0, 2.0)),
            case("hinge 64 pairs x 9 tokens float32, forward + backward", eager=timed("eager torch", 3.0, 3.0, 3.0)),
        ]
        put(tmp_path, "formulas", cases=cases)
        lines = of(tables, "formulas", tmp_path).splitlines()
        assert lines[2] == "| 8 pairs | 2 | eager torch | 1.00x | 0.50x, `hinge` | 2.0x, `f_dpo js` |"
        assert lines[3].startswith("| 64 pairs x 9 tokens | 1 | eager torch | 3.0x |")
        shown = of(tables, "headlines", tmp_path)
        assert "| 2 formulas on 8 pairs, geometric mean | 1.00x, the worst 0.50x |" in shown

    def test_sweep(self, tables, tmp_path):
        core = timed("torch's", 0.8, memory=2e9), absent("torch's", "skipped", "would take about 5 GB")
        put(
            tmp_path,
            "sweep",
            cases=[
                {**case(f"linear_logprobs {rows}", processes=1, core=row), "rows": rows, "vocab": 99}
                for rows, row in zip((512, 8192), core, strict=True)
            ],
        )
        text = of(tables, "sweep", tmp_path)
        assert text.startswith("linear_logprobs: rows 512 to 8192, vocab 99.\n")
        assert "| fastpo | 2 of 2 |  | 2 MB |  |" in text
        assert "| torch's | 1 of 2 | 0.80x | 2.0 GB | would take about 5 GB at the largest |" in text
        assert "| linear_logprobs 512 | torch's | 1.25 times its time | 3 MB, 2.0 GB |" in of(
            tables, "slower", tmp_path
        )


class TestSlower:
    def test_neither_floors_nor_our_own(self, tables, tmp_path):
        """Slower than a peer, in the order of by how much; a floor is faster by its nature."""
        cases = [
            case(
                "grpo",
                eager=timed("eager torch", 0.7, 0.8, 1.2),
                fastpo_kept=timed("fastpo, kept", 0.5, 0.5, 0.5),
                liger=timed("Liger", 0.5, 0.5, 0.5, memory=None),
                trl=timed("TRL", 1.0, 1.0, 1.0),
                read=timed("floor: a read", 0.1, 0.1, 0.1, status="floor"),
            )
        ]
        put(tmp_path, "policy", cases=cases)
        lines = of(tables, "slower", tmp_path).splitlines()
        assert lines[0] == "Of 3 comparisons, ours is the slower one in 2."
        assert lines[4:] == [
            "| grpo | Liger | 2.0 times its time | 3 MB, ? |",
            "| grpo | eager torch | 1.25 (0.83 .. 1.43) times its time | 3 MB, 3 MB |",
        ]
        shown = of(tables, "headlines", tmp_path)
        assert "slower one in 2 of 3" in shown and "2.0 times the time of: Liger, in grpo." in shown

    def test_none(self, tables, tmp_path):
        put(tmp_path, "policy", cases=[case("grpo", eager=timed("eager torch", 2.0, 2.0, 2.0))])
        assert of(tables, "slower", tmp_path) == "Of 1 comparisons, ours is the slower one in 0."


class TestOthers:
    def test_targets(self, tables, load, tmp_path):
        """Met, missed, and not measured."""
        cases = load("cases")
        target = next(t for t in cases.TARGETS if t.case is cases.POLICY[1] and t.against == "eager")
        put(
            tmp_path,
            "policy",
            cases=[
                case(
                    target.case.name,
                    eager=timed("eager torch", *[target.asked + 1] * 3),
                    compile=timed("torch.compile of eager", 0.1, 0.1, 0.1),
                )
            ],
        )
        lines = of(tables, "targets", tmp_path).splitlines()
        said = {line.split(" | ")[0].removeprefix(f"| {target.case.name}: "): line for line in lines[2:]}
        assert said["speed over eager"].endswith(f"| ≥ {target.asked:g} | {target.asked + 1:.1f} | met |")
        assert said["speed over compile"].endswith("| 0.10 | **MISSED** |")
        assert sum(line.endswith("|  | not measured |") for line in lines) == len(lines) - 4

    def test_trainers(self, tables, tmp_path):
        """The ratio is that of processes in turn, the worst stands among what is slower."""
        runs = {
            "dpo": {
                "fastpo": [{"seconds": 2.0, "bytes": 1e9}, {"seconds": 4.0, "bytes": 3e9}],
                "trl": [{"seconds": 4.0, "bytes": 4e9}, {"seconds": 12.0, "bytes": 4e9}],
            },
            "grpo": {"fastpo": [{"seconds": 2.0, "bytes": 1e9}], "trl": [{"seconds": 1.0, "bytes": 1e9}]},
        }
        put(tmp_path, "trainers", settings={"model": "A model", "max_length": 512}, trainers=runs)
        lines = of(tables, "trainers", tmp_path).splitlines()
        assert lines[2] == (
            "| `dpo` | 3.0 s (2.0 .. 4.0), 2.0 GB | 8.0 s (4.0 .. 12.0), 4.0 GB | 2.5x (2.0 .. 3.0) | 2.0 times |"
        )
        assert "Settings: model A model, max length 512." in lines and "1 to 2 fresh processes" in lines[-1]
        shown = of(tables, "headlines", tmp_path)
        assert (
            "| a step of `fastpo train dpo`, A model |  |  | TRL's trainer: 2.5x, with 2.0 times the memory |" in shown
        )
        assert "`fastpo train grpo` | TRL's trainer | 2.0 times its time |" in of(tables, "slower", tmp_path)

    def test_generation(self, tables, tmp_path):
        ways = {name: {"64": spread(1e-3 * n)} for n, name in enumerate(tables.WAYS, 1)}
        environment = {**ENVIRONMENT, "parameters": {"s4": 5e6, "llama": 4e6}}
        contents = {"environment": environment, "seconds_per_token": ways}
        contents["target"] = {"asked": 20.0, "measured": 2.0, "met": False}
        put(tmp_path, "s4_generation", **contents)
        text = of(tables, "generation", tmp_path)
        assert "| 64 | 1 ms (1 .. 1) | 2 ms, 2.0x | 3 ms, 3.0x | 4 ms, 4.0x |" in text and "Llama 4.0M" in text
        assert "| ≥ 20 | 2.0 | **MISSED** |" in of(tables, "targets", tmp_path)

    def test_methods(self, tables, tmp_path):
        found = {"tokens_per_second": 1234.5, "bytes": 5e8}
        answers = {"accuracy_before": 0.25, "accuracy_after": 0.5, "kl": 0.125, **found}
        ranks = {"reward_accuracy_before": 0.5, "reward_accuracy_after": 1.0, **found}
        put(tmp_path, "methods", seeds=3, jobs=2, methods={"dpo": answers, "reward_model": ranks})
        lines = of(tables, "methods", tmp_path).splitlines()
        assert lines[2] == "| `dpo` | 0.25 | 0.50 | 0.12 | 1,234 | 500 MB |"
        assert lines[3] == "| `reward_model` | 0.50 | 1.00 |  | 1,234 | 500 MB |"
        assert lines[-1] == "2 methods, 3 seeds, 2 at a time."


class TestMeasuringMethods:
    @pytest.fixture
    def methods(self, load, monkeypatch):
        """benchmarks/methods.py, whose runs are replaced by their results; `runs` has those that were asked for."""
        module = load("methods")
        module.runs, module.broken = [], set()

        def measured(name: str, seeds: int, folder: Path) -> dict[str, float] | None:
            module.runs.append(name)
            return None if name in module.broken else {"accuracy_after": 0.5, "bytes": 1.0}

        monkeypatch.setattr(module, "measured", measured)
        monkeypatch.setattr(module, "fit_references", lambda *_: None)
        return module

    def test_the_rest(self, methods, tmp_path, capsys):
        """A failed method is said and left out; the rest is what is missing."""
        path = tmp_path / "methods.json"
        where = ["--output", str(tmp_path), "--jobs", "2"]
        methods.broken.add("dpo")
        assert methods.main(["kto", "dpo", "ipo", *where]) == 1
        first = json.loads(path.read_text())
        assert list(first["methods"]) == ["ipo", "kto"] and first["seeds"] == 1 and first["jobs"] == 2
        methods.broken.clear()
        methods.runs.clear()
        assert methods.main(["kto", "dpo", "ipo", "--rest", *where]) == 0 and methods.runs == ["dpo"]
        again = json.loads(path.read_text())
        assert set(again["methods"]) == {"dpo", "ipo", "kto"}
        assert again["environment"]["git_commit"] == first["environment"]["git_commit"]
        with pytest.raises(SystemExit):
            methods.main(["--rest", "--seeds", "3", *where])
        assert "of 1 seeds" in capsys.readouterr().err

    def test_each_is_written(self, methods, tmp_path, monkeypatch):
        """What is there when it is stopped stays."""

        def stopped(name: str, *_: Any) -> dict[str, float]:
            if name == "dpo":
                raise KeyboardInterrupt
            return {"accuracy_after": 0.5, "bytes": 1.0}

        monkeypatch.setattr(methods, "measured", stopped)
        with pytest.raises(KeyboardInterrupt):
            methods.main(["ipo", "dpo", "--output", str(tmp_path)])
        assert list(json.loads((tmp_path / "methods.json").read_text())["methods"]) == ["ipo"]
