"""Optimal brain damage for channels, with a diagonal Fisher matrix: C-OBD of Wang et al., 2019 (arXiv:1905.05934).

LeCun et al., 1990, with the squared gradients of single images in the place of the Hessian's diagonal.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from compress.criteria.evidence import Evidence, Need
from compress.criteria.taylor import first_order
from compress.settings import Settings


def saliency(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """(C,): half the sum of weight**2 * E[gradient**2] over all weights of a channel; both are (C, elements).

    `gradients` are root mean squares over single images.
    """
    return first_order(weights, gradients) / 2


class OBD(Settings):
    """As `fisher`, weight by weight, as if the weights of a channel were independent."""

    needs: ClassVar[Need] = "sampled_gradients"
    across_layers: ClassVar[bool] = False

    use: Literal["obd"]

    def __call__(self, evidence: Evidence) -> Tensor:
        return saliency(evidence.weights, evidence.gradients)
