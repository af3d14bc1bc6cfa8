# Two commands do everything on a machine with python3 and pip: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
MODEL := build/smollm2
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check lint types model clean

demo: .venv/demo model
	$(BIN)/python examples/demo.py $(MODEL) build/demo

test: .venv/test model
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: lint types test

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/test
	$(BIN)/mypy

model: $(MODEL)/config.json

$(MODEL)/config.json: examples/demo_model.py | .venv/demo
	$(BIN)/python examples/demo_model.py $(MODEL)

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable '.[gguf]'
	touch $@

.venv/test: .venv/demo
	$(INSTALL) --editable '.[gguf,tasks,test,dev]'
	touch $@

clean:
	rm -rf build .venv
