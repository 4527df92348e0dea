# `make` lists the targets. Settings, e.g. `make install PYTHON=python3.12`:
#   PYTHON       the Python that makes the environment (3.11 or newer)
#   TORCH_INDEX  address of PyTorch's CPU-only wheel index; without it torch is what pip finds (on Linux: the CUDA build)
#   VENV         where the environment lies
#   WORKERS      test processes; auto: one per core, eight at most
#   BUDGET, SEEDS, ONLY   of a paper's table or figure: how long, how many seeds, which rows (a pattern)
PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
WORKERS ?= auto

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per test process, so that they do not fight for the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 -m "not slow and not gpu"
TRIAL = model=tiny dataset=synthetic budget=smoke out=outputs/smoke

# One target for each card of conf/paper: flexor-table1, pact-table1 ...
CARDS := $(subst _,-,$(basename $(notdir $(wildcard conf/paper/*.yaml))))
PAPER = $(BIN)/qbench paper
STUDY = $(if $(SEEDS),seeds=$(SEEDS)) $(if $(ONLY),only='$(ONLY)')

.DEFAULT_GOAL := help
.PHONY: help install demo test lint type smoke papers bench bench-check bench-page clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo "  make CARD        a table or figure of conf/paper, e.g. make flexor-table1 BUDGET=short SEEDS=3 ONLY='resnet20*'"

install: $(STAMP)  ## make .venv and install qbench with its pinned dependencies (again only when these changed)

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' VENV='$(VENV)' scripts/install.sh
	@touch $@

demo: $(STAMP)  ## the first experiment: 4-bit PACT on the digits that come with scikit-learn, half a minute
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

papers: $(STAMP)  ## all tables and figures of conf/paper; BUDGET=smoke (default) composes each row and tries two of each card
	$(PAPER) all budget=$(or $(BUDGET),smoke) $(STUDY)

$(CARDS): $(STAMP)
	$(PAPER) $(subst -,_,$@) budget=$(or $(BUDGET),short) $(STUDY)

bench: $(STAMP)  ## measure how fast everything is here, about eight minutes; outputs/bench.json
	$(BIN)/qbench bench out=outputs

bench-check: $(STAMP)  ## a short run against docs/benchmarks.json: fails when a ratio got worse by a quarter
	$(BIN)/qbench bench check

bench-page: $(STAMP)  ## write docs/benchmarks.md from docs/benchmarks.json
	$(BIN)/qbench bench page

clean:  ## remove the environment, caches and built files; results and data stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find qbench tests -name __pycache__ -type d -prune -exec rm -rf {} +
