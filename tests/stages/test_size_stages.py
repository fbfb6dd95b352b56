"""Stages for size: low rank, 2:4 zeros, shared values; from the stage through training and int8 to the files."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from drawn_networks import SIZE, build
from networks import images_of, settle
from onnx import numpy_helper

from compress import checkpoint
from compress.errors import ModelError
from compress.formats.tflite_file import unpack
from compress.measures import macs
from compress.models.two_of_four import fits, mask
from compress.product import Network, Product, Structure
from compress.quantization import freeze
from compress.recipe import order_mistakes
from compress.stages.cluster import NO_FASTER as SHARED
from compress.stages.cluster import Cluster
from compress.stages.export import Export
from compress.stages.factorize import Factorize
from compress.stages.prune import Prune
from compress.stages.quantize import Quantize
from compress.stages.sparsify import NO_FASTER, Sparsify
from compress.stages.train import Train
from compress.teaching.alignment import channels, kept

MODEL = {
    "use": "drawn_networks:build",
    "args": {"parts": [["residual", 16, 1], ["inverted", 16, 1], ["grouped", 16, 1], ["squeezed", 16, 2]]},
}
ONE = {"epochs": 1, "batch_size": 32}


@pytest.fixture
def small(run):
    torch.manual_seed(0)
    structure = Structure(model=MODEL, num_classes=5, preprocess=run.data.preprocess)
    return Product(Network(settle(build(5, **MODEL["args"]), images_of(16, SIZE)), structure))


def answers(network: Network) -> torch.Tensor:
    with torch.no_grad():
        return network.module(images_of(3, SIZE))


def assert_comes_back(network: Network, folder) -> None:
    checkpoint.save(network, folder)
    loaded = checkpoint.load(folder)
    assert loaded.structure == network.structure
    assert torch.equal(answers(loaded), answers(network))


def stored(path) -> dict[str, np.ndarray]:
    """The int8 weights of an ONNX file by name."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    return {name: values for name, values in found.items() if values.dtype == np.int8 and values.ndim > 1}


def in_tflite(path) -> list[np.ndarray]:
    model = unpack(path.read_bytes())
    graph = model.subgraphs[0]
    return [
        np.frombuffer(model.buffers[tensor.buffer].data.tobytes(), np.int8).reshape(tensor.shape)
        for tensor in graph.tensors
        if model.buffers[tensor.buffer].data is not None and tensor.type == 9 and len(tensor.shape) > 1
    ]


def test_factored_layers_train_quantize_and_come_back(small, run, tmp_path):
    pruned = Prune(use="prune", goal={"macs": 0.7}).apply(small, run)
    stage = Factorize(use="factorize", energy=0.8, keep=("parts.0.*",), batchnorm_images=32)
    product = stage.apply(pruned, run)
    figures, structure = product.metrics, product.network.structure
    assert figures["macs_after"] == macs(product.network.module, SIZE) < figures["macs_before"]
    assert figures["params_after"] < figures["params_before"]
    assert {entry["name"]: entry["rank"] for entry in figures["factored"]} == structure.factored
    assert len(structure.factored) > 2
    assert all(entry["energy"] >= 0.8 - 1e-9 for entry in figures["factored"])
    assert product.parent is small.network
    assert structure.kept == pruned.network.structure.kept
    # BatchNorm stays behind the second.
    one = next(iter(structure.factored))
    assert f"{one}.0.weight" in product.network.module.state_dict()
    trained = Train(use="train", **ONE).apply(product, run)
    assert not torch.equal(answers(trained.network), answers(product.network))
    assert_comes_back(trained.network, tmp_path / "factored")
    with pytest.raises(ModelError, match="put prune before factorize"):
        Prune(use="prune", goal={"macs": 0.7}).apply(product, run)


@pytest.mark.slow
def test_factored_layers_become_int8_files(small, run, tmp_path):
    trained = Factorize(use="factorize", energy=0.8, batchnorm_images=32).apply(small, run)
    one = next(iter(trained.network.structure.factored))
    quantized = Quantize(use="quantize", calibration_images=32, **ONE).apply(trained, run)
    assert_comes_back(quantized.network, tmp_path / "quantized")
    Export(use="export", kinds=("int8",)).apply(quantized, run)
    layers = stored(run.folder / "int8.onnx")
    assert f"{one}.0.weight" in " ".join(layers)
    assert len(in_tflite(run.folder / "int8.tflite")) == len(layers)
    assert f"{one}.1.weight" in " ".join(layers)


def test_with_all_energy_nothing_is_factored_that_would_cost_more(small, run):
    product = Factorize(use="factorize", energy=1.0, batchnorm_images=0).apply(small, run)
    assert product.network.structure.factored == {}
    assert torch.equal(answers(product.network), answers(small.network))


def test_a_map_behind_two_layers_has_the_channels_of_the_one(small, run):
    product = Factorize(use="factorize", energy=0.7, batchnorm_images=0).apply(small, run)
    name = next(layer for layer in product.network.structure.factored if layer.startswith("parts."))
    block = ".".join(name.split(".")[:2])
    index = kept(channels(product.network, [block])[block], channels(small.network, [block])[block])
    assert index is not None
    assert index.tolist() == list(range(len(index)))


def test_two_of_four_are_zero_from_the_stage_to_the_files(small, run, tmp_path):
    notes = []
    run.progress.note = notes.append
    product = Sparsify(use="sparsify", keep=("head",), batchnorm_images=32).apply(small, run)
    names = product.metrics["layers"]
    assert len(names) > 9
    assert "head" not in names
    assert {*product.network.structure.held.values()} == {("zeros",)}
    assert NO_FASTER in notes
    assert product.metrics["deflated_after"] < 0.8 * product.metrics["deflated_before"]
    before = dict(small.network.module.named_modules())
    for name in names:
        assert torch.equal(product.network.module.get_submodule(name).weight != 0, mask(before[name].weight)), name
    assert all(fits(before[name]) for name in names)

    trained = Train(use="train", **ONE).apply(product, run)
    moved = 0
    for name in names:
        old, new = (part.network.module.get_submodule(name).weight for part in (product, trained))
        assert torch.equal(new == 0, old == 0), name
        moved += int(not torch.equal(new, old))
    assert moved == len(names)
    assert_comes_back(trained.network, tmp_path / "sparse")
    again = replace(trained, network=checkpoint.load(tmp_path / "sparse"))
    assert all(again.network.module.get_submodule(name).held == ("zeros",) for name in names)

    quantized = Quantize(use="quantize", calibration_images=32, **ONE).apply(again, run)
    for name in names:
        assert not (quantized.network.module.get_submodule(name).weight[~mask(before[name].weight)]).any(), name
    for name, integers in freeze(quantized.network.module).integers.items():
        if name in names:
            assert not integers.weight[~mask(before[name].weight)].any(), name
    assert_comes_back(quantized.network, tmp_path / "quantized")
    exported = Export(use="export", kinds=("int8",)).apply(quantized, run)
    weights = {name.removesuffix(".weight"): values for name, values in stored(run.folder / "int8.onnx").items()}
    for name in names:
        assert not weights[name][~mask(before[name].weight).numpy()].any(), name
    for file, facts in exported.metrics["files"].items():
        content = (run.folder / file).read_bytes()
        assert facts["deflated_bytes"] == len(zlib.compress(content, 9))
        assert facts["size_bytes"] == len(content)
    with pytest.raises(ModelError, match="put prune before sparsify"):
        Prune(use="prune", goal={"macs": 0.7}).apply(product, run)


def test_shared_values_stay_shared_from_the_stage_to_the_files(small, run, tmp_path):
    notes = []
    run.progress.note = notes.append
    product = Cluster(use="cluster", clusters=16, least_weights=128, batchnorm_images=32).apply(small, run)
    names = product.metrics["layers"]
    assert SHARED in notes
    assert product.metrics["deflated_after"] < 0.5 * product.metrics["deflated_before"]
    codes = {}
    for name in names:
        values, codes[name] = product.network.module.get_submodule(name).weight.unique(return_inverse=True)
        assert len(values) <= 16
    trained = Train(use="train", **ONE).apply(product, run)
    for name in names:
        old, new = (part.network.module.get_submodule(name).weight for part in (product, trained))
        assert not torch.equal(new, old)
        assert len(new.unique()) == len(old.unique())
        assert all(len(new[codes[name] == code].unique()) == 1 for code in codes[name].unique()), name
    assert_comes_back(trained.network, tmp_path / "clustered")


@pytest.mark.slow
def test_int8_files_have_as_many_values_in_each_output_channel_at_most(small, run, tmp_path):
    trained = Cluster(use="cluster", clusters=16, least_weights=128, batchnorm_images=32).apply(small, run)
    names = trained.metrics["layers"]
    quantized = Quantize(use="quantize", calibration_images=32, **ONE).apply(trained, run)
    assert_comes_back(quantized.network, tmp_path / "quantized")
    Export(use="export", kinds=("int8",)).apply(quantized, run)
    weights = {name.removesuffix(".weight"): values for name, values in stored(run.folder / "int8.onnx").items()}
    assert {*names} <= weights.keys()
    for name in names:  # folded BatchNorm scales each output channel by itself
        assert max(len(np.unique(row)) for row in weights[name].reshape(len(weights[name]), -1)) <= 16, name


def test_zeros_stay_zero_where_values_are_shared(small, run):
    sparse = Sparsify(use="sparsify", batchnorm_images=0).apply(small, run)
    product = Cluster(use="cluster", clusters=16, least_weights=1, batchnorm_images=0).apply(sparse, run)
    trained = Train(use="train", **ONE).apply(product, run)
    for name in sparse.metrics["layers"]:
        old, new = (part.network.module.get_submodule(name).weight for part in (sparse, trained))
        assert torch.equal(new == 0, old == 0), name
        assert len(new.unique()) <= 17
        assert trained.network.structure.held[name] == ("zeros", "values")
    with pytest.raises(ModelError, match="put sparsify before cluster"):
        Sparsify(use="sparsify").apply(product, run)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (["factorize", "prune"], "channels cannot be taken out of layers that were factored already; move it before"),
        (["sparsify", "prune"], "taken out of layers that were made sparse already"),
        (["cluster", "factorize"], "that were clustered already; move it before cluster"),
        (["cluster", "sparsify"], "since they were clustered"),
        (["quantize", "factorize"], "the network is quantized already; move it before quantize"),
        (["quantize", "sparsify"], "the network is quantized already"),
        (["quantize", "cluster"], "the network is quantized already"),
        (["prune", "factorize", "sparsify", "cluster", "quantize"], ""),
    ],
)
def test_an_order_that_cannot_work_is_refused_before_anything_runs(stages, said):
    mistakes = order_mistakes([{"use": use} for use in stages])
    assert [said in text for _, text in mistakes] == ([True] if said else [])


@pytest.mark.parametrize("stage", [Factorize(use="factorize"), Sparsify(use="sparsify"), Cluster(use="cluster")])
def test_a_pattern_that_matches_nothing_is_refused_at_once(stage, small, run):
    with pytest.raises(ModelError, match="`keep: nothing` matches no"):
        stage.model_copy(update={"keep": ("nothing",)}).check(small.network.module, run.data.preprocess)
    with pytest.raises(ModelError):
        stage.check(torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3)), run.data.preprocess)
