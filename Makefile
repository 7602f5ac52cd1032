# `make demo` and `make test` install all they need into .venv, once.
# PYTHON=python3.12 chooses the interpreter, ARGS="-k scan" goes to pytest or the demo.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# An editable install follows the Python sources by itself; these need another one.
INPUTS := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo experiments test lint wheel clean
.SECONDARY:

demo: $(VENV)/train.stamp
	$(BIN)/python -m examples.demo $(ARGS)

# Writes examples/experiments/results again.
experiments: $(VENV)/experiments.stamp
	for name in squeezing digits frozen_lake preference probe_cost; do \
	  $(BIN)/python -m examples.experiments.$$name || exit 1; done

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 $(ARGS)

# What CI runs, and what pre-commit runs on every commit.
lint: $(VENV)/dev.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

wheel: $(VENV)/dev.stamp
	IFT_REQUIRE_CPP=1 $(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

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
	IFT_REQUIRE_CPP=1 $(PIP) install --no-compile --no-build-isolation -c constraints.txt -e '.[$*]'
	@touch $@
