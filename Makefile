.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-llm-servers check bench lock clean
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

# Whole runs mostly wait for processes to start, so they are tested beside all else; the halves take equally long.
BESIDE := tests/flows tests/faults tests/servers tests/tasks/mini
test: setup-dev check  ## run all checks and tests
	@mkdir -p build; $(BIN)/python -m pytest $(BESIDE) > build/test-flows.log 2>&1 & whole=$$!; \
	$(BIN)/python -m pytest $(BESIDE:%=--ignore=%); parts=$$?; \
	wait $$whole; runs=$$?; cat build/test-flows.log; exit $$((parts + runs))

test-llm-servers: setup-dev  ## get LLM servers that others wrote, and talk to them (slow the first time)
	@$(BIN)/python -m tests.servers.install && $(BIN)/python -m pytest tests/servers

check: setup-dev  ## format, lint, types
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q . && $(BIN)/mypy

bench: setup-dev  ## measure the main job's figures and print them
	@$(BIN)/python -m tests.bench.main_job

lock: setup-dev  ## resolve the dependencies anew
	@$(BIN)/python -m pip install -q uv && PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python deployments/refresh_lock.py

clean:  ## remove the environment and all runs
	@rm -rf .venv runs build
