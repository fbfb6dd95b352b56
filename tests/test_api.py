"""The Python that docs/distillation.md shows, run as it stands."""

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from compress import api, checkpoint
from compress.errors import RecipeError
from compress.losses import LossSettings
from compress.losses.lesson import Lesson
from compress.models import ModelSettings, build
from compress.product import Network, Preprocess, Structure
from compress.recipe.explain import uses
from compress.schemes import SchemeSettings
from compress.teachers import TeacherSettings

DOCS = (Path(__file__).parents[1] / "docs/distillation.md").read_text()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a saved network and photographs.zip: two classes of colour."""
    monkeypatch.chdir(tmp_path)
    model = {"use": "mobilenet_v2", "width": 0.35}
    torch.manual_seed(0)
    module = build(TypeAdapter(ModelSettings).validate_python(model), 2, 64)
    checkpoint.save(
        Network(module, Structure(model=model, num_classes=2, preprocess=Preprocess(size=64))), Path("parent")
    )
    generator = np.random.default_rng(0)
    with zipfile.ZipFile("photographs.zip", "w") as archive:
        for split, count in (("train", 16), ("val", 4)):
            for index in range(count):
                for colour in (0, 2):
                    pixels = generator.integers(0, 100, (64, 64, 3), np.uint8)
                    pixels[..., colour] += 100
                    stream = io.BytesIO()
                    Image.fromarray(pixels).save(stream, "PNG")
                    archive.writestr(f"{split}/{'red' if colour == 0 else 'blue'}/{index}.png", stream.getvalue())
    return tmp_path


def test_load_distill_save_in_under_ten_lines(place):
    code = re.search(r"```python\n(.*?)```", DOCS, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) < 10
    assert code in (Path(__file__).parents[1] / "README.md").read_text()
    before = {path.name: path.read_bytes() for path in Path("parent").iterdir()}
    exec(compile(code, "docs/distillation.md", "exec"), {})
    student, parent = api.load("student"), api.load("parent")
    assert sum(p.numel() for p in student.module.parameters()) < sum(p.numel() for p in parent.module.parameters())
    assert {path.name: path.read_bytes() for path in Path("parent").iterdir()} == before
    assert {path.name for path in Path("student").iterdir()} == {"structure.json", "weights.safetensors"}
    assert 0 <= api.accuracy(student, api.data("photographs.zip", size=64)) <= 1


def test_settings_are_refused_as_in_a_recipe(place):
    data, parent = api.data("photographs.zip", size=64), api.load("parent")
    with pytest.raises(RecipeError, match=r"losses\.0\.temprature: unknown field; did you mean 'temperature'"):
        api.distill(parent, parent, data, losses=[{"use": "kd", "temprature": 3}])
    with pytest.raises(RecipeError, match="epoch: unknown field"):
        api.prune(parent, data, macs=0.5, epoch=3)
    assert os.listdir("parent")


def test_the_loss_that_the_documentation_adds():
    code = re.search(r"```python\n(\"\"\"Cosine.*?)```", DOCS, re.DOTALL).group(1)
    made: dict = {}
    exec(compile(code, "cosine.py", "exec"), made)
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(4, 5)), generator.normal(size=(4, 5))
    products = (student * teacher).sum(1) / np.linalg.norm(student, axis=1) / np.linalg.norm(teacher, axis=1)
    lesson = Lesson(torch.tensor(student), torch.tensor(teacher), torch.zeros(4, dtype=torch.int64))
    loss = made["Cosine"](use="cosine", weight=2.0, active=(0, 0.5))
    assert loss(lesson).item() == pytest.approx(1 - products.mean())


@pytest.mark.parametrize("union", [LossSettings, SchemeSettings, TeacherSettings])
def test_the_documentation_knows_every_name(union):
    named = uses(union)
    assert named
    for name in named:
        assert re.search(rf"[`\s{{]{name}[`,}}\s]", DOCS), name


def test_functions_that_the_documentation_names_exist():
    import importlib

    for line in re.findall(r"^\| `[\w`, ]+` \| (`losses[^|]+) \|", DOCS, re.MULTILINE):
        first, *others = re.findall(r"`([\w.]+)`", line)
        file, function = first.rsplit(".", 1)
        module = importlib.import_module(f"compress.{file}")
        for name in (function, *others):
            assert callable(getattr(module, name)), (file, name)
