"""Names of a float network's values that are those of its int8 file, so that both can be compared layer by layer."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from compress.quantization.graph import CALLS, is_in, kind_of, layer_name
from compress.quantization.operators import PAD, PASS, REARRANGE, rectifier

CALLED = "calls"
"""Where the wrapped functions of a graph live."""


class Call(nn.Module):
    """A function or method of a graph as a module, whose path an exporter writes down."""

    def __init__(self, op: str, target: Any) -> None:
        super().__init__()
        self.op, self.target = op, target

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        if self.op == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


@dataclass(frozen=True)
class Named:
    module: fx.GraphModule
    """The same network; every call in it is that of a module."""
    values: list[tuple[str, str]]
    """Path of the module and name of its result, in the order of execution."""


def named(graph_module: fx.GraphModule) -> Named:
    """The network with a name for each of its values: the layer that made it, as `freeze` calls the grids.

    A rectifier's result has the name of the layer before it, if nothing else reads that layer's.
    """
    copied = copy.deepcopy(graph_module)
    modules = dict(copied.named_modules())
    copied.add_submodule(CALLED, nn.Module())
    used: set[str] = set()
    results: dict[fx.Node, str] = {}
    paths: dict[fx.Node, str] = {}
    kinds: dict[fx.Node, Any] = {}
    for node in list(copied.graph.nodes):
        if node.op not in CALLS:
            continue
        kind = kind_of(node, modules)
        name = layer_name(node)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        alone = source in results and rectifier(node, modules) is not None and len(source.users) == 1
        if source is not None and alone and not any(is_in(kinds[source], table) for table in (REARRANGE, PAD, PASS)):
            name, results[source] = results[source], f"{results[source]}/linear"
            used.discard(name)
        numbered = (f"{name}#{i}" for i in itertools.count(2))
        unique = next(n for n in itertools.chain((name,), numbered) if n not in used)
        used.add(unique)
        results[node], kinds[node] = unique, kind
        paths[node] = str(node.target) if node.op == "call_module" else f"{CALLED}.{node.name}"
        if node.op != "call_module" and not _asks_size(node):
            copied.get_submodule(CALLED).add_module(node.name, Call(node.op, kind))
            with copied.graph.inserting_before(node):
                call = copied.graph.call_module(f"{CALLED}.{node.name}", node.args, node.kwargs)
            node.replace_all_uses_with(call)
            copied.graph.erase_node(node)
            for known in (results, paths, kinds):
                known[call] = known.pop(node)
    copied.recompile()
    order = [node for node in copied.graph.nodes if node in results]
    return Named(copied.eval(), [(paths[node], results[node]) for node in order])


def _asks_size(node: fx.Node) -> bool:
    return node.target in (getattr, torch.numel) or node.target in ("size", "dim", "numel")
