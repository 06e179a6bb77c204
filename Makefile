# Every target sets up what it needs: a virtual environment in .venv, pinned by constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
NPROC ?= $(shell $(BIN)/python -c 'import torch; print(max(1, torch.cuda.device_count()))')
PORT ?= 29500
JOBS ?= 2
CODE := pipeline shard_tools trainer tests

.PHONY: help setup check test test-slow demo shards train bench chaos clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.complete .venv/.chromium  ## create .venv with everything pinned (about two minutes) [CHROMIUM=no]

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("cropstream needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# One test looks at a page in a browser, and says so where there is none: this may fail.
.venv/.chromium: | .venv/.complete
	@if test '$(CHROMIUM)' != no && ! command -v chromium >/dev/null && command -v apt-get >/dev/null && test "$$(id -u)" = 0; then \
		echo 'installing Chromium for the test of the gallery (leave it out: CHROMIUM=no)'; \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium; } >/dev/null 2>&1 \
		|| echo 'Chromium could not be installed: its test will be skipped (try again: rm $@; make setup)'; \
		touch $@; \
	fi

check: setup  ## lint, types, import rules
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup  ## all tests but the exhaustive ones (10 to 14 minutes on 2 cores) [JOBS=2]
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: setup  ## the exhaustive matrices
	$(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadfile

demo: setup  ## the whole road on real images in a few minutes [IMAGES=dir]
	$(BIN)/python -m tests.demo.run $(if $(IMAGES),--images '$(IMAGES)')

shards: setup  ## pack images into shards: SRC=folder or s3://… DST=s3://… [ARGS=…]
	@test -n '$(SRC)' -a -n '$(DST)' || { echo 'usage: make shards SRC=folder-or-prefix DST=s3://bucket/prefix' >&2; exit 2; }
	$(BIN)/python -m shard_tools pack '$(SRC)' '$(DST)' $(ARGS)

train: setup  ## start or resume a run: CONFIG=configs/… [NPROC=…] ARGS="loader.dataset=s3://… checkpoint.run=s3://…"
	@test -n '$(CONFIG)' || { echo 'usage: make train CONFIG=configs/….toml ARGS="loader.dataset=s3://… checkpoint.run=s3://…"' >&2; exit 2; }
	$(BIN)/deepspeed --num_accelerators $(NPROC) --master_addr 127.0.0.1 --master_port $(PORT) --module trainer --config $(CONFIG) $(ARGS)

bench: setup  ## measure every figure into build/bench.json [ONLY=loader.]
	$(BIN)/python -m tests.bench $(if $(ONLY),--only '$(ONLY)')

chaos: setup  ## SIGKILL packing and training at random; results in build/chaos.json
	$(BIN)/python -m tests.chaos

clean:  ## remove what was built; data on stores is never touched
	rm -rf build .venv *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
