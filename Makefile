# Everything here runs from a clean clone: it makes .venv when missing, with python3.11 (and its venv
# module), make and the network. No compiler is needed.

PYTHON ?= python3.11
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test check matrix bench clean

help: ## what there is to make
	@sed -n 's/^\([a-z]*\): .*## \(.*\)/make \1\t\2/p' Makefile

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: $(PYTHON) with its venv module is needed and was not found;" >&2; \
	  echo "      on Debian: apt-get install python3.11-venv; elsewhere: make PYTHON=/path/to/python3.11" >&2; \
	  exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(STAMP) ## train a small model on two ranks, verify it, write a report
	$(BIN)/mw demo

test: $(STAMP) ## every test but the full matrix, a file at a time in each of JOBS processes
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

check: $(STAMP) ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports --no-cache

matrix: $(STAMP) ## every legal cell of the equality matrices
	$(BIN)/python -m pytest -m matrix --timeout 600 $(ARGS)

bench: $(STAMP) ## the reach table against peers and limits: docs/benchmarks.md
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove what the others made, the environment included
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
