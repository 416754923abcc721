# Each target works on a machine with python3 (3.11 or newer), make and git.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
export PYTHONUNBUFFERED := 1
# Each stage is a process: without bytecode on disk every one would compile torch anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test check format bench lock clean

setup: $(VENV)/.ready

# uv resolves nothing here: the lock names every version with its hashes.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or newer"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	xattn preset use demo
	dvc repro
	xattn report --show

test: setup
	python -m pytest -n auto --dist worksteal

check: setup
	ruff format --check .
	ruff check .
	mypy

format: setup
	ruff format .
	ruff check --fix .

bench: setup
	xattn bench engine

lock: setup
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--no-emit-index-url --upgrade --group dev pyproject.toml -o requirements.lock

# Progress, results and caches; raw data and shards stay.
clean:
	rm -rf runs results .xattn mlflow.db mlartifacts .pytest_cache .mypy_cache .ruff_cache
