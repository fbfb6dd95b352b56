"""One of K classes: cross entropy, and the part of the images whose largest output is their class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # scores are read where there is no torch
    from torch import Generator, Tensor

    from compress.product import Scale


def cross_entropy(
    logits_NK: Tensor, labels_N: Tensor, label_smoothing: float = 0.0, weights_K: Tensor | None = None
) -> Tensor:
    """The mean over the images that have a label; 0 where none has one.

    With `weights_K` of the classes, an image counts by its class's weight and the mean is the weighted one.
    """
    from torch.nn import functional as F

    from compress.product import NO_LABEL

    weight = None if weights_K is None else weights_K.to(logits_NK)
    mean = F.cross_entropy(logits_NK, labels_N, weight=weight, ignore_index=NO_LABEL, label_smoothing=label_smoothing)
    # The mean over no image is NaN.
    return mean if bool((labels_N != NO_LABEL).any()) else logits_NK.sum() * 0


def drawn(logits_NK: Tensor, generator: Generator) -> Tensor:
    """int64 (N,): a class for each image, drawn with the probabilities that the logits give."""
    import torch

    return torch.multinomial(logits_NK.softmax(1), 1, generator=generator)[:, 0]


def surprise(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """(N,): -log p of the class, in nats."""
    from torch.nn import functional as F

    return F.cross_entropy(logits_NK, labels_N, reduction="none")


def divergence(changed_NK: Tensor, whole_NK: Tensor) -> Tensor:
    """float (N,): KL(whole || changed) of the classes' probabilities, in nats."""
    from torch.nn import functional as F

    return F.kl_div(changed_NK.log_softmax(1), whole_NK.log_softmax(1), reduction="none", log_target=True).sum(1)


def decided(outputs_NK: np.ndarray) -> np.ndarray:
    """int64 (N,): the place of the largest output, ties to the lowest."""
    classes_N: np.ndarray = outputs_NK.argmax(1)
    return classes_N


def accuracy(classes_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Top-1 accuracy in [0, 1]."""
    return float((classes_N == labels_N).mean())


def balanced_accuracy(classes_N: np.ndarray, labels_N: np.ndarray) -> float:
    """The mean of each class's own accuracy, in [0, 1]: equal to the accuracy where all classes are as frequent."""
    own = [float((classes_N[labels_N == label] == label).mean()) for label in np.unique(labels_N)]
    return float(np.mean(own))


def same(outputs_a_NK: np.ndarray, outputs_b_NK: np.ndarray) -> np.ndarray:
    """bool (N,): whether both put an image into the same class."""
    found: np.ndarray = decided(outputs_a_NK) == decided(outputs_b_NK)
    return found


def details(
    classes_N: np.ndarray, labels_N: np.ndarray, names: Sequence[str], scale: Scale | None
) -> list[dict[str, Any]]:
    """Nothing: `verify` has the confusion of classes."""
    return []
