"""Growing L2 on the channels that will go: GReg-1, Wang et al., 2021 (arXiv:2012.09243)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.criteria import CriterionSettings
from compress.criteria.magnitude import Magnitude
from compress.measures import macs
from compress.models.coupled import Coupled
from compress.models.patterns import Pattern
from compress.product import Batch, Preprocess, Run
from compress.pruning import MacGoal, Pruning, refuse_unreachable
from compress.pruning.chosen import chosen
from compress.pruning.limits import Ratio
from compress.pruning.network import least_of
from compress.regularizers.coupled_weights import squared_norms
from compress.settings import Settings


def grown(progress: float, *, weight: float, until: float) -> float:
    """The factor after that part of the training: from 0 in a straight line to `weight`, where it stays.

    The paper adds a fixed amount every few steps up to a ceiling and then lets the network settle; in parts of the
    training, that line is the same however many steps there are.
    """
    return weight * min(1.0, progress / until)


def growing(squared_norms: Sequence[Tensor], going: Sequence[Tensor], factor: float) -> Tensor:
    """factor / 2 times the squared norms of the channels that will go: the slope at each of their weights is factor
    times the weight.

    Both are (C,) for each set of coupled channels; `going` is bool.
    """
    parts = [(each * which.to(each)).sum() for each, which in zip(squared_norms, going, strict=True)]
    return factor / 2 * torch.stack(parts).sum()


@dataclass
class _Penalty:
    sets: Sequence[Coupled]
    going: list[Tensor]
    settings: Growing

    def penalty(self, student: nn.Module, batch: Batch) -> Tensor:
        factor = grown(batch.progress, weight=self.settings.weight, until=self.settings.until)
        return growing(squared_norms(student, self.sets), self.going, factor)

    def state(self) -> dict[str, Tensor]:
        """The choice: it was made before the training, and with other threads it might be another."""
        return {str(number): which for number, which in enumerate(self.going)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.going = [state[str(number)].bool() for number in range(len(self.going))]


class Growing(Settings):
    """Chooses the channels first, then pulls them harder and harder towards zero, so that the others can take over.

    Give the stage `prune` that follows the same goal and limits.
    """

    use: Literal["growing"]
    goal: MacGoal
    """Of the network that enters the training, as the stage `prune` will have it."""
    weight: float = Field(default=1.0, ge=0)
    """What the factor grows to; the gradient of a weight is the factor times the weight. The paper's ceiling is 1."""
    until: float = Field(default=0.5, gt=0, le=1)
    """The part of the training in which the factor grows."""
    criterion: CriterionSettings = Field(default_factory=lambda: Magnitude(use="magnitude"))
    """What chooses the channels, once, before the training."""
    round_to: int = Field(default=8, ge=1)
    scope: Literal["global", "local"] = "global"
    max_ratio: Ratio = 0.8
    layer_ratios: dict[Pattern, Ratio] = Field(default_factory=dict)
    keep: tuple[Pattern, ...] = ()
    images: int = Field(default=256, ge=1)
    """Training images for a criterion that needs them."""

    def pruning(self) -> Pruning:
        """The choice in the words of a stage `prune`."""
        shared: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields if name in CHOICE}
        return Pruning(**shared)

    def check(self, module: nn.Module, preprocess: Preprocess, place: str) -> None:
        """Raises ModelError where pruning would: patterns that match nothing, a goal out of reach."""
        refuse_unreachable(
            module, self.goal, self.pruning(), size=preprocess.size, channels=preprocess.channels, place=place
        )

    def open(self, module: nn.Module, run: Run) -> _Penalty:
        preprocess, place, pruning = run.data.preprocess, f"stage {run.stage}", self.pruning()
        self.check(module, preprocess, place)
        most = self.goal.most_macs(macs(module, preprocess.size, preprocess.channels))
        least = least_of(module, pruning, place)
        generator = torch.Generator().manual_seed(run.seed)
        found = chosen(module, pruning, most=most, least=least, run=run, generator=generator)
        return _Penalty(found.sets, found.gone(), self)


CHOICE = ("criterion", "round_to", "scope", "max_ratio", "layer_ratios", "keep", "images")
"""What a choice of channels has in common with a stage `prune`."""
