"""From a float network to one that trains with the arithmetic of its int8 files."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from compress.errors import ModelError
from compress.product import Preprocess
from compress.quantization.fake_quant import QMAX, QMIN, ActivationQuantizer, QuantizedConv2d, QuantizedLinear
from compress.quantization.fold import fold_batchnorm
from compress.quantization.graph import CALLS, insert_after, is_in, is_tensor, kind_of, layer_name, set_module
from compress.settings import Settings


class Quantization(Settings):
    """How the network is quantized: part of a saved network's structure."""

    learn_activations: bool = True
    """Train the scales and zero points of activations, not only those of weights."""


RELU: tuple[Any, ...] = (nn.ReLU, F.relu, torch.relu, "relu", "relu_")
RELU6: tuple[Any, ...] = (nn.ReLU6, F.relu6)
ADD: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
CONCATENATE: tuple[Any, ...] = (torch.cat, torch.concat)
MEAN: tuple[Any, ...] = (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, torch.mean, "mean")
"""Results spread less than inputs, so they get a grid of their own (unless the pooling has more than one cell)."""
AVERAGE: tuple[Any, ...] = (nn.AvgPool2d, F.avg_pool2d)
"""Rounded to the grid of their input: TFLite's AVERAGE_POOL_2D has one grid for both."""
REARRANGE: tuple[Any, ...] = (
    nn.MaxPool2d,
    F.max_pool2d,
    torch.max_pool2d,
    nn.Flatten,
    torch.flatten,
    "flatten",
    torch.reshape,
    "reshape",
    "view",
    torch.squeeze,
    "squeeze",
    torch.unsqueeze,
    "unsqueeze",
    torch.permute,
    "permute",
    torch.transpose,
    "transpose",
)
"""Their results consist of values of their input (and zeros, which every grid holds), so they need no rounding."""
PAD: tuple[Any, ...] = (nn.ZeroPad2d, F.pad)
PASS: tuple[Any, ...] = (nn.Dropout, nn.Dropout2d, F.dropout, nn.Identity, "contiguous", "detach")
"""They change nothing at inference."""


def prepare(module: nn.Module, settings: Quantization, preprocess: Preprocess) -> fx.GraphModule:
    """A trainable graph with BatchNorm folded, weights fake-quantized and each tensor on a grid of 256 steps.

    `module` is not changed. Grids are meaningless until `calibrate` ran or a state dict is loaded.
    Raises ModelError that names the first layer or operator which has no int8 counterpart here.
    """
    graph_module = fold_batchnorm(module)
    size = preprocess.size
    try:
        with torch.no_grad():
            ShapeProp(graph_module).propagate(torch.zeros(1, 3, size, size))
    except Exception as error:
        raise ModelError(
            type(module).__name__,
            f"fails as a traced graph ({(str(error).strip().splitlines() or [type(error).__name__])[0]})",
            "its forward must not depend on anything but the image",
        ) from error
    modules = dict(graph_module.named_modules())
    _merge_pads(graph_module, modules)
    _refuse_layers(graph_module, modules)
    for name, layer in list(modules.items()):
        if type(layer) is nn.Conv2d:
            set_module(graph_module, name, QuantizedConv2d.of(layer, getattr(layer, "pads", (0, 0, 0, 0))))
        elif type(layer) is nn.Linear:
            set_module(graph_module, name, QuantizedLinear.of(layer))
    modules = dict(graph_module.named_modules())

    grids: dict[fx.Node, str] = {}
    """The quantizer on whose grid a node's value lies, by module name."""
    graph_module.add_submodule("grids", nn.Module())

    def own_grid(node: fx.Node, layer: str, **how: Any) -> None:
        name = f"grids.{node.name}"
        if node.op == "placeholder":
            graph_module.add_submodule(name, _input_quantizer(preprocess))
        else:
            graph_module.add_submodule(name, ActivationQuantizer(layer, learned=settings.learn_activations, **how))
        grids[insert_after(graph_module, node, name)] = name

    for node in list(graph_module.graph.nodes):
        if node.op == "placeholder":
            own_grid(node, "input")
            continue
        if node.op == "output" or not is_tensor(node):
            continue  # sizes and other plain numbers
        kind, sources = kind_of(node, modules), node.all_input_nodes
        layered = isinstance(kind, (QuantizedConv2d, QuantizedLinear))
        if isinstance(kind, QuantizedLinear) and len(node.meta["tensor_meta"].shape) != 2:
            raise _no_counterpart(node, kind)
        rectifies = rectifier(kind)
        on_grid = sources and all(source in grids for source in sources if is_tensor(source))
        if rectifies and sources:
            # Alone or behind its layer: rounding to a grid that starts at zero is the rectifier.
            own_grid(node, layer_name(sources[0] if sources[0] not in grids else node), **rectifies)
        elif not on_grid:
            raise _no_counterpart(node, kind)
        elif layered or _joins(node, kind) or (is_in(kind, MEAN) and node.meta["tensor_meta"].shape[2:].numel() == 1):
            if not _feeds_only_rectifier(node, modules):
                own_grid(node, layer_name(node))
        elif is_in(kind, AVERAGE) or is_in(kind, MEAN):
            name = f"grids.{node.name}"
            shared = graph_module.get_submodule(grids[sources[0]])
            assert isinstance(shared, ActivationQuantizer)
            graph_module.add_submodule(name, shared.again(layer_name(node)))
            grids[insert_after(graph_module, node, name)] = name
        elif is_in(kind, REARRANGE) or is_in(kind, PASS) or (is_in(kind, PAD) and _zero_pads(node, modules)):
            grids[node] = grids[sources[0]]
        else:
            raise _no_counterpart(node, kind)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module.train()


def _input_quantizer(preprocess: Preprocess) -> ActivationQuantizer:
    """A fixed grid over all pixel values.

    254 steps and not 255: with mean = std = 0.5 the 256 pixel values would otherwise fall half-way between steps, and
    rounding half to even would merge them in pairs.
    """
    quantizer = ActivationQuantizer("input", learned=False)
    low = min((0 - mean) / std for mean, std in zip(preprocess.mean, preprocess.std, strict=True))
    high = max((1 - mean) / std for mean, std in zip(preprocess.mean, preprocess.std, strict=True))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (QMAX - QMIN - 1)
    quantizer.log_scale.fill_(math.log(scale))
    quantizer.zero_point.fill_(float(round(0.5 - low / scale)))
    return quantizer


def rectifier(kind: Any) -> dict[str, Any] | None:
    """How the grid behind a ReLU or ReLU6 differs from a plain one; None for everything else."""
    if is_in(kind, RELU):
        return {"nonnegative": True}
    if is_in(kind, RELU6) or (type(kind) is nn.Hardtanh and (kind.min_val, kind.max_val) == (0.0, 6.0)):
        return {"nonnegative": True, "limit": 6.0}
    return None


def _joins(node: fx.Node, kind: Any) -> bool:
    """Whether the node adds or concatenates two or more tensors of the graph."""
    return (is_in(kind, ADD) or is_in(kind, CONCATENATE)) and len(node.all_input_nodes) > 1


def _feeds_only_rectifier(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the only user of the node's value is a rectifier, whose grid then serves both."""
    users = list(node.users)
    if len(users) != 1 or users[0].op not in CALLS:
        return False
    return rectifier(kind_of(users[0], modules)) is not None


def _no_counterpart(node: fx.Node, kind: Any) -> ModelError:
    if isinstance(kind, nn.Module):
        operator_name = type(kind).__name__
    else:
        operator_name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    return ModelError(
        f"layer {layer_name(node)}",
        f"operator {operator_name} has no int8 counterpart here",
        "replace it, or leave `quantize` out of the recipe",
    )


def _merge_pads(graph_module: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    """Moves a constant zero padding into the one convolution that reads it."""
    for node in list(graph_module.graph.nodes):
        pads = _zero_pads(node, modules)
        if pads is None or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        conv = modules.get(str(user.target)) if user.op == "call_module" else None
        if type(conv) is not nn.Conv2d or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            continue
        conv.pads = pads  # type: ignore[assignment]
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)


def _zero_pads(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[int, int, int, int] | None:
    if node.op == "call_function" and node.target is F.pad:
        arguments = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
        pads = arguments["pad"]
        if arguments.get("mode", "constant") != "constant" or arguments.get("value") not in (None, 0, 0.0):
            return None
        if isinstance(pads, (tuple, list)) and len(pads) == 4 and all(isinstance(p, int) and p >= 0 for p in pads):
            return tuple(pads)
    layer = modules[str(node.target)] if node.op == "call_module" else None
    if isinstance(layer, nn.ZeroPad2d):
        return layer.padding
    return None


def _refuse_layers(graph_module: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    """Raises ModelError for layers whose meaning would change in silence."""
    seen: set[str] = set()
    for node in graph_module.graph.nodes:
        kind = kind_of(node, modules) if node.op in CALLS else None
        if isinstance(kind, (nn.Conv2d, nn.Linear)):
            if node.target in seen:
                raise ModelError(
                    f"layer {node.target}",
                    "runs twice in one forward pass, so its weights would need two grids",
                    "give each call a layer of its own, or leave `quantize` out of the recipe",
                )
            seen.add(node.target)
        if isinstance(kind, nn.Conv2d) and kind.padding_mode != "zeros":
            raise ModelError(
                f"layer {node.target}",
                f"padding_mode {kind.padding_mode} has no int8 counterpart here",
                "use zeros, or leave `quantize` out of the recipe",
            )
        in_place = getattr(kind, "inplace", False) or node.kwargs.get("inplace") or str(kind).endswith("_")
        if in_place and rectifier(kind) and (not node.users or len(node.all_input_nodes[0].users) > 1):
            raise ModelError(
                f"layer {layer_name(node)}",
                "changes its input in place, and the input is used again",
                "use its result, with inplace=False",
            )
