"""The ranking finds the layer that was sabotaged, and its figures are what their definitions say."""

import math

import pytest
import torch
from conftest import PREPROCESS, SmallNet, Stripes, randomized

from compress.doctor.damage import difference, rank, sqnr_db
from compress.quantization import Quantization, calibrate, prepare

IMAGES_NCHW = next(iter(Stripes().batches("train", batch_size=8))).images_NCHW


def prepared_small():
    prepared = prepare(randomized(SmallNet()), Quantization(), PREPROCESS)
    calibrate(prepared, Stripes().batches("train", batch_size=8, limit=8), torch.device("cpu"))
    return prepared


@pytest.mark.parametrize("layer", ["stem", "point", "down", "head"])
def test_coarse_weights_put_their_layer_first(layer):
    prepared = prepared_small()
    with torch.no_grad():
        prepared.get_submodule(layer).log_weight_scale.add_(math.log(60))
    state = {name: value.clone() for name, value in prepared.state_dict().items()}
    ranking = rank(prepared, IMAGES_NCHW)
    assert ranking.layers[0].layer == layer
    assert ranking.layers[0].sqnr_db < ranking.layers[1].sqnr_db - 6
    assert ranking.total.sqnr_db < ranking.layers[1].sqnr_db
    assert all(torch.equal(state[name], value) for name, value in prepared.state_dict().items())


def test_a_coarse_grid_puts_its_layer_first():
    prepared = prepared_small()
    down = next(module for module in prepared.modules() if getattr(module, "layer", "") == "down")
    with torch.no_grad():
        down.set_range(-900.0, 900.0)
    assert rank(prepared, IMAGES_NCHW).layers[0].layer == "down"


def test_every_layer_is_ranked_once_worst_first():
    told = []
    ranking = rank(prepared_small(), IMAGES_NCHW, told.append)
    names = [damage.layer for damage in ranking.layers]
    assert sorted(names) == sorted(set(names)) == sorted(told)
    assert [damage.sqnr_db for damage in ranking.layers] == sorted(damage.sqnr_db for damage in ranking.layers)


def test_difference_is_what_its_definitions_say():
    exact = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
    damage = difference("x", exact, 1.1 * exact)
    assert damage.sqnr_db == pytest.approx(20, abs=1e-4)  # the error has a tenth of the amplitude
    assert damage.moved == 0
    p, q = exact.double().softmax(1), (1.1 * exact).double().softmax(1)
    assert damage.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    assert difference("x", exact, exact) == difference("x", exact, exact.clone())
    assert difference("x", exact, exact).sqnr_db == math.inf
    assert difference("x", exact, exact.roll(1, 1)).moved == 1
    assert difference("x", torch.zeros(1, 2), torch.ones(1, 2)).sqnr_db == -math.inf


def test_a_map_of_classes_is_compared_along_its_classes():
    exact = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rolled = exact.clone()
    rolled[0] = exact[0].roll(1, 0)  # other classes in half of the images
    assert difference("x", exact, rolled).moved == pytest.approx(0.5)
    assert sqnr_db(exact, exact * 0) == pytest.approx(0)
