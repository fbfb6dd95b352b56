"""Signal-to-quantization-noise ratios against what numpy and torch compute by themselves."""

import copy

import numpy as np
import pytest
import torch

from compress.quantization import fold_batchnorm, freeze
from compress.verification import noise, open_file
from compress.verification.differences import sqnr_db
from compress.verification.torch_network import FrozenNetwork, UnroundedNetwork
from compress.verification.twin import float_twin


@pytest.fixture
def images(run) -> np.ndarray:
    return run.data.splits["evaluation"][0][:6].numpy()


@pytest.fixture
def unrounded(exported) -> UnroundedNetwork:
    prepared = exported.network.module
    return UnroundedNetwork(prepared, freeze(prepared))


def test_the_formula():
    exact, rounded = np.array([3.0, -4.0]), np.array([3.0, -3.0])
    assert sqnr_db(exact, rounded) == pytest.approx(10 * np.log10(25))
    assert sqnr_db(exact, exact) == float("inf")


def test_the_network_before_rounding_is_the_float_network(exported, unrounded, images):
    """Nothing was trained, so leaving every rounding out gives the parent back."""
    parent = fold_batchnorm(exported.parent.module)
    expected = parent(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(unrounded.predict(images), expected, rtol=1e-4, atol=1e-5)
    values = {}
    for name in ("stem", "point"):
        parent.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: values.__setitem__(name, out))
    parent(torch.from_numpy(images))
    found = unrounded.floats(images, ["stem", "point"])
    np.testing.assert_allclose(found["stem"][:, 0], values["stem"].clamp(0, 6).detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["point"][:, 0], values["point"].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["int8.onnx", "int8.tflite"])
def test_every_figure_against_numpy(exported, unrounded, images, name):
    file = open_file(exported.files[name])
    found = noise.measure(unrounded, file, images)
    assert {layer.layer for layer in found.layers} == {"stem", "depthwise", "point", "add", "down", "head"}
    steps = file.steps(images)
    for layer in found.layers:
        exact = unrounded.floats(images, [layer.layer])[layer.layer].astype(np.float64)
        grid = file.grids[layer.layer]
        rounded = steps[layer.layer] * float(grid.scale)
        assert layer.sqnr_db == pytest.approx(
            10 * np.log10((exact**2).sum() / ((exact - rounded) ** 2).sum()), abs=1e-3
        )
    expected = unrounded.predict(images).astype(np.float64)
    error = ((expected - file.predict(images)) ** 2).sum()
    assert found.output_db == pytest.approx(10 * np.log10((expected**2).sum() / error), abs=1e-6)
    # Small errors add up: what the layers cost one by one is what the network costs.
    together = sum(10 ** (-layer.output_db / 10) for layer in found.layers)
    assert 10 * np.log10(1 / together) == pytest.approx(found.output_db, abs=2.5)


def test_the_last_layer_costs_its_own_error(exported, unrounded, images):
    head = noise.measure(unrounded, open_file(exported.files["int8.onnx"]), images).layers[-1]
    assert head.layer == "head"
    assert head.output_db == pytest.approx(head.own_db)


def test_a_layer_with_coarse_steps_costs_most(exported, images):
    """Weights of `point` on 8 steps to either side, everything else as before."""
    prepared = copy.deepcopy(exported.network.module)
    with torch.no_grad():
        prepared.get_submodule("point").log_weight_scale.add_(float(np.log(16)))
    frozen = freeze(prepared)

    class Coarse(FrozenNetwork):
        """Layers one by one, with torch: each is what the whole network makes of the given tensors."""

        def alone(self, images, given):
            file = open_file(exported.files["int8.onnx"])
            found = file.alone(images, given)
            scale, weight = frozen.integers["point"].weight_scale, frozen.integers["point"].weight
            x = torch.from_numpy(given["depthwise"][:, 0]).double() * float(self.grids["depthwise"].scale)
            real = torch.nn.functional.conv2d(x, weight.double() * scale.double().view(-1, 1, 1, 1))
            bias = frozen.integers["point"].bias.double() * frozen.integers["point"].bias_scale.double()
            found["point"] = self.grids["point"].nearest((real + bias.view(1, -1, 1, 1)).numpy())[:, None]
            return found

    found = noise.measure(UnroundedNetwork(prepared, frozen), Coarse(frozen), images)
    assert found.worst[0].layer == "point"
    assert "point" in found.sentence()


@pytest.mark.parametrize("name", ["int8.onnx", "int8.tflite"])
def test_the_float_twin_rounds_nothing(exported, images, tmp_path, name):
    """It is the frozen network without grids: its logits are those of torch with the integers' real weights."""
    file = open_file(exported.files[name])
    folder = tmp_path / "twin"
    folder.mkdir()
    twin = float_twin(file, folder)
    assert twin.storage != "int8"
    module = copy.deepcopy(exported.network.module)
    snapped = freeze(module).module
    with torch.no_grad():
        for layer in freeze(module).integers:
            module.get_submodule(layer).weight.copy_(snapped.get_submodule(layer).weight)
            module.get_submodule(layer).bias.copy_(snapped.get_submodule(layer).bias)
    expected = UnroundedNetwork(module, freeze(module)).predict(images)
    np.testing.assert_allclose(twin.predict(images), expected, rtol=1e-4, atol=1e-4)
    found = noise.measure(twin, file, images)
    assert {"stem", "depthwise", "point", "add", "down", "head"} <= {layer.layer for layer in found.layers}
    moved = [layer for layer in found.layers if layer.layer in ("max_pool2d", "pool")]
    assert all(layer.output_db == float("inf") for layer in moved)  # moving numbers costs nothing


def test_a_foreign_pair_is_matched_by_name(mlperf):
    rng = np.random.default_rng(0)
    images = (255 * rng.random((2, 3, 32, 32))).astype(np.float32)
    exact = open_file(mlperf / "pretrainedResnet.tflite")
    found = noise.measure(exact, open_file(mlperf / "pretrainedResnet_quant.tflite"), images)
    assert len(found.layers) == found.tensors == 16
    # TFLite's average pool keeps the grid of its input, which is far too coarse for a mean.
    assert found.worst[0].layer == "model/average_pooling2d/AvgPool"
