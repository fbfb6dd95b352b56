"""Stages for a network and images: how long to train, how much to take out, and what the network does not allow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from compress.errors import CompressError
from compress.stages import StageSettings
from compress.starting.images import Seen
from compress.starting.network import Chosen

SEEN = 60_000
"""Images that a training from random weights should see, and with pretrained weights a third of it."""
FEWEST, MOST = 5, 60
"""Epochs."""
GOALS = ((0.33, 16), (0.5, 16), (0.5, 8), (0.7, 4))
"""Part of the multiply-adds to keep and the multiple of channels, the boldest first."""


@dataclass(frozen=True)
class Planned:
    """A stage, or one that the network does not allow."""

    settings: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    """Why it is left out."""


def planned(images: Seen, network: Chosen) -> list[Planned]:
    """The stages of a first run, in their order."""
    batch = max(8, min(64, 2 ** ((max(1, images.train // 20)).bit_length() - 1)))
    wanted = SEEN // 3 if network.pretrained else SEEN
    epochs = max(FEWEST, min(MOST, round(wanted / max(1, images.train))))
    again = max(FEWEST, epochs // 2)
    fit = {"batch_size": batch} if batch != 64 else {}
    why_batch = {"batch_size": f"{images.train} images for training"} if fit else {}
    rate = {"optimizer": "adamw", "lr": 0.001} if network.pretrained else {"lr": round(0.05 * batch / 64, 4)}
    why_rate = {"lr": "gentle: the weights are good already" if network.pretrained else "for this batch size"}
    why_epochs = f"so that about {round(epochs * images.train, -3):,} images are seen"
    prune = _prune(network)
    quantize = {"use": "quantize", "epochs": max(1, again // 4), **fit, "distill": {}}
    teach = {"use": "distill", "epochs": again, **fit, **rate}
    after = {"use": "the network before pruning is the teacher", "epochs": "more of them win more back"}
    # Where nothing was taken out there is nothing to win back.
    middle = [prune] if prune.refused else [prune, Planned(teach, after)]
    why_quantize = {"use": "int8 with training; epochs: 0 calibrates only", "distill": "taught by the parent"}
    return [
        Planned(
            {"use": "train", "epochs": epochs, **fit, **rate},
            {"use": "the parent: baseline and teacher", "epochs": why_epochs, **why_batch, **why_rate},
        ),
        *middle,
        _allowed(network, quantize, why_quantize),
        Planned({"use": "export"}, {"use": "ONNX and TFLite"}),
        Planned({"use": "verify"}, {"use": "do all files compute what was trained?"}),
        Planned({"use": "benchmark"}, {"use": "in turns with the parent, which is also measured against itself"}),
    ]


def _prune(network: Chosen) -> Planned:
    """The boldest pruning that the network's widths allow."""
    refused = ""
    for share, multiple in GOALS:
        settings = {"use": "prune", "goal": {"macs": share}, "round_to": multiple}
        found = _allowed(network, settings, {})
        if not found.refused:
            reasons = {
                "goal": f"{share:.0%} of the multiply-adds stay; 0.5 is careful, 0.25 bold",
                "round_to": "a multiple of 16 is fast on x86 and ARM alike"
                if multiple == 16
                else "the network is too narrow for multiples of 16, which are faster",
            }
            return Planned(settings, reasons)
        refused = refused or found.refused
    return Planned({"use": "prune", "goal": {"macs": GOALS[0][0]}, "round_to": GOALS[0][1]}, refused=refused)


def _allowed(network: Chosen, settings: dict[str, Any], reasons: dict[str, str]) -> Planned:
    """The stage, asked about the network as `compress run` will ask it."""
    stage = TypeAdapter[Any](StageSettings).validate_python(settings)
    try:
        stage.check(network.module, network.preprocess)
    except CompressError as error:
        return Planned(settings, refused=f"{error.problem}; {error.way_out}".rstrip("; "))
    return Planned(settings, reasons)
