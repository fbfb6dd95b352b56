"""Networks that ask for sizes while they are traced, as those of transformers and timm do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.models import INPUT_SHAPE
from compress.models.mobilenet_v2 import ConvNormAct
from compress.product import Preprocess
from compress.quantization import Quantization, prepare
from compress.quantization.fold import fold_batchnorm
from compress.quantization.graph import trace

PREPROCESS = Preprocess(size=10, mean=(0.5,) * 3, std=(0.5,) * 3, crop=1.0)


class NormAct(nn.BatchNorm2d):
    """timm's way: a BatchNorm of its own class, with the activation inside."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return self.act(x)


class Asks(nn.Module):
    """Refuses other images, pads as TensorFlow does, loops over sizes, and casts to the type that is there."""

    def __init__(self, way="all"):
        super().__init__()
        self.way = way
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), NormAct(8)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.1, 0.1)
            self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        if x.shape[1] != 3:
            raise ValueError("not three channels")
        if self.way == "values" and x.sum() > 0:
            return x.mean((2, 3)) @ torch.ones(3, 5)
        if self.way == "item" and x.max().item() > 0:
            return x.mean((2, 3)) @ torch.ones(3, 5)
        if self.way == "batch" and x.shape[0] > 2:
            return x.mean((2, 3)) @ torch.ones(3, 5)
        height, width = int(x.shape[-2]), x.size(3)
        down = max((math.ceil(height / 2) - 1) * 2 + 3 - height, 0)
        right = max((math.ceil(width / 2) - 1) * 2 + 3 - width, 0)
        x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        x = self.norm(self.stem(x.to(self.stem.weight.dtype)))
        assert len(x.shape) == 4
        for _ in range(x.shape[2] // 4):
            x = x * 1.5
        return self.head(x.mean((2, 3)))


def built(way="all", size=10):
    torch.manual_seed(0)
    module = Asks(way).eval()
    setattr(module, INPUT_SHAPE, (3, size, size))
    return module


def test_sizes_are_looked_up_and_the_graph_computes_the_same():
    module = built()
    with pytest.raises(ModelError, match="cannot be traced"):
        trace(Asks().eval())
    called = nn.Module.__call__
    for images in (torch.randn(1, 3, 10, 10), torch.randn(4, 3, 10, 10)):
        torch.testing.assert_close(trace(module)(images), module(images))
        torch.testing.assert_close(fold_batchnorm(module)(images), module(images), atol=1e-5, rtol=1e-5)
    assert nn.Module.__call__ is called


@pytest.mark.parametrize("way", ["values", "item", "batch"])
def test_what_depends_on_values_or_on_the_batch_is_still_refused(way):
    with pytest.raises(ModelError, match=r"cannot be traced as one graph"):
        trace(built(way))


def test_a_batchnorm_of_its_own_class_is_folded_and_casts_go():
    graph = prepare(built(), Quantization(), PREPROCESS)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in graph.modules())
    assert not any(node.target == "to" for node in graph.graph.nodes)
    kinds = {type(layer).__name__ for layer in graph.modules()}
    assert {"QuantizedConv2d", "QuantizedLinear"} <= kinds


@pytest.mark.parametrize("size", [8, 9])
def test_paddings_from_sizes_become_numbers(size):
    torch.manual_seed(0)
    module = ConvNormAct(3, 4, 3, 2, "same").eval()
    setattr(module, INPUT_SHAPE, (3, size, size))
    graph = trace(module)
    calls = [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    assert [(call.target, call.args[1]) for call in calls] == [(F.pad, (size % 2, 1, size % 2, 1))]
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(graph(images), module(images))


class SameConv(nn.Conv2d):
    """Asks its weight for its size, as timm's convolutions with TensorFlow's padding do."""

    def forward(self, x):
        kernel = self.weight.shape[-2:]
        pads = [max((math.ceil(side / 2) - 1) * 2 + k - side, 0) for side, k in zip(x.shape[-2:], kernel, strict=True)]
        down, right = pads
        x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


@pytest.mark.parametrize("size", [8, 9])
def test_a_convolution_that_computes_its_padding_is_a_layer(size):
    torch.manual_seed(0)
    module = nn.Sequential(SameConv(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).eval()
    setattr(module, INPUT_SHAPE, (3, size, size))
    folded = fold_batchnorm(module)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(folded(images), module(images))
    graph = prepare(module, Quantization(), PREPROCESS.model_copy(update={"size": size}))
    assert "QuantizedConv2d" in {type(layer).__name__ for layer in graph.modules()}
