import collections
import io

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import PREPROCESS, SmallNet, Stripes, randomized
from onnx import numpy_helper
from torch import nn

from compress.errors import ModelError
from compress.formats.metadata import metadata
from compress.formats.onnx import float_onnx, int8_onnx
from compress.formats.tflite import read_metadata, to_tflite
from compress.quantization import Quantization, calibrate, fold_batchnorm, freeze, prepare, run_integers
from compress.targets import open_model

ABOUT = metadata(
    kind="int8", layout="NCHW", preprocess=PREPROCESS, labels=["a", "b", "c", "d", "é"], recipe_hash="f" * 64
)


@pytest.fixture(scope="module")
def frozen():
    graph = prepare(randomized(SmallNet()), Quantization(), PREPROCESS)
    calibrate(graph, Stripes().batches("train", batch_size=16), torch.device("cpu"))
    return freeze(graph)


@pytest.fixture(scope="module")
def model(frozen):
    return int8_onnx(frozen, 16, ABOUT)


def test_integers_and_scales_are_the_frozen_ones(frozen, model):
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert frozen.integers
    for layer, integers in frozen.integers.items():
        assert stored[f"{layer}.weight"].dtype == np.int8
        assert (stored[f"{layer}.weight"] == integers.weight.numpy()).all()
        assert (stored[f"{layer}.weight_scale"] == integers.weight_scale.numpy()).all()
        assert stored[f"{layer}.bias"].dtype == np.int32
        assert (stored[f"{layer}.bias"] == integers.bias.numpy()).all()
        assert (stored[f"{layer}.bias_scale"] == integers.bias_scale.numpy()).all()


def test_every_layer_has_a_bias_even_if_it_is_zero():
    """The exporter drops biases that are all zeros; integer kernels want one."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(8, 5, bias=False)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    graph = prepare(Plain(), Quantization(), PREPROCESS)
    calibrate(graph, Stripes().batches("train", batch_size=16), torch.device("cpu"))
    made = int8_onnx(freeze(graph), 16, {})
    assert {node.op_type: len(node.input) for node in made.graph.node if node.op_type in ("Conv", "Gemm")} == {
        "Conv": 3,
        "Gemm": 3,
    }


def test_onnxruntime_fuses_every_layer_to_an_integer_kernel(model, tmp_path):
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] == 4
    assert kinds["QLinearAdd"] == 1
    assert kinds["QGemm"] == 1
    assert kinds["QuantizeLinear"] == kinds["DequantizeLinear"] == 1
    assert not {"Conv", "Gemm", "MatMul", "Add", "FusedConv", "FusedGemm", "Relu", "Clip", "MaxPool"} & kinds.keys()


def test_files_agree_with_the_frozen_network_to_one_step(frozen, model, tmp_path):
    images = Stripes().splits["evaluation"][0]
    expected = frozen.steps(run_integers(frozen, images).logits_NK).numpy()
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "m.tflite").write_bytes(to_tflite(model, ABOUT))
    for name in ("m.onnx", "m.tflite"):
        logits = open_model(tmp_path / name).predict(images.numpy())
        difference = np.abs(frozen.steps(torch.from_numpy(logits)).numpy() - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_float_files_agree_with_torch(tmp_path):
    module = randomized(SmallNet())
    images = Stripes().splits["evaluation"][0]
    made = float_onnx(fold_batchnorm(module), 16, ABOUT)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    (tmp_path / "m.tflite").write_bytes(to_tflite(made, ABOUT))
    for name in ("m.onnx", "m.tflite"):
        logits = open_model(tmp_path / name).predict(images.numpy())
        np.testing.assert_allclose(logits, module(images).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_metadata_travels_in_both_formats_and_no_path_of_this_machine_does(model):
    assert {entry.key: entry.value for entry in model.metadata_props} == ABOUT
    assert read_metadata(to_tflite(model, ABOUT)) == ABOUT
    content = model.SerializeToString()
    assert b"/site-packages/" not in content
    assert b"conftest" not in content


def test_names_are_those_of_the_layers(frozen, model):
    quantized = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert quantized == {grid.layer for grid in frozen.grids()}
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["image", "logits"]
    assert onnx.load(io.BytesIO(model.SerializeToString())).opset_import[0].version == 18


def test_a_network_torch_cannot_export_is_refused_in_one_line():
    class Strange(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    with pytest.raises(ModelError, match=r"Strange: torch.onnx cannot export it \(.*\)"):
        float_onnx(Strange(), 16, {})
