"""What makes a training sparse, so that channels can go afterwards: one file per penalty.

A settings class with `check(module, preprocess, place)`, which refuses what cannot work before anything is trained, and
`open(module, run)`, which returns what `compress.training.fit` asks for a penalty at each step. Its gradient is added
like weight decay, beside the loss and whoever teaches: gradient clipping does not see it. To add one: its file, its
name in `SparsitySettings`, one test.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from compress.product import Preprocess, Run
from compress.regularizers.bn_scale import BNScaleL1
from compress.regularizers.group_norm import GroupNorm
from compress.regularizers.growing import Growing
from compress.settings import Settings
from compress.training import Regularizer

SparsitySettings = Annotated[BNScaleL1 | GroupNorm | Growing, Field(discriminator="use")]


class Sparse(Settings):
    """A training that may prepare the network for pruning."""

    sparsity: SparsitySettings | None = None
    """A penalty that pulls whole channels towards zero, for a stage `prune` that follows; null for none."""

    def refuse_unsparse(self, module: nn.Module, preprocess: Preprocess, place: str) -> None:
        """Raises ModelError for a network that the penalty does not fit."""
        if self.sparsity is not None:
            self.sparsity.check(module, preprocess, place)

    def regularizer(self, module: nn.Module, run: Run) -> Regularizer | None:
        """The penalty for a training that begins with `module`; None where there is none, or its weight is 0."""
        return self.sparsity.open(module, run) if self.sparsity is not None and self.sparsity.weight else None
