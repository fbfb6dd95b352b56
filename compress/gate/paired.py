"""Two networks on the same images: whether one is better, and by how much.

McNemar, Psychometrika 12, 1947, in its exact form; Dietterich, Neural Computation 10, 1998, on why it fits two
classifiers with one test set; Newcombe, Statistics in Medicine 17:2635, 1998, method 10, for the interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """What becomes of the images that a baseline and a candidate both answered."""

    both: int
    """Right in both."""
    lost: int
    """Right in the baseline alone."""
    gained: int
    """Right in the candidate alone."""
    neither: int

    @property
    def images(self) -> int:
        return self.both + self.lost + self.gained + self.neither

    @property
    def baseline(self) -> float:
        """Accuracy in [0, 1]."""
        return (self.both + self.lost) / self.images

    @property
    def candidate(self) -> float:
        """Accuracy in [0, 1]."""
        return (self.both + self.gained) / self.images

    @property
    def difference(self) -> float:
        """Accuracy gained; negative for a loss."""
        return (self.gained - self.lost) / self.images

    @property
    def p_value(self) -> float:
        return mcnemar(self.lost, self.gained)

    @property
    def told(self) -> str:
        p = f"= {self.p_value:.2g}" if self.p_value >= 1e-4 else "< 0.0001"
        return f"{self.gained} images gained, {self.lost} lost of {self.images}, McNemar's p {p}"

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Of `difference`."""
        low, high = difference_interval(self.both, self.gained, self.lost, self.neither, confidence)
        return low, high

    def as_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "both_right": self.both,
            "lost": self.lost,
            "gained": self.gained,
            "both_wrong": self.neither,
            "difference": self.difference,
            "interval": list(self.interval()),
            "mcnemar_p": self.p_value,
        }


def paired(*, baseline: np.ndarray, candidate: np.ndarray) -> Paired:
    """From whether each image was right, (N,) of booleans in the same order."""
    if baseline.shape != candidate.shape or baseline.ndim != 1 or not len(baseline):
        raise ValueError(f"not the same images: {baseline.shape} and {candidate.shape}")
    return Paired(
        both=int((baseline & candidate).sum()),
        lost=int((baseline & ~candidate).sum()),
        gained=int((~baseline & candidate).sum()),
        neither=int((~baseline & ~candidate).sum()),
    )


def mcnemar(lost: int, gained: int) -> float:
    """The two-sided p-value, exact: each image that only one of the two has right is a toss of a fair coin."""
    tosses, fewer = lost + gained, min(lost, gained)
    tail, term = 0, 1  # the sum of C(tosses, k) for k up to `fewer`, in whole numbers
    for k in range(fewer + 1):
        tail += term
        term = term * (tosses - k) // (k + 1)
    return min(1.0, 2 * tail / 2**tosses)  # whole numbers divide rightly where floats would overflow


def difference_interval(
    both: int, first_only: int, second_only: int, neither: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Of p1 - p2, two proportions of the same images: Newcombe's method 10.

    Wilson's interval of each, squared and added, less what their correlation takes away (with continuity correction).
    """
    n = both + first_only + second_only + neither
    p1, p2 = (both + first_only) / n, (both + second_only) / n
    low1, high1 = wilson(both + first_only, n, confidence)
    low2, high2 = wilson(both + second_only, n, confidence)
    margins = (both + first_only) * (second_only + neither) * (both + second_only) * (first_only + neither)
    product: float = both * neither - first_only * second_only
    if product > 0:
        product = max(product - n / 2, 0)
    phi = product / math.sqrt(margins) if margins else 0.0
    down1, up1, down2, up2 = p1 - low1, high1 - p1, p2 - low2, high2 - p2
    below = math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
    above = math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
    return max(-1.0, p1 - p2 - below), min(1.0, p1 - p2 + above)


def wilson(right: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, scale = right / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)
