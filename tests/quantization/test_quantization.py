import copy
import math

import numpy as np
import pytest
import torch
from conftest import PREPROCESS, SmallNet, Stripes, randomized
from torch import nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.product import Preprocess
from compress.quantization import (
    ActivationQuantizer,
    Quantization,
    QuantizedConv2d,
    calibrate,
    fold_batchnorm,
    freeze,
    prepare,
    run_integers,
)
from compress.quantization.fake_quant import weight_integers

CPU = torch.device("cpu")


def prepared(module: nn.Module, stripes: Stripes, **settings: bool) -> torch.fx.GraphModule:
    graph = prepare(module, Quantization(**settings), PREPROCESS)
    calibrate(graph, stripes.batches("train", batch_size=16), CPU)
    return graph.eval()


def test_folding_batchnorm_changes_no_output(stripes):
    module = randomized(SmallNet())
    before = copy.deepcopy(module.state_dict())
    folded = fold_batchnorm(module)
    assert not any(isinstance(child, nn.BatchNorm2d) for child in folded.modules())
    images = stripes.splits["evaluation"][0]
    torch.testing.assert_close(folded(images), module(images), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_quantizer_equals_the_affine_formula(nonnegative):
    """Independent computation: equation 1 of Jacob et al. (2018), halves to even."""
    quantizer = ActivationQuantizer("x", nonnegative=nonnegative)
    quantizer.set_range(-1.3, 2.9)
    scale, zero_point = quantizer.grid()
    x = torch.linspace(-4, 4, 10_001)
    steps = np.clip(np.rint(x.numpy() / np.float32(scale)) + zero_point, 0, 255)
    expected = (steps - zero_point) * np.float32(scale)
    # torch multiplies by 1/scale, so a value within rounding of a half may fall to the neighbouring step
    off = np.abs(quantizer(x).detach().numpy() - expected) / scale
    assert (off > 0.01).mean() < 1e-3
    assert off.max() < 1.01
    assert (zero_point == 0) == nonnegative


def test_the_gradient_of_the_step_size_is_the_papers():
    """LSQ, equation 3, with g = 1 / sqrt(N * Qp) of section 2.2 and Qp as half the grid, summed by hand."""
    quantizer = ActivationQuantizer("x", nonnegative=True)
    with torch.no_grad():
        quantizer.log_scale.fill_(math.log(0.1))
    x = torch.tensor([[-1.0, 0.123, 7.777, 30.0]], dtype=torch.float32)
    quantizer(x).sum().backward()
    ratios = x[0].double().numpy() / 0.1
    inside = [np.rint(r) - r for r in ratios[1:3]]
    by_hand = (0 + sum(inside) + 255) / np.sqrt(4 * 127.5)  # below: 0 steps above zero; beyond: 255
    assert quantizer.log_scale.grad.item() == pytest.approx(0.1 * by_hand, rel=1e-3)  # d/dlog(s) = s d/ds


def test_a_relu6_grid_never_passes_six():
    quantizer = ActivationQuantizer("x", nonnegative=True, limit=6.0)
    with torch.no_grad():
        quantizer.log_scale.fill_(math.log(5.0))
    assert quantizer(torch.tensor([100.0])).item() == pytest.approx(6.0, rel=1e-6)
    assert quantizer(torch.tensor([-100.0])).item() == 0.0


def test_weights_are_on_symmetric_grids_per_channel():
    conv = nn.Conv2d(4, 6, 3)
    quantized = QuantizedConv2d.of(conv)
    integers = weight_integers(quantized.weight, quantized.weight_scale)
    assert integers.dtype == torch.int8
    assert integers.flatten(1).abs().amax(1).tolist() == [127] * 6
    rounded = integers * quantized.weight_scale.view(-1, 1, 1, 1)
    assert ((rounded - conv.weight).abs() <= quantized.weight_scale.view(-1, 1, 1, 1) / 2 * 1.0001).all()


def test_input_grid_keeps_all_pixel_values_apart():
    """With mean = std = 0.5 a grid of 255 steps would put pixels half-way between steps and merge them in pairs."""
    graph = prepare(SmallNet(), Quantization(), PREPROCESS)
    quantizer = next(m for m in graph.modules() if isinstance(m, ActivationQuantizer) and m.layer == "input")
    pixels = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    assert len(quantizer(pixels).unique()) >= 255


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0,) * 3, (1.0,) * 3), ((0.5,) * 3, (0.5,) * 3)],
)
def test_input_grid_covers_every_pixel_value_of_every_channel(mean, std):
    graph = prepare(SmallNet(), Quantization(), Preprocess(size=16, mean=mean, std=std))
    quantizer = next(m for m in graph.modules() if isinstance(m, ActivationQuantizer) and m.layer == "input")
    extremes = torch.tensor([(pixel - m) / s for pixel in (0, 1) for m, s in zip(mean, std, strict=True)])
    assert ((quantizer(extremes) - extremes).abs() <= quantizer.scale * 0.501).all()


@pytest.mark.parametrize("learn", [True, False])
def test_fake_quant_stays_close_and_frozen_equals_it(stripes, learn):
    module = randomized(SmallNet())
    graph = prepared(module, stripes, learn_activations=learn)
    frozen = freeze(graph)
    images = stripes.splits["evaluation"][0]
    float_NK, fake_NK, frozen_NK = module(images), graph(images), frozen.module(images)
    assert (fake_NK.argmax(1) == float_NK.argmax(1)).float().mean() >= 0.9
    assert (frozen.steps(fake_NK) - frozen.steps(frozen_NK)).abs().max() <= 1
    assert (frozen.steps(fake_NK) != frozen.steps(frozen_NK)).float().mean() < 0.25  # biases are rounded


def test_frozen_network_equals_integer_arithmetic(stripes):
    """The first layer, recomputed in int64 from the integers that go into the files."""
    graph = prepared(randomized(SmallNet()), stripes)
    frozen = freeze(graph)
    images = stripes.splits["evaluation"][0][:4]
    seen = {}
    for grid in frozen.grids():
        grid.register_forward_hook(lambda grid, _, out: seen.update({grid.layer: (grid, out)}))
    frozen.module(images)
    grid_in, x = seen["input"]
    grid_out, y = seen["stem"]
    steps = torch.round(x / grid_in.scale).to(torch.int64)
    layer = frozen.integers["stem"]
    sums = F.conv2d(F.pad(steps, (0, 1, 0, 1)).double(), layer.weight.double(), stride=2).to(torch.int64)
    sums += layer.bias.view(1, -1, 1, 1)
    real = sums.double() * layer.bias_scale.double().view(1, -1, 1, 1)
    expected = (torch.round(real / grid_out.scale) + grid_out.zero_point).clamp(0, 255) - grid_out.zero_point
    difference = (torch.round(y / grid_out.scale) - expected).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 1e-3
    assert layer.bias_scale.equal(torch.tensor(grid_in.scale, dtype=torch.float32) * layer.weight_scale)


def test_every_frozen_operator_stands_between_grids(stripes):
    frozen = freeze(prepared(randomized(SmallNet()), stripes))
    names = [grid.layer for grid in frozen.grids()]
    assert len(names) == len(set(names))
    assert {"input", "stem", "depthwise", "point", "add", "down", "pool", "reshape", "head"} <= set(names)
    assert not any(isinstance(child, (nn.ReLU, nn.ReLU6)) for child in frozen.module.modules())


def test_preparing_changes_neither_bytes_nor_mode_of_the_input(stripes):
    module = randomized(SmallNet())
    before = copy.deepcopy(module.state_dict())
    prepared(module, stripes)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not module.training


def test_grids_and_weights_learn(stripes):
    graph = prepared(randomized(SmallNet()), stripes).train()
    images, labels = stripes.splits["train"]
    F.cross_entropy(graph(images), labels).backward()
    without = [name for name, p in graph.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_unsupported_operators_are_refused_by_layer_before_training():
    class Shrinks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(3, 8, 1), nn.Hardshrink(), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.act(self.conv(x)).mean((2, 3)))

    with pytest.raises(ModelError, match="layer act: operator Hardshrink has no int8 counterpart"):
        prepare(Shrinks(), Quantization(), PREPROCESS)


def test_data_dependent_control_flow_is_refused():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="cannot be traced"):
        prepare(Branches(), Quantization(), PREPROCESS)


def test_a_layer_used_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 5)

        def forward(self, x):
            return self.head(self.conv(self.conv(x)).mean((2, 3)))

    with pytest.raises(ModelError, match="layer conv: runs twice"):
        prepare(Twice(), Quantization(), PREPROCESS)


@pytest.mark.parametrize(
    ("pool", "features"),
    [
        (nn.AvgPool2d(2), 8 * 4),
        (nn.AdaptiveAvgPool2d(2), 8 * 4),
        (nn.Sequential(nn.AvgPool2d(4), nn.Flatten()), 8),
    ],
)
def test_averages_after_a_rectifier_stay_in_the_frozen_network(stripes, pool, features):
    class Averages(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU()
            self.pool, self.head = pool, nn.Linear(features, 5)

        def forward(self, x):
            return self.head(self.pool(self.relu(self.conv(x))).flatten(1))

    module = randomized(Averages())
    graph = prepared(module, stripes)
    images = stripes.splits["evaluation"][0]
    frozen = freeze(graph)
    assert (frozen.steps(frozen.module(images)) - frozen.steps(graph(images))).abs().max() <= 1
    error = (frozen.module(images) - module(images)).abs().mean() / module(images).abs().mean()
    assert error < 0.1  # without the pooling it is about 1


def test_a_dead_channel_keeps_its_bias(stripes):
    module = randomized(SmallNet())
    with torch.no_grad():
        module.down.weight[3] = 0
        module.down.bias[3] = 1.2
    frozen = freeze(prepared(module, stripes))
    layer = frozen.integers["down"]
    assert (layer.bias[3] * layer.bias_scale[3]).item() == pytest.approx(1.2, rel=1e-4)
    assert layer.bias.abs().max() <= 2**30


def test_other_paddings_than_zeros_are_refused():
    module = SmallNet()
    module.down = nn.Conv2d(16, 24, 3, stride=2, padding=1, padding_mode="reflect")
    with pytest.raises(ModelError, match="layer down: padding_mode reflect"):
        prepare(module, Quantization(), PREPROCESS)


@pytest.mark.parametrize("use_result", [True, False])
def test_in_place_activations_whose_input_lives_on_are_refused(use_result):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Linear(8, 5)

        def forward(self, x):
            x = self.conv(x)
            y = self.relu(x)
            return self.head((x + y if use_result else x).mean((2, 3)))

    with pytest.raises(ModelError, match="layer relu: changes its input in place"):
        prepare(InPlace(), Quantization(), PREPROCESS)


def test_optional_arguments_of_the_forward_take_their_defaults(stripes):
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x, targets=None, double=False):
            features = self.conv(x).relu().mean((2, 3))
            logits = self.head(features * 2 if double else features)
            return logits if targets is None else F.cross_entropy(logits, targets)

    module = randomized(Optional())
    images = stripes.splits["evaluation"][0]
    torch.testing.assert_close(fold_batchnorm(module)(images), module(images))
    assert freeze(prepared(module, stripes)).module(images).shape == (40, 5)


def test_integer_arithmetic_against_int64_and_one_float32_product(stripes):
    """The depthwise and the linear layer, recomputed from the steps that go in and the integers of the files."""
    frozen = freeze(prepared(randomized(SmallNet()), stripes))
    images = stripes.splits["evaluation"][0][:8]
    result = run_integers(frozen, images, keep_steps=True)
    steps = {name: values.long() for name, values in result.steps.items()}
    grids = {grid.layer: grid for grid in frozen.grids()}
    assert list(steps) == [grid.layer for grid in frozen.grids()]
    for layer, source in (("depthwise", "stem"), ("head", "reshape")):
        integers = frozen.integers[layer]
        if layer == "head":
            sums = steps[source] @ integers.weight.long().T
        else:
            windows = F.pad(steps[source], (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
            sums = (windows * integers.weight.long()[None, :, 0, None, None]).sum((-1, -2))
        shape = (-1,) + (1,) * (sums.ndim - 2)
        sums = sums + integers.bias.long().view(shape)
        multiplier = integers.bias_scale.numpy() / np.float32(grids[layer].scale)
        ratio = sums.numpy().astype(np.float32) * multiplier.reshape(shape)
        zero_point = grids[layer].zero_point
        assert (np.clip(np.rint(ratio), -zero_point, 255 - zero_point) == steps[layer].numpy()).all()
    assert torch.equal(frozen.steps(result.logits_NK).long(), steps["head"])


def test_sums_too_large_for_float32_are_exact():
    """2**24 + 1 is no float32."""
    linear = nn.Linear(2000, 5)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.bias.zero_()
    graph = prepare(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2000), linear), Quantization(), PREPROCESS
    )
    calibrate(graph, Stripes().batches("train", batch_size=16), CPU)
    frozen = freeze(graph)
    integers = frozen.integers["3"]
    assert integers.weight.long().sum(1).tolist() == [2000 * 127] * 5
    result = run_integers(frozen, Stripes().splits["evaluation"][0], keep_steps=True)
    exact = result.steps["2"].long() @ integers.weight.long().T + integers.bias.long()
    output = frozen.output
    ratio = exact.numpy().astype(np.float32) * (integers.bias_scale.numpy() / np.float32(output.scale))
    expected = np.clip(np.rint(ratio), -output.zero_point, 255 - output.zero_point)
    assert (result.steps["3"].numpy() == expected).all()
