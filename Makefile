# Two commands on a fresh machine: `make demo` and `make test`. `make run` opens the app.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-fast check run screenshots real-models bench-deps clean

help:
	@echo "make demo         fine-tune a real small model, and see it work"
	@echo "make run          open the app"
	@echo "make test         run every test"
	@echo "make test-fast    the tests that take milliseconds: under a minute on 2 cores"
	@echo "make check        lint, formatting, types, architecture"
	@echo "make screenshots  draw the pictures of the README again, from recorded runs"
	@echo "make real-models  train two real models beside a plain script, step by step (fetches 0.3 GB)"
	@echo "make bench-deps   what only the benchmarks need, in an environment of its own"

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(INSTALLED)

demo: $(INSTALLED)
	@$(BIN)/qlora-tui demo

run: $(INSTALLED)
	@$(BIN)/qlora-tui

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadgroup

test-fast: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadgroup -m "not slow"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

screenshots: $(INSTALLED)
	$(BIN)/python -m screenshots.make

real-models: $(INSTALLED)
	@echo "Gemma 3 270M is under the Gemma Terms of Use (ai.google.dev/gemma/terms): by fetching it you accept"
	@echo "them. It is kept in this machine's cache, and must not be passed on without those terms."
	$(BIN)/python -m bench.real_models

bench-deps:
	$(PYTHON) -m venv .bench-venv
	.bench-venv/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt

clean:
	rm -rf $(VENV) .bench-venv .mypy_cache .ruff_cache .pytest_cache build dist
