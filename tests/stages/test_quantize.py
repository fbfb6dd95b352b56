import copy
import json
from typing import Any

import pytest
import torch
from conftest import PREPROCESS, SmallNet, Stripes, randomized
from pydantic import ValidationError
from torch import Tensor, nn

from compress import checkpoint
from compress.data.sample import sample, sample_size
from compress.models import build
from compress.models.mobilenet_v2 import MobileNetV2Settings
from compress.product import Network, Product, Structure
from compress.quantization import ActivationQuantizer, Quantization, QuantizedConv2d, fold_batchnorm, freeze
from compress.stages.quantize import Quantize
from compress.training import reestimated_batchnorm

MODEL = {"use": "mobilenet_v2", "width": 0.1, "stem_stride": 1, "dropout": 0.0}


def quantized(product: Product, run, **settings: Any) -> Product:
    return Quantize(use="quantize", **({"epochs": 0, "batch_size": 32} | settings)).apply(product, run)


def grids(product: Product) -> dict[str, tuple[float, int]]:
    found = [m for m in product.network.module.modules() if isinstance(m, ActivationQuantizer)]
    return {quantizer.layer: quantizer.grid() for quantizer in found}


def outputs(module: nn.Module, stripes: Stripes) -> Tensor:
    with torch.no_grad():
        return module(stripes.splits["evaluation"][0])


@pytest.mark.parametrize("settings", [{}, {"equalize": True}, {"calibration": "mse", "bias_correction": True}])
def test_a_quantized_network_comes_back_bit_for_bit(run, stripes, tmp_path, settings):
    torch.manual_seed(0)
    module = randomized(build(MobileNetV2Settings(**MODEL), 5, 16))
    product = Product(Network(module, Structure(model=MODEL, num_classes=5, preprocess=PREPROCESS)))
    made = quantized(product, run, **settings)
    kept = Quantization.model_validate_json(json.dumps(made.network.structure.quantize))
    assert kept == Quantization(equalize=settings.get("equalize", False))
    checkpoint.save(made.network, tmp_path / "network")
    loaded = checkpoint.load(tmp_path / "network")
    assert torch.equal(outputs(loaded.module, stripes), outputs(made.network.module, stripes))
    assert made.float_network is product.network
    assert made.parent is product.network


def test_the_product_that_came_in_stays_as_it_was(product, run):
    before = copy.deepcopy(product.network.module.state_dict())
    settings = {"reestimate_batchnorm": True, "equalize": True, "weight_calibration": "mse", "bias_correction": True}
    quantized(product, run, epochs=1, **settings)
    after = product.network.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not product.network.module.training


def test_every_calibration_places_the_grids_differently(product, run):
    """Percentiles of 100 are the extremes of all images; of 99, less; the mean of extremes lies below the extremes."""
    minmax = grids(quantized(product, run))
    everything = grids(quantized(product, run, calibration="percentile", percentile=100))
    most = grids(quantized(product, run, calibration="percentile", percentile=99))
    least_error = grids(quantized(product, run, calibration="mse"))
    assert minmax["input"] == everything["input"] == most["input"]
    for layer in ("point", "add", "down", "head"):
        assert minmax[layer][0] <= everything[layer][0] * 1.0001
        assert most[layer][0] < everything[layer][0]
        assert least_error[layer][0] <= everything[layer][0] * 1.0001
    assert least_error != everything


def test_steps_of_weights_of_least_squares_are_no_larger(product, run):
    layers = {}
    for how in ("minmax", "mse"):
        module = quantized(product, run, weight_calibration=how, weight_bits=4).network.module
        layers[how] = [m.weight_scale.detach() for m in module.modules() if isinstance(m, QuantizedConv2d)]
    pairs = list(zip(layers["mse"], layers["minmax"], strict=True))
    assert pairs
    assert all((mse <= minmax * 1.0001).all() for mse, minmax in pairs)
    assert any((mse < 0.95 * minmax).any() for mse, minmax in pairs)


def test_weights_of_least_squares_need_steps_of_their_own():
    with pytest.raises(ValidationError, match="`weight_calibration: mse` needs `step_size: learned`"):
        Quantize(use="quantize", weight_calibration="mse", step_size="minmax")


def test_bias_correction_moves_biases_alone(product, run):
    without, corrected = (quantized(product, run, bias_correction=on).network.module for on in (False, True))
    for (name, a), b in zip(without.state_dict().items(), corrected.state_dict().values(), strict=True):
        assert torch.equal(a, b) != name.endswith(".bias"), name


def test_reestimated_statistics_are_what_is_folded(product, run, stripes):
    """The network with its statistics measured on the same images, then quantized, has the same weights and biases."""
    spoiled = copy.deepcopy(product.network.module)
    spoiled.stem_bn.running_var.mul_(9.0)
    spoiled.stem_bn.running_mean.add_(1.0)
    given = Product(Network(spoiled, product.network.structure))
    made = quantized(given, run, reestimate_batchnorm=True, calibration_images=64).network.module
    measured = reestimated_batchnorm(product.network.module, sample(run, 64, batch_size=32), run.device)
    for name, value in fold_batchnorm(measured).state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value)
    plain = quantized(given, run, calibration_images=64).network.module
    assert not torch.allclose(made.state_dict()["stem.bias"], plain.state_dict()["stem.bias"], atol=0.05)


def test_held_grids_stay_while_weights_learn(product, run):
    placed = grids(quantized(product, run))
    held, free = (quantized(product, run, epochs=1, hold_grids_after=part) for part in (0.0, None))
    assert grids(held) == placed
    assert grids(free) != placed
    weights = quantized(product, run).network.module.state_dict()["down.weight"]
    assert not torch.equal(held.network.module.state_dict()["down.weight"], weights)


@pytest.mark.parametrize("step_size", ["learned", "minmax"])
def test_training_improves_a_coarse_network(run, stripes, step_size):
    """3 bits ruin the outputs; the float network as a teacher brings them back."""
    torch.manual_seed(0)
    structure = Structure(model={"use": "tests:none"}, num_classes=5, preprocess=PREPROCESS)
    product = Product(Network(randomized(SmallNet()), structure))
    wanted = outputs(product.network.module, stripes)
    errors = []
    for epochs in (0, 12):
        kd: Any = {"losses": ({"use": "kd", "temperature": 4.0, "weight": 1.0},), "labels": 0.0}
        how: Any = {"epochs": epochs, "batch_size": 16, "lr": 3e-3, "step_size": step_size, "weight_bits": 3}
        made = quantized(product, run, **how, **({"distill": kd} if epochs else {}))
        found = outputs(made.network.module, stripes)
        centred = [x - x.mean(1, keepdim=True) for x in (found, wanted)]  # what soft targets see
        errors.append(float((centred[0] - centred[1]).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_metrics_count_the_images(product, run):
    assert quantized(product, run, calibration_images=32).metrics["calibration_images"] == 32
    assert quantized(product, run).metrics["calibration_images"] == 64  # all there are


def test_ptq_freezes_to_whole_numbers(product, run, stripes):
    module = quantized(product, run, calibration="mse", bias_correction=True).network.module
    float_NK, frozen_NK = outputs(product.network.module, stripes), outputs(freeze(module).module, stripes)
    assert (float_NK.argmax(1) == frozen_NK.argmax(1)).float().mean() >= 0.9


@pytest.mark.parametrize(("images", "batch_size", "sizes"), [(32, 32, [32]), (500, 16, [16] * 4), (5, 32, [5])])
def test_a_sample_is_the_same_every_time(run, images, batch_size, sizes):
    first, again = (list(sample(run, images, batch_size=batch_size)) for _ in range(2))
    assert [len(batch.labels_N) for batch in first] == sizes
    assert all(torch.equal(a.images_NCHW, b.images_NCHW) for a, b in zip(first, again, strict=True))
    assert sample_size(run, images) == min(images, 64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0, "rewrite_activations": True}, "nothing is trained"),
        ({"epochs": 0, "only": ["head.*"]}, "nothing is trained"),
        ({"percentile": 99.0}, "needs `calibration: percentile`"),
        ({"hold_grids_after": 0.5, "learn_activations": False}, "grids never move"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        Quantize.model_validate_json(json.dumps({"use": "quantize", **settings}))
