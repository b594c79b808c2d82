# Two commands do all set-up: `make demo` and `make test`. They share one virtual environment, .venv, filled once from
# the pinned requirements.lock; afterwards everything here works offline.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-full lint bench clean

demo: $(READY)
	@mkdir -p build
	$(BIN)/adaptinfer ask examples/scene.png "What colour is the star?" --budget 0.33 --compare --overlay build/demo.png

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not full and not slow and not gpu"

# The whole matrix of families, caches, backends and ways to decode; some 20 minutes on two cores.
test-full: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings

bench: $(READY)
	$(BIN)/adaptinfer bench --shape llava-1b
	$(BIN)/python benchmarks/embedded_accuracy.py

$(READY): requirements.lock pyproject.toml
	@echo "Setting up $(VENV) (once, some minutes; 1.5 GB with a CPU build of torch, more with CUDA)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

clean:
	rm -rf $(VENV) build
