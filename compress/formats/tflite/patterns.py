"""Operators that torch exports as several: found in the graph and put together again.

A pattern is recognized by what it computes, not by how it is written: its nodes are evaluated on some numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from compress.formats.tflite.graph import Graph, Node

POINTS = np.linspace(-6, 6, 97)

ERF = np.vectorize(math.erf)

FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Tanh": np.tanh,
    "Erf": ERF,
}

GELUS = {
    b"none": POINTS * 0.5 * (1 + ERF(POINTS / math.sqrt(2))),
    b"tanh": POINTS * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (POINTS + 0.044715 * POINTS**3))),
}


def put_together(graph: Graph) -> None:
    """Replaces each pattern by one node: Gelu, GroupNorm, Softplus."""
    replaced: dict[Node, Node] = {}
    gone: set[Node] = set()
    for node in graph.nodes:
        if node in gone:
            continue
        found = None
        if node.op in ("Erf", "Tanh"):
            found = _gelu(graph, node)
        elif node.op == "InstanceNormalization":
            found = _group_norm(graph, node)
        elif node.op == "Softplus":
            found = _softplus(graph, node)
        if found:
            cluster, new = found
            last = next(member for member in cluster if member.output == new.output)
            gone |= cluster - {last}
            replaced[last] = new
    if replaced:
        graph.nodes = [replaced.get(node, node) for node in graph.nodes if node not in gone]
        graph.index()


def _gelu(graph: Graph, middle: Node) -> tuple[set[Node], Node] | None:
    """The cluster around an Erf or Tanh that computes x * Phi(x), and the Gelu in its place."""
    for x in _ancestors(graph, middle.inputs[0], 6):
        last = middle
        for _ in range(5):
            following = graph.only_consumer(last.output, "Mul", "Add")
            if following is None:
                # x may also meet the chain twice: x * (0.5 + 0.5 * erf) is written with one reader per step only.
                break
            last = following
            cluster: set[Node] = set()
            values = _computed(graph, last.output, x, cluster)
            if values is None or middle not in cluster or not _closed(graph, cluster, last):
                continue
            for approximate, gelu in GELUS.items():
                if np.allclose(values, gelu, atol=1e-6):
                    node = Node("Gelu", last.place, (x,), last.outputs, {"approximate": approximate})
                    return cluster, node
    return None


def _ancestors(graph: Graph, name: str, depth: int) -> list[str]:
    """Computed values that `name` comes from by simple functions, nearest first, itself included."""
    found, edge = [name], [name]
    for _ in range(depth):
        nodes = [graph.producers[n] for n in edge if n in graph.producers and graph.producers[n].op in FUNCTIONS]
        edge = [n for node in nodes for n in node.inputs if n not in graph.constants and n not in found]
        found += list(dict.fromkeys(edge))
    return found


def _computed(graph: Graph, name: str, x: str, cluster: set[Node], depth: int = 12) -> np.ndarray | None:
    """The value `name` where `x` is POINTS, if nothing else goes into it; its nodes are added to `cluster`."""
    if name == x:
        return POINTS
    if name in graph.constants:
        number = graph.scalar(name)
        return None if number is None else np.full(POINTS.shape, number)
    node = graph.producers.get(name)
    if node is None or node.op not in FUNCTIONS or depth == 0:
        return None
    inputs = []
    for source in node.inputs:
        values = _computed(graph, source, x, cluster, depth - 1)
        if values is None:
            return None
        inputs.append(values)
    cluster.add(node)
    with np.errstate(all="ignore"):
        result: np.ndarray = FUNCTIONS[node.op](*inputs)
    return result


def _closed(graph: Graph, cluster: set[Node], last: Node) -> bool:
    """Nobody outside the cluster reads what is inside."""
    inner = [node for node in cluster if node is not last]
    return all(
        node.output not in graph.outputs and all(reader in cluster for reader in graph.consumers.get(node.output, []))
        for node in inner
    )


def _group_norm(graph: Graph, norm: Node) -> tuple[set[Node], Node] | None:
    """Reshape to (N, groups, -1), InstanceNormalization, Reshape back, and the channels' factors and summands."""
    first = graph.producers.get(norm.inputs[0])
    last = graph.only_consumer(norm.output, "Reshape")
    if first is None or first.op != "Reshape" or last is None or not graph.only_consumer(first.output, norm.op):
        return None
    x = first.inputs[0]
    shape, grouped = graph.shape(x), graph.shape(first.output)
    factors, summands = (graph.constants.get(name) for name in norm.inputs[1:3])
    plain = factors is not None and summands is not None and (factors == 1).all() and (summands == 0).all()
    if (
        not plain
        or len(grouped) != 3
        or grouped[0] != shape[0]
        or shape[1] % grouped[1]
        or graph.shape(last.output) != shape
    ):
        return None
    attributes = {"num_groups": grouped[1], "epsilon": norm.attributes.get("epsilon", 1e-5)}
    cluster = {first, norm, last}
    parameters = []
    for op in ("Mul", "Add"):
        following = graph.only_consumer(last.output, op)
        other = [name for name in following.inputs if name != last.output] if following else []
        values = graph.constants.get(other[0]) if len(other) == 1 else None
        if (
            following is None
            or values is None
            or values.shape[-len(shape) + 1 :] != (shape[1],) + (1,) * (len(shape) - 2)
        ):
            break
        parameters.append(other[0])
        cluster.add(following)
        last = following
    return cluster, Node("GroupNorm", last.place, (x, *parameters), last.outputs, attributes)


def _softplus(graph: Graph, softplus: Node) -> tuple[set[Node], Node] | None:
    """Where(x > threshold, x, Softplus(x)): beyond torch's threshold of 20 the two are equal in float32."""
    x = softplus.inputs[0]
    where = graph.only_consumer(softplus.output, "Where")
    greater = graph.producers.get(where.inputs[0]) if where else None
    if where is None or greater is None or greater.op != "Greater" or where.inputs[1:] != (x, softplus.output):
        return None
    threshold = graph.scalar(greater.inputs[1])
    if (
        greater.inputs[0] != x
        or threshold is None
        or threshold < 17
        or not graph.only_consumer(greater.output, "Where")
    ):
        return None
    return {softplus, greater, where}, Node("Softplus", where.place, (x,), where.outputs, {})
