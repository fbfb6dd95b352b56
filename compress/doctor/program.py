"""What a runtime makes of a file: its own list of operators, read back from the runtime, with the types they read."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from compress.errors import ModelError
from compress.formats.tflite_file import unpack

NUMBERED = re.compile(r"val_\d+")
"""Names that torch's exporter gives to values within one operator of the network."""
BOUNDARY = ("QuantizeLinear", "DequantizeLinear", "QUANTIZE", "DEQUANTIZE")
"""Operators that go from float to a grid or back; they compute nothing else."""


@dataclass(frozen=True)
class Value:
    """A tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As numpy calls it; empty where the runtime does not say."""
    constant: bool = False

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("float")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * (np.dtype(self.dtype).itemsize if self.dtype else 1)


@dataclass(frozen=True)
class Operator:
    """One step of the runtime's plan."""

    op: str
    layer: str
    """What the user calls it: the layer whose result it computes."""
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    macs: int
    delegated: bool = True
    """LiteRT: whether XNNPACK computes it. ONNX Runtime has no such split."""

    @property
    def reads(self) -> tuple[Value, ...]:
        """The inputs that are computed while it runs, not stored in the file."""
        return tuple(value for value in self.inputs if not value.constant)

    @property
    def is_boundary(self) -> bool:
        """It converts between floats and a grid. From one grid to another is integer arithmetic."""
        return self.op in BOUNDARY and any(value.is_float for value in (*self.reads, *self.outputs))

    @property
    def in_float(self) -> bool:
        """It computes with floats. An integer operator whose result is a float (the logits) does not."""
        return not self.is_boundary and any(value.is_float for value in self.reads)

    @property
    def moved_bytes(self) -> int:
        """Activations read and written."""
        return sum(value.bytes for value in (*self.reads, *self.outputs))


@dataclass(frozen=True)
class Program:
    """The operators in the order of execution, with the network's input and output."""

    runtime: str
    operators: tuple[Operator, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    partitions: int = 0
    """LiteRT: how many stretches XNNPACK got; 0 without XNNPACK."""

    @property
    def macs(self) -> int:
        return sum(operator.macs for operator in self.operators)

    def peak_bytes(self) -> int:
        """The largest sum of activations that are alive at once: what any planner of buffers needs at least."""
        last: dict[str, int] = {value.name: len(self.operators) for value in self.outputs}
        for index, operator in enumerate(self.operators):
            for value in operator.reads:
                last[value.name] = max(last.get(value.name, 0), index)
        alive = {value.name: value.bytes for value in self.inputs}
        peak = sum(alive.values())
        for index, operator in enumerate(self.operators):
            alive |= {value.name: value.bytes for value in operator.outputs}
            peak = max(peak, sum(alive.values()))
            alive = {name: size for name, size in alive.items() if last.get(name, -1) > index}
        return peak


# ---- ONNX Runtime ------------------------------------------------------------------------------------------


def onnxruntime_program(model: onnx.ModelProto) -> Program:
    """What ONNX Runtime runs after all of its fusions on this machine's CPU.

    The session saves its optimized graph. Raises ModelError if the runtime cannot open the file.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen classes for this, none of them public
            raise ModelError("onnxruntime", f"cannot open the file ({_first_line(error)})") from error
        graph = onnx.load(options.optimized_model_filepath).graph
    names, shapes = _node_layers(model.graph), _shapes(model)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    typed = {
        value.name: Value(
            value.name,
            tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),
            _onnx_dtype(value.type.tensor_type.elem_type),
        )
        for value in (*graph.input, *graph.value_info, *graph.output)
    }

    def value(name: str) -> Value:
        if name in constants:
            return Value(name, tuple(constants[name].dims), _onnx_dtype(constants[name].data_type), constant=True)
        return typed[name]

    operators = []
    for node in graph.node:
        inputs = tuple(value(name) for name in node.input if name)
        origin = _origin(node, names)
        for name in filter(None, node.output):
            if name not in typed:  # made by a fusion, or inside an inlined function such as HardSwish
                typed[name] = _untold(node.op_type, name, inputs, shapes.get(origin))
        outputs = tuple(value(name) for name in node.output if name)
        layer = names[origin] if origin else _layer_of(node)
        operators.append(Operator(node.op_type, layer, inputs, outputs, _onnx_macs(node.op_type, inputs, outputs)))
    operators = _named_by_readers(operators, set(names.values()))
    inputs = tuple(value(v.name) for v in graph.input if v.name not in constants)
    return Program("onnxruntime", tuple(operators), inputs, tuple(value(v.name) for v in graph.output))


def _untold(op: str, name: str, inputs: Sequence[Value], shape: tuple[int, ...] | None) -> Value:
    """A result that the saved graph does not describe: of the shape it had as exported, or of its input's."""
    source = next((value for value in inputs if not value.constant), inputs[0])
    dtype = source.dtype
    if op == "DequantizeLinear":
        dtype = inputs[1].dtype
    elif op == "QuantizeLinear":
        dtype = inputs[2].dtype if len(inputs) > 2 else "uint8"
    return Value(name, shape or source.shape, dtype)


def _onnx_dtype(kind: int) -> str:
    return str(onnx.helper.tensor_dtype_to_np_dtype(kind)) if kind else ""


def _node_layers(graph: onnx.GraphProto) -> dict[str, str]:
    """Layer by node name in the file as exported: the value it makes, or the grid that value is rounded to."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    ends = {value.name for value in graph.output}
    layers = {}
    for node in graph.node:
        name = node.output[0]
        following = readers.get(name, [])
        if len(following) == 1 and following[0].op_type in ("Relu", "Clip"):
            name = following[0].output[0]
            following = readers.get(name, [])
        rounded = [reader.output[0] for reader in following if reader.op_type == "QuantizeLinear"]
        weights = [given for given in node.input if given.endswith((".weight", ".weight/float"))]
        if weights:
            layer = weights[0].removesuffix("/float").removesuffix(".weight")
        elif rounded and node.op_type not in BOUNDARY:
            layer = rounded[0]
        else:
            layer = node.name if name in ends else name
        layers[node.name] = layers[_blocked(node)] = plain_name(layer)
    return layers


def _blocked(node: onnx.NodeProto) -> str:
    """What ONNX Runtime calls the node where it computes on blocks of channels: for its result, not by its name."""
    return f"{node.output[0]}_nchwc"


def plain_name(value: str) -> str:
    """The layer in a value's name: without what the exporters hang on it."""
    name = value.split(":")[0]
    for ending in ("/exact", "/float", "/unused"):
        name = name.removesuffix(ending)
    return name


def _origin(node: onnx.NodeProto, names: Collection[str]) -> str:
    """The node as exported: ONNX Runtime keeps its name with something around it. Empty for new nodes."""
    if node.name in names:
        return node.name
    known = [name for name in names if name and f"_{name}_" in f"_{node.name}_"]
    return max(known, key=len, default="")


def _layer_of(node: onnx.NodeProto) -> str:
    weights = [given for given in node.input if given.endswith(".weight")]
    return plain_name(weights[0].removesuffix(".weight") if weights else node.output[0])


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shape of each node's result in the file as exported, by node name; the order of axes may be another later."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    known = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.output)
    }
    shapes = {}
    for node in graph.node:
        if node.output[0] in known:
            shapes[node.name] = shapes[_blocked(node)] = known[node.output[0]]
    return shapes


def _named_by_readers(operators: Sequence[Operator], known: Collection[str]) -> list[Operator]:
    """Operators without a layer's name get that of the one that reads their result.

    ONNX Runtime made them itself, or the exporter did, out of one operator of the network (a GELU, say).
    """
    named: list[Operator] = []
    readers: dict[str, str] = {}
    for operator in reversed(operators):
        layer = operator.layer
        if layer not in known or NUMBERED.fullmatch(layer):
            layer = next((readers[value.name] for value in operator.outputs if value.name in readers), layer)
        named.append(replace(operator, layer=layer))
        readers |= {value.name: layer for value in operator.reads}
    return named[::-1]


ONNX_WEIGHTS = {
    "Conv": 1,
    "FusedConv": 1,
    "NhwcFusedConv": 1,
    "ConvInteger": 1,
    "ConvTranspose": 1,
    "QLinearConv": 3,
    "QLinearConvTranspose": 3,
}
"""Which input holds the weights, outputs first."""
ONNX_PRODUCTS = ("Gemm", "MatMul", "FusedGemm", "FusedMatMul", "QGemm", "QLinearMatMul", "MatMulInteger")
ONNX_PRODUCTS_TO_FLOAT = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul")


def _onnx_macs(op: str, inputs: Sequence[Value], outputs: Sequence[Value]) -> int:
    """Multiply-adds of convolutions and matrix products; everything else counts as none."""
    if op in ONNX_WEIGHTS:
        per_element = math.prod(inputs[ONNX_WEIGHTS[op]].shape[1:])
        return per_element * (inputs[0] if "Transpose" in op else outputs[0]).elements
    if op in ONNX_PRODUCTS or op in ONNX_PRODUCTS_TO_FLOAT:
        return outputs[0].elements * (inputs[0].shape[-1] if inputs[0].shape else 0)
    return 0


# ---- LiteRT ------------------------------------------------------------------------------------------------

_TFLITE_TYPES = {
    getattr(schema.TensorType, name): dtype
    for name, dtype in {
        "FLOAT32": "float32",
        "FLOAT16": "float16",
        "INT8": "int8",
        "UINT8": "uint8",
        "INT16": "int16",
        "INT32": "int32",
        "INT64": "int64",
        "BOOL": "bool",
    }.items()
}
_TFLITE_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}


def litert_program(content: bytes) -> Program:
    """What LiteRT runs: the file's operators, each with whether XNNPACK took it on this machine.

    Raises ModelError if the runtime cannot open the file.
    """
    model = unpack(content)
    graph = model.subgraphs[0]
    given = set(graph.inputs)
    written = {index for operator in graph.operators for index in operator.outputs}
    values = [
        Value(
            tensor.name.decode(),
            tuple(int(size) for size in ([] if tensor.shape is None else tensor.shape)),
            _TFLITE_TYPES.get(tensor.type, ""),
            constant=index not in written and index not in given,
        )
        for index, tensor in enumerate(graph.tensors)
    ]
    delegated, partitions = _delegated(content, [list(operator.outputs) for operator in graph.operators])
    operators = []
    for number, operator in enumerate(graph.operators):
        code = model.operatorCodes[operator.opcodeIndex]
        op = _TFLITE_NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)]
        inputs = tuple(values[index] for index in operator.inputs if index >= 0)
        outputs = tuple(values[index] for index in operator.outputs)
        layer = plain_name(outputs[0].name)
        operators.append(
            Operator(op, layer, inputs, outputs, _tflite_macs(op, inputs, outputs), delegated=number in delegated)
        )
    operators = _named_for_layers(operators)
    operators = _named_by_readers(operators, {operator.layer for operator in operators})
    return Program(
        "litert",
        tuple(operators),
        tuple(values[index] for index in graph.inputs),
        tuple(values[index] for index in graph.outputs),
        partitions,
    )


def _delegated(content: bytes, results: Sequence[Sequence[int]]) -> tuple[set[int], int]:
    """Numbers of the operators that XNNPACK computes, and how many stretches they make.

    The interpreter lists the file's operators followed by one DELEGATE per stretch. What lies between a delegate's
    inputs and outputs is what it computes.
    """
    try:
        interpreter = Interpreter(model_content=content, num_threads=1)
        interpreter.allocate_tensors()
    except Exception as error:
        raise ModelError("litert", f"cannot open the file ({_first_line(error)})") from error
    details = interpreter._get_ops_details()
    plan, delegates = details[: len(results)], details[len(results) :]
    maker = {int(index): number for number, indices in enumerate(results) for index in indices}
    taken: set[int] = set()
    for delegate in delegates:
        stop, open_ends = set(map(int, delegate["inputs"])), list(map(int, delegate["outputs"]))
        while open_ends:
            number = maker.get(open_ends.pop())
            if number is None or number in taken:
                continue
            taken.add(number)
            open_ends += [int(index) for index in plan[number]["inputs"] if int(index) >= 0 and int(index) not in stop]
    return taken, len(delegates)


def _named_for_layers(operators: Sequence[Operator]) -> list[Operator]:
    """A float operator whose only reader is a QUANTIZE gets the name of the grid behind it."""
    grids = {operator.reads[0].name: operator.layer for operator in operators if operator.op == "QUANTIZE"}
    return [
        replace(operator, layer=grids.get(operator.outputs[0].name, operator.layer)) if operator.in_float else operator
        for operator in operators
    ]


def _tflite_macs(op: str, inputs: Sequence[Value], outputs: Sequence[Value]) -> int:
    if op == "CONV_2D":
        return outputs[0].elements * math.prod(inputs[1].shape[1:])
    if op == "DEPTHWISE_CONV_2D":
        return outputs[0].elements * math.prod(inputs[1].shape[1:3])
    if op == "TRANSPOSE_CONV":  # output shape, weights (O, h, w, I), image
        return inputs[2].elements * math.prod(inputs[1].shape[:3])
    if op in ("FULLY_CONNECTED", "BATCH_MATMUL"):
        return outputs[0].elements * inputs[0].shape[-1]
    return 0


def _first_line(error: BaseException) -> str:
    lines: list[Any] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
