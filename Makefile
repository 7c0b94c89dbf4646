# Everything a person or CI does with this repository. `make help` lists it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
SUITE ?= data control
SCALE ?= 1
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test soak check gen bench format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo $(VENV)/.psana ## Set up, then stream a real run from xtc2 files to HDF5 files, and verify it
	@$(BIN)/python examples/demo.py

test: $(VENV)/.dev $(VENV)/.psana ## Set up, then run every test that this machine can
	@$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

soak: $(VENV)/.dev ## Kill, cut and corrupt, frames by the million and services at each step: make soak SCALE=0.1
	@$(BIN)/python -m tests.faults --scale $(SCALE)

check: $(VENV)/.dev ## Contract, style, types, arrows between rooms, docs
	$(BIN)/python gen/generate.py --check
	$(BIN)/python docs/generate.py --check
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking gen/beamwire.binpb --against protos/baseline.binpb --path beamwire
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy mesh services clients/python tests bench examples gen/generate.py docs/generate.py
	$(BIN)/pyright
	$(BIN)/lint-imports

gen: $(VENV)/.dev ## Regenerate gen/ from protos/
	$(BIN)/python gen/generate.py
	$(BIN)/python docs/generate.py

bench: $(VENV)/.dev ## Measure beside baselines: make bench SUITE=data
	$(BIN)/python -m bench $(SUITE)

format: $(VENV)/.dev ## Format everything
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/buf format --write

clean: ## Remove what was made here
	rm -rf $(VENV) .cache bench-results demo-output

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[hdf5,mpi]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# Where psana cannot be installed, the stamp keeps the reason, and demo and tests say so.
$(VENV)/.psana: deploy/install_psana.py | $(BIN)/python
	@$(BIN)/python deploy/install_psana.py || true
	@touch $@
