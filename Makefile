# make demo   build the bundle of the reference model and sample a grid from it
# make demo-text  the same of the small text-to-image model
# make test   lint, type check and run the tests
# make test-gpu  run the tests that need an NVIDIA GPU, on a machine that has one (in .venv-gpu); they say why where they skip
# make test-ray  run the tests of sampling on Ray, which the extra `ray` (some 500 MB) is installed for
# make check  lint and type check alone
# make bench  measure the tables of docs/benchmarks.md and of the README (several hours)
# make clean  remove what these commands wrote (.venv and .venv-gpu stay: remove them by hand)
#
# Each of them creates .venv first if it is missing or older than pyproject.toml and constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# onnxruntime-gpu overwrites onnxruntime: an environment of its own. `make GPU=gpu,tensorrt test-gpu` adds TensorRT.
BIN_GPU := .venv-gpu/bin
INSTALLED_GPU := .venv-gpu/.installed
GPU ?= gpu

.PHONY: demo demo-text test test-builds test-rest test-gpu test-ray check bench clean
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: set PYTHON, as in make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing the pinned packages into .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,build,dev]'
	@touch $@

$(INSTALLED_GPU): pyproject.toml constraints.txt
	@echo "Installing into .venv-gpu (once)"
	@$(PYTHON) -m venv .venv-gpu
	@$(BIN_GPU)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(GPU),build,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/ptqd-export build calib/fashion_mnist --out engines/fashion_mnist
	$(BIN)/ptqd-export run engines/fashion_mnist --out engines/fashion_mnist_samples --num-samples 80

demo-text: $(INSTALLED)
	$(BIN)/ptqd-export build calib/cifar10_text --out engines/cifar10_text
	$(BIN)/ptqd-export run engines/cifar10_text --out engines/cifar10_text_samples --num-samples 16 --prompt "a photo of a horse"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ptqd_export

# Two halves at once, of one thread each: together they take about as long as the longer one alone.
# Engines are built in the first, whose fixtures take longest: what needs them is in it. What both need is built once.
HALF := tests/assemble tests/bench tests/cli tests/farm tests/fuzz tests/evaluate tests/parity/test_machines.py tests/runtime/test_open.py
test: check
	@bundles=$$(mktemp -d); trap 'rm -rf "$$bundles"' EXIT INT TERM; \
		PTQD_TEST_BUNDLES=$$bundles $(MAKE) --no-print-directory -j2 test-builds test-rest

test-builds:
	OMP_NUM_THREADS=1 $(BIN)/pytest $(HALF)

test-rest:
	OMP_NUM_THREADS=1 $(BIN)/pytest tests $(HALF:%=--ignore=%)

test-gpu: $(INSTALLED_GPU)
	$(BIN_GPU)/pytest -m gpu -rs

test-ray: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/pytest tests/farm -rs

bench: $(INSTALLED)
	test -d engines/fashion_mnist || $(BIN)/ptqd-export build calib/fashion_mnist --out engines/fashion_mnist
	$(BIN)/python benchmarks/step_time.py --write
	$(BIN)/python benchmarks/step_time.py --threads 1 2 --batch 4 --baseline "ORT fp32, as exported" "OpenVINO + NNCF INT8" --write
	$(BIN)/python benchmarks/graph_rewrites.py --models reference unet cifar --rounds 15 --write
	$(BIN)/python benchmarks/ort_options.py engines/fashion_mnist benchmarks/out/step-time-unet --rounds 40 --write
	taskset -c 0 $(BIN)/python benchmarks/switching.py --write
	$(BIN)/python benchmarks/parity.py --write
	$(BIN)/python benchmarks/false_alarms.py --write
	$(BIN)/python benchmarks/engine_builds.py --write
	$(BIN)/python benchmarks/input_grids.py --write
	$(BIN)/python benchmarks/quality.py --only headline --write
	$(BIN)/python benchmarks/quality.py --only ablation --samples 512 --write
	$(BIN)/python benchmarks/quality.py --only paper --samples 256 --write
	$(BIN)/python benchmarks/plan_gain.py --samples 64 --write
	$(BIN)/python benchmarks/float_layers.py --write
	$(BIN)/python benchmarks/text_model.py --write
	$(BIN)/python benchmarks/one_step.py --write
	$(BIN)/python benchmarks/plan_ranking.py benchmarks/out/ours-eta0-20-5 --samples 128 --write
	$(BIN)/python benchmarks/rounding.py --n-steps 5 --calib-size 10 --samples 16 --iterations 200 --write
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/calibration_cost.py --calib-size 2 --n-steps 4 --write
	$(BIN)/python benchmarks/summary.py --write
	$(BIN)/python benchmarks/samples.py
	$(BIN)/python benchmarks/recipe_reference.py --write

clean:
	rm -rf engines/fashion_mnist engines/fashion_mnist_samples engines/cifar10_text engines/cifar10_text_samples build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
