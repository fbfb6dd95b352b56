"""Layers that multiply matrices: by constant weights (FULLY_CONNECTED), and of two values (BATCH_MATMUL)."""

from __future__ import annotations

from ai_edge_litert import schema_py_generated as schema

from compress.formats.tflite.graph import Node
from compress.formats.tflite.layout import Order, ending_in, plain, same, widened
from compress.formats.tflite.translation import Translation
from compress.formats.tflite_file import Shape, Tensor


def gemm(t: Translation, node: Node) -> None:
    attributes = node.attributes
    if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1 or attributes.get("beta", 1.0) != 1:
        node.refuse("with transA, alpha or beta")
    if not t.is_constant(node.inputs[1]):
        node.refuse("with computed weights", "use torch.matmul")
    _fully_connected(t, node, node.input(2), node.output, transposed=bool(attributes.get("transB", 0)))


def matmul(t: Translation, node: Node) -> None:
    """By constant weights: with the Add of a constant behind it, which is the bias."""
    x, weight = node.inputs
    if not t.is_constant(weight) or t.rank(weight) != 2 or t.is_constant(x) or t.rank(x) < 2:
        _batch_matmul(t, node)
        return
    bias, value = "", node.output
    add = t.graph.only_consumer(value, "Add")
    if add:
        [other] = [name for name in add.inputs if name != value] or [value]
        if t.is_constant(other) and t.graph.constants[other].size == t.shape(value)[-1] == t.shape(other)[-1]:
            bias, value = other, add.output
            t.done.add(add)
    _fully_connected(t, node, bias, value, transposed=False)


def _fully_connected(t: Translation, node: Node, bias: str, value: str, *, transposed: bool) -> None:
    """Over the last axis of the ONNX; the others may lie in any order."""
    name, weight = node.inputs[:2]
    if bias and not t.is_constant(bias):
        node.refuse("with a computed bias")
    outputs = t.shape(value)[-1]
    if bias and t.graph.constants[bias].size not in (1, outputs):
        node.refuse("with a bias per row")
    landing = t.landing(value, fuse=True)
    int8 = t.is_int8(name, landing, weight, bias, output_axis=0 if transposed else 1)
    x = t.read(name, int8=int8)
    rank = len(x.order)
    order = ending_in(x.order, rank - 1)
    tensor = t.in_order(x, order)
    weights_OI = t.parameter(weight, (0, 1) if transposed else (1, 0), stored=int8)
    bias_tensor = t.bias(node, bias, tensor, weight, outputs, stored=int8)
    options = schema.FullyConnectedOptionsT(keepNumDims=rank > 2)
    version = 5 if rank > 2 else None
    t.emit(
        "FULLY_CONNECTED", [tensor, weights_OI, bias_tensor], landing, options, order=order, int8=int8, version=version
    )


def _batch_matmul(t: Translation, node: Node) -> None:
    """In float: XNNPACK (LiteRT 2.3) has no int8 BATCH_MATMUL, and LiteRT's own is a step off on 0.2 % of points."""
    if min(t.rank(name) for name in node.inputs) < 2:
        node.refuse("of a vector", "give it a second axis")
    rank = len(t.shape(node.output))
    left, _ = _matrices(t, node.inputs[0], rank, may_flip=False)
    right, flipped = _matrices(t, node.inputs[1], rank, may_flip=True)
    options = schema.BatchMatMulOptionsT(adjY=flipped)
    t.emit("BATCH_MATMUL", [left, right], t.landing(node.output), options, order=plain(rank), int8=False)


def _matrices(t: Translation, name: str, rank: int, *, may_flip: bool) -> tuple[Tensor, bool]:
    """The value with all axes as in the ONNX, or with the last two exchanged if that moves fewer numbers."""
    straight = plain(rank)
    if t.is_constant(name) or not may_flip:
        return t.operand(name, straight), False
    swapped: Order = (*range(rank - 2), rank - 1, rank - 2)
    order = widened(t.order(name), rank)
    shape: Shape = (1,) * (rank - t.rank(name)) + t.shape(name)
    # A TRANSPOSE that leaves the last axis in its place copies whole rows.
    flip = not same(shape, order, straight) and order[-1] == rank - 2
    return t.operand(name, swapped if flip else straight), flip
