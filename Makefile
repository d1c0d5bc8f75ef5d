# Every target makes its own environment from requirements.lock: plain venv and pip, nothing else needed but Python 3.10
# or newer.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --disable-pip-version-check --quiet
STAMP  := $(VENV)/.installed

.PHONY: demo app test test-slow test-newest test-lowest lock soak gpu-kit lint types format clean help

help:
	@echo "make demo    the demo: one picture grid in demo/ (a few minutes)"
	@echo "make app     the app in the browser"
	@echo "make test    the test suite"
	@echo "make soak    fifty visitors of the app for ten minutes: nothing lost, nothing mixed"
	@echo "make gpu-kit a folder that tests and measures on a machine with a GPU and no network (bench/README.md)"
	@echo "make test-newest, test-lowest   the same with the newest and the lowest versions that are allowed"
	@echo "make lock    requirements.lock anew: the exact versions that all of these install"
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

# Environments of their own; what they found is in CONTRIBUTING.md.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --disable-pip-version-check --quiet --upgrade --editable ".[dev]"
	.venv-newest/bin/python -m pytest $(ARGS)

test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --disable-pip-version-check --quiet uv
	.venv-lowest/bin/uv pip compile --quiet --resolution lowest-direct --extra dev \
	  --python .venv-lowest/bin/python --output-file .venv-lowest/requirements.txt pyproject.toml
	.venv-lowest/bin/pip install --disable-pip-version-check --quiet --requirement .venv-lowest/requirements.txt
	.venv-lowest/bin/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	.venv-lowest/bin/python -m pytest tests/core tests/pipeline tests/training tests/test_cli.py $(ARGS)

lock: $(STAMP)
	$(PIP) uv
	$(VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra dev --no-header \
	  --no-annotate --output-file requirements.lock pyproject.toml

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
$(STAMP): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "mole_diffusion needs Python 3.10 or newer as '$(PYTHON)'. Another one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv, then try again." >&2; exit 1; }
	@echo "Installing into $(VENV); PyTorch is large, the first time takes minutes ..."
	@$(PIP) --requirement requirements.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
