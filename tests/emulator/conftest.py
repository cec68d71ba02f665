"""The two ways in which the kernels are launched; and each formula runs once, sizes, layouts and dtypes on one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastpo.kernels import _native
from tests.emulator.harness import Emulator, build, build_ops, python_launch

ONE_FORMULA = "ipo"  # it takes every argument that a pairwise objective has


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_wanted(item: pytest.Item) -> bool:
        # the hook is shown the items of all folders
        if Path(__file__).parent not in item.path.parents or not hasattr(item, "callspec"):
            return True
        row = item.callspec.params.get("row")
        return row is None or row.name == ONE_FORMULA

    dropped = [item for item in items if not is_wanted(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if is_wanted(item)]


@pytest.fixture(scope="module")
def ops() -> Path:
    """The compiled launch, over the emulator."""
    return build_ops()


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator(build())


@pytest.fixture(params=[False, True], ids=["forward", "reverse"])
def checked(emulator: Emulator, request: pytest.FixtureRequest) -> Iterator[Emulator]:
    """The ops launched from Python, threads and blocks in both orders."""
    emulator.reversed = request.param
    emulator.launched.clear()
    with python_launch(emulator):
        yield emulator
    emulator.reversed = False


@pytest.fixture(params=["emulator", "_cuda"])
def exports(request: pytest.FixtureRequest, ops: Path) -> ctypes.CDLL:
    """What a build of the compiled launch says of its structs and grids."""
    found = [ops] if request.param == "emulator" else sorted(Path(_native.__file__).parents[1].glob("_cuda*.so"))
    if not found:
        pytest.skip("_cuda is not built: no nvcc")
    return ctypes.CDLL(str(found[0]))
