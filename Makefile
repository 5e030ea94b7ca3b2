# Three doors for a clean clone; each makes .venv by itself and is quick the second time.
#   make quickstart   text to base model, fine-tuned, preference-tuned, evaluated, asked one question
#   make test         the tests
#   make check        ruff, the formatter, the type checker
# PYTHON=/path/to/python chooses the interpreter that .venv is made with (3.11 or newer).

.PHONY: quickstart test check clean
.DEFAULT_GOAL := help

PYTHON ?=
PYTEST_ARGS ?= -n 2
BIN := .venv/bin

help:
	@sed -n '2,5s/^# *//p' Makefile

quickstart: .venv/.core
	$(BIN)/open-instruct run recipes/quickstart/pipeline.yaml

test: .venv/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache

# 3.11 and 3.12 are what constraints.txt was resolved for, so they come before anything newer.
$(BIN)/python:
	@set -e; chosen=""; \
	for bounds in "(3, 11) <= v < (3, 13)" "(3, 11) <= v"; do \
	  for candidate in $(or $(PYTHON),python3 python3.12 python3.11 python); do \
	    if [ -z "$$chosen" ] && "$$candidate" -c "import sys; v = sys.version_info; sys.exit(not ($$bounds))" >/dev/null 2>&1; \
	    then chosen="$$candidate"; fi; \
	  done; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "open-instruct needs Python 3.11 or newer; found: $$($(or $(PYTHON),python3) --version 2>&1)." >&2; \
	  echo "Install one, then say: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; \
	fi; \
	echo "making .venv with $$chosen ($$("$$chosen" --version))"; \
	"$$chosen" -m venv .venv

.venv/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch .venv/.core $@
