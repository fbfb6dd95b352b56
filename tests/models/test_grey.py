"""Networks that read grey images, from the pixels to the files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import Stripes
from PIL import Image
from pydantic import ValidationError
from torch import nn

from compress import checkpoint, measures
from compress.data import open_data
from compress.data.augment import AugmentPhoto
from compress.data.digits import Digits
from compress.data.pixels import pixels
from compress.errors import ModelError
from compress.formats.metadata import metadata, preprocess_of
from compress.knowledge.corruptions import CORRUPTIONS, corrupt
from compress.models import build, started
from compress.models.factory import Factory
from compress.models.grey import read_grey
from compress.models.mobilenet_v2 import MobileNetV2Settings
from compress.product import Network, Preprocess, Product, Run, Structure
from compress.progress import Silent
from compress.stages.distill import Distill
from compress.stages.export import Export
from compress.stages.prune import Prune
from compress.stages.quantize import Quantize
from compress.stages.verify import Verify
from compress.verification.inputs import for_files
from compress.verification.onnx_file import OnnxFile

GREY = Preprocess(size=16, channels=1, mean=(0.5,), std=(0.5,), crop=1.0)


def test_one_number_per_channel():
    assert Preprocess(channels=1).mean == (0.449,)
    assert Preprocess(channels=1).std == (0.226,)
    with pytest.raises(ValidationError, match="mean: must have 1 number, as `channels` is 1, not 3"):
        Preprocess(channels=1, mean=(0.5, 0.5, 0.5))
    with pytest.raises(ValidationError, match=r"std: must have 3 numbers, .* not 1"):
        Preprocess(std=(0.5,))


def test_a_run_of_before_loads():
    said = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "crop": 0.9}
    old = Preprocess.model_validate_json(json.dumps(said))
    assert (old.channels, old.interpolation) == (3, "bilinear")
    kept = json.dumps({**said, "channels": "RGB", "layout": "NCHW", "resize": "bilinear", "scale": 1 / 255})
    assert preprocess_of({"compress.preprocess": kept}) == old
    assert preprocess_of({"compress.preprocess": "{}"}) is None


@pytest.mark.parametrize("preprocess", [GREY, Preprocess(interpolation="bicubic"), Preprocess()])
def test_files_say_how_their_input_is_made(preprocess):
    said = metadata(kind="int8", layout="NCHW", preprocess=preprocess, labels=["a"], recipe_hash="0")
    assert preprocess_of(said) == preprocess
    assert json.loads(said["compress.preprocess"])["channels"] == {1: "L", 3: "RGB"}[preprocess.channels]


def picture(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def test_pixels_are_what_pillow_makes_of_them():
    image = picture()
    grey = pixels(image, replace_size(GREY, 24))
    assert grey.shape == (24, 24, 1)
    resized = image.convert("L").resize((32, 24), Image.Resampling.BILINEAR)
    assert np.array_equal(grey[..., 0], np.asarray(resized)[:, 4:28])
    cubic = pixels(image, Preprocess(size=24, crop=1.0, interpolation="bicubic"))
    assert np.array_equal(cubic, np.asarray(image.resize((32, 24), Image.Resampling.BICUBIC))[:, 4:28])
    assert not np.array_equal(cubic, pixels(image, Preprocess(size=24, crop=1.0)))


def replace_size(preprocess, size):
    return preprocess.model_copy(update={"size": size})


def test_augmentation_and_corruptions_of_grey_images():
    changed = AugmentPhoto()(picture(), GREY, np.random.default_rng(0))
    assert (changed.shape, changed.dtype) == ((16, 16, 1), np.uint8)
    same = AugmentPhoto()(picture(), GREY.model_copy(update={"interpolation": "bicubic"}), np.random.default_rng(0))
    assert not np.array_equal(changed, same)
    for corruption in CORRUPTIONS:
        assert corrupt(changed, corruption, 3, seed=0, image=0).shape == changed.shape


def test_digits_in_grey_are_their_three_equal_channels(tmp_path):
    grey, coloured = (
        open_data(Digits(use="digits"), preprocess, Silent(), tmp_path)
        for preprocess in (GREY, Preprocess(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, crop=1.0))
    )
    for augment in (False, True):
        ours = next(iter(grey.batches("train", batch_size=8, augment=augment))).images_NCHW
        theirs = next(iter(coloured.batches("train", batch_size=8, augment=augment))).images_NCHW
        assert ours.shape == (8, 1, 16, 16)
        torch.testing.assert_close(ours.expand_as(theirs), theirs, atol=0.005, rtol=0)


def test_read_grey_answers_as_for_three_equal_channels():
    coloured = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    image = torch.randn(2, 1, 8, 8)
    expected = coloured(image.expand(2, 3, 8, 8))
    read_grey(coloured, "here")
    torch.testing.assert_close(coloured(image), expected)
    with pytest.raises(ModelError, match="here: its first convolution, 0, reads 4 channels, not 3"):
        read_grey(nn.Sequential(nn.Conv2d(4, 4, 3)), "here")


class GreyStripes(Stripes):
    preprocess = GREY

    def batches(self, split, **how):
        for batch in super().batches(split, **how):
            images = batch.images_NCHW.mean(1, keepdim=True).contiguous(memory_format=torch.channels_last)
            yield replace(batch, images_NCHW=images)


SMALL = """
from torch import nn
from conftest import SmallNet

def net(num_classes):
    small = SmallNet(num_classes)
    small.stem = nn.Conv2d(1, 16, 3, stride=2, bias=False)
    return small
"""


def test_mobilenet_reads_grey(tmp_path):
    settings = MobileNetV2Settings(use="mobilenet_v2", width=0.25, stem_stride=1)
    module = started(settings, 5, GREY, Silent(), tmp_path)
    assert module.features[0][0].in_channels == 1
    assert module(torch.zeros(2, 1, 16, 16)).shape == (2, 5)


def test_a_grey_network_goes_all_the_way(tmp_path, monkeypatch):
    (tmp_path / "greynet.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data = GreyStripes()
    settings = Factory(use="greynet:net")
    module = started(settings, 5, GREY, Silent(), tmp_path)
    structure = Structure(model=settings.model_dump(mode="json"), num_classes=5, preprocess=GREY)
    product = Product(Network(module, structure))
    stages = (
        Prune(use="prune", goal={"macs": 0.6}),
        Distill(use="distill", epochs=1, batch_size=16),
        Quantize(use="quantize", epochs=0, calibration_images=32),
        Export(use="export"),
        Verify(use="verify"),
    )
    for number, stage in enumerate(stages):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = Run(folder, data, torch.device("cpu"), 1, Silent(), "0" * 64)
        if hasattr(stage, "check"):
            stage.check(started(settings, 5, GREY, Silent(), tmp_path), GREY)
        product = stage.apply(product, run)
    assert product.metrics["verdict"] == "PASS", product.metrics["reason"]
    before, after = (measures.macs(network.module, 16, 1) for network in (product.original, product.network))
    assert after <= 0.6 * before
    model = onnx.load(product.files["int8.onnx"])
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 16, 16]

    file = OnnxFile(product.files["int8.onnx"])
    fed = for_files([file], None, 4, 0, 5)
    assert next(iter(fed.batches()))[0].shape == (4, 1, 16, 16)
    picture().save(tmp_path / "a.png")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "pictures" / "a.png")
    image, _ = next(iter(for_files([file], tmp_path / "pictures", None, 0, 5).batches()))
    assert np.array_equal(image[0, 0], GREY.normalize(pixels(picture(), GREY)[None])[0, ..., 0])

    checkpoint.save(product.network, tmp_path / "saved")
    again = checkpoint.load(tmp_path / "saved").module
    images = next(iter(data.batches("evaluation", batch_size=4))).images_NCHW
    assert torch.equal(again(images), product.network.module.eval()(images))


def test_a_factory_of_three_channels_is_refused_for_grey(tmp_path, monkeypatch):
    (tmp_path / "three.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"fails on an image of 16x16 pixels .*expected input.* to have 3 channels"):
        build(Factory(use="three:net"), 5, 16, channels=1)
