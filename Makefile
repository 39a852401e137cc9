# `make train` and `make test` need Python 3.11 or newer, make and a package registry; they set up the rest.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# overrides for the demo run, e.g. make train ARGS="trainer.max_steps=200"
ARGS   ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install install-dev train demo-idefics test test-gpu gpu-day test-faults test-triton compiled lint format bench clean

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

train: $(VENV)/.installed  ## set up, draw the demo data, pretrain GroupViT on it and show its segments
	@echo "==> drawing the demo scenes into data/demo, unless they are there"
	@$(BIN)/interloom data demo --out data/demo
	@echo "==> training on captions alone, then segmenting held-out scenes (about 8 minutes on two cores)"
	@$(BIN)/interloom train experiment=groupvit_demo $(ARGS)
	@echo "==> segments of held-out scenes: runs/groupvit_demo/latest/segments.png"

demo-idefics: $(VENV)/.installed  ## the same for IDEFICS on documents of pictures and text (about 14 minutes)
	@echo "==> drawing the demo documents into data/demo-interleaved, unless they are there"
	@$(BIN)/interloom data demo --kind interleaved --out data/demo-interleaved
	@echo "==> training from scratch, then answering questions about held-out documents (about 13 minutes on two cores)"
	@$(BIN)/interloom train experiment=idefics_demo $(ARGS)
	@echo "==> answers, loss and gates: runs/idefics_demo/latest/grounding.png, curves.png; what it wrote: samples/"

test: $(VENV)/.installed-dev  ## set up and run the tests that need no GPU
	@echo "==> running the tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not gpu and not faults and not weights"

test-gpu: $(VENV)/.installed-dev  ## the kernel tests that need a GPU (2 minutes); make gpu-day for times
	@TRITON_INTERPRET=0 $(BIN)/python -m pytest -q -m gpu tests/kernels

gpu-day:  ## check and time everything on the GPU of this machine, in 8 minutes; needs no install but PyTorch
	@$(PYTHON) train/bench/gpu_day.py

# A release that came with torch 2.11, and the newest; the pinned one is what `make test` runs.
TRITONS ?= 3.6.0 3.9.0
# The harness itself, not the kernels: counts, tables and reports.
HOST_ONLY := bench

test-triton: $(VENV)/.installed-dev  ## the kernel tests in the interpreters of Triton 3.6 and 3.9
	@for version in $(TRITONS); do \
	  echo "==> installing Triton $$version beside .venv, and running the kernel tests with it" && \
	  { test -d .cache/triton-$$version/triton || \
	    $(BIN)/python -m pip install --quiet --no-deps --target .cache/triton-$$version triton==$$version; } && \
	  PYTHONPATH=.cache/triton-$$version OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile \
	    -m "not slow and not gpu" --hypothesis-profile=brief $(addprefix --ignore=tests/kernels/,$(HOST_ONLY)) \
	    tests/kernels || exit 1; \
	done

test-faults: $(VENV)/.installed-dev  ## the tests that kill processes and fill disks
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m faults

compiled: $(VENV)/.installed-dev  ## compile every kernel for seven GPU architectures; compare with the committed table
	@$(BIN)/python -m interloom.kernels.bench.compiled

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
