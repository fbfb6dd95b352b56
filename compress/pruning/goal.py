"""What pruning aims at, and what a network would cost with fewer channels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from pydantic import Field
from torch import nn

from compress.errors import ModelError
from compress.measures import layers as measured_layers
from compress.models.coupled import Coupled, Side, depthwise
from compress.settings import Settings

Cost = Callable[[Sequence[int]], int]
"""A network's multiply-adds as a function of how many units of each set of coupled channels stay."""


class MacGoal(Settings):
    """A share of the multiply-adds of the network that is to be pruned."""

    macs: float = Field(gt=0, lt=1)

    def most_macs(self, before: int) -> int:
        """What the pruned network may need, given what the whole one needs."""
        return int(self.macs * before)

    def refuse_out_of_reach(self, before: int, least: int, place: str) -> None:
        """Raises ModelError where even the narrowest network, of `least` multiply-adds, needs more."""
        if least > self.most_macs(before):
            raise ModelError(
                place,
                f"`goal: {{macs: {self.macs:g}}}` is out of reach: under these limits "
                f"{math.ceil(1000 * least / before) / 1000:g} of the multiply-adds remain",
                "raise max_ratio or layer_ratios, lower round_to, or keep fewer layers",
            )


def cost_of(module: nn.Module, sets: Sequence[Coupled], size: int, channels: int = 3) -> Cost:
    """The cost function of `module` on square images of `size` pixels; equals `macs` of the result."""
    table = measured_layers(module, size, channels)
    shapes = [
        (coupled.units, [(place, channels.shape[1]) for place, channels in coupled.places.items()]) for coupled in sets
    ]
    narrow = {name for name, layer in module.named_modules() if depthwise(layer)}

    def cost(stay: Sequence[int]) -> int:
        gone: defaultdict[tuple[str, Side], int] = defaultdict(int)
        for (units, places), count in zip(shapes, stay, strict=True):
            for place, each in places:
                gone[place] += (units - count) * each
        total = 0
        for layer in table:
            name, outputs, inputs = layer["name"], layer["outputs"], layer["inputs"]
            left = layer["macs"] * (outputs - gone[name, "outputs"]) // outputs
            total += left if name in narrow else left * (inputs - gone[name, "inputs"]) // inputs
        return total

    return cost
