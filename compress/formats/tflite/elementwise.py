"""Operators on two or more values, element by element."""

from __future__ import annotations

import math

from ai_edge_litert import schema_py_generated as schema

from compress.formats.tflite.graph import Node
from compress.formats.tflite.layout import arranged
from compress.formats.tflite.translation import Translation


def binary(t: Translation, node: Node) -> None:
    """Add, Sub, Mul, Div: two values, or a value and a constant."""
    landing = t.landing(node.output, fuse=True)
    grids = [t.grid(name) for name in node.inputs]
    int8 = landing.grid is not None and None not in grids and node.op != "Div"
    shape = t.shape(node.output)
    order = t.common_order(node.inputs, shape)
    inputs = [t.operand(name, order, int8=int8) for name in node.inputs]
    version = None
    if int8 and landing.grid and node.op == "Mul":  # op_version.cc: 3 where the product is rescaled by 1 or more
        product_scale = math.prod(float(grid.scale) for grid in grids if grid)
        version = 3 if product_scale >= landing.grid.scale else 2
    options = getattr(schema, f"{node.op}OptionsT")()
    t.emit(node.op.upper(), inputs, landing, options, order=order, int8=int8, version=version)


def extremum(t: Translation, node: Node) -> None:
    """Max, Min of any number of values; in int8 if all lie on one grid, since one of them is selected."""
    landing = t.landing(node.output)
    int8 = landing.grid is not None and {t.grid(name) for name in node.inputs} == {landing.grid}
    _chain(t, node, "MAXIMUM" if node.op == "Max" else "MINIMUM", schema.MaximumMinimumOptionsT, int8=int8)


def add_up(t: Translation, node: Node) -> None:
    """Sum of any number of values, in float."""
    _chain(t, node, "ADD", schema.AddOptionsT, int8=False)


def _chain(t: Translation, node: Node, op: str, options: type, *, int8: bool) -> None:
    order = t.common_order(node.inputs, t.shape(node.output))
    shape = arranged(t.shape(node.output), order)
    landing = t.landing(node.output)
    found, *others = [t.operand(name, order, int8=int8) for name in node.inputs]
    if not others:
        t.rename(node.output, t.value(node.inputs[0]))
        return
    for index, other in enumerate(others[:-1]):
        total = t.file.tensor(f"{node.output}:{index}", shape, landing.grid if int8 else None)
        t.file.operator(op, [found, other], total, options())
        found = total
    t.emit(op, [found, others[-1]], landing, options(), order=order, int8=int8)


def power(t: Translation, node: Node) -> None:
    """Pow, in float; a usual constant exponent has an operator of its own."""
    exponent = t.graph.scalar(node.inputs[1])
    landing = t.landing(node.output)
    usual = {2.0: "SQUARE", 0.5: "SQRT", -0.5: "RSQRT"}
    if exponent in usual and t.rank(node.inputs[1]) <= t.rank(node.inputs[0]):
        x = t.float_value(node.inputs[0])
        t.emit(usual[exponent], [x.tensor], landing, order=x.order, int8=False)
        return
    order = t.common_order(node.inputs, t.shape(node.output))
    inputs = [t.operand(name, order) for name in node.inputs]
    t.emit("POW", inputs, landing, schema.PowOptionsT(), order=order, int8=False)
