"""Two zeros in every four weights: Mishra et al., 2021 (arXiv:2104.08378), section 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUP, STAY = 4, 2


def fits(layer: nn.Module) -> bool:
    """Whether the layer's inputs come in fours: convolutions (of each group) and linear layers."""
    return isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight.shape[1] % GROUP == 0


def mask(weight: Tensor) -> Tensor:
    """bool, in the weight's shape (outputs, inputs, ...): the two largest of each four neighbouring inputs.

    By absolute value, at each output and place of the kernel; of equal ones the first.
    """
    groups = weight.detach().abs().unflatten(1, (-1, GROUP))
    order = groups.argsort(dim=2, descending=True, stable=True)
    stays = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[:, :, :STAY], True)
    return stays.flatten(1, 2)
