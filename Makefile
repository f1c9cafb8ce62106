# Two commands matter: `make demo` and `make test`. They need python3 and the package
# registries, and make everything else themselves, below .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BACKENDS := jax tensorflow torch
OLDEST_KERAS := keras==3.14.0
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-engine test-keras test-oldest-keras test-docs exact-table lint format bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m stepsave.demo

# The engine's tests run once; those of the callback once per backend, in processes of their own.
test: test-engine test-keras test-oldest-keras test-docs

test-engine: $(VENV)/.test
	$(PYTEST) tests/format tests/store tests/snapshot tests/engine tests/test_*.py -n 2 --dist loadfile

test-keras: $(VENV)/.test
	@set -e; for backend in $(BACKENDS); do \
	  echo "== KERAS_BACKEND=$$backend"; \
	  KERAS_BACKEND=$$backend $(PYTEST) tests/fit --ignore-glob="*/test_exact_*" -n 2; \
	  KERAS_BACKEND=$$backend $(PYTEST) tests/fit/test_exact_*.py -n 2; \
	done

# Exact resume depends on how Keras works inside, so also with the oldest Keras that is admitted.
# Interrupted by exceptions only, for time; `make test-oldest-keras OLDEST=` runs the whole matrix.
OLDEST ?= -k "not SIGKILL and not SIGTERM"
test-oldest-keras: $(VENV)/.oldest-keras
	@set -e; for backend in $(BACKENDS); do \
	  echo "== KERAS_BACKEND=$$backend with $(OLDEST_KERAS)"; \
	  PYTHONPATH=$(CURDIR)/$(VENV)/oldest-keras KERAS_BACKEND=$$backend $(PYTEST) -n 2 \
	    tests/fit/test_exact_resume.py tests/fit/test_keras_internals.py \
	    tests/fit/test_preemption.py tests/fit/test_sources.py $(OLDEST); \
	done

test-docs: $(VENV)/.test
	KERAS_BACKEND=jax $(PYTEST) tests/demo tests/docs

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Runs the matrix of exact resume and makes docs/exact-resume.md from what passed.
exact-table: $(VENV)/.test
	$(BIN)/python -m bench.exact

# Measures on this machine, keeps the raw JSON, and makes the published tables from it.
bench: $(VENV)/.test
	$(BIN)/python -m bench

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[jax,demo]"
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e . --group backends --group test
	@touch $@

$(VENV)/.oldest-keras: pyproject.toml $(VENV)/.test
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oldest-keras \
	  "$(OLDEST_KERAS)"
	@touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/.test
	$(BIN)/python -m pip install --quiet --group lint
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
