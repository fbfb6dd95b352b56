"""Every kind of file from one product: what it is made from, what it computes, and what is never written."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from pydantic import ValidationError
from torch import nn

from compress.errors import ModelError
from compress.formats.tflite import read_metadata
from compress.product import Network, Product
from compress.progress import Silent
from compress.quantization import fold_batchnorm, freeze, run_integers
from compress.quantization.precision import precision
from compress.stages.export import Export, by_kind, compressed, reference
from compress.stages.quantize import Quantize
from compress.targets import open_model

KINDS = ("parent", "float", "int8", "float16", "int8_weights")
FORMATS = ("onnx", "tflite")


def quantized(product, run, **settings):
    return Quantize(use="quantize", epochs=0, calibration_images=64, **settings).apply(product, run)


@pytest.fixture
def pruned(product):
    """As after `prune`: another float network than the parent."""
    return Product(Network(randomized(SmallNet(), seed=1), product.network.structure), parent=product.network)


class Told(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def logits(path, images):
    return open_model(path).predict(images.numpy())


def test_all_kinds_open_in_their_runtimes_and_compute_what_torch_does(pruned, run):
    product = quantized(pruned, run)
    exported = Export(use="export", kinds=KINDS).apply(product, run)
    assert set(exported.files) == {f"{kind}.{suffix}" for kind in KINDS for suffix in FORMATS}
    images = run.data.splits["evaluation"][0]
    parent, net = (fold_batchnorm(network.module) for network in (pruned.parent, pruned.network))
    frozen = freeze(product.network.module)
    expected = {
        "parent": parent(images),
        "float": net(images),
        "float16": by_hand(net, lambda weight, axis: weight.half().float())(images),
        "int8_weights": by_hand(net, in_steps)(images),
        "int8": run_integers(frozen, images).logits_NK,
    }
    for name, path in exported.files.items():
        kind, found = path.stem, logits(path, images)
        wanted = expected[kind].detach().numpy()
        if kind == "int8":
            assert np.abs(found - wanted).max() <= 1.01 * frozen.output.scale, name
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
        others = [value.detach().numpy() for other, value in expected.items() if other != kind]
        assert all(np.abs(found - other).max() > 1e-4 for other in others), f"{name} is another network's file"


def by_hand(network, rounding):
    """A copy with each layer's weight of 256 values or more rounded; SmallNet has output channels first."""
    copied = fold_batchnorm(network)
    with torch.no_grad():
        for layer in copied.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight.numel() >= 256:
                layer.weight.copy_(rounding(layer.weight, 0))
    return copied


def in_steps(weight, axis):
    scale = weight.flatten(1).abs().amax(1).div(127).view(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / scale) * scale


def test_the_reference_of_a_file_is_the_network_so_rounded(pruned):
    net = fold_batchnorm(pruned.network.module)
    for kind, rounding in (("float16", lambda weight, axis: weight.half().float()), ("int8_weights", in_steps)):
        made, expected = reference(pruned.network, kind).state_dict(), by_hand(net, rounding).state_dict()
        assert all((made[name] == value).all() for name, value in expected.items())
    assert reference(pruned.network, "float") is pruned.network.module


def test_weights_are_stored_in_16_and_8_bits_in_both_formats(pruned, run):
    files = Export(use="export", kinds=("float", "float16", "int8_weights")).apply(pruned, run).files
    for suffix in FORMATS:
        size = {kind: files[f"{kind}.{suffix}"].stat().st_size for kind in ("float", "float16", "int8_weights")}
        # SmallNet's large weights: stem 432, point 256, down 3456, head 480.
        assert size["float"] - size["float16"] > 2 * 4624 - 1500
        assert size["float16"] - size["int8_weights"] > 4624 - 1500


def test_files_say_what_they_are(pruned, run):
    exported = Export(use="export", kinds=KINDS[3:]).apply(pruned, run)
    for name, path in exported.files.items():
        if path.suffix == ".onnx":
            texts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        else:
            texts = read_metadata(path.read_bytes())
        assert texts["compress.kind"] == path.stem == exported.metrics["files"][name]["kind"]
        layout = json.loads(texts["compress.preprocess"])["layout"]
        assert layout == ("NCHW" if path.suffix == ".onnx" else "NHWC")
        assert json.loads(texts["compress.labels"]) == list(run.data.labels)


def test_without_kinds_there_is_what_the_stages_made(product, pruned, run):
    export = Export(use="export", formats=("onnx",))
    assert list(export.apply(product, run).files) == ["parent.onnx"]
    assert list(export.apply(pruned, run).files) == ["parent.onnx", "float.onnx"]
    assert list(export.apply(quantized(pruned, run), run).files) == ["parent.onnx", "float.onnx", "int8.onnx"]
    assert list(export.apply(quantized(product, run), run).files) == ["parent.onnx", "int8.onnx"]


def test_smaller_weights_are_those_of_the_parent_where_nothing_was_pruned(product, run):
    files = Export(use="export", formats=("onnx",), kinds=("int8_weights",)).apply(quantized(product, run), run).files
    images = run.data.splits["evaluation"][0]
    expected = reference(product.network, "int8_weights")(images).detach().numpy()
    assert list(files) == ["int8_weights.onnx"]
    np.testing.assert_allclose(logits(files["int8_weights.onnx"], images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "name"), [({"weight_bits": 4}, "W4A8"), ({"weight_bits": 2, "activation_bits": 4}, "W2A4")]
)
def test_what_no_runtime_executes_is_never_exported_as_int8(pruned, run, bits, name):
    told = Told()
    run = replace(run, progress=told, stage="05-export")
    product = quantized(pruned, run, **bits)
    assert precision(product.network) == f"{name} (simulated)"
    assert set(by_kind(product)) == {"parent", "float"}
    files = Export(use="export", formats=("onnx",)).apply(product, run).files
    assert list(files) == ["parent.onnx", "float.onnx"]
    assert told.notes == [
        f"{name} is simulated in training and no runtime here executes it, so no int8 file is written"
    ]
    with pytest.raises(ModelError, match=f"^stage 05-export: there is no int8 network; {name} is simulated"):
        Export(use="export", kinds=("parent", "int8")).apply(product, run)


def test_a_kind_that_the_product_lacks_is_refused_in_one_line(product, run):
    for kind in ("int8", "float"):
        with pytest.raises(ModelError, match=f"^stage export: there is no {kind} network; leave {kind} out$"):
            Export(use="export", kinds=(kind,)).apply(product, run)
    for kinds in ((), ("fp16",)):
        with pytest.raises(ValidationError):
            Export(use="export", kinds=kinds)


def test_precision_counts_the_layers_that_stay_float(product, run):
    assert precision(product.network) == "float32"
    assert precision(quantized(product, run).network) == "int8 (fake quant)"
    one, two = (quantized(product, run, keep_float=names).network for names in (("head",), ("head", "re:do")))
    assert precision(one) == "int8 + 1 layer float32 (fake quant)"
    assert precision(two) == "int8 + 2 layers float32 (fake quant)"
    assert compressed(quantized(product, run)) is product.network


def test_an_operator_without_a_counterpart_is_found_before_training(monkeypatch):
    """`check` writes every kind that is asked for, from the network as it is."""
    from compress.stages import export

    written = []
    monkeypatch.setattr(export, "to_tflite", lambda model, about: written.append(model.ByteSize()))
    Export(use="export", kinds=("parent", "float16", "int8_weights")).check(SmallNet().eval(), PREPROCESS)
    assert len(written) == 3
    assert written == sorted(written, reverse=True)
    written.clear()
    Export(use="export", formats=("onnx",), kinds=("float16",)).check(SmallNet().eval(), PREPROCESS)
    assert written == []
