"""Triton's interpreter, without what it does again and again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def language_patched_once() -> Iterator[None]:
    """The interpreter patches its language at a launch, and once more at every call of a function inside, where the
    search for what is left to patch would be more than a quarter of its time."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    tl, patch = interpreter.tl, interpreter._patch_lang

    def once(function: Callable[..., Any]) -> Any:
        modules = [m for m in function.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core)]
        return patch(function) if not modules or any(tl.core.is_builtin(m.load) for m in modules) else None

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", once)
        yield
