# SPDX-License-Identifier: Apache-2.0
# Everything below works from a bare clone: the first target that needs it makes .venv.   make help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
STAMP := $(VENV)/.installed
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# One thread per process: two runs side by side are faster than one run on two threads.
export OMP_NUM_THREADS ?= 1
export PYTHON
unexport PYTHONPATH PYTHONHOME

# Files of tests that run at a time; each keeps to one thread and about 1 GB. On two cores three are faster: many tests wait for processes.
WORKERS ?= 3
RESULTS := reports/table2.csv reports/table2.md reports/figure2.png reports/figure3.png reports/figure7.png

.PHONY: help setup demo reproduce test lint format docs bench sync check-results testcluster lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | while IFS='|' read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## create .venv and install everything, pinned (PYTHON=/path/to/python3.11 to choose one)

$(STAMP): requirements.lock pyproject.toml
	@tools/setup.sh

demo: $(STAMP) ## train teachers and students on small data sets, make Table 2 and Figures 2, 3 and 7 (SCALE=smoke: in minutes, without meaning)
	@$(RUN) python -m pipeline watch -- snakemake --profile cluster/local $(RESULTS) $(if $(SCALE),--config scale=$(SCALE))
	@$(RUN) python tools/show_table.py reports/table2.csv
	@printf '\n%s\n' "tables and figures: reports/   runs: $(VENV)/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db   everything else: make reproduce"

reproduce: $(STAMP) ## every table and figure of the paper, the claims and reports/report.html, at SCALE
	@$(RUN) python -m pipeline watch -- snakemake --profile cluster/local $(if $(SCALE),--config scale=$(SCALE))
	@printf '\n%s\n' "everything on one page: reports/report.html   tables, figures, claims: reports/   runs: $(VENV)/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db"

test: $(STAMP) ## all tests, the slow ones too (ARGS="-m 'not slow'" for the quick ones, WORKERS=0 for one process)
	@$(RUN) python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## ruff (rules and format) and mypy
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

format: $(STAMP) ## let ruff fix and format the code
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

docs: $(STAMP) ## the documentation with an API reference, into build/docs
	@$(RUN) python tools/docs.py

bench: $(STAMP) ## every benchmark in benchmarks/
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(RUN) python "$$script"; done

sync: $(STAMP) ## tell each engine (Snakemake, DVC) what the other has made
	@$(RUN) python -m pipeline sync

check-results: $(STAMP) ## compare what you ran with the committed results, within their error bars (at SCALE)
	@$(RUN) python -m pipeline results check $(if $(SCALE),--scale $(SCALE))

testcluster: $(STAMP) ## a real two-node SLURM on this machine, for development (ACCOUNTING=1: with sacct; it says how to use and stop it)
	@$(RUN) python cluster/testcluster start $(if $(ACCOUNTING),--accounting)

lock: ## resolve pyproject.toml into requirements.lock (UPGRADE=1: take the newest versions allowed)
	@test -x $(VENV)/bin/python || $(MAKE) --no-print-directory setup # not $(STAMP): it needs the lock that is to be made
	@$(RUN) UPGRADE="$(UPGRADE)" python tools/lock.py

clean: ## remove caches and build files (.venv, runs/ and reports/ stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
