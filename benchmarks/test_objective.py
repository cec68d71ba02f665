"""The fused objectives and their peers, under pytest-benchmark: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import OBJECTIVE

from fastpo.bench import ObjectiveCase


@pytest.mark.parametrize("prepared", OBJECTIVE, indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", ObjectiveCase.PROVIDERS)
def test_objective(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)
