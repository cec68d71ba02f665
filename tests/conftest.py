"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

# Triton kernels run in its interpreter, which is chosen when Triton is imported; on a GPU, set this to 0
os.environ.setdefault("TRITON_INTERPRET", "1")
# threads of workers that share the cores would spin where another could work: a third of the time of the kernels' tests
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# whose tests share nothing that takes long to make
SHARED_OUT = ("tests/training/test_trained.py",)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` a file is one worker's, but for a few files, of which each test is."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith(SHARED_OUT) else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The reference has no instruction set."""
    for item in items:
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
