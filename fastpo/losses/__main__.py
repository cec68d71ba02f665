"""Writes the type stub of this package: `python -m fastpo.losses`."""

from pathlib import Path

from fastpo.losses import _build, _listwise, _policy

Path(__file__).with_name("__init__.pyi").write_text(_build.stub() + _policy.stub() + _listwise.stub())
