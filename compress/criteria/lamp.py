"""Layer-adaptive magnitude: Lee et al., 2021 (arXiv:2010.07611), equation 1."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compress.criteria.evidence import Evidence, Need
from compress.settings import Settings


def lamp(weights: Sequence[Tensor]) -> Tensor:
    """(C,): the squared norm of each channel's weights, divided by the sum of all squared norms that are no smaller.

    The paper's score of a single weight, with channels in the place of weights. The largest channel of every layer has
    a score of 1, so that no layer is emptied. `weights` are (C, elements); equal norms share the larger sum's order.
    """
    squared_C = torch.cat(list(weights), dim=1).square().sum(dim=1).double()
    sorted_C, order_C = squared_C.sort(stable=True)
    no_smaller_C = sorted_C.flip(0).cumsum(0).flip(0)
    scores_C = torch.empty_like(squared_C)
    scores_C[order_C] = sorted_C / no_smaller_C.clamp_min(torch.finfo(torch.float64).tiny)
    return scores_C.to(weights[0].dtype)


class LAMP(Settings):
    """Channels that are small beside the larger ones of their layer go first. Needs no data and compares layers."""

    needs: ClassVar[Need] = "weights"
    across_layers: ClassVar[bool] = True

    use: Literal["lamp"]

    def __call__(self, evidence: Evidence) -> Tensor:
        return lamp(evidence.weights)
