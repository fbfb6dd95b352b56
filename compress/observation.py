"""What layers return while a network answers: hooks for one forward pass, on any form that a network has here.

A layer has the name it has in the network as its factory built it. In a graph with folded BatchNorm or fake
quantization, a name stands for the node that took its place; a container, for what comes out of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from compress.errors import ModelError
from compress.quantization.graph import RESULT_OF

ACTIVATIONS = {F.relu, F.relu_, F.relu6, F.leaky_relu, F.prelu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish}
ACTIVATIONS |= {F.hardswish, F.hardtanh, F.softplus, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
"""As torch.overrides sees them, called by a module or by a `forward`; gates (sigmoids) are none."""


@dataclass(frozen=True)
class Answers:
    """What a network makes of a batch."""

    logits_NK: Tensor
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    """What the layers that were asked for return: (N, C, H, W), (N, tokens, C) or (N, C)."""


def observe(module: nn.Module, images_NCHW: Tensor, layers: Iterable[str] = ()) -> Answers:
    """The answers of one forward pass, with what `layers` returned in it.

    Raises ModelError for a layer that cannot be observed: absent, not run, run twice, or fused away.
    """
    layers = tuple(dict.fromkeys(layers))
    if not layers:
        return Answers(module(images_NCHW))
    inner = unwrapped(module)
    seen: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, __: object, output: object) -> Tensor:
            if name in seen:
                raise ModelError(f"layer {name}", "runs twice in one forward pass", "name a layer that runs once")
            if not isinstance(output, Tensor):
                raise ModelError(f"layer {name}", f"returns {type(output).__name__}", "name one that returns a tensor")
            seen[name] = output
            if output.requires_grad and _is_channels_last(output):
                output.register_hook(_channels_last)
            return output.clone()  # an in-place ReLU behind the layer would overwrite what was seen

        handles.append(layer.register_forward_hook(hook))

    places = _places(inner)
    for name in layers:
        if name not in places:
            raise ModelError(f"layer {name}", "cannot be observed here", _instead(name, places))
    for name in layers:
        watch(name, places[name])
    try:
        logits_NK = module(images_NCHW)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in seen:
            raise ModelError(f"layer {name}", "does not run in a forward pass", "name another layer")
    return Answers(logits_NK, seen)


def _is_channels_last(map_: Tensor) -> bool:
    """Whether its channels lie beside each other in memory, and nothing else can be said of it."""
    return map_.ndim == 4 and map_.is_contiguous(memory_format=torch.channels_last) and not map_.is_contiguous()


def _channels_last(gradient: Tensor) -> Tensor:
    """Losses return gradients in the order of the axes, and the layers before then take twice the time."""
    return gradient.contiguous(memory_format=torch.channels_last)


def answers_to_blank(module: nn.Module, size: int, layers: Iterable[str] = (), channels: int = 3) -> Answers:
    """The answers to one image of zeros, on the module's device, in eval mode and without a graph: for their shapes.

    The module's mode is afterwards what it was. Raises ModelError as `observe` does.
    """
    was_training = module.training
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            return observe(module.eval(), torch.zeros(1, channels, size, size, device=device), layers)
    finally:
        module.train(was_training)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network itself, without what DistributedDataParallel puts around it."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def observable(module: nn.Module) -> list[str]:
    """Names of the layers that `observe` may be asked for."""
    return list(_places(unwrapped(module)))


def _places(module: nn.Module) -> dict[str, nn.Module]:
    """The submodule whose output each name stands for."""
    if not isinstance(module, fx.GraphModule):
        return {name: child for name, child in module.named_modules() if name}
    modules = dict(module.named_modules())
    places: dict[str, nn.Module] = {}
    twice: set[str] = set()
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    runs = Counter(str(node.target) for node in calls)
    for node in calls:
        if runs[str(node.target)] > 1:
            continue  # a ReLU that serves several places
        for name in node.meta.get(RESULT_OF, ()):
            twice |= {name} & places.keys()
            places[name] = modules[str(node.target)]
    return {name: place for name, place in places.items() if name not in twice}


def stage_ends(module: nn.Module, size: int, channels: int = 3) -> list[str]:
    """The last layer, or block of layers, before each halving of the image, and the last one of all.

    A block is the largest module within which the image gets smaller once at most. Maps of one pixel do not count.
    Raises ModelError for a network without maps.
    """
    reached: dict[str, tuple[int, int]] = {}
    inside: dict[str, set[tuple[int, int]]] = {}
    order: list[str] = []
    handles = []
    modules = {name: child for name, child in unwrapped(module).named_modules() if name}

    def watch(name: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            maps = [t for t in (*inputs, output) if isinstance(t, Tensor) and t.ndim == 4]
            sizes = {(t.shape[2], t.shape[3]) for t in maps}
            for outer in _ancestors(name):
                inside.setdefault(outer, set()).update(s for s in sizes if s != (1, 1))
            if isinstance(output, Tensor) and output.ndim == 4 and name not in reached:
                reached[name] = (output.shape[2], output.shape[3])
            order.append(name)

        handles.append(layer.register_forward_hook(hook))

    for name, child in modules.items():
        watch(name, child)
    try:
        answers_to_blank(module, size, channels=channels)
    finally:
        for handle in handles:
            handle.remove()
    ends: dict[tuple[int, int], str] = {}
    for name in order:
        whole = order.count(name) == 1 and len(inside[name]) <= 2
        part = any(len(inside.get(outer, ())) <= 2 for outer in _ancestors(name)[1:])
        # The input is square: other maps have their channels last.
        height, width = reached.get(name, (1, 1))
        if whole and not part and height == width > 1:
            ends[reached[name]] = name
    first = next((name for name in order if any(True for _ in modules[name].parameters(recurse=False))), "")
    if set(ends.values()) <= {first}:  # none, or the patches of a transformer
        problem = f"`auto` found no layer that returns maps{f' but the first, {first}' if ends else ''}"
        raise ModelError("layers", problem, "name layers of the network")
    return list(ends.values())


def before_activations(module: nn.Module, size: int, channels: int = 3) -> list[str]:
    """The layer in front of the last activation before each halving of the image, and of the last one of all.

    In front of it is the layer whose output goes into the activation as it is: not through a sum with a shortcut.
    Maps of one pixel do not count. Raises ModelError for a network without such a layer.
    """
    made: dict[int, tuple[str, Tensor, int]] = {}
    ends: dict[tuple[int, ...], str] = {}
    handles = []

    def watch(name: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor):  # kept, so that no other tensor gets its id
                made[id(output)] = name, output, output._version

        handles.append(layer.register_forward_hook(hook))

    class Watched(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func in ACTIVATIONS and args and isinstance(args[0], Tensor) and id(args[0]) in made:
                name, output, version = made[id(args[0])]
                if output.ndim == 4 and output.shape[2:] != (1, 1) and output._version == version:
                    ends.pop(tuple(output.shape[2:]), None)
                    ends[tuple(output.shape[2:])] = name
            return func(*args, **(kwargs or {}))

    for name, child in unwrapped(module).named_modules():
        if name and not any(child.children()):
            watch(name, child)
    try:
        with Watched():
            answers_to_blank(module, size, channels=channels)
    finally:
        for handle in handles:
            handle.remove()
    if not ends:
        raise ModelError("layers", "`auto` found no layer in front of an activation", "name layers of the network")
    return list(ends.values())


def _ancestors(name: str) -> list[str]:
    """The name, and those of all modules around it, inner first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _instead(name: str, names: Iterable[str]) -> str:
    known = list(names)
    return f"some are {', '.join(get_close_matches(name, known, 4, 0.3) or known[-4:])}"
