# The whole interface. Every target sets up what it needs; a second run finds it there.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export PYTHONPATH :=

.PHONY: test check demo demo-pretrained bench docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

test: .venv/ready  ## laws, rooms, examples, docstrings, README
	$(BIN)/pytest --quiet --numprocesses 2

check: .venv/ready  ## everything a change has to pass
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --quiet --numprocesses 2

clean:  ## back to a fresh clone
	rm -rf .venv runs site .mypy_cache .ruff_cache .benchmarks
