"""Empirical bias correction: Nagel et al., 2019 (arXiv:1906.04721), section 4.2 and appendix D.

Rounding moves the mean of a channel, and the next layers see that as a shift of their input. Images tell how large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.product import Batch
from compress.quantization.fake_quant import ActivationQuantizer
from compress.quantization.operators import QUANTIZED


def correct_bias(prepared: fx.GraphModule, batches: Sequence[Batch], device: torch.device) -> dict[str, Tensor]:
    """What was added to each layer's bias, by name, so that its outputs have the means they have without rounding.

    `prepared`, calibrated, is changed in place. Layers are corrected in the order of execution, each on what the
    corrected ones before it compute, in one pass: that holds the values between two layers of all images in memory.
    """
    was_training = prepared.training
    prepared.eval().to(device)
    in_float, corrected = _InFloat(prepared), _Corrected(prepared)
    with torch.no_grad():
        for batch in batches:
            in_float.run(batch.images_NCHW.to(device))
        corrected.wanted = {name: total / in_float.count[name] for name, total in in_float.total.items()}
        corrected.run(torch.cat([batch.images_NCHW for batch in batches]).to(device))
    prepared.to("cpu").train(was_training)
    return {name: added.cpu() for name, added in corrected.added.items()}


class _InFloat(fx.Interpreter):
    """Runs the graph without any rounding, and sums up what each quantized layer returns, per channel."""

    def __init__(self, prepared: fx.GraphModule) -> None:
        super().__init__(prepared)
        self.total: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer, x = self.fetch_attr(target), args[0]
        if isinstance(layer, ActivationQuantizer):
            return x.clamp(0, layer.limit) if layer.nonnegative else x
        if not isinstance(layer, QUANTIZED):
            return super().call_module(target, args, kwargs)
        if isinstance(layer, nn.Conv2d):
            output = nn.Conv2d.forward(layer, F.pad(x, layer.pads) if any(layer.pads) else x)
        elif isinstance(layer, nn.ConvTranspose2d):
            output = nn.ConvTranspose2d.forward(layer, x)
        else:
            output = nn.Linear.forward(layer, x)
        axes = _all_but_channels(layer, output)
        self.total[target] = self.total.get(target, 0) + output.sum(axes).double()
        self.count[target] = self.count.get(target, 0) + output.numel() // len(self.total[target])
        return output


class _Corrected(fx.Interpreter):
    """Runs the fake-quantized graph and gives every layer, as it is reached, the mean outputs that are `wanted`."""

    def __init__(self, prepared: fx.GraphModule) -> None:
        super().__init__(prepared)
        self.wanted: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().call_module(target, args, kwargs)
        if target not in self.wanted:
            return output
        layer = self.fetch_attr(target)
        found = output.mean(_all_but_channels(layer, output)).double()
        added = (self.wanted[target] - found).to(output.dtype)
        layer.bias += added
        self.added[target] = added
        # In place: of all images at once, a tensor may be a gigabyte.
        return output.add_(added if isinstance(layer, nn.Linear) else added.view(-1, *(1,) * (output.ndim - 2)))


def _all_but_channels(layer: nn.Module, output: Tensor) -> tuple[int, ...]:
    channels = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
    return tuple(axis for axis in range(output.ndim) if axis != channels)
