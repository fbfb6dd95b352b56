"""The ONNX graph as the writer reads it: nodes in order, constants, shapes, and who reads what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import onnx
from onnx import helper, numpy_helper

from compress.errors import ModelError
from compress.formats.tflite_file import Grid, Shape

OLDEST_OPSET = 13
"""Before it, Softmax and other operators meant something else."""

PLAIN_NAME = re.compile(r"(val|tmp|node)?_?\d*")
"""Names that torch's exporter makes up: they say nothing of the layer."""


@dataclass(frozen=True, eq=False)
class Node:
    op: str
    place: str
    """What an error names: the output, whose name carries the layer's path, unless the exporter made it up."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def output(self) -> str:
        return self.outputs[0]

    def input(self, index: int) -> str:
        """The name of an input, empty if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def refuse(self, detail: str = "", way_out: str = "") -> NoReturn:
        raise ModelError(
            self.place,
            " ".join(["operator", self.op, *filter(None, [detail]), "has no TFLite counterpart here"]),
            way_out or "rewrite the layer, or export to ONNX only",
        )


@dataclass(frozen=True)
class Stored:
    """A constant that the ONNX keeps as integers in front of a DequantizeLinear."""

    name: str
    """Of the integers."""
    integers: np.ndarray
    scales: np.ndarray
    """One, or one per index along `axis`."""
    zero_point: int
    axis: int

    @property
    def real(self) -> np.ndarray:
        shape = [1] * self.integers.ndim
        if len(self.scales) > 1:
            shape[self.axis] = -1
        shifted = self.integers.astype(np.float32) - np.float32(self.zero_point)
        return shifted * (self.scales.reshape(shape) if shape else self.scales[0])

    @property
    def grid(self) -> Grid | None:
        """Of an 8-bit constant with one scale."""
        if len(self.scales) > 1 or self.integers.dtype not in (np.uint8, np.int8):
            return None
        return int8_grid(self.scales, np.asarray(self.zero_point, self.integers.dtype))

    @property
    def is_symmetric_int8(self) -> bool:
        return self.integers.dtype == np.int8 and self.zero_point == 0

    def transposed(self, axes: Sequence[int]) -> Stored:
        return replace(self, integers=self.integers.transpose(axes), axis=list(axes).index(self.axis))


class Graph:
    """Nodes in execution order, constants, shapes and consumers.

    Identity and Dropout are gone, and so is what can be computed now: a node all of whose inputs are constants.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
        if opset < OLDEST_OPSET:
            raise ModelError(
                "ONNX file", f"has opset {opset}, read are {OLDEST_OPSET} and later", "export with opset 18"
            )
        constant_names = {tensor.name for tensor in model.graph.initializer}
        for value in model.graph.input:
            dims = value.type.tensor_type.shape.dim
            if value.name not in constant_names and any(dim.dim_value <= 0 for dim in dims):
                raise ModelError(
                    value.name, "the input's shape is not fixed", "export with a fixed batch and image size"
                )
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        self._opsets = list(model.opset_import)
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.stored: dict[str, Stored] = {}
        self.halves: dict[str, tuple[str, np.ndarray]] = {}
        """Constants that the ONNX keeps in float16 in front of a Cast to float32: their names and values there."""
        self.nodes: list[Node] = []
        self.consumers: dict[str, list[Node]] = {}
        self._shapes = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in [*graph.input, *graph.value_info, *graph.output]
            if value.type.tensor_type.HasField("shape")
        }
        results = {value.name for value in graph.output}
        same: dict[str, str] = {}
        for proto in graph.node:
            node = Node(
                op=proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}",
                place=_place(proto, results),
                inputs=tuple(same.get(name, name) for name in proto.input),
                outputs=tuple(proto.output),
                attributes={a.name: helper.get_attribute_value(a) for a in proto.attribute},
            )
            if node.op in ("Identity", "Dropout"):
                same[node.output] = node.inputs[0]
            elif not self._fold(node, proto):
                self.nodes.append(node)
        self.inputs = [value.name for value in graph.input if value.name not in self.constants]
        self.outputs = [same.get(value.name, value.name) for value in graph.output]
        self.index()

    def index(self) -> None:
        """Finds the consumers; to be called when `nodes` has changed."""
        self.consumers = {}
        self.producers = {name: node for node in self.nodes for name in node.outputs}
        for node in self.nodes:
            for name in set(node.inputs):
                self.consumers.setdefault(name, []).append(node)

    def shape(self, name: str) -> Shape:
        """The shape in the ONNX, NCHW for images."""
        if name in self.constants:
            return self.constants[name].shape
        shape = self._shapes.get(name)
        if shape is None or any(dim <= 0 for dim in shape):
            raise ModelError(
                name, "ONNX shape inference finds no fixed shape", "export with a fixed batch and image size"
            )
        return shape

    def only_consumer(self, name: str, *ops: str) -> Node | None:
        """The one node that reads `name`, if it is one of `ops` and `name` is no output of the graph."""
        consumers = self.consumers.get(name, [])
        alone = len(consumers) == 1 and name not in self.outputs
        return consumers[0] if alone and consumers[0].op in ops else None

    def grid(self, node: Node) -> Grid:
        """The int8 grid of a QuantizeLinear or DequantizeLinear of activations."""
        scale = self.constants.get(node.input(1))
        zero_point = self.constants.get(node.input(2), np.zeros((), np.uint8))
        if scale is None or scale.size != 1 or zero_point.size != 1 or zero_point.dtype not in (np.uint8, np.int8):
            node.refuse("with other than one constant scale and one 8-bit zero point")
        return int8_grid(scale, zero_point)

    def scalar(self, name: str) -> float | None:
        """The number that a constant of one element holds."""
        values = self.constants.get(name)
        return float(values.item()) if values is not None and values.size == 1 else None

    def integers(self, node: Node, index: int, default: Sequence[int] | None = None) -> list[int]:
        """A constant list of whole numbers that the node reads as input `index`."""
        if not node.input(index) and default is not None:
            return list(default)
        values = self.constants.get(node.input(index))
        if values is None:
            node.refuse(f"with a computed input {index + 1}", "use fixed shapes and indices")
        return [int(value) for value in values.reshape(-1)]

    def _fold(self, node: Node, proto: onnx.NodeProto) -> bool:
        """Whether the node's result is a constant, which is then stored."""
        if node.op == "Constant":
            self.constants[node.output] = _constant_value(node)
        elif node.op == "Shape" and not node.attributes and node.inputs[0] in self._shapes:
            self.constants[node.output] = np.asarray(self.shape(node.inputs[0]), np.int64)
        elif not all(name == "" or name in self.constants for name in node.inputs) or not node.inputs:
            return False
        elif node.op == "DequantizeLinear":
            self.stored[node.output] = self._read_stored(node)
            self.constants[node.output] = self.stored[node.output].real
        else:
            values = self._computed(node, proto)
            if values is None:
                return False
            self.constants.update(zip(node.outputs, values, strict=True))
            self._keep_storage(node)
        return True

    def _keep_storage(self, node: Node) -> None:
        """A cast from float16, or a transposed integer constant, is still stored as it was."""
        source = node.inputs[0]
        if node.op == "Cast" and self.constants[source].dtype == np.float16:
            self.halves[node.output] = (source, self.constants[source])
        elif node.op == "Transpose" and source in self.stored:
            axes = node.attributes.get("perm", range(self.constants[source].ndim)[::-1])
            self.stored[node.output] = self.stored[source].transposed(axes)
        elif node.op == "Transpose" and source in self.halves:
            axes = node.attributes.get("perm", range(self.constants[source].ndim)[::-1])
            name, values = self.halves[source]
            self.halves[node.output] = (name, values.transpose(axes))

    def _computed(self, node: Node, proto: onnx.NodeProto) -> list[np.ndarray] | None:
        """The results of a node of constants by ONNX's reference implementation, if it has one."""
        from onnx.reference import ReferenceEvaluator  # slow to import, and seldom needed

        copy = onnx.NodeProto()
        copy.CopyFrom(proto)
        del copy.input[:]
        copy.input.extend(node.inputs)
        feeds = {name: self.constants[name] for name in node.inputs if name}
        values = [onnx.ValueInfoProto(name=name) for name in feeds]
        results = [onnx.ValueInfoProto(name=name) for name in node.outputs]
        model = helper.make_model(helper.make_graph([copy], "constant", values, results), opset_imports=self._opsets)
        try:
            found = list(ReferenceEvaluator(model).run(None, feeds))
        except Exception:  # whatever it lacks is left to the operator's own translation, which refuses by name
            return None
        return [np.asarray(array) for array in found]

    def _read_stored(self, node: Node) -> Stored:
        integers, scales = self.constants[node.inputs[0]], self.constants[node.inputs[1]]
        zero_points = self.constants.get(node.input(2), np.zeros((), integers.dtype))
        if scales.ndim > 1 or np.unique(zero_points).size != 1:
            node.refuse("with blocks or with different zero points", "quantize weights symmetrically")
        axis = node.attributes.get("axis", 1) % max(integers.ndim, 1)
        return Stored(node.inputs[0], integers, np.atleast_1d(scales), int(zero_points.flat[0]), axis)


def _place(proto: onnx.NodeProto, results: set[str]) -> str:
    output = proto.output[0]
    if proto.name and (output in results or PLAIN_NAME.fullmatch(output)):
        return str(proto.name)
    return str(output)


def _constant_value(node: Node) -> np.ndarray:
    kind, value = next(iter(node.attributes.items()))
    if kind == "value":
        return numpy_helper.to_array(value)
    return np.asarray(value, np.float32 if kind.startswith("value_float") else np.int64)


def int8_grid(scale: np.ndarray, zero_point: np.ndarray) -> Grid:
    shift = 128 if zero_point.dtype == np.uint8 else 0
    return Grid(np.float32(scale.item()), int(zero_point.item()) - shift)
