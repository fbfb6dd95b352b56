"""Predictions from tables that are formulas: exact where the formula is what interpolation assumes."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import TargetError
from compress.latency.networks import narrower
from compress.latency.predict import (
    BASES,
    OFFSETS,
    Predictor,
    Profile,
    architecture,
    calibrate,
    plan,
    predictor_of,
    profile_of,
)
from compress.latency.shapes import Placed, Shape, place_layers, up
from compress.latency.table import Key, Table, Whole
from compress.models.coupled import find_coupled

KEY = Key({"cpu": "a formula"}, "litert", "1", 1)


def conv(inputs: int, outputs: int, kernel: int = 1, size: int = 12) -> Shape:
    padding = (kernel // 2, kernel // 2)
    return Shape("conv", inputs, outputs, (kernel, kernel), (1, 1), padding, (1, 1), 1, (size, size))


def grouped(inputs: int, outputs: int, groups: int) -> Shape:
    return Shape("grouped", inputs, outputs, (3, 3), (1, 1), (1, 1), (1, 1), groups, (6, 6))


def placed(*shapes: Shape) -> list[Placed]:
    return [Placed(f"layer{number}", shape, 0) for number, shape in enumerate(shapes)]


def tabled(layers: list[Placed], us: Callable[[Shape], float], *wholes: Whole) -> Predictor:
    return predictor_of(Table(KEY, {shape: us(shape) for shape in plan(layers).shapes}, wholes), layers)


def bilinear(shape: Shape) -> float:
    n, m = shape.inputs // shape.groups, shape.outputs
    area = shape.size[0] * shape.size[1] * shape.kernel[0] ** 2
    return 3.0 + 0.01 * n + 0.02 * m + 1e-5 * area * n * m


def tiled(shape: Shape) -> float:
    """A kernel that computes 16 outputs at a time and reads 4 inputs at a time."""
    return bilinear(shape.with_channels(up(shape.inputs, 4), up(shape.outputs, 16)))


CHAIN = placed(
    conv(3, 32, 3), conv(32, 192), conv(192, 64), conv(64, 384), conv(384, 96), conv(96, 96, 3, 6), conv(96, 10)
)


def test_measured_widths_are_exact():
    predictor = tabled(CHAIN, lambda shape: random.Random(str(shape) + shape.channels).uniform(1, 100))
    shapes = plan(CHAIN).shapes
    assert len(shapes) > 100
    assert all(predictor.layer_us(shape) == predictor.table.cells[shape] for shape in shapes)
    assert {layer.shape for layer in CHAIN} <= set(shapes)


def test_a_bilinear_time_is_interpolated_exactly_at_every_even_width():
    predictor, rng = tabled(CHAIN, bilinear), random.Random(0)
    for _ in range(300):
        layer = rng.choice(CHAIN[1:-1]).shape
        shape = layer.with_channels(2 * rng.randint(8, layer.inputs // 2), 2 * rng.randint(8, layer.outputs // 2))
        assert predictor.layer_us(shape) == pytest.approx(bilinear(shape), rel=1e-9)
    assert predictor.step("conv") == 4  # no width is slow, and none is asked about below


def test_kernels_that_compute_many_channels_at_once_are_found_out():
    predictor, rng = tabled(CHAIN, tiled), random.Random(1)
    steps = {at: profile.step for at, profile in predictor.profiles.items() if at[0] == "conv 1x1"}
    assert steps == {("conv 1x1", "inputs"): 4, ("conv 1x1", "outputs"): 16}
    assert predictor.step("conv") == 16
    for _ in range(300):
        layer = rng.choice(CHAIN[1:-1]).shape
        shape = layer.with_channels(4 * rng.randint(8, layer.inputs // 4), 4 * rng.randint(8, layer.outputs // 4))
        assert predictor.layer_us(shape) == pytest.approx(tiled(shape), rel=1e-6)


def test_a_slow_path_is_told_from_channels_that_are_missing_to_a_multiple():
    def slow(n: int) -> float:  # as ONNX Runtime's depthwise layers: multiples of 16 have a kernel of their own
        return (1 if n % 16 == 0 else 1.75) * (1 + 0.1 * n)

    found = profile_of({(base, offset): slow(base + offset) for base in BASES for offset in OFFSETS})
    assert found.step == 16
    assert all(factor == pytest.approx(1.75, rel=1e-6) for factor in found.factor.values())
    assert all(more == pytest.approx(0, abs=1e-6) for more in found.more.values())
    filled = profile_of({(base, offset): 1 + 0.1 * up(base + offset, 8) for base in BASES for offset in OFFSETS})
    assert filled.step == 8
    assert all(factor == pytest.approx(1, rel=1e-6) for factor in filled.factor.values())
    assert {rest: round(more, 6) for rest, more in filled.more.items()} == {
        rest: up(rest, 8) - rest for rest in OFFSETS if 0 < rest < 16
    }


def test_widths_that_were_not_measured_are_like_one_that_was():
    profile = Profile({1: 2.0, 4: 1.0, 6: 2.0, 8: 1.0, 14: 2.0}, {1: 0.0, 4: 0.0, 6: 0.0, 8: 0.0, 14: 2.0})
    assert profile.at(64) == (64, 1.0)
    assert profile.at(64 + 4) == (68, 1.0)
    assert profile.at(64 + 5) == (70, 2.0)  # odd, as 6 and not as 4 or 8, which kernels for four channels fill
    assert profile.at(64 + 7) == (70, 2.0)
    assert profile.at(64 + 15) == (64 + 16, 2.0)
    assert profile.at(64 + 12) == (64 + 16, 2.0)
    assert Profile().at(77) == (77, 1.0)


def test_grouped_convolutions_may_lose_channels_of_each_group_or_whole_groups():
    layers = placed(conv(3, 128, 3), grouped(128, 128, 8), conv(128, 10))

    def us(shape: Shape) -> float:
        return shape.groups * (1 + 0.1 * (shape.inputs // shape.groups) * (shape.outputs // shape.groups))

    predictor = tabled(layers, us)
    for shape in (grouped(128, 128, 8), grouped(64, 96, 8), grouped(64, 64, 4)):
        assert predictor.layer_us(shape) == pytest.approx(us(shape), rel=1e-9)


class Residual(nn.Module):
    """A stem, a block with a hidden width and a depthwise layer, a grouped one, classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, stride=2, padding=1)
        self.expand = nn.Conv2d(48, 200, 1)
        self.depthwise = nn.Conv2d(200, 200, 3, padding=1, groups=200)
        self.project = nn.Conv2d(200, 48, 1)
        self.grouped = nn.Conv2d(48, 96, 3, padding=1, groups=4)
        self.head = nn.Linear(96, 7)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(self.grouped(x).mean((2, 3)))


def test_every_narrower_version_of_a_network_has_a_time():
    torch.manual_seed(0)
    module = Residual().eval()
    layers = place_layers(module, 32)
    predictor = tabled(layers, bilinear)
    sets, _ = find_coupled(module, 32)
    assert len(sets) >= 3
    for seed, (round_to, least) in enumerate([(1, 0.02), (8, 0.2), (4, 0.1), (1, 0.5)]):
        narrow = narrower(module, sets, seed=seed, round_to=round_to, least=least)
        shapes = [layer.shape for layer in place_layers(narrow, 32)]
        assert shapes != [layer.shape for layer in layers]
        assert predictor.network_us(shapes) > 0
        assert architecture(place_layers(narrow, 32)) == architecture(layers)
        wide = [shape for shape in shapes if min(shape.inputs, shape.outputs) >= 16 and shape.kind == "conv"]
        assert all(predictor.layer_us(shape) == pytest.approx(bilinear(shape), rel=0.03) for shape in wide)


def test_what_it_was_not_built_for_is_refused():
    predictor = tabled(CHAIN, bilinear)
    for shape in (conv(32, 64, 5), conv(32, 64, 1, 13), grouped(64, 64, 2)):
        with pytest.raises(TargetError, match="the table has no layer like"):
            predictor.layer_us(shape)


def test_a_sparse_plan_is_a_part_of_the_time():
    assert len(plan(CHAIN, sparse=True).shapes) < 0.5 * len(plan(CHAIN).shapes)
    assert plan(CHAIN) == plan(list(CHAIN))


def test_two_numbers_are_fitted_to_whole_networks():
    networks = [[layer.shape for layer in CHAIN[:count]] for count in (2, 4, 5, 7)]
    plain = tabled(CHAIN, bilinear)
    assert (plain.fixed_us, plain.scale, plain.fitted) == (0.0, 1.0, 0)

    def real(shapes: list[Shape]) -> float:
        return 12.5 + 0.9 * sum(map(bilinear, shapes))

    fitted = calibrate(plain, [(shapes, real(shapes)) for shapes in networks])
    assert (fitted.fixed_us, fitted.scale) == (pytest.approx(12.5), pytest.approx(0.9))
    assert fitted.network_us(CHAIN[i].shape for i in (0, 3)) == pytest.approx(real([CHAIN[0].shape, CHAIN[3].shape]))
    single = calibrate(plain, [(networks[0], 2 * plain.network_us(networks[0]))])
    assert (single.fixed_us, single.scale, single.fitted) == (0.0, pytest.approx(2.0), 1)
    wholes = [Whole(tuple(shapes), real(shapes), architecture(CHAIN)) for shapes in networks]
    kept = tabled(CHAIN, bilinear, *wholes, Whole((CHAIN[0].shape,), 1e6, "of another network"))
    assert (kept.fixed_us, kept.scale, kept.fitted) == (pytest.approx(12.5), pytest.approx(0.9), 4)


def test_architectures_differ_in_more_than_widths():
    def net(kernel: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, kernel), nn.Flatten(), nn.LazyLinear(5))

    first, wider, other = (architecture(place_layers(net(*how), 8)) for how in ((3, 8), (3, 16), (1, 8)))
    assert first == wider != other


def test_times_rise_with_width_on_the_grid_of_a_monotone_table():
    predictor = tabled(CHAIN, tiled)
    for layer in CHAIN[1:-1]:
        full = layer.shape
        times = [predictor.layer_us(full.with_channels(full.inputs, n)) for n in range(8, full.outputs + 1, 8)]
        assert np.all(np.diff(times) >= -1e-9)
