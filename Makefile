# Needs python3 (3.10 or newer) with its venv module, and nothing else: every target makes .venv and
# installs what it needs there, once. Variables, e.g. `make demo PYTHON=python3.12`:
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
# more arguments for the program that the target runs:  make test ARGS="-k report -x"
ARGS ?=
# more arguments for pip when it installs torch:        make demo TORCH_ARGS="--index-url URL"
TORCH_ARGS ?=

BIN := $(VENV)/bin
# -qq: errors only.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# of all files of a folder whose names are like this
lines = $$(find $(1) -name '$(2)' ! -name '*.pyc' -exec cat {} + | wc -l)

# The model comes out of a package; nothing asks a model hub.
export HF_HUB_OFFLINE := 1

.PHONY: help demo test check docs nightly release gpu clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make demo     embed real sentences in float and in int8, and compare"
	@echo "make test     all tests but the slow ones"
	@echo "make check    ruff, mypy, import-linter"
	@echo "make docs     the pages of docs/ as a site, in build/docs"
	@echo "make nightly  all tests with many more random examples, faults made on purpose, torch's own programs"
	@echo "make release  builds the wheel and the sdist, installs the wheel with each torch and runs it"
	@echo "make gpu      the tests that need an NVIDIA GPU; says so when there is none"
	@echo "make clean    remove .venv and everything generated"

demo: $(VENV)/.demo
	@$(BIN)/python examples/embed.py $(ARGS)

# All tests of a file in one worker: they share what is compiled for them. In the order of folders, so
# that many short files come last and the workers end together.
SPREAD := -n $(JOBS) --dist loadfile --no-loadscope-reorder

# One thread per worker: JOBS workers with a thread per core each would fight for the cores.
test: $(VENV)/.test
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(SPREAD) -m "not slow" $(ARGS)

nightly: $(VENV)/.test build/vision/.made
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HYPOTHESIS_PROFILE=nightly \
		$(BIN)/python -m pytest $(SPREAD) --timeout=3600 $(ARGS)
	@$(BIN)/python -m tools.mutate -j $(JOBS) --control
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m tools.upstream --seconds 1800

check: $(VENV)/.lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@echo "lines of Python: graphquant $(call lines,graphquant,*.py), tools $(call lines,tools,*.py)," \
		"tests $(call lines,tests,*.py); of CUDA and C in graphquant: $(call lines,graphquant,*.c*)"

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "open build/docs/index.html, or with its search: python3 -m http.server -d build/docs"

# Environments with torch 2.11 and 2.13 stay in build/release, for the next time.
release: $(VENV)/.test
	@$(BIN)/python -m pytest --release tests/test_release.py $(ARGS)

gpu: $(VENV)/.test
	@$(BIN)/python -m tools.check --gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment: a stamp file per step, redone when what it was made from has changed -------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "graphquant needs Python 3.10 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one, for example: make $(or $(firstword $(MAKECMDGOALS)),demo) PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu it needs: apt install python3-venv" >&2; \
		exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "installing $$(grep '^torch==' constraints.txt) (the largest part: this can take some minutes)"
	@$(PIP) $(TORCH_ARGS) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing graphquant and what the demo needs"
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo "installing graphquant and what the tests need"
	@$(PIP) -e '.[test,demo,docs,recipes,ray]'
	@touch $@

# The recipes for timm and open_clip import these, and nothing else may: see tests/docs/vision.py.
build/vision/.made: $(VENV)/.torch constraints.txt
	@echo "installing timm, open_clip and torchvision"
	@$(PIP) --no-deps --upgrade --target $(@D) torchvision timm open_clip_torch ftfy regex wcwidth
	@touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	@echo "installing graphquant and what the checks need"
	@$(PIP) -e '.[lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	@echo "installing graphquant and what builds the site"
	@$(PIP) -e '.[docs]'
	@touch $@
