"""What a layer's time depends on, and where a network's layers lie: the rows and columns of a latency table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.coupled import depthwise


@dataclass(frozen=True)
class Shape:
    """What a single layer's time depends on."""

    kind: str
    """depthwise, grouped, conv or linear."""
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    size: tuple[int, int]
    """Height and width of its input; (1, 1) for a linear layer."""

    def at(self, multiple: int) -> Shape:
        """The same layer with its channels raised to the next multiples; the image's 3 stay."""
        outputs = up(self.outputs, multiple)
        inputs = self.inputs if self.inputs <= 3 else up(self.inputs, multiple)
        groups = outputs if self.kind == "depthwise" else self.groups
        return replace(self, inputs=outputs if self.kind == "depthwise" else inputs, outputs=outputs, groups=groups)

    @property
    def signature(self) -> Shape:
        """What stays of it at every width: its channels as 0, the groups of a grouped convolution as they are."""
        return replace(self, inputs=0, outputs=0, groups=self.groups if self.kind == "grouped" else 0)

    def with_channels(self, inputs: int, outputs: int) -> Shape:
        """The layer with other channels; a depthwise one has as many groups."""
        groups = outputs if self.kind == "depthwise" else self.groups if self.kind == "grouped" else 1
        return replace(self, inputs=inputs, outputs=outputs, groups=groups)

    @property
    def family(self) -> str:
        """Kind and kernel, of which fast widths are a property: `conv 1x1`, `depthwise 3x3`, `linear`."""
        return self.kind if self.kind == "linear" else f"{self.kind} {self.kernel[0]}x{self.kernel[1]}"

    @property
    def channels(self) -> str:
        return str(self.outputs) if self.kind == "depthwise" else f"{self.inputs} to {self.outputs}"

    def __str__(self) -> str:
        if self.kind == "linear":
            return "linear"
        stride = f" / {self.stride[0]}" if self.stride[0] > 1 else ""
        return f"{self.kind} {self.kernel[0]}x{self.kernel[1]}{stride}, {self.size[0]}x{self.size[1]}"


@dataclass(frozen=True)
class Placed:
    """A layer of the network, with its shape and its multiply-adds."""

    name: str
    shape: Shape
    macs: int


def place_layers(module: nn.Module, input_size: int, channels: int = 3) -> list[Placed]:
    """Every convolution and linear layer with the size of what it reads, in the order of execution."""
    found: dict[str, Placed] = {}
    handles = []

    def watch(name: str, layer: nn.Conv2d | nn.Linear) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            shape = shape_of(layer, inputs[0])
            elements = output[0].numel()
            per_element = layer.weight[0].numel()
            found.setdefault(name, Placed(name, shape, elements * per_element))

        handles.append(layer.register_forward_hook(hook))

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            watch(name, layer)
    was_training = module.training
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, channels, input_size, input_size))
    finally:
        for handle in handles:
            handle.remove()
        module.train(was_training)
    return list(found.values())


def shape_of(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Shape:
    """The shape of a layer that reads `x` (N, ...)."""
    if isinstance(layer, nn.Linear):
        return Shape("linear", layer.in_features, layer.out_features, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1))
    kind = "depthwise" if depthwise(layer) else "grouped" if layer.groups > 1 else "conv"
    padding: Any = layer.padding
    if isinstance(padding, str):
        spans = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        padding = tuple(span // 2 if layer.padding == "same" else 0 for span in spans)
    return Shape(
        kind,
        layer.in_channels,
        layer.out_channels,
        (layer.kernel_size[0], layer.kernel_size[1]),
        (layer.stride[0], layer.stride[1]),
        (padding[0], padding[1]),
        (layer.dilation[0], layer.dilation[1]),
        layer.groups,
        (x.shape[-2], x.shape[-1]),
    )


def up(channels: int, multiple: int) -> int:
    """The next multiple from `channels` on."""
    return -(-channels // multiple) * multiple
