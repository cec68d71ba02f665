"""The standard cases, and what is asked of fastpo in them on a machine with two cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastpo.bench import Case, ObjectiveCase, TokenLogprobsCase, VocabDivergenceCase

FORWARD = TokenLogprobsCase(512, 50_000)
ENTROPY = TokenLogprobsCase(512, 50_000, stats=("entropy",))
BACKWARD = TokenLogprobsCase(512, 50_000, backward=True)
BFLOAT16 = TokenLogprobsCase(512, 50_000, dtype="bfloat16")

TOKEN_LOGPROBS = (FORWARD, ENTROPY, BACKWARD, BFLOAT16)
VOCAB_DIVERGENCE = tuple(VocabDivergenceCase(backward=backward) for backward in (False, True))
OBJECTIVE = tuple(
    ObjectiveCase(pairs, tokens, backward=backward)
    for pairs, tokens in ((8, 0), (65_536, 0), (1_048_576, 0), (64, 4096))
    for backward in (False, True)
)
GROUPS: dict[str, tuple[Case, ...]] = {
    "token_logprobs": TOKEN_LOGPROBS,
    "vocab_divergence": VOCAB_DIVERGENCE,
    "objective": OBJECTIVE,
}


@dataclass(frozen=True)
class Target:
    """A number asked of fastpo in a case.

    "speed": at least `asked` times as fast as the provider `against`; "bar": at most `asked` times the
    longest of the case's floors; "error": the error of the log-probs at most `asked` times `against`'s.
    """

    case: Case
    kind: Literal["speed", "bar", "error"]
    asked: float
    against: str = ""

    def measured(self, summary: dict[str, Any]) -> dict[str, float] | None:
        """Median, min and max over the processes, or None if a provider that is needed did not run."""
        providers = summary["providers"]
        if self.kind == "bar":
            return summary["bar"]
        row = providers.get(self.against, {})
        if self.kind == "speed":
            return row.get("speed")
        if "errors" not in row:
            return None
        ratio = providers["fastpo"]["errors"]["logprobs"] / row["errors"]["logprobs"]
        return {"median": ratio, "min": ratio, "max": ratio}

    def met(self, value: float) -> bool:
        return value >= self.asked if self.kind == "speed" else value <= self.asked

    @property
    def text(self) -> str:
        return {
            "speed": f"speed over {self.against}",
            "bar": "time over the longer floor",
            "error": f"error over {self.against}'s",
        }[self.kind]


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
)
