# Thin names for the commands of the README. Each sets up what it needs in .venv.
PYTHON ?= python3
# any torch >= 2.10 serves; this one is what the tests are run with
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: demo test lint bench clean

demo: $(VENV)/installed
	$(BIN)/fastpo train dpo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp')
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/report.py

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy setuptools wheel pybind11 ninja
	touch $@

# torch is there already, so the build needs no isolation, which would fetch another one
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build fastpo/*.so fastpo.egg-info
