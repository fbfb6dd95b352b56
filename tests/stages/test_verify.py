from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from compress.quantization import freeze
from compress.stages.export import Export
from compress.stages.quantize import Quantize
from compress.stages.verify import (
    Verify,
    compare_floats,
    compare_layers,
    compare_steps,
    onnx_layers,
    tflite_layers,
    torch_layers,
)

EXPORT, VERIFY = Export(use="export"), Verify(use="verify")


@pytest.fixture
def exported(product, run):
    quantized = Quantize(use="quantize", epochs=0, calibration_images=64).apply(product, run)
    return EXPORT.apply(quantized, run)


def test_quantize_with_no_epochs_is_calibration_alone(product, run):
    quantized = Quantize(use="quantize", epochs=0).apply(product, run)
    assert quantized.parent is product.network
    assert quantized.float_network is product.network
    assert quantized.metrics == {"history": [], "calibration_images": 64}
    assert quantized.network.structure.quantize == {"learn_activations": True}


def test_export_writes_what_there_is(product, exported, run):
    assert set(exported.files) == {"parent.onnx", "parent.tflite", "int8.onnx", "int8.tflite"}
    assert exported.metrics["files"]["int8.onnx"]["size_bytes"] == exported.files["int8.onnx"].stat().st_size
    plain = EXPORT.apply(product, run)
    assert set(plain.files) == {"parent.onnx", "parent.tflite"}


def test_runtimes_agree_and_accuracy_is_the_files_own(exported, run):
    metrics = VERIFY.apply(exported, run).metrics
    assert metrics["verdict"] == "PASS", metrics["reason"]
    assert {(pair["a"], pair["b"]) for pair in metrics["agreement"]} == {
        ("trained torch int8", "frozen torch int8"),
        ("torch parent", "parent.onnx"),
        ("torch parent", "parent.tflite"),
        ("frozen torch int8", "int8.onnx"),
        ("frozen torch int8", "int8.tflite"),
        ("int8.onnx", "int8.tflite"),
        ("parent.onnx", "parent.tflite"),
    }
    for name in exported.files:
        assert metrics["files"][name]["images"] == run.data.count("evaluation") == metrics["images"]
    labels = run.data.splits["evaluation"][1]
    images = run.data.splits["evaluation"][0]
    expected = (exported.parent.module(images).argmax(1) == labels).float().mean().item()
    assert metrics["files"]["parent.onnx"]["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("layer", ["depthwise", "down"])
def test_an_altered_file_fails_and_the_first_wrong_layer_is_named(exported, run, layer):
    path = exported.files["int8.onnx"]
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == f"{layer}.bias":
            moved = numpy_helper.to_array(tensor) + 40 * np.abs(numpy_helper.to_array(tensor)).max()
            tensor.CopyFrom(numpy_helper.from_array(moved.astype(np.int32), tensor.name))
    onnx.save(model, path)
    metrics = VERIFY.apply(exported, run).metrics
    assert metrics["verdict"] == "FAIL"
    reasons = [pair["reason"] for pair in metrics["agreement"] if pair["verdict"] == "FAIL"]
    assert len(reasons) == 2  # against torch and against LiteRT; those two still agree
    assert all(f"first at layer {layer} (" in reason for reason in reasons)


def test_a_float_file_that_differs_fails(exported, run):
    files = dict(exported.files)
    path = files["parent.onnx"]
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "head.bias":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, tensor.name))
    onnx.save(model, path)
    metrics = VERIFY.apply(replace(exported, files=files), run).metrics
    assert metrics["verdict"] == "FAIL"
    assert "torch parent and parent.onnx differ by" in metrics["reason"]
    assert "parent.onnx and parent.tflite differ by" in metrics["reason"]
    assert "torch parent and parent.tflite" not in metrics["reason"]


def test_a_freeze_that_computes_something_else_fails(exported, run, monkeypatch):
    """Files are copies of the frozen network, so only the trained one can tell."""
    from compress.stages import verify

    def broken(prepared):
        frozen = freeze(prepared)
        with torch.no_grad():
            frozen.integers["head"].bias.copy_(torch.tensor([0, 0, 0, 0, 2**30]))
        return frozen

    monkeypatch.setattr(verify, "freeze", broken)
    metrics = VERIFY.apply(exported, run).metrics
    assert "trained torch int8 and frozen torch int8 differ in the class of" in metrics["reason"]


def test_comparisons_against_hand_counts():
    a = np.array([[3, 5, -2], [7, 7, 0]])
    b = np.array([[3, 6, -2], [7, 9, 0]])
    pair = compare_steps("a", "b", a, b, tolerance_lsb=1)
    assert pair["logits"] == 6
    assert pair["differing"] == 2
    assert pair["max_lsb"] == 2
    assert pair["histogram"] == {"0": 4, "1": 1, "2": 1}
    assert pair["top1_agreement"] == 0.5
    assert pair["worst_image"] == 1
    assert (pair["verdict"], compare_steps("a", "b", a, b, 2)["verdict"]) == ("FAIL", "PASS")
    floats = compare_floats("a", "b", a.astype(float), b.astype(float), tolerance=0.3)
    assert floats["max_abs"] == 2
    assert floats["max_relative"] == pytest.approx(2 / 7)
    assert floats["verdict"] == "PASS"


def test_layers_are_compared_as_whole_numbers(exported, run):
    """All three readers give the same numbers for the same tensors, in one layout."""
    frozen = freeze(exported.network.module)
    image = run.data.splits["evaluation"][0][0].numpy()
    by_torch = torch_layers(frozen, image)
    by_onnx = onnx_layers(exported.files["int8.onnx"], frozen.grids(), image, run.folder)
    by_tflite = tflite_layers(exported.files["int8.tflite"], frozen.grids(), image, run.folder)
    assert list(by_torch) == list(by_onnx)
    assert len(by_tflite) >= 8
    for other in (by_onnx, by_tflite):
        found = compare_layers(by_torch, other)
        assert len(found) == len(other)
        assert max(layer["max_lsb"] for layer in found) <= 1
