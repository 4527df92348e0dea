# `make` lists the targets. Settings, e.g. `make install PYTHON=python3.12`:
#   PYTHON       the Python that makes the environment (3.11 or newer)
#   TORCH_INDEX  address of PyTorch's CPU-only wheel index; without it torch is what pip finds (on Linux: the CUDA build)
#   VENV         where the environment lies
#   WORKERS      test processes; auto: one per core, eight at most
PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
WORKERS ?= auto

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per test process, so that they do not fight for the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 -m "not slow and not gpu"
TRIAL = model=tiny dataset=synthetic budget=smoke out=outputs/smoke

.DEFAULT_GOAL := help
.PHONY: help install demo test lint type smoke clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## make .venv and install qbench with its pinned dependencies (again only when these changed)

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' VENV='$(VENV)' scripts/install.sh
	@touch $@

demo: $(STAMP)  ## the first experiment: 4-bit PACT on the digits that come with scikit-learn, about two minutes
	$(BIN)/qbench method=pact bits=4

test: $(STAMP)  ## run the tests, but for those marked slow or gpu
	$(PYTEST)

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)  ## check types
	$(BIN)/mypy

smoke: $(STAMP)  ## run the whole way, float parent to pictures, with numbers that mean nothing; seconds
	rm -rf outputs/smoke
	$(BIN)/qbench method=pact bits=4 $(TRIAL)
	$(BIN)/qbench table outputs/smoke

clean:  ## remove the environment, caches and built files; results and data stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find qbench tests -name __pycache__ -type d -prune -exec rm -rf {} +
