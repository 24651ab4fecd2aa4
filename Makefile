PYTHON ?= python3
BIN := .venv/bin

.PHONY: help quickstart test test-all lint bench clean

help:  ## list what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

quickstart: .venv/installed  ## run the quickstart experiment and make its figures
	$(BIN)/python manager.py --exp quickstart
	$(BIN)/python report.py --exp quickstart

test: .venv/installed  ## run the tests
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: .venv/installed  ## run the tests and the longer proofs
	$(BIN)/python -m pytest -n auto --dist worksteal -m ""

lint: .venv/installed  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed  ## measure speed and memory against primitives timed in the same run
	$(BIN)/python -m benchmarks.bounds
	$(BIN)/python -m benchmarks.common_particles
	$(BIN)/python -m benchmarks.image_models
	$(BIN)/python -m benchmarks.stochastic_graph
	$(BIN)/python -m benchmarks.dice
	$(BIN)/python -m benchmarks.pyro_bounds

clean:  ## remove the environment and all that is generated, but runs/ and data/
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find reports -mindepth 1 ! -name README.md -delete
