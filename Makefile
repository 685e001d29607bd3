# Each target first creates a virtual environment in .venv with the pinned packages. Needs Python 3.11 or newer.
# What the targets do is in lora_from_scratch/cli/make.py, for systems without make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MAKE_IT := $(BIN)/python -m lora_from_scratch make
TARGETS := demo lab build translations site readme smollm2 test test-all test-gpu test-gpt2 lint bench install install-course install-dev

.PHONY: help clean $(TARGETS)

help: $(BIN)/python
	@$(MAKE_IT) --help

$(TARGETS): $(BIN)/python
	@$(MAKE_IT) $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed; set it with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "could not create a virtual environment (on Debian: apt install python3-venv)"; exit 2; }

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
