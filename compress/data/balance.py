"""Classes of unequal size: to draw them equally often, or to let their mistakes cost more."""

from __future__ import annotations

from typing import Literal

import numpy as np

from compress.labels import Task
from compress.tasks.multi_label import positive_weights

Balance = Literal["none", "sampler", "loss"]
BETA = 0.999
"""How much each further image of a class adds, in the effective number of Cui et al.; they try 0.9 to 0.9999."""


def drawn_equally(groups_N: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """int64 (N,): numbers of the images of an epoch, as many as there are, each group as often as the others.

    A number is `index + N * again`, where `again` counts how often the image came earlier in the epoch. The images of
    a group follow one order that is shuffled anew when all have been drawn, and goes on from epoch to epoch: none comes
    a third time before all of its group have come twice.
    """
    count = len(groups_N)
    labels = np.unique(groups_N)
    drawn = []
    for place, label in enumerate(labels.tolist()):
        members = np.flatnonzero(groups_N == label)
        # Draws go round the groups: so many of the draws before this epoch, and before the next, were of this one.
        first, last = (
            (total - place + len(labels) - 1) // len(labels) for total in (epoch * count, (epoch + 1) * count)
        )
        chosen = []
        for round_ in range(first // len(members), -(-last // len(members))):
            order = np.random.default_rng((seed, round_, place, 0, 3)).permutation(members)
            start = round_ * len(members)
            chosen.append(order[max(0, first - start) : last - start])
        indices = np.concatenate([np.empty(0, np.int64), *chosen])
        # The how-manieth of equal indices each is: its place among them, once sorted.
        ordered = np.argsort(indices, kind="stable")
        runs = np.flatnonzero(np.diff(indices[ordered], prepend=-1))
        again = np.empty(len(indices), np.int64)
        again[ordered] = np.arange(len(indices)) - np.repeat(runs, np.diff(np.append(runs, len(indices))))
        drawn.append(indices + count * again)
    return np.concatenate(drawn)


def effective_weights(images_K: np.ndarray) -> np.ndarray:
    """float64 (K,), mean 1: what an image of each class counts in a loss, by how many images the class has.

    The inverse of the effective number of images, (1 - BETA^n) / (1 - BETA): Cui et al., 2019 (arXiv:1901.05555).
    """
    effective_K = (1 - BETA ** images_K.astype(np.float64)) / (1 - BETA)
    weights_K = 1 / np.maximum(effective_K, 1)
    return weights_K / weights_K.mean()


def label_weights(targets: np.ndarray, labels: int, task: Task) -> tuple[float, ...]:
    """What the loss of each output is weighted with: of a class by its effective number, of a label where it holds."""
    if task == "multi_label":
        return tuple(positive_weights(targets).tolist())
    return tuple(effective_weights(np.bincount(targets, minlength=labels)).tolist())
