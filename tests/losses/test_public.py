"""What `fastpo.losses` shows to users: signatures, docstrings and the type stub."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from fastpo import losses
from fastpo.losses import _build, _listwise, _policy
from fastpo.reference import objectives


def test_stub_is_up_to_date():
    written = Path(losses.__file__).with_name("__init__.pyi").read_text()
    assert written == _build.stub() + _policy.stub() + _listwise.stub(), "run python -m fastpo.losses"


@pytest.mark.parametrize("row", list(objectives()), ids=lambda row: row.name)
def test_signature_and_docstring(row):
    function = getattr(losses, row.name)
    parameters = inspect.signature(function).parameters
    tensors = [f"{model}_{side}" if side else model for model in row.models for side in row.sides]
    tensors += [given.name for given in row.inputs]
    assert [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == tensors
    assert all(f"{name}: " in function.__doc__ for name in parameters if name in {g.name for g in row.inputs})
    assert all(name in function.__doc__ for name in parameters)
    for name, default in row.defaults.items():
        assert parameters[name].default == default
        assert f"{name}: in {row.domains[name]}." in function.__doc__
    for name, values in row.options.items():
        assert parameters[name].default == values[0]
    for text in (row.paper, row.equation, "Args:", "Returns:", "Raises:"):
        assert text in function.__doc__
    assert function.__name__ == row.name and function.__module__ == "fastpo.losses"


def test_the_readme_names_every_objective():
    text = (Path(losses.__file__).parents[2] / "README.md").read_text()
    functions = [name for name in losses.__all__ if name[0].islower()]
    assert [name for name in functions if f"`{name}`" not in text] == []


def test_unknown_objective():
    with pytest.raises(AttributeError, match="no objective 'dppo'; it has dpo, cdpo"):
        _ = losses.dppo
