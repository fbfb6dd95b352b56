"""The last layer of a network, whose outputs are the classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.errors import ModelError


def find_head(module: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d] | None:
    """Name and layer of the linear layer that was registered last, else of the last 1x1 convolution; None for neither.

    SqueezeNet, without a linear layer, averages a map of each class.
    """
    layers = list(module.named_modules())
    linear = [(name, layer) for name, layer in layers if isinstance(layer, nn.Linear)]
    points = [(name, layer) for name, layer in layers if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)]
    return linear[-1] if linear else points[-1] if points else None


def replace_head(module: nn.Module, num_classes: int, place: str) -> str:
    """Puts a fresh layer of `num_classes` outputs in the head's place; a sentence that says so.

    Raises ModelError where the network has neither a linear layer nor a 1x1 convolution.
    """
    found = find_head(module)
    if found is None:
        raise ModelError(
            place, "has no linear layer to replace for this data's classes", "let the factory take `num_classes`"
        )
    name, old = found
    parent, _, child = name.rpartition(".")
    biased = old.bias is not None
    fresh: nn.Module
    if isinstance(old, nn.Linear):
        fresh = nn.Linear(old.in_features, num_classes, bias=biased)
    else:
        fresh = nn.Conv2d(old.in_channels, num_classes, 1, bias=biased)
    setattr(module.get_submodule(parent), child, fresh)
    return head_replaced(len(old.weight), num_classes)


def head_replaced(before: int, after: int) -> str:
    return f"head replaced: {before} -> {after} classes"


def output_classes(module: nn.Module, input_size: int, place: str, channels: int = 3) -> int:
    """Number of logits for one black image of `input_size` pixels a side; the module keeps its mode.

    Raises ModelError if the forward pass fails or returns anything but a tensor (1, classes).
    """
    was_training = module.training
    try:
        with torch.no_grad():
            logits = module.eval()(torch.zeros(1, channels, input_size, input_size))
    except Exception as error:  # the user's own code may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ModelError(place, f"fails on an image of {input_size}x{input_size} pixels ({reason})") from error
    finally:
        module.train(was_training)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 1:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(place, f"returns {got}", "it must return logits of shape (images, classes)")
    return logits.shape[1]


def check(module: nn.Module, *, num_classes: int, input_size: int, place: str, channels: int = 3) -> None:
    """Raises ModelError unless the network turns one image into `num_classes` logits."""
    found = output_classes(module, input_size, place, channels)
    if found != num_classes:
        raise ModelError(place, f"has {found} outputs, but the data has {num_classes} classes")
