"""The weights of coupled channels in a network that is being trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.models.coupled import Coupled
from compress.pruning.evidence import unit_rows


def squared_norms(module: nn.Module, sets: Sequence[Coupled]) -> list[Tensor]:
    """(units,) for each set: the sum of squares of all weights that go with a unit, differentiable.

    They are those that pruning takes out with it: the filters that make its channels, their BatchNorm scales and the
    slices of the filters that read them; no biases, as they are of another kind (DepGraph's `bias=False`).
    """
    found = []
    for coupled in sets:
        rows = []
        for (name, side), channels in coupled.places.items():
            layer = module.get_submodule(name)
            weight = getattr(layer, "weight", None)
            if isinstance(weight, Tensor) and not isinstance(layer, nn.PReLU):
                rows.append(unit_rows(layer, side, weight, channels.to(weight.device)).square().sum(dim=1))
        found.append(torch.stack(rows).sum(dim=0))
    return found
