"""What an exported file says of itself, as text keys and values: the same in ONNX and TFLite."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from pydantic import ValidationError

from compress import __version__
from compress.labels import Task
from compress.product import Preprocess, Scale

MODES = {1: "L", 3: "RGB"}
"""The number of channels, and what files and Pillow call such images."""


def preprocess_of(metadata: Mapping[str, str]) -> Preprocess | None:
    """What `metadata` wrote into a file; None for a file without it. Files of earlier versions are RGB and bilinear."""
    try:
        said = json.loads(metadata["compress.preprocess"])
        given = {key: said[key] for key in ("size", "mean", "std", "crop")}
        channels = {mode: number for number, mode in MODES.items()}[said.get("channels", "RGB")]
        given |= {"channels": channels, "interpolation": said.get("resize", "bilinear")}
        return Preprocess.model_validate_json(json.dumps(given))
    except (KeyError, ValueError, TypeError, ValidationError):
        return None


def task_said(metadata: Mapping[str, str]) -> Task:
    """What the file with this `metadata` was made for; classification, if it says nothing else."""
    return next((task for task in get_args(Task) if task == metadata.get("compress.task")), "classification")


def metadata(
    *,
    kind: str,
    layout: Literal["NCHW", "NHWC"],
    preprocess: Preprocess,
    labels: Sequence[str],
    recipe_hash: str,
    task: Task = "classification",
    scale: Scale | None = None,
) -> dict[str, str]:
    """Keys under `compress.`: how to make the input of an image, what the outputs mean, where the file is from.

    `compress.task` is there where outputs are no classes, `compress.units` where a number is output * std + mean.
    """
    meaning: dict[str, str] = {} if task == "classification" else {"compress.task": task}
    meaning |= {"compress.units": scale.model_dump_json()} if scale else {}
    return {
        "compress.version": __version__,
        "compress.kind": kind,
        "compress.preprocess": json.dumps(
            {
                **preprocess.model_dump(exclude={"interpolation"}),
                "channels": MODES[preprocess.channels],
                "layout": layout,
                "resize": preprocess.interpolation,
                "scale": 1 / 255,
            }
        ),
        "compress.labels": json.dumps(list(labels), ensure_ascii=False),
        **meaning,
        "compress.recipe": recipe_hash,
    }
