# Everything that people and CI run. `make` alone says what there is.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo paper test check soak bench serve lock clean

PYTHON ?= python3.11
READY := .venv/.from-lock

# The one place for the environment of commands; pipeline/flows.py adds what only a flow needs.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DO_NOT_TRACK := 1

help: ## this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

# pip and not uv, because pip takes the index that the user's machine is set up for.
$(READY): requirements.lock
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --require-hashes --no-deps --requirement requirements.lock
	touch $@

demo: $(READY) ## the whole road on the built-in sample corpus, then the scores
	dvc repro
	python -m model.report

# Name single ones with MODELS="pam aveqa" and SEEDS="0"; DRY=--estimate only tells what is missing.
paper: $(READY) ## the paper's grid on CORPUS: what is missing of it, then the report
	@test -n "$(CORPUS)" || { echo 'say on which corpus: make paper CORPUS=sample'; exit 2; }
	python -m model.grid $(CORPUS) $(if $(MODELS),--models $(MODELS)) $(if $(SEEDS),--seeds $(SEEDS)) $(DRY)

test: $(READY) ## all tests, in random order
	python -m pytest

check: $(READY) ## style, types, import direction, layout
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-cache
	python -m pytest tests/test_repository.py

soak: $(READY) ## long sweeps of faults and damage, which `make test` leaves out
	python -m pytest -m soak

bench: $(READY) ## speed beside peers; NAME=join for one of them
	python -m benchmarks $(NAME)

serve: $(READY) ## Prefect server and deployments, until Ctrl-C
	python -m pipeline.flows

lock: $(READY) ## pin what requirements.in adds; UPGRADE=--upgrade pins all of it anew
	uv pip compile --quiet $(UPGRADE) --generate-hashes --no-header --no-annotate \
	  --python-version 3.11 --output-file requirements.lock requirements.in

clean: ## remove what runs made; packages, finished shards and DVC's cache stay
	rm -rf data runs reports .mypy_cache .pytest_cache .ruff_cache .hypothesis
