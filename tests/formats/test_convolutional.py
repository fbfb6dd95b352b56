"""Networks written by the table of operators against torch's exporter: equal operators, names and numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from torch import Tensor, nn
from torch.nn import functional as F

from compress.formats import onnx as formats
from compress.formats.convolutional import NotInTableError
from compress.formats.onnx import float_onnx, int8_onnx
from compress.formats.tflite import to_tflite
from compress.models.mobilenet_v2 import ConvNormAct
from compress.product import Batch
from compress.quantization import Quantization, calibrate, fold_batchnorm, freeze, prepare
from compress.targets import open_model


class Gated(nn.Module):
    """What SmallNet has not: gates, concatenations, averages, differences."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.swish = nn.Conv2d(3, 8, 3, padding=1, dilation=1), nn.Hardswish()
        self.gate, self.wide = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, (1, 3), padding=(0, 1), groups=4)
        self.average, self.largest = nn.AvgPool2d(3, 2, padding=1), nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.swish(self.stem(x))
        x = x * F.hardsigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = torch.relu(self.wide(torch.cat([x, torch.sigmoid(x)], axis=1)))
        x = self.average(x) - self.largest(x)
        return self.head(F.relu6(x).mean((2, 3), keepdims=True).flatten(1))


def refuse(*_: object) -> None:
    raise NotInTableError


def both(module: nn.Module, size: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[onnx.ModelProto, ...]]:
    """Float and int8 model, each as the table writes it and as torch does."""
    preprocess = PREPROCESS.model_copy(update={"size": size})
    images = networks.images_of(16, size)
    graph = prepare(module, Quantization(), preprocess)
    calibrate(graph, [Batch(images, torch.zeros(len(images), dtype=torch.long))], torch.device("cpu"))
    folded, frozen = fold_batchnorm(module), freeze(graph.eval())
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", refuse)
        ours = (float_onnx(folded, size, {}), int8_onnx(frozen, size, {}))
    with monkeypatch.context() as patch:
        patch.setattr(formats, "float_model", refuse)
        patch.setattr(formats, "frozen_model", refuse)
        return list(zip(ours, (float_onnx(folded, size, {}), int8_onnx(frozen, size, {})), strict=True))


def results(model: onnx.ModelProto, images: Tensor, folder: Path) -> list[np.ndarray]:
    """Logits of the ONNX file and of the TFLite file written from it."""
    (folder / "a.onnx").write_bytes(model.SerializeToString())
    (folder / "a.tflite").write_bytes(to_tflite(model, {}))
    return [open_model(folder / name).predict(images.numpy()) for name in ("a.onnx", "a.tflite")]


@pytest.mark.parametrize("name", ["small", "gated", "mobilenet_v3_small"])
def test_the_table_writes_what_torch_writes(name, monkeypatch, tmp_path):
    torch.manual_seed(0)
    own = {"small": SmallNet, "gated": Gated}
    size = 16 if name in own else networks.size_of(name)
    module = randomized(own[name]()) if name in own else networks.NETWORKS[name](5)
    if name not in own:
        networks.settle(module, networks.images_of(16, size))
    images = networks.images_of(4, size, seed=1)
    for ours, torchs in both(module.eval(), size, monkeypatch):
        assert Counter(node.op_type for node in ours.graph.node) == Counter(n.op_type for n in torchs.graph.node)
        for mine, expected in zip(results(ours, images, tmp_path), results(torchs, images, tmp_path), strict=True):
            np.testing.assert_array_equal(mine, expected)
        quantized = [
            [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
            for model in (ours, torchs)
        ]
        assert quantized[0] == quantized[1]


def test_operators_that_the_table_does_not_have_go_to_torch(monkeypatch):
    class Gelu(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(F.gelu(self.conv(x)).mean((2, 3)))

    operators = {node.op_type for node in float_onnx(fold_batchnorm(randomized(Gelu())), 16, {}).graph.node}
    assert "Erf" in operators


def test_a_padding_that_was_traced_without_a_size_goes_to_torch(tmp_path):
    module = randomized(nn.Sequential(ConvNormAct(3, 4, 3, 2, "same"), nn.Flatten(), nn.Linear(4 * 5 * 5, 3)))
    (tmp_path / "float.onnx").write_bytes(float_onnx(fold_batchnorm(module), 9, {}).SerializeToString())
    images = torch.rand(1, 3, 9, 9)
    with torch.no_grad():
        expected = module.eval()(images).numpy()
    np.testing.assert_allclose(open_model(tmp_path / "float.onnx").predict(images.numpy()), expected, atol=1e-5)
