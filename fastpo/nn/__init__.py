"""Modules with parameters: S4 and S4D kernels, their layer, and a language model of such layers.

`S4Config`, `S4LanguageModel` and `S4Cache` stand on transformers (`pip install "fastpo[train]"`), which is imported
when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastpo.nn import hippo
from fastpo.nn.s4 import Recurrence, S4DKernel, S4Kernel, S4Layer, advance, from_original

if TYPE_CHECKING:
    from fastpo.nn.language import S4Cache, S4Config, S4LanguageModel

_LANGUAGE = ("S4Cache", "S4Config", "S4LanguageModel")

__all__ = [
    "Recurrence",
    "S4Cache",
    "S4Config",
    "S4DKernel",
    "S4Kernel",
    "S4LanguageModel",
    "S4Layer",
    "advance",
    "from_original",
    "hippo",
]


def __getattr__(name: str) -> Any:
    if name in _LANGUAGE:
        from fastpo.nn import language

        return getattr(language, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
