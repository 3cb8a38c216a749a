# Start with make quickstart and make test; both create .venv if it is missing.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= jobs/configs/quickstart.yaml
INSTALLED := .venv/.installed

.PHONY: help install quickstart serve test test-unit test-cluster test-serving benchmark lint types clean

help:
	@echo "make quickstart   train on two objectives, evaluate, serve, ask, report"
	@echo "make serve        serve the published value models of a run (CONFIG=$(CONFIG))"
	@echo "make test         all tests"
	@echo "make benchmark    measure the decoder on a finished quickstart run (docs/figures/decode.json)"
	@echo "make lint types   ruff, mypy"
	@echo "make clean        remove .venv and caches; keep runs/"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m jobs.prepare
	@touch $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/python -m jobs.quickstart --config $(CONFIG)

serve: $(INSTALLED)
	$(BIN)/python -m jobs.serve --config $(CONFIG)

# In parallel: the unit tests compute, while most of the other tests wait for processes to start and end.
test: $(INSTALLED)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-unit test-cluster test-serving

test-unit: $(INSTALLED)
	$(BIN)/python -m pytest tests/unit
	$(BIN)/python -m pytest tests/browser

test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest tests/cluster

test-serving: $(INSTALLED)
	$(BIN)/python -m pytest tests/serving

benchmark: $(INSTALLED)
	$(BIN)/python -m benchmarks.decode

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
