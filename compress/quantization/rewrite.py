"""Changes to a folded float graph that make it quantizable: the same function, but for `rewrite_activations`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.quantization.graph import (
    CALLS,
    hand_over_results,
    is_in,
    is_tensor,
    kind_of,
    layer_name,
    set_module,
    shape_of,
)
from compress.quantization.operators import REARRANGE

HARD_SWISH = (nn.Hardswish, F.hardswish)
HARD_SIGMOID = (nn.Hardsigmoid, F.hardsigmoid)
OUT_OF_PLACE: dict[Any, Any] = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}
OUT_OF_PLACE |= {torch.relu_: torch.relu, F.relu_: F.relu, torch.clamp_: torch.clamp, F.hardtanh_: F.hardtanh}
OUT_OF_PLACE |= {operator.itruediv: operator.truediv, operator.imatmul: operator.matmul}


def rewrite_activations(graph_module: fx.GraphModule) -> list[str]:
    """Puts ReLU6 in the place of hard-swish and the sigmoid in that of hard-sigmoid; the names of what was changed.

    The network then computes something else and has to be trained again. No runtime here has a fast int8 hard-swish:
    it runs in float between conversions.
    """
    return [
        *_replace(graph_module, HARD_SWISH, lambda: nn.ReLU6()),
        *_replace(graph_module, HARD_SIGMOID, lambda: nn.Sigmoid()),
    ]


def rewritable(graph_module: fx.GraphModule) -> list[tuple[str, str]]:
    """Name and kind, `hard-swish` or `hard-sigmoid`, of each call that `rewrite_activations` would change."""
    modules = dict(graph_module.named_modules())
    found = []
    for node in graph_module.graph.nodes:
        kind = kind_of(node, modules) if node.op in CALLS else None
        for kinds, name in ((HARD_SWISH, "hard-swish"), (HARD_SIGMOID, "hard-sigmoid")):
            if is_in(kind, kinds):
                found.append((layer_name(node), name))
    return found


def _replace(graph_module: fx.GraphModule, kinds: tuple[object, ...], make: Callable[[], nn.Module]) -> list[str]:
    modules = dict(graph_module.named_modules())
    changed: list[str] = []
    for node in list(graph_module.graph.nodes):
        if node.op not in ("call_module", "call_function") or not is_in(kind_of(node, modules), kinds):
            continue
        if node.op == "call_module":
            if node.target not in changed:
                set_module(graph_module, node.target, make())
                changed.append(str(node.target))
            continue
        name = f"{node.name}_rewritten" if hasattr(graph_module, node.name) else node.name
        graph_module.add_submodule(name, make())
        with graph_module.graph.inserting_before(node):
            new = graph_module.graph.call_module(name, (node.all_input_nodes[0],))
        hand_over_results(node, new)
        node.replace_all_uses_with(new)
        graph_module.graph.erase_node(node)
        changed.append(name)
    graph_module.recompile()
    return changed


def fold_sizes(graph_module: fx.GraphModule, size: int, channels: int = 3) -> None:
    """Puts constants in the place of sizes and what is computed from them, but for those that the batch changes."""
    results = [_Sizes(graph_module).of(torch.zeros(batch, channels, size, size)) for batch in (2, 3)]
    for node in reversed(graph_module.graph.nodes):
        if node not in results[0] or node not in results[1] or results[0][node] != results[1][node]:
            continue
        value = results[0][node]
        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), _replacing(node, value))
        graph_module.graph.erase_node(node)
    graph_module.recompile()


def drop_casts(graph_module: fx.GraphModule) -> None:
    """Removes conversions to the type that a tensor has already; shapes must have been propagated."""
    for node in list(graph_module.graph.nodes):
        if node.op != "call_method" or node.target not in ("to", "float", "type_as") or not is_tensor(node):
            continue
        source = node.args[0]
        if (
            isinstance(source, fx.Node)
            and is_tensor(source)
            and source.meta["tensor_meta"].dtype == node.meta["tensor_meta"].dtype
        ):
            hand_over_results(node, source)
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _replacing(node: fx.Node, value: Any) -> Callable[[fx.Node], Any]:
    return lambda used: value if used is node else used


class _Sizes(fx.Interpreter):
    """Runs a graph and keeps all that is no tensor."""

    def of(self, images_NCHW: torch.Tensor) -> dict[fx.Node, Any]:
        self.found: dict[fx.Node, Any] = {}
        was_training = self.module.training
        self.module.eval()
        with torch.no_grad():
            self.run(images_NCHW)
        self.module.train(was_training)
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in CALLS and (result is None or isinstance(result, (bool, int, float, torch.Size))):
            self.found[n] = tuple(result) if isinstance(result, torch.Size) else result
        return result


def out_of_place(graph_module: fx.GraphModule) -> None:
    """Makes operators that overwrite their input return a new tensor.

    Raises ModelError where the overwritten tensor is read later on: the network would compute something else.
    """
    modules = dict(graph_module.named_modules())
    place = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    for node in graph_module.graph.nodes:
        if node.op not in CALLS or not node.all_input_nodes:
            continue
        kind = kind_of(node, modules)
        in_place = getattr(kind, "inplace", False) or node.kwargs.get("inplace")
        named = isinstance(kind, str) and kind.endswith("_") and not kind.endswith("__")
        if not (in_place or named or kind in OUT_OF_PLACE):
            continue
        if not node.users or any(place[user] > place[node] for user in node.all_input_nodes[0].users):
            raise ModelError(
                f"layer {layer_name(node)}",
                "changes its input in place, and the input is used again",
                "use its result, with inplace=False",
            )
        if isinstance(kind, nn.Module):
            kind.inplace = False  # type: ignore[assignment]
        elif named:
            node.target = kind.rstrip("_")
        elif kind in OUT_OF_PLACE:
            node.target = OUT_OF_PLACE[kind]
        else:
            node.kwargs = {**node.kwargs, "inplace": False}
    graph_module.recompile()


def merge_moves(graph_module: fx.GraphModule) -> None:
    """Makes equal rearrangements of one tensor one call. The exporter does, and its grids must stay as many as ours."""
    modules = dict(graph_module.named_modules())
    first: dict[str, fx.Node] = {}
    for node in list(graph_module.graph.nodes):
        if node.op not in CALLS or not is_in(kind_of(node, modules), REARRANGE):
            continue
        call = repr((node.op, node.target, node.args, node.kwargs))
        if call in first:
            node.replace_all_uses_with(first[call])
            graph_module.graph.erase_node(node)
        else:
            first[call] = node
    graph_module.recompile()


def batchnorm_as_convolution(graph_module: fx.GraphModule, keep: Collection[str]) -> None:
    """Makes each BatchNorm2d that no convolution could take in a depthwise 1x1 convolution, which int8 kernels know."""
    modules = dict(graph_module.named_modules())
    for node in graph_module.graph.nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or node.target in keep:
            continue
        assert norm.running_var is not None
        factor = torch.rsqrt(norm.running_var + norm.eps)
        conv = nn.Conv2d(norm.num_features, norm.num_features, 1, groups=norm.num_features)
        with torch.no_grad():
            scale = factor if norm.weight is None else norm.weight * factor
            conv.weight.copy_(scale.view(-1, 1, 1, 1))
            assert conv.bias is not None
            conv.bias.copy_(-norm.running_mean * scale + (0 if norm.bias is None else norm.bias))
        set_module(graph_module, node.target, conv)


def rows_as_matrix(graph_module: fx.GraphModule, keep: Collection[str]) -> None:
    """Flattens the input of each linear layer over (N, ..., C) to (rows, C) and its result back.

    Runtimes have an int8 kernel for matrices; shapes must have been propagated, and are not afterwards.
    """
    modules = dict(graph_module.named_modules())
    graph = graph_module.graph
    flattened: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        layer = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(layer, nn.Linear) or node.target in keep or len(shape_of(node)) < 3:
            continue
        source = node.args[0]
        if source not in flattened:
            with graph.inserting_before(node):
                flattened[source] = graph.call_function(torch.flatten, (source, 0, -2))
        with graph.inserting_after(node):
            back = graph.call_method("reshape", (node, -1, *shape_of(node)[1:]))
        hand_over_results(node, back)
        node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        node.args = (flattened[source],)
    graph_module.recompile()
