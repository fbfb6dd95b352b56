"""QuantizeLinear and DequantizeLinear of activations: a value between them exists on its grid only."""

from __future__ import annotations

from compress.formats.tflite.graph import Node
from compress.formats.tflite.translation import Translation


def quantize(t: Translation, node: Node) -> None:
    grid = t.graph.grid(node)
    name = node.inputs[0]
    if name in t.padded and t.grid(name) == grid:
        t.padded[node.output] = t.padded[name]
        return
    t.rename(node.output, t.on_grid(name, grid, node.output))


def dequantize(t: Translation, node: Node) -> None:
    name = node.inputs[0]
    if t.grid(name) != t.graph.grid(node):
        node.refuse("with another grid than its QuantizeLinear")
    if name in t.padded:
        t.padded[node.output] = t.padded[name]
    else:
        t.rename(node.output, t.value(name))
