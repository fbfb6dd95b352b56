import math

import numpy as np
import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.errors import ModelError
from compress.quantization import ActivationQuantizer, Quantization, QuantizedConv2d, calibrate, freeze, prepare
from compress.quantization.calibration import (
    BINS,
    Histogram,
    calibrate_weights,
    mse_range,
    mse_weight_scales,
    percentile_range,
    rounding_error,
)
from compress.quantization.fake_quant import weight_scales

CPU = torch.device("cpu")

shapes = st.sampled_from(["normal", "laplace", "relu", "uniform", "shifted", "spikes"])


def values_of(shape: str, seed: int, size: int = 6000) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    drawn = {
        "normal": lambda: rng.normal(0, 1, size),
        "laplace": lambda: rng.laplace(0, 1, size),
        "relu": lambda: np.maximum(rng.normal(-0.5, 1, size), 0),
        "uniform": lambda: rng.uniform(-3, 1, size),
        "shifted": lambda: rng.normal(5, 1, size),
        "spikes": lambda: np.append(rng.normal(0, 0.1, size), [40.0, -25.0]),
    }[shape]()
    return torch.from_numpy(drawn * rng.uniform(0.01, 100)).float()


def error(x: torch.Tensor, low: float, high: float, last: int = 255) -> float:
    """Of the real quantizer, on the values themselves."""
    quantizer = ActivationQuantizer("x", bits=int(math.log2(last + 1)))
    quantizer.set_range(low, high)
    return float((quantizer(x).detach() - x).square().mean())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(shapes, st.integers(0, 99)), min_size=1, max_size=4))
def test_a_growing_histogram_equals_one_of_all_values_at_once(parts):
    tensors = [values_of(*part) for part in parts]
    histogram = Histogram()
    for tensor in tensors:
        histogram.add(tensor)
    together = torch.cat(tensors)
    assert (histogram.low, histogram.high) == (min(0, float(together.min())), max(0, float(together.max())))
    assert BINS / 2 <= len(histogram.counts) <= BINS
    numbers = np.floor(together.double().numpy() / histogram.width).astype(np.int64) - histogram.first
    expected = np.bincount(numbers, minlength=len(histogram.counts))
    # torch.histc may put a value on an edge, or within a rounding of it, into the bin beside it.
    assert np.abs(np.cumsum(expected) - np.cumsum(histogram.counts.numpy())).max() <= 0.002 * len(together)
    assert histogram.counts.sum() == len(together)


def test_a_histogram_of_zeros_grows_like_any_other():
    histogram = Histogram()
    histogram.add(torch.zeros(2, 3))
    assert mse_range(histogram) == percentile_range(histogram, 99.9) == (0.0, 0.0)
    histogram.add(torch.tensor([8.0, -4.0]))
    assert histogram.counts.sum() == 8
    assert percentile_range(histogram, 100) == (-4.0, 8.0)


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(0, 999), st.sampled_from([90.0, 99.0, 99.9, 100.0]))
def test_percentiles_are_numpys_to_a_bin(shape, seed, percent):
    x = values_of(shape, seed)
    histogram = Histogram()
    histogram.add(x)
    for found, wanted in zip(percentile_range(histogram, percent), (100 - percent, percent), strict=True):
        # Between two values far apart numpy interpolates: any point between the neighbours is a percentile.
        below, above = np.percentile(x, wanted, method="lower"), np.percentile(x, wanted, method="higher")
        assert min(below, 0.0 if wanted == 0 else below) - 2 * histogram.width <= found
        assert found <= max(above, 0.0 if wanted == 100 else above) + 2 * histogram.width


@settings(max_examples=10, deadline=None)
@given(shapes, st.integers(0, 999), st.sampled_from([255, 15]))
def test_no_range_beats_that_of_least_squares(shape, seed, last):
    """Against every pair of ends of a 40 x 40 raster, by the error of the real quantizer on the real values."""
    x = values_of(shape, seed, size=2000)
    histogram = Histogram()
    histogram.add(x)
    found = error(x, *mse_range(histogram, last), last)
    ends = np.linspace(1, 0, 40, endpoint=False)
    lows, highs = (grid.ravel() for grid in np.meshgrid(min(0, float(x.min())) * ends, max(0, float(x.max())) * ends))
    raster = rounding_error(x.double(), torch.ones(len(x)).double(), torch.tensor(lows), torch.tensor(highs), last)
    best = int(raster.argmin())
    assert found <= 1.02 * error(x, float(lows[best]), float(highs[best]), last)


@settings(max_examples=15, deadline=None)
@given(shapes, st.integers(0, 999), st.floats(0.2, 1.0), st.sampled_from([255, 15]))
def test_the_error_of_a_range_is_that_of_the_quantizer(shape, seed, part, last):
    x = values_of(shape, seed, size=500)
    low, high = min(0.0, float(x.min())) * part, max(0.0, float(x.max())) * part
    computed = rounding_error(
        x.double(), torch.ones(len(x)).double(), torch.tensor([low]).double(), torch.tensor([high]).double(), last
    )
    assert float(computed) == pytest.approx(error(x, low, high, last), rel=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_least_squares_against_every_step(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 3, 3, 3, generator=generator)
    weight[1] *= 100
    weight[2, 0, 0, 0] = 30.0  # one outlier
    weight[3] = 0
    last = 2 ** (bits - 1) - 1

    def errors(scales: torch.Tensor) -> torch.Tensor:
        steps = scales.view(-1, 1, 1, 1)
        return ((weight / steps).round().clamp(-last, last) * steps - weight).square().flatten(1).mean(1)

    found = errors(mse_weight_scales(weight, bits))
    every = torch.stack([errors(weight_scales(weight, bits) * factor) for factor in np.linspace(1, 0.02, 2000)])
    assert (found <= 1.1 * every.amin(0) + 1e-12).all()
    assert (found <= errors(weight_scales(weight, bits))).all()
    if bits == 4:
        assert (found[[0, 1]] < 0.95 * errors(weight_scales(weight, bits))[[0, 1]]).all()


def test_minmax_is_the_mean_of_the_extremes(stripes):
    module = randomized(SmallNet())
    graph = prepare(module, Quantization(), PREPROCESS)
    calibrate(graph, stripes.batches("train", batch_size=16), CPU)
    grid = quantizer(graph, "head")
    seen: list[torch.Tensor] = []
    graph.get_submodule("head").register_forward_hook(lambda *_: seen.append(_[2].aminmax()))
    for other in graph.modules():
        if isinstance(other, ActivationQuantizer) and other.layer != "input":
            other.calibrating = True
    graph.eval()
    with torch.no_grad():
        for batch in stripes.batches("train", batch_size=16):
            graph(batch.images_NCHW)
    low = np.mean([float(extremes[0]) for extremes in seen])
    high = np.mean([float(extremes[1]) for extremes in seen])
    scale, zero_point = grid.grid()
    assert scale == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-4)
    assert zero_point == round(-low / scale)


def quantizer(graph: nn.Module, layer: str) -> ActivationQuantizer:
    return next(m for m in graph.modules() if isinstance(m, ActivationQuantizer) and m.layer == layer)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_every_method_leaves_a_network_that_freezes_and_predicts(stripes, method):
    module = randomized(SmallNet())
    graph = prepare(module, Quantization(), PREPROCESS)
    before = quantizer(graph, "input").grid()
    calibrate(graph, stripes.batches("train", batch_size=16), CPU, method, percentile=99.9)
    assert graph.training
    assert not any(m.calibrating for m in graph.modules() if isinstance(m, ActivationQuantizer))
    assert quantizer(graph, "input").grid() == before
    assert quantizer(graph, "stem").scale.item() <= 6 / 255 * 1.0001
    images = stripes.splits["evaluation"][0]
    assert (freeze(graph).module(images).argmax(1) == module(images).argmax(1)).float().mean() >= 0.9


def test_least_squares_lose_less_than_extremes_where_tails_are_long(stripes):
    """Of each tensor that has a grid of its own, on the images that calibrated it."""
    module = randomized(SmallNet())
    with torch.no_grad():
        module.down.weight[0] *= 8  # one loud channel
    images = torch.cat([batch.images_NCHW for batch in stripes.batches("train", batch_size=16)])
    errors = {}
    for method in ("minmax", "mse"):
        graph = prepare(module, Quantization(activation_bits=4), PREPROCESS)
        calibrate(graph, stripes.batches("train", batch_size=16), CPU, method)
        grid, seen = quantizer(graph, "down"), []
        for other in graph.modules():
            if isinstance(other, ActivationQuantizer) and other is not grid:
                other.calibrating = True
        grid.register_forward_hook(lambda _, x, y, seen=seen: seen.append((y - x[0]).square().mean().item()))
        graph.eval()(images)
        errors[method] = seen[0]
    assert errors["mse"] < 0.9 * errors["minmax"]


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_fixed_grids_stay_out_of_it(stripes, method):
    class Grids(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.fixed = ActivationQuantizer("own"), ActivationQuantizer("fixed", fixed=(1 / 256, 0))

        def forward(self, x):
            return self.fixed(self.own(x) * 10)

    grids = Grids()
    calibrate(grids, stripes.batches("train", batch_size=16), CPU, method)
    assert grids.fixed.grid() == (1 / 256, 0)
    largest = max(float(batch.images_NCHW.abs().max()) for batch in stripes.batches("train", batch_size=16))
    assert grids.own.scale.item() * 255 <= 2 * largest * 1.01


def test_values_that_are_not_finite_are_refused_by_layer(stripes):
    module = randomized(SmallNet())
    with torch.no_grad():
        module.down.bias[0] = float("nan")
    graph = prepare(module, Quantization(), PREPROCESS)
    with pytest.raises(ModelError, match="layer down: has values that are not finite"):
        calibrate(graph, stripes.batches("train", batch_size=16), CPU)
    assert not any(m.calibrating for m in graph.modules() if isinstance(m, ActivationQuantizer))


def test_weights_are_calibrated_in_place(stripes):
    graph = prepare(randomized(SmallNet()), Quantization(weight_bits=4), PREPROCESS)
    layers = [m for m in graph.modules() if isinstance(m, QuantizedConv2d)]
    before = [layer.weight_scale.detach().clone() for layer in layers]
    weights = [layer.weight.detach().clone() for layer in layers]
    calibrate_weights(graph)
    for layer, scale, weight in zip(layers, before, weights, strict=True):
        assert torch.equal(layer.weight, weight)
        assert (layer.weight_scale <= scale * 1.0001).all()
    assert any((layer.weight_scale < 0.9 * scale).any() for layer, scale in zip(layers, before, strict=True))
