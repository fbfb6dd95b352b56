import copy

import pytest
import torch
from conftest import PREPROCESS, randomized
from torch import nn
from torch.nn import functional as F

from compress.quantization import Quantization, calibrate, fold_batchnorm, freeze, prepare
from compress.quantization.equalize import (
    Pair,
    equalize,
    equalizing_scales,
    find_pairs,
    input_ranges,
    output_ranges,
    rescale,
)

CPU = torch.device("cpu")


class Separable(nn.Module):
    """Widen, filter each channel, narrow, twice: the first block with an addition, the head behind a pooling."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem, self.stem_bn, self.act = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), act()
        self.widen, self.widen_bn = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.filter, self.filter_bn = nn.Conv2d(24, 24, 3, stride=2, groups=24, bias=False), nn.BatchNorm2d(24)
        self.narrow, self.narrow_bn = nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 20, 3, padding=1, groups=4)
        self.last = nn.Conv2d(20, 12, 1)
        self.skip = nn.Conv2d(12, 12, 1)
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 5)

    def forward(self, x):
        x = self.act(self.stem_bn(self.stem(x)))
        x = F.pad(self.act(self.widen_bn(self.widen(x))), (0, 1, 0, 1))
        x = self.act(self.filter_bn(self.filter(x)))
        x = self.narrow_bn(self.narrow(x))  # no activation
        x = F.max_pool2d(torch.relu(self.grouped(x)), 2)
        x = self.last(x)
        x = torch.relu(x + self.skip(x))  # read twice
        return self.head(torch.relu(self.hidden(self.flat(self.pool(x)))))


PAIRS = [
    Pair("stem", "widen"),
    Pair("widen", "filter"),
    Pair("filter", "narrow"),
    Pair("narrow", "grouped"),
    Pair("grouped", "last"),
    Pair("hidden", "head"),
]


def test_equation_11_by_hand():
    first, second = torch.tensor([8.0, 1.0, 0.0, 3.0, 1e-9]), torch.tensor([2.0, 4.0, 1.0, 0.0, 1.0])
    assert equalizing_scales(first, second).tolist() == [2.0, 0.5, 1.0, 1.0, 1.0]


def test_a_network_with_relus_computes_what_it_did(stripes):
    folded = fold_batchnorm(randomized(Separable()))
    images = stripes.splits["evaluation"][0]
    before = folded(images).detach()
    weights = {name: value.clone() for name, value in folded.named_parameters()}
    assert equalize(folded) == PAIRS
    torch.testing.assert_close(folded(images).detach(), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    moved = {name for name, value in folded.named_parameters() if not torch.equal(value, weights[name])}
    assert {f"{name}.weight" for pair in PAIRS for name in (pair.first, pair.second)} <= moved
    assert "last.bias" not in moved
    assert "head.bias" not in moved


def test_ranges_are_equal_afterwards_along_chains():
    folded = fold_batchnorm(randomized(Separable()))
    layers = dict(folded.named_modules())
    spread = [(output_ranges(layers[p.first]) / input_ranges(layers[p.second])).log().abs().max() for p in PAIRS]
    assert max(spread) > 0.5
    equalize(folded)
    for pair in PAIRS:
        torch.testing.assert_close(
            output_ranges(layers[pair.first]), input_ranges(layers[pair.second]), rtol=3e-3, atol=0
        )


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_ranges_of_inputs_against_the_full_matrix(groups):
    """A grouped convolution as an ordinary one with zeros: column c holds what reads channel c."""
    conv = nn.Conv2d(8, 16, 3, groups=groups)
    full = torch.zeros(16, 8, 3, 3)
    each_out, each_in = 16 // groups, 8 // groups
    for g in range(groups):
        rows, columns = slice(g * each_out, (g + 1) * each_out), slice(g * each_in, (g + 1) * each_in)
        full[rows, columns] = conv.weight.detach()[rows]
    assert torch.equal(input_ranges(conv), full.abs().amax((0, 2, 3)))


def test_scales_cancel_exactly_for_powers_of_two():
    """f(s x) = s f(x) without any rounding: 2 and 1/4 change exponents alone."""
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=4)
    images = torch.randn(2, 3, 9, 9)
    before = second(torch.relu(first(images)))
    rescale(first, second, torch.tensor([2.0, 0.25] * 4))
    assert torch.equal(second(torch.relu(first(images))), before)


@pytest.mark.parametrize(
    "act", [nn.ReLU6, nn.SiLU, nn.Sigmoid, lambda: nn.Hardtanh(0.0, 6.0), lambda: nn.Hardtanh(-1.0, 1.0)]
)
def test_layers_around_what_does_not_scale_are_left_alone(act):
    pairs = find_pairs(fold_batchnorm(Separable(act)))
    assert pairs == [p for p in PAIRS if p.first in ("narrow", "grouped", "hidden")]


def test_channels_that_do_not_match_are_no_pair():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.rows = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)
            self.flat, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)
            self.twice, self.shared = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
            self.shared.weight = self.flat.weight

        def forward(self, x):
            x = self.twice(torch.relu(self.twice(torch.relu(self.conv(x)))))
            x = self.shared(torch.relu(self.flat(torch.relu(x))))
            x = self.rows(torch.relu(x))  # over columns: 16 of them, as there are channels
            return self.head(x.mean(3).flatten(2).mean(2))

    assert find_pairs(fold_batchnorm(Net())) == []


def test_a_badly_scaled_network_quantizes_as_well_as_before_it_was_spoiled(stripes):
    """Channels scaled by up to 400 against each other, which float does not notice, and int8 does."""
    torch.manual_seed(0)
    module = randomized(Separable())
    images = stripes.splits["evaluation"][0]
    with torch.no_grad():
        factors = torch.logspace(-1.3, 1.3, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(1))]
        module.widen_bn.weight.mul_(factors)
        module.widen_bn.bias.mul_(factors)
        module.filter.weight.div_(factors.view(-1, 1, 1, 1))
        module.filter_bn.weight.mul_(factors)
        module.filter_bn.bias.mul_(factors)
        module.narrow.weight.div_(factors.view(1, -1, 1, 1))
    errors = {}
    for equalized in (False, True):
        graph = prepare(module, Quantization(equalize=equalized), PREPROCESS)
        calibrate(graph, stripes.batches("train", batch_size=16), CPU)
        with torch.no_grad():
            frozen = freeze(graph).module(images)
            errors[equalized] = ((frozen - module(images)).square().mean() / module(images).square().mean()).item()
    assert errors[True] < 0.3 * errors[False]


def test_an_equalized_network_is_built_again_and_takes_its_weights(stripes):
    module = randomized(Separable())
    settings = Quantization(equalize=True)
    graph = prepare(module, settings, PREPROCESS)
    calibrate(graph, stripes.batches("train", batch_size=16), CPU)
    other = prepare(randomized(Separable(), seed=5), settings, PREPROCESS)
    other.load_state_dict(copy.deepcopy(graph.state_dict()))
    images = stripes.splits["evaluation"][0]
    assert torch.equal(other.eval()(images), graph.eval()(images))
