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


def value_names(graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    """A name for the result of each call: the layer that made it, as `freeze` calls the grids.

    A rectifier's result has the name of the layer before it, if nothing else reads that layer's.
    """
    modules = dict(graph_module.named_modules())
    used: set[str] = {"image", "logits"}  # the file's own
    names: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        if node.op not in CALLS:
            continue
        name = layer_name(node)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        alone = source in names and rectifier(node, modules) is not None and len(source.users) == 1
        if source is not None and alone:
            before = kind_of(source, modules)
            if not any(is_in(before, table) for table in (REARRANGE, PAD, PASS)):
                name, names[source] = names[source], f"{names[source]}/linear"
                used.discard(name)
        numbered = (f"{name}#{i}" for i in itertools.count(2))
        names[node] = next(n for n in itertools.chain((name,), numbered) if n not in used)
        used.add(names[node])
    return names


def named(graph_module: fx.GraphModule) -> Named:
    """The network with functions and methods as modules, and the names of all results; see `value_names`."""
    copied = copy.deepcopy(graph_module)
    names = value_names(copied)
    copied.add_submodule(CALLED, nn.Module())
    values = []
    for node, name in names.items():
        path = str(node.target)
        if node.op != "call_module" and not _asks_size(node):
            path = f"{CALLED}.{node.name}"
            copied.get_submodule(CALLED).add_module(node.name, Call(node.op, node.target))
            with copied.graph.inserting_before(node):
                call = copied.graph.call_module(path, node.args, node.kwargs)
            node.replace_all_uses_with(call)
            copied.graph.erase_node(node)
        values.append((path, name))
    copied.recompile()
    return Named(copied.eval(), values)


def _asks_size(node: fx.Node) -> bool:
    return node.target in (getattr, torch.numel) or node.target in ("size", "dim", "numel")
