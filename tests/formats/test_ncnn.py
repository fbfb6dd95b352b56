"""ncnn files against torch, in ncnn itself.

`pip install 'compress[ncnn]'`, then `pytest -m ncnn`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import SmallNet, randomized
from networks import DENSE, NETWORKS, images_of, settle, size_of
from torch import nn

from compress.errors import ModelError, TargetError
from compress.formats import ncnn as format_ncnn
from compress.formats.ncnn import read_metadata, to_ncnn
from compress.formats.onnx import float_onnx
from compress.formats.weight_only import float16_weights, int8_weights
from compress.product import Product
from compress.progress import Silent
from compress.pruning import MacGoal, Pruning, prune_network
from compress.stages.benchmark import Benchmark
from compress.stages.export import NCNN_ONLY, Export, to_onnx
from compress.stages.quantize import Quantize
from compress.stages.verify import Verify
from compress.targets import open_model
from compress.verification import verify_files

pytestmark = [
    pytest.mark.ncnn,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in format_ncnn.PACKAGES), reason="ncnn is not installed"
    ),
]

CLOSE = 1e-3
"""Of the largest output: what `verify` allows. Measured: 2e-4 for MobileNetV2 of random weights, 1e-5 for most."""


class Told(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def written(tmp_path, content, name="float.ncnn"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def close(answer, expected):
    assert answer.shape == expected.shape
    assert expected.std() > 0.01 * np.abs(expected).max(), "a constant would prove nothing"
    assert np.abs(answer - expected).max() <= CLOSE * np.abs(expected).max()


def unpacked(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "shufflenet_v2", "mobilenet_v3_small", "vit", "ghostnet"])
def test_a_network_computes_what_torch_does(name, tmp_path):
    torch.manual_seed(0)
    size = size_of(name)
    images = images_of(8, size)
    module = settle(NETWORKS[name](7), images)
    path = written(tmp_path, to_ncnn(float_onnx(module, size, {}), {}))
    with torch.inference_mode():
        close(open_model(path).predict(images.numpy()), module(images).numpy())


def test_a_map_of_classes_keeps_its_shape(tmp_path):
    torch.manual_seed(0)
    module = DENSE["unet_bilinear"](7).eval()
    images = images_of(2, size_of("unet_bilinear"))
    path = written(tmp_path, to_ncnn(float_onnx(module, images.shape[-1], {}), {}))
    with torch.inference_mode():
        close(open_model(path).predict(images.numpy()), module(images).numpy())


def test_a_pruned_network(product, run, tmp_path):
    pruned = prune_network(product.network, MacGoal(macs=0.5), Pruning(round_to=2, batchnorm_images=0), run=run)
    content = to_ncnn(to_onnx(pruned, {}), {})
    assert len(content) < 0.8 * len(to_ncnn(to_onnx(product.network, {}), {}))
    images = run.data.splits["evaluation"][0]
    with torch.inference_mode():
        close(open_model(written(tmp_path, content)).predict(images.numpy()), pruned.module(images).numpy())


def test_equal_networks_give_equal_bytes_and_any_program_of_ncnn_can_read_them(tmp_path):
    import ncnn

    model = float_onnx(randomized(SmallNet()), 16, {})
    content = to_ncnn(model, {"compress.kind": "float", "compress.labels": '["ä"]'})
    assert content == to_ncnn(model, {"compress.kind": "float", "compress.labels": '["ä"]'})
    assert read_metadata(content) == {"compress.kind": "float", "compress.labels": '["ä"]'}
    parts = unpacked(content)
    assert list(parts) == ["network.param", "network.bin", "compress.json"]
    about = json.loads(parts["compress.json"])
    assert about["input"] == {"name": "in0", "shape": [1, 3, 16, 16]}
    assert about["output"] == {"name": "out0", "shape": [1, 5]}
    for name, part in parts.items():
        (tmp_path / name).write_bytes(part)
    net = ncnn.Net()
    assert net.load_param(str(tmp_path / "network.param")) == 0
    assert net.load_model(str(tmp_path / "network.bin")) == 0
    assert list(net.input_names()) == ["in0"]
    assert list(net.output_names()) == ["out0"]


@pytest.mark.parametrize("make", [float16_weights, int8_weights])
def test_numbers_that_ncnn_cannot_hold_are_refused(make):
    with pytest.raises(ModelError, match="as they were trained"):
        to_ncnn(make(float_onnx(randomized(SmallNet()), 16, {})), {})


def test_an_int8_network_is_refused(exported):
    with pytest.raises(ModelError, match="as they were trained"):
        to_ncnn(onnx.load(exported.files["int8.onnx"]), {})


def test_an_operator_without_a_counterpart_is_named():
    torch.manual_seed(0)
    module = NETWORKS["swin"](7).eval()
    with pytest.raises(ModelError, match=r"ncnn has no operator for Tensor\.reshape"):
        to_ncnn(float_onnx(module, size_of("swin"), {}), {})


def test_what_is_translated_wrongly_without_a_word_is_refused():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(approximate="tanh"), nn.Conv2d(8, 5, 3)).eval()
    with pytest.raises(ModelError, match="the translation computes something else"):
        to_ncnn(float_onnx(module, 8, {}), {})


def test_an_absent_package_gives_the_install_line(product, run, monkeypatch):
    monkeypatch.setattr(format_ncnn, "PACKAGES", ("ncnn", "a_package_that_nobody_has"))
    wanted = "a_package_that_nobody_has not installed; python -m pip install 'compress[ncnn]'"
    network = product.network
    with pytest.raises(ModelError) as refused:
        Export(use="export", formats=("onnx", "ncnn")).check(network.module, network.structure.preprocess)
    assert wanted in str(refused.value)
    Export(use="export", formats=("onnx",)).check(network.module, network.structure.preprocess)


def damaged(parts, name, content):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for key, part in {**parts, name: content}.items():
            archive.writestr(key, part)
    return stream.getvalue()


def test_a_damaged_file_is_an_error_of_one_line(tmp_path):
    content = to_ncnn(float_onnx(randomized(SmallNet()), 16, {}), {})
    parts = unpacked(content)
    param = parts["network.param"]
    assert b"Convolution" in param
    for name, part, problem in (
        ("network.bin", parts["network.bin"][: len(parts["network.bin"]) // 2], "damaged"),
        ("network.param", b"hello", "damaged"),
        ("network.param", param.replace(b"\nConvolution ", b"\nConvulsion ", 1), "has no layer Convulsion"),
        ("compress.json", b"{}", "is no ncnn file of compress"),
    ):
        with pytest.raises(TargetError, match=problem) as refused:
            open_model(written(tmp_path, damaged(parts, name, part)))
        assert "\n" not in str(refused.value)
    with pytest.raises(TargetError, match="is no ncnn file of compress"):
        open_model(written(tmp_path, content[: len(content) // 2]))


@pytest.fixture
def three_formats(product, run):
    """parent, float and int8 in all formats; ncnn for the first two."""
    run = replace(run, progress=Told())
    pruned = Product(product.network, parent=product.network)
    small = prune_network(product.network, MacGoal(macs=0.6), Pruning(round_to=2, batchnorm_images=0), run=run)
    quantized = Quantize(use="quantize", epochs=0, calibration_images=64).apply(replace(pruned, network=small), run)
    return Export(use="export", formats=("onnx", "tflite", "ncnn")).apply(quantized, run), run


def test_the_stages_write_verify_and_time_ncnn_files(three_formats):
    product, run = three_formats
    kinds = {suffix: {n.split(".")[0] for n in product.files if n.endswith(suffix)} for suffix in ("onnx", "ncnn")}
    assert kinds == {"onnx": {"parent", "float", "int8"}, "ncnn": {"parent", "float"}}
    assert run.progress.notes.count(NCNN_ONLY) == 1
    assert product.metrics["files"]["float.ncnn"]["format"] == "ncnn"

    verified = Verify(use="verify", threads=1).verify(product, run.data, run.progress)
    assert verified.passed, verified.reason
    pairs = {(pair["a"], pair["b"]) for pair in verified.agreement}
    assert {("torch float", "float.ncnn"), ("float.onnx", "float.ncnn"), ("torch parent", "parent.ncnn")} <= pairs
    assert verified.files["float.ncnn"]["runtime"] == "ncnn"

    timed = Benchmark(use="benchmark", runtimes=("ncnn",), rounds=1, runs=3, warmup_s=0).apply(product, run)
    assert {(row["file"], row["runtime"]) for row in timed.metrics["rows"]} == {
        ("parent.ncnn", "ncnn"),
        ("float.ncnn", "ncnn"),
    }
    assert all(row["p50_ms"] > 0 for row in timed.metrics["rows"])


def test_a_file_with_other_weights_fails(three_formats):
    product, run = three_formats
    path = product.files["float.ncnn"]
    parts = unpacked(path.read_bytes())
    weights = np.frombuffer(parts["network.bin"], np.float32).copy()
    weights[-5:] += 1.0  # the last layer's biases
    path.write_bytes(damaged(parts, "network.bin", weights.tobytes()))
    verified = Verify(use="verify", threads=1).verify(product, run.data, run.progress)
    assert not verified.passed
    assert "float.ncnn" in verified.reason


def test_files_are_compared_without_a_product_too(three_formats):
    product, run = three_formats
    found = verify_files([product.files["float.onnx"], product.files["float.ncnn"]], limit=4, progress=run.progress)
    assert found.passed, found.reason
    with pytest.raises(ModelError, match="nothing to compare it with"):
        verify_files([product.files["float.ncnn"]], limit=4, progress=run.progress)
