.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-long test-slow test-numerics test-llm-servers check bench chaos lock clean
PYTHON ?= python3
BIN := .venv/bin

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup:  ## make .venv and install the locked dependencies
	@$(PYTHON) deployments/setup_environment.py

setup-dev:
	@$(PYTHON) deployments/setup_environment.py --dev

demo: setup  ## run the whole job on the embedded default
	@$(BIN)/likeness run

# One process per core. A file's tests stay together, and so do all whole runs: they share a Prefect server and a run.
PYTEST := $(BIN)/python -m pytest -n auto
SLOW := servers or stack or browser
LAYERS := not (long or $(SLOW))
test: setup-dev check  ## run all checks, and all tests but those below
	@$(PYTEST) -m "$(LAYERS)"

test-long: setup-dev  ## run the tests that take minutes: killed and resumed runs, sweeps, several ranks
	@$(PYTEST) -m long

test-slow: setup-dev  ## run the slow layers: LLM servers, the stack, browsers; what is not installed is skipped
	@# With a cache of what failed, for REPEAT=--last-failed.
	@$(PYTEST) -o "addopts=-q --strict-markers" -o cache_dir=build/pytest -m "$(SLOW)" -rs $(REPEAT)

# What is compared with other code, with the kernels of CPUs without AVX-512, with AVX2 alone, and on two threads.
NUMERIC := tests/tasks/diffusion tests/tasks/encoders tests/tasks/evaluation/test_metrics.py \
	tests/tasks/test_intervals.py tests/tasks/evaluation/test_sampling.py tests/tasks/training/test_losses.py \
	tests/tasks/training/data/test_dataset.py tests/tasks/training/test_known_defects.py tests/tasks/training/data/test_buckets.py
test-numerics: setup-dev  ## compare numbers as other CPUs compute them
	@ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=2 $(PYTEST) $(NUMERIC)
	@# The second is what `make test` runs where the CPU has no AVX-512.
	@if ! grep -qs -m1 avx512f /proc/cpuinfo; then echo "no AVX-512: avx2 is the default here"; else \
	  ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(PYTEST) $(NUMERIC); fi

test-llm-servers: setup-dev  ## get LLM servers that others wrote, and talk to them (slow the first time)
	@$(BIN)/python -m tests.servers.install && $(BIN)/python -m pytest tests/servers

check: setup-dev  ## format, lint, types
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q . && $(BIN)/mypy

bench: setup-dev  ## measure the main job's figures and print them
	@$(BIN)/python -m tests.bench.main_job

CHAOS := --seed 0 --runs 20 --workers 2
chaos: setup-dev  ## run a campaign of faults against real servers, check invariants and print a table (half an hour)
	@LIKENESS_CHAOS=1 $(BIN)/python -m pytest -p no:xdist tests/stack/test_interruptions.py tests/stack/test_tracking_outage.py \
	  tests/stack/test_chaos.py
	@$(BIN)/python -m tests.chaos $(CHAOS)

lock: setup-dev  ## resolve the dependencies anew
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python deployments/refresh_lock.py

clean:  ## remove the environment and all runs
	@rm -rf .venv runs build
