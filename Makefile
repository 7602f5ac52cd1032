# `make demo` and `make test` install all they need into .venv, once.
# PYTHON=python3.12 chooses the interpreter, ARGS="-k scan" goes to pytest or the demo.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# An editable install follows the Python sources by itself; these need another one.
INPUTS := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

# Without a GPU the CUDA extension would cost minutes and serve nothing; its tests compile it anyway.
WITH_CUDA := $(or $(IFT_BUILD_CUDA),$(if $(shell command -v nvidia-smi),auto,0))

.PHONY: demo experiments test prove bench gpu lint wheel cuda-versions triton-versions clean
.SECONDARY:

demo: $(VENV)/train.stamp
	$(BIN)/python -m examples.demo $(ARGS)

# Writes examples/experiments/results again.
experiments: $(VENV)/experiments.stamp
	for name in squeezing digits frozen_lake clip preference instructions probe_cost; do \
	  $(BIN)/python -m examples.experiments.$$name || exit 1; done

# Neighbouring tests share fixtures, so each worker takes half of them in a row, then what the other
# has left. Tests start many processes: bytecode is kept even where the environment says otherwise.
test: $(VENV)/dev.stamp
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# What takes too long for a test: PART=models or properties; run it again to go on where it stopped. Its
# log is tests/proofs/PART.jsonl; the table of models is docs/models.md.
prove: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.proofs $(PART) $(ARGS)

# Every suite in short, with a budget of nine minutes; ends in build/bench/report.html.
bench: $(VENV)/bench.stamp
	$(BIN)/python -m bench quick $(ARGS)

# On a machine with a GPU: all that is to be known of it, with pictures; run it again to go on where
# it stopped. SECONDS=90 gives a first answer, DRY=1 goes the same way on a CPU.
gpu: $(VENV)/dev.stamp
	$(BIN)/python -m bench device --plot $(if $(DRY),--dry-run) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

# What CI runs, and what pre-commit runs on every commit.
lint: $(VENV)/dev.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

# One wheel in dist/, repaired and checked: with the CUDA extension where nvcc is; CUDA=12.9 asks for
# that toolkit and tags the version +cu129. See docs/install.md.
wheel: $(VENV)/dev.stamp
	PYTHON="$(abspath $(BIN))/python" CUDA="$(CUDA)" .ci/wheel

# NVRTC and headers of each older CUDA version that is supported, then every kernel through it.
# (version, then the releases of nvrtc, runtime, nvcc, cccl)
CUDA_VERSIONS := 12.6/12.6.85/12.6.77/12.6.85/12.6.77 12.8/12.8.93/12.8.90/12.8.93/12.8.90 \
  12.9/12.9.86/12.9.79/12.9.86/12.9.27
cuda-versions: $(VENV)/dev.stamp
	set -e; for each in $(CUDA_VERSIONS); do \
	  set -- $$(echo $$each | tr / ' '); folder=build/cuda-$$1; \
	  [ -d $$folder ] || $(PIP) install --quiet --no-deps --target $$folder \
	    nvidia-cuda-nvrtc-cu12==$$2 nvidia-cuda-runtime-cu12==$$3 \
	    nvidia-cuda-nvcc-cu12==$$4 nvidia-cuda-cccl-cu12==$$5; \
	  $(BIN)/python .ci/nvrtc.py $$folder 80 90a; \
	done

# The kernels with each older Triton that has committed limits, in the interpreter and compiled, beside
# the newest numpy that this interpreter takes. ARGS=--write commits limits of kernels that changed.
TRITON_VERSIONS := 3.6.0
triton-versions: $(VENV)/dev.stamp
	set -e; for each in $(TRITON_VERSIONS); do folder=build/triton-$$each; \
	  [ -d $$folder ] || $(PIP) install --quiet --no-deps --target $$folder triton==$$each 'numpy<2.4'; \
	  PYTHONPATH=$$folder $(BIN)/python -m bench static $(ARGS); \
	  PYTHONPATH=$$folder $(BIN)/python -m pytest -n 0 tests/kernels/backends/test_triton.py \
	    tests/bench/test_bench_gpu.py; \
	done

# Leaves the packages in .venv, which take longest; the next command builds ours again.
clean:
	rm -rf build dist ift_kernels.egg-info ift_kernels/_cpu*.so $(VENV)/*.stamp
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find bench examples ift_kernels python_api tests -name __pycache__ -prune -exec rm -rf {} +

# $* is an extra of pyproject.toml. The build requirements stand in .venv, rather than in an
# environment of pip's own, so that ninja finds the same paths again and rebuilds only what changed.
# Without --no-compile pip would spend a minute on bytecode of modules that are never imported.
$(VENV)/%.stamp: $(INPUTS)
	@PYTHON="$(PYTHON)" .ci/needs
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --no-compile -c constraints.txt setuptools pybind11 ninja
	IFT_BUILD_CUDA=$(WITH_CUDA) IFT_REQUIRE_CPP=1 \
	$(PIP) install --no-compile --no-build-isolation -c constraints.txt -e '.[$*]'
	@touch $@
