"""Questions asked of an fx graph, and the two changes made to it, by every step of quantization."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import fx, nn

from compress.errors import ModelError

CALLS = ("call_module", "call_function", "call_method")


def trace(module: nn.Module) -> fx.GraphModule:
    """The graph of an eval-mode copy of `module`. Raises ModelError where its control flow depends on the data."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    try:
        graph_module = fx.symbolic_trace(copy.deepcopy(module).eval(), concrete_args=defaults or None)
        _drop_defaults(graph_module)
        return graph_module
    except Exception as error:
        raise ModelError(
            type(module).__name__,
            f"cannot be traced as one graph ({str(error).splitlines()[0]})",
            "its forward must not branch or loop on tensor values or sizes",
        ) from error


def _drop_defaults(graph_module: fx.GraphModule) -> None:
    """Removes optional arguments of the forward, which were traced with their defaults, and fx's checks of them."""
    _, *optional = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for placeholder in optional:
        for user in [*placeholder.users]:
            for check in [*user.users, user]:
                graph_module.graph.erase_node(check)
        graph_module.graph.erase_node(placeholder)
    # fx binds the defaults in the generated signature; the graph takes one image now.
    graph_module.graph.set_codegen(fx.graph.CodeGen())
    graph_module.recompile()


def kind_of(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    """The module a node calls, or the function, or the method's name."""
    return modules[str(node.target)] if node.op == "call_module" else node.target


def is_in(kind: Any, table: tuple[Any, ...]) -> bool:
    """Whether a module's type, a function or a method's name stands in `table`."""
    return (type(kind) if isinstance(kind, nn.Module) else kind) in table


def layer_name(node: fx.Node) -> str:
    """What a user calls the layer: the module's path, or the name fx gave to a function call."""
    return str(node.target) if node.op == "call_module" else node.name


def is_tensor(node: fx.Node) -> bool:
    """False for sizes and other plain numbers; shapes must have been propagated."""
    return "tensor_meta" in node.meta


def insert_after(graph_module: fx.GraphModule, node: fx.Node, module_name: str) -> fx.Node:
    """A new call of `module_name` between `node` and everything that computes with its value."""
    with graph_module.graph.inserting_after(node):
        new = graph_module.graph.call_module(module_name, (node,))
    new.meta["tensor_meta"] = node.meta["tensor_meta"]
    node.replace_all_uses_with(
        new, delete_user_cb=lambda user: user is not new and (user.op == "output" or is_tensor(user))
    )
    return new


def set_module(graph_module: fx.GraphModule, name: str, new: nn.Module) -> None:
    """Puts `new` in the place of the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(graph_module.get_submodule(parent), leaf, new)
