"""Operators that move or select numbers without computing: what lies on a grid stays on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.formats.tflite.graph import Node
from compress.formats.tflite.layout import NHWC, Order, arranged, reshaped, widened
from compress.formats.tflite.translation import Translation, Value
from compress.formats.tflite_file import Shape


def reshape(t: Translation, node: Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: all of them name an output shape."""
    view(t, t.value(node.inputs[0]), node.output)


def view(t: Translation, value: Value, name: str) -> None:
    """The ONNX value `name` as the numbers of `value`, in the ONNX's sequence, under its own shape."""
    new = t.shape(name)
    before, after = reshaped(value.shape, value.order, new)
    t.carry_view(t.in_order(value, before), name, after)


def transpose(t: Translation, node: Node) -> None:
    """Writes nothing: the tensor holds the result as well, in another order."""
    x = t.value(node.inputs[0])
    rank = len(x.order)
    permutation = list(node.attributes.get("perm", range(rank)[::-1]))
    t.rename(node.output, Value(x.tensor, tuple(permutation.index(axis) for axis in x.order)))


def pad(t: Translation, node: Node) -> None:
    """Zeros are put off until the value is read: a convolution takes them into its own padding."""
    rank = t.rank(node.inputs[0])
    pads, axes = t.graph.integers(node, 1), t.graph.integers(node, 3, default=range(rank))
    fill = float(t.graph.constants.get(node.input(2), np.zeros(())).item())
    per_axis = [(0, 0)] * rank
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        per_axis[axis] = (before, after)
    mode = node.attributes.get("mode", b"constant")
    name = node.inputs[0]
    if any(size < 0 for pair in per_axis for size in pair):
        if mode != b"constant" or fill or any(size > 0 for pair in per_axis for size in pair):
            node.refuse("that adds and removes at once", "crop and pad one after the other")
        cut(t, t.value(name), node.output, tuple(-before for before, _ in per_axis))
    elif mode == b"constant" and fill == 0:
        t.padded[node.output] = (name, tuple(per_axis))
    elif mode == b"constant":
        grid = t.grid(name)
        int8 = grid is not None and grid.holds(fill)
        t.rename(node.output, t.pad(t.read(name, int8=int8), tuple(per_axis), node.output, fill=fill))
    elif mode == b"reflect":
        x = t.value(name)
        inputs = [x.tensor, t.integers(f"{node.output}:pads", [per_axis[axis] for axis in x.order])]
        options = schema.MirrorPadOptionsT(mode=schema.MirrorPadMode.REFLECT)
        t.carry("MIRROR_PAD", inputs, node.output, options, order=x.order)
    else:
        node.refuse(f"with mode {mode.decode()}", "use zeros or reflect")


def concat(t: Translation, node: Node) -> None:
    """Of values and constants; the int8 kernel wants one grid, so the inputs are brought onto the result's."""
    shape = t.shape(node.output)
    axis = node.attributes["axis"] % len(shape)
    order = t.common_order(node.inputs, shape)
    landing = t.landing(node.output)
    grids = {t.grid(name) for name in node.inputs}
    grid = landing.grid or next(iter(grids))
    options = schema.ConcatenationOptionsT(axis=order.index(axis))
    if grid is None or None in grids or (landing.grid is None and len(grids) > 1):
        inputs = [t.operand(name, order) for name in node.inputs]
        t.emit("CONCATENATION", inputs, landing, options, order=order, int8=False)
        return
    inputs = []
    for index, name in enumerate(node.inputs):
        if t.grid(name) == grid:
            inputs.append(t.operand(name, order, int8=True))
        else:
            inputs.append(t.in_order(t.on_grid(name, grid, f"{node.output}:{index}"), order))
    t.carry("CONCATENATION", inputs, node.output, options, order=order)


def slice_(t: Translation, node: Node) -> None:
    """With constant begins, ends and steps."""
    shape = t.shape(node.inputs[0])
    starts = t.graph.integers(node, 1)
    axes = t.graph.integers(node, 3, default=range(len(starts)))
    steps = t.graph.integers(node, 4, default=[1] * len(starts))
    begin, step = [0] * len(shape), [1] * len(shape)
    for start, axis, stride in zip(starts, axes, steps, strict=True):
        size = shape[axis]
        counted = start + size if start < 0 else start
        begin[axis] = min(max(counted, 0), size if stride > 0 else size - 1)
        step[axis] = stride
    cut(t, t.value(node.inputs[0]), node.output, tuple(begin), tuple(step) if set(step) != {1} else None)


def cut(t: Translation, value: Value, name: str, begin: Shape, steps: Shape | None = None) -> None:
    """The ONNX value `name` as the part of `value` that starts at `begin`, in the ONNX's order of axes."""
    shape = t.shape(name)
    order = value.order
    size = arranged(shape, order)
    start = arranged(begin, order)
    if size == value.tensor.shape and not steps:
        t.rename(name, value)
        return
    x = value.tensor
    if steps is None:
        inputs = [x, t.integers(f"{name}:begin", start), t.integers(f"{name}:size", size)]
        version = 5 if len(size) > 4 else None
        t.carry("SLICE", inputs, name, schema.SliceOptionsT(), order=order, version=version)
        return
    stride = arranged(steps, order)
    last = [first + by * (count - 1) for first, by, count in zip(start, stride, size, strict=True)]
    end = [index + (1 if by > 0 else -1) for index, by in zip(last, stride, strict=True)]
    mask = sum(1 << axis for axis, index in enumerate(end) if index < 0)  # below zero would count from behind
    words = {"begin": start, "end": end, "step": stride}
    inputs = [x, *(t.integers(f"{name}:{word}", numbers) for word, numbers in words.items())]
    version = 4 if len(size) > 4 else None
    t.carry("STRIDED_SLICE", inputs, name, schema.StridedSliceOptionsT(endMask=mask), order=order, version=version)


def split(t: Translation, node: Node) -> None:
    """One SLICE for each part."""
    axis = node.attributes.get("axis", 0) % t.rank(node.inputs[0])
    value = t.value(node.inputs[0])
    begin = [0] * len(value.order)
    for name in node.outputs:
        if name:
            cut(t, value, name, tuple(begin))
            begin[axis] += t.shape(name)[axis]


def gather(t: Translation, node: Node) -> None:
    """With constant indices; those that follow one another are a SLICE."""
    name, output = node.inputs[0], node.output
    shape = t.shape(name)
    axis = node.attributes.get("axis", 0) % len(shape)
    indices = t.graph.constants.get(node.inputs[1])
    if indices is None:
        node.refuse("with computed indices", "use fixed indices")
    if t.is_constant(name):
        node.refuse("in a constant", "use fixed indices")
    flat = [int(index) % shape[axis] for index in indices.reshape(-1)]
    value = t.value(name)
    if indices.ndim == 0:
        picked = taken(t, value, axis, flat, f"{output}:picked")
        view(t, picked, output)
    elif indices.ndim == 1:
        t.rename(output, taken(t, value, axis, flat, output))
    else:
        view(t, taken(t, value, axis, flat, f"{output}:picked"), output)


def taken(t: Translation, value: Value, axis: int, indices: Sequence[int], name: str) -> Value:
    """The value with only `indices` along an ONNX axis, in a tensor `name`."""
    x, place = value.tensor, value.order.index(axis)
    if list(indices) == list(range(x.shape[place])):
        return value
    shape = tuple(len(indices) if at == place else size for at, size in enumerate(x.shape))
    output = t.file.tensor(name, shape, x.grid, nonnegative=x.nonnegative)
    if list(indices) == list(range(indices[0], indices[0] + len(indices))):
        begin = [indices[0] if at == place else 0 for at in range(len(shape))]
        inputs = [x, t.integers(f"{name}:begin", begin), t.integers(f"{name}:size", shape)]
        t.file.operator("SLICE", inputs, output, schema.SliceOptionsT(), 5 if len(shape) > 4 else None)
    else:
        inputs = [x, t.integers(f"{name}:indices", indices)]
        t.file.operator("GATHER", inputs, output, schema.GatherOptionsT(axis=place))
    return Value(output, value.order)


def expand(t: Translation, node: Node) -> None:
    """Expand: broadcasting that is written out."""
    value = t.value(node.inputs[0])
    shape = t.shape(node.output)
    order = widened(value.order, len(shape))
    x = t.reshaped(value.tensor, (1,) * (len(shape) - len(value.order)) + value.tensor.shape)
    target = arranged(shape, order)
    if x.shape == target:
        t.rename(node.output, Value(x, order))
        return
    inputs = [x, t.integers(f"{node.output}:shape", target)]
    t.carry("BROADCAST_TO", inputs, node.output, schema.BroadcastToOptionsT(), order=order, version=2)


def tile(t: Translation, node: Node) -> None:
    value = t.value(node.inputs[0])
    repeats = t.graph.integers(node, 1)
    inputs = [value.tensor, t.integers(f"{node.output}:repeats", [repeats[axis] for axis in value.order])]
    t.carry("TILE", inputs, node.output, schema.TileOptionsT(), order=value.order)


def depth_to_space(t: Translation, node: Node) -> None:
    """TFLite's operator takes the channels in DCR order; torch's PixelShuffle (CRD) is a transposition of rank 6."""
    block = node.attributes["blocksize"]
    value = t.value(node.inputs[0])
    batch, channels, height, width = value.shape
    if node.attributes.get("mode", b"DCR") == b"DCR":
        x = t.in_order(value, NHWC)
        t.carry("DEPTH_TO_SPACE", [x], node.output, schema.DepthToSpaceOptionsT(blockSize=block), order=NHWC)
        return
    apart = (batch, channels // block**2, block, block, height, width)
    moved: Order = (0, 1, 4, 2, 5, 3)  # batch, channel, height, row in the block, width, column in the block
    before, order = reshaped(value.shape, value.order, apart)
    x = t.reshaped(t.in_order(value, before), arranged(apart, order), f"{node.output}:apart")
    view(t, Value(x, tuple(moved.index(axis) for axis in order)), node.output)


def space_to_depth(t: Translation, node: Node) -> None:
    x = t.in_order(t.value(node.inputs[0]), NHWC)
    options = schema.SpaceToDepthOptionsT(blockSize=node.attributes["blocksize"])
    t.carry("SPACE_TO_DEPTH", [x], node.output, options, order=NHWC)


def cast(t: Translation, node: Node) -> None:
    """Of real numbers to real numbers, which changes nothing here."""
    if node.attributes["to"] != 1:  # TensorProto.FLOAT
        node.refuse("to another type than float32")
    t.rename(node.output, t.value(node.inputs[0]))
