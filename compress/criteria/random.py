"""The control that any criterion has to beat."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from compress.criteria.evidence import Evidence, Need
from compress.settings import Settings


def uniform(channels: int, generator: torch.Generator) -> Tensor:
    """(channels,): independent and uniform on [0, 1)."""
    return torch.rand(channels, generator=generator)


class Random(Settings):
    """Channels go in an order drawn with the recipe's seed."""

    needs: ClassVar[Need] = "weights"
    across_layers: ClassVar[bool] = False

    use: Literal["random"]

    def __call__(self, evidence: Evidence) -> Tensor:
        return uniform(len(evidence.weights[0]), evidence.generator)
