# make demo: everything in small. make test: all tests. Both set up .venv first; `make help` lists the rest.

PYTHON ?= python3
# V100 users: TORCH=2.10.0, the last release on PyPI whose wheels hold kernels for them (sm_70).
TORCH ?= 2.13.0
# Where torch's CPU build comes from on a machine without an NVIDIA GPU, if it can be reached.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
SIZE ?= full
DEVICE ?= cpu
IMAGES ?=
OUT ?=
# Which tests: any of unit distributed store e2e slurm gpu.
MARKS ?= unit distributed store e2e slurm gpu

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
BIN := .venv/bin
STAMP := .venv/.installed
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH

.PHONY: help setup demo test lint format clean

help:
	@echo "make demo [SIZE=smoke|full] [IMAGES=folder] [DEVICE=cpu|cuda] [OUT=folder]   the main job in small"
	@echo "make test [MARKS=\"unit distributed store e2e slurm gpu\"]                      the tests"
	@echo "make lint | format | setup | clean"

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml Makefile tools/install.sh
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" bash tools/install.sh .venv
	@touch $@

demo: $(STAMP)
	@$(BIN)/pixart-ds demo --size "$(SIZE)" --device "$(DEVICE)" $(if $(IMAGES),--images "$(IMAGES)") $(if $(OUT),--out "$(OUT)")

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

test: lint
	@bash tools/test.sh $(BIN) $(MARKS)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
