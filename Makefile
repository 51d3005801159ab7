# make run    everything from a fresh machine to a trained phase 1 (more flags: make run ARGS="--size nano")
# make test   everything from a fresh machine to a tested checkout
# make docs   the site, in site/index.html
# On Linux with an NVIDIA GPU: make clean run BACKEND=cuda
# For GNU make 3.81 and bash 3.2, which macOS has (tests/test_make.py).
SUITS  := import platform, sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10) or platform.system() + platform.machine() == "Darwinx86_64")
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3.10; do \
	$$python -c '$(SUITS)' >/dev/null 2>&1 && { echo $$python; exit; }; done; echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
BACKEND ?= cpu
ARGS   ?=

.PHONY: run test test-all lint docs clean
.DELETE_ON_ERROR:

run: $(VENV)/run.stamp
	$(BIN)/python -m phases.phase1 $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto $(ARGS)

test-all: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto -m "slow or not slow" $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs.stamp
	$(BIN)/python -m mkdocs build --strict --quiet

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "error: $(PYTHON) is missing or older than 3.10: install a newer Python ('brew install python@3.12' or python.org on a Mac, 'apt install python3.12-venv' on Ubuntu), or name one with make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import platform, sys; sys.exit(platform.system() + platform.machine() == "Darwinx86_64")' || { echo "error: $(PYTHON) is made for Intel processors, and MLX needs Apple silicon: install a native Python ('brew install python@3.12' with the Homebrew in /opt/homebrew, or python.org), or name one with make PYTHON=/opt/homebrew/bin/python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make a virtual environment: install it with 'apt install python3-venv' (Debian, Ubuntu), then make again" >&2; exit 2; }
	@[ "$$(uname)" != Linux ] || command -v g++ >/dev/null || echo "note: g++ is missing, so MLX will run slowly: install it with 'apt install g++' (Debian, Ubuntu) or 'dnf install gcc-c++' (Fedora)" >&2
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(BACKEND)]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(BACKEND),test,bench,docs]' -c constraints.txt
	@touch $@ $(VENV)/run.stamp $(VENV)/docs.stamp

$(VENV)/docs.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(BACKEND),docs]'
	@touch $@ $(VENV)/run.stamp

clean:
	rm -rf $(VENV) build dist site *.egg-info
