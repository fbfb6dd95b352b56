"""Networks by factory and by recipe, with the batch they are looked at with."""

import pytest
import torch

from compress import doctor
from compress.doctor.subject import batch_of, from_factory, from_recipe, synthetic
from compress.errors import ModelError, RecipeError
from compress.product import Preprocess
from compress.progress import Silent

NET = """
import torch
from torch import nn

def small(num_classes: int = 7):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))

def own():
    return nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(), nn.LazyLinear(23))

def wants(num_classes):
    return small(num_classes)

def wrong():
    return [1]
"""

RECIPE = """
name: tiny
model: {use: mobilenet_v2, width: 0.35}
data: {use: digits}
preprocess: {size: 32, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], crop: 1.0}
stages:
  - {use: train, epochs: 1}
  - {use: quantize, epochs: 0, calibration: mse}
  - {use: export, formats: [tflite]}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets_of_doctor.py").write_text(NET)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outputs(subject) -> int:
    with torch.no_grad():
        return subject.module(subject.images_NCHW[:1]).shape[1]


def test_a_factory_keeps_its_own_outputs(folder):
    assert outputs(from_factory("nets_of_doctor:own", Silent(), size=16)) == 23
    assert outputs(from_factory("nets_of_doctor:small", Silent(), size=16)) == 7
    assert outputs(from_factory("nets_of_doctor:small", Silent(), size=16, classes=4)) == 4


def test_a_factory_is_the_same_each_time(folder):
    first, second = (from_factory("nets_of_doctor:small", Silent(), size=16, seed=3) for _ in range(2))
    assert torch.equal(first.images_NCHW, second.images_NCHW)
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True))
    assert any("noise" in note for note in first.notes)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("nets_of_doctor:wants", "--classes"),
        ("nets_of_doctor:wrong", "must return a torch.nn.Module"),
        ("nets_of_doctor:absent", "has no `absent`"),
        ("no_such_module_here:f", "no module"),
    ],
)
def test_a_factory_that_does_not_serve_is_one_clear_line(folder, use, said):
    with pytest.raises(ModelError) as caught:
        from_factory(use, Silent(), size=16)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_is_looked_at_with_its_training_images(folder):
    subject = from_recipe(folder / "tiny.yaml", [], Silent(), base=folder)
    assert (subject.name, subject.formats, subject.stage.calibration) == ("tiny", ("tflite",), "mse")
    assert subject.images == "16 training images"
    assert subject.images_NCHW.shape == (16, 3, 32, 32)
    assert outputs(subject) == 10
    assert any("random" in note for note in subject.notes)


def test_batchnorm_that_is_new_gets_statistics_and_it_is_said(folder):
    subject = from_recipe(folder / "tiny.yaml", [], Silent(), base=folder)
    assert any("statistics" in note for note in subject.notes)
    with torch.no_grad():
        # A fresh MobileNetV2 without statistics answers the same to all images, to the eighth digit.
        assert subject.module(subject.images_NCHW).std(0).mean() > 1e-3
    assert not subject.module.training


def test_overrides_change_the_recipe(folder):
    subject = from_recipe(folder / "tiny.yaml", ["stages.quantize.keep_float=['classifier.*']"], Silent(), base=folder)
    assert subject.stage.keep_float == ("classifier.*",)
    with pytest.raises(RecipeError, match=r"stages\.quantize\.nonsense"):
        from_recipe(folder / "tiny.yaml", ["stages.quantize.nonsense=1"], Silent(), base=folder)


def test_without_the_data_synthetic_images_serve_and_it_is_said(folder):
    text = RECIPE.replace("{use: digits}", "{use: folder, path: nowhere}")
    (folder / "tiny.yaml").write_text(text)
    subject = from_recipe(folder / "tiny.yaml", [], Silent(), base=folder)
    assert "synthetic" in subject.images
    assert any("nowhere" in note for note in subject.notes)


def test_pruning_and_no_quantizing_are_said(folder):
    text = RECIPE.replace("  - {use: quantize, epochs: 0, calibration: mse}\n", "  - {use: prune, goal: {macs: 0.5}}\n")
    (folder / "tiny.yaml").write_text(text)
    subject = from_recipe(folder / "tiny.yaml", [], Silent(), base=folder)
    assert any("no `quantize` stage" in note for note in subject.notes)
    assert any("before that" in note for note in subject.notes)


def test_images_cover_the_range_of_pixels():
    preprocess = Preprocess(size=40)
    images_NCHW = synthetic(preprocess)
    pixels = images_NCHW * torch.tensor(preprocess.std).view(3, 1, 1) + torch.tensor(preprocess.mean).view(3, 1, 1)
    assert pixels.min() == pytest.approx(0, abs=1e-6)
    assert pixels.max() == pytest.approx(1, abs=1e-6)
    assert 0.1 < pixels.std() < 0.5
    assert [batch_of(size) for size in (16, 96, 160, 224, 320)] == [16, 16, 5, 4, 4]


def test_examining_a_subject_follows_its_recipe(folder):
    subject = from_factory("nets_of_doctor:small", Silent(), size=16)
    found = doctor.examine_subject(subject, Silent(), measure=False)
    assert found.ok
    assert found.network == "nets_of_doctor:small"
    assert set(subject.notes) <= set(found.notes)
    assert found.widths is not None
    assert (found.widths.machine, found.widths.measured) == ("", ())
