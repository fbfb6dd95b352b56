"""Two forms of an int8 network, layer by layer: how far their tensors are apart, and whose own arithmetic differs.

A difference of one step somewhere is a difference everywhere behind it. So each layer is also computed on its own: the
file under test gets, in the place of every tensor before it, the numbers of the other form. What differs then was made
by that layer. Between correct runtimes that is at most one step, where a value falls half-way between two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from compress.verification.facts import short


class Witness(Protocol):
    """One form of an int8 network."""

    name: str

    def steps(self, images: np.ndarray) -> dict[str, np.ndarray]: ...


class Computing(Witness, Protocol):
    """One whose layers can be run on given numbers."""

    def alone(self, images: np.ndarray, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class LayerDifference:
    layer: str
    values: int
    differing: int
    max_lsb: int
    """With all that the layers before it did."""
    alone_differing: int
    alone_lsb: int
    """On equal inputs."""

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class LayerComparison:
    """Of two forms of one network on the same images."""

    a: str
    b: str
    images: int
    tolerance_lsb: int
    """What a layer may differ on equal inputs."""
    layers: list[LayerDifference]
    """Of the tensors that both have, in the order of execution."""

    @property
    def worst_alone(self) -> int:
        return max((layer.alone_lsb for layer in self.layers), default=0)

    @property
    def first_wrong(self) -> LayerDifference | None:
        """The first layer whose own arithmetic differs by more than is allowed."""
        return next((layer for layer in self.layers if layer.alone_lsb > self.tolerance_lsb), None)

    @property
    def first_differing(self) -> LayerDifference | None:
        return next((layer for layer in self.layers if layer.differing), None)

    def sentence(self) -> str:
        """Where the difference begins, or that it is rounding alone."""
        wrong, first = self.first_wrong, self.first_differing
        if wrong is not None:
            return f"first at layer {short(wrong.layer)} (up to {wrong.alone_lsb} LSB on equal inputs)"
        if first is None:
            return f"no layer differs on these {self.images} images"
        return (
            f"no layer is wrong: each on its own is within {self.worst_alone} LSB, and rounding grows with depth from"
            f" layer {short(first.layer)} on"
        )

    def as_dict(self) -> dict[str, Any]:
        wrong, first = self.first_wrong, self.first_differing
        return {
            "a": self.a,
            "b": self.b,
            "images": self.images,
            "tolerance_lsb": self.tolerance_lsb,
            "first_wrong": wrong.layer if wrong else None,
            "first_differing": first.layer if first else None,
            "worst_alone_lsb": self.worst_alone,
            "layers": [layer.as_dict() for layer in self.layers],
        }


def compare_layers(
    a: Witness,
    b: Computing,
    images: np.ndarray,
    *,
    tolerance_lsb: int = 1,
    known: Mapping[str, np.ndarray] | None = None,
) -> LayerComparison:
    """Tensor by tensor; `b` is also computed layer by layer on the numbers of `a` (`known`, if they are at hand)."""
    ours = known if known is not None else a.steps(images)
    theirs = b.steps(images)
    given = {name: steps for name, steps in ours.items() if name in theirs and steps.shape == theirs[name].shape}
    alone = b.alone(images, given)
    layers = []
    for name, steps in given.items():
        if name not in alone:
            continue
        difference = np.abs(steps.astype(np.int64) - theirs[name])
        own = np.abs(steps.astype(np.int64) - alone[name])
        layers.append(
            LayerDifference(
                layer=name,
                values=int(difference.size),
                differing=int((difference > 0).sum()),
                max_lsb=int(difference.max(initial=0)),
                alone_differing=int((own > 0).sum()),
                alone_lsb=int(own.max(initial=0)),
            )
        )
    return LayerComparison(a.name, b.name, len(images), tolerance_lsb, layers)
