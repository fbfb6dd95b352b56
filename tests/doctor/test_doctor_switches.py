"""Roundings off is the float network, roundings on is the prepared one, and nothing stays behind."""

import pytest
import torch
from conftest import PREPROCESS, SmallNet, Stripes, randomized
from torch import nn

from compress.doctor.switches import groups, quantizers, rounding_only, weighted
from compress.quantization import Quantization, calibrate, fold_batchnorm, prepare

IMAGES = next(iter(Stripes().batches("train", batch_size=8)))


def prepared_small():
    module = randomized(SmallNet())
    prepared = prepare(module, Quantization(), PREPROCESS)
    calibrate(prepared, [IMAGES], torch.device("cpu"))
    return module, prepared


def test_without_any_rounding_it_is_the_float_network():
    module, prepared = prepared_small()
    with torch.no_grad(), rounding_only(prepared):
        torch.testing.assert_close(prepared(IMAGES.images_NCHW), module(IMAGES.images_NCHW), rtol=1e-4, atol=1e-5)


def test_with_every_rounding_it_is_the_prepared_network():
    _, prepared = prepared_small()
    with torch.no_grad():
        expected = prepared.eval()(IMAGES.images_NCHW)
        everything = [module for modules in groups(prepared).values() for module in modules]
        with rounding_only(prepared, everything):
            assert torch.equal(prepared(IMAGES.images_NCHW), expected)
    assert not torch.allclose(expected, fold_batchnorm(prepared_small()[0])(IMAGES.images_NCHW))


def test_only_the_chosen_weights_are_rounded():
    _, prepared = prepared_small()
    layers = weighted(prepared)
    seen = {}
    handles = [
        layer.register_forward_hook(lambda module, x, y, name=name: seen.update({name: (x[0], y)}))
        for name, layer in layers.items()
    ]
    with torch.no_grad(), rounding_only(prepared, [layers["point"]]):
        prepared(IMAGES.images_NCHW)
        for name, layer in layers.items():
            x, y = seen[name]
            plain = nn.functional.linear if isinstance(layer, nn.Linear) else layer._conv_forward
            x = nn.functional.pad(x, layer.pads) if getattr(layer, "pads", None) else x
            exact = torch.allclose(plain(x, layer.weight, layer.bias), y, atol=1e-6)
            assert exact == (name != "point"), name
    for handle in handles:
        handle.remove()


def test_an_error_in_the_block_leaves_no_switch_behind():
    _, prepared = prepared_small()
    prepared.train()
    before = prepared.eval()(IMAGES.images_NCHW)
    prepared.train()
    with pytest.raises(KeyError), rounding_only(prepared):
        raise KeyError
    assert prepared.training
    assert not any("forward" in vars(module) for module in prepared.modules() if not isinstance(module, type(prepared)))
    assert torch.equal(prepared.eval()(IMAGES.images_NCHW), before)


def test_groups_hold_each_rounding_once():
    _, prepared = prepared_small()
    grouped = [module for modules in groups(prepared).values() for module in modules]
    assert len(grouped) == len(set(map(id, grouped)))
    assert {id(module) for module in grouped} == {
        id(module) for module in (*quantizers(prepared).values(), *weighted(prepared).values())
    }
    assert {"input", "stem", "depthwise", "point", "down", "head"} <= set(groups(prepared))
