"""BatchNorm's scales: network slimming, Liu et al., 2017 (arXiv:1708.06519), section 3."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compress.criteria.evidence import Evidence, Need
from compress.settings import Settings


def scale_sums(scales: Sequence[Tensor]) -> Tensor:
    """(C,): for each channel the sum of |gamma| over its BatchNorm layers; `scales` are (C, elements)."""
    return torch.cat(list(scales), dim=1).abs().sum(dim=1)


class BNScale(Settings):
    """Channels that BatchNorm scales down most go first. Wants networks trained with an L1 penalty on these scales."""

    needs: ClassVar[Need] = "scales"
    across_layers: ClassVar[bool] = False

    use: Literal["bn_scale"]

    def __call__(self, evidence: Evidence) -> Tensor:
        return scale_sums(evidence.of("normalizes"))
