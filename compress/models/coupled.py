"""Which channels of a network can only go together: the dependency graph of Fang et al., 2023 (arXiv:2301.12900).

Where two layers are added, channel 3 of one is tied to channel 3 of the other; where a layer is depthwise, its output
is tied to its input; where two are concatenated, each ties another part of what follows. torch-pruning traces this.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.structure import SLICEABLE, resize, sizes, swap_sides
from compress.product import KeptChannels

Side = Literal["outputs", "inputs"]
UNFOLLOWED = "what is done with them on their way is beyond the rules that would take some of them out"
MOST_PLACES = 200_000
"""Of the values that one set of channels may become on its way: VGG-16 flattens 512 channels into 25,088; each of the
reshapes of Swin multiplies them once more."""
RIGHT = 1e-6
"""Of the largest output, in float64."""


@dataclass(frozen=True, eq=False)
class Coupled:
    """Units of channels: any of them may go, and with it goes its row of every entry of `places`."""

    places: Mapping[tuple[str, Side], Tensor]
    """By layer name and side the channels of that layer, int64 (units, channels of one unit). Normalisation layers and
    depthwise convolutions appear with their outputs only."""

    @property
    def units(self) -> int:
        return next(iter(self.places.values())).shape[0]

    @property
    def name(self) -> str:
        """Of its first producer."""
        return next(iter([*self.producers, next(iter(self.places))[0]]))

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
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it gives up following, and what it makes of that is tried below
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
    for layer, group in _groups(graph):
        if group is None:
            whole.append(f"{names[layer]} keeps all its channels: {UNFOLLOWED}")
            continue
        if any(isinstance(item.dep.target.module, torch_pruning.ops._OutputOp) for item in group):
            continue
        root = names[group[0].dep.target.module]
        foreign = _foreign(group, names)
        if foreign:
            whole.append(f"{root} keeps all its channels: {foreign} depends on them and cannot be pruned")
            continue
        sets = [coupled for coupled in _sets(graph, group, names) if coupled.places]
        found.extend(sets)
        if not sets:
            whole.append(
                f"{root} keeps all its channels: a grouped convolution reads them from layers of different kinds"
            )
    right = _right(module, [coupled for coupled in found if _in_range(coupled, module)], input_size, channels)
    whole += [f"{coupled.name} keeps all its channels: {UNFOLLOWED}" for coupled in found if coupled not in right]
    return right, list(dict.fromkeys(whole))


def without(module: nn.Module, gone: Mapping[tuple[str, Side], set[int]]) -> dict[str, KeptChannels]:
    """What every layer keeps when the channels in `gone` go; untouched layers are absent."""
    kept: dict[str, KeptChannels] = {}
    for name, layer in module.named_modules():
        sides = gone.get((name, "outputs")), gone.get((name, "inputs"))
        if not any(sides):
            continue
        outputs, inputs = (
            tuple(index for index in range(size) if index not in side) if side else None
            for size, side in zip(sizes(name, layer), sides, strict=True)
        )
        if depthwise(layer) and outputs is not None:
            kept[name] = KeptChannels(outputs=outputs, inputs=outputs, groups=len(outputs))
        else:
            kept[name] = KeptChannels(outputs=outputs, inputs=inputs)
    return kept


def _in_range(coupled: Coupled, module: nn.Module) -> bool:
    """Whether all layers have the channels that they are said to have."""
    for (name, side), channels_UC in coupled.places.items():
        width = sizes(name, module.get_submodule(name))[0 if side == "outputs" else 1]
        if int(channels_UC.max()) >= width or len(set(channels_UC.flatten().tolist())) < channels_UC.numel():
            return False
    return True


def _right(module: nn.Module, sets: Sequence[Coupled], input_size: int, channels: int) -> list[Coupled]:
    """Those whose channels are tied as they say: without half of them, the network computes what it does when nothing
    reads them.

    A graph of operators is followed by rules that do not know them all: a slice, a shuffle of channels, heads.
    """
    copied = copy.deepcopy(module).eval().cpu()
    copied.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, channels, input_size, input_size, generator=generator)
    with contextlib.suppress(Exception):  # float64 tells rounding from a wrong channel, where the network allows it
        with torch.no_grad():
            copied.double()(image.double())
        image = image.double()
    if image.dtype != torch.float64:
        copied = copied.float()
    halves = [torch.randperm(coupled.units, generator=generator)[: coupled.units // 2] for coupled in sets]

    def passes(chosen: Sequence[int]) -> bool:
        gone: dict[tuple[str, Side], set[int]] = {}
        for index in chosen:
            for place, channels_UC in sets[index].places.items():
                gone.setdefault(place, set()).update(channels_UC[halves[index]].flatten().tolist())
        deaf, narrow = copy.deepcopy(copied), copy.deepcopy(copied)
        try:
            with torch.no_grad():
                for (name, side), indices in gone.items():
                    if side == "inputs" and not depthwise(layer := deaf.get_submodule(name)):
                        _forget(layer, sorted(indices))
                resize(narrow, without(narrow, gone))
                expected, found = deaf(image), narrow(image)
        except Exception:  # shapes that no longer fit, in as many words as there are operators
            return False
        close = RIGHT if image.dtype == torch.float64 else 1e-3
        bound = close * float(expected.abs().max().clamp_min(torch.finfo(image.dtype).tiny))
        return found.shape == expected.shape and not bool((found - expected).abs().max() > bound)

    def right(chosen: list[int]) -> list[int]:
        if not chosen or passes(chosen):
            return chosen
        if len(chosen) == 1:
            return []
        accepted, rest = right(chosen[: len(chosen) // 2]), right(chosen[len(chosen) // 2 :])
        if passes([*accepted, *rest]):
            return [*accepted, *rest]
        for index in rest:
            if passes([*accepted, index]):
                accepted = [*accepted, index]
        return accepted

    chosen = {*right([index for index, half in enumerate(halves) if len(half)])}
    # A set of one unit is never cut.
    return [coupled for index, coupled in enumerate(sets) if index in chosen or not len(halves[index])]


def _forget(layer: nn.Module, indices: list[int]) -> None:
    """Makes a layer deaf to some of its input channels."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Conv2d):
        each, outputs = weight.shape[1], weight.shape[0] // layer.groups
        for index in indices:
            group = index // each
            weight[group * outputs : (group + 1) * outputs, index % each] = 0
    elif isinstance(layer, nn.ConvTranspose2d):
        weight[indices] = 0
    else:
        weight[:, indices] = 0


def _groups(graph: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Each layer with channels and the group that goes with them, if it is in none so far; None where rules fail."""
    seen: set[nn.Module] = set()

    def bounded(dependency: Any, triggered: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def ask(function: Any) -> bool:
            # torch-pruning makes the mappings anew for each group, and applies them next.
            dependency.index_mapping = [mapping and _bounded(mapping, graph) for mapping in dependency.index_mapping]
            return triggered(function)

        return ask

    for dependency in [dependency for node in graph.module2node.values() for dependency in node.dependencies]:
        dependency.is_triggered_by = bounded(dependency, dependency.is_triggered_by)
    for layer in list(graph.module2node):
        if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) or layer in seen:
            continue
        pruner = graph.get_pruner_of_module(layer)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                count = pruner.get_out_channels(layer)
                group = graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(count)))
        except ModelError:
            raise
        except Exception:  # a layer that reads part of what the rules say it reads: a division by 0, an index
            yield layer, None
            continue
        seen |= {item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)}
        yield layer, group


def _bounded(mapping: Any, graph: Any) -> Callable[[Any], Any]:
    """The mapping of indices, refusing to make more of them than any network has that can be pruned."""
    if getattr(mapping, "bounded", False):
        return mapping

    def map_few(indices: Any) -> Any:
        times = 1 if getattr(mapping, "reverse", True) else getattr(mapping, "_stride", 1)
        if len(indices) * times > MOST_PLACES:
            raise ModelError(
                type(graph.model).__name__,
                "its channels are tied in more ways than torch-pruning can follow",
                "leave `prune` out of the recipe",
            )
        return mapping(indices)

    map_few.bounded = True  # type: ignore[attr-defined]
    return map_few


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
            if root is None or root >= width:
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
