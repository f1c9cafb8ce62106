# Two commands matter: `make demo` and `make test`. They need python3 and the package
# registries, and make everything else themselves, below .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BACKENDS := torch jax tensorflow # the quickest first: what says the same on each runs there
OLDEST_KERAS := keras==3.14.0
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-all crash exact-table lint docs format bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m stepsave.demo

# What a newcomer waits for: each test that is quick, on all backends, each in its own process.
test: $(VENV)/.test
	@set -e; $(call part,the engine without Keras,tests/format tests/store tests/snapshot \
	  tests/engine tests/testing tests/test_*.py -n 2 --dist loadfile -m "$(QUICK)"); \
	left="$(QUICK)"; for backend in $(BACKENDS); do \
	  export KERAS_BACKEND=$$backend; \
	  $(call part,the callback on $$backend,tests/fit -n 2 --dist loadgroup -m "$$left"); \
	  left="$(QUICK) and not first and not once"; \
	done; \
	export KERAS_BACKEND=jax; \
	$(call part,what the documents show,tests/cli tests/demo tests/docs tests/packaging -n 2 --dist loadfile -m "$(QUICK)")

# Everything: the matrix of exact resume (whole on one backend, a part on each of the others),
# the demo, benchmarks, and the oldest Keras that is admitted.
test-all: test $(VENV)/.oldest-keras
	@set -e; left="$(SLOW)"; for backend in $(BACKENDS); do \
	  export KERAS_BACKEND=$$backend; \
	  $(call part,the rest on $$backend,tests/fit -n 2 --dist loadgroup -m "$$left"); \
	  left="(slow or first) and not once and not whole_matrix"; \
	done; \
	export KERAS_BACKEND=jax; \
	$(call part,the demo and the benchmarks,tests/cli tests/demo tests/docs tests/packaging -n 2 \
	  --dist loadfile -m "$(SLOW)"); \
	export PYTHONPATH=$(CURDIR)/$(VENV)/oldest-keras; \
	left="$(QUICK)"; tests="$(OLDEST_TESTS)"; for backend in $(BACKENDS); do \
	  export KERAS_BACKEND=$$backend; \
	  $(call part,$(OLDEST_KERAS) on $$backend,$$tests -n 2 --dist loadgroup -m "$$left"); \
	  left="$(QUICK) and not once"; tests="$(wordlist 1,2,$(OLDEST_TESTS))"; \
	done

QUICK := not slow
SLOW := slow and not whole_matrix
# Exact resume, and what a backup holds, depend on how Keras works inside; the first two on each
# backend.
OLDEST_TESTS := tests/fit/test_exact_resume.py tests/fit/test_keras_internals.py \
  tests/fit/test_preemption.py tests/fit/test_saveables.py tests/fit/test_sources.py

# Says what runs, and how long it took.
part = echo "== $(1)"; begun=$$(date +%s); $(PYTEST) $(2); \
  echo "-- $(1): $$(( $$(date +%s) - begun )) s"

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The site, into build/site; a warning is an error.
docs: $(VENV)/.docs
	KERAS_BACKEND=jax $(BIN)/sphinx-build -q -W --keep-going -n -b html docs build/site
	@echo "build/site/index.html"

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Runs the matrix of exact resume and makes docs/exact-resume.md from what passed.
exact-table: $(VENV)/.test
	$(BIN)/python -m bench.publish.exact

# Tries for hours to make a backup lose something, and makes the tables of docs/durability.md.
# One campaign, in small: make crash CRASH="kills --quick"
crash: $(VENV)/.test
	PYTHONPATH=tests:. $(BIN)/python -m proof $(CRASH)

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
	$(BIN)/python -m pip install --quiet -e ".[cli]" --group backends --group test \
	  --group packaging --group recipes
	@touch $@

$(VENV)/.oldest-keras: pyproject.toml $(VENV)/.test
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oldest-keras \
	  "$(OLDEST_KERAS)"
	@touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/.test
	$(BIN)/python -m pip install --quiet --group lint
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.test
	$(BIN)/python -m pip install --quiet --group docs
	@touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis
