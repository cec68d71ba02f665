"""`fastpo.linear_divergence` and its peers, under pytest-benchmark: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import LINEAR_DIVERGENCE

from fastpo.bench import LinearDivergenceCase


@pytest.mark.parametrize("prepared", LINEAR_DIVERGENCE, indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", LinearDivergenceCase.PROVIDERS)
def test_linear_divergence(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)
