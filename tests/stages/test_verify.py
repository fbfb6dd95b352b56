import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from compress.gate import answers
from compress.product import Network, Product
from compress.quantization import freeze
from compress.stages.export import Export
from compress.stages.quantize import Quantize
from compress.stages.verify import Verify
from compress.targets import open_model
from compress.verification.differences import compare_floats, compare_steps

EXPORT, VERIFY = Export(use="export"), Verify(use="verify")


@pytest.fixture
def exported(product, run):
    quantized = Quantize(use="quantize", epochs=0, calibration_images=64).apply(product, run)
    return EXPORT.apply(quantized, run)


def change(path, name, values):
    """Writes `values(old)` in the place of one constant of an ONNX file."""
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    old = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(values(old).astype(old.dtype), name))
    onnx.save(model, path)


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


def test_the_class_of_every_image_and_a_sample_of_the_images_are_kept(exported, run):
    verified = VERIFY.apply(exported, run)
    kept = answers.from_dict(json.loads((run.folder / answers.NAME).read_text()))
    images, labels = (array.numpy() for array in run.data.splits["evaluation"])
    assert np.array_equal(kept.labels_N, labels)
    assert set(kept.top1) == set(exported.files)
    for name, path in exported.files.items():
        assert np.array_equal(kept.top1[name], open_model(path).predict(images).argmax(1))
        assert (kept.top1[name] == labels).mean() == pytest.approx(verified.metrics["files"][name]["accuracy"])
    sample = np.load(run.folder / answers.SAMPLE)
    assert np.array_equal(sample, images[list(kept.sample)])
    assert len(sample) == answers.SAMPLE_IMAGES


def test_stored_numbers_layers_and_sqnr_are_in_the_manifest(exported, run):
    metrics = VERIFY.apply(exported, run).metrics
    assert metrics["static"]["witnesses"] == ["frozen torch int8", "int8.onnx", "int8.tflite"]
    assert metrics["static"]["layers"] == 5
    assert metrics["static"]["differing"] == 0
    assert [(c["a"], c["b"]) for c in metrics["layers"]] == [
        ("frozen torch int8", "int8.onnx"),
        ("frozen torch int8", "int8.tflite"),
    ]
    assert all(c["first_wrong"] is None and c["worst_alone_lsb"] <= 1 for c in metrics["layers"])
    worst = metrics["sqnr"]["worst"]
    assert len(worst) == 3
    costs = {layer["layer"]: layer["output_db"] for layer in metrics["sqnr"]["layers"]}
    assert worst == sorted(costs, key=costs.get)[:3]


@pytest.mark.parametrize("layer", ["depthwise", "down"])
def test_an_altered_file_fails_and_the_first_wrong_layer_is_named(exported, run, layer):
    change(exported.files["int8.onnx"], f"{layer}.bias", lambda bias: bias + 40 * np.abs(bias).max())
    metrics = VERIFY.apply(exported, run).metrics
    assert metrics["verdict"] == "FAIL"
    assert metrics["reason"].startswith(f"int8.onnx: bias of layer {layer} channel 0 (and ")
    reasons = [pair["reason"] for pair in metrics["agreement"] if pair["verdict"] == "FAIL"]
    assert len(reasons) == 2  # against torch and against LiteRT; those two still agree
    assert all(f"first at layer {layer} (" in reason for reason in reasons)
    assert [c["first_wrong"] for c in metrics["layers"]] == [layer, None]
    named = {
        p["b"]: p["layers"][0]["layer"] for p in metrics["agreement"] if p["a"] == "frozen torch int8" and "layers" in p
    }
    assert named == {"int8.onnx": layer}


def test_a_small_lie_in_a_scale_fails_where_the_logits_do_not_show_it(exported, run):
    """One channel of one layer, by one part in a thousand."""
    change(
        exported.files["int8.onnx"],
        "point.weight_scale",
        lambda scale: scale * np.where(np.arange(len(scale)) == 2, 1.001, 1),
    )
    metrics = VERIFY.apply(exported, run).metrics
    assert all(pair["verdict"] == "PASS" for pair in metrics["agreement"])
    assert metrics["verdict"] == "FAIL"
    assert metrics["reason"].startswith("int8.onnx: weight scale of layer point channel 2 is ")


def test_a_float_file_that_differs_fails(exported, run):
    change(exported.files["parent.onnx"], "head.bias", lambda bias: bias + 1)
    metrics = VERIFY.apply(exported, run).metrics
    assert metrics["verdict"] == "FAIL"
    assert "torch parent and parent.onnx differ by" in metrics["reason"]
    assert "parent.onnx and parent.tflite differ by" in metrics["reason"]
    assert "torch parent and parent.tflite" not in metrics["reason"]


def test_a_freeze_that_computes_something_else_fails(exported, run, monkeypatch):
    """Files are copies of the frozen network, so only the trained one can tell."""
    from compress.verification import verify

    def broken(prepared):
        frozen = freeze(prepared)
        with torch.no_grad():
            frozen.integers["head"].bias.copy_(torch.tensor([0, 0, 0, 0, 2**30]))
        return frozen

    monkeypatch.setattr(verify, "freeze", broken)
    metrics = VERIFY.apply(exported, run).metrics
    assert "trained torch int8 and frozen torch int8 differ in the class of" in metrics["reason"]
    assert "bias of layer head" in metrics["reason"]


def test_a_limit_takes_fewer_images(exported, run):
    found = VERIFY.verify(exported, run.data, run.progress, limit=7)
    assert found.images == found.files["int8.onnx"]["images"] == 7
    assert found.passed


class FloatHead(nn.Module):
    """Its last layer can be kept float, and so can a hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = nn.functional.hardswish(self.first(x))
        x = torch.relu(self.second(x)).mean((2, 3))
        return self.head(x)


def test_float_logits_of_an_int8_network_have_an_lsb_of_their_own(product, run):
    torch.manual_seed(0)
    small = Product(Network(FloatHead().eval(), product.network.structure))
    quantized = Quantize(use="quantize", epochs=0, keep_float=("head",)).apply(small, run)
    assert freeze(quantized.network.module).output is None
    metrics = VERIFY.apply(EXPORT.apply(quantized, run), run).metrics
    assert metrics["verdict"] == "PASS", metrics["reason"]
    pair = next(p for p in metrics["agreement"] if (p["a"], p["b"]) == ("int8.onnx", "int8.tflite"))
    assert pair["max_lsb"] <= 1
    assert 0 < pair["lsb"] < 1
    change(run.folder / "int8.onnx", "head.bias", lambda bias: bias + np.float32(1))
    metrics = VERIFY.apply(replace(EXPORT.apply(quantized, run)), run).metrics
    assert metrics["verdict"] == "PASS"  # written anew
    change(run.folder / "int8.onnx", "head.bias", lambda bias: bias + np.float32(1))
    found = VERIFY.apply(
        replace(quantized, files={name: run.folder / name for name in ("int8.onnx", "int8.tflite")}), run
    ).metrics
    assert found["verdict"] == "FAIL"
    assert "frozen torch int8 and int8.onnx differ by" in found["reason"]


def test_weight_only_files_are_compared_as_floats_and_with_the_float_network(product, run):
    quantized = Quantize(use="quantize", epochs=0).apply(product, run)
    kinds = ("float16", "int8_weights", "int8")
    exported = Export(use="export", kinds=kinds).apply(quantized, run)
    metrics = VERIFY.apply(exported, run).metrics
    assert metrics["verdict"] == "PASS", metrics["reason"]
    for kind in ("float16", "int8_weights"):
        pairs = [pair for pair in metrics["agreement"] if pair["kind"] == kind]
        assert any(pair.get("max_relative", 1) < 1e-3 for pair in pairs)
        by_class = {pair["b"]: pair for pair in pairs if pair["a"] == "torch parent"}
        assert set(by_class) == {f"{kind}.onnx", f"{kind}.tflite"}
        assert all(pair["top1_agreement"] >= 0.98 and pair["sqnr_db"] > 20 for pair in by_class.values())


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
