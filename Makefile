# Given Python >= 3.11 and make: `make train` in a fresh clone. Each target installs what it needs.

PYTHON ?= python3
WORKDIR ?= runs/tiny
PIP = -m pip install --quiet --disable-pip-version-check

# A python3.12 that starts; a version manager's shim may not.
PYTHON312 = $(shell for p in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3.12; do \
	$$p -c 'pass' 2>/dev/null && echo $$p && break; done)

.PHONY: help venv train test test-slow test-newest smoke-newest studies lint format bench compile-all clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

venv: .venv/core ## install the pinned packages into .venv

train: .venv/core ## train configs/tiny.py on Python's standard library, minutes on 2 cores
	.venv/bin/python -m experiments.train --config=configs/tiny.py --workdir=$(WORKDIR)

test: .venv/dev ## the suite, parity with torch included, 8 to 10 minutes on 2 cores
	.venv/bin/python -m pytest -n 2 --dist loadfile

test-slow: .venv/dev ## what takes longer, also run by .ci/run
	.venv/bin/python -m pytest -n 2 --dist loadfile -m slow

test-newest: .venv-newest/dev ## the suite on Python 3.12 with the newest JAX
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile

smoke-newest: .venv-newest/dev
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile tests/model tests/train tests/house/test_mesh_equality.py

studies: .venv/core ## train the published ablations again into runs/studies, 45 minutes on 2 cores
	for study in position ffn norm; do \
		.venv/bin/python -m experiments.ablate --config=configs/ablations/$$study.py \
			--workdir=runs/studies/$$study || exit 1; \
	done

lint: .venv/dev ## ruff, style and format; basedpyright, types, a minute
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright

format: .venv/dev ## ruff, in place
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/bench ## measure against peers; writes docs/benchmarks.md and benchmarks/results.json
	.venv/bin/python -m benchmarks.run

compile-all: .venv/dev ## compile networks for TPU slices; writes docs/scale.md; an hour or two, resumable
	.venv/bin/python -m benchmarks.scale

clean: ## remove the environments; runs and caches stay
	rm -rf .venv .venv-newest

.venv/core: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -r requirements.txt
	@touch $@

# torch first and alone: resolved together with others it may be replaced by a release with CUDA.
.venv/dev: .venv/core setup.py
	.venv/bin/python $(PIP) torch==2.13.0
	.venv/bin/python $(PIP) -r requirements.txt -e '.[dev,parity]'
	rm -rf .venv/libtpu && .venv/bin/python $(PIP) --target .venv/libtpu libtpu==0.0.52
	@touch $@

.venv/bench: .venv/dev
	.venv/bin/python $(PIP) -r requirements.txt -e '.[bench]'
	@touch $@

.venv-newest/dev: setup.py
	@test -n "$(PYTHON312)" || { echo "python3.12 is not on this machine"; exit 1; }
	$(PYTHON312) -m venv .venv-newest
	.venv-newest/bin/python $(PIP) --upgrade -e '.[dev]'
	@touch $@
