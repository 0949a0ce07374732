# One command each; every target sets up what it needs in .venv first. `make` alone lists them.

.PHONY: help demo test test-slow test-gpu check bench clean
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
NEEDS := pyproject.toml constraints.txt
# where CUDA is: the interpreter of .venv if it was set up for tests, else the machine's own. Or say PYTHON=...
PYTHON ?= $(if $(wildcard $(VENV)/.set-up-test),$(BIN)/python,python3)
PYTEST_ARGS ?=

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

demo: $(VENV)/.set-up-demo  ## two small checkpoints, every lifecycle event on both backends, a report
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/tandem demo

test: $(VENV)/.set-up-test  ## what takes seconds, on the CPU, without network
	$(BIN)/python -m pytest -n 2 -m 'not slow and not gpu' $(PYTEST_ARGS)

test-slow: $(VENV)/.set-up-test-slow  ## what takes minutes
	$(BIN)/python -m pytest -n 2 -m 'slow and not gpu' $(PYTEST_ARGS)

test-gpu:  ## what needs CUDA, with PYTHON, which needs torch, jax and pytest but no set-up
	@files=$$(grep -rlE 'mark\.gpu' tests --include='test_*.py'); \
	if [ -z "$$files" ]; then echo "no test is marked gpu yet"; exit 0; fi; \
	set -x; PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest -m gpu $(PYTEST_ARGS) $$files

check: $(VENV)/.set-up-check  ## format, lint, types, import arrows, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: $(VENV)/.set-up-test  ## benchmarks, as JSON in benchmarks/results
	@files=$$(ls benchmarks/bench_*.py 2>/dev/null); \
	if [ -z "$$files" ]; then echo "there is no benchmark yet"; exit 0; fi; \
	for file in $$files; do echo "$$file"; $(BIN)/python $$file || exit; done

clean:  ## everything that can be made again, .venv excepted
	rm -rf .jax_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks .coverage
	rm -rf build dist demo-report *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: with a looser requirement pip may take a newer build, and gigabytes of CUDA with it
$(VENV)/.set-up-torch: $(NEEDS)
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.set-up-demo: EXTRAS := jax,torch
$(VENV)/.set-up-test: EXTRAS := jax,torch,test
$(VENV)/.set-up-test-slow: EXTRAS := jax,torch,test,tpu-compiler
$(VENV)/.set-up-check: EXTRAS := jax,torch,calibrate,processor,check
$(VENV)/.set-up-demo $(VENV)/.set-up-test $(VENV)/.set-up-test-slow $(VENV)/.set-up-check: $(VENV)/.set-up-torch
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@
