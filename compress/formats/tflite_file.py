"""A TFLite file under construction: tensors, operators, buffers. Nothing here knows ONNX.

The layout is `schema.fbs` of LiteRT, through the object API that `ai_edge_litert` ships.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

Shape = tuple[int, ...]

ALIGNMENT = 16  # bytes; `force_align` of Buffer.data in schema.fbs, which the Python object API does not honour

TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.float16): schema.TensorType.FLOAT16,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int8): schema.TensorType.INT8,
}

# Versions of the int8 kernels as op_version.cc of LiteRT assigns them; 1 where an operator is missing here.
INT8_VERSIONS = {
    "ADD": 2,
    "BROADCAST_TO": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "DEPTH_TO_SPACE": 2,
    "DEQUANTIZE": 2,
    "FULLY_CONNECTED": 4,
    "GATHER": 2,
    "LOGISTIC": 2,
    "MAXIMUM": 2,
    "MAX_POOL_2D": 2,
    "MEAN": 2,
    "MINIMUM": 2,
    "MIRROR_PAD": 2,
    "MUL": 2,
    "PAD": 2,
    "PADV2": 2,
    "REDUCE_MAX": 2,
    "REDUCE_MIN": 2,
    "RESIZE_NEAREST_NEIGHBOR": 2,
    "SLICE": 2,
    "SPACE_TO_DEPTH": 2,
    "STRIDED_SLICE": 2,
    "SUB": 2,
    "SUM": 2,
    "TANH": 2,
    "TRANSPOSE": 2,
}


@dataclass(frozen=True)
class Grid:
    """The real numbers an int8 tensor can hold: `scale * (stored - zero_point)`, stored in [-128, 127]."""

    scale: np.float32
    zero_point: int

    def nearest(self, number: float) -> int:
        """What an int8 tensor stores for `number`."""
        return int(np.clip(np.round(number / float(self.scale)) + self.zero_point, -128, 127))

    def holds(self, number: float) -> bool:
        """Whether `number` is a point of the grid, but for rounding of float32."""
        point = float(self.scale) * (self.nearest(number) - self.zero_point)
        return math.isclose(number, point, rel_tol=1e-6, abs_tol=1e-6 * float(self.scale))


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file. Without a grid it is float32 (or int32, for shapes and axes)."""

    index: int
    name: str
    shape: Shape
    grid: Grid | None = None
    nonnegative: bool = False
    """Of a float tensor: no element is below zero, whatever the input, so that zeros can pad it for a maximum."""


class _Buffer(schema.BufferT):
    """Bytes that start at a multiple of ALIGNMENT in the file."""

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802 - flatbuffers' name
        if self.data is not None:
            builder.Prep(ALIGNMENT, len(self.data))
        return super().Pack(builder)


@dataclass(frozen=True)
class _Operator:
    op: str
    version: int
    inputs: tuple[int, ...]
    output: int
    options: Any


class TFLiteFile:
    """Grows by tensors and operators, in execution order; `to_bytes` ends it."""

    def __init__(self) -> None:
        self._tensors: list[schema.TensorT] = []
        self._contents: dict[int, bytes] = {}  # of the constants, by tensor
        self._operators: list[_Operator] = []

    def tensor(self, name: str, shape: Shape, grid: Grid | None = None, *, nonnegative: bool = False) -> Tensor:
        """A tensor that an operator, or the caller of the file, fills: int8 on `grid`, else float32."""
        tensor = Tensor(len(self._tensors), name, shape, grid, nonnegative)
        kind = np.dtype(np.float32 if grid is None else np.int8)
        quantization = _quantization([grid.scale], [grid.zero_point]) if grid else None
        self._add_tensor(name, shape, kind, quantization)
        return tensor

    def constant(
        self,
        name: str,
        values: np.ndarray,
        *,
        grid: Grid | None = None,
        scales: np.ndarray | None = None,
        axis: int = 0,
    ) -> Tensor:
        """A tensor with its numbers in the file; `scales` are symmetric, one or one per index along `axis`."""
        quantization = None
        if grid is not None:
            quantization = _quantization([grid.scale], [grid.zero_point])
        elif scales is not None:
            quantization = _quantization(scales, np.zeros(len(scales), np.int64), axis if len(scales) > 1 else 0)
        tensor = Tensor(len(self._tensors), name, values.shape, grid)
        self._add_tensor(name, values.shape, values.dtype, quantization)
        self._contents[tensor.index] = values.tobytes()
        return tensor

    def operator(
        self, op: str, inputs: Sequence[Tensor], output: Tensor, options: Any = None, version: int | None = None
    ) -> None:
        """Appends `op`, a name of BuiltinOperator. The version defaults to that of the plain or int8 kernel."""
        if version is None:
            version = INT8_VERSIONS.get(op, 1) if inputs[0].grid else 1
        sources = tuple(tensor.index for tensor in inputs)
        self._operators.append(_Operator(op, version, sources, output.index, options))

    def to_bytes(self, *, inputs: Sequence[Tensor], outputs: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
        """The finished file; operators and constants that no output depends on are left out."""
        operators: list[_Operator] = []
        wanted = {tensor.index for tensor in outputs}
        for operator in reversed(self._operators):
            if operator.output in wanted:
                operators.insert(0, operator)
                wanted.update(operator.inputs)
        number = {old: new for new, old in enumerate(sorted(wanted | {tensor.index for tensor in inputs}))}

        buffers = [schema.BufferT()]  # the empty one, for tensors that the runtime fills

        def buffer(content: bytes) -> int:
            buffers.append(schema.BufferT(data=np.frombuffer(content, np.uint8)))
            return len(buffers) - 1

        tensors = []
        for index in number:
            tensor = self._tensors[index]
            tensor.buffer = buffer(self._contents[index]) if index in self._contents else 0
            tensors.append(tensor)
        codes = {kind: place for place, kind in enumerate(dict.fromkeys((x.op, x.version) for x in operators))}
        graph = schema.SubGraphT(
            tensors=tensors,
            inputs=[number[tensor.index] for tensor in inputs],
            outputs=[number[tensor.index] for tensor in outputs],
            operators=[_packed(operator, codes[operator.op, operator.version], number) for operator in operators],
            name="main",
        )
        return pack(
            schema.ModelT(
                version=3,
                operatorCodes=[_code(op, version) for op, version in codes],
                subgraphs=[graph],
                description="compress",
                metadata=[schema.MetadataT(name=key, buffer=buffer(text.encode())) for key, text in metadata.items()],
                buffers=buffers,
            )
        )

    def _add_tensor(self, name: str, shape: Shape, kind: np.dtype, quantization: Any) -> None:
        self._tensors.append(
            schema.TensorT(name=name, shape=list(shape), type=TYPES[kind], quantization=quantization, hasRank=True)
        )


def _packed(operator: _Operator, code: int, number: Mapping[int, int]) -> schema.OperatorT:
    packed = schema.OperatorT(
        opcodeIndex=code, inputs=[number[index] for index in operator.inputs], outputs=[number[operator.output]]
    )
    if operator.options is not None:
        packed.builtinOptions = operator.options
        packed.builtinOptionsType = getattr(schema.BuiltinOptions, type(operator.options).__name__.removesuffix("T"))
    return packed


def _code(op: str, version: int) -> schema.OperatorCodeT:
    code = getattr(schema.BuiltinOperator, op)
    # Readers older than 2020 know the one-byte field only; 127 sends the others to the new field.
    return schema.OperatorCodeT(deprecatedBuiltinCode=min(code, 127), version=version, builtinCode=code)


def pack(model: schema.ModelT) -> bytes:
    """The flatbuffer of a model in the object API, every buffer aligned."""
    model.buffers = [_Buffer(data=buffer.data) for buffer in model.buffers]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def unpack(data: bytes) -> schema.ModelT:
    """The model in the object API; it can be edited and packed again."""
    return schema.ModelT.InitFromPackedBuf(data, 0)


def _quantization(scales: Any, zero_points: Any, axis: int = 0) -> schema.QuantizationParametersT:
    return schema.QuantizationParametersT(
        scale=np.asarray(scales, np.float32),
        zeroPoint=np.asarray(zero_points, np.int64),
        quantizedDimension=axis,
    )
