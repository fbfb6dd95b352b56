"""Float ONNX graphs with random weights, their quantized twins, and both runtimes to run them in."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper

from compress.formats.tflite import to_tflite
from compress.formats.tflite_file import unpack

F32 = np.float32


class Net:
    """A float ONNX graph, grown node by node with random weights."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, values: np.ndarray) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant((self.random.normal(size=shape) / math.sqrt(math.prod(shape[1:]))).astype(F32))

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        return self.split(kind, *inputs, outputs=1, **attributes)[0]

    def split(self, kind: str, *inputs: str, outputs: int, **attributes: object) -> list[str]:
        """An operator of several results."""
        base = f"{kind.lower()}_{len(self.nodes)}"
        names = [base, *(f"{base}.{index}" for index in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"node_{base}", **attributes))
        return names

    def conv(
        self,
        x: str,
        inputs: int,
        outputs: int,
        *,
        kernel: int | tuple[int, int] = 3,
        pads: tuple[int, int, int, int] = (1, 1, 1, 1),
        stride: int = 1,
        group: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> str:
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        parameters = [self.weight(outputs, inputs // group, height, width)]
        if bias:
            parameters.append(self.weight(outputs))
        settings = {"pads": pads, "strides": [stride] * 2, "dilations": [dilation] * 2, "group": group}
        return self.op("Conv", x, *parameters, kernel_shape=[height, width], **settings)

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        return self.op("Gemm", x, self.weight(outputs, inputs), self.weight(outputs), transB=1)

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def relu6(self, x: str) -> str:
        return self.op("Clip", x, self.constant(np.zeros((), F32)), self.constant(np.full((), 6, F32)))

    def ints(self, *values: int) -> str:
        return self.constant(np.asarray(values, np.int64))

    def floats(self, *values: float) -> str:
        return self.constant(np.asarray(values, F32))

    def model(self, output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)

    def images(self) -> np.ndarray:
        return self.random.normal(size=self.shape).astype(F32)


KEEPS_GRID = (
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "GlobalMaxPool",
    "MaxPool",
    "Pad",
    "ReduceMax",
    "ReduceMin",
    "Reshape",
    "Resize",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def quantized(
    model: onnx.ModelProto,
    images: np.ndarray,
    *,
    grids: dict[str, tuple[float, int]] | None = None,
    bare: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """The QDQ graph that `compress` exports: uint8 activations, int8 weights per channel, int32 biases.

    Ranges are those that `images` produce; `grids` overrides them by value name; values in `bare` stay in float.
    """
    floats = {"images": images, **run_onnx_all(model, images)}
    initializers = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    outputs = [value.name for value in model.graph.output]
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    nodes: list[onnx.NodeProto] = []
    stored: dict[str, onnx.TensorProto] = {}
    scales: dict[str, tuple[float, int]] = {}
    renamed: dict[str, str] = {}

    def store(name: str, values: object, kind: type) -> str:
        stored[name] = numpy_helper.from_array(np.asarray(values, kind), name)
        return name

    def observe(name: str, keep: str | None = None) -> None:
        low, high = min(float(floats[name].min()), 0.0), max(float(floats[name].max()), 0.0)
        scale = max(high - low, 1e-3) / 255
        scale, zero = scales[keep] if keep else (scale, round(-low / scale))
        scale, zero = (grids or {}).get(name, (scale, zero))
        scales[name] = (scale, zero)
        q_inputs = [store(f"{name}_scale", scale, F32), store(f"{name}_zero", zero, np.uint8)]
        result = f"{name}_dq"
        nodes.append(helper.make_node("QuantizeLinear", [name, *q_inputs], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *q_inputs], [result]))
        renamed[name] = result

    def store_weights(node: onnx.NodeProto) -> list[str]:
        source = node.input[0]
        weights = initializers[node.input[1]]
        transposed = node.op_type in ("MatMul", "ConvTranspose") or (node.op_type == "Gemm" and not node.attribute)
        axes = tuple(axis for axis in range(weights.ndim) if axis != int(transposed))
        weight_scales = (np.abs(weights).max(axis=axes) / 127).astype(F32)
        column = np.expand_dims(weight_scales, axes)
        names = []
        integers = {"w": (np.clip(np.round(weights / column), -127, 127), weight_scales, np.int8)}
        if len(node.input) > 2:
            groups = len(initializers[node.input[2]]) // len(weight_scales)
            bias_scales = (F32(scales[source][0]) * np.tile(weight_scales, groups)).astype(F32)
            integers["b"] = (np.round(initializers[node.input[2]] / bias_scales), bias_scales, np.int32)
        for part, (values, part_scales, kind) in integers.items():
            base = f"{node.output[0]}_{part}"
            ins = [store(base, values, kind), store(f"{base}_scale", part_scales, F32)]
            ins.append(store(f"{base}_zero", np.zeros(part_scales.shape), kind))
            nodes.append(
                helper.make_node("DequantizeLinear", ins, [f"{base}_dq"], axis=int(transposed and part == "w"))
            )
            names.append(f"{base}_dq")
        return names

    observe("images")
    for node in model.graph.node:
        inputs = [renamed.get(name, name) for name in node.input]
        weight = initializers.get(node.input[1]) if node.op_type in LAYERS else None
        if weight is not None and (weight.ndim == 2 or node.op_type != "MatMul"):
            inputs = inputs[:1] + store_weights(node)
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(inputs)
        nodes.append(copy)
        for name in node.output:
            if name not in bare and readers.get(name) not in (["Relu"], ["Clip"]):
                observe(name, node.input[0] if node.op_type in KEEPS_GRID else None)
            elif node.op_type in KEEPS_GRID:
                scales[name] = scales[node.input[0]]
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used] + list(stored.values())
    graph = helper.make_graph(
        nodes,
        "quantized",
        model.graph.input,
        [helper.make_tensor_value_info(renamed.get(name, name), TensorProto.FLOAT, None) for name in outputs],
        tensors,
    )
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(result, strict_mode=True)


def run_onnx(model: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})


def run_onnx_all(model: onnx.ModelProto, images: np.ndarray, op: str = "") -> dict[str, np.ndarray]:
    """What every node computes, or every `op`, by name."""
    names = [name for node in model.graph.node if op in ("", node.op_type) for name in node.output]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return dict(zip(names, run_onnx(onnx.shape_inference.infer_shapes(copy), images), strict=True))


def nhwc(values: np.ndarray) -> np.ndarray:
    return values.transpose(0, 2, 3, 1) if values.ndim == 4 else values


def run_tflite(data: bytes, images: np.ndarray) -> list[np.ndarray]:
    """Outputs as the file stores them; the images are put on the input's grid."""
    interpreter = Interpreter(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    [entry] = interpreter.get_input_details()
    values = nhwc(images)
    if entry["dtype"] == np.int8:
        scale, zero = entry["quantization"]
        values = np.clip(np.round(values / F32(scale)) + zero, -128, 127).astype(np.int8)
    interpreter.set_tensor(entry["index"], np.ascontiguousarray(values))
    interpreter.invoke()
    return [interpreter.get_tensor(output["index"]) for output in interpreter.get_output_details()]


def lsb_apart(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """How many steps of the output's grid the two runtimes differ by, element by element."""
    data = to_tflite(model, {})
    [expected] = run_onnx(model, images)
    [got] = run_tflite(data, images)
    output = unpack(data).subgraphs[0]
    quantization = output.tensors[output.outputs[0]].quantization
    assert got.dtype == np.int8
    expected_points = np.round(nhwc(expected) / quantization.scale[0]) + quantization.zeroPoint[0]
    assert got.shape == expected_points.shape
    assert len(np.unique(got)) > 3 or got.size < 8, "a constant output would prove nothing"
    return np.abs(got.astype(int) - expected_points.astype(int))


def check_float(net: Net, output: str) -> None:
    model, images = net.model(output), net.images()
    [expected], [got] = run_onnx(model, images), run_tflite(to_tflite(model, {}), images)
    assert got.shape == nhwc(expected).shape
    np.testing.assert_allclose(got, nhwc(expected), rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))


def check(net: Net, output: str, **settings: object) -> None:
    """Float and int8: both runtimes compute the same."""
    check_float(net, output)
    model, images = net.model(output), net.images()
    assert lsb_apart(quantized(model, images, **settings), images).max() <= 1


def written_ops(data: bytes) -> list[str]:
    model = unpack(data)
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    codes = [names[code.builtinCode] for code in model.operatorCodes]
    return [codes[operator.opcodeIndex] for operator in model.subgraphs[0].operators]


def ops_of(net: Net, output: str, **settings: object) -> tuple[list[str], list[str]]:
    """Operators of the float and of the int8 file."""
    model = net.model(output)
    return written_ops(to_tflite(model, {})), written_ops(to_tflite(quantized(model, net.images(), **settings), {}))


few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
