"""Whole networks against litert-torch, an independent way from PyTorch to TFLite.

`pip install litert-torch==0.10.0` (2.2 GB) into an environment of its own, then `pytest -m litert_torch`.
"""

import collections
import contextlib
import copy
import functools
import importlib.util
import io
import warnings

import networks
import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from torch import nn
from torch.nn.utils import parametrize

from compress.formats.onnx import float_onnx, int8_onnx
from compress.formats.tflite import to_tflite
from compress.formats.tflite_file import unpack
from compress.product import Batch, Preprocess
from compress.quantization import Grid, Quantization, calibrate, fold_batchnorm, freeze, prepare

pytestmark = [
    pytest.mark.litert_torch,
    pytest.mark.skipif(importlib.util.find_spec("litert_torch") is None, reason="litert-torch is not installed"),
]

OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")

SAME_KERNELS = ("mobilenet_v2", "resnet18", "regnet_y")
OTHER_KERNELS = ("mobilenet_v3_small", "vit", "unet_nearest")
"""They move a value to another grid by QUANTIZE and take int8 kernels where we compute in float."""
FLOAT = ("unet_transposed", "densenet", "shufflenet_v2", "convnext", "ghostnet", "vgg_bn")


def settled(name):
    torch.manual_seed(0)
    return networks.settle(networks.NETWORKS[name](7), networks.images_of(32, networks.size_of(name)))


@functools.cache
def frozen(name):
    size = networks.size_of(name)
    preprocess = Preprocess(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=1.0)
    graph = prepare(settled(name), Quantization(), preprocess)
    labels = torch.zeros(16, dtype=torch.long)
    batches = [Batch(images, labels) for images in networks.images_of(32, size).split(16)]
    calibrate(graph, batches, torch.device("cpu"))
    return freeze(graph)


def theirs(module, name, **how):
    """What litert-torch makes of the module, as a file with NHWC input."""
    size = networks.size_of(name)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        import litert_torch
        from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
        from litert_torch.quantize.quant_config import QuantConfig

        if how.pop("int8", False):
            # The graph is quantized already: this only lets the converter choose int8 kernels.
            quantizer = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
            how["quant_config"] = QuantConfig(pt2e_quantizer=quantizer)
        nhwc = litert_torch.to_channel_last_io(module, args=[0]).eval()
        return litert_torch.convert(nhwc, (torch.zeros(1, size, size, 3),), **how).model_content()


class Signed(nn.Module):
    """A grid as int8."""

    def __init__(self, grid):
        super().__init__()
        self.grid = (grid.scale, grid.zero_point - 128, -128, 127, torch.int8)

    def forward(self, x):
        ops = torch.ops.quantized_decomposed
        return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *self.grid), *self.grid)


class Weights(nn.Module):
    """Weights on their grids: not only snapped, but said to be integers."""

    def __init__(self, integers):
        super().__init__()
        self.register_buffer("scale", integers.weight_scale)
        self.register_buffer("zero_point", torch.zeros(len(integers.weight_scale), dtype=torch.int64))
        self.axis = integers.axis

    def forward(self, weight):
        ops = torch.ops.quantized_decomposed
        grid = (self.scale, self.zero_point, self.axis, -127, 127, torch.int8)
        return ops.dequantize_per_channel(ops.quantize_per_channel(weight, *grid), *grid)


def signed(network):
    """The frozen network with the integers of TFLite, as a module that litert-torch can read."""
    module = copy.deepcopy(network.module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Grid):
            module.set_submodule(name, Signed(layer))
    for name, integers in network.integers.items():
        parametrize.register_parametrization(module.get_submodule(name), "weight", Weights(integers), unsafe=True)
    return module


def operators(data):
    """How many of each kind the file has."""
    model = unpack(data)
    codes = [OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    return collections.Counter(codes[operator.opcodeIndex] for operator in model.subgraphs[0].operators)


def layers(data):
    """Of each layer with weights: kind, shape, weights, their scales and the bias, as the file's bytes; sorted."""
    model = unpack(data)
    graph = model.subgraphs[0]
    codes = [OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    found = []
    for operator in graph.operators:
        kind = codes[operator.opcodeIndex]
        if kind in WEIGHTED:
            bias = graph.tensors[operator.inputs[-1]]
            weight = graph.tensors[operator.inputs[1]]
            assert weight.type == schema.TensorType.INT8
            assert bias.type == schema.TensorType.INT32
            scales = np.asarray(weight.quantization.scale, np.float32).tobytes()
            contents = (bytes(model.buffers[tensor.buffer].data) for tensor in (weight, bias))
            found.append((kind, tuple(weight.shape), scales, *contents))
    return sorted(found)


def grids(data):
    """Scale and zero point of all int8 tensors that are not weights."""
    model = unpack(data)
    return {
        (np.float32(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0]))
        for tensor in model.subgraphs[0].tensors
        if tensor.type == schema.TensorType.INT8 and model.buffers[tensor.buffer].data is None
    }


def outputs(data, images_NCHW):
    """The file's own numbers, int8 where it ends in int8."""
    interpreter = Interpreter(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    rows = []
    for image in images_NCHW.permute(0, 2, 3, 1).numpy():
        if given["dtype"] == np.int8:
            scale, zero_point = given["quantization"]
            image = np.clip(np.rint(image / np.float32(scale)) + zero_point, -128, 127).astype(np.int8)
        interpreter.set_tensor(given["index"], image[None])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(made["index"]).copy())
    return np.concatenate(rows)


@pytest.mark.parametrize("name", [*SAME_KERNELS, *OTHER_KERNELS, *FLOAT])
def test_float_files_compute_the_same_with_no_more_transposes(name):
    module, size = settled(name), networks.size_of(name)
    images = networks.images_of(4, size, seed=1)
    ours, other = to_tflite(float_onnx(fold_batchnorm(module), size, {}), {}), theirs(module, name)
    np.testing.assert_allclose(outputs(ours, images), outputs(other, images), rtol=1e-3, atol=1e-4)
    assert operators(ours)["TRANSPOSE"] <= operators(other)["TRANSPOSE"]


@pytest.mark.parametrize("name", [*SAME_KERNELS, *OTHER_KERNELS])
def test_int8_files_hold_the_same_weights_biases_and_grids(name):
    size = networks.size_of(name)
    ours, other = to_tflite(int8_onnx(frozen(name), size, {}), {}), theirs(signed(frozen(name)), name, int8=True)
    assert len(layers(ours)) == len(frozen(name).integers)
    assert layers(ours) == layers(other)
    assert grids(ours) == grids(other)
    assert operators(ours)["TRANSPOSE"] <= operators(other)["TRANSPOSE"]
    if name in SAME_KERNELS:
        images = networks.images_of(8, size, seed=1)
        assert not {"QUANTIZE", "DEQUANTIZE"} & operators(other).keys()
        np.testing.assert_array_equal(outputs(ours, images), outputs(other, images))
