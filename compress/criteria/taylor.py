"""First-order change of the loss: Molchanov et al., 2019 (arXiv:1906.10771), equation 8."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from compress.criteria.evidence import Evidence, Need
from compress.settings import Settings


def first_order(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """(C,): for each channel the sum of (weight * gradient)**2 over all weights that go with it.

    Both are (C, elements). With gradients that are root mean squares over mini-batches this is the paper's average of
    the squared first-order terms: the mean gradient itself vanishes where training has converged.
    """
    return sum((w * g).square().sum(dim=1) for w, g in zip(weights, gradients, strict=True))  # type: ignore[return-value]


class Taylor(Settings):
    """Channels whose removal changes the loss least, to first order, go first."""

    needs: ClassVar[Need] = "gradients"
    across_layers: ClassVar[bool] = False

    use: Literal["taylor"]

    def __call__(self, evidence: Evidence) -> Tensor:
        return first_order(evidence.weights, evidence.gradients)
