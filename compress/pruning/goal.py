"""What pruning aims at, and what a network would cost with fewer channels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag
from torch import nn

from compress.errors import ModelError
from compress.measures import layers as measured_layers
from compress.models.coupled import Coupled, Side, depthwise
from compress.settings import Settings
from compress.targets import Runtime

Cost = Callable[[Sequence[int]], float]
"""A network's multiply-adds, or its time, as a function of how many units of each set of coupled channels stay."""


class MacGoal(Settings):
    """A share of the multiply-adds of the network that is to be pruned."""

    macs: float = Field(gt=0, lt=1)

    def most_macs(self, before: int) -> int:
        """What the pruned network may need, given what the whole one needs."""
        return int(self.macs * before)

    def refuse_out_of_reach(self, before: int, least: float, place: str) -> None:
        """Raises ModelError where even the narrowest network, of `least` multiply-adds, needs more."""
        if least > self.most_macs(before):
            raise ModelError(
                place,
                f"`goal: {{macs: {self.macs:g}}}` is out of reach: under these limits "
                f"{math.ceil(1000 * least / before) / 1000:g} of the multiply-adds remain",
                "raise max_ratio or layer_ratios, lower round_to, or keep fewer layers",
            )


class TimeGoal(Settings):
    """How fast the int8 file has to be on the recipe's target."""

    runtime: Runtime = "litert"
    """The one that will run it."""
    threads: int = Field(default=1, ge=1)


class FpsGoal(TimeGoal):
    """Frames per second of the int8 file."""

    fps: float = Field(gt=0)

    @property
    def text(self) -> str:
        return f"fps: {self.fps:g}"

    def most_us(self, parent_us: float) -> float:
        """Microseconds that the pruned network's int8 file may take."""
        return 1e6 / self.fps


class SpeedupGoal(TimeGoal):
    """How many times as fast as the float file of the parent, in the same runtime, the int8 file has to be."""

    speedup: float = Field(gt=1)

    @property
    def text(self) -> str:
        return f"speedup: {self.speedup:g}"

    def most_us(self, parent_us: float) -> float:
        """Microseconds that the pruned network's int8 file may take, where the parent's float file takes so many."""
        return parent_us / self.speedup


GOALS = ("macs", "fps", "speedup")


def _which(section: Any) -> str | None:
    """The goal that a section means, by its key or the one most like it; None where it names two."""
    if not isinstance(section, dict):
        return next((name for name in GOALS if hasattr(section, name)), GOALS[0])
    found = [name for name in GOALS if name in section]
    if found:
        return found[0] if len(found) == 1 else None
    close = [match for key in section for match in get_close_matches(str(key), GOALS, 1)]
    return close[0] if close else GOALS[0]


Goal = Annotated[
    Annotated[MacGoal, Tag("macs")] | Annotated[FpsGoal, Tag("fps")] | Annotated[SpeedupGoal, Tag("speedup")],
    Discriminator(
        _which,
        custom_error_type="no_such_goal",
        custom_error_message=f"give one of {', '.join(GOALS)}",
    ),
]


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
