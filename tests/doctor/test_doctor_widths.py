"""Which layers are timed and at which widths; the files that are timed compute what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from compress.doctor.widths import Timed, Width, candidates, measure_widths
from compress.latency.shapes import Shape, place_layers
from compress.latency.single import layer_file
from compress.targets import open_model


class Widths(nn.Module):
    """88 channels, of which a depthwise layer is made, between widths that are multiples of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.expand = nn.Conv2d(32, 88, 1)
        self.depthwise = nn.Conv2d(88, 88, 3, padding="same", groups=88)
        self.again = nn.Conv2d(88, 88, 3, padding=1, groups=88)
        self.project = nn.Conv2d(88, 32, 1)
        self.grouped = nn.Conv2d(32, 36, 1, groups=4)
        self.head = nn.Linear(36, 7)

    def forward(self, x):
        x = self.again(self.depthwise(self.expand(self.stem(x))))
        return self.head(self.grouped(self.project(x)).mean((2, 3)))


def test_only_odd_widths_that_can_change_are_timed():
    found = candidates(place_layers(Widths(), 16))
    assert {layer.name: alike for layer, alike in found} == {"expand": 1, "depthwise": 2, "project": 1}
    kinds = [layer.shape.kind for layer, _ in found[:2]]
    assert sorted(kinds) == ["conv", "depthwise"]  # the kinds take turns, though the depthwise ones have few products


def test_wider_is_the_next_multiple_and_nothing_else():
    shapes = {layer.name: layer.shape for layer in place_layers(Widths(), 16)}
    depthwise, expand = shapes["depthwise"], shapes["expand"]
    assert depthwise.at(8) == depthwise
    assert depthwise.at(16) == replace(depthwise, inputs=96, outputs=96, groups=96)
    assert expand.at(16) == replace(expand, outputs=96)
    assert (depthwise.size, depthwise.padding) == ((8, 8), (1, 1))
    image = Shape("conv", 3, 20, (3, 3), (2, 2), (1, 1), (1, 1), 1, (16, 16))
    assert image.at(16) == replace(image, outputs=32)


@pytest.mark.parametrize(
    "shape",
    [
        Shape("conv", 5, 9, (3, 3), (2, 2), (1, 1), (1, 1), 1, (9, 9)),
        Shape("depthwise", 6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6, (7, 7)),
        Shape("conv", 4, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1, (5, 5)),
        Shape("linear", 10, 12, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1)),
    ],
    ids=str,
)
def test_single_layers_compute_the_same_in_both_runtimes(shape, tmp_path):
    (tmp_path / "m.onnx").write_bytes(layer_file(shape, "onnxruntime"))
    (tmp_path / "m.tflite").write_bytes(layer_file(shape, "litert"))
    ort, litert = (open_model(tmp_path / name) for name in ("m.onnx", "m.tflite"))
    assert ort.input.dtype == np.uint8
    assert litert.input.dtype == np.int8
    image = np.random.default_rng(0).integers(0, 256, ort.input.shape).astype(np.uint8)
    as_int8 = (image.astype(np.int16) - 128).astype(np.int8)
    if image.ndim == 4:
        as_int8 = as_int8.transpose(0, 2, 3, 1)
    first, second = ort.infer(image)[0].astype(int), litert.infer(np.ascontiguousarray(as_int8))[0].astype(int) + 128
    if first.ndim == 4:
        second = second.transpose(0, 3, 1, 2)
    assert np.abs(first - second).max() <= 1
    assert len(np.unique(first)) > 8  # the grid fits the result: neither all zero nor all clipped


def test_widths_are_measured_and_what_is_left_is_counted():
    said = []
    found = measure_widths(place_layers(Widths(), 8), ["litert"], "this machine", budget_s=0.0, advance=said.append)
    assert (len(found.measured), found.left_out, len(said)) == (1, 2, 1)
    (width,) = found.measured
    assert [time.multiple for time in width.times] == [1, 16]  # 88 is a multiple of 8 already
    assert all(time.us > 0 for time in width.times)
    assert found.machine == "this machine"
    assert (found.odd_layers, found.of_layers) == (5, 7)


def test_nothing_to_measure_is_no_machine():
    layers = place_layers(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.LazyLinear(5)), 8)
    found = measure_widths(layers, ["litert"], "this machine")
    assert (found.measured, found.machine, found.odd_layers) == ((), "", 0)


def test_slow_is_what_more_channels_do_not_slow_down():
    def width(*us: float) -> Width:
        return Width("x", 1, "", "litert", tuple(Timed(m, "", t) for m, t in zip((1, 8, 16), us, strict=False)))

    assert width(100.0, 80.0).slow
    assert width(100.0, 101.0).slow
    assert not width(100.0, 105.0).slow
    assert width(100.0, 70.0, 99.0).best.multiple == 16


def test_looking_at_a_network_changes_nothing():
    module = Widths().train()
    place_layers(module, 16)
    assert module.training
    assert not any(layer._forward_hooks for layer in module.modules())
    with torch.no_grad():
        assert module(torch.zeros(1, 3, 16, 16)).shape == (1, 7)
