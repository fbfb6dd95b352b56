"""A prepared network with some or all of its roundings switched off, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.quantization import ActivationQuantizer

LAYERS: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""What a fake-quantized layer is a kind of; called as that, its weights are not rounded."""


def quantizers(prepared: fx.GraphModule) -> dict[str, ActivationQuantizer]:
    """The grids of activations by module name, in the order of the graph."""
    modules = dict(prepared.named_modules())
    return {str(node.target): module for node, module in _calls(prepared, modules, ActivationQuantizer)}


def weighted(prepared: fx.GraphModule) -> dict[str, nn.Module]:
    """The layers whose weights are rounded, in the order of the graph."""
    modules = dict(prepared.named_modules())
    return {
        str(node.target): module for node, module in _calls(prepared, modules, LAYERS) if type(module) not in LAYERS
    }


def _calls(prepared: fx.GraphModule, modules: dict[str, nn.Module], kinds: Any) -> Iterator[tuple[fx.Node, Any]]:
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], kinds):
            yield node, modules[str(node.target)]


def groups(prepared: fx.GraphModule) -> dict[str, list[nn.Module]]:
    """What is rounded, by the layer's name: its weights, and the grids of what comes out of it."""
    found: dict[str, list[nn.Module]] = {}
    modules = dict(prepared.named_modules())
    layers = weighted(prepared)
    for node in prepared.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer):
            found.setdefault(module.layer, []).append(module)
        elif module is not None and str(node.target) in layers:
            found.setdefault(str(node.target), []).append(module)
    return found


@contextlib.contextmanager
def rounding_only(prepared: fx.GraphModule, chosen: Collection[nn.Module] = ()) -> Iterator[None]:
    """`prepared` in eval mode, computing in float but for the roundings of the `chosen` modules."""
    kept = {id(module) for module in chosen}
    every = [*quantizers(prepared).values(), *weighted(prepared).values()]
    switched = [module for module in every if id(module) not in kept]
    was_training = prepared.training
    prepared.eval()
    for module in switched:
        # On the instance: nn.Module finds it before the class's own, and hooks still run.
        module.forward = _float_forward(module)
    try:
        yield
    finally:
        for module in switched:
            del module.__dict__["forward"]
        prepared.train(was_training)


def _float_forward(module: nn.Module) -> Callable[..., Tensor]:
    if isinstance(module, ActivationQuantizer):
        # A grid that starts at zero stands in the place of a rectifier, which is no rounding.
        low, high = (0.0, module.limit) if module.nonnegative else (None, None)
        return (lambda x: x) if low is None else (lambda x: x.clamp(low, high))
    plain = next(kind for kind in type(module).__mro__ if kind in LAYERS)
    pads: Any = getattr(module, "pads", ())

    def forward(x: Tensor, *rest: Any) -> Tensor:
        result: Tensor = plain.forward(module, F.pad(x, pads) if any(pads) else x, *rest)
        return result

    return forward
