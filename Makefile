# Everything works on a machine with Python 3.11+, make and a Python registry: each target makes the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow crash-matrix soak-kill soak-healthy celery-suite matrix bench lint format docs clean help

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "patchpilot needs Python 3.11 or later; say which with: make PYTHON=python3.12 ...")'
	@echo 'installing into $(VENV), once ...'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)   ## patch a live broker in a lab on this machine and count what was lost
	$(BIN)/patchpilot lab demo

test: $(STAMP)   ## the whole suite on real servers, in random order, under 8 minutes
	$(BIN)/python -m pytest -m 'not slow' --numprocesses 6 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)  ## the longer proofs
	$(BIN)/python -m pytest -m slow

crash-matrix: $(STAMP)  ## every scenario, the pilot killed at every entry of its journal; many interleavings of rivals
	$(BIN)/python -m pytest -m matrix

soak-kill: $(STAMP)  ## kill the pilot in real labs at random moments, more than twenty times
	$(BIN)/python -m pytest -m soak

soak-healthy: $(STAMP)  ## recovery beside 10,000 healthy chords, and no remedy; a quarter of an hour. HEALTHY_CHORDS=n
	$(BIN)/python -m pytest -m healthy

celery-suite: $(STAMP)  ## Celery's own integration tests on stock Redis and on ours, by name; half an hour. ARGS=--help
	$(BIN)/python -m tests.celery_suite $(ARGS)

bench: $(STAMP)     ## what the backend and each setting cost, as ratios to stock Celery; ten minutes
	$(BIN)/python -m bench.backends $(ARGS)

matrix: $(STAMP) ## the backend's tests over Pythons, Celerys and servers; CELLS='--help' says how to choose
	$(BIN)/python -m tests.matrix $(CELLS)

lint: $(STAMP)   ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check patchpilot tests bench tools
	$(BIN)/ruff format --check patchpilot tests bench tools
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## ruff format and the fixes ruff is sure of
	$(BIN)/ruff format patchpilot tests bench tools
	$(BIN)/ruff check --fix patchpilot tests bench tools

docs: $(STAMP)   ## write the diagrams and the index of the runbooks anew
	$(BIN)/python -m tools.docs

clean:           ## the virtual environment, caches and reports
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis reports .lab .matrix
