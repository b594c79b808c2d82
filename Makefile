# Two commands do all set-up: `make demo` and `make test`. They share one virtual environment, .venv, filled once from
# the pinned requirements.lock; afterwards everything here works offline.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-full test-vllm mutants lint docs bench clean

demo: $(READY)
	@mkdir -p build
	$(BIN)/python -m adaptinfer.embedded draw --seed 6 build/scene.jpg
	$(BIN)/adaptinfer ask build/scene.jpg "Is there a black cross?" --budget 0.33
	$(BIN)/adaptinfer ask build/scene.jpg "What does the black sign say?" --budget 0.33
	$(BIN)/adaptinfer ask build/scene.jpg "Is the star left of the red moon?" --budget 0.33
	$(BIN)/adaptinfer ask build/scene.jpg "What colour is the star?" --budget 0.33 --compare --overlay build/demo.png

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not full and not slow and not gpu"

# The whole matrix of families, caches, backends and ways to decode; some 20 minutes on two cores.
test-full: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

# Every known bug is planted once, and its tests must go red.
mutants: $(READY)
	$(BIN)/python tests/mutants.py -j 2

# vLLM pins other versions of transformers than we use, so it has an environment of its own. PyPI's torchvision is built
# for CUDA and does not import beside the CPU build of torch; neither vLLM nor a LLaVA needs it. It goes into a folder
# from which tests/vllm/vision.py takes its Python part, which Qwen's processor needs.
VLLM_BIN := .venv-vllm/bin
VLLM_READY := .venv-vllm/.ready

test-vllm: $(VLLM_READY)
	cd tests/vllm && ../../$(VLLM_BIN)/python -m pytest

$(VLLM_READY): requirements-vllm.lock pyproject.toml
	@echo "Setting up .venv-vllm (once, some minutes; 3 GB)"
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.lock
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .venv-vllm/torchvision "$$(grep ^torchvision== requirements-vllm.lock)"
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(VLLM_READY)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --warnings

# The documentation site, in build/site. A broken link or a docstring that does not parse is an error. Works offline.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY)
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "Built build/site/index.html"

bench: $(READY)
	$(BIN)/adaptinfer bench --shape llava-1b
	$(BIN)/adaptinfer eval --task world --method adaptinfer -o build/eval

$(READY): requirements.lock pyproject.toml
	@echo "Setting up $(VENV) (once, some minutes; 1.5 GB with a CPU build of torch, more with CUDA)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

clean:
	rm -rf $(VENV) .venv-vllm build
