"""Weights that share a few values: Han et al., 2016 (arXiv:1510.00149), section 3."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_ROUNDS = 300


def clustered(values: Tensor, clusters: int) -> Tensor:
    """`values` with each in the place of the mean of its cluster: k-means in one dimension.

    It begins with `clusters` values at equal distances from the least to the largest, which keeps the large weights,
    that matter most (section 3.2). At most that many different values are left, fewer where a cluster runs empty.
    """
    flat = values.detach().double().flatten()
    if len(torch.unique(flat)) <= clusters:
        return values.detach().clone()
    centres = torch.linspace(float(flat.min()), float(flat.max()), clusters, dtype=torch.float64, device=flat.device)
    codes = torch.full(flat.shape, -1, dtype=torch.int64, device=flat.device)
    for _ in range(MOST_ROUNDS):
        nearest = torch.bucketize(flat, (centres[1:] + centres[:-1]) / 2)
        if torch.equal(nearest, codes):
            break
        codes = nearest
        counts = torch.bincount(codes, minlength=clusters)
        means = torch.bincount(codes, flat, minlength=clusters) / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres)
    return centres[codes].reshape(values.shape).to(values.dtype)
