"""The emulator runs each formula once, and sizes, layouts and dtypes on one formula."""

from __future__ import annotations

from pathlib import Path

import pytest

ONE_FORMULA = "ipo"  # it takes every argument that a pairwise objective has


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_wanted(item: pytest.Item) -> bool:
        row = getattr(item, "callspec", None) and item.callspec.params.get("row")
        return not row or row.name == ONE_FORMULA or Path(__file__).parent not in item.path.parents

    dropped = [item for item in items if not is_wanted(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if is_wanted(item)]
