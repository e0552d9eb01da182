# make demo  environment, install, then the built-in demo models answer about examples/
# make test  environment, install with the development tools and the clients to try, then ./check
PYTHON ?= python3
VENV := .venv
CLIENTS := $(VENV)/clients
SOURCES := pyproject.toml CMakeLists.txt $(wildcard src/glimt/kernels/csrc/*)

.PHONY: demo test clean

demo: $(VENV)/installed
	$(VENV)/bin/python -m glimt.demo examples

test: $(VENV)/installed-dev $(CLIENTS)/installed
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

# Clients of the server that do not go with glimt's own tools: an environment of their own.
$(CLIENTS)/installed: $(VENV)/bin/python tests/clients/requirements.txt
	$(VENV)/bin/python -m venv --clear $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --requirement tests/clients/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
