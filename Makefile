# make demo: everything in small. make test: all tests. Both set up .venv first; `make help` lists the rest.

PYTHON ?= python3
# The release of torch. V100 users: TORCH=2.10.0, the last on PyPI whose wheels hold kernels for them (sm_70).
TORCH ?= $(shell sed -n 's/^torch==//p' requirements-cuda.txt)
# Where torch comes from, if not from PyPI (with an NVIDIA GPU) or PyTorch's CPU index (without one, if it can be reached).
TORCH_INDEX ?=
SIZE ?= full
DEVICE ?= cpu
IMAGES ?=
OUT ?=
# s3: the demo starts an object store and trains from it.
STORE ?=
# Which tests: any of unit distributed store e2e slurm gpu.
MARKS ?= unit distributed store e2e slurm gpu

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
BIN := .venv/bin
STAMP := .venv/.installed
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH

.PHONY: help setup demo test lint format cluster clean

help:
	@echo "make demo [SIZE=smoke|full] [IMAGES=folder] [DEVICE=cpu|cuda] [OUT=folder] [STORE=s3]"
	@echo "                                                                            the main job in small"
	@echo "make test [MARKS=\"unit distributed store e2e slurm gpu\"]                      the tests"
	@echo "make setup [PYTHON=python3] [TORCH=$(TORCH)] [TORCH_INDEX=url]               .venv alone (V100: TORCH=2.10.0)"
	@echo "make cluster                                                                a Slurm of 8 nodes to play with (root)"
	@echo "make lint | format | clean                                                  clean keeps what the demo and runs wrote"

setup: $(STAMP)

$(STAMP): requirements.txt requirements-cuda.txt pyproject.toml tools/install.sh
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" bash tools/install.sh .venv
	@touch $@

demo: $(STAMP)
	@$(BIN)/pixart-ds demo --size "$(SIZE)" --device "$(DEVICE)" $(if $(IMAGES),--images "$(IMAGES)") $(if $(OUT),--out "$(OUT)") \
	  $(if $(STORE),--store "$(STORE)")

# One line and its time for a check that passes, what it found for one that fails.
define check
@found=$$($(BIN)/$(1) 2>&1) || { echo "$$found"; exit 1; }; echo "── $(1): $$SECONDS s"
endef

lint: $(STAMP)
	$(call check,ruff check .)
	$(call check,ruff format --check .)
	$(call check,mypy)
	$(call check,lint-imports)

format: $(STAMP)
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

test: lint
	@bash tools/test.sh $(BIN) $(MARKS)

# A Slurm on this machine, in a shell; it ends with the shell.
cluster: $(STAMP)
	@PATH="$(abspath $(BIN)):$$PATH" bash tests/slurm/cluster.sh shell

clean:
	rm -rf .venv .venv-swift build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
