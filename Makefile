# make demo   set up, then the whole job on the embedded model: table, figures, runs/demo/report.html
# make test   set up, then the tests
# make test-slow   the tests that are marked slow, which CI runs
# make lint   set up, then ruff, mypy and the way of the imports
#
# Set-up makes .venv once, and again when pyproject.toml or constraints.txt change.
# PYTHON=python3.12 picks an interpreter; PIP_ARGS is passed to pip, PYTEST_ARGS to pytest.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CODE := src tests training examples
PYTEST := $(BIN)/python -m pytest -q --numprocesses logical --maxprocesses 8

.PHONY: help setup demo test test-slow lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(READY)

demo: $(READY)
	$(BIN)/pore demo $(DEMO_ARGS)

test: $(READY)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(READY)
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV) build runs

# torch goes first, in exactly the version of the constraints, so that nothing after it takes another.
# Which build of it comes is pip's choice: see CONTRIBUTING.md for one without CUDA.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pore needs Python 3.10")'
	@echo "Setting up $(VENV), once: torch, then transformers and what the tests need. About 2 GB of disk, and"
	@echo "some gigabytes more where pip takes torch with CUDA (CONTRIBUTING.md says how to avoid that)."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@
