"""Functions of one value, element by element.

All are computed in float unless a comment names the int8 kernel: it must be XNNPACK's and exact (LiteRT 2.3, x86:
LOGISTIC, TANH and ELU are; LEAKY_RELU is a step off on 5 % of random points).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.formats.tflite.graph import Node
from compress.formats.tflite.layout import ending_in
from compress.formats.tflite.translation import RECTIFIERS, Translation, Value, clip_bounds
from compress.formats.tflite_file import Grid, Tensor

SIGMOID_GRID = Grid(np.float32(1 / 256), -128)
TANH_GRID = Grid(np.float32(1 / 128), 0)
"""The only output grids of the int8 kernels LOGISTIC and TANH."""


def unary(op: str, options: Callable[[], object] | None = None) -> Callable[[Translation, Node], None]:
    """The translation into a float operator of one input and no settings."""

    def translate(t: Translation, node: Node) -> None:
        x = t.float_value(node.inputs[0])
        t.emit(op, [x.tensor], t.landing(node.output), options() if options else None, order=x.order, int8=False)

    return translate


def squash(op: str, grid: Grid) -> Callable[[Translation, Node], None]:
    """The translation of a bounded function whose int8 kernel writes onto `grid`."""

    def translate(t: Translation, node: Node) -> None:
        landing = t.landing(node.output)
        int8 = t.grid(node.inputs[0]) is not None and landing.grid == grid
        x = t.read(node.inputs[0], int8=int8)
        t.emit(op, [x.tensor], landing, order=x.order, int8=int8)

    return translate


def clip(t: Translation, node: Node) -> None:
    """A Relu or Clip that no layer before it could take in; in float, since XNNPACK has no int8 RELU."""
    low, high = clip_bounds(t.graph, node)
    if low is None and high is None:
        t.rename(node.output, t.value(node.inputs[0]))
        return
    x = t.float_value(node.inputs[0])
    landing = t.landing(node.output)
    if (low, high) in RECTIFIERS:
        t.emit(RECTIFIERS[low, high], [x.tensor], landing, order=x.order, int8=False)
        return
    rank = len(x.order)
    tensor = x.tensor
    if low is not None and high is not None:
        bound = t.number(f"{node.output}:low", low, rank)
        tensor = t.step(
            "MAXIMUM", [tensor, bound], f"{node.output}:raised", tensor.shape, schema.MaximumMinimumOptionsT()
        )
    op, last = ("MAXIMUM", low) if high is None else ("MINIMUM", high)
    assert last is not None
    inputs = [tensor, t.number(f"{node.output}:bound", last, rank)]
    t.emit(op, inputs, landing, schema.MaximumMinimumOptionsT(), order=x.order, int8=False)


def hard_sigmoid(t: Translation, node: Node) -> None:
    """min(max(alpha x + beta, 0), 1); TFLite has no kernel of this name."""
    alpha, beta = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
    x = t.float_value(node.inputs[0])
    shape, rank = x.tensor.shape, len(x.order)
    landing = t.landing(node.output)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:  # torch's: relu6(x + 3) / 6
        relu6 = schema.AddOptionsT(fusedActivationFunction=schema.ActivationFunctionType.RELU6)
        inputs = [x.tensor, t.number(f"{node.output}:three", 3, rank)]
        clipped = t.step("ADD", inputs, f"{node.output}:relu6", shape, relu6)
        inputs = [clipped, t.number(f"{node.output}:sixth", alpha, rank)]
        t.emit("MUL", inputs, landing, schema.MulOptionsT(), order=x.order, int8=False)
        return
    inputs = [x.tensor, t.number(f"{node.output}:alpha", alpha, rank)]
    scaled = t.step("MUL", inputs, f"{node.output}:scaled", shape, schema.MulOptionsT())
    inputs = [scaled, t.number(f"{node.output}:beta", beta, rank)]
    relu = schema.AddOptionsT(fusedActivationFunction=schema.ActivationFunctionType.RELU)
    inputs = [t.step("ADD", inputs, f"{node.output}:relu", shape, relu), t.number(f"{node.output}:one", 1, rank)]
    t.emit("MINIMUM", inputs, landing, schema.MaximumMinimumOptionsT(), order=x.order, int8=False)


def leaky_relu(t: Translation, node: Node) -> None:
    x = t.float_value(node.inputs[0])
    options = schema.LeakyReluOptionsT(alpha=node.attributes.get("alpha", 0.01))
    t.emit("LEAKY_RELU", [x.tensor], t.landing(node.output), options, order=x.order, int8=False)


def prelu(t: Translation, node: Node) -> None:
    """The slopes, usually one per channel, are wanted along the last axis."""
    if not t.is_constant(node.inputs[1]):
        node.refuse("with computed slopes")
    x = t.float_value(node.inputs[0])
    rank = len(x.order)
    wide = (1,) * (rank - t.rank(node.inputs[1])) + t.shape(node.inputs[1])
    varying = [axis for axis, size in enumerate(wide) if size != 1]
    order = ending_in(x.order, *varying) if varying else x.order
    slopes = t.graph.constants[node.inputs[1]].astype(np.float32).reshape(wide).transpose(order)
    if rank > 1 and len(slopes) == 1:  # the converters write no batch axis, and XNNPACK takes no other shape
        slopes = slopes[0]
    alpha = t.file.constant(f"{node.output}:slopes", np.ascontiguousarray(slopes))
    t.emit("PRELU", [t.in_order(x, order), alpha], t.landing(node.output), order=order, int8=False)


def elu(t: Translation, node: Node) -> None:
    """Elu, Celu, Selu: gamma * (max(x, 0) + alpha * (exp(min(x, 0) / divisor) - 1))."""
    alpha = node.attributes.get("alpha", 1.6732632 if node.op == "Selu" else 1.0)
    gamma = node.attributes.get("gamma", 1.0507010) if node.op == "Selu" else 1.0
    divisor = alpha if node.op == "Celu" else 1.0
    landing = t.landing(node.output)
    if alpha == gamma == 1:  # exact in int8, whatever the grids
        int8 = t.grid(node.inputs[0]) is not None and landing.grid is not None
        x = t.read(node.inputs[0], int8=int8)
        t.emit("ELU", [x.tensor], landing, order=x.order, int8=int8)
        return
    x = t.float_value(node.inputs[0])
    shape, rank = x.tensor.shape, len(x.order)

    def scaled(tensor: Tensor, factor: float, word: str) -> Tensor:
        inputs = [tensor, t.number(f"{node.output}:{word}", factor, rank)]
        return t.step("MUL", inputs, f"{node.output}:{word}*", shape, schema.MulOptionsT())

    zero = t.number(f"{node.output}:zero", 0, rank)
    below = t.step("MINIMUM", [x.tensor, zero], f"{node.output}:below", shape, schema.MaximumMinimumOptionsT())
    curve = t.step("ELU", [scaled(below, 1 / divisor, "inner") if divisor != 1 else below], f"{node.output}:elu", shape)
    above = t.step("RELU", [x.tensor], f"{node.output}:above", shape)
    if gamma != 1:
        above = scaled(above, gamma, "gamma")
    inputs = [above, scaled(curve, alpha * gamma, "alpha")]
    t.emit("ADD", inputs, landing, schema.AddOptionsT(), order=x.order, int8=False)


def softplus(t: Translation, node: Node) -> None:
    """log(1 + exp(x)), and Mish, which is x * tanh(softplus(x))."""
    x = t.float_value(node.inputs[0])
    landing = t.landing(node.output)
    addends = _softplus(t, node, x)
    if node.op == "Softplus":
        t.emit("ADD", addends, landing, schema.AddOptionsT(), order=x.order, int8=False)
        return
    shape = x.tensor.shape
    total = t.step("ADD", addends, f"{node.output}:softplus", shape, schema.AddOptionsT())
    gate = t.step("TANH", [total], f"{node.output}:gate", shape)
    t.emit("MUL", [x.tensor, gate], landing, schema.MulOptionsT(), order=x.order, int8=False)


def _softplus(t: Translation, node: Node, x: Value) -> list[Tensor]:
    """Its addends max(x, 0) and log(1 + exp(-|x|)), which do not overflow."""
    shape, name = x.tensor.shape, node.output
    size = t.step("ABS", [x.tensor], f"{name}:abs", shape, schema.AbsOptionsT())
    below = t.step("NEG", [size], f"{name}:neg", shape, schema.NegOptionsT())
    small = t.step("EXP", [below], f"{name}:exp", shape, schema.ExpOptionsT())
    inputs = [small, t.number(f"{name}:one", 1, len(shape))]
    tail = t.step("LOG", [t.step("ADD", inputs, f"{name}:sum", shape, schema.AddOptionsT())], f"{name}:log", shape)
    return [t.step("RELU", [x.tensor], f"{name}:relu", shape), tail]


def reciprocal(t: Translation, node: Node) -> None:
    x = t.float_value(node.inputs[0])
    one = t.number(f"{node.output}:one", 1, len(x.order))
    t.emit("DIV", [one, x.tensor], t.landing(node.output), schema.DivOptionsT(), order=x.order, int8=False)


def gelu(t: Translation, node: Node) -> None:
    x = t.float_value(node.inputs[0])
    options = schema.GeluOptionsT(approximate=node.attributes.get("approximate", b"none") == b"tanh")
    t.emit("GELU", [x.tensor], t.landing(node.output), options, order=x.order, int8=False)


def softmax(t: Translation, node: Node) -> None:
    """Softmax, LogSoftmax: along the last axis of the tensor; XNNPACK (LiteRT 2.3) has no int8 SOFTMAX."""
    x = t.float_value(node.inputs[0])
    rank = len(x.order)
    order = ending_in(x.order, node.attributes.get("axis", -1) % rank)
    op, options = ("SOFTMAX", schema.SoftmaxOptionsT(beta=1.0))
    if node.op == "LogSoftmax":
        op, options = "LOG_SOFTMAX", schema.LogSoftmaxOptionsT()
    t.emit(op, [t.in_order(x, order)], t.landing(node.output), options, order=order, int8=False)
