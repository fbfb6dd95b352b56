"""Norms of coupled channels: DepGraph, Fang et al., 2023 (arXiv:2301.12900), and the group lasso.

Group lasso: Yuan & Lin, 2006; for the channels of networks Wen et al., 2016 (arXiv:1608.03665).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.coupled import Coupled, find_coupled
from compress.product import Batch, Preprocess, Run
from compress.regularizers.coupled_weights import squared_norms
from compress.settings import Settings


def strengths(norms_C: Tensor, alpha: float) -> Tensor:
    """(C,): 2**(alpha * (max - n) / (max - min)), without a gradient.

    1 for the largest norm and 2**alpha for the smallest; all are 1 where all norms are equal.
    """
    norms_C = norms_C.detach()
    spread = (norms_C.max() - norms_C.min()).clamp_min(torch.finfo(norms_C.dtype).tiny)
    return 2.0 ** (alpha * (norms_C.max() - norms_C) / spread)


def shrinkage(squared_norms: Sequence[Tensor], alpha: float) -> Tensor:
    """Half the sum over channels of strength * squared norm: the gradient of each weight is its channel's strength
    times the weight, as the paper's code adds it. `squared_norms` are (C,) for each set of coupled channels."""
    return torch.stack([(strengths(each.sqrt(), alpha) * each).sum() for each in squared_norms]).sum() / 2


def lasso(squared_norms: Sequence[Tensor]) -> Tensor:
    """The sum over channels of the Euclidean norm of their coupled weights; its derivative at 0 is 0."""
    # The root has no derivative at 0: the channels there are left out.
    parts = [torch.where(each > 0, each, torch.ones_like(each)).sqrt() * (each > 0) for each in squared_norms]
    return torch.stack([part.sum() for part in parts]).sum()


@dataclass(frozen=True)
class _Penalty:
    sets: Sequence[Coupled]
    settings: GroupNorm

    def penalty(self, student: nn.Module, batch: Batch) -> Tensor:
        squared = squared_norms(student, self.sets)
        value = lasso(squared) if self.settings.form == "lasso" else shrinkage(squared, self.settings.alpha)
        return self.settings.weight * value

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        pass


class GroupNorm(Settings):
    """Pulls all coupled weights of a channel towards zero together; goes with `criterion: {use: magnitude, p: 2}`."""

    use: Literal["group_norm"]
    weight: float = Field(default=1e-4, ge=0)
    form: Literal["squared", "lasso"] = "squared"
    """`squared`: squared norms, the smaller the stronger, as DepGraph does; `lasso`: norms, pulled alike."""
    alpha: float = Field(default=4.0, ge=0)
    """For `squared`: the smallest channel of a set is pulled 2**alpha times as hard as its largest."""

    def check(self, module: nn.Module, preprocess: Preprocess, place: str) -> None:
        """Raises ModelError where no channel may go."""
        if not find_coupled(module, preprocess.size, preprocess.channels)[0]:
            raise ModelError(place, "`sparsity: group_norm` finds no channels that may go", "leave `sparsity` out")

    def open(self, module: nn.Module, run: Run) -> _Penalty:
        preprocess = run.data.preprocess
        self.check(module, preprocess, f"stage {run.stage}")
        return _Penalty(find_coupled(module, preprocess.size, preprocess.channels)[0], self)
