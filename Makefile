# `make help` lists the targets. Each does the set-up it needs: a virtual environment in .venv, from pinned versions.
PROFILE ?= mini
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3 2>/dev/null))
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
PIPELINE := $(VENV)/.pipeline
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export PATH := $(BIN):$(PATH)
# JOBS=4: stages at a time, of those that keep one core busy (`side_by_side` in dvc.yaml). By default one a core; one on GPUs
# A notebook on two cores gains nothing from more threads, and results stay the same on machines with more
export OMP_NUM_THREADS ?= 1
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup repro verify rehearsal smoke lint test bench bench-full params export readme docs clean distclean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'
	@echo "  PROFILE=mini (default) | smoke | study | paper   chooses the profile of make repro"

setup: $(READY) ## Install everything into .venv, with what tests and notebooks need (about three minutes, once)

# What make repro needs, networks of nnU-Net included; tests and editors come on top
$(PIPELINE): settings.ini setup.py pyproject.toml constraints.txt benchmarks/peers.txt
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11 or newer, or run make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: run make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned versions into $(VENV) (minutes)"
	$(PIP) torch
	$(PIP) -e '.[train,pipeline]'
	$(PIP) --no-deps $$(grep '^dynamic_network_architectures=' benchmarks/peers.txt)
	@touch $(PIPELINE)

$(READY): $(PIPELINE)
	$(PIP) -e '.[train,convert,dicom,remote,cluster,pipeline,docs,dev]'
	$(PIP) --no-deps -r benchmarks/peers.txt
	@touch $(READY)

repro: $(PIPELINE) ## Regenerate results, tables and figures of a profile with DVC
	@python -m mednext_v2.repro $(PROFILE) $(if $(JOBS),--jobs $(JOBS))
	@echo "scores, tables and figures: results/$(PROFILE)"

verify: $(PIPELINE) ## Compare the results of make repro with the committed ones (RECORD=1 adds this machine to benchmarks/machines.md)
	@python -m mednext_v2.report.verify $(PROFILE) $(if $(filter-out 0 no false,$(RECORD)),--record)

smoke: $(READY) ## Run the whole pipeline at toy size in a scratch copy
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && git clone --quiet . "$$copy/mednext_v2" && cd "$$copy/mednext_v2" \
	  && { python -m mednext_v2.repro smoke $(if $(JOBS),--jobs $(JOBS)) || { tail -n 40 $$(ls -t runs/smoke/logs/*.log | head -n 1); exit 1; }; }

rehearsal: $(READY) ## Run mini in a scratch copy, killed in each kind of stage, and compare it with the committed results
	@python tests/rehearsal.py

lint: $(READY) ## Look for unused names, unsorted imports and unformatted cells with ruff (rules in pyproject.toml)
	@ruff check mednext_v2 tests benchmarks nbs/site
	@ruff format --check nbs tests benchmarks

test: $(READY) ## Run every test and every chapter
	@python -m pytest -n 2 $(PYTEST)

bench: $(READY) ## Measure the ratios to the named peers anew and compare them with the committed ones (ten minutes; STRICT=1 fails on a regression)
	@python benchmarks/compare.py $(if $(filter-out 0 no false,$(STRICT)),--strict)

bench-full: $(READY) ## Measure all that benchmarks/results holds anew, and write it there (over an hour)
	@for part in storage data trainer block threads scaling tried metrics inference whole; do python benchmarks/$$part.py || exit 1; done

params: $(PIPELINE) ## Compose params.yaml anew from conf/ (profile mini)
	@python -m mednext_v2.stages params mini

export: $(READY) ## Format the notebooks, write mednext_v2/ from them, and clean them
	@ruff format --quiet nbs tests benchmarks
	@nbdev_export && nbdev_clean
	@python -c "from mednext_v2.public import stub; print(stub(), end='')" > mednext_v2/__init__.pyi

readme: $(READY) ## Write README.md from nbs/index.ipynb
	@python -m mednext_v2.stages readme > README.md

docs: $(READY) ## Build the site in _docs from what is saved, offline (a minute and a half on two cores)
	@python nbs/site/build_site.py

clean: ## Remove unfinished trainings
	rm -rf scratch

distclean: clean ## Remove the environment and everything that DVC can make again
	rm -rf $(VENV) data/raw data/prepared models runs
