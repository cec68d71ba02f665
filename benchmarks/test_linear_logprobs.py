"""`fastpo.linear_logprobs` and its peers, under pytest-benchmark: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import LINEAR_LOGPROBS, LINEAR_LOGPROBS_BFLOAT16

from fastpo.bench import LinearLogprobsCase


@pytest.mark.parametrize(
    "prepared", (*LINEAR_LOGPROBS, *LINEAR_LOGPROBS_BFLOAT16), indirect=True, ids=lambda case: case.name
)
@pytest.mark.parametrize("provider", LinearLogprobsCase.PROVIDERS)
def test_linear_logprobs(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)
