"""Two ways to train a network, each tried with several seeds and judged on the same images: is one of them better?

Two chances are at work, and a difference has to be larger than both: which images were asked (a sign-flip test, Fisher,
The Design of Experiments, 1935, section 21, which with one seed is McNemar's exact test), and what chance did to each
training (Student's t-test; Bouthillier et al., 2021, arXiv:2103.03098, on why seeds have to be counted).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

import numpy as np

ALPHA = 0.05
"""Below this p-value a difference is called one."""


@dataclass(frozen=True)
class Replicated:
    difference: float
    """Mean score of the first less that of the second."""
    images_p: float
    """How often chance in the images alone makes such a difference."""
    seeds_p: float | None
    """How often chance in the trainings alone does; None where one of the two was trained once."""

    @property
    def real(self) -> bool:
        """Whether neither chance explains the difference."""
        return self.difference != 0 and max(self.images_p, self.seeds_p or 0.0) < ALPHA

    def as_dict(self) -> dict[str, Any]:
        return {"difference": self.difference, "images_p": self.images_p, "seeds_p": self.seeds_p}


def replicated(first_SN: np.ndarray, second_SN: np.ndarray) -> Replicated:
    """From whether each image was right, bool (seeds, images), the same images in the same order."""
    if first_SN.shape != second_SN.shape or first_SN.ndim != 2 or not first_SN.size:
        raise ValueError(f"not the same seeds and images: {first_SN.shape} and {second_SN.shape}")
    gained_N = first_SN.sum(0, dtype=np.int64) - second_SN.sum(0, dtype=np.int64)
    return Replicated(
        float(first_SN.mean() - second_SN.mean()),
        sign_flip(gained_N),
        students_t(first_SN.mean(1).tolist(), second_SN.mean(1).tolist()),
    )


def sign_flip(differences_N: np.ndarray) -> float:
    """The two-sided p-value of a sum of whole numbers under random signs, exact.

    Of each size m there are n numbers, and their sum is m (2 B - n) with B binomial: a convolution over the sizes.
    """
    sizes, counts = np.unique(np.abs(differences_N[differences_N != 0]), return_counts=True)
    chances, most = np.ones(1), 0  # of sums from -most to most
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        own = np.zeros(2 * size * count + 1)
        own[:: 2 * size] = _binomial(count)
        chances, most = np.convolve(chances, own), most + size * count
    reached = np.abs(np.arange(-most, most + 1)) >= abs(int(differences_N.sum()))
    return min(1.0, float(chances[reached].sum()))


def _binomial(count: int) -> np.ndarray:
    """Chances of 0 to `count` heads in as many tosses."""
    return np.exp(
        [
            math.lgamma(count + 1) - math.lgamma(heads + 1) - math.lgamma(count - heads + 1) - count * math.log(2)
            for heads in range(count + 1)
        ]
    )


def students_t(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p-value for as many figures of each; None for less than two.

    Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.4: closed for the even number of degrees of freedom
    that two series of one length have.
    """
    if len(first) != len(second) or len(first) < 2:
        return None
    difference, spread = fmean(first) - fmean(second), variance(first) + variance(second)
    if spread == 0:
        return 1.0 if difference == 0 else 0.0
    freedom = 2 * len(first) - 2
    angle = math.atan2(abs(difference) / math.sqrt(spread / len(first)), math.sqrt(freedom))
    term, total = 1.0, 1.0
    for k in range(1, freedom // 2):
        term *= (2 * k - 1) / (2 * k) * math.cos(angle) ** 2
        total += term
    return max(0.0, 1 - math.sin(angle) * total)
