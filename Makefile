# The commands of this project. Each makes what it needs; PIP_CONSTRAINT, if set, is respected.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: reproduce test coverage campaign matrix lint types clean

reproduce: $(VENV)/.demo ## fine-tune three ways, measure, draw (about 4 minutes on 2 cores)
	$(RUN) -m analyses.reproduce

test: $(VENV)/.dev ## the whole test suite
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

coverage: $(VENV)/.dev ## the same, and which lines no test runs (a third slower)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal --cov --cov-report=term:skip-covered

campaign: $(VENV)/.dev ## the tests of many tries, in full: kills, bad files, long runs
	DORA_DYNAMICS_CAMPAIGN=full OMP_NUM_THREADS=1 $(RUN) -m pytest -m campaign -n 2

matrix: $(VENV)/.dev ## the tests under the oldest and newest versions; table in CONTRIBUTING.md
	$(RUN) -m tests.matrix

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.dev
	$(RUN) -m mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .venv-core
