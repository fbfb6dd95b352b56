"""How narrow each layer may become: the recipe's patterns, and widths that are multiples of a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field
from torch import nn

from compress.models.coupled import Coupled
from compress.models.patterns import matching
from compress.models.structure import sizes

Ratio = Annotated[float, Field(ge=0, lt=1)]
PRODUCER = "convolution or linear layer"


def least_widths(
    module: nn.Module, *, max_ratio: float, layer_ratios: Mapping[str, float], keep: Sequence[str], place: str
) -> dict[str, float]:
    """By layer, how many outputs have to stay: `max_ratio` of them may go, or what the patterns allow instead."""
    outputs = {
        name: sizes(name, layer)[0]
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    }
    limits: dict[str, float] = {}
    for pattern, ratio in layer_ratios.items():
        for name in matching(pattern, list(outputs), field="layer_ratios", place=place, kind=PRODUCER):
            limits[name] = min(ratio, limits.get(name, ratio))
    for pattern in keep:
        limits.update(dict.fromkeys(matching(pattern, list(outputs), field="keep", place=place, kind=PRODUCER), 0.0))
    return {name: width * (1 - limits.get(name, max_ratio)) for name, width in outputs.items()}


def widths(coupled: Coupled, module: nn.Module, least: Mapping[str, float], round_to: int) -> list[int]:
    """How many units may stay: all, then all numbers that give the producing layers multiples of `round_to`."""
    layers = dict(module.named_modules())
    step, fewest = 1, 0.0
    for name in coupled.producers:
        if name in least:
            step = math.lcm(step, round_to // math.gcd(round_to, coupled.places[name, "outputs"].shape[1]))
            # Where these channels are only a part of the layer's, they may shrink by the layer's share.
            fewest = max(fewest, coupled.units * least[name] / sizes(name, layers[name])[0])
    smallest = step * max(1, math.ceil(round(fewest, 6) / step))
    largest = (coupled.units - 1) // step * step
    return [coupled.units, *range(largest, smallest - 1, -step)]
