"""What a criterion may know of one set of coupled channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Role = Literal["makes", "normalizes", "bends", "reads"]
"""What a layer's weight is to the channels: its rows make them, scale them (BatchNorm), bend them (PReLU), or read
them."""

Need = Literal["weights", "scales", "gradients", "sampled_gradients", "mask_gradients", "activations"]
"""What has to be collected for a criterion; the weights are always there.

    scales              BatchNorm scales among the weights: a set without any is an error
    gradients           of the loss of mini-batches of training images
    sampled_gradients   of single images, with labels drawn from what the network itself answers
    mask_gradients      of single images with such labels, with respect to a factor on each channel
    activations         what the layers that read the channels are given
"""


@dataclass(frozen=True)
class Evidence:
    """The C units of one set of coupled channels. What its criterion does not need is empty."""

    weights: Sequence[Tensor]
    """(C, elements) for every layer that loses something with these channels, row c with unit c: the filters that make
    the channel, its BatchNorm scale, the slices of the filters that read it."""
    roles: Sequence[Role]
    """Of each of `weights`."""
    gradients: Sequence[Tensor] = ()
    """(C, elements) like `weights`: root mean squares over mini-batches, or over images with `sampled_gradients`."""
    mask_gradients_NC: Tensor = field(default_factory=lambda: torch.empty(0))
    """For each of N images the derivative of its loss by a factor on the unit, at 1."""
    activations_NC: Tensor = field(default_factory=lambda: torch.empty(0))
    """For each of N images the statistic that the criterion takes of what is read of the unit."""
    generator: torch.Generator = field(default_factory=torch.Generator)
    """The only source of randomness."""

    def of(self, role: Role) -> list[Tensor]:
        """The weights with that role."""
        return [weight for weight, own in zip(self.weights, self.roles, strict=True) if own == role]
