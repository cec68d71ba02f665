"""Tests that need a GPU: `make gpu-check`. Elsewhere they are not collected.

FASTPO_TEST_DEVICE=cpu runs on the CPU what does not speak of streams and graphs, to try the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.device import evaluated_on

DEVICE = torch.device(os.environ.get("FASTPO_TEST_DEVICE", "cuda"))
# thousands of skipped cases would say no more
collect_ignore_glob = ["test_*.py"] if DEVICE.type == "cuda" and not torch.cuda.is_available() else []


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with evaluated_on(DEVICE):
        yield DEVICE


@pytest.fixture
def cuda(device) -> torch.device:
    """For what only a CUDA device has."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device
