"""Which images are for training and which for evaluation, decided by their content."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holdout(hashes: Sequence[str], classes_N: np.ndarray, part: float) -> np.ndarray:
    """bool (N,): the images that are kept for evaluation, `part` of each class but at least one.

    The choice follows the hashes alone: no seed, file name or other class changes it, and equal images of a class
    fall on the same side.
    """
    chosen: set[tuple[int, str]] = set()
    for label in np.unique(classes_N).tolist():
        distinct = sorted({hashes[index] for index in np.flatnonzero(classes_N == label).tolist()})
        chosen |= {(label, value) for value in distinct[: max(1, round(part * len(distinct)))]}
    return np.array([pair in chosen for pair in zip(classes_N.tolist(), hashes, strict=True)], bool)
