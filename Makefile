# Two commands on a fresh machine: `make demo` and `make test`. `make run` opens the app.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test check run screenshots bench-deps clean

help:
	@echo "make demo         fine-tune a real small model, and see it work"
	@echo "make run          open the app"
	@echo "make test         run every test"
	@echo "make check        lint, formatting, types, architecture"
	@echo "make screenshots  draw the pictures of the README again, from recorded runs"
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

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

screenshots: $(INSTALLED)
	$(BIN)/python -m screenshots.make

bench-deps:
	$(PYTHON) -m venv .bench-venv
	.bench-venv/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt

clean:
	rm -rf $(VENV) .bench-venv .mypy_cache .ruff_cache .pytest_cache build dist
