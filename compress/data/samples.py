"""What the network will see, for people to look at: a wrong mean or a mirrored text shows at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.data.loader import ImageData
from compress.data.pictures import save_picture
from compress.data.pixels import to_pixels
from compress.product import Batch, Data, Split

SAMPLES = 8
"""Images of each split."""
FOLDER = "samples"


def write_samples(data: Data, folder: Path, seed: int) -> dict[str, Any]:
    """Writes eight augmented training images and eight evaluation images below `folder`; what a manifest says of them.

    `samples`: each image's file, split, label, name in its source, and mean and standard deviation of what the network
    gets, for each channel. `classes`: how many images each class has (or have each label), by split.
    """
    splits: tuple[Split, ...] = ("train", "evaluation")
    samples = [
        sample
        for split in splits
        for batch in _batches(data, split, seed)
        for sample in _written(data, split, batch, folder)
    ]
    return {"samples": samples, "classes": counts(data)}


def counts(data: Data) -> dict[str, list[int]]:
    """Images of each class, or that have each label, in the order of `data.labels`, by split; empty for numbers."""
    if not isinstance(data, ImageData) or data.task == "regression":
        return {}
    found = {"train": data.train.targets, "evaluation": data.evaluation.targets}
    if data.task == "classification":
        return {split: np.bincount(targets, minlength=len(data.labels)).tolist() for split, targets in found.items()}
    return {split: (targets > 0.5).sum(0).tolist() for split, targets in found.items()}


def _batches(data: Data, split: Split, seed: int) -> list[Batch]:
    limit = min(SAMPLES, data.count(split))
    return list(data.batches(split, batch_size=limit, augment=split == "train", limit=limit, seed=seed))


def _written(data: Data, split: Split, batch: Batch, folder: Path) -> list[dict[str, Any]]:
    found = []
    pixels_NHWC = to_pixels(batch.images_NCHW, data.preprocess)
    for number, (image_CHW, pixels_HWC) in enumerate(zip(batch.images_NCHW, pixels_NHWC, strict=True)):
        name = f"{FOLDER}/{split}-{number:02d}.png"
        save_picture(folder / name, pixels_HWC)
        std_C, mean_C = torch.std_mean(image_CHW.double(), (1, 2), correction=0)
        found.append(
            {
                "image": name,
                "split": split,
                "label": _label(data, batch.labels_N[number]),
                "name": _name(data, split, batch, number),
                "mean": [round(value, 4) for value in mean_C.tolist()],
                "std": [round(value, 4) for value in std_C.tolist()],
            }
        )
    return found


def _label(data: Data, label: Tensor) -> str:
    if data.task == "classification":
        return data.labels[int(label)]
    if data.task == "multi_label":
        return ", ".join(name for name, held in zip(data.labels, label.tolist(), strict=True) if held) or "none"
    numbers = np.array(label.tolist())
    if data.scale is not None:
        numbers = numbers * data.scale.std + data.scale.mean
    return ", ".join(f"{name} {number:.4g}" for name, number in zip(data.labels, numbers, strict=True))


def _name(data: Data, split: Split, batch: Batch, number: int) -> str | None:
    """What the source calls the image; None where it says nothing."""
    images = (data.train if split == "train" else data.evaluation) if isinstance(data, ImageData) else None
    if images is None or not images.names or batch.indices_N is None:
        return None
    return images.names[int(batch.indices_N[number]) - images.first]
