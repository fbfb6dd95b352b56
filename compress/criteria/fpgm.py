"""Distance from the geometric median: FPGM, He et al., 2019 (arXiv:1811.00250), equation 8."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compress.criteria.evidence import Evidence, Need
from compress.settings import Settings


def distances(filters: Sequence[Tensor]) -> Tensor:
    """(C,): for each channel the sum of the Euclidean distances of its filters to those of all other channels.

    `filters` are (C, elements), one for each layer that makes the channels; the distances of the layers add up. The
    smallest sums are nearest to the geometric median: what these filters compute, others compute as well.
    """
    sums = [torch.cdist(each, each, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1) for each in filters]
    return torch.stack(sums).sum(dim=0)


class FPGM(Settings):
    """Channels whose filters are most replaceable by others of their layer go first. Needs no data."""

    needs: ClassVar[Need] = "weights"
    across_layers: ClassVar[bool] = False

    use: Literal["fpgm"]

    def __call__(self, evidence: Evidence) -> Tensor:
        return distances(evidence.of("makes"))
