"""Normalizations, out of their parts and in float: TFLite has no operator for them."""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.formats.tflite.graph import Node
from compress.formats.tflite.layout import Order, arranged, reshaped
from compress.formats.tflite.translation import Translation, Value
from compress.formats.tflite_file import Shape, Tensor


def layer_norm(t: Translation, node: Node) -> None:
    """Over the last axes, with a weight and a bias for each element of these."""
    if any(t.graph.consumers.get(name) for name in node.outputs[1:]):
        node.refuse("whose mean or deviation is used too")
    x = t.float_value(node.inputs[0])
    rank = len(x.order)
    first = node.attributes.get("axis", -1) % rank
    epsilon = node.attributes.get("epsilon", 1e-5)
    normal = _standardized(t, x.tensor, [x.order.index(a) for a in range(first, rank)], epsilon, node.output)
    _scaled(t, node, Value(normal, x.order), *_constants(t, node, 1, rank))


def instance_norm(t: Translation, node: Node) -> None:
    """Over the image of each channel."""
    x = t.float_value(node.inputs[0])
    rank = len(x.order)
    epsilon = node.attributes.get("epsilon", 1e-5)
    normal = _standardized(t, x.tensor, [x.order.index(a) for a in range(2, rank)], epsilon, node.output)
    _scaled(t, node, Value(normal, x.order), *_constants(t, node, 1, rank, channels=True))


def group_norm(t: Translation, node: Node) -> None:
    """Over the image and the channels of each group; our own name for what torch exports as a pattern."""
    x = t.float_value(node.inputs[0])
    shape = t.shape(node.inputs[0])
    batch, channels, *image = shape
    groups = node.attributes["num_groups"]
    grouped = (batch, groups, channels // groups, *image)
    before, order = reshaped(shape, x.order, grouped)
    split = t.reshaped(t.in_order(x, before), arranged(grouped, order), f"{node.output}:groups")
    axes = [order.index(axis) for axis in range(2, len(grouped))]
    normal = _standardized(t, split, axes, node.attributes["epsilon"], node.output)
    _, order = reshaped(grouped, order, shape)
    joined = t.reshaped(normal, arranged(shape, order), f"{node.output}:joined")
    _scaled(t, node, Value(joined, order), *_constants(t, node, 1, len(shape), channels=True))


def batch_norm(t: Translation, node: Node) -> None:
    """One that was not folded into a convolution: a factor and a summand per channel."""
    scale, bias, mean, variance = (t.graph.constants.get(name) for name in node.inputs[1:5])
    if scale is None or bias is None or mean is None or variance is None or node.attributes.get("training_mode", 0):
        node.refuse("with computed statistics", "export the network in eval mode")
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + node.attributes.get("epsilon", 1e-5))
    x = t.float_value(node.inputs[0])
    wide = (1, -1) + (1,) * (len(x.order) - 2)
    _scaled(t, node, x, factor.reshape(wide), (bias - mean * factor).reshape(wide))


def _constants(
    t: Translation, node: Node, index: int, rank: int, *, channels: bool = False
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The constant weight and bias from input `index` on, seen with `rank` axes; None where there is none."""
    found: list[np.ndarray | None] = []
    for name in (node.input(index), node.input(index + 1)):
        values = t.graph.constants.get(name)
        if name and values is None:
            node.refuse("with computed weights")
        if values is not None:
            wide = (1, -1) + (1,) * (rank - 2) if channels else (1,) * (rank - values.ndim) + values.shape
            values = values.reshape(wide)
        found.append(values)
    return found[0], found[1]


def _standardized(t: Translation, x: Tensor, axes: list[int], epsilon: float, name: str) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) over axes of the tensor."""
    over = t.integers(f"{name}:axes", sorted(axes))
    kept: Shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    reducer = schema.ReducerOptionsT(keepDims=True)
    mean = t.step("MEAN", [x, over], f"{name}:mean", kept, reducer)
    centred = t.step("SUB", [x, mean], f"{name}:centred", x.shape, schema.SubOptionsT())
    squares = t.step("SQUARE", [centred], f"{name}:squares", x.shape, schema.SquareOptionsT())
    variance = t.step("MEAN", [squares, over], f"{name}:variance", kept, reducer)
    inputs = [variance, t.number(f"{name}:epsilon", epsilon, len(kept))]
    shifted = t.step("ADD", inputs, f"{name}:shifted", kept, schema.AddOptionsT())
    inverse = t.step("RSQRT", [shifted], f"{name}:inverse", kept)
    return t.step("MUL", [centred, inverse], f"{name}:normal", x.shape, schema.MulOptionsT())


def _scaled(t: Translation, node: Node, x: Value, weight: np.ndarray | None, bias: np.ndarray | None) -> None:
    """x * weight + bias, the end of `node`; a factor of ones or a summand of zeros is left out."""
    order: Order = x.order
    tensor, name = x.tensor, node.output

    def constant(word: str, values: np.ndarray) -> Tensor:
        return t.file.constant(f"{name}:{word}", np.ascontiguousarray(values.astype(np.float32).transpose(order)))

    if bias is not None and not bias.any():
        bias = None
    landing = t.landing(name, fuse=True)
    if weight is None and bias is None:
        weight = np.ones((1,) * len(order))
    if weight is not None and bias is not None:
        tensor = t.step(
            "MUL", [tensor, constant("weight", weight)], f"{name}:scaled", tensor.shape, schema.MulOptionsT()
        )
    if bias is not None:
        inputs = [tensor, constant("bias", bias)]
        t.emit("ADD", inputs, landing, schema.AddOptionsT(), order=order, int8=False)
    else:
        assert weight is not None
        inputs = [tensor, constant("weight", weight)]
        t.emit("MUL", inputs, landing, schema.MulOptionsT(), order=order, int8=False)
