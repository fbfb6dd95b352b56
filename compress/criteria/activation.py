"""What a channel says: mean activations of Molchanov et al., 2017 (arXiv:1611.06440), section 2.2, and APoZ.

APoZ, the average percentage of zeros: Hu et al., 2016 (arXiv:1607.03250), equation 1.
"""

from typing import ClassVar, Literal

from torch import Tensor

from compress.criteria.evidence import Evidence, Need
from compress.settings import Settings


def mean_absolute(read_NCE: Tensor) -> Tensor:
    """(N, C): for each image the mean of |x| over a unit's E elements."""
    return read_NCE.abs().mean(dim=2)


def part_not_zero(read_NCE: Tensor) -> Tensor:
    """(N, C): for each image the part of a unit's E elements that is not zero: 1 - APoZ."""
    return (read_NCE != 0).to(read_NCE.dtype).mean(dim=2)


class Activation(Settings):
    """Channels that are silent go first."""

    needs: ClassVar[Need] = "activations"
    across_layers: ClassVar[bool] = False

    use: Literal["activation"]
    statistic: Literal["mean", "nonzero"] = "mean"
    """Of what the next layers read of a channel: `mean` of the absolute values; `nonzero`, 1 - APoZ, wants ReLUs."""

    def taken(self, read_NCE: Tensor) -> Tensor:
        """(N, C): the statistic of each image."""
        return mean_absolute(read_NCE) if self.statistic == "mean" else part_not_zero(read_NCE)

    def __call__(self, evidence: Evidence) -> Tensor:
        return evidence.activations_NC.mean(dim=0)
