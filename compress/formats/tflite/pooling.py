"""Poolings over windows, and reductions over whole axes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.formats.tflite.graph import Node
from compress.formats.tflite.layout import NHWC, without
from compress.formats.tflite.translation import Landing, Translation, Value
from compress.formats.tflite.window import Window
from compress.formats.tflite_file import Shape, Tensor


def max_pool(t: Translation, node: Node) -> None:
    name = node.inputs[0]
    window = _window(t, node)
    x = t.in_order(t.value(name), NHWC)
    x, padding = t.around(x, window, node.output, lowest=True)
    t.carry("MAX_POOL_2D", [x], node.output, _options(window, padding), order=NHWC)


def average_pool(t: Translation, node: Node) -> None:
    name = node.inputs[0]
    window = _window(t, node)
    image, result = t.shape(name)[2:], t.shape(node.output)[2:]
    if window.is_valid and window.kernel == image:
        return reduce_over(t, node, (2, 3), keepdims=True)
    counts_pads = bool(node.attributes.get("count_include_pad", 0))
    if counts_pads and node.attributes.get("ceil_mode", 0):
        node.refuse("with ceil_mode and count_include_pad")
    fixed_area = counts_pads or window.is_valid
    landing = t.landing(node.output)
    int8 = fixed_area and t.grid(name) is not None and landing.grid is not None
    x = t.image(name, int8=int8)
    uncounted = not fixed_area and not window.is_same(image)
    if not window.is_valid and (counts_pads or uncounted):  # SAME would not count what it pads
        x = t.pad(Value(x, NHWC), ((0, 0), (0, 0), *window.pads), f"{node.output}:padded").tensor
    padding = schema.Padding.VALID if fixed_area or uncounted else schema.Padding.SAME
    if int8:
        _average_by_conv(t, x, window, landing)
    elif uncounted:  # the average over a full window, times how much larger that is than what counts
        share = math.prod(window.kernel) / window.counts(image, result)
        factors = t.file.constant(f"{node.output}:share", share.astype(np.float32)[None, :, :, None])
        shape = (x.shape[0], *result, x.shape[3])
        full = t.step("AVERAGE_POOL_2D", [x], f"{node.output}:full", shape, _options(window, padding))
        t.emit("MUL", [full, factors], landing, schema.MulOptionsT(), order=NHWC, int8=False)
    else:
        t.emit("AVERAGE_POOL_2D", [x], landing, _options(window, padding), order=NHWC, int8=False)
    return None


def _average_by_conv(t: Translation, x: Tensor, window: Window, landing: Landing) -> None:
    """An int8 average as a depthwise convolution of ones with scale 1/area.

    XNNPACK (LiteRT 2.3) has no int8 AVERAGE_POOL_2D, and that operator keeps its input's grid: a QUANTIZE behind it
    would round a second time.
    """
    assert x.grid is not None
    channels = x.shape[3]
    scale = np.asarray([1 / math.prod(window.kernel)], np.float32)
    ones = np.ones((1, *window.kernel, channels), np.int8)
    filters = t.file.constant(f"{landing.value}:ones", ones, scales=scale)
    bias = t.file.constant(f"{landing.value}:bias", np.zeros(channels, np.int32), scales=x.grid.scale * scale)
    options = schema.DepthwiseConv2DOptionsT(
        padding=schema.Padding.VALID,
        strideH=window.strides[0],
        strideW=window.strides[1],
        depthMultiplier=1,
        dilationHFactor=1,
        dilationWFactor=1,
    )
    t.emit("DEPTHWISE_CONV_2D", [x, filters, bias], landing, options, order=NHWC, int8=True)


def _window(t: Translation, node: Node) -> Window:
    shape = t.shape(node.inputs[0])
    if len(shape) != 4:
        node.refuse(f"over {len(shape) - 2} axes")
    window = Window.of(node, shape[2:], node.attributes["kernel_shape"], t.shape(node.output)[2:])
    if window.dilations != (1, 1):
        node.refuse("with dilation")
    return window


def _options(window: Window, padding: int) -> schema.Pool2DOptionsT:
    return schema.Pool2DOptionsT(
        padding=padding,
        strideH=window.strides[0],
        strideW=window.strides[1],
        filterHeight=window.kernel[0],
        filterWidth=window.kernel[1],
    )


def global_pool(t: Translation, node: Node) -> None:
    reduce_over(t, node, tuple(range(2, t.rank(node.inputs[0]))), keepdims=True)


REDUCTIONS = {
    "AveragePool": "MEAN",
    "GlobalAveragePool": "MEAN",
    "GlobalMaxPool": "REDUCE_MAX",
    "ReduceL2": "SUM",
    "ReduceMax": "REDUCE_MAX",
    "ReduceMean": "MEAN",
    "ReduceMin": "REDUCE_MIN",
    "ReduceSum": "SUM",
}


def reduction(t: Translation, node: Node) -> None:
    rank = t.rank(node.inputs[0])
    axes: Any = node.attributes.get("axes")
    if axes is None and (node.input(1) or node.attributes.get("noop_with_empty_axes", 0)):
        axes = t.graph.integers(node, 1, default=())
    if axes is not None and not len(axes) and node.attributes.get("noop_with_empty_axes", 0):
        t.rename(node.output, t.value(node.inputs[0]))
        return
    axes = tuple(sorted(int(axis) % rank for axis in axes)) if axes is not None and len(axes) else tuple(range(rank))
    reduce_over(t, node, axes, keepdims=bool(node.attributes.get("keepdims", 1)))


def reduce_over(t: Translation, node: Node, axes: Shape, *, keepdims: bool) -> None:
    """Over axes of the ONNX value. The int8 MEAN and SUM may change the grid; maxima are selected, so they keep it."""
    name, op = node.inputs[0], REDUCTIONS[node.op]
    landing = t.landing(node.output)
    selects = op in ("REDUCE_MAX", "REDUCE_MIN")
    int8 = t.grid(name) is not None and landing.grid is not None and node.op != "ReduceL2"
    int8 = int8 and (not selects or t.grid(name) == landing.grid)
    x = t.read(name, int8=int8)
    order = x.order if keepdims else without(x.order, axes)
    in_file = tuple(sorted(x.order.index(axis) for axis in axes))
    tensor = x.tensor
    if node.op == "ReduceL2":
        tensor = t.step("SQUARE", [tensor], f"{node.output}:squares", tensor.shape, schema.SquareOptionsT())
    inputs = [tensor, t.integers(f"{node.output}:axes", in_file)]
    options = schema.ReducerOptionsT(keepDims=keepdims)
    if node.op == "ReduceL2":
        shape = t.shape(node.output)
        total = t.step(op, inputs, f"{node.output}:sum", tuple(shape[axis] for axis in order), options)
        t.emit("SQRT", [total], landing, order=order, int8=False)
    else:
        t.emit(op, inputs, landing, options, order=order, int8=int8)
