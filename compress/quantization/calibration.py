"""Where grids lie before training starts, or for good (PTQ): three ways for activations, two for weights.

`minmax` covers the mean extremes, `percentile` leaves the rarest values out, and `mse` takes the range whose rounding
and clipping together cost the least mean squared error (Nagel et al., 2021, arXiv:2106.08295, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.product import Batch
from compress.quantization.fake_quant import (
    QMAX,
    QMIN,
    SMALLEST_SCALE,
    ActivationQuantizer,
    largest_weight,
    weight_scales,
)
from compress.quantization.operators import QUANTIZED

Method = Literal["minmax", "percentile", "mse"]
BINS = 4096
"""At most so many in a histogram, and at least half as many: 8 to 16 for each step of a grid that covers them all."""
FINEST = 2.0**-100
"""The narrowest bins, for tensors of nothing but zeros: float32 holds their edges exactly."""


class Histogram:
    """How often values fall into bins of one width, which doubles when the range outgrows `BINS` of them.

    The width is a power of two and zero is an edge, so that two bins become one without a value being moved.
    """

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        """The extremes so far, widened to contain zero."""
        self.width = FINEST
        self.first = 0
        """The number of the first bin; bin k holds [k, k + 1) times the width."""
        self.counts = torch.zeros(0, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Counts every value of a tensor, which must be finite."""
        lowest, highest = (float(extreme) for extreme in values.aminmax())
        self._cover(lowest, highest)
        edges = (self.first * self.width, (self.first + len(self.counts)) * self.width)
        counts = torch.histc(values.detach().float(), len(self.counts), *edges)
        self.counts += counts.double().cpu()

    def _cover(self, lowest: float, highest: float) -> None:
        self.low, self.high = min(self.low, lowest), max(self.high, highest)
        while self._bins()[1] - self._bins()[0] > BINS:
            if len(self.counts):
                padded = torch.zeros(self.first % 2 + len(self.counts) + (self.first + len(self.counts)) % 2)
                padded = padded.double()
                padded[self.first % 2 : self.first % 2 + len(self.counts)] = self.counts
                self.counts = padded.view(-1, 2).sum(1)
            self.first //= 2
            self.width *= 2
        first, end = self._bins()
        counts = torch.zeros(end - first, dtype=torch.float64)
        counts[self.first - first : self.first - first + len(self.counts)] = self.counts
        self.first, self.counts = first, counts

    def _bins(self) -> tuple[int, int]:
        """Numbers of the first bin and of the one after the last, such that all values lie inside."""
        return int(self.low // self.width), int(self.high // self.width) + 1

    def centres(self) -> Tensor:
        """The middle of each bin (float64)."""
        numbers = torch.arange(self.first, self.first + len(self.counts), dtype=torch.float64)
        return (numbers + 0.5) * self.width

    def percentile(self, percent: float) -> float:
        """The value below which `percent` of all values lie, by linear interpolation within a bin."""
        cumulative = self.counts.cumsum(0)
        wanted = cumulative[-1] * (percent / 100)
        index = min(int(torch.searchsorted(cumulative, wanted)), len(cumulative) - 1)
        inside = float((wanted - (cumulative[index] - self.counts[index])) / self.counts[index].clamp_min(1))
        return min(max((self.first + index + inside) * self.width, self.low), self.high)


def percentile_range(histogram: Histogram, percent: float) -> tuple[float, float]:
    """The range that leaves out `100 - percent` percent of the values at each end."""
    return histogram.percentile(100 - percent), histogram.percentile(percent)


def rounding_error(values: Tensor, counts: Tensor, lows: Tensor, highs: Tensor, steps: int) -> Tensor:
    """Mean squared error of `values` that occur `counts` times, on each grid of `steps` steps over [low, high]."""
    scales = ((highs - lows) / steps).clamp_min(SMALLEST_SCALE)[:, None]
    below = torch.round(-lows[:, None] / scales).clamp(0, steps)
    rounded = torch.maximum(torch.minimum(torch.round(values / scales), steps - below), -below) * scales
    return (rounded - values).square() @ counts / counts.sum()


def mse_range(histogram: Histogram, steps: int = QMAX - QMIN) -> tuple[float, float]:
    """The range of least mean squared error for a grid of `steps` steps.

    Both ends shrink together and on a raster first; from the best, each moves by itself, in ever finer steps.
    """
    seen = histogram.counts > 0
    lowest, highest = histogram.low, histogram.high
    values, counts = histogram.centres()[seen].clamp(lowest, highest), histogram.counts[seen]

    def best(lows: Tensor, highs: Tensor) -> tuple[float, float]:
        index = int(rounding_error(values, counts, lows, highs, steps).argmin())
        return float(lows[index]), float(highs[index])

    shrunk = torch.linspace(1, 0, 129, dtype=torch.float64)[:-1]
    raster = torch.cartesian_prod(shrunk[::5], shrunk[::5])
    together = torch.stack([shrunk, shrunk], 1)
    ends = torch.cat([together, raster])
    low, high = best(lowest * ends[:, 0], highest * ends[:, 1])
    for reach in (0.5, 0.25, 0.1, 0.05, 0.02):
        factors = torch.linspace(1 - reach, 1 + reach, 33, dtype=torch.float64)
        same = torch.ones_like(factors)
        low, high = best(low * same, (high * factors).clamp_max(highest))
        low, high = best((low * factors).clamp_min(lowest), high * same)
    return low, high


def mse_weight_scales(weight: Tensor, bits: int = 8, candidates: int = 80) -> Tensor:
    """The step per output channel (axis 0) of least mean squared error, of all from 1/5 to 1 of the largest's.

    A step smaller than that of the largest weight clips it and rounds the others more finely.
    """
    rows, last = weight.detach().flatten(1), largest_weight(bits)
    whole = weight_scales(weight, bits)
    best, least = whole.clone(), torch.full_like(whole, float("inf"))
    for factor in torch.linspace(1, 0.2, candidates).tolist():
        scale = whole * factor
        rounded = torch.round(rows / scale[:, None]).clamp(-last, last) * scale[:, None]
        error = (rounded - rows).square().mean(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def calibrate_weights(graph_module: nn.Module) -> None:
    """Puts weights on their grids of least mean squared error; changes `graph_module`, whose steps are learned ones."""
    for layer in graph_module.modules():
        if isinstance(layer, QUANTIZED) and layer.log_weight_scale is not None:
            with torch.no_grad():
                layer.log_weight_scale.copy_(mse_weight_scales(layer.weight_by_output(), layer.bits).log())


def calibrate(
    graph_module: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    method: Method = "minmax",
    *,
    percentile: float = 99.99,
) -> None:
    """Places every grid by its tensor's values in float arithmetic; changes `graph_module` in place.

    Grids that are fixed, as the input's, stay. Raises ModelError for values that are not finite.
    """
    quantizers = [m for m in graph_module.modules() if isinstance(m, ActivationQuantizer) and m.fixed is None]
    observed = {quantizer: Histogram() for quantizer in quantizers}
    hooks = [q.register_forward_hook(_watch(histogram, method)) for q, histogram in observed.items()]
    was_training = graph_module.training
    graph_module.eval().to(device)
    for quantizer in quantizers:
        quantizer.calibrating = True
        quantizer.batches.zero_()
        quantizer.extremes.zero_()
    try:
        with torch.no_grad():
            for batch in batches:
                graph_module(batch.images_NCHW.to(device))
    finally:
        for hook in hooks:
            hook.remove()
        for quantizer in quantizers:
            quantizer.calibrating = False
    for quantizer, histogram in observed.items():
        if method == "percentile":
            quantizer.set_range(*percentile_range(histogram, percentile))
        elif method == "mse":
            quantizer.set_range(*mse_range(histogram, quantizer.last))
        else:
            quantizer.set_range(*quantizer.extremes.tolist())
    graph_module.to("cpu").train(was_training)


def _watch(histogram: Histogram, method: Method) -> Callable[[nn.Module, Any, Tensor], None]:
    """A hook on a quantizer that lets tensors pass: averages their extremes, and counts their values."""

    def hook(quantizer: nn.Module, _: Any, values: Tensor) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        extremes = torch.stack(values.aminmax()).float()
        if not extremes.isfinite().all():
            raise ModelError(
                f"layer {quantizer.layer}",
                "has values that are not finite, so no grid holds them",
                "look at the network's weights, and at what training did to them",
            )
        quantizer.batches += 1
        quantizer.extremes += (extremes - quantizer.extremes) / quantizer.batches
        if method != "minmax":
            histogram.add(values)

    return hook
