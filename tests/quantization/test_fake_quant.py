"""The fake quantizers by themselves, each recomputed element by element."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from compress.quantization.fake_quant import (
    CHUNK,
    MEMORY,
    ActivationQuantizer,
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    QuantizedLinear,
    hold_grids,
    swap_channels,
    weight_integers,
    weight_scales,
)


def quantizer(low: float, high: float, **how) -> ActivationQuantizer:
    made = ActivationQuantizer("x", **how)
    made.set_range(low, high)
    return made


def gradients(function, x, *parameters):
    """The output, and gradients of a weighted sum of it for x and the parameters."""
    x = x.detach().requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return y.detach(), *torch.autograd.grad((y * weights).sum(), (x, *parameters))


def lsq(x, scale, zero, last):
    """Equations 1, 3 and 5 of LSQ, one value at a time: (value, d/dx, d/ds, d/dz)."""
    low, high = -zero, last - zero
    if x <= low * scale:
        return low * scale, 0.0, float(low), -scale
    if x >= high * scale:
        return high * scale, 0.0, float(high), -scale
    step = float(np.rint(x / scale))
    return step * scale, 1.0, step - x / scale, 0.0


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.floats(-3, 0), st.floats(0.1, 4), st.booleans(), st.integers(0, 2**31))
def test_values_and_gradients_are_the_papers(bits, low, high, nonnegative, seed):
    made = quantizer(low, high, bits=bits, nonnegative=nonnegative)
    scale, zero = made.grid()
    last = 2**bits - 1
    x = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * high
    parameters = (made.log_scale,) if nonnegative else (made.log_scale, made.zero_point)
    y, dx, *others = gradients(made, x, *parameters)
    expected = np.array([lsq(value, scale, zero, last) for value in x.flatten().tolist()])
    weights = np.linspace(-1, 2, x.numel())
    gradient_scale = 1 / math.sqrt(x[0].numel() * last / 2)
    np.testing.assert_allclose(y.flatten(), expected[:, 0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dx.flatten(), weights * expected[:, 1], rtol=1e-12)
    sums = [scale * (weights * expected[:, 2]).sum(), (weights * expected[:, 3]).sum()]  # d/dlog(s) = s d/ds
    assert [float(g) for g in others] == pytest.approx([s * gradient_scale for s in sums[: len(others)]], rel=1e-4)


def test_where_everything_is_clipped_the_gradient_is_the_derivative():
    """Clipped values are a smooth function of the scale: a difference quotient says what its gradient is."""
    made = quantizer(-1.0, 1.0)
    x = torch.tensor([[-9.0, 7.0, 8.0]], dtype=torch.float64)
    weights = torch.linspace(-1, 2, 3, dtype=torch.float64)
    _, _, gradient = gradients(made, x, made.log_scale)
    values = []
    for delta in (-0.01, 0.01):
        other = copy.deepcopy(made)
        with torch.no_grad():
            other.log_scale += delta
            values.append(float((other(x) * weights).sum()))
    assert gradient.item() * math.sqrt(3 * 127.5) == pytest.approx((values[1] - values[0]) / 0.02, rel=1e-3)


@pytest.mark.parametrize(("rectifier", "limit"), [(F.relu, None), (F.relu6, 6.0)])
@pytest.mark.parametrize("top", [0.7, 5.9, 6.0, 9.0])
@pytest.mark.parametrize("bits", [8, 3])
def test_a_rectifier_before_a_grid_that_starts_at_zero_changes_nothing(rectifier, limit, top, bits):
    """Not a value and not a gradient, bit by bit, on the edges either: prepare takes the rectifier out."""
    made = quantizer(0.0, top, nonnegative=True, limit=limit, bits=bits)
    scale, _ = made.grid()
    edges = [0.0, -0.0, scale / 2, -scale / 2, scale, made.last * scale, (made.last + 0.5) * scale, 6.0, 6.01, -7.0]
    x = torch.cat([torch.tensor(edges), torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 4]).view(10, -1)
    alone = gradients(made, x, made.log_scale)
    behind = gradients(lambda x: made(rectifier(x)), x, made.log_scale)
    assert all(torch.equal(a, b) for a, b in zip(alone, behind, strict=True))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "sliced", "expanded gradient"])
def test_the_memory_layout_changes_no_number(layout):
    made = quantizer(-1.0, 2.0)
    x = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(2))
    plain = gradients(made, x, made.log_scale, made.zero_point)
    if layout == "NHWC":
        laid = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        laid = torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, :6]
    else:
        laid = x
    again = gradients(made, laid, made.log_scale, made.zero_point)
    if layout == "expanded gradient":
        inputs = [value.clone().requires_grad_() for value in (x, x.to(memory_format=torch.channels_last))]
        for value in inputs:
            made(value).mean((2, 3)).sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
    if layout == "NHWC":
        assert made(laid).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])
    for a, b in zip(plain[2:], again[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # summed in another order


def test_a_tensor_of_several_chunks_is_rounded_whole():
    made = quantizer(-1.0, 2.0)
    x = torch.linspace(-2, 3, 2 * CHUNK + 7).view(1, -1)
    together = made(x)
    parts = torch.cat([made(part) for part in x.split(1000, 1)], 1)
    assert torch.equal(together, parts)


def test_a_scale_at_its_limit_can_only_shrink():
    made = quantizer(0.0, 6.0, nonnegative=True, limit=6.0)
    with torch.no_grad():
        made.log_scale.fill_(math.log(9 / 255))
    x = torch.full((1, 4), 9.0)
    for sign, moves in ((1.0, True), (-1.0, False)):  # a descent shrinks what has a positive gradient
        made.log_scale.grad = None
        (sign * made(x).sum()).backward()
        assert (made.log_scale.grad.item() > 0) == moves
        assert made.log_scale.grad.item() >= 0
    assert made.grid()[0] == np.float32(6 / 255)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_grid_has_as_many_steps_as_its_bits_allow(bits):
    made = quantizer(-1.0, 1.0, bits=bits)
    assert len(made(torch.linspace(-3, 3, 5001)[None]).unique()) == 2**bits
    conv = nn.Conv2d(3, 4, 5)
    layer = QuantizedConv2d.of(conv, bits=bits)
    largest = 2 ** (bits - 1) - 1
    integers = weight_integers(layer.weight, layer.weight_scale, bits)
    assert integers.flatten(1).abs().amax(1).tolist() == [largest] * 4
    rounded = integers * layer.weight_scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(layer.fake_weight(), rounded, rtol=1e-6, atol=0)
    assert ((rounded - conv.weight).abs() <= layer.weight_scale.view(-1, 1, 1, 1) / 2 * 1.0001).all()


def test_a_fixed_grid_stays_where_it_is():
    """The grid of LiteRT's sigmoid: 1/256 to the last bit, which the exponential of its logarithm is not."""
    made = ActivationQuantizer("sigmoid", fixed=(1 / 256, 0), follows=True).train()
    x = torch.linspace(-4, 4, 1000)[None]
    made.set_range(-3, 3)
    made.calibrating = True
    assert torch.equal(made(x), x)
    made.calibrating = False
    made(x)
    hold_grids(made)
    assert list(made.parameters()) == []
    assert made.grid() == (1 / 256, 0)
    assert torch.equal(made(torch.tensor([[0.5, 1.0, -1.0]])), torch.tensor([[0.5, 255 / 256, 0.0]]))


def test_a_grid_that_follows_keeps_a_moving_average_of_extremes_while_it_trains():
    made = ActivationQuantizer("x", learned=False, follows=True).train()
    assert list(made.parameters()) == []
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(2, 50, generator=generator) * (k + 1) for k in range(5)]
    low, high = batches[0].min().item(), batches[0].max().item()
    for number, batch in enumerate(batches):
        if number:
            low = MEMORY * low + (1 - MEMORY) * batch.min().item()
            high = MEMORY * high + (1 - MEMORY) * batch.max().item()
        made(batch)
    scale, zero = made.grid()
    assert scale == pytest.approx((high - low) / 255, rel=1e-5)
    assert zero == round(-low / scale)
    made.eval()(batches[-1] * 100)
    hold_grids(made.train())
    made(batches[-1] * 100)
    assert made.grid() == (scale, zero)
    hold_grids(made, held=False)
    made(batches[-1] * 100)
    assert made.grid() != (scale, zero)


def test_held_grids_get_no_gradient_and_give_the_same_one_to_their_input():
    made = quantizer(-1.0, 1.0)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    y, dx, _ = gradients(made, x, made.log_scale)
    hold_grids(made)
    held_y, held_dx = gradients(made, x)
    assert torch.equal(y, held_y)
    assert torch.equal(dx, held_dx)
    assert not any(p.requires_grad for p in made.parameters())
    hold_grids(made, held=False)
    assert all(p.requires_grad for p in made.parameters())


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**31))
def test_gradients_of_weights_and_their_steps_are_the_papers(bits, seed):
    torch.manual_seed(seed)
    layer = QuantizedLinear.of(nn.Linear(7, 3), bits=bits).double()
    with torch.no_grad():
        layer.log_weight_scale -= 0.5  # some weights are clipped
    scales, last = layer.weight_scale.detach(), 2 ** (bits - 1) - 1
    x = torch.randn(2, 7, dtype=torch.float64)
    layer(x).sum().backward()
    upstream = x.sum(0)  # of the rounded weight
    for channel, scale in enumerate(scales.tolist()):
        terms = [lsq(value, scale, last, 2 * last) for value in layer.weight[channel].tolist()]
        expected = [float(u) * term[1] for u, term in zip(upstream, terms, strict=True)]
        assert layer.weight.grad[channel].tolist() == pytest.approx(expected)
        by_step = scale * sum(float(u) * term[2] for u, term in zip(upstream, terms, strict=True))
        assert layer.log_weight_scale.grad[channel].item() == pytest.approx(by_step / math.sqrt(7 * last), abs=1e-9)


def test_steps_that_follow_the_weights_clip_none_and_pass_gradients_as_they_are():
    layer = QuantizedConv2d.of(nn.Conv2d(3, 4, 3), learned=False)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    with torch.no_grad():
        layer.weight *= 3
    assert torch.equal(layer.weight_scale, weight_scales(layer.weight))
    fake = layer.fake_weight()
    assert ((fake - layer.weight).abs() <= layer.weight_scale.view(-1, 1, 1, 1) * 0.5001).all()
    upstream = torch.randn_like(fake)
    fake.backward(upstream)
    assert torch.equal(layer.weight.grad, upstream)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("learned", [True, False])
def test_transposed_convolutions_have_a_step_for_each_output_channel(groups, learned):
    conv = nn.ConvTranspose2d(6, 12, 3, stride=2, padding=1, output_padding=1, groups=groups)
    layer = QuantizedConvTranspose2d.of(conv, learned=learned)
    rounded = torch.zeros_like(conv.weight)
    per_group = 12 // groups
    for output in range(12):
        group, place = divmod(output, per_group)
        inputs = slice(group * 6 // groups, (group + 1) * 6 // groups)
        kernel = conv.weight[inputs, place].detach()
        scale = kernel.abs().max() / 127
        assert layer.weight_scale[output].item() == pytest.approx(scale.item(), rel=1e-5)
        rounded[inputs, place] = torch.round(kernel / scale) * scale
    x = torch.randn(2, 6, 5, 4)
    expected = F.conv_transpose2d(x, rounded, conv.bias, 2, 1, 1, groups)
    assert layer(x).shape == conv(x).shape
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_channels_swapped_twice_are_as_they_were(groups):
    weight = torch.randn(6, 5, 3, 2)
    swapped = swap_channels(weight, groups)
    assert swapped.shape == (5 * groups, 6 // groups, 3, 2)
    assert torch.equal(swap_channels(swapped, groups), weight)


def test_scales_can_be_put_over_changed_weights():
    layer = QuantizedLinear.of(nn.Linear(5, 3))
    with torch.no_grad():
        layer.weight *= torch.tensor([[1.0], [2.0], [0.5]])
    layer.reset_scales()
    torch.testing.assert_close(layer.weight_scale, weight_scales(layer.weight))
