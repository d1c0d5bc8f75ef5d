# Every target makes its own environment: plain venv and pip, nothing else needed but Python 3.10 or newer.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: demo app test test-slow soak gpu-kit lint types format clean help

help:
	@echo "make demo    the demo: one picture grid in demo/ (a few minutes)"
	@echo "make app     the app in the browser"
	@echo "make test    the test suite"
	@echo "make soak    fifty visitors of the app for ten minutes: nothing lost, nothing mixed"
	@echo "make gpu-kit a folder that tests and measures on a machine with a GPU and no network (bench/README.md)"
	@echo "make lint    ruff: style and formatting"
	@echo "make types   mypy --strict"

demo: $(STAMP)
	$(VENV)/bin/mole demo $(ARGS)

app: $(STAMP)
	$(VENV)/bin/mole app $(ARGS)

test: $(STAMP)
	$(PY) -m pytest $(ARGS)

test-slow: $(STAMP)
	$(PY) -m pytest -m slow $(ARGS)

soak: $(STAMP)
	$(PY) tests/app/soak.py $(ARGS)

gpu-kit: $(STAMP)
	$(PY) bench/kit.py $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# `venv` without ensurepip leaves a half-made folder behind, hence the check for pip and not for the folder.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "mole_diffusion needs Python 3.10 or newer as '$(PYTHON)'. Another one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv, then try again." >&2; exit 1; }
	@echo "Installing into $(VENV); PyTorch is large, the first time takes minutes ..."
	@$(PY) -m pip install --disable-pip-version-check --quiet --editable ".[dev]"
	@touch $@
