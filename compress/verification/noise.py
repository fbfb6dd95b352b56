"""What int8 costs, layer by layer, as signal-to-quantization-noise ratios (SQNR, in dB).

Three figures per layer, each 10 log10(sum x^2 / sum (x - q)^2):
`sqnr_db`   of its values in the int8 network: its own error and all that it inherits;
`own_db`    of its values against the float layer on the same, rounded inputs: its own error (weights, grid, clipping);
`output_db` of the network's output when the layer's own error is all that is wrong: what the layer costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from compress.verification.differences import finite, sqnr_db
from compress.verification.facts import Grid, short
from compress.verification.layers import Computing

WORST = 3


class Exact(Protocol):
    """A float network whose values can be read and disturbed."""

    name: str

    @property
    def output_tensor(self) -> str: ...

    def float_names(self) -> list[str]: ...

    def floats(self, images: np.ndarray, names: list[str]) -> dict[str, np.ndarray]: ...

    def floats_alone(self, images: np.ndarray, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def disturbed(self, images: np.ndarray, errors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def predict(self, images: np.ndarray) -> np.ndarray: ...


class Rounded(Computing, Protocol):
    """The int8 network."""

    grids: dict[str, Grid]

    @property
    def output_tensor(self) -> str: ...

    def predict(self, images: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class LayerNoise:
    layer: str
    sqnr_db: float
    own_db: float
    output_db: float

    def as_dict(self) -> dict[str, Any]:
        """Decibels are None where there is no error at all."""
        figures = {key: finite(getattr(self, key)) for key in ("sqnr_db", "own_db", "output_db")}
        return {"layer": self.layer, **figures}


@dataclass(frozen=True)
class Noise:
    """Of one int8 network against one float network."""

    exact: str
    rounded: str
    images: int
    output_db: float
    tensors: int
    """Quantized tensors of the int8 network."""
    layers: list[LayerNoise]
    """Those whose value the float network has too, in the order of execution."""

    @property
    def worst(self) -> list[LayerNoise]:
        """The layers which cost most at the output, the worst first; those that only move numbers cost nothing."""
        costly = [layer for layer in self.layers if np.isfinite(layer.output_db)]
        return sorted(costly, key=lambda layer: layer.output_db)[:WORST]

    def sentence(self) -> str:
        named = ", ".join(f"{short(layer.layer)} ({layer.output_db:.1f} dB)" for layer in self.worst)
        return f"{self.rounded} against {self.exact}: output {self.output_db:.1f} dB; most is lost in {named}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "exact": self.exact,
            "rounded": self.rounded,
            "images": self.images,
            "output_db": finite(self.output_db),
            "tensors": self.tensors,
            "matched": len(self.layers),
            "worst": [layer.layer for layer in self.worst],
            "layers": [layer.as_dict() for layer in self.layers],
        }


def measure(exact: Exact, rounded: Rounded, images: np.ndarray) -> Noise:
    """Every layer whose values both networks have by the same name; the others are left out (`tensors` counts all)."""
    steps = rounded.steps(images)
    twins = pairs(exact, rounded, list(steps))
    floats = exact.floats(images, list(twins.values()))
    twins = {name: twin for name, twin in twins.items() if floats[twin].shape == steps[name].shape}
    grids = rounded.grids
    nearest = {name: grids[name].nearest(floats[twin]) for name, twin in twins.items()}
    errors: dict[str, np.ndarray] = {}
    if twins:
        alone = rounded.alone(images, nearest)
        twins = {name: twin for name, twin in twins.items() if name in alone}
        exactly = exact.floats_alone(images, {twin: grids[name].real(nearest[name]) for name, twin in twins.items()})
        errors = {twin: grids[name].real(alone[name]) - exactly[twin] for name, twin in twins.items()}
    damaging = {twin: error for twin, error in errors.items() if error.any()}  # moving numbers costs nothing
    disturbed = exact.disturbed(images, damaging) if damaging else {}
    output = exact.predict(images)
    layers = [
        LayerNoise(
            layer=name,
            sqnr_db=sqnr_db(floats[twin], grids[name].real(steps[name])),
            own_db=sqnr_db(floats[twin], floats[twin] + errors[twin]),
            output_db=sqnr_db(output, disturbed[twin].reshape(output.shape)) if twin in disturbed else float("inf"),
        )
        for name, twin in twins.items()
    ]
    return Noise(
        exact=exact.name,
        rounded=rounded.name,
        images=len(images),
        output_db=sqnr_db(output, rounded.predict(images).reshape(output.shape)),
        tensors=len(steps),
        layers=layers,
    )


def pairs(exact: Exact, rounded: Rounded, names: Sequence[str]) -> dict[str, str]:
    """The float network's value for each of the tensors `names` of the int8 one: by name; outputs in any case."""
    available = set(exact.float_names())
    found = {name: name for name in names if name in available}
    output = rounded.output_tensor
    if output in names and output not in found and exact.output_tensor not in found.values():
        found[output] = exact.output_tensor
    return found
