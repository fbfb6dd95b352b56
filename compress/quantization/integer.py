"""A frozen network in the arithmetic of the runtimes: Jacob et al., 2018 (arXiv:1712.05877), section 2.2.

Products are summed exactly; a sum becomes a step of the next grid by one float32 multiplication and one rounding,
halves to even, as in ONNX Runtime's QLinearConv and XNNPACK's qs8 kernels. In float32 alone, one value in 10^5
falls to the neighbouring step, and ten layers later that is several LSB of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.quantization.freeze import Frozen, Grid, Integers
from compress.quantization.graph import CALLS, is_in, kind_of
from compress.quantization.operators import (
    ADD,
    AVERAGE,
    CONCATENATE,
    INTERPOLATE,
    MEAN,
    MULTIPLY,
    PAD,
    PASS,
    REARRANGE,
    SIGMOID,
    SUBTRACT,
)

EXACT = (ADD, SUBTRACT, MULTIPLY, CONCATENATE, MEAN, AVERAGE, SIGMOID, PAD, PASS, REARRANGE, INTERPOLATE)
"""Computed in float64; all others in float32, as runtimes do."""

EXACT_IN_FLOAT32 = 2**24
"""Whole numbers up to here have no rounding error in float32, which is several times faster than float64."""


@dataclass(frozen=True)
class IntegerResult:
    logits_NK: Tensor
    """float32, whole multiples of the output's step."""
    steps: dict[str, Tensor]
    """By layer: how many steps from zero each value lies (int32), in the order of execution; empty unless asked for."""


def run_integers(frozen: Frozen, images_NCHW: Tensor, *, keep_steps: bool = False) -> IntegerResult:
    """Logits of float32 images, the same to about one in 10^4 as those of the int8 files."""
    arithmetic = _Arithmetic(frozen, keep_steps)
    with torch.inference_mode():
        logits_NK = arithmetic.run(images_NCHW)
    return IntegerResult(logits_NK.float(), arithmetic.steps)


@dataclass(frozen=True)
class _Sums:
    """int32 accumulators (exact, as float64), and the real value of one, per output channel."""

    values: Tensor
    scale: Tensor


class _Arithmetic(fx.Interpreter):
    """Runs the frozen graph; what joins or moves values does so in float64, and islands compute in float32."""

    def __init__(self, frozen: Frozen, keep_steps: bool) -> None:
        super().__init__(frozen.module)
        self.integers, self.keep_steps = frozen.integers, keep_steps
        self.layers = dict(frozen.module.named_modules())
        self.steps: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in CALLS and not isinstance(kind_of(n, self.layers), Grid) and n.target not in self.integers:
            kind = kind_of(n, self.layers)
            if not any(is_in(kind, table) for table in EXACT):
                args, kwargs = fx.map_arg((n.args, n.kwargs), lambda node: _in_float32(self.env[node]))
                return getattr(self, n.op)(n.target, args, kwargs)
        return super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, Grid):
            steps = _steps(args[0], layer)
            if self.keep_steps:
                self.steps[layer.layer] = steps.to(torch.int32)
            return steps.double() * layer.scale
        if target in self.integers:
            return _sums(layer, self.integers[target], args[0])
        return super().call_module(target, args, kwargs)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _steps(x: Tensor | _Sums, grid: Grid) -> Tensor:
    """Steps from zero on `grid`, clipped to its 256."""
    if isinstance(x, _Sums):
        multiplier = x.scale / torch.tensor(grid.scale, dtype=torch.float32)
        ratio = x.values.float() * multiplier.view(-1, *(1,) * (x.values.ndim - 2))
    else:
        ratio = x / torch.tensor(grid.scale, dtype=x.dtype)
    return torch.round(ratio).clamp(-grid.zero_point, 255 - grid.zero_point)


def _sums(layer: nn.Module, integers: Integers, x: Tensor) -> _Sums:
    steps = torch.round(x / integers.input_scale)
    largest = float(integers.weight.double().abs().transpose(0, integers.axis).flatten(1).sum(1).max()) * 255
    dtype = torch.float32 if largest < EXACT_IN_FLOAT32 else torch.float64
    steps, weight = steps.to(dtype), integers.weight.to(dtype)
    if isinstance(layer, nn.ConvTranspose2d):
        how = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        products = F.conv_transpose2d(steps, weight, None, *how)  # type: ignore[arg-type]
    elif isinstance(layer, nn.Conv2d):
        products = F.conv2d(steps, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        products = F.linear(steps, weight)
    bias = integers.bias.double().view(-1, *(1,) * (products.ndim - 2))
    return _Sums(products.double() + bias, integers.bias_scale)
