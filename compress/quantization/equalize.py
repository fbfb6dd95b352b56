"""Cross-layer equalization: Nagel et al., 2019 (arXiv:1906.04721), section 4.1.

A channel between two layers may be divided by any positive number in the first and multiplied by it in the second.
One that makes the largest weights of both sides equal brings the channels' ranges together, and one grid for all of
them loses less.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.quantization.graph import CALLS, is_in, kind_of
from compress.quantization.operators import PASS, rectifier, zero_pads

Layer = nn.Conv2d | nn.Linear

PER_CHANNEL: tuple[object, ...] = (
    *(nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, nn.AvgPool2d, F.avg_pool2d),
    *(nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d),
)
"""These, ReLU and what changes nothing may stand between layers: f(s x) = s f(x) in each channel of (N, C, H, W)."""
FLATTEN: tuple[object, ...] = (nn.Flatten, torch.flatten, "flatten")
ROUNDS = 50
"""Far more than chains of three or four layers need to come to rest."""
NEAR_DEAD = 1e-3
"""Of the layer's largest channel: below, a channel is mostly its bias, which would grow as its weights do."""


@dataclass(frozen=True)
class Pair:
    """Two layers that share the channels between them with nothing else."""

    first: str
    second: str


def equalize(graph_module: fx.GraphModule) -> list[Pair]:
    """The pairs of layers whose channels were rescaled; `graph_module`, with BatchNorm folded, is changed in place.

    The network computes what it did, so layers around a ReLU6 are left alone: a channel divided by s would have to be
    clipped at 6/s, and an int8 grid clips all channels of a tensor alike. (The paper puts a ReLU in its place. That
    costs the MobileNetV2 of the benchmark 9.6 points before anything is quantized; see docs/log.md.)
    """
    pairs = find_pairs(graph_module)
    modules = dict(graph_module.named_modules())
    for _ in range(ROUNDS):
        furthest = 0.0
        for pair in pairs:
            first, second = modules[pair.first], modules[pair.second]
            assert isinstance(first, Layer)
            assert isinstance(second, Layer)
            scales_C = equalizing_scales(output_ranges(first), input_ranges(second))
            rescale(first, second, scales_C)
            furthest = max(furthest, float(scales_C.log().abs().max()))
        if furthest < 1e-3:
            break
    return pairs


def equalizing_scales(first_C: Tensor, second_C: Tensor) -> Tensor:
    """By what each channel of the first layer is divided, given the ranges of its weights in both: equation 11.

    Channels with next to no weights on either side keep their scale: 1.
    """
    alive_C = (first_C > NEAR_DEAD * first_C.max()) & (second_C > NEAR_DEAD * second_C.max())
    return torch.where(alive_C, (first_C / second_C).sqrt(), torch.ones_like(first_C))


def output_ranges(layer: Layer) -> Tensor:
    """The largest absolute weight of each output channel."""
    return layer.weight.detach().abs().flatten(1).amax(1)


def input_ranges(layer: Layer) -> Tensor:
    """The largest absolute weight that reads each input channel."""
    largest = layer.weight.detach().abs()
    if isinstance(layer, nn.Conv2d):
        largest = largest.flatten(2).amax(2)
    return _grouped(layer, largest).amax(1).flatten()


def rescale(first: Layer, second: Layer, scales_C: Tensor) -> None:
    """Divides what `first` writes into each channel by its scale and multiplies what `second` reads from it."""
    with torch.no_grad():
        first.weight.div_(scales_C.view(-1, *(1,) * (first.weight.ndim - 1)))
        if first.bias is not None:
            first.bias.div_(scales_C)
        _grouped(second, second.weight).mul_(
            scales_C.view(getattr(second, "groups", 1), 1, -1, *(1,) * (second.weight.ndim - 2))
        )


def _grouped(layer: Layer, weight: Tensor) -> Tensor:
    """A view (groups, outputs, inputs, ...), where output and input are counted within their group."""
    return weight.view(getattr(layer, "groups", 1), -1, *weight.shape[1:])


def find_pairs(graph_module: fx.GraphModule) -> list[Pair]:
    """In the order of execution, each convolution or linear layer with the one that alone reads its channels.

    Layers that run twice or share their weights are left out.
    """
    modules = dict(graph_module.named_modules())
    calls = Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    owners = Counter(id(found.weight) for found in modules.values() if isinstance(found, Layer))

    def layer(node: fx.Node) -> Layer | None:
        found = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(found, Layer) or calls[str(node.target)] > 1 or owners[id(found.weight)] > 1:
            return None
        return found

    pairs = []
    for node in graph_module.graph.nodes:
        first, between = layer(node), list[fx.Node]()
        user = node
        while first is not None and len(user.users) == 1:
            user = next(iter(user.users))
            second = layer(user)
            if second is not None:
                if _share_channels(first, second, between, modules):
                    pairs.append(Pair(str(node.target), str(user.target)))
                break
            if not _scales(user, modules):
                break
            between.append(user)
    return pairs


def _scales(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether f(s x) = s f(x) in each channel of the node's only tensor."""
    if node.op not in CALLS or len(node.all_input_nodes) != 1:
        return False
    kind = kind_of(node, modules)
    if is_in(kind, FLATTEN):
        if isinstance(kind, nn.Flatten):
            return (kind.start_dim, kind.end_dim) == (1, -1)
        given = dict(zip(("input", "start_dim", "end_dim"), node.args, strict=False)) | dict(node.kwargs)
        return (given.get("start_dim", 0), given.get("end_dim", -1)) == (1, -1)
    return _elementwise(node, modules) or is_in(kind, PER_CHANNEL) or zero_pads(node, modules) is not None


def _elementwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return is_in(kind_of(node, modules), PASS) or rectifier(node, modules) == {"nonnegative": True}


def _share_channels(first: Layer, second: Layer, between: list[fx.Node], modules: dict[str, nn.Module]) -> bool:
    """Whether output channel c of `first` is input channel c of `second`."""
    outputs = first.out_features if isinstance(first, nn.Linear) else first.out_channels
    inputs = second.in_features if isinstance(second, nn.Linear) else second.in_channels
    if outputs != inputs:
        return False
    if isinstance(first, nn.Linear):  # channels are the last axis, where pooling and padding would mix them
        return isinstance(second, nn.Linear) and all(_elementwise(node, modules) for node in between)
    flattened = [index for index, node in enumerate(between) if is_in(kind_of(node, modules), FLATTEN)]
    if isinstance(second, nn.Conv2d):
        return not flattened
    # As many inputs as channels: what was flattened had one cell a channel.
    return len(flattened) == 1 and all(_elementwise(node, modules) for node in between[flattened[0] + 1 :])
