"""Fisher information of a factor on each channel: Theis et al., 2018 (arXiv:1801.05787), equation 6.

For coupled channels: Liu et al., 2021 (arXiv:2108.00708), equation 8. With labels drawn from the network's own answers,
it is the Fisher information and not the empirical one, which is zero where every image is answered right.
"""

from typing import ClassVar, Literal

from torch import Tensor

from compress.criteria.evidence import Evidence, Need
from compress.settings import Settings


def fisher(mask_gradients_NC: Tensor) -> Tensor:
    """(C,): half the mean over images of the squared derivative by a channel's factor, the loss's second-order rise."""
    return mask_gradients_NC.square().mean(dim=0) / 2


class Fisher(Settings):
    """Channels whose removal changes the network's answers least, to second order, go first. Needs no labels."""

    needs: ClassVar[Need] = "mask_gradients"
    across_layers: ClassVar[bool] = False

    use: Literal["fisher"]

    def __call__(self, evidence: Evidence) -> Tensor:
        return fisher(evidence.mask_gradients_NC)
