# Two commands: `make run` (the default experiment, to its report) and `make test`.
PYTHON ?= python3
VENV := .venv
CORES ?= $(shell nproc 2>/dev/null || echo 2)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: run help smoke test test-fast test-all lint format env clean

run: env ## the default experiment, to results/digits/report.html
	snakemake --cores $(CORES)

help: ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

smoke: env ## every stage once, in under a minute
	snakemake --cores $(CORES) smoke

# A worker per core; every worker computes with one thread.
PYTEST := pytest -n $(CORES) --dist loadfile

test: env ## the tests, slow ones included
	$(PYTEST) -m "not long"

test-fast: env ## three minutes of tests
	$(PYTEST) -m "not slow"

test-all: env ## everything, for as long as it takes
	$(PYTEST)

lint: env ## formatting and lint
	ruff format --check .
	ruff check .
	snakefmt --check Snakefile rules
	snakemake --lint

format: env ## put the code in order
	ruff format .
	ruff check --fix .
	snakefmt Snakefile rules

env: $(VENV)/.ready ## the environment, pinned by envs/constraints.txt

$(VENV)/.ready: pyproject.toml envs/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q -c envs/constraints.txt -e ".[dev,slurm]"
	touch $@

clean: ## remove what runs made, but not the environment or the reference results
	find results -mindepth 1 -maxdepth 1 ! -name reference -exec rm -rf {} +
	rm -rf resources
