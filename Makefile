# `make quickstart` and `make test` come first; `make help` lists all. Each sets itself up in .venv and can be run again;
# `make clean` deletes .venv and runs/, with every checkpoint in it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: help quickstart test check smoke golden clean

help:
	@echo "make quickstart   install, build a tokenizer, train, evaluate, write $(RUN)/report.html"
	@echo "make test         install and run the tests"
	@echo "make check        ruff and pyright"
	@echo "make smoke        the debug recipe, in seconds"
	@echo "make golden       check that the debug recipe still gives the recorded losses"
	@echo "make clean        delete $(VENV) and runs/, with all checkpoints"

quickstart: $(VENV)/.installed
	$(BIN)/clip-train quickstart --run-dir $(RUN)

# Tests that watch the clock come alone, then all others, two files at once.
ALONE := tests/distributed/test_elastic_restart.py tests/distributed/test_watchdog.py tests/data/test_waiting.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ALONE)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ALONE:%=--ignore=%)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

smoke: $(VENV)/.installed
	rm -rf runs/debug && $(BIN)/clip-train train debug && $(BIN)/clip-train report runs/debug

golden: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/golden

clean:
	rm -rf $(VENV) runs

# One stamp for each set of extras: an install happens once, and again when pyproject.toml changes.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clip-train needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test
