# Two commands do all on a fresh machine with Python 3.11 or newer: `make run` and `make test`.
# Some tests read outside data, in the folders that OPENDET_DATA and OPENDET_VECTORS name; without them they skip.

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/scenes_tiny
MAIN := $(BIN)/python -m opendet_jax.main --config=configs/scenes_tiny.py --workdir=$(RUN)
OPENDET_DATA ?= $(abspath $(wildcard ../shared/data))
OPENDET_VECTORS ?= $(abspath $(wildcard ../shared/parity))
export OPENDET_DATA OPENDET_VECTORS

.PHONY: run test test-slow parity lint golden bench compile-check venv clean

run: .venv/run
	$(MAIN) --mode=train
	@test -e $(RUN)/eval/scenes/metrics.json  # else it was stopped, and has said how it goes on
	$(MAIN) --mode=predict --config.predict.inputs='$(RUN)/val_*/images/*0.jpg'
	@echo; echo "What there is to see:"
	@ls $(RUN)/curves.png $(RUN)/eval/scenes/*.png $(RUN)/eval/scenes/*.json
	@echo "$(RUN)/predict: one annotated picture a photograph, and predictions.json"

test: .venv/test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-slow: .venv/test
	$(BIN)/python -m pytest -q -m slow

parity: .venv/test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/parity --parity-report docs/parity.md

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

golden: .venv/test
	$(BIN)/python -m tests.golden.parameters

# Beside PyTorch, on an otherwise quiet machine; it takes long. Writes docs/benchmarks.md and its pictures.
bench: .venv/test
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.growth

# Compiles the kernels for machines that are not here; the compilers come into a venv of their own (a download of 1.2 GB).
compile-check: .venv-compile/done
	JAX_PLATFORMS=cpu .venv-compile/bin/python -m benchmarks.compile_check

venv: .venv/test

.venv/run: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-deps -e .
	touch $@

.venv/test: .venv/run
	$(BIN)/pip install -q -e '.[test]'
	touch $@

.venv-compile/done: benchmarks/requirements-compile.txt requirements.txt
	$(PYTHON) -m venv .venv-compile
	.venv-compile/bin/pip install -q -r $<
	touch $@

clean:
	rm -rf .venv .venv-compile runs
