"""Names of another library replaced: all of them or none, and back."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple


class Swap(NamedTuple):
    """One name to be replaced.

    Attributes:
        module, path: where it is; "Class.method" for a method.
        build: from the original to what stands in its place.
        parameters: that the original must have, in this order; None for anything.
        everywhere: also wherever else the library has imported it by name.
        optional: whether it may be missing.
    """

    module: str
    path: str
    build: Callable[[Any], Any]
    parameters: tuple[str, ...] | None = None
    everywhere: bool = True
    optional: bool = False


class _Found(NamedTuple):
    owner: Any
    name: str
    original: Any
    swap: Swap


class Swaps:
    """A set of replacements in one library, made when it is constructed.

    Args:
        library: name of the package.
        version: of what is installed, for messages.
        swaps: what to replace.

    Raises:
        ImportError: a name is missing or takes other arguments; nothing has been replaced then.
    """

    def __init__(self, library: str, version: str, swaps: list[Swap]) -> None:
        self._library, self._version = library, version
        # owner, name, what was there, what stands there since
        self._undo: list[tuple[Any, str, Any, Any]] = []
        self._replaced: dict[int, tuple[Any, Any]] = {}
        found = [f for f in map(self._find, swaps) if f is not None]
        aliases: dict[int, Any] = {}
        for owner, name, original, swap in found:
            replacement = swap.build(original)
            self._set(owner, name, replacement)
            if swap.everywhere and isinstance(owner, ModuleType):
                aliases[id(original)] = replacement
                self._replaced[id(replacement)] = (replacement, original)
        self._rename(aliases, remember=True)

    def _find(self, swap: Swap) -> _Found | None:
        here = f"{swap.module}.{swap.path}"
        try:
            owner: Any = importlib.import_module(swap.module)
            *outer, name = swap.path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            # of a class its own, not what it inherits
            original = vars(owner)[name]
        except (ImportError, AttributeError, KeyError) as error:
            if swap.optional:
                return None
            raise ImportError(
                f"{self._library} {self._version} has no {here}, which this version of fastpo replaces; nothing was "
                f"changed ({type(error).__name__}: {error})"
            ) from error
        if swap.parameters is not None:
            takes = tuple(inspect.signature(original).parameters)
            if takes != swap.parameters:
                raise ImportError(
                    f"{self._library} {self._version}: {here} takes ({', '.join(takes)}), and this version of fastpo "
                    f"knows it with ({', '.join(swap.parameters)}); nothing was changed"
                )
        return _Found(owner, name, original, swap)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append((owner, name, vars(owner)[name], value))
        setattr(owner, name, value)

    def _rename(self, by_identity: dict[int, Any], *, remember: bool) -> None:
        """What the library's modules have imported by name."""
        inside = f"{self._library}."
        for name, module in list(sys.modules.items()):
            if module is None or not (name == self._library or name.startswith(inside)):
                continue
            for attribute, value in list(vars(module).items()):
                if id(value) in by_identity:
                    if remember:
                        self._set(module, attribute, by_identity[id(value)])
                    else:
                        setattr(module, attribute, by_identity[id(value)])

    def undo(self) -> None:
        """Everything as it was, in modules imported since too; what others have replaced since stays, and warns."""
        for owner, name, original, ours in reversed(self._undo):
            if vars(owner).get(name) is ours:
                setattr(owner, name, original)
            else:
                warnings.warn(
                    f"{owner.__name__}.{name} was replaced again since fastpo did, and is left as it is", stacklevel=4
                )
        self._undo.clear()
        self._rename({i: original for i, (_, original) in self._replaced.items()}, remember=False)
        self._replaced.clear()
