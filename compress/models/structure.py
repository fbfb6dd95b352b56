"""From a factory's network to a pruned one: which layer keeps which channels.

A layer's weight has its outputs in one dimension and its inputs in another; BatchNorm and PReLU have outputs only. A
depthwise convolution keeps the same channels on both sides, a grouped one the same number in each of its groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.product import KeptChannels

SLICEABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)
"""Layers that channels can be taken out of."""


def resize(module: nn.Module, kept: Mapping[str, KeptChannels]) -> None:
    """Takes all other channels out of `module`, in place; a state dict of the pruned network then loads strictly.

    The channels that stay keep their weights. Raises ModelError for a layer that `module` does not have in this shape.
    """
    layers = dict(module.named_modules())
    for name, channels in kept.items():
        layer = _find(layers, name)
        for key, tensor in _sliced(name, layer, channels).items():
            old = getattr(layer, key)
            new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
            setattr(layer, key, new)
        _set_sizes(layer, channels)


def select(original: nn.Module, kept: Mapping[str, KeptChannels]) -> dict[str, Tensor]:
    """The state dict of `original` with the other channels taken out; `original` stays as it is.

    What a pruned layer would hold had nothing been trained since: the target of a loss on weights, and of tests.
    """
    state = {key: tensor.detach().clone() for key, tensor in original.state_dict().items()}
    layers = dict(original.named_modules())
    for name, channels in kept.items():
        layer = _find(layers, name)
        state.update({f"{name}.{key}": tensor for key, tensor in _sliced(name, layer, channels).items()})
    return state


def kept_weight(name: str, layer: nn.Module, channels: KeptChannels) -> Tensor:
    """A copy of one layer's weight with the kept channels only, in the layer's own layout."""
    return _sliced(name, layer, channels)["weight"]


def within(
    student: Mapping[str, KeptChannels], teacher: Mapping[str, KeptChannels], dropped: Sequence[str] = ()
) -> dict[str, KeptChannels] | None:
    """One step from the network that kept `teacher` to the one that kept `student`, both of the same factory's network.

    `compose(teacher, within(student, teacher))` is `student`. None where the student has a channel that the teacher has
    not. The student has nothing of the blocks that it `dropped`.
    """

    def places(mine: tuple[int, ...] | None, theirs: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if theirs is None:
            return mine
        if mine is None:  # all of the factory's
            raise KeyError
        where = {channel: place for place, channel in enumerate(theirs)}
        return None if mine == theirs else tuple(where[channel] for channel in mine)

    step: dict[str, KeptChannels] = {}
    for name in {**teacher, **student}:
        if inside(name, dropped):
            continue
        mine, theirs = student.get(name, KeptChannels()), teacher.get(name, KeptChannels())
        try:
            outputs, inputs = places(mine.outputs, theirs.outputs), places(mine.inputs, theirs.inputs)
        except KeyError:
            return None
        if outputs is not None or inputs is not None:
            step[name] = KeptChannels(outputs=outputs, inputs=inputs, groups=mine.groups)
    return step


def inside(name: str, blocks: Iterable[str]) -> bool:
    """Whether the layer of that name is one of those blocks, or in one."""
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def compose(first: Mapping[str, KeptChannels], then: Mapping[str, KeptChannels]) -> dict[str, KeptChannels]:
    """`first`, then `then` on what `first` left: one step from the factory's network to the result of both."""

    def picked(old: tuple[int, ...] | None, new: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if old is None or new is None:
            return new if old is None else old
        return tuple(old[index] for index in new)

    composed = dict(first)
    for name, new in then.items():
        old = first.get(name, KeptChannels())
        composed[name] = KeptChannels(
            outputs=picked(old.outputs, new.outputs),
            inputs=picked(old.inputs, new.inputs),
            groups=old.groups if new.groups is None else new.groups,
        )
    return composed


def sizes(name: str, layer: nn.Module) -> tuple[int, int]:
    """Number of output and input channels; the latter is 0 for a layer whose channels pass through one by one."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        return layer.out_channels, layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return layer.num_features, 0
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters, 0
    raise ModelError(name, f"channels cannot be taken out of a {type(layer).__name__}")


def _find(layers: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in layers:
        close = get_close_matches(name, layers, n=3)
        raise ModelError(name, "the network has no such layer", f"close: {', '.join(close)}" if close else "")
    return layers[name]


@torch.no_grad()
def _sliced(name: str, layer: nn.Module, channels: KeptChannels) -> dict[str, Tensor]:
    """Copies of all tensors of `layer` with the kept channels only, by attribute name."""
    outputs, inputs = _kept(name, layer, channels)
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    # One value per output, but for BatchNorm's count of batches and the weights below.
    sliced = {key: tensor[outputs] for key, tensor in tensors.items() if tensor.ndim == 1}
    if isinstance(layer, nn.Linear):
        sliced["weight"] = layer.weight[outputs][:, inputs]
    elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        # Both as (outputs, inputs of one group, height, width), and the transposed one back again.
        transposed = isinstance(layer, nn.ConvTranspose2d)
        weight = swap_sides(layer.weight, layer.groups) if transposed else layer.weight
        weight, groups = _grouped(name, weight, outputs, inputs, layer.groups)
        expected = channels.groups or layer.groups
        if groups != expected:
            raise ModelError(name, f"{groups} of {layer.groups} groups have kept channels, not {expected}")
        sliced["weight"] = swap_sides(weight, groups) if transposed else weight
    return {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in sliced.items()}


def _kept(name: str, layer: nn.Module, channels: KeptChannels) -> tuple[list[int], list[int]]:
    """The kept outputs and inputs, spelled out where the layer keeps all of them."""
    chosen = []
    for side, size, indices in zip(
        ("output", "input"), sizes(name, layer), (channels.outputs, channels.inputs), strict=True
    ):
        outside = [index for index in indices or () if not 0 <= index < size]
        if outside:
            raise ModelError(name, f"there is no {side} channel {outside[0]}: the layer has {size}")
        chosen.append(list(range(size)) if indices is None else list(indices))
    return chosen[0], chosen[1]


def _grouped(name: str, weight_OIHW: Tensor, outputs: list[int], inputs: list[int], groups: int) -> tuple[Tensor, int]:
    """The kept part of a convolution's weight, and in how many of its groups something is left."""
    outputs_each, inputs_each = weight_OIHW.shape[0] // groups, weight_OIHW.shape[1]
    rows: dict[int, list[int]] = {}
    columns: dict[int, list[int]] = {}
    for index in outputs:
        rows.setdefault(index // outputs_each, []).append(index)
    for index in inputs:
        columns.setdefault(index // inputs_each, []).append(index % inputs_each)
    shapes = {(len(rows.get(group, ())), len(columns.get(group, ()))) for group in {*rows, *columns}}
    if len(shapes) != 1 or 0 in next(iter(shapes)):
        raise ModelError(name, "the groups of a grouped convolution must keep equally many channels")
    order = sorted(rows)
    if len(order) == 1:
        return weight_OIHW[rows[order[0]]][:, columns[order[0]]], 1
    # All groups at once: a depthwise convolution has a thousand of them.
    row_R = torch.tensor([row for group in order for row in rows[group]], device=weight_OIHW.device)
    column_RI = torch.tensor([columns[group] for group in order for _ in rows[group]], device=weight_OIHW.device)
    return weight_OIHW[row_R[:, None], column_RI], len(rows)


def swap_sides(weight: Tensor, groups: int) -> Tensor:
    """(groups * a, b, H, W) to (groups * b, a, H, W): between the layouts of Conv2d and ConvTranspose2d."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _set_sizes(layer: nn.Module, channels: KeptChannels) -> None:
    if isinstance(layer, nn.Conv2d):
        layer.groups = channels.groups or layer.groups
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.ConvTranspose2d):
        layer.groups = channels.groups or layer.groups
        layer.in_channels, layer.out_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif channels.outputs is not None:
        if isinstance(layer, nn.PReLU):
            layer.num_parameters = len(channels.outputs)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.num_features = len(channels.outputs)
