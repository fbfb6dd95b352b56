"""ONNX to TFLite, operator by operator: the exported ONNX is the only source of the TFLite file.

Three rules hold the translation together.

Layout: a tensor holds a value's axes in an order of its own (`layout`). Images come in as NHWC, convolutions and
poolings work on NHWC, everything else takes the order it finds; a TRANSPOSE is written only where an operator needs
another one. Inputs and outputs of rank 4 lie as NHWC.

Numbers: a float value between QuantizeLinear and DequantizeLinear exists on its grid only. The ONNX stores a grid's
points as uint8, TFLite as int8: the same scale, the zero point 128 lower. An operator becomes an int8 kernel if all it
reads lies on grids and a QuantizeLinear follows, and if LiteRT has a kernel that is exact; else it stays in float,
between DEQUANTIZE and QUANTIZE. Constants stay stored as in the ONNX, in int8 or float16 too.

Names: a tensor has the name of the ONNX value it holds (of the QuantizeLinear's output if it is int8), so that both
runtimes can be compared value by value. Tensors that the ONNX does not know have a colon in their name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import onnx

from compress.errors import ModelError
from compress.formats.tflite.graph import Graph
from compress.formats.tflite.operators import OPERATORS
from compress.formats.tflite.patterns import put_together
from compress.formats.tflite.translation import Translation
from compress.formats.tflite_file import pack, unpack

__all__ = ["axis_orders", "pack", "read_metadata", "tensor_names", "to_tflite", "with_outputs"]

ORDERS_KEY = "compress.axis_orders"
"""Of the file's metadata: orders of tensors other than NHWC for rank 4 and the ONNX's for the rest, as JSON."""


def to_tflite(model: onnx.ModelProto, metadata: Mapping[str, str]) -> bytes:
    """The network as a TFLite file, float or int8 as the ONNX is; images go in as NHWC.

    An input that the ONNX quantizes first, and an output that it dequantizes last, are int8 tensors of the file.
    Raises ModelError for an operator without a counterpart, and for shapes that are not fixed.
    """
    graph = Graph(model)
    put_together(graph)
    translation = Translation(graph)
    for node in graph.nodes:
        if node in translation.done:
            continue
        if node.op not in OPERATORS:
            node.refuse()
        OPERATORS[node.op](translation, node)
    orders = translation.unusual_orders()
    own = {ORDERS_KEY: json.dumps(orders)} if orders else {}
    return translation.to_bytes({**metadata, **own})


def read_metadata(data: bytes) -> dict[str, str]:
    """The texts that were given to `to_tflite`, by key."""
    return {key: text for key, text in _texts(data).items() if key != ORDERS_KEY}


def axis_orders(data: bytes) -> dict[str, tuple[int, ...]]:
    """In which order tensors hold the axes of the ONNX value of their name, where it is not the usual one.

    The usual order is NHWC for rank 4, and the ONNX's for every other rank. Axis i of the tensor is axis `order[i]`
    of the value, so `numpy.transpose(tensor, numpy.argsort(order))` is the value.
    """
    return {name: tuple(order) for name, order in json.loads(_texts(data).get(ORDERS_KEY, "{}")).items()}


def _texts(data: bytes) -> dict[str, str]:
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
