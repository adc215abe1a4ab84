# `make demo` and `make test` need only Python 3.11 or newer; everything else is put into .venv.

PORT ?= 8000
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v $$p; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
ORACLE := .venv-oracle
FIND_LINKS ?=

.PHONY: demo test check format lint types test-oracle bench-quick

demo: $(VENV)/.installed
	@exec $(BIN)/stator demo --port $(PORT) $(if $(HUB_PORT),--hub-port $(HUB_PORT)) $(if $(JOIN),--join $(JOIN))

test: $(VENV)/.installed-test
	$(PYTEST) -n 2 tests/unit tests/contract tests/sim
	$(PYTEST) tests/integration
	$(PYTEST) tests/e2e

# The gate: formatting, lint, strict types, import rules, unit tests.
check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST) -n 2 tests/unit

# The local engine against transformers on torch (CPU).
test-oracle: $(ORACLE)/.installed
	$(ORACLE)/bin/python -m pytest -q -m oracle tests

bench-quick: $(VENV)/.installed-test
	@for b in benchmarks/*.py; do echo "== $$b"; $(BIN)/python "$$b" --quick || exit 1; done

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Stator needs Python 3.11 or newer, and none was found. \
	Install it (for instance: apt install python3.11-venv), or say where it is: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing Stator into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "installing Stator and its test tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "installing Stator and its development tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

# torch comes from FIND_LINKS (a directory or page with wheels) if that is set, else from PyTorch's CPU index.
$(ORACLE)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Stator needs Python 3.11 or newer"; exit 1; }
	@test -x $(ORACLE)/bin/python || $(PYTHON) -m venv $(ORACLE)
	@$(ORACLE)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 \
		$(if $(FIND_LINKS),--find-links $(FIND_LINKS),--extra-index-url https://download.pytorch.org/whl/cpu)
	@$(ORACLE)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]' transformers
	@touch $@
