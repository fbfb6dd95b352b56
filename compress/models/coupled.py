"""Which channels of a network can only go together: the dependency graph of Fang et al., 2023 (arXiv:2301.12900).

Where two layers are added, channel 3 of one is tied to channel 3 of the other; where a layer is depthwise, its output
is tied to its input; where two are concatenated, each ties another part of what follows. torch-pruning traces this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.structure import SLICEABLE, swap_sides

Side = Literal["outputs", "inputs"]


@dataclass(frozen=True)
class Coupled:
    """Units of channels: any of them may go, and with it goes its row of every entry of `places`."""

    places: Mapping[tuple[str, Side], Tensor]
    """By layer name and side the channels of that layer, int64 (units, channels of one unit). Normalisation layers and
    depthwise convolutions appear with their outputs only."""

    @property
    def units(self) -> int:
        return next(iter(self.places.values())).shape[0]

    @property
    def producers(self) -> list[str]:
        """Layers whose outputs these are."""
        return [name for name, side in self.places if side == "outputs"]


def find_coupled(module: nn.Module, input_size: int, channels: int = 3) -> tuple[list[Coupled], list[str]]:
    """All sets of channels that may be removed from `module`, and a sentence for each set that has to stay whole.

    The channels of the network's output are in neither. Needs one forward pass of a square image with `input_size`
    pixels a side. `module` stays as it is.
    """
    import torch_pruning  # slow to import, and only pruning needs it

    names = {layer: name for name, layer in module.named_modules()}
    trained = {parameter: parameter.requires_grad for parameter in module.parameters()}
    device = next(iter(trained)).device
    was_training = module.training
    try:
        module.requires_grad_(True)
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                module,
                # In a tuple: a bare tensor is first tried as `module(*images)`, which some networks accept.
                example_inputs=(torch.zeros(1, channels, input_size, input_size, device=device),),
                # Ends the graph in an operation that is no layer, so that what is tied to the output can be told.
                output_transform=lambda logits: logits * 1,
                verbose=False,
            )
    except Exception as error:
        raise ModelError(
            type(module).__name__,
            f"torch-pruning cannot follow it ({(str(error).strip().splitlines() or [type(error).__name__])[0]})",
            "leave `prune` out of the recipe",
        ) from error
    finally:
        module.train(was_training)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
    found: list[Coupled] = []
    whole: list[str] = []
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.ConvTranspose2d, nn.Linear]):
        if any(isinstance(item.dep.target.module, torch_pruning.ops._OutputOp) for item in group):
            continue
        root = names[group[0].dep.target.module]
        foreign = _foreign(group, names)
        if foreign:
            whole.append(f"{root} keeps all its channels: {foreign} depends on them and cannot be pruned")
            continue
        sets = _sets(graph, group, names)
        found.extend(sets)
        if not sets:
            whole.append(
                f"{root} keeps all its channels: a grouped convolution reads them from layers of different kinds"
            )
    return found, whole


def _foreign(group: Any, names: Mapping[nn.Module, str]) -> str:
    """The first layer or parameter with per-channel values that we cannot slice, or nothing."""
    for item in group:
        target = item.dep.target.module
        if isinstance(target, nn.Parameter):
            return "a parameter outside any layer"
        if target not in names:
            continue
        parametrised = any(True for _ in target.parameters())
        # torch-pruning takes every convolution with one output per group for a depthwise one.
        mistaken = getattr(target, "groups", 1) == getattr(target, "out_channels", 0) and not depthwise(target)
        if (parametrised and not isinstance(target, SLICEABLE)) or mistaken:
            return f"{names[target]} ({type(target).__name__})"
    return ""


def _sets(graph: Any, group: Any, names: Mapping[nn.Module, str]) -> list[Coupled]:
    """The group as sets of like units: channels of its root that the same layers depend on in the same way."""
    width = len(group[0].idxs)
    channels: list[dict[tuple[str, Side], set[int]]] = [{} for _ in range(width)]
    divisor = 1
    for item in group:
        layer = item.dep.target.module
        if not isinstance(layer, SLICEABLE) or (isinstance(layer, nn.PReLU) and layer.num_parameters == 1):
            continue
        is_output = graph.is_out_channel_pruning_fn(item.dep.handler)
        groups = getattr(layer, "groups", 1)
        if groups > 1 and not depthwise(layer):
            divisor = math.lcm(divisor, groups)
        place: tuple[str, Side] = (names[layer], "outputs" if is_output else "inputs")
        for index, root in zip(item.idxs, item.root_idxs, strict=True):
            if root is None:
                return []
            channels[root].setdefault(place, set()).add(index)
    alike: dict[Any, list[int]] = {}
    for index, places in enumerate(channels):
        signature = tuple(sorted((place, len(indices)) for place, indices in places.items()))
        alike.setdefault(signature, []).append(index)
    if divisor > 1 and (len(alike) > 1 or width % divisor):
        return []
    sets = []
    for roots in alike.values():
        # A grouped convolution loses the same channel of each of its groups.
        units = torch.tensor(roots).view(divisor, -1).T.tolist()
        sets.append(
            Coupled(
                {
                    place: torch.tensor([[i for root in unit for i in sorted(channels[root][place])] for unit in units])
                    for place in channels[roots[0]]
                }
            )
        )
    return sets


def depthwise(layer: nn.Module) -> bool:
    """Whether each output of `layer` is made from the one input of the same number."""
    return (
        isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
        and layer.groups == layer.out_channels == layer.in_channels > 1
    )


def channel_rows(layer: nn.Module, side: Side, weight: Tensor) -> Tensor:
    """`weight` (of the layer, or its gradient) with one row per channel of that side: (channels, elements)."""
    if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        return weight.reshape(len(weight), -1) if side == "outputs" else weight.T
    if isinstance(layer, nn.ConvTranspose2d) == (side == "inputs"):
        return weight.flatten(1)
    return swap_sides(weight, layer.groups).flatten(1)
