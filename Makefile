PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-slow test-ncnn test-extras test-image image-arm64 clean

run: .venv/ready  # the main job on handwritten digits
	$(BIN)/compress run recipes/mobilenetv2_arm.yaml

test: .venv/ready  # style, types, import layers, and the tests that take seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2
	$(BIN)/pytest -m alone

test-slow: .venv/ready  # the tests that take minutes
	$(BIN)/pytest -m "slow and not extras"

test-ncnn: .venv/ready  # the tests of the extra runtime, which they install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,ncnn]'
	$(BIN)/pytest -m ncnn

test-extras: .venv/ready  # the tests of the optional extras, which they install; Chromium comes with .ci/packages
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,browser,huggingface,mlflow,sweep,tensorboard,timm,torchvision]'
	$(BIN)/pytest -m extras

test-image: .venv/ready  # builds the board's image for linux/arm64 and runs it; wants root, or buildah and podman
	$(BIN)/pytest -m image

image-arm64:  # the board's image, built and run for linux/arm64
	.ci/image-arm64

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
