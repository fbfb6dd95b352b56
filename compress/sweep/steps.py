"""What a sweep computes, and in which order: a tree of stages in which cells part where their recipes do.

Cells with the same network, data, seed and first stages have the same first results. One of them, the first, runs
these; when it is done the others take them and all go on at once, so that no worker waits for what another computes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.recipe import Recipe

MEASURES = "benchmark"
"""The stage that wants the machine for itself."""


@dataclass(frozen=True)
class Step:
    """A stretch of a cell's run, from wherever it is."""

    cell: int
    until: int | None
    """Number of the stage to stop after, the network as it came being 0; None for all that is left."""
    after: int | None
    """Number of the step that has to be over before."""
    alone: bool = False
    """Whether nothing else may run meanwhile."""


def steps(recipes: Sequence[Recipe]) -> list[Step]:
    """The steps of a sweep, each after those it waits for; what is to be timed comes last, one cell after the other."""
    stages = [_stages(recipe) for recipe in recipes]
    found: list[Step] = []
    ends: dict[int, int | None] = {}

    def add(cell: int, depth: int, after: int | None) -> int:
        whole = depth > len(recipes[cell].stages)
        found.append(Step(cell, None if whole else depth - 1, after))
        return len(found) - 1

    def grow(cells: list[int], depth: int, after: int | None) -> None:
        """Steps of cells that share their first `depth` stages, which the step `after` computes."""
        if len(cells) == 1:
            ends[cells[0]] = add(cells[0], len(stages[cells[0]]), after)
            return
        common = depth
        while len({stages[cell][common] if common < len(stages[cell]) else "" for cell in cells}) == 1:
            if common == len(stages[cells[0]]):  # the same up to what is timed
                break
            common += 1
        # The network as it came is not worth a step: nothing was trained.
        begun = add(cells[0], common, after) if common > max(depth, 1) else after
        groups: dict[str, list[int]] = {}
        for cell in cells:
            groups.setdefault(stages[cell][common] if common < len(stages[cell]) else "", []).append(cell)
        for stage, members in groups.items():
            if stage:
                grow(members, common, begun)
            else:
                for cell in members:
                    done = begun is not None and found[begun] == Step(cell, None, found[begun].after)
                    ends[cell] = begun if done else add(cell, common, begun)

    groups: dict[str, list[int]] = {}
    for cell, own in enumerate(stages):
        groups.setdefault(own[0], []).append(cell)
    for members in groups.values():
        grow(members, 1, None)
    for cell, recipe in enumerate(recipes):
        if len(stages[cell]) <= len(recipe.stages):
            found.append(Step(cell, None, ends[cell], alone=True))
    return found


def _stages(recipe: Recipe) -> list[str]:
    """What decides the results of each stage up to the first that is timed; first of all the network as it came."""
    whole: dict[str, Any] = recipe.model_dump(mode="json", exclude={"name", "report", "target"})
    uses = [stage["use"] for stage in whole["stages"]]
    untimed = uses.index(MEASURES) if MEASURES in uses else len(uses)
    loaded = {name: value for name, value in whole.items() if name != "stages"}
    return [json.dumps(part, sort_keys=True) for part in (loaded, *whole["stages"][:untimed])]
