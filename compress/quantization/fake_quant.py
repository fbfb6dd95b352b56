"""Fake quantization with learned step sizes: Esser et al., 2020 (arXiv:1902.08153), equations 1 to 5, section 2.2.

The logarithm of a step size is what is trained: steps stay positive, and one learning rate moves a step of 0.001 and
one of 0.1 by the same part of themselves (Jain et al., 2020, arXiv:1903.08066, appendix B). Or the grids follow the
extremes of what they round, as in Jacob et al., 2018 (arXiv:1712.05877), section 3.1.

An activation's grid has 2**bits steps, numbered from 0 as in ONNX; TFLite numbers its 256 steps -128..127. Fewer than
8 bits are simulated: no exported file computes with them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compress.holding import held, hold

QMIN, QMAX = 0, 255
WEIGHT_QMAX = 127
"""Weights use -127..127: symmetric, so that zero points are zero and no kernel overflows on -128 x -128."""
SMALLEST_SCALE = 1e-8
CHUNK = 2**19
"""Values that are rounded at a time: four passes over 2 MB stay in the cache."""
MEMORY = 0.99
"""Of a grid that follows extremes: what part of them it keeps from one training step to the next."""


def largest_step(bits: int) -> int:
    """The highest number of an activation's grid: 255 at 8 bits."""
    return int(2**bits - 1)


def largest_weight(bits: int) -> int:
    """The highest number of a weight's grid: 127 at 8 bits."""
    return int(2 ** (bits - 1) - 1)


class _OnGrid(torch.autograd.Function):
    """An activation on its grid; the gradients are equations 3 and 5 of LSQ, and LSQ+'s of the zero point.

    Gradients pass where low < x < high, the values of the first and the last step. For a grid that starts at zero
    this is what a ReLU in front of it would do, and a ReLU6 where the grid ends at 6 or below: none is needed.

    Plain operators in memory order: torch's fake-quantize kernels take 10 to 20 times as long on CPUs, forward and
    backward (torch 2.13; 57 MB, AVX-512: 153 + 142 ms for the learnable one, 8 + 14 ms here).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_scale: Tensor,
        zero_point: Tensor,
        scale: float,
        zero: int,
        last: int,
        gradient_scale: float,
        pinned: bool,
    ) -> Tensor:
        x = _dense(x)
        y = torch.empty_like(x)
        size = CHUNK if x.device.type == "cpu" else max(1, x.numel())
        for source, target in zip(_flat(x).split(size), _flat(y).split(size), strict=True):
            torch.mul(source, 1.0 / scale, out=target)
            target.round_().clamp_(-zero, last - zero).mul_(scale)
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x, y if learns else None)
        ctx.scale, ctx.zero, ctx.last, ctx.gradient_scale, ctx.pinned = scale, zero, last, gradient_scale, pinned
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        low, high = -ctx.zero * ctx.scale, (ctx.last - ctx.zero) * ctx.scale
        dx = torch.ops.aten.hardtanh_backward(dy, x, low, high)
        d_log_scale = d_zero_point = None
        if ctx.needs_input_grad[1]:
            # dy/ds is y/s outside and (y - x)/s inside; dx is 0 outside and dy inside. d/dlog(s) = s d/ds.
            d_log_scale = (torch.dot(_flat(dy), _flat(y)) - torch.dot(_flat(dx), _flat(x))).view(1) * ctx.gradient_scale
            if ctx.pinned:
                d_log_scale.clamp_min_(0)
        if ctx.needs_input_grad[2]:
            d_zero_point = (_flat(dx).sum() - _flat(dy).sum()).view(1) * (ctx.scale * ctx.gradient_scale)
        return dx, d_log_scale, d_zero_point, None, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    """`x`, copied if its memory is neither in the order of its axes nor channels_last."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def _flat(x: Tensor) -> Tensor:
    """A dense tensor in the order of its memory: sums over it take a tenth of the time in channels_last."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).view(-1)


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to its grid in the forward pass and passes gradients to the tensor and to the grid.

    While `calibrating`, it lets tensors pass, clipped as a rectifier would. `nonnegative` is for what comes out of a
    ReLU: the zero point is the lowest step, so that the grid itself does the clipping, and `limit` (6 for ReLU6) bounds
    its upper end likewise; no rectifier is needed in front of it.

    A grid is `learned`, or `follows` a moving average of the extremes while training, or (neither) stays where
    calibration put it, or is `fixed` at (scale, zero point), where calibration does not move it either.
    """

    def __init__(
        self,
        layer: str,
        *,
        nonnegative: bool = False,
        limit: float | None = None,
        learned: bool = True,
        follows: bool = False,
        bits: int = 8,
        fixed: tuple[float, int] | None = None,
    ):
        super().__init__()
        self.layer, self.nonnegative, self.limit, self.bits, self.fixed = layer, nonnegative, limit, bits, fixed
        self.last = largest_step(bits)
        self.follows = follows and not learned and fixed is None
        self.calibrating, self.held = False, False
        self.register_buffer("extremes", torch.zeros(2))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        learned = learned and fixed is None
        scale, zero_point = fixed or (1.0, 0)
        self._set("log_scale", torch.tensor([math.log(scale)]), learned)
        self._set("zero_point", torch.tensor([float(zero_point)]), learned and not nonnegative)

    log_scale: Tensor
    zero_point: Tensor
    extremes: Tensor
    batches: Tensor
    held: bool
    """Training leaves the grid where it is; see `hold_grids`."""

    def _set(self, name: str, value: Tensor, learned: bool) -> None:
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def scale(self) -> Tensor:
        """Shape (1,); with a `limit`, never so large that the grid passes it."""
        if self.fixed:
            return self.log_scale.new_tensor([self.fixed[0]])  # exp(log(s)) would be off by an ulp
        scale = self.log_scale.exp()
        return scale.clamp_max(self.limit / self.last) if self.limit else scale

    def grid(self) -> tuple[float, int]:
        """The scale (a float32 value) and the zero point in 0..2**bits - 1: those of the exported files."""
        zero_point = int(torch.round(self.zero_point.detach()).clamp(0, self.last))
        return float(self.scale.detach()), zero_point

    def set_range(self, low: float, high: float) -> None:
        """Puts the grid over [low, high], widened to contain zero; a `fixed` one stays."""
        if self.fixed:
            return
        low, high = min(0.0, low), max(0.0, high)
        if self.nonnegative:
            low = 0.0
        if self.limit:
            high = min(high, self.limit)
        scale = max((high - low) / self.last, SMALLEST_SCALE)
        with torch.no_grad():
            self.log_scale.fill_(math.log(scale))
            self.zero_point.fill_(min(self.last, max(0, round(-low / scale))))

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            return x.clamp(0.0, self.limit) if self.nonnegative else x
        if self.follows and self.training and not self.held:
            with torch.no_grad():
                self.batches += 1
                self._observe(x, 1.0 - MEMORY if self.batches > 1 else 1.0)
        scale, zero_point = self.grid()
        gradient_scale = 1.0 / math.sqrt(x[0].numel() * self.last / 2)
        # At its limit, a scale cannot grow; without this, its logarithm would, and later take long to come back.
        pinned = self.limit is not None and scale >= np.float32(self.limit / self.last)
        fake: Tensor = _OnGrid.apply(
            x, self.log_scale, self.zero_point, scale, zero_point, self.last, gradient_scale, pinned
        )
        return fake

    def _observe(self, x: Tensor, weight: float) -> None:
        extremes = torch.stack(torch.aminmax(x)).float()
        self.extremes += (extremes - self.extremes) * weight
        low, high = self.extremes.tolist()
        self.set_range(low, high)

    def extra_repr(self) -> str:
        return f"{self.layer}, nonnegative={self.nonnegative}, limit={self.limit}, bits={self.bits}, fixed={self.fixed}"


def hold_grids(module: nn.Module, held: bool = True) -> None:
    """Lets training leave the grids of activations where they are, which makes its step faster, or no longer so."""
    for quantizer in module.modules():
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.held = held
            for value in (quantizer.log_scale, quantizer.zero_point):
                if isinstance(value, nn.Parameter):
                    value.requires_grad_(not held)


def weight_scales(weight: Tensor, bits: int = 8) -> Tensor:
    """The step per output channel (axis 0) that maps the channel's largest absolute weight to the grid's last step."""
    largest = weight.detach().abs().flatten(1).amax(1)
    return (largest / largest_weight(bits)).clamp_min(SMALLEST_SCALE)


def weight_integers(weight: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """The int8 weights of the exported files, output channels first, one step of `scale` (outputs,) each."""
    last = largest_weight(bits)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    return torch.round(weight.detach() / scale.detach().view(shape)).clamp(-last, last).to(torch.int8)


class _WeightOnGrid(torch.autograd.Function):
    """Weights, output channels first, each channel on its grid; the gradients are equations 3 and 5 of LSQ."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_scale: Tensor, last: int) -> Tensor:
        scale = log_scale.exp().view((-1,) + (1,) * (weight.ndim - 1))
        ratio = weight / scale
        steps = torch.round(ratio).clamp_(-last, last)
        ctx.save_for_backward(ratio, steps, scale)
        ctx.last = last
        return steps * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ratio, steps, scale = ctx.saved_tensors
        dw = torch.ops.aten.hardtanh_backward(dy, ratio, -ctx.last, ctx.last)
        d_log_scale = None
        if ctx.needs_input_grad[1]:
            by_channel = torch.addcmul(dy * steps, dw, ratio, value=-1).flatten(1).sum(1)
            gradient_scale = 1.0 / math.sqrt(ratio[0].numel() * ctx.last)
            d_log_scale = by_channel * scale.flatten() * gradient_scale
        return dw, d_log_scale, None


class _WeightWithinExtremes(torch.autograd.Function):
    """Weights on grids that reach their extremes: nothing is clipped, so gradients pass as they are."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        scale = scale.view((-1,) + (1,) * (weight.ndim - 1))
        return (weight / scale).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _QuantizedWeight:
    """What the quantized layers share: where their grids lie, and the weight on them.

    `log_weight_scale` is a parameter of a layer that has learned steps, and None where steps follow the weights.
    """

    weight: Tensor
    log_weight_scale: nn.Parameter | None
    bits: int

    @property
    def weight_scale(self) -> Tensor:
        """Steps of the weights' grids, (outputs,)."""
        if self.log_weight_scale is None:
            return weight_scales(self.weight_by_output(), self.bits)
        return self.log_weight_scale.exp()

    def weight_by_output(self) -> Tensor:
        """The weight with output channels first."""
        return self.weight

    def fake_weight(self) -> Tensor:
        """The weight on its grids, in the layer's own layout."""
        return self._on_grid(self.weight)

    def reset_scales(self) -> None:
        """Puts learned steps where the weights' extremes are now, after something else than training changed them."""
        if self.log_weight_scale is not None:
            with torch.no_grad():
                self.log_weight_scale.copy_(weight_scales(self.weight_by_output(), self.bits).log())

    def _on_grid(self, weight: Tensor) -> Tensor:
        fake: Tensor
        if self.log_weight_scale is None:
            fake = _WeightWithinExtremes.apply(weight, weight_scales(weight, self.bits))
        else:
            fake = _WeightOnGrid.apply(weight, self.log_weight_scale, largest_weight(self.bits))
        return fake

    def _take(self, old: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, bits: int, learned: bool) -> None:
        """Copies the parameters of a float layer and puts the grids over its weights."""
        new: Any = self
        with torch.no_grad():
            new.weight.copy_(old.weight)
            new.bias.zero_() if old.bias is None else new.bias.copy_(old.bias)
        new.bits = bits
        scales = weight_scales(self.weight_by_output(), bits)
        new.register_parameter("log_weight_scale", nn.Parameter(scales.log()) if learned else None)
        hold(new, held(old))


class QuantizedConv2d(_QuantizedWeight, nn.Conv2d):
    """A convolution whose weights are rounded to a grid per output channel; `padding` may be asymmetric.

    `pads` is (left, right, top, bottom) in front of the convolution's own padding, as torch.nn.functional.pad takes it.
    """

    pads: tuple[int, int, int, int]

    @classmethod
    def of(
        cls, conv: nn.Conv2d, pads: tuple[int, int, int, int] = (0, 0, 0, 0), bits: int = 8, learned: bool = True
    ) -> QuantizedConv2d:
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
        new._take(conv, bits, learned)
        return new

    def forward(self, input: Tensor) -> Tensor:
        if any(self.pads):
            input = F.pad(input, self.pads)
        return self._conv_forward(input, self.fake_weight(), self.bias)


class QuantizedConvTranspose2d(_QuantizedWeight, nn.ConvTranspose2d):
    """A transposed convolution; its weights (inputs, outputs/groups, H, W) are rounded to a grid per output channel."""

    @classmethod
    def of(cls, conv: nn.ConvTranspose2d, bits: int = 8, learned: bool = True) -> QuantizedConvTranspose2d:
        """The same layer with fake-quantized weights; parameters are copied."""
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            output_padding=conv.output_padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=True,
        )
        new._take(conv, bits, learned)
        return new

    def weight_by_output(self) -> Tensor:
        """The weight as (outputs, inputs/groups, H, W)."""
        return swap_channels(self.weight, self.groups)

    def fake_weight(self) -> Tensor:
        """The weight on its grids, as (inputs, outputs/groups, H, W)."""
        return swap_channels(self._on_grid(self.weight_by_output()), self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert output_size is None
        return F.conv_transpose2d(
            input,
            self.fake_weight(),
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            self.output_padding,
            self.groups,
            self.dilation,
        )


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """(inputs, outputs/groups, H, W) as (outputs, inputs/groups, H, W); and back, for it is its own inverse."""
    first, second, *kernel = weight.shape
    by_group = weight.reshape(groups, first // groups, second, *kernel)
    return by_group.transpose(1, 2).reshape(groups * second, first // groups, *kernel)


class QuantizedLinear(_QuantizedWeight, nn.Linear):
    """A linear layer whose weights are rounded to a grid per output."""

    @classmethod
    def of(cls, linear: nn.Linear, bits: int = 8, learned: bool = True) -> QuantizedLinear:
        """The same layer with fake-quantized weights; parameters are copied."""
        new = cls(linear.in_features, linear.out_features, bias=True)
        new._take(linear, bits, learned)
        return new

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.fake_weight(), self.bias)
