# `make demo` and `make test` set up everything they need: Python >= 3.11, make and a package index are enough.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test reproduce install clean

demo: install
	$(BIN)/python recipes/quickstart_data.py
	$(BIN)/redwhale run recipes/quickstart.toml

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

# The experiments of docs/reproduction.md at a reduced size; DATA is the folder that the page describes.
reproduce: install
	$(BIN)/python bench/reproduction/run.py --quick --data $(DATA)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; run make PYTHON=python3.11 (or newer)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,filtering,web,scale,cloud,report,serve]"
	@touch $@

# Leaves runs/ and quickstart-data/ alone.
clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
