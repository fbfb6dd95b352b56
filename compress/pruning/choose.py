"""How many channels stay where, and which: from rankings and a cost to the channels that every layer keeps."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from torch import nn

from compress.models.coupled import Coupled, Side, without
from compress.product import KeptChannels
from compress.pruning.goal import Cost
from compress.pruning.ranking import Ranking


def choose(ranked: Sequence[Ranking], cost: Cost, *, most: float, scope: Literal["global", "local"]) -> list[int]:
    """How many units of each ranking stay, so that their `cost` is at most `most` and close to it.

    `global`: blocks of all rankings go in the order of their mean score until the cost is low enough; then whatever
    still fits is put back, the last block first. `local`: blocks go so that every ranking loses the same share.
    """
    blocks: list[tuple[float, int, int]] = []
    for index, ranking in enumerate(ranked):
        units = len(ranking.order)
        for level, (more, fewer) in enumerate(zip(ranking.widths, ranking.widths[1:], strict=False), start=1):
            block = ranking.scores[units - more : units - fewer]
            blocks.append((sum(block) / len(block) if scope == "global" else 1 - fewer / units, index, level))
    blocks.sort(key=lambda block: block[0])  # stable, so a ranking's blocks stay in their order

    def widths(levels: Sequence[int]) -> list[int]:
        return [ranking.widths[level] for ranking, level in zip(ranked, levels, strict=True)]

    def levels_after(count: int) -> list[int]:
        levels = [0] * len(ranked)
        for _, index, level in blocks[:count]:
            levels[index] = level
        return levels

    count = bisect_left(range(len(blocks) + 1), -most, key=lambda count: -cost(widths(levels_after(count))))
    while count < len(blocks) and cost(widths(levels_after(count))) > most:  # fewer channels may take longer
        count += 1
    levels = levels_after(count)
    # Not in `local`: cheap layers fit, and would stay whole while the others shrink.
    for _, index, level in reversed(blocks[:count]) if scope == "global" else ():
        if levels[index] == level:
            levels[index] -= 1
            if cost(widths(levels)) > most:
                levels[index] = level
    return widths(levels)


def kept_channels(
    module: nn.Module, sets: Sequence[Coupled], ranked: Sequence[Ranking], stay: Sequence[int]
) -> dict[str, KeptChannels]:
    """What every layer keeps when the last `stay` units of each ranking do; untouched layers are absent."""
    gone: defaultdict[tuple[str, Side], set[int]] = defaultdict(set)
    for coupled, ranking, count in zip(sets, ranked, stay, strict=True):
        units = list(ranking.order[: coupled.units - count])
        if units:
            for place, channels in coupled.places.items():
                gone[place].update(channels[units].flatten().tolist())
    return without(module, gone)
