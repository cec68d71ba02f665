"""The benchmark harness: what it refuses, what it computes, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fastpo.bench import (
    Case,
    CheckFailedError,
    Expected,
    GaeCase,
    GroupCase,
    LinearDivergenceCase,
    LinearDpoCase,
    LinearLogprobsCase,
    ListwiseCase,
    ObjectiveCase,
    PolicyCase,
    Problem,
    Provider,
    StateSpaceCase,
    SubTbCase,
    TokenLogprobsCase,
    UnavailableError,
    VocabDivergenceCase,
    harness,
    linear_logprobs,
    main,
    measure,
    measure_in_processes,
    summarise,
    table,
)
from fastpo.bench.harness import Measurement, Outcome, Run, check, interleave, peak_bytes, read
from fastpo.bench.listwise import OBJECTIVES as LIST_OBJECTIVES
from fastpo.bench.vocab_divergence import DIVERGENCES
from fastpo.kernels import _native
from fastpo.reference.registry import objective


@dataclass(frozen=True)
class Doubling:
    """2x, by providers of which some err by a factor."""

    PROVIDERS: ClassVar[tuple[str, ...]] = ("fastpo", "eager", "peer", "absent", "broken", "read")

    own: float = 1.0
    baseline: float = 1.0
    peer: float = 1.0
    name: str = "doubling"

    def build(self) -> Problem:
        x = torch.linspace(1, 2, 1000)

        def by(factor: float) -> Callable[[], list[Tensor]]:
            return lambda: [x * (2 * factor)]

        def absent() -> Callable[[], list[Tensor]]:
            raise UnavailableError("not installed")

        def broken() -> Callable[[], list[Tensor]]:
            raise RuntimeError("no compiler\nand a long story")

        return Problem(
            [
                Provider("fastpo", "fastpo", lambda: by(self.own)),
                Provider("eager", "eager torch", lambda: by(self.baseline)),
                Provider("peer", "a peer", lambda: by(self.peer)),
                Provider("absent", "another", absent),
                Provider("broken", "a third", broken),
                Provider("read", "floor: a read", lambda: read(x), floor=True),
            ],
            expected=lambda: {"y": Expected(2 * x.double(), magnitude=4.0)},
            bytes=4000,
            bar=("read",),
        )


def test_a_wrong_peer_is_named_and_not_timed() -> None:
    outcomes = measure(Doubling(peer=1.001), repetitions=1).outcomes
    peer = outcomes["peer"]
    assert peer.status == "failed" and peer.seconds is None and peer.peak_bytes is None
    assert peer.reason is not None and peer.reason.startswith("y: error 4.0")
    assert outcomes["fastpo"].seconds is not None
    summary = summarise([measure(Doubling(peer=1.001), repetitions=1)])
    assert "speed" not in summary["providers"]["peer"] and "seconds" not in summary["providers"]["peer"]
    text = table(summary)
    assert "a peer: failed, y: error" in text and "another: skipped, not installed" in text
    assert "a third: failed, RuntimeError: no compiler" in text and "long story" not in text


@pytest.mark.parametrize("case", [Doubling(own=1.001), Doubling(own=math.nan), Doubling(baseline=1.01)])
def test_nothing_is_measured_when_fastpo_or_the_baseline_is_wrong(case: Doubling) -> None:
    with pytest.raises(CheckFailedError, match=r"doubling: (fastpo|eager torch) gives a wrong result: y: error"):
        measure(case, repetitions=1)


def test_allowed_errors() -> None:
    eps, coarse = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps
    exact = Expected(torch.tensor([8.0], dtype=torch.float64), magnitude=16.0)
    # fastpo: two roundings more than eager, of the dtype whose are larger
    assert exact.allowed(torch.float32, 1e-6) == pytest.approx(1e-6 + 2 * 16 * eps)
    assert exact.allowed(torch.bfloat16, 1e-6) == pytest.approx(1e-6 + 2 * 8 * coarse)
    # the others: a hundred
    assert exact.allowed(torch.bfloat16) == pytest.approx(100 * 16 * eps + 2 * 8 * coarse)
    assert exact.error(torch.tensor([8.5])) == 0.5
    assert Expected(exact.value, weight=4.0).error(torch.tensor([8.5])) == 0.125
    assert exact.error(torch.tensor([math.nan])) == exact.error(torch.zeros(2)) == math.inf


def _measurement(own: float, peer: float, read: float, cached: float) -> Measurement:
    def outcome(seconds: float, status: str = "ok", peak: int | None = 0) -> Outcome:
        return Outcome("label", 10**9, status, seconds=seconds, peak_bytes=peak, errors={"y": own})

    return Measurement(
        "case",
        ("read", "cached"),
        {
            "fastpo": outcome(own),
            "peer": outcome(peer, peak=int(peer)),
            "read": outcome(read, "floor"),
            "cached": outcome(cached, "floor"),
        },
    )


def test_ratios_are_taken_per_process() -> None:
    # the ratio of the medians would be 10 / 2 = 5
    summary = summarise([_measurement(1, 4, 0.5, 0.8), _measurement(2, 10, 1, 4), _measurement(5, 15, 4, 1)])
    peer = summary["providers"]["peer"]
    assert peer["speed"] == {"median": 4, "min": 3, "max": 5}
    assert peer["seconds"] == {"median": 10, "min": 4, "max": 15} and peer["gb_per_s"] == 0.1
    assert peer["peak_bytes"] == 10 and summary["providers"]["fastpo"]["errors"] == {"y": 5}
    # fastpo over the longer floor: 1 / 0.8, 2 / 4, 5 / 4
    assert summary["bar"] == {"floors": ["read", "cached"], "median": 1.25, "min": 0.5, "max": 1.25}
    assert summary["processes"] == 3


def test_a_provider_that_fails_in_one_process_has_no_ratio() -> None:
    good, bad = _measurement(1, 4, 1, 1), _measurement(1, 4, 1, 1)
    bad.outcomes["peer"] = Outcome("label", 1, "failed", "y: wrong", errors={"y": 9.0})
    row = summarise([good, bad])["providers"]["peer"]
    assert row == {"label": "label", "status": "failed", "reason": "y: wrong", "errors": {"y": 9.0}}


def test_providers_take_turns() -> None:
    calls: list[str] = []

    def provider(name: str) -> Callable[[], list[Tensor]]:
        return lambda: calls.append(name) or []

    seconds = interleave({name: provider(name) for name in "abc"}, 7, least_seconds=0.0)
    assert set(seconds) == set("abc") and all(s > 0 for s in seconds.values())
    assert calls[:6] == list("aabbcc")
    rounds = [calls[i : i + 3] for i in range(6, len(calls), 3)]
    assert len(rounds) == 7 and all(sorted(r) == list("abc") for r in rounds)


def test_a_long_call_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def took(run: Run, calls: int) -> float:
        run()
        return 11.0 if run is long else 0.5

    def long() -> list[Tensor]:
        return calls.append("long") or []

    monkeypatch.setattr(harness, "_timed", took)
    seconds = interleave({"short": lambda: calls.append("short") or [], "long": long}, 7)
    assert seconds == {"short": 0.5, "long": 11.0}
    assert calls.count("long") == 1 and calls.count("short") == 9


def test_peak_memory_counts_temporaries_once() -> None:
    megabytes = 64
    size = megabytes * 1024 * 1024 // 4
    peak = peak_bytes(lambda: [torch.ones(size).add_(1).sum()])
    if peak is None:
        pytest.skip("the system has no resettable high-water mark")
    assert 0.9 < peak / (megabytes * 2**20) < 1.1
    again = peak_bytes(lambda: [torch.zeros(1)])
    assert again is not None and again < 4 * 2**20


def checked(case: Case, *only: str) -> dict[str, Outcome]:
    """What a case finds out without taking times, whose garbage collections are slow in a process of many tests."""
    outcomes: dict[str, Outcome] = {}
    check(case.build(), outcomes, only)
    return outcomes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("backward", [False, True])
def test_token_logprobs_passes_its_own_check(dtype: str, backward: bool) -> None:
    case = TokenLogprobsCase(7, 333, dtype, ("top1", "entropy", "logsumexp", "log_sum_p2"), backward)
    outcomes = checked(case, "read", "cached", "fastpo_float32")
    names = {"logprobs", "entropy", "logsumexp", "log_sum_p2", "top1"} | ({"gradient"} if backward else set())
    assert set(outcomes["fastpo"].errors) == names
    assert ("cached" in outcomes) != backward
    assert ("fastpo_float32" in outcomes) == (not backward and dtype in ("bfloat16", "float16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backward", [False, True])
def test_vocab_divergence_passes_its_own_check(dtype: str, divergence: str, backward: bool) -> None:
    case = VocabDivergenceCase(7, 333, dtype, divergence, backward)
    outcomes = checked(case, "read")
    assert set(outcomes) == {"fastpo", "eager", "read"}
    assert set(outcomes["fastpo"].errors) == {"divergence", *["gradient"] * backward}


@pytest.mark.parametrize("tokens", [0, 9])
@pytest.mark.parametrize(
    ("formula", "options"), ObjectiveCase.formulas(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_objective_passes_its_own_check(formula: str, options: Any, tokens: int) -> None:
    # in fp64 eager torch is the exact result itself, which leaves two roundings: as many as simple formulas make
    # (robust_dpo's slope is a difference of two products, divided, scaled by the mean and by the incoming gradient)
    simple = formula in ("dpo", "cdpo", "ipo", "hinge")
    for dtype in ("float32", "float64") if simple else ("float32",):
        case = ObjectiveCase(33, tokens, formula, dtype, True, options=options)
        outcomes = checked(case, "read")
        assert set(outcomes) == {"fastpo", "eager", "read"}
        assert {"loss", "accuracies", "chosen_gradient"} <= set(outcomes["fastpo"].errors)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True])
def test_policy_passes_its_own_check(dtype: str, backward: bool) -> None:
    outcomes = checked(PolicyCase(5, 40, dtype, backward), "read")
    assert set(outcomes) == {"fastpo", "eager", "read"}
    assert {"loss", "kl", "ratio"} <= set(outcomes["fastpo"].errors)


@pytest.mark.parametrize("backward", [False, True])
def test_policy_peers_compute_the_same(backward: bool) -> None:
    """Their own code, on every output that it has."""
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    outcomes = checked(PolicyCase(5, 40, "float32", backward), "trl", "liger")
    assert [(name, o.status, o.reason) for name, o in outcomes.items() if o.status != "ok"] == []
    more = {"gradient"} if backward else set()
    assert set(outcomes["trl"].errors) == {"loss", "kl", "clipped low", "clipped high", "clipped"} | more
    assert set(outcomes["liger"].errors) == {"loss", "kl", "clipped"} | more


@pytest.mark.parametrize("backward", [False, True])
def test_subtb_passes_its_own_check(backward: bool) -> None:
    outcomes = checked(SubTbCase(3, 70, backward), "read")
    assert set(outcomes) == {"fastpo", "eager", "read"}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("product", ["cauchy", "vandermonde"])
def test_state_space_passes_its_own_check(product: str, dtype: str, backward: bool) -> None:
    outcomes = checked(StateSpaceCase(product, 3, 5, 70, dtype, backward), "none")
    assert set(outcomes) == {"fastpo", "eager"}
    assert len(outcomes["fastpo"].errors) == (3 if backward else 1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("objective", LIST_OBJECTIVES)
def test_listwise_passes_its_own_check(objective: str, dtype: str) -> None:
    for backward in (False, True):
        outcomes = checked(ListwiseCase(objective, 5, 7, dtype, backward), "read")
        assert set(outcomes) == {"fastpo", "eager", "read"}
        assert {"loss", "rewards"} <= set(outcomes["fastpo"].errors)


def test_every_compiled_formula_on_pairs_is_measured() -> None:
    rows = [objective(name) for name, _ in ObjectiveCase.formulas()]
    assert {row.kind for row in rows} == {"pairwise"} and len(rows) == len(_native.CPU.formulas)


@pytest.mark.parametrize("layout", ["dense", "ragged", "packed"])
def test_gae_passes_its_own_check(layout: str) -> None:
    outcomes = checked(GaeCase(5, 37, layout), "read", "copy")
    assert set(outcomes) == {"fastpo", "eager", "read", "copy"}
    assert set(outcomes["fastpo"].errors) == {"advantages", "returns"}


@pytest.mark.parametrize("shuffled", [False, True])
def test_group_normalize_passes_its_own_check(shuffled: bool) -> None:
    outcomes = checked(GroupCase(333, shuffled), "loop", "read")
    assert {name: o.status for name, o in outcomes.items()} == {
        "fastpo": "ok",
        "eager": "ok",
        "loop": "ok",
        "read": "floor",
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("options", [{}, {"backward": True}, {"frozen": True, "backward": True}], ids=str)
def test_linear_logprobs_passes_its_own_check(dtype: str, options: dict[str, bool]) -> None:
    for prompt in (0.0, 0.5):
        case = LinearLogprobsCase(21, 40, 333, dtype, prompt, **options)
        names = set(LinearLogprobsCase.PROVIDERS) - {"compile", "core_chunked", "trl", "trl_gathered", "cce"}
        outcomes: dict[str, Outcome] = {}
        check(case.build(), outcomes, names)
        learning = options == {"backward": True}
        names -= set() if learning else {"fastpo_kept", "products_kept"}
        names -= {"core_gathered"} if prompt == 0.0 else set()
        names -= {"fastpo_float32"} if dtype in ("float32", "float64") else set()
        assert set(outcomes) == names and all(o.status in ("ok", "floor") for o in outcomes.values())
        gradients = {"hidden_gradient"} if options else set()
        gradients |= {"weight_gradient"} if learning else set()
        assert set(outcomes["fastpo"].errors) == {"logprobs"} | gradients


def test_the_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shapes of the rows that have targets."""
    made: list[tuple[int, ...]] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, out: made.append(tuple(out.shape)) or mm(*args, out=out))
    logits, d_hidden, d_weight = (10, 333), (10, 40), (333, 40)
    for options, name, wanted in (
        ({}, "products", [logits]),
        ({"backward": True}, "products", [logits, logits, d_hidden, d_weight]),
        ({"backward": True}, "products_kept", [logits, d_hidden, d_weight]),
        ({"frozen": True, "backward": True}, "products", [logits, d_hidden]),
    ):
        problem = LinearLogprobsCase(20, 40, 333, **options).build()
        (floor,) = (p for p in problem.providers if p.name == name)
        run = floor.prepare()
        made.clear()
        run()
        assert made == wanted and f" {len(wanted)} matrix product" in floor.label


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_on_the_head_passes_its_own_check(divergence: str) -> None:
    names = ("fastpo_kept", "products", "products_kept")
    outcomes: dict[str, Outcome] = {}
    check(LinearDivergenceCase(20, 40, 333, divergence).build(), outcomes, names)
    assert set(outcomes) == {"fastpo", "eager", *names}
    assert all(o.status in ("ok", "floor") for o in outcomes.values())
    assert set(outcomes["fastpo"].errors) == {"loss", "hidden_gradient", "weight_gradient"}


def test_dpo_on_the_head_passes_its_own_check() -> None:
    names = ("fastpo_kept", "products", "products_kept")
    outcomes: dict[str, Outcome] = {}
    check(LinearDpoCase(4, 10, 40, 333).build(), outcomes, names)
    assert set(outcomes) == {"fastpo", "eager", *names}
    assert all(o.status in ("ok", "floor") for o in outcomes.values())
    gradients = {"hidden_gradient", "weight_gradient"}
    assert set(outcomes["fastpo"].errors) == {"loss", "chosen_rewards", "rejected_rewards"} | gradients


def test_providers_that_would_take_too_much_are_named() -> None:
    case = LinearLogprobsCase(4, 8, 50, backward=True)
    reasons = {"eager": "26 GB", "fastpo_kept": "9 GB"}
    outcomes = measure(case, only=("fastpo_kept", "products"), repetitions=1, skip=reasons).outcomes
    assert {name: o.reason for name, o in outcomes.items() if o.status == "skipped"} == reasons
    assert outcomes["fastpo"].seconds is not None
    assert "eager torch: skipped, 26 GB" in table(summarise([measure(case, only=(), repetitions=1, skip=reasons)]))


def test_the_check_sees_a_slightly_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    true = TokenLogprobsCase._fastpo
    monkeypatch.setattr(TokenLogprobsCase, "_fastpo", lambda *args: [1.000002 * o for o in true(*args)])
    for backward in (False, True):
        with pytest.raises(CheckFailedError, match="fastpo gives a wrong result"):
            measure(TokenLogprobsCase(4, 100, backward=backward), only=(), repetitions=1)


@pytest.mark.parametrize("wrong", ["logprobs", "hidden_gradient", "weight_gradient"])
def test_the_check_sees_a_slightly_wrong_head(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    true = linear_logprobs.fastpo_head("fastpo")

    def steeper(t: Tensor, name: str) -> Tensor:
        """The same numbers, with a gradient that is too large."""
        return t + 1e-5 * (t - t.detach()) if name == wrong else t

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found = true(steeper(hidden, "hidden_gradient"), steeper(weight, "weight_gradient"), targets)
        return found + 1e-5 if wrong == "logprobs" else found

    monkeypatch.setattr(linear_logprobs, "fastpo_head", lambda name: head)
    with pytest.raises(CheckFailedError, match=f"fastpo, logits computed again gives a wrong result: {wrong}"):
        check(LinearLogprobsCase(8, 16, 100, backward=True).build(), {}, ())


def test_fresh_processes() -> None:
    (runs,) = measure_in_processes([ObjectiveCase(8)], 2, only=("read",), repetitions=1)
    assert [set(run.outcomes) for run in runs] == [{"fastpo", "eager", "read"}] * 2


def test_command_prints_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    sizes = ["--rows", "3", "--vocab", "50", "--stats", "entropy", "--processes", "1", "--repetitions", "2"]
    code = main(["token_logprobs", *sizes, "--providers", "read", "cached", "--json", str(file)])
    assert code == 0
    printed = capsys.readouterr().out
    assert "token_logprobs 3 x 50 float32, forward + entropy" in printed and "eager torch" in printed
    found = json.loads(file.read_text())
    assert {"date", "cpu", "cores", "instruction_set", "torch", "fastpo_kernels"} <= set(found["environment"])
    (case,) = found["cases"]
    assert set(case["providers"]) == {"fastpo", "eager", "read", "cached"}
    eager = case["providers"]["eager"]
    times = {"seconds", "seconds_each", "gb_per_s", "speed"}
    assert set(eager) == {"label", "status", "reason", "errors", "peak_bytes", "result_bytes", *times}
    assert len(eager["seconds_each"]) == 1 and eager["result_bytes"] == 2 * 3 * 4
    assert eager["speed"]["min"] <= eager["speed"]["median"] <= eager["speed"]["max"]
    assert case["bar"]["floors"] == ["read", "cached"]
    assert main(["objective", "--pairs", "5", "--tokens", "4", "--processes", "1", "--providers"]) == 0
    assert main(["vocab_divergence", "--rows", "3", "--vocab", "50", "--processes", "1", "--providers"]) == 0
    sizes = ["--hidden", "8", "--vocab", "50", "--processes", "1", "--repetitions", "1", "--providers", "products"]
    assert main(["linear_logprobs", "--rows", "6", "--prompt", "0.3", "--frozen", "--backward", *sizes]) == 0
    assert "linear_logprobs 6 x 8 x 50 float32, 30% prompt, forward + backward" in capsys.readouterr().out
    assert main(["linear_divergence", "--rows", "8", "--divergence", "jsd", *sizes]) == 0
    assert "jsd on the head 8 x 8 x 50 float32, 50% prompt" in capsys.readouterr().out
    assert main(["linear_dpo", "--sequences", "2", "--tokens", "4", *sizes]) == 0
    assert "dpo on the head 2 x 4 x 8 x 50 float32, 50% prompt" in capsys.readouterr().out


def test_command_refuses_when_fastpo_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    true = TokenLogprobsCase._fastpo
    monkeypatch.setattr(TokenLogprobsCase, "_fastpo", lambda *args: [o + 1e-3 for o in true(*args)])
    file = tmp_path / "out.json"
    sizes = ["--rows", "3", "--vocab", "50", "--processes", "1", "--json", str(file)]
    assert main(["token_logprobs", *sizes, "--providers"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and not file.exists()
    assert "fastpo gives a wrong result: logprobs: error 1.00e-03" in printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["token_logprobs", "--rows", "0"],
        ["objective", "--formula", "x"],
        ["linear_logprobs", "--prompt", "1"],
        ["linear_dpo", "--sequences", "3"],
    ],
)
def test_command_refuses_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_command_refuses_a_missing_folder_before_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objective", "--pairs", "5", "--json", "no/such/folder/x.json"]) == 2
    assert "no directory" in capsys.readouterr().err
