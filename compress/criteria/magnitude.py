"""Norms of the weights: Li et al., 2017 (arXiv:1608.08710).

Taken over all coupled layers, as in Fang et al., 2023 (arXiv:2301.12900).
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compress.criteria.evidence import Evidence, Need
from compress.settings import Settings


def norms(weights: Sequence[Tensor], p: int) -> Tensor:
    """(C,): for each channel the p-norm of all weights that go with it; `weights` are (C, elements)."""
    return torch.cat(list(weights), dim=1).norm(p, dim=1)


class Magnitude(Settings):
    """Channels with small weights go first. Needs no data."""

    needs: ClassVar[Need] = "weights"
    across_layers: ClassVar[bool] = False

    use: Literal["magnitude"]
    p: Literal[1, 2] = 1
    """1: sum of absolute values, as in the paper; 2: Euclidean norm."""

    def __call__(self, evidence: Evidence) -> Tensor:
        return norms(evidence.weights, self.p)
