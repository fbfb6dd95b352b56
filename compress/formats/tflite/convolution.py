"""Convolutions: plain, grouped, dilated, depthwise, transposed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.formats.tflite.graph import Node
from compress.formats.tflite.layout import NHWC
from compress.formats.tflite.moving import cut
from compress.formats.tflite.translation import Translation, Value
from compress.formats.tflite.window import Pads, Window
from compress.formats.tflite_file import Shape


def conv(t: Translation, node: Node) -> None:
    weight, bias = node.inputs[1], node.input(2)
    shape_OIHW = _weight_shape(t, node)
    outputs, inputs_per_group, *kernel = shape_OIHW
    groups = node.attributes.get("group", 1)
    depthwise = groups > 1 and inputs_per_group == 1

    name, before = _without_pad(t, node.inputs[0])
    window = Window.of(node, t.shape(node.inputs[0])[2:], kernel, t.shape(node.output)[2:])
    landing = t.landing(node.output, fuse=True)
    int8 = t.is_int8(name, landing, weight, bias, output_axis=0)
    x = t.image(name, int8=int8)
    bias_tensor = t.bias(node, bias, x, weight, outputs, stored=int8)
    x, padding = t.around(x, window.padded(before), node.output)
    common = {
        "padding": padding,
        "strideH": window.strides[0],
        "strideW": window.strides[1],
        "dilationHFactor": window.dilations[0],
        "dilationWFactor": window.dilations[1],
    }
    options: Any
    if depthwise:
        filters = t.parameter(weight, (1, 2, 3, 0), stored=int8)
        options = schema.DepthwiseConv2DOptionsT(depthMultiplier=outputs // groups, **common)
        version = None if int8 or window.dilations == (1, 1) else 2
        inputs = [x, filters, bias_tensor]
        t.emit("DEPTHWISE_CONV_2D", inputs, landing, options, order=NHWC, int8=int8, version=version)
    else:
        filters = t.parameter(weight, NHWC, stored=int8)
        version = 6 if groups > 1 else None
        options = schema.Conv2DOptionsT(**common)
        t.emit("CONV_2D", [x, filters, bias_tensor], landing, options, order=NHWC, int8=int8, version=version)


def _weight_shape(t: Translation, node: Node) -> Shape:
    weight, bias = node.inputs[1], node.input(2)
    if not t.is_constant(weight) or (bias and not t.is_constant(bias)):
        node.refuse("with computed weights")
    shape = t.shape(weight)
    if len(shape) != 4:
        node.refuse(f"over {len(shape) - 2} axes", f"use {'ConvTranspose2d' if 'T' in node.op else 'Conv2d'}")
    return shape


def _without_pad(t: Translation, name: str) -> tuple[str, Pads]:
    """The value before a Pad of zeros around the image, and those zeros as (vertical, horizontal)."""
    if name in t.padded:
        source, pads = t.padded[name]
        if len(pads) == 4 and pads[:2] == ((0, 0), (0, 0)):
            return source, pads[2:]
    return name, ((0, 0), (0, 0))


def conv_transpose(t: Translation, node: Node) -> None:
    """As TRANSPOSE_CONV over the whole reach of the kernels, out of which the ONNX's window is cut.

    TFLite knows neither groups nor dilation: weights of other groups, and those between dilated ones, are zeros.
    """
    weight, bias = node.inputs[1], node.input(2)
    shape_IOHW = _weight_shape(t, node)
    groups = node.attributes.get("group", 1)
    outputs = shape_IOHW[1] * groups
    strides = tuple(node.attributes.get("strides", (1, 1)))
    dilations = tuple(node.attributes.get("dilations", (1, 1)))
    image, result = t.shape(node.inputs[0])[2:], t.shape(node.output)[2:]
    kernel = [(k - 1) * d + 1 for k, d in zip(shape_IOHW[2:], dilations, strict=True)]
    reach = [(size - 1) * s + k for size, s, k in zip(image, strides, kernel, strict=True)]
    begin = _begin(node, reach, result)

    landing = t.landing(node.output, fuse=True)
    int8 = t.is_int8(node.inputs[0], landing, weight, bias, output_axis=1)
    x = t.image(node.inputs[0], int8=int8)
    dense = weight if groups == 1 and dilations == (1, 1) else _dense(t, weight, groups, dilations)
    filters = t.parameter(dense, (1, 2, 3, 0), stored=int8)
    bias_tensor = t.bias(node, bias, x, dense, outputs, stored=int8)

    # SAME cuts half of what reaches over `size * stride`, the smaller half before; VALID cuts nothing before.
    same = all(
        out == size * stride and start == max(full - out, 0) // 2
        for out, size, stride, start, full in zip(result, image, strides, begin, reach, strict=True)
    )
    whole = result if same else tuple(max(full, s + out) for full, s, out in zip(reach, begin, result, strict=True))
    padding = schema.Padding.SAME if same else schema.Padding.VALID
    options = schema.TransposeConvOptionsT(padding=padding, strideH=strides[0], strideW=strides[1])
    batch = t.shape(node.output)[0]
    full_shape = (batch, *whole, outputs)
    inputs = [t.integers(f"{node.output}:size", full_shape), filters, x, bias_tensor]
    version = 4 if landing.activation != "NONE" else 3
    if whole == result:
        t.emit("TRANSPOSE_CONV", inputs, landing, options, order=NHWC, int8=int8, version=version)
        return
    if landing.activation != "NONE":
        options.fusedActivationFunction = getattr(schema.ActivationFunctionType, landing.activation)
    uncut = t.file.tensor(f"{node.output}:uncut", full_shape, landing.grid if int8 else None)
    t.file.operator("TRANSPOSE_CONV", inputs, uncut, options, version)
    t.done.update(landing.absorbed)
    cut(t, Value(uncut, NHWC), landing.value, (0, 0, *begin))


def _begin(node: Node, reach: list[int], result: Shape) -> tuple[int, ...]:
    """How much of the kernels' reach lies before the result, per axis."""
    auto_pad = node.attributes.get("auto_pad", b"NOTSET")
    if auto_pad == b"NOTSET" and "output_shape" not in node.attributes:
        return tuple(node.attributes.get("pads", (0, 0, 0, 0))[:2])
    totals = [max(full - out, 0) for full, out in zip(reach, result, strict=True)]
    if auto_pad == b"VALID":
        return (0, 0)
    return tuple(math.ceil(total / 2) if auto_pad != b"SAME_UPPER" else total // 2 for total in totals)


def _dense(t: Translation, weight: str, groups: int, dilations: tuple[int, ...]) -> str:
    """A constant with the weights of all groups over all channels, stored as `weight` is."""
    name = f"{weight}:dense"
    graph = t.graph
    graph.constants[name] = _spread(graph.constants[weight], groups, dilations)
    if weight in graph.stored:
        stored = graph.stored[weight]
        scales = np.tile(stored.scales, groups) if len(stored.scales) > 1 and stored.axis == 1 else stored.scales
        if len(scales) == 1 or stored.axis == 1:
            graph.stored[name] = replace(
                stored, integers=_spread(stored.integers, groups, dilations), scales=scales, axis=1
            )
    if weight in graph.halves:
        source, halves = graph.halves[weight]
        graph.halves[name] = (source, _spread(halves, groups, dilations))
    return name


def _spread(weight_IOHW: np.ndarray, groups: int, dilations: tuple[int, ...]) -> np.ndarray:
    """Weights with the zeros of grouping and dilation written out."""
    inputs, per_group, height, width = weight_IOHW.shape
    spread = ((height - 1) * dilations[0] + 1, (width - 1) * dilations[1] + 1)
    dense = np.zeros((inputs, per_group * groups, *spread), weight_IOHW.dtype)
    size = inputs // groups
    for group in range(groups):
        rows, columns = slice(group * size, (group + 1) * size), slice(group * per_group, (group + 1) * per_group)
        dense[rows, columns, :: dilations[0], :: dilations[1]] = weight_IOHW[rows]
    return dense
