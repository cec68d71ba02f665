"""DPO from hidden states and its peers, under pytest-benchmark: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import LINEAR_DPO

from fastpo.bench import LinearDpoCase


@pytest.mark.parametrize("prepared", LINEAR_DPO, indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", LinearDpoCase.PROVIDERS)
def test_linear_dpo(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)
