# make demo   set up, then the whole job on the embedded model: table, figures, runs/demo/report.html
# make test   set up, then the tests
# make test-slow   the tests that are marked slow, as far as CI runs them
# make test-all    all of them: every method in every family and situation
# make lint   set up, then ruff, mypy and the way of the imports
#
# Set-up makes .venv once, and again when pyproject.toml or constraints.txt change.
# PYTHON=python3.12 picks an interpreter; PIP_ARGS is passed to pip, PYTEST_ARGS to pytest.

SHELL := /bin/bash
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=

# Where this is set, as in many containers, every process would compile transformers again: ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CODE := src tests training examples
# A process takes tests that stand together, so that what they share is made once.
PYTEST := $(BIN)/python -m pytest -q --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: help setup demo test test-slow test-all lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(READY)

demo: $(READY)
	$(BIN)/pore demo $(DEMO_ARGS)

test: $(READY)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(READY)
	$(PYTEST) -m "slow and not exhaustive" $(PYTEST_ARGS)

test-all: $(READY)
	$(PYTEST) $(PYTEST_ARGS)

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

# One step of set-up: what it is, and the names of the packages as pip finds them, which may be many. They are
# not compiled here: most modules of transformers are never imported, and the others are compiled then.
define install
	@echo "[$(1)] $(2)"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile \
		$(PIP_ARGS) -c constraints.txt $(3) | while read -r what name _; do \
			case $$what in \
				Collecting | Processing) name=$${name##*/}; name=$${name%%[^A-Za-z0-9._-]*}; name=$${name%%-[0-9]*}; \
					[ $${at:=0} -gt 0 ] || printf '     '; printf ' %s' "$$name"; at=$$((at + $${#name} + 1)); \
					[ $$at -lt 60 ] || { echo; at=0; } ;; \
				Installing) [ $${at:-0} = 0 ] || echo; at=0; echo "      found all, and unpacks them" ;; \
			esac; \
		done
endef

# torch goes first, in exactly the version of the constraints, so that nothing after it takes another.
# Which build of it comes is pip's choice: see CONTRIBUTING.md for one without CUDA.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pore needs Python 3.10")'
	@echo "Setting up $(VENV), once. It takes 80 seconds of one core and what the download takes, and 1.6 GB of"
	@echo "disk; some gigabytes more where pip takes torch with CUDA (CONTRIBUTING.md: how to avoid that)."
	@echo "[1/3] an environment for $$($(PYTHON) -V)"
	@$(PYTHON) -m venv --clear $(VENV)
	$(call install,2/3,$$(grep '^torch=' constraints.txt) and what it needs,torch)
	$(call install,3/3,transformers and all else that pore and its tests need,-e '.[dev]')
	@$(BIN)/python -c 'import os, sys, time; took = time.time() - os.path.getmtime(sys.argv[1]); \
		print(f"Ready after {took:.0f} seconds, with {sys.argv[2]} of disk.")' \
		$(VENV)/pyvenv.cfg $$(du -sh $(VENV) | cut -f1)
	@touch $@
