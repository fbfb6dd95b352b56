"""Which layer's rounding costs the output most: each alone on its grids, everything else in float."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from compress.doctor.switches import groups, rounding_only


@dataclass(frozen=True)
class Damage:
    """How far the output moves from that of the float network."""

    layer: str
    sqnr_db: float
    """Power of the float output over the power of the error; `inf` if nothing moved."""
    kl: float
    """KL(float || quantized) of the class probabilities, mean over the images, in nats."""
    moved: float
    """Fraction of images whose most probable class is another."""


@dataclass(frozen=True)
class Ranking:
    layers: tuple[Damage, ...]
    """The worst first."""
    total: Damage
    """All layers at once: what the int8 file will show before any training."""


def rank(prepared: fx.GraphModule, images_NCHW: Tensor, advance: Callable[[str], None] = lambda text: None) -> Ranking:
    """Every layer of a calibrated network by the damage its own rounding does: weights and the grid of its result.

    Runs the network once per layer. `prepared` is as before afterwards.
    """
    with torch.inference_mode():
        with rounding_only(prepared):
            exact = prepared(images_NCHW)
        found = []
        for layer, modules in groups(prepared).items():
            with rounding_only(prepared, modules):
                found.append(difference(layer, exact, prepared(images_NCHW)))
            advance(layer)
        was_training = prepared.training
        total = difference("all", exact, prepared.eval()(images_NCHW))
        prepared.train(was_training)
    return Ranking(tuple(sorted(found, key=lambda damage: (damage.sqnr_db, -damage.kl))), total)


def difference(layer: str, exact_NK: Tensor, moved_NK: Tensor) -> Damage:
    """What separates two outputs of the same images; classes lie on axis 1."""
    exact, moved = exact_NK.double(), moved_NK.double()
    divergence = F.kl_div(moved.log_softmax(1), exact.log_softmax(1), log_target=True, reduction="none").sum(1).mean()
    changed = (exact.argmax(1) != moved.argmax(1)).double().mean()
    return Damage(layer, sqnr_db(exact, moved), max(0.0, float(divergence)), float(changed))


def sqnr_db(exact: Tensor, rounded: Tensor) -> float:
    """Signal over rounding noise in dB; `inf` where nothing was rounded."""
    noise, power = float((exact - rounded).double().square().sum()), float(exact.double().square().sum())
    if not noise:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf
