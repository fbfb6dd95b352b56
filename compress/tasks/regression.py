"""K numbers: squared error, or Huber's, and R2. Outputs and labels are standardised: see `compress.product.Scale`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # scores are read where there is no torch
    from torch import Generator, Tensor

    from compress.product import Scale

HUGE = 1e30
"""In place of an output that is no number."""
NEAR = 0.1
"""Two answers are the same that are no further apart than this part of the standard deviation over the images."""


def squared_error(
    outputs_NK: Tensor, labels_NK: Tensor, huber: float | None = None, weights_K: Tensor | None = None
) -> Tensor:
    """The mean over numbers, and over the images whose numbers are known; 0 where none are.

    An error beyond `huber` d counts d (2 |e| - d) in place of e^2 (Huber, 1964): outliers pull no harder than that.
    `weights_K` are factors of the numbers.
    """
    from torch.nn import functional as F

    from compress.product import labelled

    rows = labelled(labels_NK)
    if not bool(rows.any()):
        return outputs_NK.sum() * 0
    outputs_NK, labels_NK = outputs_NK[rows], labels_NK[rows].to(outputs_NK.dtype)
    if huber is None:
        errors_NK = F.mse_loss(outputs_NK, labels_NK, reduction="none")
    else:
        errors_NK = 2 * F.huber_loss(outputs_NK, labels_NK, reduction="none", delta=huber)
    return (errors_NK if weights_K is None else errors_NK * weights_K).mean()


def drawn(outputs_NK: Tensor, generator: Generator) -> Tensor:
    """(N, K): normal around the outputs, with a variance of 1.

    Squared error is the -log p of a normal distribution whose variance is the same for all images and numbers; it says
    nothing about how large that is. 1 is the variance of the standardised numbers, what is left where nothing is known.
    Another variance v divides every Fisher information by v, so that no order of channels depends on it.
    """
    import torch

    noise_NK = torch.randn(outputs_NK.shape, generator=generator, dtype=outputs_NK.dtype, device=generator.device)
    return outputs_NK + noise_NK.to(outputs_NK.device)


def surprise(outputs_NK: Tensor, labels_NK: Tensor) -> Tensor:
    """(N,): -log p of the numbers of an image under that distribution, in nats."""
    return ((outputs_NK - labels_NK).square() + math.log(2 * math.pi)).sum(1) / 2


def divergence(changed_NK: Tensor, whole_NK: Tensor) -> Tensor:
    """float (N,): half the squared distance, which in nats is how far two normal distributions of unit variance are
    from each other."""
    return (changed_NK - whole_NK).square().sum(1) / 2


def r2_of_each(outputs_NK: np.ndarray, labels_NK: np.ndarray, counts_N: np.ndarray | None = None) -> np.ndarray:
    """float64 (K,): one less the squared error over that of the mean, at most 1.

    A number that is the same for all images has 1 where it is met exactly and 0 where it is not, as scikit-learn says;
    an output that is no number is far off.
    """
    outputs_NK = np.nan_to_num(outputs_NK.astype(np.float64), nan=HUGE, posinf=HUGE, neginf=-HUGE)
    labels_NK = labels_NK.astype(np.float64)
    counts_N1 = np.ones((len(labels_NK), 1)) if counts_N is None else counts_N.astype(np.float64)[:, None]
    mean_K = (counts_N1 * labels_NK).sum(0) / counts_N1.sum()
    wrong_K = (counts_N1 * (labels_NK - outputs_NK) ** 2).sum(0)
    spread_K = (counts_N1 * (labels_NK - mean_K) ** 2).sum(0)
    found: np.ndarray = np.where(
        spread_K > 0, 1 - wrong_K / np.where(spread_K > 0, spread_K, 1), np.where(wrong_K == 0, 1.0, 0.0)
    )
    return found


def r2(outputs_NK: np.ndarray, labels_NK: np.ndarray, counts_N: np.ndarray | None = None) -> float:
    """The mean over the numbers: 1 is perfect, 0 is as good as saying the mean; no percentage."""
    return float(r2_of_each(outputs_NK, labels_NK, counts_N).mean())


def same(outputs_a_NK: np.ndarray, outputs_b_NK: np.ndarray) -> np.ndarray:
    """bool (N, K): whether answers are no further apart than a tenth of the first's standard deviation over the images.

    Of a single image, whose spread is unknown, no more than a tenth of the first's own value.
    """
    a_NK, b_NK = outputs_a_NK.astype(np.float64), outputs_b_NK.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # what is no number is near nothing
        spread = a_NK.std(0) if len(a_NK) > 1 else np.abs(a_NK)
        found: np.ndarray = np.abs(a_NK - b_NK) <= NEAR * spread
    return found


def details(
    outputs_NK: np.ndarray, labels_NK: np.ndarray, names: Sequence[str], scale: Scale | None
) -> list[dict[str, Any]]:
    """For each number its R2, and its mean absolute and root mean square error in the unit of the data."""
    units_K = np.asarray(scale.std) if scale else np.ones(len(names))
    errors_NK = (outputs_NK.astype(np.float64) - labels_NK) * units_K
    each = zip(
        names,
        r2_of_each(outputs_NK, labels_NK),
        np.abs(errors_NK).mean(0),
        np.sqrt((errors_NK**2).mean(0)),
        strict=True,
    )
    return [{"name": name, "r2": float(r2), "mae": float(mae), "rmse": float(rmse)} for name, r2, mae, rmse in each]


def scale_of(targets_NK: np.ndarray) -> Scale:
    """Mean and standard deviation of each number over the images where all are known; 1 where it never varies."""
    from compress.product import Scale

    known_NK = targets_NK[~np.isnan(targets_NK).any(1)].astype(np.float64)
    if not len(known_NK):
        return Scale(mean=(0.0,) * targets_NK.shape[1], std=(1.0,) * targets_NK.shape[1])
    std_K = known_NK.std(0)
    return Scale(mean=tuple(known_NK.mean(0).tolist()), std=tuple(np.where(std_K > 0, std_K, 1.0).tolist()))


def standardized(targets_NK: np.ndarray, scale: Scale) -> np.ndarray:
    """float32 (N, K): the numbers in the unit of the outputs."""
    found: np.ndarray = ((targets_NK.astype(np.float64) - scale.mean) / scale.std).astype(np.float32)
    return found
