"""What a network's answers lose where one set of coupled channels becomes narrower, alone: its sensitivity.

Measured, and not summed from the scores of single channels: those are small changes of a network that is whole, and say
little of half a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.models.coupled import Coupled
from compress.models.structure import resize
from compress.product import Batch, Run
from compress.pruning.choose import kept_channels
from compress.pruning.divergence import divergence
from compress.pruning.ranking import Ranking
from compress.tasks import task_of

POINTS = 5
"""Widths at which a set is measured, its narrowest among them."""


@dataclass(frozen=True)
class Curve:
    """How the answers change as one set narrows and all others stay whole."""

    layers: tuple[str, ...]
    """Whose outputs the set's channels are, in the order of the module."""
    units: int
    widths: tuple[int, ...]
    """Units that stay, falling from all of them."""
    kl: tuple[float, ...]
    """Mean divergence of the answers from those of the whole network, in nats; 0 at the first width."""
    score: tuple[float, ...]
    """The task's score on the same images: accuracy, where there are classes."""

    def losses(self, widths: Sequence[int]) -> np.ndarray:
        """Nats at each of those widths: convex in what is removed.

        Between measured widths on lines. Where the measured curve flattens, it goes on as steeply as before: a network
        that answers by chance loses nothing more, but what is taken from it then cannot be trained back.
        """
        removed = self.units - np.asarray(self.widths, np.float64)
        rise = np.diff(np.maximum.accumulate(np.asarray(self.kl, np.float64)))
        slopes = np.maximum.accumulate(rise / np.maximum(np.diff(removed), 1))
        convex = np.concatenate([[0.0], np.cumsum(slopes * np.diff(removed))])
        losses: np.ndarray = np.interp(self.units - np.asarray(widths, np.float64), removed, convex)
        return losses

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.layers[0],
            "layers": list(self.layers),
            "units": self.units,
            "widths": list(self.widths),
            "kl": list(self.kl),
            "accuracy": list(self.score),
        }


def curves(
    module: nn.Module, sets: Sequence[Coupled], ranked: Sequence[Ranking], batches: Sequence[Batch], run: Run
) -> list[Curve]:
    """One curve for each set: its units go in the order of their ranking, to at most `POINTS` narrower widths.

    BatchNorm takes its statistics from each batch of images itself, which is what measuring them again comes to.
    `module` stays as it is.
    """
    whole = copy.deepcopy(module)
    whole_NK = answers(whole, batches, run)
    rules = task_of(run.data.task)
    labels_N = torch.cat([batch.labels_N for batch in batches]).cpu().numpy()

    def score(outputs_NK: Tensor) -> float:
        return rules.score(rules.kept(outputs_NK.numpy()), labels_N)

    order = {name: place for place, (name, _) in enumerate(module.named_modules())}
    measured = [_points(ranking.widths) for ranking in ranked]
    found = []
    with run.progress.steps("prune  sensitivity", sum(map(len, measured)) - len(measured)) as advance:
        for number, (coupled, widths) in enumerate(zip(sets, measured, strict=True)):
            kl, scores = [0.0], [score(whole_NK)]
            for width in widths[1:]:
                stay = [width if other == number else sets[other].units for other in range(len(sets))]
                narrow = copy.deepcopy(module)
                resize(narrow, kept_channels(narrow, sets, ranked, stay))
                outputs_NK = answers(narrow, batches, run)
                kl.append(max(0.0, float(divergence(outputs_NK, whole_NK, run.data.task).mean())))
                scores.append(score(outputs_NK))
                advance(f"{coupled.name} {width}/{coupled.units}: {kl[-1]:.3g} nats")
            layers = tuple(sorted(coupled.producers, key=lambda name: order[name])) or (coupled.name,)
            found.append(Curve(layers, coupled.units, tuple(widths), tuple(kl), tuple(scores)))
    return found


def as_json(found: Sequence[Curve], module: nn.Module) -> list[dict[str, Any]]:
    """The curves in the order of the module's layers, as stages keep them."""
    order = {name: place for place, (name, _) in enumerate(module.named_modules())}
    return [curve.as_json() for curve in sorted(found, key=lambda curve: order[curve.layers[0]])]


def answers(module: nn.Module, batches: Sequence[Batch], run: Run) -> Tensor:
    """float32 (N, K) on the CPU: the outputs, with BatchNorm's statistics of each batch; `module` is changed."""
    module.eval().to(run.device)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.train()
    with torch.no_grad():
        return torch.cat([module(batch.images_NCHW.to(run.device)).float().cpu() for batch in batches])


def _points(widths: Sequence[int]) -> list[int]:
    """The first, the last, and some between, evenly."""
    places = np.linspace(0, len(widths) - 1, min(POINTS + 1, len(widths))).round().astype(int)
    return [widths[place] for place in dict.fromkeys(places.tolist())]
