"""ONNX to TFLite, operator by operator: the exported ONNX is the only source of the TFLite file.

Three rules hold the translation together.

Layout: a value of rank 4 lies as NHWC, every other value as in the ONNX. Where an operator counts elements in NCHW
order (reshape, flatten), a TRANSPOSE restores it.

Numbers: a float value between QuantizeLinear and DequantizeLinear exists on its grid only. The ONNX stores a grid's
points as uint8, TFLite as int8: the same scale, the zero point 128 lower. An operator becomes an int8 kernel if all it
reads lies on grids and a QuantizeLinear follows; else it stays in float, between DEQUANTIZE and QUANTIZE.

Names: a tensor has the name of the ONNX value it holds (of the QuantizeLinear's output if it is int8), so that both
runtimes can be compared value by value. Tensors that the ONNX does not know have a colon in their name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from onnx import numpy_helper

from compress.errors import ModelError
from compress.formats.tflite_file import Grid, Shape, Tensor, TFLiteFile, pack, unpack

NHWC = (0, 2, 3, 1)  # where NHWC takes its axes from, in NCHW
NCHW = (0, 3, 1, 2)  # and back

Pads = tuple[tuple[int, int], ...]  # (before, after) per axis

SIGMOID_GRID = Grid(np.float32(1 / 256), -128)  # the only output grid of the int8 LOGISTIC kernel


def to_tflite(model: onnx.ModelProto, metadata: Mapping[str, str]) -> bytes:
    """The network as a TFLite file, float or int8 as the ONNX is; images go in as NHWC.

    An input that the ONNX quantizes first, and an output that it dequantizes last, are int8 tensors of the file.
    Raises ModelError for an operator without a counterpart, and for shapes that are not fixed.
    """
    return _Translation(_Graph(model)).to_bytes(metadata)


def read_metadata(data: bytes) -> dict[str, str]:
    """The texts that `to_tflite` stored in a TFLite file, by key."""
    model = unpack(data)
    texts = {}
    for entry in model.metadata or []:
        content = model.buffers[entry.buffer].data
        texts[entry.name.decode()] = "" if content is None else bytes(content).decode(errors="replace")
    return texts


def tensor_names(data: bytes) -> set[str]:
    """All tensors of the file; an ONNX value that was folded into an operator is not among them."""
    return {tensor.name.decode() for tensor in unpack(data).subgraphs[0].tensors}


def with_outputs(data: bytes, names: Sequence[str]) -> bytes:
    """The same file with the tensors `names` appended to its outputs, in that order, so that a runtime must keep them.

    A tensor that is an output already is not repeated. Raises ModelError for a name that the file does not have.
    """
    model = unpack(data)
    graph = model.subgraphs[0]
    indices = {tensor.name.decode(): index for index, tensor in enumerate(graph.tensors)}
    outputs = list(graph.outputs)
    for name in names:
        if name not in indices:
            raise ModelError(name, "the TFLite file has no tensor of this name", "see the names in the ONNX file")
        if indices[name] not in outputs:
            outputs.append(indices[name])
    graph.outputs = outputs
    return pack(model)


# ---- the ONNX graph, read once -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Node:
    op: str
    place: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]

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
class _Stored:
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


class _Graph:
    """Nodes in execution order, constants, shapes and consumers. Identity and Dropout are gone."""

    def __init__(self, model: onnx.ModelProto) -> None:
        constant_names = {tensor.name for tensor in model.graph.initializer}
        for value in model.graph.input:
            dims = value.type.tensor_type.shape.dim
            if value.name not in constant_names and any(dim.dim_value <= 0 for dim in dims):
                raise ModelError(
                    value.name, "the input's shape is not fixed", "export with a fixed batch and image size"
                )
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.stored: dict[str, _Stored] = {}
        self.nodes: list[_Node] = []
        self.consumers: dict[str, list[_Node]] = {}
        self._shapes = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in [*graph.input, *graph.value_info, *graph.output]
            if value.type.tensor_type.HasField("shape")
        }
        same: dict[str, str] = {}
        for proto in graph.node:
            node = _Node(
                op=proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}",
                place=proto.name or proto.output[0],
                inputs=tuple(same.get(name, name) for name in proto.input),
                output=proto.output[0],
                attributes={a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute},
            )
            if node.op in ("Identity", "Dropout"):
                same[node.output] = node.inputs[0]
            elif node.op == "Constant":
                self.constants[node.output] = _constant_value(node)
            elif node.op == "DequantizeLinear" and node.inputs[0] in self.constants:
                self.stored[node.output] = self._read_stored(node)
                self.constants[node.output] = self.stored[node.output].real
            else:
                self.nodes.append(node)
        for node in self.nodes:
            for name in set(node.inputs):
                self.consumers.setdefault(name, []).append(node)
        self.inputs = [value.name for value in graph.input if value.name not in self.constants]
        self.outputs = [same.get(value.name, value.name) for value in graph.output]

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

    def only_consumer(self, name: str, *ops: str) -> _Node | None:
        """The one node that reads `name`, if it is one of `ops` and `name` is no output of the graph."""
        consumers = self.consumers.get(name, [])
        alone = len(consumers) == 1 and name not in self.outputs
        return consumers[0] if alone and consumers[0].op in ops else None

    def grid(self, node: _Node) -> Grid:
        """The int8 grid of a QuantizeLinear or DequantizeLinear of activations."""
        scale = self.constants.get(node.input(1))
        zero_point = self.constants.get(node.input(2), np.zeros((), np.uint8))
        if scale is None or scale.size != 1 or zero_point.size != 1 or zero_point.dtype not in (np.uint8, np.int8):
            node.refuse("with other than one constant scale and one 8-bit zero point")
        return _int8_grid(scale, zero_point)

    def activation(self, node: _Node) -> str:
        """RELU or RELU6, for a Relu or Clip."""
        if node.op == "Relu":
            return "RELU"
        low, high = (self.constants.get(node.input(i)) for i in (1, 2))
        if low is not None and low == 0:
            if high is None or high >= np.finfo(np.float32).max:
                return "RELU"
            if high == 6:
                return "RELU6"
        node.refuse("with other bounds than 0 and 6", "use ReLU or ReLU6")

    def _read_stored(self, node: _Node) -> _Stored:
        integers, scales = self.constants[node.inputs[0]], self.constants[node.inputs[1]]
        zero_points = self.constants.get(node.input(2), np.zeros((), integers.dtype))
        if scales.ndim > 1 or np.unique(zero_points).size != 1:
            node.refuse("with blocks or with different zero points", "quantize weights symmetrically")
        axis = node.attributes.get("axis", 1) % max(integers.ndim, 1)
        return _Stored(node.inputs[0], integers, np.atleast_1d(scales), int(zero_points.flat[0]), axis)


def _constant_value(node: _Node) -> np.ndarray:
    kind, value = next(iter(node.attributes.items()))
    if kind == "value":
        return numpy_helper.to_array(value)
    return np.asarray(value, np.float32 if kind.startswith("value_float") else np.int64)


def _int8_grid(scale: np.ndarray, zero_point: np.ndarray) -> Grid:
    shift = 128 if zero_point.dtype == np.uint8 else 0
    return Grid(np.float32(scale.item()), int(zero_point.item()) - shift)


# ---- shapes and windows ------------------------------------------------------------------------------------


def _to_nhwc(shape: Shape) -> Shape:
    return tuple(shape[axis] for axis in NHWC) if len(shape) == 4 else shape


def _one_order(shape_NCHW: Shape) -> bool:
    """NCHW and NHWC put the elements in the same order."""
    return len(shape_NCHW) != 4 or shape_NCHW[1] == 1 or shape_NCHW[2] * shape_NCHW[3] == 1


def _same_pads(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """What TFLite's SAME padding puts before and after `size` elements; `kernel` counts its dilation."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@dataclass(frozen=True)
class _Window:
    """How a convolution or pooling walks over the image; pairs are (vertical, horizontal)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: Pads

    @classmethod
    def of(cls, node: _Node, image: Shape, kernel: Sequence[int], outputs: Shape) -> _Window:
        """Read from the attributes; `image` and `outputs` are (height, width)."""
        strides = tuple(node.attributes.get("strides", (1, 1)))
        dilations = tuple(node.attributes.get("dilations", (1, 1)))
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        auto_pad = node.attributes.get("auto_pad", b"NOTSET")
        if auto_pad == b"NOTSET":
            begin_end = node.attributes.get("pads", (0, 0, 0, 0))
            pads = [(begin_end[0], begin_end[2]), (begin_end[1], begin_end[3])]
        elif auto_pad == b"VALID":
            pads = [(0, 0), (0, 0)]
        else:
            pads = [_same_pads(*walk) for walk in zip(image, spans, strides, strict=True)]
            if auto_pad == b"SAME_LOWER":
                pads = [(after, before) for before, after in pads]
        if node.attributes.get("ceil_mode", 0):  # the last window may stand over the edge: pad as far as it reaches
            for axis, (before, after) in enumerate(pads):
                last = (outputs[axis] - 1) * strides[axis]
                if last >= image[axis] + before:
                    # ONNX shape inference counts such a window, runtimes leave it out.
                    node.refuse("with ceil_mode and a last window that sees padding only", "use ceil_mode=False")
                pads[axis] = (before, max(after, last + spans[axis] - image[axis] - before))
        return cls(tuple(kernel), strides, dilations, tuple(pads))

    def padded(self, extra: Pads) -> _Window:
        summed = tuple((a + c, b + d) for (a, b), (c, d) in zip(self.pads, extra, strict=True))
        return _Window(self.kernel, self.strides, self.dilations, summed)

    def is_same(self, image: Shape) -> bool:
        """TFLite's SAME puts exactly these pads around `image`."""
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        return self.pads == tuple(_same_pads(*walk) for walk in zip(image, spans, self.strides, strict=True))

    @property
    def is_valid(self) -> bool:
        return not any(map(any, self.pads))


# ---- the translation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Landing:
    """Where a node's result ends up once the activation and the QuantizeLinear behind it are taken in."""

    value: str
    """The float value."""
    activation: str
    quantize: _Node | None
    grid: Grid | None
    absorbed: tuple[_Node, ...]
    """Activation nodes, without the QuantizeLinear: only an int8 kernel absorbs that one."""


class _Translation:
    """Walks over the ONNX nodes once and writes the TFLite operators."""

    def __init__(self, graph: _Graph) -> None:
        self.graph = graph
        self.file = TFLiteFile()
        self.values: dict[str, Tensor] = {}  # by ONNX value; int8 if the value lies on a grid
        self.floats: dict[int, Tensor] = {}  # dequantized copies, by the int8 tensor's index
        self.padded: dict[str, tuple[str, Pads]] = {}  # values not written yet: another value, and zeros around it
        self.done: set[_Node] = set()
        self.inputs = [self._graph_input(name) for name in graph.inputs]
        for node in graph.nodes:
            if node in self.done:
                continue
            if node.op not in OPERATORS:
                node.refuse()
            OPERATORS[node.op](self, node)

    def to_bytes(self, metadata: Mapping[str, str]) -> bytes:
        outputs = [self.tensor(name) for name in self.graph.outputs]
        return self.file.to_bytes(inputs=self.inputs, outputs=outputs, metadata=metadata)

    def _graph_input(self, name: str) -> Tensor:
        quantize = self.graph.only_consumer(name, "QuantizeLinear")
        shape = _to_nhwc(self.graph.shape(name))
        if quantize:
            self.done.add(quantize)
            name = quantize.output
        self.values[name] = self.file.tensor(name, shape, self.graph.grid(quantize) if quantize else None)
        return self.values[name]

    # -- reading values

    def tensor(self, name: str) -> Tensor:
        """The tensor that holds an ONNX value, float or int8."""
        if name not in self.values and name in self.padded:
            source, pads = self.padded[name]
            self.values[name] = self._pad(self.tensor(source), pads, name)
        if name not in self.values and name in self.graph.constants:
            values = self.graph.constants[name].astype(np.float32)
            self.values[name] = self.file.constant(
                name, np.ascontiguousarray(values.transpose(NHWC)) if values.ndim == 4 else values
            )
        return self.values[name]

    def float_tensor(self, name: str) -> Tensor:
        """The value in float32, dequantized if need be."""
        x = self.tensor(name)
        if x.grid is None:
            return x
        if x.index not in self.floats:
            label = f"{name}:float" if name == x.name else name
            self.floats[x.index] = self.file.tensor(label, x.shape)
            self.file.operator("DEQUANTIZE", [x], self.floats[x.index], schema.DequantizeOptionsT())
        return self.floats[x.index]

    def parameter(self, name: str, axes: Sequence[int], *, stored: bool) -> Tensor:
        """A weight with its axes permuted: the integers and scales of the ONNX if `stored`, else float32."""
        if not stored:
            return self.file.constant(name, np.ascontiguousarray(self.graph.constants[name].transpose(axes)))
        weight = self.graph.stored[name]
        axis = list(axes).index(weight.axis)
        return self.file.constant(
            weight.name, np.ascontiguousarray(weight.integers.transpose(axes)), scales=weight.scales, axis=axis
        )

    def bias(self, node: _Node, name: str, x: Tensor, weight: str, count: int, *, stored: bool) -> Tensor:
        """The bias of `count` outputs; zeros where the ONNX has none, since not every kernel does without."""
        if not name:
            label = f"{node.output}:bias"
            if not stored or x.grid is None:
                return self.file.constant(label, np.zeros(count, np.float32))
            scales = x.grid.scale * self.graph.stored[weight].scales
            return self.file.constant(label, np.zeros(count, np.int32), scales=scales)
        if not stored:
            values = np.broadcast_to(self.graph.constants[name].reshape(-1), (count,))
            return self.file.constant(name, np.ascontiguousarray(values))
        bias = self.graph.stored[name]
        return self.file.constant(bias.name, bias.integers.reshape(count), scales=bias.scales)

    def is_int8(self, x: Tensor, landing: _Landing, weight: str, bias: str, *, output_axis: int) -> bool:
        """TFLite's int8 layers take these parameters: symmetric weights, scales per tensor or per output."""
        if x.grid is None or landing.grid is None or weight not in self.graph.stored:
            return False
        weights = self.graph.stored[weight]
        symmetric = weights.integers.dtype == np.int8 and weights.zero_point == 0
        per_output = len(weights.scales) == 1 or weights.axis == output_axis
        biases = self.graph.stored.get(bias)
        return symmetric and per_output and (not bias or (biases is not None and biases.integers.dtype == np.int32))

    # -- writing values

    def landing(self, value: str, *, fuse: bool = False) -> _Landing:
        activation = "NONE"
        absorbed: tuple[_Node, ...] = ()
        node = self.graph.only_consumer(value, "Relu", "Clip") if fuse else None
        if node:
            value, activation, absorbed = node.output, self.graph.activation(node), (node,)
        quantize = self.graph.only_consumer(value, "QuantizeLinear")
        return _Landing(value, activation, quantize, self.graph.grid(quantize) if quantize else None, absorbed)

    def emit(
        self,
        op: str,
        inputs: Sequence[Tensor],
        landing: _Landing,
        options: Any = None,
        *,
        int8: bool,
        version: int | None = None,
    ) -> None:
        """Writes an operator that computes; `int8` lets it write onto the landing's grid."""
        self.done.update(landing.absorbed)
        name = landing.value
        if int8 and landing.quantize:
            self.done.add(landing.quantize)
            name = landing.quantize.output
        self.values[name] = self.file.tensor(
            name,
            _to_nhwc(self.graph.shape(landing.value)),
            landing.grid if int8 else None,
            nonnegative=landing.activation != "NONE" or op in ("RELU", "RELU6"),
        )
        if options is not None and landing.activation != "NONE":
            options.fusedActivationFunction = getattr(schema.ActivationFunctionType, landing.activation)
        self.file.operator(op, inputs, self.values[name], options, version)

    def carry(self, op: str, inputs: Sequence[Tensor], value: str, options: Any = None) -> None:
        """Writes an operator that moves numbers without changing them: the result lies on the first input's grid."""
        grid = inputs[0].grid
        shape = _to_nhwc(self.graph.shape(value))
        quantize = self.graph.only_consumer(value, "QuantizeLinear")
        if grid and quantize and self.graph.grid(quantize) == grid:
            self.done.add(quantize)
            value = quantize.output
        nonnegative = grid is None and inputs[0].nonnegative
        self.values[value] = self.file.tensor(value, shape, grid, nonnegative=nonnegative)
        self.file.operator(op, inputs, self.values[value], options)

    def on_grid(self, name: str, grid: Grid, result: str) -> Tensor:
        """The value on `grid`, written to a tensor `result` if it lies elsewhere.

        By way of float: XNNPACK's QUANTIZE from int8 to int8 rounds the ratio of the scales to 1/256, and one random
        point in eight came out a step off (0.03 onto 0.04, LiteRT 2.3); this way only exact ties can.
        """
        if self.tensor(name).grid == grid:
            return self.tensor(name)
        x = self.float_tensor(name)
        output = self.file.tensor(result, x.shape, grid)
        self.file.operator("QUANTIZE", [x], output, schema.QuantizeOptionsT())
        return output

    def integers(self, name: str, values: Any) -> Tensor:
        return self.file.constant(name, np.asarray(values, np.int32))

    def _pad(self, x: Tensor, pads: Pads, name: str, *, lowest: bool = False) -> Tensor:
        """`x` with zeros around it, or with the lowest number it can hold; `pads` in the ONNX's order of axes."""
        stored_pads = np.asarray([pads[axis] for axis in NHWC] if len(pads) == 4 else pads, np.int32)
        shape = tuple(int(size + sum(pad)) for size, pad in zip(x.shape, stored_pads, strict=True))
        output = self.file.tensor(name, shape, x.grid, nonnegative=x.nonnegative)
        inputs = [x, self.integers(f"{name}:pads", stored_pads)]
        # PAD fills with real zero, which is the zero point on a grid.
        zero_is_lowest = x.nonnegative if x.grid is None else x.grid.zero_point == -128
        if lowest and not zero_is_lowest:
            low = np.full(1, np.finfo(np.float32).min, np.float32) if x.grid is None else np.full(1, -128, np.int8)
            inputs.append(self.file.constant(f"{name}:lowest", low, grid=x.grid))
            self.file.operator("PADV2", inputs, output, schema.PadV2OptionsT())
        else:
            self.file.operator("PAD", inputs, output, schema.PadOptionsT())
        return output

    def around(self, x: Tensor, window: _Window, value: str, *, lowest: bool = False) -> tuple[Tensor, int]:
        """`x` and TFLite's padding code for `window`; an explicit PAD where neither SAME nor VALID fits."""
        if window.is_valid:
            return x, schema.Padding.VALID
        if window.is_same(x.shape[1:3]):
            return x, schema.Padding.SAME
        pads = ((0, 0), (0, 0), *window.pads)
        return self._pad(x, pads, f"{value}:padded", lowest=lowest), schema.Padding.VALID

    # -- quantization

    def quantize(self, node: _Node) -> None:
        grid = self.graph.grid(node)
        name = node.inputs[0]
        if name in self.padded and self.tensor(self.padded[name][0]).grid == grid:
            self.padded[node.output] = self.padded[name]
            return
        self.values[node.output] = self.on_grid(name, grid, node.output)

    def dequantize(self, node: _Node) -> None:
        name = node.inputs[0]
        if name in self.padded:
            self.padded[node.output] = self.padded[name]
            name = self.padded[name][0]
        else:
            self.values[node.output] = self.tensor(name)
        if self.tensor(name).grid != self.graph.grid(node):
            node.refuse("with another grid than its QuantizeLinear")

    # -- layers with weights

    def conv(self, node: _Node) -> None:
        weight, bias = node.inputs[1], node.input(2)
        if weight not in self.graph.constants or (bias and bias not in self.graph.constants):
            node.refuse("with computed weights")
        shape_OIHW = self.graph.shape(weight)
        if len(shape_OIHW) != 4:
            node.refuse(f"over {len(shape_OIHW) - 2} axes", "use Conv2d")
        outputs, inputs_per_group, *kernel = shape_OIHW
        groups = node.attributes.get("group", 1)
        depthwise = groups > 1 and inputs_per_group == 1

        name, before = self._without_pad(node.inputs[0])
        window = _Window.of(node, self.graph.shape(node.inputs[0])[2:], kernel, self.graph.shape(node.output)[2:])
        landing = self.landing(node.output, fuse=True)
        int8 = self.is_int8(self.tensor(name), landing, weight, bias, output_axis=0)
        x = self.tensor(name) if int8 else self.float_tensor(name)
        bias_tensor = self.bias(node, bias, x, weight, outputs, stored=int8)
        x, padding = self.around(x, window.padded(before), node.output)
        common = {
            "padding": padding,
            "strideH": window.strides[0],
            "strideW": window.strides[1],
            "dilationHFactor": window.dilations[0],
            "dilationWFactor": window.dilations[1],
        }
        options: Any
        if depthwise:
            filters = self.parameter(weight, (1, 2, 3, 0), stored=int8)
            options = schema.DepthwiseConv2DOptionsT(depthMultiplier=outputs // groups, **common)
            version = None if int8 or window.dilations == (1, 1) else 2
            self.emit("DEPTHWISE_CONV_2D", [x, filters, bias_tensor], landing, options, int8=int8, version=version)
        else:
            filters = self.parameter(weight, NHWC, stored=int8)
            version = 6 if groups > 1 else None
            options = schema.Conv2DOptionsT(**common)
            self.emit("CONV_2D", [x, filters, bias_tensor], landing, options, int8=int8, version=version)

    def _without_pad(self, name: str) -> tuple[str, Pads]:
        """The value before a Pad of zeros around the image, and those zeros as (vertical, horizontal)."""
        if name in self.padded:
            source, pads = self.padded[name]
            if len(pads) == 4 and pads[:2] == ((0, 0), (0, 0)):
                return source, pads[2:]
        return name, ((0, 0), (0, 0))

    def gemm(self, node: _Node) -> None:
        attributes = node.attributes
        if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1 or attributes.get("beta", 1.0) != 1:
            node.refuse("with transA, alpha or beta")
        self._fully_connected(node, node.input(2), node.output, transposed=bool(attributes.get("transB", 0)))

    def matmul(self, node: _Node) -> None:
        """With the Add of a constant behind it, which is the bias."""
        bias, value = "", node.output
        add = self.graph.only_consumer(value, "Add")
        if add:
            [other] = [name for name in add.inputs if name != value] or [value]
            if other in self.graph.constants and self.graph.constants[other].size == self.graph.shape(value)[-1]:
                bias, value = other, add.output
                self.done.add(add)
        self._fully_connected(node, bias, value, transposed=False)

    def _fully_connected(self, node: _Node, bias: str, value: str, *, transposed: bool) -> None:
        name, weight = node.inputs[:2]
        if weight not in self.graph.constants or (bias and bias not in self.graph.constants):
            node.refuse("with computed weights")
        if len(self.graph.shape(name)) != 2 or len(self.graph.shape(weight)) != 2:
            node.refuse("on other than matrices", "flatten the input first")
        landing = self.landing(value, fuse=True)
        int8 = self.is_int8(self.tensor(name), landing, weight, bias, output_axis=0 if transposed else 1)
        x = self.tensor(name) if int8 else self.float_tensor(name)
        weights_OI = self.parameter(weight, (0, 1) if transposed else (1, 0), stored=int8)
        bias_tensor = self.bias(node, bias, x, weight, weights_OI.shape[0], stored=int8)
        options = schema.FullyConnectedOptionsT()
        self.emit("FULLY_CONNECTED", [x, weights_OI, bias_tensor], landing, options, int8=int8)

    # -- element by element

    def binary(self, node: _Node) -> None:
        """Add, Sub, Mul, Div: two values, or a value and a constant."""
        landing = self.landing(node.output, fuse=True)
        grids = [self._operand_grid(name) for name in node.inputs]
        int8 = landing.grid is not None and None not in grids and node.op != "Div"
        rank = len(self.graph.shape(node.output))
        inputs = [self._operand(node, name, rank, int8=int8) for name in node.inputs]
        version = None
        if int8 and landing.grid and node.op == "Mul":  # op_version.cc: 3 where the product is rescaled by 1 or more
            product_scale = math.prod(float(grid.scale) for grid in grids if grid)
            version = 3 if product_scale >= landing.grid.scale else 2
        options = getattr(schema, f"{node.op}OptionsT")()
        self.emit(node.op.upper(), inputs, landing, options, int8=int8, version=version)

    def _operand_grid(self, name: str) -> Grid | None:
        if name in self.graph.stored:
            stored = self.graph.stored[name]
            if len(stored.scales) == 1 and stored.integers.dtype in (np.uint8, np.int8):
                return _int8_grid(stored.scales, np.asarray(stored.zero_point, stored.integers.dtype))
            return None
        return None if name in self.graph.constants else self.tensor(name).grid

    def _operand(self, node: _Node, name: str, rank: int, *, int8: bool) -> Tensor:
        if name not in self.graph.constants:
            if len(self.graph.shape(name)) != rank:
                node.refuse("of values of different rank", "reshape one of them first")
            return self.tensor(name) if int8 else self.float_tensor(name)
        values = self.graph.constants[name].astype(np.float32)
        grid = None
        if int8:
            stored, grid = self.graph.stored[name], self._operand_grid(name)
            shift = 128 if stored.integers.dtype == np.uint8 else 0
            values = (stored.integers.astype(np.int16) - shift).astype(np.int8)
        values = values.reshape((1,) * (rank - values.ndim) + values.shape)
        if rank == 4:
            values = np.ascontiguousarray(values.transpose(NHWC))
        return self.file.constant(name, values, grid=grid)

    def activation(self, node: _Node) -> None:
        """A Relu or Clip that no layer before it could take in; in float, since XNNPACK has no int8 RELU."""
        x = self.float_tensor(node.inputs[0])
        self.emit(self.graph.activation(node), [x], self.landing(node.output), int8=False)

    def sigmoid(self, node: _Node) -> None:
        landing = self.landing(node.output)
        int8 = self.tensor(node.inputs[0]).grid is not None and landing.grid == SIGMOID_GRID
        x = self.tensor(node.inputs[0]) if int8 else self.float_tensor(node.inputs[0])
        self.emit("LOGISTIC", [x], landing, int8=int8)

    def softmax(self, node: _Node) -> None:
        """In float: XNNPACK (LiteRT 2.3) has no int8 SOFTMAX."""
        rank = len(self.graph.shape(node.output))
        if node.attributes.get("axis", -1) % rank != (1 if rank == 4 else rank - 1):
            node.refuse("along another axis than the channels")
        x = self.float_tensor(node.inputs[0])
        self.emit("SOFTMAX", [x], self.landing(node.output), schema.SoftmaxOptionsT(beta=1.0), int8=False)

    def hard_swish(self, node: _Node) -> None:
        """In float: XNNPACK has no int8 HARD_SWISH, and LiteRT's own took 1.08 ms on (1, 56, 56, 72), this 0.10 ms."""
        x = self.float_tensor(node.inputs[0])
        self.emit("HARD_SWISH", [x], self.landing(node.output), schema.HardSwishOptionsT(), int8=False)

    def hard_sigmoid(self, node: _Node) -> None:
        """relu6(x + 3) / 6, which is torch's Hardsigmoid; in float, TFLite has no kernel of this name."""
        alpha, beta = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
        if not math.isclose(alpha, 1 / 6, rel_tol=1e-6) or beta != 0.5:
            node.refuse("with other than alpha 1/6 and beta 1/2")
        x = self.float_tensor(node.inputs[0])
        ones = (1,) * len(x.shape)
        clipped = self.file.tensor(f"{node.output}:relu6", x.shape, nonnegative=True)
        three = self.file.constant(f"{node.output}:three", np.full(ones, 3, np.float32))
        relu6 = schema.AddOptionsT(fusedActivationFunction=schema.ActivationFunctionType.RELU6)
        self.file.operator("ADD", [x, three], clipped, relu6)
        sixth = self.file.constant(f"{node.output}:sixth", np.full(ones, alpha, np.float32))
        self.emit("MUL", [clipped, sixth], self.landing(node.output), schema.MulOptionsT(), int8=False)

    # -- pooling

    def max_pool(self, node: _Node) -> None:
        x = self.tensor(node.inputs[0])
        window = self._pool_window(node)
        x, padding = self.around(x, window, node.output, lowest=True)
        self.carry("MAX_POOL_2D", [x], node.output, _pool_options(window, padding))

    def average_pool(self, node: _Node) -> None:
        name = node.inputs[0]
        window = self._pool_window(node)
        image = self.graph.shape(name)[2:]
        if window.is_valid and window.kernel == image:
            return self._mean(node, (2, 3), keepdims=True)
        counts_pads = bool(node.attributes.get("count_include_pad", 0))
        if counts_pads and node.attributes.get("ceil_mode", 0):
            node.refuse("with ceil_mode and count_include_pad")
        fixed_area = counts_pads or window.is_valid
        if not fixed_area and not window.is_same(image):
            node.refuse("with pads that it does not count", "use count_include_pad=True")
        landing = self.landing(node.output)
        int8 = fixed_area and self.tensor(name).grid is not None and landing.grid is not None
        x = self.tensor(name) if int8 else self.float_tensor(name)
        if not window.is_valid and counts_pads:  # SAME would not count what it pads
            x = self._pad(x, ((0, 0), (0, 0), *window.pads), f"{node.output}:padded")
        if int8:
            self._average_by_conv(x, window, landing)
        else:
            padding = schema.Padding.VALID if fixed_area else schema.Padding.SAME
            self.emit("AVERAGE_POOL_2D", [x], landing, _pool_options(window, padding), int8=False)

    def _average_by_conv(self, x: Tensor, window: _Window, landing: _Landing) -> None:
        """An int8 average as a depthwise convolution of ones with scale 1/area.

        XNNPACK (LiteRT 2.3) has no int8 AVERAGE_POOL_2D, and that operator keeps its input's grid: a QUANTIZE behind it
        would round a second time.
        """
        assert x.grid is not None
        channels = x.shape[3]
        scale = np.asarray([1 / math.prod(window.kernel)], np.float32)
        filters = self.file.constant(
            f"{landing.value}:ones", np.ones((1, *window.kernel, channels), np.int8), scales=scale
        )
        bias = self.file.constant(f"{landing.value}:bias", np.zeros(channels, np.int32), scales=x.grid.scale * scale)
        options = schema.DepthwiseConv2DOptionsT(
            padding=schema.Padding.VALID,
            strideH=window.strides[0],
            strideW=window.strides[1],
            depthMultiplier=1,
            dilationHFactor=1,
            dilationWFactor=1,
        )
        self.emit("DEPTHWISE_CONV_2D", [x, filters, bias], landing, options, int8=True)

    def _pool_window(self, node: _Node) -> _Window:
        shape = self.graph.shape(node.inputs[0])
        kernel = node.attributes["kernel_shape"]
        if len(shape) != 4:
            node.refuse(f"over {len(shape) - 2} axes")
        window = _Window.of(node, shape[2:], kernel, self.graph.shape(node.output)[2:])
        if window.dilations != (1, 1):
            node.refuse("with dilation")
        return window

    def global_average_pool(self, node: _Node) -> None:
        self._mean(node, tuple(range(2, len(self.graph.shape(node.inputs[0])))), keepdims=True)

    def reduce_mean(self, node: _Node) -> None:
        rank = len(self.graph.shape(node.inputs[0]))
        axes = self.graph.constants.get(node.input(1), node.attributes.get("axes"))
        if axes is None:
            node.refuse("without constant axes")
        self._mean(node, tuple(int(axis) % rank for axis in axes), keepdims=bool(node.attributes.get("keepdims", 1)))

    def _mean(self, node: _Node, axes: Shape, *, keepdims: bool) -> None:
        """The int8 MEAN may change the grid, so it also serves pooling over the whole image."""
        name = node.inputs[0]
        rank = len(self.graph.shape(name))
        if rank == 4:
            left = [axis for axis in NHWC if axis not in axes]
            if not keepdims and left != sorted(left):
                node.refuse(f"over axes {axes} without keepdims")
            axes = tuple(sorted(NHWC.index(axis) for axis in axes))
        landing = self.landing(node.output)
        int8 = self.tensor(name).grid is not None and landing.grid is not None
        x = self.tensor(name) if int8 else self.float_tensor(name)
        inputs = [x, self.integers(f"{node.output}:axes", axes)]
        self.emit("MEAN", inputs, landing, schema.ReducerOptionsT(keepDims=keepdims), int8=int8)

    # -- moving numbers

    def reshape(self, node: _Node) -> None:
        """Reshape, Flatten, Squeeze, Unsqueeze: all of them name an output shape."""
        x = self.tensor(node.inputs[0])
        old, new = self.graph.shape(node.inputs[0]), self.graph.shape(node.output)
        if old == new:
            self.values[node.output] = x
            return
        if not _one_order(old):
            x = self._transpose(x, NCHW, f"{node.output}:nchw")
        if _one_order(new):
            target = _to_nhwc(new)
            inputs = [x, self.integers(f"{node.output}:shape", target)]
            self.carry("RESHAPE", inputs, node.output, schema.ReshapeOptionsT(newShape=list(target)))
        else:
            nchw = self.file.tensor(f"{node.output}:reshaped", new, x.grid, nonnegative=x.nonnegative)
            inputs = [x, self.integers(f"{node.output}:shape", new)]
            self.file.operator("RESHAPE", inputs, nchw, schema.ReshapeOptionsT(newShape=list(new)))
            self.carry(
                "TRANSPOSE",
                [nchw, self.integers(f"{node.output}:order", NHWC)],
                node.output,
                schema.TransposeOptionsT(),
            )

    def _transpose(self, x: Tensor, order: Sequence[int], name: str) -> Tensor:
        shape = tuple(x.shape[axis] for axis in order)
        output = self.file.tensor(name, shape, x.grid, nonnegative=x.nonnegative)
        self.file.operator("TRANSPOSE", [x, self.integers(f"{name}:order", order)], output, schema.TransposeOptionsT())
        return output

    def transpose(self, node: _Node) -> None:
        x = self.tensor(node.inputs[0])
        rank = len(x.shape)
        order = list(node.attributes.get("perm", range(rank)[::-1]))
        if rank == 4:  # from NHWC back to NCHW, the ONNX's order, and to NHWC again
            order = [NCHW[order[axis]] for axis in NHWC]
        if order == sorted(order):
            self.values[node.output] = x
            return
        inputs = [x, self.integers(f"{node.output}:order", order)]
        self.carry("TRANSPOSE", inputs, node.output, schema.TransposeOptionsT())

    def pad(self, node: _Node) -> None:
        """Put off until the value is read: a convolution takes the zeros into its own padding."""
        constants = self.graph.constants
        pads = constants.get(node.input(1))
        fill = constants.get(node.input(2), np.zeros(()))
        rank = len(self.graph.shape(node.inputs[0]))
        axes = constants.get(node.input(3), np.arange(rank))
        if node.attributes.get("mode", b"constant") != b"constant" or fill.item() != 0:
            node.refuse("with other than zeros")
        if pads is None or (pads < 0).any():
            node.refuse("with computed or negative pads")
        per_axis = [(0, 0)] * rank
        for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
            per_axis[axis] = (int(before), int(after))
        self.padded[node.output] = (node.inputs[0], tuple(per_axis))

    def concat(self, node: _Node) -> None:
        rank = len(self.graph.shape(node.output))
        axis = node.attributes["axis"] % rank
        axis = NHWC.index(axis) if rank == 4 else axis
        landing = self.landing(node.output)
        grids = {self.tensor(name).grid for name in node.inputs}
        grid = landing.grid or next(iter(grids))
        options = schema.ConcatenationOptionsT(axis=axis)
        if grid is None or None in grids or (landing.grid is None and len(grids) > 1):
            inputs = [self.float_tensor(name) for name in node.inputs]
            self.emit("CONCATENATION", inputs, landing, options, int8=False)
        else:  # the int8 kernel wants one grid
            inputs = [self.on_grid(name, grid, f"{node.output}:{i}") for i, name in enumerate(node.inputs)]
            self.carry("CONCATENATION", inputs, node.output, options)


def _pool_options(window: _Window, padding: int) -> schema.Pool2DOptionsT:
    return schema.Pool2DOptionsT(
        padding=padding,
        strideH=window.strides[0],
        strideW=window.strides[1],
        filterHeight=window.kernel[0],
        filterWidth=window.kernel[1],
    )


OPERATORS: dict[str, Callable[[_Translation, _Node], None]] = {
    "Add": _Translation.binary,
    "AveragePool": _Translation.average_pool,
    "Clip": _Translation.activation,
    "Concat": _Translation.concat,
    "Conv": _Translation.conv,
    "DequantizeLinear": _Translation.dequantize,
    "Div": _Translation.binary,
    "Flatten": _Translation.reshape,
    "Gemm": _Translation.gemm,
    "GlobalAveragePool": _Translation.global_average_pool,
    "HardSigmoid": _Translation.hard_sigmoid,
    "HardSwish": _Translation.hard_swish,
    "MatMul": _Translation.matmul,
    "MaxPool": _Translation.max_pool,
    "Mul": _Translation.binary,
    "Pad": _Translation.pad,
    "QuantizeLinear": _Translation.quantize,
    "ReduceMean": _Translation.reduce_mean,
    "Relu": _Translation.activation,
    "Reshape": _Translation.reshape,
    "Sigmoid": _Translation.sigmoid,
    "Softmax": _Translation.softmax,
    "Squeeze": _Translation.reshape,
    "Sub": _Translation.binary,
    "Transpose": _Translation.transpose,
    "Unsqueeze": _Translation.reshape,
}
