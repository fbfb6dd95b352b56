"""Which class every image got from every file, kept so that two runs can be compared image by image.

`verify` writes it to its folder as `answers.json`; a baseline holds the same. Arrays are base64 of little-endian
whole numbers: `np.frombuffer(base64.b64decode(x["data"]), x["dtype"]).reshape(x["shape"])`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NAME = "answers.json"
SAMPLE = "sample.npy"
"""Some of the images, real-valued and channels first, as the files were fed with them."""
SAMPLE_IMAGES = 32
SAMPLE_BYTES = 4 * 2**20
"""At most, but four images at least: a baseline lies in a repository."""


@dataclass(frozen=True)
class Answers:
    labels_N: np.ndarray
    """(N,) classes; in other tasks (N, K), standardised in a regression."""
    top1: Mapping[str, np.ndarray]
    """By file: the place of the largest output, ties to the lowest, (N,); in other tasks the outputs, (N, K)."""
    sample: tuple[int, ...] = ()
    """Which images `sample.npy` holds."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "labels": packed(self.labels_N),
            "top1": {name: packed(top1_N) for name, top1_N in self.top1.items()},
            "sample": list(self.sample),
        }


def from_dict(value: Mapping[str, Any]) -> Answers:
    """Raises KeyError, TypeError or ValueError for what `as_dict` did not write."""
    labels_N = unpacked(value["labels"])
    top1 = {str(name): unpacked(array) for name, array in value["top1"].items()}
    sample = tuple(int(index) for index in value["sample"])
    if labels_N.ndim != (2 if labels_N.dtype.kind == "f" else 1) or not labels_N.size:
        raise ValueError("labels are no list")
    for name, top1_N in top1.items():
        if top1_N.shape != labels_N.shape:
            raise ValueError(f"{name} has answers of shape {top1_N.shape}, the labels {labels_N.shape}")
    if any(not 0 <= index < len(labels_N) for index in sample):
        raise ValueError("the sample names images that are not there")
    return Answers(labels_N, top1, sample)


def write(path: Path, answers: Answers) -> None:
    path.write_text(json.dumps(answers.as_dict()) + "\n", encoding="utf-8")


def chosen(count: int, image_bytes: int) -> list[int]:
    """Images to keep as a sample of `count`: by lot, always the same one, for steps of equal size may miss a class."""
    wanted = min(count, SAMPLE_IMAGES, max(4, SAMPLE_BYTES // image_bytes))
    return np.sort(np.random.default_rng(0).permutation(count)[:wanted]).tolist()


def packed(array: np.ndarray) -> dict[str, Any]:
    """For JSON: whole numbers in as few bytes each as hold them all, at least two unless they came in one."""
    dtypes = ("<i1", "<u1") if array.dtype.itemsize == 1 else ("<i2", "<i4", "<i8")
    fits = [name for name in dtypes if _holds(np.dtype(name), array)]
    if array.dtype.kind == "f":
        fits = [array.dtype.newbyteorder("<").str]
    small = np.ascontiguousarray(array.astype(fits[0]))
    return {"dtype": fits[0], "shape": list(array.shape), "data": base64.b64encode(small.tobytes()).decode()}


def unpacked(value: Mapping[str, Any]) -> np.ndarray:
    """Raises KeyError, TypeError or ValueError for what `packed` did not write."""
    dtype = np.dtype(str(value["dtype"]))
    shape: Sequence[int] = [int(size) for size in value["shape"]]
    if dtype.kind not in "iuf":
        raise ValueError(f"no numbers: {dtype}")
    try:
        content = base64.b64decode(value["data"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
    return np.frombuffer(content, dtype).reshape(shape)


def _holds(dtype: np.dtype[Any], array: np.ndarray) -> bool:
    if array.dtype.kind == "f":
        return False
    limits = np.iinfo(dtype)
    return not array.size or (int(array.min()) >= limits.min and int(array.max()) <= limits.max)
