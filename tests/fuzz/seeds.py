"""Valid files to damage: small networks as ONNX and TFLite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.formats.tflite import to_tflite

SIZE, CLASSES = 16, 5


def float_model() -> onnx.ModelProto:
    """Convolutions plain and depthwise, an addition, pooling and a linear layer, in float."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("f4"), name)

    kept = [
        weight("w0", 8, 3, 3, 3),
        weight("b0", 8),
        weight("w1", 8, 1, 3, 3),
        weight("w2", 8, 8, 1, 1),
        weight("head", CLASSES, 8),
        weight("bias", CLASSES),
    ]
    nodes = [
        helper.make_node(
            "Conv", ["images", "w0", "b0"], ["c0"], name="stem", pads=[1] * 4, strides=[2, 2], kernel_shape=[3, 3]
        ),
        helper.make_node("Relu", ["c0"], ["r0"], name="relu"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], name="depthwise", pads=[1] * 4, group=8, kernel_shape=[3, 3]),
        helper.make_node("Conv", ["c1", "w2"], ["c2"], name="point", kernel_shape=[1, 1]),
        helper.make_node("Add", ["r0", "c2"], ["sum"], name="sum"),
        helper.make_node("MaxPool", ["sum"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["p"], ["g"], name="mean"),
        helper.make_node("Flatten", ["g"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "head", "bias"], ["logits"], name="head", transB=1),
    ]
    return _model(nodes, kept, "logits")


def int8_model() -> onnx.ModelProto:
    """A convolution and a linear layer between QuantizeLinear and DequantizeLinear, as our exporter writes them."""
    rng = np.random.default_rng(1)
    kept, nodes = [], []

    def constant(name: str, array: np.ndarray) -> str:
        kept.append(numpy_helper.from_array(array, name))
        return name

    def grid(x: str, scale: float, zero: int) -> str:
        names = [
            constant(f"{x}.scale", np.float32(scale).reshape(())),
            constant(f"{x}.zero", np.uint8(zero).reshape(())),
        ]
        nodes.append(helper.make_node("QuantizeLinear", [x, *names], [f"{x}.q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{x}.q", *names], [f"{x}.d"]))
        return f"{x}.d"

    def layer(op: str, x: str, x_scale: float, shape: tuple[int, ...], output: str, **attributes: object) -> None:
        scale = np.float32(0.01)
        stored = constant(f"{output}.weight", rng.integers(-127, 128, shape).astype(np.int8))
        scales = constant(f"{output}.weight.scale", np.full(shape[0], scale))
        zeros = constant(f"{output}.weight.zero", np.zeros(shape[0], np.int8))
        nodes.append(helper.make_node("DequantizeLinear", [stored, scales, zeros], [f"{output}.w"], axis=0))
        bias = constant(f"{output}.bias", rng.integers(-500, 500, shape[0]).astype(np.int32))
        bias_scale = constant(f"{output}.bias.scale", np.full(shape[0], scale * np.float32(x_scale)))
        bias_zero = constant(f"{output}.bias.zero", np.zeros(shape[0], np.int32))
        nodes.append(helper.make_node("DequantizeLinear", [bias, bias_scale, bias_zero], [f"{output}.b"], axis=0))
        nodes.append(helper.make_node(op, [x, f"{output}.w", f"{output}.b"], [output], **attributes))

    x = grid("images", 0.03, 128)
    layer("Conv", x, 0.03, (8, 3, 3, 3), "c0", pads=[1] * 4, strides=[2, 2], kernel_shape=[3, 3])
    x = grid("c0", 0.05, 120)
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["g"]))
    x = grid("g", 0.05, 120)
    nodes.append(helper.make_node("Flatten", [x], ["f"]))
    x = grid("f", 0.05, 120)
    layer("Gemm", x, 0.05, (CLASSES, 8), "l", transB=1)
    nodes.append(helper.make_node("Identity", [grid("l", 0.1, 128)], ["logits"]))
    return _model(nodes, kept, "logits")


def _model(nodes: list[onnx.NodeProto], kept: list[onnx.TensorProto], output: str) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, CLASSES])],
        kept,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"compress.kind": "float" if len(nodes) < 10 else "int8"})
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def models(folder: Path) -> list[Path]:
    """`float` and `int8` as .onnx and .tflite, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in (("float", float_model()), ("int8", int8_model())):
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        (folder / f"{name}.tflite").write_bytes(to_tflite(model, {"compress.kind": name}))
    return [folder / f"{name}.{suffix}" for name in ("float", "int8") for suffix in ("onnx", "tflite")]
