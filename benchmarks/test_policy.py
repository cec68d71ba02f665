"""The policy objectives and their peers, under pytest-benchmark: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import POLICY

from fastpo.bench import PolicyCase


@pytest.mark.parametrize("prepared", POLICY, indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", PolicyCase.PROVIDERS)
def test_policy(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)
