# `make train` and `make test` need Python 3.11 or newer, make and a package registry; they set up the rest.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= data/demo
# overrides for the demo run, e.g. make train ARGS="trainer.max_steps=200"
ARGS   ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install install-dev train test test-gpu test-faults lint format bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */	/' | expand -t 14

install: $(VENV)/.installed  ## create .venv with everything that training needs
install-dev: $(VENV)/.installed-dev  ## the same with what tests and lint need

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than Python 3.11; give a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# The stamps make a second call free; a changed pin or dependency installs again.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing Interloom and the versions of constraints.txt into $(VENV) (about 2 minutes)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing Interloom with the tools of tests and lint into $(VENV) (about 3 minutes)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(DATA)/classes.txt: | $(VENV)/.installed
	@echo "==> drawing the demo scenes into $(DATA)"
	@$(BIN)/interloom data demo --out $(DATA)

train: $(VENV)/.installed $(DATA)/classes.txt  ## set up, draw the demo data, pretrain GroupViT on it and show its segments
	@echo "==> training on captions alone, then segmenting held-out scenes (about 10 minutes on two cores)"
	@$(BIN)/interloom train experiment=groupvit_demo data.root=$(DATA) $(ARGS)

test: $(VENV)/.installed-dev  ## set up and run the tests that need no GPU
	@echo "==> running the tests"
	@$(BIN)/python -m pytest -q -m "not gpu and not faults"

test-gpu: $(VENV)/.installed-dev  ## the tests that need a GPU
	@$(BIN)/python -m pytest -q -m gpu

test-faults: $(VENV)/.installed-dev  ## the tests that kill processes and fill disks
	@$(BIN)/python -m pytest -q -m faults

lint: $(VENV)/.installed-dev  ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: $(VENV)/.installed-dev  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.installed  ## the cost of every kernel on this machine
	@$(BIN)/interloom bench kernels

clean:  ## remove build outputs; keeps .venv, data and runs
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
