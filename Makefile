# MODEL: a name from `cnq models`, a directory, a GGUF file or a hub id. TYPES: quantizations, the last one is talked with.
MODEL ?= tiny
TYPES ?= Q4_K_M
PYTHON ?= python3
# A package index with prebuilt llama-cpp-python wheels; empty = compile it, about two minutes on two cores.
LLAMA_WHEELS ?=

BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	$(if $(LLAMA_WHEELS),--extra-index-url $(LLAMA_WHEELS) --only-binary llama-cpp-python)
# See tools/llama_cpp_python.cmake. pip keeps the compiled wheel in its cache for the next .venv.
export CMAKE_ARGS := -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/tools/llama_cpp_python.cmake $(CMAKE_ARGS)

.PHONY: help setup quantize chat demo test training check format docs golden bench clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/core ## create .venv and install cnq (the other targets do it by themselves)

quantize: .venv/core ## the whole road: make quantize MODEL=7b TYPES="Q4_K_M Q8_0"
	$(BIN)/cnq build $(MODEL) $(TYPES:%=-t %) --prompt

chat: .venv/core ## talk with what quantize made
	@$(BIN)/cnq build $(MODEL) $(TYPES:%=-t %)
	$(BIN)/cnq chat "$$(ls -t models/$(MODEL)/*-$(lastword $(TYPES))*.gguf | head -1)"

demo: .venv/training ## train a small model on Chinese text, no GPU; measured before and after; about 15 minutes
	$(BIN)/python tools/demo.py

test: .venv/dev ## every test
	$(BIN)/pytest

training: .venv/training ## install what training takes (torch, transformers, DeepSpeed), which its tests take too

check: .venv/dev ## format, lint, types, and whether docs/cli.md is fresh
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/cli_docs.py --check

format: .venv/dev ## put the code in form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/dev ## rewrite docs/cli.md from the help of the commands
	$(BIN)/python tools/cli_docs.py

golden: .venv/dev ## rewrite tests/golden from llama.cpp's own converter, and show the difference
	$(BIN)/python tests/golden/make.py
	$(BIN)/python tests/golden/make_tools.py
	$(BIN)/python tests/golden/make_lora.py
	git diff --stat tests/golden

bench: .venv/dev ## time cnq against llama.cpp's own tools, and rewrite docs/benchmarks.md
	$(BIN)/python tools/bench.py $(MODEL) --write

clean: ## remove .venv and what was built (not models/)
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/core: pyproject.toml constraints.txt tools/llama_cpp_python.cmake | .venv/bin/python
	@echo "installing cnq; llama.cpp is compiled once, which takes about two minutes on two cores"
	$(PIP) --editable .
	@touch $@

.venv/dev: .venv/core
	$(PIP) --editable '.[dev]'
	@touch $@

.venv/training: .venv/dev
	$(PIP) --editable '.[training]'
	@touch $@
