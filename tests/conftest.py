"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Triton kernels run in its interpreter, which is chosen when Triton is imported; on a GPU, set this to 0
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


# before pytest-xdist's, which reads the groups
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The reference has no instruction set. A file is one worker's, unless its tests say otherwise."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
        if getattr(item, "callspec", None) is not None and item.callspec.params.get("backend") == "reference":
            item.add_marker("once")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns, also inside C++, with NaN: reading it before writing shows in the result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
