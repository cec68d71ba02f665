"""GAE and group normalisation and their peers, under pytest-benchmark: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import ADVANTAGES, GROUPED

from fastpo.bench import GaeCase, GroupCase


@pytest.mark.parametrize("prepared", ADVANTAGES, indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", GaeCase.PROVIDERS)
def test_gae(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)


@pytest.mark.parametrize("prepared", GROUPED, indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", GroupCase.PROVIDERS)
def test_group_normalize(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)
