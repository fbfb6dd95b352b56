"""Logit standardization: Sun et al., 2024 (arXiv:2403.01427), section 3 and algorithm 1."""

import torch
from torch import Tensor

SMALLEST_VARIANCE = 1e-6
"""Logits that lie closer together than this are not spread any further: their gradient would have no bound."""


def standardized(logits_NK: Tensor) -> Tensor:
    """Each row minus its mean, divided by its standard deviation over the classes (by K, not K - 1).

    Student and teacher then agree where their logits differ by a shift and a factor of each image, so a small student
    need not reach the teacher's range. The paper divides the result by the base temperature, as `soft_targets` does.
    The authors' code divides by the deviation with K - 1 instead; its temperature T is T * sqrt(K / (K - 1)) here.
    A row of equal logits gives zeros.
    """
    centred_NK = logits_NK - logits_NK.mean(1, keepdim=True)
    variance_N1 = centred_NK.square().mean(1, keepdim=True)
    return centred_NK / torch.sqrt(variance_N1.clamp_min(SMALLEST_VARIANCE))
