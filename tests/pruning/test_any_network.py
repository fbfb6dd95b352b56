"""Any network, cut at random: channels at any ratio and whole blocks.

It computes what the original does when nobody reads the channels and the blocks return what they are given; and it
trains, comes back from safetensors and its structure, quantizes, and both runtimes compute its int8 files.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_networks import PARTS, SIZE, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import NETWORKS, images_of, settle, size_of
from pydantic import TypeAdapter
from torch import nn
from torch.nn import functional as F

from compress import checkpoint
from compress.formats.onnx import float_onnx, int8_onnx
from compress.formats.tflite import to_tflite
from compress.measures import macs
from compress.models import ModelSettings
from compress.models import build as build_by_name
from compress.models.blocks import drop, dropped_from, find_blocks
from compress.models.coupled import Coupled, depthwise, find_coupled, without
from compress.models.structure import compose, resize
from compress.product import Batch, Network, Preprocess, Structure
from compress.quantization import Quantization, calibrate, freeze, prepare
from compress.verification.layers import compare_layers
from compress.verification.onnx_file import OnnxFile
from compress.verification.tflite_file import TFLiteFile
from compress.verification.torch_network import FrozenNetwork

CLASSES = 5
CPU = torch.device("cpu")


def network(module: nn.Module, model: dict[str, object], size: int) -> Network:
    preprocess = Preprocess(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=1.0)
    return Network(module.eval(), Structure(model=model, num_classes=CLASSES, preprocess=preprocess))


def registered(name: str) -> Network:
    torch.manual_seed(0)
    size = size_of(name)
    return network(settle(NETWORKS[name](CLASSES), images_of(8, size)), {"use": f"networks:{name}"}, size)


def drawn(parts: list[list[object]]) -> Network:
    torch.manual_seed(0)
    module = settle(build(CLASSES, parts), images_of(8, SIZE))
    return network(module, {"use": "drawn_networks:build", "args": {"parts": parts}}, SIZE)


def cut(given: Network, seed: int) -> tuple[Network, nn.Module, tuple[int, int]]:
    """The network without random blocks and channels; the original with their traces wiped out; how many of each."""
    rng, size = random.Random(seed), given.structure.preprocess.size
    blocks = [block.name for block in find_blocks(given.module, size) if rng.random() < 0.5]
    module = copy.deepcopy(given.module)
    drop(module, blocks)
    structure = dropped_from(given.structure, blocks)
    wiped = copy.deepcopy(given.module)
    for block in blocks:
        wiped.get_submodule(block).register_forward_hook(lambda _, inputs, __: inputs[0])
    sets, _ = find_coupled(module, size)
    gone: dict = {}
    for coupled in sets:
        units = rng.sample(range(coupled.units), rng.randint(0, coupled.units - 1))
        for place, channels in coupled.places.items():
            gone.setdefault(place, set()).update(channels[units].flatten().tolist())
        unread(wiped, coupled, units)
    kept = without(module, gone)
    resize(module, kept)
    structure = structure.model_copy(update={"kept": compose(structure.kept, kept)})
    return Network(module, structure), wiped, (len(blocks), len(kept))


def unread(module: nn.Module, coupled: Coupled, units: list[int]) -> None:
    """Puts zeros where a layer reads these channels: independent of how weights are cut."""
    for (name, side), channels in coupled.places.items():
        layer = module.get_submodule(name)
        if side == "inputs" and not depthwise(layer) and units:
            index = channels[units].flatten()

            def before(layer: nn.Module, inputs: tuple, index: torch.Tensor = index) -> tuple:
                axis = -1 if isinstance(layer, nn.Linear) else 1
                return (inputs[0].index_fill(axis, index, 0.0),)

            layer.register_forward_pre_hook(before)


def assert_the_same_function(given: Network, smaller: Network, wiped: nn.Module) -> None:
    size = given.structure.preprocess.size
    images = images_of(3, size, seed=4)
    assert macs(smaller.module, size) <= macs(given.module, size)
    with torch.no_grad():
        found, expected = smaller.module.double()(images.double()), wiped.double()(images.double())
    smaller.module.float()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def assert_comes_back(smaller: Network, folder: Path) -> None:
    """From JSON and safetensors, by the factory."""
    checkpoint.save(smaller, folder)
    loaded = checkpoint.load(folder)
    assert loaded.structure == smaller.structure
    images = images_of(2, smaller.structure.preprocess.size)
    with torch.no_grad():
        assert torch.equal(loaded.module(images), smaller.module(images))


def assert_trains(smaller: Network) -> None:
    """A step reaches every parameter, and there is something to learn from what is left."""
    module = copy.deepcopy(smaller.module).train()
    images, labels = images_of(8, smaller.structure.preprocess.size, seed=2), torch.arange(8) % CLASSES
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    loss = F.cross_entropy(module(images), labels)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())
    optimizer.step()
    assert torch.isfinite(F.cross_entropy(module(images), labels))


def assert_both_runtimes_compute_it(smaller: Network, folder: Path, *, int8: bool = True) -> None:
    size, seen = smaller.structure.preprocess.size, images_of(16, smaller.structure.preprocess.size)
    images = images_of(2, size, seed=1)
    model = float_onnx(smaller.module, size, {})
    (folder / "float.onnx").write_bytes(model.SerializeToString())
    (folder / "float.tflite").write_bytes(to_tflite(model, {}))
    with torch.no_grad():
        expected = smaller.module(images).numpy()
    for file in (OnnxFile(folder / "float.onnx"), TFLiteFile(folder / "float.tflite")):
        np.testing.assert_allclose(file.predict(images.numpy()), expected, rtol=1e-3, atol=1e-3)
    if not int8:
        return
    graph = prepare(smaller.module, Quantization(), smaller.structure.preprocess)
    with torch.no_grad():
        labels = smaller.module(seen).argmax(1)
    calibrate(graph, [Batch(seen, labels)], CPU)
    frozen = freeze(graph)
    model = int8_onnx(frozen, size, {})
    (folder / "int8.onnx").write_bytes(model.SerializeToString())
    (folder / "int8.tflite").write_bytes(to_tflite(model, {}))
    for file in (OnnxFile(folder / "int8.onnx"), TFLiteFile(folder / "int8.tflite")):
        found = compare_layers(FrozenNetwork(frozen), file, images.numpy())
        assert frozen.integers.keys() <= {layer.layer for layer in found.layers}
        assert max(layer.alone_lsb for layer in found.layers) <= 1


def check(given: Network, seed: int, folder: Path, *, files: bool) -> tuple[int, int]:
    """How many blocks and channels of how many layers were taken out."""
    smaller, wiped, what = cut(given, seed)
    assert_the_same_function(given, smaller, wiped)
    assert_comes_back(smaller, folder)
    assert_trains(smaller)
    if files:
        assert_both_runtimes_compute_it(smaller, folder)
    return what


CUTS = st.integers(0, 10_000)
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(parts=PARTS, seed=CUTS)
def test_a_drawn_network_cut_at_random(parts, seed, tmp_path):
    check(drawn(parts), seed, tmp_path, files=False)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(parts=PARTS, seed=CUTS)
def test_many_drawn_networks_cut_at_random(parts, seed, tmp_path):
    check(drawn(parts), seed, tmp_path, files=False)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(parts=PARTS, seed=CUTS)
def test_a_drawn_network_cut_at_random_becomes_files(parts, seed, tmp_path):
    check(drawn(parts), seed, tmp_path, files=True)


DEFAULT = "mobilenet_v3_small"
WITH_FILES = ("resnext50", "resnet18", "resnet50", "efficientnet_lite", "densenet", "vit")
OTHERS = ("regnet_y", "vit_timm", "convnext", "ghostnet", "shufflenet_v2", "googlenet", "unet_nearest", "mobilevit")


@pytest.mark.slow
@pytest.mark.parametrize("name", [DEFAULT, *WITH_FILES])
def test_a_network_of_each_family_cut_at_random_becomes_files(name, tmp_path):
    blocks, layers = check(registered(name), 1, tmp_path, files=True)
    assert layers > 1
    assert blocks or name == "densenet"


@pytest.mark.parametrize("name", [DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_network_of_each_family_cut_at_random(name, tmp_path):
    _, layers = check(registered(name), 1, tmp_path, files=False)
    assert layers > 1


NAMED = (
    ("torchvision", "resnet18", 64, False),
    ("torchvision", "resnet50", 64, False),
    ("torchvision", "mobilenet_v3_small", 64, False),
    ("torchvision", "mnasnet0_5", 64, False),
    ("torchvision", "densenet121", 64, False),
    ("timm", "efficientnet_lite0", 64, False),
    ("timm", "tf_efficientnet_lite0", 64, True),  # computes its padding
    ("timm", "vit_tiny_patch16_224", 224, False),
)


@pytest.mark.slow
@pytest.mark.extras
@pytest.mark.parametrize(("use", "name", "size", "files"), NAMED)
def test_a_network_of_another_package_cut_at_random(use, name, size, files, tmp_path):
    torch.manual_seed(0)
    model = {"use": use, "name": name, "weights": None}
    section = TypeAdapter(ModelSettings).validate_json(json.dumps(model))
    module = settle(build_by_name(section, CLASSES, size), images_of(8, size))
    blocks, layers = check(network(module, section.model_dump(mode="json"), size), 2, tmp_path, files=files)
    assert layers > 1
    assert blocks or name == "densenet121"
