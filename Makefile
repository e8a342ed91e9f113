# Everything runs from the project's own .venv; nothing is installed outside of it.
# `make help` lists what there is.

PYTHON ?= python3
BIN := .venv/bin
# Tests own their servers, ports and folders, and often wait for them, so three share two cores.
SIDE_BY_SIDE := -n 3 --dist worksteal
# Where memory has room for them, the files of tests lie there: nobody waits for a disk to sync them.
IN_MEMORY := $(shell df -k --output=avail /dev/shm 2>/dev/null | awk 'NR == 2 && $$1 > 6000000 {print "TMPDIR=/dev/shm"}')
ON_POSTGRESQL_15 := tests/capture tests/conformance tests/log/test_recorder.py
export DAGSTER_HOME := $(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-servers stress check format bench docs clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.installed ## Make .venv with everything that is pinned

.venv/.installed: pyproject.toml requirements/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; ok = (3, 11) <= v < (3, 14); print("" if ok else "Deltaworks needs Python 3.11 to 3.13; this is %d.%d. Run: make PYTHON=python3.12 …" % v); sys.exit(not ok)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt uv
	@echo "installing (once; about a gigabyte on disk) …"
	@VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --constraint requirements/constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## Real films from PostgreSQL to a released, searchable store, then a report
	@$(BIN)/python -m studio.demo

up: setup ## Run everything until Ctrl-C: database, services, Dagster, search page
	@$(BIN)/python -m studio.ready
	@$(BIN)/honcho start

test: setup ## All tests that need Python packages only
	@$(IN_MEMORY) $(BIN)/pytest -m 'not server' $(SIDE_BY_SIDE)

test-servers: setup ## The tests with servers of Debian and Maven (installs them)
	@tests/servers/install.sh
	@$(BIN)/pytest -m server
	@$(BIN)/pytest $(ON_POSTGRESQL_15) --postgres-binaries /usr/lib/postgresql/15/bin $(SIDE_BY_SIDE)

stress: setup ## Ten minutes of dumps among stalls, schema changes and deaths: thousands of chunks
	@$(BIN)/pytest tests/log/test_dump_endurance.py --dump-seconds 600 --timeout 0 -s

check: setup ## Format, lint, types, layers, docs
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python docs/generate.py --check

format: setup ## Rewrite the code in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup ## Write the generated pages of docs/reference
	@$(BIN)/python docs/generate.py

bench: setup ## Run every benchmark beside its limit
	@for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

clean: ## Remove everything that running leaves behind (keeps .venv)
	rm -rf .deltaworks dbt_project/target dbt_project/logs
