"""The float twin of an int8 file: the same network with every rounding of activations left out.

For a file without a float partner: its weights stay as they are stored, so the twin shows what the grids of activations
cost. A grid that begins at zero keeps its rectifier, which freezing had left to it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from compress.formats.tflite import pack
from compress.verification.facts import Grid
from compress.verification.onnx_file import OnnxFile
from compress.verification.tflite_file import TFLiteFile

MOVES = ("QUANTIZE", "DEQUANTIZE")


def float_twin(file: OnnxFile | TFLiteFile, folder: Path) -> OnnxFile | TFLiteFile:
    """The twin, written into `folder` and opened."""
    path = folder / f"twin{file.path.suffix}"
    name = f"the float twin of {file.name}"
    if isinstance(file, OnnxFile):
        onnx.save(_onnx_twin(file), path)
        return OnnxFile(path, name=name, threads=file.threads)
    path.write_bytes(_tflite_twin(file))
    return TFLiteFile(path, name=name, threads=file.threads)


def _rectifies(grid: Grid) -> str:
    """NONE, RELU or RELU6: what a grid does to real numbers, apart from rounding."""
    if grid.zero_point != 0:
        return "NONE"
    return "RELU6" if abs(grid.high / 6 - 1) < 0.01 else "RELU"


def _onnx_twin(file: OnnxFile) -> onnx.ModelProto:
    proto = copy.deepcopy(file.proto)
    graph = proto.graph
    nodes = []
    six = False
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] in file.grids:
            rectifier = _rectifies(file.grids[node.output[0]])
            if rectifier == "RELU6":
                six = True
                node = helper.make_node("Clip", [node.input[0], "twin/zero", "twin/six"], node.output)
            else:
                op = "Identity" if rectifier == "NONE" else "Relu"
                node = helper.make_node(op, [node.input[0]], node.output)
        elif node.op_type == "DequantizeLinear" and node.input[0] in file.grids:
            node = helper.make_node("Identity", [node.input[0]], node.output)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    if six:
        for name, value in (("twin/zero", 0), ("twin/six", 6)):
            graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [value]))
    for value in list(graph.value_info):
        if value.name in file.grids:
            graph.value_info.remove(value)
    return proto


def _tflite_twin(file: TFLiteFile) -> bytes:
    schema = file.schema
    model = file.unpacked()
    graph = model.subgraphs[0]
    same: dict[int, int] = {}
    operators: list[Any] = []
    fused = {name: code for name, code in vars(schema.ActivationFunctionType).items() if isinstance(code, int)}
    relu = {}
    for rectifier in ("RELU", "RELU6"):
        code = getattr(schema.BuiltinOperator, rectifier)
        relu[rectifier] = len(model.operatorCodes)
        model.operatorCodes.append(schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code, version=1))
    for op, operator in zip(file.ops, graph.operators, strict=True):
        operator.inputs = [same.get(int(index), int(index)) for index in operator.inputs]
        output = int(operator.outputs[0])
        grid = file.grids.get(file.names[output])
        rectifier = "NONE" if grid is None else _rectifies(grid)
        if op in MOVES and rectifier == "NONE":
            same[output] = int(operator.inputs[0])
            continue
        if op in MOVES:
            operator.opcodeIndex = relu[rectifier]
            operator.builtinOptions, operator.builtinOptionsType = None, 0
        elif getattr(operator.builtinOptions, "fusedActivationFunction", None) == fused["NONE"]:
            operator.builtinOptions.fusedActivationFunction = fused[rectifier]
        elif rectifier != "NONE" and not hasattr(operator.builtinOptions, "fusedActivationFunction"):
            before = copy.copy(graph.tensors[output])
            before.name = f"{file.names[output]}/unrectified"
            graph.tensors.append(before)
            operator.outputs = [len(graph.tensors) - 1]
            operators.append(operator)
            operator = schema.OperatorT(opcodeIndex=relu[rectifier], inputs=[len(graph.tensors) - 1], outputs=[output])
        operators.append(operator)
    graph.operators = operators
    graph.outputs = [same.get(int(index), int(index)) for index in graph.outputs]
    for index, tensor in enumerate(graph.tensors):
        if index >= len(file.names):
            tensor.type, tensor.quantization = schema.TensorType.FLOAT32, None
        elif file.types[file.names[index]] in ("int8", "uint8", "int16", "int32", "int64"):
            values = file.real_constant(index)
            if values is None and file.names[index] not in file.grids:
                continue  # shapes and axes
            if values is not None:
                model.buffers.append(schema.BufferT(data=np.frombuffer(values.tobytes(), np.uint8)))
                tensor.buffer = len(model.buffers) - 1
            tensor.type = schema.TensorType.FLOAT32
            tensor.quantization = None
    for code in model.operatorCodes:
        code.version = 1
    model.signatureDefs = None
    content: bytes = pack(model)
    return content
