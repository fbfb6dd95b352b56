"""MobileNetV2 against the published facts about torchvision's."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_pruning
from pydantic import TypeAdapter, ValidationError

from compress import measures
from compress.data import Folder, open_data
from compress.models import ModelSettings, build, load_weights
from compress.models.mobilenet_v2 import BLOCKS, ConvNormAct, MobileNetV2, multiple_of_8
from compress.product import Preprocess

SHARED = Path(__file__).resolve().parents[2].parent / "shared/data"
WEIGHTS = SHARED / "mobilenet_v2_imagenet_fp16.safetensors"
PHOTOS = SHARED / "imagenette_112px.zip"
IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def settings(**fields):
    return TypeAdapter(ModelSettings).validate_python({"use": "mobilenet_v2", **fields})


def torchvision_keys():
    """Names of torchvision's state dict, from the structure that its source and its published files show."""

    def batch_norm(name):
        return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    keys = ["features.0.0.weight", *batch_norm("features.0.1")]
    number = 1
    for expansion, _, repeats, _ in BLOCKS:
        for _ in range(repeats):
            block = f"features.{number}.conv"
            activated = 1 if expansion == 1 else 2
            for part in range(activated):
                keys += [f"{block}.{part}.0.weight", *batch_norm(f"{block}.{part}.1")]
            keys += [f"{block}.{activated}.weight", *batch_norm(f"{block}.{activated + 1}")]
            number += 1
    keys += ["features.18.0.weight", *batch_norm("features.18.1")]
    return [*keys, "classifier.1.weight", "classifier.1.bias"]


def test_names_parameters_and_multiply_adds_are_the_published_ones():
    network = MobileNetV2()
    assert list(network.state_dict()) == torchvision_keys()
    assert measures.params(network) == 3_504_872
    assert measures.macs(network, 224) == 300_774_272
    assert network.features[18][1].eps == 1e-5


@pytest.mark.parametrize(
    ("channels", "expected"), [(32, 32), (11.2, 16), (8.4, 8), (5.6, 8), (33.6, 32), (44, 48), (1792, 1792)]
)
def test_multiple_of_8(channels, expected):
    # 11.2 would round to 8, more than 10 % below, and becomes 16, as in torchvision.
    assert multiple_of_8(channels) == expected


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_trace_equals_eager(padding, stem_stride):
    network = build(settings(width=0.25, padding=padding, stem_stride=stem_stride), 10, 64)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(network)(images), network(images))
        assert network.features(images).shape[2:] == ((4, 4) if stem_stride == 1 else (2, 2))
    assert list(network.state_dict()) == torchvision_keys()


def same_convolution(image_CHW, weight_OIHW, stride):
    """TensorFlow's SAME, from the formula in its documentation, in numpy loops' clearest form."""
    size, kernel = image_CHW.shape[1], weight_OIHW.shape[2]
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    before = total // 2
    padded = np.pad(image_CHW, ((0, 0), (before, total - before), (before, total - before)))
    result = np.empty((weight_OIHW.shape[0], out, out))
    for y in range(out):
        for x in range(out):
            window = padded[:, y * stride : y * stride + kernel, x * stride : x * stride + kernel]
            result[:, y, x] = np.einsum("oihw,ihw->o", weight_OIHW, window)
    return result


@pytest.mark.parametrize("size", [1, 2, 9, 10])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_same_is_tensorflows(stride, size):
    generator = torch.Generator().manual_seed(0)
    layer = ConvNormAct(3, 4, 3, stride, "same").eval()
    image = torch.rand(1, 3, size, size, generator=generator)
    with torch.no_grad():
        ours = layer(image)[0].numpy()
    convolved = same_convolution(image[0].numpy(), layer[0].weight.detach().numpy(), stride)
    expected = np.clip(convolved / np.sqrt(1 + layer[1].eps), 0, 6)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_torch_pruning_understands_it():
    network = build(settings(padding="same"), 10, 32)
    before = measures.params(network)
    images = torch.rand(1, 3, 32, 32)
    pruner = torch_pruning.pruner.BasePruner(
        network,
        images,
        torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[network.classifier[1]],
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    assert measures.params(network) < 0.35 * before
    assert network(images).shape == (1, 10)


def test_unknown_network_says_what_there_is():
    with pytest.raises(ValidationError, match=r"must be mobilenet_v2, .*, or package\.module:factory"):
        settings(use="mobilenet_v4")


class Silent:
    @contextmanager
    def steps(self, label, total):
        yield lambda text: None

    def note(self, text):
        raise AssertionError(text)


@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"needs {WEIGHTS}")
def test_imagenet_weights_recognise_photographs():
    half = (0.5, 0.5, 0.5)
    # The photographs have 112 pixels a side; 128 x 128 of them enlarged suit the network better than 96 x 96.
    preprocess = Preprocess(size=128, mean=half, std=half)
    data = open_data(Folder(use="folder", path=str(PHOTOS), workers=0), preprocess, Silent(), Path.cwd())
    network = build(settings(padding="same"), 1000, 128)
    load_weights(network, WEIGHTS, Silent())
    correct = 0
    with torch.inference_mode():
        for batch in data.batches("evaluation", batch_size=50, limit=200):
            predicted = network(batch.images_NCHW)[:, IMAGENETTE].argmax(1)
            correct += int((predicted == batch.labels_N).sum())
    assert correct > 180
