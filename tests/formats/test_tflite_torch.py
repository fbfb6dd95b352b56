"""Layers as torch exports them: the float TFLite file computes what torch computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from onnx_nets import nhwc, run_tflite, written_ops
from torch import Tensor, nn
from torch.nn import functional as F

from compress.formats.onnx import float_onnx
from compress.formats.tflite import to_tflite


class Layers(nn.Module):
    """A function of an image and of layers."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def tokens(x: Tensor, patches: nn.Module) -> Tensor:
    return patches(x).flatten(2).transpose(1, 2)


class ClassToken(nn.Module):
    """The front of a ViT: patches, a token for the class, positions, attention, and the class's token again."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = tokens(x, self.patches)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.attention(x, x, x, need_weights=False)[0][:, 0]


def attention(x: Tensor, patches: nn.Module, qkv: nn.Module) -> Tensor:
    x = tokens(x, patches)
    batch, count, channels = x.shape
    q, k, v = qkv(x).reshape(batch, count, 3, 2, channels // 2).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, channels)


def shuffle(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    x = first(x)
    kept, changed = x.chunk(2, dim=1)
    x = torch.cat([kept, second(changed)], dim=1)
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def interpolated(**how: object) -> nn.Module:
    return Layers(lambda x: F.interpolate(x, **how))


def by_channels(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def windows(x: Tensor) -> Tensor:
    """The shifted windows of a Swin transformer."""
    rolled = torch.roll(x, (2, 3), (2, 3))
    return rolled.view(1, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(16, 16, 3)


def conv(outputs: int) -> nn.Module:
    return nn.Conv2d(3, outputs, 1)


def patches() -> nn.Module:
    return nn.Conv2d(3, 8, 4, 4)


MODULES: dict[str, tuple[set[str], Callable[[], nn.Module]]] = {
    # operators that the file must have, and the module
    "gelu": ({"GELU"}, nn.GELU),
    "gelu tanh": ({"GELU"}, lambda: nn.GELU("tanh")),
    "silu": ({"LOGISTIC", "MUL"}, nn.SiLU),
    "hardtanh": ({"RELU_N1_TO_1"}, nn.Hardtanh),
    "softplus": ({"LOG"}, nn.Softplus),
    "prelu": ({"PRELU"}, lambda: nn.PReLU(3)),
    "layer norm": ({"RSQRT"}, lambda: nn.LayerNorm([3, 16, 16])),
    "layer norm of channels": ({"RSQRT"}, lambda: Layers(by_channels, nn.LayerNorm(3))),
    "group norm": ({"RSQRT"}, lambda: nn.Sequential(conv(6), nn.GroupNorm(3, 6))),
    "instance norm": ({"RSQRT"}, lambda: nn.InstanceNorm2d(3, affine=True)),
    "batch norm": ({"MUL"}, lambda: nn.BatchNorm2d(3)),
    "normalize": ({"DIV"}, lambda: Layers(lambda x: F.normalize(x, dim=1))),
    "nearest": ({"RESIZE_NEAREST_NEIGHBOR"}, lambda: interpolated(scale_factor=2)),
    "nearest to a size": ({"RESIZE_NEAREST_NEIGHBOR"}, lambda: interpolated(size=(11, 23))),
    "bilinear": ({"RESIZE_BILINEAR"}, lambda: interpolated(scale_factor=2, mode="bilinear")),
    "corners": ({"RESIZE_BILINEAR"}, lambda: interpolated(size=(20, 24), mode="bilinear", align_corners=True)),
    "transposed": ({"TRANSPOSE_CONV"}, lambda: nn.ConvTranspose2d(3, 6, 2, stride=2)),
    "transposed, padded": ({"TRANSPOSE_CONV"}, lambda: nn.ConvTranspose2d(3, 6, 3, 2, padding=1, output_padding=1)),
    "transposed, grouped": ({"TRANSPOSE_CONV"}, lambda: nn.ConvTranspose2d(3, 6, 3, 2, 1, groups=3, dilation=2)),
    "class token": ({"BATCH_MATMUL", "SOFTMAX", "CONCATENATION"}, ClassToken),
    "attention": ({"BATCH_MATMUL", "SOFTMAX"}, lambda: Layers(attention, patches(), nn.Linear(8, 24))),
    "linear of tokens": (
        {"FULLY_CONNECTED"},
        lambda: Layers(lambda x, first, second: second(tokens(x, first)), patches(), nn.Linear(8, 5)),
    ),
    "channel shuffle": ({"TRANSPOSE"}, lambda: Layers(shuffle, conv(8), nn.Conv2d(4, 4, 1))),
    "pixel shuffle": ({"TRANSPOSE"}, lambda: nn.Sequential(conv(12), nn.PixelShuffle(2))),
    "pixel unshuffle": ({"TRANSPOSE"}, lambda: nn.PixelUnshuffle(2)),
    "windows": ({"CONCATENATION", "TRANSPOSE"}, lambda: Layers(windows)),
    "mean": ({"MEAN"}, lambda: Layers(lambda x: x.mean((2, 3)))),
    "max": ({"REDUCE_MAX"}, lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())),
    "uncounted pads": ({"AVERAGE_POOL_2D"}, lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "reflected": ({"MIRROR_PAD"}, lambda: nn.ReflectionPad2d(2)),
    "glu": ({"SLICE", "MUL"}, lambda: Layers(lambda x: F.glu(x, 3))),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_torch(name):
    torch.manual_seed(0)
    ops, build = MODULES[name]
    module = settled(build())
    image = torch.randn(1, 3, 16, 16)
    data = to_tflite(float_onnx(module, 16, {}), {})
    assert ops <= set(written_ops(data))
    with torch.inference_mode():
        close(run_tflite(data, image.numpy())[0], module(image).numpy())


def settled(module: nn.Module) -> nn.Module:
    """With parameters that differ from channel to channel, and statistics of their own."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.running_mean)
    return module.eval()


def close(got: np.ndarray, expected: np.ndarray) -> None:
    expected = nhwc(expected)
    assert got.shape == expected.shape
    assert expected.std() > 0.01 * np.abs(expected).max(), "a constant would prove nothing"
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
