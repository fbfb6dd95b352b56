"""Which of K labels hold: binary cross entropy of each label's logit, and mean average precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # scores are read where there is no torch
    from torch import Generator, Tensor

    from compress.product import Scale


def binary_cross_entropy(logits_NK: Tensor, labels_NK: Tensor, weights_K: Tensor | None = None) -> Tensor:
    """The mean over labels, and over the images whose labels are known; 0 where none are.

    With `weights_K`, what a label costs where it holds counts that many times.
    """
    from torch.nn import functional as F

    from compress.product import labelled

    rows = labelled(labels_NK)
    if not bool(rows.any()):
        return logits_NK.sum() * 0
    logits_NK, labels_NK = logits_NK[rows], labels_NK[rows].to(logits_NK.dtype)
    weight = None if weights_K is None else weights_K.to(logits_NK)
    return F.binary_cross_entropy_with_logits(logits_NK, labels_NK, pos_weight=weight)


def drawn(logits_NK: Tensor, generator: Generator) -> Tensor:
    """(N, K) of 0 and 1: each label by itself, drawn with the probability that its logit gives."""
    import torch

    return torch.bernoulli(logits_NK.sigmoid(), generator=generator)


def surprise(logits_NK: Tensor, labels_NK: Tensor) -> Tensor:
    """(N,): -log p of the labels of an image, which are independent given the image, in nats."""
    from torch.nn import functional as F

    return F.binary_cross_entropy_with_logits(logits_NK, labels_NK, reduction="none").sum(1)


def divergence(changed_NK: Tensor, whole_NK: Tensor) -> Tensor:
    """float (N, K): KL(whole || changed) of each label's yes and no, in nats."""
    from torch.nn import functional as F

    yes_NK, no_NK = F.logsigmoid(whole_NK), F.logsigmoid(-whole_NK)
    found = yes_NK.exp() * (yes_NK - F.logsigmoid(changed_NK))
    return found + no_NK.exp() * (no_NK - F.logsigmoid(-changed_NK))


def average_precision(logits_N: np.ndarray, holds_N: np.ndarray, counts_N: np.ndarray | None = None) -> float:
    """The sum over thresholds of precision times what recall gains there, as scikit-learn's of that name; NaN where the
    label holds nowhere.

    Images with equal logits come in together. `counts_N` is how often each image counts, or None for once.
    """
    counts = np.ones(len(logits_N)) if counts_N is None else counts_N.astype(np.float64)
    order = np.argsort(-logits_N, kind="stable")
    right, seen = np.cumsum((counts * holds_N)[order]), np.cumsum(counts[order])
    if not right[-1]:
        return float("nan")
    ordered = logits_N[order]
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
    right, seen = right[ends], seen[ends]
    gained = np.diff(right, prepend=0.0) / right[-1]
    # Where nothing was seen yet, nothing was gained either.
    return float((gained * right / np.maximum(seen, 1)).sum())


def mean_average_precision(logits_NK: np.ndarray, labels_NK: np.ndarray, counts_N: np.ndarray | None = None) -> float:
    """In [0, 1]: the mean over the labels that hold for some image; 0 where none does."""
    each = [
        average_precision(logits_N, holds_N, counts_N)
        for logits_N, holds_N in zip(logits_NK.T, labels_NK.T > 0.5, strict=True)
    ]
    known = [value for value in each if not np.isnan(value)]
    return float(np.mean(known)) if known else 0.0


def same(outputs_a_NK: np.ndarray, outputs_b_NK: np.ndarray) -> np.ndarray:
    """bool (N, K): whether both decide alike on a label, at probability 0.5: by the sign of the logit, 0 is a no."""
    found: np.ndarray = (outputs_a_NK > 0) == (outputs_b_NK > 0)
    return found


def details(
    logits_NK: np.ndarray, labels_NK: np.ndarray, names: Sequence[str], scale: Scale | None
) -> list[dict[str, Any]]:
    """For each label its average precision (None where it holds nowhere), for how many images it holds, and which part
    of the images is decided rightly at probability 0.5."""
    found = []
    for name, logits_N, holds_N in zip(names, logits_NK.T, labels_NK.T > 0.5, strict=True):
        precision = average_precision(logits_N, holds_N)
        found.append(
            {
                "name": name,
                "average_precision": None if np.isnan(precision) else precision,
                "positives": int(holds_N.sum()),
                "right": float(((logits_N > 0) == holds_N).mean()),
            }
        )
    return found


def positive_weights(labels_NK: np.ndarray) -> Tensor:
    """float32 (K,): images without a label over images with it, so that both weigh the same in the label's loss.

    At most 100, and 1 for a label that holds nowhere or everywhere.
    """
    import torch

    holds_K = (labels_NK > 0.5).sum(0)
    lacks_K = len(labels_NK) - holds_K
    weights_K = np.where((holds_K > 0) & (lacks_K > 0), lacks_K / np.maximum(holds_K, 1), 1.0)
    return torch.from_numpy(np.minimum(weights_K, 100.0).astype(np.float32))
