"""`fastpo.token_logprobs` and its peers, under pytest-benchmark: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import TOKEN_LOGPROBS

from fastpo.bench import TokenLogprobsCase


@pytest.mark.parametrize("prepared", TOKEN_LOGPROBS, indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", TokenLogprobsCase.PROVIDERS)
def test_token_logprobs(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)
