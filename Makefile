PYTHON ?= python3
# Processes that run tests: a number, or "auto" for one per core.
PYTEST_WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

MINUTES ?= 9
OUT ?= gpu-results
MUTATE_MINUTES ?= 60

.PHONY: accuracy help demo test test-quick emulate lint format docs bench gpu matrix peers-tests zoo clean
.PHONY: engines executorch files mutate

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

demo: $(VENV)/.demo ## train a CNN, fine-tune it with QAT, deploy it, and compare
	$(BIN)/python -m tritonq demo

# A process that interprets kernels can't compile them, so that the tests of kernels are runs of their own (tests/conftest.py).
test: $(VENV)/.dev ## run all tests (PYTEST_WORKERS=2 for two processes)
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS)
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --kernels=interpreter tests/operators
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --kernels=sanitizer tests/operators

# Kept out of the quick tests: what compiles kernels, starts processes, or trains for more than a few steps.
SLOW := codegen or launches or emulator or sanitizer or compile or cli or demo or trainers or examples or distributed or data_parallel or library

test-quick: $(VENV)/.dev ## run the tests that need no compiler, interpreter, second process or long training
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) -k "not ($(SLOW))"

# Triton compiles kernels for a GPU, and an emulator runs them on CPU tensors (tests/support/emulator).
ifdef TRITON
EMULATE_VENV := .venv-triton-$(TRITON)
else
EMULATE_VENV := $(VENV)
endif

emulate: $(EMULATE_VENV)/.dev ## run the operators' tests on emulated GPUs (TRITON=3.6 for another version of Triton)
	$(EMULATE_VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --kernels=emulator tests/operators

ifdef TRITON
$(EMULATE_VENV)/.dev: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(EMULATE_VENV)
	$(EMULATE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(EMULATE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'triton==$(TRITON).*'
	touch $@
endif

mutate: $(VENV)/.dev ## try deliberate errors in kernels and their specification for MUTATE_MINUTES=60 and write MUTATIONS.md
	$(BIN)/python tools/mutate.py --minutes $(MUTATE_MINUTES)

lint: $(VENV)/.dev ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

files: ## list files with what each holds, or those about WORD=histogram
	@$(PYTHON) tools/files.py $(WORD)

docs: $(VENV)/.docs ## build the documentation into docs/_build/html; a broken link or reference is an error
	$(BIN)/python -m sphinx -q -E --fail-on-warning -b html docs docs/_build/html
	@echo docs/_build/html/index.html

bench: $(VENV)/.dev ## time the quick cases against other implementations
	$(BIN)/python -m tritonq bench --quick

accuracy: $(VENV)/.dev ## compare methods at few bits on DATA=FOLDER, nine minutes at a time (hours in all)
	$(BIN)/python -m tritonq.perf.accuracy $(DATA)

gpu: ## answer a first visit to a GPU in MINUTES=9; needs no installation, writes to OUT=DIR
	$(or $(wildcard $(BIN)/python),$(PYTHON)) perf/gpu --minutes $(MINUTES) --out $(OUT)

matrix: ## run the tests under each supported version (hours, some 30 GB) and write COMPATIBILITY.md
	$(PYTHON) tools/matrix.py

peers-tests: ## tests that need NVIDIA Model-Optimizer, with PEERS_PYTHON: an environment with it, pytest and this package
	$(PEERS_PYTHON) -m pytest tests/backend/test_accelerate_model_optimizer.py

# An environment of its own, since Ultralytics and torchvision's detectors need a newer torch; ZOO="--only timm/" for some.
zoo: .zoo/.installed ## try prepare_qat and what follows on 120 models of seven libraries (hours) and write ZOO.md
	.zoo/bin/python tools/zoo.py $(ZOO)

.zoo/.installed: tools/zoo-requirements.txt pyproject.toml
	$(PYTHON) -m venv .zoo
	.zoo/bin/python -m pip install --quiet --disable-pip-version-check -r tools/zoo-requirements.txt -e '.[onnx]'
	touch $@

# A CUDA build of torch, whose runtime is replaced: tools/fake_cuda.
.PHONY: fake-cuda
fake-cuda: .fake-cuda/.installed ## run the operators' tests and every preset on a CUDA device that is not there, write FAKE_CUDA.md
	.fake-cuda/bin/python tools/fake_cuda/run.py

.fake-cuda/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv .fake-cuda
	.fake-cuda/bin/python -m pip install --quiet --disable-pip-version-check 'torch==2.11.0' 'triton==3.6.0' numpy \
	  pytest pytest-timeout pytest-xdist hypothesis ml_dtypes -e .
	touch $@

.PHONY: trainers
trainers: .trainers/.installed ## train with the trainers of other libraries and write TRAINERS.md
	.trainers/bin/python tools/trainers.py

.trainers/.installed: tools/trainers-requirements.txt pyproject.toml
	$(PYTHON) -m venv .trainers
	.trainers/bin/python -m pip install --quiet --disable-pip-version-check -r tools/trainers-requirements.txt -e '.[onnx]'
	touch $@

# ONNX Runtime 1.18 does not say that it needs the older NumPy.
ENGINES := "onnxruntime==1.18.1 numpy<2" "openvino"
engines: ## run exported models in ONNX Runtime 1.18 and OpenVINO, each in an environment of its own, and write ENGINES.md
	$(PYTHON) tools/engines.py export .engines/models
	for packages in $(ENGINES); do name=$${packages%%[= ]*}; python3 -m venv .engines/$$name && \
	  .engines/$$name/bin/python -m pip install --quiet $$packages && \
	  .engines/$$name/bin/python tools/engines.py run .engines/models $$name || exit 1; done
	$(PYTHON) tools/engines.py table .engines/models

executorch: .executorch/.installed ## lower programs with ExecuTorch's XNNPACK delegate, run them, and write EXECUTORCH.md
	.executorch/bin/python tools/delegates.py

.executorch/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .executorch
	.executorch/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'executorch==1.5.1' -e .
	.executorch/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps torchvision pillow
	touch $@

# PyTorch's source at the tag of the installed version; its tests need packages of their own.
.PHONY: torch-tests
torch-tests: .torch-tests/.installed ## run PyTorch's quantization tests of PYTORCH=CHECKOUT on tritonq's operators, write TORCH_TESTS.md
	.torch-tests/bin/python tools/torch_tests.py $(PYTORCH)

.torch-tests/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .torch-tests
	.torch-tests/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt expecttest hypothesis pytest scipy -e .
	touch $@

clean: ## remove caches and outputs; .venv, .matrix and .zoo stay
	rm -rf build dist *.egg-info demo-output docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.*' -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.docs: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[docs]'
	touch $@

# torchvision, timm and triton-viz come without what they depend on: the first two would bring another build of torch,
# the third a web server. What the tests need of theirs is in the extra.
$(VENV)/.dev: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps torchvision timm triton-viz
	touch $@
