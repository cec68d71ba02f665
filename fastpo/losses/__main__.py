"""Writes the type stub of this package: `python -m fastpo.losses`."""

from pathlib import Path

from fastpo.losses._build import stub

Path(__file__).with_name("__init__.pyi").write_text(stub())
