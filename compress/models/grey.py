"""A network for RGB images made to read grey ones."""

from __future__ import annotations

from torch import Tensor, nn

from compress.errors import ModelError


def read_grey(module: nn.Module, place: str) -> None:
    """Gives the first convolution, in place, one input channel: its weights of the three colours added up.

    A grey image then has the answer of the same image in three equal channels. Raises ModelError where no convolution
    reads three channels.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and layer.groups == 1:
            layer.weight = nn.Parameter(added_up(layer.weight.detach()))
            layer.in_channels = 1
            return
        if isinstance(layer, nn.Conv2d):
            raise ModelError(place, f"its first convolution, {name}, reads {layer.in_channels} channels, not 3")
    raise ModelError(place, "has no convolution that reads an image", "give it channels: 3")


def added_up(weight_OIHW: Tensor) -> Tensor:
    """(O, 1, H, W): what a convolution of three equal channels does with one of them."""
    return weight_OIHW.sum(1, keepdim=True)
