"""Fixtures for the pytest-benchmark files: one case is built and checked once, for all its providers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastpo.bench import Case, CheckFailedError
from fastpo.bench.harness import Outcome, Run, check


@dataclass
class Prepared:
    """A case whose providers were checked; `problem` says why nothing of it may be timed."""

    case: Case
    runs: dict[str, Run] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    problem: str | None = None


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest) -> Prepared:
    found = Prepared(request.param)
    try:
        found.runs = check(found.case.build(), found.outcomes, None)
    except CheckFailedError as error:
        found.problem = str(error)
    return found


@pytest.fixture
def timed(prepared: Prepared, benchmark: BenchmarkFixture) -> Callable[[str], None]:
    """Times one provider of the prepared case, if its result is right."""

    def time(provider: str) -> None:
        if prepared.problem:
            pytest.fail(prepared.problem)
        outcome = prepared.outcomes.get(provider)
        if outcome is None:
            pytest.skip("not a provider of this case")
        if outcome.status == "skipped":
            pytest.skip(f"{outcome.label}: {outcome.reason}")
        if outcome.status == "failed":
            pytest.fail(f"{outcome.label} gives a wrong result: {outcome.reason}")
        benchmark.group = prepared.case.name
        benchmark.extra_info["errors"] = outcome.errors
        benchmark(prepared.runs[provider])
        if outcome.bytes and benchmark.stats:
            benchmark.extra_info["gb_per_s"] = outcome.bytes / benchmark.stats.stats.median / 1e9

    return time
