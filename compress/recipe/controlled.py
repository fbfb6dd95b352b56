"""What a recipe may ask to be compared with: settings alone, `control` makes recipes of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.settings import Settings

ControlName = Literal[
    "uniform_width", "lower_resolution", "mac_pruning", "random_criterion", "ptq_only", "no_distillation"
]
CONTROLS: tuple[ControlName, ...] = (
    "uniform_width",
    "lower_resolution",
    "mac_pruning",
    "random_criterion",
    "ptq_only",
    "no_distillation",
)


class Controls(Settings):
    """Simpler networks of the same measured latency, trained as long: what the recipe's own has to beat."""

    which: tuple[ControlName, ...] | None = Field(default=None, min_length=1)
    """`uniform_width`: the same share of every layer; `lower_resolution`: the whole network, smaller images;
    `mac_pruning`: to a share of the multiply-adds; `random_criterion`: channels by lot; `ptq_only`: quantized, and
    nothing else; `no_distillation`: no teacher. null: all that the recipe's stages leave room for."""
    seeds: int = Field(default=1, ge=1, le=20)
    """Trainings of each control and of the recipe's own network, each from the same parent with a seed of its own."""
    tolerance: float = Field(default=0.02, gt=0, le=0.5)
    """How far a control's latency may be from the network's and be called equal."""
    searches: int = Field(default=6, ge=1, le=20)
    """Measurements for finding a control of equal latency; nothing is trained for them."""


def worded(name: str) -> str:
    """A control as people call it: `uniform width`."""
    return name.replace("_", " ").replace("ptq", "PTQ").replace("mac ", "MAC ")
