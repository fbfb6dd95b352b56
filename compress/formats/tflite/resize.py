"""Resizing of images: nearest neighbour and bilinear, where TFLite's coordinates are those of the ONNX."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.formats.tflite.graph import Node
from compress.formats.tflite.layout import NHWC
from compress.formats.tflite.moving import taken
from compress.formats.tflite.translation import Translation, Value

CLOSE = 1e-4
"""Of a pixel: float32 coordinates of the runtimes differ by less."""


def resize(t: Translation, node: Node) -> None:
    """Over the two axes of an image."""
    name, output = node.inputs[0], node.output
    shape, result = t.shape(name), t.shape(output)
    if len(shape) != 4 or shape[:2] != result[:2]:
        node.refuse("over other axes than the image's")
    mode = node.attributes.get("mode", b"nearest").decode()
    if mode not in ("nearest", "linear"):
        node.refuse(f"with mode {mode}", "use nearest or bilinear")
    if node.attributes.get("antialias", 0):
        node.refuse("with antialias", "use antialias=False")
    coordinates = [_coordinates(t, node, axis) for axis in (2, 3)]
    if mode == "nearest":
        _nearest(t, node, coordinates)
    else:
        _linear(t, node, coordinates)


def _coordinates(t: Translation, node: Node, axis: int) -> np.ndarray:
    """Where in the input, in pixels, each pixel of the result along `axis` comes from."""
    old, new = t.shape(node.inputs[0])[axis], t.shape(node.output)[axis]
    scales = t.graph.constants.get(node.input(2))
    scale = float(scales[-4:][axis]) if scales is not None and scales.size == 4 else new / old
    if scales is not None and scales.size not in (0, 4):
        node.refuse("with scales of some axes only")
    at = np.arange(new, dtype=np.float64)
    kind = node.attributes.get("coordinate_transformation_mode", b"half_pixel").decode()
    if kind == "align_corners":
        return at * (old - 1) / (new - 1) if new > 1 else at * 0
    if kind == "asymmetric":
        return at / scale
    if kind == "half_pixel" or (kind == "pytorch_half_pixel" and new > 1):
        return (at + 0.5) / scale - 0.5
    if kind == "pytorch_half_pixel":
        return at * 0
    return node.refuse(f"with coordinate_transformation_mode {kind}")


FLAGS: tuple[dict[str, bool], ...] = ({}, {"halfPixelCenters": True}, {"alignCorners": True})


def _in_tflite(old: int, new: int, *, halfPixelCenters: bool = False, alignCorners: bool = False) -> np.ndarray:
    """The same coordinates in TFLite."""
    at = np.arange(new, dtype=np.float64)
    if alignCorners and new > 1:
        return at * (old - 1) / (new - 1)
    return (at + 0.5) * old / new - 0.5 if halfPixelCenters else at * old / new


def _linear(t: Translation, node: Node, coordinates: list[np.ndarray]) -> None:
    """In float if computed: the int8 kernel rounds ties otherwise than the runtimes of the ONNX."""
    shape, result = t.shape(node.inputs[0]), t.shape(node.output)
    for flags in FLAGS:
        ours = [_in_tflite(shape[axis], result[axis], **flags) for axis in (2, 3)]
        limits = [(0, shape[axis] - 1) for axis in (2, 3)]
        pairs = zip(coordinates, ours, limits, strict=True)
        if all(np.allclose(np.clip(a, *limit), np.clip(b, *limit), atol=CLOSE) for a, b, limit in pairs):
            break
    else:
        node.refuse("with coordinates that its kernel does not know", "give a size that is a multiple of the input's")
    x = t.image(node.inputs[0], int8=False)
    options = schema.ResizeBilinearOptionsT(**flags)
    inputs = [x, t.integers(f"{node.output}:size", result[2:])]
    version = 3 if flags.get("halfPixelCenters") else None
    t.emit("RESIZE_BILINEAR", inputs, t.landing(node.output), options, order=NHWC, int8=False, version=version)


ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
}


def _nearest(t: Translation, node: Node, coordinates: list[np.ndarray]) -> None:
    """By TFLite's kernel if it picks the same pixels, else by their indices along each axis."""
    shape, result, output = t.shape(node.inputs[0]), t.shape(node.output), node.output
    rounding = node.attributes.get("nearest_mode", b"round_prefer_floor")
    # Quotients that are whole but for their last digit must not fall to the pixel before.
    rounded = [ROUNDINGS[rounding.decode()](np.round(at, 6)) for at in coordinates]
    picked = [np.clip(at, 0, shape[axis] - 1).astype(int) for axis, at in zip((2, 3), rounded, strict=True)]
    value = t.value(node.inputs[0])
    if all((at == _picked_by_tflite(shape[axis], result[axis])).all() for axis, at in zip((2, 3), picked, strict=True)):
        x = t.in_order(value, NHWC)
        inputs = [x, t.integers(f"{output}:size", result[2:])]
        t.carry("RESIZE_NEAREST_NEIGHBOR", inputs, output, schema.ResizeNearestNeighborOptionsT(), order=NHWC)
        return
    rows = taken(t, value, 2, picked[0].tolist(), f"{output}:rows")
    found: Value = taken(t, rows, 3, picked[1].tolist(), output)
    t.rename(output, found)


def _picked_by_tflite(old: int, new: int) -> np.ndarray:
    """In float32, as the kernel computes it (resize_nearest_neighbor.h)."""
    scale = np.float32(old) / np.float32(new)
    at = np.floor(np.arange(new, dtype=np.float32) * scale).astype(int)
    found: np.ndarray = np.minimum(at, old - 1)
    return found
