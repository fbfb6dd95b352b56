"""A TFLite file under construction: tensors, operators, buffers. Nothing here knows ONNX.

The layout is `schema.fbs` of LiteRT, through the object API that `ai_edge_litert` ships.
"""

from __future__ import annotations

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
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int8): schema.TensorType.INT8,
}

# Versions of the int8 kernels as op_version.cc of LiteRT assigns them; 1 where an operator is missing here.
INT8_VERSIONS = {
    "ADD": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "DEQUANTIZE": 2,
    "FULLY_CONNECTED": 4,
    "LOGISTIC": 2,
    "MAX_POOL_2D": 2,
    "MEAN": 2,
    "MUL": 2,
    "PAD": 2,
    "PADV2": 2,
    "SUB": 2,
    "TRANSPOSE": 2,
}


@dataclass(frozen=True)
class Grid:
    """The real numbers an int8 tensor can hold: `scale * (stored - zero_point)`, stored in [-128, 127]."""

    scale: np.float32
    zero_point: int


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


class TFLiteFile:
    """Grows by tensors and operators, in execution order; `to_bytes` ends it."""

    def __init__(self) -> None:
        self._tensors: list[schema.TensorT] = []
        self._operators: list[schema.OperatorT] = []
        self._codes: dict[tuple[str, int], int] = {}
        self._buffers = [schema.BufferT()]  # the empty one, for tensors that the runtime fills

    def tensor(self, name: str, shape: Shape, grid: Grid | None = None, *, nonnegative: bool = False) -> Tensor:
        """A tensor that an operator, or the caller of the file, fills: int8 on `grid`, else float32."""
        tensor = Tensor(len(self._tensors), name, shape, grid, nonnegative)
        kind = np.dtype(np.float32 if grid is None else np.int8)
        quantization = _quantization([grid.scale], [grid.zero_point]) if grid else None
        self._add_tensor(name, shape, kind, 0, quantization)
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
        self._add_tensor(name, values.shape, values.dtype, self._add_buffer(values.tobytes()), quantization)
        return tensor

    def operator(
        self, op: str, inputs: Sequence[Tensor], output: Tensor, options: Any = None, version: int | None = None
    ) -> None:
        """Appends `op`, a name of BuiltinOperator. The version defaults to that of the plain or int8 kernel."""
        if version is None:
            version = INT8_VERSIONS.get(op, 1) if inputs[0].grid else 1
        operator = schema.OperatorT(
            opcodeIndex=self._codes.setdefault((op, version), len(self._codes)),
            inputs=[tensor.index for tensor in inputs],
            outputs=[output.index],
        )
        if options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self._operators.append(operator)

    def to_bytes(self, *, inputs: Sequence[Tensor], outputs: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
        """The finished file."""
        entries = [schema.MetadataT(name=key, buffer=self._add_buffer(text.encode())) for key, text in metadata.items()]
        codes = []
        for op, version in self._codes:
            code = getattr(schema.BuiltinOperator, op)
            # Readers older than 2020 know the one-byte field only; 127 sends the others to the new field.
            codes.append(schema.OperatorCodeT(deprecatedBuiltinCode=min(code, 127), version=version, builtinCode=code))
        graph = schema.SubGraphT(
            tensors=self._tensors,
            inputs=[tensor.index for tensor in inputs],
            outputs=[tensor.index for tensor in outputs],
            operators=self._operators,
            name="main",
        )
        return pack(
            schema.ModelT(
                version=3,
                operatorCodes=codes,
                subgraphs=[graph],
                description="compress",
                buffers=self._buffers,
                metadata=entries,
            )
        )

    def _add_buffer(self, data: bytes) -> int:
        self._buffers.append(schema.BufferT(data=np.frombuffer(data, np.uint8)))
        return len(self._buffers) - 1

    def _add_tensor(self, name: str, shape: Shape, kind: np.dtype, buffer: int, quantization: Any) -> None:
        self._tensors.append(
            schema.TensorT(
                name=name,
                shape=list(shape),
                type=TYPES[kind],
                buffer=buffer,
                quantization=quantization,
                hasRank=True,
            )
        )


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
