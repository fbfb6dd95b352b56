"""Which of the teacher's channels a pruned student kept, at any layer.

A pruned network shares the names of layers and the order of channels with the network it was pruned from, so a map of
the student can be compared with a slice of the teacher's: no adaptor has to be learnt.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from compress.errors import ModelError
from compress.models.low_rank import SECOND
from compress.product import Network
from compress.quantization.graph import RESULT_OF, operands, shape_of, trace

Channel = tuple[str, int]
"""The layer that makes a channel, and the channel's index in that layer as its factory built it."""

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
MIXING = ("reshape", "view", "flatten", torch.flatten)
"""Change the axes; the channels stay only where each map is one pixel."""
JOINING = (operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.mul, torch.sub)
SCRAMBLING: tuple[Any, ...] = ("chunk", "split", "permute", "transpose", torch.chunk, torch.split, torch.permute)
SCRAMBLING += (torch.transpose, operator.getitem, torch.matmul, operator.matmul)


def channels(network: Network, layers: Sequence[str]) -> dict[str, tuple[Channel, ...] | None]:
    """The channels of what each layer of a float network returns, in their order; None where they cannot be told."""
    try:
        graph_module = trace(network.module)
        with torch.no_grad():
            given = network.structure.preprocess
            ShapeProp(graph_module).propagate(torch.zeros(1, given.channels, given.size, given.size))
    except (ModelError, RuntimeError):  # cannot be followed
        return dict.fromkeys(layers)
    modules = dict(graph_module.named_modules())
    known: dict[fx.Node, tuple[Channel, ...] | None] = {}
    order: dict[str, int] = {}
    """By layer, when it runs."""
    found: dict[str, tuple[Channel, ...] | None] = dict.fromkeys(layers)
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            order.setdefault(_as_factored(str(node.target), network), len(order))
        of_node = _of_node(node, modules, known, network, order)
        shape = shape_of(node)
        axis = 1 if len(shape) in (2, 4) else -1
        if of_node is not None and (len(shape) < 2 or len(of_node) != shape[axis]):
            of_node = None
        known[node] = of_node
        for name in node.meta.get(RESULT_OF, ()):
            if name in found:
                found[name] = of_node
    return found


def kept(student: Sequence[Channel] | None, teacher: Sequence[Channel] | None) -> Tensor | None:
    """Indices (C of the student,) into the teacher's channels; None where one of them is not among those."""
    if student is None or teacher is None:
        return None
    places = {channel: index for index, channel in enumerate(teacher)}
    if not set(student) <= places.keys():
        return None
    return torch.tensor([places[channel] for channel in student])


def _of_node(
    node: fx.Node,
    modules: dict[str, nn.Module],
    known: dict[fx.Node, tuple[Channel, ...] | None],
    network: Network,
    order: dict[str, int],
) -> tuple[Channel, ...] | None:
    if node.op == "placeholder":
        return tuple(("image", index) for index in range(network.structure.preprocess.channels))
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    kind: Any = modules[str(node.target)] if node.op == "call_module" else node.target
    if isinstance(kind, LAYERS):
        return _outputs(str(node.target), kind, network)
    sources = [known.get(source) for source in operands(node)]
    if not sources:
        return None
    if kind in (torch.cat, torch.concat):
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if dim not in (1, -3) or any(source is None for source in sources):
            return None
        return tuple(channel for source in sources if source is not None for channel in source)
    if isinstance(kind, (nn.Flatten, nn.Unflatten)) or (not isinstance(kind, nn.Module) and kind in MIXING):
        before = shape_of(operands(node)[0])
        return sources[0] if len(before) == 4 and before[2:] == (1, 1) else None
    if not isinstance(kind, nn.Module):
        if kind in SCRAMBLING:
            return None
        if kind in JOINING and len(operands(node)) > 1:
            # A sum's channels go by the names of a side that has as many: the other may be a gate of one pixel.
            shape = shape_of(node)
            whole = [s for s, o in zip(sources, operands(node), strict=True) if shape_of(o) == shape]
            known_sides = [side for side in whole if side is not None]
            if not whole or len(known_sides) < len(whole):
                return whole[0] if whole else None
            # Of the side that was made first: it is there even where the block that adds to it was taken out.
            return min(known_sides, key=lambda side: max(order.get(layer, -1) for layer, _ in side))
    if isinstance(kind, (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)) or kind is F.pixel_shuffle:
        return None
    return sources[0]  # normalisation, activation, pooling, dropout, resizing: channel by channel


def _as_factored(name: str, network: Network) -> str:
    """The layer's name; of the second of two that stand for one, that one's, which made the same channels."""
    whole, _, part = name.rpartition(".")
    return whole if part == SECOND and whole in network.structure.factored else name


def _outputs(name: str, layer: nn.Module, network: Network) -> tuple[Channel, ...]:
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    name = _as_factored(name, network)
    chosen = network.structure.kept.get(name)
    indices = range(int(width)) if chosen is None or chosen.outputs is None else chosen.outputs  # type: ignore[arg-type]
    return tuple((name, index) for index in indices)
