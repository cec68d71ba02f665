"""The standard cases, and what is asked of fastpo in them on a machine with two cores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastpo.bench import (
    Case,
    GaeCase,
    GroupCase,
    LinearDivergenceCase,
    LinearDpoCase,
    LinearLogprobsCase,
    ListwiseCase,
    ObjectiveCase,
    PolicyCase,
    StateSpaceCase,
    SubTbCase,
    TokenLogprobsCase,
    VocabDivergenceCase,
)
from fastpo.bench.listwise import OBJECTIVES as LIST_OBJECTIVES
from fastpo.bench.processes import spread
from fastpo.bench.state_space import PRODUCTS
from fastpo.bench.vocab_divergence import DIVERGENCES
from fastpo.kernels._tiles import MULTIPLIED_ON_CPUS

FORWARD = TokenLogprobsCase(512, 50_000)
ENTROPY = TokenLogprobsCase(512, 50_000, stats=("entropy",))
BACKWARD = TokenLogprobsCase(512, 50_000, backward=True)
BFLOAT16 = TokenLogprobsCase(512, 50_000, dtype="bfloat16")

HALF = LinearLogprobsCase(backward=True)
HALF_BFLOAT16 = LinearLogprobsCase(dtype="bfloat16", backward=True)
HALF_FROZEN = LinearLogprobsCase(frozen=True, backward=True)
WHOLE = LinearLogprobsCase(prompt=0.0, backward=True)
DPO = LinearDpoCase()

TOKEN_LOGPROBS = (FORWARD, ENTROPY, BACKWARD, BFLOAT16)
VOCAB_DIVERGENCE = (
    VocabDivergenceCase(),
    *(VocabDivergenceCase(divergence=name, backward=True) for name in DIVERGENCES),
)
OBJECTIVE = tuple(
    ObjectiveCase(pairs, tokens, backward=backward)
    for pairs, tokens in ((8, 0), (65_536, 0), (1_048_576, 0), (64, 4096))
    for backward in (False, True)
)
# every compiled formula on pairs: sizes, and how many times as fast as eager torch fastpo shall be on the geometric
# mean. On 8 pairs a call is nothing but dispatch, and eager's is lean
FORMULA_SIZES = {(8, 0): 1 / 1.2, (65_536, 0): 1.5, (1_048_576, 0): 2.5, (64, 2048): 3.0}
FORMULAS = tuple(
    ObjectiveCase(pairs, tokens, formula, backward=True, options=options)
    for pairs, tokens in FORMULA_SIZES
    for formula, options in ObjectiveCase.formulas()
)
GAE, LONG_GAE = GaeCase(), GaeCase(512, 4096)
RAGGED_GAE, PACKED_GAE = (GaeCase(512, 4096, layout) for layout in ("ragged", "packed"))
ADVANTAGES = (GAE, LONG_GAE, RAGGED_GAE, PACKED_GAE)
GROUP = GroupCase()
GROUPED = (GROUP, GroupCase(shuffled=True))
POLICY = tuple(PolicyCase(backward=backward) for backward in (False, True))
FLOWS = tuple(SubTbCase(backward=backward) for backward in (False, True))
LISTWISE = tuple(ListwiseCase(objective, backward=b) for objective in LIST_OBJECTIVES for b in (False, True))
CAUCHY, VANDERMONDE = (
    tuple(StateSpaceCase(product, backward=backward) for backward in (False, True)) for product in PRODUCTS
)
LINEAR_LOGPROBS = (HALF, HALF_FROZEN, WHOLE)
LINEAR_LOGPROBS_BFLOAT16 = (HALF_BFLOAT16,)
LINEAR_DPO = (DPO,)
LINEAR_DIVERGENCE = tuple(LinearDivergenceCase(divergence=name) for name in ("forward", "reverse", "jsd"))
GROUPS: dict[str, tuple[Case, ...]] = {
    "token_logprobs": TOKEN_LOGPROBS,
    "vocab_divergence": VOCAB_DIVERGENCE,
    "objective": OBJECTIVE,
    "formulas": FORMULAS,
    "policy": POLICY,
    "flows": FLOWS,
    "listwise": LISTWISE,
    "linear_logprobs": LINEAR_LOGPROBS,
    "linear_logprobs_bfloat16": LINEAR_LOGPROBS_BFLOAT16,
    "linear_dpo": LINEAR_DPO,
    "linear_divergence": LINEAR_DIVERGENCE,
    "advantages": ADVANTAGES,
    "groups": GROUPED,
    "state_space": (*CAUCHY, *VANDERMONDE),
}
# samples per process, fewer where a call takes a second
REPETITIONS = {
    "token_logprobs": 9,
    "vocab_divergence": 9,
    "objective": 9,
    "formulas": 5,
    "policy": 9,
    "flows": 5,
    "listwise": 9,
    "linear_logprobs": 3,
    "linear_logprobs_bfloat16": 3,
    "linear_dpo": 3,
    "linear_divergence": 3,
    "advantages": 5,
    "groups": 5,
    "state_space": 5,
}

# beside fastpo and eager torch; torch.compile would take an hour
ONLY: dict[str, tuple[str, ...]] = {"formulas": ()}
if torch.bfloat16 not in MULTIPLIED_ON_CPUS:
    # a call of eager torch takes a minute or two, and those of its peers as long
    ONLY["linear_logprobs_bfloat16"] = ("fastpo_kept", "fastpo_float32")


@dataclass(frozen=True)
class Sweep:
    """How time and memory grow: a line per provider over one number of the cases, a plot per value of another one.

    `work` says in proportion to what a provider's time and memory are taken to grow.
    """

    cases: tuple[Any, ...]
    providers: tuple[str, ...]
    over: str
    across: str
    work: tuple[str, ...]

    def work_of(self, case: Any) -> int:
        return math.prod(getattr(case, name) for name in self.work)


SWEEPS = {
    "linear_logprobs": Sweep(
        tuple(
            LinearLogprobsCase(rows, vocab=vocab, prompt=0.0, backward=True)
            for vocab in (32_768, 50_257, 131_072, 262_144)
            for rows in (512, 2048, 8192)
        ),
        ("fastpo_kept", "compile", "core", "trl"),
        "rows",
        "vocab",
        ("rows", "vocab"),
    ),
} | {
    product: Sweep(
        tuple(
            StateSpaceCase(product, 64, state, length, backward=True)
            for state in (16, 64, 256)
            for length in (1024, 4096, 16_384, 65_536)
        ),
        ("compile", "pykeops"),
        "length",
        "state",
        ("state", "length"),
    )
    for product in PRODUCTS
}


@dataclass(frozen=True)
class Target:
    """A number asked of one of fastpo's providers in a case.

    "speed": at least `asked` times as fast as the provider `against`; "time": at most `asked` times its time;
    "memory": at most `asked` times its memory beside the results; "error": the error of the log-probs at most
    `asked` times its own; "bar": at most `asked` times the longest of the case's floors.
    """

    case: Case
    kind: Literal["speed", "time", "memory", "error", "bar"]
    asked: float
    against: str = ""
    provider: str = "fastpo"

    def measured(self, summary: dict[str, Any]) -> dict[str, float] | None:
        """Median, min and max over the processes, or None if a provider that is needed did not run."""
        if self.kind == "bar":
            return summary["bar"]
        rows = [summary["providers"].get(name, {}) for name in (self.provider, self.against)]
        if self.kind == "error":
            values = [row["errors"]["logprobs"] for row in rows if "errors" in row]
            return spread([values[0] / values[1]]) if len(values) == 2 else None
        if any("seconds" not in row for row in rows):
            return None
        if self.kind == "memory":
            if any(row["peak_bytes"] is None for row in rows):
                return None
            own, other = (max(row["peak_bytes"] - row["result_bytes"], 1) for row in rows)
            return spread([own / other])
        pairs = zip(*(row["seconds_each"] for row in rows), strict=True)
        return spread([other / own if self.kind == "speed" else own / other for own, other in pairs])

    def met(self, value: float) -> bool:
        return value >= self.asked if self.kind == "speed" else value <= self.asked

    @property
    def text(self) -> str:
        what = {
            "speed": f"speed over {self.against}",
            "time": f"time over {self.against}",
            "memory": f"memory over {self.against}'s",
            "error": f"error over {self.against}'s",
            "bar": "time over the longer floor",
        }[self.kind]
        return what if self.provider == "fastpo" else f"{self.provider}: {what}"


@dataclass(frozen=True)
class Overall:
    """A speed over eager torch asked on the geometric mean over many cases."""

    what: str
    cases: tuple[ObjectiveCase, ...]
    asked: float

    def measured(self, summaries: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        """The mean of the cases' medians, their range, and the worst case; None if one is missing."""
        if any(case.name not in summaries for case in self.cases):
            return None
        speeds = {c.formula: summaries[c.name]["providers"]["eager"]["speed"]["median"] for c in self.cases}
        mean = math.exp(sum(map(math.log, speeds.values())) / len(speeds))
        worst = min(speeds, key=speeds.__getitem__)
        return {"median": mean, "min": speeds[worst], "max": max(speeds.values()), "worst": worst}


OVERALL = tuple(
    Overall(
        f"{len(ObjectiveCase.formulas())} formulas, {pairs} pairs" + f" x {tokens} tokens" * bool(tokens),
        tuple(c for c in FORMULAS if (c.pairs, c.tokens) == (pairs, tokens)),
        asked,
    )
    for (pairs, tokens), asked in FORMULA_SIZES.items()
)
TARGETS = (
    Target(FORWARD, "speed", 6.0, "eager"),
    Target(FORWARD, "speed", 4.5, "trl"),
    Target(FORWARD, "speed", 1.6, "compile"),
    Target(FORWARD, "bar", 1.3),
    Target(FORWARD, "error", 1.0, "eager"),
    Target(ENTROPY, "speed", 8.0, "trl"),
    Target(BACKWARD, "speed", 4.0, "eager"),
    Target(BACKWARD, "speed", 1.5, "compile"),
    Target(BFLOAT16, "speed", 1.0, "fastpo_float32"),
    Target(POLICY[1], "speed", 5.0, "eager"),
    Target(POLICY[1], "speed", 2.0, "compile"),
    *(Target(case, "speed", 50.0, "eager") for case in FLOWS),
    *(Target(case, "speed", 5.0, "eager") for case in LISTWISE if case.backward),
    *(Target(case, "speed", 3.0, "compile") for case in LISTWISE if case.backward),
    *(Target(cases[0], "speed", 35.0, "eager") for cases in (CAUCHY, VANDERMONDE)),
    *(Target(cases[0], "speed", 7.0, "pykeops") for cases in (CAUCHY, VANDERMONDE)),
    *(Target(cases[1], "speed", 25.0, "eager") for cases in (CAUCHY, VANDERMONDE)),
    # beside the results, a hundredth of what eager torch holds, which is every term
    *(Target(cases[1], "memory", 1 / 100, "eager") for cases in (CAUCHY, VANDERMONDE)),
    Target(DPO, "speed", 1.8, "eager"),
    Target(DPO, "speed", 1.45, "compile"),
    Target(DPO, "speed", 1.6, "liger"),
    Target(DPO, "memory", 1 / 8, "eager"),
    Target(DPO, "bar", 1.15),
    Target(DPO, "speed", 2.3, "eager", "fastpo_kept"),
    Target(DPO, "speed", 1.9, "compile", "fastpo_kept"),
    Target(DPO, "speed", 2.0, "liger", "fastpo_kept"),
    Target(DPO, "memory", 1 / 4, "eager", "fastpo_kept"),
    Target(DPO, "time", 1.15, "products_kept", "fastpo_kept"),
    *(
        Target(HALF, *asked, provider)
        for provider in ("fastpo", "fastpo_kept")
        for asked in (
            ("speed", 1.5, "core"),
            ("speed", 1.5, "trl"),
            ("speed", 1.0, "core_gathered"),
            ("speed", 1.0, "trl_gathered"),
            ("memory", 1 / 2, "core_gathered"),
            ("memory", 1 / 2, "trl_gathered"),
        )
    ),
    Target(HALF_BFLOAT16, "speed", 1.6, "fastpo_float32"),
    # 2.2 of one product
    Target(HALF_FROZEN, "bar", 1.1),
    Target(GAE, "speed", 300.0, "eager"),
    Target(GAE, "speed", 30.0, "torchrl"),
    Target(LONG_GAE, "bar", 3.0),
    Target(GROUP, "speed", 20.0, "loop"),
    Target(GROUP, "speed", 2.0, "eager"),
    Target(WHOLE, "speed", 1.0, "eager"),
    Target(WHOLE, "memory", 1 / 10, "eager"),
)
