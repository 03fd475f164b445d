# The whole interface. Every target sets up what it needs; a second run finds it there.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export PYTHONPATH :=

# The shapes in signatures, checked at run time by jaxtyping and beartype (bad input meets them first).
TYPED := tests/test_laws.py tests/test_criteria.py tests/test_models.py tests/test_distiller.py \
	-k 'not refused and not broadcasts and not compile' --jaxtyping-packages=kdloss,beartype.beartype

.PHONY: test check static typed demo demo-pretrained bench docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

test: .venv/ready  ## laws, rooms, examples, docstrings, README
	$(BIN)/pytest --quiet --numprocesses 2

check: static test typed  ## everything a change has to pass

static: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

typed: .venv/ready
	$(BIN)/pytest --quiet --numprocesses 2 $(TYPED)

bench: .venv/ready  ## our losses beside the plain PyTorch recipe
	$(BIN)/pytest --override-ini testpaths=benchmarks --benchmark-columns=median,iqr,rounds

docs: .venv/ready  ## the pages, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## back to a fresh clone
	rm -rf .venv runs site .mypy_cache .ruff_cache .benchmarks
