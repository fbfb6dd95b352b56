"""Which images are for training and which for evaluation, decided by their content."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.labels import Task

BINS = 10
"""Parts of equal size into which the first number of a regression is cut, to choose images over its whole range."""


def alike(targets: np.ndarray, task: Task) -> np.ndarray:
    """int64 (N,): groups to spread a choice of images over: classes, or tenths of a regression's first number.

    An image with several labels belongs to its rarest, so that no label is missed; one without any is a group of -1.
    """
    if task == "classification":
        return targets
    if task == "regression":
        rank = np.argsort(np.argsort(targets[:, 0], kind="stable"), kind="stable")
        return rank * BINS // max(1, len(targets))
    positive_NK = targets > 0.5
    often_K = np.where(positive_NK.any(0), positive_NK.sum(0), len(targets) + 1)
    rarest_N = np.where(positive_NK, often_K, len(targets) + 2).argmin(1)
    return np.where(positive_NK.any(1), rarest_N, -1)


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
