# make run    set-up and the quick start: PPO with both fusions on two CPU cores
# make test   set-up, lint, types and all tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run test setup setup-dev check assets clean

$(VENV)/runtime.stamp: requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(BIN)/python -m rlhfuse.warm_up
	touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

setup: $(VENV)/runtime.stamp

setup-dev: $(VENV)/dev.stamp

assets: setup
	$(BIN)/rlhfuse prepare-quickstart

run: assets
	$(BIN)/rlhfuse train configs/quickstart.yaml

check: setup-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build dist *.egg-info
