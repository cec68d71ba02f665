"""Runs side by side, and the panels of a run's figure."""

from __future__ import annotations

import json

import pytest
import yaml

from fastpo.cli import main
from fastpo.training import report
from fastpo.training.compare import differences, rows

# what a run with rollouts writes, by the axis it belongs to
ROLLOUTS = {
    "reward": "reward",
    "kl": "KL to the reference, nats",
    "entropy": "entropy, nats",
    "clip_fraction_high": "share of clipped tokens",
    "clip_fraction_low": "share of clipped tokens",
    "length": "tokens of a completion",
}
RECORDS = [
    {"step": s, "loss": 1 / s, **{k: s / 10 for k in ROLLOUTS}, "tokens": 10, "seconds": 0.5} for s in range(1, 21)
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, as {label of the axis: {label of the line: (points, colour)}}."""
    from matplotlib.figure import Figure

    found, real = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        lines = {
            a.get_ylabel(): {n.get_label(): (len(n.get_xdata()), n.get_color()) for n in a.lines}
            for a in figure.axes
            if a.lines
        }
        found.append(lines)
        return real(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def run(folder, records=RECORDS, steps=20, **options):
    folder.mkdir()
    config = {"algorithm": {"beta": 0.1}, "steps": 20, "optim": {"lr": 1e-3}, **options}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if steps is not None:
        summary = {"algorithm": "grpo", "steps": steps, "reward_last": 1.25, "tokens_per_second": 1234.5678}
        (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def test_a_panel_for_what_rollouts_measure(tmp_path, drawn):
    report.plot(RECORDS, tmp_path / "curve.png", "grpo")
    (panels,) = drawn
    assert panels.pop("loss") == {"loss": (20, "C0")}
    for key, label in ROLLOUTS.items():
        assert panels[label][key.replace("_", " ")][0] == 20
    assert sum(map(len, panels.values())) == len(ROLLOUTS)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    found = report.summary(RECORDS)
    assert (found["reward_first"], found["reward_last"]) == (pytest.approx(0.15), pytest.approx(1.95))


def test_two_runs(tmp_path, capsys, drawn, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    evaluated = [{"step": 0, "eval_kl": 0.0}, *RECORDS[:5], {**RECORDS[5], "eval_kl": 0.5}]
    one = run(tmp_path / "one")
    # stopped, and begun again after its end
    other = run(tmp_path / "other", evaluated, 3, optim={"lr": 2e-3, "warmup": 0.1}, algorithm={"beta": 0.1})
    output = tmp_path / "both.png"
    assert main(["compare", one, other, "--output", str(output)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["optim.lr", "0.001", "0.002"] in table and ["optim.warmup", "-", "0.1"] in table
    assert not any(line and line[0] in ("algorithm.beta", "seed") for line in table)
    assert ["steps", "20", "6"] in table and ["reward_last", "1.25", "0.6"] in table
    assert ["kl_after", "-", "0.5"] in table and ["tokens_per_second", "1235", "20"] in table
    assert output.read_bytes().startswith(b"\x89PNG")
    (panels,) = drawn
    both = {one: (20, "C0"), other: (6, "C1")}
    assert panels["loss"] == panels["clip fraction high"] == both and panels["eval kl"] == {other: (2, "C1")}


def test_rows():
    assert rows([{"a": 1, "b": 2}, {"c": 3, "a": 1}]) == {"a": [1, 1], "b": [2, None], "c": [None, 3]}
    assert differences([{"a": 1, "b": 2}, {"c": 3, "a": 1}]) == {"b": [2, None], "c": [None, 3]}


def test_no_runs(tmp_path, capsys):
    one, empty = run(tmp_path / "one"), tmp_path / "empty"
    empty.mkdir()
    never = run(tmp_path / "never", [], None)
    broken = run(tmp_path / "broken")
    (tmp_path / "broken" / "config.yaml").write_text("- no\n- options\n")
    cut = run(tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").write_text("{")
    output = tmp_path / "compare.png"
    for runs, message in (
        ((one, str(empty)), f"{empty}: there is no run in this folder (config.yaml is missing)"),
        ((one, str(tmp_path / "nowhere")), "nowhere: there is no run in this folder"),
        ((one,), "compare needs two runs or more"),
        ((one, one), f"{one} is named twice"),
        ((never, run(tmp_path / "none", [], None)), "none of the runs has done a step"),
        ((one, broken), f"{broken}: config.yaml holds no options"),
        ((one, cut), f"{cut}: config.yaml or summary.json cannot be read"),
    ):
        assert main(["compare", *runs, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()
    assert main(["compare", one, never, "--output", str(output)]) == 0
