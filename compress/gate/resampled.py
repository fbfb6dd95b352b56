"""Two networks on the same images where an answer is not simply right or wrong: the bootstrap of their difference.

Efron & Tibshirani, An Introduction to the Bootstrap, 1993, sections 13.3 and 16.4; images are drawn in pairs, so that
what both find hard weighs on both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.gate.paired import CONFIDENCE

DRAWS = 1000
"""A p-value is no finer than twice one of these."""

Score = Callable[[np.ndarray, np.ndarray, np.ndarray], float]
"""Of outputs (N, K), labels (N, K) and how often each image counts (N,)."""


@dataclass(frozen=True)
class Resampled:
    """Both scores, and their difference under images drawn anew."""

    images: int
    baseline: float
    candidate: float
    differences: np.ndarray
    """(DRAWS,) of candidate less baseline, in ascending order."""

    @property
    def difference(self) -> float:
        return self.candidate - self.baseline

    @property
    def p_value(self) -> float:
        """Two-sided: twice the smaller part of the draws in which the difference is gone or turned round."""
        draws = len(self.differences)
        smaller = min(int((self.differences <= 0).sum()), int((self.differences >= 0).sum()))
        return min(1.0, 2 * (smaller + 1) / (draws + 1))

    @property
    def told(self) -> str:
        p = self.p_value
        said = f"= {p:.2g}" if p > 2 / (len(self.differences) + 1) else f"< {2 / len(self.differences):.2g}"
        return f"{self.baseline:.4f} to {self.candidate:.4f} on {self.images} images, bootstrap p {said}"

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Of `difference`: percentiles of the draws."""
        low, high = np.quantile(self.differences, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def as_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "difference": self.difference,
            "interval": list(self.interval()),
            "bootstrap_p": self.p_value,
            "draws": len(self.differences),
        }


def resampled(*, baseline: np.ndarray, candidate: np.ndarray, labels: np.ndarray, score: Score) -> Resampled:
    """From what both answered and what is right, of the same images in the same order. The draws are always the same.

    Scores of one draw are of the same images, so a baseline against itself differs by nothing in every draw.
    """
    if not baseline.shape == candidate.shape == labels.shape or not len(labels):
        raise ValueError(f"not the same images: {baseline.shape}, {candidate.shape}, {labels.shape}")
    count, rng = len(labels), np.random.default_rng(0)
    differences = []
    for _ in range(DRAWS):
        counts_N = np.bincount(rng.integers(0, count, count), minlength=count)
        differences.append(score(candidate, labels, counts_N) - score(baseline, labels, counts_N))
    once = np.ones(count)
    return Resampled(
        count, score(baseline, labels, once), score(candidate, labels, once), np.sort(np.array(differences))
    )
