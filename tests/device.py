"""Where the kernel tests evaluate: on the CPU, unless tests/gpu says otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

_current = torch.device("cpu")
T = TypeVar("T")


@contextlib.contextmanager
def evaluated_on(device: torch.device | str) -> Iterator[None]:
    global _current
    before, _current = _current, torch.device(device)
    try:
        yield
    finally:
        _current = before


def to_device(value: T) -> T:
    """A tensor on the device in force, with its strides, its offset in the storage and what is around it."""
    if not isinstance(value, Tensor) or value.device == _current:
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.detach().untyped_storage())
    return storage.to(_current).as_strided(value.shape, value.stride(), value.storage_offset())
