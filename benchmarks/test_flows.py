"""SubTB and its definition, under pytest-benchmark: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import FLOWS

from fastpo.bench import SubTbCase


@pytest.mark.parametrize("prepared", FLOWS, indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", SubTbCase.PROVIDERS)
def test_flows(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)
