import copy

import pytest
import torch
from torch import nn

from compress.errors import ModelError
from compress.models.structure import compose, resize, select
from compress.product import KeptChannels


def kept(outputs: list[int] | None = None, inputs: list[int] | None = None, groups: int | None = None) -> KeptChannels:
    return KeptChannels(
        outputs=None if outputs is None else tuple(outputs),
        inputs=None if inputs is None else tuple(inputs),
        groups=groups,
    )


LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3), kept([0, 2, 5], [1, 3])),
    "conv without bias": (nn.Conv2d(4, 6, 3, bias=False), kept([0, 2, 5])),
    "conv, inputs only": (nn.Conv2d(4, 6, 3), kept(inputs=[3])),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), kept([1, 4], [1, 4], 2)),
    "depthwise, one left": (nn.Conv2d(6, 6, 3, groups=6), kept([3], [3], 1)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=2), kept([0, 2, 7, 10], [1, 2, 4, 7])),
    "whole groups": (nn.Conv2d(8, 12, 3, groups=4), kept([3, 4, 5, 9, 10, 11], [2, 3, 6, 7], 2)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), kept([0, 2, 5], [1, 3])),
    "transposed, grouped": (nn.ConvTranspose2d(8, 12, 3, groups=2), kept([0, 2, 7, 10], [1, 2, 4, 7])),
    "linear": (nn.Linear(4, 6), kept([0, 2, 5], [1, 3])),
    "norm": (nn.BatchNorm2d(6), kept([0, 5])),
    "bare norm": (nn.BatchNorm2d(6, affine=False), kept([0, 5])),
    "norm of vectors": (nn.BatchNorm1d(6), kept([0, 5])),
    "prelu": (nn.PReLU(6), kept([0, 5])),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", LAYERS)
def test_a_resized_layer_computes_what_the_original_does_on_the_kept_channels(case: str) -> None:
    """Zeros into the removed inputs, the kept channels of the output."""
    layer, channels = LAYERS[case]
    layer = copy.deepcopy(layer).eval()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    resized = nn.Sequential(copy.deepcopy(layer))
    resize(resized, {"0": channels})

    flat = isinstance(layer, (nn.Linear, nn.BatchNorm1d))
    through = isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU))
    width = 6 if through else layer.in_features if flat else layer.in_channels
    inputs = channels.outputs if through else channels.inputs or tuple(range(width))
    images = torch.rand(2, width) if flat else torch.rand(2, width, 5, 5)
    masked = torch.zeros_like(images)
    masked[:, list(inputs)] = images[:, list(inputs)]
    expected = layer(masked)
    if channels.outputs is not None:
        expected = expected[:, list(channels.outputs)]
    torch.testing.assert_close(resized(images[:, list(inputs)]), expected)


@pytest.mark.parametrize("case", LAYERS)
def test_the_selected_state_loads_into_a_resized_layer_and_into_a_fresh_one(case: str) -> None:
    layer, channels = LAYERS[case]
    original = nn.Sequential(layer)
    before = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    state = select(original, {"0": channels})
    assert all(torch.equal(tensor, before[key]) for key, tensor in original.state_dict().items())

    resized, fresh = copy.deepcopy(original), copy.deepcopy(original)
    for parameter in fresh.parameters():
        nn.init.constant_(parameter, 7)
    resize(resized, {"0": channels})
    resize(fresh, {"0": channels})
    assert not fresh.load_state_dict(state, strict=True).missing_keys
    for key, tensor in resized.state_dict().items():
        assert torch.equal(tensor, state[key])
        assert torch.equal(tensor, fresh.state_dict()[key])
    assert repr(resized) == repr(fresh)


def test_sizes_are_what_the_layer_says() -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6, 2))
    resize(module, {"0": kept([1, 2]), "1": kept([1, 2]), "2": kept([1, 2], [1, 2], 2), "3": kept(inputs=[1, 2])})
    assert (module[0].in_channels, module[0].out_channels) == (4, 2)
    assert module[1].num_features == 2
    assert (module[2].in_channels, module[2].out_channels, module[2].groups) == (2, 2, 2)
    assert (module[3].in_features, module[3].out_features) == (2, 2)


def test_frozen_weights_stay_frozen() -> None:
    module = nn.Sequential(nn.Linear(4, 6).requires_grad_(False))
    resize(module, {"0": kept([1])})
    assert not module[0].weight.requires_grad


def test_composing_two_steps_equals_taking_them_one_after_the_other() -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6, 3))
    first = {
        "0": kept([0, 2, 4, 5]),
        "1": kept([0, 2, 4, 5]),
        "2": kept([0, 2, 4, 5], [0, 2, 4, 5], 4),
        "3": kept(inputs=[0, 2, 4, 5]),
    }
    then = {
        "0": kept([1, 3], [0, 1]),
        "1": kept([1, 3]),
        "2": kept([1, 3], [1, 3], 2),
        "3": kept([0], [1, 3]),
    }
    both = compose(first, then)
    assert both["0"] == kept([2, 5], [0, 1])
    assert both["2"] == kept([2, 5], [2, 5], 2)
    assert both["3"] == kept([0], [2, 5])
    assert compose({}, then) == then
    assert compose(first, {}) == first

    one, two = copy.deepcopy(module), copy.deepcopy(module)
    resize(one, first)
    resize(one, then)
    resize(two, both)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({"1": kept([0])}, "1: the network has no such layer"),
        ({"0": kept([6])}, "there is no output channel 6: the layer has 6"),
        ({"0": kept(inputs=[-1])}, "there is no input channel -1"),
        ({"": kept([0])}, "channels cannot be taken out of a Sequential"),
        ({"0": kept([0], groups=2)}, "1 of 1 groups have kept channels, not 2"),
    ],
)
def test_what_does_not_fit_is_an_error(layers: dict[str, KeptChannels], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        resize(nn.Sequential(nn.Conv2d(4, 6, 3)), layers)


def test_uneven_groups_are_an_error() -> None:
    with pytest.raises(ModelError, match="equally many"):
        resize(nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)), {"0": kept([0, 1, 2, 7])})
