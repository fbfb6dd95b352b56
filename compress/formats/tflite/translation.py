"""The translation under way: which tensor holds which ONNX value, and how operators read and write values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.formats.tflite.graph import Graph, Node, Stored
from compress.formats.tflite.layout import NHWC, Order, arranged, outward, same, sequence, widened
from compress.formats.tflite.window import Pads, Window
from compress.formats.tflite_file import Grid, Shape, Tensor, TFLiteFile


@dataclass(frozen=True)
class Value:
    """A tensor, and the order in which it holds the axes of an ONNX value."""

    tensor: Tensor
    order: Order

    @property
    def shape(self) -> Shape:
        """Of the value, in the ONNX's order."""
        sizes = dict(zip(self.order, self.tensor.shape, strict=True))
        return tuple(sizes[axis] for axis in range(len(sizes)))


@dataclass(frozen=True)
class Landing:
    """Where a node's result ends up once the activation and the QuantizeLinear behind it are taken in."""

    value: str
    """The float value."""
    activation: str
    quantize: Node | None
    grid: Grid | None
    absorbed: tuple[Node, ...]
    """Activation nodes, without the QuantizeLinear: only an int8 kernel absorbs that one."""


class Translation:
    """A file under construction, and what each ONNX value has become in it.

    Transposing a value writes nothing: the same tensor then holds the new value, in another order. An operator that
    needs an order asks for it, and only then a TRANSPOSE is written, always of the tensor that was first.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.file = TFLiteFile()
        self.values: dict[str, Value] = {}
        """By ONNX value; int8 if the value lies on a grid."""
        self.padded: dict[str, tuple[str, Pads]] = {}
        """Values not written yet: another value, and zeros around it."""
        self.done: set[Node] = set()
        self._floats: dict[int, Tensor] = {}  # dequantized copies, by the int8 tensor's index
        self._reshaped: dict[tuple[int, Shape], Tensor] = {}
        self._roots: dict[int, Tensor] = {}  # of a RESHAPE's result: what was reshaped first
        self._transposed: dict[tuple[int, Order], Tensor] = {}
        self._origins: dict[int, tuple[Tensor, Order]] = {}  # of a TRANSPOSE's result: its input, and the permutation
        self.inputs = [self._graph_input(name) for name in graph.inputs]

    def to_bytes(self, metadata: Mapping[str, str]) -> bytes:
        outputs = []
        for name in self.graph.outputs:
            value = self.value(name)
            outputs.append(self.in_order(value, outward(len(value.order)), name))
        return self.file.to_bytes(inputs=self.inputs, outputs=outputs, metadata=metadata)

    def unusual_orders(self) -> dict[str, Order]:
        """Orders of the tensors that hold an ONNX value otherwise than rank 4 as NHWC and the rest as in the ONNX."""
        found = {}
        for name, value in self.values.items():
            shape, usual = value.shape, outward(len(value.order))
            alike = same(shape, value.order, usual) and arranged(shape, usual) == value.tensor.shape
            if value.tensor.name == name and not alike:
                found[name] = value.order
        return found

    def _graph_input(self, name: str) -> Tensor:
        quantize = self.graph.only_consumer(name, "QuantizeLinear")
        shape = self.graph.shape(name)
        if quantize:
            self.done.add(quantize)
            name = quantize.output
        order = outward(len(shape))
        tensor = self.file.tensor(name, arranged(shape, order), self.graph.grid(quantize) if quantize else None)
        self.values[name] = Value(tensor, order)
        return tensor

    # -- reading values

    def shape(self, name: str) -> Shape:
        return self.graph.shape(name)

    def rank(self, name: str) -> int:
        return len(self.graph.shape(name))

    def is_constant(self, name: str) -> bool:
        return name in self.graph.constants

    def value(self, name: str) -> Value:
        """What holds an ONNX value, float or int8."""
        if name not in self.values and name in self.padded:
            source, pads = self.padded[name]
            self.values[name] = self.pad(self.value(source), pads, name)
        if name not in self.values and self.is_constant(name):
            order = outward(self.rank(name))
            self.values[name] = Value(self.operand(name, order, int8=self.grid(name) is not None), order)
        return self.values[name]

    def grid(self, name: str) -> Grid | None:
        """The grid that a value or a stored constant lies on."""
        if self.is_constant(name):
            stored = self.graph.stored.get(name)
            return stored.grid if stored else None
        if name not in self.values and name in self.padded:
            return self.grid(self.padded[name][0])
        return self.values[name].tensor.grid

    def order(self, name: str) -> Order:
        if name not in self.values and name in self.padded:
            return self.order(self.padded[name][0])
        return self.value(name).order

    def float_value(self, name: str) -> Value:
        """The value in float32, dequantized if need be, in the order it lies in."""
        value = self.value(name)
        x = value.tensor
        if x.grid is None:
            return value
        if x.index not in self._floats:
            label = f"{name}:float" if name == x.name else name
            self._floats[x.index] = self.file.tensor(label, x.shape)
            self.file.operator("DEQUANTIZE", [x], self._floats[x.index], schema.DequantizeOptionsT())
        return Value(self._floats[x.index], value.order)

    def read(self, name: str, *, int8: bool) -> Value:
        return self.value(name) if int8 else self.float_value(name)

    def in_order(self, value: Value, order: Order, label: str = "") -> Tensor:
        """The tensor that holds the value in `order`; written if it has to be, named `label`."""
        shape = value.shape
        target = arranged(shape, order)
        x, permutation = value.tensor, tuple(value.order.index(axis) for axis in order)
        if x.index in self._origins and not same(shape, value.order, order):
            x, first = self._origins[x.index]
            permutation = tuple(first[axis] for axis in permutation)
        if list(sequence(x.shape, permutation)) == sorted(sequence(x.shape, permutation)):
            return self.reshaped(x, target, label)
        key = (x.index, permutation)
        if key not in self._transposed:
            name = label or f"{x.name}:{''.join(map(str, permutation))}"
            output = self.file.tensor(name, target, x.grid, nonnegative=x.nonnegative)
            version = {5: 4, 6: 6}.get(len(target))
            self.file.operator(
                "TRANSPOSE",
                [x, self.integers(f"{name}:order", permutation)],
                output,
                schema.TransposeOptionsT(),
                version,
            )
            self._transposed[key] = output
            self._origins[output.index] = (x, permutation)
        return self._transposed[key]

    def reshaped(self, x: Tensor, shape: Shape, label: str = "") -> Tensor:
        """The same numbers in the same sequence under another shape; never a RESHAPE of a RESHAPE."""
        x = self.unshaped(x, shape)
        if x.shape == shape:
            return x
        if (x.index, shape) not in self._reshaped:
            name = label or f"{x.name}:{'x'.join(map(str, shape))}"
            output = self.file.tensor(name, shape, x.grid, nonnegative=x.nonnegative)
            inputs = [x, self.integers(f"{name}:shape", shape)]
            self.file.operator("RESHAPE", inputs, output, schema.ReshapeOptionsT(newShape=list(shape)))
            self._reshaped[x.index, shape] = output
            self._roots[output.index] = x
        return self._reshaped[x.index, shape]

    def unshaped(self, x: Tensor, shape: Shape) -> Tensor:
        """The tensor to reshape for the numbers of `x` under `shape`: `x` itself, or what `x` was reshaped from."""
        return x if x.shape == shape else self._roots.get(x.index, x)

    def carry_view(self, x: Tensor, value: str, order: Order) -> None:
        """The ONNX value as `x` under its own shape."""
        shape = arranged(self.shape(value), order)
        x = self.unshaped(x, shape)
        if x.shape == shape:
            self.values[value] = Value(x, order)
            return
        inputs = [x, self.integers(f"{value}:shape", shape)]
        tensor = self.carry("RESHAPE", inputs, value, schema.ReshapeOptionsT(newShape=list(shape)), order=order)
        self._roots[tensor.index] = x

    def image(self, name: str, *, int8: bool) -> Tensor:
        """A value of rank 4 as NHWC."""
        return self.in_order(self.read(name, int8=int8), NHWC)

    def common_order(self, names: Sequence[str], shape: Shape) -> Order:
        """An order for operands of an operator with a result of `shape`: that of the largest value among them."""
        rank = len(shape)
        values = [name for name in names if not self.is_constant(name)]
        largest = max(values, key=lambda name: int(np.prod(self.shape(name))), default="")
        return widened(self.order(largest), rank) if largest else outward(rank)

    def operand(self, name: str, order: Order, *, int8: bool = False) -> Tensor:
        """A value or constant in `order`, broadcast to that many axes by leading ones."""
        if self.is_constant(name):
            return self.constant(name, order, int8=int8)
        value = self.read(name, int8=int8)
        if len(value.order) == len(order):
            return self.in_order(value, order)
        shape = (1,) * (len(order) - len(value.order)) + value.shape
        wide = Value(value.tensor, widened(value.order, len(order)))
        if same(shape, wide.order, order):
            return self.reshaped(value.tensor, arranged(shape, order))
        own = tuple(axis - len(order) + len(value.order) for axis in order if axis >= len(order) - len(value.order))
        return self.reshaped(self.in_order(value, own), arranged(shape, order))

    def constant(self, name: str, order: Order, *, int8: bool = False) -> Tensor:
        """A constant in `order`, seen with leading axes of size 1; its integers if `int8`, else as real numbers.

        Real numbers stay stored as the ONNX stores them, int8 or float16, behind a DEQUANTIZE.
        """
        graph = self.graph

        def moved(values: np.ndarray) -> np.ndarray:
            wide = values.reshape((1,) * (len(order) - values.ndim) + values.shape)
            return np.ascontiguousarray(wide.transpose(order))

        stored = graph.stored.get(name)
        if stored and int8:
            grid = stored.grid
            assert grid is not None
            shift = 128 if stored.integers.dtype == np.uint8 else 0
            integers = (stored.integers.astype(np.int16) - shift).astype(np.int8)
            return self.file.constant(name, moved(integers), grid=grid)
        if stored and stored.is_symmetric_int8:
            axis = order.index(stored.axis + len(order) - stored.integers.ndim) if stored.integers.ndim else 0
            packed = self.file.constant(stored.name, moved(stored.integers), scales=stored.scales, axis=axis)
            return self._unpacked(packed, name, 5 if len(stored.scales) > 1 else 2)
        if name in graph.halves:
            source, halves = graph.halves[name]
            return self._unpacked(self.file.constant(source, moved(halves)), name, 3)
        return self.file.constant(name, moved(graph.constants[name].astype(np.float32)))

    def _unpacked(self, packed: Tensor, name: str, version: int) -> Tensor:
        output = self.file.tensor(name, packed.shape)
        self.file.operator("DEQUANTIZE", [packed], output, schema.DequantizeOptionsT(), version)
        return output

    def integers(self, name: str, values: Any) -> Tensor:
        return self.file.constant(name, np.asarray(values, np.int32))

    def number(self, name: str, value: float, rank: int = 0) -> Tensor:
        """A float constant of one element, of as many axes as its partner."""
        return self.file.constant(name, np.full((1,) * rank, value, np.float32))

    def pad(self, value: Value, pads: Pads, name: str, *, lowest: bool = False, fill: float = 0.0) -> Value:
        """The value with zeros around it, with `fill`, or with the lowest number it can hold; `pads` per ONNX axis."""
        x = value.tensor
        in_file = np.asarray([pads[axis] for axis in value.order], np.int32)
        shape = tuple(int(size + sum(pad)) for size, pad in zip(x.shape, in_file, strict=True))
        output = self.file.tensor(name, shape, x.grid, nonnegative=x.nonnegative and fill >= 0)
        inputs = [x, self.integers(f"{name}:pads", in_file)]
        version = 4 if len(shape) > 4 else None
        # PAD fills with real zero, which is the zero point on a grid.
        zero_is_lowest = x.nonnegative if x.grid is None else x.grid.zero_point == -128
        if (lowest and not zero_is_lowest) or fill:
            number = np.finfo(np.float32).min if lowest else fill
            kind, stored = (
                (np.float32, number) if x.grid is None else (np.int8, -128 if lowest else x.grid.nearest(fill))
            )
            inputs.append(self.file.constant(f"{name}:fill", np.full(1, stored, kind), grid=x.grid))
            self.file.operator("PADV2", inputs, output, schema.PadV2OptionsT(), version)
        else:
            self.file.operator("PAD", inputs, output, schema.PadOptionsT(), version)
        return Value(output, value.order)

    def around(self, x: Tensor, window: Window, value: str, *, lowest: bool = False) -> tuple[Tensor, int]:
        """An image and TFLite's padding code for `window`; an explicit PAD where neither SAME nor VALID fits."""
        if window.is_valid:
            return x, schema.Padding.VALID
        if window.is_same(x.shape[1:3]):
            return x, schema.Padding.SAME
        pads = ((0, 0), (0, 0), *window.pads)
        return self.pad(Value(x, NHWC), pads, f"{value}:padded", lowest=lowest).tensor, schema.Padding.VALID

    # -- layers with weights

    def parameter(self, name: str, axes: Order, *, stored: bool) -> Tensor:
        """A weight with its axes permuted: the integers and scales of the ONNX if `stored`, else real numbers."""
        return self.weights(self.graph.stored[name], axes) if stored else self.constant(name, axes)

    def weights(self, weight: Stored, axes: Order) -> Tensor:
        integers = np.ascontiguousarray(weight.integers.transpose(axes))
        return self.file.constant(weight.name, integers, scales=weight.scales, axis=axes.index(weight.axis))

    def bias(self, node: Node, name: str, x: Tensor, weight: str, count: int, *, stored: bool) -> Tensor:
        """The bias of `count` outputs; zeros where the ONNX has none, since not every kernel does without."""
        if not name:
            label = f"{node.output}:bias"
            if not stored or x.grid is None:
                return self.file.constant(label, np.zeros(count, np.float32))
            scales = x.grid.scale * self.graph.stored[weight].scales
            return self.file.constant(label, np.zeros(count, np.int32), scales=scales)
        if not stored:
            values = np.broadcast_to(self.graph.constants[name].astype(np.float32).reshape(-1), (count,))
            return self.file.constant(name, np.ascontiguousarray(values))
        bias = self.graph.stored[name]
        return self.file.constant(bias.name, bias.integers.reshape(count), scales=bias.scales)

    def is_int8(self, x: str, landing: Landing, weight: str, bias: str, *, output_axis: int) -> bool:
        """TFLite's int8 layers take these parameters: symmetric weights, scales per tensor or per output."""
        if self.grid(x) is None or landing.grid is None or weight not in self.graph.stored:
            return False
        weights = self.graph.stored[weight]
        per_output = len(weights.scales) == 1 or weights.axis == output_axis
        biases = self.graph.stored.get(bias)
        fits = not bias or (biases is not None and biases.integers.dtype == np.int32)
        return weights.is_symmetric_int8 and per_output and fits

    # -- writing values

    def landing(self, value: str, *, fuse: bool = False) -> Landing:
        """`fuse` takes in an activation that TFLite's operators can carry."""
        activation = "NONE"
        absorbed: tuple[Node, ...] = ()
        node = self.graph.only_consumer(value, "Relu", "Clip") if fuse else None
        if node and (fused := fusible(self.graph, node)):
            value, activation, absorbed = node.output, fused, (node,)
        quantize = self.graph.only_consumer(value, "QuantizeLinear")
        return Landing(value, activation, quantize, self.graph.grid(quantize) if quantize else None, absorbed)

    def emit(
        self,
        op: str,
        inputs: Sequence[Tensor],
        landing: Landing,
        options: Any = None,
        *,
        order: Order,
        int8: bool,
        version: int | None = None,
    ) -> None:
        """Writes an operator that computes, its result in `order`; `int8` lets it write onto the landing's grid."""
        self.done.update(landing.absorbed)
        name = landing.value
        if int8 and landing.quantize:
            self.done.add(landing.quantize)
            name = landing.quantize.output
        tensor = self.file.tensor(
            name,
            arranged(self.shape(landing.value), order),
            landing.grid if int8 else None,
            nonnegative=landing.activation in NONNEGATIVE or op in NONNEGATIVE,
        )
        self.values[name] = Value(tensor, order)
        if options is not None and landing.activation != "NONE":
            options.fusedActivationFunction = getattr(schema.ActivationFunctionType, landing.activation)
        self.file.operator(op, inputs, tensor, options, version)

    def step(self, op: str, inputs: Sequence[Tensor], name: str, shape: Shape, options: Any = None) -> Tensor:
        """Writes a float operator in the middle of a longer computation; `name` has a colon."""
        output = self.file.tensor(name, shape)
        self.file.operator(op, inputs, output, options)
        return output

    def carry(
        self,
        op: str,
        inputs: Sequence[Tensor],
        value: str,
        options: Any = None,
        *,
        order: Order,
        version: int | None = None,
    ) -> Tensor:
        """Writes an operator that moves or selects numbers: the result lies on the first input's grid."""
        x = inputs[0]
        shape = arranged(self.shape(value), order)
        quantize = self.graph.only_consumer(value, "QuantizeLinear")
        if x.grid and quantize and self.graph.grid(quantize) == x.grid:
            self.done.add(quantize)
            value = quantize.output
        tensor = self.file.tensor(value, shape, x.grid, nonnegative=x.grid is None and x.nonnegative)
        self.values[value] = Value(tensor, order)
        self.file.operator(op, inputs, tensor, options, version)
        return tensor

    def rename(self, name: str, value: Value) -> None:
        """The ONNX value `name` is held by a tensor that is there already."""
        self.values[name] = value

    def on_grid(self, name: str, grid: Grid, result: str) -> Value:
        """The value on `grid`, written to a tensor `result` if it lies elsewhere.

        By way of float: XNNPACK's QUANTIZE from int8 to int8 rounds the ratio of the scales to 1/256, and one random
        point in eight came out a step off (0.03 onto 0.04, LiteRT 2.3); this way only exact ties can.
        """
        if self.grid(name) == grid:
            return self.value(name)
        value = self.float_value(name)
        output = self.file.tensor(result, value.tensor.shape, grid)
        self.file.operator("QUANTIZE", [value.tensor], output, schema.QuantizeOptionsT())
        return Value(output, value.order)


def clip_bounds(graph: Graph, node: Node) -> tuple[float | None, float | None]:
    """The bounds of a Relu or Clip; None where there is none."""
    if node.op == "Relu":
        return 0.0, None
    bounds: list[float | None] = []
    for index in (1, 2):
        bound = graph.scalar(node.input(index))
        if node.input(index) and bound is None:
            node.refuse("with computed bounds")
        largest = float(np.finfo(np.float32).max)
        bounds.append(None if bound is None or abs(bound) >= largest else bound)
    return bounds[0], bounds[1]


NONNEGATIVE = ("RELU", "RELU6")
RECTIFIERS: dict[tuple[float | None, float | None], str] = {
    (0.0, None): "RELU",
    (0.0, 6.0): "RELU6",
    (-1.0, 1.0): "RELU_N1_TO_1",
}
"""By their bounds."""


def fusible(graph: Graph, node: Node) -> str | None:
    """The activation that a TFLite operator can carry, for a Relu or Clip."""
    return RECTIFIERS.get(clip_bounds(graph, node))
