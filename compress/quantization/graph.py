"""Questions asked of an fx graph, and the two changes made to it, by every step of quantization."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.models import INPUT_SHAPE
from compress.quantization.attention import expand_attention
from compress.quantization.tracing import RESULT_OF, Tracer

CALLS = ("call_module", "call_function", "call_method")


def trace(module: nn.Module) -> fx.GraphModule:
    """The graph of an eval-mode copy of `module`. Raises ModelError where its control flow depends on the data."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    try:
        copied = copy.deepcopy(module).eval()
        expand_attention(copied)
        tracer = Tracer(getattr(module, INPUT_SHAPE, None))
        graph = tracer.trace(copied, defaults or None)
        _sizes_as_numbers(graph, tracer)
        graph_module = fx.GraphModule(tracer.root, graph, type(module).__name__)
        _drop_defaults(graph_module)
        _drop_stochastic_depth(graph_module)
        _calls_as_layers(graph_module)
        _norms_as_layers(graph_module)
        return graph_module
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            type(module).__name__,
            f"cannot be traced as one graph ({(str(error).strip().splitlines() or [type(error).__name__])[0]})",
            "its forward must not branch or loop on tensor values or sizes",
        ) from error


def hand_over_results(node: fx.Node, new: fx.Node) -> None:
    """From now on `new` is what the modules return whose result `node` was."""
    new.meta[RESULT_OF] = [*new.meta.get(RESULT_OF, ()), *node.meta.pop(RESULT_OF, ())]


def _sizes_as_numbers(graph: fx.Graph, tracer: Tracer) -> None:
    """Puts numbers in the place of paddings that the forward computes, and drops sizes that nobody reads any more.

    A weight whose shape was asked for would have two readers, and be no layer's own.
    """

    def number(node: fx.Node) -> Any:
        return tracer.number(fx.Proxy(node, tracer), lambda _: node)

    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.pad and len(node.args) > 1:
            node.update_arg(1, fx.node.map_arg(node.args[1], number))
    for node in reversed(graph.nodes):
        if not node.users and node.op in ("call_function", "call_method") and tracer.is_number(node):
            graph.erase_node(node)


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


def _calls_as_layers(graph_module: fx.GraphModule) -> None:
    """Puts a layer in the place of each functional convolution or product with parameters of its own.

    Subclasses of nn.Conv2d that compute their padding are traced through to that call.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (torch.conv2d, F.conv2d, F.linear):
            continue
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        parameters = [given["weight"], *filter(None, [given.get("bias")])]
        if any(not isinstance(p, fx.Node) or p.op != "get_attr" or len(p.users) > 1 for p in parameters):
            continue
        weight, *bias = [_attribute(graph_module, str(parameter.target)) for parameter in parameters]
        layer: nn.Conv2d | nn.Linear
        if node.target is F.linear:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(bias))
        else:
            how = {name: given[name] for name in names[3:] if name in given}
            inputs = weight.shape[1] * how.get("groups", 1)
            height, width = weight.shape[2:]
            layer = nn.Conv2d(inputs, weight.shape[0], (height, width), bias=bool(bias), **how)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.copy_(bias[0])
        layer.eval()
        name = str(parameters[0].target).rpartition(".")[0]
        if not name or any(True for _ in graph_module.get_submodule(name).children()):
            name = f"{node.name}_layer"
            graph_module.add_submodule(name, layer)
        else:
            set_module(graph_module, name, layer)
        with graph.inserting_before(node):
            call = graph.call_module(name, (given["input"],))
        hand_over_results(node, call)
        node.replace_all_uses_with(call)
        for old in (node, *parameters):
            graph.erase_node(old)
    graph_module.recompile()


def _norms_as_layers(graph_module: fx.GraphModule) -> None:
    """Puts a BatchNorm in the place of each functional one with parameters of its own.

    timm's BatchNorm, which brings its activation along, is traced through to that call.
    """
    graph = graph_module.graph
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not F.batch_norm:
            continue
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        parameters = [
            p for p in (given.get(name) for name in names[1:5]) if isinstance(p, fx.Node) and p.op == "get_attr"
        ]
        if given.get("training") or len(parameters) < 4:
            continue
        values = [_attribute(graph_module, str(parameter.target)) for parameter in parameters]
        norm = nn.BatchNorm2d(len(values[0]), eps=given.get("eps", 1e-5)).eval()
        with torch.no_grad():
            for tensor, value in zip(
                (norm.running_mean, norm.running_var, norm.weight, norm.bias), values, strict=True
            ):
                assert tensor is not None
                tensor.copy_(value)
        name = f"{node.name}_layer"
        graph_module.add_submodule(name, norm)
        with graph.inserting_before(node):
            call = graph.call_module(name, (given["input"],))
        hand_over_results(node, call)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        for parameter in parameters:
            if not parameter.users:
                graph.erase_node(parameter)
    graph_module.recompile()


def _attribute(graph_module: fx.GraphModule, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value: Tensor = getattr(graph_module.get_submodule(owner), name)
    return value.detach()


def _drop_stochastic_depth(graph_module: fx.GraphModule) -> None:
    """Removes torchvision's function of that name, which hides from the tracer and does nothing at inference."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "stochastic_depth":
            hand_over_results(node, node.args[0])
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
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


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Of the node's value at batch 1, empty for several tensors at once; shapes must have been propagated."""
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node computes with, as often as it reads them; shapes must have been propagated."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda argument: found.append(argument))
    return [argument for argument in found if is_tensor(argument)]


def insert_after(graph_module: fx.GraphModule, node: fx.Node, module_name: str) -> fx.Node:
    """A new call of `module_name` between `node` and everything that reads its value."""
    with graph_module.graph.inserting_after(node):
        new = graph_module.graph.call_module(module_name, (node,))
    new.meta["tensor_meta"] = node.meta["tensor_meta"]
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def set_module(graph_module: fx.GraphModule, name: str, new: nn.Module) -> None:
    """Puts `new` in the place of the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(graph_module.get_submodule(parent), leaf, new)
