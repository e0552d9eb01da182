# make demo  environment, install, then the built-in demo models answer about examples/
# make test  environment, install with the development tools, then ./check
PYTHON ?= python3
VENV := .venv
SOURCES := pyproject.toml CMakeLists.txt $(wildcard src/glimt/kernels/csrc/*)

.PHONY: demo test clean

demo: $(VENV)/installed
	$(VENV)/bin/python -m glimt.demo examples

test: $(VENV)/installed-dev
	./check

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "glimt needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
