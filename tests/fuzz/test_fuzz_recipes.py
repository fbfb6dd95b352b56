"""Damaged recipes: a recipe, or a RecipeError whose every line names a place and a problem.

hypothesis prints the falsifying seed; `mutated(VALID[k], random.Random(seed))` is the recipe.
"""

from __future__ import annotations

import io
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutation import cases, damaged, mutated
from ruamel.yaml import YAML
from sandboxed import CONTROL, Sandbox

from compress import recipe as recipes
from compress.errors import RecipeError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
LONG = """
name: everything
model: {use: mobilenet_v2, width: 0.5}
data: {use: folder, path: photos, holdout: 0.2, names: {a: A}, augment: {flip: false, color: 0.1}}
preprocess: {size: 32, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], crop: 1.0}
stages:
  - {use: train, epochs: 2, lr: 0.05, batch_size: 16}
  - {use: prune, goal: {macs: 0.5}, criterion: {use: taylor}}
  - use: distill
    epochs: 2
    teacher: {use: several, teachers: [{use: parent}, {use: stage, folder: 01-train}]}
    losses:
      - {use: kd, temperature: 4.0, weight: 0.9}
      - {use: dkd, alpha: 1.0}
  - {use: quantize, epochs: 1, calibration_images: 16, weight_bits: 8}
  - {use: export, formats: [onnx, tflite], kinds: [parent, int8]}
  - {use: verify, tolerance_lsb: 2}
  - {use: benchmark, rounds: 2, runs: 5}
report: {ablate_distillation: true}
"""
TEXTS = [path.read_text(encoding="utf-8") for path in RECIPES] + [LONG]
VALUES: list[Any] = [YAML(typ="safe").load(text) for text in TEXTS]
PLACE = re.compile(r"(\S+\.yaml(:\d+)?|override '.*'): \S.*")
THOROUGH = settings(max_examples=3000, deadline=None, derandomize=True)
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


def loaded(content: bytes, overrides: list[str] | None = None) -> None:
    """The contract of one recipe."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        try:
            recipe = recipes.load(path, overrides or [])
        except RecipeError as error:
            lines = str(error).splitlines()
            assert lines
            for line in lines:
                assert PLACE.fullmatch(line.replace(folder, "")), line
                assert len(line) < 3000
                assert not CONTROL.search(line), line
            return
        again = Path(folder) / "again.yaml"
        again.write_text(recipes.dump(recipe), encoding="utf-8")
        assert recipes.load(again) == recipe
        assert all(recipes.describe(recipe))
        assert all(recipes.notes(recipe) or [True])


def written(value: Any) -> bytes:
    stream = io.StringIO()
    try:
        YAML(typ="safe").dump(value, stream)
    except Exception:  # ruamel itself has no words for it
        return repr(value).encode("utf-8", "surrogatepass")
    return stream.getvalue().encode("utf-8", "surrogatepass")


def of_values(seed: int) -> None:
    rng = random.Random(seed)
    loaded(written(mutated(rng.choice(VALUES), rng)))


def of_bytes(seed: int) -> None:
    rng = random.Random(seed)
    loaded(damaged(rng.choice(TEXTS).encode(), rng))


def of_overrides(seed: int) -> None:
    rng = random.Random(seed)
    text = rng.choice(TEXTS)
    keys = [
        "seed",
        "stages.0.epochs",
        "stages.train.lr",
        "model.use",
        "stages.9.x",
        "name",
        "data.path",
        "x..y",
        "stages.-1",
        "preprocess.mean.0",
    ]
    values = [
        "1",
        "-1",
        "[1",
        "{a: b}",
        "!!python/name:os.system",
        "1e999",
        "'",
        "\x1b[31m",
        "*a",
        "null",
        "é",
        "0x10",
        "2020-01-01",
    ]
    loaded(text.encode(), [f"{rng.choice(keys)}={rng.choice(values)}" for _ in range(rng.randrange(1, 4))])


EXAMPLES = st.integers(0, 2**32)


@QUICK
@given(EXAMPLES)
def test_values_of_any_kind_in_any_place(seed: int) -> None:
    of_values(seed)


@QUICK
@given(EXAMPLES)
def test_damaged_bytes(seed: int) -> None:
    of_bytes(seed)


@QUICK
@given(EXAMPLES)
def test_overrides(seed: int) -> None:
    of_overrides(seed)


@pytest.mark.slow
@THOROUGH
@given(EXAMPLES)
def test_thousands_of_values(seed: int) -> None:
    of_values(seed)


@pytest.mark.slow
@THOROUGH
@given(EXAMPLES)
def test_thousands_of_damaged_files(seed: int) -> None:
    of_bytes(seed)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=400))
def test_bytes_that_never_were_a_recipe(content: bytes) -> None:
    loaded(content)


SMALL = {
    "name": "small",
    "model": {"use": "mynet:Net"},
    "data": {"use": "digits"},
    "preprocess": {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3},
    "stages": [
        {"use": "train", "epochs": 1, "batch_size": 256, "lr": 0.05},
        {"use": "prune", "goal": {"macs": 0.7}},
        {"use": "quantize", "epochs": 0, "calibration_images": 16},
        {"use": "export"},
        {"use": "verify"},
    ],
}
NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(
            nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("case", cases("run", 2, 300))
def test_a_damaged_recipe_is_run(case: str, box: Sandbox) -> None:
    """Numbers that are allowed and absurd must end in a line too: a run that does not end is stopped by Ctrl-C."""
    rng = random.Random(int(case.partition("-")[2]))
    box.empty()
    (box.cwd / "mynet.py").write_text(NETWORK)
    (box.cwd / "recipe.yaml").write_bytes(written(mutated(SMALL, rng, rng.choice((1, 1, 2)))))
    before = box.listing(box.cwd / "runs")
    ended = box.run("run", "recipe.yaml", timeout_s=16, signal_s=8)
    wrong = ended.wrong(statuses=(0, 1, 2, 130), lines=30)
    if not wrong and box.listing(box.cwd / "runs", box.cwd / "__pycache__", box.folder / "home" / ".cache") != before:
        wrong = "wrote outside the run's folder"
    assert not wrong, f"{wrong}\n{(box.cwd / 'recipe.yaml').read_text()}\n{ended.err[-2500:]}"


def test_undamaged_ones_load() -> None:
    assert len(TEXTS) > 2
    for text in TEXTS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(text, encoding="utf-8")
            assert recipes.load(path).stages
