# Every target makes its own environment with venv, pip and the uv that pip brings: nothing else needed but Python 3.10 or newer.
# It holds the versions of requirements.lock; test-newest and test-lowest try the ends of the ranges in pyproject.toml.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
PIP    := -m pip --disable-pip-version-check install --quiet
# Installs in a tenth of pip's time; resolves versions for the lock and for the two ends, with an environment of its own.
UV     := $(VENV)-uv/bin/uv
UV_VERSION := $(shell sed -n 's/^uv==//p' requirements.lock)
# `make lock UPGRADE=` keeps the versions that the ranges still allow.
UPGRADE ?= --upgrade
NEWEST := $(VENV)-newest
LOWEST := $(VENV)-lowest
# What the lowest versions must pass: everything but the app, evaluation, and other programs.
LOWEST_TESTS := tests/core tests/pipeline tests/methods tests/training tests/test_cli.py \
  --ignore tests/pipeline/test_webui_training.py

# Not compiled when it is installed.
SELDOM := /(tests?|transformers/models|diffusers/pipelines|fontTools|mypy|networkx|pygments|setuptools|skimage|sklearn|timm)/
LOCK := $(UV) pip compile --quiet --universal --python-version 3.10 --no-annotate --custom-compile-command "make lock" $(UPGRADE)

# Two halves that take about as long, each in one process: servers and browsers are shared by the tests of a host.
GRADIO := tests/app tests/webui
COMFY := tests/comfy tests/evaluation tests/starter

# Whatever the machine says: each of the tests' many processes would compile anew what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo app test test-gradio test-comfy test-slow test-newest test-lowest lock soak gpu-kit lint types format clean help

help:
	@echo "make demo    the demo: one picture grid in demo/ (a few minutes)"
	@echo "make app     the app in the browser"
	@echo "make test    the test suite"
	@echo "make soak    fifty visitors of the app for ten minutes: nothing lost, nothing mixed"
	@echo "make gpu-kit a folder that tests and measures on a machine with a GPU and no network (bench/README.md)"
	@echo "make test-newest, make test-lowest    the tests with the newest and the lowest versions that pyproject.toml allows"
	@echo "make lock    write requirements.lock anew, with the newest versions"
	@echo "make lint    ruff: style and formatting"
	@echo "make types   mypy --strict"

demo: $(STAMP)
	$(VENV)/bin/mole demo $(ARGS)

app: $(STAMP)
	$(VENV)/bin/mole app $(ARGS)

# Always two processes of one thread each, which do not get in each other's way. With ARGS it is one plain run
# of pytest.
test: export OMP_NUM_THREADS := 1
test: $(STAMP)
ifdef ARGS
	$(PY) -m pytest $(ARGS)
else
	$(MAKE) --jobs 2 --output-sync test-gradio test-comfy
	$(PY) -m pytest --numprocesses 2 --dist worksteal $(patsubst %,--ignore=%,$(GRADIO) $(COMFY))
endif

test-gradio: $(STAMP)
	$(PY) -m pytest $(GRADIO)

test-comfy: $(STAMP)
	$(PY) -m pytest $(COMFY)

test-slow: $(STAMP)
	$(PY) -m pytest -m slow $(ARGS)

soak: $(STAMP)
	$(PY) tests/app/soak.py $(ARGS)

test-newest: $(UV)
	$(UV) venv --quiet --clear --seed --python $(PYTHON) $(NEWEST)
	$(UV) pip install --quiet --upgrade --python $(NEWEST)/bin/python --editable ".[dev]"
	$(NEWEST)/bin/python -m pytest $(ARGS)

# Wheels as old as these exist for Python 3.10 to 3.12. The bounds are written down first and then kept: `lowest-direct` alone takes
# a newer torch where a newer torchvision asks for it, and says nothing. Bounds that do not go together fail here, by name.
test-lowest: $(UV)
	$(UV) venv --quiet --clear --seed --python $(PYTHON) $(LOWEST)
	$(UV) pip compile --quiet --no-deps --resolution lowest --python $(LOWEST)/bin/python --no-annotate --no-header \
	  --extra baselines --extra test --output-file $(LOWEST)/bounds.txt pyproject.toml >/dev/null
	$(UV) pip install --quiet --constraint $(LOWEST)/bounds.txt --python $(LOWEST)/bin/python --editable ".[baselines,test]"
	$(LOWEST)/bin/python -m pytest $(LOWEST_TESTS) $(ARGS)

lock: $(UV)
	$(LOCK) --extra dev --output-file requirements.lock pyproject.toml
	$(LOCK) --constraint requirements.lock --output-file tests/comfy/requirements.lock tests/comfy/requirements.in

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
	rm -rf $(VENV) $(VENV)-uv $(NEWEST) $(LOWEST) build dist .mypy_cache .pytest_cache .ruff_cache

# `venv` without ensurepip leaves a half-made folder behind, hence the check for pip and not for the folder.
define make-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
  echo "mole_diffusion needs Python 3.10 or newer as '$(PYTHON)'. Another one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(1) || { rm -rf $(1); \
  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv, then try again." >&2; exit 1; }
endef

# The build backend is locked too, so nothing is fetched past the lock. pip installs where uv finds no packages: it does not know
# an index that only pip is told of. Compiled on all cores, which neither does by itself, but for what is seldom imported (that is
# compiled then); some packages bring templates that are no Python.
$(STAMP): pyproject.toml requirements.lock
	$(call make-venv,$(VENV))
	@echo "Installing into $(VENV); PyTorch is large, the first time takes minutes ..."
	@$(PY) $(PIP) uv==$(UV_VERSION)
	@$(PY) -m uv pip install --quiet --python $(PY) --requirement requirements.lock || \
	  $(PY) $(PIP) --no-compile --requirement requirements.lock
	@$(PY) -m compileall -qq -j 0 -x '$(SELDOM)' $(VENV)/lib || true
	@$(PY) $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(UV):
	$(call make-venv,$(VENV)-uv)
	@$(VENV)-uv/bin/python $(PIP) uv==$(UV_VERSION)
