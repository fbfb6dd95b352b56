"""Two thin layers for a wide one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, images_of, size_of
from torch import nn

from compress.errors import ModelError
from compress.measures import macs
from compress.models.low_rank import factorize, least_rank, low_ranks, matrix_of, replaceable

LAYERS = {
    "linear": (nn.Linear(12, 20), (5, 12)),
    "linear without bias": (nn.Linear(20, 12, bias=False), (5, 20)),
    "tokens": (nn.Linear(12, 20), (5, 7, 12)),
    "convolution": (nn.Conv2d(12, 20, 1), (2, 12, 5, 5)),
    "strided": (nn.Conv2d(12, 20, 1, stride=2, bias=False), (2, 12, 5, 5)),
    "padded": (nn.Conv2d(12, 20, 1, padding=1), (2, 12, 5, 5)),
}


def factored(layer: nn.Module, rank: int) -> nn.Sequential:
    whole = nn.Sequential(copy.deepcopy(layer))
    factorize(whole, {"0": rank})
    return whole


@pytest.mark.parametrize("case", LAYERS)
def test_with_all_singular_values_it_is_the_layer(case):
    layer, shape = LAYERS[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(factored(layer, 12)(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_the_error_is_what_was_left_out_of_the_singular_values(case, rank):
    """Eckart and Young: no matrix of that rank is nearer, so the squared distance is the sum of the rest's squares."""
    layer, _ = LAYERS[case]
    first, second = factored(layer, rank)[0]
    product = second.weight.flatten(1).double() @ first.weight.flatten(1).double()
    weight = layer.weight.detach().flatten(1).double()
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert float((product - weight).square().sum().detach()) == pytest.approx((values[rank:] ** 2).sum(), rel=1e-4)
    assert np.linalg.matrix_rank(product.detach().numpy(), tol=1e-6) == rank
    assert first.bias is None
    assert (second.bias is None) == (layer.bias is None)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20), st.floats(0.01, 1))
def test_the_rank_is_the_least_that_keeps_the_energy(values, energy):
    falling = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = least_rank(falling, energy)
    squares = falling.square()
    assert 1 <= rank <= len(values)
    if energy < 1:
        assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-9)
        assert rank == 1 or squares[: rank - 1].sum() < energy * squares.sum() * (1 + 1e-9)
    else:
        assert rank == len(values)


def test_only_layers_that_get_cheaper_are_factored():
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.Conv2d(32, 40, 1), nn.Conv2d(40, 32, 1), nn.Conv2d(32, 32, 1, groups=2)
    )
    with torch.no_grad():  # of rank 3, and noise: of no rank
        module[1].weight.copy_(
            (torch.randn(40, 3, generator=generator) @ torch.randn(3, 32, generator=generator))[..., None, None]
        )
    names = ["0", "1", "2", "3"]
    (found,) = low_ranks(module, names, energy=0.9999, saving=0.1)
    assert (found.name, found.rank, found.full) == ("1", 3, 32)
    assert found.energy == pytest.approx(1)
    assert [matrix_of(layer) is not None for layer in module] == [False, True, True, False]
    assert replaceable(module, names, 8) == ["1", "2"]
    before = macs(module, 8)
    factorize(module, {"1": 3})
    assert macs(module, 8) == before - (32 * 40 - 3 * (32 + 40)) * 6 * 6


@pytest.mark.parametrize(
    ("name", "some"), [("regnet_y", "trunk_output.0.0.f.a.0"), ("vit", "encoder.layers.encoder_layer_0.mlp.0")]
)
def test_layers_of_any_network_whose_weight_nobody_else_reads(name, some):
    torch.manual_seed(0)
    module = NETWORKS[name](5).eval()
    names = [layer for layer, child in module.named_modules() if isinstance(child, (nn.Conv2d, nn.Linear))]
    found = replaceable(module, names, size_of(name))
    assert some in found
    assert not [layer for layer in found if layer.endswith("out_proj")]  # torch's attention reads its weight
    expected = module(images_of(2, size_of(name)))
    factorize(module, {layer: min(matrix_of(module.get_submodule(layer)).shape) for layer in found})
    torch.testing.assert_close(module(images_of(2, size_of(name))), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "rank"), [("0", 1), ("1", 0), ("1", 9), ("7", 1)])
def test_what_cannot_be_factored_is_refused(name, rank):
    with pytest.raises(ModelError, match=name):
        factorize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 9)), {name: rank})
