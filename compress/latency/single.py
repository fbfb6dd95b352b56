"""Int8 files of a single layer, or of several layers of one shape side by side, as our networks' files have them.

A file of one layer takes a call of the runtime besides, some microseconds that a network pays once. What one more layer
of a shape adds to a file is free of that: (time of a file of n layers - time of a file of one) / (n - 1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx import OPSET
from compress.formats.tflite import to_tflite
from compress.latency.shapes import Shape
from compress.targets import Runtime

PATTERN = 4093
"""Weights repeat after so many values: an archive of files stays small. Prime, so that no two channels are equal."""


def layer_file(shape: Shape, runtime: Runtime, layers: int = 1) -> bytes:
    """A file for the runtime with `layers` layers of this shape that read one image; integers in and out."""
    model = side_by_side(shape, layers)
    if runtime == "onnxruntime":
        return with_integers(model).SerializeToString()
    return to_tflite(model, {})


def side_by_side(shape: Shape, layers: int) -> onnx.ModelProto:
    """`layers` layers of one shape with weights of their own, which all read the image's grid; an output of each."""
    step = np.float32(1 / 64)
    linear = shape.kind == "linear"
    arrays: dict[str, Any] = {"step": step, "zero": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "step", "zero"], ["x"], "quantize"),
        helper.make_node("DequantizeLinear", ["x", "step", "zero"], ["x/float"], "dequantize"),
    ]
    for number in range(layers):
        own, more = _layer(shape, number, step)
        arrays |= own
        nodes += more
    size = (1, shape.inputs) if linear else (1, shape.inputs, *shape.size)
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info(f"result{number}", TensorProto.FLOAT, None) for number in range(layers)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _layer(shape: Shape, number: int, step: np.float32) -> tuple[dict[str, Any], list[onnx.NodeProto]]:
    """The arrays and nodes of one layer and its grids."""
    linear = shape.kind == "linear"
    dims = (shape.outputs, shape.inputs // shape.groups, *(() if linear else shape.kernel))
    values = np.random.default_rng(number).integers(-127, 128, PATTERN).astype(np.int8)
    scales = np.full(shape.outputs, 1 / 512, np.float32)

    def at(name: str) -> str:
        return f"{name}{number}"

    arrays = {
        at("weight"): np.resize(values, dims),
        at("weight_scale"): scales,
        at("weight_zero"): np.zeros(shape.outputs, np.int8),
        at("bias"): np.zeros(shape.outputs, np.int32),
        at("bias_scale"): scales * step,
        at("bias_zero"): np.zeros(shape.outputs, np.int32),
        at("out_step"): np.float32(step * np.sqrt(np.prod(dims[1:])) / 4),  # three standard deviations of the sums
    }
    axis: dict[str, Any] = {"axis": 0}
    weight, bias = ([at(f"{name}{end}") for end in ("", "_scale", "_zero")] for name in ("weight", "bias"))
    read = ["x/float", at("w/float"), at("b/float")]
    if linear:
        layer = helper.make_node("Gemm", read, [at("y/exact")], at("layer"), transB=1)
    else:
        how: dict[str, Any] = {
            "kernel_shape": shape.kernel,
            "strides": shape.stride,
            "pads": shape.padding * 2,
            "dilations": shape.dilation,
            "group": shape.groups,
        }
        layer = helper.make_node("Conv", read, [at("y/exact")], at("layer"), **how)
    return arrays, [
        helper.make_node("DequantizeLinear", weight, [at("w/float")], at("w"), **axis),
        helper.make_node("DequantizeLinear", bias, [at("b/float")], at("b"), **axis),
        layer,
        helper.make_node("QuantizeLinear", [at("y/exact"), at("out_step"), "zero"], [at("y")], at("round")),
        helper.make_node("DequantizeLinear", [at("y"), at("out_step"), "zero"], [at("result")], at("result")),
    ]


def with_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with uint8 in and out, as LiteRT's files have it: ONNX Runtime's conversions are not to be timed."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    results = {output.name: f"y{output.name.removeprefix('result')}" for output in graph.output}
    kept = [node for node in graph.node if node.name != "quantize" and node.name not in results]
    del graph.node[:]
    graph.node.extend(kept)
    graph.input[0].name = "x"
    for output in graph.output:
        output.name = results[output.name]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.UINT8
    ends = {"x", *results.values()}
    described = [value for value in graph.value_info if value.name not in ends]
    del graph.value_info[:]
    graph.value_info.extend(described)
    return changed
