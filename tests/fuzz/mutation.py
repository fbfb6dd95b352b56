"""Damage to bytes, to values and to the insides of model files; the same for the same seed."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import struct
from typing import Any

import onnx
import pytest
from onnx import TensorProto

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    32767,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    -1,
    -2,
    -(2**31),
    -(2**63),
)
WORDS = (
    b"\x00" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x01\x00\x00\x00",
    b"../../evil",
    b"\x1b[31m",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    10**30,
    -0.5,
    1e308,
    1e-320,
    "",
    "x",
    "../../evil",
    "/etc/passwd",
    "\x1b[31mred",
    "<script>alert(1)</script>",
    "é" * 300,
    "a\nb",
    "use",
    "NaN",
    [],
    [[]],
    [None],
    {},
    {"use": "train"},
    {"a": {"b": [1]}},
    [1, "2"],
    float("nan"),
    float("inf"),
    "\ud800",
)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut off, inserted, doubled or swapped; now and then nothing left at all."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8, 30))):
        where = rng.randrange(len(data) + 1) if rng.random() < 0.6 else rng.randrange(min(len(data), 200) + 1)
        match rng.randrange(8):
            case 0 | 1 if data:
                data[where % len(data)] ^= 1 << rng.randrange(8)
            case 2:
                del data[where:]
            case 3:
                data[where:where] = rng.randbytes(rng.choice((1, 2, 4, 16, 300)))
            case 4:
                del data[where : where + rng.choice((1, 2, 4, 8, 64))]
            case 5:
                data[where : where + 4] = rng.choice(WORDS)
            case 6:
                data[where : where + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
            case _ if data:
                size = rng.choice((4, 16, 64))
                other = rng.randrange(len(data))
                data[where : where + size] = data[other : other + size]
        if not data:
            break
    return bytes(data)


def changed_value(value: Any, rng: random.Random) -> Any:
    """Another value in place of one: of the same kind but extreme, or of any kind."""
    if rng.random() < 0.5:
        return copy.deepcopy(rng.choice(VALUES))
    match value:
        case bool():
            return not value
        case int():
            return rng.choice((*NUMBERS, value + 1, value - 1, -value, value * 1000, float(value), str(value)))
        case float():
            return rng.choice(
                (-value, value * 1e9, 0.0, math.inf, math.nan, 1e-30, int(value) if math.isfinite(value) else 0)
            )
        case str():
            return rng.choice(
                (value[:-1], value + "x", value.upper(), value * 50, "../" + value, "/" + value, value.swapcase(), "")
            )
        case list():
            return rng.choice(
                ([], value * 2, value[:1], value[1:], [value], value[::-1], {str(k): v for k, v in enumerate(value)})
            )
        case dict():
            return rng.choice(({}, list(value.values()), list(value), {"x": value}))
    return copy.deepcopy(rng.choice(VALUES))


def places(value: Any, keys: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys of every value within `value`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [keys] * bool(keys) + [place for key, item in inner for place in places(item, (*keys, key))]


def mutated(value: Any, rng: random.Random, times: int | None = None) -> Any:
    """A copy of nested lists and mappings with keys dropped, renamed, doubled, moved, and values of any kind."""
    value = copy.deepcopy(value)
    for _ in range(times or rng.choice((1, 1, 1, 2, 4))):
        found = places(value)
        if not found:
            return changed_value(value, rng)
        # The deeper, the rarer: half of the time one of the upper levels.
        *around, key = (
            rng.choice([p for p in found if len(p) <= 3] or found) if rng.random() < 0.4 else rng.choice(found)
        )
        inside = value
        for part in around:
            inside = inside[part]
        match rng.randrange(6):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside[str(key) + "x" if rng.random() < 0.5 else rng.choice(("use", "name", "", "stages", "é"))] = (
                    inside.pop(key)
                )
            case 2 if isinstance(inside, list):
                inside.insert(key, copy.deepcopy(inside[key]))
            case 3:
                *elsewhere, other = rng.choice(found)
                target = value
                for part in elsewhere:
                    target = target[part] if isinstance(target, dict | list) and _has(target, part) else None
                if isinstance(target, dict | list) and _has(target, other):
                    inside[key] = copy.deepcopy(target[other])
            case _:
                inside[key] = changed_value(inside[key], rng)
    return value


def _has(container: Any, key: Any) -> bool:
    if isinstance(container, dict):
        return key in container
    return isinstance(key, int) and key < len(container)


def onnx_mutated(content: bytes, rng: random.Random) -> bytes:
    """An ONNX file whose messages are whole and whose fields are not what they should be."""
    model = onnx.ModelProto.FromString(content)
    graph = model.graph
    for _ in range(rng.choice((1, 1, 2, 4))):
        node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
        value = rng.choice([*graph.input, *graph.output, *graph.value_info])
        match rng.randrange(16):
            case 0:
                node.op_type = rng.choice(
                    (
                        "Loop",
                        "If",
                        "Reshape",
                        "Nope",
                        "",
                        "Conv",
                        "Gather",
                        "QuantizeLinear",
                        rng.choice(graph.node).op_type,
                    )
                )
            case 1 if node.input:
                node.input[rng.randrange(len(node.input))] = rng.choice(
                    [
                        "",
                        "nowhere",
                        node.output[0],
                        *(t.name for t in graph.initializer),
                        *rng.choice(graph.node).output,
                    ]
                )
            case 2:
                node.output[0] = rng.choice(["", rng.choice(graph.node).output[0], graph.input[0].name])
            case 3 if node.attribute:
                attribute = rng.choice(node.attribute)
                if attribute.ints:
                    attribute.ints[rng.randrange(len(attribute.ints))] = _signed(rng)
                else:
                    attribute.i = _signed(rng)
            case 4 if node.attribute:
                del node.attribute[rng.randrange(len(node.attribute))]
            case 5:
                tensor.data_type = rng.randrange(26)
            case 6 if tensor.dims:
                tensor.dims[rng.randrange(len(tensor.dims))] = _signed(rng)
            case 7:
                tensor.dims.append(_signed(rng))
            case 8:
                tensor.raw_data = damaged(tensor.raw_data, rng)
            case 9:
                tensor.name = rng.choice(["", "other", rng.choice(graph.initializer).name])
            case 10:
                shape = value.type.tensor_type.shape
                if shape.dim:
                    rng.choice(shape.dim).dim_value = _signed(rng)
            case 11:
                value.type.tensor_type.elem_type = rng.randrange(26)
            case 12:
                model.opset_import[0].version = rng.choice((0, 1, 7, 13, 21, 99, -1))
            case 13:
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for key, text in (
                    ("location", rng.choice(("../../secret", "/etc/passwd", "weights.bin", ""))),
                    ("offset", str(_signed(rng))),
                    ("length", str(_signed(rng))),
                ):
                    entry = tensor.external_data.add()
                    entry.key, entry.value = key, text
            case 14:
                items = rng.choice((graph.node, graph.initializer, graph.output, graph.input))
                if len(items) > 1 or rng.random() < 0.3:
                    del items[rng.randrange(len(items))]
            case _:
                entry = model.metadata_props.add()
                entry.key = rng.choice(("compress.labels", "compress.preprocess", "compress.kind", "x"))
                entry.value = rng.choice(
                    (
                        "{",
                        "[1]",
                        '"a"',
                        "\x1b[2J",
                        "<b>",
                        json.dumps({"size": _signed(rng), "mean": [1, 2], "std": [0, 0, 0], "crop": -1}),
                        "int8",
                        "null",
                    )
                )
        if not (graph.node and graph.initializer and graph.input):
            break
    return model.SerializeToString()


def tflite_mutated(content: bytes, rng: random.Random) -> bytes:
    """A TFLite file whose flatbuffer is whole and whose fields are not what they should be."""
    from compress.formats.tflite_file import pack, schema, unpack

    model = unpack(content)
    graph = model.subgraphs[0]
    for _ in range(rng.choice((1, 1, 2, 4))):
        operator, tensor, code = rng.choice(graph.operators), rng.choice(graph.tensors), rng.choice(model.operatorCodes)
        match rng.randrange(16):
            case 0:
                code.builtinCode = rng.choice((rng.randrange(210), rng.randrange(210), 2**31 - 1, -1))
                code.deprecatedBuiltinCode = min(127, max(-128, code.builtinCode))
            case 1:
                code.version = rng.choice((0, 1, 2, 5, 100, -1))
            case 2:
                operator.opcodeIndex = rng.choice((0, 1, 5, 100, 2**32 - 1))
            case 3:
                operator.inputs = _indices(operator.inputs, len(graph.tensors), rng)
            case 4:
                operator.outputs = _indices(operator.outputs, len(graph.tensors), rng)
            case 5:
                tensor.shape = [
                    _small(rng) if rng.random() < 0.4 else int(n)
                    for n in (tensor.shape if tensor.shape is not None else [])
                ] + [_small(rng)] * (rng.random() < 0.2)
            case 6:
                tensor.type = rng.randrange(20)
            case 7:
                tensor.buffer = rng.choice((0, 1, 2, len(model.buffers) - 1, len(model.buffers), 2**32 - 1))
            case 8 if tensor.quantization is not None:
                tensor.quantization.scale = rng.choice(
                    ([], [0.0], [math.nan], [math.inf], [-1.0], [1e-40], [0.1] * 3, None)
                )
            case 9 if tensor.quantization is not None:
                tensor.quantization.zeroPoint = rng.choice(([], [0], [-129], [2**62], [0] * 3, None))
                tensor.quantization.quantizedDimension = rng.choice((0, 1, 3, 9, -1))
            case 10:
                buffer = rng.choice(model.buffers)
                if buffer.data is not None:
                    buffer.data = (
                        list(damaged(bytes(buffer.data), rng)) if rng.random() < 0.7 else rng.choice((None, []))
                    )
            case 11:
                options = operator.builtinOptions
                fields = (
                    [name for name, kept in vars(options).items() if isinstance(kept, int)]
                    if options is not None
                    else []
                )
                if fields:
                    setattr(
                        options,
                        rng.choice(fields),
                        rng.choice((0, 1, -1, 3, 100, 2**31 - 1) if rng.random() < 0.5 else (0, 1, 2, 3)),
                    )
            case 12:
                operator.builtinOptions, operator.builtinOptionsType = None, 0
            case 13:
                names = rng.choice((graph.inputs, graph.outputs))
                changed = _indices(names, len(graph.tensors), rng)
                if names is graph.inputs:
                    graph.inputs = changed
                else:
                    graph.outputs = changed
            case 14:
                items = rng.choice((graph.operators, graph.tensors, model.buffers, model.operatorCodes))
                if len(items) > 1:
                    del items[rng.randrange(len(items))]
            case _:
                model.metadata = [
                    schema.MetadataT(
                        name=rng.choice(
                            ("compress.orders", "compress.labels", "compress.preprocess", "compress.kind", "\x1b[31m")
                        ),
                        buffer=rng.randrange(len(model.buffers)),
                    )
                ]
    try:
        return pack(model)
    except Exception:  # a value that its field cannot hold
        return damaged(content, rng)


def _indices(old: Any, count: int, rng: random.Random) -> list[int]:
    found = [int(index) for index in (old if old is not None else [])]
    match rng.randrange(4):
        case 0 if found:
            found[rng.randrange(len(found))] = rng.choice(
                (-1, 0, count - 1, count, 2**31 - 1, -(2**31), rng.randrange(count))
            )
        case 1 if found:
            del found[rng.randrange(len(found))]
        case 2:
            found.append(rng.randrange(-1, count))
        case _:
            rng.shuffle(found)
    return found


def _signed(rng: random.Random) -> int:
    return rng.choice((0, 1, 2, 3, 5, 16, 1000, -1, -2, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63)))


def _small(rng: random.Random) -> int:
    return rng.choice((0, 1, 2, 3, 8, 16, 17, 1000, 65536, -1, 2**31 - 1))


def cases(name: str, default: int, slow: int) -> list[Any]:
    """`NAME-0` ...: the first in every test run, the others in the slow one, and those that FUZZ_CASES asks for."""
    found = [pytest.param(f"{name}-{number}", marks=[pytest.mark.slow] * (number >= default)) for number in range(slow)]
    if asked := os.environ.get("FUZZ_CASES"):
        first, _, last = asked.partition("-")
        found += [pytest.param(f"{name}-{number}") for number in range(max(int(first), slow), int(last))]
    return found
