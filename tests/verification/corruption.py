"""Small lies in copies of exported files, as a bad converter would tell them."""

from pathlib import Path

import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from onnx import numpy_helper

from compress.formats.tflite import pack


def change_onnx(path: Path, name: str, change) -> None:
    """`change` gets the constant's array and returns the new one."""
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(values), values.dtype), name))
    onnx.save(model, path)


def change_onnx_grid(path: Path, layer: str, factor: float = 1.0, shift: int = 0) -> None:
    """Writes and reads one activation on another grid; grids that shared its constants keep theirs."""
    model = onnx.load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or layer not in (node.input[0], node.output[0]):
            continue
        scale, zero_point = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        new = {
            f"{layer}/{node.op_type}/scale": np.asarray(scale * np.float32(factor), np.float32),
            f"{layer}/{node.op_type}/zero_point": np.asarray(zero_point + shift, zero_point.dtype),
        }
        for index, (name, values) in enumerate(new.items(), 1):
            node.input[index] = name
            if name not in constants:
                constants[name] = numpy_helper.from_array(values, name)
                model.graph.initializer.append(constants[name])
    onnx.save(model, path)


def change_tflite(path: Path, name: str, change) -> None:
    """`change` gets the tensor and the buffer of its numbers, in the object API."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    (tensor,) = (tensor for tensor in model.subgraphs[0].tensors if tensor.name.decode() == name)
    change(tensor, model.buffers[tensor.buffer])
    path.write_bytes(pack(model))


def scaled(factor: float, channel: int | None = None):
    """A change for `change_tflite`: scales times `factor`, of one channel or of all."""

    def change(tensor, buffer) -> None:
        scale = np.array(tensor.quantization.scale, np.float32)
        scale[slice(None) if channel is None else channel] *= np.float32(factor)
        tensor.quantization.scale = scale

    return change


def flipped(byte: int, bit: int):
    """A change for `change_tflite`: one bit of the numbers."""

    def change(tensor, buffer) -> None:
        data = np.array(buffer.data, np.uint8)
        data[byte] ^= 1 << bit
        buffer.data = data

    return change
