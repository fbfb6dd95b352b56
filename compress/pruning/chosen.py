"""Which channels a criterion would take out of a network as it is now, without taking them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.models.coupled import Coupled, find_coupled
from compress.product import KeptChannels, Run
from compress.pruning.choose import choose, kept_channels
from compress.pruning.goal import cost_of
from compress.pruning.limits import widths
from compress.pruning.ranking import Ranking, rank

if TYPE_CHECKING:
    from compress.pruning.network import Pruning


@dataclass(frozen=True)
class Survey:
    """The sets of coupled channels of a network, each ranked, with the widths that the recipe allows."""

    sets: Sequence[Coupled]
    ranked: Sequence[Ranking]
    notes: Sequence[str]
    """A sentence for each set that has to stay whole."""


@dataclass(frozen=True)
class Chosen:
    """The sets of coupled channels of a network, ranked, and how many units of each would stay."""

    sets: Sequence[Coupled]
    ranked: Sequence[Ranking]
    stay: Sequence[int]

    def gone(self) -> list[Tensor]:
        """bool (units,) for each set: which units would go."""
        found = []
        for coupled, ranking, count in zip(self.sets, self.ranked, self.stay, strict=True):
            units = torch.zeros(coupled.units, dtype=torch.bool)
            units[list(ranking.order[: coupled.units - count])] = True
            found.append(units)
        return found

    def kept(self, module: nn.Module) -> dict[str, KeptChannels]:
        """What every layer of the network would keep; untouched layers are absent."""
        return kept_channels(module, self.sets, self.ranked, self.stay)


def chosen(
    module: nn.Module,
    pruning: Pruning,
    *,
    most: int,
    least: Mapping[str, float],
    run: Run,
    generator: torch.Generator,
) -> Chosen:
    """What stays where `module` (on the CPU) may need `most` multiply-adds and its layers `least` outputs.

    Where even the narrowest network needs more, that one. Raises ModelError as `rank` does.
    """
    found = surveyed(module, pruning, least=least, run=run, generator=generator)
    cost = cost_of(module, found.sets, run.data.preprocess.size, run.data.preprocess.channels)
    return Chosen(found.sets, found.ranked, choose(found.ranked, cost, most=most, scope=pruning.scope))


def surveyed(
    module: nn.Module,
    pruning: Pruning,
    *,
    least: Mapping[str, float],
    run: Run,
    generator: torch.Generator,
    last: Callable[[Coupled], Tensor] | None = None,
) -> Survey:
    """What may go from `module` (on the CPU), in which order, where its layers need `least` outputs.

    `last` tells of a set which units go after all others of the network, bool (units,). Raises ModelError as `rank` and
    `find_coupled` do.
    """
    sets, notes = find_coupled(module, run.data.preprocess.size, run.data.preprocess.channels)
    ranked = rank(
        module,
        sets,
        [widths(coupled, module, least, pruning.round_to) for coupled in sets],
        criterion=pruning.criterion,
        images=pruning.images,
        run=run,
        generator=generator,
        last=[] if last is None else list(map(last, sets)),
    )
    return Survey(sets, ranked, notes)
