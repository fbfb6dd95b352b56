"""Fake quantization with learned step sizes: Esser et al., 2020 (arXiv:1902.08153), equations 1 to 3, section 2.2.

The logarithm of a step size is what is trained: steps stay positive, and one learning rate moves a step of 0.001 and
one of 0.1 by the same part of themselves (Jain et al., 2020, arXiv:1903.08066, appendix B).

An activation's grid has 256 steps, numbered 0..255 as in ONNX; TFLite numbers it -128..127. (torch's learnable
fake quant truncates negative zero points in its backward pass instead of rounding, so -128..127 would bias gradients.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QMIN, QMAX = 0, 255
WEIGHT_QMAX = 127
"""Weights use -127..127: symmetric, so that zero points are zero and no kernel overflows on -128 x -128."""
SMALLEST_SCALE = 1e-8


def weight_scales(weight: Tensor) -> Tensor:
    """The step per output channel (axis 0) that maps the channel's largest absolute weight to 127."""
    largest = weight.detach().abs().flatten(1).amax(1)
    return (largest / WEIGHT_QMAX).clamp_min(SMALLEST_SCALE)


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to its grid in the forward pass and passes gradients to the tensor and to the grid.

    While `calibrating`, it lets tensors pass and averages their extremes over batches. `nonnegative` is for what
    comes out of a ReLU: the zero point is the lowest step, so that the grid itself does the clipping, and `limit` (6
    for ReLU6) bounds its upper end likewise. `learned=False` keeps scale and zero point where calibration put them.
    """

    def __init__(self, layer: str, *, nonnegative: bool = False, limit: float | None = None, learned: bool = True):
        super().__init__()
        self.layer, self.nonnegative, self.limit = layer, nonnegative, limit
        self.calibrating, self.observes = False, True
        self._set("log_scale", torch.tensor([0.0]), learned)
        self._set("zero_point", torch.tensor([float(QMIN if nonnegative else 0)]), learned and not nonnegative)
        self.register_buffer("extremes", torch.zeros(2))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    log_scale: Tensor
    zero_point: Tensor
    extremes: Tensor
    batches: Tensor

    def _set(self, name: str, value: Tensor, learned: bool) -> None:
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def scale(self) -> Tensor:
        """Shape (1,); with a `limit`, never so large that the grid passes it."""
        scale = self.log_scale.exp()
        return scale.clamp_max(self.limit / (QMAX - QMIN)) if self.limit else scale

    def grid(self) -> tuple[float, int]:
        """The scale (a float32 value) and the zero point in 0..255 that the exported files get."""
        zero_point = int(torch.round(self.zero_point.detach()).clamp(QMIN, QMAX))
        return float(self.scale.detach()), zero_point

    def set_range(self, low: float, high: float) -> None:
        """Puts the grid over [low, high], widened to contain zero."""
        low, high = min(0.0, low), max(0.0, high)
        if self.nonnegative:
            low = 0.0
        if self.limit:
            high = min(high, self.limit)
        scale = max((high - low) / (QMAX - QMIN), SMALLEST_SCALE)
        with torch.no_grad():
            self.log_scale.fill_(math.log(scale))
            self.zero_point.fill_(min(QMAX, max(QMIN, round(QMIN - low / scale))))

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            if not self.observes:
                return x
            with torch.no_grad():
                extremes = torch.stack([x.min(), x.max()]).float()
                self.batches += 1
                self.extremes += (extremes - self.extremes) / self.batches
                self.set_range(float(self.extremes[0]), float(self.extremes[1]))
            return x
        gradient_scale = 1.0 / math.sqrt(x[0].numel() * (QMAX - QMIN) / 2)
        fake: Tensor = torch._fake_quantize_learnable_per_tensor_affine(
            x, self.scale, self.zero_point, QMIN, QMAX, gradient_scale
        )
        return fake

    def again(self, layer: str) -> ActivationQuantizer:
        """A quantizer of another tensor on this grid: it has the same parameters and no part in calibration."""
        other = ActivationQuantizer(layer, nonnegative=self.nonnegative, limit=self.limit)
        other.log_scale, other.zero_point, other.observes = self.log_scale, self.zero_point, False
        return other

    def extra_repr(self) -> str:
        return f"{self.layer}, nonnegative={self.nonnegative}, limit={self.limit}"


def _fake_weight(weight: Tensor, scale: Tensor) -> Tensor:
    gradient_scale = 1.0 / math.sqrt(weight[0].numel() * WEIGHT_QMAX)
    fake: Tensor = torch._fake_quantize_learnable_per_channel_affine(
        weight, scale, torch.zeros_like(scale), 0, -WEIGHT_QMAX, WEIGHT_QMAX, gradient_scale
    )
    return fake


def weight_integers(weight: Tensor, scale: Tensor) -> Tensor:
    """The int8 weights of the exported files, output channels first, one step of `scale` (outputs,) each."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    return torch.round(weight.detach() / scale.detach().view(shape)).clamp(-WEIGHT_QMAX, WEIGHT_QMAX).to(torch.int8)


class QuantizedConv2d(nn.Conv2d):
    """A convolution whose weights are rounded to a learned grid per output channel; `padding` may be asymmetric.

    `pads` is (left, right, top, bottom) in front of the convolution's own padding, as torch.nn.functional.pad takes it.
    """

    log_weight_scale: nn.Parameter
    pads: tuple[int, int, int, int]

    @classmethod
    def of(cls, conv: nn.Conv2d, pads: tuple[int, int, int, int] = (0, 0, 0, 0)) -> QuantizedConv2d:
        """The same convolution with fake-quantized weights; parameters are copied."""
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=True,
        )
        new.pads = pads
        _take_parameters(new, conv)
        return new

    def forward(self, input: Tensor) -> Tensor:
        if any(self.pads):
            input = F.pad(input, self.pads)
        return self._conv_forward(input, _fake_weight(self.weight, self.weight_scale), self.bias)

    @property
    def weight_scale(self) -> Tensor:
        """Steps of the weights' grids, (outputs,)."""
        return self.log_weight_scale.exp()


class QuantizedLinear(nn.Linear):
    """A linear layer whose weights are rounded to a learned grid per output."""

    log_weight_scale: nn.Parameter

    @classmethod
    def of(cls, linear: nn.Linear) -> QuantizedLinear:
        """The same layer with fake-quantized weights; parameters are copied."""
        new = cls(linear.in_features, linear.out_features, bias=True)
        _take_parameters(new, linear)
        return new

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _fake_weight(self.weight, self.weight_scale), self.bias)

    @property
    def weight_scale(self) -> Tensor:
        """Steps of the weights' grids, (outputs,)."""
        return self.log_weight_scale.exp()


def _take_parameters(new: Any, old: nn.Conv2d | nn.Linear) -> None:
    with torch.no_grad():
        new.weight.copy_(old.weight)
        if old.bias is None:
            new.bias.zero_()
        else:
            new.bias.copy_(old.bias)
    new.log_weight_scale = nn.Parameter(weight_scales(new.weight).log())
