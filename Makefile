# Two commands do all on a fresh machine with Python 3.11 or newer: `make run` and `make test`.
# Some tests read outside data, in the folders that OPENDET_DATA and OPENDET_VECTORS name; without them they skip.

PYTHON ?= python3
NEWEST ?= python3.13
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/scenes_tiny
FLAGS ?=
MAIN := $(BIN)/python -m opendet_jax.main --config=configs/scenes_tiny.py --workdir=$(RUN) $(FLAGS)
OPENDET_DATA ?= $(abspath $(wildcard ../shared/data))
OPENDET_VECTORS ?= $(abspath $(wildcard ../shared/parity))
export OPENDET_DATA OPENDET_VECTORS

.PHONY: run test test-demo test-newest test-slow parity lint config-page golden docs bench compile-check venv clean

run: $(VENV)/run
	$(MAIN) --mode=train
	@test -e $(RUN)/eval/scenes/metrics.json  # else it was stopped, and has said how it goes on
	$(MAIN) --mode=predict --config.predict.inputs='$(RUN)/val_*/images/*0.jpg'
	@echo; echo "What there is to see:"
	@ls $(RUN)/curves.png $(RUN)/eval/scenes/*.png $(RUN)/eval/scenes/*.json
	@echo "$(RUN)/predict: one annotated picture a photograph, and predictions.json"

test: $(VENV)/test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# The page in the browser, in Debian's Chromium. What gradio wants lies over the packages of the other tests.
test-demo: .venv-demo/done
	.venv-demo/bin/python -m pytest -q tests/test_demo.py

# Tests and run on a newer Python with the newest packages that requirements.txt allows, in a virtual environment of their
# own; the run is cut: it shows that all works together, not what the model reaches.
test-newest:
	$(MAKE) VENV=.venv-newest PYTHON=$(NEWEST) venv
	.venv-newest/bin/pip install -q --upgrade --upgrade-strategy eager -r requirements.txt -e '.[test]'
	$(MAKE) VENV=.venv-newest test
	rm -rf runs/newest
	$(MAKE) VENV=.venv-newest RUN=runs/newest FLAGS=--config.train.steps=20 run

test-slow: $(VENV)/test
	$(BIN)/python -m pytest -q -m slow

parity: $(VENV)/test
	XLA_FLAGS= $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "minutes or not slow" tests/parity --parity-report docs/parity.md

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python docs/config_page.py --check

# docs/config.md, from opendet_jax/config.py.
config-page: $(VENV)/test
	$(BIN)/python docs/config_page.py

golden: $(VENV)/test
	$(BIN)/python -m tests.golden.parameters

# NO_MKDOCS_2_WARNING: without it Material for MkDocs prints a page about its successor at every build.
docs: .venv-docs/done
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "The documentation: site/index.html; with its search: $(PYTHON) -m http.server --bind 127.0.0.1 --directory site"

# Beside PyTorch, on an otherwise quiet machine; it takes long. Writes docs/benchmarks.md and its pictures.
bench: $(VENV)/test
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.growth

# Compiles the kernels for machines that are not here; the compilers come into a venv of their own (a download of 1.3 GB).
compile-check: .venv-compile/done
	JAX_PLATFORMS=cpu .venv-compile/bin/python -m benchmarks.compile_check

venv: $(VENV)/test

$(VENV)/run: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-deps -e .
	touch $@

$(VENV)/test: $(VENV)/run
	$(BIN)/pip install -q -e '.[test]'
	touch $@

.venv-demo/done: $(VENV)/test
	$(PYTHON) -m venv .venv-demo
	$(BIN)/python -c 'import site; print(*site.getsitepackages())' \
		> "$$(.venv-demo/bin/python -c 'import site; print(*site.getsitepackages())')/beneath.pth"
	.venv-demo/bin/pip install -q -e '.[test-demo]'
	touch $@

.venv-compile/done: benchmarks/requirements-compile.txt requirements.txt
	$(PYTHON) -m venv .venv-compile
	.venv-compile/bin/pip install -q -r $<
	touch $@

# The site is made from the sources without importing them: it has the packages of the extra "docs" and no others.
.venv-docs/done: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> .venv-docs/requirements.txt
	.venv-docs/bin/pip install -q -r .venv-docs/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-demo .venv-newest .venv-compile .venv-docs runs site
