# Each target sets itself up: it uses the active virtual environment, or makes .venv, and installs the pinned set.
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.lowmem-grpo-installed
SEED ?= 0
KILLS ?= 100
INTERRUPTIONS ?= 25

.PHONY: demo demo-r1 test test-slow test-kill test-gpu lint

demo: $(INSTALLED)
	$(PYTHON) -m lowmem_grpo.cli demo --seed $(SEED)

demo-r1: $(INSTALLED)
	$(PYTHON) -m lowmem_grpo.cli demo r1 --seed $(SEED)

test: $(INSTALLED)
	$(PYTHON) -m pytest -q -m "not slow and not gpu" -n auto --maxprocesses 4 --dist worksteal

test-slow: $(INSTALLED)
	$(PYTHON) -m pytest -q -m "slow and not gpu"

test-kill: $(INSTALLED)
	$(PYTHON) tests/kills.py --kills $(KILLS) --interruptions $(INTERRUPTIONS) --seed $(SEED)
	$(PYTHON) tests/pipeline_kills.py --kills 12 --seed $(SEED)

test-gpu: $(INSTALLED)
	$(PYTHON) -m pytest -q -m gpu

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	$(PYTHON) -W ignore -m compileall -qq -j 0 -x 'site-packages/.*/tests/' $(VENV)/lib || true  # on every core; pip has one
	touch $@
