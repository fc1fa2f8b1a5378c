# make train   the main job: a tiny mixture-of-experts model learns by RL, routes replayed
# make test    every test          make lint   ruff and mypy
# make gpu     kernels on a GPU    make bench  benchmarks      make docs   docs/*.md checked
# make test-sglang   against real SGLang on this machine's CPU, in an environment of its own; some minutes
# make fuzz   the parsers, by coverage; ARGS="--seconds 600 reply"
# Each target sets itself up in .venv; a second run installs nothing.
PYTHON ?= python3
VENV ?= .venv
SGLANG ?= .venv-sglang
ARGS ?=
BIN := $(VENV)/bin
OUT ?= benchmarks/results
INTERPRETED := tests/kernels tests/trainer/test_same_step.py
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install train test test-sglang fuzz lint gpu bench docs clean
install:
	@VENV=$(VENV) $(PYTHON) scripts/install.py

train: install
	$(BIN)/pacenote train tiny $(ARGS)

# The kernels' tests run twice: on the plain definitions, and on the Triton kernels in the interpreter, where the training
# step runs as well (ARGS may select nothing there, which is pytest's exit code 5).
test: install
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto $(INTERPRETED) $(ARGS) || [ $$? -eq 5 ]

# One after the other: each module starts its own servers, and two are what a small machine holds.
test-sglang: install
	@VENV=$(SGLANG) $(PYTHON) scripts/install_sglang.py
	PACENOTE_SGLANG=$(abspath $(SGLANG))/bin/python $(BIN)/python -m pytest tests/sglang $(ARGS)

# What is found out is left in $(OUT)/fuzz.
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --out $(OUT)/fuzz $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A GPU machine may have no network: a python that already holds a CUDA torch is used as it is.
gpu:
	$(PYTHON) scripts/gpu.py --out $(OUT)

bench: install
	for name in route permute pack logprob policy step wire; do $(BIN)/python -m benchmarks.$$name --out $(OUT) $(ARGS) || exit 1; done
	$(BIN)/python -m benchmarks.replay_cost --out $(OUT)

docs: install
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf $(VENV) $(SGLANG) build dist .mypy_cache .ruff_cache .pytest_cache runs
