"""The products of state-space layers and their peers, under pytest-benchmark: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import CAUCHY, VANDERMONDE

from fastpo.bench import StateSpaceCase


@pytest.mark.parametrize("prepared", (*CAUCHY, *VANDERMONDE), indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", StateSpaceCase.PROVIDERS)
def test_state_space(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)
