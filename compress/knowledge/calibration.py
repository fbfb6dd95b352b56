"""Whether probabilities mean what they say: Guo et al., 2017 (arXiv:1706.04599), section 2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Bin:
    """The images whose confidence lies in (low, high]."""

    low: float
    high: float
    images: int
    accuracy: float | None
    """None where there is no image."""
    confidence: float | None


def reliability(logits_NK: Tensor, labels_N: Tensor, bins: int = 15) -> list[Bin]:
    """Accuracy and mean confidence of each of `bins` equally wide bins: the paper's reliability diagram.

    The confidence of an image is the probability of its most likely class, so bins below 1/K stay empty.
    """
    confidence_N, class_N = logits_NK.double().softmax(1).max(1)
    right_N = (class_N == labels_N).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence_N.device)
    place_N = torch.bucketize(confidence_N, edges[1:-1])  # bin m is (edge m, edge m + 1]
    found = []
    for number, (low, high) in enumerate(zip(edges.tolist(), edges.tolist()[1:], strict=False)):
        inside_N = place_N == number
        images = int(inside_N.sum())
        means = (float(values[inside_N].mean()) if images else None for values in (right_N, confidence_N))
        found.append(Bin(low, high, images, *means))
    return found


def expected_calibration_error(logits_NK: Tensor, labels_N: Tensor, bins: int = 15) -> float:
    """Distance of confidence and accuracy, averaged over the images of all bins; in [0, 1].

    0 for a network that is right in 80 percent of the cases in which it says 80 percent. It depends on the number of
    bins, and with few images it is too large: a few per bin are right more or less often by chance.
    """
    total = 0.0
    for part in reliability(logits_NK, labels_N, bins):
        if part.accuracy is not None and part.confidence is not None:
            total += part.images * abs(part.accuracy - part.confidence)
    return total / len(labels_N)


def negative_log_likelihood(logits_NK: Tensor, labels_N: Tensor) -> float:
    """Mean over images of -log of the probability of the label, in nats."""
    return float(F.cross_entropy(logits_NK.double(), labels_N))


def brier_score(logits_NK: Tensor, labels_N: Tensor) -> float:
    """Squared distance of the probabilities and the one-hot label, summed over classes, image mean; in [0, 2].

    Brier, Verification of forecasts expressed in terms of probability, 1950: over all classes, not one.
    """
    probabilities_NK = logits_NK.double().softmax(1)
    labels_NK = F.one_hot(labels_N, probabilities_NK.shape[1])
    return float((probabilities_NK - labels_NK).square().sum(1).mean())
