"""The objectives on lists and their peers, under pytest-benchmark: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import LISTWISE

from fastpo.bench import ListwiseCase


@pytest.mark.parametrize("prepared", LISTWISE, indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", ListwiseCase.PROVIDERS)
def test_listwise(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)
