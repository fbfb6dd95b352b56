PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-slow clean

run: .venv/ready  # the main job on handwritten digits
	$(BIN)/compress run recipes/mobilenetv2_arm.yaml

test: .venv/ready  # style, types, import layers, and the tests that take seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

test-slow: .venv/ready  # the tests that take minutes
	$(BIN)/pytest -m slow

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
