# make demo   the main job on an embedded corpus, from nothing to runs/demo/report.html
# make test   the tests that need neither a GPU nor a network
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS ?= 2

.PHONY: demo smoke study corpora test test-slow test-long test-hf test-transformers check lint types docs clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kanlm needs Python >= 3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m kanlm compare configs/demo.toml

# smoke       the demo shrunk: every stage, in under two minutes
smoke: $(VENV)/installed
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m kanlm compare configs/smoke.toml

# study       the study behind the verdict again, from nothing, into runs/study/results: make study CORPORA=FOLDER
study: corpora $(VENV)/installed
	$(BIN)/python -m kanlm study prepare $(CORPORA)
	$(BIN)/python -m kanlm study run --jobs $(THREADS) --folder runs/study/results
	$(BIN)/python -m kanlm study baselines --folder runs/study/results
	$(BIN)/python -m kanlm study functions --folder runs/study/results
	$(BIN)/python -m kanlm report runs/study/results

corpora:
	@test -d "$(CORPORA)" || { echo "make study: CORPORA: no folder '$(CORPORA)'; docs/comparison.md says what it holds"; exit 2; }

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not gpu and not network' -n 2 --dist worksteal --durations 20

# test-slow   the tests that take over 20 seconds each
test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and not long and not gpu and not network' -n 2 --durations 10

# test-long   the tests that take minutes each: wheels, ONNX of every arm, conversion, injected faults, two machines
test-long: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'long and not gpu and not network' -n 2

# test-hf     transformers' own model tests on our classes
test-hf: $(VENV)/installed
	$(BIN)/python scripts/test_hf.py

# test-transformers   tests/hf under the oldest and the newest transformers that pyproject.toml allows
test-transformers: $(VENV)/installed
	$(BIN)/python scripts/test_transformers.py

# check       format, lint, types and tests
check: lint types test

lint: $(VENV)/installed
	$(BIN)/ruff format --check kanlm scripts tests examples
	$(BIN)/ruff check kanlm scripts tests examples

types: $(VENV)/installed
	$(BIN)/mypy

# docs        the documentation site in site/; a warning is an error
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# clean       remove the environment and what the demo and the smoke left behind; other runs stay
clean:
	rm -rf $(VENV) runs/demo runs/smoke runs/cache build site *.egg-info
