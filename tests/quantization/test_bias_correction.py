import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from torch import nn

from compress.quantization import Quantization, calibrate, fold_batchnorm, prepare
from compress.quantization.bias_correction import correct_bias

CPU = torch.device("cpu")


class Mixed(nn.Module):
    """A transposed convolution, a ReLU6, and a linear layer over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu6 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU6()
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False)
        self.rows, self.head = nn.Linear(16, 4), nn.Linear(6 * 16 * 4, 5)

    def forward(self, x):
        x = torch.relu(self.up(self.relu6(self.conv(x) * 3)))
        return self.head(self.rows(x).flatten(1))


def means(graph: nn.Module, names: list[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each layer's outputs, per channel."""
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for name in names:
        layer = graph.get_submodule(name)

        def hook(layer, _, y, name=name):
            y = y.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0)
            found[name] = y.double().flatten(1).mean(1)

        hooks.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        graph.eval()(images)
    for handle in hooks:
        handle.remove()
    return found


def prepared(module: nn.Module, stripes, **settings) -> torch.fx.GraphModule:
    graph = prepare(module, Quantization(**settings), PREPROCESS)
    calibrate(graph, stripes.batches("train", batch_size=16), CPU)
    return graph


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("network", [SmallNet, Mixed])
def test_every_layer_gets_the_means_of_the_float_network(stripes, network, bits):
    module = randomized(network())
    graph = prepared(module, stripes, weight_bits=bits)
    batches = list(stripes.batches("train", batch_size=16))
    images = torch.cat([batch.images_NCHW for batch in batches])
    added = correct_bias(graph, batches, CPU)
    layers = [name for name, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    assert sorted(added) == sorted(layers)
    wanted, found = means(fold_batchnorm(module), layers, images), means(graph, layers, images)
    for name in layers:
        assert added[name].abs().max() > 0
        # A corrected value may fall to another step of a grid: that moves the mean by a part of 1 in 10^4 or so.
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-3 * float(wanted[name].abs().max()))


def test_what_was_added_is_the_change_and_nothing_else_moves(stripes):
    graph = prepared(randomized(SmallNet()), stripes, weight_bits=4).train()
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    added = correct_bias(graph, list(stripes.batches("train", batch_size=16)), CPU)
    after = graph.state_dict()
    assert graph.training
    for name, value in before.items():
        layer, _, kind = name.rpartition(".")
        if kind == "bias":
            torch.testing.assert_close(after[name] - value, added[layer], atol=1e-6, rtol=1e-3)
        else:
            assert torch.equal(after[name], value)


def test_coarse_weights_lose_less_with_corrected_biases(stripes):
    module = randomized(SmallNet())
    images = stripes.splits["evaluation"][0]
    errors = {}
    for corrected in (False, True):
        graph = prepared(module, stripes, weight_bits=3)
        if corrected:
            correct_bias(graph, list(stripes.batches("train", batch_size=16)), CPU)
        with torch.no_grad():
            errors[corrected] = (graph.eval()(images) - module(images)).square().mean().item()
    assert errors[True] < 0.8 * errors[False]
