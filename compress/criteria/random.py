"""The control that any criterion has to beat."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compress.settings import Settings


def uniform(channels: int, generator: torch.Generator) -> Tensor:
    """(channels,): independent and uniform on [0, 1)."""
    return torch.rand(channels, generator=generator)


class Random(Settings):
    """Channels go in an order drawn with the recipe's seed."""

    needs_gradients: ClassVar[bool] = False

    use: Literal["random"]

    def __call__(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        return uniform(len(weights[0]), generator)
