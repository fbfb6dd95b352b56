"""The TFLite file against the ONNX it comes from, in the real runtimes: equal grids, equal numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import (
    F32,
    Net,
    check,
    check_float,
    few,
    lsb_apart,
    nhwc,
    ops_of,
    quantized,
    run_onnx,
    run_onnx_all,
    run_tflite,
    written_ops,
)

from compress.errors import ModelError
from compress.formats.tflite import read_metadata, to_tflite, with_outputs
from compress.formats.tflite_file import ALIGNMENT, unpack

# ---- layers with weights -----------------------------------------------------------------------------------


@few
@given(
    seed=st.integers(0, 999),
    height=st.integers(6, 13),
    width=st.integers(6, 13),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    kind=st.sampled_from(["plain", "grouped", "depthwise", "multiplied"]),
    after=st.sampled_from(["", "relu", "relu6"]),
    bias=st.booleans(),
)
def test_convolutions_agree(seed, height, width, kernel, stride, dilation, pads, kind, after, bias):
    group, outputs = {"plain": (1, 6), "grouped": (2, 6), "depthwise": (4, 4), "multiplied": (4, 8)}[kind]
    assume(height + pads[0] + pads[2] > (kernel[0] - 1) * dilation)
    assume(width + pads[1] + pads[3] > (kernel[1] - 1) * dilation)
    net = Net((1, 4, height, width), seed)
    settings = {"kernel": kernel, "pads": pads, "stride": stride, "dilation": dilation, "group": group, "bias": bias}
    x = net.conv("images", 4, outputs, **settings)
    check(net, getattr(net, after)(x) if after else x)


@pytest.mark.parametrize(
    ("size", "pads", "ops"),
    [
        (12, (0, 0, 1, 1), ["CONV_2D"]),  # SAME puts the odd pixel behind
        (12, (1, 1, 1, 1), ["PAD", "CONV_2D"]),
        (13, (1, 1, 1, 1), ["CONV_2D"]),
        (12, (0, 0, 0, 0), ["CONV_2D"]),
    ],
)
@pytest.mark.parametrize("group", [1, 3])
def test_stride_2_pads_with_same_only_where_same_is_meant(size, pads, ops, group):
    net = Net((2, 3, size, size))
    output = net.conv("images", 3, 3, pads=pads, stride=2, group=group)
    expected = [op.replace("CONV", "DEPTHWISE_CONV") if group > 1 else op for op in ops]
    assert ops_of(net, output) == (expected, expected)
    check(net, output)


@pytest.mark.parametrize("bare_pad", [True, False])
def test_a_pad_of_zeros_disappears_into_the_convolution(bare_pad):
    net = Net((1, 3, 12, 12))
    padded = net.op("Pad", "images", net.ints(0, 0, 0, 0, 0, 0, 1, 1))
    output = net.conv(padded, 3, 4, pads=(0, 0, 0, 0), stride=2)
    bare = (padded,) if bare_pad else ()
    assert ops_of(net, output, bare=bare) == (["CONV_2D"], ["CONV_2D"])
    check(net, output, bare=bare)


def test_a_pad_that_others_read_too_is_written():
    net = Net((1, 3, 6, 6))
    padded = net.op("Pad", "images", net.ints(0, 0, 1, 1, 0, 0, 1, 1))
    output = net.op("Add", padded, net.conv(padded, 3, 3))
    check(net, output)


@few
@given(seed=st.integers(0, 999), inputs=st.integers(1, 40), outputs=st.integers(4, 12), transposed=st.booleans())
def test_fully_connected_agrees(seed, inputs, outputs, transposed):
    net = Net((3, inputs), seed)
    if transposed:
        output = net.linear("images", inputs, outputs)
    else:
        output = net.op("Gemm", "images", net.weight(inputs, outputs), net.weight(outputs))
    assert ops_of(net, output) == (["FULLY_CONNECTED"], ["FULLY_CONNECTED"])
    check(net, output)


@pytest.mark.parametrize("order", ["product + bias", "bias + product", "no bias"])
def test_matmul_and_add_become_one_layer(order):
    net = Net((2, 7))
    product, bias = net.op("MatMul", "images", net.weight(7, 5)), net.weight(5)
    pair = {"product + bias": [product, bias], "bias + product": [bias, product]}
    output = net.relu(net.op("Add", *pair[order]) if order in pair else product)
    assert written_ops(to_tflite(net.model(output), {})) == ["FULLY_CONNECTED"]
    check_float(net, output)


def test_matmul_of_stored_weights_is_int8():
    net = Net((3, 7))
    output = net.op("MatMul", "images", net.weight(7, 5))
    assert ops_of(net, output)[1] == ["FULLY_CONNECTED"]
    check(net, output)


@pytest.mark.parametrize("layer", ["Conv", "Gemm", "Add"])
@pytest.mark.parametrize("after", ["relu", "relu6"])
def test_an_activation_that_the_grid_does_not_imply_is_fused(layer, after):
    net = Net((4, 8) if layer == "Gemm" else (2, 4, 6, 6))
    net_layers = {
        "Conv": lambda: net.op("Conv", "images", net.constant(net.random.normal(0, 2, (4, 4, 1, 1)).astype(F32))),
        "Gemm": lambda: net.op("Gemm", "images", net.constant(net.random.normal(0, 2, (6, 8)).astype(F32)), transB=1),
        "Add": lambda: net.op("Add", "images", net.op("Mul", "images", net.constant(np.full((), 4, F32)))),
    }
    output = getattr(net, after)(net_layers[layer]())
    wide = {output: (0.12, 128)}  # from -15.4 to 15.2
    assert not [op for op in ops_of(net, output, grids=wide)[1] if op.startswith("RELU")]
    check(net, output, grids=wide)


def test_an_activation_is_not_fused_where_others_read_its_input():
    net = Net((1, 4, 6, 6))
    x = net.conv("images", 4, 4)
    output = net.op("Add", net.relu(x), x)
    assert ops_of(net, output)[0] == ["CONV_2D", "RELU", "ADD"]
    check(net, output)


def test_an_activation_is_not_fused_where_an_output_shows_its_input():
    net = Net((1, 4, 6, 6))
    x = net.conv("images", 4, 4)
    model, images = net.model(net.relu(x)), net.images()
    model.graph.output.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, None))
    for expected, got in zip(run_onnx(model, images), run_tflite(to_tflite(model, {}), images), strict=True):
        np.testing.assert_allclose(got, nhwc(expected), rtol=1e-4, atol=1e-5)


def test_a_layer_without_a_grid_behind_it_computes_in_float():
    net = Net((1, 4, 6, 6))
    inner = net.conv("images", 4, 4, group=4)
    output = net.op("Sigmoid", inner)
    written = ["DEQUANTIZE", "DEQUANTIZE", "DEPTHWISE_CONV_2D", "LOGISTIC", "QUANTIZE"]  # of image and weights
    assert ops_of(net, output, bare=(inner,))[1] == written
    check(net, output, bare=(inner,))


# ---- the other operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("second", ["value", "per channel", "constant", "scalar"])
@pytest.mark.parametrize("after", ["", "relu", "relu6"])
def test_element_by_element(kind, second, after):
    net = Net((2, 4, 5, 6))
    first = net.conv("images", 4, 4)
    other = {
        "value": lambda: net.op("Sigmoid", net.conv("images", 4, 4)),
        "per channel": lambda: net.op("Sigmoid", net.op("GlobalAveragePool", "images")),
        "constant": lambda: net.constant(np.asarray([0.5, 1, 2, 3], F32).reshape(4, 1, 1)),
        "scalar": lambda: net.constant(np.full((), 1.5, F32)),
    }[second]()
    if kind == "Div" and "constant" not in other:  # keep away from division by small numbers
        other = net.op("Add", other, net.constant(np.full((), 1, F32)))
    x = net.op(kind, first, other)
    check(net, getattr(net, after)(x) if after else x)


def test_a_stored_constant_operand_keeps_the_sum_in_int8():
    net = Net((1, 4, 5, 5))
    model, images = net.model(net.op("Add", "images", net.weight(4, 1, 1))), net.images()
    qdq = quantized(model, images)
    [add] = [node for node in qdq.graph.node if node.op_type == "Add"]
    [constant] = [tensor for tensor in qdq.graph.initializer if tensor.name == add.input[1]]
    integers = np.asarray([3, 90, 180, 255], np.uint8).reshape(4, 1, 1)
    stored = {"c": integers, "c_scale": np.asarray(0.01, F32), "c_zero": np.asarray(100, np.uint8)}
    qdq.graph.initializer.remove(constant)
    qdq.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in stored.items())
    qdq.graph.node.insert(0, helper.make_node("DequantizeLinear", list(stored), [add.input[1]]))
    assert written_ops(to_tflite(qdq, {})) == ["ADD"]
    assert lsb_apart(qdq, images).max() <= 1


@few
@given(
    seed=st.integers(0, 999),
    size=st.integers(5, 10),
    kernel=st.integers(2, 3),
    stride=st.integers(1, 3),
    pad=st.integers(0, 1),
    ceil_mode=st.integers(0, 1),
    relu=st.booleans(),
)
def test_max_pool_agrees(seed, size, kernel, stride, pad, ceil_mode, relu):
    net = Net((1, 4, size, size + 1), seed)
    x = net.conv("images", 4, 4)
    settings = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4, "ceil_mode": ceil_mode}
    last_windows = [math.ceil((n + 2 * pad - kernel) / stride) * stride for n in (size, size + 1)]
    assume(not ceil_mode or (last_windows[0] < size + pad and last_windows[1] < size + 1 + pad))
    check(net, net.op("MaxPool", net.relu(x) if relu else x, **settings))


@few
@given(
    seed=st.integers(0, 999),
    size=st.integers(5, 10),
    kernel=st.integers(2, 3),
    stride=st.integers(1, 2),
    pad=st.integers(0, 1),
)
def test_average_pool_agrees(seed, size, kernel, stride, pad):
    net = Net((1, 4, size, size + 1), seed)
    settings = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4, "count_include_pad": 1}
    check(net, net.op("AveragePool", "images", **settings))


def test_average_pool_that_leaves_its_pads_uncounted():
    net = Net((1, 4, 7, 7))
    output = net.op("AveragePool", "images", kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    assert ops_of(net, output)[1] == ["DEQUANTIZE", "AVERAGE_POOL_2D", "QUANTIZE"]
    check(net, output)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("kind", ["GlobalAveragePool", "ReduceMean", "AveragePool"])
def test_pooling_over_the_image_is_a_mean_between_two_grids(kind, keepdims):
    net = Net((2, 4, 5, 7))
    x = net.conv("images", 4, 6)
    if kind == "ReduceMean":
        output = net.op(kind, x, net.ints(-2, -1), keepdims=keepdims)
    else:
        output = net.op(kind, x, **({"kernel_shape": [5, 7]} if kind == "AveragePool" else {}))
    assert ops_of(net, output) == (["CONV_2D", "MEAN"], ["CONV_2D", "MEAN"])
    check(net, output)


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [("HardSwish", {}), ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}), ("Sigmoid", {}), ("Relu", {})],
)
def test_what_has_no_good_int8_kernel_is_a_float_island(kind, attributes):
    net = Net((1, 4, 5, 5))
    output = net.op(kind, net.op("MaxPool", "images", kernel_shape=[2, 2]), **attributes)
    written = ops_of(net, output)[1]
    assert written[1] == "DEQUANTIZE"
    assert written[-1] == "QUANTIZE"
    check(net, output)


def test_sigmoid_runs_in_int8_on_the_grid_of_its_kernel():
    net = Net((1, 4, 5, 5))
    output = net.op("Sigmoid", "images")
    assert ops_of(net, output, grids={output: (1 / 256, 0)})[1] == ["LOGISTIC"]
    check(net, output, grids={output: (1 / 256, 0)})


@pytest.mark.parametrize("shape", [(2, 10), (2, 4, 3, 3)])
def test_softmax_over_the_channels(shape):
    net = Net(shape)
    output = net.op("Softmax", "images", axis=1)
    # Of grids finer than 1/256 onnxruntime 1.31's QLinearSoftmax makes nonsense (values wrap around to 0).
    check(net, output, grids={output: (1 / 256, 0)})


@pytest.mark.parametrize(
    "build",
    [
        lambda net: net.op("Transpose", "images", perm=[0, 2, 1, 3]),
        lambda net: net.op("Transpose", net.op("Flatten", "images"), perm=[1, 0]),
        lambda net: net.op("Reshape", "images", net.ints(2, 3, 8, 5)),
        lambda net: net.op("Reshape", "images", net.ints(2, 4, -1)),
        lambda net: net.op("Squeeze", net.op("GlobalAveragePool", "images"), net.ints(2, 3)),
        lambda net: net.op("Unsqueeze", net.op("Flatten", "images"), net.ints(2, 3)),
        lambda net: net.op("Pad", "images", net.ints(0, 1, 2, 0, 0, 0, 1, 3)),
        lambda net: net.op("Pad", "images", net.ints(1, 2), "", net.ints(3)),
        lambda net: net.op("Identity", net.op("Dropout", net.op("Flatten", "images"))),
    ],
)
def test_moving_numbers_keeps_them(build):
    net = Net((2, 4, 6, 5))
    output = build(net)
    model, images = net.model(output), net.images()
    [expected], [got] = run_onnx(model, images), run_tflite(to_tflite(model, {}), images)
    np.testing.assert_allclose(got, nhwc(expected), rtol=1e-6, atol=1e-7)
    if "identity" not in output:
        assert lsb_apart(quantized(model, images), images).max() <= 1


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_concat_brings_its_inputs_onto_one_grid(axis):
    net = Net((2, 4, 6, 6))
    x, y = net.conv("images", 4, 4), net.op("Mul", "images", "images")
    output = net.op("Concat", x, y, axis=axis)
    check(net, output)
    one = (0.05, 100)
    assert ops_of(net, output, grids={x: one, y: one, output: one})[1] == ["CONV_2D", "MUL", "CONCATENATION"]


# ---- networks ----------------------------------------------------------------------------------------------


def inverted_residual(net: Net, x: str, channels: int) -> str:
    y = net.relu6(net.conv(x, channels, 3 * channels, kernel=1, pads=(0, 0, 0, 0)))
    y = net.relu6(net.conv(y, 3 * channels, 3 * channels, group=3 * channels))
    return net.op("Add", x, net.conv(y, 3 * channels, channels, kernel=1, pads=(0, 0, 0, 0)))


def mobilenet(seed: int = 0) -> tuple[Net, str]:
    net = Net((1, 3, 16, 16), seed)
    x = net.relu6(net.conv("images", 3, 8, stride=2))
    x = net.conv(net.relu6(net.conv(x, 8, 8, group=8, stride=2)), 8, 8, kernel=1, pads=(0, 0, 0, 0))
    x = inverted_residual(net, inverted_residual(net, x, 8), 8)
    return net, net.linear(net.op("Flatten", net.op("GlobalAveragePool", x)), 8, 10)


def resnet(seed: int = 0) -> tuple[Net, str]:
    net = Net((1, 3, 16, 16), seed)
    x = net.relu(net.conv("images", 3, 8, kernel=7, pads=(3, 3, 3, 3), stride=2))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = net.conv(net.relu(net.conv(x, 8, 8)), 8, 8)
    x = net.relu(net.op("Add", x, y))
    x = net.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    return net, net.linear(net.op("Flatten", x), 32, 10)


def dense(seed: int = 0) -> tuple[Net, str]:
    net = Net((1, 3, 12, 12), seed)
    x = net.conv("images", 3, 6)
    x = net.op("Concat", x, net.relu(net.conv(x, 6, 4)), axis=1)
    x = net.op("Concat", x, net.conv(x, 10, 4), axis=1)
    return net, net.linear(net.op("ReduceMean", x, net.ints(2, 3), keepdims=0), 14, 10)


NETWORKS = [mobilenet, resnet, dense]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_networks_agree(network, seed):
    check(*network(seed))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_can_be_compared_by_name(network):
    net, output = network()
    images = net.images()
    model = quantized(net.model(output), images)
    data = to_tflite(model, {"name": "demo"})
    in_file = {tensor.name.decode() for tensor in unpack(data).subgraphs[0].tensors}
    expected = {
        name: values for name, values in run_onnx_all(model, images, "QuantizeLinear").items() if name in in_file
    }
    assert len(expected) >= 8
    layered = with_outputs(data, list(expected))
    assert read_metadata(layered) == {"name": "demo"}
    np.testing.assert_array_equal(run_tflite(layered, images)[0], run_tflite(data, images)[0])
    graph = unpack(layered).subgraphs[0]
    names = [graph.tensors[index].name.decode() for index in graph.outputs]
    for name, got in zip(names, run_tflite(layered, images), strict=True):
        assert np.abs(nhwc(expected[name]).astype(int) - 128 - got).max() <= 1, name


@pytest.mark.parametrize("network", NETWORKS)
def test_grids_weights_and_biases_are_those_of_the_onnx_bit_for_bit(network):
    net, output = network()
    model = quantized(net.model(output), net.images())
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    file = unpack(to_tflite(model, {}))
    tensors = {tensor.name.decode(): tensor for tensor in file.subgraphs[0].tensors}
    checked = {"QuantizeLinear": 0, "DequantizeLinear": 0}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] in tensors:
            quantization = tensors[node.output[0]].quantization
            assert quantization.scale.tobytes() == stored[node.input[1]].tobytes()
            assert quantization.zeroPoint[0] == int(stored[node.input[2]]) - 128
            checked[node.op_type] += 1
        elif node.op_type == "DequantizeLinear" and node.input[0] in stored:
            tensor, values = tensors[node.input[0]], stored[node.input[0]]
            content = file.buffers[tensor.buffer].data.view(values.dtype).reshape(tensor.shape)
            assert tensor.quantization.scale.tobytes() == stored[node.input[1]].tobytes()
            if values.ndim == 4 and tensor.quantization.quantizedDimension == 3:
                content = content.transpose(3, 0, 1, 2)
            elif values.ndim == 4:
                content = content.transpose(0, 3, 1, 2)
            np.testing.assert_array_equal(content, values)
            checked[node.op_type] += 1
    assert min(checked.values()) >= 6


def test_input_and_output_of_an_int8_file_are_int8():
    net, output = mobilenet()
    data = to_tflite(quantized(net.model(output), net.images()), {})
    assert not {"QUANTIZE", "DEQUANTIZE"} & set(written_ops(data))
    interpreter = Interpreter(model_content=data)
    [entry], [result] = interpreter.get_input_details(), interpreter.get_output_details()
    assert (entry["name"], entry["dtype"], list(entry["shape"])) == ("images_q", np.int8, [1, 16, 16, 3])
    assert (result["name"], result["dtype"], list(result["shape"])) == (f"{output}_q", np.int8, [1, 10])


# ---- the file ----------------------------------------------------------------------------------------------


def test_metadata_comes_back():
    net = Net((1, 3, 4, 4))
    metadata = {"labels": '["näyttö", "猫"]', "recipe": "", "preprocess": "{}" * 5000}
    data = to_tflite(net.model(net.conv("images", 3, 4)), metadata)
    assert read_metadata(data) == metadata
    run_tflite(data, net.images())


def test_buffers_are_aligned():
    net, output = mobilenet()
    data = to_tflite(quantized(net.model(output), net.images()), {"key": "odd"})
    model = schema.Model.GetRootAs(data, 0)
    start = np.frombuffer(data, np.uint8).ctypes.data
    offsets = [
        model.Buffers(i).DataAsNumpy().ctypes.data - start
        for i in range(model.BuffersLength())
        if not model.Buffers(i).DataIsNone()
    ]
    assert len(offsets) > 20
    assert {offset % ALIGNMENT for offset in offsets} == {0}


def test_the_same_onnx_gives_the_same_bytes():
    net, output = mobilenet()
    model = net.model(output)
    assert to_tflite(model, {"a": "b"}) == to_tflite(model, {"a": "b"})


def test_with_outputs_refuses_an_unknown_name():
    net = Net((1, 3, 4, 4))
    data = to_tflite(net.model(net.conv("images", 3, 4)), {})
    with pytest.raises(ModelError, match="no_such: the TFLite file has no tensor of this name"):
        with_outputs(data, ["no_such"])


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda net: net.op("Erf", "images"), "operator Erf has no TFLite counterpart here"),
        (lambda net: net.op("Det", "images"), "operator Det has no TFLite counterpart here"),
        (lambda net: net.op("Clip", "images", net.op("ReduceMin", "images", keepdims=0)), "Clip with computed bounds"),
        (
            lambda net: net.op("AveragePool", "images", kernel_shape=[2, 2], ceil_mode=1, count_include_pad=1),
            "AveragePool with ceil_mode and count_include_pad",
        ),
        (lambda net: net.op("MaxPool", "images", kernel_shape=[2, 2], dilations=[2, 2]), "MaxPool with dilation"),
        (
            lambda net: net.op("MaxPool", "images", kernel_shape=[2, 2], strides=[3, 3], pads=[1] * 4, ceil_mode=1),
            "a last window that sees padding only",
        ),
        (lambda net: net.op("MatMul", "images", net.weight(4)), "operator MatMul of a vector"),
        (lambda net: net.op("Conv", "images", net.op("Identity", "images")), "operator Conv with computed weights"),
        (lambda net: net.op("Gemm", net.op("Flatten", "images"), net.weight(64, 2), alpha=2.0), "alpha or beta"),
        (lambda net: net.op("Pad", "images", net.ints(*[1] * 8), mode="edge"), "Pad with mode edge .*; use zeros or"),
        (lambda net: net.op("Pad", "images", net.ints(0, 0, -1, 0, 0, 0, 0, 1)), "Pad that adds and removes at once"),
        (lambda net: net.op("Resize", "images", "", net.floats(1, 1, 2, 2), mode="cubic"), "Resize with mode cubic"),
        (lambda net: net.op("Resize", "images", "", net.floats(1, 2, 2, 2)), "over other axes than the image's"),
        (
            lambda net: net.op("Resize", "images", "", net.floats(1, 1, 1.4, 1.4), mode="linear"),
            "Resize with coordinates that its kernel does not know",
        ),
        (lambda net: net.op("PRelu", "images", net.op("Abs", "images")), "PRelu with computed slopes"),
        (lambda net: net.op("Gemm", net.op("Flatten", "images"), net.op("Flatten", "images"), transB=1), "computed w"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(build, words):
    net = Net((1, 4, 4, 4))
    output = build(net)
    with pytest.raises(ModelError, match=words) as caught:
        to_tflite(net.model(output), {})
    assert caught.value.place == f"node_{output}"


def test_a_dynamic_batch_is_refused():
    net = Net(("batch", 3, 4, 4))
    model = net.model(net.conv("images", 3, 4))
    with pytest.raises(ModelError, match="images: the input's shape is not fixed; export with a fixed batch"):
        to_tflite(model, {})


def test_an_old_opset_whose_operators_mean_something_else_is_refused():
    net = Net((1, 3, 4, 4))
    model = net.model(net.conv("images", 3, 4))
    model.opset_import[0].version = 11
    with pytest.raises(ModelError, match="has opset 11, read are 13 and later; export with opset 18"):
        to_tflite(model, {})


def test_an_error_names_the_layer_rather_than_the_node_that_the_exporter_numbered():
    net = Net((1, 3, 4, 4))
    inner = net.op("Det", "images")
    model = net.model(net.op("Relu", inner))
    for name, place in (("features.3.det/exact", "features.3.det/exact"), ("val_7", f"node_{inner}")):
        model.graph.node[0].output[0] = model.graph.node[1].input[0] = name
        del model.graph.value_info[:]
        with pytest.raises(ModelError) as caught:
            to_tflite(model, {})
        assert caught.value.place == place
