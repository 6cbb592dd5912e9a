# Works on a fresh clone with nothing but Python >= 3.11 and make: a target creates
# .venv (or uses the one that is there), installs what it needs, once, and runs.
#
#   make test PYTHON=python3.12        another interpreter for a new .venv
#   make test ARGS="-k rigl"           more arguments for the command
#   make demo JAX_PLATFORMS=cuda       another backend than the CPU

PYTHON ?= python3
ARGS ?=
JAX_PLATFORMS ?= cpu
export JAX_PLATFORMS

BIN := .venv/bin
EXPERIMENTS := .venv/.installed-experiments
DEV := .venv/.installed-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-all bench bench-compaction lint notebooks

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

demo: $(EXPERIMENTS) ## train sparse networks on real digits and write a report
	$(BIN)/python experiments/demo.py --workdir=runs/demo $(ARGS)

test: $(DEV) ## run the tests, without the slow ones, and the docstrings' examples
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-all: $(DEV) ## run every test, fully optimised
	XLA_FLAGS="$(XLA_FLAGS)" $(BIN)/python -m pytest -n 2 $(ARGS)

bench: $(EXPERIMENTS) ## measure mask updates and the steps between them
	$(BIN)/python benchmarks/mask_update.py $(ARGS)

bench-compaction: $(EXPERIMENTS) ## measure compaction: exactness, analysis, speed-up
	$(BIN)/python benchmarks/compaction.py $(ARGS)

lint: $(DEV) ## check style, format and types
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

notebooks: $(DEV) ## execute the notebooks
	$(BIN)/python -m pytest --nbmake notebooks/ $(ARGS)

# $(call require_python,INTERPRETER,REMEDY)
define require_python
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "sparsejax needs Python >= 3.11, got $(1): $$($(1) --version 2>&1). $(2)" >&2; \
	exit 1; }
endef

# $(call install,EXTRA)
define install
$(call require_python,$(BIN)/python,Remove .venv or make it anew with a later Python.)
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
@echo "Installing sparsejax[$(1)] into .venv: minutes the first time, then never again"
@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(1)]'
endef

$(BIN)/python:
	$(call require_python,$(PYTHON),Name another one: make PYTHON=/path/to/python3)
	$(PYTHON) -m venv .venv

# The stamps are touched last, so that an interrupted installation leaves none.
$(EXPERIMENTS): pyproject.toml | $(BIN)/python
	$(call install,experiments)
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(call install,dev)
	@touch $(EXPERIMENTS) $@
