# Every target does its own set-up with pip in .venv; deploy/prerequisites.py looks for what pip cannot bring.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# For two cores: tests that kill and freeze servers wait more than they work.
TESTERS ?= 4

.PHONY: help setup demo train-full test check audit format lock clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

demo: $(VENV)/.run   ## train on MovieLens 100K, publish, serve on http://127.0.0.1:8000
	@$(BIN)/python -m deploy.demo

setup: $(VENV)/.run   ## install the service and the trainer into .venv

train-full: $(VENV)/.run   ## train the full presets on MovieLens 100K and publish them
	@$(BIN)/python -m trainer run sasrec-full bert4rec-full

# Types are looked at beside the tests, since mypy keeps one core busy for a minute; what it says comes last.
test: $(VENV)/.dev   ## lint, types and all tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@said=$$(mktemp); $(BIN)/mypy > $$said 2>&1 & types=$$!; \
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses $(TESTERS) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types || tests=1; cat $$said; rm -f $$said; exit $$tests

check: $(VENV)/.dev   ## lint and types alone
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

audit: $(VENV)/.dev   ## look up known vulnerabilities of what constraints.txt pins
	@$(BIN)/python -m deploy.audit

format: $(VENV)/.dev   ## rewrite the sources in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: $(VENV)/.dev   ## make constraints.txt anew from pyproject.toml
	@CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --upgrade --output-file constraints.txt pyproject.toml
	@# A local version such as 2.13.0+cpu names one machine's build, not the release.
	@sed -i -E 's/^(torch==[0-9.]+)\+[a-z0-9]+/\1/' constraints.txt
	@# Older Pythons than the one that makes this file want one package more, for redis: Debian 12 has 3.11.2.
	@grep -q '^async-timeout==' constraints.txt || sed -i 's/^asyncpg==/async-timeout==5.0.1 ; python_full_version < "3.11.3"\n    # via redis\n&/' constraints.txt

clean:           ## remove what the targets made, data and bundles included
	rm -rf $(VENV) bundles runs var data

$(VENV)/.run: pyproject.toml constraints.txt
	@$(PYTHON) deploy/prerequisites.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Upnext into $(VENV) (a minute or two, once)"
	@$(PIP) --editable '.[service,trainer]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@$(PIP) --editable '.[service,trainer,dev]'
	@touch $@
