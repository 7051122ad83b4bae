# `make demo` and `make test` need Python 3.11 or newer and nothing else. They set up .venv first.
# SYSTEM_TORCH=1 takes the torch that PYTHON already has instead of installing one.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a large red star with stripes
TEST_WORKERS ?= 2

BIN = $(VENV)/bin
ifdef SYSTEM_TORCH
VENV_FLAGS = --system-site-packages
CONSTRAINTS = $(VENV)/constraints.txt
else
CONSTRAINTS = constraints.txt
endif

.PHONY: demo test test-quantization matrix style quality docs build clean

demo: $(VENV)/.core
	$(BIN)/diffusers-hart generate "$(PROMPT)" -o hart.png --seed 0

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

# Better in an environment of its own, `make test-quantization VENV=.venv-quantization`: these packages make every
# import slower.
test-quantization: $(VENV)/.venv
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[test,quantization]'
	$(BIN)/python -m pytest -m "quantization and not gpu"

# The oldest and the newest versions that setup.cfg allows.
matrix:
	PYTHON=$(PYTHON) tests/version_matrix.sh

style: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

quality: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist site src/*.egg-info

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	touch $@

$(VENV)/.core: $(VENV)/.venv setup.cfg constraints.txt
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.test $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(VENV)/.venv setup.cfg constraints.txt
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[$*]'
	touch $@
