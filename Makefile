# Every target makes the environment that it needs by itself.
#
#   make demo                           a whole backup and restore, with an embedded PostgreSQL
#   make test [ARGS="tests/unit -q"]    the tests; ARGS goes to pytest, JOBS=2 runs two at a time
#   make lint                           ruff, mypy, import directions
#   make bench [SCALE=...] [ARGS=...]   the measurements
#   make e2e [ARGS=...]                 the tests that need containers
#   make lock [UPGRADE=1]               write the locked environments anew
#   make clean                          remove everything that make made

PYTHON ?= python3
VENV ?= .venv
# Tests at a time; 0 runs them in pytest's own process.
JOBS ?= 0
ARGS ?=
SCALE ?=
UPGRADE ?=

LOCK := requirements/dev.lock
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
SOURCES := $(wildcard src tests bench)
# The folders in the project that may hold sealed files. Nothing outside them has its flags cleared.
SCRATCH := .scratch bench/.scratch
# Twice quiet: errors only.
PIP_QUIET := -qq --disable-pip-version-check --no-input

COMPILE := .venv-lock/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-emit-find-links --no-emit-package pgkeep --custom-compile-command "make lock" --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint lint-rules lint-format lint-types lint-imports bench e2e lock clean python

help:
	@sed -n 's/^#   //p' Makefile

demo: $(READY)
	$(VENV)/bin/pgkeep demo $(ARGS)

test: $(READY)
	$(PY) -m pytest -n $(JOBS) $(ARGS)

# With --keep-going each of these has its say.
lint: lint-rules lint-format lint-types lint-imports

lint-rules: $(READY)
	$(PY) -m ruff check $(SOURCES) deploy

lint-format: $(READY)
	$(PY) -m ruff format --check $(SOURCES) deploy

lint-types: $(READY)
	$(PY) -m mypy $(SOURCES)

lint-imports: $(READY)
	$(VENV)/bin/lint-imports --no-cache

bench: $(READY)
	@test -f bench/run.py || { echo "There is no bench/run.py to run." >&2; exit 1; }
	$(PY) -m bench.run $(if $(SCALE),--scale $(SCALE)) $(ARGS)

e2e: $(READY)
	@test -d tests/e2e || { echo "There are no end-to-end tests yet: tests/e2e does not exist." >&2; exit 1; }
	$(PY) -m pytest tests/e2e $(ARGS)

# A half-made environment has no stamp and is made anew.
$(READY): $(LOCK) pyproject.toml
	@$(MAKE) --no-print-directory --silent python
	@echo "Making $(VENV) from $(LOCK): half a minute."
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install $(PIP_QUIET) --require-hashes -r $(LOCK)
	$(PY) -m pip install $(PIP_QUIET) --no-deps --no-build-isolation --editable .
	@touch $@

python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is missing. As root: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pgkeep needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) can't make virtual environments. As root: apt-get install python3-venv" >&2; exit 1; }

# The resolver writes one lock for every supported Python; it names packages and hashes, never where they lie.
# The images get three parts of it, in the same versions: what runs, what runs in the extractor, and what builds.
lock: python
	test -x .venv-lock/bin/uv || $(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install $(PIP_QUIET) uv
	$(COMPILE) pyproject.toml --extra dev $(if $(UPGRADE),--upgrade) --output-file $(LOCK)
	$(COMPILE) pyproject.toml --constraint $(LOCK) --output-file requirements/runtime.lock
	$(COMPILE) pyproject.toml --extra s3 --constraint $(LOCK) --output-file requirements/extractor.lock
	echo 'hatchling' | $(COMPILE) - --constraint $(LOCK) --output-file requirements/build.lock

clean:
	@for folder in $(SCRATCH); do \
	  if [ -d "$$folder" ] && [ ! -L "$$folder" ] && [ "$$(id -u)" = 0 ]; then chattr -R -f -i -a "$$folder" || true; fi; \
	done
	rm -rf --one-file-system $(SCRATCH) $(VENV) .venv-lock build dist \
	  .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +
